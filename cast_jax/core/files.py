"""Atomic writes: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cast_jax.core.errors import UserError

logger = logging.getLogger(__name__)
LOCK = ".lock"
TEMPORARY = ".tmp"  # how the names of hidden files end that nobody needs once their writer is gone


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path``, synced, when the block ends, and vanishes if it fails; makes the folder.

    What a link points at is replaced, not the link; a pipe or a device is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes out of this block for the same ``folder``; also on network file systems that lock files.

    A process that ends, in whatever way, keeps nobody out any more, nor do the processes that it has started.

    Raises:
      UserError: another process is inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another run is at work in {folder} (it holds {folder / LOCK}); wait for its end, or stop it"
            ) from error
        except OSError as error:
            logger.warning("%s: files cannot be locked there (%s): start no second run in it", folder, error.strerror)
        yield


@contextlib.contextmanager
def writing_to(path: Path, called: str) -> Iterator[None]:
    """Within, what cannot be written is an error of the user, who calls the file or folder so (``--workdir``).

    Raises:
      UserError: saying so.
      OSError: the disk is full; names the path.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise UserError(f"{called} {path} cannot be written to ({error.strerror}); name another") from error


def is_full(error: BaseException) -> bool:
    """Whether this says that a disk, or a user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def make_folder(folder: Path, called: str) -> None:
    """Makes a folder, with all above it, before the long work whose results go there; see :func:`writing_to`."""
    with writing_to(folder, called):
        _make(folder)


def make_room(file: Path, called: str) -> None:
    """Makes the folder of a file before the long work whose result it becomes; see :func:`writing_to`."""
    with writing_to(file, called):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not file.exists() or file.is_file():
            _make(Path(os.path.realpath(file)).parent)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(4096))  # an empty file finds room on a full disk


def remove_temporaries(folder: Path) -> None:
    """Removes what writers that were killed have left below ``folder``; none may be at work there."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes ``data`` to ``path`` through a synced temporary file in the same folder; makes the folder.

    Text is UTF-8; what it cannot hold (the bytes of a file name in another encoding) is written as ``\\udcff``.
    """
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_new_json(contents: Mapping[Path, Any]) -> None:
    """Writes files by :func:`write_json`; none of them where one is there with other content.

    Raises:
      UserError: naming that one.
    """
    for path, value in contents.items():
        if path.exists() and json.loads(json.dumps(value)) != read_json(path):
            raise UserError(f"{path}: is there already, with other content; name another folder, or delete it")
    for path, value in contents.items():
        write_json(path, value)


def read_json(path: str | os.PathLike[str], hint: str = "") -> Any:
    """Reads a JSON file written by :func:`write_json`.

    Raises:
      UserError: it is damaged; names it and says the ``hint``.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged, or no JSON ({error})" + (f"; {hint}" if hint else "")) from error

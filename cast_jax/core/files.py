"""Atomic writes: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
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
    """A binary file that becomes ``path``, synced, when the block ends, and vanishes if it fails; makes the folder."""
    path = Path(path)
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


def make_folder(folder: Path, called: str) -> None:
    """Makes a folder, before the long work whose results go there.

    Args:
      folder: with all above it; may be there.
      called: what the user calls it, an argument or a field.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{called} {folder} cannot be written to ({error.strerror}); name another folder") from error


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

"""A write happens whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cast_jax.core.errors import UserError
from cast_jax.core.files import atomic_write, make_folder, make_room, only_writer, read_json, write_json


def test_text_bytes_and_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    atomic_write(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_what_utf8_cannot_hold_is_written_as_its_number(tmp_path):
    atomic_write(tmp_path / "file.txt", os.fsdecode(b"caf\xe9") + "\ud800\n")
    assert (tmp_path / "file.txt").read_text(encoding="utf-8") == "caf\\udce9\\ud800\n"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_old_file_stays_readable_while_the_new_one_is_written(tmp_path, monkeypatch):
    path, seen = tmp_path / "file.txt", []
    atomic_write(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()))
    atomic_write(path, "new")
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_json(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"x": object()})
    assert read_json(tmp_path / "x.json") == value


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path):
    program = "import sys, time; from pathlib import Path; from cast_jax.core.files import only_writer\n"
    program += "with only_writer(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another run is at work in"), only_writer(tmp_path):
            pass
        other.kill()
    with only_writer(tmp_path):
        pass


def test_what_a_link_points_at_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("one", "two"):  # also where nothing is there yet
        atomic_write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    make_room(tmp_path / "pipe", "--json")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_json(tmp_path / "pipe", [1])
        assert json.loads(read.result(60)) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_there_is_room_for_a_file_or_it_is_said(tmp_path):
    make_room(tmp_path / "a" / "b" / "file", "--json")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "c" / "file")
    make_room(tmp_path / "link", "--json")
    assert (tmp_path / "c").is_dir()
    (tmp_path / "file").write_text("old")
    make_room(tmp_path / "file", "--json")
    assert (tmp_path / "file").read_text() == "old"
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x", "File exists")):
        with pytest.raises(UserError, match=rf"--json {place} cannot be written to \({reason}\); name another"):
            make_room(place, "--json")


@pytest.mark.parametrize("make", [make_folder, make_room])
def test_a_full_disk_is_not_another_folder_s_matter(make, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=rf"\[Errno 28\] No space left on device: '{tmp_path}/x'"):
        make(tmp_path / "x", "--output")

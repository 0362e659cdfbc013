"""A whole ``cast`` of toy models on a disk that is full again and again: it says so, and in the end nothing is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from runs import Runs
from test_kill import TOY, results

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture
def disk(tmp_path):
    """Runs in a small file system of their own, its folder as seen from here, and a function to resize it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=64m none '{folder}'"
    if subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    with Runs(folder, *TOY, inside=(*NAMESPACE, "sh", "-c", f'{mount} && exec "$@"', "sh")) as runs:
        enter = ["nsenter", f"--target={runs.server.pid}", "--user", "--preserve-credentials", "--mount"]

        def resize(size: str) -> None:
            subprocess.run([*enter, "mount", "-o", f"remount,size={size}", str(folder)], check=True)

        runs("whole")  # the namespace is there once this has answered
        yield runs, Path(f"/proc/{runs.server.pid}/root{folder}"), resize


@pytest.mark.parametrize(
    "kibibytes",
    [pytest.param((300, 1700), id="two"), pytest.param(range(20, 3000, 150), id="many", marks=pytest.mark.full)],
)
def test_a_full_disk_is_told_and_a_larger_one_ends_the_run(disk, tmp_path, kibibytes):
    runs, folder, resize = disk
    expected, taken = results(folder / "whole"), _kibibytes(folder)
    said = tmp_path / "said.log"
    (folder / "stopped.log").symlink_to(said)  # what a run says is on another disk
    for size in kibibytes:
        resize(f"{taken + size}k")
        said.write_text("")
        answer = runs("stopped", fails=True)
        assert answer["codes"] == [1], said.read_text()[-3000:]
        last = said.read_text().splitlines()[-1]
        assert last.startswith("error: [Errno 28] No space left on device"), last
        assert last.endswith("free some, then run the same command again to continue")
    resize("64m")
    runs("stopped")
    assert results(folder / "stopped") == expected


def _kibibytes(folder: Path) -> int:
    """What the files take up."""
    return sum(path.lstat().st_blocks for path in folder.rglob("*")) // 2

"""Runs of whole casts in processes that are started by a fork, and killed at a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Runs:
    """A server of the commands of ``toy_cast.py``; a context manager."""

    def __init__(self, folder: Path, *arguments: str, inside: Sequence[str] = (), **options: Any) -> None:
        """Runs of one configuration in subfolders of ``folder``, ``inside`` a command that runs the server."""
        self.folder, self.arguments, self.options = folder, arguments, options
        program = [*inside, sys.executable, str(ROOT / "tests" / "toy_cast.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(
            program, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes
        )

    def __call__(self, name: str, *arguments: str, **options: Any) -> dict:
        """Runs in ``folder/name``, to the end or until it is killed, or else if it ``fails``."""
        fails = options.pop("fails", False)
        options = {"arguments": [*self.arguments, *arguments], **self.options, **options}
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps({"workdir": str(self.folder / name), **options}) + "\n")
        self.server.stdin.flush()
        found = json.loads(self.server.stdout.readline())
        assert fails or options.get("kill") or set(found["codes"]) == {0}, self.log(name)
        return found

    def log(self, name: str, number: int = 0) -> str:
        """What a process of the run wrote to the console."""
        path = self.folder / (f"{name}.{number}.log" if number else f"{name}.log")
        return path.read_text()

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

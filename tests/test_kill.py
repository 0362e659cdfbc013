"""A whole ``cast`` that is killed again and again, at any file operation, ends as an undisturbed one does, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOY = ("--config", "configs/coco.py:cast,smoke", "--config.steps.adapt.train.eval_every=2")
TOY += ("--config.steps.distill.train.save_every=1",)
DEMO = ("--config", "configs/demo.py:cast,smoke")


class Runs:
    """Runs of one command in many folders, each a fork of a process that has imported everything."""

    def __init__(self, folder: Path, command: tuple[str, ...], real: bool) -> None:
        self.folder, self.command, self.real = folder, command, real
        program = [sys.executable, str(Path(__file__).with_name("toy_cast.py"))]
        self.server = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, name: str, kill: tuple[int, float] | None = None) -> dict:
        """Runs in ``folder/name``, to the end or until it is killed."""
        arguments = [*self.command, "--workdir", str(self.folder / name)]
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps({"arguments": arguments, "real": self.real, "kill": kill}) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        assert answer["code"] == 0 or (kill and answer["code"] == -9), self.log(name)
        return answer

    def log(self, name: str) -> str:
        """The end of what a run wrote to the console."""
        return (self.folder / f"{name}.log").read_text()[-3000:]


@pytest.fixture
def runs(tmp_path):
    made = []

    def start(command, real=False):
        made.append(Runs(tmp_path, command, real))
        return made[-1]

    yield start
    for server in made:
        server.server.communicate()


def results(workdir: Path) -> dict[str, object]:
    """Everything that must not depend on when a run was stopped, whole, and the metrics without what tells the time."""
    patterns = ("*/exported/*", "pseudo_labels/*/*", "*/evaluation/*", "evaluation/*", "splits/*", "*.json")
    timed = ("summary.json", "environment.json")
    files = [path for pattern in patterns for path in workdir.glob(pattern) if path.name not in timed]
    found: dict[str, object] = {str(path.relative_to(workdir)): path.read_bytes() for path in files}
    for path in workdir.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        timeless = [{key: line[key] for key in line if not key.startswith(("speed/", "memory/"))} for line in lines]
        found[str(path.relative_to(workdir))] = timeless
    found |= {f"{path.relative_to(workdir)}": None for path in workdir.glob("*/overlays/*")}
    return found | {"finished": sorted(path.parent.name for path in workdir.glob("*/done.json"))}


def kill_often(runs: Runs, kills: int, changes: float) -> Counter[str]:
    """Kills runs ``kills`` times, each after about ``changes`` changes of files; returns which kinds were cut short."""
    whole = runs("whole")
    expected = results(runs.folder / "whole")
    assert len(expected) > 60
    seed = random.randrange(2**32)
    rng, struck, number = random.Random(seed), [], 0
    while len(struck) < kills:
        kill = 1 + int(rng.expovariate(1 / changes)), rng.choice([0.0, rng.uniform(0.0, 0.05)])
        answer = runs(f"killed-{number}", kill)
        if answer["code"]:
            struck.append(answer["event"])
        if answer["code"] == 0 or len(struck) == kills:
            runs(f"killed-{number}")
            found = results(runs.folder / f"killed-{number}")
            different = [name for name in expected | found if found.get(name, 0) != expected.get(name, 0)]
            assert not different, f"after kills at moments of seed {seed}: {different}; killed at {struck}"
            shutil.rmtree(runs.folder / f"killed-{number}")
            number += 1
    print(f"{kills} kills in {number} runs of {whole['changes']} changes each: {struck}")
    return Counter(kind_of(event) for event in struck)


def kind_of(event: str) -> str:
    """What a change of a file belonged to."""
    kinds = ("checkpoints", "shard-", "exported", "summary.json", "report.html", "evaluation", "overlays", "metrics")
    return next((kind for kind in kinds if kind in event), "another file")


def test_killed_at_any_file_operation_it_ends_with_the_same_bits(runs):
    kinds = kill_often(runs(TOY), 6, 180)
    assert kinds["checkpoints"], kinds


@pytest.mark.full
def test_sixty_kills_reach_everything_that_is_written(runs):
    kinds = kill_often(runs(TOY), 60, 90)
    assert set(kinds) >= {"checkpoints", "shard-", "exported", "evaluation", "summary.json"}, kinds


@pytest.mark.full
def test_fifty_kills_of_the_demo(runs):
    kinds = kill_often(runs(DEMO, real=True), 50, 60)
    assert kinds["checkpoints"], kinds

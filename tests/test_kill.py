"""A whole ``cast`` that is killed again and again, at any file operation, ends with an undisturbed one's bits."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from runs import Runs

TOY = ("--config", "configs/coco.py:cast,smoke", "--config.steps.adapt.train.eval_every=2")
TOY += ("--config.steps.distill.train.save_every=1",)
WRITTEN = ("checkpoints", "shard-", "stats.json", "exported", "evaluation", "done.json", "summary.json", "report.html")
DEMO = ("--config", "configs/demo.py:cast,smoke")


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
    """Kills runs ``kills`` times; returns what was being written then.

    Half of the kills come after about ``changes`` changes of files, the others at something in particular.
    """
    whole = runs("whole")
    expected = results(runs.folder / "whole")
    assert len(expected) > 60
    seed = random.randrange(2**32)
    rng, struck, number = random.Random(seed), [], 0
    while len(struck) < kills:
        text = rng.choice(["", rng.choice(WRITTEN)])
        after = 1 + int(rng.expovariate(1 / (2 if text else changes)))
        kill = text, after, rng.choice([0.0, rng.uniform(0.0, 0.05)])
        answer = runs(f"killed-{number}", kill=kill)
        assert answer["codes"] in ([0], [-signal.SIGKILL]), runs.log(f"killed-{number}")
        if answer["codes"] != [0]:
            struck.append(answer["event"])
        if answer["codes"] == [0] or len(struck) == kills:
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
    return next((kind for kind in WRITTEN if kind in event), "another file")


def test_killed_at_any_file_operation_it_ends_with_the_same_bits(tmp_path):
    with Runs(tmp_path, *TOY) as runs:
        kill_often(runs, 6, 180)


@pytest.mark.full
def test_many_kills_reach_everything_that_is_written(tmp_path):
    with Runs(tmp_path, *TOY) as runs:
        kinds = kill_often(runs, 100, 150)
    assert set(kinds) >= {"checkpoints", "shard-", "exported", "evaluation", "summary.json"}, kinds


@pytest.mark.full
def test_fifty_kills_of_the_demo(tmp_path):
    with Runs(tmp_path, *DEMO, real=True) as runs:
        kill_often(runs, 50, 150)

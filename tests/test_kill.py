"""A whole ``cast`` that is killed in several of its steps ends with the same files as an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A kill falls up to this many seconds after the file appears that says that a step has begun or is about to end.
WITHIN = 1.5
MOMENTS = (
    "finetune/metrics.jsonl",
    "adapt/checkpoints/*",
    "pseudo_labels/adapted/shard-*",
    "refine/exported/last.safetensors",
)


def start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cast_jax.main", "--config", "configs/coco.py:cast,smoke", "--workdir", workdir]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def results(workdir: Path) -> dict[str, bytes]:
    """Everything that should not depend on when a run was stopped: weights, pseudo-labels, evaluations, splits."""
    patterns = (
        "*/exported/*",
        "pseudo_labels/*/shard-*",
        "*/evaluation/*.json",
        "evaluation/*.json",
        "splits/*",
        "*.json",
    )
    timed = ("summary.json", "environment.json")
    files = [path for pattern in patterns for path in workdir.glob(pattern) if path.name not in timed]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


def test_killed_in_four_steps_it_ends_with_the_same_bits(tmp_path):
    seed = random.randrange(2**32)
    rng, killed = random.Random(seed), 0
    for pattern in MOMENTS:
        process = start(tmp_path / "killed")
        while process.poll() is None and not any((tmp_path / "killed").glob(pattern)):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, WITHIN))
        process.kill()
        _, error = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), error
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 3, "the moments come too late to interrupt anything"
    for name in ("killed", "whole"):
        process = start(tmp_path / name)
        _, error = process.communicate()
        assert process.returncode == 0, error
    whole = results(tmp_path / "whole")
    assert len(whole) > 20
    assert results(tmp_path / "killed") == whole, f"differs after kills at moments of seed {seed}"

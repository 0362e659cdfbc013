"""The loop on a toy recipe, stopped: by signals it ends as it should, and killing it changes nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import BATCH, Regression, ToyLoader, digest, run_toy, toy_config

from cast_jax.core import distributed, runtime
from cast_jax.core.errors import DataError
from cast_jax.core.logging import read_metrics
from cast_jax.trainer import finished, train

pytestmark = pytest.mark.usefixtures("toy_cache")


class SlowLoader(ToyLoader):
    """Sends a signal to this very process before a given batch."""

    def __init__(self, at: int, number: int):
        super().__init__()
        self.at, self.number = at, number

    def __next__(self):
        if self.position == self.at:
            os.kill(os.getpid(), self.number)
        return super().__next__()


@pytest.mark.usefixtures("interruptible")
def test_a_loader_whose_workers_a_signal_ended_is_not_to_blame(tmp_path):
    class Ended(SlowLoader):
        def __next__(self):
            batch = super().__next__()
            if self.position > 1:  # after the first update: before it a signal ends everything at once
                raise DataError("a worker process of the data loader died")
            return batch

    with pytest.raises(SystemExit) as stopped:
        train(Regression(), config=toy_config(20), folder=tmp_path / "toy", loader=Ended(1, signal.SIGTERM))
    assert stopped.value.code == 143
    with pytest.raises(DataError):
        train(Regression(), config=toy_config(20), folder=tmp_path / "toy", loader=Ended(2, signal.SIGTERM))


BEFORE_THE_FIRST_UPDATE = """
import logging, signal, sys
from pathlib import Path
from test_stopping import Regression, SlowLoader, toy_config
from cast_jax.trainer import train
logging.basicConfig()
train(Regression(), config=toy_config(20), folder=Path(sys.argv[1]), loader=SlowLoader(0, signal.SIGTERM))
"""


def test_a_signal_before_the_first_update_ends_the_process_at_once(tmp_path):
    """Of several processes one may wait in a call that Python cannot interrupt, for another that is gone already."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    }
    command = [sys.executable, "-c", BEFORE_THE_FIRST_UPDATE, str(tmp_path / "toy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 143, done.stderr
    assert "SIGTERM: stopping; run the same command again" in done.stderr
    assert list((tmp_path / "toy" / "checkpoints").iterdir()) == []


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, caplog, number, code):
    previous = signal.getsignal(number)
    config, folder = toy_config(20, save_every=100), tmp_path / "toy"
    with caplog.at_level("WARNING", "cast_jax"), pytest.raises(SystemExit) as stopped:
        train(Regression(), config=config, folder=folder, loader=SlowLoader(10, number))
    assert stopped.value.code == code
    assert "saved step 11; run the same command again to continue" in caplog.text
    assert signal.getsignal(number) is previous
    continued = train(Regression(), config=config, folder=folder, loader=ToyLoader())
    assert digest(continued.params) == digest(run_toy(tmp_path / "whole", 20).params)
    assert continued.images == 20 * BATCH
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [5, 10, 15, 20]


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, toy_cache):
    steps, seed = 60, random.randrange(2**32)
    rng = random.Random(seed)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(toy_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = [
        sys.executable,
        str(Path(__file__).parent / "toy_training.py"),
        str(tmp_path / "killed"),
        str(steps),
        "0.02",
    ]
    checkpoints = tmp_path / "killed" / "checkpoints"
    saved, kills = -1, 0
    while kills < 3:
        process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Wait for a checkpoint that this process made, then kill it anywhere: in a step, in a save, in a deletion.
        while process.poll() is None and newest(checkpoints) <= saved:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        _, error = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), error.decode()
        saved, kills = newest(checkpoints), kills + 1
    final = subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1]
    whole = run_toy(tmp_path / "whole", steps)
    assert final == digest(whole.params), f"differs after kills at moments of seed {seed}"
    training = [line for line in read_metrics(tmp_path / "killed" / "metrics.jsonl") if "loss/total" in line]
    assert [line["step"] for line in training] == list(range(5, steps + 1, 5))
    assert finished(tmp_path / "killed")["images"] == steps * BATCH


def newest(checkpoints: Path) -> int:
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_during_the_last_export_ends_the_run_after_it(tmp_path):
    folder, exported = tmp_path / "toy", []

    def export(params, which: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        exported.append(which)

    for _ in range(2):  # training, and what a finished step does
        with pytest.raises(SystemExit) as stopped:
            train(Regression(), config=toy_config(5), folder=folder, loader=ToyLoader(), export=export)
        assert stopped.value.code == 143
        assert finished(folder)["step"] == 5
    assert exported == ["last", "last"]


def test_the_process_that_serves_the_others_ends_last(monkeypatch):
    """Without it jax aborts those that have not ended yet."""
    monkeypatch.setattr(distributed, "several", lambda: True)
    waits = []
    for first in (True, False):
        monkeypatch.setattr(distributed, "is_first", lambda first=first: first)
        waits.append(distributed.patience())
    assert waits[0] > waits[1] == 0
    done = []
    monkeypatch.setattr(runtime.time, "sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(runtime, "end", lambda code: done.append(code))
    with runtime.StopSignals() as stop, stop.by_force(waits[0]):
        stop._end(signal.SIGTERM)
    assert done == [waits[0], 143]

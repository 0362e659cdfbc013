"""Several seeds as one table."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    spec = util.spec_from_file_location("run_seeds", Path(__file__).parents[1] / "scripts" / "run_seeds.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_means_and_sample_deviations(script):
    rows = [{"refine": {"mask_ap": value, "mask_ap50": 50.0, "seconds": 10 * value}} for value in (30.0, 32.0, 34.0)]
    table = script.aggregate(rows)
    assert table["refine"]["mask_ap"] == {"values": [30.0, 32.0, 34.0], "mean": 32.0, "std": 2.0}
    assert script.format_table(table).splitlines()[-1] == "| refine | 32.0 ± 2.0 | 50.0 ± 0.0 | 320 |"


def test_a_step_that_one_seed_alone_made_is_in_no_table(script):
    row = {"mask_ap": 1.0, "mask_ap50": 2.0, "seconds": 3.0}
    assert set(script.aggregate([{"distill": row, "refine": row}, {"distill": row}])) == {"distill"}


def test_every_seed_has_its_own_folder_and_split(script):
    overrides = ["--config.data.split=splits/a_seed{seed}.json"]
    options = argparse.Namespace(config="configs/coco.py:cast", workdir=Path("runs/seeds"), overrides=overrides)
    command = script.command_of(2, options)
    assert command[3:] == [
        "--config",
        "configs/coco.py:cast,seed=2",
        "--workdir",
        "runs/seeds/seed2",
        "--config.data.split=splits/a_seed2.json",
    ]


def call(script, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["run_seeds.py", *map(str, arguments)])
    script.main()


def test_seeds_that_run_together_leave_what_they_say(script, monkeypatch, tmp_path):
    monkeypatch.setattr(
        script, "command_of", lambda seed, options: ["sh", "-c", f"echo no such {seed} >&2; exit {seed}"]
    )
    with pytest.raises(SystemExit, match=rf"seeds \[1\] failed; see {tmp_path / 'seed1.out'}"):
        call(script, monkeypatch, "--config", "c.py:cast", "--workdir", tmp_path, "--seeds", 0, 1, "--parallel", 2)
    assert (tmp_path / "seed1.out").read_text() == "no such 1\n"


STOPPED = """
import runpy, sys
from importlib import util
spec = util.spec_from_file_location("run_seeds", sys.argv[1])
script = util.module_from_spec(spec)
spec.loader.exec_module(script)
child = "import signal, sys, time\\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\\n"
child += "print('seed', flush=True)\\ntime.sleep(60)"
script.command_of = lambda seed, options: [sys.executable, "-c", child]
sys.argv[1:] = ["--config", "c.py:cast", "--workdir", sys.argv[2], "--seeds", "0", "1", "2", *sys.argv[3:]]
script.main()
"""


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_signal_is_passed_on_to_the_runs_and_none_begins(script, tmp_path, parallel):
    command = [sys.executable, "-c", STOPPED, script.__file__, str(tmp_path), "--parallel", parallel]
    log = tmp_path / ("seed0.out" if parallel == "2" else "log")
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while not (log.exists() and b"seed" in log.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    said = "".join(path.read_text() for path in (log, tmp_path / "log"))
    assert "saved" in said
    assert "stopped; run the same command again" in said
    assert (tmp_path / "log").read_text().count("seed\n") + 2 * (parallel == "2") <= 2


def test_runs_beside_each_other_share_the_gpus(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "command_of", lambda *_: ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 1"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    arguments = ("--config", "c.py:cast", "--workdir", tmp_path, "--seeds", 0, 1, 2, "--parallel", 2)
    monkeypatch.setattr(script.util, "find_spec", lambda name: name)  # a plugin of jax
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,-1")
    with pytest.raises(SystemExit, match="failed"):
        call(script, monkeypatch, *arguments)
    given = [(tmp_path / f"seed{seed}.out").read_text().strip() for seed in range(3)]
    assert set(given) == {"3", "5"}  # a third GPU would divide no batches
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(9))))
    with pytest.raises(SystemExit, match="failed"):
        call(script, monkeypatch, *arguments)
    assert set((tmp_path / "seed0.out").read_text().split()) & {"0,1,2,3", "4,5,6,7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(SystemExit):
        call(script, monkeypatch, *arguments)
    assert "there are fewer GPUs (1)" in capsys.readouterr().err


def test_a_step_without_a_figure_leaves_the_others_theirs(script):
    row = {"mask_ap": None, "mask_ap50": 2.0, "seconds": 3.0}
    table = script.aggregate([{"distill": row}, {"distill": {**row, "mask_ap": 1.0}}])
    assert script.format_table(table).splitlines()[-1] == "| distill | n/a | 2.0 ± 0.0 | 3 |"


def test_what_has_no_table_is_said(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "command_of", lambda seed, options: ["true"])
    with pytest.raises(SystemExit, match=r"seeds \[3\] left no results: c\.py:check_data trains nothing"):
        call(script, monkeypatch, "--config", "c.py:check_data", "--workdir", tmp_path, "--seeds", 3)
    for arguments, message in (
        (("c.py:cast", 1, 1), "names one twice"),
        (("c.py:cast,seed=3", 1, 2), "--config says seed="),
        (("c.py:cast", 1, 2, "--", "--config.seed=5"), "--config.seed=5 says seed="),
    ):
        with pytest.raises(SystemExit):
            call(script, monkeypatch, "--config", arguments[0], "--workdir", tmp_path, "--seeds", *arguments[1:])
        assert message in capsys.readouterr().err

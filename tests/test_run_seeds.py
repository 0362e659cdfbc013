"""Several seeds as one table."""

from __future__ import annotations

import argparse
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

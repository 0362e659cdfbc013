"""Generated data in the published layouts goes through a whole cast of toy models."""

from __future__ import annotations

import json

import pytest
from runs import Runs


@pytest.mark.parametrize(("config", "classes"), [("cityscapes", 8), ("ade20k", 100)])
def test_a_published_layout_goes_through_a_cast(config, classes, tmp_path):
    with Runs(tmp_path, "--config", f"configs/{config}.py:cast,smoke") as runs:
        runs("run")
    assert len(json.loads((tmp_path / "run" / "classes.json").read_text())) == classes
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert {"finetune", "adapt", "distill", "refine", "student_supervised"} <= set(steps)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "MB an image to the devices" in log

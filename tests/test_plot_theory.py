"""The picture of the theory's quantities, from runs' metrics."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_theory.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("plot_theory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, negatives: int, values: list[float]) -> Path:
    (folder / "adapt").mkdir(parents=True)
    contrastive = {"num_negatives": negatives, "scope": "batch"}
    config = {"steps": {"adapt": {"objective": {"contrastive": contrastive}}}}
    (folder / "config.json").write_text(json.dumps(config))
    names = ("contrastive/margin", "contrastive/loss", "contrastive/false_negative_rate")
    lines = [{"step": 10 * i, **dict.fromkeys(names, value)} for i, value in enumerate(values)]
    lines.insert(1, {"step": 5, "evaluation/mask_ap": 3.0})
    (folder / "adapt" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_curves_are_the_runs(script, tmp_path, capsys):
    runs = [write_run(tmp_path / str(k), k, [k / 1000, 0.2, 0.9, 0.3]) for k in (128, 256)]
    out = tmp_path / "pictures" / "theory.png"
    out.parent.mkdir()
    script.main([*map(str, runs), "--out", str(out), "--window", "3"])
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size == (1800, 540)
    assert script.labels(runs, "adapt") == ["K = 128", "K = 256"]
    figure = script.draw({"a": script.read_curves(runs[1], "adapt")}, out, window=3)
    assert [axes.get_title() for axes in figure.axes] == list(script.PANELS.values())
    (line,) = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 10, 20, 30])
    np.testing.assert_allclose(line.get_ydata(), [0.228, 0.256, 0.3, 0.6])


def test_equal_settings_are_told_apart_by_their_folders(script, tmp_path):
    runs = [write_run(tmp_path / name, 64, [1.0]) for name in ("seed0", "seed1")]
    assert script.labels(runs, "adapt") == [str(run) for run in runs]


def test_what_is_missing_is_named(script, tmp_path):
    run = write_run(tmp_path / "run", 64, [1.0])
    with pytest.raises(SystemExit, match=r"error: .*distill/metrics.jsonl does not exist; trained steps there: adapt"):
        script.main([str(run), "--step", "distill"])
    (run / "adapt" / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n')
    with pytest.raises(SystemExit, match=r"has no contrastive/margin: was contrastive_weight 0"):
        script.main([str(run)])

"""``:check_data`` and its script: a report, pictures, and exit code 1 on errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cast_jax import pipeline
from cast_jax.core.errors import DataError
from cast_jax.data.datasets import open_datasets
from configs import coco

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_data.py"


@pytest.fixture
def run(tmp_path):
    """A configuration of generated images, written."""
    config = coco.get_config("check_data,smoke").to_dict()
    open_datasets(config["data"], tmp_path)
    return config, tmp_path


def test_sound_data(run):
    config, workdir = run
    report = pipeline.run(config, workdir)
    assert report["errors"] == []
    assert report == json.loads((workdir / "check_data" / "report.json").read_text(), object_hook=_tuples)
    assert [report["sets"][name]["images"] for name in ("labelled", "unlabelled", "val")] == [4, 8, 4]
    content = json.loads((workdir / "data" / "coco" / "val.json").read_text())
    assert report["sets"]["val"]["instances"] == len(content["annotations"])
    sheet, plain = (np.asarray(Image.open(workdir / "check_data" / f"{name}.jpg")) for name in ("val", "unlabelled"))
    assert min(sheet.shape[:2]) > min(plain.shape[:2])  # masks and names are drawn on enlarged images
    assert not (workdir / "config.json").exists()  # the workdir stays free for any run


def _tuples(entry):
    return {key: tuple(value) if isinstance(value, list) and key in SIZES else value for key, value in entry.items()}


SIZES = ("smallest", "largest", "commonest")


def test_errors_are_counted_to_the_end_and_raised(run):
    config, workdir = run
    folder = workdir / "data" / "coco"
    images = sorted((folder / "labelled").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:-200])
    Image.open(sorted((folder / "val").iterdir())[0]).save(folder / "unlabelled" / "leak.png")
    content = json.loads((folder / "labelled.json").read_text())
    content["annotations"][-1]["category_id"] = 1
    (folder / "labelled.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"(?s)3 errors, all of them in .*report\.json:.*cannot be read.*category_id 1"):
        pipeline.run(config, workdir)
    errors = json.loads((workdir / "check_data" / "report.json").read_text())["errors"]
    assert [name in error for name, error in zip(("truncated", "category_id 1", "leak.png"), errors, strict=True)]
    assert (workdir / "check_data" / "labelled.jpg").exists()


def test_the_script(run, monkeypatch, capfd):
    _, workdir = run
    folder = workdir / "data" / "coco"
    spec = importlib.util.spec_from_file_location("check_data_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["--labelled", folder / "labelled.json", "--unlabelled", folder / "unlabelled", "--val"]
    command = ["check_data.py", "coco", *arguments, folder / "val.json", "--output", workdir / "out"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    script.main()
    assert "no errors" in capfd.readouterr().err
    assert (workdir / "out" / "report.json").exists()
    monkeypatch.setattr("sys.argv", [*map(str, ["check_data.py", "coco", *arguments[:2], "--output", workdir / "one"])])
    script.main()
    assert list(json.loads((workdir / "one" / "report.json").read_text())["sets"]) == ["labelled"]
    (workdir / "file").touch()
    monkeypatch.setattr(
        "sys.argv", [*map(str, ["check_data.py", "coco", *arguments, "x", "--output", workdir / "file"])]
    )
    with pytest.raises(SystemExit, match=r"--output .*file cannot be written to"):
        script.main()
    monkeypatch.setattr("sys.argv", ["check_data.py", "coco"])
    with pytest.raises(SystemExit, match="nothing to check; give --labelled"):
        script.main()
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    next((folder / "val").iterdir()).write_bytes(b"")
    with pytest.raises(SystemExit, match="error: 1 errors"):
        script.main()
    content = json.loads((folder / "labelled.json").read_text()) | {"annotations": []}
    (folder / "bare.json").write_text(json.dumps(content))
    bare = ["--labelled", folder / "bare.json", "--labelled-images", folder / "labelled", "--output", workdir / "bare"]
    monkeypatch.setattr("sys.argv", list(map(str, ["check_data.py", "coco", *bare])))
    with pytest.raises(SystemExit, match=r"(?s)error: 1 errors.*bare\.json: none of the 4 images has an instance"):
        script.main()
    command = ["check_data.py", "cityscapes", "--root", str(workdir / "data" / "target")]
    monkeypatch.chdir(workdir)
    for more, sizes in (((), {"labelled": 12}), (("--labelled", "1"), {"labelled": 1, "unlabelled": 11})):
        monkeypatch.setattr("sys.argv", [*command, *more])
        script.main()
        sets = json.loads((workdir / "check_data" / "report.json").read_text())["sets"]
        assert {name: found["images"] for name, found in sets.items() if name != "val"} == sizes
    monkeypatch.setattr("sys.argv", [*command, "--labelled", "some"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2

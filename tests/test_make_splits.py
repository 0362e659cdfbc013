"""scripts/make_splits.py on small folders in the data sets' layouts, and a run's data by what it wrote."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import types
from importlib import util
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.errors import DataError
from cast_jax.data.datasets import open_datasets
from cast_jax.data.sources.ade20k import Ade20k
from cast_jax.data.sources.coco import Coco
from cast_jax.data.splits import read_split

NOTHING = {"train": 0, "val": 0, "source": 0, "image_size": (32, 64), "seed": 0}


def call(*arguments: object) -> types.SimpleNamespace:
    """Runs the script in this process."""
    spec = util.spec_from_file_location("make_splits", Path(__file__).parents[1] / "scripts" / "make_splits.py")
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("sys.argv", ["make_splits.py", *map(str, arguments)]),
    ):
        try:
            script.main()
        except SystemExit as stop:
            code = 1
            err.write(f"{stop.code}\n")
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def pixels(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def settings(**values) -> dict:
    return {"split_seed": 0, "split": "", "generated": NOTHING, **values}


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory) -> Path:
    """Twenty training images and one for validation."""
    root = tmp_path_factory.mktemp("cityscapes")
    for split, count in (("train", 20), ("val", 1)):
        for number in range(count):
            stem = f"ulm_{number:06d}_000019"
            pixels(root / "leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png", np.zeros((2, 2, 3), np.uint8))
            ids = np.full((2, 2), 26000, np.uint16)
            pixels(root / "gtFine" / split / "ulm" / f"{stem}_gtFine_instanceIds.png", ids)
    return root


def test_cityscapes_by_share(cityscapes, tmp_path):
    done = call("cityscapes", cityscapes, "--output", tmp_path, "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    splits = {
        (percent, seed): read_split(tmp_path / f"cityscapes_{percent}_percent_seed{seed}.json")
        for percent in (5, 10, 20, 30)
        for seed in (0, 1)
    }
    assert [len(splits[percent, 0].labelled) for percent in (5, 10, 20, 30)] == [1, 2, 4, 6]
    assert splits[10, 0] != splits[10, 1]
    for seed in (0, 1):
        assert set(splits[10, seed].labelled) < set(splits[20, seed].labelled) < set(splits[30, seed].labelled)
    split = splits[10, 1]
    assert len({*split.labelled, *split.unlabelled}) == 20

    path = tmp_path / "cityscapes_10_percent_seed1.json"
    data = open_datasets(settings(kind="cityscapes", root=str(cityscapes), labelled=298, split=str(path)), tmp_path)
    assert [data.labelled.record(i).image_id for i in range(2)] == list(split.labelled)
    assert [data.unlabelled.record(i).image_id for i in range(18)] == list(split.unlabelled)
    # The same images without a file: the seed is all it takes.
    drawn = open_datasets({**settings(kind="cityscapes", root=str(cityscapes), labelled=2), "split_seed": 1}, tmp_path)
    assert [drawn.labelled.record(i).image_id for i in range(2)] == list(split.labelled)


def test_cityscapes_has_the_literature_s_numbers(tmp_path):
    """2,975 images, whose files nobody opens; lists name them with or without their city's folder."""
    names = [f"city{i % 18}/city{i % 18}_{i:06d}_000019" for i in range(2_975)]
    for name in names:
        path = tmp_path / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listed = tmp_path / "literature.txt"
    listed.write_text("".join(f"{name}_gtFine_instanceIds.png\n" for name in names[::10]))
    for options in ((), ("--lists", listed)):
        done = call("cityscapes", tmp_path, "--output", tmp_path / "splits", *options)
        assert done.returncode == 0, done.stderr
    paths = [tmp_path / "splits" / f"cityscapes_{p}_percent_seed0.json" for p in (5, 10, 20, 30)]
    splits = [read_split(path) for path in (*paths, tmp_path / "splits" / "cityscapes_literature.json")]
    found = [(len(split.labelled), len(split.unlabelled)) for split in splits]
    assert found == [(149, 2_826), (298, 2_677), (595, 2_380), (893, 2_082), (298, 2_677)]
    for split in splits:
        assert len({*split.labelled, *split.unlabelled}) == 2_975
    for small, large in itertools.pairwise(splits[:4]):
        assert set(small.labelled) < set(large.labelled)
    assert splits[4].labelled[1] == "city10_000010_000019"


def test_a_list_of_the_literature_becomes_a_split(cityscapes, tmp_path):
    listed = tmp_path / "10_datalist.txt"
    listed.write_text("ulm_000003_000019_gtFine_instanceIds.png\nulm_000001_000019_gtFine_instanceIds.png\n")
    assert call("cityscapes", cityscapes, "--output", tmp_path, "--lists", listed).returncode == 0
    split = read_split(tmp_path / "cityscapes_10_datalist.json")
    assert (split.labelled, len(split.unlabelled)) == (("ulm_000003_000019", "ulm_000001_000019"), 18)
    listed.write_text("ulm_000099_000019_gtFine_instanceIds.png\n")
    done = call("cityscapes", cityscapes, "--output", tmp_path, "--lists", listed)
    assert done.returncode == 1
    assert "10_datalist.txt: 1 images are not in this split: ulm_000099_000019" in done.stderr


def test_ade20k_by_class(tmp_path):
    """Thirty images: every one has a person, a third a car, a tenth a flag."""
    for split, name, count in (("training", "train", 30), ("validation", "val", 1)):
        for number in range(1, count + 1):
            stem, ids = f"ADE_{name}_{number:08d}", np.zeros((2, 2, 3), np.uint8)
            ids[0, 0, :2] = (4, 1)
            ids[0, 1, :2] = (9, 2) if number % 3 == 0 else (0, 0)
            ids[1, 0, :2] = (100, 3) if number % 10 == 0 else (0, 0)
            pixels(tmp_path / "images" / split / f"{stem}.jpg", np.zeros((2, 2, 3), np.uint8))
            pixels(tmp_path / "annotations_instance" / split / f"{stem}.png", ids)
    done = call("ade20k", tmp_path, "--output", tmp_path, "--per-class", 2, "--subset", 15)
    assert done.returncode == 0, done.stderr
    assert "classes in fewer than 2 images: bed 0, windowpane 0" in done.stderr
    path = tmp_path / "ade20k_2_per_class_seed0.json"
    split = read_split(path)
    assert (len(split.labelled), len({*split.labelled, *split.unlabelled})) == (6, 15)

    given = settings(kind="ade20k", root=str(tmp_path), labelled=0, split=str(path), category_ids="sceneparse150")
    data = open_datasets(given, tmp_path)
    assert (len(data.labelled), len(data.unlabelled), len(data.val)) == (6, 9, 1)
    assert data.labelled.categories == data.val.categories
    assert (data.labelled.categories[99].id, data.unlabelled.categories) == (149, ())
    source = Ade20k(tmp_path, "training", images=split.labelled)
    found = [label for i in range(6) for label in source.classes(i)]
    assert found.count(99) >= 2
    assert found.count(8) >= 2

    with pytest.raises(DataError, match=r"config\.data\.split is not set; .*make_splits\.py ade20k"):
        open_datasets({**given, "split": ""}, tmp_path)
    done = call("ade20k", tmp_path, "--output", tmp_path, "--subset", 3537)
    assert done.returncode == 1
    assert "--subset 3537 must be above" in done.stderr
    assert call("ade20k", tmp_path, "--output", tmp_path, "--percent", 50).returncode == 0
    assert len(read_split(tmp_path / "ade20k_50_percent_seed0.json").labelled) == 15


@pytest.fixture
def coco(tmp_path) -> Path:
    """Ten images with a box each."""
    images = [{"id": 7 * i, "file_name": f"{i}.png", "height": 4, "width": 4} for i in range(10)]
    annotations = [
        {"id": i, "image_id": 7 * i, "category_id": 3, "segmentation": [[0, 0, 2, 0, 2, 2]]} for i in range(10)
    ]
    for image in images:
        pixels(tmp_path / "all" / image["file_name"], np.zeros((4, 4, 3), np.uint8))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "box"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path / "all.json"


def test_any_share_of_a_coco_set(coco, tmp_path):
    assert call("coco", coco, "--output", tmp_path, "--percent", 20).returncode == 0
    path = tmp_path / "all_20_percent_seed0.json"
    split = read_split(path)
    assert (len(split.labelled), len(split.unlabelled)) == (2, 8)
    given = settings(
        kind="coco",
        labelled=str(coco),
        val=str(coco),
        unlabelled="",
        labelled_images="",
        val_images="",
        split=str(path),
    )
    given["val_images"] = str(tmp_path / "all")
    data = open_datasets(given, tmp_path)
    assert tuple(data.labelled.record(i).image_id for i in range(2)) == split.labelled
    assert tuple(data.unlabelled.record(i).image_id for i in range(8)) == split.unlabelled
    assert (len(data.labelled.instances(0)), data.unlabelled.categories) == (1, ())
    with pytest.raises(DataError, match="unlabelled pool"):
        data.unlabelled.instances(0)

    path.write_text(path.read_text().replace("[\n    ", "[\n    8, ", 1))
    message = r"1 images are not in the training set: 8; name .* ids, such as 0, 7, 14, or .* such as 0\.png, 1\.png, "
    with pytest.raises(DataError, match=rf"seed0\.json: {message}"):
        open_datasets(given, tmp_path)
    (tmp_path / "named.txt").write_text("3.png\n./1.png\n14\n")
    data = open_datasets({**given, "split": str(tmp_path / "named.txt")}, tmp_path)
    assert [data.labelled.record(i).image_id for i in range(3)] == [21, 7, 14]
    assert len(data.unlabelled) == 7
    (tmp_path / "named.txt").write_text("3.png\n21\n")
    with pytest.raises(DataError, match=r"named\.txt: listed twice: 3\.png"):
        open_datasets({**given, "split": str(tmp_path / "named.txt")}, tmp_path)
    (tmp_path / "all.txt").write_text("\n".join(str(7 * i) for i in range(10)))
    with pytest.raises(DataError, match=r"all\.txt: labels every image"):
        open_datasets({**given, "split": str(tmp_path / "all.txt")}, tmp_path)


def test_a_list_of_a_coco_set_names_ids_or_files(coco, tmp_path):
    content = json.loads(coco.read_text())
    content["images"][4]["file_name"] = "sub/4.png"
    content["images"][5]["file_name"] = "7"  # the id of another
    content["images"][6]["file_name"] = content["images"][8]["file_name"]
    coco.write_text(json.dumps(content), encoding="utf-8-sig")
    listed = tmp_path / "lab.txt"
    listed.write_text("sub\\4.png\n7\n2.png\n")
    assert call("coco", coco, "--output", tmp_path, "--lists", listed).returncode == 0
    split = read_split(tmp_path / "all_lab.json")
    assert (split.labelled, split.unlabelled) == ((28, 7, 14), (0, 21, 35, 42, 49, 56, 63))
    assert call("coco", coco, "--output", tmp_path / "out", "--val-percent", 20).returncode == 0  # with its mark
    listed.write_text("8.png\nimages/2.png\n")
    done = call("coco", coco, "--output", tmp_path, "--lists", listed)
    assert "lab.txt: 2 images are not in the training set: 8.png, images/2.png; name images by their ids" in done.stderr


def test_a_coco_set_is_divided_into_training_and_validation(coco, tmp_path):
    (tmp_path / "all").rename(tmp_path / "images")
    options = ("--images", tmp_path / "images", "--output", tmp_path / "out")
    done = call("coco", coco, *options, "--val-percent", 20)
    assert done.returncode == 0, done.stderr
    parts = {name: tmp_path / "out" / f"all_{name}.json" for name in ("train", "val")}
    sources = {name: Coco(path, tmp_path / "images") for name, path in parts.items()}
    assert {name: len(source) for name, source in sources.items()} == {"train": 8, "val": 2}
    ids = [source.record(i).image_id for source in sources.values() for i in range(len(source))]
    assert sorted(ids) == [7 * i for i in range(10)]
    assert all(len(source.instances(i)) == 1 for source in sources.values() for i in range(len(source)))
    assert call("coco", coco, *options, "--val-percent", 1).returncode == 1
    parts["val"].unlink()
    parts["train"].write_text("{}")
    assert f"{parts['train']}: is there already" in call("coco", coco, *options, "--val-percent", 20).stderr
    assert not parts["val"].exists()
    assert parts["train"].read_text() == "{}"


def test_faults_are_one_message(coco, tmp_path):
    for arguments, message in (
        (("coco", tmp_path / "no.json"), "no such annotation file"),
        (("coco", coco, "--percent", 1), "--percent 1 of 10 images is 0"),
        (("coco", coco, "--percent", 100), "--percent must lie between 0 and 100"),
        (("ade20k", tmp_path), "ADEChallengeData2016"),
    ):
        done = call(*arguments, "--output", tmp_path / "out")
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
        assert message in done.stderr
    (tmp_path / "file").touch()
    done = call("coco", coco, "--percent", 50, "--output", tmp_path / "file")
    assert (done.returncode, "--output" in done.stderr, "cannot be written to" in done.stderr) == (1, True, True)


def test_another_data_set_s_split_is_left_alone(coco, tmp_path):
    arguments = ("coco", coco, "--output", tmp_path / "splits")
    assert call(*arguments, "--percent", 25).returncode == 0
    (path,) = (tmp_path / "splits").iterdir()
    assert call(*arguments, "--percent", 25).returncode == 0  # the same again
    before = path.read_text().replace('"labelled"', '"unlabelled"', 1)
    path.write_text(before)
    found = call(*arguments, "--percent", 25)
    assert found.returncode == 1
    assert f"{path}: is there already, with other content" in found.stderr
    assert path.read_text() == before

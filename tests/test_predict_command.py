"""``cast-predict``: from an export and a folder of images to a COCO JSON, resumable."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny import TINY, drawn

from cast_jax.core.annotations import Category, decode_mask
from cast_jax.core.errors import UserError
from cast_jax.export import save_weights
from cast_jax.models.registry import build_segmenter
from cast_jax.predict_command import load_predictor, main

CATEGORIES = (Category(24, "person"), Category(33, "bicycle"))
SIZE = (32, 64)


@pytest.fixture
def inputs(tmp_path):
    """Random weights that find something everywhere, and three images of different sizes, one in a sub-folder."""
    segmenter = build_segmenter(TINY, [category.name for category in CATEGORIES], SIZE)
    weights = tmp_path / "run" / "exported" / "last.safetensors"
    save_weights(weights, drawn(segmenter.abstract(), 0.5), {"model": TINY, "image_size": list(SIZE)}, CATEGORIES)
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name, (height, width) in {"a.png": (40, 50), "b/c.png": (64, 30), "d.png": (32, 64)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / "images" / name)
    return str(weights), str(tmp_path / "images"), str(tmp_path / "out")


def test_masks_of_a_folder_become_a_coco_json(inputs, tmp_path, capsys):
    main([*inputs, "--min-score", "0", "--pictures", "2", "--batch-size", "2"])
    coco = COCO(str(tmp_path / "out" / "predictions.json"))
    assert [coco.imgs[number]["file_name"] for number in (1, 2, 3)] == ["a.png", "b/c.png", "d.png"]
    annotations = coco.loadAnns(coco.getAnnIds())
    assert annotations
    assert {annotation["category_id"] for annotation in annotations} <= {24, 33}
    for annotation in annotations:
        image = coco.imgs[annotation["image_id"]]
        assert coco.annToMask(annotation).shape == (image["height"], image["width"])
        assert 0 <= annotation["score"] <= 1
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert f"{len(annotations)} masks in 3 images" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["pixels_hash"]) == 16

    # Again: what is there stays; other thresholds do not mix with it.
    shard = tmp_path / "out" / "shard-00000.jsonl"
    before = shard.stat().st_mtime_ns
    main([*inputs, "--min-score", "0"])
    assert shard.stat().st_mtime_ns == before
    shutil.copytree(tmp_path / "out", tmp_path / "out.replaced")
    (tmp_path / "out").rename(tmp_path / "out.importing")  # a review that was stopped between its renames
    main([*inputs, "--min-score", "0"])
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"has threshold 0\.0, not 0\.9; delete the folder"):
        main([*inputs, "--min-score", "0.9"])


def test_arrays_get_the_masks_that_the_command_writes(inputs, tmp_path):
    weights, folder, _ = inputs
    main([*inputs, "--min-score", "0.01", "--batch-size", "2"])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    images = [np.asarray(Image.open(f"{folder}/{image['file_name']}")) for image in written["images"]]
    predictor = load_predictor(weights, min_score=0.01, batch_size=2)
    for number, found in enumerate(predictor(images), 1):
        wanted = [annotation for annotation in written["annotations"] if annotation["image_id"] == number]
        assert len(found) == len(wanted) > 0
        assert found.category_ids.tolist() == [annotation["category_id"] for annotation in wanted]
        assert found.labels == tuple({24: "person", 33: "bicycle"}[number] for number in found.category_ids)
        np.testing.assert_allclose(found.scores, [annotation["score"] for annotation in wanted], rtol=1e-6)
        for mask, annotation in zip(found.masks, wanted, strict=True):
            np.testing.assert_array_equal(mask, decode_mask(annotation["segmentation"]))
    with pytest.raises(UserError, match=r"min_score is 2; it must lie in \[0, 1\]"):
        load_predictor(weights, min_score=2)
    with pytest.raises(UserError, match=f"is a folder; name the file, such as {weights}"):
        load_predictor(tmp_path / "run")


@pytest.mark.parametrize("name", ["a.png", "odd [1]*.PNG"])
def test_one_image_is_enough(inputs, tmp_path, name, capsys):
    weights, folder, output = inputs
    shutil.copy(f"{folder}/a.png", tmp_path / name)
    main([weights, str(tmp_path / name), output, "--min-score", "0"])
    assert "masks in 1 images" in capsys.readouterr().out
    assert [
        image["file_name"] for image in json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    ] == [name]
    (tmp_path / "no image.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no image\.jpg: cannot be read as an image"):
        main([weights, str(tmp_path / "no image.jpg"), output])


@pytest.mark.parametrize("output", ["file", "file/out"])
def test_where_nothing_can_be_written_is_said_before_images_are_read(inputs, tmp_path, output):
    weights, folder, _ = inputs
    (tmp_path / "file").write_text("")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")  # of which nothing is said yet
    with pytest.raises(SystemExit, match=rf"{output} cannot be written to \(.+\); name another"):
        main([weights, folder, str(tmp_path / output)])


def test_what_is_drawn_does_not_lie_among_the_images(inputs, capsys):
    weights, images, _ = inputs
    for output in (images, f"{images}/out", f"{images}/../images/b"):
        with pytest.raises(SystemExit):
            main([weights, images, output])
        assert "its pictures would be taken for images" in capsys.readouterr().err


def test_that_nothing_reached_the_threshold_is_said(inputs, capsys):
    main([*inputs, "--min-score", "1"])
    assert "nothing reached --min-score 1.0" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_a_line(inputs, tmp_path):
    weights, images, output = inputs
    config = tmp_path / "run" / "exported" / "config.json"
    for arguments, message in (
        ([weights, str(tmp_path / "nowhere"), output], "no such folder of images"),
        ([str(tmp_path / "no.safetensors"), images, output], "not a readable export"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    described = json.loads(config.read_text())
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")  # of which nothing is said yet
    config.write_text(json.dumps({"model": described["model"]}))
    with pytest.raises(SystemExit, match="do not describe a trained model"):
        main(list(inputs))
    with pytest.raises(SystemExit):
        main([*inputs, "--max-iou", "2"])
    config.write_text(json.dumps(described))
    with pytest.raises(SystemExit, match=r"1 unreadable images of 4"):
        main(list(inputs))
    main([*inputs, "--skip-unreadable", "--min-score", "1"])
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["images"] == 3


def test_the_warnings_of_a_run_are_given(inputs, tmp_path, capsys):
    exif, folder = Image.Exif(), tmp_path / "images"
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)).save(folder / "t.jpg", exif=exif)
    (folder / "cut.jpg").write_bytes((folder / "t.jpg").read_bytes()[:-300])
    (folder / "phone.heic").write_bytes(b"")
    main([*inputs, "--skip-unreadable", "--min-score", "1"])
    said = capsys.readouterr().err
    assert f"images: 1 of 5 images are unreadable and left out: {folder / 'cut.jpg'}" in said
    assert "images: 1 images have an EXIF orientation, which is not applied: t.jpg" in said
    assert "images: 1 files with other extensions (.heic) are left out" in said

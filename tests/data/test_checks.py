"""The check before a run: counts, faults and warnings, on folders with known faults."""

from __future__ import annotations

import json
import logging
import zlib

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.errors import DataError
from cast_jax.data.checks import check_source, check_sources
from cast_jax.data.findings import SeenImages
from cast_jax.data.inspection import inspect
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.subset import Subset, Unlabelled

_NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def _picture(name, number):
    """A picture that no other set or number has."""
    return _NOISE + np.uint8(zlib.crc32(f"{name} {number}".encode()) % 251)


def _coco(folder, name, instances, categories=((1, "cell"),)):
    """A COCO set with ``instances[i]`` squares in image i."""
    images, annotations = [], []
    for number, count in enumerate(instances):
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(name, number)).save(path)
        images.append({"id": number, "file_name": path.name, "height": 32, "width": 32})
        for k in range(count):
            square = [k, k, k + 4, k, k + 4, k + 4, k, k + 4]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": categories[0][0], "segmentation": [square]}
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in categories],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return Coco(folder / f"{name}.json")


def _folder(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.fromarray(_picture(folder.name, number)[:24]).save(folder / f"{number}.png")
    return ImageFolder(folder)


def _cut(source, *indices):
    for index in indices:
        path = source.record(index).path
        path.write_bytes(path.read_bytes()[:-1000])


def _counts(report):
    """Instances of each usable image."""
    return [len(found.labels) for found in report.look.findings]


def test_a_sound_dataset_is_counted_and_returned_as_it_is(tmp_path, caplog):
    labelled, val = _coco(tmp_path, "labelled", [3, 0, 5, 1]), _coco(tmp_path, "val", [2])
    unlabelled = _folder(tmp_path / "pool", 3)
    with caplog.at_level(logging.INFO):
        report = check_sources(labelled, unlabelled, val, max_instances=5)
    assert report.labelled.source is labelled
    counts = {name: _counts(getattr(report, name)) for name in ("labelled", "unlabelled", "val")}
    assert counts == {"labelled": [3, 0, 5, 1], "unlabelled": [0, 0, 0], "val": [2]}
    assert report.warnings == ()
    assert "labelled: 4 images, 9 instances, 1 images without any" in caplog.text


def test_what_images_show_and_what_is_said_of_them_has_names(tmp_path):
    look = lambda source: check_source("labelled", source, None)
    before = look(_coco(tmp_path, "set", [2, 1]))
    assert look(Coco(tmp_path / "set.json")).content == before.content
    fewer = look(_coco(tmp_path, "set", [1, 1]))
    assert (fewer.pixels == before.pixels, fewer.content == before.content) == (True, False)
    Image.fromarray(_picture("other", 0)).save(tmp_path / "set" / "0.png")
    other = look(Coco(tmp_path / "set.json"))
    assert len({other.pixels, fewer.pixels}) == len({other.content, fewer.content}) == 2


def _named(folder, change=lambda content: None):
    """The names of three pictures and what is said of them, one thing changed."""
    _coco(folder, "set", [2, 1, 1], ((1, "cell"), (4, "dust")))
    content = json.loads((folder / "set.json").read_text())
    content["annotations"][3]["iscrowd"] = 1
    change(content)
    (folder / "set.json").write_text(json.dumps(content))
    report = check_source("labelled", Coco(folder / "set.json"), None)
    return report.pixels, report.content


def test_the_names_of_data_are_those_of_earlier_versions(tmp_path):
    """By them a run that goes on knows its data again. These are of commit 2091c56."""
    pixels, content = _named(tmp_path)
    assert (pixels, content) == ("6d4dae9f37c913ca", "20620c73d818324e")
    for change in (
        lambda content: content["annotations"][3].update(iscrowd=0),
        lambda content: content["annotations"][0].update(category_id=4),
        lambda content: content["annotations"].pop(0),
        lambda content: (content["images"][2].update(id=7), content["annotations"][3].update(image_id=7)),
    ):
        same, other = _named(tmp_path, change)
        assert (same == pixels, other == content) == (True, False)
    same, other = _named(tmp_path, lambda content: content["images"].reverse())
    assert (same == pixels, other == content) == (False, False)


def test_instances_over_the_cap_are_a_warning(tmp_path, caplog):
    report = check_sources(
        _coco(tmp_path, "labelled", [3, 0, 5, 2]), None, _coco(tmp_path, "val", [4]), max_instances=2
    )
    assert "2 images have more than 2 instances, which cuts 4" in report.warnings[0]
    assert report.warnings[0] in caplog.text
    assert len(report.warnings) == 1, "val is compared with every instance: nothing is cut there"
    assert report.unlabelled is None


def test_images_that_a_list_names_in_vain_are_found_before_training(tmp_path):
    _folder(tmp_path / "pool", 2)
    (tmp_path / "pool.txt").write_text("pool/0.png\npool/gone.png\npool/1.png\n")
    pool = ImageFolder(tmp_path / "pool.txt")
    with pytest.raises(DataError, match=r"(?s)1 unreadable images of 3.*gone\.png"):
        check_sources(None, pool, None, max_instances=5)
    assert len(check_sources(None, pool, None, max_instances=5, on_unreadable="skip").unlabelled.source) == 2


def test_truncated_images_are_found_before_training(tmp_path):
    pool = _folder(tmp_path / "pool", 14)
    _cut(pool, *range(1, 13))
    with pytest.raises(DataError, match="the unlabelled source has 12 unreadable images of 14") as caught:
        check_sources(None, pool, None, max_instances=5)
    assert str(caught.value).count("cannot be read as an image") == 10, "ten are listed"
    assert "on_unreadable" in str(caught.value)


def test_the_faults_of_all_sets_are_told_at_once(tmp_path):
    labelled, pool = _coco(tmp_path, "labelled", [1, 1]), _folder(tmp_path / "pool", 2)
    _cut(labelled, 1)
    _cut(pool, 0)
    with pytest.raises(DataError, match=r"(?s)labelled source has 1 .*1\.png.*\nthe unlabelled source has 1 .*0\.png"):
        check_sources(labelled, pool, _coco(tmp_path, "val", [1]), max_instances=5)


def test_unreadable_images_are_left_out_and_counted_when_asked(tmp_path):
    labelled = _coco(tmp_path, "labelled", [1, 2, 3, 4])
    _cut(labelled, 1)
    labelled.record(2).path.unlink()
    report = check_sources(labelled, None, None, max_instances=9, on_unreadable="skip")
    assert (report.labelled.look.usable, len(report.labelled.look.faults)) == ((0, 3), 2)
    assert [report.labelled.source.record(i).image_id for i in range(2)] == [0, 3]
    assert _counts(report.labelled) == [1, 4]
    assert "2 of 4 images are unreadable and left out" in report.warnings[0]
    assert "1.png" in report.warnings[0]


def test_an_annotation_that_does_not_fit_counts_as_unreadable(tmp_path):
    labelled = _coco(tmp_path, "labelled", [1, 1])
    Image.fromarray(_NOISE[:16]).save(labelled.record(1).path)
    with pytest.raises(DataError, match=r"1\.png: is \(16, 32\)"):
        check_source("labelled", labelled, max_instances=5)


def test_sound_images_are_decoded_once(tmp_path, monkeypatch):
    """Also where the first look ended with an error; a file that has changed is looked at again."""
    pool, decoded = _folder(tmp_path / "pool", 4), []
    image = ImageFolder.image
    monkeypatch.setattr(ImageFolder, "image", lambda self, index: decoded.append(index) or image(self, index))
    _cut(pool, 1)
    seen = SeenImages(tmp_path / "seen")
    with pytest.raises(DataError, match=r"1\.png"):
        check_source("unlabelled", pool, 5, seen=seen)
    seen.save()
    assert sorted(decoded) == [0, 1, 2, 3]
    decoded.clear()
    Image.fromarray(_NOISE).save(pool.record(1).path)
    _cut(pool, 2)
    report = check_source("unlabelled", pool, 5, "skip", SeenImages(tmp_path / "seen"))
    assert sorted(decoded) == [1, 2]
    assert report.look.usable == (0, 1, 3)
    assert report.look == check_source("unlabelled", pool, 5, "skip").look
    decoded.clear()
    kept = (tmp_path / "seen").read_bytes()
    (tmp_path / "seen").write_bytes(bytes([kept[0] | 128]) + kept[1:])  # a damaged note costs another look
    check_source("unlabelled", pool, 5, "skip", SeenImages(tmp_path / "seen"))
    assert set(decoded) >= {1, 2}


def test_copies_and_links_out_are_warnings(tmp_path):
    labelled, pool = _coco(tmp_path, "labelled", [1, 1]), _folder(tmp_path / "pool", 3)
    picture = Image.open(labelled.record(1).path)
    picture.save(pool.record(0).path.with_name("copy.bmp"))
    Image.fromarray(_NOISE).save(tmp_path / "elsewhere.png")
    pool.record(2).path.unlink()
    pool.record(2).path.symlink_to(tmp_path / "elsewhere.png")
    shared, out = sorted(check_sources(labelled, ImageFolder(tmp_path / "pool"), None, 5).warnings)
    assert shared.startswith("labelled and unlabelled share 1 images (1.png)")
    assert out == "unlabelled: 1 images are links that leave their folder: 2.png"


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    pool = _folder(tmp_path / "pool", 2)
    _cut(pool, 0, 1)
    with pytest.raises(DataError, match=r"no readable image among 2; the first: .*0\.png"):
        check_source("unlabelled", pool, 5, on_unreadable="skip")


def test_val_with_other_categories_is_refused(tmp_path):
    labelled = _coco(tmp_path, "labelled", [1], ((1, "cell"), (2, "dust")))
    val = _coco(tmp_path, "val", [1], ((1, "cells"),))
    with pytest.raises(DataError, match="2 'dust' is missing, 1 is 'cells', not 'cell'"):
        check_sources(labelled, None, val, max_instances=5)


@pytest.mark.parametrize("name", ["labelled", "val"])
def test_a_set_without_instances_is_an_error(name, tmp_path):
    """Before training and in an inspection; under a split, too."""
    sources = {"labelled": _coco(tmp_path, "labelled", [1, 1]), "val": _coco(tmp_path, "val", [1])}
    assert inspect(sources, 5)["errors"] == []
    sources[name] = Subset(_coco(tmp_path, name, [0, 1, 0]), [0, 2])
    with pytest.raises(DataError, match=rf"^{name}: .*{name}\.json: none of the 2 images has an instance"):
        check_sources(sources["labelled"], None, sources["val"], 5)
    (error,) = inspect(sources, 5)["errors"]
    assert error.startswith(f"{name}: {tmp_path / name}.json: none of the 2 images has an instance")


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(DataError, match="known values: error, skip"):
        check_source("unlabelled", _folder(tmp_path / "pool", 1), 5, on_unreadable="ignore")


def test_annotations_of_unlabelled_images_are_not_spoken_of(tmp_path):
    """They may come from one JSON with the labelled ones."""
    source = _coco(tmp_path, "labelled", [1, 1])
    content = json.loads((tmp_path / "labelled.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 99, 99]
    (tmp_path / "labelled.json").write_text(json.dumps(content))
    source = Coco(tmp_path / "labelled.json")
    report = check_sources(Subset(source, [0]), Unlabelled(source, [1]), None, 5)
    assert report.warnings == ("labelled: 1 annotations have a bbox outside their image, which is not used: 0",)


def test_images_of_two_sets_are_a_warning(tmp_path, caplog):
    labelled = _coco(tmp_path, "labelled", [1, 1, 1])
    pool = _folder(tmp_path / "pool", 3)
    assert check_sources(labelled, pool, _coco(tmp_path, "val", [1]), 5).warnings == ()
    pool.record(0).path.unlink()
    pool.record(0).path.symlink_to(labelled.record(2).path)
    warnings = check_sources(labelled, pool, Subset(labelled, [1, 2]), 5).warnings[1:]  # the first: a link out
    assert [text.partition(" images ")[0] for text in warnings] == [
        "labelled and val share 2",
        "labelled and unlabelled share 1",
        "unlabelled and val share 1",
    ]
    assert "(2.png)" in warnings[1]
    assert warnings[1] in caplog.text


def test_what_repeats_or_is_not_applied_is_a_warning(tmp_path):
    """A picture and an annotation that are there twice, a second entry for one file, and a turned picture."""
    _coco(tmp_path, "labelled", [2, 1, 1])
    content = json.loads((tmp_path / "labelled.json").read_text())
    content["images"].append(content["images"][2] | {"id": 9})
    content["annotations"].append(content["annotations"][0] | {"id": "copy"})
    (tmp_path / "labelled.json").write_text(json.dumps(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("0.png", "1.png"):
        Image.fromarray(_NOISE).save(tmp_path / "labelled" / name, exif=exif if name == "1.png" else None)
    source = Coco(tmp_path / "labelled.json")
    assert source.copies == ("copy",)
    expected = {
        "labelled: 4 images show the same pixels as another: 0.png = 1.png, 2.png = 2.png",
        "labelled: 1 images have an EXIF orientation, which is not applied: 1.png",
        "labelled: 1 annotations are exact copies of another in their image: copy",
    }
    assert set(check_sources(source, None, None, max_instances=9).warnings) == expected
    again = Subset(source, np.arange(len(source)))  # as a split hands it over
    assert set(check_sources(again, None, None, max_instances=9).warnings) == expected


def test_what_is_left_out_is_a_warning(tmp_path, caplog):
    """An annotation of shares of the sides, and files of formats that are not read."""
    labelled, pool = _coco(tmp_path, "labelled", [2, 1, 1]), _folder(tmp_path / "pool", 2)
    content = json.loads((tmp_path / "labelled.json").read_text())
    content["annotations"][0]["segmentation"] = [[0.1, 0.1, 0.3, 0.1, 0.3, 0.3]]
    content["annotations"][3] |= {"id": "tiny", "segmentation": [[10.1, 10.1, 10.3, 10.1, 10.3, 10.3]]}
    (tmp_path / "labelled.json").write_text(json.dumps(content))
    (tmp_path / "pool" / "phone.heic").write_bytes(b"")
    labelled, pool = Coco(tmp_path / "labelled.json"), ImageFolder(tmp_path / "pool")
    report = check_sources(labelled, Subset(pool, [1]), None, max_instances=9)
    assert sum(_counts(report.labelled)) == 2
    rest = "(polygons are in pixels, not in shares of the image's sides)"
    assert report.warnings == (
        f"labelled: 2 annotations cover no pixel and are left out {rest}: 0 of 0.png, tiny of 2.png",
        "unlabelled: 1 files with other extensions (.heic) are left out; save them as PNG or JPEG to use them: "
        "phone.heic",
    )
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [*report.warnings]
    assert check_sources(Subset(labelled, [1]), None, None, max_instances=9).warnings == ()
    inspected = inspect({"labelled": labelled, "unlabelled": pool}, 9)
    assert tuple(inspected["warnings"]) == report.warnings

"""Generated micrographs: readable as COCO, repeatable, exact, and varied."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cast_jax.core.annotations import Category
from cast_jax.core.errors import DataError
from cast_jax.data.micrographs import MIN_AREA, paint, write_micrographs
from cast_jax.data.sources.coco import Coco

_OPTIONS = {"count": 3, "image_size": (64, 96), "seed": 1, "category": Category(7, "nucleus")}


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_coco_source_reads_what_was_painted(tmp_path):
    write_micrographs(tmp_path / "cells.json", **_OPTIONS)
    source = Coco(tmp_path / "cells.json")
    assert (len(source), source.categories) == (3, (Category(7, "nucleus"),))
    for index in range(3):
        image, masks = paint(np.random.default_rng([1, index]), 64, 96)
        np.testing.assert_array_equal(source.image(index), image)
        np.testing.assert_array_equal(source.instances(index).masks, masks)


def test_an_image_depends_on_its_seed_and_index_alone(tmp_path):
    write_micrographs(tmp_path / "a" / "cells.json", **_OPTIONS)
    write_micrographs(tmp_path / "b" / "cells.json", **_OPTIONS | {"count": 2})
    first, second = _files(tmp_path / "a"), _files(tmp_path / "b")
    shared = {name: data for name, data in second.items() if name.suffix == ".png"}
    assert len(shared) == 2
    assert shared.items() <= first.items()


def test_what_is_there_stays_and_a_broken_one_is_completed(tmp_path):
    path = tmp_path / "cells.json"
    write_micrographs(path, **_OPTIONS)
    before = _files(tmp_path)
    (tmp_path / "cells" / "000001.png").unlink()
    write_micrographs(path, **_OPTIONS)
    assert len(_files(tmp_path)) == 3, "a finished set is trusted"
    path.unlink()
    write_micrographs(path, **_OPTIONS)
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"count": 2}, {"image_size": (64, 64)}, {"category": Category(7, "c")}]
)
def test_other_parameters_are_refused(tmp_path, change):
    path = tmp_path / "cells.json"
    write_micrographs(path, **_OPTIONS)
    with pytest.raises(DataError, match=r"cells.json: other micrographs are here, made with .*'seed': 1"):
        write_micrographs(path, **_OPTIONS | change)
    assert json.loads(path.read_text())["info"]["seed"] == 1


def test_masks_are_what_is_seen():
    """They never overlap, are no crumbs, and differ from the ground beside them in almost every image."""
    counts, contrast, coloured = [], [], []
    for index in range(40):
        image, masks = paint(np.random.default_rng(index), 96, 96)
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= MIN_AREA
        counts.append(len(masks))
        painted = masks.any(axis=0)
        pixels = image.astype(float)
        contrast.append(pixels[painted].mean() - pixels[~painted].mean())
        coloured.append(np.ptp(pixels, axis=-1).max() > 0)
    assert min(counts) < 12 < 30 < max(counts)
    assert np.mean(np.abs(contrast) > 10) > 0.9
    assert [c < 0 for c in contrast] == coloured, "dark nuclei lie on a tinted ground"
    assert 0 < sum(coloured) < 15

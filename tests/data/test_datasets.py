"""A configuration's data: which images are labelled, and what is said when a path is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cast_jax.core.errors import DataError
from cast_jax.data.datasets import Datasets, open_datasets
from cast_jax.data.splits import Split, write_split
from configs import common

GENERATED = {"train": 6, "val": 2, "source": 3, "image_size": (32, 64), "seed": 0}
NOTHING = {"train": 0, "val": 0, "source": 0, "image_size": (32, 64), "seed": 0}


def settings(kind: str, generated=GENERATED, **changes) -> dict[str, Any]:
    own = {
        "coco": common.COCO,
        "nuclei": common.COCO,
        "cityscapes": {"root": "", "split": "", "labelled": 2},
        "scenes": {"root": "", "split": "", "labelled": 2},
    }
    return {"kind": kind, "split_seed": 0, "generated": generated, **own.get(kind, {}), **changes}


def ids(source) -> list[Any]:
    return [source.record(index).image_id for index in range(len(source))]


def sizes(datasets: Datasets) -> list[int]:
    return [len(part) for part in (datasets.labelled, datasets.unlabelled, datasets.val)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A workdir with generated scenes."""
    workdir = tmp_path_factory.mktemp("scenes")
    return workdir, open_datasets(settings("scenes"), workdir)


def test_scenes(scenes):
    workdir, datasets = scenes
    assert datasets.pretrain is not None
    assert sizes(datasets) == [2, 4, 2]
    assert len(datasets.pretrain) == 3
    assert not set(ids(datasets.labelled)) & set(ids(datasets.unlabelled))
    assert datasets.unlabelled.categories == ()
    assert len(datasets.labelled.categories) == len(datasets.val.categories) == 8
    assert datasets.labelled.image(0).shape == (32, 64, 3)
    again = open_datasets(settings("scenes"), workdir)
    assert ids(again.labelled) == ids(datasets.labelled)
    more = open_datasets(settings("scenes", labelled=4), workdir)
    assert set(ids(datasets.labelled)) < set(ids(more.labelled))
    other = [ids(open_datasets(settings("scenes", split_seed=seed), workdir).labelled) for seed in range(5)]
    assert len({tuple(chosen) for chosen in other}) > 1


def test_cityscapes_by_number_and_by_list(scenes, tmp_path):
    workdir, datasets = scenes
    root = str(workdir / "data" / "target")
    given = open_datasets(settings("cityscapes", NOTHING, root=root), tmp_path)
    assert ids(given.labelled) == ids(datasets.labelled)
    assert given.pretrain is None
    chosen = ids(datasets.unlabelled)[1:3]
    (tmp_path / "split.txt").write_text("\n".join(chosen) + "\n")
    listed = open_datasets(settings("cityscapes", NOTHING, root=root, split=str(tmp_path / "split.txt")), tmp_path)
    assert ids(listed.labelled) == chosen
    assert sorted(ids(listed.labelled) + ids(listed.unlabelled)) == sorted(ids(given.labelled) + ids(given.unlabelled))
    for labelled in (0, 6, 298):
        message = rf"config\.data\.labelled is {labelled}, but must lie in \[1, 6\): there are 6 training images"
        with pytest.raises(DataError, match=message):
            open_datasets(settings("cityscapes", NOTHING, root=root, labelled=labelled), tmp_path)


def test_nuclei_are_own_data_with_micrographs_to_pretrain_on(tmp_path):
    datasets = open_datasets(settings("nuclei"), tmp_path)
    assert datasets.pretrain is not None
    assert [*sizes(datasets), len(datasets.pretrain)] == [2, 4, 2, 3]
    assert datasets.pretrain.categories == datasets.labelled.categories[:1], "a label is a position in the task's"
    assert datasets.pretrain.image(0).shape == (32, 64, 3)
    again = open_datasets(settings("nuclei"), tmp_path)
    assert ids(again.pretrain) == ids(datasets.pretrain)


def test_generated_images_as_coco(tmp_path):
    """The stand-in for own data: the same pixels and instances as the scenes that it is made of."""
    datasets = open_datasets(settings("coco"), tmp_path)
    assert sizes(datasets) == [2, 4, 2]
    assert [category.id for category in datasets.labelled.categories] == [24, 25, 26, 27, 28, 31, 32, 33]
    scenes = open_datasets(settings("cityscapes", labelled=2), tmp_path)
    for index in range(2):
        np.testing.assert_array_equal(datasets.labelled.image(index), scenes.labelled.image(index))
        ours, theirs = datasets.labelled.instances(index), scenes.labelled.instances(index)
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    again = open_datasets(settings("coco"), tmp_path)
    assert ids(again.unlabelled) == ids(datasets.unlabelled)


def test_own_data_in_coco_json(tmp_path):
    open_datasets(settings("coco"), tmp_path)
    made = tmp_path / "data" / "coco"
    paths = {"labelled": "labelled.json", "unlabelled": "unlabelled", "val": "val.json"}
    paths = {key: str(made / name) for key, name in paths.items()}
    datasets = open_datasets(settings("coco", NOTHING, **paths), tmp_path / "other")
    assert sizes(datasets) == [2, 4, 2]
    assert list(open_datasets(settings("coco", NOTHING, **{**paths, "unlabelled": ""}), tmp_path).of_the_task()) == [
        "labelled",
        "val",
    ]
    for key in ("labelled", "val"):
        with pytest.raises(DataError, match=rf"config\.data\.{key} is not set; .* --config\.data\.{key}=PATH"):
            open_datasets(settings("coco", NOTHING, **{**paths, key: ""}), tmp_path)
    with pytest.raises(DataError, match=r"nowhere\.json"):
        open_datasets(settings("coco", NOTHING, **{**paths, "val": str(tmp_path / "nowhere.json")}), tmp_path)
    with pytest.raises(DataError, match="elsewhere"):
        open_datasets(settings("coco", NOTHING, **paths, labelled_images=str(tmp_path / "elsewhere")), tmp_path)
    swapped = {**paths, "labelled": paths["val"], "labelled_images": str(made / "val")}
    assert len(open_datasets(settings("coco", NOTHING, **swapped), tmp_path).labelled) == 2


def test_own_data_with_a_split(tmp_path):
    open_datasets(settings("coco"), tmp_path)
    made = tmp_path / "data" / "coco"
    whole = open_datasets(settings("coco"), tmp_path).labelled
    split, paths = tmp_path / "split.json", {"labelled": str(made / "labelled.json"), "val": str(made / "val.json")}
    write_split(split, Split((ids(whole)[1],), (ids(whole)[0],)), {})
    for pool, unlabelled in (("", 1), (str(made / "unlabelled"), 4)):
        datasets = open_datasets(settings("coco", NOTHING, **paths, unlabelled=pool, split=str(split)), tmp_path)
        assert ids(datasets.labelled) == ids(whole)[1:]
        assert sizes(datasets) == [1, unlabelled, 2]


@pytest.mark.parametrize("kind", ["coco", "cityscapes"])
def test_without_paths_only_smoke_runs_make_images(kind, tmp_path):
    key = {"coco": "labelled", "cityscapes": "root"}[kind]
    with pytest.raises(DataError, match=rf"config\.data\.{key} is not set"):
        open_datasets(settings(kind, NOTHING), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_kinds():
    with pytest.raises(
        DataError, match=r"config\.data\.kind 'voc' is unknown; known: coco, cityscapes, ade20k, scenes"
    ):
        open_datasets(settings("voc"), None)  # type: ignore[arg-type]

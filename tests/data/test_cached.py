"""The folder of decoded images: the same pixels at every read, the same views, whoever writes, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.data.pipeline import LoaderConfig, make_loader
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.sources.base import ImageRecord
from cast_jax.data.sources.cached import Cached
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.data.views import ViewConfig, make_views

VIEW = ViewConfig(image_size=(32, 64), max_instances=3, min_area=1, scale=(0.5, 1.0), jitter_probability=0.0)


def picture(seed: int, height: int = 96, width: int = 192) -> np.ndarray:
    """Smooth, so that resampling it twice changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


class Labelled:
    """Images of a folder with a disc and a bar each (the last image without any); counts what is decoded."""

    categories = (Category(1, "disc"), Category(2, "bar"))

    def __init__(self, folder: Path):
        self.images, self.decoded = ImageFolder(folder), 0

    def __len__(self) -> int:
        return len(self.images)

    def record(self, index: int) -> ImageRecord:
        return self.images.record(index)

    def image(self, index: int) -> np.ndarray:
        self.decoded += 1
        return self.images.image(index)

    def instances(self, index: int) -> Instances:
        height, width = self.images.image(index).shape[:2]
        if index == len(self) - 1:
            return Instances.empty(height, width)
        y, x = np.mgrid[:height, :width] + 0.5
        disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 4) ** 2
        bar = (abs(x - 0.8 * width) < width / 12) & (abs(y - 0.5 * height) < height / 3)
        return Instances(np.stack([disc, bar]), np.arange(2, dtype=np.int32), y < height / 8, np.ones(2, np.float32))


@pytest.fixture
def source(tmp_path) -> Labelled:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / "images" / f"{i}.png")
    return Labelled(tmp_path / "images")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_read_gives_the_pixels_of_the_first(source, tmp_path):
    cached = Cached(source, tmp_path / "cache", VIEW)
    first = cached.image(0)
    assert first.shape == (32, 64, 3)
    np.testing.assert_allclose(first, picture(0).reshape(32, 3, 64, 3, 3).mean(axis=(1, 3)), atol=0.6)
    for again in (cached, Cached(source, tmp_path / "cache", VIEW), pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(again.image(0), first)
    assert source.decoded == 1
    assert [path.stat().st_size - first.size for path in files(tmp_path / "cache")] == [128]  # numpy's header
    assert (cached.categories, len(cached), cached.record(0)) == (source.categories, 3, source.record(0))


@pytest.mark.parametrize("index", [0, 2])
def test_views_are_those_without_the_cache_up_to_resampling(source, index, tmp_path):
    cached = Cached(source, tmp_path / "cache", VIEW)
    for seed in range(8):
        plain, quick = (
            make_views(s.image(index), s.instances(index), np.random.default_rng(seed), VIEW) for s in (source, cached)
        )
        np.testing.assert_allclose(quick["strong_to_weak"], plain["strong_to_weak"], atol=1e-6)
        for name in ("weak", "strong"):
            own, other = quick[name], plain[name]
            np.testing.assert_allclose(own["valid_box"], other["valid_box"], atol=1e-4)
            np.testing.assert_array_equal(own["labels"], other["labels"])
            assert np.abs(own["image"].astype(float) - other["image"]).mean() < 3
            for key in ("masks", "ignore"):
                bits, others = (np.unpackbits(view[key], axis=-1) for view in (own, other))
                edge = np.unpackbits(other[key], axis=-1).sum() ** 0.5  # a mask of area a has an outline of about this
                assert (bits != others).sum() <= 2 * edge
        assert quick["weak"]["instance_valid"].sum() == (0 if index == 2 else 2)


def test_masks_have_the_size_of_the_cached_image(source, tmp_path):
    cached = Cached(source, tmp_path / "cache", VIEW)
    for index, count in ((0, 2), (2, 0)):
        instances = cached.instances(index)
        assert instances.masks.shape == (count, 32, 64)
        assert instances.ignore.shape == cached.image(index).shape[:2]
        assert (instances.masks.dtype, instances.ignore.dtype) == (bool, bool)
    whole = source.instances(0)
    halves = whole.masks.reshape(2, 32, 3, 64, 3).mean(axis=(2, 4)) >= 0.5
    np.testing.assert_array_equal(cached.instances(0).masks, halves)
    small = dataclasses.replace(VIEW, scale=(0.5, 4.0))
    assert Cached(source, tmp_path / "cache", small).instances(0).masks.shape == whole.masks.shape


@pytest.mark.parametrize(
    ("size", "kept"),
    [((1, 1), (1, 1)), ((20, 30), (20, 30)), ((3, 9000), (1, 64)), ((9000, 2), (32, 1)), ((64, 64), (32, 32))],
)
def test_images_of_every_shape(size, kept, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(0, *size)).save(tmp_path / "images" / "odd.png")
    source = Labelled(tmp_path / "images")
    cached = Cached(source, tmp_path / "cache", VIEW)
    for _ in range(2):
        assert cached.image(0).shape == (*kept, 3)
        assert cached.instances(0).ignore.shape == kept
        make_views(cached.image(0), cached.instances(0), np.random.default_rng(0), VIEW)
    assert source.decoded == 1
    if kept == size:
        np.testing.assert_array_equal(cached.image(0), source.image(0))


def test_other_views_and_changed_images_have_files_of_their_own(source, tmp_path):
    folder = tmp_path / "cache"
    before = Cached(source, folder, VIEW).image(0)
    larger = dataclasses.replace(VIEW, scale=(0.5, 2.0))
    assert Cached(source, folder, larger).image(0).shape == (64, 128, 3)
    Image.fromarray(255 - picture(0)).save(source.record(0).path)
    np.testing.assert_allclose(Cached(source, folder, VIEW).image(0), 255.0 - before, atol=1)
    # Also one of the same length, by its time alone.
    status = source.record(0).path.stat()
    os.utime(source.record(0).path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    Cached(source, folder, VIEW).image(0)
    assert len(files(folder)) == 4


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"not an array", None])
def test_a_damaged_file_is_made_again(source, damage, tmp_path):
    cached = Cached(source, tmp_path / "cache", VIEW)
    image = cached.image(0)
    (file,) = files(tmp_path / "cache")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    np.testing.assert_array_equal(cached.image(0), image)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_costs_a_warning(source, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cached = Cached(source, tmp_path / "file" / "cache", VIEW)
    usual = Cached(source, tmp_path / "cache", VIEW)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            np.testing.assert_array_equal(cached.image(index), usual.image(index))
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"data.cache {tmp_path / 'file' / 'cache'} cannot be written to"
    ]


def test_an_image_that_is_gone_is_named_though_it_is_cached(source, tmp_path):
    cached = Cached(source, tmp_path / "cache", VIEW)
    cached.image(0)
    source.record(0).path.unlink()
    with pytest.raises(DataError, match=r"0\.png: no such image file"):
        cached.image(0)


def test_threads_may_write_the_same_image_at_once(source, tmp_path):
    for attempt in range(5):
        cached = Cached(source, tmp_path / str(attempt), VIEW)
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(cached.image, [0, 1, 2] * 16))
        for number, image in enumerate(images):
            np.testing.assert_array_equal(image, images[number % 3])
        assert [path.suffix for path in files(tmp_path / str(attempt))] == [".npy"] * 3, "no half-written files"


def test_worker_processes_share_it_and_give_the_same_batches(source, tmp_path):
    config = LoaderConfig(view=VIEW, batch_labelled=2, num_threads=2)
    batches = {}
    for workers in (0, 2):
        cached = Cached(source, tmp_path / f"cache{workers}", VIEW)
        loader = make_loader(cached, None, dataclasses.replace(config, num_workers=workers))
        batches[workers] = [next(loader)["labelled"]["strong"]["image"] for _ in range(6)]
        loader.close()
        assert len(files(tmp_path / f"cache{workers}")) == 3
    np.testing.assert_array_equal(batches[0], batches[2])


def test_pseudo_labels_shrink_with_their_images(source, tmp_path):
    truth = source.instances(0)
    found = Detections(
        truth.labels, np.float32([0.9, 0.6]), np.float32([1, 1]), [encode_mask(mask) for mask in truth.masks]
    )
    nothing = Detections(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), [])
    writer = PseudoLabelWriter(
        tmp_path / "store", source.images, categories=source.categories, model_hash="abc", threshold=0.3, shard_size=3
    )
    writer.write_shard(0, [found, nothing, nothing])
    labelled = PseudoLabelled(source.images, PseudoLabels.open(tmp_path / "store"), source.categories)
    cached = Cached(labelled, tmp_path / "cache", VIEW)
    instances = cached.instances(0)
    np.testing.assert_array_equal(instances.masks, Cached(source, tmp_path / "cache", VIEW).instances(0).masks)
    np.testing.assert_array_equal(instances.scores, np.float32([0.9, 0.6]))
    assert instances.labels.tolist() == [0, 1]
    assert cached.instances(1).masks.shape == (0, *cached.image(1).shape[:2])

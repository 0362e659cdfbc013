"""Generated streets: readable by the Cityscapes source, repeatable, resumable, and with a real gap."""

from __future__ import annotations

import numpy as np
import pytest

from cast_jax.core.errors import DataError
from cast_jax.core.files import read_json
from cast_jax.data.scenes import MARKER, write_scenes
from cast_jax.data.scenes_canvas import FIRST_FIGURE, Camera, Canvas, Figure, Light
from cast_jax.data.scenes_compose import compose
from cast_jax.data.scenes_figures import VIEWS, Paint
from cast_jax.data.scenes_looks import LOOKS
from cast_jax.data.sources.cityscapes import CATEGORIES, Cityscapes

_SIZE = (64, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, split_sizes={"train": 6, "val": 2}, image_size=_SIZE, look="target", seed=3)
    return folder


def _pixels(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_the_cityscapes_source_reads_them(root):
    for split, size in (("train", 6), ("val", 2)):
        source = Cityscapes(root, split)
        assert len(source) == size
        for index in range(size):
            instances = source.instances(index)
            assert source.image(index).shape == (*_SIZE, 3)
            assert instances.masks.shape == (len(instances), *_SIZE)
            assert instances.masks.sum(axis=0).max() <= 1, "visible masks never overlap"
    assert not {Cityscapes(root, "train").record(i).image_id for i in range(6)} & {
        Cityscapes(root, "val").record(i).image_id for i in range(2)
    }


def test_a_scene_depends_on_its_seed_look_split_and_index_alone(root, tmp_path):
    write_scenes(tmp_path, split_sizes={"val": 1, "train": 3}, image_size=_SIZE, look="target", seed=3)
    again, first = _pixels(tmp_path), _pixels(root)
    assert len(again) == 8
    assert all(first[path] == data for path, data in again.items())
    assert len(set(first.values())) == len(first), "no two scenes are alike"


def test_a_finished_folder_is_left_alone_and_a_broken_one_is_completed(root, tmp_path):
    options = {"split_sizes": {"train": 2}, "image_size": _SIZE, "look": "source", "seed": 1}
    write_scenes(tmp_path, **options)
    before = _pixels(tmp_path)
    victim = tmp_path / sorted(before)[0]
    victim.unlink()
    write_scenes(tmp_path, **options)
    assert not victim.exists(), "a complete folder is trusted"
    marker = tmp_path / MARKER
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    write_scenes(tmp_path, **options)
    assert _pixels(tmp_path) == before
    assert read_json(marker)["complete"] is True


@pytest.mark.parametrize("change", [{"seed": 4}, {"look": "source"}, {"split_sizes": {"train": 7, "val": 2}}])
def test_other_parameters_are_refused_by_name(root, change):
    options = {"split_sizes": {"train": 6, "val": 2}, "image_size": _SIZE, "look": "target", "seed": 3}
    with pytest.raises(DataError, match=f"{next(iter(change))} is .*, not .*delete the folder"):
        write_scenes(root, **(options | change))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"look": "night"}, "known looks: source, target"),
        ({"image_size": (16, 128)}, "too small"),
        ({"split_sizes": {}}, "one image"),
        ({"split_sizes": {"train": 0}}, "one image"),
    ],
)
def test_what_cannot_be_painted_is_refused_before_writing(tmp_path, change, problem):
    options = {"split_sizes": {"train": 1}, "image_size": _SIZE}
    with pytest.raises(DataError, match=problem):
        write_scenes(tmp_path, **(options | change))
    assert not list(tmp_path.iterdir())


def test_the_looks_share_shapes_but_not_pixels():
    scenes = {look: [compose(np.random.default_rng(i), LOOKS[look], *_SIZE) for i in range(8)] for look in LOOKS}
    source, target = (np.stack([image for image, _ in scenes[look]]).astype(float) for look in ("source", "target"))
    saturation = {look: np.ptp(images, axis=-1).mean() for look, images in (("source", source), ("target", target))}
    assert source.mean() > target.mean() + 20, "an evening is darker"
    assert saturation["source"] > 1.3 * saturation["target"], "and its colours are paler"
    for look in LOOKS:
        covered = np.mean([(ids >= 1000).mean() for _, ids in scenes[look]])
        assert 0.04 < covered < 0.5


def test_many_scenes_hold_all_classes_groups_and_a_sensible_number_of_instances():
    counts, classes, groups = [], set(), 0
    for index in range(40):
        _, ids = compose(np.random.default_rng(index), LOOKS["target"], *_SIZE)
        values, areas = np.unique(ids, return_counts=True)
        assert areas[values >= 1000].min() >= 20 / (128 * 256) * ids.size, "hidden figures are no instances"
        counts.append((values >= 1000).sum())
        classes |= set((values[values >= 1000] // 1000).tolist())
        groups += bool(np.isin([24, 26, 33], values).any())
        for class_id in set((values[values >= 1000] // 1000).tolist()):
            numbers = values[values // 1000 == class_id] % 1000
            assert numbers.tolist() == list(range(len(numbers))), "k counts from 0"
    assert classes == {category.id for category in CATEGORIES}
    assert 3 <= np.mean(counts) <= 9
    assert 4 <= groups <= 36


def _canvas_and_figure(depth, mark=FIRST_FIGURE):
    camera = Camera(height=64, width=128, focal=100.0, horizon=28.0, vanishing_x=64.0)
    light = Light(side=0.0, haze=0.0, haze_colour=(0, 0, 0), shadow=0.0, lamps=False)
    canvas = Canvas(64, 128)
    return canvas, Figure(canvas, camera, light, 0.0, depth, 1, mark)


def test_a_box_of_known_size_lands_where_the_camera_says():
    # 10 px a metre at 10 m; the ground is 2 m below the eye: row 28 + 20 = 48, and 3 m x 2 m are 30 x 20 px above it.
    canvas, figure = _canvas_and_figure(depth=10.0)
    figure.box(-1.0, 0.0, 2.0, 2.0, (10, 20, 30))
    colours, marks = canvas.finish()
    rows, columns = np.nonzero(marks == FIRST_FIGURE)
    assert (rows.min(), rows.max() + 1) == pytest.approx((28, 48), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((54, 84), abs=1)
    np.testing.assert_allclose(colours[38, 64], [10, 20, 30], atol=0.5)


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_figures_shrink_with_depth_and_stand_on_the_ground(name):
    areas = []
    for depth in (20.0, 40.0):
        canvas, figure = _canvas_and_figure(depth)
        VIEWS[name][0](
            figure, Paint((200, 0, 0), (0, 200, 0), (220, 180, 150), (100, 100, 120)), np.random.default_rng(0)
        )
        rows, _ = np.nonzero(canvas.marks == FIRST_FIGURE)
        areas.append(len(rows))
        if name != "rider":
            assert (rows.max() + 1) / 2 == pytest.approx(28 + 2 * 100 / depth, abs=1.5)
    assert 2.5 < areas[0] / areas[1] < 5.0  # half the scale is a quarter of the area, but thin parts keep a pixel


def test_later_figures_hide_earlier_ones():
    camera = Camera(height=64, width=128, focal=100.0, horizon=28.0, vanishing_x=64.0)
    light = Light(side=0.0, haze=0.0, haze_colour=(0, 0, 0), shadow=0.0, lamps=False)
    canvas = Canvas(64, 128)
    far, near = (Figure(canvas, camera, light, 0.0, depth, 1, FIRST_FIGURE + i) for i, depth in enumerate((20.0, 10.0)))
    far.box(-1, 0, 1, 2, (255, 0, 0))
    near.box(-2, 0, 2, 3, (0, 255, 0))
    assert not (canvas.marks == FIRST_FIGURE).any()

"""The fused teacher from converted weights of both networks, without training."""

from __future__ import annotations

import dataclasses
import json

import pytest
from teacher_tiny import DETECTOR, SEGMENTER, write_vocabulary
from tiny import drawn

from cast_jax import pipeline
from cast_jax.core.config import to_json
from cast_jax.core.errors import UserError
from cast_jax.core.files import LOCK
from cast_jax.export import save_weights
from cast_jax.models.functional import Functional
from cast_jax.models.teacher.grounding_dino import GroundingDino
from cast_jax.models.teacher.sam2 import Sam2
from configs import cityscapes


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A configuration whose teacher is small, but comes as large ones do: two folders of converted weights."""
    folder = tmp_path_factory.mktemp("weights")
    networks = {"detector": (GroundingDino, DETECTOR), "segmenter": (Sam2, SEGMENTER)}
    for part, (network, sizes) in networks.items():
        params = drawn(Functional(lambda rngs, network=network, sizes=sizes: network(sizes, rngs=rngs)).abstract(), 0.2)
        described = {"model": to_json(dataclasses.asdict(sizes)), "converted": {"name": part, "decided": {}}}
        save_weights(folder / part / "model.safetensors", params, described, ())
    config = cityscapes.get_config("zero_shot,smoke").to_dict()
    config["model"]["teacher"] = {
        "name": "grounded_sam2_t",
        "num_queries": 12,
        "segmenter_size": (64, 96),
        "tokenizer": str(write_vocabulary(folder)),
    }
    config["data"]["max_instances"] = 12
    config["init"] = {"teacher": {part: str(folder / part) for part in networks}, "student": ""}
    return config


def test_it_is_evaluated_and_nothing_is_done_twice(settings, tmp_path, caplog):
    summary = pipeline.run(settings, tmp_path)
    assert set(summary["steps"]) == {"zero_shot"}
    row = summary["steps"]["zero_shot"]
    assert 0 <= row["mask_ap"] <= row["mask_ap50"] <= 100
    assert row["images_per_second"] > 0
    results = json.loads((tmp_path / "zero_shot/evaluation/coco_results.json").read_text())
    assert {result["category_id"] for result in results} <= {24, 25, 26, 27, 28, 31, 32, 33}
    written = (tmp_path / "zero_shot/done.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        pipeline.run(settings, tmp_path)
    assert "zero_shot: finished already" in caplog.text
    assert (tmp_path / "zero_shot/done.json").stat().st_mtime_ns == written
    assert "was made from other" not in caplog.text
    for kind, names in MADE_FROM.items():
        assert set(json.loads((tmp_path / "zero_shot" / f"{kind}.json").read_text())) == set(names)
        (tmp_path / "zero_shot" / f"{kind}.json").write_text(json.dumps(dict.fromkeys(names, "other")))
    pipeline.run(settings, tmp_path)
    assert "was made from other weights to start from" in caplog.text
    assert "was made from other images or labels" in caplog.text


MADE_FROM = {"weights": ("config.init.teacher.detector", "config.init.teacher.segmenter"), "images": ("val",)}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"segmenter": ""}, r"config\.init\.teacher gives no segmenter\. Convert"),
        ({"detector": "nowhere"}, r"config\.init\.teacher\.detector: no weights at nowhere"),
    ],
)
def test_a_teacher_must_be_whole(settings, tmp_path, teacher, message):
    init = {**settings["init"], "teacher": {**settings["init"]["teacher"], **teacher}}
    with pytest.raises(UserError, match=message):
        pipeline.run({**settings, "init": init}, tmp_path)


def test_the_networks_are_told_apart(settings, tmp_path):
    """SAM 2 given for the detector and the other way round, by what their conversion wrote beside them."""
    teacher = settings["init"]["teacher"]
    for swapped, message in (
        ({"detector": teacher["segmenter"]}, "detector: .* a segmenter; .* needs a GroundingDino there"),
        ({"segmenter": teacher["detector"]}, "segmenter: .* a detector; .* needs a Sam2 there"),
        ({"decoder": teacher["detector"]}, "decoder: .* a detector; grounded_sam2_t has no decoder"),
    ):
        with pytest.raises(UserError, match=rf"config\.init\.teacher\.{message}"):
            pipeline.run({**settings, "init": {**settings["init"], "teacher": teacher | swapped}}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_both_networks_are_asked_for(settings, tmp_path):
    init = {**settings["init"], "teacher": settings["init"]["teacher"]["detector"]}
    with pytest.raises(UserError, match=r"starts from several networks; give the folder of each"):
        pipeline.run({**settings, "init": init}, tmp_path)

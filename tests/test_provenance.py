"""Steps remember what they were made from."""

import json
import logging

import pytest

from cast_jax.core.errors import UserError
from cast_jax.pipeline import Pipeline
from cast_jax.provenance import record, warn_of_others
from configs import demo

MADE = {"weights": {"config.steps.refine.start": "1"}, "images": {"labelled": "2", "unlabelled": "3"}}


def changed(kind, name):
    return {**MADE, kind: {**MADE[kind], name: "other"}}


def test_going_on_with_other_weights_is_refused_and_with_other_images_a_warning(tmp_path, caplog):
    record(tmp_path, MADE)
    record(tmp_path, MADE)
    assert json.loads((tmp_path / "weights.json").read_text()) == MADE["weights"]
    with pytest.raises(
        UserError, match=r"(?s)began with other weights to start from; delete it .*start: '1' -> 'other'"
    ):
        record(tmp_path, changed("weights", "config.steps.refine.start"))
    assert not caplog.records
    record(tmp_path, changed("images", "labelled"))
    assert "began with other images or labels, and goes on with these" in caplog.text
    assert json.loads((tmp_path / "images.json").read_text()) == MADE["images"]


def test_what_is_done_is_not_done_again_but_told_to_be_of_others(tmp_path, caplog):
    warn_of_others(tmp_path, MADE)  # nothing was written down
    record(tmp_path, MADE)
    warn_of_others(tmp_path, MADE)
    warn_of_others(tmp_path, {})
    warn_of_others(tmp_path, {"weights": {}})  # gone by now
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_others(tmp_path, changed("images", "unlabelled"))
    assert "was made from other images or labels than there are now" in caplog.text


def test_a_step_knows_the_weights_and_images_that_it_is_made_from(tmp_path):
    run = Pipeline(demo.get_config("refine,smoke").to_dict(), tmp_path)
    assert set(run._made_from("refine")) == {"images"}
    weights = tmp_path / "distill" / "exported" / "last.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    first = run._made_from("refine")
    weights.write_bytes(b"another")
    second = run._made_from("refine")
    assert first["weights"].keys() == {"config.steps.refine.start"}
    assert first["weights"] != second["weights"]
    assert first["images"].keys() == {"labelled"}
    assert run._made_from("adapt")["images"].keys() == {"labelled", "unlabelled"}

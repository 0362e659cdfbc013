"""Steps remember what they were made from."""

import json
import logging

import pytest

from cast_jax.core.errors import UserError
from cast_jax.pipeline import Pipeline
from cast_jax.provenance import record, warn_of_others
from configs import demo

MADE = {
    "weights": {"config.steps.refine.start": "1"},
    "images": {"labelled": "2", "unlabelled": "3"},
    "pseudo_labels": {"content_hash": "4"},
}


def changed(kind, name):
    return {**MADE, kind: {**MADE[kind], name: "other"}}


def test_what_has_begun_goes_on_with_the_same_labels_and_says_what_else_changed(tmp_path, caplog):
    record(tmp_path, changed("pseudo_labels", "content_hash"))
    record(tmp_path, MADE)  # nothing is lost yet
    assert json.loads((tmp_path / "pseudo_labels.json").read_text()) == MADE["pseudo_labels"]
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    record(tmp_path, MADE)
    assert not caplog.records
    with pytest.raises(UserError, match=r"(?s)began with other pseudo-labels; delete it.*content_hash: '4' -> 'other'"):
        record(tmp_path, changed("pseudo_labels", "content_hash"))
    for kind, name, said in (
        ("weights", "config.steps.refine.start", "other weights to start from, and goes on"),
        ("images", "labelled", "other images or labels, and goes on"),
    ):
        record(tmp_path, changed(kind, name))
        assert said in caplog.text
        assert json.loads((tmp_path / f"{kind}.json").read_text()) == MADE[kind]


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

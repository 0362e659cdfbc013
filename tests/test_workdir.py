"""A run's folder: where it may be, and which configurations may go on in it."""

import json
import re
from typing import Any

import pytest

from cast_jax.core.config import to_json
from cast_jax.core.errors import UserError
from cast_jax.workdir import make_workdir, require_same
from configs import coco


def config(change=lambda values: None) -> dict[str, Any]:
    values = coco.get_config("cast,smoke").to_dict()
    values["model"]["teacher"].pop("encoder", None)
    change(values)
    return values


def test_steps_that_have_not_begun_may_be_corrected(tmp_path):
    (tmp_path / "finetune" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config())))
    require_same(config(lambda values: values["steps"]["distill"]["optimizer"].update(learning_rate=3.0)), tmp_path)
    require_same(config(lambda values: values["steps"].pop("refine")), tmp_path)
    changes = [
        (
            lambda values: values["steps"]["finetune"]["train"].update(steps=9),
            "config.steps.finetune.train.steps: 4 -> 9",
        ),
        (lambda values: values["steps"].pop("finetune"), "-> '(absent)'"),
        (lambda values: values.update(embedding_dim=3), "config.embedding_dim: 32 -> 3"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=re.escape(message)):
            require_same(config(change), tmp_path)


def test_an_evaluation_without_training_is_a_result_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(config())))
    other = config(lambda values: values["init"].update(teacher="elsewhere"))
    require_same(other, tmp_path)
    (tmp_path / "zero_shot").mkdir()
    (tmp_path / "zero_shot" / "done.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.init\.teacher: .* -> 'elsewhere'"):
        require_same(other, tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.val: .* -> 'other\.json'"):
        require_same(config(lambda values: values["data"].update(val="other.json")), tmp_path)
    # What plays no part in it may be decided after it.
    require_same(config(lambda values: values["init"].update(student="weights")), tmp_path)
    require_same(config(lambda values: values["pseudo_labels"].update(threshold=0.9)), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["data"]["loader"].update(num_workers=4, num_threads=1, prefetch=9),
        lambda values: values["steps"]["finetune"]["data"].update(num_workers=4),
        lambda values: values["steps"]["finetune"]["train"].update(
            log_every=7, save_every=9, keep=5, tensorboard=False
        ),
        lambda values: values["model"]["student"]["encoder"].update(remat="blocks"),
        lambda values: values["model"]["teacher"].update(encoder={"remat": "none"}),  # of which nothing was said before
        lambda values: values["mesh"].update(fsdp=8),
        lambda values: values.update(pipeline=("finetune",)),
    ],
)
def test_what_changes_no_result_may_change_under_way(change, tmp_path):
    (tmp_path / "finetune" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(to_json(config())))
    require_same(config(change), tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    make_workdir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", type(tmp_path)("/proc/run")):
        with pytest.raises(UserError, match=rf"--workdir {path} cannot be written to \(.+\); name another"):
            make_workdir(path)

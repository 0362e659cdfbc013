"""What is found before the first step: order, weights, rules, the workdir, and changes to a run that has begun."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from cast_jax.core.annotations import Category
from cast_jax.core.config import build
from cast_jax.core.errors import MissingStepError, UserError
from cast_jax.core.files import write_json
from cast_jax.core.sharding import make_mesh
from cast_jax.export import save_weights
from cast_jax.models.registry import segmenter_config
from cast_jax.preflight import (
    as_converted,
    check_images,
    check_order,
    check_parameters,
    check_settings,
    evaluated,
)
from cast_jax.settings import RunConfig
from configs import coco, demo

CATEGORIES = (Category(1, "cell"), Category(2, "dust"))


def config(change=lambda values: None, step: str = "cast") -> dict[str, Any]:
    values = coco.get_config(f"{step},smoke").to_dict()
    values["model"]["teacher"] = {**values["model"]["teacher"], "encoder": {"embed_dim": 16, "num_heads": 2}}
    change(values)
    return values


def run_config(change=lambda values: None, step: str = "cast") -> RunConfig:
    return build(RunConfig, config(change, step), "config")


def test_a_burn_in_comes_before_the_teacher_when_a_run_is_looked_at():
    run = build(RunConfig, coco.get_config("evaluate,smoke,system=guided_distillation").to_dict(), "config")
    order = evaluated(run)
    assert order.index("distill") < order.index("burn_in") < order.index("finetune")


def check_parameters_of(run: RunConfig, workdir) -> None:
    check_parameters(run, CATEGORIES, make_mesh(), workdir)


def save(run: RunConfig, role: str, path, categories=CATEGORIES) -> None:
    """Weights of a role, as an earlier run would have left them."""
    shapes = run.segmenter(role, categories).abstract()
    save_weights(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), {}, categories)


@pytest.mark.parametrize(
    ("order", "missing"),
    [
        (("adapt",), "finetune"),
        (("finetune", "adapt"), "pseudo_label/finetuned"),
        (("refine", "distill"), "distill"),
        (("pseudo_label", "finetune"), "finetune"),
        (("finetune", "pseudo_label", "distill"), "adapt"),
        (("refine",), "distill"),
    ],
)
def test_a_pipeline_out_of_order_is_refused(order, missing, tmp_path):
    run = run_config(lambda values: values.update(pipeline=order))
    with pytest.raises(MissingStepError, match=rf"(?s)needs the result of '{missing}'.*and the other arguments"):
        check_order(run, tmp_path)


def test_a_step_may_find_what_it_needs_in_the_workdir(tmp_path):
    check_order(run_config(), tmp_path)
    for made in ("finetune/exported/last.safetensors", "pseudo_labels/finetuned/stats.json"):
        (tmp_path / made).parent.mkdir(parents=True)
        (tmp_path / made).touch()
    (tmp_path / "refine" / "exported").mkdir(parents=True)
    (tmp_path / "refine" / "exported" / "last.safetensors").touch()
    for step in ("adapt", "pseudo_label", "evaluate", "refine"):
        check_order(run_config(step=step), tmp_path)
    with pytest.raises(MissingStepError, match="evaluate' needs the result of 'distill'"):
        check_order(run_config(lambda values: values["evaluate"].update(step="distill"), "evaluate"), tmp_path)


def test_pretraining_needs_images(tmp_path):
    run = build(RunConfig, demo.get_config("pretrain,smoke").to_dict(), "config")
    check_images(run, SimpleNamespace(pretrain=()))
    with pytest.raises(UserError, match=r"config\.steps\.pretrain\.source is 'pretrain'"):
        check_images(run, SimpleNamespace(pretrain=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda steps: steps["refine"]["optimizer"].update(learning_rate_rules=(("encoder/.*", 0.1), (".*", 1.0))),
            r"config\.steps\.refine: optimizer\.learning_rate_rules: rule 'encoder/\.\*' matches no parameter",
        ),
        (
            lambda steps: steps["distill"]["optimizer"].update(frozen=("segmenter/enc/.*",)),
            r"config\.steps\.distill: optimizer\.frozen: rule 'segmenter/enc/\.\*' matches no parameter",
        ),
        (
            lambda steps: steps["adapt"]["train"].update(sharding_rules=(("segmenter/.*", "auto"),)),
            r"config\.steps\.adapt: .*sharding.rules: no rule matches projection",
        ),
        (
            lambda steps: steps["refine"]["optimizer"].update(schedule="linear"),
            r"steps\.refine\.optimizer\.schedule 'linear' is unknown; known: ",
        ),
        (lambda steps: steps["refine"]["optimizer"].update(warmup_steps=4), r"steps\.refine: .*warmup_steps is 4"),
        (
            lambda steps: steps["refine"].update(start="finetune"),
            r"(?s)config\.steps\.refine\.start: .*do not fit.*encoder/.* has shape",
        ),
        (lambda steps: steps["refine"].update(start_parts=("decodr",)), r"no parameters under decodr"),
    ],
)
def test_faulty_rules_and_starts_are_found_for_every_step(change, message, tmp_path):
    check_parameters_of(run_config(), tmp_path)
    with pytest.raises(UserError, match=message):
        check_parameters_of(run_config(lambda values: change(values["steps"])), tmp_path)


def test_weights_to_start_from_are_held_against_the_model(tmp_path):
    path = tmp_path / "weights" / "model.safetensors"
    run = run_config(lambda values: values.update(init={"teacher": str(path), "student": ""}))
    save(run, "teacher", path)
    check_parameters_of(run, tmp_path)
    save(run, "student", path)
    with pytest.raises(UserError, match=r"(?s)config\.init\.teacher: .*model\.safetensors: the weights do not fit"):
        check_parameters_of(run, tmp_path)
    save(run, "teacher", path, (Category(1, "cell"), Category(7, "dirt")))
    with pytest.raises(
        UserError, match=r"other classes \(1 cell, 7 dirt\) than the labelled images \(1 cell, 2 dust\)"
    ):
        check_parameters_of(run, tmp_path)
    parts = lambda values: [values["steps"][name].update(start_parts=("encoder",)) for name in ("finetune", "adapt")]
    check_parameters_of(run_config(lambda values: (values.update(init=run.init), parts(values))), tmp_path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable export"):
        check_parameters_of(run, tmp_path)
    for step in ("finetune", "adapt"):  # what is finished no longer starts
        (tmp_path / step).mkdir()
        (tmp_path / step / "done.json").write_text('{"step": 3}')
    check_parameters_of(run, tmp_path)


@pytest.mark.parametrize("inside", ["", "refine", "refine/exported"])
def test_of_the_folder_of_a_run_the_file_to_start_from_is_named(inside, tmp_path):
    file, one = tmp_path / "refine" / "exported" / "last.safetensors", SimpleNamespace(size=1)
    file.parent.mkdir(parents=True)
    save(run_config(), "student", file)
    given = str(tmp_path / inside)
    starting = lambda path: run_config(lambda values: values.update(init={"teacher": "", "student": path}))
    with pytest.raises(UserError, match=rf"config\.init\.student: no weights at .*; name the file, such as {file}"):
        check_settings(starting(given), one)
    check_settings(starting(str(file)), one)


def test_an_export_of_other_classes_is_not_evaluated(tmp_path):
    path = tmp_path / "model.safetensors"
    evaluated = lambda values: values.update(step="zero_shot", init={"teacher": str(path), "student": ""})
    run = run_config(evaluated)
    save(run, "teacher", path)
    check_parameters_of(run, tmp_path)
    save(run, "teacher", path, (Category(1, "cell"), Category(7, "dirt")))
    with pytest.raises(UserError, match=r"other classes \(1 cell, 7 dirt\) than the labelled images .*as it is"):
        check_parameters_of(run, tmp_path)


def test_only_the_steps_to_run_must_divide_over_the_devices(tmp_path):
    eight = SimpleNamespace(size=8)

    def grown(values: dict[str, Any]) -> None:
        values["steps"]["distill"]["data"].update(batch_labelled=8, batch_unlabelled=8)

    check_settings(run_config(grown, "distill"), eight)
    with pytest.raises(UserError) as refused:
        check_settings(run_config(grown), eight)
    lines = [line.split(";")[0].strip() for line in str(refused.value).splitlines()]
    groups = ("finetune.data.batch_labelled", "adapt.data.batch_labelled", "adapt.data.batch_unlabelled")
    groups += ("refine.data.batch_labelled", "student_supervised.data.batch_labelled")
    assert lines == [f"config.steps.{group}: a batch of 2 cannot be split over 8 devices" for group in groups]


def test_an_encoder_is_resized_as_its_checkpoint_was_trained(tmp_path):
    """The convention comes with the converted weights; what contradicts them is refused."""
    encoder = {"embed_dim": 64, "num_heads": 2, "position_offset": 0.1, "position_antialias": False, "drop_path": 0.5}
    write_json(
        tmp_path / "config.json",
        {
            "model": {"encoder": encoder},
            "converted": {"decided": {"encoder": {"position_offset": 0.1, "num_register_tokens": 0}}},
        },
    )

    def change(values):
        values["model"]["student"] = {"name": "student_tiny"}
        values["init"]["student"] = str(tmp_path)

    adopted = as_converted(run_config(change))
    assert segmenter_config(adopted.model["student"]).encoder.position_offset == 0.1
    assert segmenter_config(run_config(change).model["student"]).encoder.position_offset == 0.0
    assert adopted.model["teacher"] == run_config(change).model["teacher"]

    def contradict(values):
        change(values)
        values["model"]["student"]["encoder"] = {"num_heads": 4}

    with pytest.raises(UserError, match=r"config\.init\.student: .* num_heads is 4, in the weights 2"):
        as_converted(run_config(contradict))

    def another(values):
        change(values)
        values["model"]["student"]["encoder"] = {"name": "resnet50"}

    write_json(
        tmp_path / "config.json", {"model": {"encoder": encoder}, "converted": {"name": "dinov2_s", "decided": {}}}
    )
    with pytest.raises(UserError, match=r"holds a dinov2_s; config\.model\.student has another .*, BottleneckResNet"):
        as_converted(run_config(another))
    write_json(tmp_path / "config.json", {"model_type": "dinov2"})
    with pytest.raises(UserError, match="is a Hugging Face model; convert it first: cast-convert"):
        as_converted(run_config(change))

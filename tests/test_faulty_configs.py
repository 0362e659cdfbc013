"""Faulty arguments and fields of the configurations are refused, by name, before any work."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from cast_jax.core.config import build
from cast_jax.core.errors import UserError
from cast_jax.pipeline import Pipeline
from cast_jax.settings import RunConfig
from configs import common

FILES = sorted(path.stem for path in Path(common.__file__).parent.glob("*.py") if path.stem != "common")


def get_config(file: str, argument: str = "cast"):
    return importlib.import_module(f"configs.{file}").get_config(argument)


def run_config(file: str, argument: str = "cast") -> RunConfig:
    return build(RunConfig, get_config(file, argument).to_dict(), "config")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("distil", r"unknown step 'distil'; known steps: cast, pretrain, finetune, pseudo_label"),
        ("", r"unknown step ''"),
        ("distill,sead=1", r"unknown config argument 'sead'; known: seed, smoke"),
        ("distill,system=kd,system=pais", r"config argument system is given twice"),
        ("distill,seed=one", r"config argument seed='one' must be of type int"),
        ("distill,seed", r"config argument seed='' must be of type int"),
        ("distill,smoke=maybe", r"config argument smoke='maybe' must be true or false"),
        ("cast,system=casts", r"unknown system 'casts'; known systems: cast, supervised, self_training"),
    ],
)
@pytest.mark.parametrize("file", FILES)
def test_faulty_arguments_are_refused(file, argument, message):
    with pytest.raises(ValueError, match=message):
        get_config(file, argument)


def test_arguments_have_types():
    assert get_config("cityscapes", "cast,labelled=30").data.labelled == 30
    assert get_config("coco", "cast,size=280,smoke=false").data.image_size == (280, 280)
    with pytest.raises(ValueError, match=r"size='big' must be of type int"):
        get_config("coco", "cast,size=big")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["steps"]["distill"]["objective"].update(lambda_pl=1.0),
            "distill.objective: unknown key lambda_pl",
        ),
        (lambda c: c["steps"]["distill"]["train"].update(epochs=3), "distill.train: unknown key epochs"),
        (lambda c: c["steps"]["distill"]["optimizer"].update(lr=3), "distill.optimizer: unknown key lr"),
        (lambda c: c["steps"]["distill"]["data"].update(batch=3), "distill.data: unknown key batch"),
        (lambda c: c["data"]["view"].update(zoom=3), "data.view: unknown key zoom"),
        (lambda c: c["model"]["teacher"].update(name="sam"), r"config\.model\.teacher\.name 'sam' is unknown"),
        (lambda c: c.update(extra=1), "config: unknown key extra"),
        (lambda c: c.pop("steps"), "config: missing key steps"),
        (lambda c: c.update(pipeline=()), "config.pipeline is empty"),
        (lambda c: c.update(seed="one"), "config.seed is 'one'; it must be of type int"),
        (lambda c: c.update(embedding_dim=0), r"config\.embedding_dim is 0; it must lie in \[1, "),
        (lambda c: c.update(init={"tutor": ""}), r"config\.init 'tutor' is unknown; known: student, teacher"),
        (lambda c: c["evaluate"].update(batch_size=0), r"config\.evaluate\.batch_size is 0; it must lie in \[1, "),
        (lambda c: c["evaluate"].update(max_detections=0), r"config\.evaluate\.max_detections is 0"),
        (lambda c: c["evaluate"].update(min_score=1.5), r"config\.evaluate\.min_score is 1\.5"),
        (lambda c: c["evaluate"].update(overlays=-1), r"config\.evaluate\.overlays is -1"),
        (
            lambda c: c["evaluate"].update(step="refined"),
            r"config\.evaluate\.step 'refined' is unknown; known: adapt, distill",
        ),
        (lambda c: c["pseudo_labels"].update(threshold=-0.1), r"config\.pseudo_labels\.threshold is -0\.1"),
        (lambda c: c["pseudo_labels"].update(shard_size=0), r"config\.pseudo_labels\.shard_size is 0"),
        (
            lambda c: c["data"].update(labelled="many"),
            r"config\.data\.labelled is 'many'; for kind 'cityscapes' it must",
        ),
        (lambda c: c["data"].update(on_unreadable="ignore"), r"config\.data\.on_unreadable 'ignore' is unknown"),
        (lambda c: c["data"].update(image_size=(518,)), r"config\.data\.image_size is \(518,\); it must be of type"),
        (lambda c: c["data"]["view"].update(scale=(2.0, 0.5)), r"config\.data\.view\.scale is \(2\.0, 0\.5\)"),
        (lambda c: c["steps"]["refine"]["data"].update(view=3), r"config\.steps\.refine\.data\.view is 3"),
        (
            lambda c: c["steps"]["refine"]["data"].update(view={"scale": (2.0, 0.5)}),
            r"config\.steps\.refine\.data\.view\.scale is \(2\.0, 0\.5\)",
        ),
        (lambda c: c["steps"]["refine"]["train"].update(steps=0), r"config\.steps\.refine\.train\.steps is 0"),
        (lambda c: c["steps"]["refine"]["train"].update(best_metric="ap"), r"train\.best_metric 'ap' is unknown"),
        (lambda c: c["steps"]["refine"]["train"].update(seed=3), r"refine\.train\.seed is not read: set config\.seed"),
        (
            lambda c: c["steps"]["refine"]["train"].update(optimizer={"learning_rate": 1.0}),
            r"train\.optimizer is not read: set the step's optimizer",
        ),
        (lambda c: c["steps"]["refine"]["data"].update(seed=3), r"refine\.data\.seed follows from config\.seed"),
        (lambda c: c["steps"]["refine"]["objective"].update(pseudo_label_weight=1.0), "which needs pseudo_labels"),
        (
            lambda c: c["steps"]["refine"].update(pseudo_labels="adapted"),
            r"config\.steps\.refine: no term of the objective reads unlabelled images: set pseudo_label_weight",
        ),
        (
            lambda c: c["steps"]["finetune"]["data"].update(batch_unlabelled=4),
            r"config\.steps\.finetune: no term of the objective reads unlabelled images",
        ),
        (
            lambda c: c["steps"]["adapt"].update(pseudo_labels="online"),
            r"config\.steps\.adapt: .*made by a moving average: set train\.ema_decay",
        ),
        (
            lambda c: (
                c["steps"]["adapt"].update(pseudo_labels="online"),
                c["steps"]["adapt"]["train"].update(ema_decay=0.99),
                c["steps"]["adapt"]["objective"].update(pseudo_label_weight=0.0),
            ),
            r"pseudo_labels 'online' need objective\.pseudo_label_weight above 0",
        ),
        (
            lambda c: (
                c["steps"]["adapt"].update(pseudo_labels="online"),
                c["steps"]["adapt"]["train"].update(ema_decay=0.99),
                c["steps"]["adapt"]["objective"].update(contrastive_weight=0.0, pseudo_label_views=("strong",)),
                c["steps"]["adapt"]["data"].update(views=("strong",)),
            ),
            r"pseudo_labels 'online' need .* data\.views \('weak', 'strong'\)",
        ),
        (
            lambda c: c["steps"]["adapt"].update(online_labels={"class_threshold": 0.9}),
            r"config\.steps\.adapt: online_labels is not read",
        ),
        (
            lambda c: c["steps"]["adapt"].update(online_labels={"weighting": "best"}),
            r"config\.steps\.adapt\.online_labels\.weighting 'best' is unknown; known: none, quality",
        ),
        (
            lambda c: c["steps"]["adapt"].update(pseudo_labels="average"),
            "pseudo_labels 'average' is unknown; known: online, adapted, finetuned",
        ),
        (lambda c: c["steps"]["adapt"]["data"].update(batch_labelled=0), "which needs data.batch_labelled"),
        (
            lambda c: c["steps"]["adapt"]["objective"].update(contrastive_stride=149),
            "must divide both sides of .* 148 x 296",
        ),
        (lambda c: c["data"].update(max_instances=1000), "has 100 queries, fewer than config.data.max_instances=1000"),
        (
            lambda c: c["model"]["teacher"].update(mask_decoder={"query_stride": 40}),
            "config.model.teacher has 28 queries, fewer than",
        ),
        (lambda c: c["data"].update(image_size=(512, 1024)), r"must be multiples of the model's patch size 14"),
        (lambda c: c["steps"]["distill"]["data"].update(views=("weak",)), r"distill.*strong"),
        (lambda c: c["steps"]["distill"]["objective"].update(supervised_views=()), r"distill.*supervised_views"),
        (lambda c: c["steps"]["refine"]["data"].update(batch_labelled=0), "both 0: a batch needs an image"),
        (
            lambda c: c["steps"]["refine"]["train"].update(accumulate=3),
            r"refine\.data\.batch_labelled: a batch of 8 cannot be split over 1 devices and there into 3 micro-batches",
        ),
        (
            lambda c: c["model"]["student"].update(encoder={"remat": "all"}),
            "remat 'all' is unknown; known: none, element",
        ),
    ],
)
def test_faults_are_found_before_the_first_step(change, message, tmp_path):
    config = get_config("cityscapes").to_dict()
    change(config)
    with pytest.raises(UserError, match=message):
        Pipeline(config, tmp_path).check()

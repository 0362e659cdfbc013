"""Every configuration file with every step: it builds, its settings are typed, its full-size loss has a shape."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core.annotations import Category
from cast_jax.core.config import to_json
from cast_jax.core.errors import UserError
from cast_jax.core.optim import make_optimizer
from cast_jax.data.datasets import Datasets
from cast_jax.data.pipeline import LoaderConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter
from cast_jax.pipeline import Pipeline
from cast_jax.recipes.semi_supervised import SemiSupervised
from configs import common

FILES = sorted(path.stem for path in Path(common.__file__).parent.glob("*.py") if path.stem != "common")
BUILT: dict[str, Functional] = {}
CATEGORIES = tuple(Category(10 * i, f"class {i}") for i in range(8))


def get_config(file: str, argument: str = "cast"):
    return importlib.import_module(f"configs.{file}").get_config(argument)


def pipeline_of(file: str, folder: Path, argument: str = "cast") -> Pipeline:
    """The pipeline of a configuration over images that are never looked at."""
    source: Any = SimpleNamespace(categories=CATEGORIES)
    pipeline = Pipeline(get_config(file, argument).to_dict(), folder)
    pipeline.__dict__["datasets"] = Datasets(source, source, source, source)
    return pipeline


def abstract_batch(config: LoaderConfig) -> dict[str, Any]:
    """The shapes of the batches that a loader of this configuration makes."""
    (height, width), slots = config.view.image_size, config.view.max_instances
    packed = (height, -(-width // 8))

    def group(batch: int) -> dict[str, Any]:
        array = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
        view = {
            "image": array(jnp.uint8, height, width, 3),
            "valid_box": array(jnp.float32, 4),
            "masks": array(jnp.uint8, slots, *packed),
            "labels": array(jnp.int32, slots),
            "instance_valid": array(jnp.bool, slots),
            "scores": array(jnp.float32, slots),
            "ignore": array(jnp.uint8, *packed),
        }
        between = {"strong_to_weak": array(jnp.float32, 2, 3)} if len(config.views) == 2 else {}
        return {"instances_cut": array(jnp.int32)} | between | dict.fromkeys(config.views, view)

    sizes = {"labelled": config.batch_labelled, "unlabelled": config.batch_unlabelled}
    return {kind: group(size) for kind, size in sizes.items() if size}


def test_there_are_configurations():
    assert {"demo", "cityscapes", "coco", "nuclei"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_step_builds(file, tmp_path):
    for smoke in ("", ",smoke"):
        for step in common.STEPS:
            config = get_config(file, f"{step},seed=3{smoke}")
            assert (config.step, config.seed) == (step, 3)
            assert config.file == f"configs/{file}.py"
            to_json(config.to_dict())  # stored beside the run
        pipeline = pipeline_of(file, tmp_path, f"cast{smoke}")
        trained = pipeline.config["steps"]
        for name in pipeline.config["pipeline"]:
            assert name in trained or name.startswith("pseudo_label/")
        for name, step in trained.items():
            assert not step["start"] or step["start"] in trained
            assert pipeline.train_config(name).steps == step["train"]["steps"]
            assert pipeline.loader_config(name).view.image_size == pipeline.image_size
    assert get_config(file).step == "cast"


@pytest.mark.parametrize("file", FILES)
def test_the_paper_s_order_and_weights(file):
    """What each step starts from, and which terms it has (method.md, section 1)."""
    config = get_config(file)
    order = [name for name in config.pipeline if name != "pretrain"]
    assert order[:6] == ["finetune", "pseudo_label/finetuned", "adapt", "pseudo_label/adapted", "distill", "refine"]
    steps = config.steps
    assert (steps.adapt.pseudo_labels, steps.distill.pseudo_labels) == ("finetuned", "adapted")
    assert steps.adapt.start == steps.finetune.start  # adapt is reset to the pretrained teacher
    assert steps.refine.start == "distill"
    for name, step in steps.items():
        semi = name in ("adapt", "distill")
        assert step.objective.pseudo_label_weight == (1.0 if semi else 0.0)
        assert step.objective.contrastive_weight == (0.2 if semi else 0.0)
        assert (step.data.batch_unlabelled > 0) == semi
        assert step.objective.contrastive.temperature == 0.2


def test_the_papers_hyper_parameters():
    steps = get_config("cityscapes").steps
    for name, updates in {"finetune": 1_000, "adapt": 5_000, "distill": 90_000, "refine": 2_000}.items():
        assert steps[name].train.steps == updates
    assert (steps.adapt.optimizer.schedule, steps.adapt.optimizer.weight_decay) == ("multi_step", 0.01)
    assert (steps.distill.optimizer.schedule, steps.distill.optimizer.weight_decay) == ("polynomial", 0.05)
    assert (steps.distill.optimizer.clip_norm, steps.adapt.optimizer.clip_norm) == (0.1, None)
    assert steps.distill.objective.contrastive.num_negatives == 256
    assert steps.distill.objective.criterion.num_points == 12_544


def segmenter_once(self: Pipeline, role: str, num_classes: int) -> Functional:
    """Tracing a large model takes longer than tracing its loss, and does not depend on the image size."""
    key = repr((self.config["model"][role], num_classes))
    if key not in BUILT:
        BUILT[key] = build_segmenter(self.config["model"][role], num_classes, self.image_size)
    return BUILT[key]


@pytest.mark.parametrize("file", FILES)
def test_the_full_size_loss(file, tmp_path, monkeypatch):
    """Each trained step's loss and optimiser, traced without allocating anything."""
    monkeypatch.setattr(Pipeline, "segmenter", segmenter_once)
    pipeline = pipeline_of(file, tmp_path)
    seen: dict[str, list[str]] = {}
    for name, step in pipeline.config["steps"].items():
        recipe = pipeline.recipe(name, len(CATEGORIES))
        params = {"segmenter": recipe.segmenter.abstract()}
        if recipe.config.contrastive_weight:
            params["projection"] = recipe.projection.abstract()
        train = pipeline.train_config(name)
        assert make_optimizer(train.optimizer, params, train.steps).multipliers
        traced = repr((step["model"], step["data"], step["objective"]))
        if traced not in seen:
            seen[traced] = trace(recipe, params, abstract_batch(pipeline.loader_config(name)))
        names = seen[traced]
        assert "loss/supervised_mask" in names
        assert ("contrastive/loss" in names) == ("loss/pseudo_label" in names) == (name in ("adapt", "distill"))


def trace(recipe: SemiSupervised, params: Any, batch: Any) -> list[str]:
    """The names of a step's metrics."""
    loss, metrics = jax.eval_shape(recipe.loss_fn, params, {}, batch, jax.random.key(0))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert all(leaf.shape == () for pair in metrics.values() for leaf in pair)
    return list(metrics)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("distil", r"unknown step 'distil'; known steps: cast, pretrain, finetune, pseudo_label"),
        ("", r"unknown step ''"),
        ("distill,sead=1", r"unknown config argument 'sead'; known: seed, smoke"),
        ("distill,seed=one", r"config argument seed='one' must be of type int"),
        ("distill,seed", r"config argument seed='' must be of type int"),
        ("distill,smoke=maybe", r"config argument smoke='maybe' must be true or false"),
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
        (lambda c: c["steps"]["distill"]["optimizer"].update(lr=3), "train.optimizer: unknown key lr"),
        (lambda c: c["steps"]["distill"]["data"].update(batch=3), "distill.data: unknown key batch"),
        (lambda c: c["data"]["view"].update(zoom=3), "data.view: unknown key zoom"),
        (lambda c: c["model"]["teacher"].update(name="sam"), r"config\.model\.teacher\.name 'sam' is unknown"),
        (lambda c: c["data"].update(max_instances=1000), "has 100 queries, fewer than config.data.max_instances=1000"),
        (lambda c: c["data"].update(image_size=(512, 1024)), r"must be multiples of the model's patch size 14"),
        (lambda c: c["steps"]["distill"]["data"].update(views=("weak",)), r"distill.*strong"),
        (lambda c: c["steps"]["distill"]["objective"].update(supervised_views=()), r"distill.*supervised_views"),
        (lambda c: c["steps"]["refine"]["data"].update(batch_labelled=0), "both 0: a batch needs an image"),
    ],
)
def test_faults_are_found_before_the_first_step(change, message, tmp_path):
    config = get_config("cityscapes").to_dict()
    change(config)
    with pytest.raises(UserError, match=message):
        Pipeline(config, tmp_path).check()

"""Every configuration file with every step: it builds, its settings are typed, its full-size loss has a shape."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core import target
from cast_jax.core.annotations import Category
from cast_jax.core.config import build, to_json
from cast_jax.core.optim import make_optimizer
from cast_jax.core.sharding import make_mesh
from cast_jax.data.pipeline import LoaderConfig
from cast_jax.preflight import check_settings
from cast_jax.recipes.semi_supervised import SemiSupervised
from cast_jax.settings import RunConfig
from configs import common

FILES = sorted(path.stem for path in Path(common.__file__).parent.glob("*.py") if path.stem != "common")
CATEGORIES = tuple(Category(10 * i, f"class {i}") for i in range(8))


def get_config(file: str, argument: str = "cast"):
    return importlib.import_module(f"configs.{file}").get_config(argument)


def run_config(file: str, argument: str = "cast") -> RunConfig:
    return build(RunConfig, get_config(file, argument).to_dict(), "config")


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
def test_every_step_builds(file):
    for smoke in ("", ",smoke"):
        for step in set(common.STEPS) - {"burn_in"}:  # another system's
            config = get_config(file, f"{step},seed=3{smoke}")
            assert (config.step, config.seed) == (step, 3)
            assert config.file == f"configs/{file}.py"
            to_json(config.to_dict())  # stored beside the run
        run = run_config(file, f"cast{smoke}")
        check_settings(run, make_mesh())
        for name, step in run.steps.items():
            assert run.train_config(name).steps == step.train.steps
            assert run.train_config(name).optimizer == step.optimizer
            assert run.loader_config(name).view.image_size == run.data.image_size
    assert get_config(file).step == "cast"


@pytest.mark.parametrize("file", FILES)
def test_the_paper_s_order_and_weights(file):
    """What each step starts from, and which terms it has (the paper's section 3.3)."""
    config = get_config(file)
    order = [name for name in config.pipeline if name != "pretrain"]
    assert order[:6] == ["finetune", "pseudo_label/finetuned", "adapt", "pseudo_label/adapted", "distill", "refine"]
    steps = config.steps
    assert (steps.adapt.pseudo_labels, steps.distill.pseudo_labels) == ("finetuned", "adapted")
    # Adapt is reset to the pretrained teacher, where there is one.
    assert steps.adapt.start == steps.finetune.start
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


@pytest.mark.parametrize("file", FILES)
def test_the_baseline_has_as_many_updates_as_distill_and_refine(file):
    for argument in ("cast", "cast,smoke"):
        config = get_config(file, argument)
        count = lambda name, steps=config.steps: steps[name].train.steps
        assert count("student_supervised") == count("distill") + count("refine")
        config.steps.distill.train.steps = 17
        config.steps.refine.train.steps = 2
        assert config.to_dict()["steps"]["student_supervised"]["train"]["steps"] == 19
        config.steps.student_supervised.train.steps = 5  # but for what one asks for
        assert (count("student_supervised"), count("distill")) == (5, 17)


def test_every_trained_step_is_profiled_on_request():
    config = get_config("cityscapes")
    config.profile.steps = 3
    run = build(RunConfig, config.to_dict(), "config")
    assert {(run.train_config(name).profile.start, run.train_config(name).profile.steps) for name in run.steps} == {
        (10, 3)
    }


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_follows_the_images_of_an_update(scaling, factor):
    config = get_config("cityscapes")
    config.steps.distill.optimizer.learning_rate_scaling = scaling
    config.steps.distill.data.update({"batch_labelled": 24, "batch_unlabelled": 8})
    run = build(RunConfig, config.to_dict(), "config")
    assert run.train_config("distill").optimizer.learning_rate == pytest.approx(factor * 1e-4)
    assert run.train_config("refine").optimizer == run.steps["refine"].optimizer


@pytest.mark.parametrize("file", FILES)
def test_reference_batches_are_the_configurations_own(file):
    run = run_config(file)
    for name, step in run.steps.items():
        loader = run.loader_config(name)
        assert step.optimizer.reference_batch == loader.batch_labelled + loader.batch_unlabelled


@pytest.mark.parametrize("file", FILES)
def test_the_full_size_loss(file):
    """Each trained step's loss and optimiser, traced without allocating anything."""
    run = run_config(file)
    seen: dict[str, list[str]] = {}
    for name, step in run.steps.items():
        recipe, train = run.recipe(name, CATEGORIES), run.train_config(name)
        assert make_optimizer(train.optimizer, recipe.abstract(), train.steps).multipliers
        traced = repr((step.model, step.data, step.objective))
        if traced not in seen:
            seen[traced] = trace(recipe, recipe.abstract(), abstract_batch(run.loader_config(name)))
        names = seen[traced]
        assert "loss/supervised_mask" in names
        assert ("contrastive/loss" in names) == ("loss/pseudo_label" in names) == (name in ("adapt", "distill"))


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_pixels_are_embedded_in_the_backend_s_dtype(backend, dtype, monkeypatch):
    """From and to float32, with parameters of float32; at full size it is a tenth of a TFLOP."""
    monkeypatch.setattr(target, "backend", lambda: backend)
    recipe = run_config("demo", "distill,smoke").recipe("distill", CATEGORIES)
    params = recipe.abstract()["projection"]
    features = jax.ShapeDtypeStruct((1, 4, 4, params["hidden"]["kernel"].shape[0]), jnp.float32)
    jaxpr = jax.make_jaxpr(recipe.projection.apply)(params, features)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert [str(factor.aval.dtype) for product in products for factor in product.invars] == [dtype] * 4
    assert {str(leaf.dtype) for leaf in (*jaxpr.out_avals, *jax.tree.leaves(params))} == {"float32"}


def trace(recipe: SemiSupervised, params: Any, batch: Any) -> list[str]:
    """The names of a step's metrics."""
    frozen = {} if recipe.online_labels is None else {"ema": params}
    loss, metrics = jax.eval_shape(recipe.loss_fn, params, frozen, batch, jax.random.key(0))
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert all(leaf.shape == () for pair in metrics.values() for leaf in pair)
    return list(metrics)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in leaves(value, f"{path}.{key}".strip(".")).items()
    }


def changed(new: Any, old: Any) -> dict[str, Any]:
    """The leaves in which ``new`` is not ``old``."""
    known = leaves(old)
    return {name: value for name, value in leaves(new).items() if name not in known or known[name] != value}


PLAIN = {"adapt.objective.contrastive_weight": 0.0, "distill.objective.contrastive_weight": 0.0}
ADAPTED = ("finetune", "pseudo_label/finetuned", "adapt", "pseudo_label/adapted", "distill")


def online(step: str, decay: float, **labels: Any) -> dict[str, Any]:
    wanted = {"pseudo_labels": "online", "objective.pseudo_label_views": ("strong",), "train.ema_decay": decay}
    wanted |= {f"online_labels.{key}": value for key, value in labels.items()}
    return {f"{step}.{key}": value for key, value in wanted.items()}


def started(step: str, start: str) -> dict[str, Any]:
    from_all = {f"{step}.start_parts": ()} if step == "distill" else {}
    return {f"{step}.start": start, f"{step}.train.ema_warmup": False} | from_all


# Of each system the steps after pretraining, and all that differs from CAST's steps at full size: the values are those
# of the systems' reference implementations.
SYSTEMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "supervised": (("finetune", "student_supervised"), PLAIN),
    "self_training": (ADAPTED[:3], PLAIN),
    "ema_teacher": (
        ("finetune", "adapt"),
        PLAIN
        | online("adapt", 0.9996, class_threshold=0.7)
        | started("adapt", "finetune")
        | {"adapt.objective.pseudo_label_weight": 4.0, "adapt.train.evaluate_ema": True},
    ),
    "pais": (
        ("distill",),
        PLAIN | online("distill", 0.999, class_threshold=0.35, mask_threshold=0.3, weighting="quality"),
    ),
    "guided_distillation": (
        ("finetune", "pseudo_label/finetuned", "burn_in", "distill"),
        PLAIN
        | online("distill", 0.9996, class_threshold=0.7)
        | started("distill", "burn_in")
        | {"distill.train.steps": 45_000, "distill.objective.pseudo_label_weight": 2.0},
    ),
    "kd": (ADAPTED, {"distill.objective.contrastive_weight": 0.0}),
    "kd_unlabelled": (
        ADAPTED,
        {
            "distill.objective.contrastive_weight": 0.0,
            "distill.objective.supervised_weight": 0.0,
            "distill.data.batch_labelled": 0,
            "distill.data.batch_unlabelled": 8,
        },
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_the_systems_change(system):
    """These values and no others, of what the paper's table 1 compares CAST with."""
    assert {"cast", *SYSTEMS} == set(common.SYSTEMS)
    of_cast, config = (get_config("cityscapes", f"cast,system={name}").to_dict() for name in ("cast", system))
    pipeline, wanted = SYSTEMS[system]
    assert config["pipeline"] == pipeline
    steps, known = config.pop("steps"), of_cast.pop("steps")
    if system == "guided_distillation":
        assert steps.pop("finetune") == known.pop("finetune") | known["student_supervised"]
        burn_in = {"pseudo_label_weight": 2.0, "pseudo_label_views": ("strong",), "contrastive_weight": 0.0}
        burn_in = {f"objective.{key}": value for key, value in burn_in.items()}
        burn_in |= {"pseudo_labels": "finetuned", "train.steps": 45_000}
        assert changed(steps.pop("burn_in"), known["distill"]) == burn_in
    assert changed(steps, known) == wanted
    assert set(changed(config, of_cast)) <= {"pipeline"}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("file", FILES)
def test_the_systems_that_cast_is_compared_with(file, system):
    """In every configuration; labels made during training leave out what stored ones do."""
    for smoke in ("", ",smoke"):
        config = get_config(file, f"cast,system={system}{smoke}")
        pipeline, _ = SYSTEMS[system]
        pretrained = ("pretrain",) if file in ("demo", "nuclei") else ()
        assert config.pipeline == (*pretrained, *pipeline)
        run = build(RunConfig, config.to_dict(), "config")
        check_settings(run, make_mesh())
        for name in run.steps:
            labels = run.online_labels(name)
            assert (labels is not None) == (run.steps[name].pseudo_labels == "online")
            if labels is not None:
                assert labels.max_iou == run.pseudo_labels.max_iou
                assert labels.min_area == run.loader_config(name).view.min_area == config.data.view.min_area
                assert (run.steps[name].train.ema_decay == 0.99) == (file in ("demo", "nuclei") and not smoke)
        missing = {"adapt", "burn_in", "distill"} - set(pipeline)
        for step in missing | ({"refine"} if "distill" in missing else set()):
            with pytest.raises(ValueError, match=rf"system={system} has no step '{step}'; it is "):
                get_config(file, f"{step},system={system}{smoke}")
    with pytest.raises(ValueError, match=r"system=cast has no step 'burn_in'"):
        get_config(file, "burn_in")


def test_labels_made_during_training_are_as_small_as_the_step_s_own_views_keep():
    config = get_config("cityscapes", "cast,system=pais").to_dict()
    config["steps"]["distill"]["data"]["view"] = {"min_area": 3}
    labels = build(RunConfig, config, "config").online_labels("distill")
    assert labels is not None
    assert labels.min_area == 3


def test_guided_distillation_is_as_long_as_its_halves_say():
    config = get_config("cityscapes", "cast,system=guided_distillation")
    config.steps.distill.train.steps = 10
    steps = config.to_dict()["steps"]
    count = {name: steps[name]["train"]["steps"] for name in ("burn_in", "finetune", "student_supervised")}
    assert count == {"burn_in": 10, "finetune": 2_020, "student_supervised": 2_020}


def test_nothing_is_pretrained_that_nothing_starts_from():
    for system in SYSTEMS:
        config = get_config("demo", f"cast,teacher=grounded_sam2_tiny,system={system}")
        starts = {config.steps[step].start for step in config.pipeline if step in config.steps}
        assert ("pretrain" in config.pipeline) == ("pretrain" in starts)


def test_labels_made_during_training_at_full_size():
    run = run_config("cityscapes", "cast,system=pais")
    recipe = run.recipe("distill", CATEGORIES)
    names = trace(recipe, recipe.abstract(), abstract_batch(run.loader_config("distill")))
    assert {"loss/supervised_mask", "loss/pseudo_label_mask", "pseudo_labels/per_image"} <= set(names)
    assert "contrastive/loss" not in names

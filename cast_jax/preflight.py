"""What can be wrong with a run, found before its first step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from cast_jax.core.annotations import Category
from cast_jax.core.config import to_json
from cast_jax.core.errors import MissingStepError, UserError
from cast_jax.core.files import read_json
from cast_jax.core.optim import make_optimizer
from cast_jax.core.sharding import check_batch_size, param_shardings
from cast_jax.data.datasets import Datasets
from cast_jax.export import load_shapes, merge_weights, product
from cast_jax.models.functional import Params
from cast_jax.models.registry import check_image_size, segmenter_config
from cast_jax.models.student import StudentConfig
from cast_jax.recipes.online_labels import OnlineLabelsConfig
from cast_jax.settings import RunConfig
from cast_jax.trainer import finished
from cast_jax.workdir import result

# Where the results of `:pseudo_label` and `:evaluate` come from when no step is named: the first that is there.
TEACHERS = {"adapted": "adapt", "finetuned": "finetune"}
EVALUATED = ("refine", "distill", "burn_in", "student_supervised", "adapt", "finetune", "pretrain")
METRICS = ("mask_ap", "mask_ap50", "mask_ap75")


def with_audit(run: RunConfig) -> RunConfig:
    """``run`` with the trained step "audit" where that is asked for: ``finetune`` on fewer images."""
    if run.step != "audit" or "finetune" not in run.steps:
        return run
    return dataclasses.replace(run, steps={**run.steps, "audit": run.steps["finetune"]})


# Fields of an encoder that change how it is trained, not what its weights mean.
ONLY_TRAINING = ("remat", "drop_path", "dropout", "layer_scale")


def check_settings(run: RunConfig, mesh: Mesh) -> None:
    """Everything that can be wrong with the configuration by itself.

    Raises:
      UserError: naming the key and what it may be.
    """
    _check_names(run)
    for role, spec in run.model.items():
        model = segmenter_config(spec, f"config.model.{role}")
        check_image_size(model, run.data.image_size)
        if (queries := model.queries(run.data.image_size)) < run.data.max_instances:
            raise UserError(
                f"config.model.{role} has {queries} queries, fewer than "
                f"config.data.max_instances={run.data.max_instances}"
            )
    for name in run.steps:
        with _at(f"config.steps.{name}"):
            _check_step(run, name)
    _check_batches(run, mesh)


def _check_names(run: RunConfig) -> None:
    """Everything by which one part of the configuration names another."""
    steps = tuple(run.steps)
    teachers = tuple(which for which, step in TEACHERS.items() if step in steps)
    labelling = ("pseudo_label", *(f"pseudo_label/{which}" for which in teachers)) if teachers else ()
    runnable = (*steps, *labelling, "evaluate", *(("zero_shot",) if "teacher" in run.model else ()))
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [("config.step", run.step, ("cast", *runnable))]
    choices += [("config.pipeline", name, runnable) for name in run.pipeline]
    choices += [("config.evaluate.step", run.evaluate.step, ("", *steps))]
    choices += [("config.init", role, tuple(run.model)) for role in run.init]
    for name, step in run.steps.items():
        where = f"config.steps.{name}"
        choices.append((f"{where}.model", step.model, tuple(run.model)))
        choices.append((f"{where}.source", step.source, ("labelled", "pretrain")))
        choices.append((f"{where}.start", step.start, ("", *steps)))
        choices.append((f"{where}.pseudo_labels", step.pseudo_labels, ("", "online", *teachers)))
        choices.append((f"{where}.train.best_metric", step.train.best_metric, (None, *METRICS)))
    for key, value, known in choices:
        if value not in known:
            raise UserError(f"{key} {value!r} is unknown; known: {', '.join(filter(None, known))}")
    for role, part, given in _initial_files(run):
        if not weights_file(given).exists():
            export = product(Path(given)) if Path(given).is_dir() else None
            hint = f"; name the file, such as {export}" if export else ""
            key = ".".join(filter(None, ("config.init", role, part)))
            raise UserError(f"{key}: no weights at {weights_file(given)}{hint}")


def _check_batches(run: RunConfig, mesh: Mesh) -> None:
    """All steps' that are to run, since other devices or another ``accumulate`` concern most of them."""
    faults = []
    for name in filter(run.steps.__contains__, run.order):
        for group in ("batch_labelled", "batch_unlabelled"):
            try:
                check_batch_size(getattr(run.loader_config(name), group), mesh.size, run.steps[name].train.accumulate)
            except UserError as error:
                faults.append(f"config.steps.{name}.data.{group}: {error}")
    if faults:
        raise UserError("\n  ".join(faults))


def _check_step(run: RunConfig, name: str) -> None:
    """One step's terms and views."""
    step, loader = run.steps[name], run.loader_config(name)
    objective, model = step.objective, segmenter_config(run.model[step.model])
    objective.check_views(loader.views, f"config.steps.{name}")
    if objective.pseudo_label_weight and not (step.pseudo_labels and loader.batch_unlabelled):
        raise UserError(
            "objective.pseudo_label_weight is on, which needs pseudo_labels ('finetuned', 'adapted' or 'online') and "
            "data.batch_unlabelled of at least 1"
        )
    reads_unlabelled = objective.pseudo_label_weight or objective.contrastive_weight
    if (step.pseudo_labels or loader.batch_unlabelled) and not reads_unlabelled:
        raise UserError(
            "no term of the objective reads unlabelled images: set pseudo_label_weight or contrastive_weight above 0, "
            "or pseudo_labels='' and data.batch_unlabelled=0"
        )
    if step.pseudo_labels != "online" and step.online_labels != OnlineLabelsConfig():
        raise UserError("online_labels is not read: its labels are stored ones; set pseudo_labels to 'online'")
    if step.pseudo_labels == "online":
        if step.train.ema_decay is None:
            raise UserError("pseudo_labels 'online' are made by a moving average: set train.ema_decay (0.9996)")
        if not (objective.pseudo_label_weight and set(loader.views) == {"weak", "strong"}):
            raise UserError(
                "pseudo_labels 'online' need objective.pseudo_label_weight above 0 and data.views ('weak', 'strong')"
            )
    if step.train.ema_decay is not None and not step.train.evaluate_ema and step.pseudo_labels != "online":
        raise UserError(
            "train.ema_decay keeps an average that nothing reads: set train.evaluate_ema=True, or leave ema_decay out"
        )
    if objective.supervised_weight and not loader.batch_labelled:
        raise UserError("objective.supervised_weight is on, which needs data.batch_labelled of at least 1")
    rows, columns = model.pixel_map(run.data.image_size)
    stride = objective.contrastive_stride
    if objective.contrastive_weight and (rows % stride or columns % stride):
        raise UserError(
            f"objective.contrastive_stride is {stride}; it must divide both sides of the map of pixel features, "
            f"{rows} x {columns}"
        )


def check_order(run: RunConfig, workdir: Path) -> None:
    """Every step to run must find what it needs: in the workdir, or from a step before it.

    Raises:
      MissingStepError: with the command that makes what is missing.
    """
    done: set[str] = set()

    def made(name: str) -> bool:
        return name in done or result(workdir, name).exists()

    for name in run.order:
        finished_already = name in run.steps and made(name)
        for wanted in () if finished_already else _needs(run, name):
            if not any(map(made, wanted)):
                missing = wanted[-1]
                teacher = TEACHERS.get(missing.removeprefix("pseudo_label/"), missing)
                missing = missing if made(teacher) else teacher
                command = f"{run.file}:{missing.partition('/')[0]} --workdir {workdir}"
                raise MissingStepError(
                    f"step {name!r} needs the result of {missing!r}, which is not in {workdir}; make it with\n"
                    f"  python -m cast_jax.main --config {command}\n"
                    "and the other arguments and --config.… flags of this command"
                )
        if name == "pseudo_label":  # by the latest teacher
            name = next(f"{name}/{which}" for which, teacher in TEACHERS.items() if made(teacher))
        done.add(name)


def _needs(run: RunConfig, name: str) -> list[tuple[str, ...]]:
    """Of each tuple, a step needs the result of one."""
    if name == "evaluate":
        return [evaluated(run)]
    if name == "zero_shot":
        return []
    if name.startswith("pseudo_label"):
        which = name.partition("/")[2]
        return [(TEACHERS[which],) if which else tuple(step for step in TEACHERS.values() if step in run.steps)]
    step = run.steps[name]
    labels = f"pseudo_label/{step.pseudo_labels}" if step.pseudo_labels in TEACHERS else ""
    return [(needed,) for needed in (step.start, labels) if needed]


def evaluated(run: RunConfig) -> tuple[str, ...]:
    """The steps that ``:evaluate`` may look at; it takes the first that is there."""
    if run.evaluate.step:
        return (run.evaluate.step,)
    return tuple(step for step in EVALUATED if step in run.steps) or tuple(run.steps)


def check_images(run: RunConfig, datasets: Datasets) -> None:
    """Every step to run must find the kind of images that it trains on.

    Raises:
      UserError: naming the step.
    """
    for name in run.order:
        reads = run.loader_config(name).batch_unlabelled if name in run.steps else name.startswith("pseudo_label")
        if reads and datasets.unlabelled is None:
            raise UserError(
                f"config.data.unlabelled is not set, whose images step {name!r} reads; give a folder of images: "
                "--config.data.unlabelled=PATH"
            )
        if name in run.steps and run.steps[name].source == "pretrain" and datasets.pretrain is None:
            raise UserError(
                f"config.steps.{name}.source is 'pretrain', but data of kind {run.data.kind!r} has no images for "
                "pretraining; use 'labelled'"
            )
    if run.step == "audit" and len(datasets.labelled) < 2:
        raise UserError(":audit hides the labels of some images and trains on the others; it needs two labelled images")


def check_parameters(run: RunConfig, categories: Sequence[Category], mesh: Mesh, workdir: Path) -> None:
    """Every rule over parameter names, and the weights that the steps to run start from, against the models' shapes.

    Raises:
      UserError: listing what does not fit.
    """
    shapes = {}
    for name in run.steps:
        train, shapes[name] = run.train_config(name), run.recipe(name, categories).abstract()
        with _at(f"config.steps.{name}"):
            make_optimizer(train.optimizer, shapes[name], train.steps)
            param_shardings(shapes[name], mesh, train.sharding_rules)
    for name in run.order:
        if name in run.steps and not finished(workdir / name):
            _check_start(run, name, shapes, categories, workdir)
        if name == "zero_shot":
            _check_zero_shot(run, categories)


def _check_start(
    run: RunConfig, name: str, shapes: Mapping[str, Params], categories: Sequence[Category], workdir: Path
) -> None:
    for start in starting_weights(run, name, workdir):
        if run.steps[name].start and not start.path.exists():
            given = shapes[run.steps[name].start]["segmenter"]
        else:
            given, _, known = load_shapes(start.path)
            head = not start.parts or any(part.split("/")[0] == "mask_decoder" for part in start.parts)
            if head:
                leave_out = f"leave its class head out with config.steps.{name}.start_parts=('encoder',)"
                _check_classes(start, known, categories, leave_out)
        start.merged_into(shapes[name]["segmenter"], given)


def _check_classes(start: Start, known: Sequence[Category], categories: Sequence[Category], mend: str) -> None:
    """Raises :class:`UserError` where weights that know classes know others than the labelled images."""
    if known and tuple(known) != tuple(categories):
        listed = lambda classes: ", ".join(f"{category.id} {category.name}" for category in classes)
        raise UserError(
            f"{start.where}: {start.path} is of other classes ({listed(known)}) than the labelled images "
            f"({listed(categories)}); {mend}"
        )


def _check_zero_shot(run: RunConfig, categories: Sequence[Category]) -> None:
    """The teacher must come whole, and for these classes."""
    starts, params = initial_weights(run, "teacher"), run.segmenter("teacher", categories).abstract()
    for start in starts:
        given, _, known = load_shapes(start.path)
        params = start.merged_into(params, given)
        _check_classes(start, known, categories, "zero_shot evaluates what it is given as it is")
    covered = {part.split("/")[0] for start in starts for part in start.parts or tuple(params)}
    if lost := [part for part in params if part not in covered]:
        raise UserError(
            f"zero_shot needs a whole teacher, but config.init.teacher gives no {', '.join(lost)}. Convert a detector "
            "and a SAM 2 (cast-convert), and run configs/….py:zero_shot,teacher=grounded_sam2_l with "
            "--config.init.teacher.detector=… --config.init.teacher.segmenter=…"
        )


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
      where: the key of the configuration that names them.
      path: their file.
      parts: which parts of the model they are (empty: everything).
      under: the model's part that they are the whole of, or empty.
    """

    where: str
    path: Path
    parts: tuple[str, ...] = ()
    under: str = ""

    def merged_into(self, fresh: Params, loaded: Params) -> Params:
        """``fresh`` parameters (or shapes) with the ``loaded`` ones in their place; see ``export.merge_weights``."""
        loaded = {self.under: loaded} if self.under else loaded
        return merge_weights(fresh, loaded, self.parts, f"{self.where}: {self.path}")

    def __str__(self) -> str:
        return f"{self.path} ({', '.join(self.parts) or 'everything'})"


def starting_weights(run: RunConfig, name: str, workdir: Path) -> list[Start]:
    """What a step starts from: the result of the step in ``start``, or ``config.init``; random weights if empty."""
    step = run.steps[name]
    if step.start:
        return [Start(f"config.steps.{name}.start", result(workdir, step.start), step.start_parts)]
    return initial_weights(run, step.model, step.start_parts)


def initial_weights(run: RunConfig, role: str, parts: tuple[str, ...] = ()) -> list[Start]:
    """What ``config.init`` gives a role. Everything of converted weights is what the conversion made."""
    found = []
    for its_role, under, given in _initial_files(run):
        if its_role == role:
            path = weights_file(given)
            described = path.parent / "config.json"
            converted = not parts and described.exists() and "converted" in read_json(described)
            own = (under,) if under else tuple(load_shapes(path)[0]) if converted else parts
            found.append(Start(".".join(filter(None, ("config.init", role, under))), path, own, under))
    return found


def _initial_files(run: RunConfig) -> list[tuple[str, str, str]]:
    """(role, part, file or folder) of ``config.init``; the part is empty where one file is for the whole model."""
    files = []
    for role, given in run.init.items():
        parts = given if isinstance(given, Mapping) else {"": given}
        files += [(role, part, path) for part, path in parts.items() if path]
    return files


def as_converted(run: RunConfig) -> RunConfig:
    """``run`` with encoders as the converted weights in ``init`` were trained, where no tensor's shape shows it.

    What the checkpoint's origin decides (how a position embedding is resized) is taken over; what else a checkpoint
    says of its encoder (the number of heads) must be so in ``model``.

    Raises:
      UserError: listing what differs.
    """
    models = dict(run.model)
    for role, part, given in _initial_files(run):
        described = weights_file(given).parent / "config.json"
        if role not in models or not described.exists():
            continue
        stored = read_json(described)
        if "converted" not in stored:
            if "model_type" in stored:
                raise UserError(
                    f"config.init.{role}: {given} is a Hugging Face model; convert it first: "
                    f"cast-convert MODEL {given} DESTINATION"
                )
            continue  # an export of our own: its model is spelled out in the configuration that made it
        if part:  # a whole network: it is what was converted
            _check_network(models[role], stored, f"config.init.{role}.{part}: {given}", part)
            models[role] = {**models[role], part: {**stored["model"], **models[role].get(part, {})}}
            segmenter_config(models[role], f"config.model.{role}")
            continue
        theirs = stored["model"].get("encoder", {})
        model = segmenter_config(models[role], f"config.model.{role}")
        if not isinstance(model, StudentConfig):
            raise UserError(
                f"config.init.{role}: {models[role]['name']} starts from several networks; give the folder of each, "
                f"--config.init.{role}.detector=… --config.init.{role}.segmenter=…"
            )
        wanted = model.encoder
        if not theirs or not theirs.keys() <= {field.name for field in dataclasses.fields(wanted)}:
            raise UserError(
                f"config.init.{role}: {given} holds a {stored['converted']['name']}; "
                f"config.model.{role} has another kind of encoder, {type(wanted).__name__.removesuffix('Config')}"
            )
        encoder = models[role].get("encoder", {})
        if isinstance(encoder, Mapping):
            models[role] = {**models[role], "encoder": {**stored["converted"]["decided"].get("encoder", {}), **encoder}}
        adopted = segmenter_config(models[role], f"config.model.{role}")
        ours = to_json(dataclasses.asdict(adopted.encoder))  # type: ignore[union-attr]  # a student still
        faults = [
            f"{key} is {ours[key]}, in the weights {theirs[key]}"
            for key in ours
            if key in theirs and key not in ONLY_TRAINING and ours[key] != theirs[key]
        ]
        if faults:
            raise UserError(
                f"config.init.{role}: {given} holds another encoder than config.model.{role}.encoder: "
                f"{'; '.join(faults)}"
            )
    return dataclasses.replace(run, model=models)


def _check_network(spec: Mapping[str, Any], stored: Mapping[str, Any], where: str, part: str) -> None:
    """Raises :class:`UserError` for one network's weights in the place of the other's."""
    wanted = getattr(segmenter_config(spec), part, None)
    if wanted is None or not stored["model"].keys() <= {field.name for field in dataclasses.fields(wanted)}:
        kind = type(wanted).__name__.removesuffix("Config")
        what = f"needs a {kind} there" if wanted is not None else f"has no {part}"
        raise UserError(f"{where} holds a {stored['converted']['name']}; {spec['name']} {what}")


def weights_file(given: str) -> Path:
    """The file that ``config.init`` names: itself, or the one in a folder of converted weights."""
    return Path(given) if given.endswith(".safetensors") else Path(given) / "model.safetensors"


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Says where in the configuration an error lies, unless it says so itself."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("config."):
            raise
        raise UserError(f"{where}: {error}") from error

"""The steps of CAST in order, each finding its predecessor in the workdir (method.md section 1).

A step that is finished is not run again, and a step that was stopped continues, so running the same command again
always ends in the same workdir.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cast_jax.core.annotations import Category
from cast_jax.core.config import build, differences, to_json
from cast_jax.core.errors import MissingStepError, UserError
from cast_jax.core.files import atomic_write, read_json, write_json
from cast_jax.core.logging import environment
from cast_jax.core.runtime import compute_dtype
from cast_jax.core.sharding import check_batch_size, make_mesh
from cast_jax.data.checks import check_sources
from cast_jax.data.datasets import Datasets, open_datasets
from cast_jax.data.pipeline import LoaderConfig, make_loader
from cast_jax.data.prefetch import Prefetcher
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.data.views import ViewConfig
from cast_jax.evaluation.class_names import class_names
from cast_jax.evaluation.coco_map import MaskAPEvaluator
from cast_jax.export import load_weights, merge_weights, save_weights, weights_hash
from cast_jax.models.functional import Functional, Params, count_parameters
from cast_jax.models.registry import build_segmenter, check_image_size, segmenter_config
from cast_jax.models.student import ProjectionHead
from cast_jax.predict import Predictor
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised
from cast_jax.report import summary_table, write_report
from cast_jax.trainer import TrainConfig, finished, train
from cast_jax.visualize import contact_sheet, overlay, save_image, side_by_side

logger = logging.getLogger(__name__)

# Where the results of `:pseudo_label` and `:evaluate` come from when no step is named: the last finished one.
TEACHERS = {"adapted": "adapt", "finetuned": "finetune"}
EVALUATED = ("refine", "distill", "student_supervised", "adapt", "finetune", "pretrain")


def run(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Runs ``config.step`` (one step, or ``cast`` for all of ``config.pipeline``) and returns the summary.

    Raises:
      UserError, DataError, MissingStepError: before the long work, saying how to mend it.
    """
    workdir = Path(workdir)
    _require_same(config, workdir)
    pipeline = Pipeline(config, workdir)
    pipeline.check()
    # Only now is the workdir this configuration's: what had to be mended may be mended in place.
    if not _has_results(workdir):
        write_json(workdir / "config.json", to_json(config))
    write_json(workdir / "environment.json", environment())
    step = config["step"]
    for name in config["pipeline"] if step == "cast" else (step,):
        pipeline.run_step(name)
    return pipeline.summarise()


class Pipeline:
    """The steps over one workdir, its data and its configuration."""

    def __init__(self, config: Mapping[str, Any], workdir: Path):
        self.config, self.workdir = config, workdir
        self.mesh = make_mesh(dict(config["mesh"]))
        self.image_size = tuple(config["data"]["image_size"])
        self.max_instances = config["data"]["max_instances"]

    @functools.cached_property
    def datasets(self) -> Datasets:
        """The run's sources, less unreadable images where they are to be skipped."""
        data = self.config["data"]
        datasets = open_datasets(data, self.workdir)
        report = check_sources(
            datasets.labelled, datasets.unlabelled, datasets.val, self.max_instances, data["on_unreadable"]
        )
        kept = {
            name: part.source
            for name in ("labelled", "unlabelled", "val")
            if (part := getattr(report, name)) is not None
        }
        for name, source in kept.items():
            ids = [str(source.record(i).image_id) for i in range(len(source))]
            atomic_write(self.workdir / "splits" / f"{name}.txt", "\n".join(ids) + "\n")
        write_json(
            self.workdir / "classes.json", [dataclasses.asdict(category) for category in self.categories_of(datasets)]
        )
        return dataclasses.replace(datasets, **kept)

    @staticmethod
    def categories_of(datasets: Datasets) -> tuple[Category, ...]:
        """The classes, in the order of the model's outputs."""
        return tuple(datasets.labelled.categories)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes of this run."""
        return self.categories_of(self.datasets)

    def check(self) -> None:
        """Everything that can be wrong with the configuration, found before the first step."""
        self._check_names()
        for name, step in self.config["steps"].items():
            self.train_config(name)
            objective = build(ObjectiveConfig, step["objective"], f"config.steps.{name}.objective")
            loader = self.loader_config(name)
            objective.check_views(loader.views, f"config.steps.{name}")
            for size in (loader.batch_labelled, loader.batch_unlabelled):
                check_batch_size(size, self.mesh.size)
        for role, spec in self.config["model"].items():
            model = segmenter_config(spec, f"config.model.{role}")
            check_image_size(model, self.image_size)
            if not model.mask_decoder.query_stride and model.mask_decoder.num_queries < self.max_instances:
                raise UserError(
                    f"config.model.{role} has {model.mask_decoder.num_queries} queries, fewer than "
                    f"config.data.max_instances={self.max_instances}"
                )
        logger.info(
            "data: %d labelled, %d unlabelled, %d validation images, %d classes",
            *(len(source) for source in (self.datasets.labelled, self.datasets.unlabelled, self.datasets.val)),
            len(self.categories),
        )

    def _check_names(self) -> None:
        """The seed, and everything by which one part of the configuration names another."""
        steps = tuple(self.config["steps"])
        if self.config["seed"] < 0:
            raise UserError(f"config.seed is {self.config['seed']}; it must be at least 0")
        runnable = (*steps, "pseudo_label", *(f"pseudo_label/{which}" for which in TEACHERS), "evaluate")
        choices = [("config.step", self.config["step"], ("cast", *runnable))]
        choices += [("config.pipeline", name, runnable) for name in self.config["pipeline"]]
        for name, step in self.config["steps"].items():
            where = f"config.steps.{name}"
            choices.append((f"{where}.model", step["model"], tuple(self.config["model"])))
            choices.append((f"{where}.source", step["source"], ("labelled", "pretrain")))
            choices.append((f"{where}.start", step["start"], ("", *steps)))
            choices.append((f"{where}.pseudo_labels", step["pseudo_labels"], ("", *TEACHERS)))
        for key, value, known in choices:
            if value not in known:
                raise UserError(f"{key} {value!r} is unknown; known: {', '.join(filter(None, known))}")
        for role, given in self.config["init"].items():
            if given and not _weights_file(given).exists():
                raise UserError(f"config.init.{role}: no weights at {_weights_file(given)}")

    def run_step(self, name: str) -> None:
        """Runs one step of the pipeline by name."""
        if name.startswith("pseudo_label"):
            self.pseudo_label(name.partition("/")[2] or self._latest_teacher())
        elif name == "evaluate":
            self.evaluate(self._latest_trained())
        else:
            self.train(name)

    # Trained steps

    def train_config(self, name: str) -> TrainConfig:
        """The trainer's settings for a step."""
        values = {**self.config["steps"][name]["train"], "optimizer": self.config["steps"][name]["optimizer"]}
        values |= {"seed": self.config["seed"], "mesh": dict(self.config["mesh"])}
        return build(TrainConfig, values, f"config.steps.{name}.train")

    def loader_config(self, name: str) -> LoaderConfig:
        """What a step's batches hold."""
        data, step = self.config["data"], self.config["steps"][name]
        view = {**data["view"], **step["data"].get("view", {})}
        view |= {"image_size": self.image_size, "max_instances": self.max_instances}
        # Each step sees its own order and views; the name makes them independent of which steps ran before.
        seed = np.random.SeedSequence([self.config["seed"], *name.encode()]).generate_state(1)[0]
        values = {**data["loader"], **{key: value for key, value in step["data"].items() if key != "view"}}
        values["view"] = build(ViewConfig, view, "config.data.view")
        return build(LoaderConfig, {**values, "seed": int(seed)}, f"config.steps.{name}.data")

    def recipe(self, name: str, num_classes: int) -> SemiSupervised:
        """A step's recipe."""
        step = self.config["steps"][name]
        segmenter = self.segmenter(step["model"], num_classes)
        features = segmenter_config(self.config["model"][step["model"]]).decoder.features
        projection = Functional(lambda rngs: ProjectionHead(features, self.config["embedding_dim"], rngs=rngs))
        objective = build(ObjectiveConfig, step["objective"], f"config.steps.{name}.objective")
        return SemiSupervised(segmenter, projection, objective, class_names(self.categories))

    def segmenter(self, role: str, num_classes: int) -> Functional:
        """The teacher or the student as a pure function."""
        return build_segmenter(self.config["model"][role], num_classes, self.image_size, dtype=compute_dtype())

    def train(self, name: str) -> None:
        """Trains a step to its end, with evaluation, export and overlays; does nothing if it is finished."""
        folder = self.workdir / name
        if finished(folder) and (folder / "exported" / "last.safetensors").exists():
            logger.info("%s: finished already", name)
            return
        step = self.config["steps"].get(name)
        if step is None:
            raise UserError(f"config.step {name!r} is unknown; known: {', '.join(self.config['steps'])}")
        start = self._starting_weights(name)
        labelled = self.datasets.pretrain if step["source"] == "pretrain" else self.datasets.labelled
        if labelled is None:
            raise UserError(f"step {name} trains on config.data's pretraining images, but there are none")
        unlabelled = self._unlabelled(name)
        recipe = self.recipe(name, len(self.categories))
        logger.info(
            "%s: %s, %.2f M parameters, from %s",
            name,
            self.config["model"][step["model"]]["name"],
            count_parameters(recipe.segmenter.abstract()) / 1e6,
            start[0] if start else "fresh weights",
        )
        predictor = self._predictor(recipe.segmenter)
        with Prefetcher(make_loader(labelled, unlabelled, self.loader_config(name))) as loader:
            train(
                recipe,
                config=self.train_config(name),
                folder=folder,
                loader=loader,
                frozen={},
                init_params=functools.partial(self._initial_params, recipe, start),
                evaluate=lambda params: self._evaluate(predictor, params["segmenter"], folder),
                export=lambda params, which: self._export(params["segmenter"], step["model"], folder, which),
            )

    def _initial_params(self, recipe: SemiSupervised, start: tuple[Path, tuple[str, ...]] | None) -> Params:
        # XLA:CPU would spend most of a minute optimising a program that runs once.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        params = jax.jit(recipe.init, compiler_options=options)(jax.random.key(self.config["seed"]))
        if start is not None:
            path, parts = start
            loaded, _, _ = load_weights(path)
            params["segmenter"] = merge_weights(params["segmenter"], loaded, parts, str(path))
        return params

    def _starting_weights(self, name: str) -> tuple[Path, tuple[str, ...]] | None:
        """The file a step starts from and which parts of it: the step named in ``start``, else ``config.init``."""
        step = self.config["steps"][name]
        if step["start"]:
            path = self.exported(step["start"])
            if not path.exists():
                raise self._missing(name, step["start"])
            return path, tuple(step["start_parts"])
        if given := self.config["init"][step["model"]]:
            return _weights_file(given), tuple(step["start_parts"])
        return None

    def _unlabelled(self, name: str) -> Source | None:
        step = self.config["steps"][name]
        if not step["data"]["batch_unlabelled"]:
            return None
        if not step["pseudo_labels"]:
            return self.datasets.unlabelled
        folder = self.workdir / "pseudo_labels" / step["pseudo_labels"]
        if not (folder / "stats.json").exists():
            teacher = TEACHERS[step["pseudo_labels"]]
            raise self._missing(name, "pseudo_label" if self.exported(teacher).exists() else teacher)
        return PseudoLabelled(self.datasets.unlabelled, PseudoLabels.open(folder), self.categories)

    def exported(self, name: str) -> Path:
        """The final weights of a step."""
        return self.workdir / name / "exported" / "last.safetensors"

    def _export(self, params: Params, role: str, folder: Path, which: str) -> None:
        model = {"model": to_json(self.config["model"][role]), "image_size": list(self.image_size)}
        save_weights(folder / "exported" / f"{which}.safetensors", params, model, self.categories)

    def _missing(self, name: str, needed: str) -> MissingStepError:
        command = f"python -m cast_jax.main --config {self.config['file']}:{needed} --workdir {self.workdir}"
        return MissingStepError(
            f"step {name!r} needs the result of {needed!r}, which is not in {self.workdir}; make it with\n  {command}"
        )

    # Prediction

    def _predictor(self, segmenter: Functional) -> Predictor:
        options = self.config["evaluate"]
        return Predictor(
            segmenter,
            self.image_size,
            batch_size=options["batch_size"],
            max_detections=options["max_detections"],
            min_score=options["min_score"],
            mesh=self.mesh,
        )

    def _trained(self, name: str) -> tuple[Predictor, Params]:
        path = self.exported(name)
        params, _, _ = load_weights(path)
        segmenter = self.segmenter(self.config["steps"][name]["model"], len(self.categories))
        return self._predictor(segmenter), merge_weights(segmenter.abstract(), params, (), str(path))

    def _evaluate(self, predictor: Predictor, params: Params, folder: Path) -> dict[str, float]:
        """Mask AP on the validation images; writes the results and overlays into the step's folder."""
        val, evaluator = self.datasets.val, MaskAPEvaluator(self.categories, self.config["evaluate"]["max_detections"])
        shown = set(
            np.linspace(0, len(val) - 1, min(self.config["evaluate"]["overlays"], len(val))).astype(int).tolist()
        )
        for index, detections in predictor(params, val, label="evaluating"):
            record, truth = val.record(index), val.instances(index)
            evaluator.add(record.image_id, truth.ignore.shape, truth, detections)
            if index in shown:
                picture = side_by_side(val.image(index), truth, detections, self.categories)
                save_image(folder / "overlays" / f"{index:05d}.jpg", picture)
        results = evaluator.write(folder / "evaluation")
        write_json(folder / "evaluation" / "results.json", results)
        keys = ("mask_ap", "mask_ap50", "mask_ap75")
        return {key: results[key] for key in keys if results[key] is not None}

    def evaluate(self, name: str) -> None:
        """Evaluates the exported weights of a finished step."""
        predictor, params = self._trained(name)
        values = self._evaluate(predictor, params, self.workdir / name)
        logger.info("%s: %s", name, "  ".join(f"{key} {value:.2f}" for key, value in values.items()))

    def pseudo_label(self, which: str) -> None:
        """Labels the unlabelled pool with the finetuned or adapted teacher, shard by shard."""
        if which not in TEACHERS:
            raise UserError(f"config.step: pseudo_label/{which} is unknown; known: {', '.join(TEACHERS)}")
        step = TEACHERS[which]
        if not self.exported(step).exists():
            raise self._missing(f"pseudo_label/{which}", step)
        folder, source = self.workdir / "pseudo_labels" / which, self.datasets.unlabelled
        options = self.config["pseudo_labels"]
        writer = PseudoLabelWriter(
            folder,
            source,
            self.categories,
            weights_hash(self.exported(step)),
            options["threshold"],
            options["shard_size"],
        )
        if not (pending := writer.pending_shards()) and (folder / "stats.json").exists():
            logger.info("pseudo_labels/%s: finished already", which)
            return
        predictor, params = self._trained(step)
        for shard in pending:
            found = predictor(params, source, list(shard.indices), f"pseudo-labels {which} {shard.number}")
            writer.write_shard(shard.number, [detections for _, detections in found])
        statistics = writer.finish()
        self._contact_sheet(folder)
        logger.info(
            "pseudo_labels/%s: %d instances in %d images, %d images without any",
            which,
            statistics["instances"],
            statistics["images"],
            statistics["empty_images"],
        )

    def _contact_sheet(self, folder: Path) -> None:
        """A page of the pool's images with their pseudo-labels, evenly spread."""
        source = PseudoLabelled(self.datasets.unlabelled, PseudoLabels.open(folder), self.categories)
        pictures = []
        for index in np.linspace(0, len(source) - 1, min(16, len(source))).astype(int).tolist():
            found = source.instances(index)
            pictures.append(
                overlay(source.image(index), found.masks, found.labels, found.scores, self.categories, long_side=480)
            )
        save_image(folder / "contact_sheet.jpg", contact_sheet(pictures))

    def _latest_teacher(self) -> str:
        for which, step in TEACHERS.items():
            if self.exported(step).exists():
                return which
        raise self._missing("pseudo_label", "finetune")

    def _latest_trained(self) -> str:
        for name in (self.config["evaluate"]["step"],) if self.config["evaluate"]["step"] else EVALUATED:
            if self.exported(name).exists():
                return name
        raise self._missing("evaluate", self.config["evaluate"]["step"] or "finetune")

    # What the run leaves

    def summarise(self) -> dict[str, Any]:
        """Writes ``summary.json`` and ``report.html``, copies the final evaluation up, and logs the table."""
        steps = {}
        order = [name for name in self.config["pipeline"] if name in self.config["steps"]]
        for name in order:
            done = finished(self.workdir / name)
            if done is not None:
                metrics = done["metrics"]
                steps[name] = {
                    "mask_ap": metrics.get("evaluation/mask_ap"),
                    "mask_ap50": metrics.get("evaluation/mask_ap50"),
                    "images_per_second": done["images_per_second"],
                    "seconds": done["seconds"],
                }
        summary = {"steps": steps, "seed": self.config["seed"], "environment": environment()}
        write_json(self.workdir / "summary.json", summary)
        for name in EVALUATED:
            if (self.workdir / name / "evaluation" / "results.json").exists():
                for file in sorted((self.workdir / name / "evaluation").iterdir()):
                    atomic_write(self.workdir / "evaluation" / file.name, file.read_bytes())
                break
        if steps:
            write_report(self.workdir)
            logger.info("\n%s\n\nreport: %s", summary_table(steps), self.workdir / "report.html")
        return summary


def _weights_file(given: str) -> Path:
    """The file that ``config.init`` names: itself, or the one in a folder of converted weights."""
    return Path(given) if given.endswith(".safetensors") else Path(given) / "model.safetensors"


def _require_same(config: Mapping[str, Any], workdir: Path) -> None:
    """Refuses a workdir that was made with another configuration, with the differences."""
    path = workdir / "config.json"
    if not path.exists() or not _has_results(workdir):
        return
    try:
        stored = dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is not the configuration of a run ({error}); use another --workdir") from error
    # The step, the machine and what is only looked at may change from call to call.
    free = ("step", "file", "runtime", "mesh", "evaluate")
    known, wanted = (
        {key: value for key, value in settings.items() if key not in free} for settings in (stored, to_json(config))
    )
    if lines := differences(known, wanted):
        listed = "\n  ".join(lines[:20])
        raise UserError(
            f"{workdir} was made with another configuration; use another --workdir. It differs in\n  {listed}"
        )


def _has_results(workdir: Path) -> bool:
    """Whether a step left something: until then the configuration may still be mended in the same workdir."""
    return any(next(workdir.glob(pattern), None) for pattern in ("*/checkpoints/*", "*/exported/*", "pseudo_labels/*"))

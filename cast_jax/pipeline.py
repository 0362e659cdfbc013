"""The steps of CAST in order, each finding its predecessor in the workdir (the paper's section 3.3).

A step that is finished is not run again, and a step that was stopped continues, so running the same command again
always ends in the same workdir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cast_jax.check_data import check_data
from cast_jax.core import distributed
from cast_jax.core.annotations import Category, Detections, Instances
from cast_jax.core.config import build, to_json
from cast_jax.core.files import atomic_write, only_writer, remove_temporaries, write_json
from cast_jax.core.logging import environment
from cast_jax.core.sharding import make_mesh, param_shardings, place, shard_batch
from cast_jax.data.checks import check_sources
from cast_jax.data.datasets import Datasets, open_datasets
from cast_jax.data.findings import SeenImages
from cast_jax.data.pipeline import make_loader
from cast_jax.data.prefetch import Prefetcher
from cast_jax.data.pseudo_labels import MANIFEST, PseudoLabels, confident
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cached import Cached
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.data.sources.subset import Subset
from cast_jax.data.splits import split_indices
from cast_jax.data.views import ViewConfig
from cast_jax.evaluation import cityscapes
from cast_jax.evaluation.audit import audit, calibration_figure, tenths_from
from cast_jax.evaluation.coco_map import MaskAPEvaluator
from cast_jax.export import load_weights, merge_weights, save_weights, weights_hash
from cast_jax.labelling import Predict, label_images
from cast_jax.models.functional import Functional, Params, count_parameters, fill_in
from cast_jax.predict import Predictor
from cast_jax.preflight import (
    EVALUATED,
    TEACHERS,
    Start,
    as_converted,
    check_images,
    check_order,
    check_parameters,
    check_settings,
    evaluated,
    initial_weights,
    starting_weights,
    with_audit,
)
from cast_jax.provenance import Made, record, warn_of_others
from cast_jax.recipes.semi_supervised import SemiSupervised
from cast_jax.report import summary_table, write_report
from cast_jax.settings import RunConfig
from cast_jax.trainer import finished, train
from cast_jax.visualize import contact_sheet, save_image, side_by_side
from cast_jax.workdir import require_same, result

logger = logging.getLogger(__name__)

LABELS = 100  # candidates for pseudo-labels an image, or as many as an image has slots for instances
MANY_PARAMETERS = 10.0  # millions, above which random initial weights are most likely an oversight


def run(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Runs ``config.step`` (one step, or ``cast`` for all of ``config.pipeline``) and returns the summary.

    Raises:
      UserError, DataError, MissingStepError: before the long work, saying how to mend it.
    """
    workdir = Path(workdir)
    distributed.require_same("the configuration", {**to_json(config), "distributed": None})
    if config.get("step") == "check_data":
        settings = build(RunConfig, config, "config").data
        datasets = open_datasets({**dataclasses.asdict(settings), "on_unreadable": "skip"}, workdir)
        return check_data(datasets.of_the_task(), settings.max_instances, workdir / "check_data")
    with only_writer(workdir) if distributed.is_first() else contextlib.nullcontext():
        return _run_alone(config, workdir)


def _run_alone(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    require_same(config, workdir)
    if distributed.is_first():
        remove_temporaries(workdir)
    pipeline = Pipeline(config, workdir)
    pipeline.check()
    distributed.barrier()  # nobody looks for an earlier run's results any more
    # Only now is the workdir this configuration's: what had to be mended may be mended in place.
    if distributed.is_first():
        write_json(workdir / "config.json", to_json(config))
        write_json(workdir / "environment.json", environment())
    for name in pipeline.config.order:
        pipeline.run_step(name)
    return distributed.agreed(pipeline.summarise() if distributed.is_first() else None)


class Pipeline:
    """The steps over one workdir, its data and its configuration."""

    def __init__(self, config: Mapping[str, Any], workdir: Path):
        """``config`` holds the fields of :class:`RunConfig`. Raises :class:`UserError` where it does not."""
        self.config, self.workdir = as_converted(with_audit(build(RunConfig, config, "config"))), workdir

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of this run."""
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def _opened(self) -> Datasets:
        """The run's sources before any image is read."""
        with distributed.first_alone():
            return open_datasets(dataclasses.asdict(self.config.data), self.workdir)

    @functools.cached_property
    def datasets(self) -> Datasets:
        """The run's sources, less unreadable images where they are to be skipped."""
        data, datasets = self.config.data, self._opened
        seen, parts = SeenImages(self.workdir / ".seen_images"), (datasets.labelled, datasets.unlabelled, datasets.val)
        try:
            report = check_sources(*parts, data.max_instances, data.on_unreadable, seen)
        finally:
            if distributed.is_first():
                seen.save()
        reports = {
            name: part for name in ("labelled", "unlabelled", "val") if (part := getattr(report, name)) is not None
        }
        kept = {name: part.source for name, part in reports.items()}
        ids = {name: [str(source.record(i).image_id) for i in range(len(source))] for name, source in kept.items()}
        classes = [dataclasses.asdict(category) for category in self.categories]
        content = {name: part.content for name, part in reports.items()}
        distributed.require_same("the images, their labels and the classes", [ids, content, classes])
        if distributed.is_first():
            for name, listed in ids.items():
                atomic_write(self.workdir / "splits" / f"{name}.txt", "\n".join(listed) + "\n")
            write_json(self.workdir / "classes.json", classes)
        return dataclasses.replace(datasets, **kept, reports=reports)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, in the order of the model's outputs."""
        return tuple(self._opened.labelled.categories)

    def check(self) -> None:
        """Everything that can be wrong, found before the first step: the configuration, the images, the weights.

        Raises:
          UserError, DataError, MissingStepError: saying how to mend it.
        """
        check_settings(self.config, self.mesh)
        check_order(self.config, self.workdir)
        check_parameters(self.config, self.categories, self.mesh, self.workdir)
        for datasets in (self._opened, self.datasets):  # before all images are read, and after
            check_images(self.config, datasets)
        sizes = ", ".join(f"{len(source)} {name}" for name, source in self.datasets.of_the_task().items())
        logger.info("data: %s images, %d classes", sizes, len(self.categories))

    def run_step(self, name: str) -> None:
        """Runs one step of the pipeline by name; :meth:`check` has seen that it finds what it needs."""
        if name.startswith("pseudo_label"):
            by_teacher = {step: which for which, step in TEACHERS.items()}
            self.pseudo_label(name.partition("/")[2] or by_teacher[self._latest(by_teacher)])
        elif name == "zero_shot":
            self.zero_shot()
        elif name == "evaluate":
            self.evaluate(self._latest(evaluated(self.config)))
        elif name == "audit":
            self.audit()
        else:
            self.train(name)

    def _latest(self, names: Iterable[str]) -> str:
        """The first step that has a result."""
        return distributed.agreed(next((name for name in names if result(self.workdir, name).exists()), None))

    # Trained steps

    def train(self, name: str) -> None:
        """Trains a step to its end, with evaluation, export and overlays; does nothing if it is finished."""
        folder, step = self.workdir / name, self.config.steps[name]
        if distributed.agreed(bool(finished(folder) and result(self.workdir, name).exists())):
            logger.info("%s: finished already", name)
            warn_of_others(folder, self._made_from(name))
            return
        record(folder, self._made_from(name))
        starts = starting_weights(self.config, name, self.workdir)
        labelled = self.datasets.pretrain if step.source == "pretrain" else self.datasets.labelled
        if name == "audit":
            labelled, _ = self._hidden_share()
        recipe = self.config.recipe(name, self.categories)
        parameters = count_parameters(recipe.segmenter.abstract()) / 1e6
        origin = ", ".join(map(str, starts)) or "random weights"
        logger.info(
            "%s: %s, %.2f M parameters, from %s", name, self.config.model[step.model]["name"], parameters, origin
        )
        if not starts and parameters > MANY_PARAMETERS:
            logger.warning(
                "%s: so large a model learns little from few images without pretrained weights: convert some "
                "(cast-convert) and give their folder as --config.init.%s=…",
                name,
                step.model,
            )
        config = self.config.train_config(name)
        given, used = step.optimizer, config.optimizer
        if used != given:
            logger.info(
                "%s: learning rate %.3g for batches of %d images (%s scaling from %.3g for %d)",
                name,
                used.learning_rate,
                used.reference_batch,
                given.learning_rate_scaling,
                given.learning_rate,
                given.reference_batch,
            )
        predictor = self._predictor(recipe.segmenter)
        share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = dataclasses.replace(self.config.loader_config(name), **share)
        labelled, unlabelled = (self._cached(part, batches.view) for part in (labelled, self._unlabelled(name)))
        to_devices = functools.partial(shard_batch, mesh=self.mesh)
        with Prefetcher(make_loader(labelled, unlabelled, batches), to_devices) as loader:
            train(
                recipe,
                config=config,
                folder=folder,
                loader=loader,
                frozen={},
                init_params=functools.partial(self._initial_params, recipe, starts),
                evaluate=lambda params: self._evaluate(predictor, params["segmenter"], folder),
                export=lambda params, which: self._export(params["segmenter"], step.model, folder, which),
            )

    def _initial_params(self, recipe: SemiSupervised, starts: Sequence[Start]) -> Params:
        """Weights of ``starts``, and elsewhere random ones, the same in every step: what is compared begins alike."""
        params = recipe.abstract()
        for start in starts:
            params["segmenter"] = start.merged_into(params["segmenter"], load_weights(start.path)[0])
        return fill_in(params, recipe.init, jax.random.key(self.config.seed))

    def _cached(self, source: Source | None, view: ViewConfig) -> Source | None:
        """The source, by the folder of decoded images if there is to be one."""
        folder = self.config.data.cache
        return Cached(source, folder, view) if folder and source is not None else source

    def _unlabelled(self, name: str) -> Source | None:
        which = self.config.steps[name].pseudo_labels
        if self.datasets.unlabelled is None or which in ("", "online"):
            return self.datasets.unlabelled
        store = PseudoLabels.open(self.workdir / "pseudo_labels" / which)
        return PseudoLabelled(self.datasets.unlabelled, store, self.categories)

    def _made_from(self, name: str) -> Made:
        """What tells the weights, labels and images of a step from others."""
        step, loader, reports = self.config.steps[name], self.config.loader_config(name), self.datasets.reports
        starts = starting_weights(self.config, name, self.workdir)
        made = {"weights": {start.where: weights_hash(start.path) for start in starts if start.path.exists()}}
        store = self.workdir / "pseudo_labels" / step.pseudo_labels
        if step.pseudo_labels in TEACHERS and (store / MANIFEST).exists():
            made["pseudo_labels"] = {"pseudo_labels": step.pseudo_labels, **PseudoLabels.open(store).identity()}
        used = (step.source if loader.batch_labelled else "", "unlabelled" if loader.batch_unlabelled else "")
        made["images"] = {part: reports[part].content for part in used if part in reports}
        return {kind: parts for kind, parts in made.items() if parts}

    def _export(self, params: Params, role: str, folder: Path, which: str) -> None:
        model = {"model": to_json(self.config.model[role]), "image_size": list(self.config.data.image_size)}
        save_weights(folder / "exported" / f"{which}.safetensors", params, model, self.categories)

    # Prediction

    def _predictor(self, segmenter: Functional, *, labelling: bool = False) -> Predictor:
        """What evaluates a model, or ``labelling``: that must not depend on how models are looked at."""
        options, data = self.config.evaluate, self.config.data
        return Predictor(
            segmenter,
            data.image_size,
            batch_size=options.batch_size,
            max_detections=max(LABELS, data.max_instances) if labelling else options.max_detections,
            min_score=self.config.pseudo_labels.threshold if labelling else options.min_score,
            mesh=self.mesh,
        )

    def _trained(self, name: str, *, labelling: bool = False) -> tuple[Predictor, Params]:
        path = result(self.workdir, name)
        params, _, _ = load_weights(path)
        segmenter = self.config.segmenter(self.config.steps[name].model, self.categories)
        params = merge_weights(segmenter.abstract(), params, (), str(path))
        return self._predictor(segmenter, labelling=labelling), place(params, param_shardings(params, self.mesh))

    def _evaluate(
        self, predictor: Predictor, params: Params, folder: Path, exported: Path | None = None
    ) -> dict[str, float]:
        """Mask AP on the validation images; writes the results and overlays into the step's folder.

        Each process takes a piece of the images; the first one adds them up.

        Args:
          exported: receives the predictions in Cityscapes' format.
        """
        val, evaluator = self.datasets.val, MaskAPEvaluator(self.categories, self.config.evaluate.max_detections)
        shown = set(np.linspace(0, len(val) - 1, min(self.config.evaluate.overlays, len(val))).astype(int).tolist())
        pieces = np.array_split(np.arange(len(val)), jax.process_count())
        for index, detections in predictor(params, val, pieces[jax.process_index()].tolist(), "evaluating"):
            record, truth = val.record(index), val.instances(index)
            evaluator.add(record.image_id, truth.ignore.shape, truth, detections)
            if exported is not None:
                cityscapes.write_predictions(exported, str(record.image_id), detections, self.categories)
            if index in shown:
                picture = side_by_side(val.image(index), truth, detections, self.categories)
                save_image(folder / "overlays" / f"{index:05d}.jpg", picture)
        results, others = None, distributed.gather(evaluator.collected() if distributed.several() else None)[1:]
        if distributed.is_first():
            for other in others:
                evaluator.extend(other)
            results = evaluator.write(folder / "evaluation")
            write_json(folder / "evaluation" / "results.json", results)
        results = distributed.agreed(results)
        keys = ("mask_ap", "mask_ap50", "mask_ap75")
        return {key: results[key] for key in keys if results[key] is not None}

    def evaluate(self, name: str) -> None:
        """Evaluates the exported weights of a finished step; of Cityscapes data, with the official AP as well."""
        predictor, params = self._trained(name)
        folder, official = self.workdir / name, self.config.data.kind in ("cityscapes", "scenes")
        exported = folder / "cityscapes_predictions" if official else None
        if exported is not None and exported.exists() and distributed.is_first():
            shutil.rmtree(exported)
        distributed.barrier()
        values = self._evaluate(predictor, params, folder, exported)
        if exported is not None and distributed.is_first():
            records = map(self.datasets.val.record, range(len(self.datasets.val)))
            annotations = {str(record.image_id): record.annotation for record in records if record.annotation}
            values |= cityscapes.write_official_ap(exported, annotations, folder / "evaluation" / "cityscapes.json")
        logger.info("%s: %s", name, "  ".join(f"{key} {value:.2f}" for key, value in values.items()))

    def zero_shot(self) -> None:
        """Evaluates the teacher as ``config.init`` gives it, without any training; does nothing if that is done."""
        folder, starts = self.workdir / "zero_shot", initial_weights(self.config, "teacher")
        made_from = {
            "weights": {start.where: weights_hash(start.path) for start in starts},
            "images": {"val": self.datasets.reports["val"].content},
        }
        if distributed.agreed(bool(finished(folder))):
            logger.info("zero_shot: finished already")
            warn_of_others(folder, made_from)
            return
        record(folder, made_from)
        segmenter = self.config.segmenter("teacher", self.categories)
        params = segmenter.abstract()
        for start in starts:
            params = start.merged_into(params, load_weights(start.path)[0])
        params = place(params, param_shardings(params, self.mesh))
        begin = time.monotonic()
        metrics = self._evaluate(self._predictor(segmenter), params, folder)
        seconds = time.monotonic() - begin
        logger.info("zero_shot: %s", "  ".join(f"{key} {value:.2f}" for key, value in metrics.items()))
        done = {"step": 0, "metrics": {f"evaluation/{key}": value for key, value in metrics.items()}}
        rate = len(self.datasets.val) / seconds
        if distributed.is_first():
            write_json(folder / "done.json", done | {"seconds": seconds, "images_per_second": rate})

    def pseudo_label(self, which: str) -> None:
        """Labels the unlabelled pool with the finetuned or adapted teacher, shard by shard."""
        step, source = TEACHERS[which], self.datasets.unlabelled
        assert source is not None, "check_images has seen to it"

        def prepare() -> Predict:
            predictor, params = self._trained(step, labelling=True)
            return functools.partial(predictor, params, source)

        folder, teacher = self.workdir / "pseudo_labels" / which, weights_hash(result(self.workdir, step))
        pixels = self.datasets.reports["unlabelled"].pixels
        label_images(folder, source, self.categories, pixels, teacher, self.config.pseudo_labels, prepare)

    def _hidden_share(self) -> tuple[Source, Source]:
        """The labelled images that the audited teacher is trained on, and those whose labels it never sees."""
        labelled, options = self.datasets.labelled, self.config.audit
        hidden = min(max(round(options.share * len(labelled)), 1), len(labelled) - 1)
        chosen, rest = split_indices(len(labelled), hidden, options.seed)
        return Subset(labelled, rest), Subset(labelled, chosen)

    def audit(self) -> None:
        """Trains the teacher without a share of the labels and holds its pseudo-labels against these."""
        self.train("audit")
        predictor, params = self._trained("audit", labelling=True)
        folder, options = self.workdir / "audit", self.config.pseudo_labels
        _, hidden = self._hidden_share()
        shown = set(np.linspace(0, len(hidden) - 1, min(self.config.audit.pictures, len(hidden))).astype(int).tolist())
        pictures = []

        def pairs() -> Iterator[tuple[Instances, Detections]]:
            for index, found in predictor(params, hidden, label="auditing"):
                truth, found = hidden.instances(index), confident(found, options.threshold, options.max_iou)
                if index in shown:
                    pictures.append(side_by_side(hidden.image(index), truth, found, self.categories, threshold=0.0))
                yield truth, found

        report = audit(pairs(), self.categories, score_edges=tenths_from(options.threshold))
        if not distributed.is_first():  # all have predicted the few hidden images
            return
        images = [hidden.record(index).image_id for index in range(len(hidden))]
        write_json(folder / "audit.json", {**report, "hidden_images": images})
        atomic_write(folder / "calibration.png", calibration_figure(report))
        if pictures:
            save_image(folder / "contact_sheet.jpg", contact_sheet(pictures, columns=1, max_side=1600))
        keys = ("precision", "recall", "mean_iou", "calibration_error")
        values = ", ".join(f"{key} {report[key]:.3f}" for key in keys if report[key] is not None)
        logger.info("audit: %d pseudo-labels in %d hidden images: %s", report["detections"], report["images"], values)

    # What the run leaves

    def summarise(self) -> dict[str, Any]:
        """Writes ``summary.json`` and ``report.html``, copies the final evaluation up, and logs the table."""
        steps = {}
        trained = [name for name in self.config.pipeline if name in self.config.steps]
        order = ["zero_shot", *trained, *(name for name in reversed(EVALUATED) if name not in trained)]
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
        summary = {"steps": steps, "seed": self.config.seed, "environment": environment()}
        write_json(self.workdir / "summary.json", summary)
        for name in EVALUATED:
            if (self.workdir / name / "evaluation" / "results.json").exists():
                for file in sorted((self.workdir / name / "evaluation").iterdir()):
                    atomic_write(self.workdir / "evaluation" / file.name, file.read_bytes())
                break
        if steps or (self.workdir / "audit" / "audit.json").exists():
            write_report(self.workdir)
            table = f"\n{summary_table(steps)}\n\n" if steps else ""
            logger.info("%sreport: %s", table, self.workdir / "report.html")
        return summary

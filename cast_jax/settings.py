"""A run's configuration as typed settings, and what a step is made of by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cast_jax.core.annotations import Category
from cast_jax.core.config import build, check_choices, check_ranges
from cast_jax.core.distributed import DistributedConfig
from cast_jax.core.errors import UserError
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.profiling import ProfileConfig
from cast_jax.core.runtime import compute_dtype
from cast_jax.data.pipeline import LoaderConfig
from cast_jax.data.views import ViewConfig
from cast_jax.evaluation.class_names import class_names
from cast_jax.labelling import PseudoLabelConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.online_labels import OnlineLabelsConfig
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised
from cast_jax.trainer import TrainConfig


@dataclasses.dataclass(frozen=True)
class GeneratedConfig:
    """Scenes to paint: how many of each kind, (height, width) in pixels, and their seed."""

    train: int = 0
    val: int = 0
    source: int = 0
    image_size: tuple[int, int] = (128, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(("train", "val", "source"), "[0, 1000000]"), seed="[0, inf)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images of a run; see :func:`cast_jax.data.datasets.open_datasets` for the paths.

    Attributes:
      image_size: (height, width) that images are fitted into.
      max_instances: slots for the instances of an image.
      loader, view: what all steps share of :class:`LoaderConfig` and :class:`ViewConfig`.
      on_unreadable: "error" or "skip".
      labelled: a COCO JSON, or how many of the training images keep their labels.
      split: a split file; see :mod:`cast_jax.data.splits`.
      cache: a folder for decoded images, as large as the views need them (see
        :class:`cast_jax.data.sources.cached.Cached`); empty for none.
      category_ids: of ADE20K: "instance100" (1 to 100) or "sceneparse150" (7 to 149).
    """

    kind: str
    image_size: tuple[int, int]
    max_instances: int
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loader: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generated: GeneratedConfig = dataclasses.field(default_factory=GeneratedConfig)
    on_unreadable: str = "error"
    split_seed: int = 0
    root: str = ""
    split: str = ""
    category_ids: str = "instance100"
    cache: str = ""
    labelled: str | int = ""
    unlabelled: str = ""
    val: str = ""
    labelled_images: str = ""
    val_images: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, split_seed="[0, inf)")
        check_choices(self, on_unreadable=("error", "skip"), category_ids=("instance100", "sceneparse150"))
        wanted = {"coco": str, "nuclei": str, "cityscapes": int, "ade20k": int, "scenes": int}.get(self.kind, object)
        if not isinstance(self.labelled, wanted):
            raise UserError(
                f"labelled is {self.labelled!r}; for kind {self.kind!r} it must be of type {wanted.__name__}"
            )


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """How ``:audit`` looks at pseudo-labels.

    Attributes:
      share: of the labelled images whose labels are hidden from the teacher; one at least, drawn by ``seed``.
      pictures: hidden images that are drawn with their truth and their pseudo-labels.
    """

    share: float = 0.25
    seed: int = 0
    pictures: int = 8

    def __post_init__(self) -> None:
        check_ranges(self, share="(0, 1)", seed="[0, inf)", pictures="[0, inf)")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How trained models are looked at.

    Attributes:
      step: which trained step ``:evaluate`` looks at; empty for ``refine``, or the next of ``preflight.EVALUATED``.
      batch_size, max_detections, min_score: see :class:`cast_jax.predict.Predictor`.
      overlays: validation images that are drawn with their predictions.
    """

    step: str = ""
    batch_size: int = 8
    max_detections: int = 100
    min_score: float = 0.01
    overlays: int = 8

    def __post_init__(self) -> None:
        check_ranges(
            self, batch_size="[1, 65536]", max_detections="[1, 65536]", min_score="[0, 1]", overlays="[0, inf)"
        )


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """A trained step.

    Attributes:
      model: its role in ``config.model``.
      source: the labelled images: "labelled", or "pretrain".
      start, start_parts: the step whose weights it starts from (empty: ``config.init``'s) and which parts of them.
      pseudo_labels: whose: "finetuned"'s or "adapted"'s, "online", or empty.
      online_labels: how "online" ones are made, by the moving average that ``train.ema_decay`` keeps.
      data: what differs from ``config.data.loader`` and, under ``view``, from ``config.data.view``.
    """

    model: str
    data: Mapping[str, Any]
    train: TrainConfig
    source: str = "labelled"
    start: str = ""
    start_parts: tuple[str, ...] = ()
    pseudo_labels: str = ""
    online_labels: OnlineLabelsConfig = dataclasses.field(default_factory=OnlineLabelsConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        unset = TrainConfig(steps=1)
        elsewhere = {"seed": "config.seed", "mesh": "config.mesh", "profile": "config.profile"}
        for name, where in {**elsewhere, "optimizer": "the step's optimizer"}.items():
            if getattr(self.train, name) != getattr(unset, name):
                raise UserError(f"train.{name} is not read: set {where}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole configuration; ``build(RunConfig, config, "config")`` finds faulty keys, types and values.

    Attributes:
      file: the configuration file, for messages.
      step: what to run: "cast" for all of ``pipeline``, or one step.
      embedding_dim: of the contrastive projection.
      init: by role, a folder or file of weights to start from, or one for each network of a model that is made of
        several; empty for fresh ones.
      model: by role, see :func:`cast_jax.models.registry.segmenter_config`.
    """

    file: str
    step: str
    pipeline: tuple[str, ...]
    model: Mapping[str, Mapping[str, Any]]
    data: DataConfig
    steps: Mapping[str, StepConfig]
    seed: int = 0
    embedding_dim: int = 128
    init: Mapping[str, str | Mapping[str, str]] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    runtime: Mapping[str, str | bool | None] = dataclasses.field(default_factory=dict)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    pseudo_labels: PseudoLabelConfig = dataclasses.field(default_factory=PseudoLabelConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)

    def __post_init__(self) -> None:
        check_ranges(self, seed="[0, 4294967295]", embedding_dim="[1, 65536]")
        for name in ("pipeline", "steps"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; it needs at least one step")

    @property
    def order(self) -> tuple[str, ...]:
        """The steps to run."""
        return self.pipeline if self.step == "cast" else (self.step,)

    def train_config(self, name: str) -> TrainConfig:
        """The trainer's settings for a step, with its learning rate scaled to its batches."""
        step, loader = self.steps[name], self.loader_config(name)
        optimizer = step.optimizer.scaled(loader.batch_labelled + loader.batch_unlabelled)
        train = dataclasses.replace(step.train, seed=self._seed(name), mesh=self.mesh, profile=self.profile)
        return dataclasses.replace(train, optimizer=optimizer)

    def _seed(self, name: str) -> int:
        """Each step has keys, an order and views of its own, whichever steps ran before."""
        return int(np.random.SeedSequence([self.seed, *name.encode()]).generate_state(1)[0])

    def loader_config(self, name: str) -> LoaderConfig:
        """What a step's batches hold.

        Raises:
          UserError: see :func:`cast_jax.core.config.build`.
        """
        data, own = self.data, dict(self.steps[name].data)
        if "seed" in {**data.loader, **own}:
            raise UserError(f"config.steps.{name}.data.seed follows from config.seed; set that")
        own_view = own.pop("view", {})
        if not isinstance(own_view, Mapping):
            raise UserError(f"config.steps.{name}.data.view is {own_view!r}; it must hold fields of config.data.view")
        fixed = {"image_size": data.image_size, "max_instances": data.max_instances}
        view = build(ViewConfig, {**data.view, **fixed}, "config.data.view")
        if own_view:
            view = build(ViewConfig, {**data.view, **own_view, **fixed}, f"config.steps.{name}.data.view")
        values = {**data.loader, **own, "view": view, "seed": self._seed(name)}
        return build(LoaderConfig, values, f"config.steps.{name}.data")

    def segmenter(self, role: str, categories: Sequence[Category]) -> Functional:
        """The teacher or the student as a pure function."""
        names = [category.name for category in categories]
        return build_segmenter(self.model[role], names, self.data.image_size, dtype=compute_dtype())

    def recipe(self, name: str, categories: Sequence[Category]) -> SemiSupervised:
        """A step's recipe."""
        step = self.steps[name]
        features = segmenter_config(self.model[step.model]).feature_dim
        projection = Functional(
            lambda rngs: ProjectionHead(features, self.embedding_dim, dtype=compute_dtype(), rngs=rngs)
        )
        segmenter = self.segmenter(step.model, categories)
        names, size = class_names(categories), self.data.image_size
        return SemiSupervised(segmenter, projection, step.objective, names, size, self.online_labels(name))

    def online_labels(self, name: str) -> OnlineLabelsConfig | None:
        """How a step makes its labels during training, if it does: where it does not say, as stored ones are made."""
        step = self.steps[name]
        if step.pseudo_labels != "online":
            return None
        view, own = self.loader_config(name).view, step.online_labels
        max_iou = self.pseudo_labels.max_iou if own.max_iou is None else own.max_iou
        min_area = view.min_area if own.min_area is None else own.min_area
        return dataclasses.replace(own, max_iou=max_iou, min_area=min_area)

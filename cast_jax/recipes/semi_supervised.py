"""The one objective of every stage (the paper's section 3.3): L = L_sup + lambda_pl L_pl + lambda_pxl L_pxl.

With both weights zero and no unlabelled batch it is plain supervised training (finetune, refine, the baseline).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cast_jax.contrastive.bank import Bank, Entries, choose_entries, empty_bank, push
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.correspondence import correspond, counterparts
from cast_jax.contrastive.fused_map import pseudo_probability
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.contrastive.peers import Peers
from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.geometry import pixel_centres
from cast_jax.core.sharding import batch_axes, join_batches, take_batches
from cast_jax.data.views import VIEW_NAMES
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.detection import DetectionConfig
from cast_jax.models.functional import Functional, Params
from cast_jax.models.segmenter import Prediction
from cast_jax.recipes.base import Batch, Metrics, view_boxes, view_images, view_targets
from cast_jax.recipes.criteria import Criteria, view_losses
from cast_jax.recipes.online_labels import OnlineLabelsConfig, label_views


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms and where they apply.

    Attributes:
      supervised_weight: of L_sup; 0 distils on unlabelled images only.
      pseudo_label_weight: lambda_pl.
      contrastive_weight: lambda_pxl.
      supervised_views, pseudo_label_views: the views whose predictions meet (pseudo-)labels **(chosen)**.
      contrastive_stride: side of the square of feature pixels that one contrastive pixel averages; 1 is the paper's.
      criterion, detection, contrastive: the terms themselves; ``detection`` is that of a model with a detector.
    """

    supervised_weight: float = 1.0
    pseudo_label_weight: float = 0.0
    contrastive_weight: float = 0.0
    supervised_views: tuple[str, ...] = ("weak", "strong")
    pseudo_label_views: tuple[str, ...] = ("weak", "strong")
    contrastive_stride: int = 1
    criterion: CriterionConfig = dataclasses.field(default_factory=CriterionConfig)
    detection: DetectionConfig = dataclasses.field(default_factory=DetectionConfig)
    contrastive: ContrastiveConfig = dataclasses.field(default_factory=ContrastiveConfig)

    def __post_init__(self) -> None:
        weights = ("supervised_weight", "pseudo_label_weight", "contrastive_weight")
        check_ranges(self, **dict.fromkeys(weights, "[0, inf)"), contrastive_stride="[1, inf)")
        check_choices(self, supervised_views=VIEW_NAMES, pseudo_label_views=VIEW_NAMES)
        if not any(getattr(self, weight) for weight in weights):
            raise UserError(f"{', '.join(weights)} are all 0: nothing would be learned; set one of them above 0")

    def check_views(self, views: Sequence[str], where: str) -> None:
        """Raises :class:`UserError` if a term that is on finds none of its views among those of the batches."""
        for weight, key in (
            (self.supervised_weight, "supervised_views"),
            (self.pseudo_label_weight, "pseudo_label_views"),
        ):
            if weight and not set(views) & set(getattr(self, key)):
                raise UserError(f"{where}: objective.{key} {getattr(self, key)} has none of data.views {tuple(views)}")
        if self.contrastive_weight and not {"weak", "strong"} <= set(views):
            raise UserError(f"{where}: the contrastive term needs data.views ('weak', 'strong'), not {tuple(views)}")


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the segmenter predicts of all views of a batch, which ``join_batches`` put together."""

    views: list[tuple[str, str]]
    """(group, view) of each."""
    sizes: list[int]
    prediction: Prediction

    def of(self, views: Sequence[tuple[str, str]], tree: Any = None) -> Any:
        """What is predicted of some views, or of another ``tree`` of all views what belongs to them."""
        tree = self.prediction if tree is None else tree
        return take_batches(tree, self.sizes, [self.views.index(view) for view in views])


class SemiSupervised:
    """Trains a segmenter, and a projection head where the contrastive term is on."""

    def __init__(
        self,
        segmenter: Functional,
        projection: Functional,
        config: ObjectiveConfig,
        class_names: Sequence[str] = (),
        image_size: tuple[int, int] | None = None,
        online_labels: OnlineLabelsConfig | None = None,
    ):
        """``segmenter`` returns a :class:`Prediction`; ``projection`` maps its pixel features to embeddings.

        ``class_names`` name the classes in the pseudo-label metrics, in the order of the class logits. A memory bank
        must know the views' ``image_size`` before it sees one. With ``online_labels`` the labels of unlabelled images
        are made by the moving average of the parameters, which the run must keep.
        """
        self.online_labels = online_labels
        self.image_size = image_size
        self.segmenter = segmenter
        self.projection = projection
        self.config = config
        self.class_names = tuple(class_names)

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh ``{"segmenter": ..., "projection": ...}``; the projection only where it is trained."""
        keys = jax.random.split(key)
        return {name: part.init(keys[position]) for position, (name, part) in enumerate(self._parts())}

    def abstract(self) -> Params:
        """Shapes and dtypes of :meth:`init`'s parameters."""
        return {name: part.abstract() for name, part in self._parts()}

    def init_bank(self) -> Bank | None:
        """An empty memory bank, if the contrastive term draws from one."""
        if not self._has_bank:
            return None
        assert self.image_size is not None, "a memory bank needs the views' size"
        params = self.abstract()
        images = jax.ShapeDtypeStruct((1, *self.image_size, 3), jnp.float32)
        prediction = jax.eval_shape(self.segmenter.apply, params["segmenter"], images)
        z = jax.eval_shape(self.projection.apply, params["projection"], prediction.pixel_features)
        of_map = lambda p: pseudo_probability(p.mask_logits, p.class_logits, self.config.contrastive.map)
        g = jax.eval_shape(of_map, prediction)
        return empty_bank(self.config.contrastive, z.shape[-1], g.shape[-1])

    def update_bank(self, bank: Bank, entries: Entries) -> Bank:
        """The bank with an update's pixels: of several micro-batches' pixels an equal share of each."""
        share = -(-len(entries.valid) // self.config.contrastive.bank_new)
        return push(bank, jax.tree.map(lambda values: values[::share], entries))

    def normalisers(self, batch: Batch) -> Params:
        """The numbers of instances that L_sup and L_pl are averaged over, by group and view, and L_pxl's ``anchors``.

        Those of labels that are still to be made are not known: each micro-batch is averaged over its own.
        """
        groups = [group for group in batch if group == "labelled" or self.online_labels is None]
        found: Params = {
            group: {view: jnp.sum(batch[group][view]["instance_valid"]) for view in VIEW_NAMES if view in batch[group]}
            for group in groups
        }
        return found | ({"anchors": self._anchors(batch)} if self.config.contrastive_weight else {})

    def _anchors(self, batch: Batch) -> Float[Array, ""]:
        """The anchors of a batch, by its geometry; pixels whose pseudo probability is not finite count too."""
        config = self.config.contrastive
        strong = batch[min(batch)]["strong"]
        prompts = {"boxes": view_boxes(strong)} if self.segmenter.takes("boxes") else {}
        of_views = lambda params: self.segmenter.apply(params, view_images(strong), **prompts).pixel_features
        rows, columns = jax.eval_shape(of_views, self.abstract()["segmenter"]).shape[1:3]
        stride = self.config.contrastive_stride
        real = functools.partial(
            counterparts, image_size=strong["image"].shape[1:3], grid=(rows // stride, columns // stride)
        )
        total = jnp.zeros(())
        for group in batch.values():
            boxes = (group[view]["valid_box"] for view in ("strong", "weak"))
            anchors = jnp.sum(jax.vmap(real)(group["strong_to_weak"], *boxes)[1], axis=-1)
            total += jnp.sum(anchors if config.num_anchors is None else jnp.minimum(anchors, config.num_anchors))
        return total * (2 if config.symmetric else 1)

    @property
    def _supervised_views(self) -> dict[str, tuple[str, ...]]:
        """By group, the views whose predictions meet labels."""
        config = self.config
        return {
            "labelled": config.supervised_views if config.supervised_weight else (),
            "unlabelled": config.pseudo_label_views if config.pseudo_label_weight else (),
        }

    @property
    def _has_bank(self) -> bool:
        return bool(self.config.contrastive_weight) and self.config.contrastive.scope == "bank"

    def _parts(self) -> list[tuple[str, Functional]]:
        projection = [("projection", self.projection)] if self.config.contrastive_weight else []
        return [("segmenter", self.segmenter), *projection]

    def loss_fn(self, params: Params, frozen: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Any, ...]:
        """One forward pass over all views of all images, then the three terms: (loss, metrics[, entries of the bank]).

        Metrics: ``loss/*`` (unweighted terms), ``pseudo_labels/*`` (kept instances an image), ``contrastive/*``.
        """
        config = self.config
        if self.online_labels is not None:
            batch = {**batch, "unlabelled": self._labelled_online(frozen["ema"]["segmenter"], batch["unlabelled"])}
        dropout, points, draws = jax.random.split(key, 3)
        found = self._forward(params["segmenter"], batch, dropout)
        loss = jnp.zeros(())
        metrics: Metrics = {}
        for group, (term, terms) in self._set_losses(points, found, batch, frozen.get("normalisers", {})).items():
            weight, prefix = {
                "labelled": (config.supervised_weight, "supervised"),
                "unlabelled": (config.pseudo_label_weight, "pseudo_label"),
            }[group]
            loss = loss + weight * term
            metrics |= {f"loss/{prefix}": (term, jnp.ones(()))}
            metrics |= {f"loss/{prefix}_{name}": pair for name, pair in terms.items()}
        for group in batch:
            cut = jnp.sum(batch[group]["instances_cut"]).astype(jnp.float32)
            metrics[f"data/instances_cut_{group}"] = (cut, jnp.asarray(len(batch[group]["instances_cut"]), jnp.float32))
        if "unlabelled" in batch and config.pseudo_label_weight:
            labelled = VIEW_NAMES if self.online_labels is None else config.pseudo_label_views
            view = next(name for name in VIEW_NAMES if name in labelled and name in batch["unlabelled"])
            metrics |= _pseudo_label_metrics(batch["unlabelled"][view], self.class_names)
        entries: list[Entries] = []
        if config.contrastive_weight:
            bank = frozen["bank"] if self._has_bank else None
            anchors = frozen.get("normalisers", {}).get("anchors")
            term, terms, *entries = self._contrastive_loss(draws, params, found, batch, bank, anchors)
            loss = loss + config.contrastive_weight * term
            metrics |= terms
        return loss, metrics | {"loss/total": (loss, jnp.ones(()))}, *entries

    @jax.named_scope("online_labels")
    def _labelled_online(self, average: Params, group: Batch) -> Batch:
        """Unlabelled images with the instances that the moving ``average`` finds in their weak view."""
        assert self.online_labels is not None
        prediction = self.segmenter.apply(average, view_images(group["weak"]))
        read = {*self.config.pseudo_label_views, *(("strong",) if self.config.contrastive_weight else ())}
        return label_views(prediction, group, self.online_labels, [name for name in VIEW_NAMES if name in read])

    def _forward(self, params: Params, batch: Batch, key: PRNGKeyArray) -> _Found:
        # View by view: what is read of one view of all groups then lies together.
        views = [(group, view) for view in VIEW_NAMES for group in sorted(batch) if view in batch[group]]
        if not self.config.contrastive_weight:
            views = [(group, view) for group, view in views if view in self._supervised_views[group]]
        images = [view_images(batch[group][view]) for group, view in views]
        prompts = {}
        if self.segmenter.takes("boxes"):  # of the (pseudo-)labels
            prompts["boxes"] = join_batches([view_boxes(batch[group][view]) for group, view in views])
        prediction = self.segmenter.apply(params, join_batches(images), **prompts, key=key)
        return _Found(views, [len(image) for image in images], prediction)

    def _set_losses(self, key, found: _Found, batch, normalisers) -> dict[str, tuple[Array, Metrics]]:
        """Of each group that has targets the segmenter's loss, the mean over its views, and its terms.

        See ``set_loss`` for ``normalisers``, by group and view.
        """
        config = self.config
        views = [(group, view) for group, view in found.views if view in self._supervised_views[group]]
        if not views:
            return {}
        of_views = view_losses(
            found.of(views),
            key,
            [view_targets(batch[group][view]) for group, view in views],
            Criteria(config.criterion, config.detection),
            [normalisers.get(group, {}).get(view) for group, view in views],
        )
        losses = {}
        for group in sorted(dict(views)):
            of_group = [loss for (its, _), loss in zip(views, of_views, strict=True) if its == group]
            mean = jnp.mean(jnp.stack([loss for loss, _ in of_group]))
            losses[group] = mean, jax.tree.map(lambda *values: sum(values), *[terms for _, terms in of_group])
        return losses

    @jax.named_scope("contrastive")
    def _contrastive_loss(
        self, key, params, found: _Found, batch, bank: Bank | None, anchors: Array | None
    ) -> tuple[Any, ...]:
        """L_pxl over all images of the batch; the strong view's pixels are the positions, weak is read beside them.

        Returns the loss, the mean over so many ``anchors`` (None: over its own), metrics and, with a bank, what goes
        into it: pixels of the strong view.
        """
        config, stride = self.config, self.config.contrastive_stride
        groups = sorted(batch)
        join = lambda read: join_batches([read(group) for group in groups])
        image_size = batch[groups[0]]["strong"]["image"].shape[1:3]
        weak_views, strong_views = ([(group, view) for group in groups] for view in VIEW_NAMES)
        z = self.projection.apply(params["projection"], _pool(found.prediction.pixel_features, stride))
        z_weak, z_strong = found.of(weak_views, z), found.of(strong_views, z)
        weak = found.of(weak_views)
        size = (z_strong.shape[1], z_strong.shape[2])
        pooled = jnp.moveaxis(_pool(jnp.moveaxis(weak.mask_logits, 1, -1), stride), -1, 1)
        g = pseudo_probability(pooled, weak.class_logits, config.contrastive.map)
        (z_seen, g_seen), valid = correspond(
            (z_weak, g),
            join(lambda group: batch[group]["strong_to_weak"]),
            join(lambda group: batch[group]["strong"]["valid_box"]),
            image_size,
            valid_box_weak=join(lambda group: batch[group]["weak"]["valid_box"]),
        )
        key, entries_key = jax.random.split(key) if bank is not None else (key, key)
        total, count, metrics = _over_devices(
            key,
            config.contrastive,
            bank,
            z_weak=z_seen,
            z_strong=z_strong.reshape(z_seen.shape),
            g=g_seen,
            valid=valid,
            instance_ids=instance_map(join(lambda group: _instances(batch[group]["strong"])), image_size, size),
        )
        result = total / jnp.maximum(count if anchors is None else anchors, 1.0), metrics
        result[1]["contrastive/loss"] = (total, count)
        if bank is None:
            return result
        z_keys = z_strong.reshape(z_seen.shape)
        return *result, choose_entries(entries_key, config.contrastive, z=z_keys, g=g_seen, valid=valid)


def _over_devices(key: PRNGKeyArray, config: ContrastiveConfig, bank: Bank | None, **pixels: Any) -> tuple[Any, ...]:
    """The contrastive loss of the whole batch, which the devices hold together."""
    if not (axes := batch_axes()):
        return contrastive_loss(key, config, bank=bank, **pixels)

    def of_one(key: PRNGKeyArray, bank: Bank | None, pixels: dict[str, Any]) -> tuple[Any, ...]:
        return contrastive_loss(key, config, bank=bank, peers=Peers(axes), **pixels)

    whole, parts = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(of_one, in_specs=(whole, whole, parts), out_specs=whole, check_vma=False)(key, bank, pixels)


def _instances(view: Batch) -> Batch:
    return {name: view[name] for name in ("masks", "instance_valid", "ignore")}


def instance_map(view: Batch, image_size: tuple[int, int], size: tuple[int, int]) -> Int[Array, "batch pixels"]:
    """Which instance lies under each centre of an ``h x w`` grid: 0 none, i + 1 the i-th, -1 not known (ignored).

    Of several the first counts. ``view`` has packed ``masks`` and ``ignore``, and ``instance_valid``.
    """
    centres = pixel_centres(*size) * jnp.array([image_size[0] / size[0], image_size[1] / size[1]])
    y, x = jnp.floor(centres).astype(jnp.int32).T
    inside = lambda packed: ((packed[..., y, x // 8] >> (x % 8).astype(jnp.uint8)) & 1).astype(bool)
    beyond = view["masks"].shape[1] + 1
    numbers = jnp.arange(1, beyond, dtype=jnp.int32)[:, None]
    first = jnp.min(
        jnp.where(inside(view["masks"]) & view["instance_valid"][:, :, None], numbers, beyond), axis=1, initial=beyond
    )
    return jnp.where(inside(view["ignore"]), -1, first % beyond)


def _pool(
    features: Float[Array, "batch h w channels"], stride: int
) -> Float[Array, "batch h/stride w/stride channels"]:
    """Averages squares of ``stride`` x ``stride`` pixels; a remainder at the border is left out."""
    if stride == 1:
        return features
    batch, height, width, channels = features.shape
    rows, columns = height // stride, width // stride
    cropped = features[:, : rows * stride, : columns * stride]
    return cropped.reshape(batch, rows, stride, columns, stride, channels).mean((2, 4))


def _pseudo_label_metrics(view: Batch, class_names: tuple[str, ...]) -> Metrics:
    """Instances an image that survive in the view, in all and by class, and their mean score."""
    valid = view["instance_valid"]
    images = jnp.asarray(valid.shape[0], jnp.float32)
    kept = jnp.sum(valid).astype(jnp.float32)
    metrics = {
        "pseudo_labels/per_image": (kept, images),
        "pseudo_labels/score": (jnp.sum(jnp.where(valid, view["scores"], 0.0)), kept),
    }
    for position, name in enumerate(class_names):
        of_class = jnp.sum(valid & (view["labels"] == position)).astype(jnp.float32)
        metrics[f"pseudo_labels/per_image/{name}"] = (of_class, images)
    return metrics

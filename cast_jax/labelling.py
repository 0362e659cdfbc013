"""Labels a pool of images with what a model predicts, shard by shard, shared between the processes of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from cast_jax.core import distributed
from cast_jax.core.annotations import Category, Detections
from cast_jax.core.config import check_ranges
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.review import finish_import
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.visualize import contact_sheet, overlay, save_image

logger = logging.getLogger(__name__)

_MANY_EMPTY = 0.9  # the share of images without any label that is most likely a mistake

Predict = Callable[[Sequence[int], str], Iterable[tuple[int, Detections]]]


@dataclasses.dataclass(frozen=True)
class PseudoLabelConfig:
    """Which predictions become pseudo-labels, and images a shard of the store.

    Attributes:
      threshold: least score.
      max_iou: of two instances that overlap by more, the better one stays; 1 keeps all but repeated ones.
      shard_size: images a shard.
    """

    threshold: float = 0.3
    max_iou: float = 0.5
    shard_size: int = 256

    def __post_init__(self) -> None:
        check_ranges(self, threshold="[0, 1]", max_iou="[0, 1]", shard_size="[1, inf)")


def label_images(
    folder: Path,
    source: Source,
    categories: Sequence[Category],
    pixels: str,
    model_hash: str,
    options: PseudoLabelConfig,
    prepare: Callable[[], Predict],
) -> None:
    """Writes the store of pseudo-labels, its statistics and contact sheet; what is there already is not made again.

    Args:
      folder: receives the store.
      source: the images.
      categories: the classes of the predictions.
      pixels: names what the images show.
      model_hash: names the model.
      options: which predictions become labels.
      prepare: loads the model, if there is anything to label; what it returns predicts images by their indices under
        a progress bar's title. All processes predict together, each its own images.

    Raises:
      DataError: see :class:`cast_jax.data.pseudo_labels.PseudoLabelWriter`.
    """
    if distributed.is_first():
        finish_import(folder)
    distributed.barrier()
    writer = PseudoLabelWriter(
        folder, source, categories, model_hash, options.threshold, options.max_iou, options.shard_size, pixels
    )
    name = f"{folder.parent.name}/{folder.name}"
    pending = distributed.agreed([shard.number for shard in writer.pending_shards()])
    if distributed.agreed(not pending and (folder / "stats.json").exists()):
        logger.info("%s: finished already", name)
        if distributed.is_first() and not (folder / "contact_sheet.jpg").exists():  # reviewed since
            _contact_sheet(folder, source, categories)
        return
    predict = prepare()
    own = pending[jax.process_index() :: jax.process_count()]
    for number in own + [None] * (-(-len(pending) // jax.process_count()) - len(own)):
        indices = [] if number is None else list(writer.shard(number).indices)
        found = list(predict(indices, f"pseudo-labels {folder.name} {number}"))
        if number is not None:
            writer.write_shard(number, [detections for _, detections in found])
    distributed.barrier()
    if distributed.is_first():
        _contact_sheet(folder, source, categories)
        made = writer.finish()
        logger.info(
            "%s: %d instances in %d images, %d images without any",
            name,
            made["instances"],
            made["images"],
            made["empty_images"],
        )
        if made["empty_images"] > _MANY_EMPTY * made["images"]:
            logger.warning(
                "%s: nothing was found in %d of %d images, of which the next step would learn that all is background: "
                "look at %s, train the teacher longer, or lower pseudo_labels.threshold (%g)",
                name,
                made["empty_images"],
                made["images"],
                folder / "contact_sheet.jpg",
                options.threshold,
            )
    distributed.barrier()


def _contact_sheet(folder: Path, source: Source, categories: Sequence[Category]) -> None:
    """A page of the images with their pseudo-labels, evenly spread."""
    labelled = PseudoLabelled(source, PseudoLabels.open(folder), tuple(categories))
    pictures = []
    for index in np.linspace(0, len(labelled) - 1, min(16, len(labelled))).astype(int).tolist():
        found = labelled.instances(index)
        pictures.append(
            overlay(labelled.image(index), found.masks, found.labels, found.scores, tuple(categories), long_side=480)
        )
    save_image(folder / "contact_sheet.jpg", contact_sheet(pictures))

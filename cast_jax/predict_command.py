"""``cast-predict WEIGHTS IMAGES OUTPUT``: the masks that a trained model finds in images without labels.

WEIGHTS is an export of a run (RUN/refine/exported/last.safetensors; config.json and classes.json lie beside it), IMAGES
an image, a folder, a pattern ("images/**/*.png") or a .txt list. OUTPUT becomes a folder with predictions.json (a COCO
JSON with the labels' own category ids and a score for every mask, which annotation tools open), stats.json and
pictures/. Images are numbered anew, from 1: those of another COCO JSON are found by their file_name.
A command that was stopped continues where it was when it is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cast_jax.core.annotations import Category
from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.files import make_folder, only_writer, remove_temporaries, write_json, writing_to
from cast_jax.core.logging import setup_logging
from cast_jax.core.runtime import compute_dtype, setup
from cast_jax.core.sharding import make_mesh, param_shardings, place
from cast_jax.data.checks import check_source
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.review import export_labels, finish_import
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.export import load_shapes, load_weights, merge_weights, weights_hash
from cast_jax.models.functional import Params
from cast_jax.models.registry import build_segmenter
from cast_jax.predict import ArrayPredictor, Predictor
from cast_jax.visualize import overlay, save_image

PREDICTIONS = "predictions.json"
MOST_MASKS = 300  # candidates an image
LEAST_SIDE = 720  # of a picture, in pixels: names and scores hide what is smaller


def predict(
    weights: Path,
    images: Source,
    output: Path,
    *,
    min_score: float = 0.3,
    max_iou: float = 0.5,
    batch_size: int = 8,
    pictures: int = 8,
    polygons: bool = False,
    pixels: str = "",
) -> dict[str, Any]:
    """Finds instances on all devices of this machine; returns the statistics.

    Args:
      min_score: masks with a lower score are dropped.
      max_iou: of two masks that overlap by more, the one with the lower score is dropped.
      batch_size: images at a time.
      pictures: images, evenly spread, that are drawn with what was found.
      polygons: outlines instead of run lengths; see :func:`cast_jax.data.review.export_labels`.
      pixels: names what the images show, so that masks of others are not taken for theirs.

    Raises:
      UserError, DataError: weights that are no export of a run; an output folder with the masks of other weights,
        images or thresholds.
    """
    _check_export(weights)
    _make_output(output)
    predictor, params, categories = _load(weights, batch_size, min_score)
    with only_writer(output):
        remove_temporaries(output)
        writer = PseudoLabelWriter(output, images, categories, weights_hash(weights), min_score, max_iou, pixels=pixels)
        for shard in writer.pending_shards():
            found = predictor(params, images, list(shard.indices), f"predicting, part {shard.number + 1}")
            writer.write_shard(shard.number, [detections for _, detections in found])
        statistics = writer.finish()
        write_json(output / PREDICTIONS, export_labels(output, polygons))
        labelled = PseudoLabelled(images, PseudoLabels.open(output), categories)
        for index in np.linspace(0, len(images) - 1, min(pictures, len(images))).astype(int).tolist():
            image, shown = images.image(index), labelled.instances(index)
            side = max(LEAST_SIDE, *image.shape[:2])
            picture = overlay(image, shown.masks, shown.labels, shown.scores, categories, long_side=side)
            save_image(output / "pictures" / f"{index:05d}.jpg", picture)
    return statistics


def load_predictor(
    weights: Path | str, *, min_score: float = 0.3, max_iou: float = 0.5, batch_size: int = 1
) -> ArrayPredictor:
    """A trained model for images in memory, on all devices of this machine; ``cast-predict`` as a function.

    It takes an image, uint8 ``[height, width, 3]`` in RGB, or a list of them; see :class:`cast_jax.predict.Found` for
    what it returns. The first image takes long: the model is compiled.

    Args:
      weights: an export of a run (RUN/refine/exported/last.safetensors).
      min_score: masks with a lower score are dropped.
      max_iou: of two masks that overlap by more, the one with the lower score is dropped.
      batch_size: images of a list at a time.

    Raises:
      UserError (a ValueError): weights that are no export of a run, or a setting outside its range.
    """
    given = argparse.Namespace(min_score=min_score, max_iou=max_iou, batch_size=batch_size)
    check_ranges(given, min_score="[0, 1]", max_iou="[0, 1]", batch_size="[1, 65536]")
    _check_export(Path(weights))
    predictor, params, categories = _load(Path(weights), batch_size, min_score)
    return ArrayPredictor(predictor, params, categories, max_iou)


def _load(weights: Path, batch_size: int, min_score: float) -> tuple[Predictor, Params, tuple[Category, ...]]:
    params, described, categories = load_weights(weights)
    size, mesh = tuple(described["image_size"]), make_mesh()
    names = [category.name for category in categories]
    segmenter = build_segmenter(described["model"], names, size, dtype=compute_dtype())
    params = merge_weights(segmenter.abstract(), params, (), str(weights))
    options: dict[str, Any] = {"batch_size": batch_size, "max_detections": MOST_MASKS, "min_score": min_score}
    predictor = Predictor(segmenter, size, mesh=mesh, **options)
    return predictor, place(params, param_shardings(params, mesh)), categories


def _check_export(weights: Path) -> None:
    """Raises :class:`UserError` if this is no trained model's."""
    _, described, categories = load_shapes(weights)
    if not {"model", "image_size"} <= described.keys() or not categories:
        raise UserError(
            f"{weights}: its config.json and classes.json do not describe a trained model; name an export of a run "
            "(RUN/refine/exported/last.safetensors)"
        )


def _make_output(output: Path) -> None:
    with writing_to(output, "OUTPUT"):
        finish_import(output)
    make_folder(output, "OUTPUT")


class _OneImage(ImageFolder):
    """A single image file."""

    def __init__(self, image: Path):
        self.root, self.left_out, self._names = image.parent, (), [image.name]


def _open_images(images: str) -> ImageFolder:
    path = Path(images)
    return _OneImage(path) if path.is_file() and path.suffix.lower() != ".txt" else ImageFolder(images)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what the user can mend ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="cast-predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=Path)
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--min-score", type=float, default=0.3, help="drop masks with a lower score (%(default)s)")
    parser.add_argument(
        "--max-iou",
        type=float,
        default=0.5,
        help="of masks that overlap by more (IoU), keep the better one (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images at a time (%(default)s)")
    parser.add_argument("--pictures", type=int, default=8, help="images drawn with their masks (%(default)s)")
    parser.add_argument("--polygons", action="store_true", help="outlines instead of run lengths")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    options = parser.parse_args(arguments)
    for name, low, high in (("min_score", 0, 1), ("max_iou", 0, 1), ("batch_size", 1, 65536), ("pictures", 0, 10**6)):
        if not low <= (value := getattr(options, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must lie between {low} and {high}")
    keep = ("min_score", "max_iou", "batch_size", "pictures", "polygons")
    folder = Path(options.images)
    if folder.is_dir() and options.output.resolve().is_relative_to(folder.resolve()):
        parser.error(f"OUTPUT {options.output} lies in IMAGES {folder}: its pictures would be taken for images")
    try:
        setup()
        setup_logging()
        _check_export(options.weights)  # before all images are read
        _make_output(options.output)
        on_unreadable = "skip" if options.skip_unreadable else "error"
        report = check_source("images", _open_images(options.images), None, on_unreadable)
        found = predict(
            options.weights,
            report.source,
            options.output,
            pixels=report.pixels,
            **{name: getattr(options, name) for name in keep},
        )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{found['instances']} masks in {found['images']} images: {options.output / PREDICTIONS}")
    if not found["instances"]:
        print(f"nothing reached --min-score {options.min_score}: try a lower one")


if __name__ == "__main__":
    main()

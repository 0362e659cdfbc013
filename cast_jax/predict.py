"""From images to instances at the image's own resolution, streaming: memory does not grow with the number of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, overload

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8
from tqdm import tqdm

from cast_jax.core.annotations import Category, Detections, Instances, decode_mask, encode_mask
from cast_jax.core.distributed import gather, is_first
from cast_jax.core.errors import DataError
from cast_jax.core.sharding import batch_sharding, make_mesh, own_rows, shard_batch
from cast_jax.data.pipeline import eval_batches
from cast_jax.data.pseudo_labels import confident
from cast_jax.data.sources.base import MAX_SIDE, ImageRecord, Source
from cast_jax.models.functional import Functional, Params
from cast_jax.models.segmenter import SATURATION, score_instances


class Predictor:
    """Runs a segmenter over a source.

    Args:
      segmenter: the model as a pure function.
      image_size: (height, width) that images are fitted into, aspect ratio kept.
      batch_size: images per step, over all processes; rounded up to a multiple of the mesh's devices.
      max_detections: (query, class) pairs kept an image.
      min_score: detections below are dropped.
      mesh: devices to share the images; None for one. With several processes all of them predict together, each on its
        own images; parameters and results of a step lie on the devices of all.
    """

    def __init__(
        self,
        segmenter: Functional,
        image_size: tuple[int, int],
        *,
        batch_size: int = 8,
        max_detections: int = 100,
        min_score: float = 0.01,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.segmenter = segmenter
        self.image_size = image_size
        self.max_detections, self.min_score = max_detections, min_score
        self.mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        split = batch_sharding(self.mesh)
        self._run = jax.jit(self._forward, in_shardings=(None, split), out_shardings=split)

    def _forward(self, params: Params, images: Any) -> Any:
        prediction = self.segmenter.apply(params, images.astype(jnp.float32) / 255.0)
        return score_instances(prediction, self.max_detections)

    def __call__(
        self, params: Params, source: Source, indices: Sequence[int] | None = None, label: str = "predicting"
    ) -> Iterator[tuple[int, Detections]]:
        """Yields (index, detections) for every image, in order, with a progress bar on a terminal.

        One batch is computed ahead, so that the device works while the host encodes masks. With several processes,
        ``indices`` are this one's own images, and all must iterate to the end, even those without any.
        """
        total, ahead = len(source) if indices is None else len(indices), None
        size = self.batch_size * len(self.mesh.local_devices) // self.mesh.size
        most = max(gather(-(-total // size)))
        with tqdm(total=total, desc=label, unit="image", disable=None if is_first() else True, leave=False) as bar:
            for batch in eval_batches(source, self.image_size, size, indices, batches=most):
                with jax.set_mesh(self.mesh):
                    scored = self._run(params, shard_batch(batch["image"], self.mesh))
                if ahead is not None:
                    yield from self._detections(*ahead, bar)
                ahead = batch, scored
            if ahead is not None:
                yield from self._detections(*ahead, bar)

    def _detections(self, batch: dict[str, np.ndarray], scored: Any, bar: Any) -> Iterator[tuple[int, Detections]]:
        scored = own_rows(scored)
        for i, index in enumerate(batch["index"].tolist()):
            if index < 0:
                continue
            kept = np.flatnonzero(scored.scores[i] >= self.min_score)
            to_map = functools.partial(
                mask_at_original,
                valid_box=batch["valid_box"][i],
                canvas=self.image_size,
                size=tuple(batch["original_size"][i].tolist()),
            )
            masks = [to_map(scored.mask_logits[i, k]) for k in kept]
            kept = kept[[bool(mask.any()) for mask in masks]] if len(kept) else kept
            rles = [encode_mask(mask) for mask in masks if mask.any()]
            bar.update()
            yield (
                index,
                Detections(
                    labels=scored.labels[i, kept].astype(np.int32),
                    scores=scored.scores[i, kept].astype(np.float32),
                    mask_quality=scored.mask_quality[i, kept].astype(np.float32),
                    rles=rles,
                ),
            )


@dataclasses.dataclass(frozen=True)
class Found:
    """The instances in an image, best first, at the image's own size.

    Attributes:
      masks: which pixels each covers; of what overlaps, both keep theirs.
      labels: their classes' names.
      category_ids: their classes' ids in the labelled set that the model was trained on.
      scores: in [0, 1].
    """

    masks: Bool[np.ndarray, "n height width"]
    labels: tuple[str, ...]
    category_ids: Int32[np.ndarray, "n"]
    scores: Float32[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.labels)


class ArrayPredictor:
    """Finds instances in images that are in memory; made by :func:`cast_jax.predict_command.load_predictor`.

    Args:
      predictor, params: the model and its parameters.
      categories: its classes.
      max_iou: of two masks that overlap by more, the one with the lower score is dropped.
    """

    def __init__(self, predictor: Predictor, params: Params, categories: Sequence[Category], max_iou: float = 0.5):
        self.predictor, self.params, self.categories = predictor, params, tuple(categories)
        self.max_iou = max_iou

    @overload
    def __call__(self, images: UInt8[np.ndarray, "height width 3"]) -> Found: ...

    @overload
    def __call__(self, images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> list[Found]: ...

    def __call__(self, images: Any) -> Found | list[Found]:
        """What is in an image, uint8 ``[height, width, 3]`` in RGB, or in each of a list of them (of any sizes).

        Raises:
          DataError (a ValueError): an array of another type or shape.
        """
        several = isinstance(images, list | tuple)
        source = _Arrays(tuple(images) if several else (images,))
        found = [
            self._found(detections, source.arrays[index]) for index, detections in self.predictor(self.params, source)
        ]
        return found if several else found[0]

    def _found(self, detections: Detections, image: np.ndarray) -> Found:
        kept = confident(detections, self.predictor.min_score, self.max_iou)
        classes = [self.categories[label] for label in kept.labels]
        masks = [decode_mask(rle) for rle in kept.rles]
        return Found(
            masks=np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool),
            labels=tuple(category.name for category in classes),
            category_ids=np.array([category.id for category in classes], np.int32),
            scores=kept.scores,
        )


class _Arrays:
    """Images in memory as a source without labels.

    Raises:
      DataError: one of them is no uint8 array ``[height, width, 3]``.
    """

    categories: tuple[Category, ...] = ()

    def __init__(self, arrays: Sequence[Any]):
        for index, array in enumerate(arrays):
            _check_array(array, f"image {index}" if len(arrays) > 1 else "the image")
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def record(self, index: int) -> ImageRecord:
        raise DataError(f"image {index} has no file: it was given as an array")

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        return np.ascontiguousarray(self.arrays[index])

    def instances(self, index: int) -> Instances:
        raise DataError(f"image {index} has no labels: it was given as an array")


def _check_array(array: Any, name: str) -> None:
    if not isinstance(array, np.ndarray):
        given = type(array).__name__
        raise DataError(f"{name} is of type {given}; give a numpy array (of a file, np.asarray(Image.open(file)))")
    if array.ndim != 3 or array.shape[2] != 3:
        match array.shape:
            case (_, _):
                hint = ": np.stack([image] * 3, axis=-1)"
            case (_, _, 4):
                hint = ": image[..., :3]"
            case (3, _, _):
                hint = ": image.transpose(1, 2, 0)"
            case (_, _, _, _):
                hint = "; give several as a list"
            case _:
                hint = ""
        raise DataError(f"{name} has shape {array.shape}; it must be [height, width, 3], in RGB{hint}")
    if array.dtype != np.uint8:
        raise DataError(
            f"{name} has dtype {array.dtype}; it must be uint8, from 0 to 255 (of floats from 0 to 1, give "
            "(255 * image).round().astype(np.uint8))"
        )
    if not 1 <= min(array.shape[:2]) <= max(array.shape[:2]) <= MAX_SIDE:
        raise DataError(f"{name} has shape {array.shape}; its sides must have 1 to {MAX_SIDE} pixels")


def mask_at_original(
    logits: Float[np.ndarray, "h w"], *, valid_box: np.ndarray, canvas: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """The mask at the image's own size: bool ``[height, width]``, mask logits interpolated bilinearly and cut at 0.

    Logits are bounded by ``SATURATION`` before (chosen): the background's are far larger than a small object's, which
    moves the zero between two of them inwards by up to a quarter of a grid cell. Self-training adds up such a loss
    (README.md).

    Args:
      logits: on a grid over the whole canvas.
      valid_box: (top, left, bottom, right), where the image lies on the canvas.
      canvas: (height, width) of the model's input.
      size: (height, width) of the image.
    """
    h, w = logits.shape
    top, left, bottom, right = (float(side) for side in valid_box)
    scale_y, scale_x = (bottom - top) / size[0] * h / canvas[0], (right - left) / size[1] * w / canvas[1]
    # Pixel centres lie at +0.5 here and at integers in OpenCV.
    shift_y, shift_x = top * h / canvas[0] + 0.5 * scale_y - 0.5, left * w / canvas[1] + 0.5 * scale_x - 0.5
    matrix = np.array([[scale_x, 0.0, shift_x], [0.0, scale_y, shift_y]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    bounded = np.clip(logits, -SATURATION, SATURATION)
    return cv2.warpAffine(bounded, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE) > 0

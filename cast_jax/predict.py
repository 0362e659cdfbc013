"""From images to instances at the image's own resolution, streaming: memory does not grow with the number of images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from cast_jax.core.annotations import Detections, encode_mask
from cast_jax.core.distributed import gather, is_first
from cast_jax.core.sharding import batch_sharding, make_mesh, own_rows, shard_batch
from cast_jax.data.pipeline import eval_batches
from cast_jax.data.sources.base import Source
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

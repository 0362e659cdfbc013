"""The paper's teacher: what a text names becomes boxes (MM-Grounding-DINO), boxes become masks (SAM 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.resize import resize
from cast_jax.models.segmenter import Prediction
from cast_jax.models.teacher.grounding_dino import Detections, GroundingDino, class_probabilities
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig
from cast_jax.models.teacher.sam2 import Sam2, Sam2Config
from cast_jax.models.teacher.text import Prompts

STRIDE = 32  # sides of what both networks see are multiples of it
MASK_STRIDE = 4  # pixels of SAM 2's image between those of its masks and finest features
LEAST = 1e-6  # a probability whose logarithm is taken


@dataclasses.dataclass(frozen=True)
class GroundedSam2Config:
    """The two networks and how they work together.

    Attributes:
      detector, segmenter: their sizes.
      num_queries: boxes of an image that become masks, those of the highest class scores.
      detector_size, segmenter_size: (height, width) that images are resized to; empty for the multiples of 32 nearest
        to the image's own. The detector was trained with shorter sides of 800, SAM 2 with 1024 x 1024.
      tokenizer: a folder with the vocab.txt of bert-base-uncased, or a name on the hub.
      synonyms: phrases that stand for a class instead of its name, ``{"person": ["pedestrian", "person"]}``.
    """

    detector: GroundingDinoConfig
    segmenter: Sam2Config
    num_queries: int = 100
    detector_size: tuple[int, ...] = ()
    segmenter_size: tuple[int, ...] = ()
    tokenizer: str = "bert-base-uncased"
    synonyms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(self, num_queries=f"[1, {self.detector.num_queries}]")
        for name in ("detector_size", "segmenter_size"):
            size = getattr(self, name)
            if size and (len(size) != 2 or any(side < STRIDE or side % STRIDE for side in size)):
                raise UserError(f"{name} is {size}; it must be two multiples of {STRIDE}, or empty")

    @property
    def patch_size(self) -> int:
        """Images of any size will do: they are resized."""
        return 1

    @property
    def feature_dim(self) -> int:
        """Channels of the pixel features."""
        return self.segmenter.features

    def pixel_map(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of masks and pixel features."""
        rows, columns = self.segmenter_size or nearest_size(image_size)
        return rows // MASK_STRIDE, columns // MASK_STRIDE

    def queries(self, image_size: tuple[int, int]) -> int:
        """How many instances can be predicted in an image."""
        del image_size
        return self.num_queries


class GroundedSam2(nnx.Module):
    """Images in [0, 1] to a :class:`Prediction` for fixed classes; masks and features at a quarter of SAM 2's image.

    Args:
      prompts: what asks for the classes, in their order (``text.make_prompts``).
    """

    def __init__(self, config: GroundedSam2Config, prompts: Prompts, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.prompts = _Constant(prompts)
        self.detector = GroundingDino(config.detector, dtype=dtype, rngs=rngs)
        self.segmenter = Sam2(config.segmenter, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> Prediction:
        """The boxes of the highest class scores with their masks.

        A class's probability is the mean of its tokens'; "no object" has what the classes leave. Boxes carry no
        gradient into the masks.
        """
        size = (images.shape[1], images.shape[2])
        images = (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)
        shown = lambda wanted: resize(images, wanted or nearest_size(size), antialias=True).astype(self.dtype)
        scores, boxes = self._queries(self.detect(shown(self.config.detector_size), rngs=rngs))
        best = jax.lax.top_k(scores.max(axis=-1), self.config.num_queries)[1][..., None]
        scores, boxes = (jnp.take_along_axis(values, best, axis=1) for values in (scores, boxes))

        features = self.segmenter.encode(shown(self.config.segmenter_size), rngs=rngs)
        rows, columns = features.stride4.shape[1:3]
        corners = corners_of(jax.lax.stop_gradient(boxes), (MASK_STRIDE * rows, MASK_STRIDE * columns))
        masks = self.segmenter.decode(features, boxes=corners, train=rngs is not None)
        return Prediction(
            mask_logits=masks.logits[:, :, 0],
            class_logits=class_logits(scores),
            pixel_features=features.stride4.astype(jnp.float32),
        )

    def detect(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> list[Detections]:
        """What the detector finds for each prompt in normalised images."""
        text = self.detector.encode_text(self.prompts.value.tokens)
        one = lambda number: jax.tree.map(lambda leaf: leaf[number : number + 1], text)
        return [self.detector(images, one(number), rngs=rngs) for number in range(len(text.mask))]

    def _queries(
        self, detections: Sequence[Detections]
    ) -> tuple[Float[Array, "batch queries classes"], Float[Array, "batch queries 4"]]:
        """Class probabilities and boxes of the last decoder layer, of all prompts one after the other."""
        maps = self.prompts.value.class_map
        scores = [class_probabilities(found.class_logits[-1], row) for found, row in zip(detections, maps, strict=True)]
        return jnp.concatenate(scores, axis=1), jnp.concatenate([found.boxes[-1] for found in detections], axis=1)


class _Constant:
    """Something that is no parameter; compared by identity."""

    def __init__(self, value: Prompts):
        self.value = value


def class_logits(scores: Float[Array, "*batch classes"]) -> Float[Array, "*batch classes+1"]:
    """Logits whose softmax is the given probabilities and, for "no object", what they leave of 1.

    Probabilities that add up to more than 1, which sigmoids may, are divided by their sum.
    """
    nothing = 1.0 - scores.sum(axis=-1, keepdims=True)
    return jnp.log(jnp.maximum(jnp.concatenate([scores, nothing], axis=-1), LEAST))


def corners_of(boxes: Float[Array, "*batch 4"], size: tuple[int, int]) -> Float[Array, "*batch 4"]:
    """(x, y, width, height) of centres in [0, 1] as (left, top, right, bottom) in pixels, cut at the image's border."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = jnp.concatenate([centre - half, centre + half], axis=-1)
    return jnp.clip(corners, 0.0, 1.0) * jnp.array([size[1], size[0]] * 2, boxes.dtype)


def nearest_size(size: tuple[int, int]) -> tuple[int, int]:
    """The sides as multiples of 32."""
    rows, columns = (max(round(side / STRIDE), 1) * STRIDE for side in size)
    return rows, columns

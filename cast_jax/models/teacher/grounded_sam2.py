"""The paper's teacher: what a text names becomes boxes (MM-Grounding-DINO), boxes become masks (SAM 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.resize import resize
from cast_jax.core.sharding import batch_axes
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.segmenter import Prediction
from cast_jax.models.teacher.grounding_dino import Detections, GroundingDino, class_probabilities
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig
from cast_jax.models.teacher.sam2 import Sam2, Sam2Config
from cast_jax.models.teacher.text import Prompts

STRIDE = 32  # sides of what both networks see are multiples of it
MASK_STRIDE = 4  # pixels of SAM 2's image between those of its masks and finest features
LEAST = 1e-6  # a probability whose logarithm is taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptDetections:
    """What the detector says for one prompt, in the first stage and in every decoder layer.

    Attributes:
      token_logits: ``[batch, layers, queries, tokens]``; those of padding tokens are -10,000.
      boxes: ``[batch, layers, queries, 4]``, (x, y, width, height) of the centre, in [0, 1].
      class_map: ``[batch, classes, tokens]``, see ``text.Prompts``; the same for all images.
    """

    token_logits: Float[Array, "batch layers queries tokens"]
    boxes: Float[Array, "batch layers queries 4"]
    class_map: Float[Array, "batch classes tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroundedPrediction(Prediction):
    """A :class:`Prediction` with what the two networks' own losses need.

    Attributes:
      detections: by prompt.
      prompted: for given boxes, mask logits ``[batch, instances, h, w]`` and the IoU ``[batch, instances]`` expected of
        them; None without.
    """

    detections: tuple[PromptDetections, ...] = ()
    prompted: tuple[Float[Array, "batch instances h w"], Float[Array, "batch instances"]] | None = None


@dataclasses.dataclass(frozen=True)
class GroundedSam2Config:
    """The two networks and how they work together.

    Attributes:
      detector, segmenter: their sizes.
      num_queries: boxes of an image that become masks, those of the highest class scores.
      detector_size, segmenter_size: (height, width) that images are resized to; empty for the multiples of 32 nearest
        to the image's own. The detector was trained with shorter sides of 800, SAM 2 with 1024 x 1024.
      box_jitter: the boxes that prompt for masks in training are off by this, relative to their sides (standard
        deviation): as imprecise as detected ones.
      images_at_once: how many images of a device are computed at a time in training, which bounds the memory: their
        gradient computes them again. 0 for all together.
      tokenizer: a folder with the vocab.txt of bert-base-uncased, a name on the hub, or "words" (see
        ``text.load_tokenizer``).
      synonyms: phrases that stand for a class instead of its name, ``{"person": ["pedestrian", "person"]}``.
    """

    detector: GroundingDinoConfig
    segmenter: Sam2Config
    num_queries: int = 100
    detector_size: tuple[int, ...] = ()
    segmenter_size: tuple[int, ...] = ()
    box_jitter: float = 0.1
    images_at_once: int = 0
    tokenizer: str = "bert-base-uncased"
    synonyms: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranges(
            self, num_queries=f"[1, {self.detector.num_queries}]", box_jitter="[0, 1]", images_at_once="[0, 65536]"
        )
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

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        boxes: Float[Array, "batch instances 4"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> GroundedPrediction:
        """The boxes of the highest class scores with their masks.

        A class's probability is the mean of its tokens'; "no object" has what the classes leave. Boxes carry no
        gradient into the masks.

        Args:
          images: in [0, 1].
          boxes: (left, top, right, bottom) in [0, 1], jittered where ``rngs`` are given: prompts for further masks.
          rngs: switches training on.
        """
        parts = 1 if rngs is None else _parts(len(images), self.config.images_at_once)
        if rngs is None or parts == 1:
            return self._predict(images, boxes, rngs)
        # Every so many-th image, so that each device has its share of every part.
        split = lambda values: jnp.swapaxes(values.reshape(-1, parts, *values.shape[1:]), 0, 1)
        join = lambda values: jnp.swapaxes(values, 0, 1).reshape(-1, *values.shape[2:])
        keys = jax.random.split(rngs.dropout(), parts)
        run = lambda images, boxes, key: self._predict(images, boxes, nnx.Rngs(dropout=key))
        given = *jax.tree.map(split, (images, boxes)), keys
        return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda given: run(*given)), given))

    def _predict(
        self,
        images: Float[Array, "batch height width 3"],
        boxes: Float[Array, "batch instances 4"] | None,
        rngs: nnx.Rngs | None,
    ) -> GroundedPrediction:
        """The call, for all images together."""
        size = (images.shape[1], images.shape[2])
        images = (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)
        shown = lambda wanted: resize(images, wanted or nearest_size(size), antialias=True).astype(self.dtype)
        detections = self.detect(shown(self.config.detector_size), rngs=rngs)
        scores, found = self._queries(detections)
        best = jax.lax.top_k(scores.max(axis=-1), self.config.num_queries)[1][..., None]
        scores, found = (jnp.take_along_axis(values, best, axis=1) for values in (scores, found))

        features = self.segmenter.encode(shown(self.config.segmenter_size), rngs=rngs)
        shown_size = jnp.array([features.stride4.shape[2], features.stride4.shape[1]] * 2) * float(MASK_STRIDE)
        decode = lambda corners: self.segmenter.decode(features, boxes=corners * shown_size, train=rngs is not None)
        masks, prompted = decode(corners_of(jax.lax.stop_gradient(found))), None
        if boxes is not None:
            of_boxes = decode(boxes if rngs is None else jittered(rngs.dropout(), boxes, self.config.box_jitter))
            prompted = of_boxes.logits[:, :, 0], of_boxes.iou[:, :, 0]
        return GroundedPrediction(
            mask_logits=masks.logits[:, :, 0],
            class_logits=class_logits(scores),
            pixel_features=features.stride4.astype(jnp.float32),
            mask_quality=masks.iou[:, :, 0],
            detections=tuple(
                _of_prompt(found, row) for found, row in zip(detections, self.prompts.value.class_map, strict=True)
            ),
            prompted=prompted,
        )

    def detect(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> list[Detections]:
        """What the detector finds for each prompt in normalised images, whose own maps are computed once."""
        text = self.detector.encode_text(self.prompts.value.tokens)
        maps = self.detector.encode_image(images, rngs=rngs)
        one = lambda number: jax.tree.map(lambda leaf: leaf[number : number + 1], text)
        return [self.detector(maps, one(number), rngs=rngs) for number in range(len(text.mask))]

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


def _parts(images: int, at_once: int) -> int:
    """Into how many parts a batch is split so that each has at most ``at_once`` images of every device."""
    devices = jax.sharding.get_abstract_mesh().size if batch_axes() else 1
    own = max(images // devices, 1)
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= (at_once or own))


def _of_prompt(found: Detections, class_map: Float[np.ndarray, "classes tokens"]) -> PromptDetections:
    """The first stage and the layers behind it, images first."""
    stacked = lambda first, layers: jnp.moveaxis(jnp.concatenate([first[None], layers]), 0, 1)
    return PromptDetections(
        stacked(found.proposals.class_logits, found.class_logits),
        stacked(found.proposals.boxes, found.boxes),
        jnp.broadcast_to(class_map, (found.boxes.shape[1], *class_map.shape)),
    )


def corners_of(boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch 4"]:
    """(x, y, width, height) of centres as (left, top, right, bottom), all in [0, 1], cut at the image's border."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.clip(jnp.concatenate([centre - half, centre + half], axis=-1), 0.0, 1.0)


def jittered(key: PRNGKeyArray, corners: Float[Array, "*batch 4"], jitter: float) -> Float[Array, "*batch 4"]:
    """Each side of a box moved by a normal deviate of ``jitter`` times the box's extent; cut at [0, 1]."""
    extent = corners[..., 2:] - corners[..., :2]
    noise = jnp.clip(jitter * jax.random.normal(key, corners.shape), -0.5, 0.5)  # so that no box turns over
    return jnp.clip(corners + noise * jnp.concatenate([extent, extent], axis=-1), 0.0, 1.0)


def nearest_size(size: tuple[int, int]) -> tuple[int, int]:
    """The sides as multiples of 32."""
    rows, columns = (max(round(side / STRIDE), 1) * STRIDE for side in size)
    return rows, columns

"""The segmenters that a configuration can name, with their sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from cast_jax.core.config import build
from cast_jax.core.errors import UserError
from cast_jax.models import dinov2
from cast_jax.models.dpt import DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.hiera import HieraConfig
from cast_jax.models.mask_decoder import MaskDecoderConfig
from cast_jax.models.parts import DECODERS, ENCODERS, decoder_layers
from cast_jax.models.resnet import ResNetConfig
from cast_jax.models.student import Student, StudentConfig
from cast_jax.models.swin import SwinConfig
from cast_jax.models.teacher.bert import BertConfig
from cast_jax.models.teacher.grounded_sam2 import GroundedSam2, GroundedSam2Config
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig, mm_grounding_dino_l, mm_grounding_dino_t
from cast_jax.models.teacher.sam2 import Sam2Config, sam2_image_l, sam2_image_t
from cast_jax.models.teacher.sam2_mask_decoder import Sam2MaskDecoderConfig
from cast_jax.models.teacher.text import load_tokenizer, make_prompts

Config = TypeVar("Config")


def student_s() -> StudentConfig:
    """The paper's student: DINOv2-S, DPT-S and nine 384-d decoder layers: 50.4 M parameters (52 in the paper)."""
    return StudentConfig(
        encoder=dinov2.dinov2_s(remat="blocks"),
        decoder=DptConfig(),
        mask_decoder=MaskDecoderConfig(hidden_dim=384, mask_dim=384, num_layers=9),
        encoder_layers=(2, 5, 8, 11),
    )


def student_l() -> StudentConfig:
    """A teacher of the student's family: DINOv2-L, the DPT-L neck of Depth-Anything-V2, nine decoder layers."""
    return StudentConfig(
        encoder=dinov2.dinov2_l(remat="blocks"),
        decoder=DptConfig(features=256, out_channels=(256, 512, 1024, 1024)),
        mask_decoder=MaskDecoderConfig(hidden_dim=384, mask_dim=384, num_layers=9),
        encoder_layers=(4, 11, 17, 23),
    )


def student_tiny() -> StudentConfig:
    """For CPUs and small data without pretrained weights: grid queries learn from scratch in minutes."""
    return StudentConfig(
        encoder=dinov2.tiny(embed_dim=64, depth=4, num_heads=2),
        decoder=DptConfig(features=24, out_channels=(24, 32, 64, 64)),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=64,
            mask_dim=24,
            num_heads=4,
            ffn_dim=128,
            num_layers=2,
            query_stride=6,
            num_levels=2,
            dropout=0.0,
        ),
        encoder_layers=(0, 1, 2, 3),
    )


def teacher_tiny() -> StudentConfig:
    """The larger sibling of ``student_tiny``: wider and deeper encoder, one and a half times its cost."""
    return StudentConfig(
        encoder=dinov2.tiny(embed_dim=96, depth=6, num_heads=3),
        decoder=DptConfig(features=32, out_channels=(32, 48, 96, 96)),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=64,
            mask_dim=24,
            num_heads=4,
            ffn_dim=128,
            num_layers=2,
            query_stride=6,
            num_levels=2,
            dropout=0.0,
        ),
        encoder_layers=(1, 2, 4, 5),
    )


def student_resnet_tiny() -> StudentConfig:
    """``student_tiny`` with a convolutional encoder, which learns from scratch in fewer updates."""
    return dataclasses.replace(
        student_tiny(),
        encoder=ResNetConfig(widths=(16, 32, 64, 96), depths=(1, 2, 2, 2)),
        decoder=DptConfig(features=24, out_channels=(16, 32, 64, 64)),
    )


def teacher_resnet_tiny() -> StudentConfig:
    """The larger sibling of ``student_resnet_tiny``: twice as wide, deeper."""
    return dataclasses.replace(
        student_resnet_tiny(),
        encoder=ResNetConfig(widths=(32, 64, 96, 128), depths=(1, 2, 3, 3)),
        decoder=DptConfig(features=32, out_channels=(32, 48, 64, 64)),
    )


def grounded_sam2_l() -> GroundedSam2Config:
    """The paper's teacher: MM-Grounding-DINO-L and SAM2-L, 560 M parameters."""
    return _fused(mm_grounding_dino_l(), sam2_image_l())


def grounded_sam2_t() -> GroundedSam2Config:
    """The smallest published pair: MM-Grounding-DINO-T and SAM2-T, 204 M parameters."""
    return _fused(mm_grounding_dino_t(), sam2_image_t())


def _fused(detector: GroundingDinoConfig, segmenter: Sam2Config) -> GroundedSam2Config:
    """Published networks, image by image and their blocks computed again in the gradient: an update is to fit a GPU."""
    backbone, bert = (
        dataclasses.replace(detector.backbone, remat="blocks"),
        dataclasses.replace(detector.bert, remat=True),
    )
    return GroundedSam2Config(
        dataclasses.replace(detector, backbone=backbone, bert=bert, remat=True),
        dataclasses.replace(segmenter, encoder=dataclasses.replace(segmenter.encoder, remat="blocks")),
        segmenter_size=(1024, 1024),
        images_at_once=1,
    )


def grounded_sam2_tiny() -> GroundedSam2Config:
    """For CPUs and small data without pretrained weights or vocabulary: both networks learn from scratch."""
    swin = SwinConfig(
        embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, learned_norms=(1, 2, 3), drop_path=0.0
    )
    detector = GroundingDinoConfig(
        backbone=swin,
        bert=BertConfig(vocab_size=1536, hidden_dim=32, num_layers=1, num_heads=2, ffn_dim=64, max_positions=64),
        hidden_dim=64,
        num_heads=4,
        encoder_layers=1,
        encoder_ffn_dim=128,
        decoder_layers=2,
        decoder_ffn_dim=128,
        num_queries=64,
    )
    trunk = HieraConfig(
        embed_dim=32,
        depths=(1, 1, 2, 1),
        window_sizes=(8, 4, 8, 4),
        global_blocks=(3,),
        normalised_maps=False,
    )
    # The single mask always: the others, which published weights fall back on, are not trained.
    decoder = Sam2MaskDecoderConfig(num_heads=2, ffn_dim=64, iou_hidden_dim=32, stability_threshold=0.0)
    segmenter = Sam2Config(trunk, features=64, mask_hidden=8, mask_decoder=decoder, prompts_per_block=0)
    return GroundedSam2Config(detector, segmenter, num_queries=64, tokenizer="words")


SegmenterConfig = StudentConfig | GroundedSam2Config

SEGMENTERS: dict[str, Callable[[], SegmenterConfig]] = {
    config.__name__: config
    for config in (
        student_s,
        student_l,
        student_tiny,
        teacher_tiny,
        student_resnet_tiny,
        teacher_resnet_tiny,
        grounded_sam2_l,
        grounded_sam2_t,
        grounded_sam2_tiny,
    )
}


def segmenter_config(spec: Mapping[str, Any], where: str = "model") -> SegmenterConfig:
    """The sizes that ``{"name": "student_s", "encoder": {...}, ...}`` describes: a named model with single changes.

    An encoder or decoder that itself has a ``name`` takes the place of the model's:
    ``{"name": "student_s", "encoder": {"name": "resnet50"}, "decoder": {"name": "fpn", "features": 128}}``. Another
    encoder comes with its own ``encoder_layers`` unless they are given.

    Raises:
      UserError: an unknown name, part or field, with the known ones; sizes that do not go together.
    """
    changes = dict(spec)
    name = _known(changes.pop("name", None), SEGMENTERS, f"{where}.name")
    named = dict(vars(SEGMENTERS[name]()))
    for part, known in (("encoder", ENCODERS), ("decoder", DECODERS)):
        values = changes.get(part)
        if part in named and isinstance(values, Mapping) and "name" in values:
            named[part] = known[_known(values["name"], known, f"{where}.{part}.name")]()
            changes[part] = {key: value for key, value in values.items() if key != "name"}
            if part == "encoder":
                named["encoder_layers"] = decoder_layers(named[part])
    return _changed(named, changes, type(SEGMENTERS[name]()), where)


def _changed(named: Mapping[str, Any], changes: Mapping[str, Any], kind: type[Config], where: str) -> Config:
    """A configuration of this ``kind`` with the ``named`` fields and, part by part, the nested ``changes``."""
    values = {**named, **changes}
    for part, given in changes.items():
        if isinstance(given, Mapping) and dataclasses.is_dataclass(has := named.get(part)):
            values[part] = _changed(vars(has), given, type(has), f"{where}.{part}")
    return build(kind, values, where)


def _known(name: Any, table: Mapping[str, Any], where: str) -> str:
    if name not in tuple(table):
        raise UserError(f"{where} {name!r} is unknown; known: {', '.join(table)}")
    return name


def check_image_size(config: SegmenterConfig, image_size: tuple[int, int]) -> None:
    """Raises :class:`UserError`, with the nearest size that can be, unless sides are multiples of the patch size."""
    if any(side % config.patch_size for side in image_size):
        nearest = [max(round(side / config.patch_size), 1) * config.patch_size for side in image_size]
        raise UserError(
            f"data.image_size {tuple(image_size)} must be multiples of the model's patch size {config.patch_size}; "
            f"the nearest is {tuple(nearest)}"
        )


def build_segmenter(
    spec: Mapping[str, Any], classes: Sequence[str], image_size: tuple[int, int], *, dtype: Any = jnp.float32
) -> Functional:
    """A segmenter as a pure function; the same one for the same model, since describing a large one takes seconds.

    Raises:
      UserError: see :func:`segmenter_config`; image sides that are no multiples of the patch size; classes that the
        model's tokenizer cannot ask for.
    """
    config = segmenter_config(spec)
    check_image_size(config, image_size)
    if isinstance(config, StudentConfig):
        return _student(config, len(classes), jnp.dtype(dtype))
    key = repr((config, tuple(classes), jnp.dtype(dtype)))
    if key not in _TEACHERS:
        prompts = make_prompts(classes, load_tokenizer(config.tokenizer), synonyms=config.synonyms)
        if (rows := int(np.max(prompts.tokens.ids)) + 1) > (known := config.detector.bert.vocab_size):
            raise UserError(f"tokenizer {config.tokenizer!r} has {rows} words, more than the model's table, {known}")
        _TEACHERS[key] = Functional(lambda rngs: GroundedSam2(config, prompts, dtype=jnp.dtype(dtype), rngs=rngs))
    return _TEACHERS[key]


_TEACHERS: dict[str, Functional] = {}  # by all that they depend on


@functools.cache
def _student(config: StudentConfig, num_classes: int, dtype: Any) -> Functional:
    return Functional(lambda rngs: Student(config, num_classes, dtype=dtype, rngs=rngs))

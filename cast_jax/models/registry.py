"""The segmenters that a configuration can name, with their sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from cast_jax.core.config import build
from cast_jax.core.errors import UserError
from cast_jax.models import dinov2
from cast_jax.models.dpt import DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.mask_decoder import MaskDecoderConfig
from cast_jax.models.parts import DECODERS, ENCODERS, decoder_layers
from cast_jax.models.resnet import ResNetConfig
from cast_jax.models.student import Student, StudentConfig


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


SEGMENTERS: dict[str, Callable[[], StudentConfig]] = {
    config.__name__: config
    for config in (student_s, student_l, student_tiny, teacher_tiny, student_resnet_tiny, teacher_resnet_tiny)
}


def segmenter_config(spec: Mapping[str, Any], where: str = "model") -> StudentConfig:
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
        if isinstance(values, Mapping) and "name" in values:
            named[part] = known[_known(values["name"], known, f"{where}.{part}.name")]()
            changes[part] = {key: value for key, value in values.items() if key != "name"}
            if part == "encoder":
                named["encoder_layers"] = decoder_layers(named[part])
    for part, values in changes.items():
        if isinstance(values, Mapping) and dataclasses.is_dataclass(named.get(part)):
            changes[part] = build(type(named[part]), {**vars(named[part]), **values}, f"{where}.{part}")
    return build(StudentConfig, {**named, **changes}, where)


def _known(name: Any, table: Mapping[str, Any], where: str) -> str:
    if name not in tuple(table):
        raise UserError(f"{where} {name!r} is unknown; known: {', '.join(table)}")
    return name


def check_image_size(config: StudentConfig, image_size: tuple[int, int]) -> None:
    """Raises :class:`UserError`, with the nearest size that can be, unless sides are multiples of the patch size."""
    if any(side % config.patch_size for side in image_size):
        nearest = [max(round(side / config.patch_size), 1) * config.patch_size for side in image_size]
        raise UserError(
            f"data.image_size {tuple(image_size)} must be multiples of the model's patch size {config.patch_size}; "
            f"the nearest is {tuple(nearest)}"
        )


def build_segmenter(
    spec: Mapping[str, Any], num_classes: int, image_size: tuple[int, int], *, dtype: Any = jnp.float32
) -> Functional:
    """A segmenter as a pure function; the same one for the same model, since describing a large one takes seconds.

    Raises:
      UserError: see :func:`segmenter_config`; image sides that are no multiples of the patch size.
    """
    config = segmenter_config(spec)
    check_image_size(config, image_size)
    return _functional(config, num_classes, jnp.dtype(dtype))


@functools.cache
def _functional(config: StudentConfig, num_classes: int, dtype: Any) -> Functional:
    return Functional(lambda rngs: Student(config, num_classes, dtype=dtype, rngs=rngs))

"""The encoders and decoders that a student can be made of by name (the paper's Table 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cast_jax.models import bottleneck, dinov2, hiera, resnet, swin
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.fpn import Fpn, FpnConfig

EncoderConfig = (
    dinov2.DinoV2Config | resnet.ResNetConfig | bottleneck.BottleneckResNetConfig | swin.SwinConfig | hiera.HieraConfig
)
DecoderConfig = DptConfig | FpnConfig

# What builds the network of a configuration.
MODULES: dict[type, Callable[..., Any]] = {
    dinov2.DinoV2Config: dinov2.DinoV2,
    resnet.ResNetConfig: resnet.ResNet,
    bottleneck.BottleneckResNetConfig: bottleneck.BottleneckResNet,
    swin.SwinConfig: swin.Swin,
    hiera.HieraConfig: hiera.Hiera,
    DptConfig: Dpt,
    FpnConfig: Fpn,
}

ENCODERS: dict[str, Callable[..., EncoderConfig]] = {
    make.__name__: make
    for make in (
        dinov2.dinov2_s,
        dinov2.dinov2_b,
        dinov2.dinov2_l,
        bottleneck.resnet50,
        bottleneck.resnet101,
        swin.swin_t,
        swin.swin_s,
        swin.swin_b,
        swin.swin_l,
        hiera.sam2_t,
        hiera.sam2_s,
        hiera.sam2_b_plus,
        hiera.sam2_l,
    )
}

DECODERS: dict[str, Callable[[], DecoderConfig]] = {"dpt": DptConfig, "fpn": FpnConfig}


def decoder_layers(encoder: EncoderConfig) -> tuple[int, int, int, int]:
    """The maps (0-based) that feed the decoder: a pyramid's stages; of a ViT those of Depth-Anything-V2."""
    if encoder.pyramid:
        return (0, 1, 2, 3)
    return (4, 11, 17, 23) if encoder.depth == 24 else tuple(encoder.depth * n // 4 - 1 for n in (1, 2, 3, 4))  # type: ignore[return-value]

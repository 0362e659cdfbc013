"""DINOv2-S and the DPT neck against PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import torch
from benchmarks.timing import medians, run, temporary_mib
from flax import nnx

from cast_jax.convert.dinov2 import reference as reference_dinov2
from cast_jax.convert.dpt import reference as reference_dpt
from cast_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_s
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.functional import Functional


def encoder(repeats: int) -> list[dict[str, Any]]:
    """One image of 518 x 518, float32; the gradient is that of the results' sum, for all parameters."""
    layers, grid, size = (2, 5, 8, 11), (37, 37), 518
    backbone = reference_dinov2(dinov2_s()).eval()
    neck = reference_dpt(dinov2_s(), DptConfig(), layers).neck.eval()
    image, tokens = torch.randn(1, 3, size, size), [torch.randn(1, 1 + 37 * 37, 384) for _ in layers]

    def torch_encoder():
        return backbone(image).last_hidden_state

    def torch_neck():
        return neck(tokens, *grid)[-1]

    def torch_backward(forward, model):
        model.zero_grad()
        forward().sum().backward()

    def torch_forward(forward):
        with torch.inference_mode():
            forward()

    keys = jax.random.split(jax.random.key(0), 5)
    pixels = jax.random.normal(keys[0], (1, size, size, 3))
    maps = [jax.random.normal(key, (1, *grid, 384)) for key in keys[1:]]
    rows = []
    for name, model, inputs, theirs, module in (
        ("DINOv2-S", _last_map(dinov2_s()), pixels, torch_encoder, backbone),
        ("DINOv2-S, remat elementwise", _last_map(dinov2_s(remat="elementwise")), pixels, torch_encoder, backbone),
        ("DINOv2-S, remat blocks", _last_map(dinov2_s(remat="blocks")), pixels, torch_encoder, backbone),
        ("DPT-S", _finest(DptConfig(finest_scale=8)), maps, torch_neck, neck),
    ):
        params = model.init(jax.random.key(1))

        def loss(params, inputs, model=model):
            return model.apply(params, inputs).sum()

        for part, function in (("forward", loss), ("forward + backward", jax.grad(loss))):
            compiled = jax.jit(function).lower(params, inputs).compile()
            other = (
                functools.partial(torch_forward, theirs)
                if part == "forward"
                else functools.partial(torch_backward, theirs, module)
            )
            ours = medians({"jax": functools.partial(run, compiled, params, inputs), "torch": other}, repeats)
            rows.append(
                {
                    "network": name,
                    "part": part,
                    "jax ms": round(1e3 * ours["jax"], 1),
                    "torch ms": round(1e3 * ours["torch"], 1),
                    "torch / jax": round(ours["torch"] / ours["jax"], 2),
                    "temporary MiB (jax)": temporary_mib(compiled),
                }
            )
    return rows


def _last_map(config: DinoV2Config) -> Functional:
    """The encoder up to its last map."""

    class Last(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.encoder = DinoV2(config, rngs=rngs)

        def __call__(self, images, *, rngs=None):
            return self.encoder(images, layers=(config.depth - 1,), rngs=rngs)[0]

    return Functional(lambda rngs: Last(rngs))


def _finest(config: DptConfig) -> Functional:
    """The DPT neck of a ViT-S up to its finest map."""

    class Finest(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.decoder = Dpt(384, config, rngs=rngs)

        def __call__(self, maps, *, rngs=None):
            return self.decoder(maps)[0]

    return Functional(lambda rngs: Finest(rngs))

"""Tiny PyTorch models in which no tensor is zero or constant, on disk under each of the published layouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from cast_jax.convert import dinov2 as dinov2_keys
from cast_jax.convert import dpt as dpt_keys
from cast_jax.convert.engine import place
from cast_jax.core.rules import EACH, is_stacked, layer_names, layer_shapes, named_leaves, unnamed

# What --config must say so that MODEL has the tiny sizes.
ENCODER = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 4, "position_grid": 5}
DECODER = {"features": 8, "out_channels": [6, 8, 10, 12]}
LAYERS = [0, 1, 2, 3]


def encoder_changes(**changes):
    return {"encoder": {**ENCODER, **changes}}


def neck_changes():
    return {"encoder": ENCODER, "decoder": DECODER, "encoder_layers": LAYERS}


def as_flags(changes) -> list[str]:
    """``--config`` arguments for nested changes."""
    flags = []
    for part, values in changes.items():
        fields = values.items() if isinstance(values, dict) else [("", values)]
        flags += [f"--config={f'{part}.{name}'.rstrip('.')}={str(value).lower()}" for name, value in fields]
    return flags


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def scaled(model: torch.nn.Module) -> torch.nn.Module:
    """No tensor zero or constant, and every layer's output about as large as its input, so that errors stay small."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "pos" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.1).add_(1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def _sizes(depth: int = 4) -> dict:
    return {
        "hidden_size": 24, "num_hidden_layers": depth, "num_attention_heads": 2, "patch_size": 4, "image_size": 20,
    }  # fmt: skip


def dinov2(registers: int = 0, swiglu: bool = False, depth: int = 4) -> torch.nn.Module:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{name}Config")(**_sizes(depth), use_swiglu_ffn=swiglu, **extra)
    return randomised(getattr(transformers, f"{name}Model")(config))


def depth_anything() -> torch.nn.Module:
    backbone = transformers.Dinov2Config(
        **_sizes(), out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=4, reassemble_hidden_size=24, neck_hidden_sizes=DECODER["out_channels"],
        fusion_hidden_size=8, head_hidden_size=5,
    )  # fmt: skip
    return randomised(transformers.DepthAnythingForDepthEstimation(config))


def official_dinov2(prefix: str = "", registers: int = 0, swiglu: bool = False, depth: int = 4, dim: int = 24) -> dict:
    """The official release's keys and shapes (facebookresearch/dinov2), random values."""
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(*shape) * 0.3
    hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
    weights = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, 26, dim),
        **({"register_tokens": draw(1, registers, dim)} if registers else {}),
        "mask_token": draw(1, dim),
        "patch_embed.proj.weight": draw(dim, 3, 4, 4),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": draw(dim),
        "norm.bias": draw(dim),
    }
    shapes = {"norm1": None, "norm2": None, "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    ffn = {"w12": (2 * hidden, dim), "w3": (dim, hidden)} if swiglu else {"fc1": (4 * dim, dim), "fc2": (dim, 4 * dim)}
    shapes |= {f"mlp.{name}": shape for name, shape in ffn.items()}
    for block in range(depth):
        for name, shape in shapes.items():
            weights[f"blocks.{block}.{name}.weight"] = draw(*(shape or (dim,)))
            weights[f"blocks.{block}.{name}.bias"] = draw(shape[0] if shape else dim)
        weights |= {f"blocks.{block}.ls{n}.gamma": draw(dim) for n in (1, 2)}
    return {prefix + key: value for key, value in weights.items()}


def official_neck(prefix: str, classes: int | None = None) -> dict:
    """Depth-Anything-V2's head (``classes`` None) or UniMatch-V2's, keys and shapes as in their ``dpt.py``."""
    torch.manual_seed(2)
    draw = lambda *shape: torch.randn(*shape) * 0.3
    weights, widths = {}, DECODER["out_channels"]

    def layer(name: str, *shape: int, outputs: int | None = None) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(*shape), draw(outputs or shape[0])

    for level, width in enumerate(widths):
        layer(f"projects.{level}", width, 24, 1, 1)
        weights[f"scratch.layer{level + 1}_rn.weight"] = draw(8, width, 3, 3)
        layer(f"scratch.refinenet{level + 1}.out_conv", 8, 8, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                layer(f"scratch.refinenet{level + 1}.resConfUnit{unit}.conv{conv}", 8, 8, 3, 3)
    layer("resize_layers.0", widths[0], widths[0], 4, 4)
    layer("resize_layers.1", widths[1], widths[1], 2, 2)
    layer("resize_layers.3", widths[3], widths[3], 3, 3)
    if classes is None:
        layer("scratch.output_conv1", 4, 8, 3, 3)
        layer("scratch.output_conv2.0", 32, 4, 3, 3)
        layer("scratch.output_conv2.2", 1, 32, 1, 1)
    else:
        layer("scratch.output_conv.0", 8, 8, 3, 3)
        layer("scratch.output_conv.2", classes, 8, 1, 1)
    return {prefix + key: value for key, value in weights.items()}


def save_torch(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def layers_of(tree) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, of its stacks' layer by layer."""
    return layer_shapes({name: leaf.shape for name, leaf in named_leaves(tree).items()})


def in_stacks(arrays: dict[str, np.ndarray], like):
    """Single layers' arrays by name, as the tree of parameters ``like``."""
    join = lambda name, leaf: (
        np.stack([arrays[layer] for layer in layer_names(name, leaf.shape)]) if is_stacked(name) else arrays[name]
    )
    return unnamed({name: join(name, leaf) for name, leaf in named_leaves(like).items()}, like)


def pairs(ours: nnx.Module, theirs: torch.nn.Module, part: str, prefix: str = "") -> Iterator:
    """(path, our parameter, theirs, how they become ours), by the conversion's rules; of a stack one for each layer.

    ``ours`` is the student's ``part``; ``prefix`` is what the file has before the names of ``theirs``. No parameter is
    left without its counterpart, on neither side.
    """
    parameters = dict(theirs.named_parameters())
    origins = place([prefix + key for key in parameters], (*dinov2_keys.RULES, *dpt_keys.RULES)).origins
    flat = [
        (path, variable, layer_names(f"{part}/{'/'.join(map(str, path))}", variable.shape))
        for path, variable in nnx.to_flat_state(nnx.state(ours, nnx.Param))
    ]
    assert {name for _, _, names in flat for name in names} == origins.keys()
    for path, variable, names in flat:
        found = [origins[name][0] for name in names]

        def layout(values, found=found, path=path) -> np.ndarray:
            arrays = [origin.convert(value.numpy()) for origin, value in zip(found, values, strict=True)]
            return np.stack(arrays) if EACH in path else arrays[0]

        yield path, variable, [parameters[origin.key.removeprefix(prefix)] for origin in found], layout


def copy_weights(theirs: torch.nn.Module, ours: nnx.Module, part: str, prefix: str = "") -> None:
    """Fills every parameter of ``ours``."""
    leaves = [
        (path, variable.replace(jnp.asarray(layout([other.detach() for other in others]))))
        for path, variable, others, layout in pairs(ours, theirs, part, prefix)
    ]
    nnx.update(ours, nnx.from_flat_state(leaves))

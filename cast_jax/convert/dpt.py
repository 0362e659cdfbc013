"""The DPT neck's keys: Depth-Anything-V2 (``depth_head.*``), UniMatch-V2 (``head.*``) and Hugging Face's (``neck.*``).

Sources: the modules' names in the two projects' ``dpt.py`` (``scratch.refinenet1`` is the finest fusion block, our
last) and Hugging Face's ``convert_depth_anything_to_hf.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cast_jax.convert import dinov2
from cast_jax.convert.engine import Rule, affine, ignore
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.dpt import DptConfig


def _reassemble(project: str, resize: str) -> tuple[Rule, ...]:
    """``project`` and ``resize`` hold the level, {}, of which the first two are enlarged and the last is reduced."""
    return (
        *affine(project.format("([0-3])"), r"decoder/reassemble/\1/project", "pointwise"),
        *affine(resize.format("([01])"), r"decoder/reassemble/\1/expand", "expansion"),
        *affine(resize.format("3"), "decoder/reassemble/3/reduce", "convolution"),
    )


_HEAD = r"(?:depth_head|head)\."

OFFICIAL: tuple[Rule, ...] = (
    *_reassemble(rf"{_HEAD}projects\.{{}}", rf"{_HEAD}resize_layers\.{{}}"),
    *(
        rule
        for n in range(1, 5)
        for rule in (
            Rule(rf"{_HEAD}scratch\.layer{n}_rn\.weight", f"decoder/adapt/{n - 1}/kernel", "convolution"),
            *affine(rf"{_HEAD}scratch\.refinenet{n}\.out_conv", f"decoder/fusion/{4 - n}/project", "pointwise"),
            *affine(
                rf"{_HEAD}scratch\.refinenet{n}\.resConfUnit([12])\.(conv[12])",
                rf"decoder/fusion/{4 - n}/unit\1/\2",
                "convolution",
            ),
        )
    ),
)

HUGGING_FACE: tuple[Rule, ...] = (
    *_reassemble(r"neck\.reassemble_stage\.layers\.{}\.projection", r"neck\.reassemble_stage\.layers\.{}\.resize"),
    Rule(r"neck\.convs\.([0-3])\.weight", r"decoder/adapt/\1/kernel", "convolution"),
    *affine(r"neck\.fusion_stage\.layers\.([0-3])\.projection", r"decoder/fusion/\1/project", "pointwise"),
    *affine(
        r"neck\.fusion_stage\.layers\.([0-3])\.residual_layer([12])\.convolution([12])",
        r"decoder/fusion/\1/unit\2/conv\3",
        "convolution",
    ),
)

# The layers after the neck, which predict depth (output_conv1, output_conv2) or UniMatch-V2's classes (output_conv).
OUTPUTS: tuple[Rule, ...] = ignore(
    rf"{_HEAD}scratch\.output_conv[12]?\.(\d\.)?(weight|bias)", r"head\.conv[123]\.(weight|bias)"
)

RULES: tuple[Rule, ...] = (*OFFICIAL, *HUGGING_FACE, *OUTPUTS)


def reference(encoder: DinoV2Config, decoder: DptConfig, layers: Sequence[int]) -> Any:
    """Hugging Face's Depth Anything, fed by the maps after ``layers`` (0-based); its depth head is not looked at."""
    import transformers

    backbone = getattr(transformers, f"Dinov2{'WithRegisters' if encoder.num_register_tokens else ''}Config")(
        **dinov2.sizes(encoder),
        out_indices=[layer + 1 for layer in layers],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=encoder.patch_size,
        reassemble_hidden_size=encoder.embed_dim,
        neck_hidden_sizes=list(decoder.out_channels),
        fusion_hidden_size=decoder.features,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def reference_stages(model: Any, tokens: Sequence[np.ndarray], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The fused maps of PyTorch's neck, coarse to fine, from the encoder's tokens."""
    import torch

    maps = model.neck([torch.from_numpy(level) for level in tokens], *grid)
    return {f"fusion/{n}": level.permute(0, 2, 3, 1).numpy() for n, level in enumerate(maps)}

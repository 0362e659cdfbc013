"""The DPT neck's keys: Depth-Anything-V2 (``depth_head.*``), UniMatch-V2 (``head.*``) and Hugging Face's (``neck.*``).

Sources: the modules' names in the two projects' ``dpt.py`` (``scratch.refinenet1`` is the finest fusion block, our
last) and Hugging Face's ``convert_depth_anything_to_hf.py``.
"""

from __future__ import annotations

from cast_jax.convert.engine import Rule, affine, ignore


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

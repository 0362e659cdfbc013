"""ResNet-50's and -101's keys: torchvision's (``layer1.0.conv1.weight``) and Hugging Face's.

Sources: the modules of torchvision's ``resnet.py`` and of Hugging Face's ``modeling_resnet.py``. Their batch norms come
folded (``sources.fold_batch_norms``), as ``<name>.scale`` and ``<name>.shift``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cast_jax.convert.engine import Rule, ignore
from cast_jax.convert.sources import Checkpoint, fold_batch_norms
from cast_jax.models.bottleneck import BottleneckResNetConfig

_PREFIX = r"(?:(?:backbone|resnet|encoder)\.)?"  # of detectors, Hugging Face's classifiers, segmentation models


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(rf"{source}\.scale", f"{target}/scale"), Rule(rf"{source}\.shift", f"{target}/shift")


TORCHVISION: tuple[Rule, ...] = (
    Rule(rf"{_PREFIX}conv1\.weight", "encoder/stem/kernel", "convolution"),
    *_norm(rf"{_PREFIX}bn1", "encoder/stem/norm"),
    *(
        rule
        for stage in range(1, 5)
        for block, ours in ((rf"{_PREFIX}layer{stage}\.(\d+)\.", rf"encoder/stages/{stage - 1}/\1/"),)
        for rule in (
            Rule(rf"{block}conv2\.weight", f"{ours}conv2/kernel", "convolution"),
            *(Rule(rf"{block}conv{n}\.weight", f"{ours}conv{n}/kernel", "pointwise") for n in (1, 3)),
            *(norm for n in (1, 2, 3) for norm in _norm(rf"{block}bn{n}", f"{ours}norm{n}")),
            Rule(rf"{block}downsample\.0\.weight", f"{ours}shortcut/kernel", "pointwise"),
            *_norm(rf"{block}downsample\.1", f"{ours}shortcut_norm"),
        )
    ),
)

HUGGING_FACE: tuple[Rule, ...] = (
    Rule(rf"{_PREFIX}embedder\.embedder\.convolution\.weight", "encoder/stem/kernel", "convolution"),
    *_norm(rf"{_PREFIX}embedder\.embedder\.normalization", "encoder/stem/norm"),
    *(
        rule
        for block, ours in ((rf"{_PREFIX}encoder\.stages\.(\d)\.layers\.(\d+)\.", r"encoder/stages/\1/\2/"),)
        for rule in (
            Rule(rf"{block}layer\.1\.convolution\.weight", f"{ours}conv2/kernel", "convolution"),
            *(
                Rule(rf"{block}layer\.{n}\.convolution\.weight", f"{ours}conv{n + 1}/kernel", "pointwise")
                for n in (0, 2)
            ),
            *(norm for n in (0, 1, 2) for norm in _norm(rf"{block}layer\.{n}\.normalization", f"{ours}norm{n + 1}")),
            Rule(rf"{block}shortcut\.convolution\.weight", f"{ours}shortcut/kernel", "pointwise"),
            *_norm(rf"{block}shortcut\.normalization", f"{ours}shortcut_norm"),
        )
    ),
)

RULES: tuple[Rule, ...] = (*HUGGING_FACE, *TORCHVISION)
HEADS: tuple[Rule, ...] = ignore(rf"{_PREFIX}(fc|classifier(\.\d)?|head)\.(weight|bias)")


def found(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Nothing: the sizes are the name's."""
    del shapes
    return {}


def facts(given: Mapping[str, Any], config: BottleneckResNetConfig) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults."""
    del config
    return {
        "layer_type": (given.get("layer_type", "bottleneck"), "bottleneck"),
        "hidden_act": (given.get("hidden_act", "relu"), "relu"),
        "downsample_in_first_stage": (given.get("downsample_in_first_stage", False), False),
        "downsample_in_bottleneck": (given.get("downsample_in_bottleneck", False), False),
    }


def prepared(checkpoint: Checkpoint) -> Checkpoint:
    """The file with its batch norms folded."""
    return fold_batch_norms(checkpoint)


def layout(keys: Iterable[str]) -> str:
    """``hugging_face`` or ``torchvision``."""
    return "hugging_face" if any("embedder.embedder" in key for key in keys) else "torchvision"


def reference(config: BottleneckResNetConfig) -> Any:
    """Hugging Face's PyTorch module."""
    import transformers

    return transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=config.width, hidden_sizes=list(config.map_widths), depths=list(config.depths)
        )
    )


def reference_stages(model: Any, images: Any) -> dict[str, np.ndarray]:
    """The stem's result, every block's and every stage's."""
    nhwc = lambda maps: maps.permute(0, 2, 3, 1).numpy()
    features = model.embedder(images)
    stages, number = {"embedding": nhwc(features)}, 0
    for stage, blocks in enumerate(model.encoder.stages):
        for block in blocks.layers:
            features = block(features)
            stages[f"blocks/{number}"] = nhwc(features)
            number += 1
        stages[f"maps/{stage}"] = nhwc(features)
    return stages

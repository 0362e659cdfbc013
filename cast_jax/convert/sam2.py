"""SAM 2's image model: the official release's keys and Hugging Face's, of its image model and of its video model.

Sources: the modules of the official ``mask_decoder.py``, ``prompt_encoder.py``, ``transformer.py`` and
``image_encoder.py``, whose keys are below ``sam_mask_decoder.``, ``sam_prompt_encoder.`` and ``image_encoder.`` of the
file's ``model``; Hugging Face's ``modeling_sam2.py`` and ``modeling_sam2_video.py``. SAM 2 and 2.1 are alike but for
their memory, which is ignored. The trunk is :mod:`cast_jax.convert.hiera`'s.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array

from cast_jax.convert import hiera
from cast_jax.convert.engine import Rule, affine
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.errors import UserError
from cast_jax.models.hiera import EPSILON
from cast_jax.models.teacher.sam2 import Sam2, Sam2Config

# Largest absolute error in float32 (design/porting.md): masks' logits and scores, those for boxes and for everything.
TOLERANCES = {"encoder": 3e-4, "neck": 3e-4, "prompts": 5e-5, "masks": 2e-4, "iou": 1e-5, "object": 1e-5}
PATCHES = (3, 5)  # of the compared images: not square, not the grid of a position embedding

_PROMPTS = r"(?:sam_)?prompt_encoder"
_DECODER = r"(?:sam_)?mask_decoder"
_TWO_WAY = rf"{_DECODER}\.transformer"
_LAYER = rf"{_TWO_WAY}\.layers\.(\d+)"
_OURS = r"mask_decoder/transformer/layers/\1"
_FOURIER = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
_POINTS = "sam_prompt_encoder.point_embeddings"


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    pairs = (("q", "query"), ("k", "key"), ("v", "value"), ("(?:o|out)", "out"))
    return tuple(
        rule for theirs, ours in pairs for rule in affine(rf"{source}\.{theirs}_proj", f"{target}/{ours}", "linear")
    )


def _mlp(source: str, target: str) -> tuple[Rule, ...]:
    """Three layers: the official release numbers them, Hugging Face numbers what is between the first and the last."""
    numbered = {f"sam_mask_decoder\\.{source}\\.layers\\.{n}": n for n in range(3)}
    named = {f"mask_decoder\\.{source}\\.{name}": n for n, name in enumerate(("proj_in", r"layers\.0", "proj_out"))}
    return tuple(
        rule for key, n in (numbered | named).items() for rule in affine(key, f"{target}/layers/{n}", "linear")
    )


RULES: tuple[Rule, ...] = (
    *hiera.RULES,
    *(
        rule
        for level in range(4)  # theirs from coarse to fine
        for rule in affine(
            rf"(?:image|vision)_encoder\.neck\.convs\.{3 - level}(?:\.conv)?", f"neck/lateral/{level}", "pointwise"
        )
    ),
    Rule(r"no_mem_embed|no_memory_embedding", "no_memory", "token"),
    # A buffer there, a parameter that no gradient reaches here.
    Rule(r"sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "prompt_encoder/fourier"),
    Rule("|".join(map(re.escape, _FOURIER)), "prompt_encoder/fourier"),
    Rule(rf"{_PROMPTS}\.(?:point_embed|point_embeddings)\.weight", "prompt_encoder/kinds"),
    Rule(rf"{_PROMPTS}\.not_a_point_embed\.weight", "prompt_encoder/not_a_point", "unbatched"),
    Rule(rf"{_PROMPTS}\.no_mask_embed\.weight", "prompt_encoder/no_mask", "unbatched"),
    *(
        rule
        for source, target, layout in (
            (r"mask_downscaling\.0|mask_embed\.conv1", "conv1", "convolution"),
            (r"mask_downscaling\.3|mask_embed\.conv2", "conv2", "convolution"),
            (r"mask_downscaling\.6|mask_embed\.conv3", "project", "pointwise"),
        )
        for rule in affine(rf"{_PROMPTS}\.(?:{source})", f"prompt_encoder/mask_embedding/{target}", layout)
    ),
    *(
        rule
        for source, target in ((r"mask_downscaling\.1", "norm1"), (r"mask_downscaling\.4", "norm2"))
        for rule in affine(rf"{_PROMPTS}\.{source}", f"prompt_encoder/mask_embedding/{target}", "same", "scale")
    ),
    *affine(rf"{_PROMPTS}\.mask_embed\.layer_norm([12])", r"prompt_encoder/mask_embedding/norm\1", "same", "scale"),
    Rule(rf"{_DECODER}\.obj_score_token\.weight", "mask_decoder/object_token", "unbatched"),
    Rule(rf"{_DECODER}\.iou_token\.weight", "mask_decoder/iou_token", "unbatched"),
    Rule(rf"{_DECODER}\.mask_tokens\.weight", "mask_decoder/mask_tokens"),
    *_attention(rf"{_LAYER}\.self_attn", f"{_OURS}/self_attention"),
    *_attention(rf"{_LAYER}\.cross_attn_token_to_image", f"{_OURS}/tokens_to_image"),
    *_attention(rf"{_LAYER}\.cross_attn_image_to_token", f"{_OURS}/image_to_tokens"),
    *affine(rf"{_LAYER}\.(?:layer_)?norm([1-4])", rf"{_OURS}/norm\2", "same", "scale"),
    *affine(rf"{_LAYER}\.mlp\.(?:layers\.0|proj_in)", f"{_OURS}/mlp/layers/0", "linear"),
    *affine(rf"{_LAYER}\.mlp\.(?:layers\.1|proj_out)", f"{_OURS}/mlp/layers/1", "linear"),
    *_attention(rf"{_TWO_WAY}\.final_attn_token_to_image", "mask_decoder/transformer/tokens_to_image"),
    *affine(rf"{_TWO_WAY}\.(?:layer_)?norm_final_attn", "mask_decoder/transformer/norm", "same", "scale"),
    *affine(rf"{_DECODER}\.(?:output_upscaling\.0|upscale_conv1)", "mask_decoder/expand8", "expansion"),
    *affine(rf"{_DECODER}\.(?:output_upscaling\.1|upscale_layer_norm)", "mask_decoder/norm8", "same", "scale"),
    *affine(rf"{_DECODER}\.(?:output_upscaling\.3|upscale_conv2)", "mask_decoder/expand4", "expansion"),
    *affine(rf"{_DECODER}\.conv_s0", "mask_decoder/project4", "pointwise"),
    *affine(rf"{_DECODER}\.conv_s1", "mask_decoder/project8", "pointwise"),
    *_mlp(r"output_hypernetworks_mlps\.(\d+)", r"mask_decoder/mask_heads/\1"),
    *_mlp("iou_prediction_head", "mask_decoder/iou_head"),
    *_mlp("pred_obj_score_head", "mask_decoder/object_head"),
    *hiera.MEMORY,
)


class Stages(Sam2):
    """The model with its intermediate results."""

    def __call__(  # type: ignore[override]
        self, images: Array, boxes: Array, points: Array, labels: Array, masks: Array, *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Array]:
        """The maps, the embedded prompts, and all masks for boxes alone and for boxes, points and masks together."""
        maps = self.encoder(images, rngs=rngs)
        features = self.pyramid(maps)
        size = images.shape[1], images.shape[2]
        found = {f"encoder/maps/{n}": level for n, level in enumerate(maps)}
        found |= {f"neck/{field.name}": getattr(features, field.name) for field in dataclasses.fields(features)}
        found |= {
            "prompts/boxes": self.prompt_encoder.tokens(size, boxes),
            "prompts/points": self.prompt_encoder.tokens(size, points=points, labels=labels),
            "prompts/masks": self.prompt_encoder.dense(masks),
        }
        image = self._of_images(features)
        for name, decoded in (
            ("boxes", self._decode(image, boxes=boxes)),
            ("all", self._decode(image, boxes=boxes, points=points, labels=labels, masks=masks)),
        ):
            found |= {f"masks/{name}": decoded.logits, f"iou/{name}": decoded.iou}
            found |= {f"object/{name}": decoded.object_logits}
        return found


def module(config: Sam2Config, *, rngs: nnx.Rngs) -> Stages:
    """The model, which returns what is compared."""
    return Stages(config, rngs=rngs)


def rules(config: Sam2Config) -> tuple[Rule, ...]:
    """The same for all sizes."""
    del config
    return RULES


def prepared(checkpoint: Checkpoint, config: Sam2Config) -> Checkpoint:
    """The file with Hugging Face's two copies of the Fourier matrix, or the four official kinds of points, as one.

    Raises:
      UserError: the copies differ.
    """
    del config
    if all(key in checkpoint.shapes for key in _FOURIER):
        one, other = map(checkpoint.read, _FOURIER)
        if not np.array_equal(one, other):
            raise UserError(f"{checkpoint.path}: {' and '.join(_FOURIER)} differ, of which SAM 2 has only one")
        checkpoint = _without(checkpoint, _FOURIER[1:])
    rows = [f"{_POINTS}.{n}.weight" for n in range(4)]
    if {checkpoint.shapes.get(key, ())[:1] for key in rows} != {(1,)}:
        return checkpoint
    read, first = checkpoint.read, rows[0]
    table = f"{_POINTS}.weight"
    stacked = _without(checkpoint, rows)
    return dataclasses.replace(
        stacked,
        shapes=stacked.shapes | {table: (4, *checkpoint.shapes[first][1:])},
        dtypes=stacked.dtypes | {table: checkpoint.dtypes[first]},
        read=lambda key: np.concatenate([read(row) for row in rows]) if key == table else read(key),
    )


def _without(checkpoint: Checkpoint, keys: Iterable[str]) -> Checkpoint:
    gone = set(keys)
    shapes, dtypes = (
        {key: value for key, value in values.items() if key not in gone}
        for values in (checkpoint.shapes, checkpoint.dtypes)
    )
    return dataclasses.replace(checkpoint, shapes=shapes, dtypes=dtypes)  # type: ignore[arg-type]


def found(shapes: Mapping[str, tuple[int, ...]], config: Sam2Config) -> dict[str, Any]:
    """Nothing: the sizes are the name's."""
    del shapes, config
    return {}


def facts(given: Mapping[str, Any], config: Sam2Config) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults.

    The image's size is not: position embeddings follow any.
    """
    decoder = config.mask_decoder
    ours: dict[str, dict[str, tuple[Any, Any]]] = {  # Hugging Face's default, ours
        "vision_config": {
            "fpn_top_down_levels": ([2, 3], [2, 3]),
            "fpn_kernel_size": (1, 1),
            "fpn_stride": (1, 1),
            "fpn_padding": (0, 0),
            "num_feature_levels": (3, 3),
        },
        "prompt_encoder_config": {
            "patch_size": (16, config.encoder.stride),
            "hidden_act": ("gelu", "gelu"),
            "layer_norm_eps": (1e-6, EPSILON),
        },
        "mask_decoder_config": {
            "num_attention_heads": (8, decoder.num_heads),
            "attention_downsample_rate": (2, decoder.downsample),
            "dynamic_multimask_via_stability": (True, True),
            "dynamic_multimask_stability_delta": (0.05, decoder.stability_delta),
            "dynamic_multimask_stability_thresh": (0.98, decoder.stability_threshold),
        },
    }
    facts = hiera.facts(given, config.encoder)
    for part, values in ours.items():
        stated = {name: value for name, value in (given.get(part) or {}).items() if value is not None}
        facts |= {f"{part}.{name}": (stated.get(name, default), value) for name, (default, value) in values.items()}
    return facts


def layout(keys: Iterable[str], config: Sam2Config) -> str:
    """``hugging_face`` or ``official``."""
    del config
    return hiera.layout(keys)


def width(config: Sam2Config) -> int:
    """Channels of the trunk's first map."""
    return config.encoder.embed_dim


def comparable(config: Sam2Config) -> Sam2Config:
    """As it is."""
    return config


def inputs(config: Sam2Config, patches: tuple[int, int] | None) -> tuple[np.ndarray, ...]:
    """An image, and prompts of every kind: two boxes, their points with each label, a mask for each."""
    random = np.random.default_rng(0)
    height, width = (side * config.encoder.patch_size for side in patches or PATCHES)
    corners = np.sort(random.uniform(size=(1, 2, 2, 2)), axis=2) * [width, height]
    points = random.uniform(size=(1, 2, 3, 2)) * [width, height]
    masks = random.normal(size=(1, 2, height // 4, width // 4), scale=4.0)
    return (
        random.normal(size=(1, height, width, 3)).astype(np.float32),
        corners.reshape(1, 2, 4).astype(np.float32),
        points.astype(np.float32),
        np.array([[[1, 0, -1], [0, 1, -10]]], np.int32),
        masks.astype(np.float32),
    )


def reference(config: Sam2Config) -> Any:
    """Hugging Face's PyTorch module, with one Fourier matrix."""
    import torch
    import transformers

    decoder = config.mask_decoder
    model = transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=transformers.Sam2VisionConfig(
                backbone_config=hiera.sizes(config.encoder),
                backbone_channel_list=list(config.encoder.map_widths[::-1]),
                fpn_hidden_size=config.features,
            ),
            prompt_encoder_config={"hidden_size": config.features, "mask_input_channels": config.mask_hidden},
            mask_decoder_config={
                "hidden_size": config.features,
                "mlp_dim": decoder.ffn_dim,
                "num_hidden_layers": decoder.num_layers,
                "num_attention_heads": decoder.num_heads,
                "attention_downsample_rate": decoder.downsample,
                "num_multimask_outputs": decoder.num_multimasks,
                "iou_head_hidden_dim": decoder.iou_hidden_dim,
                "dynamic_multimask_stability_delta": decoder.stability_delta,
                "dynamic_multimask_stability_thresh": decoder.stability_threshold,
            },
        )
    )
    with torch.no_grad():
        matrix = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)
    return model


def reference_stages(model: Any, config: Sam2Config, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """What :class:`Stages` returns. Hugging Face's code is for square images of one size; here it is told another."""
    import torch

    del config
    images, boxes, points, labels, masks = map(torch.from_numpy, inputs)
    height, width = images.shape[1:3]
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    encoder.image_embedding_size, encoder.input_image_size = (height // 16, width // 16), width
    # It divides both coordinates by the same side.
    squared = lambda given: (given + 0.5) * torch.tensor([1.0, width / height]) - 0.5
    boxes = squared(boxes.reshape(1, -1, 2, 2)).flatten(2)
    points, labels = squared(points), labels.long()

    nhwc = lambda maps: maps.movedim(-3, -1).numpy()
    trunk = model.vision_encoder.backbone(images.permute(0, 3, 1, 2)).intermediate_hidden_states
    stages = {f"encoder/maps/{n}": level.numpy() for n, level in enumerate(trunk)}
    stride16, stride8, stride4 = model.vision_encoder.neck(trunk)[0][-3:]
    stride16 = stride16 + model.no_memory_embedding.reshape(1, -1, 1, 1)
    stages |= {"neck/stride4": nhwc(stride4), "neck/stride8": nhwc(stride8), "neck/stride16": nhwc(stride16)}

    box_tokens, nothing = encoder(None, None, boxes, None)
    point_tokens, _ = encoder(points, labels, None, None)
    dense = encoder.mask_embed(masks.flatten(0, 1)[:, None])
    stages |= {"prompts/boxes": box_tokens.numpy(), "prompts/points": point_tokens.numpy()}
    stages["prompts/masks"] = nhwc(dense)[None]
    both = encoder(points, labels, boxes, None)[0]

    decoder.dynamic_multimask_via_stability = False  # so that the single mask and the others together are all
    finer = [decoder.conv_s0(stride4), decoder.conv_s1(stride8)]
    positions = model.get_image_wide_positional_embeddings()
    for name, tokens, added in (("boxes", box_tokens, [nothing] * 2), ("all", both, dense[:, None])):
        # A mask is of one image there: each prompt is decoded by itself.
        results = [
            [
                decoder(stride16, positions, tokens[:, n : n + 1], added[n], multimask, finer)
                for multimask in (False, True)
            ]
            for n in range(tokens.shape[1])
        ]
        for part, stage in enumerate(("masks", "iou")):
            each = [torch.cat([single[part], others[part]], dim=2) for single, others in results]
            stages[f"{stage}/{name}"] = torch.cat(each, dim=1).numpy()
        stages[f"object/{name}"] = torch.cat([single[3] for single, _ in results], dim=1)[..., 0].numpy()
    return stages

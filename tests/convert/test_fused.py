"""The whole chain against Hugging Face's pair: text and image to boxes to masks, from converted files."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import torch
from published import scaled
from teacher_tiny import DETECTOR, SEGMENTER, spec

from cast_jax.convert import grounding_dino, sam2
from cast_jax.convert.command import convert
from cast_jax.core.rules import named_leaves
from cast_jax.export import load_weights
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.teacher.grounding_dino_decoder import Selection
from cast_jax.models.teacher.text import load_tokenizer, make_prompts

CLASSES = ("person", "traffic light", "car")
SIDE = 64  # Hugging Face's SAM 2 takes squares
QUERIES = DETECTOR.num_queries


def converted(folder, name: str, model: torch.nn.Module, config) -> dict:
    """The parameters, by way of two files."""
    model.save_pretrained(folder / f"{name}_saved")
    changes = json.loads(json.dumps(dataclasses.asdict(config)))
    convert(name, folder / f"{name}_saved", folder / name, changes)
    return load_weights(folder / name / "model.safetensors")[0]


def hugging_face(detector, segmenter, images: np.ndarray, prompts) -> dict[str, np.ndarray]:
    """What both models' own forward passes return, with masks for all boxes, and the chosen positions."""
    chosen: list[torch.Tensor] = []

    def topk(*arguments, **options):
        values, indices = original(*arguments, **options)
        chosen.append(indices)
        return values, indices

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    everywhere = lambda array: torch.from_numpy(np.repeat(array, len(images), axis=0))
    original, torch.topk = torch.topk, topk
    try:
        found = detector(
            pixel_values=pixels,
            input_ids=everywhere(prompts.tokens.ids).long(),
            attention_mask=everywhere(prompts.tokens.mask).long(),
        )
    finally:
        torch.topk = original
    tokens = found.logits.sigmoid().numpy()[..., : prompts.class_map.shape[2]]
    scores = np.stack([tokens[..., row > 0].mean(-1) for row in prompts.class_map[0]], axis=-1)
    order = np.argsort(-scores.max(-1), axis=1, kind="stable")[..., None]
    boxes, scores = (np.take_along_axis(values, order, axis=1) for values in (found.pred_boxes.numpy(), scores))
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.clip(np.concatenate([centre - half, centre + half], axis=-1), 0, 1) * SIDE
    segmenter.backbone_feature_sizes = [[SIDE // stride] * 2 for stride in (4, 8, 16)]
    encoder = segmenter.prompt_encoder
    encoder.input_image_size, encoder.image_embedding_size = SIDE, (SIDE // 16, SIDE // 16)
    encoder.mask_input_size = (SIDE // 4, SIDE // 4)
    masks = segmenter(pixel_values=pixels, input_boxes=torch.from_numpy(corners), multimask_output=False)
    return {
        "indices": chosen[0].numpy(),
        "scores": scores,
        "masks": masks.pred_masks[:, :, 0].numpy(),
        "iou": masks.iou_scores[:, :, 0].numpy(),
    }


def test_the_whole_chain(tmp_path, monkeypatch):
    """With the reference's choice of positions forced; how many both would have chosen is asked separately."""
    detector, segmenter = scaled(grounding_dino.reference(DETECTOR)), scaled(sam2.reference(SEGMENTER))
    with torch.no_grad():
        matrix = segmenter.shared_image_embedding.positional_embedding
        segmenter.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)
    params = {
        "detector": converted(tmp_path, "mm_grounding_dino_t", detector, DETECTOR),
        "segmenter": converted(tmp_path, "sam2_image_t", segmenter, SEGMENTER),
    }
    described = spec(tmp_path, segmenter_size=(), num_queries=QUERIES)
    prompts = make_prompts(CLASSES, load_tokenizer(segmenter_config(described).tokenizer))  # type: ignore[union-attr]
    images = np.random.default_rng(0).random((2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        normalised = ((images - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).astype(np.float32)
        theirs = hugging_face(detector, segmenter, normalised, prompts)

    own: list[np.ndarray] = []
    choose = Selection.choose

    def forced(self, scene):
        jax.debug.callback(lambda indices: own.append(np.asarray(indices)), choose(self, scene))
        return theirs["indices"]

    monkeypatch.setattr(Selection, "choose", forced)
    model = build_segmenter(described, CLASSES, (SIDE, SIDE))
    assert named_leaves(model.abstract()).keys() == named_leaves(params).keys()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(model.apply)(params, images)
    jax.effects_barrier()
    probabilities = jax.nn.softmax(ours.class_logits)[..., :-1]
    total = theirs["scores"].sum(-1, keepdims=True)  # sigmoids may add up to more than 1
    np.testing.assert_allclose(probabilities, theirs["scores"] / np.maximum(total, 1.0), atol=1e-5)
    np.testing.assert_allclose(ours.mask_logits, theirs["masks"], atol=2e-4 * max(1.0, theirs["masks"].std()))
    np.testing.assert_allclose(ours.mask_quality, theirs["iou"], atol=1e-5)
    assert theirs["masks"].std() > 1e-2
    assert np.ptp(theirs["scores"]) > 1e-3
    (natural,) = own
    shared = [len(np.intersect1d(*both)) / QUERIES for both in zip(natural, theirs["indices"], strict=True)]
    assert min(shared) == 1.0  # the same set, whatever the order

"""The fused teacher in PyTorch, to compare with: Hugging Face's two modules, random weights.

MM-Grounding-DINO's boxes of the highest class scores prompt SAM 2; an update sums the detector's own loss (Hungarian
matching by scipy, all decoder layers and the first stage), that of the masks prompted with the instances' boxes, and
the contrastive loss between the views' features.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from benchmarks.torch_contrastive import Contrast, projection_head, pseudo_probability

from cast_jax.convert import grounding_dino, sam2
from cast_jax.models.teacher.grounded_sam2 import GroundedSam2Config
from cast_jax.models.teacher.text import Prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Teacher(torch.nn.Module):
    """Both networks, of the sizes that ``config`` gives, for square images of ``side`` pixels and one prompt."""

    detector: Any
    segmenter: Any
    ids: torch.Tensor
    class_map: torch.Tensor
    features: int

    def __init__(self, config: GroundedSam2Config, prompts: Prompts, side: int):
        super().__init__()
        self.detector, self.segmenter = grounding_dino.reference(config.detector), sam2.reference(config.segmenter)
        self.detector.config.auxiliary_loss = True
        self.segmenter.backbone_feature_sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
        encoder = self.segmenter.prompt_encoder
        encoder.input_image_size, encoder.image_embedding_size = side, (side // 16, side // 16)
        encoder.mask_input_size = (side // 4, side // 4)
        self.register_buffer("ids", torch.from_numpy(np.asarray(prompts.tokens.ids)).long())
        self.register_buffer("class_map", torch.from_numpy(prompts.class_map[0]))
        self.num_queries, self.side, self.features = config.num_queries, side, config.feature_dim
        self.to(DEVICE)

    def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class scores, mask logits and expected IoU of the best boxes; normalised images, channels first."""
        self.eval()
        with torch.inference_mode(), _half():
            detected = self.detector(pixel_values=images, input_ids=self.ids.expand(len(images), -1))
            scores, corners = self._best(detected)
            masks = self._masks(corners, pixel_values=images)
        return scores, masks.pred_masks[:, :, 0].float(), masks.iou_scores[:, :, 0].float()

    def loss(
        self, images: torch.Tensor, masks: list[torch.Tensor], labels: list[torch.Tensor], boxes: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of both networks' losses, SAM 2's features of stride 4, and the fused map of the first half.

        ``masks`` are of the predicted size, boxes (left, top, right, bottom).
        """
        self.eval()  # ours has no dropout
        centred = [torch.cat([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], -1) for box in boxes]
        targets = [{"class_labels": classes, "boxes": box} for classes, box in zip(labels, centred, strict=True)]
        kept: list[torch.Tensor] = []
        keep = lambda module, arguments: kept.append(arguments[0])
        with _half(), self.segmenter.mask_decoder.conv_s0.register_forward_pre_hook(keep):
            ids = self.ids.expand(len(images), -1)
            detected = self.detector(pixel_values=images, input_ids=ids, labels=targets)
            most = max(map(len, boxes))  # Hugging Face wants as many prompts for every image
            prompts = torch.stack([torch.nn.functional.pad(box, (0, 0, 0, most - len(box))) for box in boxes])
            found = self._masks(prompts, pixel_values=images)
            with torch.no_grad():
                scores, corners = (values[: len(images) // 2] for values in self._best(detected))
                seen = [maps[: len(images) // 2] for maps in found.image_embeddings]
                predicted = self._masks(corners, image_embeddings=seen).pred_masks[:, :, 0].float()
        nothing = (1 - scores.sum(-1, keepdim=True)).clamp(min=1e-6)
        fused_map = pseudo_probability(predicted, torch.cat([scores, nothing], -1).log())
        logits = torch.cat([found.pred_masks[n, : len(box), 0] for n, box in enumerate(boxes)]).float()
        iou = torch.cat([found.iou_scores[n, : len(box), 0] for n, box in enumerate(boxes)]).float()
        truth = torch.cat(masks)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
        inside = logits.sigmoid()
        dice = 1 - (2 * (inside * truth).sum((1, 2)) + 1) / (inside.sum((1, 2)) + truth.sum((1, 2)) + 1)
        cut, true = logits > 0, truth > 0.5
        actual = (cut & true).sum((1, 2)) / (cut | true).sum((1, 2)).clamp(min=1)
        loss = detected.loss + (5 * bce + 5 * dice + (iou - actual).abs()).mean()
        return loss, kept[0].float(), fused_map

    def _best(self, detected: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Class scores and corners of the boxes that become masks."""
        tokens = detected.logits.float().sigmoid()[..., : self.class_map.shape[1]]
        scores = tokens @ self.class_map.T / self.class_map.sum(1)
        best = scores.amax(-1).topk(self.num_queries).indices[..., None]
        scores, boxes = (torch.take_along_dim(values, best, 1) for values in (scores, detected.pred_boxes.float()))
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
        return scores, corners.clamp(0.0, 1.0)

    def _masks(self, corners: torch.Tensor, **images: Any) -> Any:
        return self.segmenter(**images, input_boxes=corners * self.side, multimask_output=False)


class Update:
    """One update of AdamW from the weak views of some images, then their strong ones; a call makes it."""

    def __init__(self, teacher: Teacher, contrast: Contrast, *targets: Any):
        self.teacher, self.contrast, self.targets = teacher, contrast, targets
        self.projection = projection_head(teacher.features).to(DEVICE)
        self.parameters = [*teacher.parameters(), *self.projection.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def __call__(self) -> float:
        """Returns the loss."""
        loss, features, fused_map = self.teacher.loss(*self.targets)
        loss = loss + self.contrast(self.projection, features.chunk(2), fused_map)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _half() -> contextlib.AbstractContextManager[Any]:
    """Products in bfloat16 on a GPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

"""The fused teacher in PyTorch, to compare with: Hugging Face's two modules, random weights.

MM-Grounding-DINO's boxes of the highest class scores prompt SAM 2; an update sums the detector's own loss (Hungarian
matching by scipy, all decoder layers and the first stage) and that of the masks prompted with the instances' boxes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

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
        self.num_queries, self.side = config.num_queries, side
        self.to(DEVICE)

    def predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class scores, mask logits and expected IoU of the best boxes; normalised images, channels first."""
        self.eval()
        with torch.inference_mode(), _half():
            found = self.detector(pixel_values=images, input_ids=self.ids.expand(len(images), -1))
            tokens = found.logits.float().sigmoid()[..., : self.class_map.shape[1]]
            scores = tokens @ self.class_map.T / self.class_map.sum(1)
            best = scores.amax(-1).topk(self.num_queries).indices[..., None]
            scores, boxes = (torch.take_along_dim(values, best, 1) for values in (scores, found.pred_boxes.float()))
            corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
            masks = self._masks(images, corners.clamp(0.0, 1.0) * self.side)
        return scores, masks.pred_masks[:, :, 0].float(), masks.iou_scores[:, :, 0].float()

    def loss(
        self, images: torch.Tensor, masks: list[torch.Tensor], labels: list[torch.Tensor], boxes: list[torch.Tensor]
    ) -> torch.Tensor:
        """The sum of both networks' losses; ``masks`` are of the predicted size, boxes (left, top, right, bottom)."""
        self.eval()  # ours has no dropout
        centred = [torch.cat([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], -1) for box in boxes]
        targets = [{"class_labels": classes, "boxes": box} for classes, box in zip(labels, centred, strict=True)]
        with _half():
            ids = self.ids.expand(len(images), -1)
            detected = self.detector(pixel_values=images, input_ids=ids, labels=targets)
            most = max(map(len, boxes))  # Hugging Face wants as many prompts for every image
            prompts = torch.stack([torch.nn.functional.pad(box, (0, 0, 0, most - len(box))) for box in boxes])
            found = self._masks(images, prompts * self.side)
        logits = torch.cat([found.pred_masks[n, : len(box), 0] for n, box in enumerate(boxes)]).float()
        iou = torch.cat([found.iou_scores[n, : len(box), 0] for n, box in enumerate(boxes)]).float()
        truth = torch.cat(masks)
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
        inside = logits.sigmoid()
        dice = 1 - (2 * (inside * truth).sum((1, 2)) + 1) / (inside.sum((1, 2)) + truth.sum((1, 2)) + 1)
        cut, true = logits > 0, truth > 0.5
        actual = (cut & true).sum((1, 2)) / (cut | true).sum((1, 2)).clamp(min=1)
        return detected.loss + (5 * bce + 5 * dice + (iou - actual).abs()).mean()

    def _masks(self, images: torch.Tensor, boxes: torch.Tensor) -> Any:
        return self.segmenter(pixel_values=images, input_boxes=boxes, multimask_output=False)


class Update:
    """One update of AdamW; a call makes it."""

    def __init__(self, teacher: Teacher, *targets: Any):
        self.teacher, self.targets = teacher, targets
        self.parameters = list(teacher.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def __call__(self) -> float:
        """Returns the loss."""
        loss = self.teacher.loss(*self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _half() -> contextlib.AbstractContextManager[Any]:
    """Products in bfloat16 on a GPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

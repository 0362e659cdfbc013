"""A student's update in PyTorch, to compare with: Hugging Face's modules, and the contrastive term written by hand.

DINOv2-S, Depth-Anything's DPT neck, Mask2Former's transformer decoder with its loss (point sampling, Hungarian matching
by scipy) on weak and strong views of labelled and pseudo-labelled images, and the contrastive loss between the views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.torch_contrastive import Contrast, projection_head, pseudo_probability
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss, Mask2FormerTransformerModule

from cast_jax.convert.dpt import reference as reference_dpt
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.dpt import DptConfig
from cast_jax.models.student import StudentConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Views = tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]]  # images; masks and labels of each


def views(group: dict[str, Any]) -> tuple[Views, Views]:
    """The weak and the strong view of a batch's group, as PyTorch's loss wants them."""

    def view(arrays: dict[str, Any]) -> Views:
        images = torch.from_numpy(np.array(arrays["image"])).to(DEVICE).permute(0, 3, 1, 2) / 255.0
        masks = np.unpackbits(np.asarray(arrays["masks"]), axis=-1, count=images.shape[-1])
        valid = np.asarray(arrays["instance_valid"])
        tensors = lambda values: [
            torch.from_numpy(np.array(v[keep])).to(DEVICE) for v, keep in zip(values, valid, strict=True)
        ]
        return images, [m.float() for m in tensors(masks)], [c.long() for c in tensors(np.asarray(arrays["labels"]))]

    return view(group["weak"]), view(group["strong"])


class Student(torch.nn.Module):
    """Encoder, neck and mask decoder of the sizes that ``config`` gives."""

    def __init__(self, config: StudentConfig, classes: int):
        super().__init__()
        assert isinstance(config.encoder, DinoV2Config)
        assert isinstance(config.decoder, DptConfig)
        depth = reference_dpt(config.encoder, config.decoder, config.encoder_layers)
        decoder, self.patch = config.mask_decoder, config.encoder.patch_size
        self.encoder, self.neck = depth.backbone, depth.neck
        sizes: Any = Mask2FormerConfig(  # type: ignore[call-arg]
            hidden_dim=decoder.hidden_dim,
            mask_feature_size=decoder.mask_dim,
            feature_size=config.decoder.features,
            num_attention_heads=decoder.num_heads,
            dim_feedforward=decoder.ffn_dim,
            decoder_layers=decoder.num_layers + 1,
            num_queries=decoder.num_queries,
            num_labels=classes,
            dropout=0.0,  # Hugging Face's would skip whole layers with this probability
        )
        self.mask_features = torch.nn.Conv2d(config.decoder.features, decoder.mask_dim, 1)
        self.transformer = Mask2FormerTransformerModule(config.decoder.features, sizes)
        self.class_head = torch.nn.Linear(decoder.hidden_dim, classes + 1)
        self.criterion = Mask2FormerLoss(sizes, {})

    def forward(self, images: torch.Tensor) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """Mask and class logits after every layer, and the finest map."""
        rows, columns = (side // self.patch for side in images.shape[-2:])
        tokens = self.encoder(images).feature_maps
        fused = self.neck(tokens, rows, columns)
        found = self.transformer(fused[:3], self.mask_features(fused[-1]))
        layers = zip(found.masks_queries_logits, found.intermediate_hidden_states, strict=True)
        predictions = [
            {"masks_queries_logits": masks, "class_queries_logits": self.class_head(hidden.transpose(0, 1))}
            for masks, hidden in layers
        ]
        return predictions, fused[-1]

    def loss(self, predictions: list[dict[str, torch.Tensor]], masks: Any, labels: Any) -> torch.Tensor:
        """The set loss over all layers: weights 5 (masks), 5 (dice) and 2 (classes)."""
        terms = self.criterion(
            **predictions[-1], mask_labels=masks, class_labels=labels, auxiliary_predictions=predictions[:-1]
        )
        return torch.stack([(2.0 if "cross_entropy" in name else 5.0) * term for name, term in terms.items()]).sum()


class Update:
    """One update of AdamW from the two views of both groups; a call makes it."""

    def __init__(
        self,
        config: StudentConfig,
        classes: int,
        groups: Sequence[tuple[Views, Views]],
        contrast: Contrast | None,
        *,
        compiled: bool = False,
    ):
        self.student, self.contrast, self.groups = Student(config, classes).train().to(DEVICE), contrast, groups
        self.projection = projection_head(config.decoder.features).to(DEVICE)
        self.parameters = [*self.student.parameters(), *self.projection.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.forward = torch.compile(self.student) if compiled else self.student

    def __call__(self) -> float:
        """Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        total, maps = torch.zeros((), device=DEVICE), []
        features: tuple[list[torch.Tensor], ...] = ([], [])  # of weak and strong views
        for weak, strong in self.groups:
            for view, kept in zip((weak, strong), features, strict=True):
                images, masks, labels = view
                with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                    predictions, pixels = self.forward(images)
                predictions = [{name: logits.float() for name, logits in layer.items()} for layer in predictions]
                total = total + self.student.loss(predictions, masks, labels)
                kept.append(pixels.float())
                if view is weak:
                    maps.append(pseudo_probability(*predictions[-1].values()))
        if self.contrast:
            total = total + self.contrast(self.projection, [torch.cat(view) for view in features], torch.cat(maps))
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(total.detach())

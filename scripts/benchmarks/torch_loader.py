"""What ``benchmark.py loader`` compares with: the same views by torch's DataLoader and torchvision's transforms."""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import library

# The transforms need no compiled operator, but importing them asks for these, which a wheel of torchvision built for
# CUDA cannot load beside a torch for CPUs.
_OPERATORS = library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import tv_tensors
from torchvision.transforms import v2

from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.views import ViewConfig


class Views(torch.utils.data.Dataset):
    """Weak and strong views of Cityscapes images with their instance masks, as semi-supervised recipes write them."""

    def __init__(self, source: Cityscapes, config: ViewConfig):
        self.source = source
        size = config.image_size
        self.weak = v2.Compose(
            [
                v2.RandomHorizontalFlip(config.flip_horizontal),
                v2.ScaleJitter(size, config.scale, antialias=True),
                v2.RandomCrop(size, pad_if_needed=True),
            ]
        )
        self.crop = v2.RandomResizedCrop(size, config.crop_area, config.crop_ratio, antialias=True)
        jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        self.colours = v2.Compose(
            [
                v2.RandomApply([jitter], config.jitter_probability),
                v2.RandomGrayscale(config.grayscale_probability),
                v2.RandomApply([v2.GaussianBlur(17, config.blur_sigma)], config.blur_probability),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.source.record(index)
        assert record.annotation is not None
        with Image.open(record.path) as file:
            image = tv_tensors.Image(v2.functional.pil_to_tensor(file.convert("RGB")))
        with Image.open(record.annotation) as file:
            ids = torch.from_numpy(np.array(file, dtype=np.int32))
        present = torch.bincount(ids.flatten()).nonzero().flatten()
        masks = tv_tensors.Mask((ids == present[present >= 1000][:, None, None]).to(torch.uint8))
        weak = self.weak({"image": image, "masks": masks})
        strong = self.crop(weak)
        return {"weak": weak, "strong": {"image": self.colours(strong["image"]), "masks": strong["masks"]}}


def batches(source: Cityscapes, config: ViewConfig, batch: int, workers: int) -> Iterator[Any]:
    """Endless shuffled batches: images stacked, masks (of different numbers) in lists."""
    loader = torch.utils.data.DataLoader(
        Views(source, config),
        batch_size=batch,
        sampler=torch.utils.data.RandomSampler(source, replacement=True, num_samples=2**31),
        num_workers=workers,
        prefetch_factor=2,
        collate_fn=_collate,
        multiprocessing_context="fork",  # before anything of JAX runs in this process
    )
    return iter(loader)


def batch_bytes(batch: dict[str, Any]) -> float:
    """Bytes of one image's views on average."""
    images = len(batch["weak"]["image"])
    parts = [part for view in batch.values() for part in (view["image"], *view["masks"])]
    return sum(part.nbytes for part in parts) / images


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        view: {
            "image": torch.stack([item[view]["image"] for item in items]),
            "masks": [item[view]["masks"] for item in items],
        }
        for view in ("weak", "strong")
    }

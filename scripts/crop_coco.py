"""A small COCO set cut from the corners of another's images: what a model is to learn by heart.

python scripts/crop_coco.py SOURCE.json DESTINATION.json [--images 8] [--side 128] [--min-area 30] [--min-instances 1]
    [--max-instances 16]

The first images, by id, whose top left squares of ``side`` pixels hold ``min-instances`` to ``max-instances`` objects
of at least ``min-area`` pixels; smaller remains are left out. Pictures lie beside the JSON in the folder with its name,
as configs/coco.py wants.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from cast_jax.core.annotations import encode_mask
from cast_jax.core.files import write_json
from cast_jax.data.sources.coco import Coco
from cast_jax.visualize import save_image


def main() -> None:
    """Writes the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--min-area", type=int, default=30)
    parser.add_argument("--min-instances", type=int, default=1)
    parser.add_argument("--max-instances", type=int, default=16)
    options = parser.parse_args()
    source, side = Coco(options.source), options.side
    folder = options.destination.with_suffix("")
    images: list[dict] = []
    annotations: list[dict] = []
    for index in sorted(range(len(source)), key=lambda index: str(source.record(index).image_id)):
        truth = source.instances(index)
        masks = [np.asarray(mask)[:side, :side] for mask in truth.masks]
        kept = [number for number, mask in enumerate(masks) if mask.sum() >= options.min_area]
        if not options.min_instances <= len(kept) <= options.max_instances or len(images) == options.images:
            continue
        name = f"{len(images):03d}.png"
        save_image(folder / name, source.image(index)[:side, :side])
        images.append({"id": len(images) + 1, "file_name": name, "height": side, "width": side})
        for number in kept:
            rle = encode_mask(masks[number])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": source.categories[int(truth.labels[number])].id,
                    "segmentation": rle,
                    "area": int(masks[number].sum()),
                    "bbox": [float(value) for value in cv2.boundingRect(masks[number].astype(np.uint8))],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category.id, "name": category.name} for category in source.categories]
    write_json(options.destination, {"images": images, "annotations": annotations, "categories": categories})
    print(f"{options.destination}: {len(images)} images, {len(annotations)} instances")


if __name__ == "__main__":
    main()

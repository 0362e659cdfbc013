"""The sources of a run, as its configuration names them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from cast_jax.core.annotations import encode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write
from cast_jax.data.scenes import write_scenes
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.subset import Subset
from cast_jax.data.splits import split_indices


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Labelled and unlabelled training images, validation images, and what a stand-in teacher is pretrained on."""

    labelled: Source
    unlabelled: Source
    val: Source
    pretrain: Source | None = None


def open_datasets(data: Mapping[str, Any], workdir: Path) -> Datasets:
    """Opens (and for generated data, first writes) the sources of ``config.data``.

    ``kind`` is one of ``coco`` (own data: ``labelled``, ``unlabelled``, ``val``), ``cityscapes`` (``root``, with
    ``labelled`` images of the train split by ``split_seed``, or the ids in ``split``) and ``scenes`` (generated into
    ``root`` or the workdir). Without any path, generated images stand in if ``generated`` has some (smoke runs).

    Raises:
      DataError: an unknown kind, or a missing path, naming the key.
    """
    kinds = {"coco": _coco, "cityscapes": _cityscapes, "scenes": _scenes}
    if data["kind"] not in kinds:
        raise DataError(f"config.data.kind {data['kind']!r} is unknown; known: {', '.join(kinds)}")
    return kinds[data["kind"]](data, workdir)


def _coco(data: Mapping[str, Any], workdir: Path) -> Datasets:
    paths = {key: data[key] for key in ("labelled", "unlabelled", "val")}
    if not any(paths.values()) and data["generated"]["train"]:
        paths = _generated_coco(data, workdir)
    for key, path in paths.items():
        if not path:
            what = "a folder of images" if key == "unlabelled" else "a COCO JSON"
            raise DataError(f"config.data.{key} is not set; give {what}: --config.data.{key}=PATH")
    folders = {key: data[f"{key}_images"] if data.get(f"{key}_images") else None for key in ("labelled", "val")}
    labelled = Coco(paths["labelled"], images=folders["labelled"])
    return Datasets(
        labelled=labelled,
        unlabelled=ImageFolder(paths["unlabelled"]),
        val=Coco(paths["val"], images=folders["val"], categories=labelled.categories),
    )


def _cityscapes(data: Mapping[str, Any], workdir: Path) -> Datasets:
    root = data["root"]
    if not root:
        if not data["generated"]["train"]:
            raise DataError(
                "config.data.root is not set; give the folder of leftImg8bit and gtFine: --config.data.root=PATH"
            )
        root = _write(workdir / "data" / "target", data, "target")
    val = Cityscapes(root, split="val")
    if data.get("split"):
        labelled = Cityscapes(root, split="train", images=data["split"])
        chosen = {labelled.record(i).image_id for i in range(len(labelled))}
        train = Cityscapes(root, split="train", labelled=False)
        rest = [i for i in range(len(train)) if train.record(i).image_id not in chosen]
        return Datasets(labelled, Subset(train, rest), val)
    train = Cityscapes(root, split="train")
    if not 1 <= data["labelled"] < len(train):
        raise DataError(
            f"config.data.labelled is {data['labelled']}, but must lie in [1, {len(train)}): {root} has {len(train)} "
            "training images, of which one at least stays unlabelled"
        )
    chosen_indices, rest = split_indices(len(train), data["labelled"], data["split_seed"])
    unlabelled = Cityscapes(root, split="train", labelled=False)
    return Datasets(Subset(train, chosen_indices), Subset(unlabelled, rest), val)


def _scenes(data: Mapping[str, Any], workdir: Path) -> Datasets:
    root = Path(data["root"] or workdir / "data")
    _write(root / "target", data, "target")
    source = _write(root / "source", data, "source")
    datasets = _cityscapes({**data, "root": root / "target"}, workdir)
    return dataclasses.replace(datasets, pretrain=Cityscapes(source, split="train"))


def _write(root: Path, data: Mapping[str, Any], look: str) -> Path:
    generated = data["generated"]
    sizes = (
        {"train": generated["train"], "val": generated["val"]} if look == "target" else {"train": generated["source"]}
    )
    write_scenes(root, split_sizes=sizes, image_size=tuple(generated["image_size"]), look=look, seed=generated["seed"])
    return root


def _generated_coco(data: Mapping[str, Any], workdir: Path) -> dict[str, str]:
    """Generated scenes as COCO JSON beside their image folders, with the sparse ids of Cityscapes."""
    root = _write(workdir / "data" / "target", data, "target")
    train, val = Cityscapes(root, split="train"), Cityscapes(root, split="val")
    chosen, rest = split_indices(len(train), max(len(train) // 3, 1), data["split_seed"])
    folder = workdir / "data" / "coco"
    for name, source in (("labelled", Subset(train, chosen)), ("val", val)):
        if not (folder / f"{name}.json").exists():
            atomic_write(folder / f"{name}.json", json.dumps(_to_coco(source, folder / name)))
    for index in rest:
        record = train.record(index)
        atomic_write(folder / "unlabelled" / record.path.name, record.path.read_bytes())
    return {
        "labelled": str(folder / "labelled.json"),
        "unlabelled": str(folder / "unlabelled"),
        "val": str(folder / "val.json"),
    }


def _to_coco(source: Source, folder: Path) -> dict[str, Any]:
    """The COCO annotations of a source, whose images are copied into ``folder``."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(len(source)):
        record, instances = source.record(index), source.instances(index)
        atomic_write(folder / record.path.name, record.path.read_bytes())
        height, width = instances.ignore.shape
        images.append({"id": index + 1, "file_name": record.path.name, "height": height, "width": width})
        for mask, label in zip(instances.masks, instances.labels, strict=True):
            rle = encode_mask(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": source.categories[label].id,
                    "segmentation": rle,
                    "area": int(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                }
            )
    categories = [dataclasses.asdict(category) for category in source.categories]
    return {"images": images, "annotations": annotations, "categories": categories}

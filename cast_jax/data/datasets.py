"""The sources of a run, as its configuration names them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from cast_jax.core.annotations import encode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write
from cast_jax.data.checks import SourceReport
from cast_jax.data.micrographs import write_micrographs
from cast_jax.data.scenes import write_scenes
from cast_jax.data.scenes_ade20k import write_as_ade20k
from cast_jax.data.sources.ade20k import Ade20k
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.subset import Subset, Unlabelled
from cast_jax.data.splits import find_images, read_split, split_indices


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Labelled and unlabelled training images, validation images, and what a stand-in teacher is pretrained on.

    Own data may come without ``unlabelled`` images, for runs without a step that reads them.

    Attributes:
      reports: by name what the look at them found, once they have been looked at.
    """

    labelled: Source
    unlabelled: Source | None
    val: Source
    pretrain: Source | None = None
    reports: Mapping[str, SourceReport] = dataclasses.field(default_factory=dict)

    def of_the_task(self) -> dict[str, Source]:
        """All by name that are there, but what a teacher is pretrained on."""
        named = {"labelled": self.labelled, "unlabelled": self.unlabelled, "val": self.val}
        return {name: source for name, source in named.items() if source is not None}


def open_datasets(data: Mapping[str, Any], workdir: Path) -> Datasets:
    """Opens (and for generated data, first writes) the sources of ``config.data``.

    ``kind`` is one of ``coco`` (own data: ``labelled``, ``unlabelled``, ``val``), ``cityscapes`` and ``ade20k``
    (``root``), ``scenes`` (generated into ``root`` or the workdir) and ``nuclei`` (as ``coco``, with generated
    micrographs to pretrain on). ``split`` names the file that says which images
    are labelled and which are not (:func:`cast_jax.data.splits.read_split`), of ``coco`` by the JSON's ids or file
    names; without one, ``labelled`` images of a published training set are drawn by ``split_seed``. Without any path,
    generated images stand in if ``generated`` has some (smoke runs).

    Raises:
      DataError: an unknown kind, or a missing path, naming the key.
    """
    kinds = {"coco": _coco, "cityscapes": _cityscapes, "ade20k": _ade20k, "scenes": _scenes, "nuclei": _nuclei}
    if data["kind"] not in kinds:
        raise DataError(f"config.data.kind {data['kind']!r} is unknown; known: {', '.join(kinds)}")
    return kinds[data["kind"]](data, workdir)


def _coco(data: Mapping[str, Any], workdir: Path) -> Datasets:
    paths = {key: data[key] for key in ("labelled", "unlabelled", "val")}
    if not any(paths.values()) and data["generated"]["train"]:
        paths = _generated_coco(data, workdir)
    for key in ("labelled", "val"):
        if not paths[key]:
            raise DataError(f"config.data.{key} is not set; give a COCO JSON: --config.data.{key}=PATH")
    folders = {key: data[f"{key}_images"] if data.get(f"{key}_images") else None for key in ("labelled", "val")}
    on_fault = data.get("on_unreadable", "error")
    with _named("labelled"):
        whole = Coco(paths["labelled"], images=folders["labelled"], on_fault=on_fault)
    with _named("val"):
        val = Coco(paths["val"], images=folders["val"], categories=whole.categories, on_fault=on_fault)
    with _named("unlabelled"):
        unlabelled = ImageFolder(paths["unlabelled"]) if paths["unlabelled"] else None
    if not data.get("split"):
        return Datasets(whole, unlabelled, val)
    labelled, rest = _divided(whole, data["split"])
    return Datasets(Subset(whole, labelled), unlabelled or Unlabelled(whole, rest), val)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Faults begin with the key of ``config.data`` that names the files."""
    try:
        yield
    except DataError as fault:
        raise DataError(f"config.data.{key}: {fault}") from fault


def _nuclei(data: Mapping[str, Any], workdir: Path) -> Datasets:
    datasets, generated = _coco(data, workdir), data["generated"]
    path, size = workdir / "data" / "micrographs.json", tuple(generated["image_size"])
    category = datasets.labelled.categories[0]
    write_micrographs(path, count=generated["source"], image_size=size, seed=generated["seed"], category=category)
    return dataclasses.replace(datasets, pretrain=Coco(path))


def _cityscapes(data: Mapping[str, Any], workdir: Path) -> Datasets:
    root = data["root"]
    if not root:
        if not data["generated"]["train"]:
            raise DataError(
                "config.data.root is not set; give the folder of leftImg8bit and gtFine: --config.data.root=PATH"
            )
        root = _write(workdir / "data" / "target", data, "target")
    return _published(data, functools.partial(Cityscapes, root), "train", "val")


def _ade20k(data: Mapping[str, Any], workdir: Path) -> Datasets:
    root = data["root"]
    if not root:
        if not data["generated"]["train"]:
            raise DataError(
                "config.data.root is not set; give the folder of images and annotations_instance, or of ADE20K 2021: "
                "--config.data.root=PATH"
            )
        root = workdir / "data" / "ade20k"
        write_as_ade20k(root, _write(workdir / "data" / "target", data, "target"))
    elif not data.get("split") and not data["labelled"]:
        raise DataError(
            "config.data.split is not set; make the paper's with `python scripts/make_splits.py ade20k ROOT` and give "
            "--config.data.split=FILE, or --config.data.labelled=NUMBER of images drawn at random"
        )
    open_split = functools.partial(Ade20k, root, category_ids=data.get("category_ids", "instance100"))
    return _published(data, open_split, "training", "validation")


def _published(data: Mapping[str, Any], open_split: Callable[..., Source], train: str, val: str) -> Datasets:
    """A data set whose training images all have labels, of which some are to be used."""
    if data.get("split"):
        labelled, pool = open_split(train, images=data["split"]), open_split(train, labelled=False)
        _, rest = _divided(pool, data["split"], labelled)
        return Datasets(labelled, Subset(pool, rest), open_split(val))
    whole = open_split(train)
    if not 1 <= data["labelled"] < len(whole):
        raise DataError(
            f"config.data.labelled is {data['labelled']}, but must lie in [1, {len(whole)}): there are {len(whole)} "
            "training images, of which one at least stays unlabelled"
        )
    chosen, rest = split_indices(len(whole), data["labelled"], data["split_seed"])
    return Datasets(Subset(whole, chosen), Subset(open_split(train, labelled=False), rest), open_split(val))


def _divided(source: Source, split_file: str, labelled: Source | None = None) -> tuple[list[int], list[int]]:
    """The (labelled, unlabelled) indices of ``source`` by a split file; ``labelled`` if that is read already.

    Raises:
      DataError: the file names an image that the source does not have, or leaves none for a side.
    """
    split = read_split(split_file)
    known = split.labelled if labelled is None else [labelled.record(i).image_id for i in range(len(labelled))]
    found = find_images(source, [*known, *(split.unlabelled or ())], split_file)
    chosen, rest = found[: len(known)], found[len(known) :]
    if split.unlabelled is None:
        rest = sorted(set(range(len(source))) - set(chosen))
    if not rest:
        raise DataError(f"{split_file}: labels every image; one at least must stay unlabelled")
    return chosen, rest


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

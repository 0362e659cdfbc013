"""Writes split files: which training images keep their labels. Seeded, and nested within a seed.

python scripts/make_splits.py cityscapes ROOT                    5, 10, 20, 30 % (10 %: 298 of 2,975)
python scripts/make_splits.py cityscapes ROOT --lists FILE...    the literature's text files, checked and completed
python scripts/make_splits.py ade20k ROOT                        10 images a class in a stratified subset of 3,537
python scripts/make_splits.py coco FILE.json --percent 1 2 5 10  of any COCO set
python scripts/make_splits.py coco FILE.json --lists FILE...     a line is an image's id or file_name in the JSON
python scripts/make_splits.py coco FILE.json --val-percent 20    two COCO JSONs: FILE_train.json and FILE_val.json

A run reads a split with --config.data.split=FILE, and such JSONs as --config.data.labelled and --config.data.val.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cast_jax.core.errors import UserError
from cast_jax.core.files import make_folder, write_new_json
from cast_jax.data.sources.ade20k import CATEGORIES, Ade20k
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cityscapes import SUFFIXES, Cityscapes
from cast_jax.data.sources.coco import Coco
from cast_jax.data.splits import (
    Split,
    choose_images,
    find_images,
    read_split,
    share_of,
    some_of_each_class,
    split_indices,
    stratified,
    write_split,
)

Made = Iterator[tuple[str, Split, dict[str, Any]]]


def main() -> None:
    """Writes the files, naming each; what the user can mend ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("cityscapes", "ade20k", "coco"))
    parser.add_argument("path", help="the data set's folder, or a COCO JSON")
    output = "folder for the files; others of the same name there are left alone (%(default)s)"
    parser.add_argument("--output", type=Path, default=Path("splits"), help=output)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a split for each (%(default)s)")
    parser.add_argument("--percent", type=float, nargs="+", help="labelled shares (5 10 20 30)")
    parser.add_argument("--val-percent", type=float, help="coco: hold out this share for validation")
    parser.add_argument("--images", help="coco: the folder of images (by default the JSON's name without .json)")
    lists = "text files with a labelled image a line, instead; of coco its id or file_name in the JSON"
    parser.add_argument("--lists", type=Path, nargs="+", help=lists)
    parser.add_argument("--per-class", type=int, default=10, help="ade20k: labelled images a class (%(default)s)")
    parser.add_argument("--subset", type=int, default=3537, help="ade20k: images in all (%(default)s)")
    options = parser.parse_args()
    try:
        if min(options.seeds) < 0 or not all(0 < percent < 100 for percent in options.percent or ()):
            raise UserError("--seeds must not be negative, and --percent must lie between 0 and 100")
        make_folder(options.output, "--output")
        if options.val_percent is not None:
            _hold_out(options)
            return
        for name, split, about in _made(options):
            path = options.output / f"{name}.json"
            write_split(path, split, {"dataset": options.dataset, **about})
            print(f"{path}: {len(split.labelled)} labelled, {len(split.unlabelled or ())} unlabelled")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def _made(options: argparse.Namespace) -> Made:
    if options.dataset == "ade20k" and not (options.percent or options.lists):
        return _classes(Ade20k(options.path, "training"), options)
    source: Source
    if options.dataset == "coco":
        source, name = Coco(options.path, options.images, on_fault="skip"), Path(options.path).stem
    elif options.dataset == "ade20k":
        source, name = Ade20k(options.path, "training", labelled=False), "ade20k"
    else:
        source, name = Cityscapes(options.path, "train", labelled=False), "cityscapes"
    if options.lists:
        return _listed(source, name, options.lists)
    return _shares(source, name, options)


def _hold_out(options: argparse.Namespace) -> None:
    """Writes the JSON's images and annotations as two JSONs; everything else stays as it is in both."""
    if options.dataset != "coco" or len(options.seeds) > 1 or not 0 < options.val_percent < 100:
        raise UserError("--val-percent is for coco, with one seed, and must lie between 0 and 100")
    source = Coco(options.path, options.images, on_fault="skip")
    content = json.loads(Path(options.path).read_text(encoding="utf-8-sig"))
    ids = [source.record(index).image_id for index in range(len(source))]
    count = share_of(len(ids), options.val_percent)
    if not 1 <= count < len(ids):
        raise UserError(f"--val-percent {options.val_percent:g} of {len(ids)} images is {count}; each side needs one")
    parts = {}
    for part, chosen in zip(("val", "train"), split_indices(len(ids), count, options.seeds[0]), strict=True):
        of_part = {ids[index] for index in chosen}
        images = [entry for entry in content["images"] if entry["id"] in of_part]
        annotations = [entry for entry in content["annotations"] if entry.get("image_id") in of_part]
        path = options.output / f"{Path(options.path).stem}_{part}.json"
        parts[path] = {**content, "images": images, "annotations": annotations}
    write_new_json(parts)
    for path, kept in parts.items():
        counts = f"{len(kept['images'])} images, {len(kept['annotations'])} annotations"
        print(f"{path}: {counts}; their folder is {source.root}")


def _shares(source: Source, name: str, options: argparse.Namespace) -> Made:
    ids = [source.record(index).image_id for index in range(len(source))]
    for seed in options.seeds:
        for percent in options.percent or (5, 10, 20, 30):
            count = share_of(len(ids), percent)
            if not 1 <= count < len(ids):
                raise UserError(
                    f"--percent {percent:g} of {len(ids)} images is {count}; one at least must be on each side"
                )
            labelled, rest = ([ids[i] for i in side] for side in split_indices(len(ids), count, seed))
            about = {"seed": seed, "percent": percent}
            yield f"{name}_{percent:g}_percent_seed{seed}", Split(tuple(labelled), tuple(rest)), about


def _listed(source: Source, name: str, lists: list[Path]) -> Made:
    """Every image of a list must be there; what it does not list is unlabelled."""
    ids = [source.record(index).image_id for index in range(len(source))]
    for path in lists:
        listed: Sequence[int | str] = read_split(path).labelled
        if not isinstance(source, Coco):
            listed = choose_images(path, set(map(str, ids)), SUFFIXES if isinstance(source, Cityscapes) else ())
        chosen = find_images(source, listed, str(path))
        rest = sorted(set(range(len(ids))) - set(chosen), key=lambda index: str(ids[index]))
        split = Split(tuple(ids[index] for index in chosen), tuple(ids[index] for index in rest))
        yield f"{name}_{path.stem}", split, {"list": path.name}


def _classes(source: Ade20k, options: argparse.Namespace) -> Made:
    """ADE20K's: so many images of each class labelled, in a subset that keeps the shares of the classes."""
    ids = [source.record(index).image_id for index in range(len(source))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reading = tqdm(pool.map(source.classes, range(len(ids))), "reading annotations", len(ids), disable=None)
        classes = list(reading)
    counts = Counter(label for of_image in classes for label in of_image)
    names = CATEGORIES["instance100"]
    if short := [
        f"{names[label].name} {counts[label]}" for label in range(len(names)) if counts[label] < options.per_class
    ]:
        print(f"classes in fewer than {options.per_class} images: {', '.join(short)}", file=sys.stderr)
    for seed in options.seeds:
        labelled = some_of_each_class(classes, options.per_class, seed)
        if not len(labelled) < options.subset <= len(ids):
            raise UserError(
                f"--subset {options.subset} must be above {len(labelled)} (labelled) and at most {len(ids)}"
            )
        subset = stratified(classes, options.subset, seed, labelled)
        rest = sorted(set(subset) - set(labelled))
        split = Split(tuple(ids[i] for i in labelled), tuple(ids[i] for i in rest))
        about = {"seed": seed, "per_class": options.per_class, "subset": options.subset}
        yield f"ade20k_{options.per_class}_per_class_seed{seed}", split, about


if __name__ == "__main__":
    main()

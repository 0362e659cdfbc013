"""Reads every image and annotation once and says what is wrong with them; exit code 1 on errors.

python scripts/check_data.py coco [--labelled labelled.json] [--unlabelled images/] [--val val.json]
python scripts/check_data.py cityscapes --root PATH [--split FILE]
python scripts/check_data.py ade20k --root PATH [--split FILE]

Counts images, instances, classes, sizes, empty and unreadable images, boxes outside, instances over the cap, and the
same pixels in two sets; writes a report and sheets of samples with their masks. A run's own data, by its configuration:
python -m cast_jax.main --config FILE:check_data --workdir FOLDER …
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from cast_jax.check_data import check_data
from cast_jax.core.errors import DataError, UserError
from cast_jax.core.files import make_folder
from cast_jax.data.datasets import open_datasets
from cast_jax.data.sources.ade20k import Ade20k
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.settings import DataConfig


def main() -> None:
    """Checks the data; what is wrong with them ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("coco", "cityscapes", "ade20k"))
    parser.add_argument("--root", default="", help="of Cityscapes or ADE20K")
    parser.add_argument("--labelled", default="", help="a COCO JSON, or how many images keep their labels")
    for name, meaning in (
        ("unlabelled", "a folder, pattern or list of images"),
        ("val", "a COCO JSON"),
        ("labelled-images", "if not in the folder beside the JSON"),
        ("val-images", "if not in the folder beside the JSON"),
        ("split", "a split file, or a text file with a labelled image a line (coco: its id or file_name in the JSON)"),
    ):
        parser.add_argument(f"--{name}", default="", help=meaning)
    parser.add_argument("--max-instances", type=int, default=100, help="slots for an image's instances (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("check_data"), help="folder for the report (%(default)s)")
    options = vars(parser.parse_args())
    if options["kind"] != "coco" and not options["labelled"].isdigit() and options["labelled"]:
        parser.error(f"--labelled is {options['labelled']!r}; of {options['kind']} it is a number of images")
    folder, labelled = options.pop("output"), options.pop("labelled")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        data = DataConfig(
            **options,
            image_size=(1, 1),
            labelled=labelled if options["kind"] == "coco" else int(labelled or 0),
            on_unreadable="skip",
        )
        make_folder(folder, "--output")
        check_data(_open(data, folder), data.max_instances, folder)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def _open(data: DataConfig, folder: Path) -> dict[str, Source]:
    """The sets that are given. Without a split, of a COCO task any of the three will do; others are all labelled."""
    if data.kind != "coco" and data.root and not data.split and not data.labelled:
        if data.kind == "cityscapes":
            return {"labelled": Cityscapes(data.root, "train"), "val": Cityscapes(data.root, "val")}
        return {"labelled": Ade20k(data.root, "training"), "val": Ade20k(data.root, "validation")}
    if data.kind != "coco" or data.split:
        return open_datasets(dataclasses.asdict(data), folder).of_the_task()
    sources: dict[str, Source] = {}
    if data.labelled:
        sources["labelled"] = Coco(str(data.labelled), data.labelled_images or None, on_fault="skip")
    if data.unlabelled:
        sources["unlabelled"] = ImageFolder(data.unlabelled)
    if data.val:
        known = sources["labelled"].categories if data.labelled else None
        sources["val"] = Coco(data.val, data.val_images or None, categories=known, on_fault="skip")
    if not sources:
        raise DataError("nothing to check; give --labelled, --unlabelled or --val")
    return sources


if __name__ == "__main__":
    main()

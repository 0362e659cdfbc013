"""Pseudo-labels for people to correct, in any tool that opens a COCO JSON.

python scripts/review_labels.py export RUN/pseudo_labels/adapted labels.json [--polygons]
python scripts/review_labels.py import RUN/pseudo_labels/adapted labels.json

The images are the run's unlabelled ones. After the import, the next step of the run trains on the corrected labels and
records their hash; the model's own stay in RUN/pseudo_labels/adapted.before_review.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cast_jax.core.errors import UserError
from cast_jax.core.files import write_json
from cast_jax.data.review import export_labels, import_labels


def main() -> None:
    """Exports or imports; what the user can mend ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("export", "import"))
    parser.add_argument("store", type=Path, help="a run's folder of pseudo-labels")
    parser.add_argument("file", type=Path, help="the COCO JSON")
    parser.add_argument("--polygons", action="store_true", help="export outlines where they show the mask well")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        if options.direction == "export":
            content = export_labels(options.store, options.polygons)
            write_json(options.file, content)
            print(f"{options.file}: {len(content['annotations'])} instances in {len(content['images'])} images")
        else:
            statistics = import_labels(options.store, options.file)
            print(f"{options.store}: {statistics['instances']} instances in {statistics['images']} images")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

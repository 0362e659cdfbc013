"""Measures the costs that BENCHMARKS.md states. Each prints a Markdown table; ``--json FILE`` keeps the numbers.

python scripts/benchmark.py contrastive      the contrastive loss with its gradient against PyTorch (needs torch)
python scripts/benchmark.py samplers         the three samplers of negatives
python scripts/benchmark.py gradient_noise   what sharing proposals does to the contrastive gradient
python scripts/benchmark.py step             a whole update of the student against PyTorch (needs torch)
python scripts/benchmark.py contrast_share   how much longer contrast makes that update
python scripts/benchmark.py criterion        the student's criterion with its gradient against PyTorch (needs torch)
python scripts/benchmark.py matching         queries and instances against optax and SciPy
python scripts/benchmark.py loop             what the training loop and its loader add to the update itself
python scripts/benchmark.py exchanged        what eight devices send each other in an update
python scripts/benchmark.py teacher          the fused teacher against PyTorch: zero-shot masks, an update (needs torch)
python scripts/benchmark.py encoder          DINOv2-S and the DPT neck at 518 x 518 against PyTorch eager (needs torch)
python scripts/benchmark.py loader           the data pipeline against torch's DataLoader (needs torch and torchvision)
python scripts/benchmark.py loader_memory    the data pipeline's memory from 100 to 10,000 images
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
from benchmarks import timing

from cast_jax.core.errors import UserError
from cast_jax.core.files import make_room, write_json

BENCHMARKS = {  # module and function
    "contrastive": ("contrastive", "contrastive"),
    "samplers": ("contrastive", "samplers"),
    "gradient_noise": ("contrastive", "gradient_noise"),
    "step": ("step", "student_step"),
    "contrast_share": ("step", "contrast_share"),
    "criterion": ("criterion", "criterion"),
    "matching": ("matching", "matching"),
    "loop": ("loop", "loop"),
    "exchanged": ("loop", "exchanged"),
    "teacher": ("teacher", "teacher"),
    "encoder": ("encoder", "encoder"),
    "loader": ("loader", "loader"),
    "loader_memory": ("loader", "loader_memory"),
}


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each variant, alternating")
    parser.add_argument("--processor-time", action="store_true", help="where others share the one core of this process")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    try:
        if options.json:
            make_room(options.json, "--json")
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.processor_time:
        timing.clock = time.process_time
    module, function = BENCHMARKS[options.benchmark]  # each needs other packages
    sys.path.insert(0, str(Path(__file__).parents[1]))  # configs
    rows = getattr(importlib.import_module(f"benchmarks.{module}"), function)(options.repeats)
    print(f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}\n")
    print_table(rows)
    if options.json:
        write_json(options.json, rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()

"""The memory of one update of `adapt` with the fused teacher, by compiling it without running it.

python scripts/teacher_memory.py [--model grounded_sam2_l] [--side 1024] [--batch 1] [--dtype bfloat16]

Prints what XLA's ``memory_analysis`` says of the compiled update: parameters, both moments and batch, gradients (on
accelerators these are among the temporaries) and activations. The latter are of ``--dtype``: bfloat16 as on
accelerators, or float32. Compiling the largest model takes minutes, and no parameters are allocated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cast_jax.core.annotations import Category
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.config import build
from cast_jax.models.functional import count_parameters
from cast_jax.models.registry import build_segmenter
from cast_jax.settings import RunConfig
from cast_jax.trainer import make_step

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grounded_sam2_l")
    parser.add_argument("--side", type=int, default=1024, help="of the square images")
    parser.add_argument("--batch", type=int, default=1, help="labelled images, and as many unlabelled ones")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is computed")
    options = parser.parse_args()
    sys.path.insert(0, str(Path.cwd()))
    cityscapes = importlib.import_module("configs.cityscapes")
    config = cityscapes.get_config(f"adapt,teacher={options.model}").to_dict()
    config["model"]["teacher"]["tokenizer"] = "words"  # the same shapes
    config["data"]["image_size"] = (options.side, options.side)
    config["steps"]["adapt"]["data"] |= {"batch_labelled": options.batch, "batch_unlabelled": options.batch}
    run = build(RunConfig, config, "config")
    recipe = run.recipe("adapt", [Category(number, name) for number, name in enumerate(CLASSES)])
    size = (options.side, options.side)
    recipe.segmenter = build_segmenter(run.model["teacher"], CLASSES, size, dtype=jnp.dtype(options.dtype))
    started = time.monotonic()
    step = make_step(recipe, run.train_config("adapt"))
    group = abstract_group(options.batch, options.side, run.data.max_instances)
    step.compile("adapt", step.like, {}, {"labelled": group, "unlabelled": group})
    memory = step.programs[0].memory_analysis()
    described: dict[str, Any] = {
        "model": options.model,
        "parameters": count_parameters(recipe.abstract()),
        "images": f"{options.batch} + {options.batch}, two views each, {options.side} x {options.side}",
        "state and batch, GiB": round(memory.argument_size_in_bytes / 2**30, 2),
        "gradients, GiB": round((memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**30, 2),
        "temporaries, GiB": round(memory.temp_size_in_bytes / 2**30, 2),
        "together, GiB": round((memory_bytes(step.programs[0]) or 0) / 2**30, 2),
        "compiled in, s": round(time.monotonic() - started),
        "device": jax.devices()[0].device_kind,
        "dtype": options.dtype,
    }
    print(json.dumps(described, indent=2))


def abstract_group(batch: int, side: int, slots: int) -> dict[str, Any]:
    """The shapes of a group of the loader's batches."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
    view = {
        "image": array(jnp.uint8, side, side, 3),
        "valid_box": array(jnp.float32, 4),
        "masks": array(jnp.uint8, slots, side, side // 8),
        "labels": array(jnp.int32, slots),
        "instance_valid": array(jnp.bool, slots),
        "scores": array(jnp.float32, slots),
        "ignore": array(jnp.uint8, side, side // 8),
    }
    return {"instances_cut": array(jnp.int32), "strong_to_weak": array(jnp.float32, 2, 3), "weak": view, "strong": view}


if __name__ == "__main__":
    main()

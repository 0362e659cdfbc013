"""A whole ``cast`` whose models are toys: everything around them is the real thing, and a restart takes a second.

As a program, ``python toy_cast.py`` imports all of cast_jax once, then runs one command a line of its standard input,
``{"arguments": [...], "real": false, "kill": null | [n, seconds]}``, each in a fork of its own, and answers with a line
of JSON: ``{"code": ..., "event": ...}``. With ``kill``, the run dies of SIGKILL ``seconds`` after it began its n-th
change of a file in the workdir, which ``event`` names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from cast_jax import main, report
from cast_jax.core.geometry import unpack_masks
from cast_jax.evaluation import coco_map
from cast_jax.models.segmenter import Prediction
from cast_jax.recipes.base import view_images
from cast_jax.settings import RunConfig

QUERIES, GRID = 3, 8


class ToySegmenter:
    """Averages cells of the image; mask and class logits are linear in the cells' colours."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def abstract(self):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
        return {"encoder": {"kernel": shape(3, QUERIES)}, "head": {"kernel": shape(3, QUERIES, self.num_classes + 1)}}

    def init(self, key):
        return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), self.abstract())

    def apply(self, params, images, *, key=None):
        batch, height, width, _ = images.shape
        cells = images.reshape(batch, height // GRID, GRID, width // GRID, GRID, 3).mean((2, 4)) - 0.5
        masks = jnp.einsum("bhwc,cq->bqhw", cells, params["encoder"]["kernel"])
        classes = jnp.einsum("bc,cqk->bqk", cells.mean((1, 2)), params["head"]["kernel"])
        return Prediction(masks, classes, cells)


class ToyRecipe:
    """The first query learns where any instance is, from labels and pseudo-labels alike."""

    def __init__(self, segmenter: ToySegmenter):
        self.segmenter = segmenter

    def abstract(self):
        return {"segmenter": self.segmenter.abstract()}

    def init(self, key):
        return {"segmenter": self.segmenter.init(key)}

    def loss_fn(self, params, frozen, batch, key):
        loss, metrics = 0.0, {}
        for name in sorted(batch):
            view = batch[name]["strong"]
            images = view_images(view) + 0.01 * jax.random.uniform(key, view["image"].shape)
            logits = self.segmenter.apply(params["segmenter"], images).mask_logits
            masks = unpack_masks(view["masks"], images.shape[2]) & view["instance_valid"][:, :, None, None]
            truth = masks.any(1)[:, :: GRID // 2, :: GRID // 2][:, ::2, ::2]
            error = jnp.mean((jax.nn.sigmoid(logits[:, 0]) - truth) ** 2)
            loss, metrics[f"loss/{name}"] = loss + error, (error, 1.0)
        return loss, metrics | {"loss/total": (loss, 1.0)}


def use_toys() -> None:
    """Every role of a configuration becomes a toy, and curves, which take most of what is then left, are not drawn."""
    report._draw = lambda chart, curves: ""
    coco_map.precision_recall_figure = lambda precision: str(precision.sum()).encode()
    RunConfig.segmenter = lambda self, role, num_classes: ToySegmenter(num_classes)  # type: ignore[method-assign]
    RunConfig.recipe = lambda self, name, categories: ToyRecipe(ToySegmenter(len(categories)))  # type: ignore


def watch_files(workdir: str, at: int, pipe: int) -> None:
    """Tells the parent when the ``at``-th change of a file below ``workdir`` begins, and which it is."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
        if changes and str(arguments[0]).startswith(workdir):
            seen += 1
            if seen == at:
                os.write(pipe, f"{event} {os.path.relpath(str(arguments[0]), workdir)}\n".encode())
            elif at == 0:
                os.write(pipe, b".")

    sys.addaudithook(hook)


def run(arguments: list[str], real: bool) -> None:
    """One command, in this process."""
    if not real:
        use_toys()
    sys.argv[1:] = arguments
    try:
        main.run()
    except SystemExit as stop:  # absl's, after a run that ended well
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        main.distributed.leave(1 if isinstance(stop.code, str) else stop.code or 0)
    main.distributed.leave(0)


def serve() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        arguments, kill = command["arguments"], command.get("kill")
        workdir = arguments[arguments.index("--workdir") + 1]
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            sink = os.open(f"{workdir}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            watch_files(workdir, kill[0] if kill else 0, writing)
            run(arguments, command.get("real", False))
        os.close(writing)
        event = b""
        if kill and (event := os.read(reading, 4096)):
            time.sleep(kill[1])
            os.kill(child, signal.SIGKILL)
        changes = 0
        while not kill and (more := os.read(reading, 4096)):
            changes += len(more)
        os.close(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code, "event": event.decode().strip(), "changes": changes}), flush=True)


if __name__ == "__main__":
    serve()

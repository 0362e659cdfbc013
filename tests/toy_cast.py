"""A whole ``cast`` whose models are toys: everything around them is the real thing, and a restart takes a second.

A program, for ``runs.py``: it imports all of cast_jax once, then runs one command a line of its standard input
(JSON, see :class:`Command`), each in forks of its own, and answers with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import sys
import time

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
    main.distributed.HEARTBEAT = 8
    report._draw = lambda chart, curves: ""
    coco_map.precision_recall_figure = lambda precision: str(precision.sum()).encode()
    RunConfig.segmenter = lambda self, role, classes: ToySegmenter(len(classes))  # type: ignore[method-assign]
    RunConfig.recipe = lambda self, name, categories: ToyRecipe(ToySegmenter(len(categories)))  # type: ignore


@dataclasses.dataclass(frozen=True)
class Command:
    """A run: the answer is ``{"codes": [...], "event": ..., "changes": ..., "seconds": ...}``.

    Attributes:
      workdir: of the run; what it says goes to ``<workdir>.log``, of a second process to ``<workdir>.1.log``.
      arguments: the command line besides.
      real: the configuration's models instead of toys.
      kill: (text, n, seconds): the victim dies of SIGKILL ``seconds`` after it began its n-th change of a file in the
        workdir whose path has ``text`` in it. ``event`` names that change; ``changes`` counts them all where none is
        wanted; ``seconds`` tell how long the others lived on.
      full: the victim finds the disk full when it begins to change such a file.
      processes, devices: processes of the run, and devices of each.
      others: more arguments of all processes but the first.
      hosts: each process's working folder.
      victim: the process to kill.
    """

    workdir: str
    arguments: list[str]
    real: bool = False
    kill: tuple[str, int, float] | None = None
    full: str = ""
    processes: int = 1
    devices: int = 1
    others: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    victim: int = 0


def watch_files(workdir: str, text: str, at: int, pipe: int, full: str) -> None:
    """Tells the parent when the ``at``-th change of such a file below ``workdir`` begins; with 0, of every change.

    Changes of files with ``full`` in their path fail.
    """
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
        path = str(arguments[0]) if changes else ""
        if full and path.startswith(workdir) and full in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if path.startswith(workdir) and text in path[len(workdir) :]:
            seen += 1
            if seen == at:
                os.write(pipe, f"{event} {path[len(workdir) + 1 :]}\n".encode())
            elif at == 0:
                os.write(pipe, b".")

    sys.addaudithook(hook)


def run(command: Command, number: int, port: int) -> None:
    """One process of the command; does not return."""
    if not command.real:
        use_toys()
    jax.config.update("jax_num_cpu_devices", command.devices)
    several = {"coordinator": f"127.0.0.1:{port}", "num_processes": command.processes, "process_id": number}
    arguments = [f"--config.distributed.{key}={value}" for key, value in several.items()]
    if command.hosts:
        os.chdir(command.hosts[number])
    arguments = [*(command.others if number else ()), *(arguments if command.processes > 1 else ())]
    sys.argv[1:] = ["--workdir", command.workdir, *command.arguments, *arguments]
    try:
        main.run()
    except SystemExit as stop:  # absl's, after a run that ended well
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        main.distributed.leave(1 if isinstance(stop.code, str) else stop.code or 0)
    main.distributed.leave(0)


def answer(command: Command) -> dict:
    """Runs the processes of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reading, writing = os.pipe()
    children = []
    for number in range(command.processes):
        children.append(os.fork())
        if children[-1] == 0:
            path = f"{command.workdir}.{number}.log" if number else f"{command.workdir}.log"
            sink = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            if number == command.victim:
                text, at = command.kill[:2] if command.kill else ("", 0)
                watch_files(command.workdir, text, at, writing, command.full)
            else:
                os.close(writing)
            run(command, number, port)
    os.close(writing)
    event, changes = b"", 0
    if command.kill and (event := os.read(reading, 4096)):
        time.sleep(command.kill[2])
        os.kill(children[command.victim], signal.SIGKILL)
    while not command.kill and (more := os.read(reading, 4096)):
        changes += len(more)
    os.close(reading)
    begin = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.monotonic() - begin
    return {"codes": codes, "event": event.decode().strip(), "changes": changes, "seconds": seconds}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(Command(**json.loads(line)))), flush=True)

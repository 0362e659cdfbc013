"""The whole objective on one device, on eight, and on two processes' eight: the same numbers, and what is exchanged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import dataclasses
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from test_semi_supervised import ALL, NAMES, parts
from tiny import group
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.core import sharding
from cast_jax.core.compiled import added_up, collective_bytes
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.rules import named_leaves
from cast_jax.core.step import TrainStep
from cast_jax.losses import mask_terms
from cast_jax.losses.matching import match_all
from cast_jax.models.segmenter import Prediction
from cast_jax.recipes.online_labels import OnlineLabelsConfig, label_views
from cast_jax.recipes.semi_supervised import SemiSupervised
from jax.sharding import NamedSharding, PartitionSpec

sharding.SMALL = 64
mask_terms._SLOTS = 2  # two blocks an image
contrastive = ContrastiveConfig(num_negatives=8, num_anchors=32, group_size=16)
recipe = SemiSupervised(*parts(), dataclasses.replace(ALL, contrastive=contrastive), NAMES)
batches = [{"labelled": group(8, seed), "unlabelled": group(8, 100 + seed)} for seed in range(3)]


def losses(mesh):
    step = TrainStep(recipe, optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0), steps=20, mesh=mesh)
    state, placed = step.initial_state(), [sharding.shard_batch(batch, mesh) for batch in batches]
    step.compile("tiny", state, {}, placed[0])
    found = []
    for number in range(20):
        state, metrics, finite = step(state, {}, placed[number % 3])
        assert finite
        found.append(metrics["loss/total"][0])
    return np.array(found), step


def check_same(found, one):
    # Masked attention and acceptance are steps: rounding that falls on one moves a loss by some 1e-5 here, and then all
    # the later ones a little. Nothing else may differ.
    error = np.abs(found / one - 1)
    assert error[:6].max() < 1e-6, error
    assert np.median(error) < 1e-5 and error.max() < 2e-4, error


one, step = losses(sharding.make_mesh({"data": 1}, jax.devices()[:1]))
assert added_up(collective_bytes, step.programs) == {}
eight, step = losses(sharding.make_mesh({"data": 8}))
check_same(eight, one)

# Parameters' gradients, pools of proposals there and back (64 images make 32 groups of 16 anchors), and crumbs: nothing
# that grows with the pixels. The images alone are larger.
exchanged = added_up(collective_bytes, step.programs)
parameters = sum(4 * leaf.size for leaf in named_leaves(step.like.params).values())
proposals = 32 * 2 * contrastive.num_slots
pools = proposals * 4 * (4 + 12 + 2 * 8 + 2)
assert sum(exchanged.values()) < parameters + pools + 60_000, (exchanged, parameters, pools)

# Devices match their own images: were their loops one, it would wait for all of them at every turn.
mesh = sharding.make_mesh({"data": 8})
places = [NamedSharding(mesh, PartitionSpec(*layers, sharding.AXES)) for layers in ((None,), ())]
costs, valid = jax.ShapeDtypeStruct((2, 16, 5, 3), np.float32), jax.ShapeDtypeStruct((16, 3), bool)
with jax.set_mesh(mesh):
    program = jax.jit(match_all, in_shardings=places).lower(costs, valid).compile()
assert collective_bytes(program) == {}, program.as_text()

# And label them; XLA's top_k alone wants every image's class probabilities (5 queries of 3 classes).
images, rows = group(8, 0), NamedSharding(mesh, PartitionSpec(sharding.AXES))
prediction = Prediction(*(jax.ShapeDtypeStruct((8, 5, *rest), np.float32) for rest in ((4, 6), (4,))), None)
with jax.set_mesh(mesh):
    label = jax.jit(lambda *found: label_views(*found, OnlineLabelsConfig(max_iou=0.5, min_area=1)), in_shardings=rows)
    program = label.lower(prediction, images).compile()
assert sum(collective_bytes(program).values()) <= 8 * 5 * 3 * 4, program.as_text()

split, step = losses(sharding.make_mesh({"data": 2, "fsdp": 4}))
# Parameters that are split are gathered, twice, also within loops; activations stay where they are.
exchanged = added_up(collective_bytes, step.programs)
assert sum(exchanged.values()) < 3 * parameters + pools + 60_000, (exchanged, parameters, pools)
assert any("fsdp" in leaf.sharding.spec for leaf in named_leaves(step.like.params).values())
check_same(split, one)
"""


# Nothing here is decided by a threshold, so that every loss is held against its goal. Arguments: address and number of
# this one of two processes, or nothing for a process and a device alone. The last line is the losses of every case.
SMOOTH = """
import dataclasses, json, sys
import jax, numpy as np
alone = len(sys.argv) == 1
jax.config.update("jax_num_cpu_devices", 1 if alone else 4)
from cast_jax.core import distributed
if not alone:
    several = {"coordinator": sys.argv[1], "num_processes": 2, "process_id": int(sys.argv[2]), "timeout": 60}
    distributed.initialize(several)
from test_semi_supervised import ALL, NAMES
from tiny import SIZE, Linear, group
from cast_jax.core import sharding
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.rules import named_leaves
from cast_jax.core.step import TrainStep
from cast_jax.models.functional import Functional
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.semi_supervised import SemiSupervised

sharding.SMALL = 1
own = slice(16) if alone else slice(8 * jax.process_index(), 8 * jax.process_index() + 8)
batches = [{"labelled": group(16, seed), "unlabelled": group(16, 100 + seed)} for seed in range(3)]
batches = [jax.tree.map(lambda leaf: leaf[own], batch) for batch in batches]
parts = Functional(Linear), Functional(lambda rngs: ProjectionHead(3, 8, rngs=rngs))
found = {}
for name, mesh, accumulate, options in (
    ("data", {"data": 8}, 1, {"scope": "bank", "bank_size": 64, "bank_new": 16}),
    ("fsdp", {"data": 1, "fsdp": 8}, 1, {"scope": "batch"}),
    ("both", {"data": 2, "fsdp": 4}, 2, {"scope": "image", "symmetric": True, "loss": "hinge", "num_anchors": 4}),
):
    contrastive = dataclasses.replace(ALL.contrastive, **options)
    recipe = SemiSupervised(*parts, dataclasses.replace(ALL, contrastive=contrastive), NAMES, SIZE)
    mesh = sharding.make_mesh({"data": 1} if alone else mesh)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    step = TrainStep(recipe, optimizer=optimizer, steps=20, mesh=mesh, ema_decay=0.9, accumulate=accumulate)
    if not alone:
        split = any("fsdp" in leaf.sharding.spec for leaf in named_leaves(step.like.ema).values())
        assert split == (mesh.shape["fsdp"] > 1), step.like
    state, placed = step.initial_state(), [sharding.shard_batch(batch, mesh) for batch in batches]
    step.compile(name, state, {}, placed[0])
    distributed.barrier()  # the first exchange does not wait long for the slower one
    found[name] = []
    for number in range(20):
        state, metrics, _ = step(state, {}, placed[number % 3])
        found[name].append(float(metrics["loss/total"][0]))
    found[name].append(float(sum(np.abs(sharding.whole(leaf)).sum() for leaf in jax.tree.leaves(state.ema))))
print(json.dumps(found))
distributed.leave(0)
"""


def environment() -> dict[str, str]:
    """Of a process that imports what tests share."""
    here = Path(__file__).parent
    paths = [str(folder) for folder in (here, here.parent, here.parents[1])]
    # Devices wait for each other in threads of one pool, which has as many as processors: on two, eight can starve.
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NPROC": "32"}


def test_eight_devices_compute_what_one_does():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_of_four_devices_compute_what_one_device_does():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command, pipes = (
        [sys.executable, "-c", SMOOTH],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    processes = [
        subprocess.Popen([*command, *arguments], env=environment(), **pipes)
        for arguments in ((), (address, "0"), (address, "1"))
    ]
    answers = [process.communicate(timeout=600) for process in processes]
    said = "\n".join(error[:4000] for _, error in answers)
    assert [process.returncode for process in processes] == [0, 0, 0], said
    alone, *both = (json.loads(answer.splitlines()[-1]) for answer, _ in answers)
    for name in alone:
        assert len(alone[name]) == 21
        assert min(alone[name][:20]) < 0.99 * max(alone[name][:20])
        for losses in both:
            np.testing.assert_allclose(losses[name], alone[name], rtol=1e-5, err_msg=name)

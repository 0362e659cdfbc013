r"""Profiles the update that a run would make: operations, memory, traffic and time, in all and by part of the model.

python scripts/profile_step.py --config configs/cityscapes.py:distill [--config.… as for a run] \
    [--workdir DIR] [--steps N] [--trace DIR] [--hlo FILE] [--json FILE] [--peak TFLOPS] \
    [--classes N] [--instances N] [--abstract | --gpu h200 | --tpu v5e:2x2]

Recipe, sizes, mesh and optimiser are the run's; weights are random. Images are the run's if the configuration names
some, and noise otherwise; pseudo-labels are those in the workdir, or else the labelled images take their place.
``--abstract`` only compiles: a full-size step on a small machine. So do ``--gpu`` and ``--tpu``, for devices that are
not there, but whose compilers are (cast_jax[cuda], cast_jax[tpu]).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from cast_jax.core import profiling, target
from cast_jax.core.annotations import Category
from cast_jax.core.errors import UserError
from cast_jax.core.files import atomic_write, make_folder, make_room, write_json
from cast_jax.core.logging import setup_logging
from cast_jax.core.progress import clock
from cast_jax.core.runtime import setup
from cast_jax.core.sharding import batch_sharding, shard_batch
from cast_jax.core.step import TrainStep, count_images
from cast_jax.data.pipeline import make_loader
from cast_jax.data.pseudo_labels import PseudoLabels
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.data.sources.stand_in import StandIn
from cast_jax.main import parse_flags
from cast_jax.pipeline import Pipeline
from cast_jax.preflight import check_settings
from cast_jax.trainer import make_step

_STEPS = flags.DEFINE_integer("steps", 10, "Updates to time, after two that are not.", lower_bound=1)
_TRACE = flags.DEFINE_string("trace", None, "Folder for a trace of three updates, for TensorBoard or Perfetto.")
_HLO = flags.DEFINE_string("hlo", None, "File for the compiled program's text; on a CPU of two, one after the other.")
_JSON = flags.DEFINE_string("json", None, "File for all figures.")
_PEAK = flags.DEFINE_float("peak", None, "What a device can do at most, TFLOP/s, where its name does not tell.")
_ABSTRACT = flags.DEFINE_bool("abstract", False, "Compile only: nothing is allocated, nothing runs.")
_GPU = flags.DEFINE_string("gpu", None, f"GPU to compile for, or several such as h100:8: {', '.join(target.GPUS)}.")
_TPU = flags.DEFINE_string("tpu", None, "TPU slice to compile for, such as v5e:2x2; needs libtpu. As --abstract.")
_CLASSES = flags.DEFINE_integer("classes", 8, "Classes, where there are no images to tell.", lower_bound=1)
_INSTANCES = flags.DEFINE_integer("instances", 20, "Instances an image, where there are no images to tell.")

WARM_UP, TRACED = 2, 3  # updates

logger = logging.getLogger("cast_jax.scripts.profile_step")


def main(argv: list[str]) -> None:
    """Prints the profile; what the user can mend ends with its message and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments: {' '.join(argv[1:])}; see --help")
    config = flags.FLAGS.config.to_dict()
    setup_logging()
    try:
        setup(config["runtime"])
        with machine(), tempfile.TemporaryDirectory() as folder:
            profile(config, Path(flags.FLAGS.workdir or folder), Path(_TRACE.value or Path(folder) / "trace"))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def machine() -> contextlib.AbstractContextManager[None]:
    """Within, programs are for the machine that the flags name."""
    if _GPU.value and _TPU.value:
        raise UserError("--gpu and --tpu: name one of them")
    if _GPU.value:
        return target.gpus(_GPU.value)
    return target.tpu_slice(_TPU.value) if _TPU.value else contextlib.nullcontext()


def profile(config: dict[str, Any], workdir: Path, trace: Path) -> None:
    """Compiles ``config.step``'s update, runs it and prints what it costs."""
    abstract = bool(_ABSTRACT.value or _GPU.value or _TPU.value)
    if abstract and _TRACE.value:
        raise UserError("--trace needs an update that runs: leave out --abstract, --gpu and --tpu")
    for flag, file in (("--hlo", _HLO.value), ("--json", _JSON.value)):
        if file:
            make_room(Path(file), flag)
    if not abstract:
        make_folder(trace, "--trace")
    pipeline = Pipeline(config, workdir)
    run, name = pipeline.config, pipeline.config.step
    check_settings(run, pipeline.mesh)
    if name not in run.steps:
        raise UserError(f"config.step is {name!r}; name a step that is trained: {', '.join(run.steps)}")
    batch, categories = first_batch(pipeline, name)
    step = make_step(run.recipe(name, categories), run.train_config(name))
    if abstract:
        sharding = batch_sharding(step.mesh)
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch)
        state = step.like
    else:
        batch, state = shard_batch(batch, step.mesh), step.initial_state()
    step.compile(name, state, {}, batch)
    if _HLO.value:
        atomic_write(_HLO.value, "\n".join(program.as_text() for program in step.programs))
    found = profiling.report(step, peak=_PEAK.value and 1e12 * _PEAK.value)
    if not abstract:
        state, seconds = timed(step, state, batch)
        with profiling.tracing(trace):
            for number in range(TRACED):
                with jax.profiler.StepTraceAnnotation(name, step_num=number):
                    state, *_ = step(state, {}, batch)
            jax.block_until_ready(state)
        found = profiling.measured(found, seconds, trace, TRACED, step.programs)
        found["images_per_second"] = count_images(batch) / seconds
        found["hours"] = run.steps[name].train.steps * seconds / 3600
    print(profiling.as_text(found))
    if not abstract:
        updates = run.steps[name].train.steps
        print(f"\n{found['images_per_second']:.3g} images/s; {updates:,} updates take {clock(updates * seconds)}")
    if _JSON.value:
        write_json(_JSON.value, found)


def first_batch(pipeline: Pipeline, name: str) -> tuple[Any, tuple[Category, ...]]:
    """A batch on the host as the run's step sees it, and the classes."""
    run, step = pipeline.config, pipeline.config.steps[name]
    if run.data.root or run.data.val or run.data.generated.train:
        datasets, categories = pipeline.datasets, pipeline.categories
        labelled = datasets.pretrain if step.source == "pretrain" else datasets.labelled
        store = pipeline.workdir / "pseudo_labels" / step.pseudo_labels
        if step.pseudo_labels in ("", "online"):
            unlabelled = datasets.unlabelled
        elif datasets.unlabelled is not None and (store / "stats.json").exists():
            unlabelled = PseudoLabelled(datasets.unlabelled, PseudoLabels.open(store), categories)
        else:
            logger.info("no pseudo-labels in %s: labelled images in their place", store)
            unlabelled = datasets.labelled
    else:
        categories = tuple(Category(number, f"class {number}") for number in range(_CLASSES.value))
        count = min(_INSTANCES.value, run.data.max_instances)
        labelled = unlabelled = StandIn(categories, run.data.image_size, count)
        logger.info("no images in the configuration: noise with %d instances of %d classes", count, len(categories))
    loader = make_loader(labelled, unlabelled, run.loader_config(name))
    try:
        return next(loader), categories
    finally:
        loader.close()


def timed(step: TrainStep, state: Any, batch: Any) -> tuple[Any, float]:
    """The state after some updates, and the median of their seconds. As in a run, one is queued while one computes."""
    state, _, waiting = step(state, {}, batch)
    ends = []
    for _ in range(WARM_UP + _STEPS.value):
        state, _, finite = step(state, {}, batch)
        jax.block_until_ready(waiting)
        ends.append(time.perf_counter())
        waiting = finite
    jax.block_until_ready(state)
    return state, statistics.median(after - before for before, after in itertools.pairwise(ends[WARM_UP - 1 :]))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)

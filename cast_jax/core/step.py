"""One update of a recipe's parameters, compiled ahead of time for one mesh.

On a CPU it is two programs, one after the other: the gradients', and the optimiser's, which where it clips them needs
the norm of all first. Both compile at the same time, which takes a tenth less. Elsewhere it is one: on a GPU that saves
no time, and gradients that are results of a program share no memory with its temporaries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PRNGKeyArray

from cast_jax.core import metrics as metric
from cast_jax.core import target
from cast_jax.core.checkpoint import TrainState
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.errors import UserError
from cast_jax.core.optim import OptimizerConfig, ema_update, make_optimizer
from cast_jax.core.rules import named_leaves, unnamed
from cast_jax.core.runtime import as_size, memory_limit
from cast_jax.core.sharding import (
    RULES,
    like_params,
    micro_batches,
    param_shardings,
    place,
    replicate,
    replicated,
    shard_params,
)

logger = logging.getLogger(__name__)


class Trainable(Protocol):
    """What a recipe must offer. Some methods are optional, and looked up by name.

    ``init_bank()`` returns arrays that become ``state.bank``, and ``update_bank(bank, third)`` what they are after an
    update, of which ``loss_fn`` returned the third value. ``loss_fn`` finds the moving average and the bank, where the
    run has them, as ``frozen["ema"]`` and ``frozen["bank"]``.

    With gradient accumulation ``loss_fn`` sees one micro-batch at a time, and what ``normalisers(batch)`` returns of
    the whole batch, divided by their number, as ``frozen["normalisers"]``; the third values are joined along their
    first axis.
    """

    def init(self, key: PRNGKeyArray) -> Any:
        """Fresh parameters."""
        ...

    def loss_fn(self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, ...]:
        """(loss, {name: (sum, count)}) or (loss, metrics, aux)."""
        ...


class TrainStep:
    """The update of one recipe on one mesh; pure, apart from keeping the programs that it compiled.

    Args:
      steps: length of the run, for the schedule.
      ema_decay, ema_warmup: see :func:`cast_jax.core.optim.ema_update`; without a decay no average is kept.
      accumulate: micro-batches that a batch is split into, see :func:`cast_jax.core.sharding.micro_batches`. Loss,
        gradients and metrics are their means; only one's activations are in memory.
      seed: of every update's key, ``fold_in(key, state.step)``, and of the parameters of :meth:`initial_state` where
        none are given.

    Attributes:
      like: the state's shapes, dtypes and shardings.
      traced, programs: the update as JAX traced it and as XLA compiled it, once that is done. Of two programs the first
        is given the whole state and needs the most memory.
    """

    def __init__(
        self,
        recipe: Trainable,
        *,
        optimizer: OptimizerConfig,
        steps: int,
        mesh: Mesh,
        rules: Sequence[tuple[str, Any]] = RULES,
        ema_decay: float | None = None,
        ema_warmup: bool = True,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        if hasattr(recipe, "init_bank") != hasattr(recipe, "update_bank"):
            raise TypeError(f"{type(recipe).__name__} must have both init_bank and update_bank, or neither")
        self.recipe, self.mesh, self.accumulate = recipe, mesh, accumulate
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self._init_key, self._step_key = jax.random.split(jax.random.key(seed))
        self._params = jax.eval_shape(recipe.init, self._init_key)
        self.optimizer = make_optimizer(optimizer, self._params, steps)
        self._param_shardings = param_shardings(self._params, mesh, rules)
        shapes = jax.eval_shape(self._new_state, self._params)
        self._shardings = like_params(shapes, self._params, self._param_shardings, mesh)
        self.like: TrainState = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, self._shardings
        )
        self.traced: tuple[Any, ...] = ()
        self.programs: tuple[Any, ...] = ()
        self._jitted: tuple[Any, ...] = ()

    def initial_state(self, params: Any = None) -> TrainState:
        """Step 0 from ``params`` (copied), or from ``recipe.init``. Raises :class:`UserError` where they do not fit."""
        if params is None:
            init = jax.jit(self.recipe.init, out_shardings=self._param_shardings, compiler_options=_compiler_options())
            params = init(self._init_key)
        else:
            _check_params(params, self._params)
            params = shard_params(params, self._param_shardings)
        return jax.jit(self._new_state, out_shardings=self._shardings)(params)

    def place(self, frozen: Mapping[str, Any] | None) -> dict[str, Any]:
        """The frozen arrays on the mesh, split over ``fsdp`` like parameters."""
        frozen = dict(frozen or {})
        return place(frozen, param_shardings(frozen, self.mesh)) if jax.tree.leaves(frozen) else frozen

    def compile(self, name: str, state: TrainState, frozen: dict[str, Any], batch: Any) -> None:
        """Compiles for these shapes (of arrays, or only described); says how long it took and what memory it needs."""
        logger.info("compiling the %s step ...", name)
        begin = time.monotonic()
        key = jax.ShapeDtypeStruct(self._step_key.shape, self._step_key.dtype, sharding=replicated(self.mesh))
        compile_ = self._compile_two if target.backend() == "cpu" else self._compile_one
        with jax.set_mesh(self.mesh):
            compile_(state, frozen, batch, key)
        logger.info("compiling the %s step done in %.1f s", name, time.monotonic() - begin)
        _report_memory(name, memory_bytes(self.programs[0]), memory_limit())

    def _compile_one(self, *given: Any) -> None:
        everywhere = replicated(self.mesh)
        jitted = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, everywhere, everywhere))
        with _uncollected():
            traced = jitted.trace(*given)
            lowered = traced.lower()
        self.traced, self._jitted, self.programs = (traced,), (jitted,), (lowered.compile(_compiler_options()),)

    def _compile_two(self, *given: Any) -> None:
        everywhere = replicated(self.mesh)
        trained = self.optimizer.split(self.like.params)[0]
        where = {name: leaf.sharding for name, leaf in trained.items()}, self._shardings.bank, everywhere, everywhere
        gradients = jax.jit(self._differentiate, keep_unused=True, out_shardings=where)
        optimizer = jax.jit(self._optimize, donate_argnums=0, out_shardings=(self._shardings, everywhere, everywhere))
        with ThreadPoolExecutor(1) as pool:
            with _uncollected():
                first = gradients.trace(*given)
                compiling = pool.submit(first.lower().compile, _compiler_options())
                loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
                second = optimizer.trace(self.like, trained, loss)
                lowered = second.lower()
            compiled = lowered.compile(_compiler_options())
            self.programs = compiling.result(), compiled
        self.traced, self._jitted = (first, second), (gradients, optimizer)

    def __call__(
        self, state: TrainState, frozen: dict[str, Any], batch: Any
    ) -> tuple[TrainState, dict[str, metric.Pair], Bool[Array, ""]]:
        """(new state, metrics, whether loss and gradients were finite). ``state`` is donated; nothing is waited for."""
        assert self.programs, "compile first"
        if not jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            return self._call(self.programs, state, frozen, batch)
        # Only calls through jit, which traces again, go on to find the operation that made a NaN.
        with jax.set_mesh(self.mesh):
            return self._call(self._jitted, state, frozen, batch)

    def _call(self, programs: tuple[Any, ...], *given: Any) -> tuple[Any, Any, Any]:
        update = programs[0] if len(programs) == 1 else functools.partial(_in_turn, *programs)
        return update(*given, self._key)

    @functools.cached_property
    def _key(self) -> PRNGKeyArray:
        return replicate(self._step_key, self.mesh)

    def _new_state(self, params: Any) -> TrainState:
        init_bank = getattr(self.recipe, "init_bank", None)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=None if self.ema_decay is None else jax.tree.map(jnp.copy, params),
            bank=None if init_bank is None else init_bank(),
        )

    def _step(self, *given: Any) -> tuple[Any, Any, Any]:
        return _in_turn(self._differentiate, self._optimize, *given)

    def _differentiate(self, state: TrainState, frozen: dict[str, Any], batch: Any, key: PRNGKeyArray) -> Any:
        key = jax.random.fold_in(key, state.step)
        own = {name: value for name, value in (("ema", state.ema), ("bank", state.bank)) if value is not None}
        gradients_of = self._gradients if self.accumulate == 1 else self._accumulated_gradients
        loss, metrics, aux, gradients = gradients_of(state.params, frozen | own, batch, key)
        bank = None if state.bank is None else self._updated_bank(state.bank, aux)
        return gradients, bank, loss.astype(jnp.float32), metric.as_pairs({"loss/total": (loss, 1.0), **metrics})

    def _updated_bank(self, bank: Any, third: Any) -> Any:
        new = self.recipe.update_bank(bank, third)  # type: ignore[attr-defined]
        describe = lambda leaf: f"{leaf.dtype}{list(leaf.shape)}"
        before, after = (jax.tree.map(describe, tree) for tree in (bank, new))
        if before != after:
            raise TypeError(f"{type(self.recipe).__name__}.update_bank was given {before}, but returned {after}")
        return new

    def _optimize(self, state: TrainState, gradients: dict[str, Array], loss: Array) -> tuple[TrainState, Any, Array]:
        with jax.named_scope("optimizer"):
            params, opt_state, norm = self.optimizer.apply(gradients, state.opt_state, state.params, state.step)
            ema = state.ema
            if self.ema_decay is not None:
                ema = ema_update(ema, params, self.ema_decay, state.step, warmup=self.ema_warmup)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, bank=state.bank)
        metrics = {
            "optimizer/gradient_norm": (norm, 1.0),
            "optimizer/learning_rate": (self.optimizer.schedule(state.step), 1.0),
        }
        return new, metric.as_pairs(metrics), jnp.isfinite(loss) & jnp.isfinite(norm)

    def _gradients(self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Array, Any, Any, Any]:
        """Loss, metrics, the recipe's third value, and the gradients of the trained parameters by path."""
        trained, fixed = self.optimizer.split(params)

        def loss_fn(trained: dict[str, Array]) -> tuple[Array, tuple[Any, Any]]:
            loss, metrics, *aux = self.recipe.loss_fn(unnamed(trained | fixed, params), frozen, batch, key)
            return loss, (metrics, aux[0] if aux else None)

        (loss, (metrics, aux)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return loss, metrics, aux, gradients

    def _accumulated_gradients(self, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, ...]:
        """The same over micro-batches, one after another."""
        count, names = self.accumulate, self.optimizer.multipliers
        if (normalisers := getattr(self.recipe, "normalisers", None)) is not None:
            frozen = frozen | {"normalisers": jax.tree.map(lambda value: value / count, normalisers(batch))}

        def add(total: Any, numbered: tuple[Array, Any]) -> tuple[Any, tuple[Any, ...]]:
            number, part = numbered
            *results, gradients = self._gradients(params, frozen, part, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, gradients), tuple(results)

        shardings = {name: leaf for name, leaf in named_leaves(self._param_shardings).items() if name in names}
        zeros = jax.tree.map(jnp.zeros_like, self.optimizer.split(params)[0])
        zeros = jax.lax.with_sharding_constraint(zeros, shardings)
        parts = micro_batches(batch, count, self.mesh)
        gradients, (losses, metrics, aux) = jax.lax.scan(add, zeros, (jnp.arange(count), parts))
        metrics = jax.tree.map(lambda values: jnp.sum(values, axis=0), metrics)
        aux = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), aux)
        return jnp.mean(losses), metrics, aux, jax.tree.map(lambda total: total / count, gradients)


def _in_turn(differentiate: Any, optimize: Any, state: TrainState, *given: Any) -> tuple[Any, Any, Any]:
    """An update of its two parts: of functions to be compiled as one, or of programs."""
    gradients, bank, loss, metrics = differentiate(state, *given)
    state, more, finite = optimize(dataclasses.replace(state, bank=bank), gradients, loss)
    return state, dict(sorted((metrics | more).items())), finite


def count_images(batch: Any) -> int:
    """Images of a batch over all devices: the groups of ``{"labelled": ..., "unlabelled": ...}`` add up."""
    nested = isinstance(batch, Mapping) and all(isinstance(group, Mapping) for group in batch.values())
    groups = list(batch.values()) if nested else [batch]
    return sum(jax.tree.leaves(group)[0].shape[0] for group in groups)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's garbage collector: tracing makes a mass of objects that stay, through which it goes in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compiler_options() -> dict[str, str | int | bool]:
    """What XLA is told beside the user's own choices, which stand.

    On a CPU compiling takes long and gains little: LLVM's first level makes updates as fast as its third, and splitting
    reductions in two makes kernels for both halves. Long sums are a library's work there, split or not; what is left is
    maxima, integers and short sums. For GPUs that are not here no Triton products: without a GPU to try them on XLA may
    find no size of their tiles.
    """
    chosen: dict[str, str | int | bool] = {}
    if target.backend() == "cpu":
        chosen = {"xla_backend_optimization_level": 1, "xla_disable_hlo_passes": "tree_reduction_rewriter"}
    elif target.backend() == "gpu" and target.absent():
        chosen = {"xla_gpu_enable_triton_gemm": False}
    return {name: value for name, value in chosen.items() if name not in os.environ.get("XLA_FLAGS", "")}


def _report_memory(name: str, needed: int | None, limit: int | None) -> None:
    """Says what a step needs on each device of what is there."""
    if needed is None:
        return
    logger.info("%s step: %s%s a device", name, as_size(needed), f" of {as_size(limit)}" if limit else "")
    if limit and needed > limit:
        logger.warning(
            "%s: the step needs more memory than there is, and will most likely fail: set train.accumulate, the "
            "encoder's remat or mesh.fsdp, or use smaller batches",
            name,
        )


def _check_params(params: Any, wanted: Any) -> None:
    given, known = named_leaves(params), named_leaves(wanted)
    faults = [f"{name}: unknown to this model" for name in given if name not in known]
    faults += [f"{name}: missing" for name in known if name not in given]
    faults += [
        f"{name}: shape {given[name].shape}, wanted {leaf.shape}"
        for name, leaf in known.items()
        if name in given and given[name].shape != leaf.shape
    ]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("the initial parameters do not fit this model:\n  " + "\n  ".join(faults[:20]) + more)

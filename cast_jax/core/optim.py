"""The optimiser: AdamW with schedules, clipping, and rules over parameter paths.

The rules say per parameter: its learning-rate multiplier, whether it decays, whether it is trained at all. A frozen
parameter has no moments, and since its gradient is never asked for, XLA drops its part of the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.rules import layer_names, match_any, match_rules, named_leaves, unnamed

Named = dict[str, Array]
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]

SCHEDULES = ("constant", "multi_step", "polynomial", "cosine")
SCALINGS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # the power of batch / reference_batch

# Customary since BERT: matrices and convolutions decay; biases, norms, layer scales and learned tables (positions,
# tokens, queries, levels) do not. In Flax the former are exactly the leaves called "kernel".
NO_DECAY = (r"(.*/)?(?!kernel$)[^/]*",)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its schedule.

    Attributes:
      learning_rate: peak, for batches of ``reference_batch`` images where it is scaled, else for any.
      learning_rate_scaling: "none"; "linear": times batch / reference_batch (Goyal et al. 2017, for SGD); or "sqrt":
        times its square root (Malladi et al. 2022, for Adam: of their rule the rate's part, the betas stay). The batch
        is that of an update, over all devices and micro-batches; warmup and weight decay stay.
      reference_batch: the images of an update that ``learning_rate`` is meant for.
      schedule: "constant", "multi_step", "polynomial" or "cosine"; each after a linear warmup.
      warmup_steps: the rate is learning_rate * (step + 1) / (warmup_steps + 1) before this step.
      milestones: multi_step only, fractions of the run after which the rate is multiplied by ``decay_factor``.
      power: polynomial only, (1 - progress) ** power.
      weight_decay: decoupled, multiplied by the parameter's own learning rate.
      clip_norm: global norm of the gradients of all trained parameters; None for no clipping.
      learning_rate_rules: (pattern, multiplier) pairs; every trained parameter must match. Layers of a stack go by
        their own names here and below, ``encoder/blocks/0/norm1/scale``.
      no_decay: patterns of parameters without weight decay; None stands for ``NO_DECAY``: all but kernels.
      frozen: patterns of parameters that are not trained.
    """

    learning_rate: float = 1e-4
    learning_rate_scaling: str = "none"
    reference_batch: int | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    milestones: tuple[float, ...] = (0.9, 0.95)
    decay_factor: float = 0.1
    power: float = 0.9
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 0.1
    learning_rate_rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)
    no_decay: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, learning_rate="(0, inf)", warmup_steps="[0, inf)", milestones="[0, 1]", power="(0, inf)")
        check_ranges(self, decay_factor="[0, inf)", weight_decay="[0, inf)", clip_norm="(0, inf)")
        check_choices(self, learning_rate_scaling=SCALINGS, schedule=SCHEDULES)
        check_ranges(self, reference_batch="[1, inf)")
        if self.learning_rate_scaling != "none" and self.reference_batch is None:
            raise UserError(
                f"learning_rate_scaling is {self.learning_rate_scaling!r}, which needs reference_batch: the images of "
                "an update that learning_rate is meant for"
            )
        check_ranges(self, b1="[0, 1)", b2="[0, 1)", eps="(0, inf)")
        if faulty := [rule for rule in self.learning_rate_rules if not 0 <= rule[1] < math.inf]:
            raise UserError(f"learning_rate_rules has {faulty[0]}; its multiplier must lie in [0, inf)")

    def scaled(self, batch: int) -> OptimizerConfig:
        """The same with the learning rate for updates of ``batch`` images."""
        if self.learning_rate_scaling == "none" or self.reference_batch is None:
            return self
        power = SCALINGS[self.learning_rate_scaling]
        rate = self.learning_rate * (batch / self.reference_batch) ** power
        return dataclasses.replace(self, learning_rate=rate, reference_batch=batch)


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate of step 0, 1, ..., ``steps`` - 1. The schedule proper starts when the warmup ends."""
    if not config.warmup_steps < max(steps, 1):
        raise UserError(f"optimizer.warmup_steps is {config.warmup_steps}, but must lie in [0, steps={steps})")
    peak, length = config.learning_rate, max(steps - config.warmup_steps, 1)
    boundaries = [round(fraction * steps) - config.warmup_steps for fraction in config.milestones]
    schedules: dict[str, Callable[[], Any]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "multi_step": lambda: optax.piecewise_constant_schedule(peak, dict.fromkeys(boundaries, config.decay_factor)),
        "polynomial": lambda: optax.polynomial_schedule(peak, 0.0, config.power, length),
        "cosine": lambda: optax.cosine_decay_schedule(peak, length),
    }
    after = schedules[config.schedule]()

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warming = peak * (step + 1) / (config.warmup_steps + 1)
        return jnp.where(step < config.warmup_steps, warming, after(jnp.maximum(step - config.warmup_steps, 0)))

    return schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The pure functions of one run; made by :func:`make_optimizer`.

    Attributes:
      schedule: step -> learning rate, before multipliers.
      multipliers, decay: learning-rate multiplier and weight decay of each trained parameter, by path; of stacked
        layers that differ an axis of them.
      moving: 1 for the layers that are trained and 0 for those that are frozen, of stacks that have both.
      transform: Adam's preconditioning over ``{path: gradient}``.
    """

    config: OptimizerConfig
    schedule: Schedule
    multipliers: dict[str, float | np.ndarray]
    decay: dict[str, float | np.ndarray]
    moving: dict[str, float | np.ndarray]
    transform: optax.GradientTransformation

    def split(self, params: Any) -> tuple[Named, Named]:
        """Parameters as (trained, frozen) flat dictionaries by path."""
        named = named_leaves(params)
        trained = {name: named[name] for name in self.multipliers}
        return trained, {name: leaf for name, leaf in named.items() if name not in self.multipliers}

    def init(self, params: Any) -> Any:
        """The optimiser's state: moments of the trained parameters, by path."""
        return self.transform.init(self.split(params)[0])

    def apply(
        self, gradients: Named, opt_state: Any, params: Any, step: Int[Array, ""]
    ) -> tuple[Any, Any, Float[Array, ""]]:
        """One AdamW step; ``gradients`` hold the trained parameters by path.

        Returns (params, opt_state, global norm of the gradients before they are clipped).
        """
        trained, frozen = self.split(params)
        gradients = gradients | {name: gradients[name] * moving for name, moving in self.moving.items()}
        # Products, and one factor for all: sums and choices for each parameter take longer to compile.
        square = lambda leaf: jnp.tensordot(leaf, leaf, leaf.ndim, precision=jax.lax.Precision.HIGHEST)
        norm = jnp.sqrt(sum(map(square, gradients.values())))
        if self.config.clip_norm is not None:
            factor = jnp.minimum(1.0, self.config.clip_norm / norm)
            gradients = {name: (leaf * factor).astype(leaf.dtype) for name, leaf in gradients.items()}
        updates, opt_state = self.transform.update(gradients, opt_state, trained)
        rate = self.schedule(step)

        def move(name: str, parameter: Array) -> Array:
            change = updates[name] + self.decay[name] * parameter if np.any(self.decay[name]) else updates[name]
            pace = rate * self.multipliers[name] * self.moving.get(name, 1.0)
            return (parameter - pace * change).astype(parameter.dtype)

        return unnamed({name: move(name, leaf) for name, leaf in trained.items()} | frozen, params), opt_state, norm


def make_optimizer(config: OptimizerConfig, params: Any, steps: int) -> Optimizer:
    """Resolves the rules against ``params`` (arrays or shapes).

    Raises:
      UserError: rules that do not fit the parameters, a warmup as long as the run.
    """
    leaves = named_leaves(params)
    layers = {name: layer_names(name, leaf.shape) for name, leaf in leaves.items()}
    names = [layer for own in layers.values() for layer in own]
    frozen = match_any(config.frozen, names, "optimizer.frozen")
    trained = [name for name in leaves if not frozen.issuperset(layers[name])]
    if not trained:
        raise UserError(f"optimizer.frozen {config.frozen} leaves nothing to train")
    # Rules are checked against all names, so that freezing an encoder does not make its multiplier rule a fault.
    multipliers = match_rules(config.learning_rate_rules, names, "optimizer.learning_rate_rules")
    patterns = NO_DECAY if config.no_decay is None else config.no_decay
    undecayed = match_any(patterns, names, "optimizer.no_decay", strict=config.no_decay is not None)

    def by_layer(name: str, values: Callable[[str], float]) -> float | np.ndarray:
        """One number for all layers of an array where theirs are the same, else an axis of them."""
        found = [values(layer) for layer in layers[name]]
        if len(set(found)) == 1:
            return found[0]
        return np.array(found, np.float32).reshape(-1, *(1,) * (leaves[name].ndim - 1))

    return Optimizer(
        config=config,
        schedule=make_schedule(config, steps),
        multipliers={name: by_layer(name, lambda layer: float(multipliers[layer])) for name in trained},
        decay={name: by_layer(name, lambda layer: config.weight_decay * (layer not in undecayed)) for name in trained},
        moving={
            name: by_layer(name, lambda layer: float(layer not in frozen))
            for name in trained
            if not frozen.isdisjoint(layers[name])
        },
        transform=optax.scale_by_adam(config.b1, config.b2, config.eps),
    )


def ema_update(average: Any, params: Any, decay: float, step: Int[Array, ""], *, warmup: bool = True) -> Any:
    """Exponential moving average of parameters.

    ``warmup`` is UniMatch's: decay = min(decay, 1 - 1 / (step + 1)). ``step`` counts from 0, so the first update copies
    ``params`` and early ones are plain means. Without it the average goes on from what it starts with.
    """
    kept = jnp.minimum(decay, 1.0 - 1.0 / (step + 1.0)) if warmup else decay
    return jax.tree.map(lambda old, new: (kept * old + (1.0 - kept) * new).astype(new.dtype), average, params)

"""The matching on the device against the Hungarian algorithms of optax (on the device too) and SciPy (on the host)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.timing import medians, run
from scipy.optimize import linear_sum_assignment

from cast_jax.losses.matching import match_all

PROBLEMS = 8  # such as the layers and images of an update


def matching(repeats: int) -> list[dict[str, Any]]:
    """Eight problems together; costs of a trained model, which tells the instances apart, and of one that does not.

    Two fifths of the instances are there, the others padding.
    """
    random = np.random.default_rng(0)
    rows = []
    for queries, instances in ((100, 20), (100, 100), (300, 100), (1024, 64)):
        for costs, apart in (("apart", 1.0), ("alike", 0.1)):
            common = random.normal(size=(PROBLEMS, queries, 1)) * (1.0 - apart)
            cost = jnp.asarray(common + apart * random.normal(size=(PROBLEMS, queries, instances)), jnp.float32)
            valid = jnp.broadcast_to(jnp.arange(instances) < 0.4 * instances, (PROBLEMS, instances))
            given = np.asarray(jnp.where(valid[:, None], cost, 0.0))
            variants = {
                "ours": functools.partial(run, jax.jit(_ours), cost, valid),
                "optax": functools.partial(run, jax.jit(_hungarian), jnp.asarray(given)),
                "scipy": functools.partial(_on_host, given),
            }
            seconds = medians(variants, repeats)
            rows.append(
                {"queries": queries, "instances": instances, "costs": costs, "ours ms": f"{1e3 * seconds['ours']:.2f}"}
                | {f"{name} / ours": f"{seconds[name] / seconds['ours']:.1f}" for name in ("optax", "scipy")}
            )
    return rows


def _ours(costs: jax.Array, valid: jax.Array) -> Any:
    return match_all(costs[None], valid)


def _hungarian(costs: jax.Array) -> Any:
    """On one device one after another, as ours: side by side each waits for the slowest."""
    solve = optax.assignment.hungarian_algorithm
    return jax.lax.map(solve, costs) if jax.default_backend() == "cpu" else jax.vmap(solve)(costs)


def _on_host(costs: np.ndarray) -> None:
    for one in costs:
        linear_sum_assignment(one)

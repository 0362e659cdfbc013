"""Bipartite matching between queries and instances, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core.sharding import on_one_cpu

# What costs that are not finite count as: far above any real one.
_LARGE = 1e4


def match(
    cost: Float[Array, "queries instances"], instance_valid: Bool[Array, "instances"]
) -> tuple[Int[Array, "instances"], Bool[Array, "instances"]]:
    """The assignment of least total cost: the query of each instance, and whether it has one.

    Padded instances are never matched. With more instances than queries the cheapest ones are matched. Costs that are
    not finite count as very large, so that the assignment stays one-to-one (``optax`` would return anything).

    Returns:
      query: the matched query of each instance (arbitrary where ``matched`` is False).
      matched: False for padded instances and for those left without a query.
    """
    num_queries, num_instances = cost.shape
    cost = jnp.clip(jnp.nan_to_num(cost, nan=_LARGE, posinf=_LARGE, neginf=-_LARGE), -_LARGE, _LARGE)
    cost = jnp.where(instance_valid, cost, 0.0)
    if num_queries < num_instances:
        # So that none is spent on padding, valid columns become cheaper than it by more than any exchange can gain.
        # Not otherwise: a constant this large would round the costs.
        cost = jnp.where(instance_valid, cost - 2.0 * num_queries * jnp.max(jnp.abs(cost)) - 1.0, 0.0)
    rows, columns = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    query = jnp.zeros(num_instances, jnp.int32).at[columns].set(rows.astype(jnp.int32))
    assigned = jnp.zeros(num_instances, bool).at[columns].set(True)
    return query, assigned & instance_valid


def match_all(
    costs: Float[Array, "layers batch queries instances"], instance_valid: Bool[Array, "batch instances"]
) -> tuple[Int[Array, "layers batch instances"], Bool[Array, "layers batch instances"]]:
    """:func:`match` for every layer and image. On one CPU one after another: side by side, all wait for the slowest."""
    valid = jnp.broadcast_to(instance_valid, (costs.shape[0], *instance_valid.shape))
    if on_one_cpu():
        flat = jax.lax.map(
            lambda pair: match(*pair), (costs.reshape(-1, *costs.shape[2:]), valid.reshape(-1, valid.shape[-1]))
        )
        return jax.tree.map(lambda result: result.reshape(valid.shape), flat)
    return jax.vmap(jax.vmap(match))(costs, valid)

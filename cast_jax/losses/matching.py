"""Bipartite matching between queries and instances, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

# Far above any real cost, far below float32's precision limit next to one.
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
    num_instances = cost.shape[1]
    cost = jnp.clip(jnp.nan_to_num(cost, nan=_LARGE, posinf=_LARGE, neginf=-_LARGE), -_LARGE, _LARGE)
    # Valid columns are lowered by a constant so that with few queries none is spent on padding.
    cost = jnp.where(instance_valid, cost - 4 * _LARGE, 0.0)
    rows, columns = optax.assignment.hungarian_algorithm(jax.lax.stop_gradient(cost))
    query = jnp.zeros(num_instances, jnp.int32).at[columns].set(rows.astype(jnp.int32))
    assigned = jnp.zeros(num_instances, bool).at[columns].set(True)
    return query, assigned & instance_valid

"""Bipartite matching between queries and instances, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core import target
from cast_jax.core.sharding import batch_axes

# What costs that are not finite count as: far above any real one.
_LARGE = 1e4


def match(
    cost: Float[Array, "queries instances"], instance_valid: Bool[Array, "instances"]
) -> tuple[Int[Array, "instances"], Bool[Array, "instances"]]:
    """The assignment of least total cost: the query of each instance, and whether it has one.

    Padded instances are never matched. With more instances than queries the cheapest ones are matched. Costs that are
    not finite count as very large, so that the assignment stays one-to-one.

    Returns:
      query: the matched query of each instance (arbitrary where ``matched`` is False).
      matched: False for padded instances and for those left without a query.
    """
    num_queries, num_instances = cost.shape
    cost = jnp.clip(jnp.nan_to_num(cost, nan=_LARGE, posinf=_LARGE, neginf=-_LARGE), -_LARGE, _LARGE).T
    if num_queries < num_instances:
        # Columns for those left over, dearer than any exchange can gain.
        dear = 2.0 * num_queries * jnp.max(jnp.abs(cost)) + 1.0
        left_over = jnp.broadcast_to(dear, (num_instances, num_instances - num_queries))
        cost = jnp.concatenate([cost, left_over], axis=1)
    column = _assign(jax.lax.stop_gradient(cost.astype(jnp.float32)), instance_valid)
    return jnp.clip(column, 0, num_queries - 1), (column >= 0) & (column < num_queries)


def match_all(
    costs: Float[Array, "layers batch queries instances"], instance_valid: Bool[Array, "batch instances"]
) -> tuple[Int[Array, "layers batch instances"], Bool[Array, "layers batch instances"]]:
    """:func:`match` for every layer and image, each device its own: loops over all devices would wait at every turn."""
    axes = batch_axes()
    if not axes or costs.shape[1] % jax.sharding.get_abstract_mesh().size:
        return _match_here(costs, instance_valid)
    rows, layers = PartitionSpec(axes), PartitionSpec(None, axes)
    return jax.shard_map(_match_here, in_specs=(layers, rows), out_specs=layers, check_vma=False)(costs, instance_valid)


def _match_here(costs: Array, instance_valid: Array) -> tuple[Array, Array]:
    """On a CPU one after another: side by side, all wait for the slowest."""
    valid = jnp.broadcast_to(instance_valid, (costs.shape[0], *instance_valid.shape))
    if target.backend() != "cpu":
        return jax.vmap(jax.vmap(match))(costs, valid)
    flat = jax.lax.map(
        lambda pair: match(*pair), (costs.reshape(-1, *costs.shape[2:]), valid.reshape(-1, valid.shape[-1]))
    )
    return jax.tree.map(lambda result: result.reshape(valid.shape), flat)


def _assign(cost: Float[Array, "rows columns"], row_valid: Bool[Array, "rows"]) -> Int[Array, "rows"]:
    """The column of each valid row so that the sum is least, -1 for the others; there must be a column for each row.

    Shortest augmenting paths over reduced costs ``cost - u - v`` (Jonker and Volgenant, 1987; Crouse, 2016). Each row
    first claims its cheapest column, where most stay: only rows that another was there before take a path.
    """
    rows, columns = cost.shape
    order = jnp.arange(rows)
    claimed = jnp.argmin(cost, axis=1)
    first = jnp.full(columns, rows).at[jnp.where(row_valid, claimed, columns)].min(order, mode="drop")
    column_of = jnp.where(row_valid & (first[claimed] == order), claimed, -1)
    row_of = jnp.where(first == rows, -1, first)

    def waiting(column_of: Array) -> Array:
        return row_valid & (column_of < 0)

    def augment(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        u, v, row_of, column_of = state
        start = jnp.argmax(waiting(column_of))

        def scan(state: tuple[Array, ...]) -> tuple[Array, ...]:
            """Dijkstra's step: from ``row``, which is reached at ``reach``, to the nearest column and the row there."""
            row, reach, distance, previous, scanned, _ = state
            through = reach + cost[row] - u[row] - v
            shorter = ~scanned & (through < distance)
            distance = jnp.where(shorter, through, distance)
            previous = jnp.where(shorter, row, previous)
            still = jnp.where(scanned, jnp.inf, distance)
            nearest = jnp.argmin(still)
            return row_of[nearest], still[nearest], distance, previous, scanned.at[nearest].set(True), nearest

        nothing = jnp.full(columns, jnp.inf), jnp.full(columns, start), jnp.zeros(columns, bool), start
        path = scan((start, jnp.zeros(()), *nothing))
        _, reach, distance, previous, scanned, last = jax.lax.while_loop(lambda state: state[0] >= 0, scan, path)
        gain = jnp.where(scanned, reach - distance, 0.0)
        u = u.at[start].add(reach).at[jnp.where(row_of < 0, rows, row_of)].add(gain, mode="drop")

        def turn(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            """Gives ``column`` to the row that it was reached from; next is the column which that row had."""
            column, row_of, column_of, _ = state
            row = previous[column]
            return column_of[row], row_of.at[column].set(row), column_of.at[row].set(column), row == start

        turned = jax.lax.while_loop(lambda state: ~state[3], turn, (last, row_of, column_of, jnp.array(False)))
        return u, v - gain, turned[1], turned[2]

    state = jnp.min(cost, axis=1), jnp.zeros(columns), row_of, column_of
    return jax.lax.while_loop(lambda state: jnp.any(waiting(state[3])), augment, state)[3]

"""Counts the floating-point operations of matrix products and convolutions, which are nearly all of a network's.

XLA's own cost analysis counts the body of a loop once, however often it turns, and nothing of cuDNN's fused attention.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params


def matrix_flops(jaxpr: Jaxpr) -> Counter[str]:
    """Operations (2 a multiply-add) by name stack, ``jvp(encoder)/mlp``, over all devices.

    Loops count as often as they turn; ``while`` loops, of which that is not known, once. Of ``cond`` the dearest branch
    does. Convolutions count as if nothing were padded, and what nobody uses does not count.
    """
    return _count(jaxpr, "", 1)


def _count(jaxpr: Jaxpr, prefix: str, times: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for equation in _needed(jaxpr):
        name, params = equation.primitive.name, equation.params
        path = "/".join(filter(None, (prefix, str(equation.source_info.name_stack))))
        if name in _OPERATIONS:
            found[path] += times * _OPERATIONS[name](equation)
        elif name == "cond":
            branches = [_count(branch.jaxpr, path, times) for branch in params["branches"]]
            found.update(max(branches, key=lambda counts: sum(counts.values())))
        else:
            inner = times
            if name == "scan":
                inner *= params["length"]
            elif name == "shard_map":  # whose shapes are those of one device of the mesh
                inner *= params["mesh"].size
            for part in jaxprs_in_params(params):
                found.update(_count(part, path, inner))
    return found


def _needed(jaxpr: Jaxpr) -> list[Any]:
    """The equations whose results are used, in reverse: compilers leave the others out."""
    used, needed = set(filter(_named, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            used.update(filter(_named, equation.invars))
            needed.append(equation)
    return needed


def _named(variable: Any) -> bool:
    """Whether it is a variable, not a literal, which has no hash."""
    return not isinstance(variable, Literal)


def _dot_general(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)


def _convolution(equation: Any) -> int:
    kernel, params = equation.invars[1].aval, equation.params
    taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])


def _attention(equation: Any) -> int:
    query, key = (variable.aval for variable in equation.invars[:2])
    return 4 * query.size * key.shape[1]  # [batch, positions, heads, channels], two products


_OPERATIONS = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    # cuDNN's, as jax.nn.dot_product_attention calls it. The gradient's are four products, and one that is done again.
    "dot_product_attention_fwd_wrapper": _attention,
    "dot_product_attention_bwd_wrapper": lambda equation: 2 * _attention(equation),
}

"""Keeps XLA's CPU compiler from computing an operand anew wherever it is read."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

T = TypeVar("T")


def on_materialized(function: Callable[..., T], *operands: Array) -> T:
    """Calls `function(*operands)` on operands that exist in memory.

    XLA fuses what makes an operand into what reads it, which pays where it is read once. A stencil or a
    gather reads it dozens of times, and a CPU then computes a soft-max per tap; `optimization_barrier`
    is gone by the time that fusions are made in the XLA of jax 0.10. The operands of a conditional are always
    made first. This one has one outcome, in a form that no simplification sees through.

    Args:
        function: of arrays to arrays.
        operands: its arguments; the first is floating point.

    Returns:
        `function(*operands)`. Not differentiable: meant for the inside of a custom rule.
    """

    def in_branch(*operands: Array) -> T:
        first = operands[0].reshape(-1)[:1].sum()
        result = jax.eval_shape(function, *operands)

        def never(*operands: Array) -> T:
            return varying_like(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result), operands)

        return lax.cond(jnp.isnan(first) & jnp.isinf(first), never, function, *operands)

    return by_platform(*operands, cpu=in_branch, accelerator=function)

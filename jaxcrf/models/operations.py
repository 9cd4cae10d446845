"""Floating-point operations of a program, counted before it is compiled.

Compilers count too, but XLA's count for CPUs knows nothing of its own convolutions and takes a loop for one iteration.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core


class Operations(NamedTuple):
    """What `count_operations` found.

    Attributes:
        flops: a multiplication and an addition are two.
        is_lower_bound: whether there is a loop that ends when something is reached; one of its iterations is counted.
    """

    flops: int
    is_lower_bound: bool


def count_operations(program: core.ClosedJaxpr | core.Jaxpr) -> Operations:
    r"""Counts the operations of convolutions, matrix products, factorisations and triangular solves.

    A convolution takes `2 · outputs · (taps · inputs per group)`, pixels of the padding included but not the zeros that
    a transposed one puts between pixels; a product of `m × k` and `k × n` takes `2 m k n`; Cholesky's factorisation of
    `n × n` takes `n³/3`, an LU `2n³/3`, a solve with a triangle `n²` for every right side. All else, that is whatever
    goes element by element, counts for nothing. Loops count as often as they run, of branches the dearest one counts,
    and what runs on several devices counts for one of them.

    Args:
        program: as `jax.make_jaxpr` returns it.

    Returns:
        The operations, and whether there may be more.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> count_operations(jax.make_jaxpr(lambda a, b: jnp.tanh(a @ b))(jnp.ones((3, 4)), jnp.ones((4, 5))))
        Operations(flops=120, is_lower_bound=False)
    """
    total, open_ended = 0.0, False
    for equation in getattr(program, "jaxpr", program).eqns:
        primitive, params = equation.primitive.name, equation.params
        found = [count_operations(inner) for inner in _inner_programs(primitive, params)]
        if primitive == "cond":
            found = [max(found, key=lambda operations: operations.flops)]
        repetitions = params["length"] if primitive == "scan" else 1
        total += repetitions * sum(operations.flops for operations in found)
        open_ended |= primitive == "while" or any(operations.is_lower_bound for operations in found)
        if primitive in _COUNTS:
            total += _COUNTS[primitive](equation)
    return Operations(round(total), open_ended)


def _inner_programs(primitive: str, params: dict[str, Any]) -> list[Any]:
    if primitive == "custom_linear_solve":
        # Beside it lie the solve of the transposed system and products with the matrix, for derivatives.
        return [params["jaxprs"].solve]
    found: list[Any] = []
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else [value]:
            if isinstance(entry, core.ClosedJaxpr | core.Jaxpr):
                found.append(entry)
    return found


def _convolution(equation: Any) -> float:
    params = equation.params
    kernel, out = params["dimension_numbers"].rhs_spec, params["dimension_numbers"].out_spec
    kernel_shape, out_shape = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    pairs = 1
    for axis in range(len(params["window_strides"])):
        places = params["window_strides"][axis] * np.arange(out_shape[out[2 + axis]])
        taps = params["rhs_dilation"][axis] * np.arange(kernel_shape[kernel[2 + axis]])
        looked_at = places[:, None] + taps - params["padding"][axis][0]
        pairs *= int(np.count_nonzero(looked_at % params["lhs_dilation"][axis] == 0))
    return 2 * pairs * out_shape[out[0]] * out_shape[out[1]] * kernel_shape[kernel[1]]


def _matrix_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _factorisation(share: float) -> Callable[[Any], float]:
    def count(equation: Any) -> float:
        *batch, rows, columns = equation.invars[0].aval.shape
        return share * math.prod(batch) * rows * columns * min(rows, columns)

    return count


def _triangular_solve(equation: Any) -> float:
    side = equation.invars[0].aval.shape[-1]
    return side * math.prod(equation.invars[1].aval.shape)


_COUNTS: dict[str, Callable[[Any], float]] = {
    "conv_general_dilated": _convolution,
    "dot_general": _matrix_product,
    "cholesky": _factorisation(1 / 3),
    "lu": _factorisation(2 / 3),
    "triangular_solve": _triangular_solve,
}

"""Factorisations of batches of small matrices, safe on CPUs.

XLA's CPU runs independent operations side by side, each on a thread of a pool, and there jaxlib hands the matrices of a
batch to that same pool and waits for them. Two batches at a time on two cores then wait for ever: nobody is left to do
the work (jaxlib 0.10). So on CPUs the matrices of a batch are taken one after the other; LAPACK uses all cores for
each that is large.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxcrf_kernels._platform import by_platform


def cholesky(matrix: Float[Array, "*batch n n"]) -> Array:
    """The lower factor, NaN where a matrix is not definite; only the lower triangle is read.

    Example:
        >>> float(cholesky(jnp.full((3, 1, 1), 4.0))[1, 0, 0])
        2.0
    """
    return _by_matrix(lambda m: lax.linalg.cholesky(m, symmetrize_input=False), matrix)


def lu(matrix: Float[Array, "*batch n n"]) -> tuple[Array, Array]:
    """The packed factors, and the rows in the order of the pivots.

    Example:
        >>> lu(jnp.asarray([[[0.0, 1.0], [2.0, 3.0]]]))[1]
        Array([[1, 0]], dtype=int32)
    """

    def factorise(matrix: Array) -> tuple[Array, Array]:
        factors, _, permutation = lax.linalg.lu(matrix)
        return factors, permutation

    return _by_matrix(factorise, matrix)


def triangular_solve(
    matrix: Float[Array, "*batch n n"], b: Float[Array, "*batch n columns"], **options: Any
) -> Float[Array, "*batch n columns"]:
    """`T⁻¹ b` of triangular matrices, with the options of `jax.lax.linalg.triangular_solve`.

    Example:
        >>> triangular_solve(jnp.full((2, 1, 1), 4.0), jnp.full((2, 1, 1), 8.0), lower=True)[1, 0, 0].item()
        2.0
    """

    def solve(matrix: Array, b: Array) -> Array:
        return lax.linalg.triangular_solve(matrix, b, left_side=True, **options)

    return _by_matrix(solve, matrix, b)


def eigvalsh(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n"]:
    """The eigenvalues of symmetric matrices, in ascending order.

    Example:
        >>> eigvalsh(jnp.asarray([[[2.0, 0.0], [0.0, 1.0]]]))
        Array([[1., 2.]], dtype=float32)
    """
    return _by_matrix(jnp.linalg.eigvalsh, matrix)


def _by_matrix(function: Callable[..., Any], *operands: Array) -> Any:
    """Calls it for a batch of matrices, on CPUs for one after the other."""
    batch = operands[0].shape[:-2]
    if math.prod(batch) == 1:
        found = function(*(a.reshape(a.shape[-2:]) for a in operands))
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape), found)

    def one_by_one(*operands: Array) -> Any:
        flat = tuple(a.reshape(-1, *a.shape[-2:]) for a in operands)
        found = lax.map(lambda each: function(*each), flat)
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), found)

    return by_platform(*operands, cpu=one_by_one, accelerator=function)

"""Factorisations of small symmetric matrices, definite or not, and of block tridiagonal ones."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxcrf import _linalg
from jaxcrf.filters.gram import PRECISION
from jaxcrf_kernels._varying import varying_like


class Factor(NamedTuple):
    """A factorisation of a batch of small symmetric matrices.

    Attributes:
        matrix: Cholesky's lower factors where all matrices are definite; otherwise the packed factors of LU.
        permutation: the pivots of LU, as a permutation of the rows.
        definite: whether a matrix is, one of each.
    """

    matrix: Float[Array, "*batch n n"]
    permutation: Int[Array, "*batch n"]
    definite: Bool[Array, "*batch"]

    def solve(self, t: Array) -> Array:
        """`M⁻¹ t`, `[*batch, n, columns]`; the batch broadcasts."""
        batch = jnp.broadcast_shapes(t.shape[:-2], self.definite.shape)
        t = jnp.broadcast_to(t, (*batch, *t.shape[-2:]))
        matrix = jnp.broadcast_to(self.matrix, (*batch, *self.matrix.shape[-2:]))
        permutation = jnp.broadcast_to(self.permutation, (*batch, self.permutation.shape[-1]))

        def by_cholesky() -> Array:
            y = _linalg.triangular_solve(matrix, t, lower=True)
            return _linalg.triangular_solve(matrix, y, lower=True, transpose_a=True)

        def by_lu() -> Array:
            y = jnp.take_along_axis(t, permutation[..., None], axis=-2)
            y = _linalg.triangular_solve(matrix, y, lower=True, unit_diagonal=True)
            return _linalg.triangular_solve(matrix, y, lower=False)

        return lax.cond(self.definite.all(), by_cholesky, by_lu)


def factorise(matrix: Float[Array, "*batch n n"]) -> Factor:
    """By Cholesky; where that fails, by LU with pivots."""
    lower = _linalg.cholesky(matrix)
    definite = jnp.isfinite(jnp.diagonal(lower, axis1=-2, axis2=-1)).all(-1)
    order = jnp.broadcast_to(jnp.arange(matrix.shape[-1], dtype=jnp.int32), matrix.shape[:-1])
    order = varying_like(order, matrix)

    def by_lu() -> tuple[Array, Array]:
        return _linalg.lu(matrix)

    factors, permutation = lax.cond(definite.all(), lambda: (lower, order), by_lu)
    return Factor(factors, permutation, definite)


class BlockFactor(NamedTuple):
    r"""A factorisation of symmetric block tridiagonal matrices.

    With blocks `D_k` on the diagonal and `E_k` below it, left of `D_k`, the pivots are
    `S_k = D_k - E_k S_{k-1}^{-1} E_kᵀ`; the matrix is definite if and only if all of them are.

    Attributes:
        pivots: the factors of all `S_k`, `[blocks, *batch, …]`.
        above: `U_k = S_k⁻¹ E_{k+1}ᵀ`, `[blocks, *batch, n, n]`, the last of them zero.
    """

    pivots: Factor
    above: Float[Array, "blocks *batch n n"]

    @property
    def definite(self) -> Bool[Array, "*batch"]:
        """Whether a matrix is, one of each."""
        return self.pivots.definite.all(0)

    def solve(self, b: Float[Array, "blocks *batch n columns"]) -> Array:
        """`A⁻¹ b`."""

        def eliminate(y: Array, operands: tuple[Array, Array]) -> tuple[Array, Array]:
            u, b = operands
            y = b - jnp.einsum("...ij,...ic->...jc", u, y, precision=PRECISION)
            return y, y

        # One block at a time, because each has been factorised in a way of its own.
        def substitute(x: Array, operands: tuple[Factor, Array, Array]) -> tuple[Array, Array]:
            pivot, u, y = operands
            x = pivot.solve(y) - jnp.einsum("...ij,...jc->...ic", u, x, precision=PRECISION)
            return x, x

        b, above = varying_like((b, self.above), (b, self.above))
        first = jnp.zeros_like(b[0])
        _, y = lax.scan(eliminate, first, (jnp.roll(above, 1, axis=0), b))
        _, x = lax.scan(substitute, first, (self.pivots, above, y), reverse=True)
        return x

    def inverse_diagonal(self) -> Float[Array, "blocks *batch n"]:
        """The diagonal of `A⁻¹`, by `(A⁻¹)_kk = S_k⁻¹ + U_k (A⁻¹)_{k+1,k+1} U_kᵀ`."""
        eye = jnp.eye(self.above.shape[-1], dtype=self.above.dtype)

        def step(following: Array, operands: tuple[Factor, Array]) -> tuple[Array, Array]:
            pivot, u = operands
            spread = jnp.einsum("...ij,...jk->...ik", u, following, precision=PRECISION)
            block = pivot.solve(jnp.broadcast_to(eye, u.shape)) + jnp.einsum(
                "...ik,...jk->...ij", spread, u, precision=PRECISION
            )
            return block, jnp.diagonal(block, axis1=-2, axis2=-1)

        _, diagonals = lax.scan(step, jnp.zeros_like(self.above[0]), (self.pivots, self.above), reverse=True)
        return diagonals


def factorise_blocks(
    diagonal: Float[Array, "blocks *batch n n"], below: Float[Array, "blocks *batch n n"]
) -> BlockFactor:
    """Factorises symmetric block tridiagonal matrices in `O(blocks n³)`.

    Args:
        diagonal: the blocks `D_k`.
        below: the blocks `E_k`, in rows `k` and columns `k - 1`; the first is not used.

    Returns:
        The factorisation, of indefinite matrices as well unless a pivot is singular.
    """
    coupling = jnp.roll(jnp.swapaxes(below, -1, -2), -1, axis=0)  # E_{k+1}ᵀ
    coupling = coupling.at[-1].set(0)

    def step(before: Array, operands: tuple[Array, Array]) -> tuple[Array, tuple[Factor, Array]]:
        d, following = operands
        pivot = factorise(d - before)
        u = pivot.solve(following)
        return jnp.einsum("...ji,...jk->...ik", following, u, precision=PRECISION), (pivot, u)

    diagonal, coupling = varying_like((diagonal, coupling), (diagonal, coupling))
    _, (pivots, above) = lax.scan(step, jnp.zeros_like(diagonal[0]), (diagonal, coupling))
    return BlockFactor(pivots, above)


def relative_norm(r: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """`‖r‖ / ‖b‖`, of numbers whose squares may leave the floating-point range."""
    scale = jnp.max(jnp.abs(b), axis=axes, keepdims=True)
    scale = jnp.where((scale > 0) & (scale < jnp.inf), scale, 1)
    size = jnp.sqrt(jnp.sum((b / scale) ** 2, axis=axes))
    return jnp.sqrt(jnp.sum((r / scale) ** 2, axis=axes)) / jnp.where(size > 0, size, 1)

"""Gaussian CRFs on the edges of a grid, solved exactly or iteratively and differentiated implicitly."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.filters.grid import OFFSETS, Connectivity, EdgeKind, Grid, PixelGrid, PixelLabelGrid, edges_inside
from jaxcrf.inference.conjugate_gradient import check_max_iterations
from jaxcrf.inference.factorization import BlockFactor, factorise_blocks, relative_norm
from jaxcrf.inference.gaussian_crf import (
    DEFINITE_SHARE,
    GaussianCRFResult,
    GaussianCRFStats,
    Solver,
    apply_system,
    check_system,
    extreme_eigenvalues,
    potts_extremes,
    solve_iteratively,
)
from jaxcrf_kernels._varying import varying_like

EdgeScaling = Literal["diagonally-dominant"]

# A grid's spectrum is a continuum, whose ends so many Lanczos iterations find to about a hundredth of its width on an
# image of any size, and to all digits on a grid of 11 × 11.
LANCZOS_ITERATIONS = 48

# The default limit of conjugate gradients. A condition number of 10⁵ takes some 2000; beyond it float32 is the limit.
MAX_ITERATIONS = 5000

# Up to so many unknowns of a block "auto" factorises: there it takes no longer than some ten to thirty iterations.
DIRECT_BLOCK = 64


def sparse_gaussian_crf(
    edges: Float[Array, "*batch_and_edges"],
    unary: Float[Array, "*batch height width labels"],
    *,
    kind: EdgeKind,
    regularization: Any,
    connectivity: Connectivity = 4,
    solver: Solver = "auto",
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    edge_scaling: EdgeScaling | None = None,
    centered: bool = False,
    variances: bool = False,
) -> GaussianCRFResult:
    r"""The most probable scores of a Gaussian CRF whose pairwise terms join neighbouring pixels.

    With `p(x) ∝ exp(-½ xᵀ(K + λI)x + bᵀx)` they solve `(K + λI) x = b`. The pairwise terms of every edge `(i, j)`
    of a 4-, 8- or 12-connected grid are, "general", a matrix for all pairs of labels, and "potts", one number for
    all pairs of different labels,

    .. math::
        K_{(i,l),(j,l')} = W_{ij}(l, l') , \qquad\qquad K_{(i,l),(j,l')} = w_{ij}\, [l \ne l'] .

    A positive number keeps the two scores from being large together, so that a positive Potts weight makes
    neighbours agree.

    "cg" iterates with products in `O(N E labels)` (Potts) or `O(N E labels²)`. "direct" orders the unknowns line by
    line along the shorter side of the image, which makes the matrix block tridiagonal, and factorises it exactly in
    `O(N n²)`; the Potts kind once for the mean over the labels and once for the deviations from it. A block has
    `n` unknowns: one line of pixels, or two with 12 neighbours, times the labels for the general kind.

    A Potts-type system falls apart into the mean over the labels, with `λ + (L-1) s` for every eigenvalue `s` of the
    weights, and the deviations from it, with `λ - s`. Grids have eigenvalues of both signs, so that many labels
    allow weak edges only. But a soft-max does not see the mean: `centered=True` leaves it to the unary,

    .. math::
        K_{(i,l),(j,l')} = w_{ij} \bigl(\tfrac1L - [l = l']\bigr) ,

    with the same deviations, the same probabilities, and `λ > s_max` all that it takes.

    The system is definite if `λ` exceeds the sum of the absolute pairwise terms of every unknown, which
    `edge_scaling` sees to. Otherwise it need not be, and there may be no most probable `x`: "direct" then still
    solves the linear system, "cg" fails, and `stats.definite` says so.

    Differentiable to any order, forward and reverse, in edges, unary and `regularization`; a gradient costs one
    more solve, with the same factorisation. Scores of a dense Gaussian CRF as `unary` stack the two models:
    dense terms first, then a clean-up along edges.

    Args:
        edges: "potts": `[*batch, height, width, E]`; "general": `[*batch, height, width, E, labels, labels]`, rows
            for the pixel that the edge starts from. `E = connectivity / 2`, in the order right, down, down-right,
            down-left, two to the right, two down. Edges that leave the image are ignored.
        unary: `b`, `[*batch, height, width, labels]`; batch axes broadcast.
        kind: "general" or "potts".
        regularization: `λ > 0`, one number.
        connectivity: 4, 8 or 12 neighbours.
        solver: "auto" takes "direct" where a block has at most 64 unknowns or variances are wanted, otherwise "cg".
        tolerance: the relative residual at which "cg" stops and that `stats.converged` refers to.
        max_iterations: of "cg", at most; None for 5000.
        edge_scaling: None leaves the edges as they are. "diagonally-dominant" weakens the edges of those pixels
            (and labels) whose absolute pairwise terms sum to more than `0.95 λ`, each by the factor that the needier of
            its two ends asks for. Centered, Potts-type weights themselves may sum to that.
        centered: of the Potts kind, lets pairwise terms act on deviations from the mean over the labels only.
        variances: also compute the marginal variances, the diagonal of `(K + λI)⁻¹`, exactly, from the
            factorisation; for "direct" only. NaN where the system is not definite.

    Returns:
        `GaussianCRFResult(scores, stats, variances)`.

    Raises:
        ValueError: if shapes disagree, `regularization` is not greater than zero, concrete arrays hold NaN, or an
            option is unknown.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> unary = jnp.array([[[1.0, 0.0], [0.1, 0.2], [1.0, 0.0]]])  # a doubtful pixel between two sure ones
        >>> edges = jnp.full((1, 3, 2), 0.4)
        >>> result = jaxcrf.sparse_gaussian_crf(edges, unary, kind="potts", regularization=1.0)
        >>> result.scores.argmax(-1), bool(result.stats.definite)
        (Array([[0, 0, 0]], dtype=int32), True)

    Dense, then sparse:

        >>> dense = jaxcrf.gaussian_crf(jnp.ones((1, 3, 2)), unary, kind="potts", regularization=9.0)
        >>> jaxcrf.sparse_gaussian_crf(edges, dense.scores, kind="potts", regularization=1.0).scores.shape
        (1, 3, 2)

    References:
        Chandra and Kokkinos, Fast, Exact and Multi-Scale Inference for Semantic Image Segmentation with Deep
        Gaussian CRFs, 2016; Chandra, Usunier and Kokkinos, Dense and Low-Rank Gaussian CRFs Using Deep
        Embeddings, 2017, tables 2 and 3 ("sparse", "densepotts+sparsepotts").
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver: got {solver!r}; expected one of {', '.join(get_args(Solver))}")
    if edge_scaling is not None and edge_scaling not in get_args(EdgeScaling):
        raise ValueError(f"edge_scaling: got {edge_scaling!r}; expected {get_args(EdgeScaling)[0]!r} or None")
    if variances and solver == "cg":
        raise ValueError("variances: solver='cg' cannot give them; pass solver='direct' or 'auto'")
    if centered and kind == "general":
        raise ValueError("centered: kind='general' has terms of its own for all pairs of labels; pass False")
    grid: Any = Grid(edges, connectivity=connectivity, kind=kind)
    b = check_system(grid, unary, regularization, tolerance)
    dtype = jnp.promote_types(b.dtype, grid.edges.dtype)
    grid, b = jax.tree.map(lambda a: a.astype(dtype), (grid, b))
    _checks.check_finite("edges", grid.edges)
    if solver == "auto":
        solver = "direct" if variances or block_size(grid) <= DIRECT_BLOCK else "cg"
    return _sparse_gaussian_crf(
        grid,
        b,
        jnp.asarray(regularization, b.dtype),
        jnp.asarray(tolerance, b.dtype),
        solver=solver,
        max_iterations=check_max_iterations(max_iterations, MAX_ITERATIONS),
        edge_scaling=edge_scaling,
        centered=bool(centered),
        variances=bool(variances),
    )


def block_size(grid: PixelGrid | PixelLabelGrid) -> int:
    """How many unknowns the blocks of the direct solver have."""
    order = _Order.of(grid.spatial, grid.connectivity)
    return order.size if grid.kind == "potts" else order.size * grid.num_labels  # type: ignore[union-attr]


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(
    jax.jit, static_argnames=("solver", "max_iterations", "edge_scaling", "centered", "variances")
)
def _sparse_gaussian_crf(
    grid: PixelGrid | PixelLabelGrid,
    b: Array,
    regularization: Array,
    tolerance: Array,
    *,
    solver: str,
    max_iterations: int,
    edge_scaling: str | None,
    centered: bool,
    variances: bool,
) -> GaussianCRFResult:
    everything = (grid, b, regularization, tolerance)
    grid, b, regularization, tolerance = varying_like(everything, everything)
    if edge_scaling is not None:
        grid = _dominated(grid, regularization, 2 if centered else b.shape[-1])
    if solver == "direct":
        return _solve_directly(grid, b, regularization, tolerance, centered, variances)
    x, stats = solve_iteratively(
        grid,
        b,
        regularization,
        tolerance=tolerance,
        max_iterations=max_iterations,
        lanczos_iterations=LANCZOS_ITERATIONS,
        centered=centered,
    )
    return GaussianCRFResult(x, stats)


def _dominated(grid: Any, regularization: Array, num_labels: int) -> Any:
    """Edges whose absolute pairwise terms sum to at most `DEFINITE_SHARE` of `λ`, whatever unknown they belong to."""
    most = DEFINITE_SHARE * regularization / (1 if grid.kind == "general" else max(1, num_labels - 1))
    degrees = grid.degrees()
    share = jnp.where(degrees > most, most / jnp.where(degrees > 0, degrees, 1), 1)
    height, width = grid.spatial
    if grid.kind == "potts":
        share = share[..., None]
    # Beyond the border lies no edge that counts.
    padded = jnp.pad(share, [(0, 0)] * (share.ndim - 3) + [(2, 2)] * 2 + [(0, 0)], constant_values=1)

    def at(dy: int, dx: int) -> Array:
        return padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width, :]

    ends = [at(*offset) for offset in OFFSETS[: grid.connectivity // 2]]
    if grid.kind == "potts":
        scale = jnp.minimum(share, jnp.concatenate(ends, -1))
    else:
        scale = jnp.minimum(share[..., None, :, None], jnp.stack(ends, -2)[..., None, :])
    return Grid(grid.edges * scale, connectivity=grid.connectivity, kind=grid.kind)


class _Order(NamedTuple):
    """The order of pixels that makes the matrix of a grid block tridiagonal: lines along the shorter side.

    Attributes:
        transposed: whether lines are columns of the image.
        lines: how many lines a block has, as many as an edge may cross.
        blocks: how many blocks there are; the last may be filled up.
        size: pixels of a block.
    """

    transposed: bool
    lines: int
    blocks: int
    size: int

    @classmethod
    def of(cls, spatial: tuple[int, ...], connectivity: int) -> "_Order":
        height, width = spatial
        lines = 2 if connectivity == 12 else 1
        short, long = min(spatial), max(spatial)
        return cls(height < width, lines, -(-long // lines), lines * short)

    def arrange(self, x: Array) -> Array:
        """`[*batch, height, width, c]` to `[blocks, *batch, size, c]`, filled up with zeros."""
        if self.transposed:
            x = jnp.swapaxes(x, -3, -2)
        missing = self.blocks * self.lines - x.shape[-3]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)])
        x = x.reshape(*x.shape[:-3], self.blocks, self.size, x.shape[-1])
        return jnp.moveaxis(x, -3, 0)

    def restore(self, x: Array, spatial: tuple[int, ...]) -> Array:
        """The way back."""
        long, short = spatial[::-1] if self.transposed else spatial
        x = jnp.moveaxis(x, 0, -3)
        x = x.reshape(*x.shape[:-3], self.blocks * self.lines, short, x.shape[-1])[..., :long, :, :]
        return jnp.swapaxes(x, -3, -2) if self.transposed else x

    def ends(self, spatial: tuple[int, ...], connectivity: int) -> tuple[np.ndarray, ...]:
        """Where the edges of an image go: `y, x, e` and, of start and end, block and place in it."""
        y, x, e = np.nonzero(edges_inside(spatial, connectivity))
        steps = np.array(OFFSETS)[e]
        places = []
        for pixel in ((y, x), (y + steps[:, 0], x + steps[:, 1])):
            line, place = pixel[::-1] if self.transposed else pixel
            places += [line // self.lines, (line % self.lines) * min(spatial) + place]
        return y, x, e, *places


def _blocks(grid: Any) -> tuple[Array, Array]:
    """`K` (general) or the weights (Potts) as blocks on and below the diagonal, `[blocks, *batch, n, n]`."""
    order = _Order.of(grid.spatial, grid.connectivity)
    y, x, e, *ends = order.ends(grid.spatial, grid.connectivity)
    tail = () if grid.kind == "potts" else (grid.num_labels,) * 2
    weights = grid.edges if grid.kind == "general" else grid.edges[..., None, None]
    weights = weights[..., y, x, e, :, :]
    flipped = jnp.swapaxes(weights, -1, -2)
    block, place, other_block, other_place = ends
    empty = jnp.zeros(
        (*weights.shape[:-3], order.blocks, order.size, order.size, *weights.shape[-2:]), weights.dtype
    )
    empty = varying_like(empty, weights)
    same = block == other_block
    later = block > other_block  # an edge that starts behind its end, as seen in this order
    diagonal = empty.at[..., block[same], place[same], other_place[same], :, :].add(weights[..., same, :, :])
    diagonal = diagonal.at[..., block[same], other_place[same], place[same], :, :].add(
        flipped[..., same, :, :]
    )
    ahead = ~same & ~later
    below = empty.at[..., other_block[ahead], other_place[ahead], place[ahead], :, :].add(
        flipped[..., ahead, :, :]
    )
    below = below.at[..., block[later], place[later], other_place[later], :, :].add(weights[..., later, :, :])

    def square(a: Array) -> Array:
        a = jnp.swapaxes(a, -3, -2)  # [..., place, label, place, label]
        n = order.size * (tail[0] if tail else 1)
        return jnp.moveaxis(a.reshape(*a.shape[:-4], n, n), -3, 0)

    return square(diagonal), square(below)


class _Factors(NamedTuple):
    """The factorisations of a system: of everything, or of a Potts-type system's mean and deviations.

    None stands for `λI`: of the deviations of one label, and of the mean of centered terms.
    """

    mean: BlockFactor | None
    deviation: BlockFactor | None

    @property
    def definite(self) -> Array:
        found = [factor.definite for factor in self if factor is not None]
        return functools.reduce(jnp.logical_and, found, jnp.ones((), bool))


def _factorise(grid: Any, regularization: Array, num_labels: int, centered: bool) -> _Factors:
    diagonal, below = _blocks(grid)
    ridge = regularization * jnp.eye(diagonal.shape[-1], dtype=diagonal.dtype)

    def factor(c: int) -> BlockFactor:
        return factorise_blocks(ridge + c * diagonal, c * below)

    if grid.kind == "general":
        return _Factors(factor(1), None)
    several = num_labels > 1
    mean = factor(num_labels - 1) if several and not centered else None
    return _Factors(mean, factor(-1) if several else None)


def _solve_directly(
    grid: Any, b: Array, regularization: Array, tolerance: Array, centered: bool, variances: bool
) -> GaussianCRFResult:
    """Solves by block elimination; the factorisation also serves the backward pass."""
    num_labels = b.shape[-1]
    order = _Order.of(grid.spatial, grid.connectivity)
    still, lam, tolerance = lax.stop_gradient((grid, regularization, tolerance))
    factors = _factorise(still, lam, num_labels, centered)
    axes = (-3, -2, -1)

    def solve_with(factor: BlockFactor | None, rhs: Array) -> Array:
        if factor is None:
            return rhs / lam
        return order.restore(factor.solve(order.arrange(rhs)), grid.spatial)

    def once(rhs: Array) -> Array:
        if grid.kind == "general":
            arranged = order.arrange(rhs)
            columns = arranged.reshape(*arranged.shape[:-2], -1, 1)
            return order.restore(factors.mean.solve(columns).reshape(arranged.shape), grid.spatial)  # type: ignore[union-attr]
        mean = rhs.mean(-1, keepdims=True)
        return solve_with(factors.mean, mean) + solve_with(factors.deviation, rhs - mean)

    def solve(matvec: Callable[[Array], Array], rhs: Array) -> tuple[Array, Array]:
        x = once(rhs)
        # What float32 loses in the elimination, one step of refinement brings back.
        x = x + once(rhs - matvec(x))
        return x, relative_norm(rhs - matvec(x), rhs, axes)

    def matvec(x: Array) -> Array:
        return apply_system(grid, regularization, x, centered=centered)

    x, residual = lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)

    shape = (*still.batch, *still.spatial, 1 if grid.kind == "potts" else num_labels)
    low, top = (
        jnp.broadcast_to(s, residual.shape)
        for s in extreme_eigenvalues(still, shape, 3, b.dtype, steps=LANCZOS_ITERATIONS)
    )
    if grid.kind == "general":
        smallest, largest = lam + low, lam + top
    else:
        smallest, largest = potts_extremes(lam, low, top, num_labels, centered)
    definite = jnp.broadcast_to(factors.definite & (lam > 0), residual.shape) & ~(smallest <= 0)
    stats = GaussianCRFStats(
        iterations=jnp.zeros(residual.shape, jnp.int32),
        residual=residual,
        converged=residual <= tolerance,
        definite=definite,
        largest_eigenvalue=top,
        condition=jnp.where(definite, largest / jnp.where(definite, smallest, 1), jnp.inf),
    )
    if not variances:
        return GaussianCRFResult(x, stats)
    return GaussianCRFResult(x, stats, _variances(grid, regularization, definite, b.shape, centered))


def _variances(
    grid: Any, regularization: Array, definite: Array, shape: tuple[int, ...], centered: bool
) -> Array:
    """The diagonal of `(K + λI)⁻¹`; of a Potts-type system that of the mean and of the deviations, weighted."""
    num_labels = shape[-1]
    order = _Order.of(grid.spatial, grid.connectivity)
    factors = _factorise(grid, regularization, num_labels, centered)
    columns = num_labels if grid.kind == "general" else 1

    def diagonal(factor: BlockFactor | None) -> Array:
        if factor is None:
            return jnp.broadcast_to(1 / regularization, (*shape[:-1], 1))
        found = factor.inverse_diagonal()
        return order.restore(found.reshape(*found.shape[:-1], -1, columns), grid.spatial)

    total = diagonal(factors.mean)
    if grid.kind == "potts":
        share = 1 / num_labels
        total = share * total + (1 - share) * diagonal(factors.deviation)
    return jnp.where(definite[..., None, None, None], jnp.broadcast_to(total, shape), jnp.nan)

"""Gaussian CRFs: inference is one linear solve, exact and differentiated implicitly."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxcrf import _checks, _linalg
from jaxcrf.filters import Filter, LinearOperator
from jaxcrf.filters.gram import PRECISION, EmbeddingKind, Gram, PixelGram, PixelLabelGram
from jaxcrf.inference.conjugate_gradient import (
    ConjugateGradientStats,
    Lanczos,
    check_max_iterations,
    iterate,
)
from jaxcrf.inference.factorization import Factor, factorise, relative_norm
from jaxcrf_kernels._varying import varying_like

Solver = Literal["auto", "cg", "direct"]
EmbeddingScaling = Literal["unit-ball", "spectral"]

# What embedding scaling leaves of λ to the largest eigenvalue of ÂᵀÂ, so that a Potts-type system is definite
# and its condition number at most (1 + 0.95 (L - 1)) / 0.05.
DEFINITE_SHARE = 0.95

# ‖G‖ <= ‖G⁸‖_F^(1/8) is at most D^(1/16) too large: 1.35 for D = 128.
SQUARINGS = 3

# From a random start, so many steps find the largest eigenvalue to about the square of what as many power iterations
# leave: to all digits unless a continuum of eigenvalues lies next to it.
LANCZOS_ITERATIONS = 20

# Exact arithmetic takes one iteration per distinct eigenvalue, of which a rank-D operator has D + 1.
ITERATIONS_PER_EIGENVALUE = 10


class GaussianCRFStats(NamedTuple):
    """How the solve of every image of the batch went.

    Attributes:
        iterations: of conjugate gradients; 0 for the direct solver.
        residual: `‖b - A x‖ / ‖b‖` of the returned scores.
        converged: whether the residual is at most the tolerance. Large condition numbers keep float32 from it.
        definite: whether the system is positive definite, so that the scores are the most probable ones. The direct
            solver knows from its factorisation; "cg" from `λ > s_max` and from every step it has made. If not, the
            direct solver's scores are still the solution of the linear system, and those of "cg" are not.
        largest_eigenvalue: `s_max`, of the affinities `AᵀA` or `ÂᵀÂ`, or of the weights of a grid's edges, estimated
            from below by Lanczos iterations.
        condition: the condition number of the system that follows from it and, for grids, from the smallest
            eigenvalue; with embeddings `(λ + s_max) / λ` or `(λ + (L - 1) s_max) / (λ - s_max)`. Infinite if the
            system is not definite. In float32, scores have about
            `1e-7 * condition` of relative error in the worst case.
    """

    iterations: Int[Array, "*batch"]
    residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    definite: Bool[Array, "*batch"]
    largest_eigenvalue: Float[Array, "*batch"]
    condition: Float[Array, "*batch"]


class GaussianCRFResult(NamedTuple):
    """Scores and how they were found.

    Attributes:
        scores: `x`, `[*batch, height, width, labels]`; a soft-max makes probabilities of them.
        stats: see `GaussianCRFStats`.
        variances: the marginal variances of the scores, likewise, where they were asked for.
    """

    scores: Float[Array, "*batch height width labels"]
    stats: GaussianCRFStats
    variances: Float[Array, "*batch height width labels"] | None = None


def gaussian_crf(
    embeddings: Float[Array, "*batch_and_spatial d"],
    unary: Float[Array, "*batch height width labels"],
    *,
    kind: EmbeddingKind,
    regularization: Any,
    solver: Solver = "auto",
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    embedding_scaling: EmbeddingScaling | None = None,
    variances: bool = False,
    spatial_ndim: int = 2,
) -> GaussianCRFResult:
    r"""The most probable scores of a dense Gaussian CRF whose pairwise terms are inner products of embeddings.

    With `p(x) ∝ exp(-½ xᵀ(K + λI)x + bᵀx)` they solve `(K + λI) x = b`, a system over all pixels and labels. Its
    pairwise terms are, for "general" embeddings of every pixel and label and for "potts" embeddings of every
    pixel, shared by all pairs of different labels,

    .. math::
        K = A^\top A , \qquad\qquad
        K = (\mathbf 1 \mathbf 1^\top - I)_{\text{labels}} \otimes \hat A^\top \hat A .

    Nothing of the size of `K` is ever made. "cg" iterates with products (eq. 13, 15, 16); "direct" factorises the
    small `D × D` matrix instead,

    .. math::
        x = \tfrac1\lambda \bigl(b - A^\top y\bigr) , \qquad y = A x = (\lambda I + A A^\top)^{-1} A b ,

    and for Potts embeddings does so for the mean over the labels, with `λ + (L-1) s` for every eigenvalue `s` of
    `ÂᵀÂ`, and for the deviations from it, with `λ - s`.

    The general system is definite for every `λ > 0`; the Potts one only if `λ > s_max` (or if there is one label).
    Otherwise there is no most probable `x`: "direct" then solves the indefinite system by LU, "cg" fails, and
    `stats.definite` says so. `embedding_scaling` makes it definite whatever the embeddings are.

    Differentiable to any order, forward and reverse, in embeddings, unary and `regularization`: with
    `g = (K + λI)⁻¹ ∂L/∂x`, which is one more solve with the same factorisation,

    .. math::
        \frac{\partial L}{\partial b} = g , \qquad
        \frac{\partial L}{\partial A} = -(A g)\, x^\top - (A x)\, g^\top , \qquad
        \frac{\partial L}{\partial \lambda} = -g^\top x .

    Memory is `O(N D)` in both directions.

    Args:
        embeddings: "general": `[*batch, height, width, labels, D]`; "potts": `[*batch, height, width, D]`.
        unary: `b`, `[*batch, height, width, labels]`; batch axes broadcast.
        kind: "general" or "potts".
        regularization: `λ > 0`, one number.
        solver: "auto" takes "direct" where embeddings have fewer numbers than there are embeddings, and always
            for Potts systems that might be indefinite; otherwise "cg".
        tolerance: the relative residual at which "cg" stops and that `stats.converged` refers to.
        max_iterations: of "cg", at most; None for `10 (D + 1)`.
        embedding_scaling: None leaves the embeddings as they are. "unit-ball" shortens those longer than one to
            one, and multiplies all by `√(0.95 λ / number of embeddings)`, so that `s_max <= 0.95 λ` however they
            lie. "spectral" multiplies the embeddings of an image by one number, at most one, so that a bound on
            `s_max` (the Schatten 16-norm of `A Aᵀ`) becomes at most `0.95 λ`: affinities are no weaker than needed.
        variances: also compute the marginal variances, the diagonal of `(K + λI)⁻¹`, exactly: about as much
            work as the factorisation. NaN where the system is not definite.
        spatial_ndim: 2 for images, 3 for volumes `[*batch, depth, height, width, …]`.

    Returns:
        `GaussianCRFResult(scores, stats, variances)`.

    Raises:
        ValueError: if shapes disagree, `regularization` is not greater than zero, concrete arrays hold NaN, or an
            option is unknown.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> embeddings = jnp.ones((1, 3, 1)).at[0, 2].set(0)  # the first two pixels belong together
        >>> unary = jnp.array([[[2.0, 0.0], [0.2, 0.3], [0.0, 1.0]]])
        >>> result = jaxcrf.gaussian_crf(embeddings, unary, kind="potts", regularization=3.0)
        >>> result.scores.argmax(-1), bool(result.stats.definite)  # the second pixel follows the first
        (Array([[0, 0, 1]], dtype=int32), True)

    References:
        Chandra, Usunier and Kokkinos, Dense and Low-Rank Gaussian CRFs Using Deep Embeddings, 2017: eq. 4, 5 and
        13 (general), 11, 12 and 14 to 16 (Potts type), 6 and 10 (gradients), algorithm 1. Its §3.3 does not say
        that Potts-type systems can be indefinite. Woodbury, 1950, for the direct solution.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver: got {solver!r}; expected one of {', '.join(get_args(Solver))}")
    if embedding_scaling is not None and embedding_scaling not in get_args(EmbeddingScaling):
        raise ValueError(
            f"embedding_scaling: got {embedding_scaling!r}; expected {' or '.join(get_args(EmbeddingScaling))}, or None"
        )
    affinities: Any = Gram(embeddings, kind=kind, spatial_ndim=spatial_ndim)
    b = check_system(affinities, unary, regularization, tolerance)
    dtype = jnp.promote_types(b.dtype, affinities.embeddings.dtype)
    affinities, b = jax.tree.map(lambda a: a.astype(dtype), (affinities, b))
    _checks.check_finite("embeddings", affinities.embeddings)
    if solver == "auto":
        solver = choose_solver(affinities, b.shape[-1], embedding_scaling)
    return _gaussian_crf(
        affinities,
        b,
        jnp.asarray(regularization, b.dtype),
        jnp.asarray(tolerance, b.dtype),
        solver=solver,
        max_iterations=check_max_iterations(
            max_iterations, ITERATIONS_PER_EIGENVALUE * (affinities.rank + 1)
        ),
        embedding_scaling=embedding_scaling,
        variances=bool(variances),
    )


def choose_solver(
    affinities: PixelGram | PixelLabelGram, num_labels: int, embedding_scaling: str | None
) -> Literal["cg", "direct"]:
    """What "auto" means: "direct", except for wide systems that are sure to be definite.

    The direct solver takes the time of some ten to twenty iterations, and no longer for ill-conditioned systems.
    """
    wide = affinities.rank > affinities.num_vectors
    definite = affinities.kind == "general" or num_labels == 1 or embedding_scaling is not None
    return "cg" if wide and definite else "direct"


def check_system(operator: LinearOperator, unary: Any, regularization: Any, tolerance: Any) -> Array:
    """Checks what all Gaussian CRFs take, and makes the unary an array of the operator's joint batch shape."""
    if np.ndim(regularization):
        raise ValueError(f"regularization: got shape {np.shape(regularization)}; expected one number > 0")
    if _checks.is_concrete(regularization) and not 0 < regularization < np.inf:
        raise ValueError(
            f"regularization: got {regularization}; expected λ > 0, which keeps the system from being singular"
        )
    if np.ndim(tolerance) or (_checks.is_concrete(tolerance) and not 0 <= tolerance < np.inf):
        raise ValueError(f"tolerance: got {tolerance}; expected a relative residual >= 0")
    b = operator.check(unary, "unary")
    _checks.check_finite("unary", b)
    return _checks.as_float(b)


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("solver", "max_iterations", "embedding_scaling", "variances"))
def _gaussian_crf(
    affinities: PixelGram | PixelLabelGram,
    b: Array,
    regularization: Array,
    tolerance: Array,
    *,
    solver: str,
    max_iterations: int,
    embedding_scaling: str | None,
    variances: bool,
) -> GaussianCRFResult:
    everything = (affinities, b, regularization, tolerance)
    affinities, b, regularization, tolerance = varying_like(everything, everything)
    affinities = _scale(affinities, regularization, embedding_scaling)
    dual = affinities.dual()  # if nothing needs it, the compiler leaves it out
    if solver == "direct":
        x, stats = _solve_directly(affinities, b, regularization, tolerance, dual)
    else:
        x, stats = solve_iteratively(
            affinities, b, regularization, tolerance=tolerance, max_iterations=max_iterations
        )
    return GaussianCRFResult(x, stats, _variances(affinities, b, regularization, dual) if variances else None)


def apply_system(operator: LinearOperator, regularization: Any, x: Array, *, centered: bool = False) -> Array:
    r"""`(K + λI) x`: the system of a Gaussian CRF, of any symmetric operator.

    A pixel filter stands for Potts-type pairwise terms, `x_k ↦ λ x_k + K Σ_l x_l - K x_k` (eq. 15 and 16); the
    labels are mixed between `K.restrict` and `K.prolong`, where maps are small. Centered, the sum over the labels is
    their mean. A pixel × label operator is the pairwise term itself (eq. 13).
    """
    if isinstance(operator, Filter):
        restricted = operator.convolve(operator.restrict(x))
        together = [(t.mean if centered else t.sum)(-1, keepdims=True) for t in restricted]
        pairwise = operator.prolong(tuple(s - t for s, t in zip(together, restricted, strict=True)))
    else:
        pairwise = operator.apply(x)
    return regularization * x + pairwise


def solve_iteratively(
    operator: LinearOperator,
    b: Array,
    regularization: Array,
    *,
    tolerance: Array,
    max_iterations: int,
    lanczos_iterations: int = LANCZOS_ITERATIONS,
    centered: bool = False,
) -> tuple[Array, GaussianCRFStats]:
    """Solves the system of `apply_system` by conjugate gradients, for any symmetric operator.

    Args:
        operator: pairwise terms, symmetric.
        b: `[*batch, *spatial, labels]`, of the joint batch shape.
        regularization: `λ`.
        tolerance: relative residual.
        max_iterations: at most.
        lanczos_iterations: for the extreme eigenvalues; of the filter of a Potts-type system these are extra
            products, of others those that the solution needs anyway.
        centered: as in `apply_system`.

    Returns:
        The solution, differentiable implicitly, and how it was found.
    """
    batch_ndim = b.ndim - 1 - len(operator.spatial)
    frozen = lax.stop_gradient(tolerance)

    def solve(matvec: Callable[[Array], Array], rhs: Array) -> tuple[Array, ConjugateGradientStats]:
        zero = jnp.zeros((), b.dtype)
        return iterate(
            matvec,
            rhs,
            None,
            frozen,
            zero,
            None,
            max_iterations=max_iterations,
            batch_ndim=batch_ndim,
            ritz_iterations=lanczos_iterations,
        )

    def matvec(x: Array) -> Array:
        return apply_system(operator, regularization, x, centered=centered)

    x, found = lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)
    still, lam = lax.stop_gradient((operator, regularization))
    if isinstance(still, Filter):
        # Only this can tell beforehand: the steps notice an indefinite system when they happen to look its way.
        low, top = (
            jnp.broadcast_to(s, found.residual.shape)
            for s in extreme_eigenvalues(
                still,
                (*still.batch, *still.spatial, 1),
                1 + len(still.spatial),
                b.dtype,
                steps=lanczos_iterations,
            )
        )
        smallest, largest = potts_extremes(lam, low, top, b.shape[-1], centered)
    else:
        seen = jnp.where(found.iterations > 0, found.smallest_eigenvalue, lam)
        low = lam if isinstance(still, PixelLabelGram) else seen
        smallest, largest = low, jnp.maximum(found.largest_eigenvalue, low)
        top = largest - lam
    definite = ~found.indefinite & (smallest > 0)
    stats = GaussianCRFStats(
        iterations=found.iterations,
        residual=found.residual,
        converged=found.converged & definite,
        definite=definite,
        largest_eigenvalue=top,
        condition=jnp.where(definite, largest / jnp.where(definite, smallest, 1), jnp.inf),
    )
    return x, stats


def extreme_eigenvalues(
    operator: Callable[[Array], Array],
    shape: tuple[int, ...],
    ndim: int,
    dtype: Any,
    *,
    steps: int = LANCZOS_ITERATIONS,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Estimates the smallest and the largest eigenvalue of symmetric operators, from within, by Lanczos iterations.

    They cost what power iterations do and see the same vectors, but find the best combination of all of them.

    Args:
        operator: `v ↦ K v`, of a whole batch.
        shape: of `v`.
        ndim: how many of its last axes are one item's.
        dtype: of `v`.
        steps: how many products.

    Returns:
        The smallest and the largest Ritz value, one number each per item of the batch.
    """
    batch = shape[: len(shape) - ndim]
    axes = tuple(range(len(batch), len(shape)))

    def normalize(v: Array) -> tuple[Array, Array]:
        largest = jnp.max(jnp.abs(v), axis=axes, keepdims=True)
        v = v / jnp.where(largest > 0, largest, 1)
        norm = jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True))
        return v / jnp.where(norm > 0, norm, 1), (norm * largest).reshape(batch)

    def step(k: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        v, before, beta, alphas, betas = state
        product = operator(v)
        alpha = jnp.sum(v * product, axis=axes)
        w = product - _expand(alpha, ndim) * v - _expand(beta, ndim) * before
        following, beta = normalize(w)
        return following, v, beta, alphas.at[k].set(alpha), betas.at[k].set(beta)

    # The same start for all items, and not orthogonal to anything in particular.
    start = 1 + np.random.default_rng(0).normal(size=shape[len(batch) :])
    v, _ = normalize(jnp.broadcast_to(jnp.asarray(start, dtype), shape))
    steps = min(steps, int(np.prod(shape[len(batch) :])))
    zeros = jnp.zeros((steps, *batch), dtype)
    state = (v, jnp.zeros_like(v), zeros[0], zeros, zeros)
    state = varying_like(state, operator(v))
    *_, alphas, betas = lax.fori_loop(0, steps, step, state)
    return Lanczos(alphas, jnp.roll(betas, 1, axis=0)).extremes()


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * ndim)


def potts_extremes(
    lam: Array, low: Array, top: Array, num_labels: int, centered: bool = False
) -> tuple[Array, Array]:
    """The extreme eigenvalues of a Potts-type system, from those of its filter: `λ + (L-1) s` and `λ - s`.

    Centered, `λ` stands in for the first.
    """
    if num_labels == 1:  # nothing to disagree with
        return jnp.broadcast_to(lam, top.shape), jnp.broadcast_to(lam, top.shape)
    together = 0 if centered else num_labels - 1
    return lam + jnp.minimum(together * low, -top), lam + jnp.maximum(together * top, -low)


def _scale(affinities: Any, regularization: Array, scaling: str | None) -> Any:
    """Embeddings whose largest eigenvalue is below `DEFINITE_SHARE` of `λ`, for sure."""
    if scaling is None:
        return affinities
    embeddings = affinities.embeddings
    allowed = DEFINITE_SHARE * regularization
    if scaling == "unit-ball":
        # s_max <= Σ_i ‖A_i‖² <= how many there are.
        shorten = lax.rsqrt(jnp.maximum(affinities.squared_norms(), 1))[..., None]
        scale = shorten * jnp.sqrt(allowed / affinities.num_vectors)
    else:
        dual = affinities.dual()
        trace = jnp.trace(dual, axis1=-2, axis2=-1)[..., None, None]
        safe = jnp.where(trace > 0, trace, 1)
        power = dual / safe
        for _ in range(SQUARINGS):
            power = jnp.matmul(power, power, precision=PRECISION)
        squares = jnp.sum(power**2, axis=(-2, -1), keepdims=True)
        bound = safe * jnp.where(trace > 0, squares, 1) ** (0.5 ** (1 + SQUARINGS))
        scale = jnp.sqrt(jnp.minimum(allowed / bound, 1))
        scale = jnp.where(trace > 0, scale, 1)
        scale = scale.reshape(scale.shape[:-2] + (1,) * (embeddings.ndim - scale.ndim + 2))
    return affinities.replace(embeddings=embeddings * scale)


def _factorise(systems: Sequence[tuple[int, Array]]) -> Factor:
    """All small systems as one batch, `[systems, *batch, D, D]`, which accelerators factorise at once."""
    return factorise(jnp.stack([matrix for _, matrix in systems]))


def _solve(factors: Factor, t: Float[Array, "systems *batch D columns"]) -> Array:
    """Every system with its own right-hand sides, likewise as one batch; the factors' batch broadcasts."""
    missing = t.ndim - factors.matrix.ndim
    aligned = (a.reshape(a.shape[0], *[1] * missing, *a.shape[1:]) for a in factors)
    return Factor(*aligned).solve(t)


def _small_systems(
    kind: str, dual: Array, regularization: Array, num_labels: int
) -> tuple[tuple[int, Array], ...]:
    """`c` and `λI + c A Aᵀ`: for everything (general); for the mean over labels, and for the deviations if any."""
    ridge = regularization * jnp.eye(dual.shape[-1], dtype=dual.dtype)
    if kind == "general":
        return ((1, ridge + dual),)
    count = num_labels - 1
    return ((count, ridge + count * dual), *(((-1, ridge - dual),) if count else ()))


def _solve_directly(
    affinities: PixelGram | PixelLabelGram,
    b: Array,
    regularization: Array,
    tolerance: Array,
    dual: Array,
) -> tuple[Array, GaussianCRFStats]:
    """Solves by Woodbury's identity; the factorisation also serves the backward pass."""
    num_labels = b.shape[-1]
    still, lam, small, tolerance = lax.stop_gradient((affinities, regularization, dual, tolerance))
    systems = _small_systems(affinities.kind, small, lam, num_labels)
    factors = _factorise(systems)
    axes = tuple(range(b.ndim - 1 - len(affinities.spatial), b.ndim))

    def once(rhs: Array) -> Array:
        if isinstance(still, PixelLabelGram):
            (y,) = _solve(factors, still.restrict(rhs)[None, ..., None])
            return (rhs - still.prolong(y[..., 0])) / lam
        (t,) = still.restrict(rhs)
        mean = jnp.broadcast_to(t.mean(-1, keepdims=True), t.shape)
        solved = _solve(factors, jnp.stack([mean, t - mean][: len(systems)]))
        y = sum(c * of_system for (c, _), of_system in zip(systems, solved, strict=True))
        return (rhs - still.prolong((y,))) / lam

    def solve(matvec: Callable[[Array], Array], rhs: Array) -> tuple[Array, Array]:
        x = once(rhs)
        return x, relative_norm(rhs - matvec(x), rhs, axes)

    def matvec(x: Array) -> Array:
        return apply_system(affinities, regularization, x)

    x, residual = lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)

    def product(v: Array) -> Array:
        return jnp.einsum("...de,...e->...d", small, v, precision=PRECISION)

    _, top = extreme_eigenvalues(product, small.shape[:-1], 1, b.dtype)
    top = jnp.broadcast_to(jnp.maximum(top, 0), residual.shape)
    if affinities.kind == "general":
        smallest, largest = lam, lam + top
    else:
        smallest, largest = potts_extremes(lam, jnp.zeros_like(top), top, num_labels)
    definite = jnp.broadcast_to(factors.definite.all(0) & (lam > 0), residual.shape) & ~(smallest <= 0)
    stats = GaussianCRFStats(
        iterations=jnp.zeros(residual.shape, jnp.int32),
        residual=residual,
        converged=residual <= tolerance,
        definite=definite,
        largest_eigenvalue=top,
        condition=jnp.where(definite, largest / jnp.where(definite, smallest, 1), jnp.inf),
    )
    return x, stats


def _variances(affinities: PixelGram | PixelLabelGram, b: Array, regularization: Array, dual: Array) -> Array:
    """The diagonal of `(K + λI)⁻¹`, by `(λI + c AᵀA)⁻¹ = (I - c Aᵀ (λI + c A Aᵀ)⁻¹ A) / λ`."""
    num_labels = b.shape[-1]
    lam = regularization
    norms = affinities.squared_norms()
    shares = (1.0, 0.0) if affinities.kind == "general" else (1 / num_labels, 1 - 1 / num_labels)
    total: Any = 0.0
    systems = _small_systems(affinities.kind, dual, lam, num_labels)
    # NaN where not definite.
    factors = _linalg.cholesky(jnp.stack([matrix for _, matrix in systems]))
    for share, (c, _), lower in zip(shares, systems, factors, strict=False):
        found = (1 - c * affinities.quadratic_form(lower)) / lam
        if c >= 0:
            # A variance is at least that with all other scores known, which rounding must not undercut.
            found = jnp.maximum(found, 1 / (lam + c * norms))
        total = total + share * found
    if affinities.kind == "potts":
        total = total[..., None]
    return jnp.broadcast_to(total, b.shape)

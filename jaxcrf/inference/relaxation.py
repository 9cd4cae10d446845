r"""The continuous relaxation of an energy, and what the algorithms that minimise it share.

Labellings are the corners of a product of simplices, one per pixel. On all of it the energy continues as

.. math::
    E(q) = -\langle w_u u, q\rangle + \tfrac12 \langle q, P q\rangle , \qquad
    P q = \sum_k (K_k q)\, \mu_k^\top , \qquad \nabla E(q) = P q - w_u u ,

and where no pixel is in its own message (`exclude_self=True`) the smallest value is at a corner, so that
nothing is lost by relaxing. `E` is quadratic: along a segment from `q` to `p` it needs `P p` and nothing else,
since `P` is linear. That is one application of every filter per iteration, line search and energies included.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxcrf import _checks
from jaxcrf.compatibility import penalty
from jaxcrf.filters import Filter
from jaxcrf.inference.energy import gibbs_energy
from jaxcrf.inference.pairwise import PairwiseTerm, check_logits, pairwise_terms
from jaxcrf_kernels._varying import varying_like

# A residual below which iterations count as converged where no tolerance was asked for, as in mean field.
DEFAULT_TOLERANCE = 1e-3


class InferenceStats(NamedTuple):
    """How the iterations went, the same for every algorithm.

    Attributes:
        iterations: how many were done.
        residual: the largest change of a marginal in the last one, over all pixels, labels and images of
            the batch.
        converged: whether the residual is at most the tolerance (1e-3 where none was given).
        energies: the relaxed energy `E(q)` before the first iteration and after each, `[iterations + 1, *batch]`;
            the last value repeats where iterations stopped early. None where the pairwise terms are not
            symmetric, so that no energy belongs to them.
        objectives: what the algorithm decreases, likewise: `E` itself for projected gradients and plain
            Frank-Wolfe, `E` with its regulariser for the others, which for mean field is the free energy.
    """

    iterations: Int[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    energies: Float[Array, "iterations_and_one *batch"] | None
    objectives: Float[Array, "iterations_and_one *batch"] | None


class InferenceResult(NamedTuple):
    """What every inference algorithm returns.

    Attributes:
        probs: `q`, `[*batch, *spatial, labels]`, summing to one over the labels.
        logits: scores with `softmax(logits) = probs`: `log q` up to a constant per pixel. A label with
            probability zero has the logarithm of the smallest normal number.
        stats: see `InferenceStats`.
    """

    probs: Float[Array, "*batch_and_spatial labels"]
    logits: Float[Array, "*batch_and_spatial labels"]
    stats: InferenceStats


class Relaxation(NamedTuple):
    """The problem: minimise `-⟨u, q⟩ + ½ ⟨q, P q⟩` over the product of simplices.

    Attributes:
        unary: `u`, its weight included, `[*batch, *spatial, labels]`.
        terms: the filters and compatibilities that `P` is made of.
    """

    unary: Array
    terms: tuple[PairwiseTerm, ...]

    def pairwise(self, q: Array) -> Array:
        """`P q`: the expected penalty of every label, one application of every filter."""
        total = jnp.zeros_like(q)
        for term in self.terms:
            total = total + penalty(term.filter(q), term.compatibility).astype(q.dtype)
        return total

    def energy(self, q: Array, pairwise: Array) -> Array:
        """`E(q)` of every image, given `P q`."""
        return self.per_image(jnp.sum(q * (0.5 * pairwise - self.unary), axis=-1))

    def per_image(self, density: Array) -> Array:
        """Adds up `[*batch, *spatial]`, axis by axis, so that float32 adds few numbers at a time."""
        spatial = len(self.terms[0].filter.spatial) if self.terms else min(2, density.ndim)
        for _ in range(spatial):
            density = density.sum(-1)
        return density

    def for_all_pixels(self, per_image: Array) -> Array:
        """A number per image, as it multiplies `[*batch, *spatial, labels]`."""
        return per_image.reshape(per_image.shape + (1,) * (self.unary.ndim - per_image.ndim))


class Iterate(NamedTuple):
    """Where an algorithm is.

    Attributes:
        probs: `q`.
        pairwise: `P q`, kept up to date by linearity.
        memory: what else the algorithm hands to its next iteration.
    """

    probs: Array
    pairwise: Array
    memory: Any = ()


class _State(NamedTuple):
    iterate: Iterate
    energies: tuple[Array, Array] | None
    residual: Array
    iterations: Array


def check_relaxation(
    logits: Any, pairwise: Any, unary_weight: Any, exclude_self: bool
) -> tuple[Array, tuple[PairwiseTerm, ...], Array]:
    """Checks the operands that all algorithms have, and makes arrays and terms of them."""
    num_labels = jnp.shape(logits)[-1] if jnp.ndim(logits) else 1
    terms = pairwise_terms(pairwise, num_labels, exclude_self=exclude_self)
    unary = check_logits(logits, terms)
    weight = jnp.asarray(unary_weight, unary.dtype)
    if weight.shape not in ((), (num_labels,)):
        raise ValueError(f"unary_weight: got shape {weight.shape}; expected a scalar or ({num_labels},)")
    return unary, terms, weight


def check_iterations(num_iterations: Any, tolerance: Any) -> int:
    """Checks how many iterations are wanted, and when to stop."""
    if not _checks.is_whole(num_iterations) or num_iterations < 0:
        raise ValueError(f"num_iterations: got {num_iterations!r}; expected a whole number >= 0")
    if tolerance is not None and _checks.is_concrete(tolerance) and not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}; expected a change of probabilities >= 0, or None")
    return int(num_iterations)


def missing_symmetry(terms: Sequence[PairwiseTerm]) -> str | None:
    """Why no energy belongs to the terms, or None where one does; a traced matrix is trusted."""
    for term in terms:
        if not term.filter.is_symmetric:
            return "a filter is not symmetric, so no energy belongs to it"
        mu = term.compatibility
        if mu.ndim == 2 and _checks.is_concrete(mu) and not np.allclose(mu, np.transpose(mu)):
            return "a compatibility matrix is not symmetric, so no energy belongs to it"
    return None


def project_to_simplex(v: Float[Array, "*batch labels"]) -> Float[Array, "*batch labels"]:
    r"""The point of the probability simplex that is nearest to `v`, over the last axis.

    It is `max(v - θ, 0)` with the one `θ` that makes it sum to one. `θ` is found exactly, by Michelot's iteration:
    the `θ` of the labels that are left, until no more of them drop out. That takes at most as many rounds
    as there are labels, mostly a handful, and is faster than sorting. The derivative is the centring of a
    change over the labels that are left, `t ↦ s (t - ⟨s, t⟩ / |s|)` with `s = 1[v > θ]`.

    Args:
        v: `[*batch, labels]`.

    Returns:
        Probabilities of the same shape; many of them exactly zero.

    Example:
        >>> project_to_simplex(jnp.array([0.9, 0.5, -3.0]))
        Array([0.7, 0.3, 0. ], dtype=float32)

    References:
        Michelot, 1986; Martins and Astudillo, 2016 (sparsemax), for the derivative.
    """
    return _project_to_simplex(v)


@jax.custom_jvp
def _project_to_simplex(v: Array) -> Array:
    # Labels that are 1 or more below the best are never left; with the best at 0 no digits are lost to θ.
    v = jnp.maximum(v - v.max(-1, keepdims=True), -1)

    def drop(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        threshold, _, count = state
        left = v > threshold
        total = jnp.sum(jnp.where(left, v, 0), axis=-1, keepdims=True)
        new = (total - 1) / jnp.sum(left, axis=-1, keepdims=True, dtype=v.dtype)
        return new, jnp.any(new > threshold), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, rising, count = state
        return rising & (count < v.shape[-1])

    everything = (jnp.sum(v, axis=-1, keepdims=True) - 1) / v.shape[-1]
    start = varying_like((everything, jnp.array(True), jnp.int32(0)), v)
    threshold, _, _ = lax.while_loop(unfinished, drop, start)
    return jnp.maximum(v - threshold, 0)


@_project_to_simplex.defjvp
def _project_to_simplex_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (change,) = primals, tangents
    p = _project_to_simplex(v)
    support = (p > 0).astype(p.dtype)
    mean = jnp.sum(support * change, axis=-1, keepdims=True) / support.sum(-1, keepdims=True)
    return p, support * (change - mean)


def directional(gradient: Array, q: Array, d: Array) -> Array:
    """`⟨gradient, d⟩` of every pixel, for a `d` from `q` to another point of the simplex."""
    # Such a d sums to zero, but only up to rounding, which a gradient far from zero would magnify. Its mean can be
    # taken off; what is left vanishes where q is stationary.
    centred = gradient - jnp.sum(q * gradient, axis=-1, keepdims=True)
    return jnp.sum(centred * d, axis=-1)


def best_step(slope: Array, curvature: Array) -> Array:
    """Where in `[0, 1]` the parabola `slope γ + ½ curvature γ²` is lowest; `slope <= 0`."""
    # A parabola that opens downward, or has its lowest point beyond, is lowest at 1. One with next to no
    # curvature at all is one of rounding errors, and dividing by it would spoil the gradient.
    inside = (curvature > -slope) & (curvature > np.sqrt(float(jnp.finfo(curvature.dtype).tiny)))
    return jnp.where(inside, jnp.maximum(-slope, 0) / jnp.where(inside, curvature, 1), 1)


def move(problem: Relaxation, iterate: Iterate, target: Array, pairwise: Array, step: Array) -> Iterate:
    """The iterate a share `step` of the way to a target; exactly the target where that is one."""
    step = problem.for_all_pixels(step)
    return iterate._replace(
        probs=(1 - step) * iterate.probs + step * target,
        pairwise=(1 - step) * iterate.pairwise + step * pairwise,
    )


def log_probs(q: Array) -> Array:
    """`log q`, finite at zero, where its gradient is zero."""
    return jnp.log(jnp.maximum(q, jnp.finfo(q.dtype).tiny))


def negative_entropy(q: Array) -> Array:
    """`Σ_l q(l) log q(l)`, with a gradient that is finite at zero."""
    return jnp.sum(q * log_probs(q), axis=-1)


def descend(
    problem: Relaxation,
    start: Iterate,
    advance: Callable[[Iterate, Array], Iterate],
    *,
    num_iterations: int,
    tolerance: Array | None,
    has_energy: bool,
    regularizer: Callable[[Array], Array] | None = None,
    first_pairwise: Array | None = None,
) -> tuple[Iterate, InferenceStats]:
    """Iterates, watches the energy, and stops early if asked to.

    Every iteration is computed again in the backward pass, so that only iterates are stored between them.

    Args:
        problem: what is minimised.
        start: the first iterate.
        advance: one iteration, given the iterate and its number.
        num_iterations: how many, at most.
        tolerance: the change of a marginal at which to stop, or None.
        has_energy: whether energies mean anything.
        regularizer: what is added to the energy of every pixel to make the objective, `[..., labels]` to `[...]`.
        first_pairwise: what the first iteration takes for `P q`, if something else.

    Returns:
        The last iterate, and how it went.
    """

    def energies(iterate: Iterate) -> tuple[Array, Array] | None:
        if not has_energy:
            return None
        energy = problem.energy(iterate.probs, iterate.pairwise)
        if regularizer is None:
            return energy, energy
        return energy, energy + problem.per_image(regularizer(iterate.probs))

    def update(state: _State) -> _State:
        iterate = advance(state.iterate, state.iterations)
        change = jnp.max(jnp.abs(lax.stop_gradient(iterate.probs - state.iterate.probs)))
        return _State(iterate, energies(iterate), change, state.iterations + 1)

    @jax.checkpoint
    def step(state: _State, _: None) -> tuple[_State, Any]:
        if tolerance is None:
            state = update(state)
        else:
            state = lax.cond(state.residual <= tolerance, lambda s: s, update, state)
        return state, state.energies

    state = _State(start, energies(start), jnp.full((), jnp.inf, start.probs.dtype), jnp.zeros((), jnp.int32))
    state = varying_like(state, problem)
    first = state.energies
    if first_pairwise is not None:
        state = state._replace(iterate=state.iterate._replace(pairwise=first_pairwise))
    state, rest = lax.scan(step, state, None, length=num_iterations)
    energy, objective = (
        (None, None)
        if first is None
        else (jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))
    )
    limit = DEFAULT_TOLERANCE if tolerance is None else tolerance
    stats = InferenceStats(state.iterations, state.residual, state.residual <= limit, energy, objective)
    return state.iterate, stats


def relaxed_energy(
    probs: Float[Array, "*batch_and_spatial labels"],
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    unary_weight: Any = 1.0,
    exclude_self: bool = False,
) -> Float[Array, " *batch"]:
    r"""The energy `E(q)` of the continuous relaxation: `gibbs_energy` at labellings, quadratic in between.

    .. math::
        E(q) = -w_u \langle u, q\rangle + \tfrac12 \sum_k \langle q, (K_k q)\, \mu_k^\top\rangle ,

    which is also the mean energy of labels drawn independently from `q` where `exclude_self=True`.

    Args:
        probs: `q`, `[*batch, *spatial, labels]`.
        logits: `u`, likewise.
        pairwise: as in `mean_field`; every filter and every compatibility matrix symmetric.
        unary_weight: `w_u`, as in `mean_field`.
        exclude_self: leave the pairs `i = j` out, as in `mean_field`.

    Returns:
        The relaxed energy of every image, `[*batch]`.

    Raises:
        ValueError: if shapes disagree or a filter is not symmetric.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> K = jaxcrf.filters.Window(jnp.zeros((1, 2, 1)), 3)  # two pixels that are neighbours
        >>> jaxcrf.relaxed_energy(jnp.full((1, 2, 2), 0.5), jnp.zeros((1, 2, 2)), [(K, 3.0)], exclude_self=True)
        Array(1.5, dtype=float32)

    References:
        Desmaison et al., 2016, the quadratic programming relaxation; Lê-Huu and Alahari, 2021.
    """
    unary, terms, weight = check_relaxation(logits, pairwise, unary_weight, exclude_self)
    require_symmetry(terms)
    q = check_logits(probs, terms, "probs")
    if q.shape[-1] != unary.shape[-1]:
        raise ValueError(f"probs: got {q.shape[-1]} labels for logits of {unary.shape[-1]}; they must agree")
    problem = Relaxation(weight * unary, terms)
    return problem.energy(q, problem.pairwise(q))


def rounded_energy(
    probs: Float[Array, "*batch_and_spatial labels"],
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    unary_weight: Any = 1.0,
    exclude_self: bool = False,
) -> Float[Array, " *batch"]:
    """The Gibbs energy of the most probable label of every pixel: what to compare algorithms by.

    Args:
        probs: any algorithm's `probs`, `[*batch, *spatial, labels]`.
        logits: as the algorithm had them.
        pairwise: likewise; every filter and every compatibility matrix symmetric.
        unary_weight: likewise.
        exclude_self: likewise.

    Returns:
        `gibbs_energy(argmax(probs), …)` of every image, `[*batch]`.

    Raises:
        ValueError: if shapes disagree or a filter is not symmetric.

    Example:
        >>> import jax, jaxcrf
        >>> logits = jax.random.normal(jax.random.key(1), (9, 9, 2))
        >>> K = jaxcrf.filters.Window(jaxcrf.position_features((9, 9), 1.0), 5, weights=0.4)
        >>> for options in ({}, {"algorithm": "frank_wolfe", "regularization": 0.3}):
        ...     probs = jaxcrf.infer(logits, K, num_iterations=20, **options).probs
        ...     print(f"{jaxcrf.rounded_energy(probs, logits, K):.1f}")
        -28.4
        -29.8
    """
    labels = jnp.argmax(jnp.asarray(probs), axis=-1)
    return gibbs_energy(labels, logits, pairwise, unary_weight=unary_weight, exclude_self=exclude_self)


def require_symmetry(terms: Sequence[PairwiseTerm], remedy: str | None = None) -> None:
    """Raises where no energy belongs to the terms."""
    reason = missing_symmetry(terms)
    if reason is not None:
        remedy = remedy or "use blur=1, the normalisation 'none' or 'symmetric', and matrices with mu = mu.T"
        raise ValueError(f"pairwise: {reason}; {remedy}")

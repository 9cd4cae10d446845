"""Frank-Wolfe for the continuous relaxation, plain and regularised."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.filters import Filter
from jaxcrf.inference.pairwise import PairwiseTerm
from jaxcrf.inference.relaxation import (
    InferenceResult,
    Iterate,
    Relaxation,
    best_step,
    check_iterations,
    check_relaxation,
    descend,
    directional,
    log_probs,
    missing_symmetry,
    move,
    negative_entropy,
    project_to_simplex,
    require_symmetry,
)
from jaxcrf_kernels._varying import varying_like


def frank_wolfe(
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    num_iterations: int = 10,
    unary_weight: Any = 1.0,
    regularization: Any = 1.0,
    regularizer: Literal["entropy", "quadratic"] = "entropy",
    step: Literal["line_search", "fixed", "decreasing"] = "line_search",
    step_size: Any = None,
    exclude_self: bool = False,
    tolerance: float | None = None,
) -> InferenceResult:
    r"""Minimises the relaxed energy `E(q) = -w_u ⟨u, q⟩ + ½ ⟨q, P q⟩`, regularised, by Frank-Wolfe.

    With `P q = Σ_k (K_k q) μ_kᵀ`, weight `λ` and regulariser `r`, from `q = softmax(u)` on,

    .. math::
        p = \operatorname*{argmin}_{p} \; \langle \nabla E(q), p\rangle + \lambda\, r(p) , \qquad
        q \leftarrow (1 - \gamma)\, q + \gamma\, p , \qquad \nabla E(q) = P q - w_u u .

    - "entropy", `r(p) = Σ_i Σ_l p_i(l) log p_i(l)`: `p = softmax(-∇E(q)/λ)`. With `λ = 1` and `γ = 1` this is
      parallel mean field. `λ` is a temperature.
    - "quadratic", `r(p) = ½‖p‖²`: `p` is `-∇E(q)/λ` projected onto the simplices, with exact zeros.
    - `λ = 0`: `p` is the best label of every pixel, one-hot. Plain Frank-Wolfe, for labellings of low
      energy; its directions are constant almost everywhere, so that next to no gradient comes back through them.
      A little regularisation, `λ` from 0.1 to 0.5, often ends at a labelling of lower energy than none.

    What decreases is the objective `E + λ r` (`stats.objectives`). "line_search" takes the best step for
    every image in closed form, because `E` is quadratic along the segment:

    .. math::
        \gamma = \min\Bigl(1, \frac{-s}{c}\Bigr) \text{ where } c > 0, \text{ else } 1 , \qquad
        c = \langle d, P d\rangle , \quad d = p - q .

    For `λ = 0` the slope is `s = ⟨∇E(q), d⟩` and the step is exact. The quadratic regulariser adds `λ⟨q, d⟩` to
    the slope and `λ‖d‖²` to the curvature, and it is exact again. The entropy is bounded by its chord, which
    is above it, so that `s = -λ KL(q ‖ p)`: the objective falls at least as far as the parabola does, in any
    case, and `γ = 1` wherever `E` is concave (for Potts: `K` positive semi-definite), which is mean field.

    Since `P` is linear, `P q` moves with `q`: an iteration applies every filter once, to `p`, whatever the
    step; the first gradient costs one more. Rounding errors do not build up, as averages do not enlarge them.

    Args:
        logits: `u`, minus the unary energies, finite, `[*batch, *spatial, labels]`.
        pairwise: one filter (Potts of weight one), or a list of `(filter, compatibility)`, as in `mean_field`.
        num_iterations: how many, at most.
        unary_weight: `w_u`, one number or one per label.
        regularization: `λ ≥ 0`, one number; a traced one must be greater than 0.
        regularizer: `r`, see above.
        step: "line_search" needs symmetric filters and compatibilities. "fixed" takes `step_size`;
            "decreasing" takes `2 / (t + 2)` in iteration `t = 0, 1, …`. Both go with any filter, but where it is
            not symmetric there is no energy: they look for a fixed point then, as mean field does, and
            `stats.energies` is None.
        step_size: `γ` in `(0, 1]` for "fixed"; 1 if None.
        exclude_self: leave every pixel out of its own message, the papers' `i ≠ j`.
        tolerance: stop as soon as an iteration has changed no marginal by more than this; None does all. All
            images of a batch go on until the last of them has settled.

    Returns:
        `InferenceResult(probs, logits, stats)`.

    Differentiable in reverse mode, in the logits, the filters, the compatibilities, `unary_weight`,
    `regularization` and `step_size`; the backward pass computes every iteration again from two stored maps.

    Raises:
        TypeError, ValueError: if shapes or types disagree, an option is unknown, or a line search is asked
            for without an energy.

    Example:
        >>> import jax, jaxcrf
        >>> logits = jax.random.normal(jax.random.key(0), (6, 7, 3))
        >>> K = jaxcrf.filters.Window(jaxcrf.position_features((6, 7), 1.5), 5)
        >>> result = jaxcrf.frank_wolfe(logits, [(K, 1.0)], regularization=0.0)
        >>> bool((result.stats.energies[1:] <= result.stats.energies[:-1]).all())
        True

    References:
        Frank and Wolfe, 1956. Lê-Huu and Alahari, "Regularized Frank-Wolfe for Dense CRFs: Generalizing Mean
        Field and Beyond", 2021: both regularisers, and mean field as a special case. Desmaison et al.,
        "Efficient Continuous Relaxations for Dense CRF", 2016: filters and the optimal step; there the
        diagonal of `P` is first enlarged until the problem is convex, here it is left as it is.
    """
    if regularizer not in ("entropy", "quadratic"):
        raise ValueError(f"regularizer: got {regularizer!r}; expected 'entropy' or 'quadratic'")
    if step not in ("line_search", "fixed", "decreasing"):
        raise ValueError(f"step: got {step!r}; expected 'line_search', 'fixed' or 'decreasing'")
    if np.ndim(regularization) or (_checks.is_concrete(regularization) and not regularization >= 0):
        raise ValueError(f"regularization: got {regularization}; expected one number >= 0")
    if step_size is not None:
        if step != "fixed":
            raise ValueError(f"step_size: got {step_size} with step={step!r}; it goes with step='fixed' only")
        if np.ndim(step_size) or (_checks.is_concrete(step_size) and not 0 < step_size <= 1):
            raise ValueError(f"step_size: got {step_size}; expected a share of the way, 0 < step_size <= 1")
    num_iterations = check_iterations(num_iterations, tolerance)
    unary, terms, weight = check_relaxation(logits, pairwise, unary_weight, exclude_self)
    if step == "line_search":
        require_symmetry(terms, "take step='fixed' or 'decreasing', which need no energy, or symmetric terms")

    plain = _checks.is_concrete(regularization) and regularization == 0
    return _frank_wolfe(
        unary,
        terms,
        weight,
        None if plain else jnp.asarray(regularization, unary.dtype),  # plain Frank-Wolfe
        jnp.asarray(1.0 if step_size is None else step_size, unary.dtype),
        None if tolerance is None else jnp.asarray(tolerance, unary.dtype),
        num_iterations=num_iterations,
        regularizer=regularizer,
        step=step,
        has_energy=missing_symmetry(terms) is None,
    )


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("num_iterations", "regularizer", "step", "has_energy"))
def _frank_wolfe(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    regularization: Array | None,
    step_size: Array,
    tolerance: Array | None,
    *,
    num_iterations: int,
    regularizer: str,
    step: str,
    has_energy: bool,
) -> InferenceResult:
    everything = (unary, terms, weight, regularization, step_size, tolerance)
    unary, terms, weight, regularization, step_size, tolerance = varying_like(everything, everything)
    problem = Relaxation(weight * unary, terms)

    def advance(iterate: Iterate, iteration: Array) -> Iterate:
        q, gradient = iterate.probs, iterate.pairwise - problem.unary
        p = _direction(gradient, regularization, regularizer)
        pairwise = problem.pairwise(p)
        if step == "line_search":
            d = p - q
            curvature = jnp.sum(d * (pairwise - iterate.pairwise), axis=-1)
            if regularization is None:
                slope = directional(gradient, q, d)
            elif regularizer == "quadratic":
                slope = directional(gradient + regularization * q, q, d)
                curvature = curvature + regularization * jnp.sum(d * d, axis=-1)
            else:
                # ⟨∇E, d⟩ + λ (r(p) - r(q)), which is this because p is the soft-max of -∇E/λ.
                log_p = jax.nn.log_softmax(-gradient / regularization, axis=-1)
                slope = -regularization * jnp.sum(q * (log_probs(q) - log_p), axis=-1)
            size = best_step(problem.per_image(slope), problem.per_image(curvature))
        elif step == "fixed":
            size = step_size
        else:
            size = 2 / (iteration.astype(q.dtype) + 2)
        return move(problem, iterate, p, pairwise, size)

    def penalty(q: Array) -> Array:
        r = negative_entropy(q) if regularizer == "entropy" else 0.5 * jnp.sum(q * q, axis=-1)
        return regularization * r

    q = jax.nn.softmax(unary, axis=-1)
    iterate, stats = descend(
        problem,
        Iterate(q, problem.pairwise(q)),
        advance,
        num_iterations=num_iterations,
        tolerance=tolerance,
        has_energy=has_energy,
        regularizer=None if regularization is None else penalty,
    )
    return InferenceResult(iterate.probs, log_probs(iterate.probs), stats)


def _direction(gradient: Array, regularization: Array | None, regularizer: str) -> Array:
    """The feasible point that minimises `⟨gradient, p⟩ + λ r(p)`."""
    if regularization is None:
        return jax.nn.one_hot(jnp.argmin(gradient, axis=-1), gradient.shape[-1], dtype=gradient.dtype)
    scores = -gradient / regularization
    return jax.nn.softmax(scores, axis=-1) if regularizer == "entropy" else project_to_simplex(scores)

"""Projected gradient descent for the continuous relaxation."""

import functools
from collections.abc import Sequence
from typing import Any

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
    move,
    project_to_simplex,
    require_symmetry,
)
from jaxcrf_kernels._varying import varying_like

# The first spectral step, and the longest: where the energy does not curve upward it has no length of its own, and
# this is long enough for the projection to be (almost) the best label, as plain Frank-Wolfe takes it.
FIRST_STEP = 1.0
LONGEST_STEP = 1e3


def projected_gradient(
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    num_iterations: int = 20,
    unary_weight: Any = 1.0,
    step_size: Any = None,
    exclude_self: bool = False,
    tolerance: float | None = None,
) -> InferenceResult:
    r"""Minimises the relaxed energy `E(q) = -w_u ⟨u, q⟩ + ½ ⟨q, P q⟩` by gradient steps that stay feasible.

    With `P q = Σ_k (K_k q) μ_kᵀ`, step size `η` and the Euclidean projection `Π` onto the simplex of every
    pixel, from `q = softmax(u)` on,

    .. math::
        p = \Pi\bigl(q - \eta\, \nabla E(q)\bigr) , \qquad d = p - q , \qquad
        q \leftarrow q + \gamma\, d , \qquad \nabla E(q) = P q - w_u u .

    The projection makes `d` a direction of descent for every `η > 0`: `⟨∇E(q), d⟩ ≤ -‖d‖²/η`. The energy is
    quadratic along it, so that the best `γ` in `[0, 1]` is known for every image,

    .. math::
        \gamma = \min\Bigl(1, \frac{-\langle\nabla E(q), d\rangle}{\langle d, P d\rangle}\Bigr)
        \text{ where } \langle d, P d\rangle > 0, \text{ else } 1 ,

    and the energy never rises, with no backtracking and no Lipschitz constant to be estimated. Since `P` is
    linear, `P q` moves with `q`: an iteration applies every filter once, to `p`; the first gradient costs one
    more.

    With `step_size=None` every image has the spectral step of Barzilai and Borwein, `η = ‖d‖² / ⟨d, P d⟩` of the
    iteration before, which is at hand and is the inverse of the curvature just met; it is 1 at first, and 1000
    where the energy does not curve upward. Short steps wander, long ones are plain Frank-Wolfe's.

    Args:
        logits: `u`, minus the unary energies, finite, `[*batch, *spatial, labels]`.
        pairwise: one filter (Potts of weight one), or a list of `(filter, compatibility)`, as in `mean_field`;
            every filter and every compatibility matrix symmetric, since the step looks at the energy.
        num_iterations: how many, at most.
        unary_weight: `w_u`, one number or one per label.
        step_size: `η > 0`, in probabilities per unit of energy; None for spectral steps.
        exclude_self: leave every pixel out of its own message, the papers' `i ≠ j`.
        tolerance: stop as soon as an iteration has changed no marginal by more than this; None does all. All
            images of a batch go on until the last of them has settled.

    Returns:
        `InferenceResult(probs, logits, stats)`; many probabilities are exactly 0 or 1.

    Differentiable in reverse mode, in the logits, the filters, the compatibilities, `unary_weight` and
    `step_size`; the backward pass computes every iteration again from two stored maps. Labels that are at
    zero when the iterations end pass no gradient on.

    Raises:
        TypeError, ValueError: if shapes or types disagree, a filter or a compatibility matrix is not
            symmetric, or an option is out of range.

    Example:
        >>> import jax, jaxcrf
        >>> logits = jax.random.normal(jax.random.key(0), (6, 7, 3))
        >>> K = jaxcrf.filters.Window(jaxcrf.position_features((6, 7), 1.5), 5)
        >>> result = jaxcrf.projected_gradient(logits, [(K, 1.0)])
        >>> bool((result.stats.energies[1:] <= result.stats.energies[:-1]).all())
        True

    References:
        Bertsekas, Nonlinear Programming, §2.3 (limited minimisation along feasible directions). Barzilai and
        Borwein, 1988; Birgin, Martínez and Raydan, 2000, algorithm SPG2, whose search need not be exact.
    """
    if step_size is not None and (
        np.ndim(step_size) or (_checks.is_concrete(step_size) and not 0 < step_size < np.inf)
    ):
        raise ValueError(f"step_size: got {step_size}; expected one number > 0, or None for spectral steps")
    num_iterations = check_iterations(num_iterations, tolerance)
    unary, terms, weight = check_relaxation(logits, pairwise, unary_weight, exclude_self)
    require_symmetry(terms, "take mean_field, or frank_wolfe with step='fixed', which need no energy")
    return _projected_gradient(
        unary,
        terms,
        weight,
        None if step_size is None else jnp.asarray(step_size, unary.dtype),
        None if tolerance is None else jnp.asarray(tolerance, unary.dtype),
        num_iterations=num_iterations,
    )


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("num_iterations",))
def _projected_gradient(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    step_size: Array | None,
    tolerance: Array | None,
    *,
    num_iterations: int,
) -> InferenceResult:
    everything = (unary, terms, weight, step_size, tolerance)
    unary, terms, weight, step_size, tolerance = varying_like(everything, everything)
    problem = Relaxation(weight * unary, terms)

    def inner(a: Array, b: Array) -> Array:
        return problem.per_image(jnp.sum(a * b, axis=-1))

    def advance(iterate: Iterate, _: Array) -> Iterate:
        q, gradient = iterate.probs, iterate.pairwise - problem.unary
        length = problem.for_all_pixels(iterate.memory) if step_size is None else step_size
        p = project_to_simplex(q - length * gradient)
        pairwise = problem.pairwise(p)
        d = p - q
        curvature = inner(d, pairwise - iterate.pairwise)
        if step_size is None:
            squared = inner(d, d)
            curves = curvature * LONGEST_STEP > squared
            spectral = jnp.where(curves, squared / jnp.where(curves, curvature, 1), LONGEST_STEP)
            # What has not moved has met no curvature.
            iterate = iterate._replace(memory=jnp.where(squared > 0, spectral, iterate.memory))
        slope = problem.per_image(directional(gradient, q, d))
        return move(problem, iterate, p, pairwise, best_step(slope, curvature))

    q = jax.nn.softmax(unary, axis=-1)
    memory = jnp.full_like(inner(q, q), FIRST_STEP) if step_size is None else ()
    iterate, stats = descend(
        problem,
        Iterate(q, problem.pairwise(q), memory),
        advance,
        num_iterations=num_iterations,
        tolerance=tolerance,
        has_energy=True,
    )
    return InferenceResult(iterate.probs, log_probs(iterate.probs), stats)

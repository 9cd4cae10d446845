"""One call for all inference algorithms, so that they can be exchanged and compared."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.filters import Filter
from jaxcrf.inference.frank_wolfe import frank_wolfe
from jaxcrf.inference.mean_field import mean_field
from jaxcrf.inference.pairwise import PairwiseTerm
from jaxcrf.inference.projected_gradient import projected_gradient
from jaxcrf.inference.relaxation import (
    InferenceResult,
    InferenceStats,
    Iterate,
    Relaxation,
    check_relaxation,
    descend,
    missing_symmetry,
    negative_entropy,
)
from jaxcrf_kernels._varying import varying_like


def infer(
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    algorithm: Literal["mean_field", "frank_wolfe", "projected_gradient"] = "mean_field",
    **options: Any,
) -> InferenceResult:
    r"""Runs any inference algorithm, and reports the energies that it went through.

    All start from `q = softmax(u)` and look for a small relaxed energy
    `E(q) = -w_u ⟨u, q⟩ + ½ Σ_k ⟨q, (K_k q) μ_kᵀ⟩`:

    - "mean_field" decreases the free energy `E - H`; for sure only where `E` is concave, or damped.
    - "frank_wolfe" decreases `E + λ r`; always, with its line search.
    - "projected_gradient" decreases `E`; always.

    No energy belongs to filters or compatibility matrices that are not symmetric (blurred filters, or
    normalised on one side). Mean field goes on without one, and so does Frank-Wolfe with `step="fixed"` or
    "decreasing": `stats.energies` is None then. Line searches, and so projected gradients, refuse.

    `stats.energies` tells which reaches the lower relaxed energy; `rounded_energy` compares the labellings
    that come out of it. Mean field gives marginals, which are soft even where the energy is lowest at a
    labelling; the others approach labellings as their regularisation falls.

    Args:
        logits: `u`, minus the unary energies, `[*batch, *spatial, labels]`.
        pairwise: one filter (Potts of weight one), or a list of `(filter, compatibility)`, as in `mean_field`.
        algorithm: which.
        **options: those of `mean_field`, `frank_wolfe` or `projected_gradient`. All take `num_iterations`,
            `unary_weight`, `exclude_self` and `tolerance`.

    Returns:
        `InferenceResult(probs, logits, stats)`, the same fields for every algorithm. Energies of mean field
        cost one more application of every filter, and a second run with `gradient="implicit"`.

    Raises:
        TypeError, ValueError: if the algorithm is unknown or has no such option, and where the algorithm raises.

    Example:
        >>> import jax, jaxcrf
        >>> logits = jax.random.normal(jax.random.key(0), (6, 7, 3))
        >>> K = jaxcrf.filters.Window(jaxcrf.position_features((6, 7), 1.5), 5)
        >>> plain = jaxcrf.infer(logits, [(K, 0.2)], algorithm="frank_wolfe", regularization=0.0)
        >>> soft = jaxcrf.infer(logits, [(K, 0.2)], algorithm="mean_field", num_iterations=10)
        >>> plain.stats.energies.shape, bool(plain.stats.energies[-1] < soft.stats.energies[-1])
        ((11,), True)

    References:
        Krähenbühl and Koltun, 2011; Desmaison et al., 2016; Lê-Huu and Alahari, 2021.
    """
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm: got {algorithm!r}; expected one of {', '.join(_ALGORITHMS)}")
    known = _options(algorithm)
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: {algorithm} has no such option; it has {', '.join(known)}")
    if algorithm == "mean_field":
        return _mean_field_with_energies(logits, pairwise, **options)
    return _ALGORITHMS[algorithm](logits, pairwise, **options)


_ALGORITHMS: dict[str, Callable[..., Any]] = {
    "mean_field": mean_field,
    "frank_wolfe": frank_wolfe,
    "projected_gradient": projected_gradient,
}


def _options(algorithm: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(_ALGORITHMS[algorithm]).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _mean_field_with_energies(logits: Any, pairwise: Any, **options: Any) -> InferenceResult:
    # Without an energy this is mean field as it is. With one its updates are done here, where `P q` of every
    # iterate is at hand and its energy costs next to nothing; either way mean field checks its own options.
    defaults = {name: p.default for name, p in _options("mean_field").items()}
    options = defaults | options
    jax.eval_shape(functools.partial(mean_field, logits, pairwise, **options))
    unary, terms, weight = check_relaxation(
        logits, pairwise, options["unary_weight"], options["exclude_self"]
    )
    if missing_symmetry(terms) is not None:
        found = mean_field(logits, pairwise, **options)
        stats = InferenceStats(
            iterations=found.stats.iterations,
            residual=found.stats.residual,
            converged=found.stats.converged,
            energies=None,
            objectives=None,
        )
        return InferenceResult(found.probs, found.logits, stats)
    tolerance, damping = options["tolerance"], options["damping"]
    operands = (
        unary,
        terms,
        weight,
        None if tolerance is None else jnp.asarray(tolerance, unary.dtype),
        None if _checks.is_concrete(damping) and damping == 0 else jnp.asarray(damping, unary.dtype),
    )
    implicit = options["gradient"] == "implicit"
    result = _mean_field_watched(
        *(lax.stop_gradient(operands) if implicit else operands),
        num_iterations=int(options["num_iterations"]),
        initial=options["initial"],
    )
    if implicit:  # whose gradients are not those of the iterations
        found = mean_field(logits, pairwise, **options)
        return InferenceResult(found.probs, found.logits, result.stats)
    return result


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("num_iterations", "initial"))
def _mean_field_watched(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    tolerance: Array | None,
    damping: Array | None,
    *,
    num_iterations: int,
    initial: str,
) -> InferenceResult:
    everything = (unary, terms, weight, tolerance, damping)
    unary, terms, weight, tolerance, damping = varying_like(everything, everything)
    problem = Relaxation(weight * unary, terms)

    def advance(iterate: Iterate, _: Array) -> Iterate:
        scores = problem.unary - iterate.pairwise
        if damping is not None:
            scores = damping * iterate.memory + (1 - damping) * scores
        q = jax.nn.softmax(scores, axis=-1)
        return Iterate(q, problem.pairwise(q), scores)

    q = jax.nn.softmax(unary, axis=-1)
    iterate, stats = descend(
        problem,
        Iterate(q, problem.pairwise(q), unary),
        advance,
        num_iterations=num_iterations,
        tolerance=tolerance,
        has_energy=True,
        regularizer=negative_entropy,
        first_pairwise=problem.pairwise(unary) if initial == "logits" else None,
    )
    return InferenceResult(iterate.probs, iterate.memory, stats)

"""Mean-field inference, for every filter and compatibility."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxcrf import _checks
from jaxcrf.compatibility import reward
from jaxcrf.filters import Filter
from jaxcrf.inference.pairwise import PairwiseTerm, check_logits, pairwise_terms
from jaxcrf_kernels._varying import varying_like

# A residual below which iterations count as converged where no tolerance was asked for.
DEFAULT_TOLERANCE = 1e-3

# The adjoint iteration of implicit gradients stops at this change relative to the cotangent (near what
# float32 can resolve), or after so many steps.
IMPLICIT_TOLERANCE = 1e-6
IMPLICIT_MAX_ITERATIONS = 1000


class MeanFieldStats(NamedTuple):
    """How the iterations went.

    Attributes:
        iterations: how many were done.
        residual: the largest change of a marginal in the last one, over all pixels, labels and images of
            the batch. Where every filter is blurred the marginals are looked at on the blurred grid, which
            is all that the next iteration would see of them.
        converged: whether the residual is at most the tolerance (1e-3 where none was given).
    """

    iterations: Int[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]


class MeanFieldResult(NamedTuple):
    """Marginals and what they came from.

    Attributes:
        probs: `[*batch, *spatial, labels]`, summing to one over the labels.
        logits: the last update before its soft-max; `probs = softmax(logits)`.
        stats: see `MeanFieldStats`.
    """

    probs: Float[Array, "*batch_and_spatial labels"]
    logits: Float[Array, "*batch_and_spatial labels"]
    stats: MeanFieldStats


class _State(NamedTuple):
    """What one iteration hands to the next.

    The marginals are `softmax(unary_scale · logits + Σ prolong(messages))`; they are never stored, since
    messages on a blurred grid are much smaller.
    """

    unary_scale: Array
    messages: tuple[tuple[Array, ...], ...]
    observed: tuple[Array, ...]
    residual: Array
    iterations: Array


def mean_field(
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    num_iterations: int = 5,
    unary_weight: Any = 1.0,
    initial: Literal["probs", "logits"] = "probs",
    exclude_self: bool = False,
    tolerance: float | None = None,
    gradient: Literal["unrolled", "implicit"] = "unrolled",
    damping: float = 0.0,
) -> MeanFieldResult:
    r"""Approximates the marginals of a CRF by independent ones, by parallel mean-field updates.

    From `q = softmax(u)` on, with filters `K_k` and compatibilities `μ_k`,

    .. math::
        q_i(l) \leftarrow \operatorname{softmax}_l \Bigl(
            w_u\, u_i(l) - \sum_k \sum_{l'} \mu_k(l, l') \,(K_k q)_i(l') \Bigr).

    Args:
        logits: `u`, minus the unary energies, `[*batch, *spatial, labels]`.
        pairwise: one filter (Potts of weight one), or a list of `(filter, compatibility)`; a compatibility
            is a scalar `w` for Potts `w (1 - I)`, a vector `v` for `-diag(v)`, or a penalty matrix.
        num_iterations: how many updates, at most.
        unary_weight: `w_u`, one number or one per label.
        initial: what the first update filters. "probs" is `softmax(u)`; "logits" is `u` itself, which is
            what the public ConvCRF code does.
        exclude_self: leave every pixel out of its own message, the papers' `i ≠ j`, by subtracting
            `K.diagonal() * q`.
        tolerance: stop as soon as an update has changed no marginal by more than this; None does all
            iterations. All images of a batch go on until the last of them has settled.
        gradient: "unrolled" differentiates the iterations that were done, recomputing each in the
            backward pass so that only the messages between them are stored. "implicit" differentiates
            the fixed point instead, by iterating its adjoint equation; memory does not grow with the
            iterations, and the gradient is right only where `stats.converged` is.
        damping: the share `η` of the last update that is kept, `z ← η z + (1 - η) z_new` on the logits
            before the soft-max. Parallel updates decrease the free energy for sure where the pairwise
            energy is concave (for Potts: `K` positive semi-definite); otherwise from
            `η ≥ 1 - 1/(1 + w |λ_min(K)|)` on.

    Returns:
        `MeanFieldResult(probs, logits, stats)`.

    Differentiable once, in reverse mode, in the logits, the filters, the compatibilities and `unary_weight`.
    Under `shard_map` every device iterates its own part of a batch.

    Raises:
        TypeError, ValueError: if shapes or types disagree, or an option is unknown.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> logits = jaxcrf.unary_from_labels(jnp.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]), 2)
        >>> K = jaxcrf.filters.Window(jaxcrf.position_features((3, 3), 3.0), 3)
        >>> result = jaxcrf.mean_field(logits, [(K, 1.0)])
        >>> result.probs.argmax(-1)[1, 1], result.stats.iterations
        (Array(0, dtype=int32), Array(5, dtype=int32))

    References:
        Krähenbühl and Koltun, 2011, algorithm 1; Teichmann and Cipolla, 2018, algorithm 1.
    """
    if initial not in ("probs", "logits"):
        raise ValueError(f"initial: got {initial!r}; expected 'probs' or 'logits'")
    if gradient not in ("unrolled", "implicit"):
        raise ValueError(f"gradient: got {gradient!r}; expected 'unrolled' or 'implicit'")
    if isinstance(num_iterations, bool) or num_iterations != int(num_iterations) or num_iterations < 0:
        raise ValueError(f"num_iterations: got {num_iterations!r}; expected a whole number >= 0")
    if np.ndim(damping) or (_checks.is_concrete(damping) and not 0 <= damping < 1):
        raise ValueError(f"damping: got {damping}; expected a share of the last update, 0 <= damping < 1")
    if tolerance is not None and _checks.is_concrete(tolerance) and not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}; expected a change of probabilities >= 0, or None")
    num_labels = jnp.shape(logits)[-1] if jnp.ndim(logits) else 1
    terms = pairwise_terms(pairwise, num_labels, exclude_self=exclude_self)
    unary = check_logits(logits, terms)
    weight = jnp.asarray(unary_weight, unary.dtype)
    if weight.shape not in ((), (num_labels,)):
        raise ValueError(f"unary_weight: got shape {weight.shape}; expected a scalar or ({num_labels},)")

    undamped = _checks.is_concrete(damping) and damping == 0
    return _mean_field(
        unary,
        terms,
        weight,
        None if tolerance is None else jnp.asarray(tolerance, unary.dtype),
        None if undamped else jnp.asarray(damping, unary.dtype),
        num_iterations=int(num_iterations),
        initial=initial,
        gradient=gradient,
    )


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("num_iterations", "initial", "gradient"))
def _mean_field(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    tolerance: Array | None,
    damping: Array | None,
    *,
    num_iterations: int,
    initial: str,
    gradient: str,
) -> MeanFieldResult:
    # Under shard_map all vary alike from here on, so that no collective ends up inside a branch that the
    # devices need not agree on.
    everything = (unary, terms, weight, tolerance, damping)
    unary, terms, weight, tolerance, damping = varying_like(everything, everything)
    run = _iterate if gradient == "unrolled" else _iterate_to_fixed_point
    state = run(unary, terms, weight, num_iterations, initial, tolerance, damping)
    scores = _scores(unary, terms, state.unary_scale, state.messages)
    probs = jax.nn.softmax(scores, axis=-1)
    residual = state.residual
    if num_iterations:
        last = _change(_observe(probs, terms), state.observed)
        # Where the iterations stopped early, the state already knows the change that stopped them.
        residual = last if tolerance is None else jnp.where(residual <= tolerance, residual, last)
    limit = DEFAULT_TOLERANCE if tolerance is None else tolerance
    return MeanFieldResult(probs, scores, MeanFieldStats(state.iterations, residual, residual <= limit))


def _scores(unary: Array, terms: Sequence[PairwiseTerm], unary_scale: Array, messages: Sequence) -> Array:
    scores = unary_scale * unary
    for term, message in zip(terms, messages, strict=True):
        scores = scores + term.filter.prolong(message)
    return scores


def _messages(q: Array, terms: Sequence[PairwiseTerm]) -> tuple[tuple[Array, ...], ...]:
    """Every term's rewards, still on its filter's grid: compatibilities mix labels only, so they may come first."""
    return tuple(
        tuple(reward(x, term.compatibility) for x in term.filter.convolve(term.filter.restrict(q)))
        for term in terms
    )


def _observe(q: Array, terms: Sequence[PairwiseTerm]) -> tuple[Array, ...]:
    q = lax.stop_gradient(q)
    if terms and all(term.filter.pools for term in terms):
        return lax.stop_gradient(terms[0].filter.restrict(q))
    return (q,)


def _change(new: Any, old: Any) -> Array:
    changes = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), new, old)
    return jnp.max(jnp.stack(jax.tree.leaves(changes)))


def _start(unary: Array, terms: Sequence[PairwiseTerm]) -> _State:
    """The state whose marginals are `softmax(u)`."""
    messages = jax.eval_shape(lambda q: _messages(q, terms), unary)
    observed = jax.eval_shape(lambda q: _observe(q, terms), unary)
    one = jnp.ones((), unary.dtype)

    def fill(value: float) -> Any:
        return lambda x: jnp.full(x.shape, value, x.dtype)

    return _State(
        unary_scale=one,
        messages=jax.tree.map(fill(0.0), messages),
        observed=jax.tree.map(fill(jnp.inf), observed),
        residual=one * jnp.inf,
        iterations=jnp.zeros((), jnp.int32),
    )


def _iterate(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    num_iterations: int,
    initial: str,
    tolerance: Array | None,
    damping: Array | None,
) -> _State:
    state = varying_like(_start(unary, terms), unary)
    # A weight per label scales the unary per label from the first update on.
    state = state._replace(unary_scale=jnp.broadcast_to(state.unary_scale, weight.shape))

    def update(state: _State, filtered: Array | None = None) -> _State:
        q = jax.nn.softmax(_scores(unary, terms, state.unary_scale, state.messages), axis=-1)
        observed = _observe(q, terms)

        def blend(old: Array, new: Array) -> Array:
            return new if damping is None else damping * old + (1 - damping) * new

        def advance(state: _State) -> _State:
            messages = _messages(q if filtered is None else filtered, terms)
            return state._replace(
                unary_scale=blend(state.unary_scale, weight),
                messages=jax.tree.map(blend, state.messages, messages),
                iterations=state.iterations + 1,
            )

        if tolerance is None:  # then only the last change is ever looked at
            return advance(state._replace(observed=observed))
        state = state._replace(observed=observed, residual=_change(observed, state.observed))
        return lax.cond(state.residual <= tolerance, lambda s: s, advance, state)

    if initial == "logits" and num_iterations:
        state, num_iterations = update(state, unary), num_iterations - 1
    if not num_iterations:
        return state

    @jax.checkpoint
    def step(state: _State, _: None) -> tuple[_State, None]:
        if tolerance is None:
            return update(state), None
        return lax.cond(state.residual <= tolerance, lambda s: s, update, state), None

    state, _ = lax.scan(step, state, None, length=num_iterations)
    return state


def _iterate_to_fixed_point(
    unary: Array,
    terms: tuple[PairwiseTerm, ...],
    weight: Array,
    num_iterations: int,
    initial: str,
    tolerance: Array | None,
    damping: Array | None,
) -> _State:
    if not num_iterations or not terms:  # nothing to be a fixed point of
        return _iterate(unary, terms, weight, num_iterations, initial, tolerance, damping)
    frozen = lax.stop_gradient((unary, terms, weight))
    state = _iterate(*frozen, num_iterations, initial, tolerance, damping)
    # At the fixed point damping has no part in the update, and the unary has its full weight.
    messages = _at_fixed_point((unary, terms, weight), state.messages, damping)
    return state._replace(unary_scale=weight, messages=messages)


@jax.custom_vjp
def _at_fixed_point(parameters: Any, messages: Any, damping: Array | None) -> Any:
    """`messages`, differentiated as the solution of `messages = update(parameters, messages)`."""
    del parameters, damping
    return messages


def _fixed_point_update(parameters: Any, messages: Any) -> Any:
    unary, terms, weight = parameters
    return _messages(jax.nn.softmax(_scores(unary, terms, weight, messages), axis=-1), terms)


def _at_fixed_point_fwd(parameters: Any, messages: Any, damping: Array | None) -> tuple[Any, Any]:
    return messages, (parameters, messages, damping)


def _at_fixed_point_bwd(residuals: Any, cotangent: Any) -> tuple[Any, Any, Any]:
    # With J = ∂update/∂messages, ∂L/∂θ = (∂update/∂θ)ᵀ (I - Jᵀ)⁻¹ g. The solution of x = g + Jᵀ x is iterated
    # to, with the damping of the forward iteration: it converges where, and as fast as, that one did.
    parameters, messages, damping = residuals
    _, pull = jax.vjp(_fixed_point_update, parameters, messages)

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        x, _, count = state
        new = jax.tree.map(jnp.add, cotangent, pull(x)[1])
        if damping is not None:
            new = jax.tree.map(lambda a, b: damping * a + (1 - damping) * b, x, new)
        return new, _change(new, x), count + 1

    def unfinished(state: tuple[Any, Array, Array]) -> Array:
        _, change, count = state
        return (change > IMPLICIT_TOLERANCE * size) & (count < IMPLICIT_MAX_ITERATIONS)

    size = _change(cotangent, jax.tree.map(jnp.zeros_like, cotangent))
    start = varying_like((cotangent, jnp.full_like(size, jnp.inf), jnp.int32(0)), cotangent)
    solution, _, _ = lax.while_loop(unfinished, step, start)
    zeros = jax.tree.map(jnp.zeros_like, (messages, damping))
    return pull(solution)[0], *zeros


_at_fixed_point.defvjp(_at_fixed_point_fwd, _at_fixed_point_bwd)

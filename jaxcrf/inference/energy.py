r"""Energies: what inference minimises, to be looked at and compared.

With symmetric filters `K_k` and compatibilities `μ_k` the energy of a labelling is

.. math::
    E(x) = - w_u \sum_i u_i(x_i) + \tfrac12 \sum_k \sum_{i,j} (K_k)_{ij}\, \mu_k(x_i, x_j) ,

every unordered pair once. Mean-field updates are the fixed-point iteration of its free energy; for
filters that are not symmetric (blurred, or normalised on one side) they belong to no energy, and the
functions here say so.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxcrf import _checks
from jaxcrf.compatibility import penalty
from jaxcrf.filters import Filter
from jaxcrf.inference.pairwise import PairwiseTerm, check_logits, pairwise_terms


def gibbs_energy(
    labels: Int[Array, " *batch_and_spatial"],
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    unary_weight: Any = 1.0,
    exclude_self: bool = False,
) -> Float[Array, " *batch"]:
    r"""The Gibbs energy `E(x)` of a labelling.

    Args:
        labels: `x`, `[*batch, *spatial]`, every label in range.
        logits: `u`, `[*batch, *spatial, labels]`.
        pairwise: as in `mean_field`; every filter symmetric.
        unary_weight: `w_u`, as in `mean_field`.
        exclude_self: leave the pairs `i = j` out. For compatibilities with a zero diagonal (Potts) they
            are zero anyway.

    Returns:
        The energy of every image, `[*batch]`.

    Raises:
        ValueError: if labels are not integers or out of range, shapes disagree, or a filter is not
            symmetric.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> K = jaxcrf.filters.Window(jnp.zeros((1, 2, 1)), 3)  # two pixels that are neighbours
        >>> jaxcrf.gibbs_energy(jnp.array([[0, 1]]), jnp.zeros((1, 2, 2)), [(K, 3.0)])
        Array(3., dtype=float32)
    """
    logits = jnp.asarray(logits)
    num_labels = logits.shape[-1] if logits.ndim else 1
    labels = _checks.check_labels("labels", labels, num_labels, None)
    terms = _symmetric_terms(pairwise, num_labels, exclude_self)
    unary = check_logits(logits, terms)
    q = check_logits(jax.nn.one_hot(labels, num_labels, dtype=unary.dtype), terms, "labels")
    return _sum_pixels(_energy_density(q, unary, terms, unary_weight), terms)


def free_energy(
    probs: Float[Array, "*batch_and_spatial labels"],
    logits: Float[Array, "*batch_and_spatial labels"],
    pairwise: Filter | Sequence[Any],
    *,
    unary_weight: Any = 1.0,
    exclude_self: bool = False,
) -> Float[Array, " *batch"]:
    r"""The mean-field free energy, which is `KL(Q ‖ P)` up to the constant `log Z`.

    .. math::
        F(q) = \sum_i \sum_l q_i(l) \log q_i(l) - w_u \langle q, u \rangle
            + \tfrac12 \sum_k \langle q, (K_k q) \mu_k^\top \rangle
            = \mathrm{KL}(Q \Vert P) - \log Z .

    The equality with the divergence holds with `exclude_self=True`; with the centre pixel included, `F` is
    what the updates with the centre pixel decrease.

    Args:
        probs: `q`, `[*batch, *spatial, labels]`.
        logits: `u`, likewise.
        pairwise: as in `mean_field`; every filter and every compatibility matrix symmetric.
        unary_weight: `w_u`, as in `mean_field`.
        exclude_self: leave the pairs `i = j` out, as in `mean_field`.

    Returns:
        The free energy of every image, `[*batch]`.

    Raises:
        ValueError: if shapes disagree or a filter is not symmetric.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> K = jaxcrf.filters.Window(jnp.zeros((1, 2, 1)), 3)
        >>> jaxcrf.free_energy(jnp.full((1, 2, 2), 0.5), jnp.zeros((1, 2, 2)), [(K, 0.0)])  # -2 log 2
        Array(-1.3862944, dtype=float32)

    References:
        Krähenbühl and Koltun, 2011, §3 and supplement.
    """
    terms = _symmetric_terms(pairwise, jnp.shape(logits)[-1], exclude_self)
    unary = check_logits(logits, terms)
    q = check_logits(probs, terms, "probs")
    if q.shape[-1] != unary.shape[-1]:
        raise ValueError(f"probs: got {q.shape[-1]} labels for logits of {unary.shape[-1]}; they must agree")
    negative_entropy = -jnp.sum(jax.scipy.special.entr(q), axis=-1)
    return _sum_pixels(negative_entropy + _energy_density(q, unary, terms, unary_weight), terms)


def _symmetric_terms(pairwise: Any, num_labels: int, exclude_self: bool) -> tuple[PairwiseTerm, ...]:
    terms = pairwise_terms(pairwise, num_labels, exclude_self=exclude_self)
    for term in terms:
        if not term.filter.is_symmetric:
            raise ValueError(
                "pairwise: a filter is not symmetric, so no energy belongs to it; use blur=1 and the "
                "normalisation 'none' or 'symmetric'"
            )
        mu = term.compatibility
        if mu.ndim == 2 and _checks.is_concrete(mu) and not np.allclose(mu, np.transpose(mu)):
            raise ValueError("pairwise: a compatibility matrix is not symmetric, so no energy belongs to it")
    return terms


def _energy_density(q: Array, unary: Array, terms: Sequence[PairwiseTerm], unary_weight: Any) -> Array:
    """The expected energy, pixel by pixel."""
    density = -jnp.sum(jnp.asarray(unary_weight, unary.dtype) * unary * q, axis=-1)
    for term in terms:
        density = density + 0.5 * jnp.sum(q * penalty(term.filter(q), term.compatibility), axis=-1)
    return density


def _sum_pixels(density: Array, terms: Sequence[PairwiseTerm]) -> Array:
    ndim = len(terms[0].filter.spatial) if terms else min(2, density.ndim)
    for _ in range(ndim):  # axis by axis, so that float32 adds few numbers at a time
        density = density.sum(-1)
    return density

"""The pairwise part of an energy, in the forms that every algorithm accepts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxcrf import _checks
from jaxcrf.compatibility import as_compatibility
from jaxcrf.filters import Diagonal, Filter, LinearOperator, PixelLabelOperator


class PairwiseTerm(NamedTuple):
    """One filter and the compatibility its messages pass through."""

    filter: Filter
    compatibility: Array


def pairwise_terms(pairwise: Any, num_labels: int, *, exclude_self: bool = False) -> tuple[PairwiseTerm, ...]:
    """Reads a `pairwise` argument.

    Args:
        pairwise: one filter, which means Potts of weight one, or a sequence of filters and
            `(filter, compatibility)` pairs; an empty sequence is no pairwise term.
        num_labels: `L`, which compatibilities must fit.
        exclude_self: take every pixel out of its own message, as the papers' `i ≠ j` does.

    Returns:
        The terms.

    Raises:
        TypeError: if something else stands where a filter should.
        ValueError: if a compatibility has the wrong shape or filters are over different images.
    """
    if isinstance(pairwise, LinearOperator):
        pairwise = [pairwise]
    if not isinstance(pairwise, Sequence):
        raise TypeError(
            f"pairwise: got {type(pairwise).__name__}; expected a filter or a list of (filter, compatibility)"
        )
    terms = []
    for item in pairwise:
        k, compatibility = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, 1.0)
        if isinstance(k, PixelLabelOperator):
            raise TypeError(
                f"pairwise: got {type(k).__name__}, which mixes labels as well as pixels; expected a filter, which "
                "treats all labels alike, and a compatibility that mixes them. Linear solvers take such operators: "
                "use gaussian_crf or sparse_gaussian_crf with kind='general', or embeddings and edges of kind='potts'"
            )
        if not isinstance(k, Filter):
            raise TypeError(
                f"pairwise: got {type(k).__name__} where a filter should stand; expected a filter or a list of "
                "(filter, compatibility), e.g. [(K, 3.0)]"
            )
        if exclude_self:
            k = k + Diagonal(-k.diagonal(), spatial_ndim=len(k.spatial))
        terms.append(PairwiseTerm(k, as_compatibility(compatibility, num_labels)))
    if len({term.filter.spatial for term in terms}) > 1:
        shapes = sorted({term.filter.spatial for term in terms})
        raise ValueError(
            f"pairwise: filters are over different spatial shapes, {shapes}; build all from one image"
        )
    return tuple(terms)


def check_logits(logits: Any, terms: Sequence[PairwiseTerm], name: str = "logits") -> Array:
    """Makes logits an array of at least float32, with the batch shape that they and the filters share."""
    array = jnp.asarray(logits)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name}: got dtype {array.dtype}; expected floating-point logits [*batch, *spatial, labels]. "
            "Turn label maps into logits with unary_from_labels."
        )
    if array.ndim < 2:
        raise ValueError(f"{name}: got shape {array.shape}; expected [*batch, *spatial, labels]")
    _checks.check_not_empty(name, array)
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    for term in terms:
        array = term.filter.check(array, name)
    return array

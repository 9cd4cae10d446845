"""Unary logits `log p(label | pixel)` from what segmentations come as."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxcrf import _checks


def unary_from_labels(
    labels: Int[Array, " *batch_and_spatial"],
    num_labels: int,
    confidence: float = 0.7,
    ignore_label: int | None = 255,
) -> Float[Array, "*batch_and_spatial labels"]:
    r"""Turns a label map that is right with probability `confidence` into logits.

    .. math::
        u_i(l) = \log c \text{ where } l = \text{labels}_i, \quad
        \log \tfrac{1 - c}{L - 1} \text{ elsewhere}, \quad
        \log \tfrac{1}{L} \text{ everywhere where the label is ignored}.

    Args:
        labels: label map `[*batch, *spatial]`, integers.
        num_labels: `L`.
        confidence: `c`, between `1 / L` and 1, both excluded.
        ignore_label: pixels of this label know nothing and are left to their neighbours; None for no
            such label. Under `jit`, labels out of range are treated likewise.

    Returns:
        Float32 logits `[*batch, *spatial, L]`; `exp` of them sums to one.

    Raises:
        ValueError: if labels are not integers, concrete ones are out of range, or `confidence` is.

    Example:
        >>> import numpy as np
        >>> logits = unary_from_labels(np.array([0, 2, 255]), 3, confidence=0.8)
        >>> np.exp(logits).round(3).tolist()  # doctest: +ELLIPSIS
        [[0.80..., 0.10..., 0.10...], [0.10..., 0.10..., 0.80...], [0.333..., 0.333..., 0.333...]]

    References:
        The gt_prob of Krähenbühl and Koltun's demonstration code, 2011.
    """
    num_labels = _checks.check_num_labels(num_labels)
    labels = _checks.check_labels("labels", labels, num_labels, ignore_label)
    if num_labels == 1:
        return jnp.zeros((*labels.shape, 1), jnp.float32)
    confidence = float(confidence)
    if not 1 / num_labels < confidence < 1:
        raise ValueError(
            f"confidence: got {confidence}; expected more than 1/num_labels = {1 / num_labels:.4g}, below which "
            "a label would speak against itself, and less than 1"
        )
    right, wrong = np.log(confidence), np.log((1 - confidence) / (num_labels - 1))
    hit = jax.nn.one_hot(labels, num_labels, dtype=jnp.bool_)
    known = (labels >= 0) & (labels < num_labels)
    if ignore_label is not None:
        known &= labels != ignore_label
    logits = jnp.where(hit, jnp.float32(right), jnp.float32(wrong))
    return jnp.where(known[..., None], logits, jnp.float32(-np.log(num_labels)))


def unary_from_probs(
    probs: Float[Array, "*batch_and_spatial labels"], clip: float = 1e-5
) -> Float[Array, "*batch_and_spatial labels"]:
    r"""Turns probabilities into logits, `u_i(l) = log max(p_i(l), clip)`.

    Args:
        probs: `[*batch, *spatial, labels]`, summing to one over the last axis up to 1e-2.
        clip: the smallest probability that is believed, so that a zero does not outweigh everything.

    Returns:
        Logits of the same shape; float32, or float64 for float64 input.

    Raises:
        ValueError: if `probs` are not floating point, or concrete ones are not probabilities; if `clip`
            is not between 0 and 1.

    Example:
        >>> import numpy as np
        >>> unary_from_probs(np.array([[1.0, 0.0]], np.float32), clip=np.exp(-4))
        Array([[ 0., -4.]], dtype=float32)
    """
    probs = jnp.asarray(probs)
    if not 0 < clip < 1:
        raise ValueError(f"clip: got {clip}; expected a probability between 0 and 1, e.g. 1e-5")
    _checks.check_probs("probs", probs)
    dtype = jnp.promote_types(probs.dtype, jnp.float32)
    return jnp.log(jnp.maximum(probs.astype(dtype), clip))

"""The pair message: its public function, its argument checks and its VJP rule."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxcrf_kernels._bank import Operands, accumulator_dtype, check_bank
from jaxcrf_kernels._dispatch import Backend, Operation
from jaxcrf_kernels.pair_message import reference
from jaxcrf_kernels.pair_message.reference import PairConfig

OPERATION = Operation(
    "pair_message",
    reference,
    {
        # Tensor cores that multiply TF32 and bfloat16 came with compute capability 8.
        "triton": Backend("jaxcrf_kernels.pair_message.triton_gpu", "cuda", (8, 0)),
        "tpu": Backend("jaxcrf_kernels.pair_message.tpu", "tpu"),
    },
)
IMPLEMENTATIONS = OPERATION.implementations
PRECISIONS = ("float32", "tf32", "bfloat16")


def select_implementation(implementation: str | None = None) -> str:
    """Names the implementation that a call of `pair_message` would use.

    Args:
        implementation: an explicit choice, which is checked and never replaced, or None for the best
            one that this machine has.

    Returns:
        One of `IMPLEMENTATIONS`.

    Raises:
        ValueError: if the name is unknown.
        NotImplementedError: if this machine cannot run an explicit choice.

    Example:
        >>> select_implementation()
        'xla'
    """
    return OPERATION.select(implementation)


def pair_message(
    q: Float[Array, "batch pixels labels"],
    features: Sequence[Float[Array, "b pixels d"]],
    weights: Float[Array, " kernels"],
    *,
    left: Float[Array, "b pixels kernels"] | None = None,
    right: Float[Array, "b pixels kernels"] | None = None,
    spatial: Sequence[int] | None = None,
    cutoff: Sequence[int] | None = None,
    precision: str = "float32",
    tolerance: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "batch pixels labels"]:
    r"""Sums a bank of Gaussian kernels over all pairs of pixels, exactly.

    With `M` kernels,

    .. math::
        (Kq)_i = \sum_j \sum_m w_m\, s_{m,i}\, r_{m,j}\,
            \exp\bigl(-\tfrac12 \lVert f_{m,i} - f_{m,j} \rVert^2\bigr)\, q_j ,

    the pair `i = j` included. Kernel values are computed on the fly from the differences of the features, a
    tile of pairs at a time and for all labels together; nothing of size pixels × pixels is ever held. The
    sum is accumulated in float32 (float64 for float64 input) and returned in the type of `q`.

    The cost is quadratic in the pixels: `arithmetic` counts it.

    Args:
        q: the maps to be filtered, `[batch, pixels, labels]`.
        features: `M` arrays `[batch or 1, pixels, d_m]`, already divided by their bandwidths; `d_m` may be
            0 and may differ between kernels.
        weights: `M` kernel weights.
        left: per-kernel scales `s` of the receiving pixel, `[batch or 1, pixels, M]`; None means 1.
        right: per-kernel scales `r` of the sending pixel, likewise.
        spatial: the shape that the pixels were flattened from, in row-major order. Needed for a cut-off; and
            where it is known, accelerators visit the pixels in compact blocks, of which fewer pairs count.
        cutoff: None, or per spatial axis the largest distance in pixels: pairs that lie farther apart along
            any axis are left out, and tiles of such pairs are not visited.
        precision: the least precision of the product of kernel values and maps (and of the products of maps
            in the backward pass): "float32", "tf32" or "bfloat16", to which both factors are rounded before
            they are multiplied. An implementation may be more precise, and the one of CPUs always is.
            Exponents and sums are float32 whatever it is. See the note on errors.
        tolerance: a pair of tiles may be left out where it is certain that all kernel values are below this.
            0 leaves out only what float32 cannot hold in full, values below 1.2e-38.
        implementation: None for the best available, or one of `IMPLEMENTATIONS`; an explicit choice is
            never replaced by another.

    Returns:
        The messages, `[batch, pixels, labels]`.

    Raises:
        ValueError: if shapes disagree, a cut-off is negative or has no `spatial`, the precision or the
            implementation is unknown, or the tolerance is not in [0, 1).
        TypeError: if `spatial` or `cutoff` are no whole numbers.

    Differentiable once, in reverse mode, in `q`, `features`, `weights`, `left` and `right`. The backward
    pass streams over the pairs like the forward one, and only computes what is asked for.

    Note:
        A message `Σ_j k_ij q_j` is off by at most `ε Σ_j |k_ij q_j|`, besides the rounding of its sum. Kernel
        values are float32, `ε` about 1e-6 where they matter. The product adds 2^-20 for "float32" on
        GPUs, where it is three products of TF32, which has 11 bits, 2^-9 for "tf32" and 2^-8 for
        "bfloat16"; errors of single terms are of either sign, so that most of this cancels. A tolerance
        `t` adds at most `t Σ_m |w_m s_mi| Σ_j |r_mj q_j|`. Gradients are those of the message that is
        computed, pairs left out included, with the same bounds on their products.

    Example:
        >>> import jax.numpy as jnp
        >>> pair_message(jnp.ones((1, 6, 1)), [jnp.zeros((1, 6, 0))], jnp.ones(1))[0, :, 0]
        Array([6., 6., 6., 6., 6., 6.], dtype=float32)
        >>> pair_message(
        ...     jnp.ones((1, 6, 1)), [jnp.zeros((1, 6, 0))], jnp.ones(1), spatial=(2, 3), cutoff=(1, 1)
        ... )[0, :, 0]
        Array([4., 6., 4., 4., 6., 4.], dtype=float32)

    References:
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*,
        2011, eq. 2 and 3.
    """
    OPERATION.check(implementation)
    q = jnp.asarray(q)
    features = tuple(jnp.asarray(f) for f in features)
    weights = jnp.asarray(weights)
    config = _checked_config(q, features, weights, left, right, spatial, cutoff)
    config = config._replace(**_checked_accuracy(precision, tolerance))
    if q.size == 0:
        return q
    dtype = accumulator_dtype(q.dtype)
    features = tuple(f.astype(dtype) for f in features)
    scales = [None if s is None else jnp.asarray(s).astype(dtype) for s in (left, right)]
    if len(features) == 1 and any(s is not None for s in scales):
        # One kernel's scales leave the sum, which then is the same tile in both directions.
        s, r = scales
        scaled = q if r is None else q.astype(dtype) * r
        scaled_operands = Operands(scaled, features, weights.astype(dtype), None, None)
        message = OPERATION(implementation, config, scaled_operands)
        return (message if s is None else message * s).astype(q.dtype)
    return OPERATION(implementation, config, Operands(q, features, weights.astype(dtype), *scales))


def _checked_config(
    q: Array,
    features: Sequence[Array],
    weights: Array,
    left: Any,
    right: Any,
    spatial: Sequence[int] | None,
    cutoff: Sequence[int] | None,
) -> PairConfig:
    if q.ndim != 3:
        raise ValueError(
            f"q: got shape {q.shape}; expected [batch, pixels, labels]. "
            "Reshape leading batch axes into one, and spatial axes into one."
        )
    check_bank(q, features, weights, left, right)
    pixels = q.shape[1]
    shape = None if spatial is None else _whole("spatial", spatial)
    if shape is not None and math.prod(shape) != pixels:
        raise ValueError(
            f"spatial: got {shape}, which is {math.prod(shape)} pixels; expected the shape that the "
            f"{pixels} pixels of q were flattened from"
        )
    whole = PairConfig(shape or (pixels,), None)
    if cutoff is None:
        return whole
    reach = _whole("cutoff", cutoff)
    if shape is None:
        raise ValueError(f"cutoff: got {reach} without spatial; pass spatial=(height, width) of the pixels")
    if len(reach) != len(shape) or any(c < 0 for c in reach):
        raise ValueError(
            f"cutoff: got {reach}; expected {len(shape)} distances >= 0 in pixels, one per spatial axis"
        )
    # Distances longer than the image leave nothing out, and a cut-off of such is none.
    if all(c >= n - 1 for c, n in zip(reach, shape, strict=True)):
        return whole
    return PairConfig(shape, tuple(min(c, n - 1) if n else c for c, n in zip(reach, shape, strict=True)))


def _checked_accuracy(precision: str, tolerance: float) -> dict[str, Any]:
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision: got {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}, the least "
            "precision of the product of kernel values and maps"
        )
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance: got {tolerance}; expected a number in [0, 1): kernel values, which are at most 1, may be "
            "left out where they are below it"
        )
    return {"precision": precision, "tolerance": float(tolerance)}


def _whole(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if np.ndim(values) != 1 or not all(isinstance(v, int | np.integer) for v in values):
        raise TypeError(f"{name}: got {values}; expected whole numbers, one per spatial axis")
    return tuple(map(int, values))


def arithmetic(
    shape: Sequence[int],
    feature_sizes: Sequence[int],
    *,
    spatial: Sequence[int] | None = None,
    cutoff: Sequence[int] | None = None,
) -> dict[str, float]:
    """Counts what a message must at least compute and move, to set a measured time beside.

    Args:
        shape: `[batch, pixels, labels]` of `q`.
        feature_sizes: `d_m` of every kernel.
        spatial: as in `pair_message`.
        cutoff: as in `pair_message`.

    Returns:
        `multiply_adds` (one per ordered pair and label), `exponentials` (one per unordered pair and kernel
        that has features) and `bytes` (reading `q` and the features once, writing the message once,
        float32).

    Example:
        >>> arithmetic((1, 375 * 500, 21), (5,))["multiply_adds"] / 1e9
        738.28125
    """
    batch, pixels, labels = shape
    pairs = pixels**2
    if cutoff is not None and spatial is not None:
        # Along an axis of n pixels, n pairs at distance 0 and 2 (n - d) at every distance d up to c.
        reach = [min(c, n - 1) for c, n in zip(cutoff, spatial, strict=True)]
        pairs = math.prod(n + c * (2 * n - c - 1) for c, n in zip(reach, spatial, strict=True))
    unordered = (pairs + pixels) // 2
    return {
        "multiply_adds": float(batch * pairs * labels),
        "exponentials": float(batch * unordered * sum(d > 0 for d in feature_sizes)),
        "bytes": 4.0 * batch * pixels * (2 * labels + sum(feature_sizes)),
    }

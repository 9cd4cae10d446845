"""The window message: its public function, its argument checks and its VJP rule."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxcrf_kernels._bank import Operands, accumulator_dtype, check_bank
from jaxcrf_kernels._dispatch import Backend, Operation
from jaxcrf_kernels.window_message import reference
from jaxcrf_kernels.window_message.reference import WindowConfig

OPERATION = Operation(
    "window_message",
    reference,
    {
        "triton": Backend("jaxcrf_kernels.window_message.triton_gpu", "cuda", capability=(8, 0)),
        "mosaic_gpu": Backend("jaxcrf_kernels.window_message.mosaic_gpu", "cuda", capability=(9, 0)),
        "tpu": Backend("jaxcrf_kernels.window_message.tpu", "tpu"),
    },
)
IMPLEMENTATIONS = OPERATION.implementations


def select_implementation(implementation: str | None = None) -> str:
    """Names the implementation that a call of `window_message` would use.

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


def window_message(
    q: Float[Array, "batch *spatial labels"],
    features: Sequence[Float[Array, "b *spatial d"]],
    weights: Float[Array, " kernels"],
    *,
    filter_size: int | Sequence[int],
    position_bandwidths: Sequence[Sequence[float] | None] | None = None,
    left: Float[Array, "b *spatial kernels"] | None = None,
    right: Float[Array, "b *spatial kernels"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch *spatial labels"]:
    r"""Sums a bank of Gaussian kernels over a window around every pixel.

    With `M` kernels, offsets `δ` inside the window and everything outside the image equal to zero,

    .. math::
        (Kq)_i = \sum_{j - i = δ} \sum_m w_m\, s_{m,i}\, r_{m,j}\,
            \exp\Bigl(-\tfrac12 \sum_a (δ_a / θ_{m,a})^2 - \tfrac12 \lVert f_{m,i} - f_{m,j} \rVert^2\Bigr) q_j .

    Kernel values are computed on the fly, once per pair and for all labels together; neither direction
    ever holds `labels × window × pixels` numbers. The sum is accumulated in float32 (float64 for float64
    input) and returned in the type of `q`.

    Args:
        q: the maps to be filtered, `[batch, *spatial, labels]` with one to three spatial axes.
        features: `M` arrays `[batch or 1, *spatial, d_m]`, already divided by their bandwidths;
            `d_m` may be 0 and may differ between kernels.
        weights: `M` kernel weights.
        filter_size: the odd width of the window, one for all axes or one per axis.
        position_bandwidths: per kernel None, or the bandwidths `θ` (pixels) of a Gaussian in the offset,
            one per spatial axis. A position term given here costs nothing per pixel.
        left: per-kernel scales `s` of the receiving pixel, `[batch or 1, *spatial, M]`; None means 1.
        right: per-kernel scales `r` of the sending pixel, likewise.
        implementation: None for the best available, or one of `IMPLEMENTATIONS`: "xla" runs everywhere,
            "triton" on NVIDIA GPUs from Ampere on, "mosaic_gpu" on those from Hopper on, "tpu" on TPUs. An
            explicit choice is never replaced by another.

    Returns:
        The messages, `[batch, *spatial, labels]`.

    Raises:
        ValueError: if shapes disagree, a window is even, or the implementation is unknown.
        TypeError: if a window is no whole number.

    Differentiable once, in reverse mode, in `q`, `features`, `weights`, `left` and `right`. The backward
    pass streams over the window like the forward one, and only computes what is asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> q = jnp.ones((1, 4, 5, 2))
        >>> window_message(q, [jnp.zeros((1, 4, 5, 0))], jnp.ones(1), filter_size=3)[0, :, :, 0]
        Array([[4., 6., 6., 6., 4.],
               [6., 9., 9., 9., 6.],
               [6., 9., 9., 9., 6.],
               [4., 6., 6., 6., 4.]], dtype=float32)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, eq. 5 and 6.
    """
    OPERATION.check(implementation)
    q = jnp.asarray(q)
    features = tuple(jnp.asarray(f) for f in features)
    weights = jnp.asarray(weights)
    config = _checked_config(q, features, weights, filter_size, position_bandwidths, left, right)
    if q.size == 0:
        return q
    dtype = accumulator_dtype(q.dtype)
    features = tuple(f.astype(dtype) for f in features)
    scales = [None if s is None else jnp.asarray(s).astype(dtype) for s in (left, right)]
    return OPERATION(implementation, config, Operands(q, features, weights.astype(dtype), *scales))


def _checked_config(
    q: Array,
    features: Sequence[Array],
    weights: Array,
    filter_size: int | Sequence[int],
    position_bandwidths: Sequence[Sequence[float] | None] | None,
    left: Any,
    right: Any,
) -> WindowConfig:
    if not 3 <= q.ndim <= 5:
        raise ValueError(
            f"q: got shape {q.shape}; expected [batch, *spatial, labels] with 1 to 3 spatial axes. "
            "Reshape leading batch axes into one."
        )
    check_bank(q, features, weights, left, right)
    spatial, count = q.shape[1:-1], len(features)
    sizes = _sizes(filter_size, len(spatial))
    if len(sizes) != len(spatial) or any(k < 1 or k % 2 == 0 for k in sizes):
        raise ValueError(
            f"filter_size: got {filter_size}; expected an odd number >= 1, or one for each of the "
            f"{len(spatial)} spatial axes"
        )
    bandwidths: list[tuple[float, ...] | None] = []
    for given in (None,) * count if position_bandwidths is None else position_bandwidths:
        theta = None if given is None else tuple(map(float, given))
        if theta is not None and (len(theta) != len(spatial) or any(not t > 0 for t in theta)):
            raise ValueError(
                f"position_bandwidths: got {theta}; expected {len(spatial)} numbers > 0, one per spatial axis"
            )
        bandwidths.append(theta)
    if len(bandwidths) != count:
        raise ValueError(f"position_bandwidths: got {len(bandwidths)} entries for {count} kernels")
    # Offsets longer than the image reach nothing: the window shrinks to what the image can fill.
    sizes = tuple(min(k, 2 * n - 1) if n else k for k, n in zip(sizes, spatial, strict=True))
    return WindowConfig(filter_size=sizes, position_bandwidths=tuple(bandwidths))


def _sizes(filter_size: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = (filter_size,) * ndim if np.ndim(filter_size) == 0 else tuple(filter_size)  # type: ignore[arg-type]
    if not all(isinstance(k, int | np.integer) for k in sizes):
        raise TypeError(f"filter_size: got {filter_size}; expected whole numbers")
    return tuple(map(int, sizes))


def arithmetic(
    shape: Sequence[int], filter_size: int | Sequence[int], feature_sizes: Sequence[int]
) -> dict[str, float]:
    """Counts what a message must at least compute and move, to set a measured time beside.

    Args:
        shape: `[batch, *spatial, labels]` of `q`.
        filter_size: as in `window_message`.
        feature_sizes: `d_m` of every kernel.

    Returns:
        `multiply_adds` (one per pair and label), `exponentials` (one per pair and kernel that has
        features) and `bytes` (reading `q` and the features once, writing the message once, float32).

    Example:
        >>> arithmetic((1, 375, 500, 21), 11, (3,))["multiply_adds"] / 1e6
        476.4375
    """
    *pixels, labels = shape
    spatial = pixels[1:]
    sizes = _sizes(filter_size, len(spatial))
    pairs = math.prod(pixels) * math.prod(sizes)
    return {
        "multiply_adds": float(pairs * labels),
        "exponentials": float(pairs * sum(d > 0 for d in feature_sizes)),
        "bytes": 4.0 * math.prod(pixels) * (2 * labels + sum(feature_sizes)),
    }

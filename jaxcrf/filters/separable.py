"""Gaussians of position only: one exact convolution along every axis."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from jaxcrf.features import Features
from jaxcrf.filters.arguments import read_features, read_weights
from jaxcrf.filters.base import filter_pytree
from jaxcrf.filters.gaussian import GaussianFilter, Kernel
from jaxcrf_kernels._materialize import on_materialized

# Up to this many taps a convolution is written out as shifted sums, which a CPU runs at the speed of its
# multiply-adds (8.5 ms for both axes of 375×500×21 at 33 taps, of 15 to 25 ms for one axis as a matrix
# product); beyond it, blocks of a banded matrix are multiplied.
MAX_TAPS = 65


@filter_pytree(
    data=("kernels", "weights", "left", "right"),
    static=("symmetric_scales",),
)
class Separable(GaussianFilter):
    r"""Gaussians of position over all pairs of pixels, exact, one axis at a time.

    .. math::
        (K q)_i = \sum_m w_m \sum_j \exp\bigl(-\tfrac12 \textstyle\sum_a (p_{ia} - p_{ja})^2 / θ_{ma}^2\bigr)\, q_j

    factorises over the axes. Beyond 5.2 bandwidths (8.2 in float64) terms are left out, which together are
    less than the rounding of the rest: `erfc(5.2 / √2) = 2e-7`. The cost per pixel, label and axis is about
    `10 θ` multiply-adds, whatever the image.

    The fully connected filters take this path by themselves for kernels that are of position only.

    Args:
        features: `position_features(shape, bandwidth)` with a bandwidth known as a number, or a tuple.
        weights: one number for all kernels, or one per kernel.
        spatial_ndim: 2 for images, 3 for volumes.

    Raises:
        ValueError: if features hold more than positions, or their bandwidths are not known.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> K = Separable(jaxcrf.position_features((1, 3), 1.0))
        >>> (100 * K(jnp.array([[[0.0], [1.0], [0.0]]]))[0, :, 0]).round()  # exp(-1/2) beside the peak
        Array([ 61., 100.,  61.], dtype=float32)

    References:
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
        Potentials*, 2011, eq. 3 (second kernel).
    """

    def __init__(self, features: Any, *, weights: Any = 1.0, spatial_ndim: int = 2):
        kernels = read_features(features, spatial_ndim)
        for f in kernels:
            if not is_position_only(f, spatial_ndim):
                raise ValueError(
                    f"features: got {f.values.shape[-1]} features with position bandwidths "
                    f"{f.position_bandwidths}; expected jaxcrf.position_features with a known bandwidth. "
                    "Use Lattice, Landmark or Dense for anything else."
                )
        self._set_kernels(
            [SeparableKernel.of(f, spatial_ndim) for f in kernels], read_weights(weights, len(kernels))
        )


def is_position_only(f: Features, spatial_ndim: int) -> bool:
    """Whether features are coordinates over known bandwidths and nothing else."""
    return f.position_bandwidths is not None and f.values.shape[-1] == spatial_ndim


@filter_pytree(data=(), static=("spatial", "bandwidths", "cutoff"))
class SeparableKernel(Kernel):
    """A Gaussian of position with known bandwidths; it holds no array."""

    spatial: tuple[int, ...]
    bandwidths: tuple[float, ...]
    cutoff: tuple[int, ...] | None
    batch = ()
    is_symmetric = True
    restricts = False

    @classmethod
    def of(cls, f: Features, spatial_ndim: int, cutoff: tuple[int, ...] | None = None) -> "SeparableKernel":
        """The kernel of position features, zero beyond a cut-off in pixels along any axis."""
        spatial = f.values.shape[-1 - spatial_ndim : -1]
        return cls.from_fields(spatial=spatial, bandwidths=f.position_bandwidths, cutoff=cutoff)

    @property
    def T(self) -> "SeparableKernel":  # noqa: D102
        return self

    def diagonal(self) -> Array:  # noqa: D102
        return jnp.ones(self.spatial)

    def convolve(self, x: Array) -> Array:  # noqa: D102
        return gaussian_convolution(x, self.spatial, self.bandwidths, self.cutoff)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gaussian_convolution(
    x: Array,
    spatial: tuple[int, ...],
    bandwidths: tuple[float, ...],
    cutoff: tuple[int, ...] | None = None,
) -> Array:
    """Filters `[*batch, *spatial, c]` with `exp(-½ Σ (Δ/θ)²)`, exact to the rounding of its type.

    A cut-off leaves out what is farther away along some axis, in pixels.
    """
    for a, (n, theta) in enumerate(zip(spatial, bandwidths, strict=True)):
        # In float64 terms beyond 8.2 bandwidths are lost in rounding, as those beyond 5.2 are in float32.
        reach = math.ceil(theta * (5.2 if jnp.finfo(x.dtype).bits <= 32 else 8.2))
        reach = min(reach, n - 1 if cutoff is None else cutoff[a], n - 1)
        if reach > 0:
            lines = x.reshape(math.prod(x.shape[: x.ndim - 1 - len(spatial) + a]), n, -1)
            x = sequential_vmap(functools.partial(_along, theta, reach))(lines).reshape(x.shape)
    return x


def _forward(x: Array, *geometry: Any) -> tuple[Array, None]:
    return gaussian_convolution(x, *geometry), None


def _backward(spatial: Any, bandwidths: Any, cutoff: Any, _: None, cotangent: Array) -> tuple[Array]:
    return (gaussian_convolution(cotangent, spatial, bandwidths, cutoff),)


gaussian_convolution.defvjp(_forward, _backward)


def _along(theta: float, reach: int, x: Array) -> Array:
    """Filters `[a, n, s]` along its middle axis, as far as `reach`."""
    count, n, step = x.shape
    if 2 * reach + 1 > MAX_TAPS or n <= 2 * reach:
        return _banded(x, theta, reach)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / theta) ** 2)
    lines = x.reshape(count, n * step)
    # Both ends as small matrix products: zeros around the lines would cost a copy, element by element. The rest
    # on its own, because in one loop with what it is joined to it would not be vectorised.
    inner = on_materialized(functools.partial(_taps, weights, n - 2 * reach, step), lines)
    end = _band(np.arange(reach), np.arange(2 * reach), theta, reach)
    first = _multiply(end, x[:, : 2 * reach])
    last = _multiply(end[::-1, ::-1], x[:, n - 2 * reach :])
    return jnp.concatenate([first, inner.reshape(count, -1, step), last], axis=1)


def _taps(weights: np.ndarray, n: int, step: int, lines: Array) -> Array:
    """The weighted sums of shifted lines, `n` of the places where all of the shifts are inside."""
    reach = len(weights) // 2

    def shifted(t: int) -> Array:
        return lax.slice_in_dim(lines, t * step, (t + n) * step, axis=1)

    total = float(weights[reach]) * shifted(reach)
    for t in range(reach):
        total = total + float(weights[t]) * (shifted(t) + shifted(2 * reach - t))
    return total


def _banded(x: Array, theta: float, reach: int) -> Array:
    """The same as products with blocks of the banded matrix, each `[block, block + 2 reach]`."""
    count, n, step = x.shape
    block = max(2 * reach, 64)
    if n <= block + 2 * reach:
        return _multiply(_band(np.arange(n), np.arange(n), theta, reach), x)
    band = _band(np.arange(block), np.arange(block + 2 * reach) - reach, theta, reach)
    blocks = math.ceil(n / block)
    padded = jnp.pad(x, ((0, 0), (reach, reach + blocks * block - n), (0, 0)))

    def one_block(start: Array) -> Array:
        return _multiply(band, lax.dynamic_slice_in_dim(padded, start, block + 2 * reach, axis=1))

    found = lax.map(one_block, jnp.arange(blocks, dtype=jnp.int32) * block)
    return jnp.moveaxis(found, 0, 1).reshape(count, blocks * block, step)[:, :n]


def _band(rows: np.ndarray, columns: np.ndarray, theta: float, reach: int) -> np.ndarray:
    distance = rows[:, None] - columns[None, :]
    return np.where(np.abs(distance) <= reach, np.exp(-0.5 * (distance / theta) ** 2), 0)


def _multiply(matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum("ij,ajs->ais", jnp.asarray(matrix, x.dtype), x, precision=lax.Precision.HIGHEST)

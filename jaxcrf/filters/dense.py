"""The Gaussian filter over all pairs of pixels, summed exactly."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcrf import _checks
from jaxcrf.filters.arguments import read_features, read_weights
from jaxcrf.filters.base import filter_pytree, flatten_batch
from jaxcrf.filters.gaussian import GaussianFilter, Kernel
from jaxcrf.filters.separable import SeparableKernel, is_position_only
from jaxcrf_kernels import pair_message
from jaxcrf_kernels.pair_message import PRECISIONS, select_implementation


@filter_pytree(
    data=("kernels", "weights", "left", "right"),
    static=("symmetric_scales",),
)
class Dense(GaussianFilter):
    r"""The fully connected Gaussian filter, every pair of pixels summed: exact, and quadratic in the pixels.

    .. math::
        (K q)_i = \sum_m w_m \sum_j \exp(-\tfrac12 \lVert f_{mi} - f_{mj} \rVert^2)\, q_j

    Kernel values are computed from differences of features, a tile of pairs at a time, and used for all
    labels and all kernels; nothing of size pixels × pixels is ever held, in either direction. The messages
    are those of float64 up to the rounding of the sums, about 1e-6 of the largest.

    Kernels of position alone (`position_features` with a known bandwidth) are evaluated axis by axis.

    On two CPU cores a message takes about a quarter of a second at 96×128 with 21 labels, and 200 times as
    long at 375×500: there `Lattice` and `Landmark` approximate it, and this is what they are measured by.

    Args:
        features: of one kernel `[*batch, *spatial, d]`, divided by the bandwidths, or a tuple.
        weights: one number for all kernels, or one per kernel.
        cutoff: None, or the largest distance of a pair in pixels, along every axis or one number per axis.
            Pairs that lie farther apart are left out, and tiles of such are not visited. Four bandwidths
            of position leave out what is below 3e-4 of the peak.
        spatial_ndim: 2 for images, 3 for volumes.
        precision: the least precision of the products of kernel values and maps, "float32", "tf32" (about 3
            digits) or "bfloat16" (2 to 3); kernel values and sums are float32 whatever it is. GPUs multiply
            faster with less, and CPUs always compute in full. See `jaxcrf_kernels.pair_message`.
        implementation: None for the best available, or a name that `jaxcrf info` lists.

    Raises:
        ValueError: if shapes or options do not fit, or features hold NaN (concrete features only).

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> image = jnp.zeros((6, 8, 3)).at[:, 4:].set(255.0)
        >>> K = jaxcrf.filters.Dense(jaxcrf.bilateral_features(image, 80, 13))
        >>> K(jnp.ones((6, 8, 1)))[3, :, 0].round()  # nothing crosses the edge in the middle of the image
        Array([24., 24., 24., 24., 24., 24., 24., 24.], dtype=float32)

    References:
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
        Potentials*, 2011, eq. 2 and 3.
    """

    def __init__(
        self,
        features: Any,
        *,
        weights: Any = 1.0,
        cutoff: int | Sequence[int] | None = None,
        spatial_ndim: int = 2,
        precision: str = "float32",
        implementation: str | None = None,
    ):
        select_implementation(implementation)
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: got {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}"
            )
        read = read_features(features, spatial_ndim)
        reach = _read_cutoff(cutoff, spatial_ndim)
        kernels: list[Kernel] = []
        for f in read:
            if is_position_only(f, spatial_ndim):
                kernels.append(SeparableKernel.of(f, spatial_ndim, reach))
            else:
                _checks.check_finite("features", f.values)
                spatial = f.values.shape[-1 - spatial_ndim : -1]
                kernels.append(
                    PairKernel.from_fields(
                        features=f.values,
                        spatial=spatial,
                        cutoff=reach,
                        precision=precision,
                        implementation=implementation,
                    )
                )
        self._set_kernels(kernels, read_weights(weights, len(read)))

    @property
    def restricts(self) -> bool:  # noqa: D102
        return False

    @property
    def num_restricted(self) -> int:  # noqa: D102
        return 1

    def restrict(self, q: Array) -> tuple[Array, ...]:  # noqa: D102
        return (q.astype(jnp.promote_types(q.dtype, jnp.float32)),)

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        (q,) = restricted
        pairs = [m for m, k in enumerate(self.kernels) if isinstance(k, PairKernel)]
        parts = [self._term(m, q) for m in range(len(self.kernels)) if m not in pairs]
        if len(pairs) == 1:
            parts.append(self._term(pairs[0], q))
        elif pairs:  # one pass over the pairs of pixels serves all kernels
            parts.append(self._merged(pairs, q))
        return (functools.reduce(jnp.add, parts),)

    def prolong(self, convolved: tuple[Array, ...]) -> Array:  # noqa: D102
        return convolved[0]

    def _merged(self, pairs: list[int], q: Array) -> Array:
        kernels = [k for k in self.kernels if isinstance(k, PairKernel)]
        weights = jnp.stack([self.weights[m] for m in pairs])
        left, right = (self._scales([side[m] for m in pairs]) for side in (self.left, self.right))
        return _message(kernels, weights, q, left, right)

    def _scales(self, scales: list[Array | None]) -> Array | None:
        """The scales of some kernels side by side, `[*batch, *spatial, kernels]`; ones where one has none."""
        if all(s is None for s in scales):
            return None
        ones = jnp.ones(self.spatial, self.weights.dtype)
        return jnp.stack(jnp.broadcast_arrays(*(ones if s is None else s for s in scales)), axis=-1)


@filter_pytree(data=("features",), static=("spatial", "cutoff", "precision", "implementation"))
class PairKernel(Kernel):
    """One Gaussian, evaluated for every pair of pixels."""

    features: Array  # [*batch, *spatial, d]
    spatial: tuple[int, ...]
    cutoff: tuple[int, ...] | None
    precision: str
    implementation: str | None
    is_symmetric = True
    restricts = False

    @property
    def batch(self) -> tuple[int, ...]:  # type: ignore[override]  # noqa: D102
        return self.features.shape[: self.features.ndim - 1 - len(self.spatial)]

    @property
    def T(self) -> "PairKernel":  # noqa: D102
        return self

    def diagonal(self) -> Array:  # noqa: D102
        return jnp.ones((*self.batch, *self.spatial), self.features.dtype)

    def convolve(self, x: Array) -> Array:  # noqa: D102
        return _message([self], jnp.ones(1, x.dtype), x, None, None)


def _message(
    kernels: Sequence[PairKernel], weights: Array, q: Array, left: Array | None, right: Array | None
) -> Array:
    """The messages of all kernels, on maps `[*batch, *spatial, labels]`."""
    first = kernels[0]
    ndim = 1 + len(first.spatial)
    batch = jnp.broadcast_shapes(q.shape[:-ndim], *(k.batch for k in kernels))

    def flatten(x: Array) -> Array:
        flat = flatten_batch(x, batch, ndim)
        return flat.reshape(len(flat), math.prod(first.spatial), x.shape[-1])

    maps = jnp.broadcast_to(q, (*batch, *q.shape[-ndim:]))
    message = pair_message(
        maps.reshape(math.prod(batch), -1, q.shape[-1]),
        [flatten(k.features) for k in kernels],
        weights,
        left=None if left is None else flatten(left),
        right=None if right is None else flatten(right),
        spatial=first.spatial,
        cutoff=first.cutoff,
        precision=first.precision,
        implementation=first.implementation,
    )
    return message.reshape(maps.shape)


def _read_cutoff(cutoff: Any, spatial_ndim: int) -> tuple[int, ...] | None:
    if cutoff is None:
        return None
    values = tuple(cutoff) if np.ndim(cutoff) == 1 else (cutoff,) * spatial_ndim
    if len(values) != spatial_ndim or not all(_checks.is_whole(v) and v >= 0 for v in values):
        raise ValueError(
            f"cutoff: got {cutoff!r}; expected a whole number of pixels >= 0, or one for each of "
            f"{spatial_ndim} axes"
        )
    return tuple(int(v) for v in values)

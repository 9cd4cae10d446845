"""What the fully connected Gaussian filters share: weighted, normalised sums of Gaussian kernels."""

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcrf._checks import Normalization, check_normalization
from jaxcrf.filters.base import Filter, Immutable, normalizing_scales


class Kernel(Immutable, abc.ABC):
    """One Gaussian kernel of weight one, as an immutable pytree: `prolong ∘ convolve ∘ restrict`.

    Maps are `[*batch, *spatial, labels]` in float32 or wider, with the kernel's own batch broadcast already.
    """

    spatial: tuple[int, ...]
    batch: tuple[int, ...]
    is_symmetric: bool
    restricts: bool

    @property
    @abc.abstractmethod
    def T(self) -> "Kernel":
        """The exact transpose."""

    @abc.abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, broadcastable to `[*batch, *spatial]`."""

    def restrict(self, q: Array) -> Array:
        """Brings a map to the kernel's own grid."""
        return q

    @abc.abstractmethod
    def convolve(self, x: Array) -> Array:
        """Filters on that grid."""

    def prolong(self, x: Array) -> Array:
        """Brings the result back to pixels."""
        return x


class GaussianFilter(Filter):
    r"""A weighted sum of Gaussian kernels over all pairs of pixels, `K = Σ_m w_m diag(l_m) K_m diag(r_m)`.

    The base of the fully connected filters; they differ in how, and how exactly, they evaluate a kernel.
    """

    kernels: tuple[Kernel, ...]
    weights: Array  # [kernels]
    left: tuple[Array | None, ...]  # per kernel [*batch, *spatial], applied after it
    right: tuple[Array | None, ...]  # likewise, applied before it
    symmetric_scales: bool

    def _set_kernels(self, kernels: Sequence[Kernel], weights: Array) -> None:
        none = (None,) * len(kernels)
        self._initialize(
            kernels=tuple(kernels), weights=weights, left=none, right=none, symmetric_scales=True
        )

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self.kernels[0].spatial

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        scales = [s.shape[: s.ndim - len(self.spatial)] for s in (*self.left, *self.right) if s is not None]
        return jnp.broadcast_shapes(*(k.batch for k in self.kernels), *scales)

    @property
    def is_symmetric(self) -> bool:  # noqa: D102
        return self.symmetric_scales and all(k.is_symmetric for k in self.kernels)

    @property
    def T(self) -> Self:  # noqa: D102
        return self.replace(kernels=tuple(k.T for k in self.kernels), left=self.right, right=self.left)

    def diagonal(self) -> Array:  # noqa: D102
        total = jnp.zeros((), self.weights.dtype)
        for m, k in enumerate(self.kernels):
            total = total + self.weights[m] * _scale(_scale(k.diagonal(), self.left[m]), self.right[m])
        return jnp.broadcast_to(total, (*self.batch, *self.spatial))

    def normalized(self, kind: Normalization) -> Self:  # noqa: D102
        check_normalization(kind)
        none = (None,) * len(self.kernels)
        bare = self.replace(left=none, right=none, symmetric_scales=True)
        if kind == "none":
            return bare
        scales = [normalizing_scales(row_sums(k, self.weights.dtype), kind) for k in self.kernels]
        left, right = zip(*scales, strict=True)
        return bare.replace(left=left, right=right, symmetric_scales=kind == "symmetric")

    @property
    def restricts(self) -> bool:  # noqa: D102
        return len(self.kernels) > 1 or self.kernels[0].restricts or self.right[0] is not None

    @property
    def num_restricted(self) -> int:  # noqa: D102
        return len(self.kernels)

    def restrict(self, q: Array) -> tuple[Array, ...]:  # noqa: D102
        q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        return tuple(self._restrict(m, q) for m in range(len(self.kernels)))

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        return tuple(k.convolve(x) for k, x in zip(self.kernels, restricted, strict=True))

    def prolong(self, convolved: tuple[Array, ...]) -> Array:  # noqa: D102
        parts = [self._prolong(m, x) for m, x in enumerate(convolved)]
        return functools.reduce(jnp.add, parts)

    def _restrict(self, m: int, q: Array) -> Array:
        right = self.right[m]
        return self.kernels[m].restrict(_scale(q, None if right is None else right[..., None]))

    def _prolong(self, m: int, x: Array) -> Array:
        scale = _scale(self.weights[m], self.left[m])
        return _scale(self.kernels[m].prolong(x), scale if scale.ndim == 0 else scale[..., None])

    def _term(self, m: int, q: Array) -> Array:
        """What one of the kernels adds to the message of maps that are float32 or wider."""
        return self._prolong(m, self.kernels[m].convolve(self._restrict(m, q)))


def _scale(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale


@functools.partial(jax.jit, static_argnums=1)
def row_sums(kernel: Kernel, dtype: Any) -> Array:
    """`K 1` of a kernel, `[*batch, *spatial]`."""
    ones = jnp.ones((*kernel.batch, *kernel.spatial, 1), dtype)
    return kernel.prolong(kernel.convolve(kernel.restrict(ones)))[..., 0]


def map_batch(
    function: Callable[..., Array], shared: Any, batch: int, x: Array, ndim: int, own_batch: int
) -> Array:
    """Applies `function(shared_item, x_item)` to every item of a batch, one after the other.

    Args:
        function: of one item's arrays and one item of `x`.
        shared: a tree of arrays with `own_batch` leading items.
        batch: how many items `x` has.
        x: `[*batch axes, …]` with `ndim` trailing axes.
        ndim: the trailing axes of one item.
        own_batch: 1 where one item of `shared` serves the whole batch.

    Returns:
        The stacked results `[batch, …]`.
    """
    flat = x.reshape(batch, *x.shape[x.ndim - ndim :])
    if own_batch == 1:
        only = jax.tree.map(lambda a: a[0], shared)
        if batch == 1:
            return function(only, flat[0])[None]
        return lax.map(lambda item: function(only, item), flat)
    return lax.map(lambda items: function(*items), (shared, flat))


def flat_batch(shape: tuple[int, ...]) -> int:
    """How many items a batch shape holds."""
    return math.prod(shape)

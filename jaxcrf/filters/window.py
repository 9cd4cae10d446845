"""The truncated Gaussian filter of ConvCRF."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf._checks import Normalization, check_normalization
from jaxcrf.features import Features
from jaxcrf.filters.arguments import read_features, read_weights
from jaxcrf.filters.base import (
    Filter,
    filter_pytree,
    flatten_batch,
    normalizing_scales,
)
from jaxcrf.filters.halo import Blocks, place, read_sharding
from jaxcrf.filters.resampling import (
    average_pool,
    bilinear_upsample,
    cells,
    pixels_per_cell,
    repeat_cells,
    shift,
    upsample_weights,
)
from jaxcrf_kernels import window_message
from jaxcrf_kernels.window_message import select_implementation


@filter_pytree(
    data=("features", "weights", "left", "right"),
    static=(
        "_spatial",
        "filter_size",
        "blur",
        "position_bandwidths",
        "transposed",
        "symmetric_scales",
        "implementation",
        "sharding",
    ),
)
class Window(Filter):
    r"""Gaussian kernels inside a window around every pixel, exact there and zero outside.

    .. math::
        (Kq)_i = \sum_{\lVert i - j \rVert_\infty \le s} \sum_m w_m
            \exp\bigl(-\tfrac12 \lVert f_{m,i} - f_{m,j} \rVert^2\bigr)\, q_j,
        \qquad \text{filter size} = 2s + 1 .

    Several kernels are merged into one pass over `q`. Kernel values are never stored. With `blur = b > 1`
    the filter is `U K P`: features and maps are averaged over `b × b` cells (`P`), filtered on that
    grid, and brought back bilinearly (`U`), so that the window reaches `b` times as far. The centre pixel
    is part of the window, pixels outside the image count as zero.

    Differentiable once, in reverse mode, in `q`, in the features (through them in images and bandwidths)
    and in the weights; neither direction ever holds `labels × window × pixels` numbers.

    With a `sharding` that splits spatial axes, one image lives on several devices, and the result is that of one
    device up to rounding. Every device filters a block of its own and gets from its neighbours, for every message,
    the `filter_size // 2` rows (columns, …) of the grid that its windows reach into; those of the features and
    the scales it got once, when the filter was built. Everything else stays code on whole maps that XLA
    partitions. Sizes need not divide by the devices; blocks smaller than the window get theirs from several.
    With `blur`, sizes that are multiples of devices × blur move the least: others make pixels follow their cells
    to another device and back, which takes several times the bytes of the halos.

    Args:
        features: one kernel's features or a tuple of several kernels', each `Features` or an array
            `[*batch, *spatial, d]` already divided by its bandwidths. Batch axes broadcast.
        filter_size: the odd width of the window, in pixels of the blurred grid; one number, or one per
            spatial axis.
        weights: one number for all kernels, or one per kernel.
        blur: the pooling factor `b`.
        spatial_ndim: 2 for images, 3 for volumes.
        implementation: None for the best available, or a name that `jaxcrf info` lists.
        sharding: None, or which mesh axes split the axes of the features' `[*batch, *spatial]`: a
            `jax.sharding.NamedSharding` as arrays of that shape have it. Entries in front of these axes are for
            batches of maps over shared features.

    Raises:
        TypeError: if `sharding` is no `NamedSharding` over devices.
        ValueError: on an even or non-positive window, features that disagree in their spatial shape,
            a wrong number of weights, zero-size arrays; if a sharded filter meets maps inside `shard_map`, where
            axes are split already.

    Example:
        >>> import jax, jax.numpy as jnp, jaxcrf
        >>> image = jnp.zeros((6, 8, 3)).at[:, 4:].set(255.0)
        >>> K = jaxcrf.filters.Window(jaxcrf.bilateral_features(image, 80, 13), filter_size=3)
        >>> q = jnp.ones((6, 8, 1))
        >>> K(q)[3, :, 0].round(2)  # nothing crosses the edge in the middle of the image
        Array([6., 9., 9., 6., 6., 9., 9., 6.], dtype=float32)

        Rows over all devices, however many there are:

        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> rows = NamedSharding(jax.make_mesh((jax.device_count(),), ("rows",)), PartitionSpec("rows"))
        >>> K = jaxcrf.filters.Window(
        ...     jaxcrf.bilateral_features(image, 80, 13), filter_size=3, sharding=rows
        ... )
        >>> K(q)[3, :, 0].round(2)
        Array([6., 9., 9., 6., 6., 9., 9., 6.], dtype=float32)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, eq. 5, 6 and §4.2.
    """

    # Per kernel, on the filter's grid, without tabulated positions; extended blocks (see halo.py) where sharded.
    features: tuple[Array, ...]
    weights: Array  # [kernels]
    # [*batch, *spatial, kernels], per pixel, applied after the kernel; at blur 1 extended blocks where sharded.
    left: Array | None
    right: Array | None  # likewise, applied before it
    _spatial: tuple[int, ...]
    filter_size: tuple[int, ...]
    blur: int
    position_bandwidths: tuple[tuple[float, ...] | None, ...]  # tabulated positions, in cells of the grid
    transposed: bool
    symmetric_scales: bool
    implementation: str | None
    sharding: NamedSharding | None  # one entry per axis of [*batch, *spatial]

    def __init__(
        self,
        features: Features | Any | Sequence[Features | Any],
        filter_size: int | Sequence[int] = 11,
        *,
        weights: Any = 1.0,
        blur: int = 1,
        spatial_ndim: int = 2,
        implementation: str | None = None,
        sharding: NamedSharding | None = None,
    ):
        kernels = read_features(features, spatial_ndim)
        weights = read_weights(weights, len(kernels))
        spatial = kernels[0].values.shape[-1 - spatial_ndim : -1]
        sizes: tuple[Any, ...] = tuple(filter_size) if np.ndim(filter_size) else (filter_size,) * spatial_ndim  # type: ignore[arg-type]
        if len(sizes) != spatial_ndim or any(not _checks.is_whole(k) or k < 1 or k % 2 == 0 for k in sizes):
            raise ValueError(
                f"filter_size: got {filter_size}; expected an odd number >= 1 (a window has a centre), "
                f"or one for each of the {spatial_ndim} spatial axes"
            )
        if not _checks.is_whole(blur) or blur < 1:
            raise ValueError(f"blur: got {blur!r}; expected a whole number >= 1")
        select_implementation(implementation)
        blur, sizes = int(blur), tuple(map(int, sizes))
        blocks = None
        if sharding is not None:
            axes = max([f.values.ndim - 1 for f in kernels] + [len(getattr(sharding, "spec", ()))])
            sharding = read_sharding(sharding, axes)
            blocks = _blocks_on_grid(sharding, spatial, blur, sizes)
        on_grid = [_split_positions(f, blur, spatial) for f in kernels]
        self._initialize(
            features=tuple(_to_grid(values, blur, spatial, blocks) for values, _ in on_grid),
            weights=weights,
            left=None,
            right=None,
            _spatial=spatial,
            filter_size=sizes,
            blur=blur,
            position_bandwidths=tuple(bandwidths for _, bandwidths in on_grid),
            transposed=False,
            symmetric_scales=True,
            implementation=implementation,
            sharding=sharding,
        )

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self._spatial

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        tail = 1 + len(self._spatial)
        arrays = [*self.features, *(s for s in (self.left, self.right) if s is not None)]
        return jnp.broadcast_shapes(*(x.shape[: x.ndim - tail] for x in arrays))

    @property
    def is_symmetric(self) -> bool:
        """True at blur 1 without, or with symmetric, normalisation."""
        return self.blur == 1 and self.symmetric_scales

    @property
    def T(self) -> "Window":
        """The transpose: scales change sides, and `U K P` becomes `Pᵀ K Uᵀ`."""
        return self.replace(
            left=self.right, right=self.left, transposed=not self.transposed and self.blur > 1
        )

    def diagonal(self) -> Float[Array, "*batch_and_spatial"]:  # noqa: D102
        # A Gaussian is one at the centre; what blur does to it depends on where in its cell a pixel lies.
        kernels = self.weights if self.blur == 1 else self.weights * self._blurred_diagonals()
        for scale in (self.left, self.right):
            if scale is not None:
                kernels = kernels * (scale if self.blur > 1 else self._on_pixels(scale))
        return jnp.broadcast_to(kernels.sum(-1), (*self.batch, *self._spatial))

    def normalized(self, kind: Normalization) -> "Window":  # noqa: D102
        check_normalization(kind)
        bare = self.replace(left=None, right=None, symmetric_scales=True)
        if kind == "none":
            return bare
        sums = []
        for m in range(len(self.features)):
            kernel = bare.replace(
                features=self.features[m : m + 1],
                position_bandwidths=self.position_bandwidths[m : m + 1],
                weights=jnp.ones((1,), self.weights.dtype),
            )
            sums.append(kernel(jnp.ones((*self._spatial, 1), self.weights.dtype)))
        batch = jnp.broadcast_shapes(*(x.shape for x in sums))
        joint = jnp.concatenate([jnp.broadcast_to(x, batch) for x in sums], axis=-1)
        left, right = normalizing_scales(joint, kind)
        blocks = self._blocks
        if blocks is not None and self.blur == 1:  # where the scales are part of the message
            left, right = (None if x is None else _extend(x, blocks) for x in (left, right))
        return bare.replace(left=left, right=right, symmetric_scales=kind == "symmetric")

    @property
    def restricts(self) -> bool:  # noqa: D102
        return self.blur > 1

    @property
    def pools(self) -> bool:  # noqa: D102
        return self.blur > 1

    @property
    def num_restricted(self) -> int:  # noqa: D102
        return 1 if self.blur == 1 or (self.left is None and self.right is None) else len(self.features)

    def check(self, q: Any, name: str = "q") -> Array:
        """As every filter's; where sharded, concrete maps are spread over the devices."""
        # Before it is an array of one device.
        return super().check(self._place(q), name)

    def restrict(self, q: Array) -> tuple[Array, ...]:  # noqa: D102
        q = self._constrain(q)
        if self.blur == 1:
            return (q,)
        if self.num_restricted == 1 and self.right is None:
            return (self._pool(q),)
        # A scaled kernel reads a map of its own.
        return tuple(
            self._pool(q if self.right is None else (self.right[..., m, None] * q).astype(q.dtype))
            for m in range(self.num_restricted)
        )

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        if self.blur == 1:
            return (self._message(restricted[0], slice(None), self.left, self.right),)
        if len(restricted) == len(self.features):
            return tuple(self._message(q, slice(m, m + 1)) for m, q in enumerate(restricted))
        return (self._message(restricted[0], slice(None)),)

    def prolong(self, convolved: tuple[Array, ...]) -> Array:  # noqa: D102
        if self.blur == 1:
            return self._constrain(convolved[0])
        if self.left is None:
            return self._constrain(self._unpool(sum(convolved[1:], convolved[0])))
        parts = [self.left[..., m, None] * self._unpool(x) for m, x in enumerate(convolved)]
        return self._constrain(sum(parts[1:], parts[0]).astype(convolved[0].dtype))

    def __add__(self, other: Filter) -> Filter:
        """Merges two windows of one geometry into one bank, so that both are filtered in one pass."""
        static = ("_spatial", "filter_size", "blur", "transposed", "implementation", "sharding")
        if not isinstance(other, Window) or any(getattr(self, s) != getattr(other, s) for s in static):
            return super().__add__(other)
        return self.replace(
            features=self.features + other.features,
            weights=jnp.concatenate([self.weights, other.weights]),
            left=_join_scales(self, other, "left"),
            right=_join_scales(self, other, "right"),
            position_bandwidths=self.position_bandwidths + other.position_bandwidths,
            symmetric_scales=self.symmetric_scales and other.symmetric_scales,
        )

    @property
    def _blocks(self) -> Blocks | None:
        """How the grid of the message is split over devices."""
        if self.sharding is None:
            return None
        return _blocks_on_grid(self.sharding, self._spatial, self.blur, self.filter_size)

    @property
    def _grid(self) -> tuple[int, ...]:
        """Cells of the message, with those that fill blocks up."""
        blocks = self._blocks
        return tuple(cells(n, self.blur)[0] for n in self._spatial) if blocks is None else blocks.padded

    @property
    def _pixels(self) -> Blocks | None:
        """How maps of the image's size are split over devices."""
        return None if self.sharding is None else Blocks.of(self.sharding, self._spatial)

    def _place(self, q: Any) -> Any:
        if self._pixels is None or not isinstance(q, jax.Array | np.ndarray) or q.ndim <= len(self._spatial):
            return q
        return place(q, self._pixels.sharding(np.ndim(q) - 1))

    def _constrain(self, q: Array) -> Array:
        """Keeps maps of pixels in blocks, so that XLA does not bring them together for what surrounds a message."""
        return q if self._pixels is None else self._pixels.constrain(q)

    def _on_pixels(self, scale: Array) -> Array:
        """A scale of blur 1 as a map of the image's size."""
        blocks = self._blocks
        return scale if blocks is None else blocks.unpad(blocks.cores(scale))

    def _pool(self, q: Array) -> Array:
        if not self.transposed:
            return average_pool(q, self.blur, self._spatial, self._grid)
        coarse = jax.ShapeDtypeStruct((*q.shape[: -1 - len(self._grid)], *self._grid, q.shape[-1]), q.dtype)
        return jax.linear_transpose(lambda x: bilinear_upsample(x, self.blur, self._spatial), coarse)(q)[0]

    def _unpool(self, x: Array) -> Array:
        if not self.transposed:
            return bilinear_upsample(x, self.blur, self._spatial)
        fine = jax.ShapeDtypeStruct(
            (*x.shape[: -1 - len(self._spatial)], *self._spatial, x.shape[-1]), x.dtype
        )
        return jax.linear_transpose(lambda q: average_pool(q, self.blur, self._spatial, self._grid), fine)(x)[
            0
        ]

    def _message(
        self, q: Array, kernels: slice, left: Array | None = None, right: Array | None = None
    ) -> Array:
        ndim = 1 + len(self._spatial)
        batch = jnp.broadcast_shapes(q.shape[:-ndim], self.batch)
        q = jnp.broadcast_to(q, (*batch, *q.shape[-ndim:]))
        bandwidths = self.position_bandwidths[kernels]

        def message(
            q: Array, pixels: tuple[tuple[Array, ...], Array | None, Array | None], weights: Array
        ) -> Array:
            batch = q.shape[:-ndim]
            features, left, right = pixels
            found = window_message(
                q.reshape(-1, *q.shape[-ndim:]),
                [flatten_batch(f, batch, ndim) for f in features],
                weights,
                filter_size=self.filter_size,
                position_bandwidths=bandwidths,
                left=None if left is None else flatten_batch(left, batch, ndim),
                right=None if right is None else flatten_batch(right, batch, ndim),
                implementation=self.implementation,
            )
            return found.reshape(q.shape)

        pixels = (self.features[kernels], left, right)
        blocks = self._blocks
        if blocks is None:
            return message(q, pixels, self.weights[kernels])
        if self.blur > 1:  # pooled into whole blocks
            return blocks.window(message, q, pixels, self.weights[kernels])
        return blocks.unpad(blocks.window(message, blocks.pad(q), pixels, self.weights[kernels]))

    def _blurred_diagonals(self) -> Array:
        """The diagonal of `U K P` per kernel of weight one, `[*batch, *spatial, kernels]`.

        Pixel `i` lies in one cell, which passes `1/size` of it on; the message comes back to `i` from that
        cell and its neighbours, `Σ_o U[i, cell + o] K[cell + o, cell] / size`.
        """
        ndim, blocks = len(self._spatial), self._blocks
        cell_of = [(np.arange(n) + cells(n, self.blur)[1]) // self.blur for n in self._spatial]
        size = [pixels_per_cell(n, self.blur)[cell] for n, cell in zip(self._spatial, cell_of, strict=True)]
        features = self.features if blocks is None else tuple(map(blocks.cores, self.features))
        total: Any = 0.0
        for offset in itertools.product((-1, 0, 1), repeat=ndim):
            if any(abs(o) > k // 2 for o, k in zip(offset, self.filter_size, strict=True)):
                continue
            share = functools.reduce(
                np.multiply.outer,
                [
                    upsample_weights(n, self.blur)[:, o + 1] / s
                    for n, o, s in zip(self._spatial, offset, size, strict=True)
                ],
            )
            if not np.any(share):
                continue
            values = []
            for f, bandwidths in zip(features, self.position_bandwidths, strict=True):
                neighbour = f
                for axis, o in enumerate(offset, start=f.ndim - 1 - ndim):
                    neighbour = shift(neighbour, axis, o) if o else neighbour
                exponent = jnp.sum((f - neighbour) ** 2, axis=-1)
                if bandwidths is not None:
                    exponent = exponent + sum((o / b) ** 2 for o, b in zip(offset, bandwidths, strict=True))
                values.append(jnp.exp(-0.5 * exponent))
            kernels = jnp.stack(jnp.broadcast_arrays(*values), axis=-1)
            kernels = repeat_cells(kernels, self.blur, self._spatial)
            total = total + jnp.asarray(share, self.weights.dtype)[..., None] * kernels
        return total


def _join_scales(first: Window, second: Window, side: str) -> Array | None:
    """The scales of two banks side by side; ones where only one of them has any."""
    if getattr(first, side) is None and getattr(second, side) is None:
        return None
    pair = []
    for k in (first, second):
        scale = getattr(k, side)
        pixels = k.features[0].shape[-1 - len(k.spatial) : -1] if k.blur == 1 else k.spatial
        pair.append(jnp.ones((*pixels, len(k.features)), k.weights.dtype) if scale is None else scale)
    leading = jnp.broadcast_shapes(*(s.shape[:-1] for s in pair))
    return jnp.concatenate([jnp.broadcast_to(s, (*leading, s.shape[-1])) for s in pair], axis=-1)


def _split_positions(
    f: Features, blur: int, spatial: tuple[int, ...]
) -> tuple[Array, tuple[float, ...] | None]:
    """A kernel's features, and the bandwidths of what of them becomes a table of offsets on the grid."""
    known = f.position_bandwidths
    # Cells that the border cuts have their mean position elsewhere: then positions stay features.
    if known is None or any(n % blur for n in spatial):
        return f.values, None
    return f.values[..., len(spatial) :], tuple(b / blur for b in known)


def _blocks_on_grid(
    sharding: NamedSharding, spatial: tuple[int, ...], blur: int, filter_size: tuple[int, ...]
) -> Blocks:
    grid = tuple(cells(n, blur)[0] for n in spatial)
    return Blocks.of(sharding, grid, tuple(k // 2 for k in filter_size))


def _to_grid(values: Array, blur: int, spatial: tuple[int, ...], blocks: Blocks | None) -> Array:
    """A kernel's features on the filter's grid; where sharded, in blocks that have their halos for good."""
    if blocks is None:
        return values if blur == 1 else average_pool(values, blur, spatial)
    return _extend_pooled(place(values, blocks.sharding(values.ndim - 1)), blur, spatial, blocks)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _extend_pooled(values: Array, blur: int, spatial: tuple[int, ...], blocks: Blocks) -> Array:
    padded = blocks.pad(values) if blur == 1 else average_pool(values, blur, spatial, blocks.padded)
    return blocks.extend(padded)


@functools.partial(jax.jit, static_argnums=1)
def _extend(values: Array, blocks: Blocks) -> Array:
    return blocks.extend(blocks.pad(values))

"""The permutohedral lattice: all-pairs Gaussian filtering at a cost that grows linearly with the pixels.

A pixel's features are placed in a lattice of simplices; its value is *splatted* onto the `d + 1` vertices
around it, the vertices are *blurred* along each of the lattice's `d + 1` directions, and the result is
*sliced* at the pixel. Only vertices that some pixel touches exist.

How this differs from the C++ code that everybody uses: the vertices are found by sorting packed keys rather
than by inserting into a hash table, so that everything has a static size; splatting sums blocks of eight
pixels of one vertex by gathering and scatters only the sums, an eighth of the rows; and the transpose and all
gradients are exact.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Bool, Int

from jaxcrf import _checks
from jaxcrf._checks import Normalization
from jaxcrf.filters.arguments import read_features, read_weights
from jaxcrf.filters.base import filter_pytree
from jaxcrf.filters.gaussian import (
    GaussianFilter,
    Kernel,
    flat_batch,
    map_batch,
    row_sums,
)
from jaxcrf.filters.separable import SeparableKernel, is_position_only
from jaxcrf_kernels._materialize import on_materialized
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

Scaling = Literal["gaussian", "continuous", "classic"]

# How many exact row sums the "gaussian" scaling is fitted to, and how many of them at a time.
SAMPLES = 64
SAMPLES_AT_A_TIME = 8

# Pixels of one vertex that are summed before anything is scattered. At 375×500×21 and bandwidths (80, 13) a
# splat takes 7 ms with 8, as with 16, and 45 ms with 1; at (50, 5), where a vertex has five pixels, 16 are
# a fifth slower.
BLOCK = 8

# Levels of the hash table in which a vertex finds its neighbours, and its slots per vertex, at least. One in five
# finds its slot of the first level taken, of those one in eighteen that of the second, and so on: of a million
# none is left without a place by five levels. Larger tables are slower, they leave the cache.
LEVELS = 5
SLOTS = 2

_HASH_FACTORS = (
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0xD6E8FEB86659FD93,
    0xA0761D6478BD642F,
)


@filter_pytree(
    data=("kernels", "weights", "left", "right", "correction"),
    static=("symmetric_scales",),
)
class Lattice(GaussianFilter):
    r"""The fully connected Gaussian filter on the permutohedral lattice, built once per image.

    .. math::
        (K q)_i \approx \sum_m w_m \sum_j \exp(-\tfrac12 \lVert f_{mi} - f_{mj} \rVert^2)\, q_j

    with `K = γ S B Sᵀ`: barycentric splatting `Sᵀ`, slicing `S`, and `B` the product of the blurs `½, 1, ½`
    along the `d + 1` lattice directions. Blurs along different directions do not commute where vertices are
    missing, so `K` is not quite symmetric; `K.T`, which blurs in the reverse order, is exact, and so are
    gradients to maps, weights and, through the barycentric coordinates, features.

    Kernels of position alone (`position_features` with a known bandwidth) do not need a lattice: unless the
    scaling is "classic" they are evaluated exactly, axis by axis (`Separable`).

    Accuracy, on photographs at the usual bandwidths: 2 to 3 % median error of a message that is normalised
    symmetrically, 4 to 8 % without normalisation; `Landmark` and `Dense` are more exact, and slower.

    Args:
        features: of one kernel `[*batch, *spatial, d]`, `d >= 1`, divided by the bandwidths, or a tuple.
        weights: one number for all kernels, or one per kernel.
        scaling: what makes up for the lattice's gain. A normalised filter is the same under all three.
            "classic" is `γ = 1 / (1 + 2^-d)`, as in the public C++ code, for parity with it; sums are
            40 % low. "continuous" is the `γ` at which sums over evenly and densely spread features are
            those of the exact Gaussian; those of photographs, whose lattices have holes, are 5 to 20 %
            low. "gaussian" corrects that too, `K ← diag(√ρ) K diag(√ρ)`: `log ρ` is a quadratic function
            of the logarithm of the lattice's row sums, fitted to 64 exact ones. This costs 10 ms per image
            of 375×500 pixels, for nothing if the filter is then normalised, and carries no gradient.
        capacity: the vertices to make room for. None counts them, and makes room for as many, if the
            features are concrete. Under `jit` sizes are static: None then takes `default_capacity`, and
            where that, or the number given, turns out too small, messages are NaN. The cost of a blur grows
            with the capacity.
        symmetric: blur in both orders and average, which makes the filter symmetric for one more blur.
        spatial_ndim: 2 for images, 3 for volumes.

    Raises:
        ValueError: if shapes or options do not fit, features hold NaN, the capacity is too small, or
            bandwidths are so small that the lattice has more cells than can be numbered (concrete features
            only, the last three).

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> image = jnp.zeros((6, 8, 3)).at[:, 4:].set(255.0)
        >>> K = jaxcrf.filters.Lattice(jaxcrf.bilateral_features(image, 80, 13)).normalized("after")
        >>> q = jnp.zeros((6, 8, 1)).at[:, 4:].set(1.0)
        >>> K(q)[3, :, 0].round(2)  # nothing crosses the edge in the middle of the image
        Array([0., 0., 0., 0., 1., 1., 1., 1.], dtype=float32)

    References:
        Adams, Baek and Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*, 2010;
        Krähenbühl and Koltun, 2011, §3.2.
    """

    def __init__(
        self,
        features: Any,
        *,
        weights: Any = 1.0,
        scaling: Scaling = "gaussian",
        capacity: int | None = None,
        symmetric: bool = False,
        spatial_ndim: int = 2,
    ):
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling: got {scaling!r}; expected one of {', '.join(get_args(Scaling))}")
        if capacity is not None and (not _checks.is_whole(capacity) or capacity < 1):
            raise ValueError(f"capacity: got {capacity!r}; expected a whole number >= 1, or None")
        kernels: list[Kernel] = []
        correction: list[Array | None] = []
        read = read_features(features, spatial_ndim)
        for f in read:
            if scaling != "classic" and is_position_only(f, spatial_ndim):
                kernels.append(SeparableKernel.of(f, spatial_ndim))
                correction.append(None)
            else:
                k = _build(f.values, spatial_ndim, scaling, capacity, bool(symmetric))
                kernels.append(k)
                correction.append(_correction(k, f.values) if scaling == "gaussian" else None)
        self._set_kernels(kernels, read_weights(weights, len(read)))
        for name in ("correction", "left", "right"):
            object.__setattr__(self, name, tuple(correction))

    def normalized(self, kind: Normalization) -> Self:  # noqa: D102
        found = super().normalized(kind)
        return found.replace(left=self.correction, right=self.correction) if kind == "none" else found

    correction: tuple[Array | None, ...]  # per kernel √ρ, what scales it while nothing normalises it

    @property
    def num_vertices(self) -> tuple[Int[Array, " *batch"], ...]:
        """How many vertices the features of each kernel touch; kernels that need no lattice are left out."""
        return tuple(k.count.reshape(k.batch) for k in self.kernels if isinstance(k, LatticeKernel))

    @property
    def capacity(self) -> tuple[int, ...]:
        """How many vertices there is room for, likewise."""
        return tuple(k.capacity for k in self.kernels if isinstance(k, LatticeKernel))

    @property
    def overflowed(self) -> Bool[Array, ""]:
        """Whether some image touches more vertices than there is room for; its messages are NaN."""
        lattices = [k for k in self.kernels if isinstance(k, LatticeKernel)]
        return functools.reduce(
            jnp.logical_or, [jnp.any(k.count > k.capacity) for k in lattices], jnp.zeros((), bool)
        )


def default_capacity(pixels: int, d: int) -> int:
    """The room that is made under `jit` where none is asked for: enough for all but finely textured images.

    Twice as many vertices as pixels; photographs have 0.1 to 0.3 times as many at bandwidths (80, 13), 0.4
    to 2.3 times at (50, 5). No image can have more than `(d + 1) · pixels`, which small ones are given.
    """
    return min((d + 1) * pixels, max(2 * pixels, 1 << 17))


@filter_pytree(
    data=(
        "barycentric",
        "block_barycentric",
        "vertex",
        "block_pixel",
        "block_vertex",
        "neighbours",
        "count",
        "gain",
    ),
    static=("spatial", "batch", "transposed", "is_symmetric"),
)
class LatticeKernel(Kernel):
    """One kernel's lattice; all arrays lead with the items of the batch."""

    barycentric: Array  # [items, d + 1, pixels]: the weight of each of a pixel's vertices
    block_barycentric: Array  # [items, BLOCK, blocks]: the same weights, by vertex; carries no gradient
    vertex: Array  # [items, d + 1, pixels]: the vertices of a pixel
    block_pixel: Array  # [items, BLOCK, blocks]: the pixels of a block, all of one vertex
    block_vertex: Array  # [items, blocks]
    neighbours: Array  # [items, d + 1, 2, capacity + 1]: along every direction, both ways
    count: Array  # [items]: vertices that there are
    gain: Array  # [items]: γ, NaN where vertices were too many
    spatial: tuple[int, ...]
    batch: tuple[int, ...]
    transposed: bool
    is_symmetric: bool
    restricts = True

    @property
    def capacity(self) -> int:
        """Vertices that there is room for; the row behind them stands for all that do not exist."""
        return self.neighbours.shape[-1] - 1

    @property
    def T(self) -> "LatticeKernel":  # noqa: D102
        return self.replace(transposed=not self.transposed)

    def restrict(self, q: Array) -> Array:
        """Splats `[*batch, *spatial, labels]` to `[*batch, capacity + 1, labels]`."""
        batch = q.shape[: q.ndim - 1 - len(self.spatial)]
        tables = (self.barycentric, self.block_barycentric, self.vertex, self.block_pixel, self.block_vertex)
        q = q.reshape(*batch, -1, q.shape[-1])
        return self._map(functools.partial(_splat, self.capacity), tables, batch, q)

    def convolve(self, x: Array) -> Array:
        """Blurs the vertices along every direction."""

        def blur(neighbours: Array, values: Array) -> Array:
            if not self.is_symmetric:
                return _blur(self.transposed, neighbours, values)
            return 0.5 * (_blur(False, neighbours, values) + _blur(True, neighbours, values))

        return self._map(blur, self.neighbours, x.shape[:-2], x)

    def prolong(self, x: Array) -> Array:
        """Slices `[*batch, capacity + 1, labels]` at every pixel."""

        def item(tables: Any, values: Array) -> Array:
            *tables, gain = tables
            return gain * _slice(self.capacity, tuple(tables), values)

        tables = (self.barycentric, self.block_barycentric, self.vertex, self.block_pixel, self.block_vertex)
        found = self._map(item, (*tables, self.gain), x.shape[:-2], x)
        return found.reshape(*x.shape[:-2], *self.spatial, x.shape[-1])

    def diagonal(self) -> Array:
        """`γ Σ_kk' b_k B_kk' b_k'` over a pixel's own vertices.

        Vertex `k'` is reached from vertex `k` by one step along each direction in between, or by one step
        back along each of the others, if the vertices on the way exist.
        """
        tables = (self.barycentric, self.vertex, self.neighbours)
        found = lax.map(lambda item: _diagonal(*item), tables)
        return (self.gain[:, None] * found).reshape(*self.batch, *self.spatial)

    def _map(self, function: Any, tables: Any, batch: tuple[int, ...], x: Array) -> Array:
        items = flat_batch(batch)
        own = len(self.gain)
        if own not in (1, items):  # batch axes that broadcast against each other
            index = jnp.broadcast_to(jnp.arange(own).reshape(self.batch), batch).reshape(-1)
            tables, own = jax.tree.map(lambda a: a[index], tables), items
        tables, x = varying_like((tables, x), tables, x)
        found = map_batch(function, tables, items, x, 2, own)
        return found.reshape(*batch, *found.shape[1:])


# Building a lattice.


def _build(
    values: Array, spatial_ndim: int, scaling: Scaling, capacity: int | None, symmetric: bool
) -> LatticeKernel:
    spatial, batch = values.shape[-1 - spatial_ndim : -1], values.shape[: -1 - spatial_ndim]
    d, pixels = values.shape[-1], math.prod(spatial)
    if d == 0:
        raise ValueError("features: got no feature at all; a lattice needs at least one dimension")
    features = values.reshape(-1, pixels, d)
    concrete = _checks.is_concrete(features)
    if concrete:
        _checks.check_finite("features", features)
    barycentric, cell, rank = _embed(features)
    survey = _survey(lax.stop_gradient(cell), rank)
    if concrete:
        with jax.ensure_compile_time_eval():
            numbered, touched = jax.device_get((survey.numbered, survey.touched))
            if not numbered.all():
                raise ValueError(
                    "features: they span more lattice cells than 62 bits can number; divide by larger "
                    "bandwidths, leave features out, or use jaxcrf.filters.Dense"
                )
            most = int(touched.max())
        if capacity is None:
            capacity = _roomy(most)
        elif most > capacity:
            raise ValueError(
                f"capacity: got {capacity}, and the features touch {most} vertices; pass capacity={most} or "
                "more, or None to have them counted"
            )
    elif capacity is None:
        capacity = default_capacity(pixels, d)
    tables = _connect(survey, lax.stop_gradient(barycentric), int(capacity))
    return LatticeKernel.from_fields(
        barycentric=barycentric,
        block_barycentric=tables.block_barycentric,
        vertex=tables.vertex,
        block_pixel=tables.block_pixel,
        block_vertex=tables.block_vertex,
        neighbours=tables.neighbours,
        count=survey.touched,
        gain=jnp.where(tables.complete & survey.numbered, _gain(scaling, d), jnp.nan).astype(values.dtype),
        spatial=spatial,
        batch=batch,
        transposed=False,
        is_symmetric=symmetric,
    )


@jax.jit
def _correction(k: LatticeKernel, features: Array) -> Array:
    """`√ρ` of every pixel."""
    sums = row_sums(k, features.dtype)
    pixels = math.prod(k.spatial)
    items = (sums.reshape(-1, pixels), features.reshape(-1, pixels, features.shape[-1]))
    corrected = lax.map(lambda item: _correct(*item), lax.stop_gradient(items))
    return corrected.reshape(sums.shape)


def _correct(sums: Array, features: Array) -> Array:
    count = min(SAMPLES, len(sums))
    chosen = (
        np.linspace(0, len(sums) - 1, count + 2)[1:-1].round().astype(int)
        if count < len(sums)
        else np.arange(count)
    )
    at_a_time = math.gcd(count, SAMPLES_AT_A_TIME)
    ones = jnp.ones(len(sums), sums.dtype)

    def exact(rows: Array) -> Array:
        distance = functools.reduce(
            jnp.add, [(rows[:, k, None] - features[:, k]) ** 2 for k in range(features.shape[-1])]
        )
        return jnp.dot(jnp.exp(-0.5 * distance), ones, precision=lax.Precision.HIGHEST)

    rows = features[chosen].reshape(count // at_a_time, at_a_time, -1)
    ratio = jnp.log(lax.map(exact, rows).reshape(count) / sums[chosen])
    level = jnp.log(sums)
    known = level[chosen]
    centre, spread = known.mean(), jnp.maximum(known.std(), 1e-3)

    def powers(level: Array) -> Array:
        x = (level - centre) / spread
        return jnp.stack([jnp.ones_like(x), x, x * x], axis=-1)

    # A little weight on small coefficients, for images with next to one level.
    design = powers(known)
    gram = jnp.matmul(design.T, design, precision=lax.Precision.HIGHEST)
    gram = gram + 1e-3 * count * jnp.diag(jnp.asarray([0.0, 1.0, 1.0], sums.dtype))
    coefficients = jnp.linalg.solve(gram, jnp.matmul(design.T, ratio, precision=lax.Precision.HIGHEST))
    fitted = jnp.matmul(powers(level), coefficients, precision=lax.Precision.HIGHEST)
    return jnp.exp(0.5 * jnp.clip(fitted, ratio.min(), ratio.max()))


def _roomy(count: int) -> int:
    """`count`, or up to an eighth more: lattices of similar images share what was compiled."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def _gain(scaling: Scaling, d: int) -> float:
    if scaling == "classic":
        return 1 / (1 + 2.0**-d)
    # A vertex stands for the volume √(d+1) (3/2)^{d/2} / (d+1) of feature space, and the blurs multiply a
    # constant by 2^{d+1}; the Gaussian integrates to (2π)^{d/2}.
    return (2 * math.pi) ** (d / 2) * math.sqrt(d + 1) / (1.5 ** (d / 2) * 2 ** (d + 1))


@jax.jit
def _embed(features: Array) -> tuple[Array, Array, Array]:
    """Places every pixel in the lattice.

    Args:
        features: `[items, pixels, d]`.

    Returns:
        Barycentric coordinates, the cell (the nearest vertex of class 0, in units of `d + 1`) and the rank
        of every coordinate's remainder, each `[items, d + 1, pixels]`.
    """
    d = features.shape[-1]
    # The step between vertices is such that splat, blur and slice together have variance one.
    step = math.sqrt(2 / 3) * (d + 1)
    coordinates: list[Any] = [None] * (d + 1)
    total = jnp.zeros(features.shape[:-1], features.dtype)
    for j in range(d, 0, -1):
        scaled = features[..., j - 1] * np.asarray(step / math.sqrt(j * (j + 1)), features.dtype)
        coordinates[j] = total - j * scaled
        total = total + scaled
    coordinates[0] = total
    position = jnp.stack(coordinates, axis=1) / (d + 1)  # on the plane of sum zero
    # In stages, which keeps a CPU from computing the whole chain anew for each of its results.
    cell, rank = on_materialized(_locate, lax.stop_gradient(position))
    remainder = position - cell
    ordered = [
        functools.reduce(jnp.add, [jnp.where(rank[:, j] == r, remainder[:, j], 0) for j in range(d + 1)])
        for r in range(d + 1)
    ]
    barycentric = [1 + ordered[d] - ordered[0]]
    barycentric += [ordered[d - k] - ordered[d + 1 - k] for k in range(1, d + 1)]
    return jnp.stack(barycentric, axis=1), cell, rank


def _locate(position: Array) -> tuple[Array, Array]:
    """The cell of every pixel, and the ranks of its remainders, largest first."""
    d = position.shape[1] - 1
    cell = jnp.round(position)
    remainder = position - cell
    ranks = []
    for i in range(d + 1):
        larger = [
            remainder[:, i] < remainder[:, j] if i < j else remainder[:, i] <= remainder[:, j]
            for j in range(d + 1)
            if j != i
        ]
        ranks.append(functools.reduce(jnp.add, [x.astype(jnp.int32) for x in larger]))
    # Rounding may leave the plane; the coordinates with the largest remainders bring the cell back.
    excess = functools.reduce(jnp.add, [cell[:, j] for j in range(d + 1)]).astype(jnp.int32)
    rank = jnp.stack(ranks, axis=1) + excess[:, None]
    shift = (rank < 0).astype(jnp.int32) - (rank > d).astype(jnp.int32)
    return cell + shift.astype(position.dtype), rank + (d + 1) * shift


class _Survey(NamedTuple):
    """The vertices of every item, sorted but without a place for them yet."""

    pixel: Array  # [items, d + 1, pixels]: by vertex; class after class
    vertex: Array  # likewise: the number of the vertex
    key: Array  # likewise, int64
    stride: Array  # [items, d + 1] int64: what one step along an axis adds to a key, and the keys of a class
    touched: Array  # [items]: how many vertices
    numbered: Array  # [items]: whether keys are large enough


@contextlib.contextmanager
def _wide_integers() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@jax.jit
def _survey(cell: Array, rank: Array) -> _Survey:
    """Numbers the vertices that pixels touch.

    A vertex of class `k` has coordinates `(d + 1) a + k` with whole numbers `a`; per class these are packed
    into one key, with room for one step beyond the range of every digit, and sorted together with the pixel.
    """
    with _wide_integers():
        if cell.shape[0] == 1:
            return jax.tree.map(lambda x: x[None], _survey_one(cell[0], rank[0]))
        return lax.map(lambda item: _survey_one(*item), (cell, rank))


def _survey_one(cell: Array, rank: Array) -> _Survey:
    classes, pixels = cell.shape
    d = classes - 1
    low = cell[:d].min(axis=1) - 2
    digits = cell[:d].max(axis=1) - low + 2
    bits = max(1, (pixels - 1).bit_length())
    span = jnp.prod(digits.astype(jnp.float64))
    numbered = span * classes * 2.0**bits < 2.0**62
    # Keys that do not fit are of no use, but must not trap.
    digits = jnp.where(numbered, digits, 1).astype(jnp.int64)
    stride = jnp.concatenate([jnp.ones(1, jnp.int64), jnp.cumprod(digits)])
    offset = (cell[:d] - low[:, None]).astype(jnp.int32)
    key = functools.reduce(jnp.add, [offset[j].astype(jnp.int64) * stride[j] for j in range(d)])
    pixel = jnp.arange(pixels, dtype=jnp.int64)
    keys = [(key << bits) | pixel]
    for k in range(1, classes):  # the coordinate of rank d - k + 1 is one lower from class k on
        key = key - functools.reduce(
            jnp.add, [jnp.where(rank[j] == d - k + 1, stride[j], 0) for j in range(d)]
        )
        keys.append((key << bits) | pixel)
    # One sort per class: shorter, and a CPU runs them side by side, if all of them may begin at once.
    packed = on_materialized(
        lambda _, keys: jnp.stack([lax.sort(row) for row in keys]), cell[0], jnp.stack(keys)
    )
    key = packed >> bits
    first = jnp.concatenate([jnp.ones((classes, 1), bool), key[:, 1:] != key[:, :-1]], axis=1)
    index = _running_sum(first.reshape(-1)) - 1
    return _Survey(
        pixel=(packed & ((1 << bits) - 1)).astype(jnp.int32),
        vertex=index.reshape(classes, pixels),
        key=key + jnp.arange(classes)[:, None] * stride[-1],
        stride=stride,
        touched=index[-1] + 1,
        numbered=numbered,
    )


def _running_sum(flags: Array) -> Array:
    """`cumsum` of a long vector of zeros and ones, int32.

    In rows, each by a product with a triangle of ones: three times as fast as `cumsum` on a CPU. Sums of two
    levels of 128 are exact in float32, and the rest is added as whole numbers.
    """
    width = 128
    triangle = jnp.asarray(np.triu(np.ones((width, width), np.float32)))

    def in_rows(x: Array) -> Array:
        rows = -(-len(x) // width)
        return jnp.dot(
            jnp.pad(x, (0, rows * width - len(x))).reshape(rows, width),
            triangle,
            precision=lax.Precision.HIGHEST,
        )

    sums = in_rows(flags.astype(jnp.float32))
    of_rows = in_rows(sums[:, -1]).astype(jnp.int32)
    of_groups = jnp.cumsum(of_rows[:, -1]) - of_rows[:, -1]
    through = (of_rows + of_groups[:, None]).reshape(-1)[: len(sums)]
    sums = sums.astype(jnp.int32)
    return (sums + (through - sums[:, -1])[:, None]).reshape(-1)[: len(flags)]


class _Tables(NamedTuple):
    """See `LatticeKernel`."""

    block_barycentric: Array
    vertex: Array
    block_pixel: Array
    block_vertex: Array
    neighbours: Array
    complete: Array


@functools.partial(jax.jit, static_argnums=2)
def _connect(survey: _Survey, barycentric: Array, capacity: int) -> _Tables:
    """Gives every vertex its pixels, in blocks, and its neighbours."""
    with _wide_integers():
        if len(survey.touched) == 1:
            survey, barycentric = jax.tree.map(lambda x: x[0], (survey, barycentric))
            return jax.tree.map(lambda x: x[None], _connect_one(survey, barycentric, capacity))
        return lax.map(lambda item: _connect_one(item[0], item[1], capacity), (survey, barycentric))


def _connect_one(survey: _Survey, barycentric: Array, capacity: int) -> _Tables:
    classes, pixels = survey.pixel.shape
    entries = classes * pixels
    index = jnp.minimum(survey.vertex, capacity).reshape(-1)
    entry = (survey.pixel + jnp.arange(classes, dtype=jnp.int32)[:, None] * pixels).reshape(-1)
    vertex = _scatter(jnp.zeros(entries, jnp.int32), entry, index, unique=True)

    # Where each vertex's entries begin in the sorted list; vertices that are not there begin at its end.
    first = jnp.concatenate([jnp.ones(1, bool), index[1:] != index[:-1]])
    begin = _scatter(
        jnp.full(capacity + 2, entries, jnp.int32),
        jnp.where(first & (index < capacity), index, capacity + 1),
        jnp.arange(entries, dtype=jnp.int32),
    )
    begin = begin.at[capacity + 1].set(entries)
    blocks_of = -(-(begin[1:-1] - begin[:-2]) // BLOCK)
    after = jnp.cumsum(blocks_of, dtype=jnp.int32)
    before = after - blocks_of
    blocks = -(-entries // BLOCK) + capacity
    used = jnp.minimum(survey.touched, capacity)
    block = jnp.arange(blocks, dtype=jnp.int32)
    marks = jnp.zeros(blocks + 1, jnp.int32)
    marks = marks.at[jnp.where(jnp.arange(capacity) < used, before, blocks)].add(1)
    block_vertex = jnp.where(block < after[-1], _running_sum(marks[:blocks]) - 1, capacity)
    beyond = jnp.append(before, 0)[block_vertex]
    position = begin[block_vertex] + (block - beyond) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[:, None]
    inside = (position < begin[block_vertex + 1]) & (block < after[-1])
    block_entry = entry.at[jnp.where(inside, position, 0)].get(mode="promise_in_bounds")
    weight = barycentric.reshape(-1).at[block_entry].get(mode="promise_in_bounds")

    neighbours, placed = _find_neighbours(survey, begin, used, capacity)
    return _Tables(
        block_barycentric=jnp.where(inside, weight, 0),
        vertex=vertex.reshape(classes, pixels),
        block_pixel=lax.rem(block_entry, jnp.int32(pixels)),
        block_vertex=block_vertex,
        neighbours=neighbours,
        complete=placed & (survey.touched <= capacity),
    )


def _find_neighbours(survey: _Survey, begin: Array, used: Array, capacity: int) -> tuple[Array, Array]:
    """The neighbours of every vertex, `[d + 1, 2, capacity + 1]`; `capacity` where there is none.

    One step along direction `j` adds one to every coordinate but takes `d` off coordinate `j`: the class
    goes up by one and digit `j` down by one; from the last class to the first all digits go up.
    """
    classes, pixels = survey.pixel.shape
    d = classes - 1
    size = survey.stride[-1]  # of one class
    number = jnp.arange(capacity, dtype=jnp.int32)
    exists = number < used
    key = survey.key.reshape(-1).at[jnp.minimum(begin[:capacity], classes * pixels - 1)].get()
    key = jnp.where(exists, key, -1 - number.astype(jnp.int64))

    slots = SLOTS * max(16, 1 << (capacity - 1).bit_length())

    def slot(level: int, keys: Array) -> Array:
        mixed = keys.astype(jnp.uint64) * np.uint64(_HASH_FACTORS[level])
        return (mixed >> np.uint64(64 - slots.bit_length() + 1)).astype(jnp.int32)

    tables = []
    pending = exists
    for level in range(LEVELS):
        mine = slot(level, key)
        table = _scatter(jnp.full(slots + 1, capacity, jnp.int32), jnp.where(pending, mine, slots), number)
        pending = pending & (table.at[mine].get(mode="promise_in_bounds") != number)
        tables.append(table)

    is_last = lax.div(jnp.maximum(key, 0), size) == d
    all_digits = jnp.sum(survey.stride[:d])
    key_of = jnp.append(key, -1 - jnp.int64(capacity))

    def along(own: Array) -> Array:
        wanted = key - own + jnp.where(is_last, all_digits - d * size, size)
        found = jnp.full(capacity, capacity, jnp.int32)
        for level in reversed(range(LEVELS)):
            candidate = tables[level].at[slot(level, wanted)].get(mode="promise_in_bounds")
            hit = key_of.at[candidate].get(mode="promise_in_bounds") == wanted
            found = jnp.where(hit & exists, candidate, found)
        forward = jnp.append(found, capacity).astype(jnp.int32)
        backward = _scatter(jnp.full(capacity + 1, capacity, jnp.int32), found, number)
        return jnp.stack([forward, backward.at[capacity].set(capacity)])

    # The last coordinate is not among the digits.
    return lax.map(along, survey.stride.at[d].set(0)), ~pending.any()


def _scatter(x: Array, index: Array, values: Array, unique: bool = False) -> Array:
    return x.at[index].set(values, mode="promise_in_bounds", unique_indices=unique)


# Applying it. All three are linear in the maps and carry their transposes as gradients.


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


def _weighted_rows(weights: Array, x: Array, index: Array) -> Array:
    """`Σ_k weights[k] x[index[k]]`: written out, so that a CPU fuses the gathers and vectorises over labels."""
    terms = [weights[k, :, None] * _take(x, index[k]) for k in range(len(index))]
    return functools.reduce(jnp.add, terms)


def _agreement(x: Array, values: Array, index: Array) -> Array:
    """`⟨x_i, values[index[k, i]]⟩` over labels, `[k, i]`."""
    return jnp.stack([jnp.sum(x * _take(values, i), axis=-1) for i in index])


def _scatter_blocks(capacity: int, tables: Any, q: Array) -> Array:
    _, block_barycentric, _, block_pixel, block_vertex = tables

    def add(q: Array, block_barycentric: Array, block_pixel: Array, block_vertex: Array) -> Array:
        sums = _weighted_rows(block_barycentric, q, block_pixel)
        zeros = jnp.zeros((capacity + 1, q.shape[-1]), sums.dtype)
        return zeros.at[block_vertex].add(sums, mode="promise_in_bounds", indices_are_sorted=True)

    run = sequential_vmap(functools.partial(on_materialized, add))
    return run(q, block_barycentric, block_pixel, block_vertex)


def _gather_vertices(tables: Any, values: Array) -> Array:
    # On its own, because the soft-max that follows would gather anew for its maximum, its sum and its result.
    barycentric, _, vertex, _, _ = tables
    return sequential_vmap(functools.partial(on_materialized, _weighted_rows))(barycentric, values, vertex)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splat(capacity: int, tables: Any, q: Array) -> Array:
    return _scatter_blocks(capacity, tables, q)


def _splat_forward(capacity: int, tables: Any, q: Array) -> tuple[Array, Any]:
    return _scatter_blocks(capacity, tables, q), (tables, q)


def _splat_backward(capacity: int, residuals: Any, cotangent: Array) -> tuple[Any, Array]:
    tables, q = residuals
    barycentric = sequential_vmap(_agreement)(q, cotangent, tables[2])
    return (barycentric, None, None, None, None), _gather_vertices(tables, cotangent)


_splat.defvjp(_splat_forward, _splat_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slice(capacity: int, tables: Any, values: Array) -> Array:
    return _gather_vertices(tables, values)


def _slice_forward(capacity: int, tables: Any, values: Array) -> tuple[Array, Any]:
    return _gather_vertices(tables, values), (tables, values)


def _slice_backward(capacity: int, residuals: Any, cotangent: Array) -> tuple[Any, Array]:
    tables, values = residuals
    barycentric = sequential_vmap(_agreement)(cotangent, values, tables[2])
    return (barycentric, None, None, None, None), _scatter_blocks(capacity, tables, cotangent)


_slice.defvjp(_slice_forward, _slice_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blur(reverse: bool, neighbours: Array, values: Array) -> Array:
    def along(values: Array, pair: Array) -> Array:
        return values + 0.5 * (_take(values, pair[0]) + _take(values, pair[1]))

    def one_after_another(neighbours: Array, values: Array) -> Array:
        for pair in reversed(neighbours) if reverse else neighbours:
            values = on_materialized(along, values, pair)
        return values

    def in_a_loop(neighbours: Array, values: Array) -> Array:
        return lax.scan(lambda x, pair: (along(x, pair), None), values, neighbours, reverse=reverse)[0]

    # A loop would copy the values in every step, and is what keeps other compilers from fusing all steps
    # into one that gathers from 3^(d + 1) vertices.
    run = functools.partial(by_platform, cpu=one_after_another, accelerator=in_a_loop)
    return sequential_vmap(run)(neighbours, values)


def _blur_forward(reverse: bool, neighbours: Array, values: Array) -> tuple[Array, Array]:
    return _blur(reverse, neighbours, values), neighbours


def _blur_backward(reverse: bool, neighbours: Array, cotangent: Array) -> tuple[None, Array]:
    # Every single blur is symmetric, since neighbours are mutual; the product's transpose is the reverse.
    return None, _blur(not reverse, neighbours, cotangent)


_blur.defvjp(_blur_forward, _blur_backward)


def _diagonal(barycentric: Array, vertex: Array, neighbours: Array) -> Array:
    classes, absent = len(barycentric), neighbours.shape[-1] - 1
    following = jnp.roll(vertex, -1, axis=0)
    # turn[j]: from which of its vertices a pixel reaches the next along direction j.
    turn = []
    for j in range(classes):
        leads = [_take(neighbours[j, 0], vertex[k]) == following[k] for k in range(classes)]
        turn.append(jnp.argmax(jnp.stack(leads), axis=0))
    # From vertex k, `steps` forward or back along the directions that follow, or precede, it.
    walks = [(k, steps, 0) for k in range(classes) for steps in range(classes + 1)]
    walks += [(k, steps, 1) for k in range(classes) for steps in range(1, classes + 1)]

    def walk(total: Array, one: Array) -> tuple[Array, None]:
        start, steps, back = one
        begin = jnp.where(back == 1, start - steps + classes, start)
        here = vertex[start]
        for j in range(classes):
            moves = lax.rem(turn[j] - begin + 2 * classes, jnp.int32(classes)) < steps
            here = jnp.where(moves, _take(neighbours[j, back], here), here)
        end = lax.rem(jnp.where(back == 1, begin, begin + steps), jnp.int32(classes))
        there = here != absent
        weight = 0.5 ** steps.astype(barycentric.dtype)
        return total + jnp.where(there, weight * barycentric[start] * barycentric[end], 0), None

    zeros = jnp.zeros_like(barycentric[0])
    return lax.scan(walk, zeros, jnp.asarray(walks, jnp.int32))[0]

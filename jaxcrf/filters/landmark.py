"""All-pairs Gaussian filtering by dense products: landmarks for colours, moments of cells for positions.

The kernel is the product of a Gaussian of position and a Gaussian of everything else (colour, say), and both
have few significant directions. The filter therefore is `K = Φ Φᵀ` with an explicit map `Φ` from pixels to a
few tens of thousands of coefficients. Nearly all of the work is products of a cell's kernel values
`[pixels, landmarks]` and its maps `[pixels, labels]`: nothing is gathered, scattered or sorted, which is what
tensor cores and TPUs like. Kernel values are computed anew wherever they are used.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcrf import _checks
from jaxcrf.features import Features
from jaxcrf.filters.arguments import read_features, read_weights
from jaxcrf.filters.base import filter_pytree
from jaxcrf.filters.gaussian import (
    GaussianFilter,
    Kernel,
    flat_batch,
    map_batch,
)
from jaxcrf.filters.separable import SeparableKernel, is_position_only
from jaxcrf_kernels._varying import varying_like

# Cells per position bandwidth. Inside a cell, and for either pixel of a pair, the Gaussian is replaced by its
# best linear fit, which is off by less than `1 / (12 · 8²)` of the peak and by nothing on average.
CELLS_PER_BANDWIDTH = 8

# Eigenvalues of a position kernel below this share of the largest are left out.
POSITION_TOLERANCE = 1e-6

# Pixels of a cell where positions are not known.
BARE_CELL = 1024

# Coefficients per label that are too many: one gigabyte of them in float32.
MAX_COEFFICIENTS = 1 << 28

# About how many pixels the landmarks are chosen from, and the steps of Lloyd's algorithm that improve them.
SAMPLE = 8192
LLOYD_STEPS = 5


@filter_pytree(
    data=("kernels", "weights", "left", "right"),
    static=("symmetric_scales",),
)
class Landmark(GaussianFilter):
    r"""The fully connected Gaussian filter by landmarks: dense products, symmetric, more exact than the lattice.

    .. math::
        (K q)_i \approx \sum_m w_m \sum_j g_m(p_i - p_j)\, c_m(f_i, f_j)\, q_j

    The Gaussian `g` of positions (of `bilateral_features` with a known bandwidth) is expanded in the
    eigenvectors of a coarse grid: pixels of one cell, an eighth of a bandwidth wide, are represented by their
    sum and their first moments. The Gaussian `c` of all other features is replaced by its Nyström
    approximation from `K` landmarks `z`, chosen among the image's features by k-means:

    .. math::
        c(f, f') \approx \sum_{ab} c(f, z_a)\, (W^+)_{ab}\, c(z_b, f'), \qquad W_{ab} = c(z_a, z_b).

    The product of both is `Φ Φᵀ`, symmetric and positive semi-definite, so that `K.T` is `K`. Where row sums of
    `Φ Φᵀ` fall below one, the least that an exact kernel has, the difference is put on the diagonal: a pixel
    whose colour no landmark represents is left alone, and every normalisation is safe.

    Kernels of position alone (`position_features` with a known bandwidth) are evaluated exactly, axis by axis
    (`Separable`). Without known positions (bare arrays, traced bandwidths) landmarks represent all features,
    and more of them are needed.

    Accuracy: median relative error of an unnormalised message against float64, over four photographs, by
    position and colour bandwidth. What matters is how many colour bandwidths the image spans: where the last
    column shows that there are too many, take `Lattice` or `Dense`. Rare colours are the worst off: at the
    default and (80, 13) one pixel in ten has more than 7 %.

    =========  ========  =========  =======
    landmarks  (80, 13)  (100, 20)  (50, 5)
    =========  ========  =========  =======
    32           14 %      1.6 %     83 %
    64          2.8 %      0.44 %    66 %
    128         0.69 %     0.09 %    45 %
    256         0.15 %     0.04 %    21 %
    512         0.06 %     0.03 %     7 %
    =========  ========  =========  =======

    Cost: `6 K` multiply-adds and `2 K` exponentials per message, pixel and (the former) label, nearly all in
    matrix products. On two CPU cores a message takes about 0.12 s at 375×500 with 21 labels and 128 landmarks,
    and twice that with 256; beside its operands it needs 40 MB. The coefficients in between number
    `K · Π_a (1.7 n_a / θ_a + 4)` per label, with axes of `n` pixels and bandwidths `θ` of position, which
    is little unless these are just a few pixels: then `Window` is the better choice.

    Gradients flow to maps, weights and all features but known positions. They are those of the approximate
    kernel with its landmarks held fixed, which are the exact Gaussian's where the landmarks represent the
    features; neither `z` nor `W` carries any.

    Args:
        features: of one kernel `[*batch, *spatial, d]`, `d >= 1`, divided by the bandwidths, or a tuple.
        num_landmarks: `K`. Images of fewer pixels than that take all of them, images of fewer colours find
            out that some are redundant.
        weights: one number for all kernels, or one per kernel.
        spatial_ndim: 2 for images, 3 for volumes.

    Raises:
        ValueError: if shapes do not fit, `num_landmarks` is not a whole number of at least 1, features hold
            NaN (concrete features only), or position bandwidths are so small that the coefficients of one
            label take more than a gigabyte.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> image = jnp.zeros((6, 8, 3)).at[:, 4:].set(255.0)
        >>> K = Landmark(jaxcrf.bilateral_features(image, 80, 13), num_landmarks=2)
        >>> K(jnp.ones((6, 8, 1)))[3, :, 0].round()  # nothing crosses the edge in the middle of the image
        Array([24., 24., 24., 24., 24., 24., 24., 24.], dtype=float32)

    References:
        Williams and Seeger, *Using the Nyström Method to Speed Up Kernel Machines*, 2001, eq. 9;
        Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
        Potentials*, 2011, eq. 2 and 3.
    """

    def __init__(
        self,
        features: Any,
        *,
        num_landmarks: int = 256,
        weights: Any = 1.0,
        spatial_ndim: int = 2,
    ):
        if not _checks.is_whole(num_landmarks) or num_landmarks < 1:
            raise ValueError(f"num_landmarks: got {num_landmarks!r}; expected a whole number >= 1")
        kernels: list[Kernel] = []
        read = read_features(features, spatial_ndim)
        for f in read:
            if is_position_only(f, spatial_ndim):
                kernels.append(SeparableKernel.of(f, spatial_ndim))
            else:
                kernels.append(_build(f, spatial_ndim, int(num_landmarks)))
        self._set_kernels(kernels, read_weights(weights, len(read)))


@filter_pytree(
    data=("features", "landmarks", "root", "own"),
    static=("spatial", "batch", "bandwidths"),
)
class LandmarkKernel(Kernel):
    """One kernel `Φ Φᵀ + diag(own)`; arrays lead with the items of the batch."""

    features: Array  # [items, *cells, pixels of a cell, d]: what is not a known position
    landmarks: Array  # [items, landmarks, d]
    root: Array  # [items, landmarks, landmarks]: `R` with `Rᵀ R = W⁺`
    own: Array  # [items, *spatial]: what a pixel adds to its own message
    spatial: tuple[int, ...]
    batch: tuple[int, ...]
    bandwidths: tuple[float, ...] | None  # of positions, in pixels; None where features are all that is known
    is_symmetric = True
    restricts = False

    @property
    def T(self) -> "LandmarkKernel":  # noqa: D102
        return self

    def convolve(self, x: Array) -> Array:  # noqa: D102
        x = x.astype(jnp.promote_types(x.dtype, self.features.dtype))
        batch = x.shape[: x.ndim - 1 - len(self.spatial)]
        items, own, arrays = flat_batch(batch), len(self.features), self._arrays
        if own not in (1, items):  # batch axes that broadcast against each other
            index = jnp.broadcast_to(jnp.arange(own).reshape(self.batch), batch).reshape(-1)
            arrays, own = jax.tree.map(lambda a: a[index], arrays), items
        message = functools.partial(_message, _grid(self.spatial, self.bandwidths))
        return map_batch(message, arrays, items, x, 1 + len(self.spatial), own).reshape(x.shape)

    def diagonal(self) -> Array:  # noqa: D102
        diagonal = functools.partial(_diagonal, _grid(self.spatial, self.bandwidths))
        return lax.map(diagonal, self._arrays).reshape(*self.batch, *self.spatial)

    @property
    def _arrays(self) -> tuple[Array, Array, Array, Array]:
        return self.features, self.landmarks, self.root, self.own


# Positions, all of them known when a program is traced.


class _Axis(NamedTuple):
    """A Gaussian of position along one axis, `B A Aᵀ Bᵀ`: moments of cells, and their eigenvectors."""

    basis: (
        np.ndarray
    )  # B [pixels of a cell, terms]: a constant and, where there is more than one pixel, a line
    factor: np.ndarray  # A [terms, cells, rank]


class _Grid(NamedTuple):
    """Cells of pixels; the axes are the spatial ones, or the pixels in a row, and at least two."""

    spatial: tuple[int, ...]
    sizes: tuple[int, ...]
    cell: tuple[int, ...]  # pixels, along every axis
    cells: tuple[int, ...]
    basis: np.ndarray  # [pixels of a cell, terms]
    factors: tuple[np.ndarray, ...]  # per axis [terms, cells, rank]


@functools.lru_cache(maxsize=64)
def _axis(size: int, bandwidth: float | None) -> _Axis:
    if bandwidth is None:
        cell = min(size, BARE_CELL)
        return _Axis(np.ones((cell, 1)), np.ones((1, -(-size // cell), 1)))
    cell = min(size, max(1, int(bandwidth / CELLS_PER_BANDWIDTH)))
    cells = -(-size // cell)
    line = np.arange(cell) - (cell - 1) / 2
    basis = np.stack([np.ones(cell), line] if cell > 1 else [np.ones(cell)], axis=1)
    basis = basis / np.linalg.norm(basis, axis=0)
    # The best fit in every cell, for both pixels of a pair. The last cell may be cut, and is fitted where it is:
    # by a constant where it is one pixel, since any line passes through that.
    last = basis[: size - (cells - 1) * cell]
    if len(last) == 1:
        last = last * (np.arange(basis.shape[1]) == 0)
    fit = np.zeros((cells, basis.shape[1], cells, cell))
    fit[np.arange(cells - 1), :, np.arange(cells - 1)] = np.linalg.pinv(basis)
    fit[-1, :, -1, : len(last)] = np.linalg.pinv(last)
    fit = fit.reshape(-1, cells * cell)[:, :size]
    position = np.arange(size)
    gaussian = np.exp(-0.5 * ((position[:, None] - position) / bandwidth) ** 2)
    values, vectors = np.linalg.eigh(fit @ gaussian @ fit.T)
    kept = values > POSITION_TOLERANCE * values[-1]
    factor = vectors[:, kept] * np.sqrt(values[kept])
    return _Axis(basis, factor.reshape(cells, basis.shape[1], -1).swapaxes(0, 1))


@functools.lru_cache(maxsize=64)
def _grid(spatial: tuple[int, ...], bandwidths: tuple[float, ...] | None) -> _Grid:
    sizes: tuple[int, ...] = spatial
    thetas: tuple[float | None, ...] | None = bandwidths
    if thetas is None:
        sizes, thetas = (math.prod(spatial),), (None,)
    if len(sizes) == 1:
        sizes, thetas = (*sizes, 1), (*thetas, None)
    axes = [_axis(n, theta) for n, theta in zip(sizes, thetas, strict=True)]
    # A constant and one line per axis; products of lines are of second order, as is all that is left out.
    degrees = [t for t in itertools.product(*(range(a.basis.shape[1]) for a in axes)) if sum(t) <= 1]
    terms = [
        functools.reduce(np.multiply.outer, [a.basis[:, k] for a, k in zip(axes, t, strict=True)]).reshape(-1)
        for t in degrees
    ]
    return _Grid(
        spatial=spatial,
        sizes=sizes,
        cell=tuple(len(a.basis) for a in axes),
        cells=tuple(a.factor.shape[1] for a in axes),
        basis=np.stack(terms, axis=1),
        factors=tuple(a.factor[[t[k] for t in degrees]] for k, a in enumerate(axes)),
    )


def _to_cells(grid: _Grid, x: Array) -> Array:
    """`[*spatial, c]` as `[*cells, pixels of a cell, c]`, zeros added."""
    count, channels = len(grid.sizes), x.shape[-1]
    x = x.reshape(*grid.sizes, channels)
    whole = [n * s for n, s in zip(grid.cells, grid.cell, strict=True)]
    x = jnp.pad(x, [*((0, w - n) for w, n in zip(whole, grid.sizes, strict=True)), (0, 0)])
    x = x.reshape(*itertools.chain(*zip(grid.cells, grid.cell, strict=True)), channels)
    x = x.transpose(*range(0, 2 * count, 2), *range(1, 2 * count, 2), 2 * count)
    return x.reshape(*grid.cells, len(grid.basis), channels)


def _from_cells(grid: _Grid, x: Array) -> Array:
    """`[*cells, pixels of a cell, c]` as `[*spatial, c]`, what was added cut off."""
    count, channels = len(grid.sizes), x.shape[-1]
    x = x.reshape(*grid.cells, *grid.cell, channels)
    x = x.transpose(*itertools.chain(*((k, count + k) for k in range(count))), 2 * count)
    x = x.reshape(*(n * s for n, s in zip(grid.cells, grid.cell, strict=True)), channels)
    return x[tuple(slice(n) for n in grid.sizes)].reshape(*grid.spatial, channels)


# Applying it, one image at a time.


def _einsum(subscripts: str, *operands: Any) -> Array:
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def _similarity(features: Array, landmarks: Array) -> Array:
    """`exp(-½‖f - z‖²)` of every pixel and landmark, by direct differences."""
    squares = [(features[..., k, None] - landmarks[:, k]) ** 2 for k in range(landmarks.shape[-1])]
    return jnp.exp(-0.5 * functools.reduce(jnp.add, squares))


def _message(grid: _Grid, arrays: tuple[Array, Array, Array, Array], q: Array) -> Array:
    features, landmarks, root, own = arrays
    return _smooth(grid, (features, landmarks, root), q) + own[..., None] * q


def _smooth(grid: _Grid, arrays: tuple[Array, Array, Array], q: Array) -> Array:
    """`Φ Φᵀ q`."""
    synthesise = functools.partial(_synthesise, grid, *arrays)
    shape = (*(f.shape[-1] for f in grid.factors), q.shape[-1], arrays[1].shape[0])
    q = varying_like(q, arrays)
    coefficients = varying_like(jnp.zeros(shape, q.dtype), q)
    # The transpose as JAX derives it, so that it is one whatever `Φ` is.
    (coefficients,) = jax.linear_transpose(synthesise, coefficients)(q)
    return synthesise(coefficients)


def _synthesise(grid: _Grid, features: Array, landmarks: Array, root: Array, x: Array) -> Array:
    """`Φ x` of coefficients `[*ranks, labels, landmarks]`."""
    labels, last = x.shape[-2], len(grid.factors) - 1
    basis, factors = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), (grid.basis, grid.factors))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # kernel values are too many to be kept
    def row(values: Array, features: Array) -> Array:
        moments = _einsum("tcr,tr...->ct...", factors[last], values)
        moments = moments.reshape(len(moments), -1, len(landmarks))
        found = _einsum("cpk,cmk->cpm", _similarity(features, landmarks), moments)
        return jnp.sum(basis[:, :, None] * found.reshape(*found.shape[:2], -1, labels), axis=-2)

    def along(axis: int, values: Array, features: Array) -> Array:
        if axis == last:
            return row(values, features)
        # Up to here all terms share their values.
        subscripts = "tr,r...->t..." if axis == 0 else "tr,tr...->t..."
        return lax.map(
            lambda cell: along(axis + 1, _einsum(subscripts, cell[0], values), cell[1]),
            (factors[axis].swapaxes(0, 1), features),
        )

    return _from_cells(grid, along(0, _einsum("...k,km->...m", x, root), features))


def _diagonal(grid: _Grid, arrays: tuple[Array, Array, Array, Array]) -> Array:
    """`‖Φ_i‖²`, the product of what position and colour contribute, and `own`."""
    features, landmarks, root, own = arrays
    grams = [np.einsum("scr,tcr->cst", f, f) for f in grid.factors]
    gram = functools.reduce(lambda a, b: a[..., None, :, :] * b, grams)
    position = np.einsum("...st,ps,pt->...p", gram, grid.basis, grid.basis)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def color(features: Array) -> Array:
        return jnp.sum(_einsum("...k,mk->...m", _similarity(features, landmarks), root) ** 2, axis=-1)

    rows = features.reshape(-1, *features.shape[-3:])
    found = lax.map(color, rows).reshape(position.shape) * position
    return _from_cells(grid, found[..., None])[..., 0] + own


# Building it.


def _build(f: Features, spatial_ndim: int, num_landmarks: int) -> LandmarkKernel:
    values, known = f.values, f.position_bandwidths
    spatial, batch = values.shape[-1 - spatial_ndim : -1], values.shape[: -1 - spatial_ndim]
    if values.shape[-1] == 0:
        raise ValueError("features: got no feature at all; a kernel needs at least one dimension")
    _checks.check_finite("features", values)
    _check_memory(spatial, known, num_landmarks)
    if known is not None:
        values = values[..., spatial_ndim:]
    values = values.reshape(-1, *spatial, values.shape[-1])
    features, landmarks, root, own = _build_items(spatial, known, num_landmarks, values)
    return LandmarkKernel.from_fields(
        features=features,
        landmarks=landmarks,
        root=root,
        own=own,
        spatial=spatial,
        batch=batch,
        bandwidths=known,
    )


def _check_memory(spatial: tuple[int, ...], known: tuple[float, ...] | None, num_landmarks: int) -> None:
    if known is None:
        return
    # Frequencies up to 5.3 / θ are above the tolerance, and an axis of n pixels holds n / π of them per unit.
    rank = math.prod(min(n, 1.7 * n / theta + 4) for n, theta in zip(spatial, known, strict=True))
    if rank * num_landmarks > MAX_COEFFICIENTS:
        raise ValueError(
            f"features: position bandwidths {known} are so small for an image of {spatial} pixels that "
            f"{num_landmarks} landmarks need {4e-9 * rank * num_landmarks:.3g} GB per label; use "
            "jaxcrf.filters.Lattice or Window, or fewer landmarks"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _build_items(
    spatial: tuple[int, ...], bandwidths: tuple[float, ...] | None, num_landmarks: int, values: Array
) -> tuple[Array, Array, Array, Array]:
    """What a kernel holds, of every item of `[items, *spatial, d]`."""
    grid = _grid(spatial, bandwidths)

    def item(values: Array) -> tuple[Array, Array, Array, Array]:
        features = _to_cells(grid, values)
        landmarks = _choose(lax.stop_gradient(values), num_landmarks)
        root = _inverse_root(landmarks)
        # An exact kernel's rows sum to one, a pixel's own term, or more. A pixel that no landmark is like would
        # get a sum of zero, or of less, which no normalisation survives; the diagonal makes up for that.
        ones = jnp.ones((*spatial, 1), values.dtype)
        own = jnp.maximum(1 - _smooth(grid, (features, landmarks, root), ones)[..., 0], 0)
        return features, landmarks, root, own

    if len(values) == 1:
        return jax.tree.map(lambda x: x[None], item(values[0]))
    return lax.map(item, values)


def _choose(values: Array, num_landmarks: int) -> Array:
    """Landmarks `[K, d]`: k-means of a regular subset of the pixels, seeded by k-means++."""
    sizes = values.shape[:-1]
    wanted = max(SAMPLE, 4 * num_landmarks)
    step = 1
    while math.prod(-(-n // step) for n in sizes) > wanted:
        step += 1
    sample = values[tuple(slice(min(step // 2, n - 1), None, step) for n in sizes)]
    sample = sample.reshape(-1, values.shape[-1])
    count = min(num_landmarks, len(sample))

    def distances(centre: Array) -> Array:
        return jnp.sum((sample - centre) ** 2, axis=-1)

    def seed(distance: Array, draw: Array) -> tuple[Array, Array]:
        # With a probability in proportion to the squared distance to the nearest that is there already.
        running = jnp.cumsum(distance)
        chosen = sample[jnp.argmax(running > draw * running[-1])]
        return jnp.minimum(distance, distances(chosen)), chosen

    # The same random numbers for every image: a filter is a function of its features.
    draws = jnp.asarray(np.random.default_rng(0).random(count), sample.dtype)
    start = jnp.ones_like(sample[:, 0])
    _, centres = lax.scan(seed, start, draws)

    def improve(centres: Array, _: None) -> tuple[Array, None]:
        nearest = jnp.argmin(jax.vmap(distances, out_axes=1)(centres), axis=1)
        member = jax.nn.one_hot(nearest, count, dtype=sample.dtype)
        size = member.sum(axis=0)[:, None]
        means = _einsum("nk,nd->kd", member, sample) / jnp.maximum(size, 1)
        return jnp.where(size > 0, means, centres), None

    return lax.scan(improve, centres, None, length=LLOYD_STEPS)[0]


def _inverse_root(landmarks: Array) -> Array:
    """`R` with `Rᵀ R = W⁺`, the pseudo-inverse of the landmarks' own kernel values.

    The rows of `R` orthogonalise the landmarks' kernel functions, at every step the one that those before it
    represent worst (a Cholesky factorisation with pivots). One that they represent up to rounding (twice the same
    colour, say) gets a row of zeros: the rank is found, not assumed, and nothing is divided by what rounding left.
    Written as a loop, since on a busy machine LAPACK's threads may take a second for 256 landmarks.
    """
    gram = _similarity(landmarks, landmarks)
    # Dividing by the root of a residual multiplies rounding by as much.
    tolerance = 100 * float(jnp.finfo(gram.dtype).eps)

    def orthogonalise(state: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], None]:
        root, residual = state
        pivot = jnp.argmax(residual)
        size = residual[pivot]
        row = (jnp.arange(len(gram)) == pivot) - _einsum(
            "k,km->m", _einsum("km,m->k", root, gram[pivot]), root
        )
        row = jnp.where(size > tolerance, row * lax.rsqrt(jnp.maximum(size, tolerance)), 0)
        residual = (residual - _einsum("m,mn->n", row, gram) ** 2).at[pivot].set(0)
        return (root.at[step].set(row), residual), None

    start = varying_like((jnp.zeros_like(gram), jnp.ones_like(gram[0])), landmarks)
    (root, _), _ = lax.scan(orthogonalise, start, jnp.arange(len(gram)))
    return root

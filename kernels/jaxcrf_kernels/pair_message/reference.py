"""The pair message in plain jnp: the path of every device, and the oracle of kernels to come.

Pixels are cut into tiles, and the walk is over *unordered* pairs of tiles: a Gaussian is symmetric, so one
tile of kernel values carries messages both ways and each exponential is computed once for two of its uses.
The kernel values of one pair of tiles are all that lives besides the operands.

Arrays are held tile by tile with pixels innermost, `[batch, tiles, channels, pixels of a tile]`. The walk is
two loops, columns outside and rows inside: what an inner loop does not change lies in memory of its own,
whereas XLA fuses a dynamic slice into the loop that computes exponentials, which along the columns keeps that
loop from being vectorised (six times slower, on jax 0.10 and 0.12 alike; along the rows it is harmless).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import sequential_vmap

from jaxcrf_kernels._bank import Needs, Operands, accumulator_dtype
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

# Pixels of a tile. On two CPU cores, 96×128×21 with kernels of 5 and 2 features takes 190 to 240 ms forward
# with 256 to 1024 pixels and 600 to 670 ms for all gradients with 512; 256 takes 5 to 25 % more (starting the
# threads), 1024 30 to 40 % (4 MiB for each of a tile's arrays, which no longer fit the second-level cache),
# 128 several times as much.
CPU_TILE = 512
# 16 million pairs, 64 MiB: enough to fill a GPU and to hide its launches, and few enough for any memory. Reasoned,
# not measured.
ACCELERATOR_TILE = 4096


class PairConfig(NamedTuple):
    """What is static about a message.

    Attributes:
        spatial: the shape that the pixels were flattened from; one axis where nobody said.
        cutoff: how far along every axis two pixels of a pair may lie apart, or None.
        precision: the least that the product of kernel values and maps, and its counterparts in the backward
            pass, must be computed in. This module always computes it in full.
        tolerance: kernel values below it may be left out. This module leaves out none.
    """

    spatial: tuple[int, ...]
    cutoff: tuple[int, ...] | None
    precision: str = "float32"
    tolerance: float = 0.0


def forward(config: PairConfig, operands: Operands) -> Array:
    """Computes the message of `pair_message`, its arguments already checked."""
    return _dispatch(_forward, config, *operands)


def gradients(config: PairConfig, wanted: Needs, operands: Operands, cotangent: Array) -> dict[str, Any]:
    """Finds the gradients that are wanted, by the names of the operands; not that of `q`.

    Args:
        config: as in `forward`.
        wanted: which, at least one of them.
        operands: as in `forward`.
        cotangent: the gradient with respect to the message, shaped like `q`.
    """
    return _dispatch(functools.partial(_backward, wanted), config, *operands, cotangent)


def _dispatch(function: Callable[..., Any], config: PairConfig, *operands: Any) -> Any:
    def run(tile: int) -> Callable[..., Any]:
        # Mapping over a batch axis of `vmap` one item at a time keeps the tile in the cache.
        return sequential_vmap(lambda *arguments: function(_Tiles.of(config, tile), *arguments))

    return by_platform(*operands, cpu=run(CPU_TILE), accelerator=run(ACCELERATOR_TILE))


class _Tiles(NamedTuple):
    """How the pixels are cut into tiles, and which pairs of tiles hold pairs of pixels within the cut-off."""

    spatial: tuple[int, ...]
    block: tuple[int, ...]  # a tile's pixels along every spatial axis
    cutoff: tuple[int, ...] | None

    @classmethod
    def of(cls, config: PairConfig, tile: int) -> "_Tiles":
        if config.cutoff is None:  # any order of the pixels will do
            pixels = math.prod(config.spatial)
            size = math.ceil(pixels / math.ceil(pixels / tile))
            # Whole vectors, unless one tile is all there is.
            return cls((pixels,), (size if size == pixels else math.ceil(size / 16) * 16,), None)
        # Blocks as wide as the cut-off along every axis: with fewer pixels more of the pairs in the tiles are
        # within it, but below some hundred pixels the loop over tiles costs more than what it saves.
        block = [1] * len(config.spatial)
        tile = min(tile, max(256, math.prod(c + 1 for c in config.cutoff)))
        while True:
            growing = [a for a, n in enumerate(config.spatial) if block[a] < n]
            if not growing or 2 * math.prod(block) > tile:
                break
            # The last axis first, since its pixels are neighbours in memory.
            a = min(growing, key=lambda a: (block[a] / (config.cutoff[a] + 1), -a))  # type: ignore[index]
            block[a] *= 2
        even = [math.ceil(n / math.ceil(n / b)) for n, b in zip(config.spatial, block, strict=True)]
        return cls(config.spatial, tuple(even), config.cutoff)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(math.ceil(n / b) for n, b in zip(self.spatial, self.block, strict=True))

    @property
    def number(self) -> int:
        return math.prod(self.grid)

    @property
    def size(self) -> int:
        return math.prod(self.block)

    def arrange(self, x: Array) -> Array:
        """`[batch, pixels, c]` to `[batch, tiles, c, size]`, padded with zeros."""
        axes = len(self.spatial)
        x = x.reshape(x.shape[0], *self.spatial, x.shape[-1])
        pad = [(0, g * b - n) for g, b, n in zip(self.grid, self.block, self.spatial, strict=True)]
        x = jnp.pad(x, [(0, 0), *pad, (0, 0)])
        x = x.reshape(x.shape[0], *itertools.chain(*zip(self.grid, self.block, strict=True)), x.shape[-1])
        order = (0, *range(1, 2 * axes, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2))
        return x.transpose(order).reshape(x.shape[0], self.number, x.shape[-1], self.size)

    def collect(self, x: Array) -> Array:
        """The inverse of `arrange`."""
        axes = len(self.spatial)
        batch, channels = x.shape[0], x.shape[-2]
        x = x.reshape(batch, *self.grid, channels, *self.block)
        order = (0, *itertools.chain(*((1 + a, 2 + axes + a) for a in range(axes))), 1 + axes)
        x = x.transpose(order)
        x = x.reshape(batch, *(g * b for g, b in zip(self.grid, self.block, strict=True)), channels)
        x = x[(slice(None), *(slice(n) for n in self.spatial))]
        return x.reshape(batch, math.prod(self.spatial), channels)

    def coordinates(self) -> Array | None:
        """Where pixels lie, `[tiles, axes, size]`; None where it does not matter."""
        if self.cutoff is None:
            return None
        axes = len(self.spatial)
        grid = jnp.stack([lax.broadcasted_iota(jnp.int32, self.spatial, a) for a in range(axes)], -1)
        return self.arrange(grid.reshape(1, -1, axes))[0]

    def partners(self) -> tuple[np.ndarray, np.ndarray]:
        """With a cut-off, the tiles `b` of all pairs `a <= b` in order of `a`, and where each `a` begins."""
        assert self.cutoff is not None
        reach = [math.ceil(c / b) for c, b in zip(self.cutoff, self.block, strict=True)]
        places = np.indices(self.grid).reshape(len(self.grid), -1).T
        pairs = []
        for offset in itertools.product(*(range(-r, r + 1) for r in np.minimum(reach, self.grid))):
            if offset < (0,) * len(offset):
                continue
            other = places + offset
            inside = ((other >= 0) & (other < self.grid)).all(-1)
            pairs.append([np.ravel_multi_index(tuple(x[inside].T), self.grid) for x in (places, other)])
        first, second = np.concatenate(pairs, axis=1)
        order = np.argsort(first, kind="stable")
        begins = np.searchsorted(first[order], np.arange(self.number + 1))
        return second[order].astype(np.int32), begins.astype(np.int32)

    def walk(
        self,
        column: Callable[[Array], Any],
        pair: Callable[[Any, Array, Array, Any], Any],
        finish: Callable[[Any, Array, Any], Any],
        initial: Any,
    ) -> Any:
        """Visits all unordered pairs of tiles.

        Args:
            column: what is the same for all pairs of one tile, from the tile's index.
            pair: `(that, column's index, row's index, carry) -> carry`, row's index not the smaller.
            finish: `(that, column's index, carry) -> carry`, once after all pairs of a tile.
            initial: the carry.

        Returns:
            The last carry.
        """
        tables = None if self.cutoff is None else tuple(map(jnp.asarray, self.partners()))

        def one_column(b: Array, carry: Any) -> Any:
            b = jnp.asarray(b, jnp.int32)  # under x64 a loop counts in int64
            shared = column(b)

            def one_pair(t: Array, carry: Any) -> Any:
                a = jnp.asarray(t, jnp.int32) if tables is None else tables[0][t]
                return pair(shared, b, a, carry)

            begin, end = (b, self.number) if tables is None else (tables[1][b], tables[1][b + 1])
            return finish(shared, b, lax.fori_loop(begin, end, one_pair, carry))

        return lax.fori_loop(0, self.number, one_column, initial)


def _tile(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def _add_tile(total: Array, value: Array, index: Array) -> Array:
    own = lax.dynamic_index_in_dim(total, index, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, own + value, index, 0)


class _Side(NamedTuple):
    """What a pair of tiles reads of one of them: `[channels, size]` each."""

    features: tuple[Array | None, ...]
    left: Array | None
    right: Array | None
    coordinates: Array | None


def _differences(rows: _Side, columns: _Side, m: int) -> list[Array]:
    f, g = rows.features[m], columns.features[m]
    if f is None or g is None:
        return []
    return [f[d][:, None] - g[d][None, :] for d in range(f.shape[0])]


def _kernels(rows: _Side, columns: _Side, cutoff: tuple[int, ...] | None, dtype: np.dtype) -> list[Array]:
    """The tiles `k_m(i, j)`, zero beyond the cut-off."""
    inside = None
    if cutoff is not None and rows.coordinates is not None and columns.coordinates is not None:
        distances = jnp.abs(rows.coordinates[:, :, None] - columns.coordinates[:, None, :])
        inside = functools.reduce(jnp.logical_and, [distances[a] <= c for a, c in enumerate(cutoff)])
    values = []
    for m in range(len(rows.features)):
        # A sum of squares that is spelled out: one loop computes it and its exponential, with no
        # `[size, size, d]` in between.
        squares = [difference * difference for difference in _differences(rows, columns, m)]
        value = jnp.exp(-0.5 * functools.reduce(jnp.add, squares)) if squares else jnp.ones((), dtype)
        values.append(value if inside is None else jnp.where(inside, value, jnp.zeros((), dtype)))
    return values


def _outer(kernel: Array, rows: Array | None, columns: Array | None, m: int) -> Array:
    """A kernel's tile times a scale of its rows and one of its columns."""
    if rows is not None:
        kernel = kernel * rows[m][:, None]
    return kernel if columns is None else kernel * columns[m][None, :]


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=lax.Precision.HIGHEST)


def merge_batch(q: Array, *others: Array | None) -> tuple[Array, bool]:
    """Items that share everything else are but more labels: `[1, pixels, batch labels]`."""
    if q.shape[0] == 1 or any(x is not None and x.shape[0] != 1 for x in others):
        return q, False
    return jnp.moveaxis(q, 0, 1).reshape(1, q.shape[1], -1), True


def unmerge_batch(message: Array, q: Array, merged: bool) -> Array:
    """The way back for the message of merged maps: shaped and stored like `q`."""
    if merged:
        message = jnp.moveaxis(message.reshape(q.shape[1], q.shape[0], q.shape[2]), 1, 0)
    return message.astype(q.dtype)


def _sides(
    tiles: _Tiles, features: tuple[Array, ...], left: Array | None, right: Array | None
) -> Callable[[Array], _Side]:
    """From the index of a batch item to its operands, tile by tile."""
    arranged = _Side(
        features=tuple(tiles.arrange(f) if f.shape[-1] else None for f in features),
        left=None if left is None else tiles.arrange(left),
        right=None if right is None else tiles.arrange(right),
        coordinates=None,
    )
    coordinates = tiles.coordinates()

    def item(index: Array) -> _Side:
        own = jax.tree.map(lambda x: _tile(x, index if x.shape[0] > 1 else jnp.int32(0)), arranged)
        return own._replace(coordinates=coordinates)

    return item


# Compiled here rather than by the caller, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnums=0)
def _forward(
    tiles: _Tiles,
    q: Array,
    features: tuple[Array, ...],
    weights: Array,
    left: Array | None,
    right: Array | None,
) -> Array:
    dtype = accumulator_dtype(q.dtype)
    merged_q, merged = merge_batch(q, *features, left, right)
    qs = tiles.arrange(merged_q.astype(dtype))
    side = _sides(tiles, features, left, right)
    shape = (tiles.size, tiles.size)

    def total(kernels: list[Array], receiver: _Side, sender: _Side, transposed: bool) -> Array:
        scales = (sender.right, receiver.left) if transposed else (receiver.left, sender.right)
        terms = [weights[m] * _outer(kernel, *scales, m) for m, kernel in enumerate(kernels)]
        return jnp.broadcast_to(functools.reduce(jnp.add, terms), shape)

    def one_item(index: Array) -> Array:
        q_item, sides = _tile(qs, index), side(index)

        def column(b: Array) -> Any:
            return _tile(sides, b), _tile(q_item, b)

        def pair(shared: Any, b: Array, a: Array, carry: Any) -> Any:
            message, own = carry
            columns, q_b = shared
            rows, q_a = _tile((sides, q_item), a)
            kernels = _kernels(rows, columns, tiles.cutoff, dtype)
            to_rows = to_columns = total(kernels, rows, columns, False)
            if left is not None or right is not None:
                to_columns = total(kernels, columns, rows, True)
            own = own + _dot(q_a, to_columns, (1, 0))
            received = _dot(q_b, to_rows, (1, 1))
            return _add_tile(message, jnp.where(a == b, 0, received), a), own

        def finish(shared: Any, b: Array, carry: Any) -> Any:
            message, own = carry
            return _add_tile(message, own, b), jnp.zeros_like(own)

        zeros = (jnp.zeros_like(q_item), jnp.zeros_like(q_item[0]))
        zeros = varying_like(zeros, q, features, weights, left, right)
        return tiles.walk(column, pair, finish, zeros)[0]

    message = tiles.collect(lax.map(one_item, jnp.arange(qs.shape[0], dtype=jnp.int32)))
    return unmerge_batch(message, q, merged)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    needs: Needs,
    tiles: _Tiles,
    q: Array,
    features: tuple[Array, ...],
    weights: Array,
    left: Array | None,
    right: Array | None,
    cotangent: Array,
) -> dict[str, Any]:
    r"""Walks over the pairs of tiles once, collecting all gradients but that of `q`.

    With `A = ⟨g_i, q_j⟩` and `B = ⟨q_i, g_j⟩` (labels contracted) and `E_m = k_m (s_i r_j A + s_j r_i B)`,
    an unordered pair `(i, j)` gives

        ∂f_i += -w_m E_m (f_i - f_j),    ∂f_j += w_m E_m (f_i - f_j),    ∂w_m += E_m,
        ∂s_i += w_m k_m r_j A,   ∂s_j += w_m k_m r_i B,   ∂r_i += w_m k_m s_j B,   ∂r_j += w_m k_m s_i A
    """
    dtype = accumulator_dtype(q.dtype)
    merged_q, _ = merge_batch(q, *features, left, right)
    merged_g, _ = merge_batch(cotangent, *features, left, right)
    qs, gs = (tiles.arrange(x.astype(dtype)) for x in (merged_q, merged_g))
    side = _sides(tiles, features, left, right)
    kernels_count = len(features)
    # Without scales only A + B is needed, which is one product of twice as many labels.
    scaled = left is not None or right is not None

    def one_item(index: Array) -> dict[str, Any]:
        q_item, g_item, sides = _tile(qs, index), _tile(gs, index), side(index)
        wide = (kernels_count, tiles.size)
        own: dict[str, Any] = {}
        if needs.features:
            own["features"] = [
                None if f is None else jnp.zeros((f.shape[-2], tiles.size), dtype) for f in sides.features
            ]
        for name in ("left", "right"):
            if getattr(needs, name):
                own[name] = jnp.zeros(wide, dtype)
        whole = jax.tree.map(lambda x: jnp.zeros((tiles.number, *x.shape), dtype), own)
        if needs.weights:
            own["weights"] = jnp.zeros(kernels_count, dtype)
            # A partial sum per tile, so that float32 never adds a whole image one by one.
            whole["weights"] = jnp.zeros((tiles.number, kernels_count), dtype)

        def column(b: Array) -> Any:
            q_b, g_b = _tile((q_item, g_item), b)
            return _tile(sides, b), q_b, g_b, jnp.concatenate([q_b, g_b])

        def pair(shared: Any, b: Array, a: Array, carry: Any) -> Any:
            whole, own = carry
            whole, own = dict(whole), dict(own)
            columns, q_b, g_b, both_b = shared
            rows, q_a, g_a = _tile((sides, q_item, g_item), a)
            once = (a != b).astype(dtype)  # a pair of a tile with itself holds every pair of pixels twice
            kernels = _kernels(rows, columns, tiles.cutoff, dtype)
            if scaled:
                forth, back = _dot(g_a, q_b, (0, 0)), _dot(q_a, g_b, (0, 0))
                energies = [
                    k
                    * (_outer(forth, rows.left, columns.right, m) + _outer(back, rows.right, columns.left, m))
                    for m, k in enumerate(kernels)
                ]
            else:
                agreement = _dot(jnp.concatenate([g_a, q_a]), both_b, (0, 0))
                energies = [k * agreement for k in kernels]
            if needs.features:
                found, gathered = list(whole["features"]), list(own["features"])
                for m, energy in enumerate(energies):
                    moments = [energy * difference for difference in _differences(rows, columns, m)]
                    if moments:
                        gathered[m] = gathered[m] + jnp.stack([x.sum(axis=0) for x in moments])
                        found[m] = _add_tile(found[m], -once * jnp.stack([x.sum(axis=1) for x in moments]), a)
                whole["features"], own["features"] = found, gathered
            if needs.weights:
                sums = jnp.stack([energy.sum(axis=0).sum() for energy in energies])
                own["weights"] = own["weights"] + (0.5 + 0.5 * once) * sums
            for name, there, along_rows, along_columns in (
                ("left", "right", "forth", "back"),
                ("right", "left", "back", "forth"),
            ):
                if not getattr(needs, name):
                    continue
                product = {"forth": forth, "back": back}
                to_rows, to_columns = product[along_rows], product[along_columns]
                of_columns, of_rows = getattr(columns, there), getattr(rows, there)
                own[name] = own[name] + jnp.stack(
                    [_outer(k * to_columns, of_rows, None, m).sum(axis=0) for m, k in enumerate(kernels)]
                )
                received = jnp.stack(
                    [_outer(k * to_rows, None, of_columns, m).sum(axis=1) for m, k in enumerate(kernels)]
                )
                whole[name] = _add_tile(whole[name], once * received, a)
            return whole, own

        def finish(shared: Any, b: Array, carry: Any) -> Any:
            whole, own = carry
            return jax.tree.map(lambda x, y: _add_tile(x, y, b), whole, own), jax.tree.map(
                jnp.zeros_like, own
            )

        zeros = varying_like((whole, own), q, features, weights, left, right, cotangent)
        return tiles.walk(column, pair, finish, zeros)[0]

    found = lax.map(one_item, jnp.arange(qs.shape[0], dtype=jnp.int32))

    def to_operand(gradient: Array, operand: Array) -> Array:
        gradient = tiles.collect(gradient)
        if operand.shape[0] == 1:  # shared by the whole batch
            gradient = gradient.sum(axis=0, keepdims=True)
        return gradient.astype(operand.dtype)

    result: dict[str, Any] = {}
    if needs.features:
        result["features"] = tuple(
            jnp.zeros_like(f) if gradient is None else weights[m] * to_operand(gradient, f)
            for m, (f, gradient) in enumerate(zip(features, found["features"], strict=True))
        )
    if needs.weights:
        result["weights"] = found["weights"].sum(axis=(0, 1))
    for name, operand in (("left", left), ("right", right)):
        if getattr(needs, name) and operand is not None:
            result[name] = weights * to_operand(found[name], operand)
    return result

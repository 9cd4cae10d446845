"""Sparse operators: weights on the edges between neighbouring pixels."""

import functools
from typing import Any, Literal, Self, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxcrf import _checks
from jaxcrf.filters.base import (
    Filter,
    Immutable,
    PixelLabelOperator,
    ScaledFilter,
    filter_pytree,
    scale_pixels,
)

EdgeKind = Literal["general", "potts"]
Connectivity = Literal[4, 8, 12]

# From a pixel to the other end of its edges: right, down, down-right, down-left, right-2, down-2. The edges the
# other way are those of the neighbours.
OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))


class Grid(Immutable):
    r"""Weights on the edges of a grid of pixels: every pixel hears its neighbours, and not itself.

    With `e` an edge from pixel `i` to pixel `i + δ_e`, of a symmetric operator's every pair named once,

    .. math::
        \text{potts:}\quad (Kq)_i(l) = \sum_e w_{i,e}\, q_{i+δ_e}(l) + w_{i-δ_e,e}\, q_{i-δ_e}(l) , \qquad
        \text{general:}\quad (Kq)_i = \sum_e W_{i,e}\, q_{i+δ_e} + W_{i-δ_e,e}^\top\, q_{i-δ_e} .

    The Potts kind has one weight per edge. It is a pixel filter like all others: it acts on each label's map
    alike, and any algorithm takes it. The general kind has a matrix of labels × labels per edge, whose rows belong
    to the pixel that the edge starts from; it mixes labels, so that linear solvers take it and mean field does not.

    Either is symmetric with a diagonal of zeros, and so, unless all weights are zero, indefinite: a linear system
    needs something on its diagonal, as `sparse_gaussian_crf` and `K + Diagonal(…)` have. Takes `O(N E)` or
    `O(N E labels²)` time and memory. Differentiable to any order, in `q` and in the edges.

    Args:
        edges: `[*batch, height, width, E]` of the Potts kind, `[*batch, height, width, E, labels, labels]` of the
            general, with `E = connectivity / 2` edges that start at a pixel, in the order right, down, down-right,
            down-left, two to the right, two down. Edges that leave the image are ignored.
        connectivity: the neighbours of a pixel: 4, 8 (with diagonals), or 12 (and those two pixels away along rows
            and columns).
        kind: "potts" or "general".

    Raises:
        ValueError: if kind or connectivity are unknown, or the edges have another shape or hold nothing.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> K = jaxcrf.filters.Grid(jnp.ones((2, 3, 2)), connectivity=4, kind="potts")
        >>> K(jnp.ones((2, 3, 1)))[..., 0]  # how many neighbours
        Array([[2., 3., 2.],
               [2., 3., 2.]], dtype=float32)

    References:
        Chandra and Kokkinos, Fast, Exact and Multi-Scale Inference for Semantic Image Segmentation with Deep
        Gaussian CRFs, 2016, for 4-connected grids; Chandra, Usunier and Kokkinos, 2017, §4, for their use after
        dense terms.
    """

    connectivity: Connectivity

    def __new__(cls, edges: Any, *, connectivity: Connectivity, kind: EdgeKind) -> Self:
        """Chooses the class by kind; both are `Grid`s."""
        del edges, connectivity
        if kind not in get_args(EdgeKind):
            raise ValueError(f"kind: got {kind!r}; expected one of {', '.join(get_args(EdgeKind))}")
        return object.__new__(PixelGrid if kind == "potts" else PixelLabelGrid)  # type: ignore[return-value]

    def __init__(self, edges: Any, *, connectivity: Connectivity, kind: EdgeKind):
        if connectivity not in get_args(Connectivity):
            raise ValueError(f"connectivity: got {connectivity!r}; expected 4, 8 or 12")
        edges = _checks.as_float(edges)
        count = connectivity // 2
        labels = [] if kind == "potts" else ["labels", "labels"]
        axis = edges.ndim - 1 - len(labels)
        square = kind == "potts" or (axis > 0 and edges.shape[-1] == edges.shape[-2])
        if axis < 2 or edges.shape[axis] != count or not square:
            expected = ", ".join(["*batch", "height", "width", str(count), *labels])
            raise ValueError(
                f"edges: got shape {edges.shape}; expected [{expected}] for kind={kind!r} and "
                f"connectivity={connectivity}, the edges that start at each pixel"
            )
        _checks.check_not_empty("edges", edges)
        self._initialize(connectivity=connectivity)
        inside = edges_inside(edges.shape[axis - 2 : axis], connectivity)
        self._set(jnp.where(inside.reshape(*inside.shape, *(1 for _ in labels)), edges, 0))

    def _set(self, edges: Array) -> None:
        self._initialize(edges=edges)

    @property
    def kind(self) -> EdgeKind:
        """Which of the two it is."""
        return "potts" if isinstance(self, Filter) else "general"

    @property
    def _offsets(self) -> tuple[tuple[int, int], ...]:
        return OFFSETS[: self.connectivity // 2]


@filter_pytree(data=("stencil", "left", "right"), static=("connectivity", "symmetric_scales"))
class PixelGrid(Grid, ScaledFilter):
    """The Potts kind of `Grid`, a pixel filter; made by `Grid(edges, connectivity=4, kind="potts")`."""

    stencil: (
        Array  # [*batch, height, width, 2 E]: what comes from the other ends of edges, and from their starts
    )

    def _set(self, edges: Array) -> None:
        backward = [
            _shifted(edges[..., e, None], (-dy, -dx))[..., 0] for e, (dy, dx) in enumerate(self._offsets)
        ]
        stencil = jnp.concatenate([edges, jnp.stack(backward, -1)], -1)
        self._initialize(stencil=stencil, left=None, right=None, symmetric_scales=True)

    @property
    def edges(self) -> Float[Array, "*batch height width edges"]:
        """The weights of the edges, zero where they would leave the image."""
        return self.stencil[..., : self.connectivity // 2]

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self.stencil.shape[-3:-1]

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return self.stencil.shape[:-3]

    def degrees(self) -> Float[Array, "*batch height width"]:
        """The sum of the absolute weights of a pixel's edges, which bounds all eigenvalues (Gershgorin)."""
        return jnp.abs(self.stencil).sum(-1)

    def diagonal(self) -> Array:
        """Zeros: no pixel is its own neighbour."""
        return jnp.zeros(self.stencil.shape[:-1], self.stencil.dtype)

    def row_sums(self) -> Array:  # noqa: D102
        return self.stencil.sum(-1)

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        (q,) = restricted
        q = scale_pixels(q.astype(jnp.promote_types(q.dtype, self.stencil.dtype)), self.right)
        both = (*self._offsets, *((-dy, -dx) for dy, dx in self._offsets))
        return (scale_pixels(_sum_shifted(q, self.stencil, both), self.left),)


@filter_pytree(data=("edges",), static=("connectivity",))
class PixelLabelGrid(Grid, PixelLabelOperator):
    """The general kind of `Grid`, which mixes labels; made by `Grid(edges, connectivity=4, kind="general")`."""

    edges: Array  # [*batch, height, width, E, labels, labels], zero where they would leave the image

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self.edges.shape[-5:-3]

    @property
    def num_labels(self) -> int:  # noqa: D102
        return self.edges.shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return self.edges.shape[:-5]

    @property
    def is_symmetric(self) -> bool:  # noqa: D102
        return True

    @property
    def T(self) -> "PixelLabelGrid":  # noqa: D102
        return self

    def degrees(self) -> Float[Array, "*batch height width labels"]:
        """The sum of the absolute weights that a pixel's label has to do with; it bounds all eigenvalues."""
        strengths = jnp.abs(self.edges)
        return self._sum_ends(strengths.sum(-1), strengths.sum(-2))

    def diagonal(self) -> Array:
        """Zeros: no pixel is its own neighbour."""
        return jnp.zeros((*self.edges.shape[:-3], self.num_labels), self.edges.dtype)

    def apply(self, q: Array) -> Array:  # noqa: D102
        padded = _padded(q)
        ends = jnp.stack([_window(padded, offset, q.shape) for offset in self._offsets], axis=-2)
        # Products summed by hand: batched products with so small a matrix take a CPU four times as long.
        received = (self.edges * ends[..., None, :]).sum(-1)
        sent = (self.edges * q[..., None, :, None]).sum(-2)
        return self._sum_ends(received, sent)

    def _sum_ends(self, received: Array, sent: Array) -> Array:
        """Sums what the edges `[*batch, height, width, E, labels]` bring to where they start, and to where they end."""
        arrived = [_shifted(sent[..., e, :], (-dy, -dx)) for e, (dy, dx) in enumerate(self._offsets)]
        return functools.reduce(jnp.add, arrived, received.sum(-2))


def edges_inside(spatial: tuple[int, ...], connectivity: int) -> np.ndarray:
    """Which edges do not leave an image, `[height, width, connectivity / 2]`."""
    height, width = spatial
    y, x = np.mgrid[:height, :width]
    inside = [(y + dy < height) & (x + dx >= 0) & (x + dx < width) for dy, dx in OFFSETS[: connectivity // 2]]
    return np.stack(inside, -1)


# How far the longest edges reach.
_REACH = max(max(map(abs, offset)) for offset in OFFSETS)


def _padded(q: Array) -> Array:
    return jnp.pad(q, [(0, 0)] * (q.ndim - 3) + [(_REACH, _REACH)] * 2 + [(0, 0)])


def _window(padded: Array, offset: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """What lies `offset` away from every pixel, zero outside the image."""
    (dy, dx), (height, width) = offset, shape[-3:-1]
    y, x = _REACH + dy, _REACH + dx
    return padded[..., y : y + height, x : x + width, :]


def _shifted(q: Array, offset: tuple[int, int]) -> Array:
    return _window(_padded(q), offset, q.shape)


def _sum_shifted(q: Array, weights: Array, offsets: tuple[tuple[int, int], ...]) -> Array:
    padded = _padded(q)
    terms = [weights[..., k, None] * _window(padded, offset, q.shape) for k, offset in enumerate(offsets)]
    return functools.reduce(jnp.add, terms)

"""Low-rank operators: inner products of learned embeddings between all pairs of pixels."""

import math
from typing import Any, Literal, Self, get_args

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxcrf import _checks, _linalg
from jaxcrf.filters.base import (
    Filter,
    Immutable,
    PixelLabelOperator,
    ScaledFilter,
    filter_pytree,
    scale_pixels,
)

EmbeddingKind = Literal["general", "potts"]

# Solvers divide by what products of embeddings leave, so that TF32 would not do.
PRECISION = lax.Precision.HIGHEST

# Sums over pixels are made per image row and then added up, which keeps all cores of a CPU busy; the partial sums
# of larger matrices would take more memory than the embeddings, so rows are merged.
MAX_PARTIAL_SUMS = 64

# From this size on, half of a symmetric product is mirrored rather than computed, but for the blocks on its diagonal.
MIN_SYMMETRIC = 512
SYMMETRIC_PARTS = 4


class Gram(Immutable):
    r"""Inner products of embeddings, `K = AᵀA` with `A` of `D` rows: dense, exact and never written out.

    .. math::
        \text{potts:}\quad (Kq)_i(l) = \sum_j \langle \hat A_i, \hat A_j\rangle\, q_j(l) , \qquad
        \text{general:}\quad (Kq)_i(l) = \sum_{j, l'} \langle A_i^l, A_j^{l'}\rangle\, q_j(l') .

    The Potts kind has one embedding per pixel. It is a pixel filter like all others: it acts on each label's map
    alike, any algorithm takes it, and its restricted maps are the `D` numbers per label `Â q`. The general
    kind has one embedding per pixel and label. It mixes labels, so that it is a `PixelLabelOperator`: linear
    solvers take it, mean field does not.

    Either is symmetric and positive semi-definite of rank at most `D`, takes `2 N D` multiply-adds per map
    and `O(N D)` memory. Differentiable to any order, in `q` and in the embeddings.

    Args:
        embeddings: `[*batch, *spatial, D]` of the Potts kind, `[*batch, *spatial, labels, D]` of the general.
        kind: "potts" or "general".
        spatial_ndim: 2 for images, 3 for volumes.

    Raises:
        ValueError: if the kind is unknown, or the embeddings have too few axes or hold nothing.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> embeddings = jnp.eye(2)[jnp.array([[0, 0, 1], [0, 1, 1]])]  # two groups of pixels
        >>> K = jaxcrf.filters.Gram(embeddings, kind="potts")
        >>> K(jnp.ones((2, 3, 1)))[..., 0]  # everyone hears of their own group
        Array([[3., 3., 3.],
               [3., 3., 3.]], dtype=float32)
        >>> K.rank, K.diagonal()[0, 0]
        (2, Array(1., dtype=float32))

    References:
        Chandra, Usunier and Kokkinos, Dense and Low-Rank Gaussian CRFs Using Deep Embeddings, 2017, eq. 4
        (general), 11 and 12 (Potts type), 13 and 15 (the products).
    """

    embeddings: Array
    _spatial: tuple[int, ...]

    def __new__(cls, embeddings: Any, *, kind: EmbeddingKind, spatial_ndim: int = 2) -> Self:
        """Chooses the class by kind; both are `Gram`s."""
        del embeddings, spatial_ndim
        if kind not in get_args(EmbeddingKind):
            raise ValueError(f"kind: got {kind!r}; expected one of {', '.join(get_args(EmbeddingKind))}")
        return object.__new__(PixelGram if kind == "potts" else PixelLabelGram)  # type: ignore[return-value]

    def __init__(self, embeddings: Any, *, kind: EmbeddingKind, spatial_ndim: int = 2):
        _checks.check_spatial_ndim(spatial_ndim)
        embeddings = _checks.as_float(embeddings)
        wanted = ["height", "width"] if spatial_ndim == 2 else [f"{spatial_ndim} spatial axes"]
        tail = spatial_ndim + (1 if kind == "potts" else 2)
        if embeddings.ndim < tail:
            axes = ", ".join(["*batch", *wanted, *(["labels"] if kind == "general" else []), "D"])
            raise ValueError(
                f"embeddings: got shape {embeddings.shape}; expected [{axes}] for kind={kind!r}"
                + (" (one embedding per pixel is kind='potts')" if kind == "general" else "")
            )
        _checks.check_not_empty("embeddings", embeddings)
        begin = embeddings.ndim - tail
        self._set(embeddings, embeddings.shape[begin : begin + spatial_ndim])

    def _set(self, embeddings: Array, spatial: tuple[int, ...]) -> None:
        self._initialize(embeddings=embeddings, _spatial=spatial)

    @property
    def kind(self) -> EmbeddingKind:
        """Which of the two it is."""
        return "potts" if isinstance(self, Filter) else "general"

    @property
    def rank(self) -> int:
        """`D`, the numbers of an embedding; the rank is no larger."""
        return self.embeddings.shape[-1]

    @property
    def num_vectors(self) -> int:
        """How many embeddings there are in one image: pixels, or pixels times labels."""
        return math.prod(self.embeddings.shape[self.embeddings.ndim - self._tail : -1])

    @property
    def _tail(self) -> int:
        return len(self._spatial) + (1 if self.kind == "potts" else 2)

    def squared_norms(self) -> Array:
        """`‖A_i‖²`, one number per embedding."""
        return jnp.sum(self.embeddings**2, axis=-1)

    def dual(self) -> Float[Array, "*batch D D"]:
        """`A Aᵀ`, the small matrix with the same eigenvalues, apart from zeros."""
        rows = self._in_rows()
        *batch, count, length, d = rows.shape
        most = max(1, min(MAX_PARTIAL_SUMS, count * length // d))
        sums = max(n for n in range(1, min(count, most) + 1) if count % n == 0)
        rows = rows.reshape(*batch, sums, -1, d)
        width = d if d < MIN_SYMMETRIC else -(-d // SYMMETRIC_PARTS)
        parts = []
        for begin in range(0, d, width):
            end = min(begin + width, d)
            part = jnp.einsum(
                "...rmd,...rme->...rde", rows[..., begin:end], rows[..., :end], precision=PRECISION
            ).sum(-3)
            parts.append(jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, d - end)]))
        if len(parts) == 1:
            return parts[0]
        lower = jnp.concatenate(parts, axis=-2)
        return jnp.tril(lower) + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)

    def quadratic_form(self, lower: Float[Array, "*batch D D"]) -> Array:
        """`A_iᵀ M⁻¹ A_i`, one number per embedding, of a `D × D` matrix `M = lower lowerᵀ`."""
        eye = jnp.broadcast_to(jnp.eye(self.rank, dtype=lower.dtype), lower.shape)
        inverse = _linalg.triangular_solve(lower, eye, lower=True)
        whitened = jnp.einsum("...rmd,...ed->...rme", self._in_rows(), inverse, precision=PRECISION)
        return jnp.sum(whitened**2, axis=-1).reshape(self.embeddings.shape[:-1])

    def _in_rows(self) -> Array:
        """The embeddings as `[*batch, rows, vectors per row, D]`."""
        batch = self.embeddings.shape[: self.embeddings.ndim - self._tail]
        return self.embeddings.reshape(*batch, self._spatial[0], -1, self.rank)


@filter_pytree(data=("embeddings", "left", "right"), static=("_spatial", "symmetric_scales"))
class PixelGram(Gram, ScaledFilter):
    """The Potts kind of `Gram`, a pixel filter; made by `Gram(embeddings, kind="potts")`."""

    def _set(self, embeddings: Array, spatial: tuple[int, ...]) -> None:
        super()._set(embeddings, spatial)
        self._initialize(left=None, right=None, symmetric_scales=True)

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self._spatial

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return self.embeddings.shape[: self.embeddings.ndim - self._tail]

    def diagonal(self) -> Array:  # noqa: D102
        return scale_pixels(scale_pixels(self.squared_norms()[..., None], self.left), self.right)[..., 0]

    def row_sums(self) -> Array:  # noqa: D102
        bare = self.replace(left=None, right=None)
        return bare(jnp.ones((*self.spatial, 1), self.embeddings.dtype))[..., 0]

    @property
    def restricts(self) -> bool:  # noqa: D102
        return True

    def restrict(self, q: Array) -> tuple[Array, ...]:
        """`Â q`, `[*batch, D, labels]` (eq. 15)."""
        q = scale_pixels(q.astype(jnp.promote_types(q.dtype, jnp.float32)), self.right)
        q = q.reshape(*q.shape[: -1 - len(self.spatial)], self.spatial[0], -1, q.shape[-1])
        # In this order of axes the products take a CPU a quarter of the time.
        t = jnp.einsum("...rmd,...rml->...rld", self._in_rows(), q, precision=PRECISION).sum(-3)
        return (jnp.swapaxes(t, -1, -2),)

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:  # noqa: D102
        return restricted

    def prolong(self, convolved: tuple[Array, ...]) -> Array:
        """`Âᵀ t`."""
        rows, t = self._in_rows(), _for_each_row(convolved[0], self._spatial[0], 2)
        q = jnp.einsum("...rmd,...rdl->...rml", rows, t, precision=PRECISION)
        q = q.reshape(*q.shape[:-3], *self.spatial, q.shape[-1])
        return scale_pixels(q, self.left)


@filter_pytree(data=("embeddings",), static=("_spatial",))
class PixelLabelGram(Gram, PixelLabelOperator):
    """The general kind of `Gram`, which mixes labels; made by `Gram(embeddings, kind="general")`."""

    @property
    def spatial(self) -> tuple[int, ...]:  # noqa: D102
        return self._spatial

    @property
    def num_labels(self) -> int:  # noqa: D102
        return self.embeddings.shape[-2]

    @property
    def batch(self) -> tuple[int, ...]:  # noqa: D102
        return self.embeddings.shape[: self.embeddings.ndim - self._tail]

    @property
    def is_symmetric(self) -> bool:  # noqa: D102
        return True

    @property
    def T(self) -> "PixelLabelGram":  # noqa: D102
        return self

    def diagonal(self) -> Array:  # noqa: D102
        return self.squared_norms()

    def restrict(self, q: Array) -> Array:
        """`A q`, `[*batch, D]` (eq. 13)."""
        q = q.reshape(*q.shape[: -1 - len(self.spatial)], self.spatial[0], -1)
        return jnp.einsum("...rmd,...rm->...rd", self._in_rows(), q, precision=PRECISION).sum(-2)

    def prolong(self, t: Array) -> Array:
        """`Aᵀ t`."""
        rows, t = self._in_rows(), _for_each_row(t, self._spatial[0], 1)
        q = jnp.einsum("...rmd,...rd->...rm", rows, t, precision=PRECISION)
        return q.reshape(*q.shape[:-2], *self.spatial, self.num_labels)

    def apply(self, q: Array) -> Array:  # noqa: D102
        return self.prolong(self.restrict(q))


def _for_each_row(t: Array, rows: int, ndim: int) -> Array:
    """One `t`, of `ndim` axes, for each row, so that its cotangent is summed row by row as well."""
    begin = t.ndim - ndim
    t = jnp.expand_dims(t, begin)
    return jnp.broadcast_to(t, (*t.shape[:begin], rows, *t.shape[begin + 1 :]))

"""Layers of Gaussian CRFs: pairwise terms from features, scores from one linear solve."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import softplus
from jaxtyping import Float

from jaxcrf.filters.gram import EmbeddingKind, Gram
from jaxcrf.filters.grid import Connectivity, EdgeKind, Grid
from jaxcrf.inference.gaussian_crf import EmbeddingScaling, GaussianCRFResult, Solver, gaussian_crf
from jaxcrf.inference.sparse_gaussian_crf import EdgeScaling, sparse_gaussian_crf
from jaxcrf.nn.mean_field import inverse_softplus_of_one

# A tenth of λ = 1 in squares, where means are taken.
_INITIAL_NORM = 0.3


class EmbeddingHead(nnx.Module):
    """A convolution that gives every pixel, or every pixel and label, an embedding.

    Args:
        in_features: channels of the features.
        embedding_size: `D`, the numbers of an embedding.
        kind: "potts" for one embedding per pixel, "general" for one per pixel and label.
        num_labels: how many labels, for the general kind.
        kernel_size: of the convolution.
        initial_norm: about how long the embeddings of features of unit variance are to begin with; None for `√D`,
            as usual weights give them.
        dtype: of its arithmetic; None for that of its inputs. Embeddings are at least float32 in any case.
        rngs: where its weights come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> head = EmbeddingHead(8, 16, kind="general", num_labels=3, rngs=nnx.Rngs(0))
        >>> head(jnp.ones((2, 4, 5, 8))).shape
        (2, 4, 5, 3, 16)

    References:
        Chandra, Usunier and Kokkinos, 2017, §4: a layer of its own on top of the pairwise stream.
    """

    def __init__(
        self,
        in_features: int,
        embedding_size: int = 128,
        *,
        kind: EmbeddingKind = "potts",
        num_labels: int | None = None,
        kernel_size: int = 1,
        initial_norm: float | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self._per_pixel = _per_pixel(kind, num_labels, (embedding_size,))
        variance = 1.0 if initial_norm is None else initial_norm**2 / embedding_size
        self.convolution = _convolution(in_features, self._per_pixel, kernel_size, dtype, rngs, variance)

    def __call__(self, features: Float[Array, "*batch height width channels"]) -> Float[Array, "..."]:
        """The embeddings, `[*batch, height, width, D]` or `[*batch, height, width, labels, D]`."""
        return _unfolded(self.convolution(features), self._per_pixel)


class EdgeHead(nnx.Module):
    """A convolution that gives the edges of a grid their weights, or their matrices of label pairs.

    Args:
        in_features: channels of the features.
        connectivity: neighbours of a pixel: 4, 8 or 12.
        kind: "potts" for one weight per edge, "general" for a matrix of labels × labels.
        num_labels: how many labels, for the general kind.
        kernel_size: of the convolution, which should see both ends of an edge.
        initial_scale: about how large the weights are to begin with, for features of unit variance.
        dtype: of its arithmetic; None for that of its inputs. Edges are at least float32 in any case.
        rngs: where its weights come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> EdgeHead(8, connectivity=8, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 5, 8))).shape
        (2, 4, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        connectivity: Connectivity = 4,
        *,
        kind: EdgeKind = "potts",
        num_labels: int | None = None,
        kernel_size: int = 3,
        initial_scale: float = 1.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        per_edge = () if kind == "potts" else (num_labels or 0,)
        self._per_pixel = (connectivity // 2, *_per_pixel(kind, num_labels, per_edge))
        self.convolution = _convolution(
            in_features, self._per_pixel, kernel_size, dtype, rngs, initial_scale**2
        )

    def __call__(self, features: Float[Array, "*batch height width channels"]) -> Float[Array, "..."]:
        """The edges, `[*batch, height, width, E]` or `[*batch, height, width, E, labels, labels]`."""
        return _unfolded(self.convolution(features), self._per_pixel)


class _Layer(nnx.Module):
    """A head that makes the pairwise terms, `λ`, and the function that solves for the scores."""

    _crf: ClassVar[Callable[..., GaussianCRFResult]]
    head: Any
    _options: dict[str, Any]

    def _set_regularization(self, regularization: float, learned: bool) -> None:
        if not 0 < regularization < math.inf:
            raise ValueError(f"regularization: got {regularization}; expected λ > 0")
        self._regularization = float(regularization)
        # As λ softplus(·) it starts from λ and never leaves the positive numbers.
        self.regularization_logit = nnx.Param(jnp.asarray(inverse_softplus_of_one())) if learned else None

    @property
    def regularization(self) -> Any:
        """`λ`: a number, or an array where it is learned."""
        if self.regularization_logit is None:
            return self._regularization
        return self._regularization * softplus(self.regularization_logit[...])

    def solve(
        self,
        features: Float[Array, "*batch height width channels"],
        unary: Float[Array, "*batch height width labels"],
        *,
        variances: bool = False,
    ) -> GaussianCRFResult:
        """Scores with statistics and, if asked for, variances."""
        return type(self)._crf(
            self._terms(features),
            unary,
            regularization=self.regularization,
            variances=variances,
            **self._options,
        )

    def __call__(
        self,
        features: Float[Array, "*batch height width channels"],
        unary: Float[Array, "*batch height width labels"],
    ) -> Float[Array, "*batch height width labels"]:
        """The scores `x`, logits for a soft-max."""
        return self.solve(features, unary).scores

    def _terms(self, features: Array) -> Array:
        """What the solver takes."""
        return self.head(features)


class GaussianCRF(_Layer):
    r"""A dense Gaussian CRF as a layer: embeddings from features, `x` from `(K + λI) x = b`.

    See `jaxcrf.gaussian_crf` for the model. `features` come from a stream of their own or from the backbone; they and
    `unary` have one resolution.

    Args:
        in_features: channels of the features.
        num_labels: labels of the unary.
        kind: "potts" (one embedding per pixel) or "general" (one per pixel and label).
        embedding_size: `D`. The paper's best are 128 (general) and 1024 (Potts).
        regularization: `λ`.
        learn_regularization: makes `λ` a parameter, positive at all times.
        embedding_scaling: as in `gaussian_crf`. "default" is "spectral" for the Potts kind, whose systems would
            otherwise not be sure to be definite while embeddings are learned, and None for the general kind.
        averaged: takes means over the pixels instead of sums, `(K q)_i = 1/P Σ_j ⟨A_i, A_j⟩ q_j`, so that pairwise
            terms are no stronger in large images than in small ones; embeddings then begin so short that scores are
            about the unary's. The paper takes sums.
        kernel_size: of the head's convolution.
        solver: "auto", "cg" or "direct".
        tolerance: as in `gaussian_crf`.
        max_iterations: likewise.
        dtype: of the head's arithmetic; the solve is at least float32.
        rngs: where the head's weights come from.

    Raises:
        ValueError: if `regularization` is not greater than zero, or the kind is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = GaussianCRF(8, num_labels=3, embedding_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 4, 5, 8)), jnp.ones((2, 4, 5, 3))).shape
        (2, 4, 5, 3)

    References:
        Chandra, Usunier and Kokkinos, Dense and Low-Rank Gaussian CRFs Using Deep Embeddings, 2017, §3 and 4.
    """

    _crf = staticmethod(gaussian_crf)

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        kind: EmbeddingKind = "potts",
        embedding_size: int = 128,
        regularization: float = 1.0,
        learn_regularization: bool = False,
        embedding_scaling: EmbeddingScaling | str | None = "default",
        averaged: bool = False,
        kernel_size: int = 1,
        solver: Solver = "auto",
        tolerance: float = 1e-6,
        max_iterations: int | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.head = EmbeddingHead(
            in_features,
            embedding_size,
            kind=kind,
            num_labels=num_labels,
            kernel_size=kernel_size,
            initial_norm=_INITIAL_NORM if averaged else None,
            dtype=dtype,
            rngs=rngs,
        )
        self._averaged = averaged
        self._set_regularization(regularization, learn_regularization)
        if embedding_scaling == "default":
            embedding_scaling = "spectral" if kind == "potts" else None
        self._options = {
            "kind": kind,
            "embedding_scaling": embedding_scaling,
            "solver": solver,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
        }

    def affinities(self, features: Float[Array, "*batch height width channels"]) -> Gram:
        """The inner products of the embeddings, before any scaling, for pictures and losses of their own."""
        return Gram(self.head(features), kind=self._options["kind"])

    def _terms(self, features: Array) -> Array:
        embeddings = self.head(features)
        return embeddings / math.sqrt(math.prod(features.shape[-3:-1])) if self._averaged else embeddings


class SparseGaussianCRF(_Layer):
    """A Gaussian CRF on the edges of a grid as a layer: edges from features, `x` from `(K + λI) x = b`.

    See `jaxcrf.sparse_gaussian_crf` for the model. `features` and `unary` have one resolution.

    Args:
        in_features: channels of the features.
        num_labels: labels of the unary.
        connectivity: neighbours of a pixel: 4, 8 or 12.
        kind: "potts" (one weight per edge) or "general" (a matrix of label pairs).
        regularization: `λ`.
        learn_regularization: makes `λ` a parameter, positive at all times.
        edge_scaling: as in `sparse_gaussian_crf`; by default the system is sure to be definite.
        averaged: takes means over the neighbours instead of sums; edges then begin so weak that scores are about the
            unary's.
        centered: likewise; None for Potts-type edges only, which many labels would else keep weak.
        kernel_size: of the head's convolution, which should see both ends of an edge.
        solver: "auto", "cg" or "direct".
        tolerance: as in `sparse_gaussian_crf`.
        max_iterations: likewise.
        dtype: of the head's arithmetic; the solve is at least float32.
        rngs: where the head's weights come from.

    Raises:
        ValueError: if `regularization` is not greater than zero, or the kind is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = SparseGaussianCRF(8, num_labels=3, connectivity=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 4, 5, 8)), jnp.ones((2, 4, 5, 3))).shape
        (2, 4, 5, 3)

    References:
        Chandra and Kokkinos, Fast, Exact and Multi-Scale Inference for Semantic Image Segmentation with Deep
        Gaussian CRFs, 2016.
    """

    _crf = staticmethod(sparse_gaussian_crf)

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        connectivity: Connectivity = 4,
        kind: EdgeKind = "potts",
        regularization: float = 1.0,
        learn_regularization: bool = False,
        edge_scaling: EdgeScaling | None = "diagonally-dominant",
        centered: bool | None = None,
        averaged: bool = False,
        kernel_size: int = 3,
        solver: Solver = "auto",
        tolerance: float = 1e-6,
        max_iterations: int | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.head = EdgeHead(
            in_features,
            connectivity,
            kind=kind,
            num_labels=num_labels,
            kernel_size=kernel_size,
            initial_scale=_INITIAL_NORM if averaged else 1.0,
            dtype=dtype,
            rngs=rngs,
        )
        self._averaged = averaged
        self._set_regularization(regularization, learn_regularization)
        self._options = {
            "kind": kind,
            "connectivity": connectivity,
            "edge_scaling": edge_scaling,
            "centered": kind == "potts" if centered is None else centered,
            "solver": solver,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
        }

    def affinities(self, features: Float[Array, "*batch height width channels"]) -> Grid:
        """The edges, before any scaling, for pictures and losses of their own."""
        options = {name: self._options[name] for name in ("connectivity", "kind")}
        return Grid(self.head(features), **options)

    def _terms(self, features: Array) -> Array:
        edges = self.head(features)
        return edges / self._options["connectivity"] if self._averaged else edges


class StackedGaussianCRF(nnx.Module):
    """Layers one after the other, each taking the scores of the one before as its unary.

    Args:
        layers: `GaussianCRF` and `SparseGaussianCRF` layers, the first to be applied first; the paper's best model
            has a dense one and then a sparse one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> stack = StackedGaussianCRF(
        ...     [GaussianCRF(8, 3, embedding_size=16, rngs=rngs), SparseGaussianCRF(8, 3, rngs=rngs)]
        ... )
        >>> stack(jnp.ones((4, 5, 8)), jnp.ones((4, 5, 3))).shape
        (4, 5, 3)

    References:
        Chandra, Usunier and Kokkinos, 2017, table 3, "densepotts+sparsepotts".
    """

    def __init__(self, layers: Sequence[GaussianCRF | SparseGaussianCRF]):
        self.layers = nnx.List(layers)

    def __call__(
        self,
        features: Float[Array, "*batch height width channels"],
        unary: Float[Array, "*batch height width labels"],
    ) -> Float[Array, "*batch height width labels"]:
        """The scores of the last layer."""
        for layer in self.layers:
            unary = layer(features, unary)
        return unary


def _per_pixel(kind: str, num_labels: int | None, last: tuple[int, ...]) -> tuple[int, ...]:
    """What a head gives every pixel: one of `last`, or one for every label."""
    if kind not in ("general", "potts"):
        raise ValueError(f"kind: got {kind!r}; expected one of general, potts")
    if kind == "potts":
        return last
    if num_labels is None:
        raise ValueError("num_labels: got None; kind='general' needs the number of labels")
    return (num_labels, *last)


def _convolution(
    in_features: int,
    per_pixel: tuple[int, ...],
    kernel_size: int,
    dtype: Any,
    rngs: nnx.Rngs,
    variance: float = 1.0,
) -> nnx.Conv:
    return nnx.Conv(
        in_features,
        math.prod(per_pixel),
        (kernel_size, kernel_size),
        kernel_init=nnx.initializers.variance_scaling(variance, "fan_in", "truncated_normal"),
        dtype=dtype,
        rngs=rngs,
    )


def _unfolded(found: Array, per_pixel: tuple[int, ...]) -> Array:
    found = found.astype(jnp.promote_types(found.dtype, jnp.float32))
    return found.reshape(*found.shape[:-1], *per_pixel)

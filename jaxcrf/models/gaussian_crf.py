"""Two streams that meet in a Gaussian CRF: scores from one network, pairwise terms from another."""

from collections.abc import Sequence
from typing import Any, Literal

from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.filters import Gram, Grid
from jaxcrf.filters.gram import EmbeddingKind
from jaxcrf.filters.grid import Connectivity
from jaxcrf.models import grids
from jaxcrf.models.network import Network
from jaxcrf.models.resnet import ResNet
from jaxcrf.nn import GaussianCRF, SparseGaussianCRF, StackedGaussianCRF

Depth = Literal["res2a", "res3a", "res4a"]
Layer = Literal["dense", "sparse"]

# Where ResNet-101 is cut off, as blocks of its stages.
_DEPTHS = {"res2a": (1,), "res3a": (3, 1), "res4a": (3, 4, 1)}


class GaussianCRFNetwork(Network):
    r"""A unary network, a second network that gives pairwise terms, and the Gaussian CRF between them.

    .. math::
        b = \mathrm{unary}(I), \qquad A = \mathrm{head}(\mathrm{pairwise}(I)), \qquad (K(A) + λI)\, x = b ,

    all on the grid of the unary, where the linear system is small; `x` is then upsampled as the unary's scores are.
    The features of the second network are interpolated to where the cells of this grid lie.

    The parameters are `unary/…`, `pairwise/…` and `crf/…`, which is what training protocols go by: `three_phase`
    with `objectives.unary`, `objectives.pairwise` and `objectives.segmentation` is the paper's.

    Args:
        unary: `b`, of any `Network`.
        pairwise: the second network, of which the last features are taken.
        crf: `nn.GaussianCRF`, `nn.SparseGaussianCRF` or `nn.StackedGaussianCRF`, with a head for these features.

    Raises:
        TypeError: if the unary is no `Network`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> options = {"embedding_size": 8, "width": 4}
        >>> model = models.create(
        ...     "small_fcn", 3, width=8, refine="gaussian_crf_potts", refine_options=options, rngs=nnx.Rngs(0)
        ... )
        >>> model.scores(jnp.zeros((1, 24, 32, 3))).shape, model(jnp.zeros((1, 24, 32, 3))).shape
        ((1, 6, 8, 3), (1, 24, 32, 3))

    References:
        Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep Embeddings*, 2017, fig. 2 and §4.
    """

    def __init__(
        self, unary: Any, pairwise: ResNet, crf: GaussianCRF | SparseGaussianCRF | StackedGaussianCRF
    ):
        if not isinstance(unary, Network):
            raise TypeError(
                f"unary: got {type(unary).__name__}; expected a network with scores on a grid, such as deeplab_v2, "
                "which Gaussian CRFs are solved on; put other CRFs on top of this one instead"
            )
        super().__init__(unary.num_labels, unary.in_channels, unary.stride)
        self.unary = unary
        self.pairwise = pairwise
        self.crf = crf

    @property
    def layers(self) -> tuple[GaussianCRF | SparseGaussianCRF, ...]:
        """The layers of the CRF, the first to be applied first."""
        return tuple(self.crf.layers) if isinstance(self.crf, StackedGaussianCRF) else (self.crf,)

    def features(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns features"]:
        """The last features of the pairwise stream at the cells of the unary's grid."""
        last = list(self.pairwise.strides)[-1]
        stride = self.pairwise.strides[last]
        rows, columns = (self.unary.places(n) / stride for n in images.shape[-3:-1])
        return grids.interpolate(self.pairwise(images)[last], rows, columns)

    def affinities(self, images: Num[Array, "*batch height width channels"]) -> tuple[Gram | Grid, ...]:
        """The pairwise terms of every layer, before any scaling: what `plots.affinity` shows of one image."""
        features = self.features(images)
        return tuple(layer.affinities(features) for layer in self.layers)

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """`x`, on the unary's grid."""
        return self._refined(images, self.unary.scores(images))

    def upsample(
        self, scores: Float[Array, "*batch rows columns labels"], size: Sequence[int]
    ) -> Float[Array, "*batch height width labels"]:
        """Scores at every pixel, as those of the unary."""
        return self.unary.upsample(scores, size)

    def places(self, pixels: int) -> Any:
        """Those of the unary's cells."""
        return self.unary.places(pixels)

    def with_unary(self, images: Num[Array, "*batch height width channels"]) -> tuple[Any, Any]:
        """Logits, and those of the unary network, for losses on both."""
        unary = self.unary.scores(images)
        size = images.shape[-3:-1]
        return self.upsample(self._refined(images, unary), size), self.upsample(unary, size)

    def _refined(self, images: Array, unary: Array) -> Array:
        # Solved in single precision at least; then in that of the network again.
        return self.crf(self.features(images), unary).astype(unary.dtype)


def with_gaussian_crf(
    unary: Any,
    num_labels: int,
    *,
    layers: Sequence[Layer] = ("dense",),
    kind: EmbeddingKind = "potts",
    embedding_size: int = 128,
    connectivity: Connectivity = 4,
    depth: Depth = "res4a",
    width: int = 64,
    regularization: float = 1.0,
    learn_regularization: bool = False,
    averaged: bool = True,
    in_channels: int = 3,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> GaussianCRFNetwork:
    """A network with a Gaussian CRF whose pairwise terms come from a truncated ResNet-101, the paper's `resnet-pw`.

    Args:
        unary: any `Network`.
        num_labels: `L`.
        layers: of the CRF, "dense" and "sparse", the first to be applied first; the paper's best is both.
        kind: of the pairwise terms, "general" or "potts".
        embedding_size: `D` of dense layers. The paper's best are 128 (general) and 1024 (Potts).
        connectivity: of sparse layers: 4, 8 or 12 neighbours.
        depth: where the ResNet ends.
        width: channels of its stem, 64 in the paper.
        regularization: `λ`.
        learn_regularization: makes `λ` a parameter.
        averaged: see `nn.GaussianCRF`. With the paper's sums, False, pairwise terms of thousands of cells begin so
            large that the CRF's scores have little to do with the unary's, and are larger in larger images.
        in_channels: of the images.
        dtype: of the convolutions' arithmetic; the solve is at least float32.
        rngs: where parameters come from.

    Returns:
        The network.

    Raises:
        ValueError: if a layer, kind, depth or connectivity is unknown.
        TypeError: if the unary is no `Network`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcrf.models.small_fcn import SmallFCN
        >>> rngs = nnx.Rngs(0)
        >>> model = with_gaussian_crf(
        ...     SmallFCN(3, width=8, rngs=rngs), 3, layers=("dense", "sparse"), embedding_size=8, width=4, rngs=rngs
        ... )
        >>> [type(terms).__name__ for terms in model.affinities(jnp.zeros((24, 32, 3)))]
        ['PixelGram', 'PixelGrid']

    References:
        Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep Embeddings*, 2017, §4 and Tables 2
        and 3.
    """
    if depth not in _DEPTHS:
        raise ValueError(f"depth: got {depth!r}; expected one of {', '.join(_DEPTHS)}")
    if not layers or any(layer not in ("dense", "sparse") for layer in layers):
        raise ValueError(f"layers: got {tuple(layers)}; expected one or more of dense, sparse")
    pairwise = ResNet(blocks=_DEPTHS[depth], in_channels=in_channels, width=width, dtype=dtype, rngs=rngs)
    channels = list(pairwise.channels.values())[-1]
    common: dict[str, Any] = {
        "kind": kind,
        "regularization": regularization,
        "learn_regularization": learn_regularization,
        "averaged": averaged,
        "dtype": dtype,
        "rngs": rngs,
    }
    made: list[Any] = [
        GaussianCRF(channels, num_labels, embedding_size=embedding_size, **common)
        if layer == "dense"
        else SparseGaussianCRF(channels, num_labels, connectivity=connectivity, **common)
        for layer in layers
    ]
    return GaussianCRFNetwork(unary, pairwise, made[0] if len(made) == 1 else StackedGaussianCRF(made))

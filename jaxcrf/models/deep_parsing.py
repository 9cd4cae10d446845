"""The unary network of the Deep Parsing Network: VGG-16 without its last two pools, and sigmoids."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxcrf.models.deeplab import DeepLab


class DeepParsingUnary(DeepLab):
    r"""VGG-16 at stride 8 without its last two pools, the layers b1 to b11 of the Deep Parsing Network: DeepLab, 7 × 7.

    The filters behind the missing pools are those of VGG-16 padded with zeros, 3 × 3 to 5 × 5 and the 7 × 7 of the
    first fully-connected layer to 25 × 25: here convolutions with holes, in which these zeros stay zero. Each label
    has a sigmoid of its own,

    .. math::
        p(u) = \sigma\bigl(\mathrm{upsample}(z)(u)\bigr) ,

    and the logits are `log p`: their soft-max, which the paper trains by, is `p` divided by its sum over the labels,
    the update of eq. 9 without penalties. `nn.DeepParsing` on top takes them as `inputs="log_probs"`.

    Args:
        num_labels: `L`.
        in_channels: of the images.
        width: see `VGG16`.
        hidden_channels: of the two fully-connected layers.
        dropout: after each of them.
        norm: batch normalisation in the backbone, to train from scratch; published weights have none.
        dtype: of the arithmetic.
        rngs: where parameters and dropout come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = DeepParsingUnary(5, width=4, hidden_channels=16, rngs=nnx.Rngs(0))
        >>> model.scores(jnp.zeros((1, 45, 61, 3))).shape, model(jnp.zeros((1, 45, 61, 3))).shape
        ((1, 6, 8, 5), (1, 45, 61, 5))

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §3.1, Table 1 (b), fig. 2.
    """

    _BACKBONE = MappingProxyType({"pool_size": 2, "dense_pools": False})

    def __init__(
        self,
        num_labels: int,
        *,
        in_channels: int = 3,
        width: int = 64,
        hidden_channels: int = 4096,
        dropout: float = 0.5,
        norm: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            num_labels,
            kernel_size=7,
            rate=4,
            hidden_channels=hidden_channels,
            in_channels=in_channels,
            width=width,
            dropout=dropout,
            norm=norm,
            dtype=dtype,
            rngs=rngs,
        )

    def upsample(
        self, scores: Float[Array, "*batch rows columns labels"], size: Sequence[int]
    ) -> Float[Array, "*batch height width labels"]:
        """Logarithms of the sigmoids at every pixel, of scores that are interpolated linearly."""
        return jax.nn.log_sigmoid(super().upsample(scores, size))

"""The unary network of the Deep Parsing Network: VGG-16 without its last two pools, and sigmoids."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.models import grids
from jaxcrf.models.network import Network
from jaxcrf.models.vgg import VGG16


class DeepParsingUnary(Network):
    r"""VGG-16 at stride 8 without its last two pools, the layers b1 to b11 of the Deep Parsing Network.

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
        super().__init__(num_labels, in_channels, 8)
        options = {"dtype": dtype, "rngs": rngs}
        self.backbone = VGG16(
            in_channels=in_channels, width=width, pool_size=2, dense_pools=False, norm=norm, **options
        )
        relu = {"kernel_init": nnx.initializers.he_normal(), **options}
        self.fc6 = nnx.Conv(
            self.backbone.channels["pool5"],
            hidden_channels,
            (7, 7),
            kernel_dilation=self.backbone.dilation,
            conv_general_dilated=grids.atrous_convolution,
            **relu,
        )
        self.fc7 = nnx.Conv(hidden_channels, hidden_channels, (1, 1), **relu)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Conv(hidden_channels, num_labels, (1, 1), **options)

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """What the sigmoids are taken of, `z`, at stride 8."""
        x = self.backbone(images)["pool5"]
        x = self.dropout(jax.nn.relu(self.fc6(x)))
        x = self.dropout(jax.nn.relu(self.fc7(x)))
        return self.classifier(x)

    def upsample(
        self, scores: Float[Array, "*batch rows columns labels"], size: Sequence[int]
    ) -> Float[Array, "*batch height width labels"]:
        """Logarithms of the sigmoids at every pixel, of scores that are interpolated linearly."""
        return jax.nn.log_sigmoid(super().upsample(scores, size))

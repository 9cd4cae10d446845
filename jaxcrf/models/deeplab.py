"""DeepLab: VGG-16 by the hole algorithm with a chosen field of view, and the ResNet-101 of its second version."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.models import grids
from jaxcrf.models.network import Network, check_dropout, check_images
from jaxcrf.models.resnet import ResNet
from jaxcrf.models.vgg import VGG16

_BRANCHES = ("image", "pool1", "pool2", "pool3", "pool4")


class DeepLab(Network):
    r"""VGG-16 at stride 8, whose first fully-connected layer looks at a few cells far apart.

    That layer, `fc6`, is VGG's of 7 × 7 cells, decimated to `kernel_size`, its taps `rate` cells apart. The paper's
    variants with their sizes for 21 labels, and their names in the registry, are

    | name | `kernel_size` | `rate` | field of view | `hidden_channels` | parameters |
    |---|---|---|---|---|---|
    | deeplab_7x7 | 7 | 4 | 224 | 4096 | 134.3 M |
    | deeplab | 4 | 4 | 128 | 4096 | 65.1 M |
    | deeplab_4x4 | 4 | 8 | 224 | 4096 | 65.1 M |
    | deeplab_largefov | 3 | 12 | 224 | 1024 | 20.5 M |

    With `multi_scale` (MSc), the image and the first four pools pass 3 × 3 and 1 × 1 convolutions of 128 channels
    each, `branches`, strided to the grid; these 640 channels join the last features before they are classified. The
    paper trains only these and the classifier's new weights then.

    The fully connected CRF on top is `create(…, refine="densecrf")`.

    Args:
        num_labels: `L`.
        kernel_size: of `fc6`.
        rate: its dilation, in cells of the grid ("input stride").
        hidden_channels: of `fc6` and `fc7`.
        multi_scale: MSc.
        branch_channels: of each of MSc's convolutions.
        in_channels: of the images.
        width: see `VGG16`.
        dropout: after each of the fully-connected layers.
        norm: batch normalisation in the backbone, to train from scratch; published weights have none.
        dtype: of the arithmetic.
        rngs: where parameters and dropout come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = DeepLab(5, width=4, hidden_channels=16, multi_scale=True, branch_channels=4, rngs=nnx.Rngs(0))
        >>> model.scores(jnp.zeros((1, 45, 61, 3))).shape, model(jnp.zeros((1, 45, 61, 3))).shape
        ((1, 6, 8, 5), (1, 45, 61, 5))

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015,
        §3, §4.3 (MSc), Table 2 (variants).
    """

    # Further options of the backbone, of networks that are this one on another.
    _BACKBONE: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        num_labels: int,
        *,
        kernel_size: int = 3,
        rate: int = 12,
        hidden_channels: int = 1024,
        multi_scale: bool = False,
        branch_channels: int = 128,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.5,
        norm: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        backbone = VGG16(in_channels=in_channels, width=width, norm=norm, **self._BACKBONE, **options)
        super().__init__(num_labels, in_channels, 8, backbone.offsets["pool5"])
        self.backbone = backbone
        relu = {"kernel_init": nnx.initializers.he_normal(), **options}
        self.fc6 = nnx.Conv(
            self.backbone.channels["pool5"],
            hidden_channels,
            (kernel_size, kernel_size),
            kernel_dilation=rate,
            conv_general_dilated=grids.atrous_convolution,
            **relu,
        )
        self.fc7 = nnx.Conv(hidden_channels, hidden_channels, (1, 1), **relu)
        self.dropout = nnx.Dropout(check_dropout(dropout), rngs=rngs)
        self.branches: Any = nnx.Dict()
        if multi_scale:
            channels = {"image": in_channels, **self.backbone.channels}
            strides = {"image": 1, **self.backbone.strides}
            for name in _BRANCHES:
                self.branches[name] = nnx.List(
                    [
                        nnx.Conv(
                            channels[name],
                            branch_channels,
                            (3, 3),
                            strides=self.stride // strides[name],
                            padding=[(1, 1), (1, 1)],
                            **relu,
                        ),
                        nnx.Conv(branch_channels, branch_channels, (1, 1), **relu),
                    ]
                )
        last = hidden_channels + len(self.branches) * branch_channels
        self.classifier = nnx.Conv(last, num_labels, (1, 1), **options)

    def features(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns features"]:
        """What is classified: `fc7` and, with `multi_scale`, the branches."""
        features = self.backbone(images)
        x = self.dropout(jax.nn.relu(self.fc6(features["pool5"])))
        found = [self.dropout(jax.nn.relu(self.fc7(x)))]
        for name in _BRANCHES if self.branches else ():
            x = features[name]
            for convolution in self.branches[name]:
                x = jax.nn.relu(convolution(x))
            found.append(x)
        return jnp.concatenate(found, -1)

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits at stride 8."""
        return self.classifier(self.features(images))


class DeepLabV2(Network):
    r"""The dilated ResNet-101 with atrous spatial pyramid pooling, run at three scales that are fused by maximum.

    .. math::
        s = \max_k\, \mathrm{resize}\Bigl(\sum_r C_r * F(\mathrm{resize}(I, \sigma_k))\Bigr)

    with the backbone's last features `F`, 3 × 3 convolutions `C_r` to labels of the dilations `r`, and the scales
    `σ`, whose weights are shared. It is the unary network of the dense Gaussian CRFs.

    Args:
        num_labels: `L`.
        depth: of the backbone, see `ResNet`.
        blocks: likewise.
        scales: `σ`; the scores have the grid of the whole image.
        rates: `r`.
        in_channels: of the images.
        width: see `ResNet`.
        dtype: of the arithmetic.
        rngs: where parameters come from.

    Raises:
        ValueError: if there is no scale or rate, or one is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = DeepLabV2(5, blocks=(1, 1, 1, 1), width=4, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 45, 61, 3))).shape
        (1, 45, 61, 5)

    References:
        Chen et al., *DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
        Fully Connected CRFs*, 2018, §3.2 and §4.1.2; Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian
        CRFs Using Deep Embeddings*, 2017, §5.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        depth: int = 101,
        blocks: Sequence[int] | None = None,
        scales: tuple[float, ...] | list[float] = (1.0, 0.75, 0.5),
        rates: tuple[int, ...] | list[int] = (6, 12, 18, 24),
        in_channels: int = 3,
        width: int = 64,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        for name, values in (("scales", scales), ("rates", rates)):
            if not values or any(not v > 0 for v in values):
                raise ValueError(f"{name}: got {tuple(values)}; expected one or more numbers > 0")
        options = {"dtype": dtype, "rngs": rngs}
        backbone = ResNet(depth, blocks=blocks, in_channels=in_channels, width=width, **options)
        self._last = list(backbone.strides)[-1]
        self._scales = tuple(scales)
        super().__init__(num_labels, in_channels, backbone.strides[self._last])
        self.backbone = backbone
        self.classifier = nnx.List(
            [
                nnx.Conv(
                    backbone.channels[self._last],
                    num_labels,
                    (3, 3),
                    kernel_dilation=rate,
                    kernel_init=nnx.initializers.normal(0.01),
                    **options,
                )
                for rate in rates
            ]
        )

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits on the backbone's grid, the largest of all scales."""
        images = check_images(images, self.in_channels)
        height, width = images.shape[-3:-1]
        grid = (-(-height // self.stride), -(-width // self.stride))
        found = []
        for scale in self._scales:
            size = (max(1, round(scale * height)), max(1, round(scale * width)))
            features = self.backbone(grids.resize(images, size))[self._last]
            scores = sum(convolution(features) for convolution in self.classifier)
            found.append(grids.resize(jnp.asarray(scores), grid))
        return jnp.stack(found).max(0)

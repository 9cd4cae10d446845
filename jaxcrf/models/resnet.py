"""Residual networks made dense by dilation."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.models import grids
from jaxcrf.models.network import Network, check_count, check_dropout, normalized
from jaxcrf.models.vgg import check_output_stride

# Blocks of each stage, by the number of layers with weights.
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNet(nnx.Module):
    """A residual network of bottleneck blocks, with the features of its stem and stages.

    Stages beyond the wanted output stride keep the resolution and dilate their convolutions instead, by 2 and 4.
    Names are torchvision's: `conv1`, `norm1`, `layer1` … `layer4`, whose blocks put the stride on the 3 × 3
    convolution.

    Args:
        depth: 50 or 101.
        blocks: of each stage, instead of those of the depth; later stages may be left out, as `(3, 4, 1)`, which
            ends with res4a.
        in_channels: of the images.
        width: channels of the stem, 64 in the paper; the stages have 4, 8, 16 and 32 times as many.
        output_stride: 8, 16 or 32 (as for classification) of the last stage.
        dtype: of the arithmetic; None for that of parameters and images.
        rngs: where parameters come from.

    Raises:
        ValueError: if there is no such depth or output stride, or `in_channels` or `width` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> network = ResNet(blocks=(1, 1, 1), width=4, rngs=nnx.Rngs(0))
        >>> features = network(jnp.zeros((1, 45, 61, 3)))
        >>> {name: x.shape for name, x in features.items()}
        {'conv1': (1, 12, 16, 4), 'layer1': (1, 12, 16, 16), 'layer2': (1, 6, 8, 32), 'layer3': (1, 6, 8, 64)}

    References:
        He et al., *Deep Residual Learning for Image Recognition*, 2016; Chen et al., *DeepLab: Semantic Image
        Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs*, 2018, §3.1.
    """

    def __init__(
        self,
        depth: int = 101,
        *,
        blocks: Sequence[int] | None = None,
        in_channels: int = 3,
        width: int = 64,
        output_stride: int = 8,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_output_stride(output_stride)
        if blocks is None and depth not in DEPTHS:
            raise ValueError(f"depth: got {depth!r}; expected one of {', '.join(map(str, DEPTHS))}")
        counts = tuple(DEPTHS[depth] if blocks is None else blocks)
        if not 1 <= len(counts) <= 4 or min(counts) < 1:
            raise ValueError(f"blocks: got {counts}; expected one to four numbers of at least 1")
        self._in_channels = check_count("in_channels", in_channels)
        check_count("width", width)
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = _convolution(in_channels, width, 7, strides=2, **options)
        self.norm1 = _norm(width, **options)
        sizes = [("conv1", 4, width)]
        before, dilation, stride = width, 1, 4
        for stage, count in enumerate(counts, start=1):
            strides = 1 if stage == 1 else 2
            # The block where the stride was still looks at neighbours: its input is as dense as ever.
            first = dilation
            if strides == 2 and stride == output_stride:
                strides, dilation = 1, 2 * dilation
            stride *= strides
            channels = width * 2 ** (stage - 1)
            layer = []
            for k in range(count):
                layer.append(
                    _Bottleneck(
                        before,
                        channels,
                        strides=strides if k == 0 else 1,
                        dilation=first if k == 0 else dilation,
                        **options,
                    )
                )
                before = 4 * channels
            setattr(self, f"layer{stage}", nnx.List(layer))
            sizes.append((f"layer{stage}", stride, before))
        self._sizes = tuple(sizes)

    @property
    def strides(self) -> dict[str, int]:
        """Of the features of the stem and every stage."""
        return {name: stride for name, stride, _ in self._sizes}

    @property
    def channels(self) -> dict[str, int]:
        """Of the features of the stem and every stage."""
        return {name: channels for name, _, channels in self._sizes}

    def __call__(self, images: Num[Array, "*batch height width channels"]) -> dict[str, Float[Array, "..."]]:
        """The features "conv1" (after its pool) and "layer1" … .

        Raises:
            ValueError: if the images do not have `in_channels` channels.
        """
        x = jax.nn.relu(self.norm1(self.conv1(normalized(images, self._in_channels))))
        features = {"conv1": grids.max_pool(x, 3, 2)}
        x = features["conv1"]
        for name in list(self.strides)[1:]:
            for block in getattr(self, name):
                x = block(x)
            features[name] = x
        return features


class ResNetFCN(Network):
    """A dilated residual network whose last features are classified at every cell of the grid.

    The unary of the ConvCRF paper is this with 101 layers.

    Args:
        num_labels: `L`.
        depth: 50 or 101.
        blocks: see `ResNet`.
        in_channels: of the images.
        width: see `ResNet`.
        output_stride: see `ResNet`.
        dropout: the share of the last features' channels that is dropped, each for the whole image (2-D dropout).
        dtype: of the arithmetic.
        rngs: where parameters and dropout come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> ResNetFCN(5, blocks=(1, 1, 1, 1), width=4, rngs=nnx.Rngs(0))(jnp.zeros((1, 45, 61, 3))).shape
        (1, 45, 61, 5)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        depth: int = 101,
        blocks: Sequence[int] | None = None,
        in_channels: int = 3,
        width: int = 64,
        output_stride: int = 8,
        dropout: float = 0.5,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        backbone = ResNet(
            depth,
            blocks=blocks,
            in_channels=in_channels,
            width=width,
            output_stride=output_stride,
            dtype=dtype,
            rngs=rngs,
        )
        self._last = list(backbone.strides)[-1]
        super().__init__(num_labels, in_channels, backbone.strides[self._last])
        self.backbone = backbone
        self.dropout = nnx.Dropout(check_dropout(dropout), broadcast_dims=(-3, -2), rngs=rngs)
        self.classifier = nnx.Conv(backbone.channels[self._last], num_labels, (1, 1), dtype=dtype, rngs=rngs)

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits on the backbone's grid."""
        return self.classifier(self.dropout(self.backbone(images)[self._last]))


class _Bottleneck(nnx.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions whose result is added to their input."""

    def __init__(
        self, in_channels: int, channels: int, *, strides: int, dilation: int, dtype: Any, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = _convolution(in_channels, channels, 1, **options)
        self.norm1 = _norm(channels, **options)
        self.conv2 = _convolution(channels, channels, 3, strides=strides, dilation=dilation, **options)
        self.norm2 = _norm(channels, **options)
        self.conv3 = _convolution(channels, 4 * channels, 1, **options)
        # Starting from zero makes a new block the identity, which trains deep stacks from the first step.
        self.norm3 = _norm(4 * channels, scale_init=nnx.initializers.zeros, **options)
        changes = strides > 1 or in_channels != 4 * channels
        self.shortcut = (
            _convolution(in_channels, 4 * channels, 1, strides=strides, **options) if changes else None
        )
        self.shortcut_norm = _norm(4 * channels, **options) if changes else None

    def __call__(self, x: Array) -> Array:
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        y = jax.nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + y)


def _convolution(
    in_channels: int,
    channels: int,
    size: int,
    *,
    strides: int = 1,
    dilation: int = 1,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    pad = dilation * (size - 1) // 2
    return nnx.Conv(
        in_channels,
        channels,
        (size, size),
        strides=strides,
        kernel_dilation=dilation,
        padding=[(pad, pad), (pad, pad)],  # "SAME" would shift the grid of even sizes by a pixel
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        dtype=dtype,
        rngs=rngs,
    )


def _norm(
    channels: int, *, scale_init: Any = nnx.initializers.ones, dtype: Any, rngs: nnx.Rngs
) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, scale_init=scale_init, dtype=dtype, rngs=rngs)

"""VGG-16 made dense by the hole algorithm."""

import itertools
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.models import grids
from jaxcrf.models.network import Network, check_count, check_dropout, normalized

OUTPUT_STRIDES = (8, 16, 32)

_CONVOLUTIONS = (2, 2, 3, 3, 3)
_CHANNELS = (1, 2, 4, 8, 8)


class VGG16(nnx.Module):
    r"""The thirteen convolutions of VGG-16, with the features of its five pools.

    Pools beyond the wanted output stride keep the resolution, and the convolutions behind them look at every second
    (fourth) pixel instead, the hole algorithm: with the same weights the same features come out, at more places.
    Convolutions are `conv1_1` … `conv5_3`.

    Args:
        in_channels: of the images.
        width: channels of the first stage, 64 in the paper; the stages have 1, 2, 4, 8 and 8 times as many.
        output_stride: 8, 16 or 32 (as for classification).
        pool_size: 3 as DeepLab has it, or 2 as the original. Where a pool keeps the resolution, it has 3.
        stages: how many of the five there are; with fewer, later pools are left out.
        dense_pools: whether there are pools that keep the resolution, as DeepLab has them; the Deep Parsing Network
            leaves them out, and its "pool4" and "pool5" are the convolutions themselves.
        norm: batch normalisation after every convolution, which training from scratch needs.
        dtype: of the arithmetic; None for that of parameters and images.
        rngs: where parameters come from.

    Attributes:
        dilation: that of the convolutions which follow: 32 / `output_stride`.

    Raises:
        ValueError: if `output_stride`, `pool_size` or `stages` is none of these, or `in_channels` or `width` is less
            than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> features = VGG16(width=4, rngs=nnx.Rngs(0))(jnp.zeros((1, 45, 61, 3)))
        >>> features["pool2"].shape, features["pool5"].shape
        ((1, 12, 16, 8), (1, 6, 8, 32))

    References:
        Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, 2015;
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015,
        §3.1 (holes); Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §3.1 (no pools).
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        width: int = 64,
        output_stride: int = 8,
        pool_size: int = 3,
        stages: int = 5,
        dense_pools: bool = True,
        norm: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_output_stride(output_stride)
        if pool_size not in (2, 3):
            raise ValueError(f"pool_size: got {pool_size}; expected 2 or 3")
        if stages not in range(1, 6):
            raise ValueError(f"stages: got {stages!r}; expected 1 to 5")
        self._convolutions = _CONVOLUTIONS[:stages]
        self._in_channels = check_count("in_channels", in_channels)
        self._pool_size = pool_size
        self._dense_pools = bool(dense_pools)
        self._norm = norm
        self._width = check_count("width", width)
        self._output_stride = output_stride
        self.dilation = 32 // output_stride
        before = in_channels
        for stage, (count, factor) in enumerate(zip(self._convolutions, _CHANNELS, strict=False), start=1):
            dilation = max(1, 2 ** (stage - 1) // output_stride)
            for k in range(1, count + 1):
                convolution = nnx.Conv(
                    before,
                    factor * width,
                    (3, 3),
                    kernel_dilation=dilation,
                    use_bias=not norm,
                    kernel_init=nnx.initializers.he_normal(),
                    dtype=dtype,
                    rngs=rngs,
                )
                setattr(self, f"conv{stage}_{k}", convolution)
                if norm:
                    setattr(
                        self,
                        f"norm{stage}_{k}",
                        nnx.BatchNorm(factor * width, momentum=0.9, dtype=dtype, rngs=rngs),
                    )
                before = factor * width

    @property
    def strides(self) -> dict[str, int]:
        """Of the features of every pool."""
        return {f"pool{k}": min(2**k, self._output_stride) for k in range(1, 1 + len(self._convolutions))}

    @property
    def offsets(self) -> dict[str, float]:
        """Where the first cell of the features of every pool lies, in pixels: pools of 2 × 2 tile the image."""
        return {
            name: (stride - 1) / 2 if self._pool_size == 2 else 0.0 for name, stride in self.strides.items()
        }

    @property
    def channels(self) -> dict[str, int]:
        """Of the features of every pool."""
        used = _CHANNELS[: len(self._convolutions)]
        return {f"pool{k}": self._width * factor for k, factor in enumerate(used, start=1)}

    def __call__(self, images: Num[Array, "*batch height width channels"]) -> dict[str, Float[Array, "..."]]:
        """The features "image" (normalised), "pool1", … of all stages.

        Raises:
            ValueError: if the images do not have `in_channels` channels.
        """
        x = normalized(images, self._in_channels)
        features = {"image": x}
        stride = 1
        for stage, count in enumerate(self._convolutions, start=1):
            for k in range(1, count + 1):
                x = getattr(self, f"conv{stage}_{k}")(x)
                if self._norm:
                    x = getattr(self, f"norm{stage}_{k}")(x)
                x = jax.nn.relu(x)
            after = self.strides[f"pool{stage}"]
            if after > stride:
                x = grids.max_pool(x, self._pool_size, 2)
            elif self._dense_pools:
                x = grids.max_pool(x, 3, 1)
            stride = after
            features[f"pool{stage}"] = x
        return features


class VGG16FCN(Network):
    """The fully convolutional network on VGG-16, with or without skip connections.

    Of the defaults is FCN-8s: scores at stride 32, to which those of "pool4" and "pool3", 1 × 1 convolutions, are
    added on the way up. With `output_stride=8` and no skips it is a dense VGG-16 with its original first
    fully-connected layer.

    Args:
        num_labels: `L`.
        in_channels: of the images.
        width: channels of the first stage.
        hidden_channels: of the two fully-connected layers, 4096 in the paper.
        output_stride: of the backbone, see `VGG16`.
        skips: pools whose scores are added, each of twice the resolution of the one before.
        pool_size: see `VGG16`.
        dropout: after each of the fully-connected layers.
        norm: see `VGG16`.
        dtype: of the arithmetic.
        rngs: where parameters and dropout come from.

    Raises:
        ValueError: if the skips are not pools of ever higher resolution.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = VGG16FCN(5, width=4, hidden_channels=16, rngs=nnx.Rngs(0))
        >>> model.scores(jnp.zeros((1, 45, 61, 3))).shape, model(jnp.zeros((1, 45, 61, 3))).shape
        ((1, 6, 8, 5), (1, 45, 61, 5))

    References:
        Long, Shelhamer and Darrell, *Fully Convolutional Networks for Semantic Segmentation*, 2015, §4.2.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        in_channels: int = 3,
        width: int = 64,
        hidden_channels: int = 4096,
        output_stride: int = 32,
        skips: tuple[str, ...] | list[str] = ("pool4", "pool3"),
        pool_size: int = 3,
        dropout: float = 0.5,
        norm: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        backbone = VGG16(
            in_channels=in_channels,
            width=width,
            output_stride=output_stride,
            pool_size=pool_size,
            norm=norm,
            **options,
        )
        strides = [output_stride, *(backbone.strides.get(skip, 0) for skip in skips)]
        if any(2 * after != before for before, after in itertools.pairwise(strides)):
            raise ValueError(
                f"skips: got {', '.join(skips)}, of strides {strides[1:]}, after an output stride of {output_stride}; "
                "expected pools each of twice the resolution of the one before, or none"
            )
        last = skips[-1] if skips else "pool5"
        super().__init__(num_labels, in_channels, strides[-1], backbone.offsets[last])
        self.backbone = backbone
        self.fc6 = nnx.Conv(
            backbone.channels["pool5"], hidden_channels, (7, 7), kernel_dilation=backbone.dilation, **options
        )
        self.fc7 = nnx.Conv(hidden_channels, hidden_channels, (1, 1), **options)
        self.dropout = nnx.Dropout(check_dropout(dropout), rngs=rngs)
        self.classifier = nnx.Conv(hidden_channels, num_labels, (1, 1), **options)
        self._skips = tuple(skips)
        self.skips = nnx.Dict(
            {skip: nnx.Conv(backbone.channels[skip], num_labels, (1, 1), **options) for skip in skips}
        )

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits on the grid of the last skip, or of the backbone."""
        features = self.backbone(images)
        x = self.dropout(jax.nn.relu(self.fc6(features["pool5"])))
        x = self.dropout(jax.nn.relu(self.fc7(x)))
        x, before = self.classifier(x), "pool5"
        strides, offsets = self.backbone.strides, self.backbone.offsets
        for skip in self._skips:
            own = self.skips[skip](features[skip])
            # In cells of the finer grid.
            offset = (offsets[before] - offsets[skip]) / strides[skip]
            x, before = own + grids.upsample(x, 2, own.shape[-3:-1], offset), skip
        return x


def check_output_stride(output_stride: Any) -> None:
    """Raises unless the output stride is 8, 16 or 32.

    Example:
        >>> check_output_stride(8)
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride: got {output_stride!r}; expected 8, 16 or 32")

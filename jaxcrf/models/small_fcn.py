"""A small fully convolutional network that is trained from scratch, on a laptop if need be."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.filters.resampling import average_pool, bilinear_upsample, cells
from jaxcrf.models.network import Network, check_count, check_dropout, check_images

# Rough moments of photographs in 0 … 255, per colour channel.
_MEAN, _SCALE = 115.0, 70.0


class SmallFCN(Network):
    r"""A residual encoder of four scales, whose features are fused from coarse to fine.

    The image is first averaged over `reduction × reduction` pixels. Of the reduced image, strided convolutions
    make features at 1/2, 1/4, 1/8 and 1/16 of its size, with residual blocks at the last three; on the way
    back every scale adds a 1 × 1 convolution of its features to the coarser one's, upsampled bilinearly, as
    fully convolutional networks add their scores. The logits come from 1/4 (of the reduced image) and
    are upsampled to the size of the image.

    Args:
        num_labels: `L`.
        in_channels: of the image.
        width: channels at 1/4; half of it at 1/2, twice and three times as many at 1/8 and 1/16.
        blocks: residual blocks at each of the last three scales.
        reduction: 1 for full resolution; 2 costs a quarter.
        dropout: the share of the fused features that is dropped while training.
        dtype: of the arithmetic; None for that of parameters and images.
        rngs: where parameters and dropout come from.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> SmallFCN(11, width=8, rngs=nnx.Rngs(0))(jnp.zeros((2, 45, 61, 3))).shape
        (2, 45, 61, 11)

    References:
        Long, Shelhamer and Darrell, *Fully Convolutional Networks for Semantic Segmentation*, 2015, for the
        fusion; He et al., *Deep Residual Learning for Image Recognition*, 2016, for the blocks.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        in_channels: int = 3,
        width: int = 64,
        blocks: tuple[int, int, int] | list[int] = (1, 2, 2),
        reduction: int = 1,
        dropout: float = 0.1,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_count("reduction", reduction)
        if check_count("width", width) < 2:
            raise ValueError("width: got 1; expected at least 2, half of which come first")
        super().__init__(num_labels, in_channels, 4 * reduction)
        self._reduction = reduction
        widths = (width, 2 * width, 3 * width)
        options = {"dtype": dtype, "rngs": rngs}
        self.stem = _Normalized(in_channels, width // 2, strides=2, kernel_size=5, **options)
        self.reductions = nnx.List(
            [
                _Normalized(before, after, strides=2, **options)
                for before, after in zip((width // 2, *widths), widths, strict=False)
            ]
        )
        self.blocks = nnx.List(
            [
                nnx.List([_Residual(channels, **options) for _ in range(count)])
                for channels, count in zip(widths, blocks, strict=True)
            ]
        )
        self.laterals = nnx.List([nnx.Conv(channels, width, (1, 1), **options) for channels in widths])
        self.fusion = _Normalized(width, width, **options)
        self.dropout = nnx.Dropout(check_dropout(dropout), rngs=rngs)
        self.classifier = nnx.Conv(width, num_labels, (1, 1), **options)

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits at 1/4 of the reduced image."""
        x = check_images(images, self.in_channels)
        x = average_pool((x - _MEAN) / _SCALE, self._reduction, x.shape[-3:-1])
        x = self.stem(x)
        scales = []
        for reduction, blocks in zip(self.reductions, self.blocks, strict=True):
            x = reduction(x)
            for block in blocks:
                x = block(x)
            scales.append(x)
        fused: Any = None
        for lateral, features in zip(reversed(self.laterals), reversed(scales), strict=True):
            own = lateral(features)
            fused = own if fused is None else own + bilinear_upsample(fused, 2, features.shape[-3:-1])
        return self.classifier(self.dropout(self.fusion(fused)))

    def upsample(
        self, scores: Float[Array, "*batch rows columns labels"], size: Sequence[int]
    ) -> Float[Array, "*batch height width labels"]:
        """Scores at every pixel; their cells tile the image."""
        # In one go: the gradient of three steps of two costs four times as much.
        return bilinear_upsample(scores, self.stride, size)

    def places(self, pixels: int) -> Float[np.ndarray, " cells"]:
        """The cells' centres."""
        count, front = cells(pixels, self.stride)
        return self.stride * (np.arange(count) + 0.5) - 0.5 - front


class _Normalized(nnx.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        strides: int = 1,
        kernel_size: int = 3,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.convolution = nnx.Conv(
            in_channels,
            channels,
            (kernel_size, kernel_size),
            strides=strides,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(channels, momentum=0.95, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.norm(self.convolution(x)))


class _Residual(nnx.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.first = _Normalized(channels, channels, dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(
            channels,
            channels,
            (3, 3),
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        # Starting from zero makes a new block the identity, which trains deep stacks from the first step.
        self.norm = nnx.BatchNorm(
            channels, momentum=0.95, scale_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x + self.norm(self.second(self.first(x))))

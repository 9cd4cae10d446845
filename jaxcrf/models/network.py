"""What all networks for dense labelling share."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf import _checks
from jaxcrf.models import grids

# Of ImageNet's photographs in 0 … 255, red, green and blue: what published weights were trained with.
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_SCALE = np.array([58.395, 57.12, 57.375], np.float32)


class Network(nnx.Module):
    """Images in 0 … 255 to logits, by scores on a grid of `stride` pixels and interpolation between them.

    Those that inherit set the attributes by `Network.__init__` and define `scores`.

    Attributes:
        num_labels: `L`.
        in_channels: of the images.
        stride: of the grid.

    Raises:
        ValueError: if `num_labels` is less than 2 or `in_channels` less than 1.
    """

    def __init__(self, num_labels: int, in_channels: int, stride: int, offset: float = 0.0):
        self.num_labels = _checks.check_num_labels(num_labels)
        if num_labels < 2:
            raise ValueError(
                "num_labels: got 1, of which every pixel would be sure; for one kind of object take 2, it and the "
                "background"
            )
        self.in_channels = check_count("in_channels", in_channels)
        self.stride = stride
        # Of the grid: where its first cell lies, in pixels.
        self._offset = offset

    def scores(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits on the grid, `[*batch, ⌈H/stride⌉, ⌈W/stride⌉, L]`, on which losses and CRFs cost less."""
        raise TypeError(f"{type(self).__name__} defines no scores")

    def upsample(
        self, scores: Float[Array, "*batch rows columns labels"], size: Sequence[int]
    ) -> Float[Array, "*batch height width labels"]:
        """Scores at every pixel of images of `size`, `(H, W)`, interpolated linearly."""
        return grids.upsample(scores, self.stride, size, self._offset)

    def places(self, pixels: int) -> Float[np.ndarray, " cells"]:
        """Where the cells of the grid lie along an axis of so many pixels, `[⌈pixels/stride⌉]`, in pixels from 0."""
        return self._offset + self.stride * np.arange(-(-pixels // self.stride), dtype=np.float64)

    def __call__(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width labels"]:
        """Logits.

        Raises:
            ValueError: if the images do not have `in_channels` channels.
        """
        return self.upsample(self.scores(images), jnp.shape(images)[-3:-1])


def check_count(name: str, value: Any) -> int:
    """A number of channels, pixels and the like.

    Raises:
        ValueError: unless it is a whole number of at least 1.

    Example:
        >>> check_count("width", 64)
        64
    """
    if not _checks.is_whole(value) or value < 1:
        raise ValueError(f"{name}: got {value!r}; expected a whole number of at least 1")
    return int(value)


def check_dropout(dropout: Any) -> float:
    """A share of what is dropped while training.

    Raises:
        ValueError: unless it is a number from 0 to less than 1.

    Example:
        >>> check_dropout(0.5)
        0.5
    """
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout!r}; expected a number from 0 to less than 1")
    return float(dropout)


def check_images(images: Any, in_channels: int) -> Array:
    """Images as floating-point numbers in 0 … 255.

    Raises:
        ValueError: if they do not have `in_channels` channels.

    Example:
        >>> check_images(np.zeros((4, 5, 3), np.uint8), 3).dtype
        dtype('float32')
    """
    shape = jnp.shape(images)
    if len(shape) < 3 or shape[-1] != in_channels or 0 in shape[-3:-1]:
        raise ValueError(
            f"images: got shape {shape}; expected [*batch, height, width, {in_channels}], in 0 … 255"
        )
    images = jnp.asarray(images)
    return images if jnp.issubdtype(images.dtype, jnp.floating) else images.astype(jnp.float32)


def normalized(images: Any, in_channels: int) -> Array:
    """Images with about zero mean and unit variance, as networks trained on ImageNet expect them.

    Other than three channels are all taken for grey.

    Raises:
        ValueError: if they do not have `in_channels` channels.

    Example:
        >>> np.asarray(normalized(np.full((1, 1, 3), 255, np.uint8), 3)).round(2)
        array([[[2.25, 2.43, 2.64]]], dtype=float32)
    """
    images = check_images(images, in_channels)
    mean, scale = (_MEAN, _SCALE) if in_channels == 3 else (_MEAN.mean(), _SCALE.mean())
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(scale, images.dtype)

"""N-ReNet, which consists of recurrent layers, and H-ReNet, which puts them on a fully convolutional network."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Num

from jaxcrf.models import grids
from jaxcrf.models.network import Network, check_count, check_dropout, normalized
from jaxcrf.models.vgg import VGG16
from jaxcrf.nn import ReNetGroup
from jaxcrf.recurrent import Cell, renet_mask

Normalization = Literal["batch", "l2"]

# What the recurrent group may be fed with, in the order in which maps are joined.
SOURCES = ("pool4", "pool5", "conv7")


class RecurrentNetwork(Network):
    """A network with ReNet layers, which look at the whole image, and so at the padding of a batch but for a mask."""

    def scores(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits on the grid.

        Args:
            images: in 0 … 255.
            mask: where there is image in a padded batch: for every image a rectangle in the upper left corner. None
                for everywhere. Convolutions see as much of the padding as they reach.

        Returns:
            `[*batch, ⌈H/stride⌉, ⌈W/stride⌉, L]`.

        Raises:
            ValueError: if the images do not have `in_channels` channels, or the mask does not fit to them.
        """
        raise TypeError(f"{type(self).__name__} defines no scores")

    def __call__(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch height width labels"]:
        """Logits; the arguments are those of `scores`. With a mask they are interpolated among its cells alone."""
        scores = self.scores(images, mask)
        cells = self._cells(images, mask)
        if cells is not None:
            # Beyond the last row and column of an image, these again.
            for axis in (-2, -1):
                nearest = jnp.minimum(jnp.arange(cells.shape[axis]), _extent(cells, axis) - 1)
                scores = _rearranged(scores, nearest, axis)
        return self.upsample(scores, jnp.shape(images)[-3:-1])

    def _cells(self, images: Any, mask: Any) -> Array | None:
        """The mask on the grid: both begin in one corner, so that a cell holds image where its first pixel does."""
        mask = self._checked_mask(images, mask)
        return None if mask is None else mask[..., :: self.stride, :: self.stride]

    def _checked_mask(self, images: Any, mask: Any) -> Array | None:
        if mask is None:
            return None
        mask = jnp.asarray(mask)
        if mask.shape != jnp.shape(images)[:-1] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask: got shape {mask.shape}, dtype {mask.dtype}; expected booleans "
                f"{jnp.shape(images)[:-1]}, as many as the images have pixels"
            )
        return mask


class NReNet(RecurrentNetwork):
    r"""Recurrent layer groups on top of each other, the first over patches of pixels; there is no convolution.

    Every group sweeps vertically, then horizontally, and sees the whole image; a 1 × 1 convolution makes scores of the
    last one's features, which are interpolated bilinearly. Images smaller than a patch are reflected at their lower and
    right borders until they fill one.

    The paper gives the numbers of units in a figure only, as "increasing"; those here are a choice.

    Args:
        num_labels: `L`.
        width: hidden units of each direction in the first group.
        multipliers: how many times as many the groups have.
        patch: height and width of the first group's patches.
        cell: "lstm", "gru" or "irnn".
        chunk: how many steps of a sweep to recompute at a time in the backward pass; None for none, see
            `jaxcrf.renet_layer`.
        in_channels: of the images.
        dtype: of the arithmetic.
        rngs: where parameters come from.

    Raises:
        ValueError: if there is no group, or a size or an option is not one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = NReNet(8, width=2, rngs=nnx.Rngs(0))
        >>> model.scores(jnp.zeros((1, 15, 20, 3))).shape, model(jnp.zeros((1, 15, 20, 3))).shape
        ((1, 8, 10, 8), (1, 15, 20, 8))

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for Semantic
        Segmentation*, 2016, §3, §4.1 and fig. 2.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        width: int = 60,
        multipliers: tuple[int, ...] | list[int] = (1, 2, 4),
        patch: int = 2,
        cell: Cell = "lstm",
        chunk: int | None = None,
        in_channels: int = 3,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_labels, in_channels, check_count("patch", patch), (patch - 1) / 2)
        check_count("width", width)
        if not isinstance(multipliers, Sequence):
            raise ValueError(f"multipliers: got {multipliers!r}; expected a tuple, a number for every group")
        if not multipliers:
            raise ValueError("multipliers: got none; expected a number for every group, at least one")
        features = [width * check_count("multipliers", factor) for factor in multipliers]
        groups = []
        before = in_channels
        for number, units in enumerate(features):
            size = (patch, patch) if number == 0 else (1, 1)
            groups.append(
                ReNetGroup(before, units, cell=cell, patch=size, chunk=chunk, dtype=dtype, rngs=rngs)
            )
            before = 2 * units
        self.groups = nnx.List(groups)
        self.classifier = nnx.Conv(before, num_labels, (1, 1), dtype=dtype, rngs=rngs)

    def feature_maps(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> dict[str, Float[Array, "*batch rows columns features"]]:
        """What every layer gives, as "renet1_vertical", "renet1_horizontal", … (fig. 2); arguments as in `scores`."""
        x = normalized(images, self.in_channels)
        x, mask = _at_least_a_patch(x, self._checked_mask(images, mask), self.stride)
        found = {}
        for number, group in enumerate(self.groups, start=1):
            x = found[f"renet{number}_vertical"] = group.first(x, mask)
            mask = None if mask is None else renet_mask(mask, group.first.patch)
            x = found[f"renet{number}_horizontal"] = group.second(x, mask)
        return found

    def scores(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits of the patches; the arguments are those of `RecurrentNetwork.scores`."""
        return self.classifier(self.feature_maps(images, mask)[f"renet{len(self.groups)}_horizontal"])


class HReNet(RecurrentNetwork):
    r"""VGG-16 at stride 8, whose last features a recurrent layer group carries over the whole image.

    The fully convolutional network below it, with `cell=None` the whole network, is VGG-16 by the hole algorithm,
    `conv6`, 3 × 3 taps 12 cells apart, and `conv7`, 3 × 3. (DeepLab-LargeFOV has pools of 3 × 3, and 1 × 1 taps there.)
    It sees 428 × 428 pixels, which is what the paper's Table 2 amounts to; its text says 604 × 604.
    Its `conv8`, a 1 × 1 convolution to scores, is `classifier` here; the group comes before it.

    With several `sources`, the paper's multi-layer feature combination, their maps are concatenated. A
    normalisation makes their magnitudes alike first: "batch" gives every channel zero mean and unit variance, "l2"
    every map `x` of an image, `[rows, columns, channels]`, the norm `λ`, `λ x / ‖x‖₂`. Layers that no source needs are
    left out.

    The fully connected CRF on top is `create(…, refine="densecrf")`, a trainable one `refine="convcrf"`.

    Args:
        num_labels: `L`.
        sources: what the group is fed with, any of "pool4", "pool5" and "conv7".
        normalization: of each of these, "batch", "l2" or None.
        l2_scale: `λ`; the paper chooses among 100, 1000 and 10 000 on held-out data.
        recurrent_channels: hidden units of each direction of both ReNet layers.
        cell: "lstm", "gru" or "irnn"; None leaves the group out.
        chunk: how many steps of a sweep to recompute at a time in the backward pass, see `jaxcrf.renet_layer`.
        hidden_channels: of `conv6` and `conv7`.
        rate: dilation of `conv6`, in cells of the grid.
        deviation: of the normal distribution that weights of `conv6`, `conv7` and the classifier are drawn from: 0.1 in
            the paper. None for one by the size of each layer (He).
        in_channels: of the images.
        width: see `VGG16`.
        dropout: after `conv6` and `conv7`.
        norm: batch normalisation in the backbone, to train from scratch; published weights have none.
        dtype: of the arithmetic.
        rngs: where parameters and dropout come from.

    Raises:
        ValueError: if a source or the normalisation is unknown, or a size or another option is not one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = HReNet(5, width=4, hidden_channels=16, recurrent_channels=6, rngs=nnx.Rngs(0))
        >>> model.scores(jnp.zeros((1, 45, 61, 3))).shape, model(jnp.zeros((1, 45, 61, 3))).shape
        ((1, 6, 8, 5), (1, 45, 61, 5))

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for Semantic
        Segmentation*, 2016, §4.2, Tables 2 and 3, fig. 3.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        sources: tuple[str, ...] | list[str] = ("conv7",),
        normalization: Normalization | None = None,
        l2_scale: float = 1000.0,
        recurrent_channels: int = 120,
        cell: Cell | None = "lstm",
        chunk: int | None = None,
        hidden_channels: int = 1024,
        rate: int = 12,
        deviation: float | None = None,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.5,
        norm: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        known = isinstance(sources, tuple | list) and set(sources) <= set(SOURCES)
        if not known or not sources or len(set(sources)) < len(sources):
            raise ValueError(
                f"sources: got {sources!r}; expected one or more of {', '.join(SOURCES)}, in a tuple"
            )
        if normalization is not None and normalization not in get_args(Normalization):
            raise ValueError(f"normalization: got {normalization!r}; expected 'batch', 'l2' or None")
        for name, value in (("l2_scale", l2_scale), ("deviation", deviation)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < np.inf):
                raise ValueError(f"{name}: got {value!r}; expected a number > 0")
        for name, value in (("hidden_channels", hidden_channels), ("rate", rate)):
            check_count(name, value)
        self._sources = tuple(source for source in SOURCES if source in sources)
        self._l2_scale = float(l2_scale) if normalization == "l2" else None
        options = {"dtype": dtype, "rngs": rngs}
        backbone = VGG16(
            in_channels=in_channels,
            width=width,
            pool_size=2,
            stages=4 if self._sources == ("pool4",) else 5,
            norm=norm,
            **options,
        )
        # Those of all sources.
        super().__init__(num_labels, in_channels, 8, backbone.offsets["pool4"])
        self.backbone = backbone
        channels = self.backbone.channels
        he, lecun = nnx.initializers.he_normal(), nnx.initializers.lecun_normal()
        drawn = None if deviation is None else nnx.initializers.normal(deviation)
        if "conv7" in self._sources:
            self.conv6 = nnx.Conv(
                channels["pool5"],
                hidden_channels,
                (3, 3),
                kernel_dilation=rate,
                conv_general_dilated=grids.atrous_convolution,
                kernel_init=drawn or he,
                **options,
            )
            self.conv7 = nnx.Conv(
                hidden_channels, hidden_channels, (3, 3), kernel_init=drawn or he, **options
            )
            channels["conv7"] = hidden_channels
        self.dropout = nnx.Dropout(check_dropout(dropout), rngs=rngs)
        self.normalizations: Any = nnx.Dict()
        if normalization == "batch":
            for source in self._sources:
                # Scales and offsets of its own would be those of what it is multiplied with next.
                self.normalizations[source] = nnx.BatchNorm(
                    channels[source], momentum=0.9, use_scale=False, use_bias=False, **options
                )
        last = sum(channels[source] for source in self._sources)
        check_count("recurrent_channels", recurrent_channels)
        self.group = (
            None if cell is None else ReNetGroup(last, recurrent_channels, cell=cell, chunk=chunk, **options)
        )
        last = last if cell is None else 2 * recurrent_channels
        self.classifier = nnx.Conv(last, num_labels, (1, 1), kernel_init=drawn or lecun, **options)

    def combined(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns features"]:
        """What the group is fed with: all sources, normalised; arguments as in `scores`."""
        features = self.backbone(images)
        if "conv7" in self._sources:
            x = self.dropout(jax.nn.relu(self.conv6(features["pool5"])))
            features["conv7"] = self.dropout(jax.nn.relu(self.conv7(x)))
        cells = self._cells(images, mask)
        return jnp.concatenate([self._normalized(name, features[name], cells) for name in self._sources], -1)

    def feature_maps(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> dict[str, Float[Array, "*batch rows columns features"]]:
        """The maps "combined", "renet1_vertical" and "renet1_horizontal" on the grid; arguments as in `scores`."""
        cells = self._cells(images, mask)
        x = self.combined(images, mask)
        found = {"combined": x}
        if self.group is not None:
            x = found["renet1_vertical"] = self.group.first(x, cells)
            found["renet1_horizontal"] = self.group.second(x, cells)
        return found

    def scores(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns labels"]:
        """Logits at stride 8; the arguments are those of `RecurrentNetwork.scores`."""
        # The last of the maps, in the order in which they are made.
        *_, x = self.feature_maps(images, mask).values()
        return self.classifier(x)

    def _normalized(self, name: str, x: Array, cells: Array | None) -> Array:
        if name in self.normalizations:
            return self.normalizations[name](x, mask=None if cells is None else cells[..., None])
        if self._l2_scale is None:
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        seen = wide if cells is None else jnp.where(cells[..., None], wide, 0)
        squares = jnp.sum(seen**2, (-3, -2, -1), keepdims=True)
        # Where all features are zero they stay so.
        return (wide * self._l2_scale * lax.rsqrt(squares + 1e-12)).astype(x.dtype)


def _extent(mask: Array, axis: int) -> Array:
    """How many rows (axis -2) or columns (-1) of each image there are, at least 1, `[*batch, 1]`."""
    return jnp.maximum(mask.any(-3 - axis).sum(-1, keepdims=True), 1)


def _rearranged(x: Array, source: Array, axis: int) -> Array:
    """Maps `[*batch, rows, columns, c]` with the rows (axis -2) or columns (-1) that `source`, `[*batch, n]`, names."""
    return jnp.take_along_axis(x, jnp.expand_dims(source, -3 - axis)[..., None], axis - 1)


def _at_least_a_patch(x: Array, mask: Array | None, patch: int) -> tuple[Array, Array | None]:
    """Images smaller than a patch reflected until they fill one; layers themselves fill up what does not divide."""
    for axis in (-2, -1) if patch > 1 else ():
        missing = max(0, patch - x.shape[axis - 1])
        if mask is None:
            if missing:
                x = jnp.take(x, _reflected(jnp.arange(patch), x.shape[axis - 1]), axis - 1)
            continue
        widths = [(0, missing) if n == mask.ndim + axis else (0, 0) for n in range(mask.ndim)]
        mask = jnp.pad(mask, widths)
        x = jnp.pad(x, [*widths, (0, 0)])
        # Every image of a padded batch has a size of its own, and what lies within the first patch may be padding.
        index = jnp.arange(mask.shape[axis])
        source = jnp.where(index < patch, _reflected(index, _extent(mask, axis)), index)
        mask = _rearranged(mask[..., None], source, axis)[..., 0]
        x = _rearranged(x, source, axis)
    return x, mask


def _reflected(index: Array, count: Any) -> Array:
    """Which of `count` pixels is at a place when they are reflected at their last and first one, over and over."""
    index = index % jnp.maximum(2 * (count - 1), 1)
    return jnp.minimum(index, 2 * (count - 1) - index)

"""ReNet layers and recurrent layer groups: sweeps over an image, their weights learned."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from jaxcrf.recurrent import Cell, Direction, across, check_options, renet_init, renet_layer, renet_mask


class ReNet(nnx.Module):
    r"""Two recurrent networks that sweep the patches of an image in opposite directions; see `jaxcrf.renet_layer`.

    Args:
        in_channels: channels of the input.
        features: `d`, hidden units of each direction.
        direction: "vertical" sweeps along columns, "horizontal" along rows.
        cell: "lstm", "gru" or "irnn".
        patch: `(s, t)`, height and width of a patch in pixels.
        chunk: how many steps of the sweep to recompute at a time in the backward pass; None for none.
        unroll: steps in one iteration of the loop; None for what was fastest, see `jaxcrf.renet_layer`.
        precision: of matrix products, as in `jax.lax.dot`.
        dtype: of its products; None for that of its inputs and parameters. States are at least float32 in any case.
        rngs: where its parameters come from: uniform over [-0.2, 0.2], for the IRNN as `jaxcrf.renet_init` says.

    Raises:
        ValueError: if a size or an option is not one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = ReNet(3, 5, patch=(2, 2), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 7, 8, 3))).shape
        (4, 4, 4, 10)

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for Semantic
        Segmentation*, 2016, §3.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        *,
        direction: Direction = "vertical",
        cell: Cell = "lstm",
        patch: tuple[int, int] = (1, 1),
        chunk: int | None = None,
        unroll: int | None = None,
        precision: Any = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_options(direction, chunk, unroll)
        params = renet_init(rngs.params(), in_channels, features, cell=cell, patch=patch)
        self.input_kernel = nnx.Param(params["input_kernel"])
        self.recurrent_kernel = nnx.Param(params["recurrent_kernel"])
        self.bias = nnx.Param(params["bias"])
        self.recurrent_bias = nnx.Param(params["recurrent_bias"]) if "recurrent_bias" in params else None
        self._direction, self._cell, self._patch = direction, cell, (int(patch[0]), int(patch[1]))
        self._chunk, self._unroll, self._precision, self._dtype = chunk, unroll, precision, dtype

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self._patch

    @property
    def parameters(self) -> dict[str, Array]:
        """As `jaxcrf.renet_layer` takes them."""
        found = {
            "input_kernel": self.input_kernel[...],
            "recurrent_kernel": self.recurrent_kernel[...],
            "bias": self.bias[...],
        }
        return found if self.recurrent_bias is None else found | {"recurrent_bias": self.recurrent_bias[...]}

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns features"]:
        """The hidden states of both directions, `[*batch, ⌈height / s⌉, ⌈width / t⌉, 2 d]`."""
        params, x = self.parameters, jnp.asarray(x)
        if self._dtype is not None:
            params, x = jax.tree.map(lambda a: a.astype(self._dtype), (params, x))
        return renet_layer(
            params,
            x,
            direction=self._direction,
            cell=self._cell,
            patch=self._patch,
            mask=mask,
            chunk=self._chunk,
            unroll=self._unroll,
            precision=self._precision,
        )


class ReNetGroup(nnx.Module):
    """A recurrent layer group: two ReNet layers, one across the other, that see the whole image.

    Args:
        in_channels: channels of the input.
        features: `d`, hidden units of each direction of both layers.
        direction: of the first layer; the second goes across.
        cell: of both layers, "lstm", "gru" or "irnn".
        patch: of the first layer; the second sweeps over what comes out of it.
        chunk: as in `ReNet`.
        unroll: as in `ReNet`.
        precision: as in `ReNet`.
        dtype: as in `ReNet`.
        rngs: where the parameters come from.

    Raises:
        ValueError: if a size or an option is not one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> group = ReNetGroup(3, 5, rngs=nnx.Rngs(0))
        >>> group(jnp.ones((4, 7, 8, 3))).shape
        (4, 7, 8, 10)

    References:
        Yan et al., 2016, §3.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        *,
        direction: Direction = "vertical",
        cell: Cell = "lstm",
        patch: tuple[int, int] = (1, 1),
        chunk: int | None = None,
        unroll: int | None = None,
        precision: Any = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "cell": cell,
            "chunk": chunk,
            "unroll": unroll,
            "precision": precision,
            "dtype": dtype,
        }
        self.first = ReNet(in_channels, features, direction=direction, patch=patch, rngs=rngs, **options)
        self.second = ReNet(2 * features, features, direction=across(direction), rngs=rngs, **options)

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch rows columns features"]:
        """The second layer's hidden states, `[*batch, ⌈height / s⌉, ⌈width / t⌉, 2 d]`."""
        y = self.first(x, mask)
        return self.second(y, None if mask is None else renet_mask(mask, self.first.patch))

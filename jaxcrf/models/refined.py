"""A network and the CRF on top of it."""

from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Num


class Refined(nnx.Module):
    """A unary network, refined by a CRF on the image: logits in, logits out.

    Its parameters are `unary/…` and `crf/…`, which is what training protocols go by.

    Args:
        unary: images `[*batch, H, W, channels]` in 0 … 255 to logits.
        crf: images and logits to logits, as `nn.ConvCRF`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> model = models.create("small_fcn", 3, width=8, refine="convcrf", rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 24, 32, 3))).shape
        (1, 24, 32, 3)
    """

    def __init__(self, unary: nnx.Module, crf: nnx.Module):
        self.unary = unary
        self.crf = crf

    def __call__(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> Float[Array, "*batch height width labels"]:
        """Refined logits; the arguments are those of `with_unary`."""
        return self.with_unary(images, mask)[0]

    def with_unary(
        self,
        images: Num[Array, "*batch height width channels"],
        mask: Bool[Array, "*batch height width"] | None = None,
    ) -> tuple[Any, Any]:
        """Refined logits, and those of the unary network, for losses on both.

        Args:
            images: in 0 … 255.
            mask: where there is image in a padded batch, for recurrent networks, which alone take one.
        """
        unary: Any = self.unary(images) if mask is None else self.unary(images, mask)
        refined: Any = self.crf(images, unary)
        # The CRF computes in float32 at least; what comes out has one type with and without it.
        return refined.astype(unary.dtype), unary

"""Networks with a CRF of mean field on top, and the variants of the ConvCRF paper."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Num

Variant: TypeAlias = Literal["convcrf", "convcrf+T", "convcrf+C", "convcrf+CT"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def convcrf_options(
    variant: Variant | None, image_shape: Sequence[int] | None = None, *, preset: str | None = None
) -> dict[str, Any]:
    """Options of `nn.ConvCRF` for a variant of the paper, as `create` takes them.

    Args:
        variant: "convcrf" learns kernel weights and bandwidths, "+T" the smoothness features as well, "+C" a matrix of
            label compatibilities, "+CT" both. None learns nothing: the hand-crafted CRF of the preset.
        image_shape: `(height, width)` of the images; only "+T" needs it, whose features belong to places.
        preset: what it begins with, see `jaxcrf.presets`; None for "convcrf" by hand and "convcrf_trainable" otherwise.

    Returns:
        The options.

    Raises:
        ValueError: if there is no such variant, or "+T" does not know the size of the images.

    Example:
        >>> from flax import nnx
        >>> from jaxcrf import models
        >>> options = convcrf_options("convcrf+C")
        >>> model = models.create("convcrf", 21, crf_options=options, width=4, blocks=[1, 1], rngs=nnx.Rngs(0))
        >>> model.crf.compatibility.shape
        (21, 21)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.2 and Table 2.
    """
    if variant is None:
        return {"preset": preset or "convcrf", "learn_weights": False, "learn_bandwidths": False}
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}; expected None or one of {', '.join(VARIANTS)}")
    learned = variant.partition("+")[2]
    options: dict[str, Any] = {"preset": preset or "convcrf_trainable"}
    if "T" in learned:
        if image_shape is None:
            raise ValueError(
                f"image_shape: got None; {variant} learns a feature for every place of the image"
            )
        options |= {"trainable_features": True, "image_shape": tuple(image_shape)}
    if "C" in learned:
        options |= {"trainable_compatibility": True}
    return options


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
            mask: where there is image in a padded batch, for recurrent networks, which alone take one. The CRF takes
                none: as far as it reaches from a border, it takes the padding for image.
        """
        unary: Any = self.unary(images) if mask is None else self.unary(images, mask)
        refined: Any = self.crf(images, unary)
        # The CRF computes in float32 at least; what comes out has one type with and without it.
        return refined.astype(unary.dtype), unary

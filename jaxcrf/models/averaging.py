"""Test-time averaging over scales, mirror images and models."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from jaxcrf.models import grids


class Averaged(nnx.Module):
    r"""Several views of an image, labelled by one model or several, and their probabilities averaged.

    .. math::
        \log \frac{1}{n} \sum_{m, \sigma, \phi}
            \mathrm{softmax}\Bigl(\phi^{-1}\,\mathrm{resize}\bigl(f_m(\phi\,\mathrm{resize}(I, \sigma))\bigr)\Bigr)

    over the models `f_m`, the scales `σ` and, with `flip`, `φ` of the image as it is and as a mirror shows it. Like
    any other model it maps images to logits, so that it can be evaluated, exported and refined by a CRF. Every view
    costs a pass of a model over an image of `σ²` times the pixels; what is averaged is held once, not per view.

    It is meant for models in evaluation mode: with dropout, views would differ by chance.

    Args:
        models: one, or several of the same labels: images `[*batch, H, W, channels]` in 0 … 255 to logits.
        scales: `σ`, of the height and width. Images are resized as `grids.resize` does.
        flip: whether mirror images are labelled too.

    Raises:
        TypeError: if something else than modules is averaged.
        ValueError: if there is no model or scale, or a scale is not a positive number.

    Example:
        >>> import numpy as np
        >>> model = nnx.Conv(3, 2, (3, 3), rngs=nnx.Rngs(0))
        >>> averaged = Averaged(model, scales=(0.5, 1.0), flip=True)
        >>> logits = averaged(np.zeros((1, 24, 33, 3), np.uint8))
        >>> logits.shape, bool(np.allclose(np.exp(logits).sum(-1), 1))
        ((1, 24, 33, 2), True)

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §5 (several scales, two models);
        Chen et al., *DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
        Fully Connected CRFs*, 2018, §4.1.
    """

    def __init__(
        self,
        models: nnx.Module | Iterable[nnx.Module],
        *,
        scales: Sequence[float] = (0.75, 1.0, 1.25),
        flip: bool = False,
    ):
        found = (models,) if isinstance(models, nnx.Module) else tuple(models)
        if not found:
            raise ValueError("models: got none; expected at least one")
        for model in found:
            if not isinstance(model, nnx.Module):
                raise TypeError(f"models: got {type(model).__name__}; expected modules, as of models.create")
        if not len(scales) or any(not 0 < scale < float("inf") for scale in scales):
            raise ValueError(f"scales: got {tuple(scales)}; expected one or more numbers > 0, as (0.75, 1.0)")
        self.models = nnx.List(found)
        self.scales = tuple(float(scale) for scale in scales)
        self.flip = bool(flip)

    def __call__(
        self, images: Num[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width labels"]:
        """Logits: the logarithms of the mean probabilities.

        Raises:
            ValueError: if the models do not have the same labels, or they reject the images.
        """
        images = jnp.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            images = images.astype(jnp.float32)
        size = images.shape[-3:-1]
        total: Any = None
        count, dtype = 0, None
        for scale in self.scales:
            view = grids.resize(images, [max(1, round(scale * n)) for n in size])
            for flipped in (False, True) if self.flip else (False,):
                seen = view[..., ::-1, :] if flipped else view
                for model in self.models:
                    logits = grids.resize(model(seen), size)
                    logits = logits[..., ::-1, :] if flipped else logits
                    if total is not None and logits.shape != total.shape:
                        raise ValueError(
                            f"models: one gives logits of shape {logits.shape}, another {total.shape}; expected models "
                            "of the same labels"
                        )
                    dtype = logits.dtype if dtype is None else jnp.promote_types(dtype, logits.dtype)
                    # 16-bit floats are storage only.
                    own = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
                    total = own if total is None else jnp.logaddexp(total, own)
                    count += 1
        return (total - jnp.log(count)).astype(dtype)

"""ConvCRF as a layer: mean field with a truncated Gaussian window, its parameters learned."""

import dataclasses
import os

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jaxcrf.features import Features, position_features
from jaxcrf.filters import Filter, Window
from jaxcrf.nn.mean_field import (
    BANDWIDTHS,
    WEIGHTS,
    Gradient,
    MeanFieldCRF,
    learnable,
    read_preset,
    smoothness_features,
)
from jaxcrf.presets import Preset


@dataclasses.dataclass(frozen=True)
class _Truncated:
    """Builds the window filter."""

    def __call__(self, features: tuple[Features | Array, ...], weights: Array, preset: Preset) -> Filter:
        k = Window(features, preset.filter_size, weights=weights, blur=preset.blur)
        return k.normalized(preset.normalization)


class ConvCRF(MeanFieldCRF):
    r"""Refines logits against an image, `q ← softmax(w_u u - μ K q)` a few times, with learned parameters.

    The filter `K` has a smoothness and an appearance kernel inside a window around every pixel, see `jaxcrf.Preset`
    and `jaxcrf.filters.Window`; `jaxcrf.mean_field` iterates. The layer begins as a preset and then refines exactly
    as `jaxcrf.refine` does. The paper's variants are

    | variant | `trainable_features` | `trainable_compatibility` |
    |---|---|---|
    | ConvCRF | no | no |
    | Conv+T | yes | no |
    | Conv+C | no | yes |
    | Conv+CT | yes | yes |

    What is learned, as far as it is asked for:

    - `scales`: kernel weights, unary weight and bandwidths, each as `v₀ softplus(s)` with the preset's `v₀`, so that
      they keep their sign and a step of `s` is a share of `v₀` whether that is 0.6 or 80. A kernel whose weight is 0
      in the preset is left out for good.
    - `feature_offsets` (+T), `[H, W, 2]`: the smoothness kernel compares `p_i / θ_γ + δ_i`, with `δ = 0` at first,
      for features that start as the positions. They are in units of the bandwidth `θ_γ`, which then is not learned
      itself. To learn the offsets is to learn the features, gradient for gradient, but small steps are not rounded
      away beside large coordinates. Every pixel has its own, so that all images must have one size, `image_shape`.
    - `compatibility` (+C), `[L, L]`: the penalty `μ(l, l')`, rows the receiving label: a 1×1 convolution of the
      messages, Potts at first, unconstrained afterwards.

    Args:
        num_labels: `L`.
        preset: a name from `jaxcrf.presets.names()`, a preset file or a `Preset`.
        num_iterations: mean-field iterations, instead of the preset's.
        learn_weights: of the kernels and of the unary.
        learn_bandwidths: `θ_γ`, `θ_α` and `θ_β`, per axis where the preset has them per axis.
        trainable_features: +T, see above; needs `image_shape`.
        trainable_compatibility: +C, see above.
        image_shape: `(H, W)` of all images, for `trainable_features` only.
        exclude_self: leave every pixel out of its own message, the paper's `i ≠ j`; its code, and presets, do not.
        gradient: as in `mean_field`. "unrolled", as in the paper, recomputes each iteration in the backward pass and
            stores only the messages between them; "implicit" is for iterations that have converged.

    Raises:
        ValueError: if arguments do not go together, or the preset is unknown.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> layer = ConvCRF(3, trainable_compatibility=True)
        >>> layer(np.zeros((2, 8, 8, 3), np.uint8), jnp.zeros((2, 8, 8, 3))).shape
        (2, 8, 8, 3)
        >>> round(layer.learned_preset().position_weight, 4), layer.compatibility[...].shape
        (7.97, (3, 3))

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §4.2 and §5.2; Zheng et al.,
        *Conditional Random Fields as Recurrent Neural Networks*, 2015, §4.2 (compatibility as a convolution).
    """

    def __init__(
        self,
        num_labels: int,
        *,
        preset: str | os.PathLike | Preset = "convcrf",
        num_iterations: int | None = None,
        learn_weights: bool = True,
        learn_bandwidths: bool = True,
        trainable_features: bool = False,
        trainable_compatibility: bool = False,
        image_shape: tuple[int, int] | None = None,
        exclude_self: bool = False,
        gradient: Gradient = "unrolled",
    ):
        chosen = read_preset(preset)
        learned = [*(WEIGHTS if learn_weights else ()), *(BANDWIDTHS if learn_bandwidths else ())]
        if trainable_features and learn_bandwidths:
            learned.remove("position_bandwidth")
        super().__init__(
            num_labels,
            chosen,
            _Truncated(),
            num_iterations=num_iterations,
            learned=learnable(chosen, learned),
            weights_per_label=False,
            trainable_compatibility=trainable_compatibility,
            exclude_self=exclude_self,
            gradient=gradient,
        )
        if trainable_features and not chosen.position_weight:
            raise ValueError(
                "trainable_features: the preset's position_weight is 0; features need a smoothness kernel"
            )
        if trainable_features != (image_shape is not None):
            raise ValueError(
                f"image_shape: got {image_shape} with trainable_features={trainable_features}; the features of "
                "+T belong to the pixels of one image size, (height, width), and nothing else does"
            )
        offsets = None
        if image_shape is not None:
            if len(image_shape) != 2:
                raise ValueError(f"image_shape: got {image_shape}; expected (height, width)")
            # Made of the features that they move, so that sizes and bandwidths are checked.
            offsets = jnp.zeros_like(position_features(image_shape, chosen.position_bandwidth).values)
        self.feature_offsets = None if offsets is None else nnx.Param(offsets)

    @property
    def smoothness_features(self) -> Float[Array, "height width 2"] | None:
        """What the smoothness kernel compares, in units of its bandwidth; None unless features are trainable."""
        if self.feature_offsets is None:
            return None
        return smoothness_features(self._preset, self.feature_offsets[...])

    def _checked_offsets(self, size: tuple[int, ...]) -> Array | None:
        if self.feature_offsets is None:
            return None
        offsets = self.feature_offsets[...]
        if size[-3:-1] != offsets.shape[:2]:
            raise ValueError(
                f"images: got {size[-3]} × {size[-2]} pixels; the trained features belong to images of "
                f"{offsets.shape[0]} × {offsets.shape[1]}. Resize or pad images and logits to that size, or train "
                "without trainable_features."
            )
        return offsets

"""ConvCRF as a layer: mean field with a truncated Gaussian window, its parameters learned."""

import dataclasses
import functools
import os
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn import softplus
from jaxtyping import Float, Shaped

from jaxcrf import _checks, presets
from jaxcrf.compatibility import as_matrix
from jaxcrf.features import Features, bilateral_features, position_features
from jaxcrf.filters import Filter, Window
from jaxcrf.inference.mean_field import MeanFieldResult, mean_field
from jaxcrf.presets import Preset

_WEIGHTS = ("position_weight", "bilateral_weight", "unary_weight")
_BANDWIDTHS = ("position_bandwidth", "bilateral_position_bandwidth", "bilateral_color_bandwidth")


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static under `jit`."""

    preset: Preset
    exclude_self: bool
    gradient: Literal["unrolled", "implicit"]


class _Parameters(NamedTuple):
    """What is not: instead of the preset's numbers, those that are learned."""

    numbers: dict[str, Array]
    feature_offsets: Array | None
    compatibility: Array | None


class ConvCRF(nnx.Module):
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
        gradient: Literal["unrolled", "implicit"] = "unrolled",
    ):
        self.num_labels = _checks.check_num_labels(num_labels)
        chosen = preset if isinstance(preset, Preset) else presets.get(preset)
        if num_iterations is not None:
            chosen = dataclasses.replace(chosen, num_iterations=num_iterations)
        if not (chosen.position_weight or chosen.bilateral_weight):
            raise ValueError("preset: position_weight and bilateral_weight are both 0; a CRF needs a kernel")
        if gradient not in ("unrolled", "implicit"):
            raise ValueError(f"gradient: got {gradient!r}; expected 'unrolled' or 'implicit'")
        if trainable_features and not chosen.position_weight:
            raise ValueError(
                "trainable_features: the preset's position_weight is 0; features need a smoothness kernel"
            )
        if trainable_features != (image_shape is not None):
            raise ValueError(
                f"image_shape: got {image_shape} with trainable_features={trainable_features}; the features of "
                "+T belong to the pixels of one image size, (height, width), and nothing else does"
            )
        self._config = _Config(chosen, bool(exclude_self), gradient)
        learned = [name for name in _WEIGHTS if learn_weights and getattr(chosen, name)]
        learned += [name for name in _BANDWIDTHS if learn_bandwidths and self._has_bandwidth(name)]
        if trainable_features and learn_bandwidths:
            learned.remove("position_bandwidth")
        # softplus(softplus⁻¹(1)) = 1, so that training starts from the preset. An array of NumPy's, for a type that is
        # not weak: the first update would change it, and everything would be compiled again.
        one = np.log(np.expm1(np.ones(()))).astype(jnp.zeros(()).dtype)
        self.scales = nnx.Dict(
            {
                name: nnx.Param(jnp.asarray(np.broadcast_to(one, np.shape(getattr(chosen, name)))))
                for name in learned
            }
        )
        offsets = None
        if image_shape is not None:
            if len(image_shape) != 2:
                raise ValueError(f"image_shape: got {image_shape}; expected (height, width)")
            # Made of the features that they move, so that sizes and bandwidths are checked.
            offsets = jnp.zeros_like(position_features(image_shape, chosen.position_bandwidth).values)
        self.feature_offsets = None if offsets is None else nnx.Param(offsets)
        self.compatibility = nnx.Param(as_matrix(1.0, self.num_labels)) if trainable_compatibility else None

    @property
    def smoothness_features(self) -> Float[Array, "height width 2"] | None:
        """What the smoothness kernel compares, in units of its bandwidth; None unless features are trainable."""
        if self.feature_offsets is None:
            return None
        return _smoothness_features(self._config.preset, self.feature_offsets[...])

    def learned_preset(self) -> Preset:
        """The preset that the weights and bandwidths have become, for `jaxcrf.refine` and `presets.save`.

        Trained features and compatibilities have no place in one: with them it is not the whole of the layer.

        Raises:
            ValueError: if a weight or bandwidth is no longer finite.
        """
        numbers = {name: value.tolist() for name, value in self._numbers().items()}
        changes: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in numbers.items()
        }
        return dataclasses.replace(self._config.preset, summary="learned", **changes)

    def infer(
        self,
        images: Shaped[Array, "*batch height width channels"],
        logits: Float[Array, "*batch height width labels"],
    ) -> MeanFieldResult:
        """Marginals, logits and statistics of the iterations.

        Args:
            images: `[*batch, H, W, channels]`, in the units of the colour bandwidth, 0 to 255.
            logits: the unary, `[*batch, H, W, L]`.

        Returns:
            `MeanFieldResult(probs, logits, stats)`, at least float32.

        Raises:
            ValueError: if shapes disagree with each other, the number of labels or `image_shape`.
        """
        shape, size = jnp.shape(logits), jnp.shape(images)
        if len(shape) < 3 or shape[-1] != self.num_labels:
            raise ValueError(f"logits: got shape {shape}; expected [*batch, H, W, {self.num_labels}]")
        if len(size) < 3 or size[-3:-1] != shape[-3:-1]:
            raise ValueError(
                f"images: got shape {size} for logits of shape {shape}; expected [*batch, H, W, channels] of "
                "their size. Bring the logits to the images' size first."
            )
        offsets = None if self.feature_offsets is None else self.feature_offsets[...]
        if offsets is not None and size[-3:-1] != offsets.shape[:2]:
            raise ValueError(
                f"images: got {size[-3]} × {size[-2]} pixels; the trained features belong to images of "
                f"{offsets.shape[0]} × {offsets.shape[1]}. Resize or pad images and logits to that size, or train "
                "without trainable_features."
            )
        compatibility = None if self.compatibility is None else self.compatibility[...]
        parameters = _Parameters(self._numbers(), offsets, compatibility)
        return _infer(jnp.asarray(images), jnp.asarray(logits), parameters, self._config)

    def __call__(
        self,
        images: Shaped[Array, "*batch height width channels"],
        logits: Float[Array, "*batch height width labels"],
    ) -> Float[Array, "*batch height width labels"]:
        """The refined logits, whose soft-max are the marginals."""
        return self.infer(images, logits).logits

    def _has_bandwidth(self, name: str) -> bool:
        preset = self._config.preset
        kernel = "position_weight" if name == "position_bandwidth" else "bilateral_weight"
        return bool(getattr(preset, kernel)) and getattr(preset, name) is not None

    def _numbers(self) -> dict[str, Array]:
        preset = self._config.preset
        return {
            name: jnp.asarray(getattr(preset, name)) * softplus(scale[...])
            for name, scale in self.scales.items()
        }


# Compiled here, so that learned bandwidths are never seen as constants: filters would take each of their values for
# a static one, and compile anew after every step.
@functools.partial(jax.jit, static_argnames="config")
def _infer(images: Array, logits: Array, parameters: _Parameters, config: _Config) -> MeanFieldResult:
    preset = config.preset
    unary_weight = parameters.numbers.get("unary_weight", preset.unary_weight)
    compatibility = 1.0 if parameters.compatibility is None else parameters.compatibility
    return mean_field(
        logits,
        [(_filter(images, parameters, preset), compatibility)],
        num_iterations=preset.num_iterations,
        unary_weight=unary_weight,
        exclude_self=config.exclude_self,
        gradient=config.gradient,
    )


def _filter(images: Array, parameters: _Parameters, preset: Preset) -> Filter:
    def number(name: str) -> Any:
        return parameters.numbers.get(name, getattr(preset, name))

    features: list[Features | Array] = []
    weights = []
    if preset.position_weight:
        if parameters.feature_offsets is None:
            features.append(position_features(images.shape[-3:-1], number("position_bandwidth")))
        else:
            features.append(_smoothness_features(preset, parameters.feature_offsets))
        weights.append(number("position_weight"))
    if preset.bilateral_weight:
        features.append(
            bilateral_features(
                images, number("bilateral_position_bandwidth"), number("bilateral_color_bandwidth")
            )
        )
        weights.append(number("bilateral_weight"))
    k = Window(
        tuple(features),
        preset.filter_size,
        weights=jnp.stack([jnp.asarray(w, float) for w in weights]),
        blur=preset.blur,
    )
    return k.normalized(preset.normalization)


def _smoothness_features(preset: Preset, offsets: Array) -> Array:
    return position_features(offsets.shape[:2], preset.position_bandwidth).values + offsets

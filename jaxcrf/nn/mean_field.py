"""What the layers of mean-field CRFs share: the parameters, and the call that iterates."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
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
from jaxcrf.filters import Filter
from jaxcrf.inference.mean_field import MeanFieldResult, mean_field
from jaxcrf.presets import Preset

Gradient = Literal["unrolled", "implicit"]

WEIGHTS = ("position_weight", "bilateral_weight", "unary_weight")
BANDWIDTHS = ("position_bandwidth", "bilateral_position_bandwidth", "bilateral_color_bandwidth")

# The filter of kernels, from their features, their weights and the preset; compares and hashes by value.
FilterBuilder = Callable[[tuple[Features | Array, ...], Array, Preset], Filter]


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static under `jit`."""

    preset: Preset
    filter: FilterBuilder
    exclude_self: bool
    gradient: Gradient
    weights_per_label: bool


class _Parameters(NamedTuple):
    """What is not: instead of the preset's numbers, those that are learned."""

    numbers: dict[str, Array]
    feature_offsets: Array | None
    compatibility: Array | None


class MeanFieldCRF(nnx.Module):
    """A CRF with a smoothness and an appearance kernel as a layer: `nn.ConvCRF` and `nn.DenseCRF`.

    Those that inherit say by which filter, and which of the preset's numbers are learned.

    Attributes:
        num_labels: `L`.
        num_iterations: of mean field. It may be set, as by `model.set_attributes(num_iterations=10)`.
        scales: what weights and bandwidths are learned as.
        compatibility: the learned penalty `μ(l, l')`; None for Potts.
    """

    def __init__(
        self,
        num_labels: int,
        preset: Preset,
        filter: FilterBuilder,
        *,
        num_iterations: int | None,
        learned: Iterable[str],
        weights_per_label: bool,
        trainable_compatibility: bool,
        exclude_self: bool,
        gradient: Gradient,
    ):
        self.num_labels = _checks.check_num_labels(num_labels)
        if num_iterations is not None:
            preset = dataclasses.replace(preset, num_iterations=num_iterations)
        if not (preset.position_weight or preset.bilateral_weight):
            raise ValueError("preset: position_weight and bilateral_weight are both 0; a CRF needs a kernel")
        if gradient not in ("unrolled", "implicit"):
            raise ValueError(f"gradient: got {gradient!r}; expected 'unrolled' or 'implicit'")
        self.num_iterations = preset.num_iterations
        self._config = _Config(preset, filter, bool(exclude_self), gradient, bool(weights_per_label))

        # softplus(softplus⁻¹(1)) = 1, so that training starts from the preset.
        def ones(name: str) -> Array:
            per_label = weights_per_label and name in ("position_weight", "bilateral_weight")
            shape = (self.num_labels,) if per_label else np.shape(getattr(preset, name))
            return jnp.asarray(np.broadcast_to(inverse_softplus_of_one(), shape))

        self.scales = nnx.Dict({name: nnx.Param(ones(name)) for name in learned})
        self.compatibility = nnx.Param(as_matrix(1.0, self.num_labels)) if trainable_compatibility else None

    def learned_preset(self) -> Preset:
        """The preset that the weights and bandwidths have become, for `jaxcrf.refine` and `presets.save`.

        What has no place in one, trained features and compatibilities, is left out, and of a kernel's weights per
        label it takes the mean: then it is not the whole of the layer.

        Raises:
            ValueError: if a weight or bandwidth is no longer finite.
        """
        numbers = self._numbers()
        if self._config.weights_per_label:
            numbers |= {name: numbers[name].mean() for name in numbers if name in WEIGHTS}
        changes: dict[str, Any] = {
            name: tuple(value.tolist()) if value.ndim else value.item() for name, value in numbers.items()
        }
        return dataclasses.replace(self._preset, summary="learned", **changes)

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
            ValueError: if shapes disagree with each other, the number of labels or the size that trained features
                belong to.
        """
        _checks.check_layer_inputs(images, logits, self.num_labels)
        offsets = self._checked_offsets(jnp.shape(images))
        compatibility = None if self.compatibility is None else self.compatibility[...]
        parameters = _Parameters(self._numbers(), offsets, compatibility)
        config = dataclasses.replace(self._config, preset=self._preset)
        return infer(jnp.asarray(images), jnp.asarray(logits), parameters, config)

    def __call__(
        self,
        images: Shaped[Array, "*batch height width channels"],
        logits: Float[Array, "*batch height width labels"],
    ) -> Float[Array, "*batch height width labels"]:
        """The refined logits, whose soft-max are the marginals."""
        return self.infer(images, logits).logits

    @property
    def _preset(self) -> Preset:
        return dataclasses.replace(self._config.preset, num_iterations=self.num_iterations)

    def _checked_offsets(self, size: tuple[int, ...]) -> Array | None:
        """What is added to the smoothness features of images of this shape."""
        del size
        return None

    def _numbers(self) -> dict[str, Array]:
        preset = self._config.preset
        return {
            name: jnp.asarray(getattr(preset, name)) * softplus(scale[...])
            for name, scale in self.scales.items()
        }


def read_preset(preset: str | os.PathLike | Preset) -> Preset:
    """A preset from its name, its file or itself."""
    return preset if isinstance(preset, Preset) else presets.get(preset)


def learnable(preset: Preset, names: Iterable[str]) -> list[str]:
    """Which of these weights and bandwidths the preset has: a kernel whose weight is 0 is left out for good."""

    def has(name: str) -> bool:
        if name in WEIGHTS:
            return bool(getattr(preset, name))
        kernel = "position_weight" if name == "position_bandwidth" else "bilateral_weight"
        return bool(getattr(preset, kernel)) and getattr(preset, name) is not None

    return [name for name in names if has(name)]


def inverse_softplus_of_one() -> np.ndarray:
    """`softplus⁻¹(1)`, at which something learned as `v₀ softplus(s)` begins as `v₀`.

    An array of NumPy's, for a type that is not weak: the first update would change it, and everything would be
    compiled again.

    Example:
        >>> softplus(inverse_softplus_of_one()).item()
        1.0
    """
    return np.log(np.expm1(np.ones(()))).astype(jnp.zeros(()).dtype)


def smoothness_features(preset: Preset, offsets: Array) -> Array:
    """Positions in units of their bandwidth, moved by what was learned."""
    return position_features(offsets.shape[:2], preset.position_bandwidth).values + offsets


# Compiled here, so that learned bandwidths are never seen as constants: filters would take each of their values for
# a static one, and compile anew after every step.
@functools.partial(jax.jit, static_argnames="config")
def infer(images: Array, logits: Array, parameters: _Parameters, config: _Config) -> MeanFieldResult:
    """Mean field with a layer's parameters."""
    preset = config.preset
    features = _features(images, parameters, preset)
    weights = [
        parameters.numbers.get(name, jnp.asarray(getattr(preset, name), float))
        for name in ("position_weight", "bilateral_weight")
        if getattr(preset, name)
    ]
    compatibility = 1.0 if parameters.compatibility is None else parameters.compatibility
    if config.weights_per_label:
        one = jnp.ones(1)
        pairwise: list[Any] = [
            # μ(l, l') w(l'), which with Potts is -diag(w) up to what is the same for all labels.
            (config.filter((f,), one, preset), w if parameters.compatibility is None else compatibility * w)
            for f, w in zip(features, weights, strict=True)
        ]
    else:
        pairwise = [(config.filter(features, jnp.stack(weights), preset), compatibility)]
    return mean_field(
        logits,
        pairwise,
        num_iterations=preset.num_iterations,
        unary_weight=parameters.numbers.get("unary_weight", preset.unary_weight),
        exclude_self=config.exclude_self,
        gradient=config.gradient,
    )


def _features(images: Array, parameters: _Parameters, preset: Preset) -> tuple[Features | Array, ...]:
    def number(name: str) -> Any:
        return parameters.numbers.get(name, getattr(preset, name))

    features: list[Features | Array] = []
    if preset.position_weight:
        if parameters.feature_offsets is None:
            features.append(position_features(images.shape[-3:-1], number("position_bandwidth")))
        else:
            features.append(smoothness_features(preset, parameters.feature_offsets))
    if preset.bilateral_weight:
        features.append(
            bilateral_features(
                images, number("bilateral_position_bandwidth"), number("bilateral_color_bandwidth")
            )
        )
    return tuple(features)

"""The fully connected CRF as a layer: mean field with every pair of pixels, its parameters learned."""

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jax import Array

from jaxcrf._checks import Normalization
from jaxcrf.features import Features
from jaxcrf.filters import Dense, Filter, Landmark, Lattice
from jaxcrf.filters.base import filter_pytree
from jaxcrf.filters.selection import Kind, fully_connected, select_filter
from jaxcrf.nn.mean_field import BANDWIDTHS, WEIGHTS, Gradient, MeanFieldCRF, learnable, read_preset
from jaxcrf.presets import Preset

# What every filter has the exact gradient of. Landmarks need positions that are known when a program is traced. The
# lattice's gradient is that of a function with a kink wherever a pixel changes its cell: on photographs it is off by a
# tenth to a half.
_LEARNABLE_BANDWIDTHS: dict[str, tuple[str, ...]] = {
    "dense": BANDWIDTHS,
    "landmark": ("bilateral_color_bandwidth",),
}
_FILTERS = {"dense": Dense, "lattice": Lattice, "landmark": Landmark}


@dataclasses.dataclass(frozen=True)
class _FullyConnected:
    """Builds the fully connected filter."""

    kind: Kind | Literal["auto"]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, features: tuple[Features | Array, ...], weights: Array, preset: Preset) -> Filter:
        first = features[0]
        size = (first.values if isinstance(first, Features) else first).shape[-3:-1]
        kind = select_filter(math.prod(size)) if self.kind == "auto" else self.kind
        options = dict(self.options)
        if kind == "lattice" and preset.normalization != "none":
            options.setdefault("scaling", "continuous")  # the cheapest one: normalised, all are the same
        k = fully_connected(features, kind=kind, weights=weights, **options)
        return _AtPixels(k.normalized(preset.normalization))


@filter_pytree(data=("filter",), static=())
class _AtPixels(Filter):
    """A filter that hands its maps on at every pixel, and not on the grid that it works on.

    A lattice has room for several vertices a pixel, and one for every kernel, so that the maps of pixels are what
    takes less room between iterations.
    """

    filter: Filter

    def __init__(self, filter: Filter):
        self._initialize(filter=filter)

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.filter.spatial

    @property
    def batch(self) -> tuple[int, ...]:
        return self.filter.batch

    @property
    def is_symmetric(self) -> bool:
        return self.filter.is_symmetric

    @property
    def T(self) -> "_AtPixels":
        return _AtPixels(self.filter.T)

    def diagonal(self) -> Array:
        return self.filter.diagonal()

    def normalized(self, kind: Normalization) -> "_AtPixels":
        return _AtPixels(self.filter.normalized(kind))

    def convolve(self, restricted: tuple[Array, ...]) -> tuple[Array, ...]:
        return (self.filter.apply(restricted[0]),)


class DenseCRF(MeanFieldCRF):
    r"""Refines logits against an image by a fully connected CRF, `q ← softmax(w_u u - μ K q)` a few times.

    It is `nn.ConvCRF` with a filter `K` over all pairs of pixels instead of a window, and begins, like that, as a
    preset with which it refines exactly as `jaxcrf.refine` does. Two networks have it on top:

    | | preset | `num_iterations` | learned |
    |---|---|---|---|
    | DeepLab | a search's, see `jaxcrf.training.search` | 10 | nothing |
    | CRF-as-RNN | "densecrf_crf_as_rnn" | 5, at test 10 | weights per label, compatibility |

    What is learned, as far as it is asked for:

    - `scales`: kernel weights, unary weight and bandwidths, each as `v₀ softplus(s)` with the preset's `v₀`. A kernel
      whose weight is 0 in the preset is left out for good. With `weights_per_label` a kernel has one weight per label,
      `[L]`: `-Σ_l' μ(l, l') w(l') (K q)(l')`.
    - `compatibility`, `[L, L]`: the penalty `μ(l, l')`, rows the receiving label, Potts at first.

    Which bandwidths can be learned depends on the filter: all of them with "dense"; with "landmark" that of the
    colours, since those of positions decide its sizes; none with "lattice", whose gradient by them is too inexact,
    nor with "auto", which may be the lattice. CRF-as-RNN keeps them fixed.

    Args:
        num_labels: `L`.
        preset: a name from `jaxcrf.presets.names()`, a preset file or a `Preset`; its window has no meaning here.
        num_iterations: mean-field iterations, instead of the preset's. The attribute of that name may be set later:
            CRF-as-RNN is trained with 5 and tested with 10.
        filter: "dense", "lattice" or "landmark" as in `jaxcrf.filters.fully_connected`; "auto" chooses by the
            images' size and the device.
        filter_options: further arguments of that filter, as `{"capacity": 500_000}`. The lattice of an image with much
            fine texture, under small bandwidths, may need more room than it makes by itself; logits are NaN then.
        learn_weights: of the kernels and of the unary.
        learn_bandwidths: see above.
        weights_per_label: gives every kernel a weight per label.
        trainable_compatibility: see above.
        exclude_self: leave every pixel out of its own message, the papers' `i ≠ j`; their code does not.
        gradient: as in `mean_field`. "unrolled" recomputes each iteration in the backward pass and stores only the
            messages between them, one map of logits per iteration.

    Raises:
        TypeError: if the filter has no such option.
        ValueError: if arguments do not go together, or the preset or the filter is unknown.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> layer = DenseCRF(3, weights_per_label=True, trainable_compatibility=True)
        >>> layer(np.zeros((2, 8, 8, 3), np.uint8), jnp.zeros((2, 8, 8, 3))).shape
        (2, 8, 8, 3)
        >>> sorted((name, scale.shape) for name, scale in layer.scales.items())
        [('bilateral_weight', (3,)), ('position_weight', (3,)), ('unary_weight', ())]

    References:
        Zheng et al., *Conditional Random Fields as Recurrent Neural Networks*, 2015, §4 and 7; Krähenbühl and Koltun,
        *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, 2011; Chen et al., *Semantic
        Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015, §3.2.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        preset: str | os.PathLike | Preset = "densecrf",
        num_iterations: int | None = None,
        filter: Kind | Literal["auto"] = "auto",
        filter_options: Mapping[str, Any] | None = None,
        learn_weights: bool = True,
        learn_bandwidths: bool = False,
        weights_per_label: bool = False,
        trainable_compatibility: bool = False,
        exclude_self: bool = False,
        gradient: Gradient = "unrolled",
    ):
        if filter != "auto" and filter not in _FILTERS:
            raise ValueError(f"filter: got {filter!r}; expected auto, {', '.join(get_args(Kind))}")
        if learn_bandwidths and filter not in _LEARNABLE_BANDWIDTHS:
            raise ValueError(
                f"learn_bandwidths: got True with filter={filter!r}; bandwidths have no exact gradient through the "
                "lattice. Take filter='dense' for all of them or 'landmark' for that of the colours, or search for "
                "them with jaxcrf.training.search"
            )
        if weights_per_label and not learn_weights:
            raise ValueError(
                "weights_per_label: got True with learn_weights=False; weights per label exist only as they are "
                "learned"
            )
        chosen = read_preset(preset)
        learned = [
            *(WEIGHTS if learn_weights else ()),
            *(_LEARNABLE_BANDWIDTHS[filter] if learn_bandwidths else ()),
        ]
        super().__init__(
            num_labels,
            chosen,
            _FullyConnected(filter, _read_options(filter, filter_options or {})),
            num_iterations=num_iterations,
            learned=learnable(chosen, learned),
            weights_per_label=weights_per_label,
            trainable_compatibility=trainable_compatibility,
            exclude_self=exclude_self,
            gradient=gradient,
        )


def _read_options(kind: str, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options of a filter as what hashes, so that a layer compiles once."""
    if not options:
        return ()
    if kind == "auto":
        raise ValueError(
            f"filter_options: got {', '.join(options)} with filter='auto'; options belong to one of the filters: name "
            "it, e.g. filter='lattice'"
        )
    known = set(inspect.signature(_FILTERS[kind]).parameters) - {"features", "weights", "spatial_ndim"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"filter_options: {kind!r} has no option {name!r}; it has {', '.join(sorted(known))}"
            )
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(options.items())
    )

"""`refine`: a segmentation and its photograph in, a sharper segmentation out."""

import dataclasses
import functools
import math
import operator
import os
import warnings
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, Shaped

from jaxcrf import _checks, presets
from jaxcrf._checks import Normalization
from jaxcrf.features import bilateral_features, position_features
from jaxcrf.filters import Filter, Window, fully_connected, select_filter
from jaxcrf.filters.halo import ambient, constrain, evenly, place, read_sharding, splits
from jaxcrf.filters.selection import Kind
from jaxcrf.inference.mean_field import MeanFieldResult, mean_field
from jaxcrf.presets import Preset
from jaxcrf.unary import unary_from_labels, unary_from_probs

# The filters that each method can run on.
METHODS: dict[str, tuple[str, ...]] = {"convcrf": ("window",), "densecrf": get_args(Kind)}

DEFAULT_PRESET = presets.get("convcrf")

_PARAMETERS = tuple(field.name for field in dataclasses.fields(Preset) if field.name != "summary")

# What only the window filter has.
_WINDOW_PARAMETERS = ("filter_size", "blur")

# Maps of the unary's size that exist at a time: the unary, the iterate, a kernel's message before and after it is
# scaled, and the scores.
_MAPS = 5


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """Everything about a refinement that is static under `jit`.

    Attributes:
        preset: kernels, weights and iterations.
        spatial_ndim: 2 for images, 3 for volumes.
        filter: "window" for ConvCRF; one of the fully connected filters, or "auto" for what
            `filters.select_filter` says, for the dense CRF.
        sharding: None, or a `NamedSharding` that says which mesh axes split the unary's `[*batch, *spatial]`;
            only the window filter takes one that splits spatial axes.
    """

    preset: Preset = DEFAULT_PRESET
    spatial_ndim: int = 2
    filter: str = "window"
    sharding: NamedSharding | None = None


@functools.partial(jax.jit, static_argnames="config")
def refine_logits(
    image: Shaped[Array, "*batch_and_spatial channels"],
    logits: Float[Array, "*batch_and_spatial labels"],
    config: RefineConfig = RefineConfig(),
) -> MeanFieldResult:
    """Refines unary logits against an image: the pure, jitted, differentiable core of `refine`.

    Args:
        image: `[*batch, *spatial, channels]`, in the units of the preset's colour bandwidth.
        logits: `[*batch, *spatial, labels]`; batch axes broadcast against the image's.
        config: what is static; every distinct one compiles anew.

    Returns:
        `MeanFieldResult(probs, logits, stats)`. Values are not checked: NaN in is NaN out. The lattice is
        given `filters.lattice.default_capacity`, and an image that needs more is NaN; build the filter
        outside `jit` where that happens, or with a capacity of your own.

    Raises:
        ValueError: if shapes disagree, or a fully connected filter is to be split over spatial axes.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> image, logits = jnp.zeros((8, 8, 3)), jnp.zeros((8, 8, 2))
        >>> jaxcrf.refine_logits(image, logits).probs.shape
        (8, 8, 2)
    """
    if config.sharding is not None:
        config = dataclasses.replace(config, sharding=read_sharding(config.sharding, jnp.ndim(logits) - 1))
        _check_splittable(config)
    return _infer(_build_filter(image, config), logits, config)


def _infer(k: Filter, logits: Array, config: RefineConfig) -> MeanFieldResult:
    preset = config.preset
    if config.sharding is not None:
        logits = constrain(logits, config.sharding)
    result = mean_field(logits, k, num_iterations=preset.num_iterations, unary_weight=preset.unary_weight)
    if config.sharding is None:
        return result
    probs, scores = (constrain(x, evenly(config.sharding, x.shape)) for x in (result.probs, result.logits))
    return result._replace(probs=probs, logits=scores)


def _build_filter(image: Array, config: RefineConfig) -> Filter:
    preset = config.preset
    image = _checks.as_float(image)
    spatial = image.shape[-1 - config.spatial_ndim : -1]
    features, weights = [], []
    if preset.position_weight:
        features.append(position_features(spatial, preset.position_bandwidth))
        weights.append(preset.position_weight)
    if preset.bilateral_weight:
        features.append(
            bilateral_features(
                image,
                preset.bilateral_position_bandwidth,
                preset.bilateral_color_bandwidth,
                spatial_ndim=config.spatial_ndim,
            )
        )
        weights.append(preset.bilateral_weight)
    if not features:
        raise ValueError("position_weight, bilateral_weight: both are 0; at least one kernel must be left")
    common: Any = {"weights": jnp.asarray(weights, jnp.float32), "spatial_ndim": config.spatial_ndim}
    if config.filter == "window":
        k: Filter = Window(
            tuple(features), preset.filter_size, blur=preset.blur, sharding=config.sharding, **common
        )
    else:
        kind = select_filter(math.prod(spatial)) if config.filter == "auto" else cast(Kind, config.filter)
        if kind == "lattice" and preset.normalization != "none":
            common["scaling"] = "continuous"  # the cheapest one: normalised, all are the same
        k = fully_connected(tuple(features), kind=kind, **common)
    return k.normalized(preset.normalization)


def _refine_labels(
    image: Array | Filter, labels: Array, config: RefineConfig, num_labels: int, ignore_label: int | None
) -> Array:
    unary = unary_from_labels(labels, num_labels, ignore_label=ignore_label)
    return _refine_scores(image, unary, config)


def _refine_probs(image: Array | Filter, probs: Array, config: RefineConfig) -> Array:
    return _refine_scores(image, unary_from_probs(probs), config)


def _refine_scores(image: Array | Filter, logits: Array, config: RefineConfig) -> Array:
    k = image if isinstance(image, Filter) else _build_filter(image, config)
    return _infer(k, logits, config).probs.astype(jnp.float32)


def refine(
    image: Shaped[Any, "*batch_and_spatial channels"],
    probs: Float[Any, "*batch_and_spatial labels"] | None = None,
    *,
    logits: Float[Any, "*batch_and_spatial labels"] | None = None,
    labels: Int[Any, " *batch_and_spatial"] | None = None,
    num_labels: int | None = None,
    method: Literal["convcrf", "densecrf"] = "convcrf",
    preset: str | os.PathLike | Preset | None = None,
    num_iterations: int | None = None,
    filter: str = "auto",
    normalization: Normalization | None = None,
    ignore_label: int | None = 255,
    spatial_ndim: int = 2,
    sharding: NamedSharding | None = None,
    **parameters: Any,
) -> Float[Array, "*batch_and_spatial labels"]:
    """Sharpens a segmentation along the edges of the image it belongs to.

    Exactly one of `probs`, `logits` and `labels` says what is known. Arguments are checked on the host, then
    one jitted function runs (`refine_logits`, to be called directly from code that is itself jitted).

    Args:
        image: `[*batch, *spatial, channels]` or, for one channel, `[*batch, *spatial]`; 8-bit, or numbers
            from 0 to 255 (bandwidths are in these units).
        probs: probabilities `[*batch, *spatial, labels]`, summing to one up to 1e-2.
        logits: unnormalised log-probabilities, likewise.
        labels: a label map `[*batch, *spatial]` of integers; needs `num_labels`.
        num_labels: `L`, for `labels` only.
        method: "convcrf", Gaussian kernels inside a window; or "densecrf", between all pairs of pixels.
        preset: a name from `jaxcrf.presets.names()`, a preset file (a `Path`, or a string that ends in
            `.json`) or a `Preset`; None is the method's default.
        num_iterations: mean-field iterations, instead of the preset's.
        filter: "auto"; "window" for "convcrf"; "dense" (exact), "lattice" or "landmark" for "densecrf", where
            "auto" is what `filters.select_filter` says of the image's size and the device.
        normalization: "none", "before", "after" or "symmetric", instead of the preset's.
        ignore_label: pixels of this label in `labels` are filled in from their neighbours; None for no
            such label.
        spatial_ndim: 2 for images, 3 for volumes.
        sharding: which mesh axes split the axes `[*batch, *spatial]`, so that several devices refine one image
            (see `filters.Window`) or a batch; None takes that of the unary, where this is a `jax.Array` split by a
            `NamedSharding`. Only "convcrf" can split spatial axes.
        **parameters: any other field of `Preset`, instead of the preset's. They are static: every distinct
            set compiles anew, so search over parameters with `filters.Window` and `mean_field` instead.

    Returns:
        Refined probabilities, float32 `[*batch, *spatial, L]`; split like the unary, but for axes that do not
        divide by their devices, which come back whole.

    Raises:
        TypeError: on an unknown parameter, unless exactly one of probs, logits and labels is given, or if
            `sharding` is no `NamedSharding` over devices.
        ValueError: on arrays that do not fit each other, values that are not what the argument says (NaN,
            negative or unnormalised probabilities, labels out of range), or options out of range; also if
            bandwidths are so small that no pixel has a neighbour, or spatial axes are split (fully connected
            filters).
        MemoryError: if the machine has less memory than the maps of all labels need.

    Warns:
        UserWarning: if a floating-point image has no value above 1, and so probably is not in 0 to 255.

    Example:
        >>> import numpy as np, jaxcrf
        >>> image = np.zeros((16, 16, 3), np.uint8)
        >>> image[:, 8:] = 255
        >>> truth = image[..., 0] // 255
        >>> noisy = truth.copy()
        >>> noisy[3:5, 3:5] = 1
        >>> refined = jaxcrf.refine(image, labels=noisy, num_labels=2)
        >>> bool((refined.argmax(-1) == truth).all())
        True

        Rows over all devices; the result is the same, and is split alike:

        >>> import jax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> rows = NamedSharding(jax.make_mesh((jax.device_count(),), ("rows",)), PartitionSpec("rows"))
        >>> split = jaxcrf.refine(image, labels=noisy, num_labels=2, sharding=rows)
        >>> bool(np.allclose(split, refined, atol=1e-4)), split.sharding.is_equivalent_to(rows, 3)
        (True, True)

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018; Krähenbühl and Koltun,
        *Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials*, 2011.
    """
    config = _config(method, preset, filter, spatial_ndim, num_iterations, normalization, parameters)
    given = [
        name
        for name, value in (("probs", probs), ("logits", logits), ("labels", labels))
        if value is not None
    ]
    if len(given) != 1:
        raise TypeError(
            f"refine takes exactly one of probs, logits and labels; got {' and '.join(given) or 'none'}"
        )
    if labels is None and num_labels is not None:
        raise TypeError(f"num_labels goes with labels; {given[0]} already says how many labels there are")
    unary = next(x for x in (probs, logits, labels) if x is not None)
    name = given[0]
    if np.ndim(unary) < spatial_ndim + (labels is None):
        raise ValueError(
            f"{name}: got shape {np.shape(unary)}; expected [*batch, {spatial_ndim} spatial axes"
            f"{', labels' if labels is None else ''}] (spatial_ndim={spatial_ndim})"
        )
    leading = np.shape(unary) if labels is not None else np.shape(unary)[:-1]
    image = _check_image(image, leading, name)
    wanted = _sharding_of(unary, len(leading)) if sharding is None else sharding
    if wanted is not None:
        config = dataclasses.replace(config, sharding=read_sharding(wanted, len(leading)))
        _check_splittable(config)
    image = place(image, config.sharding)
    with ambient(config.sharding):
        if labels is not None:
            refined = _refine_label_map(image, labels, num_labels, ignore_label, config)
        else:
            refined = _refine_unary(image, unary, name, config)
    # The mesh that the caller speaks of may differ from ours in the type of its axes.
    return place(refined, wanted)


def _refine_label_map(
    image: Array, labels: Any, num_labels: int | None, ignore_label: int | None, config: RefineConfig
) -> Array:
    if num_labels is None:
        raise TypeError("labels needs num_labels: a map need not show every label")
    count = _checks.check_num_labels(num_labels)
    ignored = None if ignore_label is None else operator.index(ignore_label)
    array = _checks.check_labels("labels", labels, count, ignored)
    _checks.check_not_empty("labels", array)
    _check_memory(array.shape, count, config)
    array = place(array, config.sharding)
    source = _filter_or_image(image, config)
    return _jitted(_refine_labels, False)(source, array, config, count, ignored)


def _refine_unary(image: Array, unary: Any, name: str, config: RefineConfig) -> Array:
    owned = isinstance(unary, (np.ndarray, list, tuple))  # anything else may hand out its own buffer
    array = jnp.asarray(unary)
    _checks.check_not_empty(name, array)
    array = place(array, config.sharding)
    if name == "probs":
        _checks.check_probs(name, array)
    else:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"logits: got dtype {array.dtype}; expected floating point. Pass a label map as labels=…, num_labels=…"
            )
        _checks.check_finite(name, array)
    if array.shape[-1] == 1:
        return jnp.ones(array.shape, jnp.float32)
    core = _refine_probs if name == "probs" else _refine_scores
    _check_memory(array.shape[:-1], array.shape[-1], config)
    source = _filter_or_image(image, config)
    # A copy of ours on the device may be overwritten, which saves large images one map of memory.
    return _jitted(core, owned and array.dtype == jnp.float32)(source, array, config)


@functools.cache
def _jitted(core: Any, donate: bool) -> Any:
    static = ("config", "num_labels", "ignore_label") if core is _refine_labels else "config"
    return jax.jit(core, static_argnames=static, donate_argnums=(1,) if donate else ())


def _filter_or_image(image: Array, config: RefineConfig) -> Array | Filter:
    """The filter, where it must be built before anything is compiled: a lattice's size depends on the image."""
    if config.filter == "window":
        return image
    spatial = image.shape[-1 - config.spatial_ndim : -1]
    kind = select_filter(math.prod(spatial)) if config.filter == "auto" else config.filter
    return _build_filter(image, config) if kind == "lattice" else image


def _sharding_of(unary: Any, ndim: int) -> NamedSharding | None:
    """How an array is split over devices, where it is and its labels are not."""
    found = unary.sharding if isinstance(unary, jax.Array) and _checks.is_concrete(unary) else None
    if not isinstance(found, NamedSharding) or not isinstance(found.mesh, Mesh):
        return None
    if len(found.spec) > ndim and found.spec[ndim] is not None:
        return None
    return found if splits(read_sharding(found, ndim)) else None


def _check_splittable(config: RefineConfig) -> None:
    """Raises if spatial axes are split for a filter between all pairs of pixels."""
    if config.filter != "window" and splits(config.sharding, slice(-config.spatial_ndim, None)):
        raise ValueError(
            f"sharding: {cast(NamedSharding, config.sharding).spec} splits an image over devices, which only method "
            "'convcrf' can; fully connected filters need whole images. Split batch axes only, or bring the image "
            "together first, e.g. with jax.device_put(probs, jax.devices()[0])"
        )


def _check_memory(leading: tuple[int, ...], num_labels: int, config: RefineConfig) -> None:
    # Devices of their own memory share the maps; those of a CPU share its memory.
    pieces = 1
    if config.sharding is not None and jax.default_backend() != "cpu":
        pieces = math.prod(leading) // math.prod(evenly(config.sharding, leading).shard_shape(leading))
    _checks.check_memory(
        4 * _MAPS * math.prod(leading) * num_labels // pieces,
        f"refining {' x '.join(map(str, leading))} pixels with {num_labels} labels",
        "Refine a crop at a time, fewer labels at a time, or a smaller batch.",
    )


def _config(
    method: str,
    preset: str | os.PathLike | Preset | None,
    filter: str,
    spatial_ndim: int,
    num_iterations: int | None,
    normalization: str | None,
    parameters: dict[str, Any],
) -> RefineConfig:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(METHODS)}")
    choices = METHODS[method]
    if filter != "auto" and filter not in choices:
        raise ValueError(
            f"filter: got {filter!r}; method {method!r} runs on 'auto' or {', '.join(map(repr, choices))}"
        )
    _checks.check_spatial_ndim(spatial_ndim)
    base = preset if isinstance(preset, Preset) else presets.get(method if preset is None else preset)
    unknown = sorted(set(parameters) - set(_PARAMETERS))
    if unknown:
        raise TypeError(
            f"refine got unknown parameters {', '.join(unknown)}; preset fields are {', '.join(_PARAMETERS)}"
        )
    misplaced = [name for name in _WINDOW_PARAMETERS if name in parameters and method != "convcrf"]
    if misplaced:
        raise TypeError(
            f"{', '.join(misplaced)}: belongs to method 'convcrf'; method {method!r} has no window"
        )
    changes = dict(parameters)
    if num_iterations is not None:
        changes["num_iterations"] = num_iterations
    if normalization is not None:
        changes["normalization"] = normalization
    config = RefineConfig(
        preset=dataclasses.replace(base, **changes),
        spatial_ndim=spatial_ndim,
        filter="window" if method == "convcrf" else filter,
    )
    if method == "densecrf":
        _check_reach(config.preset)
    return config


def _check_reach(preset: Preset) -> None:
    """Raises if a kernel's value between neighbours is lost beside the pixel's own."""
    for kernel, name in (("position", "position_bandwidth"), ("bilateral", "bilateral_position_bandwidth")):
        value = getattr(preset, name)
        if value is None or not getattr(preset, f"{kernel}_weight"):
            continue
        largest = max(value) if isinstance(value, tuple) else value
        if math.exp(-0.5 / largest**2) < np.finfo(np.float32).eps:
            raise ValueError(
                f"{name}: got {value}, at which no pixel sees another; raise it (0.18 pixels is the least), or "
                f"switch the kernel off with {kernel}_weight=0"
            )


def _check_image(image: Any, leading: tuple[int, ...], name: str) -> Array:
    if (
        image is None
        or isinstance(image, (str, bytes))
        or getattr(getattr(image, "dtype", None), "hasobject", False)
    ):
        raise TypeError(
            f"image: got {type(image).__name__}; expected an array, e.g. from jaxcrf.data.read_image"
        )
    array = jnp.asarray(image)
    if array.shape == leading:
        array = array[..., None]
    if array.shape[:-1] != leading:
        raise ValueError(
            f"image: got shape {np.shape(image)}, which does not fit {name} over {leading}; expected "
            f"{leading} or {(*leading, 'channels')}. Resize one to the other; the axis order is height, width."
        )
    _checks.check_not_empty("image", array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == jnp.bool_:
        raise ValueError(f"image: got dtype {array.dtype}; expected 8-bit values or numbers from 0 to 255")
    _checks.check_finite("image", array)
    if (
        jnp.issubdtype(array.dtype, jnp.floating)
        and _checks.is_concrete(array)
        and float(jnp.max(array)) <= 1
    ):
        warnings.warn(
            "image: floating point with no value above 1; bandwidths are in units of 0 to 255, so multiply "
            "the image by 255",
            UserWarning,
            stacklevel=3,
        )
    return array


def _largest(array: Array) -> float:
    with jax.ensure_compile_time_eval():
        return float(jnp.max(array))

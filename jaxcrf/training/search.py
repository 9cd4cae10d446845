"""Coarse-to-fine search over the parameters of a CRF, on held-out images.

Candidates that differ in weights only share a filter: it is built once per image, and one compiled call
infers with every set of weights and counts its confusions. What is compiled depends on shapes, not on
weights and bandwidths, and images share it:

- Lattice filters that are normalised pad images to a few common shapes. Pixels of the padding send no
  messages, and lie so far from all others in feature space that they share no vertex of the lattice with
  them: results are those of the image alone. The lattices' own sizes are rounded up by half octaves.
- Window filters pool pixels, which padding would change at the borders. They, and lattices that are not
  normalised, compile once per image size.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int, Num

from jaxcrf import _checks, presets
from jaxcrf._checks import Normalization
from jaxcrf.features import bilateral_features, position_features
from jaxcrf.filters import Filter, Lattice, Window
from jaxcrf.filters.base import normalizing_scales
from jaxcrf.inference.mean_field import mean_field
from jaxcrf.metrics import confusion_matrix, mean_iou, pixel_accuracy
from jaxcrf.presets import Preset
from jaxcrf.unary import unary_from_probs

Method = Literal["densecrf", "convcrf"]
Unary = Literal["probs", "logits"]
Example: TypeAlias = tuple[Num[Any, "*spatial channels"], Num[Any, "*spatial labels"], Int[Any, "*spatial"]]
Examples: TypeAlias = Iterable[Example] | Callable[[], Iterable[Example]]

# What is searched unless told otherwise. The dense CRF's is the grid of DeepLab, §4 "Cross-validation".
SPACES: dict[str, dict[str, tuple[float, ...]]] = {
    "densecrf": {
        "bilateral_weight": (5, 6, 7, 8, 9, 10),
        "bilateral_position_bandwidth": (50, 60, 70, 80, 90, 100),
        "bilateral_color_bandwidth": (3, 4, 5, 6, 7, 8, 9, 10),
    },
    "convcrf": {
        "position_weight": (2, 4, 8, 16),
        "bilateral_weight": (2, 4, 8, 16),
        "bilateral_position_bandwidth": (3, 4, 5, 6, 8, 10),
        "bilateral_color_bandwidth": (5, 10, 15, 20, 25, 30),
    },
}

# What is not searched. DeepLab: w2 = σγ = 3, ten iterations.
PRESETS: dict[str, Preset] = {
    "densecrf": dataclasses.replace(presets.get("densecrf"), num_iterations=10),
    "convcrf": presets.get("convcrf"),
}

_FIELDS = tuple(field.name for field in dataclasses.fields(Preset) if field.name != "summary")
_WEIGHTS = ("unary_weight", "position_weight", "bilateral_weight")
_WHOLE = ("num_iterations", "filter_size", "blur")
_WINDOW_ONLY = ("filter_size", "blur")

# Images are padded to multiples of so many pixels, or less where no image of the same shape is larger.
_SHAPE_STEP = 64

# How far padding lies from all pixels, in bandwidths and along every feature: beyond the blurs' reach.
_FAR = 32.0

# Room for so many sets of weights at least, so that rounds with fewer share what was compiled.
_LEAST_ROOM = 8

_LOG_FORMAT = 1


class Trial(NamedTuple):
    """One candidate and how it did on all images together.

    Attributes:
        parameters: the fields of the preset that are searched, by name.
        score: the mean intersection over union, between 0 and 1.
        pixel_accuracy: the fraction of labelled pixels that are right.
        recalled: whether the numbers were read from the log rather than computed.
    """

    parameters: dict[str, Any]
    score: float
    pixel_accuracy: float
    recalled: bool


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        best: the preset of the best candidate; of several equally good ones, the first.
        score: its mean intersection over union, between 0 and 1.
        trials: every candidate, in the order of the search.
        unrefined: the mean intersection over union of the unaries by themselves.
        at_edge: fields whose best value is the smallest or largest of its range, beyond which there may be
            better ones.
    """

    best: Preset
    score: float
    trials: tuple[Trial, ...]
    unrefined: float
    at_edge: tuple[str, ...]


def search(
    examples: Examples,
    *,
    method: Method = "densecrf",
    preset: str | os.PathLike | Preset | None = None,
    space: Mapping[str, Iterable[Any]] | None = None,
    unary: Unary = "probs",
    ignore_label: int | None = 255,
    coarse: int = 3,
    refinements: int = 1,
    log: str | os.PathLike | None = None,
    progress: bool = True,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    r"""Searches, coarse to fine, for the parameters that segment held-out images best.

    Of the parameters `θ` of a grid it looks for those with the largest mean intersection over union,

    .. math::
        \hat θ = \operatorname*{argmax}_θ\ \mathrm{mIoU}\Bigl( \sum_n C\bigl(y_n, \hat y_n(θ)\bigr) \Bigr),
        \qquad \hat y_{ni}(θ) = \operatorname*{argmax}_l\ q_{ni}(l; θ),

    with `C` the confusion counts of image `n` and `q` its mean-field marginals. The first round tries every
    `coarse`-th value of every range in all combinations. Then the best candidate's neighbours on the full
    grid are tried, one step along any combination of ranges, until none is better. Finally the steps are halved
    `refinements` times, with the same walk after each. Numbers are ranges in this sense; fields that are not
    (`normalization`, bandwidths per axis or None) are tried with all their values in every round.

    Every image is read once per filter, that is, per combination of values other than weights, and once in the
    beginning; nothing is kept. The values of `position_bandwidth`, `num_iterations`, `normalization`,
    `filter_size` and `blur` are static, and each compiles anew; those of weights and the other bandwidths do not.

    Args:
        examples: `(image, unary, labels)` of every held-out image: images `[*spatial, channels]`, or `[*spatial]`
            for one channel, in the units of the colour bandwidth (0 to 255); unaries `[*spatial, L]`; true labels
            `[*spatial]`, integers. A list, anything else that can be walked through repeatedly (and may read
            files as it is), or a function that returns an iterator. Sizes may differ, `L` may not.
        method: "densecrf", fully connected with `filters.Lattice`, or "convcrf" with `filters.Window`.
        preset: the parameters that are not searched: a name, a file or a `Preset`. None is `PRESETS[method]`:
            for "densecrf" position weight and bandwidth 3 and ten iterations, as in DeepLab.
        space: values per field of `Preset`. None is `SPACES[method]`: for "densecrf" `bilateral_weight` 5 to 10,
            `bilateral_position_bandwidth` 50 to 100 in steps of 10 and `bilateral_color_bandwidth` 3 to 10.
        unary: whether unaries are "probs", summing to one, or "logits".
        ignore_label: pixels of this true label do not count; None for no such label.
        coarse: the stride of the first round; 1 tries the whole grid.
        refinements: how many times the steps are halved. The weights and bandwidths only; numbers of iterations
            and sizes stay on the grid.
        log: a file to which every candidate is added as it is finished, one JSON object a line. If it exists,
            candidates found in it are not computed again, so that an interrupted search goes on where it was, and
            one with other `coarse` or `refinements` begins with what is known.
        progress: draw a progress bar on the standard error stream.
        on_trial: called with every candidate when it is finished and logged, or recalled.

    Returns:
        `SearchResult(best, score, trials, unrefined, at_edge)`; write `best` with `jaxcrf.presets.save`.

    Raises:
        TypeError: if `examples` can be walked through only once.
        ValueError: on examples that do not fit together or hold no label that counts, fields or values that a
            preset does not have, or a log of another search (other images, method, space or preset): the message
            says what differs. Also if a candidate's bandwidths are too small for the lattice.
        OSError: if the log cannot be written to.

    Warns:
        UserWarning: if a floating-point image has no value above 1, and so probably is not in 0 to 255.

    Example:
        >>> import numpy as np, jaxcrf
        >>> image = np.zeros((16, 16, 3), np.uint8)
        >>> image[:, 8:] = 255
        >>> truth = image[..., 0] // 255
        >>> noisy = truth.copy()
        >>> noisy[3:5, 3:5] = 1
        >>> probs = np.where(noisy[..., None] == [0, 1], 0.6, 0.4)
        >>> found = search(
        ...     [(image, probs, truth)],
        ...     preset=jaxcrf.Preset(position_weight=0),
        ...     space={"bilateral_weight": [0.001, 0.1, 10], "bilateral_color_bandwidth": [5, 13]},
        ...     progress=False,
        ... )
        >>> round(found.unrefined, 2), found.score, found.best.bilateral_weight
        (0.97, 1.0, 10.0)

    References:
        Chen, Papandreou, Kokkinos, Murphy and Yuille, *Semantic Image Segmentation with Deep Convolutional Nets
        and Fully Connected CRFs* (DeepLab), 2015, §4.
    """
    base, axes = read_space(method, preset, space)
    if unary not in get_args(Unary):
        raise ValueError(f"unary: got {unary!r}; expected one of {', '.join(get_args(Unary))}")
    for name, number, least in (("coarse", coarse, 1), ("refinements", refinements, 0)):
        if not _checks.is_whole(number) or number < least:
            raise ValueError(f"{name}: got {number!r}; expected a whole number >= {least}")
    walk = _walker(examples)
    with _progress_bar(progress) as bar:
        data = _survey(walk, unary, ignore_label, bar)
        task = _Task(walk, data, method, base, axes, unary, ignore_label)
        record = _Log(None if log is None else Path(log), task)

        known: dict[_Candidate, Trial] = {}
        plan: dict[_Candidate, None] = {}  # their order, in which no log has a part
        best: _Candidate | None = None
        rounds = 0
        for level in _levels(axes, coarse, refinements):
            while True:
                nearby = level if best is None else [a.near(v) for a, v in zip(level, best, strict=True)]
                new = [c for c in itertools.product(*(axis.values for axis in nearby)) if c not in plan]
                plan |= dict.fromkeys(new)
                recalled = [c for c in new if c in record.found]
                groups = task.groups(c for c in new if c not in record.found)
                if groups:
                    rounds += 1
                    score = "" if best is None else f", best {known[best].score:.2%}"
                    bar.begin(f"Round {rounds}{score}", len(groups) * len(data.sizes))
                found = itertools.chain(
                    [{c: record.found[c] for c in recalled}], (record.add(task.run(g, bar)) for g in groups)
                )
                for trials in found:
                    known |= trials
                    if on_trial is not None:
                        for trial in trials.values():
                            on_trial(trial)
                first, was = best is None, best
                best = max(plan, key=lambda c: known[c].score)
                if first or best == was:
                    break

    assert best is not None
    images = f"{len(data.sizes)} image{'s' if len(data.sizes) > 1 else ''}"
    summary = (
        f"{method}, searched on {images}: mean IoU {known[best].score:.2%} (unaries {data.unrefined:.2%})"
    )
    ranges = [(axis, value) for axis, value in zip(axes, best, strict=True) if axis.is_range]
    return SearchResult(
        best=dataclasses.replace(task.preset(best), summary=summary),
        score=known[best].score,
        trials=tuple(known[c] for c in plan),
        unrefined=data.unrefined,
        at_edge=tuple(
            axis.name
            for axis, value in ranges
            if len(axis.values) > 1 and value in (axis.values[0], axis.values[-1])
        ),
    )


# The space.

# The values of one candidate, in the order of the axes.
_Candidate: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The values of one parameter, ascending if they are a range of numbers."""

    name: str
    values: tuple[Any, ...]
    is_range: bool

    def every(self, stride: int) -> "_Axis":
        """Every so many values, as much in the middle as may be."""
        begin = (len(self.values) - 1) % stride // 2
        return dataclasses.replace(self, values=self.values[begin::stride]) if self.is_range else self

    def near(self, value: Any) -> "_Axis":
        """A value and its neighbours."""
        if not self.is_range:
            return self
        here = self.values.index(value)
        return dataclasses.replace(self, values=self.values[max(here - 1, 0) : here + 2])

    def halved(self) -> "_Axis":
        """With a value in the middle of every two."""
        if not self.is_range or self.name in _WHOLE:
            return self
        middles = {(low + high) / 2 for low, high in itertools.pairwise(self.values)}
        return dataclasses.replace(self, values=tuple(sorted(middles | set(self.values))))


def _levels(axes: list[_Axis], coarse: int, refinements: int) -> Iterator[list[_Axis]]:
    if coarse > 1:
        yield [axis.every(coarse) for axis in axes]
    yield axes
    for _ in range(refinements):
        axes = [axis.halved() for axis in axes]
        yield axes


def read_space(
    method: Method, preset: str | os.PathLike | Preset | None, space: Mapping[str, Iterable[Any]] | None
) -> tuple[Preset, list[_Axis]]:
    """Reads the arguments of `search` that say what is to be searched.

    Args:
        method: as in `search`.
        preset: likewise.
        space: likewise.

    Returns:
        The preset to vary, and one axis per field that is searched.

    Raises:
        ValueError: if the method or a field is unknown, or a value is out of range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(get_args(Method))}")
    preset = PRESETS[method] if preset is None else preset
    base = preset if isinstance(preset, Preset) else presets.get(preset)
    space = SPACES[method] if space is None else space
    if not space:
        raise ValueError("space: is empty; name at least one field of Preset and its values")
    axes = []
    for name, given in space.items():
        if name not in _FIELDS:
            close = difflib.get_close_matches(str(name), _FIELDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"space: got {name!r}; expected fields of Preset: {', '.join(_FIELDS)}{hint}")
        if method != "convcrf" and name in _WINDOW_ONLY:
            raise ValueError(f"space: {name} has no effect on method {method!r}; leave it out")
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise ValueError(f"space: {name}: got {given!r}; expected a list of values")
        values = []
        for value in given:
            try:
                changed = dataclasses.replace(base, **{name: _plain(value)})
            except ValueError as error:
                raise ValueError(f"space: {error}") from error
            if getattr(changed, name) not in values:
                values.append(getattr(changed, name))
        if not values:
            raise ValueError(f"space: {name}: got no values; expected at least one")
        is_range = all(isinstance(value, (int, float)) for value in values)
        axes.append(_Axis(name, tuple(sorted(values) if is_range else values), is_range))
    if all(0 in values for values in _kernel_weights(base, axes).values()):
        raise ValueError(
            "space: position_weight and bilateral_weight may both be 0, which leaves no kernel; take 0 out of "
            "one of them"
        )
    return base, axes


def _kernel_weights(base: Preset, axes: Sequence[_Axis]) -> dict[str, tuple[float, ...]]:
    """All values that the weight of each kernel takes."""
    values = {axis.name: axis.values for axis in axes}
    return {
        name: values.get(name, (getattr(base, name),)) for name in ("position_weight", "bilateral_weight")
    }


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's, and lists as tuples."""
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray, Array)) else value
    return tuple(value) if isinstance(value, list) else value


# The images.


def _walker(examples: Examples) -> Callable[[], Iterable[Example]]:
    """A function that begins anew with the examples."""
    if isinstance(examples, Iterable):
        if iter(examples) is examples:
            raise TypeError(
                f"examples: got {type(examples).__name__}, which can be walked through only once; pass a list, or "
                "a function that returns a new iterator at each call"
            )
        return lambda: examples
    if not callable(examples):
        raise TypeError(
            f"examples: got {type(examples).__name__}; expected (image, unary, labels) of every image, as a list "
            "or a function that returns an iterator"
        )
    return examples


class _Data(NamedTuple):
    """What is known of the images after a first look."""

    sizes: tuple[tuple[int, ...], ...]
    shapes: dict[tuple[int, ...], tuple[int, ...]]  # by size: what to pad to
    num_labels: int
    fingerprint: str
    unrefined: float


def _survey(
    walk: Callable[[], Iterable[Example]], unary: Unary, ignore_label: int | None, bar: "_ProgressBar"
) -> _Data:
    """Walks through all images once, to check them, to tell them from others and to know their sizes."""
    digest = hashlib.blake2b(digest_size=16)
    sizes: list[tuple[int, ...]] = []
    num_labels: int | None = None
    channels: int | None = None
    counts: Any = 0
    bar.begin("Reading", None)
    for example in walk():
        where = f"example {len(sizes)}"
        try:
            image, values, labels = _check(example, unary, ignore_label)
            for name, number, expected in (
                ("image", image.shape[-1], channels),
                ("unary", values.shape[-1], num_labels),
            ):
                if expected not in (None, number):
                    what = "channels" if name == "image" else "labels"
                    raise ValueError(f"{name}: got {number} {what}, but the first example has {expected}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        channels, num_labels = image.shape[-1], values.shape[-1]
        for array in (image, values, labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        sizes.append(labels.shape)
        best = values.argmax(-1).astype(np.int32)
        counts = counts + np.asarray(confusion_matrix(labels, best, num_labels, ignore_label), np.int64)
        bar.advance()
    if num_labels is None:
        raise ValueError("examples: got none; expected at least one image")
    if not np.sum(counts):
        raise ValueError(
            f"examples: no pixel of any label map counts (ignore_label={ignore_label}), so there is nothing to "
            "score by"
        )
    return _Data(
        sizes=tuple(sizes),
        shapes=_common_shapes(sizes),
        num_labels=num_labels,
        fingerprint=digest.hexdigest(),
        unrefined=float(mean_iou(counts)),
    )


def _check(example: Any, unary: Unary, ignore_label: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not isinstance(example, (tuple, list)) or len(example) != 3:
        raise TypeError(f"got {type(example).__name__}; expected (image, {unary}, labels)")
    image, values, labels = _arrays(example)
    spatial = labels.shape
    if labels.ndim not in (1, 2, 3):
        raise ValueError(f"labels: got shape {spatial}; expected 1, 2 (images) or 3 (volumes) axes")
    for name, array, last in (("image", image, "channels"), (unary, values, "labels")):
        if array.shape[:-1] != spatial or array.size == 0:
            raise ValueError(
                f"{name}: got shape {array.shape}; expected {(*spatial, last)}, as the labels have"
            )
    if image.dtype.kind not in "uif":
        raise ValueError(f"image: got dtype {image.dtype}; expected 8-bit values or numbers from 0 to 255")
    _checks.check_finite("image", jnp.asarray(image))
    if image.dtype.kind == "f" and image.max() <= 1:
        warnings.warn(
            "image: floating point with no value above 1; bandwidths are in units of 0 to 255, so multiply the "
            "image by 255",
            UserWarning,
            stacklevel=5,
        )
    if unary == "probs":
        _checks.check_probs("probs", jnp.asarray(values))
    elif values.dtype.kind != "f":
        raise ValueError(f"logits: got dtype {values.dtype}; expected floating point")
    else:
        _checks.check_finite("logits", jnp.asarray(values))
    _checks.check_labels("labels", labels, values.shape[-1], ignore_label)
    return image, values, labels


def _arrays(example: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, values, labels = (np.asarray(x) for x in example)
    return (image[..., None] if image.shape == labels.shape else image), values, labels


def _common_shapes(sizes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For every size the shape that it is padded to: the same for sizes that are nearly the same."""
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for size in sizes:
        groups.setdefault(tuple(-(-n // _SHAPE_STEP) for n in size), set()).add(size)
    return {size: tuple(map(max, *group, size)) for group in groups.values() for size in group}


# The candidates.


@dataclasses.dataclass(frozen=True)
class _Task:
    """What every candidate is tried on, and how."""

    walk: Callable[[], Iterable[Example]]
    data: _Data
    method: Method
    base: Preset
    axes: list[_Axis]
    unary: Unary
    ignore_label: int | None

    def preset(self, candidate: _Candidate) -> Preset:
        return dataclasses.replace(self.base, **self.parameters(candidate))

    def parameters(self, candidate: _Candidate) -> dict[str, Any]:
        return {axis.name: value for axis, value in zip(self.axes, candidate, strict=True)}

    @functools.cached_property
    def kernels(self) -> tuple[str, ...]:
        """The weights of the kernels that there are; those of weight 0 throughout are left out."""
        return tuple(name for name, values in _kernel_weights(self.base, self.axes).items() if any(values))

    def groups(self, candidates: Iterable[_Candidate]) -> list[list[_Candidate]]:
        """Candidates that differ in nothing but weights, together."""
        groups: dict[_Candidate, list[_Candidate]] = {}
        for c in candidates:
            key = tuple(v for axis, v in zip(self.axes, c, strict=True) if axis.name not in _WEIGHTS)
            groups.setdefault(key, []).append(c)
        return list(groups.values())

    def run(self, candidates: list[_Candidate], bar: "_ProgressBar") -> tuple[dict[_Candidate, Trial], float]:
        """Tries candidates of one group on all images; also the seconds that each took."""
        start = time.perf_counter()
        tried = [self.preset(c) for c in candidates]
        room = max(_LEAST_ROOM, 1 << (len(tried) - 1).bit_length())
        weights = np.zeros((room, 1 + len(self.kernels)))
        for row, preset in zip(weights, tried, strict=False):
            row[:] = [preset.unary_weight, *(getattr(preset, name) for name in self.kernels)]
        totals = np.zeros((len(tried), self.data.num_labels, self.data.num_labels), np.int64)
        seen = 0
        for seen, example in enumerate(self.walk(), 1):
            image, values, labels = _arrays(example)
            if seen > len(self.data.sizes) or labels.shape != self.data.sizes[seen - 1]:
                raise ValueError(
                    f"example {seen - 1}: is not what it was at first; a search needs the same images"
                )
            try:
                k, shape = self._filter(image, tried[0])
                counts, finite = _confusions(
                    k,
                    _padded(values, (*shape, values.shape[-1]), 1),
                    # Labels out of range do not count.
                    _padded(labels.astype(np.int32), shape, -1),
                    weights,
                    len(tried),
                    num_iterations=tried[0].num_iterations,
                    unary=self.unary,
                    num_labels=self.data.num_labels,
                    ignore_label=self.ignore_label,
                )
                if not bool(finite):
                    raise ValueError(
                        "messages are not finite; take extreme weights or bandwidths out of the space"
                    )
            except ValueError as error:
                at = ", ".join(f"{name}={value}" for name, value in self.parameters(candidates[0]).items())
                raise ValueError(f"example {seen - 1}: at {at}: {error}") from error
            totals += np.asarray(counts, np.int64)[: len(tried)]
            bar.advance()
        if seen < len(self.data.sizes):
            raise ValueError(
                f"examples: got {seen}, and {len(self.data.sizes)} at first; a search needs the same"
            )
        trials = {
            c: Trial(self.parameters(c), float(mean_iou(cm)), float(pixel_accuracy(cm)), recalled=False)
            for c, cm in zip(candidates, totals, strict=True)
        }
        return trials, (time.perf_counter() - start) / len(tried)

    def _filter(self, image: np.ndarray, preset: Preset) -> tuple[Filter, tuple[int, ...]]:
        """The filter of an image with weights of one, and the shape of its maps."""
        size = image.shape[:-1]
        bandwidths = preset.bilateral_position_bandwidth, preset.bilateral_color_bandwidth
        if self.method == "convcrf":
            window = _window(
                jnp.asarray(image),
                bandwidths,
                kernels=self.kernels,
                position_bandwidth=preset.position_bandwidth,
                filter_size=preset.filter_size,
                blur=preset.blur,
                normalization=preset.normalization,
            )
            return window, size
        # What makes an unnormalised lattice sum like the Gaussian is fitted to whole images, so these stay as
        # they are.
        bare = preset.normalization == "none"
        shape = size if bare else self.data.shapes[size]
        features: list[Any] = []
        capacity = None
        if "position_weight" in self.kernels:
            features.append(position_features(shape, preset.position_bandwidth))
        if "bilateral_weight" in self.kernels:
            values = _isolated_features(_padded(image, (*shape, image.shape[-1]), 0), size, bandwidths)
            features.append(values)
            capacity = _rounded_up(int(_count_vertices(values)))
        lattice = Lattice(
            tuple(features),
            capacity=capacity,
            spatial_ndim=len(shape),
            scaling="gaussian" if bare else "continuous",
        )
        return (lattice if bare else _inside(lattice, size, preset.normalization)), shape


def _padded(array: np.ndarray, shape: tuple[int, ...], value: int) -> Array:
    if array.shape != shape:
        widths = [(0, n - own) for n, own in zip(shape, array.shape, strict=True)]
        array = np.pad(array, widths, constant_values=value)
    return jnp.asarray(array)


def _rounded_up(count: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << max(10, (count - 1).bit_length())
    return power * 3 // 4 if count <= power * 3 // 4 else power


@functools.partial(
    jax.jit, static_argnames=("kernels", "position_bandwidth", "filter_size", "blur", "normalization")
)
def _window(
    image: Array,
    bandwidths: Any,
    *,
    kernels: tuple[str, ...],
    position_bandwidth: Any,
    filter_size: Any,
    blur: int,
    normalization: Normalization,
) -> Filter:
    ndim = image.ndim - 1
    features = {
        "position_weight": lambda: position_features(image.shape[:-1], position_bandwidth),
        "bilateral_weight": lambda: bilateral_features(image, *bandwidths, spatial_ndim=ndim),
    }
    k = Window(tuple(features[name]() for name in kernels), filter_size, blur=blur, spatial_ndim=ndim)
    return k.normalized(normalization)


def _is_inside(shape: tuple[int, ...], size: Any) -> Array:
    inside = jnp.ones(shape, bool)
    for axis, n in enumerate(size):
        inside &= lax.broadcasted_iota(jnp.int32, shape, axis) < n
    return inside


@jax.jit
def _isolated_features(image: Array, size: Any, bandwidths: Any) -> Array:
    """Bilateral features, those of the padding in one point far from all others."""
    values = bilateral_features(image, *bandwidths, spatial_ndim=image.ndim - 1).values
    inside = _is_inside(image.shape[:-1], size)[..., None]
    lowest = jnp.min(values, axis=range(image.ndim - 1), where=inside, initial=jnp.inf)
    return jnp.where(inside, values, lowest - _FAR)


@jax.jit
def _count_vertices(features: Array) -> Array:
    # Nothing else of this lattice is computed.
    k = Lattice(features, capacity=1, spatial_ndim=features.ndim - 1, scaling="continuous")
    return k.num_vertices[0]


@functools.partial(jax.jit, static_argnames="kind")
def _inside(k: Lattice, size: Any, kind: Normalization) -> Lattice:
    """The normalised filter over the pixels that are not padding: what padding sends counts for nothing."""
    inside = _is_inside(k.spatial, size)
    mask = inside.astype(k.weights.dtype)
    scales = []
    for kernel in k.kernels:
        one = k.replace(kernels=(kernel,), weights=k.weights[:1], left=(None,), right=(None,))
        left, right = normalizing_scales(one(mask[..., None])[..., 0], kind)
        scales.append((None if left is None else left * mask, mask if right is None else right * mask))
    lefts, rights = zip(*scales, strict=True)
    return k.replace(left=lefts, right=rights, symmetric_scales=kind == "symmetric")


@functools.partial(jax.jit, static_argnames=("num_iterations", "unary", "num_labels", "ignore_label"))
def _confusions(
    k: Any,
    values: Array,
    labels: Array,
    weights: Array,
    count: Array,
    *,
    num_iterations: int,
    unary: Unary,
    num_labels: int,
    ignore_label: int | None,
) -> tuple[Array, Array]:
    """The confusion counts of one image with each of the first `count` sets of weights.

    One after the other, and not by `vmap`: memory is that of one, and a CPU has nothing to gain from wider maps.

    Args:
        k: the filter.
        values: the unaries `[*spatial, L]`.
        labels: the truth `[*spatial]`.
        weights: `[room, 1 + kernels]`, of the unary and of the kernels.
        count: how many of them there are.
        num_iterations: of mean field.
        unary: what the unaries are.
        num_labels: `L`.
        ignore_label: the label of pixels that do not count.

    Returns:
        Counts `[room, L, L]`, and whether all marginals were finite.
    """
    logits = unary_from_probs(values) if unary == "probs" else _checks.as_float(values)

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        counts, finite = state
        w = _checks.as_float(weights[i])
        result = mean_field(
            logits, k.replace(weights=w[1:]), num_iterations=num_iterations, unary_weight=w[0]
        )
        best = jnp.argmax(result.probs, axis=-1).astype(jnp.int32)
        counts = counts.at[i].set(confusion_matrix(labels, best, num_labels, ignore_label))
        return counts, finite & ~jnp.isnan(result.stats.residual)

    start = jnp.zeros((len(weights), num_labels, num_labels), jnp.int32), jnp.ones((), bool)
    return lax.fori_loop(0, count, add, start)


# The log.


class _Log:
    """Finished candidates in a file: what is searched in the first line, then one candidate a line.

    Attributes:
        found: the candidates that were in the file.
    """

    def __init__(self, path: Path | None, task: _Task):
        self.path = path
        self.found: dict[_Candidate, Trial] = {}
        self._task = task
        if path is None:
            return
        identity = _identity(task)
        content = path.read_bytes() if path.exists() else b""
        if not content:
            from jaxcrf.data.images import replacing

            with replacing(path) as file:
                file.write(_json_line(identity))
            return
        # What follows the last line break was cut off while it was written.
        *lines, rest = content.split(b"\n")
        first = _parsed(lines[0]) if lines else None
        if first is None or "jaxcrf_search" not in first:
            raise ValueError(f"log: {path} exists and is not the log of a search; pass another file")
        there, here = _flattened(first), _flattened(json.loads(_json_line(identity)))
        different = [
            f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in (there | here)
            if there.get(name) != here.get(name)
        ]
        if different:
            raise ValueError(
                f"log: {path} belongs to another search: {'; '.join(different)}. Pass another file, or remove it to "
                "begin anew"
            )
        for number, line in enumerate(lines[1:], 2):
            self._recall(line, number)
        if rest:
            with path.open("r+b") as file:
                file.truncate(len(content) - len(rest))

    def _recall(self, line: bytes, number: int) -> None:
        parsed = _parsed(line) or {}
        parameters = parsed.get("parameters")
        score, accuracy = parsed.get("mean_iou"), parsed.get("pixel_accuracy")
        if (
            not isinstance(parameters, dict)
            or set(parameters) != {axis.name for axis in self._task.axes}
            or not (isinstance(score, float) and 0 <= score <= 1)
            or not (isinstance(accuracy, float) and 0 <= accuracy <= 1)
        ):
            raise ValueError(
                f"log: {self.path}, line {number}: is not a candidate of this search; take the line out, or remove "
                "the file to begin anew"
            )
        candidate = tuple(_plain(parameters[axis.name]) for axis in self._task.axes)
        self.found[candidate] = Trial(self._task.parameters(candidate), score, accuracy, recalled=True)

    def add(self, finished: tuple[dict[_Candidate, Trial], float]) -> dict[_Candidate, Trial]:
        """Appends candidates in one piece and hands them back."""
        trials, seconds = finished
        if self.path is not None:
            lines = [
                _json_line(
                    {
                        "parameters": trial.parameters,
                        "mean_iou": trial.score,
                        "pixel_accuracy": trial.pixel_accuracy,
                        "seconds": round(seconds, 3),
                    }
                )
                for trial in trials.values()
            ]
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        return trials


def _identity(task: _Task) -> dict[str, Any]:
    """All that a candidate's score depends on, and the space."""
    searched = {axis.name: list(axis.values) for axis in task.axes}
    irrelevant = {"summary", *searched, *(() if task.method == "convcrf" else _WINDOW_ONLY)}
    return {
        "jaxcrf_search": _LOG_FORMAT,
        "images": len(task.data.sizes),
        "fingerprint": task.data.fingerprint,
        "unary": task.unary,
        "ignore_label": task.ignore_label,
        "method": task.method,
        "space": searched,
        "preset": {k: v for k, v in dataclasses.asdict(task.base).items() if k not in irrelevant},
    }


def _flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, with dots in its names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": x for inner, x in value.items()}
        else:
            flat[name] = value
    return flat


def _json_line(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(line)
        if isinstance(parsed, dict):
            return parsed
    return None


# The progress bar.


class _ProgressBar:
    """One bar that is used for one round after the other, or nothing at all."""

    def __init__(self, progress: Any):
        self._progress = progress
        self._task = None if progress is None else progress.add_task("", total=None)

    def begin(self, title: str, total: int | None) -> None:
        if self._progress is not None:
            self._progress.reset(self._task, description=title, total=total)

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)


@contextlib.contextmanager
def _progress_bar(shown: bool) -> Iterator[_ProgressBar]:
    if not shown:
        yield _ProgressBar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _ProgressBar(progress)

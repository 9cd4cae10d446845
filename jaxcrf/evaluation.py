"""Evaluation of anything that labels images on a data set: totals, tables, curves, and its worst and best images."""

import dataclasses
import heapq
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Int64, Num, UInt8

from jaxcrf import metrics
from jaxcrf.metrics import (
    LabelRow,
    ObjectCounts,
    ObjectScores,
    PrecisionRecallCurve,
    ThresholdCounts,
    TrimapCounts,
    TrimapCurve,
)
from jaxcrf.metrics.boundaries import Around

# Counting compiles once per size, so sizes are rounded up to multiples of this.
_GRANULE = 64


class Source(Protocol):
    """A sequence of `(image, labels)` that knows its labels, such as `jaxcrf.data.SegmentationFolder`."""

    @property
    def label_names(self) -> Sequence[str]:
        """What the labels 0, 1, … stand for."""

    @property
    def ignore_label(self) -> int | None:
        """The label of void pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """How well one image is labelled.

    Attributes:
        index: its place in the source.
        name: its name there, or its place.
        mean_iou: over the labels that it has or is given; NaN if no pixel counts.
        accuracy: the fraction of its pixels that are labelled correctly; NaN if none counts.
    """

    index: int
    name: str
    mean_iou: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that is to be looked at.

    Attributes:
        score: whose it is, and its scores.
        image: uint8 `[H, W, 3]`.
        truth: int32 `[H, W]`.
        prediction: int32 `[H, W]`.
        before: what was refined to the prediction, int32 `[H, W]`; None if nothing was.
        before_score: its scores.
    """

    score: ImageScore
    image: UInt8[np.ndarray, "height width 3"]
    truth: Int[np.ndarray, "height width"]
    prediction: Int[np.ndarray, "height width"]
    before: Int[np.ndarray, "height width"] | None = None
    before_score: ImageScore | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        label_names: what the labels 0, 1, … stand for.
        ignore_label: the true label of pixels that do not count.
        images: the scores of every image, in the order of the source.
        confusion: counts of all pixels `[L, L]`, row = truth.
        trimap: accuracy and mean IoU against the distance to boundaries.
        around: what the trimap's bands are around.
        objects: tagging, localisation and boundary accuracy of every label.
        background: the label that is no object; None if there is none.
        saliency: with two labels and probabilities, precision and recall of label 1; otherwise None.
        worst: the images with the lowest mean IoU, the lowest first.
        best: those with the highest, the highest first; none that is among the worst.
        seconds: what predictions took, compilation included, of all images.
        baseline: the evaluation of what was refined; None if nothing was.
    """

    label_names: tuple[str, ...]
    ignore_label: int | None
    images: tuple[ImageScore, ...]
    confusion: Int64[np.ndarray, "labels labels"]
    trimap: TrimapCurve
    around: Around
    objects: ObjectScores
    background: int | None
    saliency: PrecisionRecallCurve | None
    worst: tuple[Picture, ...]
    best: tuple[Picture, ...]
    seconds: float
    baseline: "Evaluation | None" = None

    def totals(self) -> dict[str, float]:
        """The figures of the whole data set by their names, fractions from 0 to 1; NaN where one is not defined."""
        tagging, localization, boundary = (float(mean) for mean in self.objects.means())
        figures = {
            "mean_iou": float(metrics.mean_iou(self.confusion)),
            "pixel_accuracy": float(metrics.pixel_accuracy(self.confusion)),
            "class_accuracy": float(metrics.class_accuracy(self.confusion)),
            "tagging_accuracy": tagging,
            "localization_accuracy": localization,
            "boundary_accuracy": boundary,
        }
        if self.saliency is not None:
            figures["max_f_measure"] = float(self.saliency.f_measure().max())
        return figures

    def table(self) -> list[LabelRow]:
        """What is known of every label, a row each; `objects` has the rest."""
        return metrics.per_class_table(self.confusion, self.label_names)

    def as_dict(self) -> dict[str, Any]:
        """All numbers as JSON can hold them, None where one is not defined; without the pictures."""
        objects = self.objects._asdict()
        per_class = [
            {**row._asdict(), **{name: values[row.label] for name, values in objects.items()}}
            for row in self.table()
        ]
        result = {
            "label_names": list(self.label_names),
            "ignore_label": self.ignore_label,
            "num_images": len(self.images),
            "seconds": self.seconds,
            "totals": self.totals(),
            "per_class": per_class,
            "confusion": self.confusion,
            "trimap": {"around": self.around, **self.trimap._asdict()},
            "background": self.background,
            "saliency": None if self.saliency is None else self.saliency._asdict(),
            "images": [dataclasses.asdict(score) for score in self.images],
            "baseline": None if self.baseline is None else self.baseline.as_dict(),
        }
        return _plain(result)

    def save_json(self, path: str | os.PathLike, *, source: str | Path | None = None) -> None:
        """Writes all numbers with the circumstances they were obtained in, whole or not at all.

        Args:
            path: the file; its folder is made.
            source: a file of the checkout whose commit is meant; None leaves the commit out.

        Raises:
            OSError: if the folder cannot be written to.
        """
        from jaxcrf import reporting

        results = {**self.as_dict(), "circumstances": reporting.circumstances(source)}
        reporting.write_json(Path(path), results)

    def save_html(
        self,
        path: str | os.PathLike,
        *,
        title: str = "Evaluation",
        notes: str = "",
        palette: UInt8[np.ndarray, "colors 3"] | None = None,
        source: str | Path | None = None,
    ) -> None:
        """Writes a report as one HTML file that needs nothing else, whole or not at all.

        Args:
            path: the file; its folder is made.
            title: the heading.
            notes: a line below it, such as what was evaluated on what.
            palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
            source: a file of the checkout whose commit is meant; None leaves the commit out.

        Raises:
            OSError: if the folder cannot be written to.
        """
        from jaxcrf import reporting
        from jaxcrf.data.images import replacing
        from jaxcrf.report import render

        text = render(
            self,
            title=title,
            notes=notes,
            palette=palette,
            circumstances=reporting.circumstances(source),
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())


def evaluate(
    predict: Callable[[Any], Any],
    source: Source,
    *,
    batch_size: int | None = None,
    refine: Callable[[Any, Any], Any] | None = None,
    around: Around = "labels",
    widths: Sequence[int] = metrics.boundaries.TRIMAP_WIDTHS,
    background: int | None = None,
    num_pictures: int = 4,
    on_image: Callable[[ImageScore], object] | None = None,
) -> Evaluation:
    """Scores what labels images against the truth of a data set.

    Images may differ in size, and are read one at a time. Nothing of them is kept but the worst and the best.

    Args:
        predict: gives an image `[H, W, 3]`, uint8, its labels `[H, W]`, integers, or its probabilities `[H, W, L]`,
            floats, of which the largest wins (so do logits; only the precision-recall curve needs probabilities).
        source: `(image, labels)` with `label_names` and `ignore_label`, such as a `jaxcrf.data.SegmentationFolder`;
            `names`, if it has some, are its images' names.
        batch_size: None, or how many images `predict` is called with at a time, `[B, H, W, 3]` to `[B, H, W]` or
            `[B, H, W, L]`. Neighbours of one size make a batch; one that is not full is filled up with copies, so that
            a jitted function compiles once per size.
        refine: if given, called with every image and what `predict` gave it; its result is evaluated, and that of
            `predict` alone is the `baseline`.
        around: what the bands of the trimap curve are around: `"labels"`, changes of label; or `"void"`, which outlines
            the objects of Pascal VOC.
        widths: the bands' widths in pixels, increasing.
        background: a label that is no object for tagging, localisation and boundary accuracy, such as 0 for Pascal VOC.
        num_pictures: how many of the worst images, and of the best, are kept.
        on_image: called with the scores of every image, for instance to show progress.

    Returns:
        The evaluation, to be looked at or written by its `save_json` and `save_html`.

    Raises:
        ValueError: if the source is empty, a prediction does not fit its image or its labels, or an option is out of
            range; the image is named.
        TypeError: if a prediction is neither integers nor floats.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Source:
        ...     examples: list
        ...     label_names: tuple = ("sky", "tree")
        ...     ignore_label: int = 255
        ...     def __len__(self):
        ...         return len(self.examples)
        ...     def __getitem__(self, index):
        ...         return self.examples[index]
        >>> image = np.zeros((4, 6, 3), np.uint8)
        >>> image[:, 3:] = 200
        >>> truth = image[..., 0] // 200
        >>> result = evaluate(lambda image: (image[..., 0] > 100).astype(int), Source([(image, truth)]))
        >>> result.totals()["mean_iou"], result.images[0].accuracy
        (1.0, 1.0)
    """
    label_names, ignore_label = tuple(map(str, source.label_names)), source.ignore_label
    if len(source) == 0:
        raise ValueError("source: got no images; expected one at least, so check its folder or its split")
    if not label_names:
        raise ValueError("source: got no label_names; name every label")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; expected at least 1, or None for images alone")
    if num_pictures < 0:
        raise ValueError(f"num_pictures: got {num_pictures}; expected at least 0")
    settings = _Settings(label_names, ignore_label, around, tuple(widths), background, num_pictures)
    names = getattr(source, "names", None)
    result = _Accumulator(settings)
    baseline = None if refine is None else _Accumulator(dataclasses.replace(settings, num_pictures=0))
    predicting, refining = _Stopwatch(), _Stopwatch()
    for example in _predicted(predicting, predict, source, names, batch_size):
        if refine is None or baseline is None:
            score, _ = result.add(example, example.prediction, None)
        else:
            refined = refining(refine, example.image, example.prediction)
            before = baseline.add(example, example.prediction, None)
            score, _ = result.add(example, refined, before)
        if on_image is not None:
            on_image(score)
    unrefined = None if baseline is None else baseline.result(predicting.seconds, None)
    return result.result(predicting.seconds + refining.seconds, unrefined)


class _Stopwatch:
    """Calls functions, and knows how long that took in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> np.ndarray:
        start = time.perf_counter()
        # As an array of NumPy it has been waited for.
        result = np.asarray(function(*arguments))
        self.seconds += time.perf_counter() - start
        return result


class Predictor:
    """A model as a jitted function of a batch of images, for `evaluate` with a batch size.

    Attributes:
        state: the model's variables.
    """

    def __init__(self, model: Any) -> None:
        from flax import nnx

        graph, self.state = nnx.split(model)

        def probabilities(state: Any, images: Array) -> Array:
            logits = nnx.merge(graph, state)(images.astype(jnp.float32))
            return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

        self._jitted = jax.jit(probabilities)

    def __call__(
        self, images: Num[Any, "batch height width channels"]
    ) -> Float[Array, "batch height width labels"]:
        """Probabilities of images in 0 … 255."""
        return self._jitted(self.state, jnp.asarray(images))

    def lower(self, images: jax.ShapeDtypeStruct) -> Any:
        """What `jax.jit(…).lower` gives for images like these."""
        return self._jitted.lower(self.state, images)


def make_predictor(model: Any) -> Predictor:
    """Makes a function that `evaluate` can call out of a model.

    Args:
        model: a `flax.nnx.Module` in evaluation mode that maps images in 0 … 255, `[B, H, W, 3]`, to logits
            `[B, H, W, L]`.

    Returns:
        A jitted function of images `[B, H, W, 3]` that gives probabilities; it compiles once per shape. Pass a
        `batch_size` to `evaluate` with it.

    Example:
        >>> from flax import nnx
        >>> predict = make_predictor(nnx.Conv(3, 2, (1, 1), rngs=nnx.Rngs(0)))
        >>> predict(np.zeros((1, 4, 6, 3), np.uint8)).shape
        (1, 4, 6, 2)
    """
    return Predictor(model)


@dataclasses.dataclass(frozen=True)
class _Settings:
    label_names: tuple[str, ...]
    ignore_label: int | None
    around: Around
    widths: tuple[int, ...]
    background: int | None
    num_pictures: int


@dataclasses.dataclass(frozen=True)
class _Example:
    index: int
    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


_Scored = tuple[ImageScore, np.ndarray]


class _Accumulator:
    """Counts of a data set that is walked through."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        count = len(settings.label_names)
        # Where there is no label for void, -1 is free: it pads images without being another label.
        self._void = -1 if settings.ignore_label is None else settings.ignore_label
        self._outside = min(-2, self._void - 1)
        self._confusion = np.zeros((count, count), np.int64)
        self._trimap = TrimapCounts.zeros(
            count, widths=settings.widths, around=settings.around, ignore_label=self._void
        )
        self._objects = ObjectCounts.zeros(count, background=settings.background, ignore_label=self._void)
        self._thresholds = ThresholdCounts.zeros(ignore_label=self._void) if count == 2 else None
        self._has_scores = False
        self._images: list[ImageScore] = []
        # Heaps whose first is the one that a worse or a better one replaces.
        self._worst: list[tuple[float, int, Picture]] = []
        self._best: list[tuple[float, int, Picture]] = []

    def add(self, example: _Example, prediction: np.ndarray, before: _Scored | None) -> _Scored:
        count = len(self.settings.label_names)
        truth = example.truth
        labels, scores = _read_prediction(example, prediction, count)
        counted = np.full(truth.shape, True)
        if self.settings.ignore_label is not None:
            counted = truth != self.settings.ignore_label
        strange = counted & ((truth < 0) | (truth >= count))
        if strange.any():
            raise ValueError(
                f"{example.name}: its truth holds the label {truth[strange][0]}; expected 0 to {count - 1} or "
                f"ignore_label {self.settings.ignore_label}"
            )
        strange = counted & ((labels < 0) | (labels >= count))
        if strange.any():
            raise ValueError(
                f"{example.name}: its prediction holds the label {labels[strange][0]} where the truth counts; expected "
                f"0 to {count - 1}"
            )
        # Void is truth that bands must not be around here, and around which they are there.
        bands_pad = self._outside if self.settings.around == "void" else self._void
        # Labels where the truth is void may be anything; padding has label 0.
        shown = np.where((labels < 0) | (labels >= count), count, labels).astype(np.int32)
        padded_truth, padded = _padded(truth, self._outside), _padded(shown, 0)
        cm = np.asarray(metrics.confusion_matrix(padded_truth, padded, count, self._void), np.int64)
        self._confusion += cm
        self._trimap = self._trimap.update(_padded(truth, bands_pad), padded)
        self._objects = self._objects.update(padded_truth, padded)
        if scores is not None and self._thresholds is not None:
            self._has_scores = True
            self._thresholds = self._thresholds.update(_padded(truth, self._void), _padded(scores, 0))
        score = ImageScore(
            example.index,
            example.name,
            float(metrics.mean_iou(cm)),
            float(metrics.pixel_accuracy(cm)),
        )
        self._images.append(score)
        if self.settings.num_pictures and not math.isnan(score.mean_iou):
            self._keep(
                Picture(
                    score,
                    example.image,
                    truth,
                    labels,
                    None if before is None else before[1],
                    None if before is None else before[0],
                )
            )
        return score, labels

    def _keep(self, picture: Picture) -> None:
        # Twice as many of the best: those that turn out to be among the worst too are left out in the end.
        for heap, sign, most in ((self._worst, -1, 1), (self._best, 1, 2)):
            entry = (sign * picture.score.mean_iou, -picture.score.index, picture)
            if len(heap) < most * self.settings.num_pictures:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)

    def result(self, seconds: float, baseline: Evaluation | None) -> Evaluation:
        worst = tuple(entry[2] for entry in sorted(self._worst, key=lambda e: e[:2], reverse=True))
        shown = {picture.score.index for picture in worst}
        best = [entry[2] for entry in sorted(self._best, key=lambda e: e[:2], reverse=True)]
        best = [picture for picture in best if picture.score.index not in shown]
        has_curve = self._has_scores and self._thresholds is not None
        return Evaluation(
            label_names=self.settings.label_names,
            ignore_label=self.settings.ignore_label,
            images=tuple(self._images),
            confusion=self._confusion,
            trimap=self._trimap.curve(),
            around=self.settings.around,
            objects=self._objects.scores(),
            background=self.settings.background,
            saliency=self._thresholds.curve() if has_curve and self._thresholds is not None else None,
            worst=worst,
            best=tuple(best[: self.settings.num_pictures]),
            seconds=seconds,
            baseline=baseline,
        )


def _predicted(
    call: _Stopwatch,
    predict: Callable[[Any], Any],
    source: Source,
    names: Sequence[str] | None,
    batch_size: int | None,
) -> Iterator[_Example]:
    """Examples with what is predicted for them, in the order of the source."""
    waiting: list[_Example] = []

    def flush() -> Iterator[_Example]:
        if not waiting or batch_size is None:
            return
        filled = [*waiting, *[waiting[-1]] * (batch_size - len(waiting))]
        predictions = call(predict, np.stack([example.image for example in filled]))
        if len(predictions) != batch_size:
            raise ValueError(
                f"predict: got a result of shape {predictions.shape} for {batch_size} images; expected one prediction "
                "per image"
            )
        yield from (dataclasses.replace(e, prediction=p) for e, p in zip(waiting, predictions, strict=False))
        waiting.clear()

    for index in range(len(source)):
        image, truth = (np.asarray(part) for part in source[index])
        name = str(index) if names is None else str(names[index])
        if image.ndim != 3 or truth.shape != image.shape[:2] or truth.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: the source gives an image of shape {image.shape} and labels of shape {truth.shape} and "
                f"dtype {truth.dtype}; expected [height, width, 3] and integers [height, width]"
            )
        example = _Example(index, name, image, truth.astype(np.int32), truth)
        if batch_size is None:
            yield dataclasses.replace(example, prediction=call(predict, image))
            continue
        if waiting and (len(waiting) == batch_size or waiting[0].image.shape != image.shape):
            yield from flush()
        waiting.append(example)
    yield from flush()


def _read_prediction(
    example: _Example, prediction: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels of a prediction, and of two labels' probabilities those of the second."""
    size = example.truth.shape
    height_and_width = f"{size[0]} x {size[1]}"
    if prediction.shape[:2] != size or prediction.ndim not in (2, 3):
        raise ValueError(
            f"{example.name}: its prediction has the shape {' x '.join(map(str, prediction.shape)) or 'of a number'}, "
            f"but the image is {height_and_width}; expected {height_and_width} labels, or {height_and_width} x {count} "
            "probabilities"
        )
    if prediction.ndim == 2:
        if prediction.dtype.kind not in "iu":
            raise TypeError(
                f"{example.name}: its prediction holds {prediction.dtype}; expected integer labels "
                f"{height_and_width}, or probabilities {height_and_width} x {count}"
            )
        return prediction.astype(np.int32), None
    if prediction.shape[2] != count:
        raise ValueError(
            f"{example.name}: its prediction has probabilities of {prediction.shape[2]} labels, but the data have "
            f"{count}; the label axis comes last"
        )
    # Of the scalar kinds that JAX adds, such as bfloat16, NumPy knows nothing.
    values = prediction.astype(np.float32) if prediction.dtype.kind != "f" else prediction
    if not np.isfinite(values).all():
        raise ValueError(f"{example.name}: its prediction holds NaN or infinite numbers")
    labels = values.argmax(-1).astype(np.int32)
    is_probability = count == 2 and values.min() >= 0 and values.max() <= 1
    return labels, values[..., 1].astype(np.float32) if is_probability else None


def _padded(a: np.ndarray, value: int) -> np.ndarray:
    return np.pad(a, [(0, -n % _GRANULE) for n in a.shape], constant_values=value)


def _plain(value: Any) -> Any:
    """Numbers as Python's, and None for those that JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Charts of numbers: confusions, per-class bars, and curves of scores."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jaxtyping import Num
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxcrf.metrics import PrecisionRecallCurve, TrimapCurve, mean_iou, per_class_iou
from jaxcrf.plots.pictures import TEXT, diverging, shaded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours again, those that differ in lightness first.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GRID = "#DDDDDD"
# More labels than this leave no room for numbers in the cells.
_MOST_NUMBERED = 24


def confusion_matrix(
    cm: Num[Array | np.ndarray, "labels labels"],
    label_names: Sequence[str] | None = None,
    *,
    cell_size: float = 0.36,
) -> Figure:
    r"""Shows what every true label is taken for.

    A cell is the share of the row, :math:`C_{kl} / \sum_l C_{kl}`, from white for none to dark for all, with its number
    in percent where there are not too many labels. Rows of labels that do not occur are empty.

    Args:
        cm: confusion counts `[L, L]`, row = truth.
        label_names: the labels' names; None for the numbers.
        cell_size: the side of a cell in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if `cm` is not square, or names are missing.

    Example:
        >>> figure = confusion_matrix(np.array([[3, 1], [0, 4]]), ["sky", "tree"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['75', '25', '100']
    """
    counts = np.asarray(cm).astype(np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"cm: got shape {counts.shape}; expected [labels, labels] from confusion_matrix")
    names = _named(len(counts), label_names)
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)

    figure, axes = _matrix(shaded(shares), names, cell_size, "truth", "predicted")
    if len(counts) <= _MOST_NUMBERED:
        for k, row in enumerate(shares):
            for l, share in enumerate(row):
                # A number that rounds to nothing would only be noise.
                if share >= 0.005:
                    color = "white" if share > 0.5 else "black"
                    axes.text(l, k, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    return figure


def compatibility(
    penalties: Num[Array | np.ndarray, "labels labels"],
    label_names: Sequence[str] | None = None,
    *,
    cell_size: float = 0.36,
) -> Figure:
    r"""Shows which labels go together: what each is penalised for each of the others.

    Soft-max does not see what is the same for all labels, so that every row is shown less its mean over the other
    labels. Labels that go together are blue, those that exclude each other orange; the scale is that of pairs of
    different labels.

    Args:
        penalties: `[L, L]`, row = the label that is there, column = the one that is penalised for it. Of the Deep
            Parsing Network `contexts.sum((0, 1)).mean(-1)`, if triple penalties are positive.
        label_names: the labels' names; None for the numbers.
        cell_size: the side of a cell in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if `penalties` is not square or not finite, or names are missing.

    Example:
        >>> figure = compatibility(np.array([[0.0, 2.0], [1.0, 0.0]]), ["sky", "tree"])
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['sky', 'tree']

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, fig. 4 (a).
    """
    numbers = np.asarray(penalties).astype(np.float64)
    if numbers.ndim != 2 or numbers.shape[0] != numbers.shape[1] or not numbers.size:
        raise ValueError(f"penalties: got shape {numbers.shape}; expected [labels, labels]")
    if not np.isfinite(numbers).all():
        raise ValueError("penalties: hold NaN or infinities; expected finite numbers")
    names = _named(len(numbers), label_names)
    others = ~np.eye(len(numbers), dtype=bool)
    numbers = numbers - numbers.mean(1, keepdims=True, where=others if len(numbers) > 1 else True)
    limit = np.abs(numbers).max(where=others, initial=0.0)
    figure, _ = _matrix(diverging(numbers, limit), names, cell_size, "label", "penalised")
    return figure


def _matrix(
    picture: np.ndarray, names: Sequence[str], cell_size: float, rows: str, columns: str
) -> tuple[Figure, "Axes"]:
    """A square of cells `[L, L, 3]`, with the labels' names at its left and on top."""
    side, margin = len(names) * cell_size, 0.1 + 0.085 * max(map(len, names)) + 0.3
    # Room for the titles of the axes, of however few labels.
    size = max(side, 0.8) + margin + 0.1
    figure = _figure(size, size)
    axes = figure.add_axes((margin / size, 1 - (margin + side) / size, side / size, side / size))
    axes.imshow(picture, interpolation="nearest")
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90, fontsize=9, color=TEXT)
    axes.set_yticks(ticks, names, fontsize=9, color=TEXT)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.set_xlabel(columns, fontsize=10, color=TEXT)
    axes.set_ylabel(rows, fontsize=10, color=TEXT)
    axes.xaxis.set_label_position("top")
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return figure, axes


def per_class_bars(
    scores: Num[Array | np.ndarray, "labels labels"] | Mapping[str, Num[Array | np.ndarray, "labels labels"]],
    label_names: Sequence[str] | None = None,
    *,
    width: float = 6.0,
) -> Figure:
    """Compares the intersection over union of all labels, and its mean.

    Args:
        scores: confusion counts `[L, L]`, row = truth; or several of those by their titles, whose bars stand together.
        label_names: the labels' names; None for the numbers.
        width: the width of the figure in inches.

    Returns:
        The figure. Labels that are neither true nor predicted have no bar.

    Raises:
        ValueError: if there is nothing to show, matrices differ in size or are not square, or names are missing.

    Example:
        >>> figure = per_class_bars({"before": np.eye(2) + 1, "after": np.eye(2)}, ["sky", "tree"])
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['sky', 'tree', 'mean']
    """
    series = dict(scores) if isinstance(scores, Mapping) else {"": scores}
    ious = {
        title: np.append(np.asarray(per_class_iou(cm)), np.asarray(mean_iou(cm)))
        for title, cm in series.items()
    }
    lengths = {title: len(values) - 1 for title, values in ious.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"scores: got the numbers of labels {lengths}; expected matrices of one size")
    names = [*_named(next(iter(lengths.values())), label_names), "mean"]
    bar = 0.17 if len(ious) > 1 else 0.2
    group = bar * len(ious) + 0.08
    left, right = 0.25 + 0.08 * max(map(len, names)), 0.55
    height = group * len(names) + 0.35 + (0.3 if len(ious) > 1 else 0)
    figure = _figure(width, height)
    axes = figure.add_axes(
        (left / width, 0.3 / height, (width - left - right) / width, group * len(names) / height)
    )
    for s, (title, values) in enumerate(ious.items()):
        places = np.arange(len(names)) * group + s * bar
        axes.barh(
            places, 100 * np.nan_to_num(values), height=bar * 0.9, color=LINE_COLORS[s], label=title or None
        )
        for place, value in zip(places, values, strict=True):
            note = "–" if np.isnan(value) else f"{100 * value:.1f}"
            axes.text(100 * np.nan_to_num(value) + 0.8, place, note, va="center", fontsize=7.5, color=TEXT)
    axes.set_yticks(np.arange(len(names)) * group + (len(ious) - 1) * bar / 2, names, fontsize=9, color=TEXT)
    axes.set_ylim(len(names) * group - bar / 2 - 0.04, -bar / 2 - 0.04)
    axes.set_xlim(0, 100)
    _plain(axes, "x")
    axes.xaxis.set_major_formatter("{x:.0f} %")
    if len(ious) > 1:
        _legend(figure, axes, height)
    return figure


def trimap_curve(curves: TrimapCurve | Mapping[str, TrimapCurve], *, panel_width: float = 3.6) -> Figure:
    """Draws accuracy and mean IoU near boundaries against how near, as in figure 5 of the DeepLab paper.

    Args:
        curves: what `metrics.trimap_curve` gives; or several of those by their titles.
        panel_width: the width of one of the two panels in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no curve.

    Example:
        >>> from jaxcrf import metrics
        >>> labels = np.array([[0, 0, 255, 1, 1]])
        >>> figure = trimap_curve(metrics.trimap_curve(labels, labels * 0, 2, widths=(1, 2)))
        >>> [axes.get_title() for axes in figure.axes]
        ['pixel accuracy, %', 'mean IoU, %']

    References:
        Chen et al., *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*,
        arXiv:1412.7062, fig. 5.
    """
    series: dict[str, TrimapCurve] = {"": curves} if isinstance(curves, TrimapCurve) else dict(curves)
    figure, panels = _lines(
        [
            (
                title,
                [
                    (name, curve.widths, 100 * np.asarray(getattr(curve, field)))
                    for name, curve in series.items()
                ],
            )
            for title, field in (("pixel accuracy, %", "accuracy"), ("mean IoU, %", "mean_iou"))
        ],
        panel_width,
        marker="o",
    )
    for axes in panels:
        axes.set_xlabel("width of the band, pixels", fontsize=9, color=TEXT)
        axes.set_xlim(left=0)
    return figure


def precision_recall(
    curves: PrecisionRecallCurve | Mapping[str, PrecisionRecallCurve],
    *,
    beta_squared: float = 0.3,
    panel_width: float = 4.2,
) -> Figure:
    """Draws precision against recall, with a ring where the F-measure is largest.

    Args:
        curves: what `metrics.precision_recall_curve` gives; or several of those by their titles.
        beta_squared: `β²` of the F-measure.
        panel_width: the width of the panel in inches.

    Returns:
        The figure, with the largest F-measures in its legend.

    Raises:
        ValueError: if there is no curve.

    Example:
        >>> from jaxcrf import metrics
        >>> labels, scores = np.array([[1, 1, 0, 0]]), np.array([[0.9, 0.7, 0.8, 0.1]])
        >>> figure = precision_recall(metrics.precision_recall_curve(labels, scores))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['max F 0.812']
    """
    series = {"": curves} if isinstance(curves, PrecisionRecallCurve) else dict(curves)
    lines, best = [], []
    for name, curve in series.items():
        precision, recall = np.asarray(curve.precision), np.asarray(curve.recall)
        f = np.asarray(curve.f_measure(beta_squared))
        index = int(np.nan_to_num(f, nan=-1).argmax())
        # Thresholds that mark nothing have no precision, and would draw a line to the corner.
        shown = recall > 0
        lines.append((f"{name}  max F {f[index]:.3f}".strip(), recall[shown], precision[shown]))
        best.append((recall[index], precision[index]))
    figure, (axes,) = _lines([("", lines)], panel_width, marker="", ratio=1.0, named=True)
    for s, place in enumerate(best):
        color = LINE_COLORS[s % len(LINE_COLORS)]
        # In a corner of the panel too it is whole.
        axes.plot(*place, "o", markersize=8, mfc="none", mec=color, mew=1.6, clip_on=False)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("recall", fontsize=9, color=TEXT)
    axes.set_ylabel("precision", fontsize=9, color=TEXT)
    return figure


def training_curves(
    rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None, panel_width: float = 3.6
) -> Figure:
    """Draws losses, scores and whatever else a training logged, against its steps.

    Every quantity has a panel. Names that differ in their prefix, as `loss`, `val/loss` and `validation_loss`, are
    lines of one panel; prefixes end in a slash, or are one of `train_`, `val_` and `validation_`. Rows need not have
    every quantity.

    Args:
        rows: mappings with `"step"` and numbers, such as the lines of a training log; what is no number is left out.
        names: which quantities to draw, by the names without prefix; None for all.
        panel_width: the width of one panel in inches; there are at most three in a row.

    Returns:
        The figure.

    Raises:
        ValueError: if there is nothing to draw, a row has no step, or a name does not occur.

    Example:
        >>> rows = [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0, "val/mean_iou": 0.4}]
        >>> [axes.get_title() for axes in training_curves(rows).axes]
        ['loss', 'mean_iou']
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, row in enumerate(rows):
        if "step" not in row:
            raise ValueError(f"rows: got row {number} without a 'step'; it has {', '.join(map(str, row))}")
        for key, value in row.items():
            number_like = isinstance(value, int | float | np.number | np.ndarray | Array)
            if key == "step" or isinstance(value, bool) or not number_like or np.ndim(value) > 0:
                continue
            prefix, name = _split_prefix(str(key))
            panels.setdefault(name, {}).setdefault(prefix, []).append((float(row["step"]), float(value)))
    for name in names or ():
        if name not in panels:
            raise ValueError(f"names: got {name!r}; the rows have {', '.join(panels) or 'no numbers'}")
    wanted = {name: panels[name] for name in (panels if names is None else names)}
    if not wanted:
        raise ValueError(f"rows: got {len(rows)} rows without a number to draw; pass what a training logged")
    tables = [
        (
            name,
            [
                (prefix or ("training" if len(lines) > 1 else ""), *np.array(points).T)
                for prefix, points in lines.items()
            ],
        )
        for name, lines in wanted.items()
    ]
    figure, axes = _lines(tables, panel_width, marker="", in_panels=True)
    for panel in axes:
        panel.set_xlabel("step", fontsize=9, color=TEXT)
    return figure


def _split_prefix(key: str) -> tuple[str, str]:
    prefix, slash, name = key.rpartition("/")
    if slash:
        return prefix, name
    for prefix in ("train", "val", "validation"):
        if key.startswith(f"{prefix}_"):
            return prefix, key.removeprefix(f"{prefix}_")
    return "", key


_Line = tuple[str, np.ndarray, np.ndarray]


def _lines(
    panels: Sequence[tuple[str, Sequence[_Line]]],
    panel_width: float,
    *,
    marker: str,
    ratio: float = 0.72,
    named: bool = False,
    in_panels: bool = False,
) -> tuple[Figure, list["Axes"]]:
    """Panels of lines, up to three in a row, under a legend if there are several lines."""
    if not panels or not panels[0][1]:
        raise ValueError("curves: got none; pass at least one")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    left, bottom, right, top = 0.6, 0.5, 0.15, 0.35 if panels[0][0] else 0.1
    several = not in_panels and (named or len(panels[0][1]) > 1)
    legend = 0.24 * math.ceil(len(panels[0][1]) / 3) + 0.1 if several else 0.0
    inner = (panel_width - left - right, (panel_width - left - right) * ratio)
    width, height = columns * panel_width, rows * (inner[1] + bottom + top) + legend
    figure = _figure(width, height)
    axes = []
    for k, (title, lines) in enumerate(panels):
        row, column = divmod(k, columns)
        low = height - legend - (row + 1) * (inner[1] + bottom + top) + bottom
        box = ((column * panel_width + left) / width, low / height, inner[0] / width, inner[1] / height)
        panel = figure.add_axes(box)
        for s, (name, x, y) in enumerate(lines):
            # A line of one point would not be seen.
            mark = marker or ("o" if len(x) == 1 else "")
            panel.plot(
                x,
                y,
                marker=mark,
                markersize=4,
                linewidth=1.6,
                color=LINE_COLORS[s % len(LINE_COLORS)],
                label=name,
            )
        panel.set_title(title, fontsize=10, color=TEXT)
        _plain(panel, "both")
        if in_panels and any(name for name, *_ in lines):
            panel.legend(frameon=False, fontsize=8, labelcolor=TEXT)
        axes.append(panel)
    if several:
        _legend(figure, axes[0], height)
    return figure, axes


def _legend(figure: Figure, axes: "Axes", height: float) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.05 / height),
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
        borderaxespad=0,
        borderpad=0,
    )


def _plain(axes: "Axes", grid: Any) -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=TEXT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _named(count: int, names: Sequence[str] | None) -> list[str]:
    if names is not None and len(names) != count:
        raise ValueError(f"label_names: got {len(names)} names for {count} labels; name every label")
    return [str(label) for label in range(count)] if names is None else [_escaped(name) for name in names]


def _escaped(name: str) -> str:
    # Matplotlib would read mathematics between dollar signs.
    return str(name).replace("$", r"\$")

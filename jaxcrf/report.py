"""An evaluation as one HTML page that needs nothing else: figures, tables, charts, and images to look at."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from jaxcrf import plots
from jaxcrf.data.images import voc_palette
from jaxcrf.evaluation import Evaluation, ImageScore, Picture
from jaxcrf.metrics import TrimapCurve
from jaxcrf.plots.pictures import TEXT

if TYPE_CHECKING:
    from matplotlib.artist import Artist

# Inlined images are at most so many pixels wide or high: four of them fit side by side on a wide screen.
_LONGEST_SIDE = 480
_DARK_TEXT, _DARK_GRID = "#DDDDDD", "#4A4F57"

_FIGURES = {
    "mean_iou": ("mean IoU", "The mean, over labels, of intersection over union."),
    "pixel_accuracy": ("pixel accuracy", "The share of pixels that are labelled correctly."),
    "class_accuracy": (
        "class accuracy",
        "The mean, over labels, of the share of their pixels that are found.",
    ),
    "tagging_accuracy": ("tagging", "How often it is right whether an image shows a label."),
    "localization_accuracy": (
        "localisation",
        "IoU of predicted and true bounding boxes, one per label and image.",
    ),
    "boundary_accuracy": ("boundary", "Precision of the boundaries of what is localised."),
    "max_f_measure": ("max F-measure", "The largest over thresholds, β² = 0.3."),
}

_STYLE = """
:root { color-scheme: light; --text: #1b1e23; --quiet: #555c66; --page: #ffffff; --card: #f4f5f7; --line: #d9dce1;
  --good: #00623f; --bad: #a03c00; --accent: #0060a0; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --text: #e8eaed; --quiet: #a9b0ba;
  --page: #15181c; --card: #1f242a; --line: #39404a; --good: #5fd0a5; --bad: #ff9d66; --accent: #7fbfff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.figures div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.figures dt { font-size: .85rem; color: var(--quiet); } .figures dd { margin: 0; }
.figures .value { font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.better { color: var(--good); } .worse { color: var(--bad); }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tfoot th, tfoot td { font-weight: 600; }
.circumstances th, .circumstances td { text-align: left; white-space: normal; }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .45em; vertical-align: -.08em;
  border: 1px solid var(--quiet); border-radius: .15em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  font-size: .9rem; }
figure { margin: 0; } section > figure { margin-top: 1rem; } figcaption { font-size: .85rem; color: var(--quiet); }
img { max-width: 100%; height: auto; display: block; } picture { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem;
  align-items: start; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 12rem), 1fr)); gap: .5rem; }
.row img { width: 100%; border: 1px solid var(--line); image-rendering: auto; }
summary { cursor: pointer; padding: .3rem 0; color: var(--accent); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  article, figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  .figures div { border: 1px solid var(--line); } }
"""


def render(
    evaluation: Evaluation,
    *,
    title: str = "Evaluation",
    notes: str = "",
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    circumstances: Mapping[str, Any] | None = None,
) -> str:
    """Renders an evaluation as an HTML page.

    The page is whole in itself: images are part of it, there are no scripts, and its own policy forbids requests. It
    follows the reader's choice of light or dark, and fits a phone, a wide screen and paper.

    Args:
        evaluation: what `jaxcrf.evaluation.evaluate` gave.
        title: the heading.
        notes: a line below it, such as what was evaluated on what.
        palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
        circumstances: what `jaxcrf.reporting.circumstances` says; None leaves it out.

    Returns:
        The page's text.

    Raises:
        ValueError: if a label has no colour.

    Example:
        >>> from jaxcrf.evaluation import evaluate
        >>> from jaxcrf.data import SegmentationFolder
        >>> class Source(list):
        ...     label_names, ignore_label = ("sky", "a < b"), 255
        >>> image, truth = np.zeros((4, 6, 3), np.uint8), np.eye(4, 6, dtype=int)
        >>> page = render(evaluate(lambda image: truth, Source([(image, truth)])), title="A & B")
        >>> "<h1>A &amp; B</h1>" in page, "a &lt; b" in page, "a < b" in page
        (True, True, False)
    """
    palette = voc_palette() if palette is None else np.asarray(palette, np.uint8)
    if len(palette) < len(evaluation.label_names):
        raise ValueError(
            f"palette: got {len(palette)} colours for {len(evaluation.label_names)} labels; pass one for each"
        )
    sections = [
        _summary(evaluation),
        _section("Labels", _per_class(evaluation, palette) + _bars(evaluation)),
        _section("Confusions", _confusions(evaluation)),
        _section("Curves", _curves(evaluation)),
        *_galleries(evaluation, palette),
        _section("All images", _all_images(evaluation)),
    ]
    if circumstances is not None:
        sections.append(_section("Circumstances", _circumstances(circumstances)))
    note = f'<p class="quiet">{_text(notes)}</p>' if notes else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        # Without one, browsers ask the server for it.
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{_text(title)}</h1>\n{note}\n</header>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _summary(evaluation: Evaluation) -> str:
    before = {} if evaluation.baseline is None else evaluation.baseline.totals()
    figures = []
    for name, value in evaluation.totals().items():
        title, meaning = _FIGURES[name]
        change = ""
        if name in before:
            change = (
                f'<dd class="quiet">{_percent(before[name])} % before, {_change(before[name], value)}</dd>'
            )
        figures.append(
            f'<div title="{_text(meaning)}"><dt>{_text(title)}</dt>'
            f'<dd class="value" data-figure="{name}">{_percent(value)} %</dd>{change}</div>'
        )
    count = len(evaluation.images)
    pixels = int(evaluation.confusion.sum())
    seconds = evaluation.seconds / count
    included = "compilation" if evaluation.baseline is None else "refinement and compilation"
    return (
        f'<dl class="figures">{"".join(figures)}</dl>\n'
        f'<p class="quiet">{count:,} image{"s" * (count != 1)}, {pixels:,} pixels that count; '
        f"{seconds:.3g} s an image, {included} included.</p>"
    )


def _per_class(evaluation: Evaluation, palette: np.ndarray) -> str:
    rows = []
    before = None if evaluation.baseline is None else evaluation.baseline.table()
    for row in evaluation.table():
        cells = [_swatch(palette[row.label]) + _text(row.name), _percent(row.share)]
        if before is not None:
            cells.append(_percent(before[row.label].iou))
        cells.append(_percent(row.iou))
        if before is not None:
            cells.append(_change(before[row.label].iou, row.iou))
        cells += [_percent(value) for value in (row.precision, row.recall)]
        cells += [_percent(float(scores[row.label])) for scores in evaluation.objects]
        rows.append(cells)
    heads = ["label", "share of pixels"]
    heads += ["IoU"] if before is None else ["IoU before", "IoU", "change"]
    heads += ["precision", "recall", "tagging", "localisation", "boundary"]
    totals = evaluation.totals()
    foot = ["mean", ""]
    if evaluation.baseline is not None:
        foot.append(_percent(evaluation.baseline.totals()["mean_iou"]))
    foot.append(_percent(totals["mean_iou"]))
    if evaluation.baseline is not None:
        foot.append(_change(evaluation.baseline.totals()["mean_iou"], totals["mean_iou"]))
    precisions = [row.precision for row in evaluation.table() if not math.isnan(row.precision)]
    foot += [_percent(float(np.mean(precisions)) if precisions else math.nan)]
    foot += [_percent(totals[name]) for name in list(_FIGURES)[2:6]]
    return _table("All in percent; a dash where there is nothing to measure.", heads, rows, foot)


def _bars(evaluation: Evaluation) -> str:
    matrices = {"after": evaluation.confusion}
    if evaluation.baseline is not None:
        matrices = {"before": evaluation.baseline.confusion, **matrices}
    figure = plots.per_class_bars(
        matrices if len(matrices) > 1 else evaluation.confusion, evaluation.label_names
    )
    return _chart(
        figure, "Bars of every label's intersection over union; the numbers are those of the table."
    )


def _confusions(evaluation: Evaluation) -> str:
    cm = evaluation.confusion.astype(np.float64)
    chart = _chart(
        plots.confusion_matrix(evaluation.confusion, evaluation.label_names),
        "Confusion matrix: what share of every true label's pixels is given which label, in percent.",
    )
    wrong = cm - np.diag(np.diagonal(cm))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    rows = []
    for index in order:
        k, l = divmod(int(index), len(cm))
        if wrong[k, l] > 0:
            names = _text(evaluation.label_names[k]), _text(evaluation.label_names[l])
            rows.append([*names, _percent(wrong[k, l] / cm[k].sum()), _percent(wrong[k, l] / wrong.sum())])
    if not rows:
        return f'<div class="charts">{chart}<p>There are none.</p></div>'
    heads = ["truth", "taken for", "of that label, %", "of all errors, %"]
    return f'<div class="charts">{chart}{_table("The largest confusions.", heads, rows)}</div>'


def _curves(evaluation: Evaluation) -> str:
    around = {"labels": "changes of label", "void": "void pixels"}[evaluation.around]
    curves: dict[str, TrimapCurve] = {"after": evaluation.trimap}
    if evaluation.baseline is not None:
        curves = {"before": evaluation.baseline.trimap, **curves}
    meaning = f"Accuracy and mean IoU within so many pixels of {around}."
    charts = [_chart(plots.trimap_curve(curves if len(curves) > 1 else evaluation.trimap), meaning)]
    if evaluation.saliency is not None and not np.isnan(evaluation.saliency.recall).all():
        saliency = {"after": evaluation.saliency}
        if evaluation.baseline is not None and evaluation.baseline.saliency is not None:
            saliency = {"before": evaluation.baseline.saliency, **saliency}
        name = evaluation.label_names[1]
        charts.append(
            _chart(
                plots.precision_recall(saliency if len(saliency) > 1 else evaluation.saliency),
                f"Precision and recall of “{name}” over thresholds, means over images.",
            )
        )
    rows = []
    for i, width in enumerate(evaluation.trimap.widths):
        row = [str(width), f"{int(evaluation.trimap.pixels[i]):,}"]
        for field in ("accuracy", "mean_iou"):
            row += [_percent(float(getattr(curve, field)[i])) for curve in curves.values()]
        rows.append(row)
    names = ["accuracy", "mean IoU"]
    if len(curves) > 1:
        names = [f"{name} {when}" for name in names for when in curves]
    table = _table("In percent.", ["width, pixels", "pixels inside", *names], rows)
    return (
        f'<div class="charts">{"".join(charts)}</div>'
        f"<details><summary>Numbers of the curve near boundaries</summary>{table}</details>"
    )


def _galleries(evaluation: Evaluation, palette: np.ndarray) -> list[str]:
    used: set[int] = set()
    for picture in (*evaluation.worst, *evaluation.best):
        for labels in (picture.truth, picture.prediction, picture.before):
            if labels is not None:
                used.update(np.unique(labels).tolist())
    swatches = [
        f"<li>{_swatch(palette[label])}{_text(name)}</li>"
        for label, name in enumerate(evaluation.label_names)
        if label in used
    ]
    if evaluation.ignore_label in used:
        swatches.append(f"<li>{_swatch((255, 255, 255))}void</li>")
    meanings = _difference_names(evaluation.baseline is not None)
    differences = [
        f"<li>{_swatch(plots.DIFFERENCE_COLORS[kind])}{name}</li>" for kind, name in meanings.items()
    ]
    legend = (
        f'<ul class="legend" aria-label="Colours of labels">{"".join(swatches)}</ul>'
        f'<ul class="legend" aria-label="Colours of differences">{"".join(differences)}</ul>'
    )
    sections = []
    for title, pictures in (("Worst images", evaluation.worst), ("Best images", evaluation.best)):
        if pictures:
            shown = "".join(_picture(picture, evaluation, palette) for picture in pictures)
            sections.append(_section(title, legend + shown))
    return sections


def _difference_names(refined: bool) -> dict[str, str]:
    if refined:
        return {name: name for name in plots.DIFFERENCE_COLORS}
    return {"correct": "correct", "broken": "wrong"}


def _picture(picture: Picture, evaluation: Evaluation, palette: np.ndarray) -> str:
    name, truth = picture.score.name, picture.truth
    ignore = evaluation.ignore_label
    valid = np.full(truth.shape, True) if ignore is None else truth != ignore
    is_right = picture.prediction == truth
    if picture.before is None:
        kinds = {"correct": is_right, "broken": ~is_right}
    else:
        was_right = picture.before == truth
        kinds = {
            "correct": was_right & is_right,
            "fixed": ~was_right & is_right,
            "broken": was_right & ~is_right,
            "still wrong": ~was_right & ~is_right,
        }
    difference = np.full((*truth.shape, 3), 255, np.uint8)
    for kind, mask in kinds.items():
        difference[mask & valid] = plots.DIFFERENCE_COLORS[kind]
    panels = [("image", _photograph(picture.image)), ("truth", _drawing(_colors(truth, palette, ignore)))]
    if picture.before is not None:
        panels.append(("before", _drawing(_colors(picture.before, palette, ignore))))
    panels += [
        (
            "prediction" if picture.before is None else "after",
            _drawing(_colors(picture.prediction, palette, ignore)),
        ),
        ("difference", _drawing(difference)),
    ]
    figures = "".join(
        f'<figure><img src="{source}" alt="{_text(f"{name}: {title}")}" width="{width}" height="{height}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, (source, width, height) in panels
    )
    scores = _scores(picture.score)
    if picture.before_score is not None:
        scores += f" (before: {_scores(picture.before_score)})"
    return f'<article><h3>{_text(name)}</h3><p class="quiet">{scores}</p><div class="row">{figures}</div></article>\n'


def _scores(score: ImageScore) -> str:
    return f"mean IoU {_percent(score.mean_iou)} %, {_percent(score.accuracy)} % correct"


def _all_images(evaluation: Evaluation) -> str:
    heads = ["image", "mean IoU", "accuracy"]
    before = None if evaluation.baseline is None else evaluation.baseline.images
    if before is not None:
        heads = ["image", "mean IoU before", "mean IoU", "change", "accuracy"]
    rows = []
    for i, score in enumerate(evaluation.images):
        cells = [_text(score.name), _percent(score.mean_iou), _percent(score.accuracy)]
        if before is not None:
            cells[1:1] = [_percent(before[i].mean_iou)]
            cells[3:3] = [_change(before[i].mean_iou, score.mean_iou)]
        rows.append(cells)
    table = _table("In percent, in the order of the data set.", heads, rows)
    return f"<details><summary>Scores of all {len(rows):,}</summary>{table}</details>"


def _circumstances(circumstances: Mapping[str, Any]) -> str:
    rows = [
        [
            _text(key),
            _text(", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value),
        ]
        for key, value in circumstances.items()
        if value is not None
    ]
    return _table("", ["", ""], rows, kind="circumstances")


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    foot: Sequence[str] | None = None,
    kind: str = "",
) -> str:
    """A table of cells that are HTML already, the first of every row being its heading."""

    def line(cells: Sequence[str], scope: str = "row") -> str:
        first, *rest = cells
        return f'<tr><th scope="{scope}">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'

    head = ""
    if any(heads):
        cells = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in heads)
        head = f"<thead><tr>{cells}</tr></thead>"
    end = "" if foot is None else f"<tfoot>{line(foot)}</tfoot>"
    name = f"<caption><span>{_text(caption)}</span></caption>" if caption else ""
    # To be scrolled by keyboard where it is wider than the screen.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(caption or "Table")}">'
        f'<table class="{kind}">{name}{head}<tbody>{"".join(map(line, rows))}</tbody>{end}</table></div>\n'
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _percent(fraction: float) -> str:
    return "–" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def _change(before: float, after: float) -> str:
    if math.isnan(before) or math.isnan(after):
        return "–"
    points = round(100 * (after - before), 2)
    kind = "better" if points > 0 else "worse" if points < 0 else ""
    return f'<span class="{kind}">{points:+.2f}</span>'.replace("+0.00", "±0.00").replace("-", "−")


def _swatch(color: Sequence[int] | np.ndarray) -> str:
    r, g, b = (int(c) for c in color)
    return f'<span class="swatch" style="background:#{r:02x}{g:02x}{b:02x}"></span>'


def _colors(labels: np.ndarray, palette: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """The colours of labels; void, and predictions that are none where the truth is void, are white."""
    known = (labels >= 0) & (labels < len(palette))
    if ignore_label is not None:
        known &= labels != ignore_label
    return np.where(known[..., None], palette[np.where(known, labels, 0)], 255).astype(np.uint8)


def _photograph(image: np.ndarray) -> tuple[str, int, int]:
    if image.shape[2] == 1:
        image = np.repeat(image, 3, 2)
    pixels = image if image.dtype == np.uint8 else np.clip(np.round(image), 0, 255).astype(np.uint8)
    return _inlined(_shrunk(Image.fromarray(pixels[..., :3]), Image.Resampling.LANCZOS), "JPEG", quality=85)


def _drawing(colors: np.ndarray) -> tuple[str, int, int]:
    # Labels are not mixed: a blend of two colours may be that of a third.
    shrunk = _shrunk(Image.fromarray(colors), Image.Resampling.NEAREST)
    pixels = np.asarray(shrunk)
    # As one number each: NumPy sorts those a hundred times as fast as rows.
    packed = (pixels.astype(np.int32) << np.array([16, 8, 0])).sum(-1)
    found, indices = np.unique(packed, return_inverse=True)
    if len(found) <= 256:
        # Far smaller than RGB, and the same.
        shrunk = Image.fromarray(indices.reshape(pixels.shape[:2]).astype(np.uint8))
        shrunk.putpalette([(int(color) >> shift) & 255 for color in found for shift in (16, 8, 0)])
    return _inlined(shrunk, "PNG", optimize=True)


def _shrunk(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    scale = min(1.0, _LONGEST_SIDE / max(image.size))
    return image.resize([max(1, round(n * scale)) for n in image.size], resampling) if scale < 1 else image


def _inlined(image: Image.Image, kind: str, **options: Any) -> tuple[str, int, int]:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return _data(data.getvalue(), f"image/{kind.lower()}"), *image.size


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _chart(figure: Figure, meaning: str) -> str:
    """A chart for light pages and one for dark ones, of which the browser shows the right one."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    light = _data(_svg(figure), "image/svg+xml")
    dark = _data(_svg(_darkened(figure)), "image/svg+xml")
    return (
        '<figure><picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{dark}"><img src="{light}" alt="{_text(meaning)}" width="{width}" height="{height}"></picture>'
        f"<figcaption>{_text(meaning)}</figcaption></figure>\n"
    )


def _svg(figure: Figure) -> bytes:
    data = io.BytesIO()
    # The same numbers make the same file, whenever it is.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "jaxcrf"}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return data.getvalue()


def _darkened(figure: Figure) -> Figure:
    """Text and lines of a chart in colours for a dark page."""
    for axes in figure.axes:
        axes.tick_params(labelcolor=_DARK_TEXT, grid_color=_DARK_GRID)
        for spine in axes.spines.values():
            spine.set_color(_DARK_GRID)

    def is_text(artist: "Artist") -> bool:
        return isinstance(artist, Text) and same_color(artist.get_color(), TEXT)

    for artist in figure.findobj(is_text):
        artist.set_color(_DARK_TEXT)  # type: ignore[attr-defined]
    return figure

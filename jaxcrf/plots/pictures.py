"""Pictures of images: overlays, side-by-side grids, what a refinement changed, pairwise terms and uncertainties."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Num, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxcrf.data.images import replacing, voc_palette
from jaxcrf.filters import LinearOperator, PixelLabelOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which also differ for the colour-blind; correct pixels stay pale.
DIFFERENCE_COLORS = {
    "correct": (232, 234, 237),
    "fixed": (0, 114, 178),
    "broken": (213, 94, 0),
    "still wrong": (240, 200, 70),
}
TEXT = "#222222"
# The share of numbers that the scale of a picture spans; those beyond have the colour of its end.
SHOWN_IN_FULL = 0.99


def overlay(
    image: Num[Array | np.ndarray, "height width *channels"],
    labels: Int[Array | np.ndarray, "height width"],
    *,
    alpha: float = 0.5,
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    ignore_label: int | None = 255,
) -> UInt8[np.ndarray, "height width 3"]:
    r"""Paints a label map over its image.

    Inside a region the colour of its label is mixed in, :math:`(1 - α) I + α c`; the pixels on either side
    of a 4-neighbour boundary take the colour of their label unmixed, which draws boundaries crisply.

    Args:
        image: `[H, W, 3]`, or `[H, W]` for gray, in 0 … 255.
        labels: `[H, W]`.
        alpha: the opacity of the colours, from 0 to 1.
        palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
        ignore_label: pixels of this label show the image as it is; None if there are none.

    Returns:
        The picture, uint8 `[H, W, 3]`.

    Raises:
        ValueError: if the sizes differ, `alpha` is outside 0 … 1 or a label has no colour.
        TypeError: if `labels` does not hold integers.

    Example:
        >>> overlay(np.full((3, 4, 3), 100, np.uint8), np.array([[1, 1, 1, 2]] * 3))[0]
        array([[114,  50,  50],
               [114,  50,  50],
               [128,   0,   0],
               [  0, 128,   0]], dtype=uint8)
    """
    image = _rgb("image", image)
    labels = _label_map("labels", labels)
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f"labels: got shape {labels.shape}, but the image is {image.shape[:2]}; resize one of them"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}; expected a number from 0 to 1")
    valid = np.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    colors = _colored(labels, valid, palette)

    boundary = np.zeros(labels.shape, bool)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    boundary[1:] |= vertical
    boundary[:-1] |= vertical
    boundary[:, 1:] |= horizontal
    boundary[:, :-1] |= horizontal

    opacity = np.where(boundary, 1.0, alpha) * valid
    picture = image + opacity[..., None] * (colors.astype(np.float64) - image)
    return np.round(picture).astype(np.uint8)


def segmentation_grid(
    columns: Mapping[str, Any],
    *,
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    label_names: Sequence[str] | None = None,
    ignore_label: int | None = 255,
    panel_width: float = 3.0,
) -> Figure:
    """Puts images and label maps side by side.

    Args:
        columns: title → picture. A picture is an image `[H, W, 3]` in 0 … 255, a label map `[H, W]` of
            integers, or a list of those, one per row; every column needs as many rows.
        palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
        label_names: the labels' names for a legend underneath; None for no legend.
        ignore_label: pixels of this label are white; None if there are none.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no column, columns differ in length, a picture has no known shape, or a label
            has no colour or no name.

    Example:
        >>> image, labels = np.zeros((4, 6, 3), np.uint8), np.array([[0, 1, 1, 2, 2, 255]] * 4)
        >>> figure = segmentation_grid({"image": image, "labels": labels}, label_names=["sky", "tree", "car"])
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'labels']
    """
    table = {
        title: list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        for title, pictures in columns.items()
    }
    lengths = {title: len(pictures) for title, pictures in table.items()}
    if not table or min(lengths.values()) == 0:
        raise ValueError(f"columns: got {lengths}; pass at least one title with at least one picture")
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"columns: got different numbers of rows, {lengths}; pass one picture per row in each"
        )

    present: set[int] = set()
    pictures = {}
    for title, column in table.items():
        for row, picture in enumerate(map(np.asarray, column)):
            if picture.ndim == 2 and picture.dtype.kind in "iu":
                present.update(np.unique(picture).tolist())
                pictures[row, title] = _painted(picture, palette, ignore_label)
            elif picture.ndim == 3:
                pictures[row, title] = _rgb(f"columns[{title!r}]", picture)
            else:
                raise ValueError(
                    f"columns[{title!r}]: got shape {picture.shape} and dtype {picture.dtype}; expected an image "
                    "[height, width, 3] or an integer label map [height, width]"
                )
    present.discard(-1 if ignore_label is None else ignore_label)
    legends = []
    if label_names is not None:
        names = _label_patches(sorted(present), label_names, palette)
        legends.append(_Legend(names, len(table) / 2, len(table) * panel_width))
    rows = range(next(iter(lengths.values())))
    shapes = [[pictures[row, title].shape for title in table] for row in rows]
    figure, axes = _panels(shapes, panel_width, titled=True, legends=legends)
    for (row, title), picture in pictures.items():
        _show(axes[row][list(table).index(title)], picture, title if row == 0 else None)
    return figure


def feature_maps(
    maps: Mapping[str, Num[Array | np.ndarray, "height width channels"]],
    beside: Mapping[str, Any] | None = None,
    *,
    count: int = 4,
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    panel_width: float = 2.4,
) -> Figure:
    """Shows the first channels of feature maps, a row for each map.

    Every channel has a scale of its own, its smallest value black and its largest white.

    Args:
        maps: name → maps of one image, `[H, W, channels]`, as the `feature_maps` of recurrent networks without their
            batch axis.
        beside: title → a picture for every row, as in `segmentation_grid`; left of the maps.
        count: how many channels.
        palette: of label maps in `beside`, as in `segmentation_grid`.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if there is no map, one is not `[H, W, channels]` or not finite, `count` is less than 1, or a
            column of `beside` has not as many pictures as there are maps.

    Example:
        >>> maps = {"renet1_vertical": np.random.rand(4, 6, 3), "renet1_horizontal": np.random.rand(4, 6, 3)}
        >>> figure = feature_maps(maps, count=2)
        >>> [axes.get_title() for axes in figure.axes]
        ['map 1', 'map 2', '', '']

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for Semantic
        Segmentation*, 2016, fig. 2.
    """
    if not maps:
        raise ValueError("maps: got none; expected at least one, name → [height, width, channels]")
    if count < 1:
        raise ValueError(f"count: got {count}; expected at least 1")
    arrays = {name: np.asarray(value, np.float64) for name, value in maps.items()}
    for name, values in arrays.items():
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(
                f"maps[{name!r}]: got shape {values.shape}; expected [height, width, channels], of one image"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"maps[{name!r}]: holds NaN or infinite values")
    columns: dict[str, Any] = dict(beside or {})
    for k in range(min(count, *(values.shape[-1] for values in arrays.values()))):
        columns[f"map {k + 1}"] = [_stretched(values[..., k]) for values in arrays.values()]
    return segmentation_grid(columns, palette=palette, panel_width=panel_width)


def _stretched(values: np.ndarray) -> np.ndarray:
    """As a picture in grey, from black to white."""
    low, high = values.min(), values.max()
    shares = (values - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.repeat((255 * shares).round().astype(np.uint8)[..., None], 3, -1)


def difference(
    truth: Int[Array | np.ndarray, "height width"],
    before: Int[Array | np.ndarray, "height width"],
    after: Int[Array | np.ndarray, "height width"],
    *,
    image: Num[Array | np.ndarray, "height width *channels"] | None = None,
    ignore_label: int | None = 255,
    panel_width: float = 4.5,
) -> Figure:
    """Shows what a refinement changed: pixels that were correct, got fixed, got broken, or stayed wrong.

    A legend underneath gives the share of each among the pixels that count.

    Args:
        truth: true labels `[H, W]`.
        before: labels before the refinement, `[H, W]`.
        after: labels after it, `[H, W]`.
        image: if given, correct pixels show it, in pale gray.
        ignore_label: pixels whose *true* label is this do not count and are white; None if there are none.
        panel_width: the width of the picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if the sizes differ.
        TypeError: if a label map does not hold integers.

    Example:
        >>> truth, before, after = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 0]]), np.array([[0, 0, 0, 0]])
        >>> figure = difference(truth, before, after)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['correct  25.0 %', 'fixed  25.0 %', 'broken  25.0 %', 'still wrong  25.0 %']
    """
    picture, shares = _difference_picture(truth, before, after, image, ignore_label)
    legend = _Legend(_difference_patches(shares), 0.5, panel_width)
    figure, axes = _panels([[picture.shape]], panel_width, titled=False, legends=[legend])
    _show(axes[0][0], picture, None)
    return figure


def refinement_figure(
    image: Num[Array | np.ndarray, "height width *channels"],
    truth: Int[Array | np.ndarray, "height width"],
    before: Int[Array | np.ndarray, "height width"],
    after: Int[Array | np.ndarray, "height width"],
    *,
    titles: Sequence[str] = ("image", "before", "after", "difference"),
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    label_names: Sequence[str] | None = None,
    ignore_label: int | None = 255,
    panel_width: float = 3.0,
) -> Figure:
    """Tells the story of a refinement in a row: image, labels before, labels after, `difference`.

    Args:
        image: `[H, W, 3]`, or `[H, W]` for gray, in 0 … 255.
        truth: true labels `[H, W]`.
        before: labels before the refinement, `[H, W]`.
        after: labels after it, `[H, W]`.
        titles: of the four pictures.
        palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
        label_names: the labels' names for the legend; None for no names.
        ignore_label: pixels of this label are white; None if there are none.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if sizes differ, there are not four titles, or a label has no colour or no name.
        TypeError: if a label map does not hold integers.

    Example:
        >>> image, truth = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), int)
        >>> figure = refinement_figure(image, truth, truth + 1, truth, label_names=["sky", "tree"])
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'before', 'after', 'difference']
    """
    if len(titles) != 4:
        raise ValueError(f"titles: got {len(titles)} of them; expected four, one per picture")
    picture, shares = _difference_picture(truth, before, after, image, ignore_label)
    pictures = [
        _rgb("image", image),
        _painted(_label_map("before", before), palette, ignore_label),
        _painted(_label_map("after", after), palette, ignore_label),
        picture,
    ]
    legends = [_Legend(_difference_patches(shares), 3.5, panel_width)]
    if label_names is not None:
        present = np.union1d(np.asarray(before), np.asarray(after)).tolist()
        names = _label_patches([label for label in present if label != ignore_label], label_names, palette)
        legends.append(_Legend(names, 2.0, 2 * panel_width))
    figure, axes = _panels([[shown.shape for shown in pictures]], panel_width, titled=True, legends=legends)
    for panel, shown, title in zip(axes[0], pictures, titles, strict=True):
        _show(panel, shown, title)
    return figure


def affinity(
    K: LinearOperator,
    pixels: Sequence[int] | Sequence[Sequence[int]],
    *,
    image: Num[Array | np.ndarray, "height width *channels"] | None = None,
    labels: tuple[int, Sequence[int]] | None = None,
    label_names: Sequence[str] | None = None,
    panel_width: float = 3.0,
) -> Figure:
    r"""Shows what reference pixels have to do with all others: a picture of the pairwise terms `K_{ij}`.

    Each row is one reference pixel `i`, marked by a ring; its pictures hold `K e_i`, for a filter one number per pixel
    `j`, for an operator that mixes labels one for every label of `j`, given a label of `i`. For a `Gram` these
    are the inner products of embeddings. Zero is white; positive terms, which keep scores from being
    large together, are orange, negative ones blue; the scale of a row leaves the reference pixel itself and the
    largest hundredth of the others out.

    Args:
        K: any filter or operator over one image.
        pixels: the reference pixels, `(y, x)` or several of those, in pixels of `K`.
        image: if given, the first picture of every row; of any size, for a `K` that works on a coarser grid.
        labels: for operators that mix labels, the label of the reference pixel and those of the others to
            show; None for label 0 and up to four.
        label_names: the labels' names, for titles.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if `K` has batch axes, or a pixel or label is outside.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcrf.filters import Gram
        >>> embeddings = jnp.eye(2)[jnp.array([[0, 0, 1], [0, 1, 1]])]
        >>> figure = affinity(Gram(embeddings, kind="potts"), (0, 0), image=np.zeros((8, 12, 3), np.uint8))
        >>> [axes.get_title() for axes in figure.axes]
        ['reference pixel', 'pairwise terms']

    References:
        Chandra, Usunier and Kokkinos, 2017, fig. 3 and 4.
    """
    if K.batch:
        raise ValueError(f"K: got batch axes {K.batch}; pass the filter of one image")
    if len(K.spatial) != 2:
        raise ValueError(f"K: got spatial axes {K.spatial}; only filters over images have pictures")
    references = [tuple(map(int, p)) for p in np.atleast_2d(np.asarray(pixels))]
    for reference in references:
        if len(reference) != 2 or any(not 0 <= c < n for c, n in zip(reference, K.spatial, strict=True)):
            raise ValueError(f"pixels: got {reference}; expected (y, x) inside {K.spatial}")
    count, mine, theirs = 1, 0, [0]
    titles = ["pairwise terms"]
    if isinstance(K, PixelLabelOperator):
        count = K.num_labels
        mine, theirs = (0, list(range(min(4, count)))) if labels is None else (labels[0], list(labels[1]))
        named = _names([mine, *theirs], count, label_names)
        titles = [f"{named[0]} – {other}" for other in named[1:]]

    rows = []
    for y, x in references:
        terms = np.asarray(K(jnp.zeros((*K.spatial, count)).at[y, x, mine].set(1)))[..., theirs]
        others = terms.copy()
        others[y, x] = 0
        # A few outliers would leave the rest white; where all but a few are zero, they are the picture.
        limit = np.quantile(np.abs(others), SHOWN_IN_FULL) or np.abs(others).max()
        pictures = [diverging(terms[..., k], limit) for k in range(len(theirs))]
        rows.append([_rgb("image", image), *pictures] if image is not None else pictures)
    if image is not None:
        titles = ["reference pixel", *titles]
    shapes = [[picture.shape for picture in row] for row in rows]
    figure, axes = _panels(shapes, panel_width, titled=True, legends=[])
    for r, (row, (y, x)) in enumerate(zip(rows, references, strict=True)):
        for panel, picture, title in zip(axes[r], row, titles, strict=True):
            _show(panel, picture, title if r == 0 else None)
            height, width = (n / m for n, m in zip(picture.shape, K.spatial, strict=False))
            place = ((x + 0.5) * width - 0.5, (y + 0.5) * height - 0.5)
            for color, thickness in (("white", 3.0), ("black", 1.2)):
                panel.plot(*place, "o", markersize=9, mfc="none", mec=color, mew=thickness)
    return figure


def label_contexts(
    contexts: Num[Array | np.ndarray, "size size labels labels contexts"],
    pairs: Sequence[tuple[int, int]],
    *,
    label_names: Sequence[str] | None = None,
    panel_width: float = 1.2,
) -> Figure:
    r"""Shows where labels are expected around others: the learned contexts of the Deep Parsing Network.

    Each column is a pair "A: B" and has a picture per context: with A at the centre, which a ring marks, what it is
    penalised for B at every place around. Where B goes with A, the picture is blue, where it speaks against it, orange;
    white is zero, and the scale of a column leaves its largest hundredth out.

    Args:
        contexts: `μ`, `[size, size, L, L, K]` as in `DeepParsingParams`, times the triple penalties' sign.
        pairs: labels A and B.
        label_names: the labels' names, for titles; None for the numbers.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if contexts have another shape or are not finite, there is no pair, or a label is out of range.

    Example:
        >>> figure = label_contexts(np.zeros((9, 9, 3, 3, 2)), [(0, 1)], label_names=["sky", "tree", "road"])
        >>> len(figure.axes), figure.axes[0].get_title()
        (2, 'sky: tree')

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, fig. 4 (b).
    """
    numbers = np.asarray(contexts).astype(np.float64)
    shape = numbers.shape
    if len(shape) != 5 or shape[0] != shape[1] or shape[2] != shape[3] or not numbers.size:
        raise ValueError(f"contexts: got shape {shape}; expected [size, size, labels, labels, contexts]")
    if not np.isfinite(numbers).all():
        raise ValueError("contexts: hold NaN or infinities; expected finite numbers")
    if not len(pairs):
        raise ValueError("pairs: got none; expected at least one (A, B)")
    columns = {}
    for center, around in pairs:
        named = _names([center, around], shape[3], label_names)
        shown = numbers[:, :, around, center]
        limit = np.quantile(np.abs(shown), SHOWN_IN_FULL) or np.abs(shown).max()
        columns[f"{named[0]}: {named[1]}"] = diverging(np.moveaxis(shown, -1, 0), limit)
    shapes: list[list[tuple[int, ...]]] = [[shape[:2]] * len(columns) for _ in range(shape[4])]
    figure, axes = _panels(shapes, panel_width, titled=True, legends=[])
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            panel = axes[row][column]
            _show(panel, picture, None)
            if row == 0:
                # Names of two labels are long beside pictures of a few cells.
                panel.set_title(title, fontsize=8, color=TEXT, pad=4)
            center = (shape[0] - 1) / 2
            panel.plot(center, center, "o", markersize=5, mfc="none", mec="black", mew=0.8)
    return figure


def uncertainty(
    image: Num[Array | np.ndarray, "height width *channels"],
    scores: Float[Array | np.ndarray, "rows columns labels"],
    variances: Float[Array | np.ndarray, "rows columns labels"],
    *,
    palette: UInt8[np.ndarray, "colors 3"] | None = None,
    label_names: Sequence[str] | None = None,
    panel_width: float = 3.0,
) -> Figure:
    r"""Shows how sure a Gaussian CRF is: image, labels, standard deviations, and the chance of the runner-up.

    The third picture is :math:`σ` of the winning label's score, from white to dark, but for the outermost hundredths.
    The fourth is the chance that the second label's score is the larger one, taken as if the two were independent,
    :math:`Φ\bigl(-(x_1 - x_2) / \sqrt{σ_1^2 + σ_2^2}\bigr)`, from white for none to dark for a half.

    Args:
        image: `[H, W, 3]`, or `[H, W]` for gray, in 0 … 255.
        scores: `[h, w, labels]`, at least two labels, of any resolution.
        variances: likewise.
        palette: one RGB colour per label, `[colors, 3]`; None means Pascal VOC's.
        label_names: the labels' names for a legend; None for no legend.
        panel_width: the width of one picture in inches.

    Returns:
        The figure.

    Raises:
        ValueError: if shapes disagree, or variances are not positive numbers, as of a system that is not definite.

    Example:
        >>> import jaxcrf
        >>> unary = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
        >>> result = jaxcrf.sparse_gaussian_crf(
        ...     np.full((4, 6, 2), 0.1), unary, kind="potts", regularization=1.0, variances=True
        ... )
        >>> figure = uncertainty(np.zeros((4, 6, 3)), result.scores, result.variances)
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'labels', 'σ of the winner', 'chance of the runner-up']
    """
    x, v = np.asarray(scores, np.float64), np.asarray(variances, np.float64)
    if x.ndim != 3 or x.shape[-1] < 2 or x.shape != v.shape:
        raise ValueError(
            f"scores, variances: got shapes {x.shape} and {v.shape}; expected [rows, columns, labels] of both, "
            "with two labels or more"
        )
    if not (v > 0).all():
        raise ValueError("variances: hold NaN or numbers <= 0; only definite systems have variances")
    order = np.argsort(-x, axis=-1)[..., :2]
    (first, second), (v1, v2) = (np.moveaxis(np.take_along_axis(a, order, -1), -1, 0) for a in (x, v))
    z = (first - second) / np.sqrt(2 * (v1 + v2))
    chance = 0.5 * np.vectorize(math.erfc)(z)
    deviation = np.sqrt(v1)
    least, most = np.quantile(deviation, [1 - SHOWN_IN_FULL, SHOWN_IN_FULL])
    shares = (deviation - least) / (most - least if most > least else 1)
    winners = order[..., 0]
    pictures = {
        "image": _rgb("image", image),
        "labels": _painted(winners, palette, None),
        "σ of the winner": shaded(shares),
        "chance of the runner-up": shaded(2 * chance),
    }
    ends = {2.5: (f"{least:.3g}", f"{most:.3g}"), 3.5: ("0", "½")}
    legends = [
        _Legend([_patch((255, 255, 255), low), _patch(SHADE, high)], center, panel_width)
        for center, (low, high) in ends.items()
    ]
    if label_names is not None:
        names = _label_patches(np.unique(winners).tolist(), label_names, palette)
        legends.append(_Legend(names, 1.0, 2 * panel_width))
    figure, axes = _panels([[p.shape for p in pictures.values()]], panel_width, titled=True, legends=legends)
    for panel, (title, picture) in zip(axes[0], pictures.items(), strict=True):
        _show(panel, picture, title)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: float = 150) -> None:
    """Writes a figure, in the format that the suffix names.

    Args:
        figure: the figure.
        path: where to; an existing file is replaced in one step.
        dpi: pixels per inch.

    Raises:
        ValueError: if the suffix is unknown.
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> save_figure(segmentation_grid({"labels": np.array([[0, 1]])}), path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    path = Path(path)
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise ValueError(f"{path}: has no suffix of a figure format; use one of {', '.join(sorted(kinds))}")
    with replacing(path) as file:
        figure.savefig(file, format=kind, dpi=dpi)


def _names(labels: Sequence[int], count: int, names: Sequence[str] | None) -> list[str]:
    for label in labels:
        if not 0 <= label < count:
            raise ValueError(f"labels: got {label}; expected labels from 0 to {count - 1}")
    if names is not None and len(names) < count:
        raise ValueError(f"label_names: got {len(names)} names for {count} labels; name every label")
    return [str(label) if names is None else names[label] for label in labels]


# What pictures of numbers fade to from white: blue and orange for the two signs, and one shade for amounts.
_NEGATIVE, _POSITIVE, SHADE = (0, 86, 150), (190, 80, 0), (60, 24, 90)


def diverging(values: np.ndarray, limit: float) -> np.ndarray:
    """White for zero, deeper colours for larger magnitudes, which count as `limit` beyond it."""
    share = np.clip(values / limit if limit > 0 else np.zeros_like(values), -1, 1)[..., None]
    color = np.where(share < 0, np.array(_NEGATIVE), np.array(_POSITIVE))
    return np.round(255 + np.abs(share) * (color - 255)).astype(np.uint8)


def shaded(shares: np.ndarray) -> np.ndarray:
    """White for 0, dark for 1."""
    share = np.clip(shares, 0, 1)[..., None]
    return np.round(255 + share * (np.array(SHADE) - 255)).astype(np.uint8)


def _rgb(name: str, image: Any) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, -1)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind not in "iuf":
        raise ValueError(
            f"{name}: got shape {image.shape} and dtype {image.dtype}; expected numbers in 0 to 255, "
            "[height, width, 3] or [height, width]"
        )
    return image if image.dtype == np.uint8 else np.clip(np.round(image), 0, 255).astype(np.uint8)


def _label_map(name: str, labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {labels.dtype}; expected integer labels, e.g. probs.argmax(-1)")
    if labels.ndim != 2:
        raise ValueError(f"{name}: got shape {labels.shape}; expected one label map [height, width]")
    return labels


def _colored(labels: np.ndarray, valid: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    palette = voc_palette() if palette is None else np.asarray(palette)
    low, high = labels.min(where=valid, initial=0), labels.max(where=valid, initial=0)
    if low < 0 or high >= len(palette):
        raise ValueError(
            f"labels: got label {low if low < 0 else high}, which is outside the palette of {len(palette)} "
            "colours; pass a larger palette, or name it as ignore_label"
        )
    return palette[np.where(valid, labels, 0)]


def _painted(labels: np.ndarray, palette: np.ndarray | None, ignore_label: int | None) -> np.ndarray:
    valid = np.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    return np.where(valid[..., None], _colored(labels, valid, palette), 255).astype(np.uint8)


def _difference_picture(
    truth: Any, before: Any, after: Any, image: Any, ignore_label: int | None
) -> tuple[np.ndarray, dict[str, float]]:
    maps = {"truth": truth, "before": before, "after": after}
    maps = {name: _label_map(name, labels) for name, labels in maps.items()}
    shape = maps["truth"].shape
    for name in ("before", "after"):
        if maps[name].shape != shape:
            raise ValueError(
                f"{name}: got shape {maps[name].shape}, but the truth is {shape}; resize one of them"
            )
    valid = np.ones(shape, bool) if ignore_label is None else maps["truth"] != ignore_label
    was_right, is_right = maps["before"] == maps["truth"], maps["after"] == maps["truth"]
    masks = {
        "correct": was_right & is_right,
        "fixed": ~was_right & is_right,
        "broken": was_right & ~is_right,
        "still wrong": ~was_right & ~is_right,
    }
    picture = np.full((*shape, 3), 255, np.uint8)
    for name, mask in masks.items():
        picture[mask & valid] = DIFFERENCE_COLORS[name]
    if image is not None:
        image = _rgb("image", image)
        if image.shape[:2] != shape:
            raise ValueError(f"image: got shape {image.shape}, but the truth is {shape}; resize one of them")
        # Pale enough that none of its grays can be taken for one of the other colours.
        pale = 176 + 0.28 * image.mean(-1)
        shown = masks["correct"] & valid
        picture[shown] = pale[shown, None].round().astype(np.uint8)
    total = max(1, int(valid.sum()))
    return picture, {name: float((mask & valid).sum()) / total for name, mask in masks.items()}


def _difference_patches(shares: dict[str, float]) -> list[Patch]:
    return [_patch(DIFFERENCE_COLORS[name], f"{name}  {100 * share:.1f} %") for name, share in shares.items()]


def _label_patches(labels: Sequence[int], names: Sequence[str], palette: np.ndarray | None) -> list[Patch]:
    palette = voc_palette() if palette is None else np.asarray(palette)
    if labels and labels[-1] >= len(names):
        raise ValueError(
            f"label_names: got {len(names)} names, none for label {labels[-1]}; name every label"
        )
    return [_patch(palette[label], names[label]) for label in labels]


def _patch(color: Any, label: str) -> Patch:
    return Patch(facecolor=tuple(c / 255 for c in color), edgecolor="#00000040", linewidth=0.5, label=label)


def _panels(
    shapes: list[list[tuple[int, ...]]], width: float, *, titled: bool, legends: Sequence["_Legend"]
) -> tuple[Figure, list[list["Axes"]]]:
    """A figure laid out in inches: panels in the proportions of their pictures, legends underneath."""
    gap, title, row_of_legend = 0.08, 0.32 if titled else 0.0, 0.24
    heights = [width * max(shape[0] / shape[1] for shape in row) for row in shapes]
    legend = max((row_of_legend * legend.rows + gap for legend in legends), default=0.0)
    total_width = len(shapes[0]) * (width + gap) + gap
    total_height = sum(heights) + gap * (len(heights) + 1) + title + legend
    figure = Figure(figsize=(total_width, total_height), facecolor="white")
    FigureCanvasAgg(figure)
    axes: list[list[Axes]] = []
    top = total_height - title
    for row, height in zip(shapes, heights, strict=True):
        top -= height + gap
        axes.append([])
        for column in range(len(row)):
            left = gap + column * (width + gap)
            box = (left / total_width, top / total_height, width / total_width, height / total_height)
            axes[-1].append(figure.add_axes(box))
    for entry in legends:
        figure.legend(
            handles=entry.patches,
            ncols=entry.columns,
            loc="upper center",
            bbox_to_anchor=((gap / 2 + entry.center * (width + gap)) / total_width, legend / total_height),
            frameon=False,
            fontsize=9,
            labelcolor=TEXT,
            handlelength=1.1,
            handleheight=1.1,
            handletextpad=0.5,
            columnspacing=1.2,
            borderpad=0,
            borderaxespad=0,
        )
    return figure, axes


@dataclasses.dataclass(frozen=True)
class _Legend:
    """A legend under the panels, its centre counted in panels from the left."""

    patches: list[Patch]
    center: float
    width: float

    @property
    def columns(self) -> int:
        # The text of a 9 point font is about 0.055 inches a letter.
        entry = 0.38 + 0.055 * max((len(str(patch.get_label())) for patch in self.patches), default=0)
        fitting = max(1, int(self.width / entry))
        # As many as fit, evened out over the rows.
        return max(1, math.ceil(len(self.patches) / math.ceil(max(1, len(self.patches)) / fitting)))

    @property
    def rows(self) -> int:
        return math.ceil(len(self.patches) / self.columns)


def _show(axes: "Axes", picture: np.ndarray, title: str | None) -> None:
    # Shrunken pictures are averaged, enlarged ones keep their pixels.
    axes.imshow(picture, interpolation="antialiased")
    axes.set_axis_off()
    if title is not None:
        axes.set_title(title, fontsize=11, color=TEXT, pad=5)

"""Charts: what they show, and that nothing sticks out of them."""

import numpy as np
import pytest

from jaxcrf import metrics, plots
from jaxcrf.metrics import PrecisionRecallCurve, TrimapCurve

CM = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 5, 5]])
NAMES = ["sky", "building", "a long name of a label", "$x$"]


def trimap(scale=1.0):
    widths = np.array([1, 2, 5])
    return TrimapCurve(
        widths, scale * np.array([0.5, 0.6, 0.7]), scale * np.array([0.2, 0.3, 0.4]), widths * 10
    )


def precision_recall(shift=0.0):
    return PrecisionRecallCurve(
        np.linspace(0, 1, 4), np.array([0.3, 0.6 + shift, 0.9, 0]), np.array([1, 0.8, 0.4, 0])
    )


ROWS = [
    {"step": 0, "loss": 3.0, "learning_rate": 0.1, "stage": "all", "time": np.arange(3)},
    {"step": 10, "loss": 2.0, "val/loss": 2.5, "validation_mean_iou": 0.25, "final": True},
    {"step": 20, "loss": np.float32(1.0), "validation_mean_iou": 0.5},
]

FIGURES = {
    "confusion": lambda: plots.confusion_matrix(CM, NAMES),
    "confusion of one label": lambda: plots.confusion_matrix([[3]]),
    "bars": lambda: plots.per_class_bars(CM, NAMES),
    "bars of two": lambda: plots.per_class_bars({"before": CM, "after": CM.T}, NAMES),
    "trimap": lambda: plots.trimap_curve(trimap()),
    "trimap of two": lambda: plots.trimap_curve({"before": trimap(), "after": trimap(1.2)}),
    "precision and recall": lambda: plots.precision_recall(
        {"a": precision_recall(), "b": precision_recall(0.1)}
    ),
    "training": lambda: plots.training_curves(ROWS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_sticks_out(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    assert figure.axes
    artists = [*figure.axes, *figure.legends]
    for artist in artists:
        box = artist.get_tightbbox(renderer)
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    # Nor into each other: a legend over a panel's title, say.
    boxes = [artist.get_tightbbox(renderer) for artist in artists]
    for k, a in enumerate(boxes):
        for b in boxes[:k]:
            # A ring in the corner of a panel may touch what is above it.
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) <= 2


def test_confusions_are_shares_of_their_row():
    figure = plots.confusion_matrix(CM, NAMES)
    [axes] = figure.axes
    shown = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "75", (0, 1): "25", (1, 0): "25", (1, 1): "75", (3, 2): "50", (3, 3): "50"}
    picture = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(picture[2], 255)
    assert (picture[0, 0] < picture[0, 1]).all()
    assert [t.get_text() for t in axes.get_yticklabels()] == [*NAMES[:3], r"\$x\$"]
    assert not plots.confusion_matrix(np.eye(30)).axes[0].texts


def test_bars_are_the_ious():
    figure = plots.per_class_bars({"before": CM, "after": np.diag([1, 2, 3, 4])}, NAMES)
    [axes] = figure.axes
    before, after = axes.containers
    ious = np.append(metrics.per_class_iou(CM), metrics.mean_iou(CM))
    np.testing.assert_allclose([bar.get_width() for bar in before], 100 * np.nan_to_num(ious), rtol=1e-6)
    np.testing.assert_allclose([bar.get_width() for bar in after], 100)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    alone = np.diag([1, 0])
    assert [t.get_text() for t in plots.per_class_bars(alone).axes[0].texts] == ["100.0", "–", "100.0"]


def test_curves_are_drawn_as_they_are():
    figure = plots.trimap_curve({"before": trimap(), "after": trimap(1.2)})
    for axes, field in zip(figure.axes, ("accuracy", "mean_iou"), strict=True):
        for line, curve in zip(axes.lines, (trimap(), trimap(1.2)), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), curve.widths)
            np.testing.assert_allclose(line.get_ydata(), 100 * getattr(curve, field))
    figure = plots.precision_recall(precision_recall())
    curve, ring = figure.axes[0].lines
    # The threshold that marks nothing is left out; the ring is where F is largest.
    np.testing.assert_array_equal(curve.get_xdata(), [1, 0.8, 0.4])
    best = int(np.argmax([1.3 * p * r / (0.3 * p + r) for p, r in ((0.3, 1), (0.6, 0.8), (0.9, 0.4))]))
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == ((1, 0.3), (0.8, 0.6), (0.4, 0.9))[best]


def test_training_curves_group_by_quantity():
    figure = plots.training_curves(ROWS)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "learning_rate", "mean_iou"]
    train, val = figure.axes[0].lines
    np.testing.assert_array_equal(train.get_xydata(), [[0, 3], [10, 2], [20, 1]])
    np.testing.assert_array_equal(val.get_xydata(), [[10, 2.5]])
    assert val.get_marker() == "o"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training", "val"]
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["validation"]
    assert figure.axes[1].get_legend() is None
    figure = plots.training_curves(ROWS, names=["mean_iou"])
    assert [axes.get_title() for axes in figure.axes] == ["mean_iou"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"cm: got shape \(2, 3\)"):
        plots.confusion_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="label_names: got 1 names for 4 labels"):
        plots.confusion_matrix(CM, ["sky"])
    with pytest.raises(ValueError, match=r"scores: got the numbers of labels \{'a': 4, 'b': 2\}"):
        plots.per_class_bars({"a": CM, "b": np.eye(2)})
    with pytest.raises(ValueError, match=r"scores: got the numbers of labels \{\}"):
        plots.per_class_bars({})
    with pytest.raises(ValueError, match="curves: got none"):
        plots.trimap_curve({})
    with pytest.raises(ValueError, match="curves: got none"):
        plots.precision_recall({})
    with pytest.raises(ValueError, match="rows: got row 1 without a 'step'; it has loss"):
        plots.training_curves([{"step": 0, "loss": 1.0}, {"loss": 1.0}])
    with pytest.raises(ValueError, match="names: got 'iou'; the rows have loss"):
        plots.training_curves([{"step": 0, "loss": 1.0}], names=["iou"])
    with pytest.raises(ValueError, match="rows: got 0 rows without a number"):
        plots.training_curves([])

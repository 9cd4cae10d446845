import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxcrf import plots
from jaxcrf.data import voc_palette
from jaxcrf.filters import Gram, Grid

GRAY = np.full((6, 8, 3), 100, np.uint8)
LABELS = np.zeros((6, 8), int)
LABELS[:, 4:] = 1


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def test_overlay_blends_inside_and_is_opaque_on_both_sides_of_a_boundary():
    picture = plots.overlay(GRAY, LABELS, alpha=0.25)
    assert picture.dtype == np.uint8
    assert picture.shape == (6, 8, 3)
    np.testing.assert_array_equal(picture[0, 0], [75, 75, 75])
    np.testing.assert_array_equal(picture[0, 7], [107, 75, 75])
    np.testing.assert_array_equal(picture[:, 3], np.tile(voc_palette()[0], (6, 1)))
    np.testing.assert_array_equal(picture[:, 4], np.tile(voc_palette()[1], (6, 1)))


def test_overlay_leaves_ignored_pixels_alone():
    labels = np.where(LABELS == 1, 255, 2)
    picture = plots.overlay(GRAY, labels, palette=np.array([[0, 0, 0], [1, 1, 1], [0, 250, 0]], np.uint8))
    np.testing.assert_array_equal(picture[:, 4:], GRAY[:, 4:])
    np.testing.assert_array_equal(picture[0, 3], [0, 250, 0])
    assert (plots.overlay(GRAY, labels, ignore_label=None)[:, 5:] != GRAY[:, 5:]).any()


@pytest.mark.parametrize("image", [GRAY[..., 0], GRAY[..., :1], GRAY.astype(np.float32)])
def test_overlay_takes_gray_and_float_images(image):
    np.testing.assert_array_equal(plots.overlay(image, LABELS), plots.overlay(GRAY, LABELS))


def test_overlay_does_not_change_its_arguments():
    image, labels = GRAY.copy(), LABELS.copy()
    plots.overlay(image, labels)
    np.testing.assert_array_equal(image, GRAY)
    np.testing.assert_array_equal(labels, LABELS)


def test_overlay_of_a_single_pixel():
    np.testing.assert_array_equal(plots.overlay(GRAY[:1, :1], LABELS[:1, :1], alpha=1.0), [[[0, 0, 0]]])


def test_overlay_refuses_bad_input():
    with pytest.raises(ValueError, match=r"labels: got shape \(5, 8\), but the image is \(6, 8\)"):
        plots.overlay(GRAY, LABELS[:5])
    with pytest.raises(TypeError, match="labels: got dtype float64"):
        plots.overlay(GRAY, LABELS * 1.0)
    with pytest.raises(ValueError, match=r"alpha: got 1\.5"):
        plots.overlay(GRAY, LABELS, alpha=1.5)
    with pytest.raises(ValueError, match="labels: got label 1, which is outside the palette of 1"):
        plots.overlay(GRAY, LABELS, palette=np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="labels: got label -1"):
        plots.overlay(GRAY, LABELS - 1)
    with pytest.raises(ValueError, match=r"image: got shape \(6, 8, 4\)"):
        plots.overlay(np.zeros((6, 8, 4)), LABELS)


def test_segmentation_grid_shows_the_pictures_with_titles_and_names():
    figure = plots.segmentation_grid(
        {"image": [GRAY, GRAY], "labels": [LABELS, LABELS]}, label_names=["sky", "tree", "unseen"]
    )
    assert [axes.get_title() for axes in figure.axes] == ["image", "labels", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "tree"]
    colors = {tuple(color) for color in rendered(figure).reshape(-1, 3)}
    assert {(100, 100, 100), (0, 0, 0), (128, 0, 0)} <= colors


def test_void_is_white_and_not_named():
    labels = np.where(LABELS == 1, 255, 1)
    figure = plots.segmentation_grid({"labels": labels}, label_names=["sky", "tree"])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[0, -1], [255, 255, 255])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tree"]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_legends_stay_inside_the_figure_and_off_the_panels(count):
    labels = np.arange(count)[None].repeat(10, 0)
    figure = plots.segmentation_grid(
        {"labels": labels, "again": labels}, label_names=[f"label {k}" for k in range(count)]
    )
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    width = figure.get_figwidth() * figure.dpi
    assert legend.x0 >= 0
    assert legend.y0 >= 0
    assert legend.x1 <= width
    assert legend.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)


def test_feature_maps_are_stretched_channel_by_channel():
    maps = np.zeros((2, 3, 5))
    maps[..., 0] = [[1, 1, 1], [1, 1, 2]]
    maps[..., 1] = [[-30, -30, -30], [0, 0, 0]]
    figure = plots.feature_maps(
        {"first": maps, "second": 7 - 1e-3 * maps}, {"image": [GRAY, LABELS]}, count=3
    )
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["image", "map 1", "map 2", "map 3"] + 4 * [""]
    np.testing.assert_array_equal(shown[0], GRAY)
    for k, levels in (
        (1, [[0, 0, 0], [0, 0, 255]]),
        (2, [[0, 0, 0], [255, 255, 255]]),
        (3, np.zeros((2, 3))),
    ):
        np.testing.assert_array_equal(shown[k], np.repeat(np.array(levels)[..., None], 3, -1))
        if k < 3:
            np.testing.assert_array_equal(shown[4 + k], 255 - shown[k])
    assert len(plots.feature_maps({"narrow": maps[..., :2]}).axes) == 2


def test_feature_maps_refuse_bad_input():
    maps = np.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="maps: got none"):
        plots.feature_maps({})
    with pytest.raises(ValueError, match="count: got 0"):
        plots.feature_maps({"a": maps}, count=0)
    with pytest.raises(ValueError, match=r"maps\['a'\]: got shape \(1, 2, 3, 5\)"):
        plots.feature_maps({"a": maps[None]})
    with pytest.raises(ValueError, match=r"maps\['a'\]: holds NaN"):
        plots.feature_maps({"a": np.nan * maps})
    with pytest.raises(ValueError, match="columns: got different numbers of rows"):
        plots.feature_maps({"a": maps}, {"image": [GRAY, GRAY]})


def test_segmentation_grid_refuses_bad_input():
    with pytest.raises(ValueError, match=r"columns: got \{\}"):
        plots.segmentation_grid({})
    with pytest.raises(ValueError, match="columns: got different numbers of rows"):
        plots.segmentation_grid({"a": [GRAY], "b": [GRAY, GRAY]})
    with pytest.raises(ValueError, match=r"columns\['a'\]: got shape \(6, 8\) and dtype float64"):
        plots.segmentation_grid({"a": np.zeros((6, 8))})
    with pytest.raises(ValueError, match="label_names: got 1 names, none for label 1"):
        plots.segmentation_grid({"a": LABELS}, label_names=["sky"])


TRUTH = np.array([[0, 0, 0, 0, 255]])
BEFORE = np.array([[0, 1, 0, 1, 0]])
AFTER = np.array([[0, 0, 1, 2, 1]])


def test_difference_colours_and_shares():
    figure = plots.difference(TRUTH, BEFORE, AFTER)
    names = ["correct", "fixed", "broken", "still wrong"]
    picture = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(
        picture[0], [*(plots.DIFFERENCE_COLORS[name] for name in names), (255, 255, 255)]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"{name}  25.0 %" for name in names
    ]


def test_difference_shows_the_image_where_it_is_correct():
    image = np.zeros((1, 5, 3), np.uint8)
    image[0, 0] = 255
    pale = plots.difference(TRUTH, TRUTH, AFTER, image=image).axes[0].images[0].get_array()
    assert pale[0, 0, 0] > pale[0, 1, 0] > 150
    assert tuple(pale[0, 2]) == plots.DIFFERENCE_COLORS["broken"]
    with pytest.raises(ValueError, match=r"image: got shape \(6, 8, 3\), but the truth is \(1, 5\)"):
        plots.difference(TRUTH, BEFORE, AFTER, image=GRAY)


def test_difference_of_nothing_that_counts():
    figure = plots.difference(TRUTH * 0 + 255, BEFORE, AFTER)
    assert figure.legends[0].get_texts()[0].get_text() == "correct  0.0 %"


def test_difference_refuses_maps_of_different_sizes():
    with pytest.raises(ValueError, match=r"after: got shape \(6, 8\), but the truth is \(1, 5\)"):
        plots.difference(TRUTH, BEFORE, LABELS)
    with pytest.raises(TypeError, match="before: got dtype float64"):
        plots.difference(TRUTH, BEFORE * 1.0, AFTER)


def test_refinement_figure():
    figure = plots.refinement_figure(GRAY, LABELS, LABELS * 0, LABELS, label_names=["sky", "tree"])
    assert [axes.get_title() for axes in figure.axes] == ["image", "before", "after", "difference"]
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert texts == {"sky", "tree", "correct  50.0 %", "fixed  50.0 %", "broken  0.0 %", "still wrong  0.0 %"}
    assert len(plots.refinement_figure(GRAY, LABELS, LABELS, LABELS).legends) == 1
    with pytest.raises(ValueError, match="titles: got 1"):
        plots.refinement_figure(GRAY, LABELS, LABELS, LABELS, titles=["a"])


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "JPG"])
def test_save_figure(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    plots.save_figure(plots.segmentation_grid({"labels": LABELS}), path)
    assert path.stat().st_size > 100
    assert list(tmp_path.iterdir()) == [path]


def test_save_figure_scales_with_dpi(tmp_path):
    figure = plots.segmentation_grid({"labels": LABELS})
    plots.save_figure(figure, tmp_path / "figure.png", dpi=50)
    with Image.open(tmp_path / "figure.png") as image:
        np.testing.assert_allclose(image.size, figure.get_size_inches() * 50, atol=1)


def test_save_figure_refuses_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.xyz: has no suffix of a figure format"):
        plots.save_figure(plots.segmentation_grid({"labels": LABELS}), tmp_path / "figure.xyz")
    with pytest.raises(FileNotFoundError):
        plots.save_figure(plots.segmentation_grid({"labels": LABELS}), tmp_path / "missing" / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_stays_unloaded():
    code = "import sys, jaxcrf.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def edge_grid():
    edges = np.zeros((4, 5, 2), np.float32)
    edges[1, 2] = [3.0, -1.5]  # from (1, 2) to the right and down
    return Grid(edges, connectivity=4, kind="potts")


def test_affinities_are_the_terms_of_the_reference_pixel():
    figure = plots.affinity(edge_grid(), (1, 2))
    [axes] = figure.axes
    picture = axes.images[0].get_array()
    assert axes.get_title() == "pairwise terms"
    np.testing.assert_array_equal(picture[1, 3], [190, 80, 0])  # the strongest positive term
    assert picture[2, 2, 2] > picture[2, 2, 0]  # half of it, and negative: bluish
    others = np.ones((4, 5), bool)
    others[1, 3] = others[2, 2] = False
    assert (picture[others] == 255).all()
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(2.0, 1.0)] * 2  # the ring


def test_affinities_of_several_pixels_beside_a_larger_image():
    figure = plots.affinity(edge_grid(), [(1, 2), (0, 0)], image=np.zeros((8, 10, 3), np.uint8))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["reference pixel", "pairwise terms", "", ""]
    assert tuple(figure.axes[0].lines[0].get_xydata()[0]) == (4.5, 2.5)
    assert (figure.axes[3].images[0].get_array() == 255).all()  # it has no edges
    assert rendered(figure).shape[2] == 3


def test_affinities_of_label_pairs():
    embeddings = np.random.default_rng(0).normal(size=(4, 5, 3, 2)).astype(np.float32)
    K = Gram(embeddings, kind="general")
    titles = [axes.get_title() for axes in plots.affinity(K, (0, 0)).axes]
    assert titles == ["0 – 0", "0 – 1", "0 – 2"]
    figure = plots.affinity(K, (0, 0), labels=(2, [1]), label_names=["road", "car", "sky"])
    [axes] = figure.axes
    assert axes.get_title() == "sky – car"
    terms = embeddings[..., 1, :] @ embeddings[0, 0, 2]
    positive = axes.images[0].get_array()[..., 0] > axes.images[0].get_array()[..., 2]
    np.testing.assert_array_equal(positive[np.abs(terms) > 0.1], (terms > 0)[np.abs(terms) > 0.1])


def test_affinities_refuse_bad_input():
    with pytest.raises(ValueError, match=r"pixels: got \(4, 0\); expected \(y, x\) inside \(4, 5\)"):
        plots.affinity(edge_grid(), (4, 0))
    with pytest.raises(ValueError, match=r"K: got batch axes \(2,\)"):
        plots.affinity(Gram(np.ones((2, 3, 4, 1)), kind="potts"), (0, 0))
    with pytest.raises(ValueError, match="only filters over images"):
        plots.affinity(Gram(np.ones((2, 3, 4, 1)), kind="potts", spatial_ndim=3), (0, 0))
    K = Gram(np.ones((3, 4, 2, 1)), kind="general")
    with pytest.raises(ValueError, match="labels: got 2; expected labels from 0 to 1"):
        plots.affinity(K, (0, 0), labels=(0, [2]))
    with pytest.raises(ValueError, match="label_names: got 1 names for 2 labels"):
        plots.affinity(K, (0, 0), label_names=["road"])


def test_uncertainty_shows_deviations_and_doubts():
    scores = np.zeros((2, 3, 2))
    scores[..., 1] = [[0.0, 1.0, 8.0], [0.0, 1.0, -8.0]]
    variances = np.ones((2, 3, 2))
    variances[0] = 4.0
    figure = plots.uncertainty(GRAY, scores, variances, label_names=["road", "car"])
    axes = dict(zip(["image", "labels", "deviation", "chance"], figure.axes, strict=True))
    deviation = axes["deviation"].images[0].get_array()
    assert (deviation[1] == 255).all()  # the least uncertain
    np.testing.assert_array_equal(deviation[0], np.tile([60, 24, 90], (3, 1)))
    chance = axes["chance"].images[0].get_array()
    np.testing.assert_array_equal(chance[:, 0], np.tile([60, 24, 90], (2, 1)))  # a tie
    assert (chance[1, 2] >= 254).all()  # no doubt
    # Φ(-1 / √2) of one half: from the error function's table.
    np.testing.assert_allclose(chance[1, 1], 255 + 2 * 0.23975 * (np.array([60, 24, 90]) - 255), atol=1)
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"1", "2", "0", "½", "road", "car"} == texts


def test_uncertainty_refuses_bad_input():
    scores = np.zeros((2, 3, 2))
    with pytest.raises(ValueError, match=r"got shapes \(2, 3, 2\) and \(2, 3, 1\)"):
        plots.uncertainty(GRAY, scores, np.ones((2, 3, 1)))
    with pytest.raises(ValueError, match="variances: hold NaN"):
        plots.uncertainty(GRAY, scores, np.full((2, 3, 2), np.nan))


def test_compatibility_shows_pairs_of_labels_less_what_all_of_a_row_have():
    penalties = np.array([[9.0, 2.0, 4.0], [0.0, 0.0, 2.0], [7.0, 5.0, 5.0]])
    figure = plots.compatibility(penalties, ["sky", "tree", "road"])
    (axes,) = figure.axes
    picture = axes.images[0].get_array()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["sky", "tree", "road"]
    # ±1 in every row; the ninth of the first cell is beyond the scale.
    orange, blue = [190, 80, 0], [0, 86, 150]
    np.testing.assert_array_equal(picture[0], [orange, blue, orange])
    np.testing.assert_array_equal(picture[1, [0, 2]], [blue, orange])
    np.testing.assert_array_equal(picture[2, :2], [orange, blue])
    np.testing.assert_array_equal(
        plots.compatibility(penalties + np.array([[1], [2], [3]])).axes[0].images[0].get_array(), picture
    )
    assert (plots.compatibility(np.ones((1, 1))).axes[0].images[0].get_array() == 255).all()


def test_compatibility_refuses_bad_input():
    with pytest.raises(ValueError, match=r"penalties: got shape \(2, 3\)"):
        plots.compatibility(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="penalties: hold NaN"):
        plots.compatibility(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="label_names: got 1 names for 2 labels"):
        plots.compatibility(np.zeros((2, 2)), ["sky"])


def test_label_contexts_shows_the_second_label_around_the_first():
    contexts = np.zeros((3, 3, 2, 2, 2))
    contexts[0, 1, 1, 0, 0] = -4.0  # a tree above goes with sky
    contexts[2, 1, 1, 0, 1] = 4.0  # a tree below speaks against it
    figure = plots.label_contexts(contexts, [(0, 1), (1, 0)], label_names=["sky", "tree"])
    assert [axes.get_title() for axes in figure.axes] == ["sky: tree", "tree: sky", "", ""]
    first, other, second, _ = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert first.shape == (3, 3, 3)
    np.testing.assert_array_equal(first[0, 1], [0, 86, 150])
    np.testing.assert_array_equal(second[2, 1], [190, 80, 0])
    assert (other == 255).all()
    assert (np.delete(first.reshape(9, 3), 1, 0) == 255).all()
    rendered(figure)


@pytest.mark.parametrize(
    ("contexts", "pairs", "message"),
    [
        (np.zeros((3, 3, 2, 2)), [(0, 1)], r"contexts: got shape \(3, 3, 2, 2\)"),
        (np.zeros((3, 5, 2, 2, 1)), [(0, 1)], r"contexts: got shape \(3, 5, 2, 2, 1\)"),
        (np.full((3, 3, 2, 2, 1), np.inf), [(0, 1)], "contexts: hold NaN or infinities"),
        (np.zeros((3, 3, 2, 2, 1)), [], "pairs: got none"),
        (np.zeros((3, 3, 2, 2, 1)), [(0, 2)], "labels: got 2; expected labels from 0 to 1"),
    ],
)
def test_label_contexts_refuses_bad_input(contexts, pairs, message):
    with pytest.raises(ValueError, match=message):
        plots.label_contexts(contexts, pairs)

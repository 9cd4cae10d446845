"""Evaluation: totals against those of all images at once, whatever their sizes, and what is refused."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrf import metrics
from jaxcrf.evaluation import evaluate, make_predictor

LABELS = ("sky", "tree", "car")
SIZES = [(12, 16), (12, 16), (9, 20), (12, 16), (12, 16), (12, 16)]


@dataclasses.dataclass
class Source:
    examples: list
    label_names: tuple = LABELS
    ignore_label: int | None = 255
    names: tuple = ()

    def __post_init__(self):
        self.names = self.names or tuple(f"image {k}" for k in range(len(self.examples)))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@pytest.fixture(scope="module")
def source():
    random = np.random.default_rng(0)
    examples = []
    for k, (height, width) in enumerate(SIZES):
        truth = np.zeros((height, width), np.int32)
        truth[:, width // 2 :] = 1
        truth[height // 2 :, : width // 3] = 2 if k != 4 else 0
        truth[:, width // 2] = 255
        # Every image says in its first channel what it is, with some noise, of which the third has the most.
        seen = np.where(
            random.random(truth.shape) < (0.4 if k == 2 else 0.05 * k),
            random.integers(0, 3, truth.shape),
            truth,
        )
        image = np.stack([seen % 255 * 80, seen * 0, seen * 0], -1).astype(np.uint8)
        examples.append((image, truth))
    return Source(examples)


def labels_of(image):
    return (np.asarray(image)[..., 0] // 80).astype(np.int32)


def probs_of(image):
    return 0.1 + 0.7 * jnp.eye(3)[labels_of(image)]


@pytest.fixture(scope="module")
def result(source):
    return evaluate(labels_of, source, num_pictures=2)


def test_totals_are_those_of_all_pixels(source, result):
    cm = np.zeros((3, 3), np.int64)
    trimap = metrics.TrimapCounts.zeros(3, around="labels")
    objects = metrics.ObjectCounts.zeros(3)
    for image, truth in source.examples:
        cm += np.asarray(metrics.confusion_matrix(truth, labels_of(image), 3))
        trimap = trimap.update(truth, labels_of(image))
        objects = objects.update(truth, labels_of(image))
    np.testing.assert_array_equal(result.confusion, cm)
    for found, expected in zip(result.trimap, trimap.curve(), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(result.objects, objects.scores(), strict=True):
        np.testing.assert_array_equal(found, expected)
    totals = result.totals()
    assert totals["mean_iou"] == pytest.approx(float(metrics.mean_iou(cm)))
    assert totals["pixel_accuracy"] == pytest.approx(np.trace(cm) / cm.sum())
    assert totals["tagging_accuracy"] == pytest.approx(np.nanmean(objects.scores().tagging))
    assert [row.name for row in result.table()] == list(LABELS)


def test_bands_around_void_do_not_see_the_padding(source):
    curve = evaluate(labels_of, source, around="void", widths=(1, 3)).trimap
    counts = metrics.TrimapCounts.zeros(3, widths=(1, 3), around="void")
    for image, truth in source.examples:
        counts = counts.update(truth, labels_of(image))
    for found, expected in zip(curve, counts.curve(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_scores_of_images(source, result):
    assert [score.name for score in result.images] == list(source.names)
    for score, (image, truth) in zip(result.images, source.examples, strict=True):
        cm = metrics.confusion_matrix(truth, labels_of(image), 3)
        assert score.mean_iou == pytest.approx(float(metrics.mean_iou(cm)))
        assert score.accuracy == pytest.approx(float(metrics.pixel_accuracy(cm)))


def test_the_worst_and_the_best_are_kept(source, result):
    order = sorted(result.images, key=lambda score: score.mean_iou)
    assert [picture.score for picture in result.worst] == order[:2]
    assert [picture.score for picture in result.best] == order[:-3:-1]
    worst = result.worst[0]
    np.testing.assert_array_equal(worst.image, source[worst.score.index][0])
    np.testing.assert_array_equal(worst.truth, source[worst.score.index][1])
    np.testing.assert_array_equal(worst.prediction, labels_of(worst.image))
    # No image is among both.
    everything = evaluate(labels_of, source, num_pictures=4)
    assert len(everything.worst) == 4
    assert [p.score for p in everything.best] == order[:-3:-1]
    assert evaluate(labels_of, Source(source.examples[:1]), num_pictures=0).worst == ()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_are_full_and_give_the_same(source, result, batch_size):
    shapes = []

    def predict(images):
        shapes.append(images.shape)
        return probs_of(images)

    batched = evaluate(predict, source, batch_size=batch_size)
    assert {shape[0] for shape in shapes} == {batch_size}
    assert len(set(shapes)) == 2
    np.testing.assert_array_equal(batched.confusion, result.confusion)
    assert batched.images == result.images


def test_refinement_is_compared_with_what_it_began_with(source, result):
    truths = {image.tobytes(): truth for image, truth in source.examples}

    def refine(image, probs):
        assert probs.shape == (*image.shape[:2], 3)
        return np.where(truths[image.tobytes()] == 2, 2, np.asarray(probs).argmax(-1))

    compared = evaluate(probs_of, source, refine=refine)
    np.testing.assert_array_equal(compared.baseline.confusion, result.confusion)
    assert compared.baseline.images == result.images
    assert compared.confusion[2, 2] == compared.confusion[2].sum() > result.confusion[2, 2]
    worst = compared.worst[0]
    np.testing.assert_array_equal(worst.before, labels_of(worst.image))
    assert worst.before_score == result.images[worst.score.index]
    assert compared.seconds >= compared.baseline.seconds > 0


def test_two_labels_with_probabilities_have_a_curve(source):
    pairs = [(image, np.where(truth == 255, 255, truth % 2)) for image, truth in source.examples]

    def predict(image):
        p = (labels_of(image) % 2) * 0.5 + 0.25
        return np.stack([1 - p, p], -1)

    found = evaluate(predict, Source(pairs, label_names=("other", "salient")))
    counts = metrics.ThresholdCounts.zeros()
    for image, truth in pairs:
        counts = counts.update(truth, predict(image)[..., 1].astype(np.float32))
    np.testing.assert_array_equal(found.saliency.precision, counts.curve().precision)
    assert found.totals()["max_f_measure"] == pytest.approx(counts.curve().f_measure().max())
    labels = evaluate(lambda image: labels_of(image) % 2, Source(pairs, label_names=("other", "salient")))
    assert labels.saliency is None
    logits = evaluate(lambda image: 9 * predict(image), Source(pairs, label_names=("other", "salient")))
    assert logits.saliency is None
    np.testing.assert_array_equal(logits.confusion, found.confusion)


def test_json_holds_the_numbers_and_no_nan(source, tmp_path):
    truth = np.where(source[0][1] == 2, 0, source[0][1])
    result = evaluate(lambda image: np.zeros(image.shape[:2], int), Source([(source[0][0], truth)]))
    result.save_json(tmp_path / "new" / "results.json")
    text = (tmp_path / "new" / "results.json").read_text()
    assert "NaN" not in text
    stored = json.loads(text)
    assert stored["totals"]["mean_iou"] == pytest.approx(result.totals()["mean_iou"])
    assert stored["per_class"][2]["iou"] is None
    assert stored["confusion"] == result.confusion.tolist()
    assert stored["images"] == [dataclasses.asdict(result.images[0])]
    assert stored["trimap"]["widths"] == result.trimap.widths.tolist()
    assert stored["circumstances"]["versions"]["jax"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_an_image_that_is_all_void_counts_nowhere(source):
    void = np.full((8, 8), 255)
    result = evaluate(
        lambda image: np.full(image.shape[:2], 255), Source([(np.zeros((8, 8, 3), np.uint8), void)])
    )
    assert math.isnan(result.images[0].mean_iou)
    assert result.worst == result.best == ()
    assert result.confusion.sum() == 0


def test_without_a_label_for_void_every_pixel_counts(source):
    examples = [(image, np.where(truth == 255, 1, truth)) for image, truth in source.examples[:2]]
    result = evaluate(lambda image: np.minimum(labels_of(image), 2), Source(examples, ignore_label=None))
    assert result.confusion.sum() == 2 * 12 * 16
    curve = metrics.trimap_curve(
        np.stack([truth for _, truth in examples]),
        np.stack([np.minimum(labels_of(image), 2) for image, _ in examples]),
        3,
        around="labels",
        ignore_label=None,
    )
    np.testing.assert_array_equal(result.trimap.mean_iou, curve.mean_iou)


def test_a_module_becomes_a_predictor(source):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Conv(3, 3, (1, 1), rngs=nnx.Rngs(0))
    predict = make_predictor(model)
    images = np.stack([image for image, _ in source.examples[:2]])
    probs = np.asarray(predict(images))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    logits = images.astype(np.float64) @ np.asarray(model.kernel[...], np.float64)[0, 0] + np.asarray(
        model.bias[...]
    )
    np.testing.assert_array_equal(probs.argmax(-1), logits.argmax(-1))
    assert evaluate(predict, source, batch_size=2).confusion.sum() > 0


def test_the_truth_of_real_images_is_right_everywhere(data_dir):
    from jaxcrf.data import voc_folder

    folder = voc_folder(data_dir / "voc_sample", "val")
    truths = {image.tobytes(): truth for image, truth in folder}
    result = evaluate(
        lambda image: truths[image.tobytes()],
        folder,
        background=0,
    )
    totals = result.totals()
    assert (totals["mean_iou"], totals["pixel_accuracy"], totals["tagging_accuracy"]) == (1, 1, 1)
    assert totals["localization_accuracy"] == 1
    assert totals["boundary_accuracy"] == 1
    assert (result.trimap.accuracy == 1).all()
    assert (np.diff(result.trimap.pixels) > 0).all()


@pytest.mark.parametrize(
    ("predict", "error", "message"),
    [
        (
            lambda image: labels_of(image)[1:],
            ValueError,
            "image 0: its prediction has the shape 11 x 16, but the image is 12 x 16",
        ),
        (
            lambda image: labels_of(image) + 3,
            ValueError,
            r"image 0: its prediction holds the label \d where the truth counts; expected 0 to 2",
        ),
        (
            lambda image: labels_of(image) * 1.0,
            TypeError,
            "image 0: its prediction holds float64; expected integer labels",
        ),
        (
            lambda image: probs_of(image)[..., :2],
            ValueError,
            "image 0: its prediction has probabilities of 2 labels, but the data have 3",
        ),
        (lambda image: probs_of(image) * np.nan, ValueError, "image 0: its prediction holds NaN"),
        (lambda image: 3, ValueError, "image 0: its prediction has the shape of a number"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(source, predict, error, message):
    with pytest.raises(error, match=message):
        evaluate(predict, source)


def test_sources_that_do_not_fit_are_refused(source):
    image, truth = source[0]
    with pytest.raises(ValueError, match="source: got no images"):
        evaluate(labels_of, Source([]))
    with pytest.raises(ValueError, match="source: got no label_names"):
        evaluate(labels_of, Source([source[0]], label_names=()))
    with pytest.raises(ValueError, match="image 0: its truth holds the label 7"):
        evaluate(labels_of, Source([(image, truth + 7)]))
    with pytest.raises(
        ValueError, match=r"image 0: the source gives an image of shape \(12, 16, 3\) and labels"
    ):
        evaluate(labels_of, Source([(image, truth[1:])]))


def test_options_out_of_range_are_refused(source):
    for options, message in (
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"num_pictures": -1}, "num_pictures: got -1"),
        ({"around": "edges"}, "around: got 'edges'"),
        ({"background": 3}, "background: got 3"),
        ({"widths": ()}, r"widths: got \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(labels_of, source, **options)
    with pytest.raises(ValueError, match=r"predict: got a result of shape \(1, 12, 16\) for 2 images"):
        evaluate(lambda images: labels_of(images)[:1], source, batch_size=2)

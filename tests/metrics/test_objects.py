"""Tagging, localisation and boundary accuracy against loops over pixels in float64."""

import math

import jax
import numpy as np
import pytest

from jaxcrf import metrics
from jaxcrf.metrics import ObjectCounts

NUM_LABELS = 4


def neighbours(i, j, shape):
    for y, x in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
        if 0 <= y < shape[0] and 0 <= x < shape[1]:
            yield y, x


def box(mask):
    found = np.argwhere(mask)
    return (*found.min(0), *(found.max(0) + 1)) if len(found) else None


def box_iou(a, b):
    if a is None or b is None:
        return 0.0
    common = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return common / (sum((r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)) - common)


def brute_force(labels, predictions, tolerance, num_labels=NUM_LABELS):
    tags, ious, precisions = ([[] for _ in range(num_labels)] for _ in range(3))
    seen = set()
    for truth, prediction in zip(labels, predictions, strict=True):
        valid = truth != 255
        width = math.floor(tolerance * math.hypot(*truth.shape))
        for k in range(num_labels):
            is_true, is_predicted = ((m == k) & valid for m in (truth, prediction))
            if is_true.any() or is_predicted.any():
                seen.add(k)
            tags[k].append(is_true.any() == is_predicted.any())
            if not is_true.any():
                continue
            ious[k].append(box_iou(box(is_true), box(is_predicted)))
            if ious[k][-1] < 0.5:
                continue
            edges = [
                [
                    (i, j)
                    for i, j in np.argwhere(m == k)
                    if any(m[y, x] != k for y, x in neighbours(i, j, m.shape))
                ]
                for m in (truth, prediction)
            ]
            right = judged = 0
            for i, j in edges[1]:
                near = any((i - y) ** 2 + (j - x) ** 2 <= width**2 for y, x in edges[0])
                right += near
                judged += near or valid[i, j]
            if judged:
                precisions[k].append(right / judged)
    mean = [[np.mean(v) if v else np.nan for v in values] for values in (tags, ious, precisions)]
    mean[0] = [value if k in seen else np.nan for k, value in enumerate(mean[0])]
    return mean


@pytest.fixture(scope="module")
def maps():
    random = np.random.default_rng(3)
    y, x = np.mgrid[:14, :17]
    labels, predictions = [], []
    for _ in range(8):
        truth, prediction = np.zeros((14, 17), int), np.zeros((14, 17), int)
        for k in random.choice([1, 2], random.integers(1, 3), replace=False):
            center, sizes = random.uniform([3, 3], [11, 14]), random.uniform(2, 5, 2)
            shift = random.normal(0, 0.8, 2)
            for target, by in ((truth, 0), (prediction, shift)):
                c = center + by
                target[((y - c[0]) / sizes[0]) ** 2 + ((x - c[1]) / sizes[1]) ** 2 < 1] = k
        # Void outlines, as in Pascal VOC, and a patch of it where nobody knows.
        edge = np.zeros(truth.shape, bool)
        edge[1:] |= truth[1:] != truth[:-1]
        truth = np.where(edge, 255, truth)
        truth[:3, :4] = 255
        prediction = np.where(random.random(truth.shape) < 0.02, 2, prediction)
        labels.append(truth)
        predictions.append(prediction)
    return np.stack(labels), np.stack(predictions)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.13])
def test_scores_against_a_loop(maps, tolerance):
    counts = ObjectCounts.zeros(NUM_LABELS, boundary_tolerance=tolerance).update(*maps)
    expected = brute_force(*maps, tolerance)
    assert np.isfinite(expected[2][1])
    assert 0 < expected[2][1] < 1 or tolerance > 0.1
    # IoUs and precisions are rounded to 2**-24.
    np.testing.assert_allclose(counts.scores(), expected, atol=2**-23)
    # Nothing is of the last label.
    assert np.isnan([score[3] for score in counts.scores()]).all()


def test_the_means_are_those_of_the_labels(maps):
    expected = brute_force(*maps, 0.05)
    for accuracy, values, options in (
        (metrics.tagging_accuracy, expected[0], {}),
        (metrics.localization_accuracy, expected[1], {}),
        (metrics.boundary_accuracy, expected[2], {"tolerance": 0.05}),
    ):
        found = accuracy(*maps, NUM_LABELS, **options)
        np.testing.assert_allclose(found, np.nanmean(values), atol=2**-23)
        found = accuracy(*maps, NUM_LABELS, background=0, **options)
        np.testing.assert_allclose(found, np.nanmean(values[1:]), atol=2**-23)


def test_padding_does_not_count(maps):
    labels, predictions = (m[:3] for m in maps)
    padding = ((0, 0), (0, 9), (0, 4))
    padded = np.pad(labels, padding, constant_values=-1), np.pad(predictions, padding, constant_values=3)
    zeros = ObjectCounts.zeros(NUM_LABELS, boundary_tolerance=0.1)
    for found, expected in zip(
        zeros.update(*padded).scores(), zeros.update(labels, predictions).scores(), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_perfect_labelling_scores_one(maps):
    truth = maps[0] % 255
    counts = ObjectCounts.zeros(NUM_LABELS, boundary_tolerance=0.0).update(truth, truth)
    assert [float(mean) for mean in counts.scores().means()] == [1, 1, 1]


def test_an_object_that_fills_the_image_has_no_boundary():
    ones = np.ones((5, 6), int)
    scores = ObjectCounts.zeros(2).update(ones, ones).scores()
    np.testing.assert_array_equal(scores.localization, [np.nan, 1])
    assert np.isnan(scores.boundary).all()


def test_scores_under_jit(maps):
    zeros = ObjectCounts.zeros(NUM_LABELS, boundary_tolerance=0.05)
    found = jax.jit(lambda *pair: zeros.update(*pair).scores())(*maps)
    np.testing.assert_allclose(found, brute_force(*maps, 0.05), rtol=1e-6)


def test_nothing_counts():
    zeros = ObjectCounts.zeros(2)
    assert zeros.update(np.zeros((0, 4, 5), int), np.zeros((0, 4, 5), int)) is zeros
    assert np.isnan(metrics.tagging_accuracy(np.full((4, 5), 255), np.zeros((4, 5), int), 2))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"boundary_tolerance: got 3; expected a fraction of the diagonal"):
        ObjectCounts.zeros(2, boundary_tolerance=3)
    with pytest.raises(ValueError, match="background: got 2; expected a label from 0 to 1"):
        ObjectCounts.zeros(2, background=2)
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\); expected \[\*batch, height, width\]"):
        metrics.tagging_accuracy(np.zeros(3, int), np.zeros(3, int), 2)

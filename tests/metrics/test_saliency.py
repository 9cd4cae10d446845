"""Precision, recall and F-measure against loops over thresholds in float64."""

import jax
import numpy as np
import pytest

from jaxcrf import metrics
from jaxcrf.metrics import ThresholdCounts

THRESHOLDS = 11


@pytest.fixture(scope="module")
def maps():
    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 255], (5, 7, 8), p=[0.6, 0.3, 0.1])
    labels[3] = np.where(labels[3] == 1, 0, labels[3])  # nothing salient
    scores = np.clip(0.3 * labels % 255 + random.normal(0.3, 0.2, labels.shape), 0, 0.93)
    # Some exactly on thresholds, as 8-bit maps are.
    scores = np.where(random.random(labels.shape) < 0.3, np.round(scores * 10) / 10, scores)
    return labels, scores.astype(np.float32)


def brute_force(labels, scores, average):
    precision, recall = [], []
    for t in np.linspace(0, 1, THRESHOLDS):
        ratios = []
        groups = [(labels, scores)] if average == "pixels" else zip(labels, scores, strict=True)
        for truth, score in groups:
            marked = (score >= np.float32(t)) & (truth != 255)
            hits, salient = (marked & (truth == 1)).sum(), (truth == 1).sum()
            if salient:
                ratios.append((hits / marked.sum() if marked.any() else 0, hits / salient))
        p, r = np.mean(ratios, 0)
        precision.append(p)
        recall.append(r)
    return np.array(precision), np.array(recall)


@pytest.mark.parametrize("average", ["images", "pixels"])
def test_curve_against_a_loop(maps, average):
    curve = metrics.precision_recall_curve(*maps, average=average, num_thresholds=THRESHOLDS)
    precision, recall = brute_force(*maps, average)
    # Ratios are rounded to float32, then to 2**-24.
    np.testing.assert_allclose(curve.precision, precision, atol=2**-22)
    np.testing.assert_allclose(curve.recall, recall, atol=2**-22)
    assert curve.precision[-1] == 0
    for beta_squared in (0.3, 1.0):
        f = [
            (1 + beta_squared) * p * r / (beta_squared * p + r) if p + r else 0
            for p, r in zip(precision, recall, strict=True)
        ]
        np.testing.assert_allclose(curve.f_measure(beta_squared), f, atol=1e-6)
        options = {"average": average, "num_thresholds": THRESHOLDS, "beta_squared": beta_squared}
        np.testing.assert_allclose(metrics.max_f_measure(*maps, **options), max(f), atol=1e-6)
        jitted = jax.jit(lambda *pair, options=options: metrics.max_f_measure(*pair, **options))
        np.testing.assert_allclose(jitted(*maps), max(f), atol=1e-5)


def test_every_level_of_8_bits_is_its_own_threshold():
    levels = np.arange(256)
    counts = ThresholdCounts.zeros().update(np.ones((1, 256), int), (levels / 255).astype(np.float32)[None])
    np.testing.assert_array_equal(counts.marked.value(), 256 - levels)


def test_a_mask_scores_one_and_nothing_salient_is_nan():
    labels = np.array([[0, 1, 1, 255]])
    assert metrics.max_f_measure(labels, (labels == 1).astype(np.float32)) == 1
    assert np.isnan(metrics.max_f_measure(labels * 0, np.ones((1, 4), np.float32)))
    assert np.isnan(metrics.max_f_measure(labels * 0, np.ones((1, 4), np.float32), average="pixels"))


def test_without_an_image_there_is_no_curve():
    assert np.isnan(metrics.max_f_measure(np.zeros((0, 3, 4), int), np.zeros((0, 3, 4), np.float32)))


@pytest.mark.parametrize(
    ("labels", "scores", "error", "message"),
    [
        ([[0, 2]], [[0.0, 1.0]], ValueError, "labels: hold something besides 0, 1 and ignore_label 255"),
        ([[0, 1]], [[0.0, 1.5]], ValueError, "scores: hold NaN or numbers outside 0 to 1"),
        ([[0, 1]], [[0.0, np.nan]], ValueError, "scores: hold NaN or numbers outside 0 to 1"),
        ([[0, 1]], [[0, 1]], TypeError, "scores: got dtype int"),
        ([[0, 1]], [[0.0]], ValueError, r"labels, scores: got shapes \(1, 2\) and \(1, 1\)"),
        ([[0.0, 1.0]], [[0.0, 1.0]], TypeError, "labels: got dtype float"),
    ],
)
def test_bad_input(labels, scores, error, message):
    with pytest.raises(error, match=message):
        metrics.max_f_measure(np.array(labels), np.array(scores))


def test_bad_options():
    with pytest.raises(ValueError, match="num_thresholds: got 1; expected at least 2"):
        ThresholdCounts.zeros(num_thresholds=1)
    with pytest.raises(ValueError, match="average: got 'median'"):
        ThresholdCounts.zeros().curve("median")
    # Where nothing counts, nothing is strange.
    metrics.max_f_measure(np.array([[1, 255]]), np.array([[1.0, 7.0]]))

"""Counts that grow batch by batch: exact, the same in any order, under jit and over devices."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrf import metrics
from jaxcrf.metrics import ConfusionCounts, ObjectCounts, ThresholdCounts, Total, TrimapCounts

SHAPE = (6, 9, 11)


@pytest.fixture(scope="module")
def maps():
    random = np.random.default_rng(0)
    labels = np.repeat(random.choice([0, 1, 2, 255], (6, 3, 11), p=[0.4, 0.3, 0.2, 0.1]), 3, 1)
    predictions = np.where(random.random(SHAPE) < 0.7, labels % 3, random.integers(0, 3, SHAPE))
    return labels, predictions


KINDS = {
    "confusion": ConfusionCounts.zeros(3),
    "trimap": TrimapCounts.zeros(3, widths=(1, 2, 4)),
    "trimap of labels": TrimapCounts.zeros(3, widths=(1, 2, 4), around="labels"),
    "objects": ObjectCounts.zeros(3, boundary_tolerance=0.1),
    "thresholds": ThresholdCounts.zeros(num_thresholds=16),
}


def arguments(kind, maps):
    if kind != "thresholds":
        return maps
    scores = np.random.default_rng(1).random(SHAPE, np.float32)
    return (maps[0] == 1).astype(int) + 255 * (maps[0] == 255), scores


def values(counts):
    totals = jax.tree.leaves(counts, is_leaf=lambda x: isinstance(x, Total))
    return np.concatenate([np.ravel(total.value()) for total in totals])


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_at_once(kind, maps):
    pairs = arguments(kind, maps)
    at_once = KINDS[kind].update(*pairs)
    assert values(at_once).any()
    update = jax.jit(lambda counts, *pair: counts.update(*pair))
    streamed = KINDS[kind]
    for i in (3, 0):
        streamed = update(streamed, *(a[i : i + 3] for a in pairs))
    np.testing.assert_array_equal(values(streamed), values(at_once))
    parts = KINDS[kind].update(*(a[:3] for a in pairs)), KINDS[kind].update(*(a[3:] for a in pairs))
    np.testing.assert_array_equal(values(parts[0] + parts[1]), values(at_once))
    np.testing.assert_array_equal(values(parts[1].merge(parts[0])), values(at_once))


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxcrf import metrics

assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("data",))
random = np.random.default_rng(0)
labels = random.choice([0, 1, 2, 255], (8, 7, 9))
predictions = np.where(random.random((8, 7, 9)) < 0.6, labels % 3, random.integers(0, 3, (8, 7, 9)))
scores = random.random((8, 7, 9), np.float32)
for zeros, pair in (
    (metrics.ConfusionCounts.zeros(3), (labels, predictions)),
    (metrics.TrimapCounts.zeros(3, widths=(1, 3)), (labels, predictions)),
    (metrics.ObjectCounts.zeros(3, boundary_tolerance=0.1), (labels, predictions)),
    (metrics.ThresholdCounts.zeros(num_thresholds=8), (labels % 3 % 2, scores)),
):
    def count(labels, predictions):
        return jax.lax.psum(zeros.update(labels, predictions), "data")

    split = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=P("data"), out_specs=P()))
    at_once = zeros.update(*pair)
    # Twice, with the sum of all devices as what is added to.
    twice = (split(*map(jnp.asarray, pair)) + split(*map(jnp.asarray, pair)))
    is_total = lambda x: isinstance(x, metrics.Total)
    found, expected = (jax.tree.leaves(c, is_leaf=is_total) for c in (twice, at_once + at_once))
    assert any(e.value().any() for e in expected)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(f.value(), e.value())
print("four devices agree")
"""


@pytest.mark.slow
def test_the_sum_over_devices_is_that_of_one():
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "four devices agree" in done.stdout


def test_totals_are_exact_beyond_int32():
    largest = 2**31 - 1
    added = Total.of(jnp.array([largest, 65535, 0], jnp.int32))
    total = Total.zeros((3,))
    add = jax.jit(lambda a, b: a + b)
    for _ in range(100):
        total = add(total, added)
    np.testing.assert_array_equal(total.value(), [100 * largest, 6553500, 0])
    # As a sum over devices adds: leaf by leaf, with nothing carried.
    summed = jax.tree.map(lambda leaf: sum(leaf for _ in range(1000)), added)
    np.testing.assert_array_equal(summed.value(), [1000 * largest, 65535000, 0])
    np.testing.assert_array_equal((summed + added).value(), [1001 * largest, 65600535, 0])
    np.testing.assert_allclose(
        jax.jit(lambda t: t.as_float())(summed), summed.value().astype(float), rtol=1e-6
    )


def test_totals_sum_over_axes_without_overflow():
    counts = jnp.full((300, 2), 2**24, jnp.int32)  # 300 · 2**24 is beyond int32
    np.testing.assert_array_equal(Total.of(counts, 0).value(), [300 * 2**24] * 2)
    ratios = jnp.full(1000, 1 / 3, jnp.float32)
    # Each is rounded once, to 2**-24; float32 sums would be off by more.
    np.testing.assert_allclose(float(Total.of_ratios(ratios, 0).as_ratios()), 1000 / 3, atol=1000 * 2**-24)


def test_scores_take_counts(maps):
    counts = KINDS["confusion"].update(*maps)
    for score in (metrics.mean_iou, metrics.per_class_iou, metrics.pixel_accuracy, metrics.class_accuracy):
        expected = score(metrics.confusion_matrix(*maps, 3))
        np.testing.assert_allclose(score(counts), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(score)(counts), expected, rtol=1e-6)


def test_counts_of_different_things_are_not_added():
    with pytest.raises(TypeError, match="got TrimapCounts to be added to ConfusionCounts"):
        KINDS["confusion"] + KINDS["trimap"]
    with pytest.raises(ValueError, match=r"got widths \(1, 2\) to be added to widths \(1, 2, 4\)"):
        _ = KINDS["trimap"] + dataclasses.replace(KINDS["trimap"], widths=(1, 2))
    with pytest.raises(ValueError, match=r"got total \(4, 4\) to be added to total \(3, 3\)"):
        _ = KINDS["confusion"] + ConfusionCounts.zeros(4)


@pytest.mark.parametrize("kind", ["confusion", "trimap", "objects"])
def test_predictions_out_of_range_are_refused_eagerly(kind):
    labels, predictions = np.array([[0, 1, 255]]), np.array([[0, 7, 9]])
    with pytest.raises(ValueError, match=r"predictions: got the label 7 .* expected 0 to 2"):
        KINDS[kind].update(labels, predictions)
    with pytest.raises(ValueError, match=r"predictions: got shape \(1, 2\), but labels have shape \(1, 3\)"):
        KINDS[kind].update(labels, predictions[:, :2])
    with pytest.raises(TypeError, match="predictions: got dtype float"):
        KINDS[kind].update(labels, predictions * 1.0)


def brute_force_curve(labels, predictions, num_labels, widths, around):
    matrices = []
    for width in widths:
        cm = np.zeros((num_labels, num_labels))
        for truth, prediction in zip(labels, predictions, strict=True):
            y, x = np.mgrid[: truth.shape[0], : truth.shape[1]]
            for i, j in np.argwhere(truth != 255):
                other = (truth == 255) if around == "void" else (truth != 255) & (truth != truth[i, j])
                if (other & ((y - i) ** 2 + (x - j) ** 2 <= width**2)).any():
                    cm[truth[i, j], prediction[i, j]] += 1
        matrices.append(cm)
    accuracy = [np.trace(cm) / cm.sum() for cm in matrices]
    mious = []
    for cm in matrices:
        union = cm.sum(0) + cm.sum(1) - np.diagonal(cm)
        mious.append(np.mean([cm[k, k] / union[k] for k in range(num_labels) if union[k]]))
    return accuracy, mious, [cm.sum() for cm in matrices]


@pytest.mark.parametrize("around", ["void", "labels"])
def test_trimap_curve_against_a_loop(around, maps):
    widths = (1, 2, 3, 100)
    curve = metrics.trimap_curve(*maps, 3, widths=widths, around=around)
    accuracy, mious, pixels = brute_force_curve(*maps, 3, widths, around)
    np.testing.assert_allclose(curve.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(curve.mean_iou, mious, rtol=1e-12)
    np.testing.assert_array_equal(curve.pixels, pixels)
    np.testing.assert_array_equal(curve.widths, widths)
    counts = TrimapCounts.zeros(3, widths=widths, around=around).update(*maps)
    for width, cm in zip(widths, counts.matrices(), strict=True):
        band = metrics.trimap_band(maps[0], width, around=around)
        np.testing.assert_array_equal(cm, metrics.confusion_matrix(np.where(band, maps[0], 255), maps[1], 3))


def test_trimap_curve_without_boundaries_is_nan():
    curve = metrics.trimap_curve(np.zeros((1, 4, 5), int), np.zeros((1, 4, 5), int), 2, widths=(3,))
    assert np.isnan(curve.accuracy).all()
    assert np.isnan(curve.mean_iou).all()
    np.testing.assert_array_equal(curve.pixels, [0])


def test_trimap_counts_refuse_bad_options():
    with pytest.raises(ValueError, match=r"widths: got \(2, 2\); expected at least one, in increasing order"):
        TrimapCounts.zeros(2, widths=(2, 2))
    with pytest.raises(ValueError, match="widths: got 0; expected at least 1"):
        TrimapCounts.zeros(2, widths=(0,))
    with pytest.raises(ValueError, match="around: got 'edges'"):
        TrimapCounts.zeros(2, around="edges")


def test_per_class_table_against_a_loop():
    cm = np.random.default_rng(0).integers(0, 2**40, (4, 4))
    cm[2] = cm[:, 2] = 0
    for row in metrics.per_class_table(cm, ["a", "b", "c", "d"]):
        k = row.label
        assert row.name == "abcd"[k]
        assert row.pixels == cm[k].sum()
        assert row.share == pytest.approx(cm[k].sum() / cm.sum())
        union = cm[k].sum() + cm[:, k].sum() - cm[k, k]
        expected = [cm[k, k] / n if n else np.nan for n in (union, cm[:, k].sum(), cm[k].sum())]
        np.testing.assert_allclose([row.iou, row.precision, row.recall], expected)
    with pytest.raises(ValueError, match="label_names: got 1 names for 4 labels"):
        metrics.per_class_table(cm, ["a"])
    with pytest.raises(ValueError, match=r"cm: got shape \(2, 3\)"):
        metrics.per_class_table(np.zeros((2, 3)))

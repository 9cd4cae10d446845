import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrf import metrics


def brute_force_confusion(labels, predictions, num_labels, ignore_label):
    cm = np.zeros((num_labels, num_labels), np.int64)
    for y, p in zip(labels.ravel(), predictions.ravel(), strict=True):
        if y != ignore_label and 0 <= y < num_labels and 0 <= p < num_labels:
            cm[y, p] += 1
    return cm


@pytest.mark.parametrize("shape", [(), (5, 9), (2, 5, 9), (0, 3)])
@pytest.mark.parametrize("ignore_label", [255, 1, None])
def test_confusion_matrix_counts_like_a_loop(shape, ignore_label):
    random = np.random.default_rng(len(shape))
    labels = random.choice([0, 1, 2, 3, 255, -1, 17], shape)
    predictions = random.integers(0, 4, shape)
    cm = metrics.confusion_matrix(labels, predictions, 4, ignore_label)
    assert cm.dtype == jnp.int32
    np.testing.assert_array_equal(cm, brute_force_confusion(labels, predictions, 4, ignore_label))


def test_rows_are_the_truth():
    cm = metrics.confusion_matrix(np.array([0, 0, 0]), np.array([1, 1, 0]), 2)
    np.testing.assert_array_equal(cm, [[1, 2], [0, 0]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_confusion_matrix_takes_every_integer_type(dtype):
    labels = np.array([0, 1, 2, 255, 200]).astype(dtype)
    if dtype != np.uint8:
        labels[-1] = -1
    cm = metrics.confusion_matrix(labels, np.array([0, 1, 1, 0, 0], dtype), 3)
    np.testing.assert_array_equal(cm, [[1, 0, 0], [0, 1, 0], [0, 1, 0]])


def test_counts_stay_exact_beyond_float32():
    # 2**24 + 1 pixels is the first count that float32 cannot hold.
    count = 2**24 + 1
    cm = metrics.confusion_matrix(jnp.zeros(count, jnp.uint8), jnp.zeros(count, jnp.uint8), 1)
    assert int(cm[0, 0]) == count


def test_predictions_out_of_range_raise_eagerly_and_count_nowhere_under_jit():
    labels, predictions = np.array([0, 1, 255]), np.array([0, 7, 9])
    with pytest.raises(ValueError, match=r"predictions: got the label 7 .* expected 0 to 1"):
        metrics.confusion_matrix(labels, predictions, 2)
    cm = jax.jit(metrics.confusion_matrix, static_argnums=2)(labels, predictions, 2)
    np.testing.assert_array_equal(cm, [[1, 0], [0, 0]])
    # Where the truth does not count, neither does a strange prediction.
    metrics.confusion_matrix(np.array([255, -1]), np.array([9, 9]), 2)


def test_confusion_matrix_under_jit_and_vmap():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 3, (2, 4, 5, 6))
    batched = jax.jit(jax.vmap(functools.partial(metrics.confusion_matrix, num_labels=3)))(
        labels, predictions
    )
    for k in range(4):
        np.testing.assert_array_equal(batched[k], metrics.confusion_matrix(labels[k], predictions[k], 3))
    np.testing.assert_array_equal(batched.sum(0), metrics.confusion_matrix(labels, predictions, 3))


def test_confusion_matrix_refuses_bad_input():
    with pytest.raises(ValueError, match=r"predictions: got shape \(3,\), but labels have shape \(2,\)"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(3, int), 2)
    with pytest.raises(TypeError, match="predictions: got dtype float32"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(2, np.float32), 2)
    with pytest.raises(TypeError, match="labels: got dtype bool"):
        metrics.confusion_matrix(np.zeros(2, bool), np.zeros(2, int), 2)
    with pytest.raises(ValueError, match="num_labels: got 0"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(2, int), 0)
    with pytest.raises(TypeError, match=r"num_labels: got 2\.0"):
        metrics.confusion_matrix(np.zeros(2, int), np.zeros(2, int), 2.0)


CM = np.array([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0]])


def test_scores_by_hand():
    np.testing.assert_allclose(metrics.per_class_iou(CM), [3 / 6, 4 / 12, np.nan, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.mean_iou(CM), (3 / 6 + 4 / 12 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics.pixel_accuracy(CM), 7 / 15, rtol=1e-6)
    np.testing.assert_allclose(metrics.class_accuracy(CM), (3 / 4 + 4 / 6 + 0) / 3, rtol=1e-6)


def test_a_label_that_is_only_predicted_lowers_the_mean_iou_but_not_the_class_accuracy():
    cm = np.array([[3, 1], [0, 0]])
    np.testing.assert_allclose(metrics.mean_iou(cm), (3 / 4 + 0) / 2)
    np.testing.assert_allclose(metrics.class_accuracy(cm), 3 / 4)


SCORES = [metrics.per_class_iou, metrics.mean_iou, metrics.pixel_accuracy, metrics.class_accuracy]


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_nothing_are_nan(score):
    assert np.isnan(score(np.zeros((3, 3), int))).all()


@pytest.mark.parametrize("score", SCORES)
def test_scores_under_jit_vmap_and_batched(score):
    batch = np.stack([CM, CM.T, np.zeros_like(CM)])
    one_by_one = np.stack([score(cm) for cm in batch])
    np.testing.assert_allclose(score(batch), one_by_one)
    np.testing.assert_allclose(jax.jit(jax.vmap(score))(batch), one_by_one, rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_scores_take_totals_beyond_int32(score):
    np.testing.assert_allclose(score(CM * 2**40), score(CM), rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_scores_refuse_what_is_not_a_confusion_matrix(score):
    with pytest.raises(ValueError, match=r"cm: got shape \(2, 3\)"):
        score(np.zeros((2, 3), int))


def brute_force_band(labels, width, around, ignore_label=255):
    height, columns = labels.shape
    y, x = np.mgrid[:height, :columns]
    band = np.zeros(labels.shape, bool)
    for i in range(height):
        for j in range(columns):
            if labels[i, j] == ignore_label:
                continue
            other = labels == ignore_label
            if around == "labels":
                other = ~other & (labels != labels[i, j])
            band[i, j] = (other & ((y - i) ** 2 + (x - j) ** 2 <= width**2)).any()
    return band


@pytest.mark.parametrize("around", ["void", "labels"])
@pytest.mark.parametrize("width", [0, 1, 2, 5, 40])
def test_trimap_band_against_brute_force(around, width):
    random = np.random.default_rng(width)
    # Few odd pixels on a plain background make distances that are long and slanted, many make them crowded.
    for density in (0.005, 0.02, 0.1, 0.3, 1.0):
        labels = np.where(random.random((17, 23)) < density, random.choice([1, 2, -1, 255], (17, 23)), 0)
        band = metrics.trimap_band(labels, width, around=around)
        np.testing.assert_array_equal(band, brute_force_band(labels, width, around))


@pytest.mark.parametrize("around", ["void", "labels"])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_trimap_band_of_thin_images(around, shape):
    labels = np.random.default_rng(1).choice([0, 0, 0, 1, 255], shape)
    band = metrics.trimap_band(labels, 3, around=around)
    np.testing.assert_array_equal(band, brute_force_band(labels, 3, around))


def test_trimap_band_is_round():
    labels = np.zeros((11, 11), int)
    labels[5, 5] = 255
    y, x = np.mgrid[-5:6, -5:6]
    expected = (y**2 + x**2 <= 16) & (y**2 + x**2 > 0)
    np.testing.assert_array_equal(metrics.trimap_band(labels, 4), expected)


def test_a_band_of_one_pixel_is_both_sides_of_the_boundary():
    labels = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(
        metrics.trimap_band(labels, 1, around="labels"), [[0, 1, 1], [0, 1, 1], [0, 0, 1]]
    )


def test_labels_are_compared_across_void():
    labels = np.array([[0, 255, 255, 1, 1]])
    np.testing.assert_array_equal(metrics.trimap_band(labels, 2, around="labels"), [[0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(metrics.trimap_band(labels, 3, around="labels"), [[1, 0, 0, 1, 0]])


@pytest.mark.parametrize("around", ["void", "labels"])
def test_trimap_band_under_jit_vmap_and_batched(around):
    random = np.random.default_rng(3)
    labels = random.choice([0, 0, 0, 0, 1, 2, 255], (2, 3, 8, 9)).astype(np.uint8)
    band = functools.partial(metrics.trimap_band, width=2, around=around)
    expected = np.stack([[brute_force_band(one, 2, around) for one in row] for row in labels])
    np.testing.assert_array_equal(band(labels), expected)
    np.testing.assert_array_equal(jax.jit(band)(labels), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(band)))(labels), expected)


def test_trimap_band_of_an_empty_batch_and_an_empty_image():
    assert metrics.trimap_band(np.zeros((0, 4, 5), int), 2).shape == (0, 4, 5)
    assert metrics.trimap_band(np.zeros((4, 0), int), 2, around="labels").shape == (4, 0)


def test_trimap_band_takes_another_ignore_label():
    labels = np.array([[0, 7, 0, 0]])
    np.testing.assert_array_equal(metrics.trimap_band(labels, 1, ignore_label=7), [[1, 0, 1, 0]])
    np.testing.assert_array_equal(metrics.trimap_band(labels, 1, ignore_label=None), [[0, 0, 0, 0]])
    band = metrics.trimap_band(labels, 1, around="labels", ignore_label=None)
    np.testing.assert_array_equal(band, [[1, 1, 1, 0]])


def test_trimap_band_refuses_bad_input():
    labels = np.zeros((3, 3), int)
    with pytest.raises(ValueError, match="width: got -1"):
        metrics.trimap_band(labels, -1)
    with pytest.raises(TypeError, match=r"width: got 1\.5; expected a Python int"):
        metrics.trimap_band(labels, 1.5)
    with pytest.raises(TypeError, match=r"width: .* static under jax\.jit"):
        jax.jit(metrics.trimap_band)(labels, 1)
    with pytest.raises(ValueError, match="around: got 'edges'; expected 'void' or 'labels'"):
        metrics.trimap_band(labels, 1, around="edges")
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\)"):
        metrics.trimap_band(labels[0], 1)
    with pytest.raises(TypeError, match="labels: got dtype float"):
        metrics.trimap_band(labels.astype(float), 1)

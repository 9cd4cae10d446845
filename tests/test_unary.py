import jax
import numpy as np
import pytest

import jaxcrf


def test_labels_become_confidences():
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    probs = np.exp(jaxcrf.unary_from_labels(labels, 3, confidence=0.8))
    np.testing.assert_allclose(probs[0, 1], [0.1, 0.8, 0.1], rtol=1e-6)
    np.testing.assert_allclose(probs[1, 1], [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)


def test_any_ignore_label_and_none():
    labels = np.array([0, 7, 1])
    np.testing.assert_allclose(np.exp(jaxcrf.unary_from_labels(labels, 2, ignore_label=7))[1], [0.5, 0.5])
    with pytest.raises(ValueError, match="labels: holds label 7"):
        jaxcrf.unary_from_labels(labels, 2, ignore_label=None)
    # A label that may be ignored can also be one of the labels: ignoring comes first.
    np.testing.assert_allclose(np.exp(jaxcrf.unary_from_labels(labels[:1], 2, ignore_label=0)), [[0.5, 0.5]])


def test_out_of_range_labels_are_unknown_under_jit():
    found = jax.jit(lambda x: jaxcrf.unary_from_labels(x, 2))(np.array([5, -1]))
    np.testing.assert_allclose(np.exp(found), 0.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("num_labels", [100, 127, 128, 200, 255, 256, 257, 300])
def test_narrow_integers_do_not_wrap(dtype, num_labels):
    # Numbers of labels that the type of the map cannot hold are no reason for it to know nothing.
    found = jaxcrf.unary_from_labels(np.array([0, 99], dtype), num_labels, ignore_label=None)
    np.testing.assert_array_equal(np.argmax(found, -1), [0, 99])
    assert found[1].max() > found[1].min()


def test_ignored_labels_do_not_wrap():
    with pytest.raises(ValueError, match="holds label 255"):
        jaxcrf.unary_from_labels(np.array([0, 255], np.uint8), 4, ignore_label=-1)
    with pytest.raises(ValueError, match="holds label -1"):
        jaxcrf.unary_from_labels(np.array([0, -1], np.int8), 4, ignore_label=255)
    with pytest.raises(ValueError, match="holds label 4294967297"):
        jaxcrf.unary_from_labels(np.array([0, 2**32 + 1]), 4)


def test_booleans_are_two_labels():
    found = jaxcrf.unary_from_labels(np.array([False, True]), 2)
    np.testing.assert_array_equal(np.argmax(found, -1), [0, 1])


def test_constants_are_checked_while_something_else_is_traced():
    constant = jax.numpy.array([0, 1])
    found = jax.jit(lambda x: x + jaxcrf.unary_from_labels(constant, 2))(np.zeros((2, 2), np.float32))
    np.testing.assert_array_equal(found, jaxcrf.unary_from_labels(constant, 2))
    bad = jax.numpy.array([[0.9, 0.9]])
    with pytest.raises(ValueError, match="do not sum to 1"):
        jax.jit(lambda x: x + jaxcrf.unary_from_probs(bad))(np.zeros((1, 2), np.float32))


def test_one_label_is_certain():
    np.testing.assert_array_equal(jaxcrf.unary_from_labels(np.zeros((2, 2), int), 1), np.zeros((2, 2, 1)))


@pytest.mark.parametrize(
    ("labels", "num_labels", "options", "message"),
    [
        (np.array([0, 3]), 3, {}, "labels: holds label 3; expected 0 to 2"),
        (np.array([0, -1]), 3, {}, "labels: holds label -1"),
        (np.array([0.0, 1.0]), 3, {}, "labels: got dtype float"),
        (np.array([0, 1]), 0, {}, "num_labels: got 0"),
        (np.array([0, 1]), 2.0, {}, "num_labels: got 2.0"),
        (np.array([0, 1]), 2, {"confidence": 0.5}, "confidence: got 0.5"),
        (np.array([0, 1]), 2, {"confidence": 1.0}, "confidence: got 1.0"),
    ],
)
def test_bad_labels_are_refused(labels, num_labels, options, message):
    with pytest.raises(ValueError, match=message):
        jaxcrf.unary_from_labels(labels, num_labels, **options)


def test_probabilities_become_logarithms_and_zeros_survive():
    found = jaxcrf.unary_from_probs(np.array([[1.0, 0.0], [0.25, 0.75]], np.float32))
    np.testing.assert_allclose(found, [[0, np.log(1e-5)], np.log([0.25, 0.75])], rtol=1e-6, atol=1e-7)
    assert np.isfinite(found).all()


def test_half_precision_probabilities_are_accepted():
    probs = np.array([[0.3, 0.7]], np.float16)
    assert jaxcrf.unary_from_probs(probs).dtype == np.float32


@pytest.mark.parametrize(
    ("probs", "options", "message"),
    [
        (np.array([[0.5, 0.6]]), {}, "do not sum to 1"),
        (np.array([[-0.5, 1.5]]), {}, "negative"),
        (np.array([[np.nan, 1.0]]), {}, "NaN"),
        (np.array([[np.inf, 1.0]]), {}, "NaN or infinite"),
        (np.array([[0, 1]]), {}, "got dtype int"),
        (np.array([[0.5, 0.5]]), {"clip": 0.0}, "clip: got 0.0"),
    ],
)
def test_what_is_no_probability_is_refused(probs, options, message):
    with pytest.raises(ValueError, match=message):
        jaxcrf.unary_from_probs(probs, **options)


def test_values_are_not_looked_at_under_jit():
    assert np.isnan(jax.jit(jaxcrf.unary_from_probs)(np.array([[np.nan, 1.0]], np.float32))[0, 0])

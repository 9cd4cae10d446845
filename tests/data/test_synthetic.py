"""The synthetic task: its arithmetic by hand, its statistics by counting."""

import numpy as np
import pytest

from jaxcrf.data.synthetic import corrupt_labels, corrupt_probs


def by_hand(labels: np.ndarray, factor: int, ignore_label: int = 255) -> np.ndarray:
    """Every pixel gets the label of its block's labelled pixel nearest to the centre; void stays void."""
    result = np.full(labels.shape, ignore_label)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            top, left = y // factor * factor, x // factor * factor
            nearest = np.inf
            for j in range(top, min(top + factor, labels.shape[0])):
                for i in range(left, min(left + factor, labels.shape[1])):
                    distance = (j - top - factor // 2) ** 2 + (i - left - factor // 2) ** 2
                    if labels[j, i] != ignore_label and distance < nearest:
                        nearest, result[y, x] = distance, labels[j, i]
    return result


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [(16, 24), (17, 13), (5, 30), (1, 1)])
def test_without_noise_only_the_resolution_is_lost(factor, size):
    labels = np.random.default_rng(0).integers(5, size=size)
    got = corrupt_labels(0, labels, 5, factor=factor, keep=1.0)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, by_hand(labels, factor))


def test_void_centres_are_replaced_from_their_block():
    rng = np.random.default_rng(1)
    labels = rng.integers(5, size=(40, 48))
    labels[rng.random(labels.shape) < 0.9] = 255
    labels[:8, :8] = 255  # a block of void only
    expected = by_hand(labels, 8)
    got = corrupt_labels(0, labels, 5, keep=1.0)
    assert (expected[:8, :8] == 255).all()
    assert 0 <= got.min() <= got.max() < 5
    assert np.ptp(got[:8, :8]) == 0
    np.testing.assert_array_equal(got[8:], expected[8:])
    np.testing.assert_array_equal(got[:8, 8:], expected[:8, 8:])


def test_blocks_have_one_label():
    got = corrupt_labels(3, np.zeros((50, 70), int), 7, factor=8)
    for y in range(0, 50, 8):
        for x in range(0, 70, 8):
            assert np.ptp(got[y : y + 8, x : x + 8]) == 0


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_labels_survive_as_often_as_asked(keep):
    num_labels, side = 4, 400
    got = corrupt_labels(0, np.full((side, side), 2), num_labels, factor=1, keep=keep)
    frequencies = np.bincount(got.ravel(), minlength=num_labels) / got.size
    expected = np.full(num_labels, (1 - keep) / num_labels)
    expected[2] += keep
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / side)  # five standard deviations


def test_seeds_and_generators():
    labels = np.random.default_rng(0).integers(21, size=(64, 64))
    first = corrupt_labels(7, labels, 21)
    np.testing.assert_array_equal(first, corrupt_labels(7, labels, 21))
    np.testing.assert_array_equal(first, corrupt_labels(np.random.default_rng(7), labels, 21))
    assert (first != corrupt_labels(8, labels, 21)).any()
    assert (corrupt_labels([7, 0], labels, 21) != corrupt_labels([7, 1], labels, 21)).any()
    rng = np.random.default_rng(7)
    corrupt_labels(rng, labels, 21)
    assert (first != corrupt_labels(rng, labels, 21)).any()


def test_batches_are_corrupted_independently():
    labels = np.zeros((2, 3, 32, 40), int)
    got = corrupt_labels(0, labels, 9)
    assert got.shape == labels.shape
    assert len({item.tobytes() for item in got.reshape(6, -1)}) == 6
    probs = corrupt_probs(0, labels, 9)
    assert probs.shape == (*labels.shape, 9)


def test_input_is_left_alone():
    labels = np.full((16, 16), 255)
    corrupt_labels(0, labels, 3)
    corrupt_probs(0, labels, 3)
    assert (labels == 255).all()


def test_probs_are_probabilities_and_agree_with_labels_at_block_centres():
    labels = np.random.default_rng(0).integers(6, size=(45, 27)).repeat(3, 0).repeat(3, 1)
    labels[:9, :9] = 255
    for factor in (1, 3, 9):  # odd, so that a block has a pixel at its centre, where no neighbour mixes in
        probs = corrupt_probs(5, labels, 6, factor=factor)
        assert probs.dtype == np.float32
        assert probs.min() >= 0
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
        centre = np.s_[factor // 2 :: factor, factor // 2 :: factor]
        np.testing.assert_array_equal(
            probs.argmax(-1)[centre], corrupt_labels(5, labels, 6, factor=factor)[centre]
        )


def test_probs_lose_fewer_pixels_than_labels():
    labels = np.zeros((800, 800), int)
    # 0.8 + 0.2 / 21 of the blocks are right; a wrong one loses its corners to its neighbours.
    right = (corrupt_probs(0, labels, 21).argmax(-1) == 0).mean()
    assert 0.88 < right < 0.92
    assert (corrupt_labels(0, labels, 21) == 0).mean() < 0.83


@pytest.mark.parametrize("corrupt", [corrupt_labels, corrupt_probs])
@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros(5, int), {}, r"labels: got shape \(5,\)"),
        (np.zeros((5, 5)), {}, "labels: .* float64; expected integers"),
        (np.full((5, 5), 21), {}, "labels: got 21; expected 0 to 20, or 255"),
        (np.full((5, 5), -1), {}, "labels: got -1"),
        (np.zeros((5, 5), int), {"factor": 0}, "factor: got 0"),
        (np.zeros((5, 5), int), {"keep": 1.5}, "keep: got 1.5"),
        (np.zeros((5, 5), int), {"num_labels": 0}, "num_labels: got 0"),
    ],
)
def test_errors_name_the_argument(corrupt, labels, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(0, labels, **{"num_labels": 21, **options})

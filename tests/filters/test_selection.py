"""Which fully connected filter is taken."""

import numpy as np
import pytest

import jaxcrf
from jaxcrf.filters import Dense, Landmark, Lattice, fully_connected, select_filter
from jaxcrf.filters.selection import EXACT_PIXELS

FEATURES = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def test_small_images_are_summed_exactly_and_large_ones_as_the_device_likes():
    for platform, kind in (("cpu", "lattice"), ("gpu", "lattice"), ("tpu", "landmark")):
        most = EXACT_PIXELS["cpu" if platform == "cpu" else "accelerator"]
        assert select_filter(most, platform) == "dense"
        assert select_filter(most + 1, platform) == kind


@pytest.mark.parametrize(
    ("kind", "filter"), [("dense", Dense), ("lattice", Lattice), ("landmark", Landmark), ("auto", Dense)]
)
def test_the_filter_of_that_name_is_built(kind, filter):
    K = fully_connected(FEATURES, kind=kind, weights=2.0)
    assert type(K) is filter
    q = np.random.default_rng(1).random((4, 5, 2)).astype(np.float32)
    np.testing.assert_allclose(K(q), filter(FEATURES, weights=2.0)(q), rtol=1e-6)


def test_auto_goes_by_the_pixels_of_one_image():
    large = np.zeros((2, 65, 64, 2), np.float32)
    assert type(fully_connected(large)) is Lattice
    assert type(fully_connected(large[:, :32])) is Dense


def test_options_go_to_the_filter_that_is_named():
    K = fully_connected(FEATURES, kind="lattice", symmetric=True)
    assert K.is_symmetric
    with pytest.raises(TypeError, match="symmetric: options belong to one of the filters; name it"):
        fully_connected(FEATURES, symmetric=True)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind: got 'window'; expected auto, dense, lattice, landmark"):
        jaxcrf.filters.fully_connected(FEATURES, kind="window")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf


def test_positions_are_in_array_order():
    values = jaxcrf.position_features((2, 3), (2.0, 4.0)).values
    np.testing.assert_array_equal(values[..., 0], [[0, 0, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(values[..., 1], [[0, 0.25, 0.5]] * 2)
    assert jaxcrf.position_features((2, 3, 4), 1.0).values.shape == (2, 3, 4, 3)


def test_colours_follow_the_positions():
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    features = jaxcrf.bilateral_features(image, (8.0, 4.0), 13.0)
    np.testing.assert_array_equal(
        features.values[0, ..., :2], jaxcrf.position_features((4, 5), (8.0, 4.0)).values
    )
    np.testing.assert_allclose(features.values[..., 2:], image / 13.0, rtol=1e-6)
    assert features.position_bandwidths == (8.0, 4.0)


def test_colour_bandwidths_may_differ_by_channel():
    image = np.ones((2, 2, 2), np.float32)
    features = jaxcrf.bilateral_features(image, None, (2.0, 4.0))
    np.testing.assert_array_equal(features.values[0, 0], [0.5, 0.25])
    assert features.position_bandwidths is None


def test_volumes_have_three_position_axes():
    features = jaxcrf.bilateral_features(np.zeros((3, 4, 5, 1)), (3.0, 1.0, 1.0), 10.0, spatial_ndim=3)
    assert features.values.shape == (3, 4, 5, 4)
    assert features.position_bandwidths == (3.0, 1.0, 1.0)


def test_traced_bandwidths_are_not_static_knowledge():
    features = jax.jit(lambda b: jaxcrf.position_features((3, 3), b))(2.0)
    assert features.position_bandwidths is None
    np.testing.assert_allclose(features.values, jaxcrf.position_features((3, 3), 2.0).values)


def test_features_keep_their_static_part_under_jit():
    features = jaxcrf.position_features((3, 3), 2.0)
    assert jax.jit(lambda f: f)(features).position_bandwidths == (2.0, 2.0)
    assert len(jax.tree.leaves(features)) == 1


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), (1.0, 0.0), (1.0, 2.0, 3.0)])
def test_bad_bandwidths_are_refused(bandwidth):
    with pytest.raises(ValueError, match="bandwidth: got"):
        jaxcrf.position_features((3, 3), bandwidth)
    with pytest.raises(ValueError, match="color_bandwidth: got"):
        jaxcrf.bilateral_features(np.zeros((3, 3, 2)), 1.0, bandwidth)


def test_images_without_channels_and_empty_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image: got shape \(3, 4\).*image\[..., None\]"):
        jaxcrf.bilateral_features(np.zeros((3, 4)), 1.0, 1.0)
    with pytest.raises(ValueError, match="shape: got"):
        jaxcrf.position_features((3, 0), 1.0)
    with pytest.raises(ValueError, match="spatial_ndim: got 5"):
        jaxcrf.bilateral_features(jnp.zeros((3, 4, 1)), 1.0, 1.0, spatial_ndim=5)

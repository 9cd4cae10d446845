import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import grid_oracles
from jaxcrf import models
from jaxcrf.data import Pipeline
from jaxcrf.models import Averaged
from jaxcrf.training import evaluate_pipeline


class Local(nnx.Module):
    """Logits that depend on the pixel and its left neighbour: a mirror image has others."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(jnp.asarray(kernel))

    def __call__(self, images):
        left = jnp.concatenate([images[..., :1, :], images[..., :-1, :]], -2)
        return (images - 0.4 * left) / 50 @ self.kernel[...]


def local(seed, labels=4):
    return Local(np.random.default_rng(seed).normal(size=(3, labels)).astype(np.float32))


def logits_in_numpy(kernel, image):
    left = np.concatenate([image[:, :1], image[:, :-1]], 1)
    return (image - 0.4 * left) / 50 @ kernel


def averaged_in_numpy(kernels, image, scales, flip):
    total, count = 0.0, 0
    for kernel in kernels:
        for scale in scales:
            view = grid_oracles.resize(image, [max(1, round(scale * n)) for n in image.shape[:2]])
            for mirrored in (False, True) if flip else (False,):
                logits = logits_in_numpy(kernel, view[:, ::-1] if mirrored else view)
                logits = grid_oracles.resize(logits, image.shape[:2])
                logits = logits[:, ::-1] if mirrored else logits
                e = np.exp(logits - logits.max(-1, keepdims=True))
                total, count = total + e / e.sum(-1, keepdims=True), count + 1
    return np.log(total / count)


@pytest.mark.parametrize(
    ("seeds", "scales", "flip"),
    [((0,), (1.0,), False), ((0, 1), (0.5, 1.0, 1.6), True), ((0,), (0.05,), True)],
)
def test_it_is_the_mean_of_what_every_view_says(seeds, scales, flip):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 7, 10, 3)).astype(np.uint8)
    members = [local(seed) for seed in seeds]
    averaged = nnx.jit(Averaged(members, scales=scales, flip=flip))
    kernels = [np.asarray(model.kernel[...], np.float64) for model in members]
    expected = [averaged_in_numpy(kernels, image.astype(np.float64), scales, flip) for image in images]
    # Logits of about 20 in float32, which is what the log-probabilities are differences of.
    np.testing.assert_allclose(averaged(images), expected, rtol=1e-5, atol=2e-5)


def test_batches_and_compilation_change_nothing():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    averaged = Averaged(local(0), scales=(1.0, 0.7))
    np.testing.assert_allclose(averaged(images)[1], nnx.jit(averaged)(images[1]), rtol=1e-5, atol=1e-5)


def test_mirror_images_get_mirrored_logits():
    image = np.random.default_rng(0).integers(0, 256, (5, 8, 3)).astype(np.uint8)
    averaged = nnx.jit(Averaged(local(0), scales=(1.5,), flip=True))
    np.testing.assert_allclose(averaged(image[:, ::-1]), averaged(image)[:, ::-1], rtol=1e-5, atol=1e-5)
    alone = Averaged(local(0), scales=(1.0,))
    assert not np.allclose(alone(image[:, ::-1]), alone(image)[:, ::-1], atol=0.1)


def test_labels_that_a_view_rules_out_are_no_nan():
    certain = Local(np.array([[0.0, 1e4], [0.0, 1e4], [0.0, 1e4]], np.float32))
    unsure = Local(np.zeros((3, 2), np.float32))
    image = np.full((2, 3, 3), 200, np.uint8)
    np.testing.assert_allclose(
        np.exp(Averaged([certain, unsure], scales=(1.0,))(image)), np.broadcast_to([0.25, 0.75], (2, 3, 2))
    )


def test_half_precision_is_averaged_in_single():
    image = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (4, 6, 3)), jnp.bfloat16)
    member = Local(jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.bfloat16))
    found = nnx.jit(Averaged([member] * 40, scales=(1.0,)))(image)
    assert found.dtype == jnp.bfloat16
    expected = jax.nn.log_softmax(member(image).astype(jnp.float32))
    # One rounding to eight bits; forty sums of them would add up to several percent.
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8)


def test_it_is_evaluated_saved_and_loaded_as_any_model(tmp_path):
    averaged = Averaged([local(0), local(1)], scales=(1.0, 0.5))
    image = np.random.default_rng(0).integers(0, 256, (7, 10, 3)).astype(np.uint8)
    run = nnx.jit(averaged)
    labels = np.asarray(run(image[None])[0].argmax(-1), np.int32)
    pipeline = Pipeline([(image, labels)], batch_size=1, size=(7, 10))
    assert evaluate_pipeline(run, pipeline)["pixel_accuracy"] == 1.0
    models.save(tmp_path / "model", averaged)
    empty = Averaged([local(2), local(3)], scales=(1.0, 0.5))
    loaded = models.load(tmp_path / "model", create=lambda rngs: empty).model
    np.testing.assert_array_equal(loaded(image[None]), averaged(image[None]))


def test_what_cannot_be_averaged_is_named():
    with pytest.raises(ValueError, match="models: got none"):
        Averaged([])
    with pytest.raises(TypeError, match="models: got function"):
        Averaged([lambda images: images])
    with pytest.raises(ValueError, match=r"scales: got \(1.0, 0.0\)"):
        Averaged(local(0), scales=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"scales: got \(\)"):
        Averaged(local(0), scales=())
    with pytest.raises(
        ValueError, match=r"models: one gives logits of shape \(2, 2, 3\), another \(2, 2, 4\)"
    ):
        Averaged([local(0), local(0, labels=3)], scales=(1.0,))(np.zeros((2, 2, 3), np.uint8))

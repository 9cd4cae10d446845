import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcrf import models
from jaxcrf.models import ModelConfig
from jaxcrf.training.updates import named_leaves, split

SMALL = {"small_fcn": {"width": 8, "blocks": [1, 0, 1]}}


def make(name, **options):
    return models.create(name, 3, rngs=nnx.Rngs(0), **(SMALL[name] | options))


@pytest.fixture(params=models.names())
def name(request):
    return request.param


@pytest.mark.parametrize(
    "shape", [(1, 17, 23), pytest.param((2, 48, 64), marks=pytest.mark.slow), (5, 7), (1, 1, 1)]
)
def test_any_size_goes_in_and_comes_out(name, shape):
    model = make(name)
    model.eval()
    images = np.zeros((*shape, 3), np.uint8)
    batch = images if len(shape) == 3 else images[None]
    assert model(batch).shape == (*batch.shape[:-1], 3)


@pytest.mark.slow
def test_compiled_it_is_the_same(name):
    model = make(name)
    model.eval()
    images = np.random.default_rng(0).integers(0, 256, (1, 19, 30, 3)).astype(np.uint8)
    # Convolutions are summed in another order when they are fused.
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refine", [pytest.param(None, marks=pytest.mark.slow), "convcrf"])
def test_gradients_reach_every_parameter(name, refine):
    options = {"trainable_compatibility": True, "trainable_features": True, "image_shape": [24, 32]}
    model = make(name, refine=refine, refine_options=options if refine else None, dropout=0.0)
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3)).astype(np.float32)

    @nnx.jit
    def gradients(model):
        # A residual block begins as the identity, where its convolutions have no gradient yet.
        definition, params, variables = split(model)
        moved = jax.tree.map(lambda leaf: leaf + 0.05, params)
        return nnx.grad(lambda m: jnp.sum(m(images)[..., 0] ** 2))(nnx.merge(definition, moved, variables))

    for path, leaf in named_leaves(gradients(model)).items():
        assert np.isfinite(leaf).all(), path
        assert np.any(np.asarray(leaf) != 0), path


@pytest.mark.slow
def test_half_precision(name):
    model = make(name, dtype="bfloat16")
    assert model(np.zeros((1, 16, 24, 3), np.uint8)).dtype == jnp.bfloat16
    _, params, _ = split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_other_channels(name):
    model = make(name, in_channels=4)
    assert model(np.zeros((1, 16, 24, 4), np.uint8)).shape == (1, 16, 24, 3)
    with pytest.raises(ValueError, match=r"images: got shape \(1, 16, 24, 3\).*4\]"):
        model(np.zeros((1, 16, 24, 3), np.uint8))


@pytest.mark.slow
def test_a_reduced_image_is_averaged_first():
    whole, reduced = make("small_fcn"), make("small_fcn", reduction=2)
    for model in (whole, reduced):
        model.eval()
    rng = np.random.default_rng(0)
    small = rng.uniform(0, 255, (1, 12, 16, 3)).astype(np.float32)
    large = small.repeat(2, 1).repeat(2, 2)
    found = np.asarray(reduced(large))
    # Both upsample the same scores, from 1/4 of the small image; cell centres lie in the middle.
    np.testing.assert_allclose(
        found.reshape(1, 12, 2, 16, 2, 3).mean((2, 4)), whole(small), rtol=1e-3, atol=2e-3
    )


def test_configurations_hash_and_survive_json():
    config = ModelConfig.of(
        "small_fcn", 3, blocks=[1, 0, 1], refine_options={"preset": "convcrf"}, refine="convcrf"
    )
    assert hash(ModelConfig.from_json(config.to_json())) == hash(config)
    assert config.to_json()["options"]["refine_options"] == {"preset": "convcrf"}
    assert make("small_fcn").config == ModelConfig.of("small_fcn", 3, **SMALL["small_fcn"])


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match="name: got 'smallfcn', did you mean 'small_fcn'"):
        models.create("smallfcn", 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="refine: got 'crf'; expected None or one of convcrf"):
        make("small_fcn", refine="crf")
    with pytest.raises(ValueError, match="refine_options: goes with refine"):
        make("small_fcn", refine_options={"preset": "convcrf"})
    with pytest.raises(TypeError, match="depth"):
        make("small_fcn", depth=3)
    with pytest.raises(TypeError, match="width: got"):
        make("small_fcn", width=jnp.float32)
    with pytest.raises(ValueError, match="reduction: got 0"):
        make("small_fcn", reduction=0)

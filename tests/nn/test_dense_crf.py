"""The layer of the fully connected CRF."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
import oracles

nnx = pytest.importorskip("flax.nnx")

from jaxcrf.nn import ConvCRF, DenseCRF  # noqa: E402  (needs flax)
from jaxcrf.nn.mean_field import infer  # noqa: E402
from layer_suite import (  # noqa: E402  (needs flax)
    LABELS,
    check_batches_and_reach,
    check_values_and_gradients,
    example,
    learned_number,
    moved,
    names,
    pixel_features,
)

TINY = jaxcrf.Preset(
    position_weight=0.6,
    position_bandwidth=1.5,
    bilateral_weight=0.9,
    bilateral_position_bandwidth=2.0,
    bilateral_color_bandwidth=40.0,
    unary_weight=0.7,
    normalization="after",
    num_iterations=2,
)
KERNELS = ("position_weight", "bilateral_weight")
NUMBERS = (*KERNELS, "unary_weight")
BANDWIDTHS = ("position_bandwidth", "bilateral_position_bandwidth", "bilateral_color_bandwidth")
CRF_AS_RNN = {"weights_per_label": True, "trainable_compatibility": True}


def create(preset=TINY, **options):
    return DenseCRF(LABELS, preset=preset, **options)


@pytest.mark.parametrize(
    ("name", "filter", "options"),
    [
        ("densecrf", "auto", {}),
        ("densecrf_crf_as_rnn", "lattice", CRF_AS_RNN),
        pytest.param("densecrf_sharp", "lattice", {}, marks=pytest.mark.exhaustive),
        pytest.param("densecrf", "landmark", CRF_AS_RNN, marks=pytest.mark.exhaustive),
        pytest.param(
            "densecrf_deeplab_v2", "dense", {"weights_per_label": True}, marks=pytest.mark.exhaustive
        ),
    ],
)
def test_layers_begin_as_their_preset(name, filter, options):
    images, logits = example(9, 8, 2)
    preset = dataclasses.replace(jaxcrf.presets.get(name), num_iterations=2)
    expected = jaxcrf.refine(images, logits=logits, preset=preset, method="densecrf", filter=filter)
    result = create(preset, filter=filter, **options).infer(images, logits)
    # Scores are up to 13; the weights of the kernels enter in another order.
    np.testing.assert_allclose(result.probs, expected, atol=3e-5)
    np.testing.assert_allclose(jax.nn.softmax(result.logits), result.probs, atol=1e-6)


def test_what_is_learned_is_what_was_asked_for():
    weights = {f"scales/{name}" for name in NUMBERS}
    assert set(names(create())) == weights
    assert set(names(create(learn_weights=False))) == set()
    assert set(names(create(**CRF_AS_RNN))) == weights | {"compatibility"}
    assert {k: v.shape for k, v in names(create(weights_per_label=True)).items()} == {
        "scales/position_weight": (LABELS,),
        "scales/bilateral_weight": (LABELS,),
        "scales/unary_weight": (),
    }
    every = {f"scales/{name}" for name in BANDWIDTHS}
    assert set(names(create(filter="dense", learn_bandwidths=True))) == weights | every
    colors = {"scales/bilateral_color_bandwidth"}
    assert set(names(create(filter="landmark", learn_bandwidths=True))) == weights | colors
    for kernel in KERNELS:
        without = dataclasses.replace(TINY, **{kernel: 0.0})
        assert f"scales/{kernel}" not in names(create(without, weights_per_label=True))


def oracle(images, logits, parameters):
    """Marginals, pixel by pixel in float64."""
    number = learned_number(parameters, TINY)
    _, near, alike = pixel_features(images, number)
    kernels = [oracles.gaussian_matrix(f.reshape(-1, f.shape[-1])) for f in (near, alike)]
    kernels = [k / k.sum(1, keepdims=True) for k in kernels]  # "after"
    weights = [np.broadcast_to(number(name), LABELS) for name in KERNELS]
    penalty = parameters.get("compatibility", 1 - np.eye(LABELS))
    u = logits.reshape(-1, LABELS)
    q = oracles.softmax(u)
    for _ in range(TINY.num_iterations):
        message = sum(k @ q * w for k, w in zip(kernels, weights, strict=True))
        q = oracles.softmax(number("unary_weight") * u - message @ penalty.T)
    return q.reshape(logits.shape)


@pytest.mark.parametrize(
    "options",
    [
        {"filter": "dense", "learn_bandwidths": True, **CRF_AS_RNN},
        pytest.param({"filter": "dense", "learn_bandwidths": True}, marks=pytest.mark.exhaustive),
        # As many landmarks as pixels represent the kernel exactly.
        pytest.param({"filter": "landmark", "weights_per_label": True}, marks=pytest.mark.exhaustive),
    ],
)
def test_values_and_gradients_are_those_of_float64_loops(options):
    check_values_and_gradients(moved(create(**options)), oracle)


def test_a_batch_is_a_loop_and_every_parameter_is_reached():
    layer = moved(create(filter="lattice", **CRF_AS_RNN))
    check_batches_and_reach(layer, *example(6, 7, 2))


def test_a_window_of_the_whole_image_is_the_same_crf():
    images, logits = example(3, 4)
    preset = dataclasses.replace(TINY, filter_size=7, blur=1)
    options = {"num_iterations": 3, "exclude_self": True, "trainable_compatibility": True}
    layers = [create(preset, filter="dense", **options), ConvCRF(LABELS, preset=preset, **options)]
    probs = [moved(layer).infer(images, logits).probs for layer in layers]
    # The window's layer has more parameters, so that moving both alike needs the same ones.
    bare = ConvCRF(LABELS, preset=preset, learn_bandwidths=False, **options)
    np.testing.assert_allclose(probs[0], moved(bare).infer(images, logits).probs, atol=2e-6)
    assert np.abs(probs[0] - probs[1]).max() > 1e-4


def test_the_number_of_iterations_may_be_set_afterwards():
    images, logits = example()
    layer = create()
    layer.set_attributes(num_iterations=5)
    expected = create(num_iterations=5).infer(images, logits)
    result = layer.infer(images, logits)
    assert result.stats.iterations == 5
    np.testing.assert_array_equal(result.logits, expected.logits)
    assert layer.learned_preset().num_iterations == 5
    layer.num_iterations = -1
    with pytest.raises(ValueError, match="num_iterations: got -1"):
        layer(images, logits)


def test_new_parameters_compile_nothing_anew():
    images, logits = example()
    options = {"filter": "dense", "filter_options": {"cutoff": [3, 4]}} | CRF_AS_RNN
    layer = create(**options)
    layer(images, logits)
    assert not any(leaf.weak_type for leaf in names(layer).values())
    before = infer._cache_size()
    # Another layer with the same options, and other numbers.
    moved(create(**options), seed=7)(images, logits)
    assert infer._cache_size() == before


def pixel_filter(images):
    """The filter of a layer, and what it is made of."""
    size = images.shape[:2]
    features = (jaxcrf.position_features(size, 1.5), jaxcrf.bilateral_features(images, 2.0, 40.0))
    return create(filter="lattice")._config.filter(features, jnp.ones(2), TINY), features


def test_lattices_hand_on_maps_of_pixels():
    def handed_on(images, logits):
        k, _ = pixel_filter(images)
        return k.convolve(k.restrict(logits))

    images, logits = example(6, 7)
    assert [x.shape for x in jax.eval_shape(handed_on, images, logits)] == [logits.shape]


@pytest.mark.exhaustive
def test_these_are_the_lattices_own():
    images, logits = example(6, 7)
    k, features = pixel_filter(images)
    lattice = jaxcrf.filters.Lattice(features).normalized("after")
    for ours, theirs in ((k, lattice), (k.T, lattice.T)):
        np.testing.assert_allclose(ours(logits), theirs(logits), atol=1e-5)
    np.testing.assert_allclose(k.diagonal(), lattice.diagonal(), atol=1e-6)


@pytest.mark.exhaustive
def test_an_iteration_costs_the_memory_of_its_messages():
    # Of one more iteration the backward pass needs the maps before it: what was filtered and, per term, a message.
    labels, size = 21, (64, 64)
    temporary = []
    for num_iterations in (2, 6):
        layer = DenseCRF(labels, preset=TINY, num_iterations=num_iterations, filter="lattice", **CRF_AS_RNN)
        graph, state = nnx.split(layer)
        gradient = jax.jit(
            jax.grad(lambda state, images, logits: jnp.sum(nnx.merge(graph, state)(images, logits) ** 2))  # noqa: B023
        )
        shapes = [jax.ShapeDtypeStruct((*size, channels), np.float32) for channels in (3, labels)]
        temporary.append(gradient.lower(state, *shapes).compile().memory_analysis().temp_size_in_bytes)
    per_iteration = (temporary[1] - temporary[0]) / 4
    assert per_iteration < 3.5 * 4 * labels * np.prod(size)


def test_learned_weights_make_a_preset():
    images, logits = example()
    layer = moved(create(filter="dense", learn_bandwidths=True))
    preset = layer.learned_preset()
    assert preset.position_bandwidth != TINY.position_bandwidth
    refined = jaxcrf.refine(images, logits=logits, preset=preset, method="densecrf", filter="dense")
    np.testing.assert_allclose(layer.infer(images, logits).probs, refined, atol=5e-6)
    # Of weights per label, a preset has the mean.
    layer = moved(create(weights_per_label=True))
    expected = np.mean(0.9 * jax.nn.softplus(layer.scales["bilateral_weight"][...]))
    np.testing.assert_allclose(layer.learned_preset().bilateral_weight, expected, rtol=1e-6)


def test_bad_arguments_are_named():
    images, logits = example()
    with pytest.raises(ValueError, match="filter: got 'latice'; expected auto, dense, lattice, landmark"):
        create(filter="latice")
    for filter in ("auto", "lattice"):
        with pytest.raises(ValueError, match=f"learn_bandwidths: got True with filter='{filter}'"):
            create(filter=filter, learn_bandwidths=True)
    with pytest.raises(ValueError, match="weights_per_label: got True with learn_weights=False"):
        create(weights_per_label=True, learn_weights=False)
    with pytest.raises(ValueError, match="filter_options: got capacity with filter='auto'"):
        create(filter_options={"capacity": 200})
    with pytest.raises(TypeError, match="filter_options: 'lattice' has no option 'capacty'; it has capacity"):
        create(filter="lattice", filter_options={"capacty": 200})
    with pytest.raises(ValueError, match="gradient: got 'exact'"):
        create(gradient="exact")
    with pytest.raises(ValueError, match=r"logits: got shape \(4, 5, 3\); expected \[\*batch, H, W, 4\]"):
        DenseCRF(4)(images, logits)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 5, 3\) for logits of shape \(4, 5, 3\)"):
        create()(images[1:], logits)

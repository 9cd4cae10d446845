"""A step against the same mathematics written out, and its guard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcrf.training import Outcome, Template, Update, data_mesh, init_state, make_step, with_optimizers
from jaxcrf.training.steps import make_predict
from training_suite import NUM_LABELS, Network, assert_same, cross_entropy, draw_batch, plain_network


def start(make, update, **options):
    template = Template(make(nnx.Rngs(0)))
    state = with_optimizers(init_state(template, average="average_decay" in options), {update.name: update})
    return template, state, make_step(template, update, **options)


def arrays(leaves):
    return {
        path: np.asarray(jax.random.key_data(leaf) if path.endswith("rngs/key") else leaf)
        for path, leaf in leaves.items()
    }


def written_out(params, batches, rate):
    """Gradient descent on the mean cross-entropy of `plain_network`, with nothing of the package."""

    def loss(params, batch):
        x = batch["image"] / 128 - 1
        convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.maximum(convolve(x, params["body/kernel"]) + params["body/bias"], 0)
        logits = convolve(x, params["head/kernel"]) + params["head/bias"]
        valid = batch["labels"] != 255
        safe = jnp.where(valid, batch["labels"], 0)
        terms = jnp.log(jnp.exp(logits).sum(-1)) - jnp.take_along_axis(logits, safe[..., None], -1)[..., 0]
        return jnp.where(valid, terms, 0).sum() / valid.sum()

    for batch in batches:
        gradients = jax.grad(loss)(params, batch)
        params = {path: leaf - rate * gradients[path] for path, leaf in params.items()}
    return params


def test_steps_are_gradient_descent_however_batches_are_split():
    batches = [draw_batch(seed=seed) for seed in range(3)]
    update = Update("all", cross_entropy, optax.sgd(0.5))
    template = Template(plain_network(nnx.Rngs(0)))
    with jax.enable_x64(True):
        exact = written_out(
            {path: jnp.asarray(leaf, jnp.float64) for path, leaf in template.params.items()}, batches, 0.5
        )
        exact = {path: np.asarray(leaf) for path, leaf in exact.items()}
    for accumulate in (1, 4):
        _, state, step = start(plain_network, update, accumulate=accumulate)
        for batch in batches:
            state, report = step(state, batch)
        assert int(state.step) == 3
        np.testing.assert_allclose(report.figures["twice"], 2 * report.loss, rtol=1e-6)
        assert int(report.confusion.sum()) == (batches[-1]["labels"] != 255).sum()
        for path, leaf in exact.items():
            # Sums over about 2000 pixels in float32, of terms of order one.
            np.testing.assert_allclose(state.params[path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)


def test_only_what_is_trainable_moves_and_frozen_layers_may_evaluate():
    update = Update(
        "head", cross_entropy, optax.adam(0.1), trainable=("head/*",), evaluating=("norm", "dropout")
    )
    template, state, step = start(Network, update)
    before, variables = arrays(state.params), arrays(state.variables)
    assert len(jax.tree.leaves(state.optimizers)) == 5  # a count, and two moments of two arrays
    state, _ = step(state, draw_batch())
    after = arrays(state.params)
    for path, leaf in before.items():
        assert path.startswith("head/") != np.array_equal(after[path], leaf), path
    assert_same(arrays(state.variables), variables)

    # In training mode the statistics and the random stream move.
    training = dataclasses.replace(update, evaluating=())
    state, _ = make_step(template, training)(state, draw_batch())
    moved = arrays(state.variables)
    assert not np.array_equal(moved["norm/mean"], variables["norm/mean"])
    assert moved["dropout/rngs/count"] == variables["dropout/rngs/count"] + 1


def test_modules_that_evaluate_must_exist():
    update = Update("head", cross_entropy, optax.sgd(0.1), evaluating=("batchnorm",))
    _, state, step = start(Network, update)
    with pytest.raises(ValueError, match="evaluating: got the pattern 'batchnorm'"):
        step(state, draw_batch())


def test_rates_of_groups():
    update = Update("all", cross_entropy, optax.sgd(0.01))
    scaled = dataclasses.replace(update, learning_rates={"head/*": 10.0})
    changes = []
    for each in (update, scaled):
        _, state, step = start(plain_network, each)
        before = arrays(state.params)
        state, _ = step(state, draw_batch())
        changes.append({path: leaf - before[path] for path, leaf in arrays(state.params).items()})
    for path, change in changes[0].items():
        factor = 10 if path.startswith("head/") else 1
        # A change is the difference of two float32 numbers of order one.
        np.testing.assert_allclose(changes[1][path], factor * change, rtol=1e-3, atol=1e-6)


def test_average_of_parameters():
    _, state, step = start(plain_network, Update("all", cross_entropy, optax.sgd(0.5)), average_decay=0.3)
    average = arrays(state.average)
    for number in range(6):
        state, _ = step(state, draw_batch(seed=number))
        decay = min(0.3, (1 + number) / (10 + number))
        params = arrays(state.params)
        average = {path: decay * leaf + (1 - decay) * params[path] for path, leaf in average.items()}
    for path, leaf in average.items():
        np.testing.assert_allclose(state.average[path], leaf, rtol=1e-5, atol=1e-7)
    assert any(not np.array_equal(arrays(state.params)[path], leaf) for path, leaf in average.items())


def test_half_precision_computes_in_it_and_keeps_parameters():
    seen = []

    def loss(model, batch):
        outcome = cross_entropy(model, batch)
        seen.append(outcome.logits.dtype)
        return outcome

    update = Update("all", loss, optax.sgd(0.1))
    reports = []
    for options in ({}, {"compute_dtype": jnp.bfloat16}):
        _, state, step = start(plain_network, update, **options)
        state, report = step(state, draw_batch())
        reports.append(float(report.loss))
    assert seen[0] == jnp.float32
    assert seen[-1] == jnp.bfloat16
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("float32")}
    # bfloat16 has 8 bits; the loss is a mean of logarithms of order one.
    np.testing.assert_allclose(reports[1], reports[0], rtol=0.02)
    assert reports[0] != reports[1]


def test_a_loss_that_is_not_finite_changes_nothing_and_stops_all_steps():
    def loss(model, batch):
        logits = model(batch["image"])
        return Outcome(cross_entropy(model, batch).loss / batch["scale"][0], logits)

    _, state, step = start(Network, Update("all", loss, optax.adam(0.1)), average_decay=0.9)
    sound = draw_batch() | {"scale": np.ones(4, np.float32)}
    broken = draw_batch(seed=1) | {"scale": np.zeros(4, np.float32)}
    state, report = step(state, sound)
    assert bool(report.finite)
    before = [arrays(part) for part in (state.params, state.variables, state.average)]
    count = int(state.step)
    for batch in (broken, sound):
        state, report = step(state, batch)
        assert bool(state.failed)
        assert int(state.step) == count
        for part, expected in zip((state.params, state.variables, state.average), before, strict=True):
            assert_same(arrays(part), expected)
    assert bool(report.finite)  # that of the sound batch, which came too late


@pytest.mark.slow
def test_dropout_differs_from_step_to_step_and_repeats_from_the_start():
    update = Update("all", cross_entropy, optax.sgd(0.0))
    losses = []
    for _ in range(2):
        _, state, step = start(lambda rngs: Network(rngs, dropout=0.5, norm=False), update)
        for _ in range(2):
            state, report = step(state, draw_batch())
            losses.append(float(report.loss))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_all_pixels_ignored_is_a_step_of_nothing():
    _, state, step = start(plain_network, Update("all", cross_entropy, optax.sgd(0.5)))
    before = arrays(state.params)
    batch = draw_batch()
    state, report = step(state, batch | {"labels": np.full_like(batch["labels"], 255)})
    assert float(report.loss) == 0
    assert_same(arrays(state.params), before)


def test_predictions_are_those_of_the_model_in_evaluation_mode():
    model = Network(nnx.Rngs(0))
    template = Template(model)
    images = draw_batch()["image"]
    found = make_predict(template)(template.params, template.variables, images)
    model.eval()
    np.testing.assert_allclose(found, model(images), rtol=1e-5, atol=1e-6)
    assert found.shape[-1] == NUM_LABELS


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"num_devices: got 64, but JAX sees \d+ .*at most"):
        data_mesh(64)


def test_batches_that_do_not_divide():
    _, state, step = start(plain_network, Update("all", cross_entropy, optax.sgd(0.5)), accumulate=3)
    with pytest.raises(ValueError, match="accumulate: got 3, which does not divide the 4 examples"):
        step(state, draw_batch())
    with pytest.raises(ValueError, match="accumulate: got 0"):
        start(plain_network, Update("all", cross_entropy, optax.sgd(0.5)), accumulate=0)

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcrf.models.parameters import named_leaves, split, with_leaves
from jaxcrf.training.updates import Update, scale_by_path, select
from training_suite import Network

PATHS = ("backbone/layers/0/kernel", "backbone/layers/0/bias", "classifier/kernel")


def test_patterns_span_slashes_and_keep_the_order_of_parameters():
    assert select(PATHS, ("classifier/*", "backbone/*/kernel")) == (PATHS[0], PATHS[2])


def test_a_pattern_without_parameters_is_named_with_near_ones():
    with pytest.raises(ValueError, match=r"trainable: got the pattern 'clasifier/kernel'.*classifier/kernel"):
        select(PATHS, ("*", "clasifier/kernel"))


def test_patterns_are_a_tuple_not_a_string():
    with pytest.raises(TypeError, match="trainable"):
        Update("crf", lambda model, batch: None, optax.sgd(1.0), trainable="crf/*")
    with pytest.raises(TypeError, match="evaluating"):
        Update("crf", lambda model, batch: None, optax.sgd(1.0), evaluating="unary")


def test_the_last_factor_that_matches_counts():
    params = {path: jnp.ones(2) for path in PATHS}
    transformation = scale_by_path({"backbone/*": 0.5, "*/bias": 2.0})
    updates, _ = transformation.update(params, transformation.init(params), params)
    assert [float(updates[path][0]) for path in PATHS] == [0.5, 2.0, 1.0]
    with pytest.raises(ValueError, match="learning_rates: got the pattern 'head"):
        scale_by_path({"head/*": 10.0}).init(params)


def test_names_give_the_arrays_back():
    model = Network(nnx.Rngs(0))
    definition, params, variables = split(model)
    assert set(named_leaves(params)) == {
        *("body/kernel", "head/kernel", "head/bias"),
        *("norm/scale", "norm/bias"),
    }
    assert "dropout/rngs/key" in named_leaves(variables)
    doubled = with_leaves(params, {path: 2 * leaf for path, leaf in named_leaves(params).items()})
    merged = nnx.merge(definition, doubled, variables)
    np.testing.assert_array_equal(merged.body.kernel[...], 2 * model.body.kernel[...])

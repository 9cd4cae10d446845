"""The variants of ConvCRF, and networks with a CRF on top."""

import dataclasses

import jax
import pytest
from flax import nnx

import jaxcrf
from jaxcrf import models
from jaxcrf.models.convcrf import VARIANTS
from jaxcrf.models.parameters import named_leaves
from jaxcrf.nn import ConvCRF

EXTRA = {
    "convcrf": set(),
    "convcrf+T": {"feature_offsets"},
    "convcrf+C": {"compatibility"},
    "convcrf+CT": {"feature_offsets", "compatibility"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn_what_the_paper_says(variant):
    layer = ConvCRF(3, **models.convcrf_options(variant, (4, 5)))
    found = {path.partition("/")[0] for path in named_leaves(nnx.state(layer, nnx.Param))}
    assert found == EXTRA[variant] | {"scales"}
    assert layer.learned_preset().filter_size == jaxcrf.presets.get("convcrf_trainable").filter_size


def test_by_hand_nothing_is_learned():
    layer = ConvCRF(3, **models.convcrf_options(None, preset="convcrf_reference"))
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    preset = jaxcrf.presets.get("convcrf_reference")
    assert dataclasses.replace(layer.learned_preset(), summary=preset.summary) == preset


def test_variants_are_options_of_create():
    options = models.convcrf_options("convcrf+CT", [24, 32])
    config = models.ModelConfig.of("convcrf", 3, width=4, blocks=[1, 1], crf_options=options)
    assert models.ModelConfig.from_json(config.to_json()) == config
    crf = config.create_abstract().crf
    assert crf.feature_offsets.shape == (24, 32, 2)
    assert crf.compatibility.shape == (3, 3)


def test_bad_variants():
    with pytest.raises(ValueError, match=r"variant: got '\+T'; expected None or one of convcrf, convcrf\+T"):
        models.convcrf_options("+T")
    with pytest.raises(
        ValueError, match=r"image_shape: got None; convcrf\+CT learns a feature for every place"
    ):
        models.convcrf_options("convcrf+CT")

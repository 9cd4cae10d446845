from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcrf import models
from jaxcrf.models import ModelConfig
from jaxcrf.models.parameters import named_leaves, split
from jaxcrf.models.registry import _REFINEMENTS
from model_suite import SIZE, SMALL, Member, draw_images, missing

# One of VGG-16; one of a residual network that also has a CRF. The others take minutes.
QUICK = ("deeplab_largefov", "convcrf")
# The code of others with other numbers, or a part of it.
ALIKE = (
    "resnet101_fcn",
    "deeplab",
    "deeplab_4x4",
    "deeplab_7x7",
    "deeplab_msc",
    "gaussian_crf",
    "deep_parsing_unary",
    "h_renet_baseline",
)
# Neither dropout nor batch normalisation: nothing that evaluation does otherwise.
MODELESS = ("n_renet",)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name,
            marks=[] if name in QUICK else pytest.mark.exhaustive if name in ALIKE else pytest.mark.slow,
        )
        for name in models.names()
        if name in SMALL
    ],
)
def member(request):
    return Member(request.param)


def test_every_entry_is_in_the_suite():
    assert not missing(), (
        f"{', '.join(missing())}: in the registry but not in SMALL of tests/model_suite.py; add options that make "
        "it tiny, and this suite runs over it"
    )


def test_the_readme_lists_every_entry():
    readme = Path(__file__).parents[2] / "README.md"
    table = readme.read_text().partition("## Models\n")[2].partition("\n## ")[0]
    for name in (*models.names(), *_REFINEMENTS):
        assert f"`{name}`" in table, name


def largest_difference(found, expected):
    """In units of the largest logit."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


# Convolutions that are fused sum in another order; float32 rounds by 6e-8, a few dozen layers by 1e-6 to 1e-5.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.exhaustive)
        for name in models.names()
    ],
)
def test_not_compiled_and_not_in_a_batch_it_is_the_same(name):
    member = Member(name)
    found = member.run(draw_images()[None, 1:])
    assert largest_difference(found[0, 0], member.logits["batch"][1]) < 1e-4


class TestEveryEntry:
    def test_any_size_goes_in_and_comes_out(self, member):
        shapes = [(5, 7), (1, 1), (2, 16, 24), (2, 1, 1, 9)]
        dtypes = (np.uint8, np.float32, np.float32, np.uint8)
        found = member.traced(
            *(np.zeros((*shape, 3), dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        )
        assert [x.shape for x in found] == [(*shape, 3) for shape in shapes]
        assert {x.dtype for x in found} == {jnp.dtype("float32")}

    def test_logits_are_finite(self, member):
        logits = member.logits
        assert logits["batch"].shape == (2, *SIZE, 3)
        assert logits["corner"].shape == (5, 3, 3)
        for values in logits.values():
            assert np.isfinite(np.asarray(values, np.float32)).all()
        # Neither constant nor the same for both images.
        assert np.std(logits["batch"]) > 1e-3
        assert largest_difference(*logits["batch"]) > 1e-3

    def test_half_precision(self, member):
        _, params, _ = split(member.abstract(dtype="bfloat16"))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        half, full = (np.asarray(member.logits[kind], np.float64) for kind in ("half", "batch"))
        assert member.logits["half"].dtype == jnp.bfloat16
        # Every layer rounds by up to 2⁻⁹; of some 25 layers the roundings add up to 5 · 2⁻⁹ if they are independent,
        # and to 25 · 2⁻⁹ if they are not.
        assert 2**-12 < np.linalg.norm(half - full) / np.linalg.norm(full) < 25 * 2**-9

    def test_gradients_reach_every_parameter(self, member):
        _, gradients = member.training
        for path, largest in gradients.items():
            assert np.isfinite(largest).all(), path
            # Not at once: a residual block begins as the identity, where its convolutions have no gradient yet.
            assert (largest[1:] > 0).any(), path

    def test_one_image_is_learned(self, member):
        losses, _ = member.training
        # A quarter of what guessing costs.
        assert losses[-5:].min() < np.log(3) / 4 < losses[0] / 3

    def test_saved_models_come_back_bit_for_bit(self, member, tmp_path):
        models.save(tmp_path / "model", member.model, label_names=("sky", "road", "car"))
        loaded = models.load(tmp_path / "model").model
        assert loaded.config == member.model.config == member.config()
        before, after = (
            {path: leaf for part in split(model)[1:] for path, leaf in named_leaves(part).items()}
            for model in (member.model, loaded)
        )
        assert before.keys() == after.keys()
        for path, leaf in before.items():
            assert leaf.dtype == after[path].dtype, path
            np.testing.assert_array_equal(
                *(jax.random.key_data(x) if is_key(x) else x for x in (leaf, after[path]))
            )
        definitions = [split(model)[0] for model in (member.model, loaded)]
        member.model.eval()
        assert split(member.model)[0] == definitions[1]
        assert (definitions[0] == definitions[1]) == (member.name in MODELESS)
        member.model.train()

    def test_other_channels(self, member):
        (found,) = member.traced(np.zeros((1, 16, 24, 4), np.uint8), in_channels=4)
        assert found.shape == (1, 16, 24, 3)
        for options, channels in (({"in_channels": 4}, 3), ({}, 4), ({}, 1)):
            with pytest.raises(
                ValueError, match=rf"images: got shape \(1, 16, 24, {channels}\).*expected \["
            ):
                member.traced(np.zeros((1, 16, 24, channels), np.uint8), **options)
        for shape in ((16, 3), (0, 16, 3)):
            with pytest.raises(ValueError, match=r"images: got shape"):
                member.traced(np.zeros(shape, np.uint8))

    def test_bad_options(self, member):
        with pytest.raises(ValueError, match=r"num_labels: got 1, .* take 2"):
            ModelConfig.of(member.name, 1, **SMALL[member.name]).create_abstract()
        for value in (0, 2.5):
            with pytest.raises(ValueError, match=f"num_labels: got {value}; expected a whole number"):
                ModelConfig.of(member.name, value)
        for name, value in (("in_channels", 0), ("in_channels", "3"), ("width", 0), ("width", 1.5)):
            with pytest.raises(ValueError, match=f"{name}: got {value!r}; expected a whole number"):
                member.config(**{name: value}).create_abstract()
        with pytest.raises(TypeError, match=r"in_chanels: .* has no such option, did you mean 'in_channels'"):
            member.config(in_chanels=3).create_abstract()


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("refine", _REFINEMENTS)
def test_any_crf_goes_on_any_network(refine):
    options = {"refine": refine, "width": 8, "blocks": [1, 0, 1]}
    shallow = {"depth": "res2a"} if refine.startswith("gaussian_crf") else {}
    model = ModelConfig.of("small_fcn", 3, refine_options=shallow, **options).create_abstract()
    definition, *arrays = split(model)

    def forward(*arrays):
        model = nnx.merge(definition, *arrays)
        return model.with_unary(np.zeros((9, 10, 3), np.uint8))

    assert [(x.shape, x.dtype) for x in jax.eval_shape(forward, *arrays)] == [((9, 10, 3), jnp.float32)] * 2
    parts = {path.split("/")[0] for path in named_leaves(arrays[0])}
    assert {"unary", "crf"} <= parts <= {"unary", "crf", "pairwise"}
    with pytest.raises(TypeError, match=f"nonsense: the CRF {refine!r} has no such option; it has "):
        ModelConfig.of("small_fcn", 3, refine_options={"nonsense": 3}, **options).create_abstract()


@pytest.mark.slow
def test_a_reduced_image_is_averaged_first():
    whole, reduced = (
        models.create("small_fcn", 3, rngs=nnx.Rngs(0), reduction=reduction, **SMALL["small_fcn"])
        for reduction in (1, 2)
    )
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
    assert config.create_abstract().config == config


def test_what_is_unknown_is_named():
    def make(name="small_fcn", **options):
        return ModelConfig.of(name, 3, **options).create_abstract()

    with pytest.raises(
        ValueError, match=r"name: got 'smallfcn', did you mean 'small_fcn'.*models are small_fcn, "
    ):
        models.create("smallfcn", 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"refine: got 'conv_crf', did you mean 'convcrf'.*expected None or one of "
    ):
        make(refine="conv_crf")
    with pytest.raises(ValueError, match="refine_options: goes with refine"):
        make(refine_options={"preset": "convcrf"})
    with pytest.raises(TypeError, match=r"refin: .*did you mean 'refine'"):
        make(refin="convcrf")
    with pytest.raises(TypeError, match="crf_options: 'small_fcn' has no such option"):
        make(crf_options={})
    for name, options in (("small_fcn", {"refine": "convcrf"}), ("convcrf", {})):
        key = "refine_options" if options else "crf_options"
        with pytest.raises(
            TypeError, match=r"num_iteration: the CRF 'convcrf' .* did you mean 'num_iterations'"
        ):
            make(name, **options, **{key: {"num_iteration": 3}})
    with pytest.raises(TypeError, match="depth"):
        make(depth=3)
    with pytest.raises(TypeError, match="width: got"):
        make(width=jnp.float32)
    with pytest.raises(ValueError, match="reduction: got 0"):
        make(reduction=0)
    with pytest.raises(ValueError, match="width: got 1; expected at least 2"):
        make(width=1)

"""N-ReNet and H-ReNet; that layers follow their equations is in test_recurrent.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcrf.compat import weights
from jaxcrf.models import ModelConfig
from jaxcrf.models.parameters import named_leaves, split
from jaxcrf.models.renet import HReNet, NReNet
from jaxcrf.models.vgg import VGG16
from model_suite import num_parameters, with_numbers

ALL = ("pool4", "pool5", "conv7")
TINY = {"width": 2, "hidden_channels": 6, "recurrent_channels": 3}


def images(*shape):
    return np.random.default_rng(1).uniform(0, 255, (*shape, 3)).astype(np.float32)


def group_parameters(channels, features, gates=4):
    """Two layers of two directions: inputs, recurrence and biases of every gate."""
    first, second = (2 * gates * features * (c + features + 1) for c in (channels, 2 * features))
    return first + second


# VGG-16's thirteen convolutions, of torchvision's vgg16 without its classifier.
VGG = 14_714_688
CONV5 = 3 * (9 * 512 * 512 + 512)
CONV67 = 9 * 512 * 1024 + 1024 + 9 * 1024 * 1024 + 1024


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        (
            "n_renet",
            {},
            group_parameters(12, 60)
            + group_parameters(120, 120)
            + group_parameters(240, 240)
            + 480 * 21
            + 21,
        ),
        ("h_renet_baseline", {}, VGG + CONV67 + 1024 * 21 + 21),
        ("h_renet", {}, VGG + CONV67 + group_parameters(1024, 120) + 240 * 21 + 21),
        ("h_renet", {"cell": "irnn"}, VGG + CONV67 + group_parameters(1024, 120, 1) + 240 * 21 + 21),
        # Normalisation has statistics, but nothing that is learned.
        (
            "h_renet",
            {"sources": ALL, "normalization": "batch"},
            VGG + CONV67 + group_parameters(512 + 512 + 1024, 120) + 240 * 21 + 21,
        ),
        # What comes after pool4 is left out.
        ("h_renet", {"sources": ["pool4"]}, VGG - CONV5 + group_parameters(512, 120) + 240 * 21 + 21),
        ("h_renet", {"sources": ["pool5"]}, VGG + group_parameters(512, 120) + 240 * 21 + 21),
    ],
)
def test_parameters_are_those_of_the_layers_of_the_paper(name, options, count):
    assert num_parameters(ModelConfig.of(name, 21, **options).create_abstract()) == count


def sensitivity(function, image):
    """Of the last cell of some maps: how much it changes with every pixel."""
    gradient = jax.jit(jax.grad(lambda image: jnp.sum(function(image)[-1, -1] ** 2)))
    return np.abs(gradient(image)).max(-1)


def test_every_score_of_an_n_renet_depends_on_every_pixel():
    model = with_numbers(lambda: NReNet(3, width=3, multipliers=(1,), rngs=nnx.Rngs(0)))
    assert (sensitivity(model.scores, images(7, 10)) > 0).all()


@pytest.fixture(scope="module")
def low():
    """An H-ReNet on features that see 92 pixels by themselves, 108 with the pool."""
    return with_numbers(lambda: HReNet(3, sources=("pool4",), **TINY, rngs=nnx.Rngs(0)))


# The last cell is columns 248 and 249 and would be those up to 255, from which convolutions reach back by 50.
WIDE, REACH = (9, 250), 198


def test_every_score_of_an_h_renet_depends_on_far_pixels_by_its_group(low):
    image = images(*WIDE)
    found = sensitivity(low.scores, image)[:, :REACH]
    # Rectifiers and maxima leave some pixels without any influence.
    assert (found > 0).mean() > 0.5
    alone = sensitivity(low.combined, image)
    assert (alone[:, :REACH] == 0).all()
    assert (alone[:, REACH:] > 0).any()


def test_padding_never_reaches_what_a_mask_lets_through(low):
    image, changed = images(*WIDE), images(*WIDE)
    mask = np.zeros(WIDE, bool)
    mask[:, :100] = True
    # Farther from the image than convolutions reach.
    changed[:, 200:] = 0
    scores = nnx.jit(lambda model, image, mask: model.scores(image, mask))
    found = np.asarray(scores(low, changed, mask))[:, :13]
    # However much of it there is, and whatever is in it.
    expected = np.asarray(scores(low, image[:, :200], mask[:, :200]))[:, :13]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(np.asarray(scores(low, changed, np.ones(WIDE, bool)))[:, :13] - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("patch", "size"),
    # Whole patches, broken ones, and images smaller than one.
    [(2, (4, 8)), (2, (5, 7)), (4, (5, 2)), (4, (1, 3)), (3, (2, 1))],
)
def test_a_padded_image_comes_out_of_an_n_renet_as_it_would_alone(patch, size):
    model = with_numbers(lambda: NReNet(3, width=3, multipliers=(1,), patch=patch, rngs=nnx.Rngs(0)))
    height, width = size
    image = images(*size)
    # Of another one, the larger, in the same batch nothing is seen either.
    padded, mask = np.full((2, 8, 12, 3), 99.0, np.float32), np.ones((2, 8, 12), bool)
    padded[0, :height, :width] = image
    mask[0] = False
    mask[0, :height, :width] = True
    run = nnx.jit(lambda model, *arguments: (model.scores(*arguments), model(*arguments)))
    scores, logits = run(model, image)
    found_scores, found = run(model, padded, mask)
    rows, columns, _ = scores.shape
    assert (rows, columns) == (-(-height // patch), -(-width // patch))
    np.testing.assert_allclose(found_scores[0, :rows, :columns], scores, atol=1e-6)
    # Up to the border, beyond which there are other cells.
    np.testing.assert_allclose(found[0, :height, :width], logits, atol=1e-5)
    np.testing.assert_allclose(found[1], run(model, padded[1])[1], atol=1e-5)


def test_images_smaller_than_a_patch_are_reflected():
    model = with_numbers(lambda: NReNet(3, width=2, multipliers=(1,), patch=4, rngs=nnx.Rngs(0)))
    image, mask = images(2, 1), np.ones((2, 1), bool)
    reflected = image[[0, 1, 0, 1]][:, [0, 0, 0, 0]]

    @nnx.jit
    def run(model, image, mask, reflected):
        return model.scores(image), model.scores(image, mask), model.scores(reflected)

    found, masked, expected = run(model, image, mask, reflected)
    assert found.shape == (1, 1, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(masked, expected, atol=1e-6)


def test_scores_of_an_h_renet_are_interpolated_within_the_image():
    model = with_numbers(lambda: HReNet(3, cell=None, **TINY, rngs=nnx.Rngs(0)))
    image, mask = images(24, 40), np.zeros((24, 40), bool)
    # Its last row and column lie behind the centres of their cells.
    mask[:14, :23] = True
    scores, logits = nnx.jit(lambda model, *arguments: (model.scores(*arguments), model(*arguments)))(
        model, image, mask
    )
    expected = model.upsample(scores[:2, :3], (14, 23))
    np.testing.assert_allclose(logits[:14, :23], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(model.upsample(scores, (24, 40))[:14, :23] - expected).max() > 1e-3


def test_patches_are_interpolated_from_their_centres():
    model = with_numbers(lambda: NReNet(3, width=2, multipliers=(1,), rngs=nnx.Rngs(0)))
    rows, columns = model.places(7), model.places(10)
    assert rows.tolist() == [0.5, 2.5, 4.5, 6.5]
    scores = jnp.asarray(rows[:, None, None] * [1, 0, 1] + columns[:, None] * [0, 1, 1], jnp.float32)
    at = np.clip(np.arange(7), 0.5, 6.5)[:, None, None], np.clip(np.arange(10), 0.5, 8.5)[:, None]
    expected = at[0] * [1, 0, 1] + at[1] * [0, 1, 1]
    np.testing.assert_allclose(model.upsample(scores, (7, 10)), expected, atol=1e-5)


class TestCombination:
    def combined(self, image, mask=None, train=False, **options):
        model = with_numbers(lambda: HReNet(3, sources=ALL[::-1], **TINY, **options, rngs=nnx.Rngs(0)))
        model.set_attributes(nnx.BatchNorm, use_running_average=not train, raise_if_not_found=False)
        return np.asarray(nnx.jit(lambda model, *arguments: model.combined(*arguments))(model, image, mask))

    def test_maps_are_joined_and_scaled_to_one_norm(self):
        x = images(2, 40, 33)
        plain = self.combined(x)
        assert plain.shape == (2, 5, 5, 16 + 16 + 6)
        found = self.combined(x, normalization="l2", l2_scale=7.0)
        # A map each, of all channels and cells of an image.
        for part in np.split(np.arange(38), [16, 32]):
            norms = np.linalg.norm(found[..., part].reshape(2, -1), axis=1)
            np.testing.assert_allclose(norms, 7.0, rtol=1e-5)
            scale = np.linalg.norm(plain[..., part].reshape(2, -1), axis=1)[:, None, None, None] / 7
            np.testing.assert_allclose(scale * found[..., part], plain[..., part], rtol=1e-4, atol=1e-4)
        # What is padding has no part in the norm.
        mask = np.zeros((2, 40, 33), bool)
        mask[0], mask[1, :16, :24] = True, True
        masked = self.combined(x, mask, normalization="l2", l2_scale=7.0)[1, :2, :3]
        np.testing.assert_allclose(np.linalg.norm(masked[..., :16]), 7.0, rtol=1e-5)

    def test_batches_are_normalised(self):
        x = images(2, 40, 33)
        plain = self.combined(x).reshape(-1, 38)
        found = self.combined(x, normalization="batch", train=True).reshape(-1, 38)
        # Some of the few rectified channels are zero everywhere.
        alive = plain.std(0) > 0.1
        assert alive.sum() > 10
        np.testing.assert_allclose(found[:, alive].mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(found[:, alive].std(0), 1, rtol=1e-2)


def test_feature_maps_have_the_names_of_the_layers():
    n_renet = with_numbers(lambda: NReNet(3, width=2, multipliers=(1, 2), rngs=nnx.Rngs(0)))
    h_renet = with_numbers(lambda: HReNet(3, **TINY, rngs=nnx.Rngs(0)))
    shapes = [
        {name: value.shape for name, value in jax.eval_shape(model.feature_maps, images(7, 10)).items()}
        for model in (n_renet, h_renet)
    ]
    assert shapes[0] == {
        f"renet{k}_{direction}": (4, 5, 4 * 2 ** (k - 1))
        for k in (1, 2)
        for direction in ("vertical", "horizontal")
    }
    assert shapes[1] == {"combined": (1, 2, 6), "renet1_vertical": (1, 2, 6), "renet1_horizontal": (1, 2, 6)}


@pytest.mark.parametrize(
    ("name", "refine"),
    [
        ("h_renet", "densecrf"),
        pytest.param("h_renet", "convcrf", marks=pytest.mark.slow),
        ("n_renet", "convcrf"),
    ],
)
def test_crfs_go_on_top(name, refine):
    options = {"width": 2} | ({"hidden_channels": 6, "recurrent_channels": 3} if name == "h_renet" else {})
    model = ModelConfig.of(name, 3, refine=refine, **options).create_abstract()
    definition, *arrays = split(model)

    def forward(*arrays):
        model = nnx.merge(definition, *arrays)
        model.eval()
        # The mask is the network's.
        return model.with_unary(np.zeros((9, 17, 3), np.uint8), np.ones((9, 17), bool))

    assert [x.shape for x in jax.eval_shape(forward, *arrays)] == [(9, 17, 3)] * 2
    assert {path.split("/")[0] for path in named_leaves(arrays[0])} == {"unary", "crf"}


def test_imagenet_weights_go_into_the_backbone():
    arrays = weights.export(with_numbers(lambda: VGG16(width=2, rngs=nnx.Rngs(0))))
    # Fully-connected layers, which are no part of this network.
    arrays |= {"classifier.0.weight": np.zeros((6, 784), np.float32), "classifier.0.bias": np.zeros(6)}
    model = nnx.clone(with_numbers(lambda: HReNet(3, sources=("pool4", "conv7"), **TINY, rngs=nnx.Rngs(1))))
    model.backbone.conv5_3.kernel[...] = jnp.zeros_like(model.backbone.conv5_3.kernel[...])
    found = weights.load(model, arrays)
    assert len(found.loaded) == 26
    assert found.unused == ("classifier.0.weight", "classifier.0.bias")
    kernel = np.asarray(model.backbone.conv5_3.kernel[...]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kernel, arrays["features.28.weight"])
    # Without the last stage only what is there.
    low = with_numbers(lambda: HReNet(3, sources=("pool4",), **TINY, rngs=nnx.Rngs(1)))
    assert len(weights.load(low, arrays).loaded) == 20


def test_what_is_not_an_option_is_named():
    def make(name="h_renet", **options):
        return ModelConfig.of(name, 3, **options).create_abstract()

    for sources in ((), ("pool3",), ("pool4", "pool4"), "conv7", None):
        with pytest.raises(ValueError, match=r"sources: got .*; expected one or more of pool4, pool5, conv7"):
            make(sources=sources)
    for name, value in (
        ("normalization", "layer"),
        ("l2_scale", 0.0),
        ("l2_scale", "big"),
        ("deviation", -0.1),
        ("dropout", 1.5),
    ):
        with pytest.raises(ValueError, match=f"{name}: got {value!r}; expected"):
            make(**{name: value})
    for name in ("hidden_channels", "recurrent_channels", "rate"):
        with pytest.raises(ValueError, match=f"{name}: got 0; expected a whole number"):
            make(**{name: 0}, sources=("pool4",))
    with pytest.raises(ValueError, match="multipliers: got 2; expected a tuple"):
        make("n_renet", multipliers=2)
    with pytest.raises(ValueError, match="multipliers: got none"):
        make("n_renet", multipliers=[])
    for name, value in (("multipliers", [1, 0]), ("patch", 0)):
        with pytest.raises(ValueError, match=f"{name}: got 0; expected a whole number"):
            make("n_renet", **{name: value})
    for name in ("h_renet", "n_renet"):
        with pytest.raises(ValueError, match="cell: got 'lsmt'; did you mean 'lstm'"):
            make(name, cell="lsmt")
    with pytest.raises(ValueError, match="stages: got 6; expected 1 to 5"):
        nnx.eval_shape(lambda: VGG16(stages=6, rngs=nnx.Rngs(0)))


def test_what_does_not_fit_is_named():
    n_renet = with_numbers(lambda: NReNet(3, width=2, multipliers=(1,), rngs=nnx.Rngs(0)))
    h_renet = with_numbers(lambda: HReNet(3, sources=("pool4",), **TINY, rngs=nnx.Rngs(0)))
    for mask in (np.ones((5, 6), bool), np.ones((5, 7)), np.ones(7, bool)):
        for model in (n_renet, h_renet):
            with pytest.raises(ValueError, match="mask: got "):
                jax.eval_shape(model, images(5, 7), mask)
    broken = images(4, 4)
    broken[2, 2] = np.nan
    with pytest.raises(ValueError, match=r"x: .*NaN"):
        n_renet(broken)

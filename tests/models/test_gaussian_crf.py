"""Two-stream networks: both streams lie on one grid, on which nothing but the CRF happens."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf

nnx = pytest.importorskip("flax.nnx")

from jaxcrf import plots  # noqa: E402  (needs flax)
from jaxcrf.filters import Gram, Grid  # noqa: E402
from jaxcrf.models import ModelConfig, grids  # noqa: E402
from jaxcrf.models.gaussian_crf import GaussianCRFNetwork, with_gaussian_crf  # noqa: E402
from jaxcrf.models.network import Network  # noqa: E402
from jaxcrf.models.parameters import named_leaves, split  # noqa: E402
from jaxcrf.models.small_fcn import SmallFCN  # noqa: E402
from jaxcrf.nn import GaussianCRF  # noqa: E402
from jaxcrf.training import objectives  # noqa: E402

LABELS, SIZE = 3, (21, 30)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.float32)
SMALL = {"embedding_size": 4, "width": 4, "depth": "res2a"}


class Tiled(Network):
    """The grid of `SmallFCN` without its convolutions: scores that are given."""

    def __init__(self, scores=None, *, reduction=2):
        super().__init__(LABELS, 3, 4 * reduction)
        self.given = nnx.data(scores)

    places, upsample = SmallFCN.places, SmallFCN.upsample

    def scores(self, images):
        return self.given


class Strided(Network):
    """The grid of networks whose cells lie over pixels."""

    def __init__(self, scores=None, *, stride=8):
        super().__init__(LABELS, 3, stride)
        self.given = nnx.data(scores)

    def scores(self, images):
        return self.given


def make(**options):
    """On scores that are given, in evaluation mode."""
    scores = unary_scores(Strided())
    model = nnx.jit(
        lambda: with_gaussian_crf(Strided(scores), LABELS, rngs=nnx.Rngs(0), **(SMALL | options))
    )()
    model.eval()
    return model


@pytest.fixture(scope="module")
def stacked():
    """A dense and a sparse layer, Potts-type."""
    return make(layers=("dense", "sparse"), regularization=2.0)


@pytest.fixture(scope="module")
def found(stacked):
    """What it makes of the images, compiled at once."""

    @nnx.jit
    def everything(model):
        return {
            "features": model.features(IMAGES),
            "affinities": model.affinities(IMAGES),
            "logits": model(IMAGES),
            "with_unary": model.with_unary(IMAGES),
        }

    return everything(stacked)


def cells(network, size=SIZE):
    return tuple(-(-n // network.stride) for n in size)


def unary_scores(network, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, *cells(network), LABELS)), jnp.float32)


@pytest.mark.parametrize(
    "network", [Tiled(), Tiled(reduction=1), Strided()], ids=["tiled", "tiled 4", "strided"]
)
@pytest.mark.parametrize("n", [1, 21, 30])
def test_scores_lie_where_a_network_says(network, n):
    # What interpolation makes of the cells' own places are the places of the pixels: it is linear.
    places = network.places(n)
    assert places.shape == cells(network, (n, 1))[:1]
    scores = jnp.broadcast_to(jnp.asarray(places, jnp.float32)[:, None, None], (len(places), 1, LABELS))
    found = network.upsample(scores, (n, 1))[:, 0, 0]
    np.testing.assert_allclose(found, np.clip(np.arange(n), places[0], places[-1]), atol=1e-4)


@pytest.mark.parametrize("unary", [Tiled(), Strided()], ids=["tiled", "strided"])
def test_features_lie_where_the_scores_do(unary):
    class Places(nnx.Module):
        """Cells at every fourth pixel, whose features are their own places."""

        strides = types.MappingProxyType({"conv1": 8, "layer1": 4})

        def __call__(self, images):
            y, x = (4.0 * jnp.arange(-(-n // 4)) for n in images.shape[-3:-1])
            return {"layer1": jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1)[None]}

    model = GaussianCRFNetwork(unary, Places(), crf=None)
    found = model.features(IMAGES)[0]
    assert found.shape == (*cells(unary), 2)
    # Beyond its last cell the pairwise stream knows nothing.
    rows, columns = (np.minimum(unary.places(n), 4 * (-(-n // 4) - 1)) for n in SIZE)
    expected = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_interpolation_repeats_what_lies_at_the_edge():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 3)), jnp.float32)
    rows, columns = np.array([-2.0, 1.0, 2.25, 9.0]), np.arange(5.0)
    found = grids.interpolate(x, rows, columns)
    expected = jnp.stack([x[:, 0], x[:, 1], 0.75 * x[:, 2] + 0.25 * x[:, 3], x[:, 3]], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert grids.interpolate(x, np.arange(4.0), columns) is x
    assert grids.interpolate(x.astype(jnp.bfloat16), rows, columns).dtype == jnp.bfloat16


def test_it_is_the_crf_on_the_same_embeddings(stacked, found):
    features, (dense, sparse) = found["features"], found["affinities"]
    pixels = features.shape[-3] * features.shape[-2]
    # Compiled with what they come from, convolutions are summed in another order.
    np.testing.assert_allclose(dense.embeddings, stacked.layers[0].head(features), rtol=1e-4, atol=1e-5)
    first = jaxcrf.gaussian_crf(
        dense.embeddings / np.sqrt(pixels),
        stacked.unary.given,
        kind="potts",
        regularization=2.0,
        embedding_scaling="spectral",
    )
    assert first.stats.definite.all()
    second = jaxcrf.sparse_gaussian_crf(
        sparse.edges / 4,
        first.scores,
        kind="potts",
        regularization=2.0,
        connectivity=4,
        edge_scaling="diagonally-dominant",
        centered=True,
    )
    # Not the unary's: half of it is what no pairwise terms would leave.
    assert np.abs(second.scores - stacked.unary.given / 2).max() > 1e-3
    logits, unary = found["with_unary"]
    np.testing.assert_allclose(logits, grids.upsample(second.scores, 8, SIZE), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unary, grids.upsample(stacked.unary.given, 8, SIZE), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averaged", [False, True])
def test_beside_a_large_regularisation_the_unary_remains(stacked, found, averaged):
    # In general-type systems nothing scales embeddings up to λ, and beside it these are nothing.
    features, unary = found["features"], stacked.unary.given
    layer = GaussianCRF(
        features.shape[-1], LABELS, kind="general", embedding_size=4, regularization=1e6, averaged=averaged,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    np.testing.assert_allclose(1e6 * layer(features, unary), unary, rtol=1e-4, atol=1e-4)


def test_means_do_not_know_how_large_an_image_is():
    layer = GaussianCRF(4, LABELS, embedding_size=4, averaged=True, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.uniform(size=(2, 3, 4)), jnp.float32)
    unary = jnp.asarray(rng.normal(size=(2, 3, LABELS)), jnp.float32)
    once, twice = layer(features, unary), layer(*(jnp.tile(x, (1, 2, 1)) for x in (features, unary)))
    assert np.abs(once - unary).max() > 1e-3
    np.testing.assert_allclose(twice, jnp.tile(once, (1, 2, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        objectives.pairwise(num_pairs=32),
        pytest.param(objectives.scores(), marks=pytest.mark.slow),
        pytest.param(objectives.joint(), marks=pytest.mark.slow),
    ],
    ids=["pairwise", "scores", "joint"],
)
def test_every_parameter_learns_from_the_losses(stacked, loss):
    batch = {"image": IMAGES, "labels": jnp.zeros((2, *SIZE), int).at[:, 9:].set(1).at[:, :, 20:].set(255)}
    definition, params, rest = split(stacked)
    # A residual block begins as the identity, where its convolutions have no gradient yet.
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda params: loss(nnx.merge(definition, params, rest), batch).loss)
    )(params)
    assert np.isfinite(value)
    assert [path for path, leaf in named_leaves(gradients).items() if not np.any(leaf)] == []


def test_the_pairwise_loss_knows_whether_affinities_agree_with_the_labels():
    network = Tiled()
    rows, columns = (network.places(n).round().astype(int) for n in SIZE)
    labels = np.zeros((2, *SIZE), np.int32)
    labels[:, 11:] = 2
    signs = np.where(labels[:, rows[:, None], columns] == 2, -1.0, 1.0)
    right, down = np.ones_like(signs), signs * np.roll(signs, -1, 1)

    class Model:
        num_labels, places = LABELS, staticmethod(network.places)

        def affinities(self, images):
            edges = jnp.asarray(np.stack([right, down], -1))
            return Gram(jnp.asarray(signs[..., None]), kind="potts"), Grid(
                edges, connectivity=4, kind="potts"
            )

    def loss(labels, scale):
        return float(
            objectives.pairwise(num_pairs=4096, scale=scale)(
                Model(), {"image": IMAGES, "labels": labels}
            ).loss
        )

    # With nothing to say, one of nine pairs of labels is as good as another. Where terms say all, what remains is which
    # label, of three, or which unlike ones, of six: pairs drawn from all, and of 17 edges the 4 across.
    np.testing.assert_allclose(loss(labels, 0.0), 2 * np.log(9), rtol=1e-5)
    above = (signs[0] > 0).mean()
    unlike = 2 * above * (1 - above) * signs[0].size / (signs[0].size - 1)
    expected = sum(u * np.log(6) + (1 - u) * np.log(3) for u in (unlike, 4 / 17))
    np.testing.assert_allclose(loss(labels, 20.0), expected, rtol=0.02)  # a sample of the pairs
    assert loss(np.ascontiguousarray(labels[:, ::-1]) * (np.arange(SIZE[1]) < 15), 20.0) > 2 * np.log(9)


def test_pictures_of_what_was_learned(stacked, found):
    for terms in jax.tree.map(lambda leaf: leaf[0], found["affinities"]):
        assert terms.spatial == cells(stacked)
        figure = plots.affinity(terms, (1, 2), image=IMAGES[0].astype(np.uint8))
        assert len(figure.axes) == 2


@pytest.mark.parametrize(
    ("name", "layers", "kind"),
    [
        ("gaussian_crf", ["PixelLabelGram"], "general"),
        pytest.param("gaussian_crf_potts", ["PixelGram"], "potts", marks=pytest.mark.slow),
        ("gaussian_crf_sparse", ["PixelLabelGrid"], "general"),
        pytest.param("gaussian_crf_sparse_potts", ["PixelGrid"], "potts", marks=pytest.mark.slow),
        ("gaussian_crf_stacked", ["PixelGram", "PixelGrid"], "potts"),
    ],
)
def test_what_the_registry_puts_on_a_network(name, layers, kind):
    def terms():
        config = ModelConfig.of("small_fcn", LABELS, width=8, refine=name, refine_options=SMALL)
        model = config.create(nnx.Rngs(0))
        paths = {path.split("/")[0] for path in named_leaves(split(model)[1])}
        assert paths == {"unary", "pairwise", "crf"}
        return model.affinities(IMAGES)

    found = jax.eval_shape(terms)
    assert [type(terms).__name__ for terms in found] == layers
    assert {terms.kind for terms in found} == {kind}


def test_bad_arguments_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(TypeError, match="unary: got Conv; expected a network with scores on a grid"):
        GaussianCRFNetwork(nnx.Conv(3, 2, (1, 1), rngs=rngs), None, None)
    with pytest.raises(ValueError, match="depth: got 'res5a'; expected one of res2a, res3a, res4a"):
        with_gaussian_crf(Strided(), LABELS, rngs=rngs, depth="res5a")
    with pytest.raises(ValueError, match=r"layers: got \('dens',\); expected one or more of dense, sparse"):
        with_gaussian_crf(Strided(), LABELS, layers=("dens",), rngs=rngs)

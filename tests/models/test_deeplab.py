import numpy as np
import pytest
from flax import nnx

import grid_oracles
from jaxcrf.models import ModelConfig, grids
from jaxcrf.models.deeplab import DeepLab, DeepLabV2
from jaxcrf.models.resnet import ResNet
from jaxcrf.models.vgg import VGG16
from model_suite import num_parameters, with_numbers


def abstract(name):
    """The network for 21 labels, without numbers."""
    return nnx.eval_shape(lambda: ModelConfig.of(name, 21).create(nnx.Rngs(0)))


def images(*shape):
    return np.random.default_rng(1).uniform(0, 255, (*shape, 3)).astype(np.float32)


# Table 2, in millions: 134.3, 65.1, 65.1, 20.5.
@pytest.mark.parametrize(
    ("name", "size", "rate", "count"),
    [
        ("deeplab_7x7", 7, 4, 134_346_581),
        ("deeplab", 4, 4, 65_140_565),
        ("deeplab_4x4", 4, 8, 65_140_565),
        ("deeplab_largefov", 3, 12, 20_505_429),
    ],
)
def test_fields_of_view_have_the_papers_parameters(name, size, rate, count):
    model = abstract(name)
    assert num_parameters(model) == count
    assert model.fc6.kernel.shape[:2] == (size, size)
    assert model.fc6.kernel_dilation == rate


def test_multi_scale_features_are_640_channels_more():
    model = abstract("deeplab_msc_largefov")
    assert model.classifier.kernel.shape == (1, 1, 1024 + 640, 21)
    channels = (3, 64, 128, 256, 512)
    branches = sum(9 * c * 128 + 128 + 128 * 128 + 128 for c in channels)
    assert num_parameters(model) == 20_505_429 + branches + 640 * 21


# torchvision's resnet101 has 44 549 160, of which 2 049 000 classify.
@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("resnet101_fcn", 2048 * 21 + 21),
        pytest.param("deeplab_v2", 4 * (9 * 2048 * 21 + 21), marks=pytest.mark.slow),
    ],
)
def test_residual_networks_have_the_published_parameters(name, classifier):
    assert num_parameters(abstract(name)) == 44_549_160 - 2_049_000 + classifier


# The hole algorithm makes no approximation: with the same weights, the features of stride 32 are those of stride 8 at
# every fourth cell, borders included, where all that is not there is zero.
SIZE = (75, 106)


@pytest.mark.parametrize("output_stride", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_dilated_residual_features_are_those_of_the_sparse_network(output_stride):
    def features(output_stride):
        model = with_numbers(
            lambda: ResNet(blocks=(1, 1, 2, 2), width=4, output_stride=output_stride, rngs=nnx.Rngs(0))
        )
        return nnx.jit(model)(images(1, *SIZE))

    dense, sparse = features(output_stride), features(32)
    for name, stride in (("layer2", 8), ("layer3", 16), ("layer4", 32)):
        step = max(1, stride // output_stride)
        assert sparse[name].shape[1:3] == tuple(-(-n // stride) for n in SIZE)
        # Sums of some hundred terms in another order.
        np.testing.assert_allclose(dense[name][:, ::step, ::step], sparse[name], rtol=1e-4, atol=1e-4)


def test_dilated_vgg_features_are_those_of_the_sparse_network(monkeypatch):
    # But for the fifth pool, whose 3 × 3 cells are neighbours in either; so here pools only leave cells out.
    monkeypatch.setattr(grids, "max_pool", lambda x, size, stride: x[..., ::stride, ::stride, :])

    def features(output_stride):
        model = with_numbers(lambda: VGG16(width=2, output_stride=output_stride, rngs=nnx.Rngs(0)))
        return nnx.jit(model)(images(1, *SIZE))

    dense, sparse = features(8), features(32)
    for name, step in (("pool3", 1), ("pool4", 2), ("pool5", 4)):
        np.testing.assert_allclose(dense[name][:, ::step, ::step], sparse[name], rtol=1e-4, atol=1e-4)


def test_multi_scale_features_come_from_every_branch():
    options = {"width": 2, "hidden_channels": 6, "multi_scale": True, "branch_channels": 3}
    model = with_numbers(lambda: DeepLab(5, **options, rngs=nnx.Rngs(0)))
    x = images(1, 45, 61)
    found, pools = nnx.jit(lambda m, x: (m.features(x), m.backbone(x)))(model, x)
    assert found.shape == (1, 6, 8, 6 + 5 * 3)
    for k, (name, stride) in enumerate(
        [("image", 8), ("pool1", 4), ("pool2", 2), ("pool3", 1), ("pool4", 1)]
    ):
        first, second = ((c.kernel[...], c.bias[...]) for c in model.branches[name])
        hidden = np.maximum(convolved(pools[name][0], *map(np.asarray, first))[::stride, ::stride], 0)
        expected = np.maximum(convolved(hidden, *map(np.asarray, second)), 0)
        np.testing.assert_allclose(found[0, ..., 6 + 3 * k : 9 + 3 * k], expected, rtol=1e-4, atol=1e-4)


def test_the_largest_score_of_all_scales_is_taken():
    scales, rates = (1.0, 0.75, 0.4), (2, 3)
    model = with_numbers(
        lambda: DeepLabV2(3, blocks=(1, 1), width=2, scales=scales, rates=rates, rngs=nnx.Rngs(0))
    )
    size = (45, 61)
    image = images(*size)
    grid = (6, 8)
    backbone = nnx.jit(model.backbone)
    found = []
    for scale in scales:
        view = grid_oracles.resize(image, [round(scale * n) for n in size])
        features = np.asarray(backbone(view.astype(np.float32))["layer2"], np.float64)
        scores = sum(
            convolved(features, np.asarray(c.kernel[...]), np.asarray(c.bias[...]), rate)
            for c, rate in zip(model.classifier, rates, strict=True)
        )
        found.append(grid_oracles.resize(scores, grid))
    # Every scale wins somewhere, or this would not see it missing.
    assert set(np.argmax(found, 0).ravel()) == {0, 1, 2}
    np.testing.assert_allclose(
        nnx.jit(lambda m, x: m.scores(x))(model, image), np.max(found, 0), rtol=1e-3, atol=1e-3
    )


def convolved(x, kernel, bias, rate=1):
    """`[rows, columns, channels]` with zeros around, tap by tap in NumPy."""
    x = np.asarray(x, np.float64)
    reach = kernel.shape[0] // 2 * rate
    padded = np.pad(x, [(reach, reach), (reach, reach), (0, 0)])
    found = np.zeros((*x.shape[:2], kernel.shape[-1])) + bias
    for i, j in np.ndindex(*kernel.shape[:2]):
        found += padded[i * rate : i * rate + x.shape[0], j * rate : j * rate + x.shape[1]] @ kernel[i, j]
    return found

"""Weights from torch's files in VGG-16 and ResNets, against what torch makes of them."""

import io
import json
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import torch_networks
from jaxcrf.compat import weights
from jaxcrf.models.convcrf import Refined
from jaxcrf.models.deeplab import DeepLab, DeepLabV2
from jaxcrf.models.parameters import is_key, named_leaves
from jaxcrf.models.resnet import ResNet, ResNetFCN
from jaxcrf.models.small_fcn import SmallFCN
from jaxcrf.models.vgg import VGG16, VGG16FCN
from training_suite import experiment

FOLDER = Path(__file__).parent


def blank(make):
    """A module in evaluation mode whose arrays are all zero, which takes no compilation."""
    definition, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def fill(leaf):
        return jax.random.key(0) if is_key(leaf) else jnp.asarray(np.zeros(leaf.shape, leaf.dtype))

    model = nnx.merge(definition, jax.tree.map(fill, state))
    model.eval()
    return model


def call(model, function, image):
    definition, state = nnx.split(model)
    return jax.jit(lambda state, x: function(nnx.merge(definition, state), x))(state, image)


def shapes(model, **others):
    return {name: value.shape for name, value in weights.export(model).items()} | others


def error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


# Activations that torch made once, of the same weights.


def test_large_field_of_view_is_torch_s():
    model = blank(lambda rngs: DeepLab(2, width=4, hidden_channels=8, rngs=rngs))
    fully_connected = {"classifier.0.weight": (16, 32 * 49), "classifier.3.weight": (16, 16)}
    wide = torch_networks.weights(
        shapes(model) | fully_connected | {f"classifier.{i}.bias": (16,) for i in (0, 3)}
    )
    weights.load(model, wide)
    with np.load(FOLDER / "torch_networks.npz") as expected:
        found = call(model, lambda m, x: m.features(x), torch_networks.image(109, 117))
        assert error(found[::2, ::2], expected["large_field_of_view"]) < 1e-4


def test_batch_normalised_vgg_is_torch_s():
    model = blank(lambda rngs: VGG16(width=4, output_stride=32, pool_size=2, norm=True, rngs=rngs))
    weights.load(model, torch_networks.weights(shapes(model)))
    with np.load(FOLDER / "torch_networks.npz") as expected:
        found = call(model, lambda m, x: m(x)["pool5"], torch_networks.image(64, 96))
        assert error(found, expected["vgg_bn"]) < 1e-4


@pytest.mark.parametrize("output_stride", [8, 32])
def test_resnet_is_torch_s(output_stride):
    model = blank(lambda rngs: ResNet(blocks=(1, 1, 2, 2), width=4, output_stride=output_stride, rngs=rngs))
    weights.load(model, torch_networks.weights(shapes(model)))
    with np.load(FOLDER / "torch_networks.npz") as expected:
        found = call(model, lambda m, x: m(x)["layer4"], torch_networks.image(45, 61))
        step = 8 if output_stride == 8 else 1
        assert error(found[..., ::step], expected[f"resnet_{output_stride}"]) < 1e-4


# torch in the same process.


@pytest.fixture(scope="module")
def networks():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    # Otherwise its threads and XLA's wait for each other.
    torch.set_num_threads(2)
    return torch_networks._modules()


def check_vgg(networks, *, norm, dense, width, hidden, size):
    _, vgg, _ = networks
    theirs = torch_networks.filled(vgg(width, hidden, 7, norm, dense))
    options = {"output_stride": 8} if dense else {"output_stride": 32, "pool_size": 2}
    ours = blank(
        lambda rngs: VGG16FCN(
            7, width=width, hidden_channels=hidden, skips=(), norm=norm, rngs=rngs, **options
        )
    )
    entries = {name: value.numpy() for name, value in theirs.state_dict().items()}
    report = weights.load(ours, entries)
    assert report.unused == ("classifier.6.weight", "classifier.6.bias")
    assert report.not_set == ("classifier/bias", "classifier/kernel")
    ours.classifier.kernel[...] = jnp.asarray(entries["classifier.6.weight"].T[None, None])
    ours.classifier.bias[...] = jnp.asarray(entries["classifier.6.bias"])
    image = torch_networks.image(*size)
    found = call(ours, lambda m, x: m.backbone(x)["pool5"], image)
    (expected,) = torch_networks.run(theirs.features, image)
    assert error(found, expected) < 1e-4
    if not dense:
        # Of 7 × 7 cells the middle one sees them all, as the fully-connected layer does.
        scores = call(ours, lambda m, x: m.scores(x), image)
        expected = torch_networks.run(lambda x: theirs(x)[:, :, None, None], image)[0]
        assert error(scores[3:4, 3:4], expected) < 1e-4
    back = blank(
        lambda rngs: VGG16FCN(
            7, width=width, hidden_channels=hidden, skips=(), norm=norm, rngs=rngs, **options
        )
    )
    weights.load(back, weights.export(ours))
    exported = {k: networks[0].tensor(v) for k, v in weights.export(ours).items()}
    missing = theirs.load_state_dict(exported, strict=False)
    assert not missing.unexpected_keys
    assert all("classifier.6" in k or "num_batches" in k for k in missing.missing_keys)
    assert error(torch_networks.run(theirs.features, image)[0], np.asarray(found)) < 1e-4


@pytest.mark.parametrize(("norm", "dense"), [(False, False), (True, True)])
def test_vgg_beside_torch(networks, norm, dense):
    check_vgg(networks, norm=norm, dense=dense, width=4, hidden=16, size=(45, 61) if dense else (224, 224))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dense", [False, True])
def test_vgg_of_full_width_beside_torch(networks, dense):
    check_vgg(
        networks, norm=False, dense=dense, width=64, hidden=4096, size=(161, 193) if dense else (224, 224)
    )


def check_resnet(networks, depth, output_stride, width, size):
    _, _, resnet = networks
    dilated = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}[output_stride]
    theirs = torch_networks.filled(resnet({50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth], width, 7, dilated))
    ours = blank(lambda rngs: ResNetFCN(7, depth=depth, width=width, output_stride=output_stride, rngs=rngs))
    report = weights.load(ours, {name: value.numpy() for name, value in theirs.state_dict().items()})
    assert report.unused == ("fc.weight", "fc.bias")
    assert report.not_set == ("classifier/bias", "classifier/kernel")
    image = torch_networks.image(*size)
    found = call(ours, lambda m, x: list(m.backbone(x).values()), image)
    for ours_, theirs_ in zip(found, torch_networks.run(theirs.stages, image), strict=True):
        assert error(ours_, theirs_) < 1e-4


@pytest.mark.parametrize(("depth", "output_stride"), [(50, 16)])
def test_resnet_beside_torch(networks, depth, output_stride):
    check_resnet(networks, depth, output_stride, 4, (45, 61))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("depth", "output_stride"), [(50, 8), (50, 32), (101, 8)])
def test_resnet_of_full_width_beside_torch(networks, depth, output_stride):
    check_resnet(networks, depth, output_stride, 64, (161, 193))


# Which entry goes where.


@pytest.fixture(scope="module")
def vgg_entries():
    rng = np.random.default_rng(0)
    model = blank(lambda rngs: VGG16FCN(2, width=2, hidden_channels=24, rngs=rngs))
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(model).items()}
    return made | {"classifier.6.weight": np.ones((9, 24)), "classifier.6.bias": np.ones(9)}


@pytest.mark.parametrize(("size", "taps"), [(7, range(7)), (4, (0, 2, 4, 6)), (3, (0, 3, 6))])
def test_the_fully_connected_layers_are_decimated(vgg_entries, size, taps):
    model = blank(lambda rngs: DeepLab(3, kernel_size=size, width=2, hidden_channels=6, rngs=rngs))
    report = weights.load(model, vgg_entries)
    assert report.unused == ("classifier.6.weight", "classifier.6.bias")
    assert {"backbone/conv1_1/kernel", "fc6/kernel", "fc7/bias"} < set(report.loaded)
    first = vgg_entries["classifier.0.weight"]
    for y, row in enumerate(taps):
        for x, column in enumerate(taps):
            for channel in (0, 5, 15):
                # The matrix is over channels, then rows, then columns.
                expected = first[::4, channel * 49 + row * 7 + column]
                np.testing.assert_array_equal(model.fc6.kernel[...][y, x, channel], expected)
    np.testing.assert_array_equal(model.fc6.bias[...], vgg_entries["classifier.0.bias"][::4])
    np.testing.assert_array_equal(model.fc7.kernel[...][0, 0].T, vgg_entries["classifier.3.weight"][::4, ::4])
    np.testing.assert_array_equal(model.fc7.bias[...], vgg_entries["classifier.3.bias"][::4])
    np.testing.assert_array_equal(
        model.backbone.conv5_3.kernel[...], vgg_entries["features.28.weight"].transpose(2, 3, 1, 0)
    )


def test_without_fully_connected_layers_they_stay(vgg_entries):
    model = blank(
        lambda rngs: DeepLab(3, width=2, hidden_channels=6, multi_scale=True, branch_channels=2, rngs=rngs)
    )
    report = weights.load(model, {k: v for k, v in vgg_entries.items() if k.startswith("features")})
    assert {"fc6/kernel", "fc7/bias", "classifier/bias", "branches/pool1/0/kernel"} < set(report.not_set)
    assert report.unused == ()
    assert len(report.loaded) == 26
    assert str(report).startswith("26 arrays loaded\nnot set: ")


def test_what_is_exported_comes_back_bit_for_bit(tmp_path):
    for make in (
        lambda rngs: DeepLab(2, width=2, hidden_channels=6, norm=True, rngs=rngs),
        lambda rngs: VGG16FCN(2, width=2, hidden_channels=6, rngs=rngs),
        lambda rngs: ResNetFCN(2, blocks=(1, 2, 1), width=2, rngs=rngs),
    ):
        model = blank(make)
        again = nnx.clone(model)
        rng = np.random.default_rng(1)
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                variable[...] = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
        weights.write_state_dict(tmp_path / "model.safetensors", weights.export(model))
        report = weights.load(again, tmp_path / "model.safetensors")
        assert report.not_set == tuple(
            p for p in report.not_set if p.split("/")[0] in ("classifier", "skips")
        )
        ours, theirs = (named_leaves(nnx.state(m, nnx.Any(nnx.Param, nnx.BatchStat))) for m in (model, again))
        for path in report.loaded:
            np.testing.assert_array_equal(
                np.asarray(ours[path]).view(np.uint32), np.asarray(theirs[path]).view(np.uint32)
            )
        assert len(report.loaded) + len(report.not_set) == len(ours)


class TwoStreams(nnx.Module):
    """As a Gaussian CRF has them."""

    def __init__(self, rngs):
        self.unary = DeepLabV2(2, blocks=(1, 1, 2, 1), width=2, rngs=rngs)
        self.pairwise = nnx.List([ResNet(blocks=(1, 1, 1), width=2, rngs=rngs)])


@pytest.fixture(scope="module")
def resnet_entries():
    model = blank(lambda rngs: ResNet(blocks=(1, 1, 2, 1), width=2, rngs=rngs))
    return torch_networks.weights(shapes(model, **{"fc.weight": (9, 64)}))


def test_all_backbones_are_set_and_shorter_ones_take_a_part(resnet_entries):
    model = blank(TwoStreams)
    counters = {"bn1.num_batches_tracked": np.array(3)}
    report = weights.load(model, {f"module.{k}": v for k, v in (resnet_entries | counters).items()})
    assert report.unused == ("module.fc.weight",)
    kernel = resnet_entries["layer3.0.conv2.weight"].transpose(2, 3, 1, 0)
    for backbone in (model.unary.backbone, model.pairwise[0]):
        np.testing.assert_array_equal(backbone.layer3[0].conv2.kernel[...], kernel)
        np.testing.assert_array_equal(backbone.norm1.var[...], resnet_entries["bn1.running_var"])
    one = blank(TwoStreams)
    report = weights.load(one, resnet_entries, within="pairwise")
    assert {"layer3.1.conv2.weight", "layer4.0.bn1.weight", "fc.weight"} < set(report.unused)
    assert all(path.startswith("pairwise/0/") for path in report.loaded)
    assert not np.any(one.unary.backbone.conv1.kernel[...])
    exported = weights.export(model, within="unary")
    assert set(exported) == set(resnet_entries) - {"fc.weight"}
    with pytest.raises(
        ValueError, match=r"within: the model has several backbones, at 'pairwise/0', 'unary/backbone'"
    ):
        weights.export(model)
    with pytest.raises(
        ValueError, match=r"within: there is no backbone in 'crf'; the model has ResNet at 'pairwise/0'"
    ):
        weights.load(model, resnet_entries, within="crf")


def test_inside_a_crf(vgg_entries):
    model = blank(
        lambda rngs: Refined(DeepLab(2, width=2, hidden_channels=6, rngs=rngs), nnx.Linear(2, 2, rngs=rngs))
    )
    report = weights.load(model, vgg_entries)
    assert {"unary/backbone/conv1_1/kernel", "unary/fc6/kernel"} < set(report.loaded)
    assert {"crf/kernel", "unary/classifier/kernel"} < set(report.not_set)


# What does not fit.


def test_differences_are_told_and_nothing_is_changed(vgg_entries, resnet_entries):
    model = blank(lambda rngs: VGG16(width=2, rngs=rngs))
    wrong = {k: v for k, v in vgg_entries.items() if k != "features.5.bias"}
    wrong["features.5.biases"] = wrong["features.0.bias"]
    wrong["features.7.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    wrong["features.7.bias"] = np.array([1, np.nan, 0, 0], np.float32)
    wrong["features.10.bias"] = np.zeros(8, np.int64)
    with pytest.raises(
        ValueError, match="weights: does not fit the VGG16 at 'the top'; 5 differences:"
    ) as error:
        weights.load(model, wrong)
    for line in (
        "missing: features.5.bias (the nearest is features.5.biases)",
        "unexpected: features.5.biases",
        "shape of features.7.weight: got (4, 3, 3, 3), expected (4, 4, 3, 3) for conv2_2/kernel",
        "values of features.7.bias: some are not finite",
        "type of features.10.bias: got int64, expected floating-point numbers",
    ):
        assert f"\n  {line}" in str(error.value)
    assert not np.any(model.conv1_1.kernel[...])
    grey = blank(lambda rngs: VGG16(width=2, in_channels=1, rngs=rngs))
    with pytest.raises(ValueError, match=r"features.0.weight: got \(2, 3, 3, 3\), expected \(2, 1, 3, 3\)"):
        weights.load(grey, vgg_entries)
    for norm in (False, True):
        other = blank(lambda rngs, norm=norm: VGG16(width=2, norm=not norm, rngs=rngs))
        own = weights.export(blank(lambda rngs, norm=norm: VGG16(width=2, norm=norm, rngs=rngs)))
        with pytest.raises(ValueError, match=rf"(?s)and \d+ more\nCreate the network with norm={norm}"):
            weights.load(other, own)
    narrow = blank(lambda rngs: DeepLab(3, width=2, hidden_channels=7, rngs=rngs))
    with pytest.raises(
        ValueError, match=r"(?s)classifier.0.weight: got \(24, 784\), expected \(7, 784\).* \(7, 16, 3, 3\)"
    ):
        weights.load(narrow, vgg_entries)


@pytest.mark.parametrize(
    ("blocks", "line"),
    [
        ((1, 1, 1, 1), "unexpected: layer3.1.conv1.weight"),
        ((1, 1, 3, 1), "missing: layer3.2.conv1.weight (the nearest is layer3.1.conv1.weight)"),
    ],
)
def test_another_depth_is_told(resnet_entries, blocks, line):
    model = blank(lambda rngs: ResNet(blocks=blocks, width=2, rngs=rngs))
    with pytest.raises(ValueError, match="Is it of another depth") as error:
        weights.load(model, resnet_entries)
    assert line in str(error.value)


def test_other_networks_are_refused(vgg_entries, resnet_entries):
    vgg = blank(lambda rngs: VGG16(width=2, rngs=rngs))
    with pytest.raises(ValueError, match="model: VGG16 has no ResNet; it has VGG16 at 'the top'"):
        weights.load(vgg, resnet_entries)
    small = blank(lambda rngs: SmallFCN(2, width=4, rngs=rngs))
    with pytest.raises(ValueError, match=r"model: SmallFCN has no VGG16$"):
        weights.load(small, vgg_entries)
    with pytest.raises(ValueError, match="model: SmallFCN has no VGG-16 or ResNet"):
        weights.export(small)
    with pytest.raises(
        ValueError, match=r"weights: holds no VGG-16 and no ResNet.*it has 'blocks\.0\.weight'"
    ):
        weights.load(vgg, {"blocks.0.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"holds several networks, of the prefixes '…', 'b\.…'"):
        weights.load(vgg, vgg_entries | {"b.features.0.bias": np.zeros(3)})


# To begin a run with.


def test_a_run_begins_with_a_file(tmp_path, resnet_entries):
    path = tmp_path / "weights.safetensors"
    weights.write_state_dict(path, resnet_entries)
    begun = experiment(model=lambda rngs: ResNet(blocks=(1,), width=2, rngs=rngs), initial=path).create()
    kernel = resnet_entries["layer1.0.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(begun.layer1[0].conv2.kernel[...], kernel)
    for initial, message in (
        (path, "initial: model: BatchNorm has no ResNet"),
        (tmp_path / "none.pth", r"initial: .*none\.pth: there is no such file"),
        (
            str(tmp_path / "none"),
            "initial: .*none does not exist; expected the folder of a saved model or run",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            experiment(model=lambda rngs: nnx.BatchNorm(2, rngs=rngs), initial=initial).create()


# Files.

STORED = {
    "float": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "part": np.arange(24, dtype=np.float32).reshape(2, 3, 4)[1:, :, ::2],
    "turned": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "half": np.arange(12, dtype=np.float16).reshape(3, 4),
    "bfloat16": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "long": np.arange(12).reshape(3, 4),
    "bool": np.arange(12).reshape(3, 4) > 3,
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.arange(16, 20, dtype=np.float32),
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_files_of_torch_are_read(name):
    same(weights.read_state_dict(FOLDER / name), STORED)


def test_what_torch_writes_now_is_read(networks, tmp_path):
    torch, *_ = networks
    state = {name: torch.tensor(value) for name, value in STORED.items() if name != "bfloat16"}
    state |= {
        "bfloat16": torch.arange(12).reshape(3, 4).bfloat16(),
        "part": torch.tensor(STORED["float"])[1:, :, ::2],
    }
    for number, (new, protocol) in enumerate([(True, 2), (True, 4), (False, 2), (False, 4)]):
        path = tmp_path / f"{number}.pth"
        options = {"_use_new_zipfile_serialization": new, "pickle_protocol": protocol}
        torch.save(
            {"epoch": 3, "optimizer": {"lr": 0.1, "state": [torch.ones(2)]}, "state_dict": state},
            path,
            **options,
        )
        same(weights.read_state_dict(path), STORED)


def test_safetensors_come_back(tmp_path):
    weights.write_state_dict(tmp_path / "a.safetensors", STORED)
    same(weights.read_state_dict(tmp_path / "a.safetensors"), STORED)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match=r"path: got .*a\.npz'; expected a name that ends in \.safetensors"):
        weights.write_state_dict(tmp_path / "a.npz", STORED)
    with pytest.raises(ValueError, match="arrays: 'x' is of type complex128; expected one of F64"):
        weights.write_state_dict(tmp_path / "b.safetensors", {"x": np.ones(2, complex)})


def test_safetensors_are_what_the_package_writes(tmp_path):
    package = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    plain = {name: np.ascontiguousarray(value) for name, value in STORED.items() if name != "bfloat16"}
    plain["scalar"] = STORED["scalar"]
    weights.write_state_dict(tmp_path / "a.safetensors", plain)
    same(package.load_file(tmp_path / "a.safetensors"), plain)
    package.save_file(plain, tmp_path / "b.safetensors")
    same(weights.read_state_dict(tmp_path / "b.safetensors"), plain)


def safetensors(header, data=b"\0" * 8):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# A pickle, instruction by instruction.

FOUR = np.arange(4, dtype="<f4").tobytes()


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def many(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, of):
    return f"c{module}\n{of}\n".encode()


def tensor(offset=0, shape=(2,), strides=(1,), size=4, key="0", kind="FloatStorage", part=()):
    storage = many(string("storage"), name("torch", kind), string(key), string("cpu"), number(size), *part)
    arguments = [storage + b"Q", number(offset), many(*map(number, shape)), many(*map(number, strides))]
    return name("torch._utils", "_rebuild_tensor") + many(*arguments) + b"R"


def state(value):
    return b"\x80\x02}" + string("w") + value + b"s."


def zipped(pickled, data=FOUR, compression=zipfile.ZIP_STORED, **others):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
        for key, value in others.items():
            archive.writestr(f"archive/{key}", value)
    return file.getvalue()


def legacy(pickled, *storages, keys=("0",), little=b"\x88"):
    parts = [b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03."]
    parts += [b"\x80\x02}" + string("little_endian") + little + b"s.", pickled]
    parts += [b"\x80\x02](" + b"".join(map(string, keys)) + b"e."]
    return b"".join(parts) + b"".join(struct.pack("<q", len(s) // 4) + s for s in storages)


def read(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    return weights.read_state_dict(tmp_path / "file.pth")


# As torch 0.1 wrote them: a Parameter made empty, which then gets (tensor, gradient's maker, volatile, trained, hooks).
OLDEST = (
    name("torch.nn.parameter", "Parameter") + b")\x81" + many(tensor(1), b"N", b"\x89", b"\x88", b"N") + b"b"
)
PART = many(string("1"), number(1), number(2))


def test_the_oldest_files_are_read(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, legacy(state(OLDEST), FOUR))["w"], [1, 2])
    np.testing.assert_array_equal(read(tmp_path, zipped(state(tensor(2))))["w"], [2, 3])
    # A storage that is a part of another one: two elements from the first.
    np.testing.assert_array_equal(read(tmp_path, legacy(state(tensor(part=[PART])), FOUR))["w"], [1, 2])
    size = name("torch", "Size") + b"(" + many(number(2)) + b"tR"
    sized = tensor().replace(many(number(2)), size)
    np.testing.assert_array_equal(read(tmp_path, zipped(state(sized)))["w"], [0, 1])


RUN = name("posix", "system") + many(string("touch ran")) + b"R"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (state(RUN), "asks for posix.system, which no state dict needs"),
        (b"\x80\x04" + string("posix") + string("system") + b"\x93.", "asks for posix.system"),
        (state(name("torch._utils", "_rebuild_qtensor")), r"asks for torch\._utils\._rebuild_qtensor"),
        (state(b"(" + string("ls") + b"iposix\nsystem\n"), "has the instruction INST"),
        (state(name("torch", "FloatStorage") + b")R"), r"calls torch\.FloatStorage, which is a type"),
        (state(string("no tensor")), "holds a dict with the keys 'w' but no tensors by name"),
        (b"\x80\x02].", "holds a list but no tensors"),
        (
            state(tensor(offset=3)),
            r"'w': shape \(2,\), strides \(1,\) and offset 3 reach beyond the 4 elements",
        ),
        (state(tensor(shape=(2, 2), strides=(3, 1))), "reach beyond the 4 elements"),
        (state(tensor(shape=(1 << 40,), strides=(0,))), "reach beyond the 4 elements"),
        (state(tensor(offset=-1)), "offset -1 do not go with the shape"),
        (state(tensor(strides=(-1,))), r"strides \(-1,\)"),
        (state(tensor(shape=(-2,))), r"got the shape \(-2,\)"),
        (state(tensor(shape=(2, 2))), "do not go with the shape"),
        (state(tensor(size=5)), "said to have 5 elements from 0; there are 4"),
        (state(tensor(size=-4)), "said to have -4 elements"),
        (
            state(tensor(kind="DoubleStorage")),
            "said to have 4 elements from 0; there are 2|storage '0' of 32 bytes reaches beyond",
        ),
        (state(tensor(key="../1")), "is damaged"),
        (state(tensor(part=[many(string("1"), number(3), number(2))])), "said to have 2 elements from 3"),
        (state(tensor() + b"K\x01b"), "gives attributes to a _Tensor"),
        (b"\x80\x02}" + many(b"K\x01") + b"K\x01s.", "sets entries that are none of a dictionary"),
        (b"\x80\x02K\x01K\x02a.", "appends to what is no list"),
        (state(tensor())[:-1], "is damaged|no tensors"),
        (b"\x80\x02\x87.", "takes more from the stack"),
        (b"\x80\x02t.", "is damaged"),
    ],
)
def test_pickles_that_are_no_state_dicts_are_refused(tmp_path, monkeypatch, pickled, message):
    monkeypatch.chdir(tmp_path)
    for content in (zipped(pickled), legacy(pickled, FOUR)):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path, content)
        assert str(error.value).startswith(f"{tmp_path / 'file.pth'}: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a safetensors file nor one that torch.save wrote; it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "neither .*; it begins with b'version https:"),
        (zipped(state(tensor()), compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed"),
        (zipped(state(tensor()), byteorder=b"big"), "big-endian"),
        (zipped(state(tensor())).replace(b"data.pkl", b"data.pki"), "has no data.pkl"),
        (zipped(state(tensor())).replace(FOUR, FOUR[::-1]), "is damaged .*CRC"),
        (zipped(state(tensor()))[:-30], "is damaged"),
        (legacy(state(tensor()), FOUR, little=b"\x89"), "big-endian"),
        (legacy(state(tensor()), FOUR)[:-1], "storage '0' of 16 bytes reaches beyond the end"),
        (legacy(state(tensor()), FOUR, keys=("1",)), "is damaged"),
        (b"\x80\x02K\x01.", "is a pickle, but not one that torch.save wrote"),
        (
            safetensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
            "'w' of type F32 and shape",
        ),
        (safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), "bytes 4 to 12 of 8"),
        (safetensors({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}), "got the shape"),
        (
            safetensors({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}),
            "is of type F8_E4M3",
        ),
        (safetensors({"w": {"dtype": "F32"}}), "is damaged"),
    ],
)
def test_damaged_and_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth: there is no such file; expected a \.safetensors"):
        weights.load(None, tmp_path / "none.pth")

"""The original's outputs on real crops, its semantics in float64, its scripts, and what it has no errors for."""

import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from filter_suite import dense_matrix
from jaxcrf.compat import pydensecrf
from jaxcrf.compat.pydensecrf import densecrf as dcrf
from jaxcrf.compat.pydensecrf import utils
from jaxcrf.filters import Lattice

pytestmark = pytest.mark.optimized

NORMALIZATIONS = {
    "none": dcrf.NO_NORMALIZATION,
    "before": dcrf.NORMALIZE_BEFORE,
    "after": dcrf.NORMALIZE_AFTER,
    "symmetric": dcrf.NORMALIZE_SYMMETRIC,
}
WIDTH, HEIGHT, LABELS = 6, 5, 3
PIXELS = WIDTH * HEIGHT


@pytest.mark.exhaustive
@pytest.mark.parametrize("image", ["2007_000129", "2007_000847"])
@pytest.mark.parametrize("name", ["after", "before", "matrix", "none", "readme", "vector"])
def test_marginals_and_divergences_are_the_original_s(golden_dir, image, name):
    golden = np.load(golden_dir / f"pydensecrf_{image}_{name}.npz")
    height, width, labels = golden["unary_energy"].shape
    crf = dcrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.moveaxis(golden["unary_energy"], -1, 0).reshape(labels, -1))
    kind = NORMALIZATIONS[str(golden["normalization"])]
    crf.addPairwiseGaussian(golden["gaussian_sxy"], golden["gaussian_compat"], normalization=kind)
    crf.addPairwiseBilateral(
        golden["bilateral_sxy"],
        golden["bilateral_srgb"],
        golden["image"],
        golden["bilateral_compat"],
        normalization=kind,
    )
    iterations = [int(key[2:]) for key in golden if key.startswith("q_")]
    assert iterations
    for count in iterations:
        q = crf.inference(count)
        difference = np.abs(q.T.reshape(height, width, labels) - golden[f"q_{count}"])
        # A pixel whose position in the lattice is a tie up to rounding may take other vertices there.
        assert np.mean(difference <= 1e-3) >= 0.999
        assert crf.klDivergence(q) == pytest.approx(float(golden[f"kl_{count}"]), rel=1e-4)


def example(seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(LABELS), size=PIXELS).T
    return -np.log(probs).astype(np.float32), rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def make(energy, image, first=2.0, second=3.0, normalization=dcrf.NORMALIZE_SYMMETRIC):
    crf = dcrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    crf.setUnaryEnergy(energy)
    crf.addPairwiseGaussian(sxy=(2, 1.5), compat=first, normalization=normalization)
    crf.addPairwiseBilateral((20, 10), (60, 50, 70), image, second, normalization=normalization)
    return crf


def features_of(image):
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    colours = np.moveaxis(image.astype(np.float32), -1, 0) / np.float32([60, 50, 70])[:, None, None]
    smooth = np.stack([x / np.float32(2), y / np.float32(1.5)])
    bilateral = np.stack([x / np.float32(20), y / np.float32(10), *colours])
    return smooth.reshape(2, -1), bilateral.reshape(5, -1)


MATRIX = np.array([[-1.0, 0.5, 2.0], [0.1, -2.0, 0.3], [0.0, 0.7, 0.4]])


def meaning(compat):
    """The matrix by which the original multiplies messages before it subtracts them."""
    if np.ndim(compat) == 0:
        return -compat * np.eye(LABELS)
    return np.diag(compat) if np.ndim(compat) == 1 else (np.asarray(compat) + np.transpose(compat)) / 2


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(2.0, 3.0, marks=pytest.mark.exhaustive),
        (-1.0, 0.0),
        pytest.param(np.array([-1.0, 0.5, -2.0]), 1, marks=pytest.mark.exhaustive),
        pytest.param(0.5, MATRIX, marks=pytest.mark.exhaustive),
        (MATRIX.tolist(), [1, 2, -1]),
    ],
)
def test_updates_and_divergence_are_those_of_a_float64_loop(kind, first, second):
    energy, image = example()
    matrices = [
        dense_matrix(Lattice(f.T, scaling="classic", spatial_ndim=1)).astype(np.float64)
        for f in features_of(image)
    ]
    left = {"none": 0, "before": 0, "after": 1, "symmetric": 0.5}[kind]
    right = {"none": 0, "before": 1, "after": 0, "symmetric": 0.5}[kind]
    sums = [k.sum(axis=1) + 1e-20 for k in matrices]
    matrices = [k * n[:, None] ** -left * n**-right for k, n in zip(matrices, sums, strict=True)]

    def energies(q):
        pairs = zip((first, second), matrices, strict=True)
        return [meaning(compat) @ q @ k.T for compat, k in pairs]

    def softmax(scores):
        e = np.exp(scores - scores.max(axis=0))
        return e / e.sum(axis=0)

    crf = make(energy, image, first, second, NORMALIZATIONS[kind])
    q = softmax(-energy.astype(np.float64))
    for count in range(3):
        np.testing.assert_allclose(crf.inference(count), q, atol=2e-5)
        divergence = np.sum(q * np.log(q)) + np.sum(energy * q) + sum(np.sum(q * e) for e in energies(q))
        # Float32 sums of about a hundred terms a pixel.
        assert crf.klDivergence(q) == pytest.approx(divergence, rel=1e-5, abs=1e-4)
        q = softmax(-energy - sum(energies(q)))


def test_steps_write_into_the_buffers():
    energy, image = example()
    crf = make(energy, image, MATRIX, 3.0)
    Q, tmp1, tmp2 = crf.startInference()
    for buffer in (Q, tmp1, tmp2):
        assert buffer.shape == (LABELS, PIXELS)
        assert buffer.dtype == np.float32
    np.testing.assert_array_equal(Q, crf.inference(0))
    view = Q[:]
    for count in range(1, 4):
        before = Q.copy()
        assert crf.stepInference(Q, tmp1, tmp2) is None
        np.testing.assert_allclose(Q, crf.inference(count), atol=1e-6)
        np.testing.assert_array_equal(view, Q)
        e = np.exp(tmp1 - tmp1.max(axis=0))
        np.testing.assert_allclose(Q, e / e.sum(axis=0), atol=1e-6)
        last = dcrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)  # the last kernel alone, through its divergence
        last.addPairwiseBilateral((20, 10), (60, 50, 70), image, 3.0)
        entropy = np.sum(before * np.log(np.maximum(before, 1e-20)), dtype=np.float64)
        assert np.sum(before * tmp2) == pytest.approx(last.klDivergence(before) - entropy, rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_floating_point_array_is_a_buffer(dtype, order):
    crf = make(*example())
    Q, tmp1, tmp2 = (np.asarray(x, dtype, order=order) for x in crf.startInference())
    crf.stepInference(Q, tmp1, tmp2)
    np.testing.assert_allclose(Q, crf.inference(1), atol=1e-6)


def test_without_kernels_the_unary_decides():
    crf = dcrf.DenseCRF(4, 2)
    crf.setUnaryEnergy(-np.log([[0.9, 0.2, 0.3, 0.5], [0.1, 0.8, 0.7, 0.5]]))
    np.testing.assert_allclose(crf.inference(5), [[0.9, 0.2, 0.3, 0.5], [0.1, 0.8, 0.7, 0.5]], atol=1e-6)
    Q, tmp1, tmp2 = crf.startInference()
    tmp2[...] = 7
    crf.stepInference(Q, tmp1, tmp2)
    assert (tmp2 == 7).all()


def test_results_are_the_caller_s_own():
    crf = make(*example())
    q = crf.inference(2)
    expected = q.copy()
    q *= 0
    np.testing.assert_array_equal(crf.inference(2), expected)
    assert np.array(q).shape == (LABELS, PIXELS)
    assert np.argmax(expected, axis=0).shape == (PIXELS,)
    np.testing.assert_allclose(expected.sum(axis=0), 1, atol=1e-6)


def test_energies_are_copied():
    energy, image = example()
    mine = energy.copy()
    crf = make(mine, image)
    expected = crf.inference(1)
    mine[...] = 0
    np.testing.assert_array_equal(crf.inference(1), expected)
    np.testing.assert_array_equal(make(energy, image).inference(1), expected)


def test_iterations_and_images_do_not_recompile():
    energy, image = example()
    make(energy, image).inference(2)
    compiled = dcrf._infer._cache_size()
    make(energy, image, 5, -1).inference(7)
    assert dcrf._infer._cache_size() == compiled


def test_features_of_a_dense_crf_are_those_of_the_image():
    energy, image = example()
    crf = dcrf.DenseCRF(PIXELS, LABELS)
    crf.setUnaryEnergy(energy)
    for features, compat in zip(features_of(image), (2.0, 3.0), strict=True):
        crf.addPairwiseEnergy(features, compat, kernel=dcrf.FULL_KERNEL)
    np.testing.assert_array_equal(crf.inference(5), make(energy, image).inference(5))


def test_made_features_are_those_of_the_image_with_y_first():
    energy, image = example()
    smooth = utils.create_pairwise_gaussian((1.5, 2), (HEIGHT, WIDTH))
    bilateral = utils.create_pairwise_bilateral((10, 20), (60, 50, 70), image, chdim=2)
    for made, expected in zip((smooth, bilateral), features_of(image), strict=True):
        np.testing.assert_array_equal(made[[1, 0, *range(2, len(made))]], expected)
    crf = dcrf.DenseCRF(PIXELS, LABELS)
    crf.setUnaryEnergy(energy)
    crf.addPairwiseEnergy(smooth, 2)
    crf.addPairwiseEnergy(bilateral, 3)
    # The lattice approximates both orders about equally well, but not equally.
    assert np.abs(crf.inference(5) - make(energy, image).inference(5)).mean() < 0.02


def test_unaries_are_constant_or_logistic_and_may_be_shared():
    energy, _ = example()
    rng = np.random.default_rng(1)
    weights, features = rng.normal(size=(LABELS, 4)), rng.normal(size=(4, PIXELS))
    crf = dcrf.DenseCRF(PIXELS, LABELS)
    constant = dcrf.ConstUnary(energy)
    for unary, expected in [(constant, energy), (dcrf.LogisticUnary(weights, features), weights @ features)]:
        assert isinstance(unary, dcrf.Unary)
        crf.setUnary(unary)
        e = np.exp(-expected)
        np.testing.assert_allclose(crf.inference(0), e / e.sum(axis=0), rtol=1e-5)
    logistic = crf.inference(0)
    crf.setUnary(constant)
    crf.setUnaryEnergy(weights, features)
    np.testing.assert_array_equal(crf.inference(0), logistic)


def test_infinite_energies_forbid_labels():
    energy, image = example()
    energy[1, 4:9] = np.inf
    crf = make(energy, image)
    q = crf.inference(5)
    assert (q[1, 4:9] == 0).all()
    assert np.isfinite(q).all()
    assert np.isfinite(crf.klDivergence(q))


def every_other(x):
    wide = np.repeat(x, 2, axis=-1)
    return wide[..., ::2]


@pytest.mark.parametrize(
    "convert",
    [np.asfortranarray, np.float64, np.ndarray.tolist, every_other, jnp.asarray],
    ids=["fortran", "float64", "lists", "strided", "jax"],
)
def test_arrays_of_any_kind_are_taken(convert):
    energy, image = example()
    expected = make(energy, image).inference(3)
    np.testing.assert_allclose(make(convert(energy), convert(image)).inference(3), expected, atol=1e-6)
    crf = dcrf.DenseCRF(PIXELS, LABELS)
    crf.setUnaryEnergy(convert(energy))
    smooth, bilateral = features_of(image)
    crf.addPairwiseEnergy(convert(smooth), convert(np.array([-2.0, -2.0, -2.0])))
    crf.addPairwiseEnergy(convert(bilateral), convert(-3 * np.eye(LABELS)))
    np.testing.assert_allclose(crf.inference(3), expected, atol=1e-6)
    assert crf.klDivergence(convert(expected)) == pytest.approx(crf.klDivergence(expected))


@pytest.mark.exhaustive
def test_whole_numbers_of_any_kind_are_taken():
    crf = dcrf.DenseCRF2D(np.int64(WIDTH), np.int32(HEIGHT), np.uint8(LABELS))
    crf.setUnaryEnergy(np.arange(LABELS * PIXELS).reshape(LABELS, -1) % 5)
    crf.addPairwiseGaussian(np.float32(3), np.int16(2), kernel=0, normalization=3)
    crf.addPairwiseEnergy(np.arange(PIXELS)[None], np.float64(1))
    assert np.isfinite(crf.inference(np.int64(2))).all()


@pytest.mark.exhaustive
def test_one_pixel_one_label_and_an_image_of_one_colour():
    crf = dcrf.DenseCRF2D(1, 1, 1)
    crf.setUnaryEnergy([[3.0]])
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(80, 13, np.full((1, 1, 3), 9, np.uint8), 10)
    np.testing.assert_allclose(crf.inference(5), [[1.0]])
    energy, image = example()
    assert np.isfinite(make(energy, np.full_like(image, 200)).inference(5)).all()


def test_enumerations_are_numbered_as_in_the_original():
    assert [k.name for k in sorted(dcrf.KernelType)] == ["CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL"]
    assert [dcrf.CONST_KERNEL, dcrf.DIAG_KERNEL, dcrf.FULL_KERNEL] == [0, 1, 2]
    assert list(NORMALIZATIONS.values()) == [0, 1, 2, 3]
    assert dcrf.NormalizationType.NORMALIZE_SYMMETRIC is dcrf.NORMALIZE_SYMMETRIC


def crf2d():
    return make(*example())


def buffers():
    return [x.copy() for x in crf2d().startInference()]


ENERGY, IMAGE = example()
UNFIT = np.where(np.arange(PIXELS) == 3, np.nan, ENERGY)
READ_ONLY = np.full((LABELS, PIXELS), 1 / LABELS)
READ_ONLY.flags.writeable = False

BAD_CALLS = {
    "nvar": (lambda: dcrf.DenseCRF(0, 2), ValueError, "nvar: got 0; expected a whole number >= 1"),
    "nvar type": (lambda: dcrf.DenseCRF(4.0, 2), TypeError, "nvar: got 4.0; expected a whole number"),
    "nlabels": (lambda: dcrf.DenseCRF(4, -1), ValueError, "nlabels: got -1"),
    "w": (lambda: dcrf.DenseCRF2D(0, 5, 2), ValueError, "w: got 0"),
    "h": (lambda: dcrf.DenseCRF2D(5, True, 2), TypeError, "h: got True"),
    "unary shape": (
        lambda: crf2d().setUnaryEnergy(ENERGY.T),
        ValueError,
        r"u: got energies of shape \(30, 3\); expected \(3, 30\), \(labels, pixels\). Pixel \(x, y\) is column",
    ),
    "unary image": (
        lambda: crf2d().setUnaryEnergy(ENERGY.reshape(3, 5, 6)),
        ValueError,
        r"u: got shape \(3, 5, 6\); expected energies \(labels, pixels\).* reshape maps",
    ),
    "unary nan": (lambda: crf2d().setUnaryEnergy(UNFIT), ValueError, "u: holds NaN or -inf"),
    "unary -inf": (
        lambda: crf2d().setUnaryEnergy(np.log(ENERGY * 0 + [0.0] * 30)),
        ValueError,
        "u: holds NaN",
    ),
    "unary inf": (
        lambda: crf2d().setUnaryEnergy(np.where(np.arange(PIXELS) == 3, np.inf, ENERGY)),
        ValueError,
        "u: is inf for all labels of pixel 3; clip probabilities",
    ),
    "unary type": (
        lambda: crf2d().setUnaryEnergy(ENERGY * 1j),
        TypeError,
        "u: got complex64; expected energies",
    ),
    "unary text": (lambda: crf2d().setUnaryEnergy("energy"), TypeError, "u: got str; expected energies"),
    "unary ragged": (lambda: crf2d().setUnaryEnergy([[1], [1, 2]]), TypeError, "rows of different lengths"),
    "unary object": (lambda: crf2d().setUnary(ENERGY), TypeError, "u: got ndarray; expected a ConstUnary or"),
    "unary base": (lambda: crf2d().setUnary(dcrf.Unary()), TypeError, "u: got Unary; expected a ConstUnary"),
    "unary none": (lambda: crf2d().setUnary(None), TypeError, "u: got NoneType"),
    "unary size": (lambda: crf2d().setUnary(dcrf.ConstUnary([[1.0]])), ValueError, r"of shape \(1, 1\)"),
    "logistic shapes": (
        lambda: dcrf.LogisticUnary(np.ones((3, 4)), np.ones((5, 30))),
        ValueError,
        r"L, f: got shapes \(3, 4\) and \(5, 30\); expected \(labels, features\) and",
    ),
    "logistic L": (lambda: dcrf.LogisticUnary([[np.nan]], [[1]]), ValueError, "L: holds NaN, infinite"),
    "logistic f": (lambda: dcrf.LogisticUnary([[1]], [[np.inf]]), ValueError, "f: holds NaN, infinite"),
    "features shape": (
        lambda: crf2d().addPairwiseEnergy(np.ones((2, 29)), 3),
        ValueError,
        r"features: got shape \(2, 29\); expected \(d, 30\), one column per pixel",
    ),
    "features image": (
        lambda: crf2d().addPairwiseEnergy(IMAGE, 3),
        ValueError,
        r"features: got shape \(5, 6, 3\)",
    ),
    "features none": (
        lambda: crf2d().addPairwiseEnergy(np.ones((0, 30)), 3),
        ValueError,
        r"got shape \(0, 30\)",
    ),
    "features nan": (lambda: crf2d().addPairwiseEnergy(UNFIT, 3), ValueError, "features: holds NaN"),
    "features large": (
        lambda: crf2d().addPairwiseEnergy([[1e39] * 30], 3),
        ValueError,
        "such as float32 has not",
    ),
    "features span": (
        lambda: crf2d().addPairwiseEnergy([np.arange(30) * 1e4], 3),
        ValueError,
        "features: the features span 2.9e.05 bandwidths; the lattice has room for 32768",
    ),
    "features cells": (
        lambda: crf2d().addPairwiseEnergy(np.random.default_rng(0).uniform(0, 5000, (8, 30)), 3),
        ValueError,
        "features: they span more lattice cells",
    ),
    "compat length": (
        lambda: crf2d().addPairwiseGaussian(3, [1, 2]),
        ValueError,
        r"compat: got shape \(2,\); expected a number w for -w I, \(3,\) for a diagonal or \(3, 3\)",
    ),
    "compat dimensions": (
        lambda: crf2d().addPairwiseGaussian(3, np.ones((3, 3, 1))),
        ValueError,
        r"compat: got shape \(3, 3, 1\)",
    ),
    "compat nan": (lambda: crf2d().addPairwiseGaussian(3, np.nan), ValueError, "compat: holds NaN"),
    "compat type": (
        lambda: crf2d().addPairwiseGaussian(3, "potts"),
        TypeError,
        "compat: got str; expected a number",
    ),
    "kernel": (
        lambda: crf2d().addPairwiseGaussian(3, 3, kernel=5),
        ValueError,
        "kernel: got 5; expected one of CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL",
    ),
    "normalization": (
        lambda: crf2d().addPairwiseGaussian(3, 3, normalization="symmetric"),
        ValueError,
        "normalization: got 'symmetric'; expected one of NO_NORMALIZATION, NORMALIZE_BEFORE",
    ),
    "sxy zero": (
        lambda: crf2d().addPairwiseGaussian(0, 3),
        ValueError,
        "sxy: got 0; a bandwidth must be greater than 0",
    ),
    "sxy negative": (lambda: crf2d().addPairwiseGaussian((3, -1), 3), ValueError, r"sxy: got \(3, -1\)"),
    "sxy nan": (lambda: crf2d().addPairwiseGaussian(np.nan, 3), ValueError, "sxy: got nan"),
    "sxy tiny": (
        lambda: crf2d().addPairwiseGaussian(1e-6, 3),
        ValueError,
        r"sxy: the features span 5e.06 bandwidths; the lattice has room for 21845. Use greater bandwidths",
    ),
    "sxy vanishing": (
        lambda: crf2d().addPairwiseGaussian(1e-50, 3),
        ValueError,
        "sxy: the features span inf",
    ),
    "sxy count": (lambda: crf2d().addPairwiseGaussian((3, 3, 3), 3), ValueError, "sxy: got 3 bandwidths"),
    "sxy shape": (lambda: crf2d().addPairwiseGaussian([[3, 3]], 3), ValueError, r"sxy: got shape \(1, 2\)"),
    "sxy type": (
        lambda: crf2d().addPairwiseGaussian("3", 3),
        TypeError,
        "sxy: got str; expected one number or 2",
    ),
    "srgb": (lambda: crf2d().addPairwiseBilateral(80, (13, 0, 13), IMAGE, 3), ValueError, "srgb: got"),
    "srgb tiny": (
        lambda: crf2d().addPairwiseBilateral(80, 1e-6, IMAGE, 3),
        ValueError,
        "sxy, srgb: the features",
    ),
    "srgb cells": (
        lambda: crf2d().addPairwiseBilateral(1e-3, 0.03, IMAGE, 3),
        ValueError,
        "sxy, srgb: they span more lattice cells",
    ),
    "image size": (
        lambda: crf2d().addPairwiseBilateral(80, 13, IMAGE.transpose(1, 0, 2), 3),
        ValueError,
        r"rgbim: got shape \(6, 5, 3\); expected \(5, 6, 3\), \(height, width, 3\)",
    ),
    "image grey": (
        lambda: crf2d().addPairwiseBilateral(80, 13, IMAGE[..., :1], 3),
        ValueError,
        r"rgbim: got shape \(5, 6, 1\).*utils.create_pairwise_bilateral",
    ),
    "image nan": (
        lambda: crf2d().addPairwiseBilateral(80, 13, IMAGE * np.nan, 3),
        ValueError,
        "rgbim: holds NaN",
    ),
    "image none": (lambda: crf2d().addPairwiseBilateral(80, 13, None, 3), TypeError, "rgbim: got NoneType"),
    "iterations": (lambda: crf2d().inference(-1), ValueError, "niter: got -1; expected a whole number >= 0"),
    "iterations type": (lambda: crf2d().inference(2.5), TypeError, "niter: got 2.5"),
    "no unary": (
        lambda: dcrf.DenseCRF(4, 2).inference(5),
        ValueError,
        "inference: there are no unary energies yet; call setUnaryEnergy first",
    ),
    "no unary start": (
        lambda: dcrf.DenseCRF(4, 2).startInference(),
        ValueError,
        "startInference: there are no",
    ),
    "no unary step": (
        lambda: dcrf.DenseCRF(4, 2).stepInference(*buffers()),
        ValueError,
        "stepInference: there",
    ),
    "buffer type": (
        lambda: crf2d().stepInference(READ_ONLY.tolist(), *buffers()[1:]),
        TypeError,
        "Q: got list; expected a NumPy array of floating point",
    ),
    "buffer jax": (lambda: crf2d().stepInference(jnp.ones((3, 30)), *buffers()[1:]), TypeError, "Q: got "),
    "buffer integers": (
        lambda: crf2d().stepInference(*buffers()[:2], np.zeros((3, 30), int)),
        TypeError,
        "tmp2: got int64; expected",
    ),
    "buffer shape": (
        lambda: crf2d().stepInference(buffers()[0], np.zeros((3, 29)), buffers()[2]),
        ValueError,
        r"tmp1: got shape \(3, 29\); expected \(3, 30\), \(labels, pixels\), as startInference",
    ),
    "buffer locked": (
        lambda: crf2d().stepInference(READ_ONLY, *buffers()[1:]),
        ValueError,
        "Q: is read-only",
    ),
    "buffer nan": (lambda: crf2d().stepInference(UNFIT.copy(), *buffers()[1:]), ValueError, "Q: holds NaN"),
    "divergence shape": (lambda: crf2d().klDivergence(READ_ONLY.T), ValueError, r"Q: got shape \(30, 3\)"),
    "divergence nan": (lambda: crf2d().klDivergence(UNFIT), ValueError, "Q: holds NaN"),
    "labels range": (
        lambda: utils.unary_from_labels([0, 4], 3, 0.7),
        ValueError,
        "labels: holds 4; expected 1 to 3, or 0 for unsure, for n_labels=3 and zero_unsure=True",
    ),
    "labels sure": (
        lambda: utils.unary_from_labels([0, 3], 3, 0.7, zero_unsure=False),
        ValueError,
        "labels: holds 3; expected 0 to 2, for n_labels=3",
    ),
    "labels negative": (lambda: utils.unary_from_labels([-1], 3, 0.7, False), ValueError, "labels: holds -1"),
    "labels type": (
        lambda: utils.unary_from_labels([0.5], 3, 0.7),
        TypeError,
        "labels: got float64 that are not",
    ),
    "n_labels": (lambda: utils.unary_from_labels([0], 0, 0.7), ValueError, "n_labels: got 0"),
    "gt_prob 0": (
        lambda: utils.unary_from_labels([0], 2, 0),
        ValueError,
        "gt_prob: got 0; expected a probability",
    ),
    "gt_prob 1": (lambda: utils.unary_from_labels([0], 2, 1.0), ValueError, "gt_prob: got 1.0"),
    "gt_prob nan": (lambda: utils.unary_from_labels([0], 2, np.nan), ValueError, "gt_prob: got nan"),
    "softmax scores": (
        lambda: utils.unary_from_softmax([[3.0], [-1.0]]),
        ValueError,
        "sm: holds values from -1 to 3; expected probabilities. Apply a softmax",
    ),
    "softmax nan": (lambda: utils.unary_from_softmax([[np.nan]]), ValueError, "sm: holds NaN"),
    "softmax empty": (lambda: utils.unary_from_softmax(0.5), ValueError, r"sm: got shape \(\)"),
    "softmax type": (lambda: utils.unary_from_softmax("p"), TypeError, "sm: got str; expected probabilities"),
    "scale 0": (
        lambda: utils.unary_from_softmax([[1.0]], scale=0),
        ValueError,
        "scale: got 0; expected more",
    ),
    "scale 2": (lambda: utils.unary_from_softmax([[1.0]], scale=2), ValueError, "scale: got 2"),
    "clip": (lambda: utils.unary_from_softmax([[1.0]], clip=0), ValueError, "clip: got 0; expected"),
    "sdims": (
        lambda: utils.create_pairwise_gaussian(0, (4, 5)),
        ValueError,
        "sdims: got 0; a bandwidth must",
    ),
    "sdims count": (
        lambda: utils.create_pairwise_gaussian((3,), (4, 5)),
        ValueError,
        "sdims: got 1 bandwidths",
    ),
    "sdims tiny": (
        lambda: utils.create_pairwise_gaussian(1e-39, (4, 5)),
        ValueError,
        "sdims: features by such",
    ),
    "shape": (
        lambda: utils.create_pairwise_gaussian(3, (4, 0)),
        ValueError,
        "shape: got 0; expected a whole",
    ),
    "shape type": (lambda: utils.create_pairwise_gaussian(3, (4, 2.5)), TypeError, "shape: got 2.5"),
    "shape none": (lambda: utils.create_pairwise_gaussian(3, ()), ValueError, r"shape: got \(\)"),
    "schan count": (
        lambda: utils.create_pairwise_bilateral(3, (13, 13), IMAGE, 2),
        ValueError,
        "schan: got 2 bandwidths; expected one number, or one for each of 3 axes",
    ),
    "schan": (lambda: utils.create_pairwise_bilateral(3, -13, IMAGE, 2), ValueError, "schan: got -13"),
    "schan tiny": (
        lambda: utils.create_pairwise_bilateral(3, 1e-39, IMAGE, 2),
        ValueError,
        "schan: features by",
    ),
    "chdim": (
        lambda: utils.create_pairwise_bilateral(3, 13, IMAGE, 3),
        ValueError,
        "chdim: got 3 for an image of",
    ),
    "img": (lambda: utils.create_pairwise_bilateral(3, 13, IMAGE * np.nan, 2), ValueError, "img: holds NaN"),
    "img none": (
        lambda: utils.create_pairwise_bilateral(3, 13, [], -1),
        ValueError,
        r"img: got shape \(0,\)",
    ),
    "img type": (lambda: utils.create_pairwise_bilateral(3, 13, "img", 2), TypeError, "img: got str"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # a test's own logarithm of 0
def test_what_makes_no_sense_is_refused(call):
    run, kind, message = BAD_CALLS[call]
    with pytest.raises(kind, match=message):
        run()


def test_a_refused_kernel_is_not_added():
    crf = crf2d()
    expected = crf.inference(2)
    with pytest.raises(ValueError, match="compat"):
        crf.addPairwiseGaussian(3, [1, 2])
    np.testing.assert_array_equal(crf.inference(2), expected)


@pytest.mark.parametrize("zero_unsure", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_energies_of_labels_are_logarithms(zero_unsure, dtype):
    labels = np.array([[0, 2, 1], [3, 0, 2]], dtype)
    n, p = (3, 0.6) if zero_unsure else (4, 0.6)
    found = utils.unary_from_labels(labels, n, gt_prob=p, zero_unsure=zero_unsure)
    assert found.shape == (n, 6)
    assert found.dtype == np.float32
    for pixel, label in enumerate(labels.reshape(-1).astype(int)):
        if zero_unsure and label == 0:
            expected = np.full(n, 1 / n)
        else:
            expected = np.full(n, (1 - p) / (n - 1))
            expected[label - zero_unsure] = p
        np.testing.assert_allclose(np.exp(-found[:, pixel]), expected, rtol=1e-6)


def test_a_single_label_is_possible():
    np.testing.assert_allclose(utils.unary_from_labels([1, 0], 1, 0.5), [[np.log(2), 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_energies_of_probabilities_are_clipped_and_scaled(dtype):
    probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5)).transpose(2, 0, 1).astype(dtype)
    probs[:, 0, 0] = [1, 0, 0]
    flat = probs.reshape(3, -1).astype(np.float64)
    found = utils.unary_from_softmax(probs)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, -np.log(np.clip(flat, 1e-5, 1)), rtol=1e-5, atol=1e-6)
    found = utils.unary_from_softmax(probs, clip=0.2)
    np.testing.assert_allclose(found, -np.log(np.clip(flat, 0.2, 1)), rtol=1e-5, atol=1e-6)
    found = utils.unary_from_softmax(probs, scale=0.7, clip=None)
    np.testing.assert_allclose(found, -np.log(0.7 * flat + 0.3 / 3), rtol=1e-5, atol=1e-6)
    assert (utils.unary_from_softmax(probs, clip=None)[1:, 0] == np.inf).all()


def test_old_names_warn_and_work():
    labels = np.array([[0, 1], [2, 1]])
    with pytest.warns(DeprecationWarning, match="use unary_from_labels"):
        found = utils.compute_unary(labels, 2)
    np.testing.assert_array_equal(found, utils.unary_from_labels(labels, 2, 0.5))
    probs = np.array([[0.25, 0.5], [0.75, 0.5]])
    with pytest.warns(DeprecationWarning, match="use unary_from_softmax"):
        found = utils.softmax_to_unary(probs)
    np.testing.assert_array_equal(found, utils.unary_from_softmax(probs, clip=None))
    with pytest.warns(DeprecationWarning, match="use unary_from_softmax"):
        found = utils.softmax_to_unary(probs, 0.9)
    np.testing.assert_array_equal(found, utils.unary_from_softmax(probs, 0.9, clip=None))


def test_position_features_follow_the_axes():
    found = utils.create_pairwise_gaussian((2, 4, 5), (2, 3, 4))
    assert found.shape == (3, 24)
    assert found.dtype == np.float32
    for index, (z, y, x) in enumerate(np.ndindex(2, 3, 4)):
        np.testing.assert_allclose(found[:, index], [z / 2, y / 4, x / 5])


@pytest.mark.parametrize("axis", [0, 1, 2, -3])
def test_bilateral_features_take_channels_from_any_axis(axis):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 2)).astype(np.uint8)
    found = utils.create_pairwise_bilateral((3, 7), (10, 20), np.moveaxis(image, 2, axis), chdim=axis)
    assert found.shape == (4, 20)
    for index, (y, x) in enumerate(np.ndindex(4, 5)):
        expected = [y / 3, x / 7, image[y, x, 0] / 10, image[y, x, 1] / 20]
        np.testing.assert_allclose(found[:, index], expected, rtol=1e-6)


def test_bilateral_features_without_channels_have_one():
    image = np.arange(12.0).reshape(3, 4)
    found = utils.create_pairwise_bilateral(2, 4, image)
    np.testing.assert_allclose(found[2], np.arange(12) / 4)
    np.testing.assert_array_equal(found, utils.create_pairwise_bilateral(2, 4, image[..., None], chdim=2))


# The shape of the original's example: a photograph and a scribble in colours go in, a colour map comes out.
SCRIPT = """
import sys

import numpy as np
import PIL.Image

import pydensecrf.densecrf as dcrf
from pydensecrf.utils import unary_from_labels, create_pairwise_bilateral, create_pairwise_gaussian

photograph, scribble, result = sys.argv[1:]
image = np.asarray(PIL.Image.open(photograph))
marks = np.asarray(PIL.Image.open(scribble)).astype(np.uint32)
codes = marks[:, :, 0] + (marks[:, :, 1] << 8) + (marks[:, :, 2] << 16)
colours, labels = np.unique(codes, return_inverse=True)
unknown = 0 in colours
if unknown:
    colours = colours[1:]
palette = np.stack([colours & 255, (colours >> 8) & 255, colours >> 16], axis=-1).astype(np.uint8)
count = len(set(labels.flat)) - int(unknown)
unary = unary_from_labels(labels, count, gt_prob=0.7, zero_unsure=unknown)

for use_2d in (True, False):
    if use_2d:
        crf = dcrf.DenseCRF2D(image.shape[1], image.shape[0], count)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy=(3, 3), compat=3, kernel=dcrf.DIAG_KERNEL,
                                normalization=dcrf.NORMALIZE_SYMMETRIC)
        crf.addPairwiseBilateral(sxy=(80, 80), srgb=(13, 13, 13), rgbim=image, compat=10,
                                 kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
    else:
        crf = dcrf.DenseCRF(image.shape[1] * image.shape[0], count)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseEnergy(create_pairwise_gaussian(sdims=(3, 3), shape=image.shape[:2]), compat=3,
                              kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC)
        features = create_pairwise_bilateral(sdims=(80, 80), schan=(13, 13, 13), img=image, chdim=2)
        crf.addPairwiseEnergy(features, compat=10, kernel=dcrf.DIAG_KERNEL,
                              normalization=dcrf.NORMALIZE_SYMMETRIC)
    Q = crf.inference(5)
    best = palette[np.argmax(Q, axis=0), :]
    PIL.Image.fromarray(best.reshape(image.shape)).save(result)

    Q, tmp1, tmp2 = crf.startInference()
    for i in range(5):
        print("KL-divergence at {}: {}".format(i, crf.klDivergence(Q)))
        crf.stepInference(Q, tmp1, tmp2)
    assert np.array_equal(palette[np.argmax(np.array(Q), axis=0)], best)
"""

ALIASES = """
import sys
import jaxcrf.compat.pydensecrf as pydensecrf

sys.modules["pydensecrf"] = pydensecrf
sys.modules["pydensecrf.densecrf"] = pydensecrf.densecrf
sys.modules["pydensecrf.utils"] = pydensecrf.utils
"""


@pytest.fixture
def pictures(tmp_path):
    """A disc before a background, marked with one stroke each and wrongly in a few places."""
    y, x = np.mgrid[:24, :30]
    disc = (y - 12) ** 2 + (x - 15) ** 2 < 60
    rng = np.random.default_rng(0)
    image = np.where(disc[..., None], (200, 60, 40), (40, 90, 170)) + rng.normal(0, 4, (24, 30, 3))
    marks = np.where(disc[..., None], (255, 0, 0), (0, 128, 255))
    marks[rng.uniform(size=disc.shape) < 0.7] = 0
    marks[5, 5], marks[12, 15] = (255, 0, 0), (0, 128, 255)
    PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "image.png")
    PIL.Image.fromarray(marks.astype(np.uint8)).save(tmp_path / "marks.png")
    expected = np.where(disc[..., None], (255, 0, 0), (0, 128, 255))
    return [str(tmp_path / name) for name in ("image.png", "marks.png", "result.png")], expected


def check_result(path, expected, printed):
    assert np.mean((np.asarray(PIL.Image.open(path)) == expected).all(-1)) > 0.99
    divergences = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("KL")]
    assert len(divergences) == 10
    for run in (divergences[:5], divergences[5:]):
        assert np.all(np.diff(run) < 1e-3 * abs(run[0]))


@pytest.mark.exhaustive
def test_the_example_runs_with_other_imports(pictures, tmp_path, monkeypatch, capsys):
    arguments, expected = pictures
    script = tmp_path / "example.py"
    script.write_text(SCRIPT.replace("pydensecrf", "jaxcrf.compat.pydensecrf"))
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    check_result(arguments[2], expected, capsys.readouterr().out)


@pytest.mark.exhaustive
def test_the_example_runs_unchanged_under_the_old_name(pictures, tmp_path):
    arguments, expected = pictures
    script = tmp_path / "aliased.py"
    script.write_text(ALIASES + SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_result(arguments[2], expected, done.stdout)


def test_the_documented_aliases_are_those_tested():
    documented = [line.strip() for line in pydensecrf.__doc__.splitlines()]
    for line in ALIASES.strip().splitlines():
        assert line in documented

"""Augmentation against float64 loops over pixels and closed forms."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from jaxcrf.data import Augmentation, augmentation
from jaxcrf.data.augmentation import Outside, affine_matrix, color_matrix, place, recolor, truncated_normal

STILL = augmentation.get("none")


class Chosen:
    """A generator whose uniform numbers are given: flip, six magnitudes, and the place of the crop."""

    def __init__(self, flip=1.0, angle=0.5, scale=0.5, colors=(0.5, 0.5, 0.5, 0.5), place=(0.5, 0.5)):
        self.numbers = [flip, angle, scale, *colors, *place]

    def random(self, count=None):
        taken, self.numbers = self.numbers[: count or 1], self.numbers[count or 1 :]
        return np.array(taken) if count else taken[0]


def example(height=14, width=19, num_labels=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
    return image, rng.integers(num_labels, size=(height, width)).astype(np.int32)


def places(shape, size, *, angle, scale, flipped, origin):
    """Where every pixel of the result comes from, in a loop: x and y, float64."""
    center_x, center_y = shape[1] / 2, shape[0] / 2
    found = np.empty((*size, 2))
    for row in range(size[0]):
        for column in range(size[1]):
            x = column + 0.5 + origin[1] - scale * center_x
            y = row + 0.5 + origin[0] - scale * center_y
            turned = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
            found[row, column] = (
                center_x + turned[0] / scale * (-1 if flipped else 1),
                center_y + turned[1] / scale,
            )
    return found


def placed(uniform, room):
    """One of the whole numbers from zero to `room`, which may be negative, all as probable."""
    return int(uniform * (room + 1)) if room >= 0 else -int(uniform * (1 - room))


def interpolated(image, x, y):
    """Bilinear, edges repeated; None outside."""
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        return None
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    value = np.zeros(3)
    for i, wy in ((top, 1 - (y - 0.5 - top)), (top + 1, y - 0.5 - top)):
        for j, wx in ((left, 1 - (x - 0.5 - left)), (left + 1, x - 0.5 - left)):
            value += wy * wx * image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
    return value


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("size", "corner"), [((14, 19), 0.1), ((9, 30), 0.0), ((30, 8), 0.999)])
def test_one_affine_map_of_image_and_labels(flipped, size, corner):
    image, labels = example()
    angle, scale = math.radians(24), 1.5
    turning = dataclasses.replace(STILL, flip=0.5, rotation=60.0, scale=(1 / 2.5, 2.5))
    # The draws are given by the values of the distribution function that belong to them.
    cdf = np.vectorize(lambda t: (math.erf(t / math.sqrt(2)) / math.erf(math.sqrt(2)) + 1) / 2)
    steps = cdf([2 * 24 / 60, 2 * math.log(1.5) / math.log(2.5)])
    draws = Chosen(0.2 if flipped else 0.7, *steps, place=(corner, corner))
    result, marks = turning(image, labels, draws, size=size)
    origin = [placed(corner, round(scale * n) - m) for n, m in zip(labels.shape, size, strict=True)]
    where = places(labels.shape, size, angle=angle, scale=scale, flipped=flipped, origin=origin)
    outside = inside = 0
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = where[row, column]
            # Which of two pixels is the nearest halfway between them is left to rounding.
            if min(abs(x - round(x)), abs(y - round(y))) < 1e-3:
                continue
            value = interpolated(image, x, y)
            if value is None:
                outside += 1
                assert marks[row, column] == 255
                assert tuple(result[row, column]) == turning.fill
            else:
                inside += 1
                assert marks[row, column] == labels[math.floor(y), math.floor(x)]
                # To 8 bits, by rounding down.
                np.testing.assert_allclose(result[row, column], value, atol=1.001)
    assert inside > 100
    assert outside > 5


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_slope_stays_where_it_belongs_at_every_scale(scale, flipped):
    """Linear interpolation and the filter of shrinking reproduce linear functions away from edges."""
    height, width = 60, 80
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([2 * columns + rows, 240 - 2 * columns, 3 * rows], -1).astype(np.uint8)
    labels = np.zeros((height, width), np.int32)
    turning = dataclasses.replace(STILL, flip=float(flipped), rotation=20.0, scale=(scale, scale))
    draws = Chosen(0.5, angle=1.0)
    result, marks = turning(image, labels, draws, size=(40, 40))
    origin = [placed(0.5, round(scale * n) - 40) for n in (height, width)]
    where = places(
        (height, width), (40, 40), angle=math.radians(20), scale=scale, flipped=flipped, origin=origin
    )
    x, y = where[..., 0] - 0.5, where[..., 1] - 0.5
    margin = 3 / min(scale, 1)
    clear = (x > margin) & (x < width - margin) & (y > margin) & (y < height - margin)
    assert clear.sum() > 150
    assert (marks[clear] == 0).all()
    truth = np.stack([2 * x + y, 240 - 2 * x, 3 * y], -1)
    # Shrinking rounds to 8 bits once along each axis, by up to a half; interpolation then rounds down.
    np.testing.assert_allclose(result[clear], truth[clear], atol=2.001)
    assert abs((result[clear] - truth[clear]).mean()) < 0.7


def test_shrinking_does_not_alias():
    """A checkerboard, finer than the result can show, becomes gray; every other pixel would be anything."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, -1)
    halving = dataclasses.replace(STILL, scale=(0.5, 0.5), rotation=10.0)
    result, marks = halving(image, board.astype(np.int32), Chosen(angle=0.9), size=(32, 32))
    seen = result[marks != 255][:, 0].astype(float)
    assert seen.size > 300
    assert abs(seen.mean() - 127.5) < 2
    assert seen.std() < 12  # of 127.5 in the image


def test_flips_are_exact():
    image, labels = example()
    flipping = dataclasses.replace(STILL, flip=1.0)
    once = flipping(image, labels, np.random.default_rng(0))
    np.testing.assert_array_equal(once[0], image[:, ::-1])
    np.testing.assert_array_equal(once[1], labels[:, ::-1])
    twice = flipping(*once, np.random.default_rng(1))
    for found, truth in zip(twice, (image, labels), strict=True):
        np.testing.assert_array_equal(found, truth)


def test_nothing_to_do_is_exact():
    image, labels = example()
    for found, truth in zip(STILL(image, labels, np.random.default_rng(0)), (image, labels), strict=True):
        np.testing.assert_array_equal(found, truth)
        assert found.dtype == truth.dtype


def test_flip_happens_as_often_as_asked():
    image, labels = example(2, 3)
    rng = np.random.default_rng(0)
    flipping = dataclasses.replace(STILL, flip=0.3)
    count = sum((flipping(image, labels, rng)[1] == labels[:, ::-1]).all() for _ in range(400))
    assert abs(count - 120) < 4 * math.sqrt(400 * 0.3 * 0.7)


def test_rotation_brings_in_ignore_at_the_corners():
    image = np.full((40, 60, 3), 50, np.uint8)
    labels = np.full((40, 60), 2, np.int32)
    turning = dataclasses.replace(STILL, rotation=10.0)
    result, marks = turning(image, labels, Chosen(angle=1.0))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert marks[corner] == 255
        assert tuple(result[corner]) == turning.fill
    assert marks[20, 30] == 2
    assert tuple(result[20, 30]) == (50, 50, 50)
    # Twice the four triangles that a turn of 10° cuts off would be too much, half of them too little.
    assert 0.03 < (marks == 255).mean() < 0.12
    mirrored, again = dataclasses.replace(turning, padding="reflect")(image, labels, Chosen(angle=1.0))
    np.testing.assert_array_equal(again, marks)
    assert (mirrored == 50).all()


def test_other_ignore_labels():
    image, labels = example()
    turning = dataclasses.replace(STILL, rotation=30.0)
    for void in (-1, 1000):
        _, marks = turning(image, labels, Chosen(angle=1.0), ignore_label=void)
        assert set(np.unique(marks)) == {0, 1, 2, 3, void}
        _, marks = STILL(image, labels, Chosen(), size=(20, 20), ignore_label=void)
        assert set(np.unique(marks)) == {0, 1, 2, 3, void}


@pytest.mark.parametrize("name", augmentation.names())
def test_results_of_every_preset(name):
    """Labels never grow beyond what there was and ignore, images stay 8-bit, sizes are as asked."""
    image, labels = example(30, 40)
    labels[:3] = 255
    rng = np.random.default_rng(0)
    preset = augmentation.get(name)
    for size in (None, (20, 50), (50, 20), (64, 64), (1, 1)):
        for _ in range(8):
            result, marks = preset(image, labels, rng, size=size)
            assert result.dtype == np.uint8
            assert marks.dtype == np.int32
            assert result.shape == (*marks.shape, 3) == (*(size or (30, 40)), 3)
            assert set(np.unique(marks)) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_image_and_labels_stay_together(padding):
    rows, columns = np.mgrid[:48, :64]
    labels = ((rows > 12) & (columns > 40)).astype(np.int32) + 2 * (rows + columns > 70)
    colors = np.array([[20, 60, 200], [220, 90, 30], [60, 200, 60], [120, 120, 120]], np.uint8)
    moving = Augmentation(brightness=0, contrast=0, saturation=0, hue=0, padding=padding)
    rng = np.random.default_rng(3)
    compared = 0
    for _ in range(12):
        result, marks = moving(colors[labels], labels, rng, size=(40, 50))
        windows = np.lib.stride_tricks.sliding_window_view(marks, (7, 7))
        uniform = (windows == windows[..., :1, :1]).all((-2, -1)) & (windows[..., 0, 0] != 255)
        center = result[3:-3, 3:-3][uniform].astype(int)
        compared += len(center)
        np.testing.assert_allclose(center, colors[marks[3:-3, 3:-3][uniform]], atol=2)
    assert compared > 3000


def test_parts_draw_the_same_whatever_the_others_are():
    image, labels = example(30, 40)
    whole = Augmentation()
    for change in (
        {"hue": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0},
        {"padding": "reflect"},
    ):
        some = dataclasses.replace(whole, **change)
        for seed in range(5):
            _, first = whole(image, labels, np.random.default_rng(seed))
            _, second = some(image, labels, np.random.default_rng(seed))
            np.testing.assert_array_equal(first, second)


def test_the_generator_decides():
    image, labels = example(30, 40)
    first, second, third = (
        Augmentation()(image, labels, np.random.default_rng(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != third).any()


def test_draws_are_truncated_normal():
    draws = truncated_normal(np.random.default_rng(0), 40_000)
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    variance = 1 - 4 * density / inside  # of the standard normal distribution within ±2
    assert np.abs(draws).max() <= 2
    assert abs(draws.mean()) < 4 * math.sqrt(variance / draws.size)
    assert abs(draws.std() - math.sqrt(variance)) < 0.01
    # Kolmogorov's statistic, whose 0.1 % point is 1.95 / sqrt(n).
    ordered = np.sort(draws)
    cdf = (np.vectorize(math.erf)(ordered / math.sqrt(2)) / inside + 1) / 2
    assert np.abs(cdf - (np.arange(draws.size) + 0.5) / draws.size).max() < 1.95 / math.sqrt(draws.size)


def test_magnitudes_have_the_spread_that_is_said():
    """Angle and scale are read off the map of a slope, over many draws."""
    rows, columns = np.mgrid[:64, :64]
    image = np.stack([columns * 4, rows * 4, 0 * rows], -1).astype(np.uint8)
    moving = dataclasses.replace(STILL, rotation=10.0, scale=(0.5, 2.0))
    rng = np.random.default_rng(0)
    angles, scales = [], []
    for _ in range(600):
        result, _ = moving(image, np.zeros((64, 64), np.int32), rng, size=(21, 21))
        if (result[:, :, 2] != 0).any():  # where padding shows
            continue
        middle = result.astype(float)[2:-2, 2:-2] / 4
        along = [(middle[:, -1, k] - middle[:, 0, k]).mean() / 16 for k in (0, 1)]
        scales.append(-math.log2(math.hypot(*along)))
        angles.append(math.degrees(math.atan2(along[1], along[0])))
    assert len(angles) > 300
    spread = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))) / 2
    assert max(map(abs, angles)) < 10.5
    assert abs(np.mean(angles)) < 4 * 10 * spread / math.sqrt(len(angles))
    assert abs(np.std(angles) - 10 * spread) < 0.4
    assert max(map(abs, scales)) < 1.05
    assert abs(np.std(scales) - spread) < 0.06


@pytest.mark.parametrize("smaller", [True, False])
def test_places_are_uniform(smaller):
    """Of a crop inside the image, and of the image inside a larger canvas."""
    image, labels = example(5, 4)
    image[..., 0] = np.arange(20).reshape(5, 4)
    counts = np.zeros((3, 3))
    rng = np.random.default_rng(0)
    for _ in range(900):
        result, marks = STILL(image, labels, rng, size=(3, 2) if smaller else (7, 6))
        row, column = divmod(int(result[0, 0, 0]), 4) if smaller else np.argwhere(marks != 255)[0]
        counts[row, column] += 1
        assert (marks != 255).sum() == (6 if smaller else 20)
    # The chi-squared statistic of eight degrees of freedom, and its 0.1 % point.
    assert ((counts - 100) ** 2 / 100).sum() < 26.1


@pytest.mark.parametrize("origin", [(0, 0), (-3, 2), (4, -9), (-20, 3), (30, 30), (2, 1)])
@pytest.mark.parametrize("size", [(5, 7), (12, 30)])
def test_windows_are_copied(origin, size):
    image, labels = example(9, 11)
    for padding in ("constant", "reflect"):
        result, marks = place(image, labels, size, origin, Outside(padding, (1, 2, 3), 77))
        for row in range(size[0]):
            for column in range(size[1]):
                y, x = row + origin[0], column + origin[1]
                inside = 0 <= y < 9 and 0 <= x < 11
                assert marks[row, column] == (labels[y, x] if inside else 77)
                if padding == "reflect":
                    y, x = (abs((i + n - 1) % (2 * n - 2) - (n - 1)) for i, n in ((y, 9), (x, 11)))
                elif not inside:
                    assert tuple(result[row, column]) == (1, 2, 3)
                    continue
                np.testing.assert_array_equal(result[row, column], image[y, x])


def test_a_single_pixel_is_reflected_too():
    image, labels = np.full((1, 1, 3), 9, np.uint8), np.zeros((1, 1), np.int32)
    for preset in (augmentation.get("hrenet"), Augmentation(padding="reflect", hue=0, brightness=0)):
        result, marks = preset(image, labels, np.random.default_rng(0), size=(4, 3))
        assert (result == 9).all()
        assert (marks == 255).sum() >= 8


def test_colors_are_one_matrix():
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(8, 9, 3), dtype=np.uint8)
    matrix = color_matrix(12.0, 0.7, 1.3, math.radians(25))
    result = np.asarray(recolor(Image.fromarray(image), matrix))
    mean = (image.reshape(-1, 3).mean(0) * [0.299, 0.587, 0.114]).sum()
    for row in range(8):
        for column in range(9):
            # The standard library has NTSC's axes with two digits only, and so slightly others.
            y, i, q = colorsys.rgb_to_yiq(*(image[row, column] / 255.0))
            turned = 1.3 * complex(i, q) * complex(math.cos(math.radians(25)), math.sin(math.radians(25)))
            y = (0.7 * (255 * y - mean) + mean + 12) / 255
            # (It also clips to 0 … 1.)
            expected = 255 * np.array(colorsys.yiq_to_rgb(y, 0.7 * turned.real, 0.7 * turned.imag))
            np.testing.assert_allclose(result[row, column], expected.clip(0, 255), atol=4)


def test_colors_in_special_cases():
    gray = np.full((4, 4, 3), 90, np.uint8)
    colored = np.random.default_rng(0).integers(256, size=(4, 4, 3), dtype=np.uint8)

    def apply(image, *arguments):
        return np.asarray(recolor(Image.fromarray(image), color_matrix(*arguments)))

    np.testing.assert_array_equal(apply(colored, 0.0, 1.0, 1.0, 0.0), colored)
    np.testing.assert_array_equal(apply(gray, 0.0, 1.0, 1.8, 1.0), gray)
    np.testing.assert_array_equal(apply(gray, 0.0, 0.3, 1.0, 0.0), gray)  # the mean stays
    np.testing.assert_array_equal(apply(gray, 7.0, 1.0, 1.0, 0.0), gray + 7)
    luma = colored @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(apply(colored, 0.0, 1.0, 0.0, 0.0), np.stack([luma] * 3, -1), atol=0.51)
    flat = apply(colored, 0.0, 0.0, 1.0, 0.0)
    assert (flat == flat[0, 0, 0]).all()
    assert abs(flat[0, 0, 0] - luma.mean()) <= 1


def test_affine_matrix_is_the_formula():
    matrix = affine_matrix((14, 19), angle=0.3, scale=0.8, flipped=True, origin=(-2, 5))
    where = places((14, 19), (4, 5), angle=0.3, scale=0.8, flipped=True, origin=(-2, 5))
    rows, columns = np.mgrid[:4, :5] + 0.5
    found = np.stack([columns, rows, np.ones_like(rows)], -1) @ matrix.T
    np.testing.assert_allclose(found, where, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("flip", "often"),
        ("rotation", -1),
        ("rotation", 181),
        ("scale", (2.0, 0.5)),
        ("scale", (0.0, 1.0)),
        ("scale", 2.0),
        ("scale", (1.0, float("nan"))),
        ("brightness", 256),
        ("contrast", 1.1),
        ("saturation", float("nan")),
        ("hue", -0.1),
        ("padding", "mirror"),
        ("fill", (1, 2)),
        ("fill", (1, 2, 256)),
        ("fill", 7),
    ],
)
def test_fields_out_of_range_are_errors(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        Augmentation(**{field: value})


def test_examples_that_do_not_fit_are_errors():
    image, labels = example()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"image: got shape \(14, 19, 3\) of float32; expected .*uint8"):
        STILL(image.astype(np.float32), labels, rng)
    with pytest.raises(ValueError, match=r"image: got list"):
        STILL(image.tolist(), labels, rng)
    with pytest.raises(
        ValueError, match=r"labels: got shape \(14, 18\) of int32 for an image of shape \(14, 19, 3\)"
    ):
        STILL(image, labels[:, :-1], rng)
    with pytest.raises(ValueError, match=r"labels: got .*float64"):
        STILL(image, labels.astype(float), rng)
    for size in (5, (5, 0), (5.0, 5)):
        with pytest.raises(ValueError, match=r"size: got .*expected height and width"):
            STILL(image, labels, rng, size=size)
    with pytest.raises(ValueError, match="no pixels"):
        STILL(image[:0], labels[:0], rng)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"augmentation: got 'convcfr'; expected .*did you mean 'convcrf'"):
        augmentation.get("convcfr")

"""Augmentation: pictures and label maps that are flipped, turned, scaled, cropped and recoloured together.

Everything geometric is one affine map, by which image and labels are resampled once; everything that happens to
colours is linear in them, and so one matrix. Both run in Pillow on the host, where decoding happens anyway, in
threads that do not wait for each other: 6 ms of a core for an image of 360 × 480 pixels, besides 3 for decoding.

As one jitted program of the same quality, they take 6 (jax 0.12) to 9 ms (jax 0.10) of a core where the device is a
CPU (`experiments/benchmarks/pipeline.py`), which gains nothing. An accelerator would take them off the host; but images
of all sizes would have to be padded before they are cropped, and a step's batch would not be the same everywhere to
the last bit. More threads or workers relieve a busy host as well.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float64, Int, Int32, UInt8
from PIL import Image

from jaxcrf._checks import is_whole

Padding = Literal["constant", "reflect"]
Size = tuple[int, int]

# Where a truncated normal draw ends, in standard deviations: further ones are drawn again, as TensorFlow has it.
TRUNCATION = 2.0

# The mean colour of ImageNet's photographs. Networks subtract it, so that it becomes the zero that their own
# convolutions pad with.
MEAN_COLOR = (124, 116, 104)

# Luma and the two chroma axes of the NTSC standard.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)


@dataclasses.dataclass(frozen=True)
class Outside:
    """What shows where an image does not reach.

    Attributes:
        padding: "constant" (`fill`), or "reflect" (the image mirrored at its edges).
        fill: the colour of constant padding.
        ignore_label: the label, with either padding.
    """

    padding: Padding = "constant"
    fill: tuple[int, int, int] = MEAN_COLOR
    ignore_label: int = 255


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes that leave the labels true: flip, rotation, scale, crop and colours.

    A pixel of the result at `p` (x, y; centres at halves) shows the image at

        c + F R(φ) (p + o - s c) / s ,

    where `c` is the image's centre, `F` mirrors x or not, `φ` is the angle, `s` the scale, and `o` the place of the
    result's window in the scaled image: whole pixels, uniformly random, with the window inside the scaled image
    where it is the smaller of the two and around it where it is the larger. Images are interpolated bilinearly
    and, to shrink them, first resized by a filter as wide as the step between samples, without which details would
    alias; labels are those of the nearest pixel, and `ignore_label` outside the image. Colours become

        contrast (R x - m) + m + brightness ,

    where `R` turns hue and stretches saturation in the YIQ colour space, which keeps luma and grays, and `m` is the
    image's mean luma.

    Every magnitude is `t / 2` of the way to its bound, with `t` from the standard normal distribution truncated at
    ±2: standard deviation 0.44 of the bound. A scale is such a step between the bounds' logarithms. All draws come
    from one generator in a fixed order, and the same ones for each part whatever the others are set to.

    Attributes:
        flip: the probability of a mirror image.
        rotation: largest angle, in degrees.
        scale: smallest and largest factor.
        brightness: largest offset, in image units (0 to 255).
        contrast: largest relative change of the distance from the mean luma, 0 to 1.
        saturation: largest relative change of the distance from gray, 0 to 1.
        hue: largest angle in the plane of chroma, in degrees.
        padding: what shows outside the image: "constant" (`fill`), or "reflect" (the image mirrored at its edges).
        fill: the colour of constant padding; as a rule the mean colour of ImageNet, which networks subtract.

    Raises:
        ValueError: if a field is out of its range.

    Example:
        >>> import numpy as np
        >>> image, labels = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.int32)
        >>> augmentation = Augmentation(rotation=45.0, scale=(1.0, 1.0))
        >>> image, labels = augmentation(image, labels, np.random.default_rng(0), size=(12, 12))
        >>> image.shape, np.unique(labels)
        ((12, 12, 3), array([  0, 255], dtype=int32))

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, section 5: flip, ±10°, 0.5 to 2
        and the truncated normal draws; the bounds for colours are not in the paper and are ours.
    """

    flip: float = 0.5
    rotation: float = 10.0
    scale: tuple[float, float] = (0.5, 2.0)
    brightness: float = 30.0
    contrast: float = 0.25
    saturation: float = 0.5
    hue: float = 18.0
    padding: Padding = "constant"
    fill: tuple[int, int, int] = MEAN_COLOR

    def __post_init__(self) -> None:
        """Checks the fields, and makes them plain numbers, so that they hash and compare."""
        largest = {
            "flip": (1.0, "a probability, 0 to 1"),
            "rotation": (180.0, "an angle, 0 to 180 degrees"),
            "brightness": (255.0, "an offset in image units, 0 to 255"),
            "contrast": (1.0, "a relative change, 0 to 1"),
            "saturation": (1.0, "a relative change, 0 to 1"),
            "hue": (180.0, "an angle, 0 to 180 degrees"),
        }
        for name, (bound, expected) in largest.items():
            number = _number(getattr(self, name))
            if not 0 <= number <= bound:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")
            object.__setattr__(self, name, number)
        scales = tuple(map(_number, self.scale)) if isinstance(self.scale, Sequence) else ()
        if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
            raise ValueError(
                f"scale: got {self.scale!r}; expected the smallest and the largest factor, such as (0.5, 2.0), "
                "or (1.0, 1.0) for none"
            )
        object.__setattr__(self, "scale", scales)
        check_padding(self.padding)
        object.__setattr__(self, "fill", checked_fill(self.fill))

    def __call__(
        self,
        image: UInt8[np.ndarray, "height width 3"],
        labels: Int[np.ndarray, "height width"],
        rng: np.random.Generator,
        *,
        size: Size | None = None,
        ignore_label: int = 255,
    ) -> tuple[UInt8[np.ndarray, "rows columns 3"], Int32[np.ndarray, "rows columns"]]:
        """One random variation of an example.

        Args:
            image: RGB, uint8 `[H, W, 3]`.
            labels: its label map, integers `[H, W]`.
            rng: where the draws come from; the same state gives the same result.
            size: height and width of the result; None keeps those of the image.
            ignore_label: the label of what lies outside the image.

        Returns:
            The image, uint8 `[*size, 3]`, and the labels, int32 `[*size]`.

        Raises:
            ValueError: if the image or the labels have another shape or type, or they do not fit together.
        """
        check_example(image, labels)
        shape = labels.shape if size is None else checked_size(size)
        flipped = rng.random() < self.flip
        angle, step, brightness, contrast, saturation, hue = truncated_normal(rng, 6) / TRUNCATION
        low, high = map(math.log, self.scale)
        scale = math.exp((low + high) / 2 + step * (high - low) / 2)
        room = [round(scale * n) - m for n, m in zip(labels.shape, shape, strict=True)]
        origin = tuple(
            int(math.copysign(math.floor(u * (abs(r) + 1)), r))
            for u, r in zip(rng.random(2), room, strict=True)
        )
        colors = color_matrix(
            self.brightness * brightness,
            1 + self.contrast * contrast,
            1 + self.saturation * saturation,
            math.radians(self.hue * hue),
        )
        jittered = any((self.brightness, self.contrast, self.saturation, self.hue))
        angle = math.radians(self.rotation * angle)
        outside = Outside(self.padding, self.fill, ignore_label)
        if angle or scale != 1:
            picture = Image.fromarray(np.ascontiguousarray(image))
            matrix = affine_matrix(labels.shape, angle, scale, flipped, origin)
            return resample(picture, labels, shape, matrix, colors if jittered else None, outside)
        if jittered:
            image = np.asarray(recolor(Image.fromarray(np.ascontiguousarray(image)), colors))
        if flipped:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return place(image, labels, shape, origin, outside)


def truncated_normal(rng: np.random.Generator, count: int) -> Float64[np.ndarray, " count"]:
    """Standard normal draws, truncated at two standard deviations.

    By the inverse of the distribution function, which takes one uniform number a draw; drawing again would
    take a varying count, and shift all that is drawn later.

    Args:
        rng: where the uniform numbers come from.
        count: how many draws.

    Returns:
        The draws, within ±2.

    Example:
        >>> draws = truncated_normal(np.random.default_rng(0), 2000)
        >>> bool(abs(draws).max() <= 2), round(draws.std(), 1)
        (True, np.float64(0.9))
    """
    normal = NormalDist()
    tail = normal.cdf(-TRUNCATION)
    return np.array([normal.inv_cdf(tail + u * (1 - 2 * tail)) for u in rng.random(count)])


def affine_matrix(
    shape: Size, angle: float, scale: float, flipped: bool, origin: tuple[int, ...]
) -> Float64[np.ndarray, "2 3"]:
    """The map from pixels of the result to places in the image, as in `Augmentation`.

    Args:
        shape: height and width of the image.
        angle: in radians; positive ones turn the image's content counter-clockwise.
        scale: how much larger the content becomes.
        flipped: whether x is mirrored.
        origin: row and column of the window in the scaled image.

    Returns:
        `[A | b]` with `A p + b` for `p = (x, y)`.

    Example:
        >>> affine_matrix((4, 6), angle=0.0, scale=2.0, flipped=True, origin=(0, 2)).tolist()
        [[-0.5, 0.0, 5.0], [0.0, 0.5, 0.0]]
    """
    center = np.array([shape[1], shape[0]]) / 2
    linear = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / scale
    if flipped:
        linear[0] *= -1
    return np.column_stack([linear, center + linear @ (np.array(origin[::-1]) - scale * center)]) + 0.0


def color_matrix(
    brightness: float, contrast: float, saturation: float, hue: float
) -> Float64[np.ndarray, "3 5"]:
    """What happens to colours, as in `Augmentation`: `M (r, g, b, m, 1)`, where `m` is the image's mean luma.

    Args:
        brightness: offset in image units.
        contrast: factor on the distance from the mean luma.
        saturation: factor on chroma.
        hue: angle by which chroma is turned, in radians.

    Returns:
        The matrix.

    Example:
        >>> np.array([100, 50, 0, 60, 1]) @ color_matrix(3.0, 0.5, 1.0, 0.0).T
        array([83., 58., 33.])
    """
    turn = saturation * np.array([[math.cos(hue), -math.sin(hue)], [math.sin(hue), math.cos(hue)]])
    chroma = np.eye(3)
    chroma[1:, 1:] = turn
    rest = np.tile([1 - contrast, brightness], (3, 1))
    return np.hstack([contrast * _RGB @ chroma @ _YIQ, rest]) + 0.0


def recolor(picture: Image.Image, matrix: Float64[np.ndarray, "3 5"]) -> Image.Image:
    """Applies a `color_matrix` to an RGB picture, rounded and clipped to 8 bits."""
    # Averaging in Pillow takes a tenth of what it takes NumPy.
    mean = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    constant = matrix[:, 3] * (_YIQ[0] @ np.array(mean)) + matrix[:, 4]
    return picture.convert("RGB", tuple(np.column_stack([matrix[:, :3], constant]).ravel().tolist()))


def place(
    image: np.ndarray,
    labels: np.ndarray,
    size: Size,
    origin: tuple[int, ...],
    outside: Outside,
) -> tuple[np.ndarray, np.ndarray]:
    """Copies a window, which may lie partly or wholly outside the image.

    Args:
        image: uint8 `[H, W, 3]`.
        labels: integers `[H, W]`.
        size: height and width of the window.
        origin: its first row and column in the image.
        outside: what shows outside the image.

    Returns:
        The image, uint8 `[*size, 3]`, and the labels, int32 `[*size]`.
    """
    if origin == (0, 0) and labels.shape == tuple(size):
        return np.ascontiguousarray(image), np.ascontiguousarray(labels, np.int32)
    starts = [max(0, o) for o in origin]
    stops = [max(i, min(n, o + m)) for i, n, o, m in zip(starts, labels.shape, origin, size, strict=True)]
    inside = tuple(slice(i, j) for i, j in zip(starts, stops, strict=True))
    there = tuple(slice(i - o, j - o) for i, j, o in zip(starts, stops, origin, strict=True))
    if outside.padding == "reflect":
        placed = _reflected(image, origin, [o + m for o, m in zip(origin, size, strict=True)])
    else:
        placed = np.empty((*size, 3), np.uint8)
        placed[...] = outside.fill
        placed[there] = image[inside]
    marked = np.full(size, outside.ignore_label, np.int32)
    marked[there] = labels[inside]
    return placed, marked


def check_example(image: Any, labels: Any) -> None:
    """Raises unless an image and a label map are what this package's sources give, and of one size."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: got {_described(image)}; expected a NumPy array, uint8 [height, width, 3]")
    if (
        not isinstance(labels, np.ndarray)
        or not np.issubdtype(labels.dtype, np.integer)
        or labels.shape != image.shape[:2]
    ):
        raise ValueError(
            f"labels: got {_described(labels)} for an image of shape {image.shape}; expected a NumPy array of "
            f"integers {list(image.shape[:2])}"
        )
    if not labels.size:
        raise ValueError(f"image: got shape {image.shape}, which has no pixels; leave the example out")


def check_padding(padding: Any) -> None:
    """Raises unless there is such a padding."""
    if padding not in get_args(Padding):
        raise ValueError(f"padding: got {padding!r}; expected one of {', '.join(get_args(Padding))}")


def checked_size(size: Any) -> Size:
    """Two whole numbers of at least 1."""
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(is_whole(n) and n >= 1 for n in size):
        raise ValueError(f"size: got {size!r}; expected height and width in pixels, or None")
    return int(size[0]), int(size[1])


def checked_fill(fill: Any) -> tuple[int, int, int]:
    """Three whole numbers of 8 bits."""
    if (
        not isinstance(fill, Sequence)
        or len(fill) != 3
        or not all(is_whole(v) and 0 <= v <= 255 for v in fill)
    ):
        raise ValueError(f"fill: got {fill!r}; expected a colour of three whole numbers, 0 to 255")
    return int(fill[0]), int(fill[1]), int(fill[2])


def resample(
    picture: Image.Image,
    labels: np.ndarray,
    size: Size,
    matrix: np.ndarray,
    colors: np.ndarray | None,
    outside: Outside,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples an image and its labels at the places of an affine map.

    Args:
        picture: the image, RGB.
        labels: its labels, `[H, W]`.
        size: height and width of the result.
        matrix: the `affine_matrix`.
        colors: the `color_matrix`; None leaves colours as they are.
        outside: what shows outside the image.

    Returns:
        The image, uint8 `[*size, 3]`, and the labels, int32 `[*size]`.
    """
    # Pillow's int32, whose one band holds any label.
    marks = Image.fromarray(np.ascontiguousarray(labels, np.int32))
    data = tuple(matrix.ravel().tolist())
    marks = marks.transform(size[::-1], Image.Transform.AFFINE, data, fillcolor=outside.ignore_label)
    zoom = math.hypot(matrix[0, 0], matrix[1, 0])
    if zoom > 1:
        width, height = picture.size
        smaller = max(1, round(width / zoom)), max(1, round(height / zoom))
        picture = picture.resize(smaller, Image.Resampling.BILINEAR)
        matrix = matrix * [[smaller[0] / width], [smaller[1] / height]]
    if colors is not None:
        picture = recolor(picture, colors)
    if outside.padding == "reflect":
        corners = matrix @ [[0, 0, size[1], size[1]], [0, size[0], 0, size[0]], [1, 1, 1, 1]]
        # One pixel more, which the outermost interpolation reaches.
        low = np.floor(corners.min(1)).astype(int) - 1
        high = np.ceil(corners.max(1)).astype(int) + 1
        picture = Image.fromarray(_reflected(np.asarray(picture), low[::-1].tolist(), high[::-1].tolist()))
        matrix = matrix - np.column_stack([np.zeros((2, 2)), low])
    picture = picture.transform(
        size[::-1],
        Image.Transform.AFFINE,
        tuple(matrix.ravel().tolist()),
        Image.Resampling.BILINEAR,
        fillcolor=outside.fill,
    )
    return np.array(picture), np.array(marks)


def _reflected(image: np.ndarray, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """Rows and columns from `start` to `stop`, before zero and after the last as in a mirror."""
    pads = [(max(0, -i), max(0, j - n)) for i, j, n in zip(start, stop, image.shape[:2], strict=True)]
    image = np.pad(image, [*pads, (0, 0)], mode="reflect")
    rows, columns = (slice(i + p, j + p) for i, j, (p, _) in zip(start, stop, pads, strict=True))
    return np.ascontiguousarray(image[rows, columns])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} of {value.dtype}"
    return type(value).__name__


_AUGMENTATIONS = {
    "none": Augmentation(0.0, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0),
    "convcrf": Augmentation(),
    "deeplab": Augmentation(0.5, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0),
    "hrenet": Augmentation(0.5, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, padding="reflect"),
}


def names() -> tuple[str, ...]:
    """The names of the papers' augmentations.

    Example:
        >>> names()
        ('none', 'convcrf', 'deeplab', 'hrenet')
    """
    return tuple(_AUGMENTATIONS)


def get(name: str) -> Augmentation:
    """The augmentation of that name.

    - `none`: only the place of the crop is random.
    - `convcrf`: flip, rotation, scale and colours, the defaults of `Augmentation`.
    - `deeplab`: flip and crop, constant padding.
    - `hrenet`: flip and crop, images smaller than the crop reflected at their edges.

    Args:
        name: one of `names()`.

    Returns:
        The augmentation; vary it with `dataclasses.replace`.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> get("hrenet").flip, get("hrenet").padding
        (0.5, 'reflect')

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, section 5. Chen et al.,
        *Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs*, 2015, section 5. Yan et
        al., *Combining the Best of Convolutional Layers and Recurrent Layers*, 2016, section 4.
    """
    if name not in _AUGMENTATIONS:
        near = difflib.get_close_matches(str(name), _AUGMENTATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"augmentation: got {name!r}; expected one of {', '.join(_AUGMENTATIONS)}{hint}")
    return _AUGMENTATIONS[name]

"""Reading and writing images, label maps and arrays.

Files come from anywhere. Whatever is wrong with one is a `ValueError` that names the file, what is wrong
with it and what to do. Writing goes to a temporary name in the same folder first, so that a file under its
own name is always whole.
"""

import contextlib
import dataclasses
import io
import os
import secrets
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jax import Array
from jaxtyping import Int, Int32, Num, UInt8
from PIL import Image, ImageOps

# Modes that Pillow gives to 16-bit grayscale files; which one depends on its version and the byte order.
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# Pillow stretches grayscale of fewer than 8 bits to 0 … 255, by these factors.
_STRETCHED = {"L;2": 85, "L;4": 17}

# The limit on the number of pixels is a global of Pillow's, which a caller's own limit replaces briefly.
_pillow_limit = threading.Lock()


@dataclasses.dataclass(frozen=True, repr=False)
class EncodedFile:
    """The contents of a file that lie in memory, to be read as the file itself would be.

    Attributes:
        name: what stands for the path in messages.
        contents: the file's bytes.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> write_labels(path, np.array([[0, 1, 255]]))
        >>> read_labels(EncodedFile("record 0", path.read_bytes()))
        array([[  0,   1, 255]], dtype=int32)
    """

    name: str
    contents: bytes

    def __str__(self) -> str:
        return self.name


def read_image(
    path: str | os.PathLike | EncodedFile, *, max_pixels: int | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image as RGB.

    Every file that Pillow opens is accepted. Grayscale is repeated over the three channels, palettes are
    looked up, transparency is dropped (the colours underneath stay), 16-bit grayscale is scaled to 8 bits,
    an EXIF orientation is applied, and of several frames the first is taken. Floating-point images are
    refused, because their range is anybody's guess.

    Args:
        path: the file, or its contents in memory.
        max_pixels: the largest size accepted; None means Pillow's limit against decompression bombs, about
            89 million.

    Returns:
        The image, uint8 `[H, W, 3]`.

    Raises:
        ValueError: if the file is missing, empty, truncated, too large or not an image that is accepted.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gray.png"
        >>> write_image(path, np.full((4, 6), 7, np.uint8))
        >>> read_image(path)[0, 0], read_image(path).shape
        (array([7, 7, 7], dtype=uint8), (4, 6, 3))
    """
    with _opened(path, max_pixels) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode in _SIXTEEN_BIT:
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(
                    f"{path}: holds 32-bit values from {values.min()} to {values.max()}, which have no "
                    "agreed scale; convert it to 8 or 16 bits"
                )
            gray = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257, rounded to nearest
            return np.repeat(gray[..., None], 3, -1)
        if image.mode == "F":
            raise ValueError(
                f"{path}: holds floating-point values, which have no agreed scale; convert it to 8 bits"
            )
        if image.mode == "P":
            # Pillow warns when the transparency of a palette is dropped in one step.
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def read_labels(
    path: str | os.PathLike | EncodedFile, *, max_pixels: int | None = None
) -> Int32[np.ndarray, "height width"]:
    """Reads a label map.

    Palette files give their indices, whatever the palette, and grayscale files of 1 to 16 bits their values
    as stored. An EXIF orientation is applied, as for images.

    Args:
        path: the file, usually a PNG, or its contents in memory.
        max_pixels: the largest size accepted; None means Pillow's limit against decompression bombs, about
            89 million.

    Returns:
        The labels, int32 `[H, W]`.

    Raises:
        ValueError: if the file is missing, empty, truncated or too large, holds colours rather than labels,
            or was compressed in a way that alters labels (JPEG).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> write_labels(path, np.array([[0, 1, 255]]))
        >>> read_labels(path)
        array([[  0,   1, 255]], dtype=int32)
    """
    with _opened(path, max_pixels) as stored:
        if stored.format in ("JPEG", "MPO", "JPEG2000"):
            raise ValueError(f"{path}: is a JPEG, whose compression alters labels; store label maps as PNG")
        # To be read before the pixels are: decoding clears the tiles.
        tiles = getattr(stored, "tile", [])
        packing = str(tiles[0][3]) if stored.format == "PNG" and tiles else ""
        image = ImageOps.exif_transpose(stored)
        if image.mode not in ("1", "L", "P", *_SIXTEEN_BIT):
            raise ValueError(
                f"{path}: holds {'x'.join(image.getbands())} values, not one label per pixel; convert it to a "
                "palette or grayscale PNG whose pixel values are the labels, e.g. look each colour up in the "
                "data set's list and store the result with jaxcrf.data.write_labels"
            )
        return np.array(image).astype(np.int32) // _STRETCHED.get(packing, 1)


def read_array(path: str | os.PathLike) -> Num[np.ndarray, "..."]:
    """Reads numbers, such as probabilities, from a `.npy` file.

    Files with pickled objects are refused, since reading them would run code.

    Args:
        path: the file, as written by `numpy.save` or `write_array`.

    Returns:
        The array, with the shape and the type that the file has, in native byte order.

    Raises:
        ValueError: if the file is missing, empty, truncated, not a `.npy` file or not real numbers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "probs.npy"
        >>> write_array(path, np.full((1, 1, 2), 0.5, np.float32))
        >>> read_array(path)
        array([[[0.5, 0.5]]], dtype=float32)
    """
    path = Path(path)
    _check_readable(path)
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError(
                    f"{path}: is not a .npy file; write one array with numpy.save "
                    "(of an .npz archive, save the one array that is meant)"
                )
            file.seek(0)
            array = np.load(file, allow_pickle=False)
    except (OSError, EOFError, MemoryError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        if "pickle" in str(error):
            raise ValueError(
                f"{path}: holds Python objects, which are not read because that would run code from the "
                "file; save a plain numeric array"
            ) from error
        raise ValueError(
            f"{path}: cannot be read ({error}); it may be truncated, so write it again"
        ) from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: holds {array.dtype} values; save real numbers, e.g. float32 probabilities")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def write_image(path: str | os.PathLike, image: UInt8[Array | np.ndarray, "height width *channels"]) -> None:
    """Writes an image, in the format that the suffix names.

    Args:
        path: where to; an existing file is replaced in one step.
        image: uint8 `[H, W, 3]` or `[H, W]`.

    Raises:
        ValueError: if the image has another shape or type, or the suffix is unknown.
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> write_image(Path(tempfile.mkdtemp()) / "red.png", np.full((4, 6, 3), [255, 0, 0], np.uint8))
    """
    path, image = Path(path), np.asarray(image)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(
            f"image: got shape {image.shape} and dtype {image.dtype}; expected uint8 [height, width, 3] or "
            "[height, width]"
        )
    _check_not_empty("image", image)
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise ValueError(f"{path}: has no suffix of an image format that can be written; use .png or .jpg")
    with replacing(path) as file:
        Image.fromarray(image).save(file, format=name)


def write_labels(path: str | os.PathLike, labels: Int[Array | np.ndarray, "height width"]) -> None:
    """Writes a label map as a palette PNG in the colours of Pascal VOC, whatever the suffix.

    Args:
        path: where to; an existing file is replaced in one step.
        labels: integers from 0 to 255, `[H, W]`.

    Raises:
        ValueError: if the labels have another shape or type, or do not fit into 8 bits.
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> write_labels(path, np.array([[0, 1, 255]]))
        >>> read_image(path)[0, 1]
        array([128,   0,   0], dtype=uint8)
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: got shape {labels.shape} and dtype {labels.dtype}; expected integers "
            "[height, width], e.g. probs.argmax(-1)"
        )
    _check_not_empty("labels", labels)
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(
            f"labels: got values from {labels.min()} to {labels.max()}; a palette PNG holds 0 to 255. "
            "Store more labels with write_array."
        )
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    with replacing(path) as file:
        image.save(file, format="PNG")


def write_array(path: str | os.PathLike, array: Num[Array | np.ndarray, "..."]) -> None:
    """Writes an array as `.npy`, under exactly the name given.

    Args:
        path: where to; an existing file is replaced in one step.
        array: numbers of any shape.

    Raises:
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "probs.npy"
        >>> write_array(path, np.zeros((4, 6, 2), np.float32))
        >>> read_array(path).shape
        (4, 6, 2)
    """
    with replacing(path) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def voc_palette() -> UInt8[np.ndarray, "256 3"]:
    """The colours of Pascal VOC: the bits of a label, three at a time, become the high bits of R, G and B.

    Returns:
        RGB colours, uint8 `[256, 3]`; row `l` is the colour of label `l`.

    Example:
        >>> voc_palette()[[0, 1, 2, 15, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]

    References:
        `VOClabelcolormap.m` of the Pascal VOC development kit.
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((labels >> channel) & 1) << (7 - bit)).astype(np.uint8)
        labels >>= 3
    return palette


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name only once it is whole.

    The data go to a temporary name in the same folder. When the block ends, that is renamed to `path`,
    replacing what was there in one step; when it raises, the temporary file is removed and `path` is left
    as it was.

    Args:
        path: the name the file is to have.

    Yields:
        A binary file to write to.

    Raises:
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_text()
        'whole'
    """
    path = Path(path)
    # Not tempfile's: its files are readable by their owner only, and keep that through the renaming.
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _opened(path: str | os.PathLike | EncodedFile, max_pixels: int | None) -> Iterator[Image.Image]:
    """Opens an image and turns everything that Pillow may raise while it is decoded into a `ValueError`."""
    file: Path | io.BytesIO
    if isinstance(path, EncodedFile):
        file = io.BytesIO(path.contents)
    else:
        path = file = Path(path)
        _check_readable(path)
    too_large = (
        "larger than the limit of {limit} against decompression bombs; if the file is to be trusted, pass a "
        "larger max_pixels"
    )
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        with _pillow_limit, warnings.catch_warnings():
            # Pillow only warns up to twice its limit; the size is checked below instead.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
            try:
                image = Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = saved
        with image:
            if limit is not None and image.width * image.height > limit:
                size = f"{image.width} x {image.height} = {image.width * image.height} pixels"
                raise ValueError(f"{path}: has {size}, {too_large.format(limit=limit)}")
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: is not an image in a known format; convert it to PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: is {too_large.format(limit=limit)} ({error})") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be decoded ({error}); replace the file") from error
    # Pillow's decoders raise whatever they stumble over: SyntaxError for a broken PNG, struct.error, zlib.error …
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be decoded ({error}); it may be truncated or damaged, so replace the file"
        ) from error


def _check_readable(path: Path) -> None:
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name a file in it")
        with path.open("rb") as file:
            if not file.read(1):
                raise ValueError(f"{path}: is empty; replace the file")
    except OSError as error:
        reason = (
            "does not exist"
            if isinstance(error, FileNotFoundError)
            else f"cannot be opened ({error.strerror})"
        )
        raise ValueError(f"{path}: {reason}; check the path and its permissions") from error


def _check_not_empty(name: str, array: np.ndarray) -> None:
    if array.size == 0:
        raise ValueError(
            f"{name}: got shape {array.shape}, which has no pixels; image files need at least one"
        )

import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxcrf import data
from jaxcrf.data.images import replacing


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, bit_depth, color_type, rows):
    """A PNG by its specification, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def test_image_round_trip(tmp_path, photo):
    data.write_image(tmp_path / "photo.png", photo)
    read = data.read_image(tmp_path / "photo.png")
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, photo)


def test_paths_may_be_strings(tmp_path, photo):
    data.write_image(str(tmp_path / "photo.PNG"), photo)
    np.testing.assert_array_equal(data.read_image(str(tmp_path / "photo.PNG")), photo)


def test_jpeg(tmp_path):
    data.write_image(tmp_path / "plain.jpg", np.full((8, 8, 3), [200, 100, 50], np.uint8))
    np.testing.assert_allclose(data.read_image(tmp_path / "plain.jpg")[0, 0], [200, 100, 50], atol=3)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(tmp_path, photo, mode):
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    image = Image.fromarray(photo).convert(mode)
    image.save(path)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(data.read_image(path), expected)


def test_transparency_is_dropped_and_the_colours_underneath_stay(tmp_path):
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(data.read_image(tmp_path / "clear.png")[0, 0], [10, 20, 30])
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(data.read_image(tmp_path / "palette.png")[0, 0], [10, 20, 30])


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(data.read_image(tmp_path / "deep.png")[0, :, 1], [0, 0, 1, 1, 128, 255])


def test_float_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: holds floating-point values"):
        data.read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    corners = np.zeros((16, 32, 3), np.uint8)
    corners[:8, :16] = 255  # bright at the top left, as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    image = data.read_image(tmp_path / "turned.jpg")
    assert image.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    right, bottom = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[
        orientation
    ]
    assert image[-1 if bottom else 0, -1 if right else 0].min() > 200
    assert image[0 if bottom else -1, 0 if right else -1].max() < 50


def test_labels_round_trip(tmp_path):
    labels = np.arange(256).reshape(16, 16)
    data.write_labels(tmp_path / "labels.png", labels)
    read = data.read_labels(tmp_path / "labels.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, labels)
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(data.read_image(tmp_path / "labels.png"), data.voc_palette()[labels])


def test_palette_files_keep_their_indices_whatever_the_colours(tmp_path):
    image = Image.fromarray(np.array([[3, 1, 0]], np.uint8))
    image.putpalette([9, 9, 9] * 4)
    image.save(tmp_path / "same.png")
    np.testing.assert_array_equal(data.read_labels(tmp_path / "same.png"), [[3, 1, 0]])


@pytest.mark.parametrize(
    ("color_type", "bit_depth"),
    [*((0, bits) for bits in (1, 2, 4, 8, 16)), *((3, bits) for bits in (1, 2, 4, 8))],
)
def test_labels_of_every_png_depth(tmp_path, color_type, bit_depth):
    labels = [1, 0, 1, 1] if bit_depth == 1 else [3, 0, 1, 2]
    row = int("".join(f"{label:0{bit_depth}b}" for label in labels).ljust(8, "0"), 2)
    content = row.to_bytes(max(1, len(labels) * bit_depth // 8), "big")
    file = png(4, 1, bit_depth, color_type, [content])
    if color_type == 3:
        palette = png_chunk(b"PLTE", bytes(range(12)))
        file = file.replace(file[33:], palette + file[33:])
    (tmp_path / "labels.png").write_bytes(file)
    np.testing.assert_array_equal(data.read_labels(tmp_path / "labels.png"), [labels])


def test_sixteen_bit_labels(tmp_path):
    labels = np.array([[0, 300, 65535]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "many.png")
    np.testing.assert_array_equal(data.read_labels(tmp_path / "many.png"), labels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_not_labels(tmp_path, photo, mode):
    Image.fromarray(photo).convert(mode).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours\.png: holds .* not one label per pixel; convert"):
        data.read_labels(tmp_path / "colours.png")


def test_jpegs_are_not_labels(tmp_path):
    Image.new("L", (4, 4), 1).save(tmp_path / "labels.jpg")
    with pytest.raises(ValueError, match=r"labels\.jpg: is a JPEG.* PNG"):
        data.read_labels(tmp_path / "labels.jpg")


@pytest.mark.parametrize("read", [data.read_image, data.read_labels, data.read_array])
def test_unreadable_files_are_value_errors_that_name_them(tmp_path, read):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png: is empty"):
        read(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"missing\.png: does not exist"):
        read(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"is a folder"):
        read(tmp_path)
    (tmp_path / "text.png").write_text("not what the name says")
    with pytest.raises(ValueError, match=r"text\.png: is not "):
        read(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif"])
def test_truncated_images(tmp_path, suffix):
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"cut.{suffix}"
    data.write_image(path, photo)
    whole = path.read_bytes()
    for kept in (len(whole) // 2, 100, 30):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}: "):
            data.read_image(path)


def test_damaged_png(tmp_path, photo):
    data.write_image(tmp_path / "photo.png", photo)
    content = bytearray((tmp_path / "photo.png").read_bytes())
    content[60] ^= 255
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"photo\.png: cannot be decoded"):
        data.read_image(tmp_path / "photo.png")


@pytest.mark.parametrize("read", [data.read_image, data.read_labels])
def test_decompression_bombs(tmp_path, read):
    # 40 kB of file that would be 225 million pixels; above one and above two times Pillow's limit.
    rows = [bytes(15_000 // 8)] * 15_000
    (tmp_path / "bomb.png").write_bytes(png(15_000, 15_000, 1, 0, rows))
    (tmp_path / "big.png").write_bytes(png(15_000, 7_000, 1, 0, rows[:7_000]))
    for name in ("bomb.png", "big.png"):
        # Pillow's own warning would be an error in this suite.
        with pytest.raises(ValueError, match=rf"{name}: .*decompression bombs.*max_pixels"):
            read(tmp_path / name)


def test_max_pixels(tmp_path, photo):
    data.write_image(tmp_path / "photo.png", photo)
    assert data.read_image(tmp_path / "photo.png", max_pixels=54).shape == photo.shape
    for limit in (53, 26):
        with pytest.raises(ValueError, match=r"photo\.png: .*limit of"):
            data.read_image(tmp_path / "photo.png", max_pixels=limit)


def test_max_pixels_can_exceed_pillows_limit(tmp_path, photo, monkeypatch):
    data.write_image(tmp_path / "photo.png", photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="limit of 10"):
        data.read_image(tmp_path / "photo.png")
    assert data.read_image(tmp_path / "photo.png", max_pixels=100).shape == photo.shape
    assert Image.MAX_IMAGE_PIXELS == 10


def test_reading_in_threads_leaves_pillows_limit_alone(tmp_path, photo):
    data.write_image(tmp_path / "photo.png", photo)
    before = Image.MAX_IMAGE_PIXELS
    threads = [
        threading.Thread(
            target=data.read_image, args=[tmp_path / "photo.png"], kwargs={"max_pixels": 1000 + k}
        )
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4", np.float64, np.uint8])
def test_array_round_trip(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    data.write_array(tmp_path / "array.npy", array)
    read = data.read_array(tmp_path / "array.npy")
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


def test_arrays_that_are_not_read(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy: holds Python objects"):
        data.read_array(tmp_path / "objects.npy")
    np.save(tmp_path / "complex.npy", np.zeros(3, complex))
    with pytest.raises(ValueError, match=r"complex\.npy: holds complex128 values"):
        data.read_array(tmp_path / "complex.npy")
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"several\.npz: is not a \.npy file"):
        data.read_array(tmp_path / "several.npz")


def test_truncated_arrays(tmp_path):
    np.save(tmp_path / "cut.npy", np.zeros((50, 50)))
    whole = (tmp_path / "cut.npy").read_bytes()
    for kept in (1000, 64, 7):
        (tmp_path / "cut.npy").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"cut\.npy: cannot be read"):
            data.read_array(tmp_path / "cut.npy")


def test_an_array_that_claims_to_be_enormous(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    (tmp_path / "huge.npy").write_bytes(header.getvalue())
    with pytest.raises(ValueError, match=r"huge\.npy: cannot be read"):
        data.read_array(tmp_path / "huge.npy")


def test_what_cannot_be_written(tmp_path, photo):
    with pytest.raises(ValueError, match="labels: got values from -1 to 0"):
        data.write_labels(tmp_path / "a.png", np.array([[0, -1]]))
    with pytest.raises(ValueError, match="labels: got values from 0 to 256"):
        data.write_labels(tmp_path / "a.png", np.array([[0, 256]]))
    with pytest.raises(ValueError, match=r"labels: got shape \(6, 9, 3\)"):
        data.write_labels(tmp_path / "a.png", photo)
    with pytest.raises(ValueError, match=r"labels: .*dtype float64"):
        data.write_labels(tmp_path / "a.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"labels: .*no pixels"):
        data.write_labels(tmp_path / "a.png", np.zeros((0, 2), int))
    with pytest.raises(ValueError, match=r"image: .*dtype float64"):
        data.write_image(tmp_path / "a.png", photo / 255)
    with pytest.raises(ValueError, match=r"image: got shape \(6, 9, 2\)"):
        data.write_image(tmp_path / "a.png", photo[..., :2])
    with pytest.raises(ValueError, match=r"a\.xyz: has no suffix of an image format"):
        data.write_image(tmp_path / "a.xyz", photo)
    with pytest.raises(FileNotFoundError):
        data.write_image(tmp_path / "missing" / "a.png", photo)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as file:
            file.write(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    data.write_labels(tmp_path / "labels.png", np.zeros((2, 2), int))
    assert os.stat(tmp_path / "labels.png").st_mode == os.stat(tmp_path / "plain").st_mode


def test_long_names_can_be_written(tmp_path):
    name = "n" * 251 + ".png"
    data.write_labels(tmp_path / name, np.zeros((2, 2), int))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_voc_palette():
    palette = data.voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == 256
    # The colours of the data set's 21 labels and of its void.
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        3: (128, 128, 0),
        8: (64, 0, 0),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for label, color in expected.items():
        assert tuple(palette[label]) == color

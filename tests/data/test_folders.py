"""Folders of the layouts that `jaxcrf.data.folders` knows, written small."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcrf.data.folders import SegmentationFolder, camvid_folder, open_folder, voc_folder

SIZES = {"2007_000033": (6, 8), "2007_000129": (9, 5), "2007_000332": (4, 4)}


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_labels(path: Path, labels: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:  # VOC stores indices into a palette
        image = image.convert("P")
        image.putdata(labels.ravel().tolist())
        image.putpalette(np.arange(768, dtype=np.uint8).tolist())
    image.save(path)


def truth(name: str, num_labels: int) -> np.ndarray:
    labels = np.random.default_rng(len(name)).integers(num_labels, size=SIZES[name])
    labels[0, 0] = 255
    return labels


@pytest.fixture
def voc(tmp_path):
    names = list(SIZES)
    for split, listed in {"train": names[:1], "val": names[1:], "trainval": names}.items():
        listing = tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(listed) + "\n\n")
    for name in names:
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg", SIZES[name])
        write_labels(tmp_path / "SegmentationClass" / f"{name}.png", truth(name, 21), palette=True)
    return tmp_path


@pytest.fixture
def camvid(tmp_path):
    for split, names in {"train": list(SIZES)[:1], "val": list(SIZES)[1:]}.items():
        for name in names:
            write_image(tmp_path / split / "images" / f"{name}.jpg", SIZES[name])
            write_labels(tmp_path / split / "labels" / f"{name}.png", truth(name, 11))
    return tmp_path


@pytest.mark.parametrize(
    ("layout", "opener", "num_labels"), [("voc", voc_folder, 21), ("camvid", camvid_folder, 11)]
)
def test_reads_every_example_of_the_split(request, layout, opener, num_labels):
    folder = opener(request.getfixturevalue(layout), "val")
    assert isinstance(folder, SegmentationFolder)
    assert folder.names == ("2007_000129", "2007_000332")
    assert folder.num_labels == len(folder.label_names) == len(set(folder.label_names)) == num_labels
    assert folder.ignore_label == 255
    examples = list(folder)
    assert len(examples) == len(folder) == 2
    for name, (image, labels) in zip(folder.names, examples, strict=True):
        assert image.shape == (*SIZES[name], 3)
        assert image.dtype == np.uint8
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, truth(name, num_labels))


def test_voc_keeps_the_order_of_its_list(voc):
    listing = voc / "ImageSets" / "Segmentation" / "odd.txt"
    listing.write_text("2007_000332\n2007_000033\n")
    assert voc_folder(voc, "odd").names == ("2007_000332", "2007_000033")


def test_camvid_accepts_png_images_and_ignores_other_files(camvid):
    write_image(camvid / "val" / "images" / "2007_000033.png", SIZES["2007_000033"])
    write_labels(camvid / "val" / "labels" / "2007_000033.png", truth("2007_000033", 11))
    (camvid / "val" / "images" / "Thumbs.db").write_bytes(b"")
    assert camvid_folder(camvid, "val").names == tuple(sorted(SIZES))


def test_indexing_and_slicing(voc):
    folder = voc_folder(voc, "trainval")
    np.testing.assert_array_equal(folder[-1][1], folder[2][1])
    every_other = folder[::2]
    assert isinstance(every_other, SegmentationFolder)
    assert every_other.names == ("2007_000033", "2007_000332")
    assert every_other.num_labels == 21
    np.testing.assert_array_equal(every_other[1][0], folder[2][0])
    with pytest.raises(IndexError):
        folder[3]


def test_open_folder_recognises_both_layouts(tmp_path, request):
    assert open_folder(request.getfixturevalue("voc")).num_labels == 21
    assert open_folder(tmp_path, "trainval").names == tuple(SIZES)


def test_open_folder_recognises_camvid(camvid):
    assert open_folder(camvid).names == ("2007_000129", "2007_000332")
    assert open_folder(str(camvid), "train").num_labels == 11


def test_open_folder_takes_the_only_split_there_is(camvid):
    (camvid / "val").rename(camvid / "test")
    with pytest.raises(ValueError, match=r"split=None.*test, train"):
        open_folder(camvid)
    (camvid / "train").rename(camvid.parent / f"{camvid.name}-elsewhere")
    assert len(open_folder(camvid)) == 2


@pytest.mark.parametrize(
    ("layout", "opener", "missing", "source"),
    [
        ("voc", voc_folder, "JPEGImages", "host.robots.ox.ac.uk"),
        ("voc", voc_folder, "SegmentationClass", "host.robots.ox.ac.uk"),
        ("voc", voc_folder, "ImageSets/Segmentation/val.txt", "the splits found there are: train, trainval"),
        ("voc", voc_folder, "JPEGImages/2007_000129.jpg", "host.robots.ox.ac.uk"),
        ("voc", voc_folder, "SegmentationClass/2007_000332.png", "host.robots.ox.ac.uk"),
        ("camvid", camvid_folder, "val", "the splits found there are: train"),
        ("camvid", camvid_folder, "val/images", "mi.eng.cam.ac.uk"),
        ("camvid", camvid_folder, "val/labels", "mi.eng.cam.ac.uk"),
        ("camvid", camvid_folder, "val/labels/2007_000129.png", "mi.eng.cam.ac.uk"),
    ],
)
def test_what_is_missing_is_named_with_the_layout_and_the_source(request, layout, opener, missing, source):
    root = request.getfixturevalue(layout)
    (root / missing).rename(root.parent / f"{root.name}-moved-away")
    with pytest.raises(ValueError) as error:
        opener(root, "val")
    message = str(error.value)
    assert str(root / missing) in message
    assert source in message
    assert "layout is" in message


def test_unknown_layouts_and_missing_roots(tmp_path):
    with pytest.raises(ValueError, match=r"no known layout.*JPEGImages.*images.*robots.*cam\.ac"):
        open_folder(tmp_path)
    for opener in (open_folder, voc_folder, camvid_folder):
        with pytest.raises(ValueError, match="nowhere: no such folder"):
            opener(tmp_path / "nowhere")


def test_empty_lists_are_errors(voc, tmp_path):
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt: got an empty list"):
        voc_folder(voc)
    for part in ("images", "labels"):
        (tmp_path / "empty" / "val" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match="without images"):
        camvid_folder(tmp_path / "empty")


def test_sizes_that_disagree_are_errors(camvid):
    write_labels(camvid / "val" / "labels" / "2007_000332.png", np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"2007_000332\.png: got a label map of shape \(4, 5\).*\(4, 4\)"):
        list(camvid_folder(camvid))


def test_labels_out_of_range_are_errors(camvid):
    # A common copy of CamVid stores void as 11.
    write_labels(camvid / "val" / "labels" / "2007_000332.png", np.full((4, 4), 11))
    with pytest.raises(ValueError, match=r"2007_000332\.png: got label 11; expected 0 to 10, or 255"):
        camvid_folder(camvid)[1]


def test_counts_must_agree(tmp_path):
    with pytest.raises(ValueError, match="one of each"):
        SegmentationFolder(("a", "b"), (tmp_path,), (tmp_path,), ("background",))


def test_real_folders(data_dir):
    opened = []
    for root in (data_dir, *sorted(path for path in data_dir.iterdir() if path.is_dir())):
        with contextlib.suppress(ValueError):
            opened.append(open_folder(root))
    assert opened, f"{data_dir}: neither a data set nor a folder of data sets"
    for folder in opened:
        image, labels = folder[0]
        assert image.dtype == np.uint8
        assert image.shape == (*labels.shape, 3)
        present = np.unique(labels)
        assert set(present[present != folder.ignore_label]) <= set(range(folder.num_labels))

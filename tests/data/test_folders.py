"""Folders of the layouts that `jaxcrf.data.folders` knows, written small."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset_suite import (
    TREES,
    VOID,
    labels_like,
    same_examples,
    with_void,
    write_image,
    write_labels,
    write_text,
)
from jaxcrf.data.folders import SegmentationFolder, camvid_folder, datasets, open_folder, voc_folder
from jaxcrf.data.folders.base import hash_order
from jaxcrf.data.folders.coco import coco_folder, polygon_mask, run_length_mask
from jaxcrf.data.folders.generic import image_mask_folder
from jaxcrf.data.folders.saliency import msra10k_folder, pascal_s_folder
from jaxcrf.data.folders.scenes import stanford_background_folder

SIZES = {"2007_000033": (6, 8), "2007_000129": (9, 5), "2007_000332": (4, 4)}


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


@pytest.fixture(scope="module", params=TREES, ids=str)
def tree(request, tmp_path_factory):
    """A tree, where it is written, and the truth."""
    root = tmp_path_factory.mktemp(request.param.dataset)
    return request.param, root, request.param.write(root)


@pytest.fixture
def copied(tree, tmp_path):
    """A tree that a test may damage."""
    case, root, _ = tree
    return case, Path(shutil.copytree(root, tmp_path / "copied"))


def test_every_data_set_is_in_the_suite():
    assert {case.dataset for case in TREES} == set(datasets())


def test_suite_every_split_has_the_labels_that_were_written(tree):
    case, root, truth = tree
    assert set(datasets()[case.dataset].find_splits(root)) == set(truth)
    for split, expected in truth.items():
        folder = open_folder(root, split, case.dataset)
        assert folder.num_labels == len(set(folder.label_names)) == case.num_labels
        assert folder.ignore_label == VOID
        list(same_examples(folder, expected))


def test_suite_layouts_are_recognised(tree):
    case, root, truth = tree
    folder = open_folder(str(root), case.split)
    assert folder == dataclasses.replace(
        open_folder(root, case.split, case.dataset), label_reader=folder.label_reader
    )
    if "val" in truth:
        assert open_folder(root).names == tuple(truth["val"])
    elif len(truth) == 1:
        assert open_folder(root).names == folder.names
    else:
        with pytest.raises(ValueError, match=f"split=None.*{case.split}"):
            open_folder(root)


def test_suite_slices_and_pickles(tree):
    case, root, truth = tree
    folder = open_folder(root, case.split, case.dataset)
    kept = pickle.loads(pickle.dumps(folder[::-2]))
    list(same_examples(kept, dict(list(truth[case.split].items())[::-2])))
    np.testing.assert_array_equal(folder[-1][0], list(folder)[-1][0])
    with pytest.raises(IndexError):
        folder[len(folder)]


def test_suite_unknown_splits_name_those_there_are(tree):
    case, root, truth = tree
    with pytest.raises(ValueError) as error:
        open_folder(root, "nonsense", case.dataset)
    message = str(error.value)
    assert "nonsense" in message
    assert case.source in message
    assert all(split in message for split in truth)


def test_suite_missing_files_are_named_with_the_layout_and_the_source(copied):
    case, root = copied
    for missing in case.needed:
        aside = root.parent / "aside"
        (root / missing).rename(aside)
        with pytest.raises(ValueError) as error:
            open_folder(root, case.split, case.dataset)
        aside.rename(root / missing)
        message = str(error.value)
        assert str(root / missing) in message
        assert "layout is" in message
        assert case.source in message
    open_folder(root, case.split, case.dataset)


def test_suite_damaged_images_are_named(copied):
    case, root = copied
    (root / case.image).write_bytes((root / case.image).read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"{case.image}: cannot be decoded"):
        list(open_folder(root, case.split, case.dataset))


def test_suite_images_of_another_size_are_errors(copied):
    case, root = copied
    write_image(root / case.image, (3, 2))
    with pytest.raises(ValueError, match=rf"got a label map of shape.*\(3, 2\) \(.*{case.image}\)"):
        list(open_folder(root, case.split, case.dataset))


def test_suite_labels_out_of_range_are_errors(copied):
    case, root = copied
    if case.spoil_labels is None:
        pytest.skip("its files cannot hold any")
    case.spoil_labels(root)
    with pytest.raises(
        ValueError, match=rf"got (label {case.num_labels}; expected 0 to|values of 0 and 1)|colours"
    ):
        list(open_folder(root, case.split, case.dataset))


def test_suite_empty_folders_are_errors(copied):
    case, root = copied
    for path in [path for path in root.rglob("*") if path.is_file() and path.name != "labels.txt"]:
        path.unlink()
    with pytest.raises(ValueError) as error:
        open_folder(root, case.split, case.dataset)
    assert case.source in str(error.value)


def test_unknown_data_sets_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"dataset: got 'voc'; expected one of camvid, coco_voc.*voc2012"):
        open_folder(tmp_path, dataset="voc")


# VOC with SBD.


@pytest.fixture
def voc_with_sbd(tmp_path):
    [case] = (case for case in TREES if case.dataset == "voc2012")
    return tmp_path, case.write(tmp_path)


def test_sbd_may_be_beside_voc_or_named(voc_with_sbd, tmp_path):
    root, truth = voc_with_sbd
    for place in ("VOCdevkit/VOC2012", "VOC2012"):
        (tmp_path / "elsewhere" / place).parent.mkdir(parents=True)
        voc = Path(shutil.copytree(root, tmp_path / "elsewhere" / place, ignore=lambda *_: ["elsewhere"]))
        (voc / "benchmark_RELEASE").rename(tmp_path / "elsewhere" / "benchmark_RELEASE")
        list(same_examples(voc_folder(voc, "train_aug"), truth["train_aug"]))
        shutil.rmtree(tmp_path / "elsewhere")
    (root / "benchmark_RELEASE").rename(root / "sbd")
    assert "train_aug" not in datasets()["voc2012"].find_splits(root)
    with pytest.raises(ValueError, match=r"train_aug\.txt: no such file.*home\.bharathh\.info"):
        voc_folder(root, "train_aug")
    assert len(voc_folder(root, "trainval_aug", sbd=root / "sbd/dataset")) == 7


def test_sbd_as_pngs_with_a_list_of_paths(voc_with_sbd):
    root, truth = voc_with_sbd
    shutil.rmtree(root / "benchmark_RELEASE")
    rows = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in truth["train_aug"])
    write_text(root / "ImageSets/Segmentation/trainaug.txt", "".join(rows))
    for name, labels in truth["train_aug"].items():
        write_labels(root / "SegmentationClassAug" / f"{name}.png", labels)
    assert {"train_aug", "trainval_aug"} <= set(datasets()["voc2012"].find_splits(root))
    list(same_examples(open_folder(root, "train_aug"), truth["train_aug"]))
    list(same_examples(open_folder(root, "trainval_aug"), truth["trainval_aug"]))


def test_validation_never_takes_the_annotations_of_sbd(voc_with_sbd):
    root, _ = voc_with_sbd
    (root / "SegmentationClass/2007_000033.png").unlink()  # which SBD has, too
    with pytest.raises(ValueError, match=r"SegmentationClass/2007_000033\.png: no such file"):
        voc_folder(root, "val")


def test_held_out_and_the_rest_make_up_all(voc_with_sbd):
    root, truth = voc_with_sbd
    held_out = voc_folder(root, "train_held_out", num_held_out=2)
    rest = voc_folder(root, "train_unary", num_held_out=2)
    # printf 0:2007_000032 | sha256sum, and so on.
    assert held_out.names == ("2007_000032", "2010_006031")
    assert sorted(held_out.names + rest.names) == list(truth["train_aug"])
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"num_held_out: got {count} of the 5"):
            voc_folder(root, "train_unary", num_held_out=count)
    assert "train_unary" not in datasets()["voc2012"].find_splits(root)


def test_as_many_as_the_paper_are_held_out(tmp_path):
    """10 582 names, of which only the files are missing."""
    names = [f"{2007 + i % 5}_{i:06}" for i in range(10582)]
    write_text(tmp_path / "ImageSets/Segmentation/train_aug.txt", "\n".join(names))
    assert {"train_unary", "train_held_out"} <= set(datasets()["voc2012"].find_splits(tmp_path))
    shuffled = hash_order(names, 0)
    assert len(set(shuffled[:200])) == 200
    assert sorted(shuffled) == sorted(names)


def test_an_order_by_hashes_is_the_same_in_every_process():
    code = "from jaxcrf.data.folders.base import hash_order; print(*hash_order(map(str, range(50)), 3))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == list(hash_order(map(str, range(50)), 3))
    assert hash_order(map(str, range(50)), 3) != hash_order(map(str, range(50)), 4)


def test_test_images_have_no_truth_or_all_of_it(voc_with_sbd):
    root, _ = voc_with_sbd
    write_text(root / "ImageSets/Segmentation/test.txt", "2008_000006\n2007_000033\n")
    with pytest.raises(ValueError, match=r"2008_000006\.png: no such file"):
        voc_folder(root, "test")
    shutil.rmtree(root / "SegmentationClass")  # the archive of the test set has none
    folder = voc_folder(root, "test")
    assert folder.label_paths == (None, None)
    assert all((labels == VOID).all() for _, labels in folder[1:])


def test_damaged_matlab_files_are_named(voc_with_sbd):
    root, _ = voc_with_sbd
    path = root / "benchmark_RELEASE/dataset/cls/2008_000002.mat"
    whole = path.read_bytes()
    for contents in (whole[:150], b"", b"MATLAB" * 50):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"2008_000002\.mat: (cannot be read|holds no variable)"):
            list(voc_folder(root, "train_aug"))
    for wrong in (
        {"GTinst": 1},
        {"GTcls": {"Boundaries": 1}},
        {"GTcls": {"Segmentation": np.ones((2, 2, 2))}},
    ):
        savemat(path, wrong)
        with pytest.raises(ValueError, match=r"2008_000002\.mat: .*GTcls"):
            list(voc_folder(root, "train_aug"))


# The others.


def test_names_that_are_listed_twice_are_errors(voc_with_sbd):
    root, _ = voc_with_sbd
    write_text(root / "ImageSets/Segmentation/val.txt", "2007_000033\n2007_000033\n")
    with pytest.raises(ValueError, match=r"val\.txt: lists '2007_000033' twice"):
        voc_folder(root, "val")


def test_folds_of_stanford_background(tmp_path):
    names = [f"{i:07}" for i in range(715)]
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").touch()
        write_text(tmp_path / "labels" / f"{name}.regions.txt", "")
    tested = [stanford_background_folder(tmp_path, f"test_{k}").names for k in range(1, 6)]
    assert [len(fold) for fold in tested] == [143] * 5
    assert sorted(name for fold in tested for name in fold) == names
    for k, fold in enumerate(tested, 1):
        assert sorted((*stanford_background_folder(tmp_path, f"train_{k}").names, *fold)) == names
    assert stanford_background_folder(tmp_path, "test_1", seed=1).names != tested[0]


@pytest.mark.parametrize("text", ["", "1 2\n3\n", "1 2\n3 x\n", "1.5 2\n", "é"])
def test_malformed_regions_are_named(tmp_path, text):
    write_image(tmp_path / "images/a.jpg", (2, 2))
    write_text(tmp_path / "labels/a.regions.txt", text)
    with pytest.raises(ValueError, match=r"a\.regions\.txt: (cannot be read|got an empty file)"):
        stanford_background_folder(tmp_path)[0]


def test_masks_may_be_stored_in_other_ways(tmp_path):
    labels = labels_like("101", 2)
    for i, convert in enumerate(
        (lambda m: m.convert("RGB"), lambda m: m.convert("1"), lambda m: m.convert("RGBA"))
    ):
        write_image(tmp_path / f"{i}.jpg", labels.shape)
        convert(Image.fromarray((labels * 255).astype(np.uint8))).save(tmp_path / f"{i}.png")
    folder = msra10k_folder(tmp_path)  # the folder Imgs itself
    assert len(folder) == 3
    for _, found in folder:
        np.testing.assert_array_equal(found, labels)
    assert open_folder(tmp_path).label_names == ("background", "salient")


def test_pascal_s_below_datasets(tmp_path):
    write_image(tmp_path / "imgs/pascal/1.jpg", (4, 4))
    write_labels(tmp_path / "masks/pascal/1.png", np.zeros((4, 4)))
    assert len(pascal_s_folder(tmp_path)) == len(open_folder(tmp_path)) == 1


def test_image_mask_layouts(tmp_path):
    labels = with_void(labels_like("a", 3))
    for i, (image, mask, split) in enumerate(
        (
            ("images/a.jpg", "labels/a.png", "full"),
            ("images/a.png", "masks/a.png", "full"),
            ("images/north/a.jpg", "masks/north/a.png", "north"),
            ("images/north/a.jpg", "labels/north/a.png", "north"),
            ("north/images/a.jpg", "north/masks/a.png", "north"),
            ("north/images/a.jpg", "north/labels/a.png", "north"),
        )
    ):
        root = tmp_path / str(i)
        write_image(root / image, labels.shape)
        write_labels(root / mask, labels)
        with pytest.raises(ValueError, match=r"labels\.txt: no such file.*label_names"):
            image_mask_folder(root, split)
        folder = image_mask_folder(root, split, label_names=["a", "b", "c"])
        list(same_examples(folder, {"a": labels}))
        write_text(root / "labels.txt", "one\n\ntwo\nthree\n")
        assert open_folder(root).label_names == ("one", "two", "three")
    with pytest.raises(ValueError, match="label_names: got"):
        image_mask_folder(root, "north", label_names="abc")
    with pytest.raises(ValueError, match=r"a\.png: got label 2; expected 0 to 1, or 255"):
        image_mask_folder(root, "north", label_names=("a", "b"))[0]
    write_labels(root / "north/labels/a.png", np.where(labels == VOID, 7, labels))
    assert image_mask_folder(root, "north", label_names=["a", "c"], ignore_label=7).ignore_label == 7


def test_two_images_of_one_name_are_errors(camvid):
    write_image(camvid / "val/images/2007_000129.png", (9, 5))
    with pytest.raises(ValueError, match=r"got both 2007_000129\.jpg and 2007_000129\.png"):
        camvid_folder(camvid)


# COCO.


def test_polygons_against_a_test_of_every_pixel():
    """The even-odd rule at pixel centres, one ray to the left of each, in a loop."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(1, 15, 2)
        polygons = [rng.uniform(-4, 18, 2 * rng.integers(3, 9)) for _ in range(rng.integers(1, 3))]
        expected = np.zeros((height, width), bool)
        for polygon in polygons:
            corners = polygon.reshape(-1, 2)
            for y in range(height):
                for x in range(width):
                    crossings = 0
                    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
                        if (y0 <= y + 0.5) != (y1 <= y + 0.5):
                            crossings += x0 + (y + 0.5 - y0) / (y1 - y0) * (x1 - x0) <= x + 0.5
                    expected[y, x] |= crossings % 2 == 1
        np.testing.assert_array_equal(polygon_mask(polygons, height, width), expected)


def test_polygons_with_a_common_edge_neither_overlap_nor_leave_a_gap():
    corners = np.array([[0, 0], [12, 0], [12, 9], [0, 9]]), np.array([5.3, 4.5])
    pieces = [
        polygon_mask([np.concatenate([corners[0][i], corners[0][(i + 1) % 4], corners[1]])], 9, 12)
        for i in range(4)
    ]
    np.testing.assert_array_equal(sum(piece.astype(int) for piece in pieces), 1)


# pycocotools 2.0.11: mask.encode of each.
RUN_LENGTHS = [
    (
        "11100100030L10O0000011OO00",
        np.array(
            [
                [0, 1, 0, 1, 1, 0, 1],
                [1, 1, 1, 0, 0, 1, 0],
                [0, 0, 1, 1, 1, 0, 1],
                [1, 1, 1, 0, 0, 0, 0],
                [0, 1, 1, 0, 1, 1, 1],
            ]
        ),
    ),
    ("S5P1800WOJ`06@J`06@J`06900000000000000000000U68cN", "plate"),
]


@pytest.mark.parametrize(("text", "expected"), RUN_LENGTHS, ids=["small", "negative differences"])
def test_run_lengths_of_coco(text, expected):
    if isinstance(expected, str):
        expected = np.zeros((40, 30), int)
        expected[3:35, 4:20] = 1
        expected[10:12, 6:9] = 0
        expected[:, 25] = 1
    np.testing.assert_array_equal(run_length_mask(text, *expected.shape), expected)


@pytest.mark.parametrize(
    "counts", ["1", "11100100030L10O0000011OO0", "111\n", "1111111\x7f", [1, 2], [40, -5], [3.5, 31.5]]
)
def test_malformed_run_lengths_are_errors(counts):
    with pytest.raises(ValueError, match="counts: got"):
        run_length_mask(counts, 5, 7)


def test_malformed_annotations_of_coco_are_named(tmp_path):
    [case] = (case for case in TREES if case.dataset == "coco_voc")
    case.write(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    whole = path.read_text()
    for text in (whole[:100], "[]", "{}", whole.replace("file_name", "file")):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"instances_val2017\.json: is not a file of COCO's instances"):
            coco_folder(tmp_path, "val2017")
    for old, new in (
        ('"size": [40, 50]', '"size": [50, 40]'),
        ('"counts"', '"runs"'),
        ("[[40, 14, 48, 14,", "[[40, 14, 48,"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"2017\.json: has a malformed segmentation of image '0+139'"):
            list(coco_folder(tmp_path, "val2017"))
    path.write_text(whole)
    with pytest.raises(ValueError, match="none of whose images has more than 2000 pixels"):
        coco_folder(tmp_path, "val2017", min_pixels=2000)
    assert len(coco_folder(tmp_path, "val2017", min_pixels=899)) == 2


def test_real_folders(data_dir):
    opened = {}
    for root in (data_dir, *sorted(path for path in data_dir.iterdir() if path.is_dir())):
        with contextlib.suppress(ValueError):
            opened[root] = open_folder(root)
    assert opened, f"{data_dir}: neither a data set nor a folder of data sets"
    for root, folder in opened.items():
        image, labels = folder[0]
        assert image.dtype == np.uint8
        assert image.shape == (*labels.shape, 3)
        present = np.unique(labels)
        assert set(present[present != folder.ignore_label]) <= set(range(folder.num_labels))
        if root.name == "camvid":
            assert (len(open_folder(root, "train")), len(folder), folder.num_labels) == (367, 101, 11)
        if root.name == "voc_sample":
            assert (len(folder), folder.num_labels) == (4, 21)
            assert {"person", "tvmonitor"} & {
                folder.label_names[i] for _, y in folder for i in np.unique(y[y < 21])
            }

"""Small trees in the layout of every data set, written with what their labels are, and the tests of all of them.

A writer fills a folder and returns the truth: for every split, the labels of every example by name, in order. It
writes each format from these labels without the code that reads it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

VOID = 255
Truth = dict[str, dict[str, np.ndarray]]


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


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def labels_like(name: str, num_labels: int) -> np.ndarray:
    """Every label once, the rest at random; no two names have the same size."""
    seed = sum(map(ord, name))
    labels = np.random.default_rng(seed).integers(num_labels, size=(5 + seed % 7, 6 + seed % 5))
    labels.ravel()[:num_labels] = range(num_labels)
    return labels


def with_void(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[-1, -1] = VOID
    return labels


def write_voc(root: Path) -> Truth:
    names = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033", "2007_000061"]}
    names["test"] = ["2008_000006"]
    names["trainval"] = sorted(names["train"] + names["val"])
    truth = {name: with_void(labels_like(name, 21)) for name in names["trainval"]}
    for split, listed in names.items():
        write_text(root / "ImageSets/Segmentation" / f"{split}.txt", "\n".join(listed) + "\n\n")
    for name, labels in truth.items():
        write_image(root / "JPEGImages" / f"{name}.jpg", labels.shape)
        write_labels(root / "SegmentationClass" / f"{name}.png", labels, palette=True)
    write_image(root / "JPEGImages/2008_000006.jpg", (6, 9))
    # SBD annotates images of its own, and some of VOC's, which are VOC's to annotate.
    sbd = root / "benchmark_RELEASE/dataset"
    own = {name: labels_like(name, 21) for name in ("2008_000002", "2010_006031", "2011_003271")}
    for name, labels in own.items():
        write_image(root / "JPEGImages" / f"{name}.jpg", labels.shape)
    for name in (*own, "2007_000032", "2007_000033"):
        labels = own.get(name, np.zeros((3, 3), int))
        contents = {"Segmentation": labels.astype(np.uint8), "CategoriesPresent": np.unique(labels)}
        (sbd / "cls").mkdir(parents=True, exist_ok=True)
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": contents}, do_compression=True)
    write_text(sbd / "train.txt", "2008_000002\n2007_000032\n2007_000033\n")
    write_text(sbd / "val.txt", "2011_003271\n2010_006031\n")
    truth |= own
    names["train_aug"] = sorted([*names["train"], *own])
    names["trainval_aug"] = sorted([*names["trainval"], *own])
    truth["2008_000006"] = np.full((6, 9), VOID)
    return {split: {name: truth[name] for name in listed} for split, listed in names.items()}


def write_person_part(root: Path) -> Truth:
    names = {"train": ["2008_000008", "2008_000003"], "val": ["2010_000015"]}
    truth = {}
    for split, listed in names.items():
        lists = root / "pascal_person_part_trainval_list"
        write_text(lists / f"{split}_id.txt", "\n".join(listed))
        rows = (f"/JPEGImages/{name}.jpg /pascal_person_part_gt/{name}.png\n" for name in listed)
        write_text(lists / f"{split}.txt", "".join(rows))
        truth[split] = {name: labels_like(name, 7) for name in listed}
        for name, labels in truth[split].items():
            write_image(root / "JPEGImages" / f"{name}.jpg", labels.shape)
            write_labels(root / "pascal_person_part_gt" / f"{name}.png", labels)
    return truth


def write_stanford_background(root: Path) -> Truth:
    truth = {}
    for name in ("0000047", "0000051", "0000059", "0000072", "0000087", "0000089", "0000108"):
        labels = labels_like(name, 8)
        truth[name] = with_void(labels)
        write_image(root / "images" / f"{name}.jpg", labels.shape)
        stored = np.where(truth[name] == VOID, -1, labels)
        rows = (" ".join(map(str, row)) + "\n" for row in stored)
        write_text(root / "labels" / f"{name}.regions.txt", "".join(rows))
        write_text(root / "labels" / f"{name}.surfaces.txt", "0 0\n")
    # By SHA-256 of 0:<name>, from the shell: printf 0:0000047 | sha256sum
    shuffled = ["0000089", "0000051", "0000047", "0000087", "0000059", "0000108", "0000072"]
    splits = {"full": truth}
    for k in range(5):
        tested = shuffled[k::5]
        splits[f"train_{k + 1}"] = {name: truth[name] for name in truth if name not in tested}
        splits[f"test_{k + 1}"] = {name: truth[name] for name in truth if name in tested}
    return splits


def write_mask(path: Path, labels: np.ndarray) -> None:
    shades = np.random.default_rng(0).integers(128, size=labels.shape)
    shades.ravel()[:2] = 127, 0
    write_labels(path, np.where(labels == 1, 255 - shades, shades))


def write_msra10k(root: Path) -> Truth:
    truth = {name: labels_like(name, 2) for name in ("101", "10021", "99")}
    for name, labels in truth.items():
        write_image(root / "Imgs" / f"{name}.jpg", labels.shape)
        write_mask(root / "Imgs" / f"{name}.png", labels)
    return {"full": dict(sorted(truth.items()))}


def write_pascal_s(root: Path) -> Truth:
    truth = {name: labels_like(name, 2) for name in ("1", "10", "2")}
    for name, labels in truth.items():
        write_image(root / "datasets/imgs/pascal" / f"{name}.jpg", labels.shape)
        write_mask(root / "datasets/masks/pascal" / f"{name}.png", labels)
    return {"full": truth}


def write_hku_is(root: Path) -> Truth:
    truth = {name: labels_like(name, 2) for name in ("0004", "0005", "0010", "0012")}
    for name, labels in truth.items():
        write_image(root / "imgs" / f"{name}.png", labels.shape)
        write_mask(root / "gt" / f"{name}.png", labels)
    splits = {"full": truth}
    for split, listed in {"train": ["0005", "0012"], "val": ["0004"], "test": ["0010"]}.items():
        cells = np.array([[f"{name}.png"] for name in listed], object)
        savemat(root / f"{split}ImgSet.mat", {f"{split}ImgSet": cells})
        splits[split] = {name: truth[name] for name in listed}
    return splits


def write_coco(root: Path) -> Truth:
    categories = [
        {"id": 1, "name": "person"},
        {"id": 24, "name": "zebra"},
        {"id": 44, "name": "bottle"},
        {"id": 67, "name": "dining table"},
    ]

    def rectangle(top: int, left: int, bottom: int, right: int) -> list[float]:
        return [left, top, right, top, right, bottom, left, bottom]

    def annotation(number: int, image: int, category: int, segmentation: object, area: int, crowd: int = 0):
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "segmentation": segmentation,
            "area": area,
            "iscrowd": crowd,
        }

    def image(number: int, height: int = 40, width: int = 50):
        name = f"{number:012}"
        return {"id": number, "file_name": f"{name}.jpg", "height": height, "width": width}

    # A table with a bottle on it, half on a zebra, which is none of VOC's classes; a crowd that the table hides.
    table = np.zeros((40, 50), int)
    crowd = np.zeros((40, 50), bool)
    crowd[2:12, 1:20] = True
    table[crowd] = VOID
    table[10:36, 4:44] = 11
    table[14:20, 40:48] = 5
    runs = np.diff(
        np.flatnonzero(np.diff(crowd.T.ravel(), prepend=~crowd[0, 0], append=~crowd[-1, -1]))
    ).tolist()
    # A person in two pieces, and another image of too few pixels.
    person = np.zeros((33, 41), int)
    person[1:31, 0:16] = person[2:32, 20:40] = 15
    truth = {
        "val2017": {"000000000139": table},
        "train2017": {"000000000009": person, "000000000025": np.where(person == 15, 1, 0) * 11},
    }
    contents = {
        "val2017": {
            "images": [image(139), image(285)],
            "annotations": [
                annotation(1, 139, 44, [rectangle(14, 40, 20, 48)], 48),
                annotation(2, 139, 67, [rectangle(10, 4, 36, 44)], 1040),
                annotation(3, 139, 1, {"size": [40, 50], "counts": runs}, 190, crowd=1),
                annotation(4, 139, 24, [rectangle(0, 30, 40, 50)], 800),
                annotation(5, 285, 1, [rectangle(0, 0, 30, 30)], 5000),  # the area lies
            ],
        },
        "train2017": {
            "images": [image(9, 33, 41), image(25, 33, 41), image(30)],
            "annotations": [
                annotation(6, 9, 1, [rectangle(1, 0, 31, 16), rectangle(2, 20, 32, 40)], 1080),
                # The same by COCO's own code, compressed.
                annotation(7, 25, 67, {"size": [33, 41], "counts": COMPRESSED}, 1080),
                # Nothing but a crowd, however large.
                annotation(8, 30, 1, {"size": [40, 50], "counts": [100, 1500, 400]}, 1500, crowd=1),
            ],
        },
    }
    for split, entry in contents.items():
        write_text(
            root / "annotations" / f"instances_{split}.json", json.dumps(entry | {"categories": categories})
        )
        for row in entry["images"]:
            write_image(root / split / row["file_name"], (row["height"], row["width"]))
    truth["trainval2017"] = truth["train2017"] | truth["val2017"]
    return truth


# pycocotools 2.0.11: mask.encode of the person of `write_coco`.
COMPRESSED = "1n0300000000000000000000000000000U40kK0000000000000000000000000000000000000o0"


def write_camvid(root: Path) -> Truth:
    truth = {"train": ["0001TP_006690", "0006R0_f00930"], "val": ["0016E5_07959"]}
    splits = {
        split: {name: with_void(labels_like(name, 11)) for name in names} for split, names in truth.items()
    }
    for split, examples in splits.items():
        for name, labels in examples.items():
            write_image(root / split / "images" / f"{name}.jpg", labels.shape)
            write_labels(root / split / "labels" / f"{name}.png", labels)
    return splits


def write_image_mask(root: Path) -> Truth:
    write_text(root / "labels.txt", "soil\nleaf\nbroken stem\n")
    splits = {"train": ["north 1", "south"], "val": ["west"]}
    truth = {
        split: {name: with_void(labels_like(name, 3)) for name in names} for split, names in splits.items()
    }
    for split, examples in truth.items():
        for name, labels in examples.items():
            write_image(root / split / "images" / f"{name}.png", labels.shape)
            write_labels(root / split / "masks" / f"{name}.png", labels, palette=True)
    return truth


@dataclasses.dataclass(frozen=True)
class Tree:
    """A data set for the suite.

    Attributes:
        dataset: its name.
        write: fills a folder and returns the truth.
        num_labels: how many labels it has.
        split: the split for tests of one.
        image: the first image of that split.
        needed: files and folders without which that split cannot be opened.
        source: a part of what says where it can be had.
        spoil_labels: gives an example of the split labels that it must not have; None if it cannot have any.
    """

    dataset: str
    write: Callable[[Path], Truth]
    num_labels: int
    split: str
    image: str
    needed: tuple[str, ...]
    source: str
    spoil_labels: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return self.dataset


def _spoil(path: str, value: int) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        labels = np.asarray(Image.open(root / path)).copy()
        labels[1, 1] = value
        write_labels(root / path, labels)

    return spoil


TREES = (
    Tree(
        "voc2012",
        write_voc,
        21,
        "val",
        "JPEGImages/2007_000033.jpg",
        (
            "JPEGImages",
            "SegmentationClass",
            "ImageSets/Segmentation/val.txt",
            "JPEGImages/2007_000061.jpg",
            "SegmentationClass/2007_000033.png",
        ),
        "host.robots.ox.ac.uk",
        _spoil("SegmentationClass/2007_000033.png", 21),
    ),
    Tree(
        "person_part",
        write_person_part,
        7,
        "train",
        "JPEGImages/2008_000008.jpg",
        (
            "JPEGImages",
            "pascal_person_part_gt",
            "pascal_person_part_trainval_list",
            "JPEGImages/2008_000003.jpg",
            "pascal_person_part_gt/2008_000003.png",
        ),
        "liangchiehchen.com",
        _spoil("pascal_person_part_gt/2008_000008.png", 7),
    ),
    Tree(
        "stanford_background",
        write_stanford_background,
        8,
        "full",
        "images/0000047.jpg",
        ("images", "labels", "labels/0000059.regions.txt"),
        "dags.stanford.edu",
        lambda root: write_text(
            root / "labels/0000047.regions.txt",
            (root / "labels/0000047.regions.txt").read_text().replace("7", "8"),
        ),
    ),
    Tree(
        "msra10k",
        write_msra10k,
        2,
        "full",
        "Imgs/10021.jpg",
        ("Imgs/10021.png",),
        "mmcheng.net",
        lambda root: write_labels(root / "Imgs/10021.png", labels_like("10021", 2)),
    ),
    Tree(
        "pascal_s",
        write_pascal_s,
        2,
        "full",
        "datasets/imgs/pascal/1.jpg",
        ("datasets/imgs/pascal", "datasets/masks/pascal", "datasets/masks/pascal/10.png"),
        "cbs.ic.gatech.edu",
        lambda root: write_image(root / "datasets/masks/pascal/1.png", labels_like("1", 2).shape),
    ),
    Tree(
        "hku_is",
        write_hku_is,
        2,
        "train",
        "imgs/0005.png",
        ("imgs", "gt", "imgs/0012.png", "gt/0005.png"),
        "i.cs.hku.hk",
    ),
    Tree(
        "coco_voc",
        write_coco,
        21,
        "train2017",
        "train2017/000000000009.jpg",
        ("annotations", "train2017/000000000025.jpg"),
        "cocodataset.org",
    ),
    Tree(
        "camvid",
        write_camvid,
        11,
        "val",
        "val/images/0016E5_07959.jpg",
        ("val", "val/images", "val/labels", "val/labels/0016E5_07959.png"),
        "mi.eng.cam.ac.uk",
        _spoil("val/labels/0016E5_07959.png", 11),
    ),
    Tree(
        "image_mask",
        write_image_mask,
        3,
        "train",
        "train/images/north 1.png",
        ("train/masks/south.png",),
        "masks are PNGs",
        _spoil("train/masks/north 1.png", 3),
    ),
)


def same_examples(source, truth: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Asserts that a source has the labels of the truth, and gives its examples."""
    assert source.names == tuple(truth)
    assert len(source) == len(truth)
    examples = list(source)
    assert len(examples) == len(truth)
    for (image, labels), expected in zip(examples, truth.values(), strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (*expected.shape, 3)
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, expected)
        yield image, labels

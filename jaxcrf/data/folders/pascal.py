"""PASCAL VOC 2012 with the extra annotations of SBD, and PASCAL Person-Part."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxcrf.data.folders.base import (
    Dataset,
    SegmentationFolder,
    check_folder,
    check_split,
    hash_order,
    read_label_file,
    read_names,
    remedy,
    usual_order,
)
from jaxcrf.data.folders.matlab import read_matlab

VOC_LABEL_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
PERSON_PART_LABEL_NAMES = (
    "background",
    "head",
    "torso",
    "upper arms",
    "lower arms",
    "upper legs",
    "lower legs",
)

_VOC_LAYOUT = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt"
_VOC_SOURCE = (
    "PASCAL VOC 2012 can be had from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ "
    "(the folder is VOCdevkit/VOC2012 inside the archive)"
)
_SBD_ADVICE = (
    "The augmented splits need the annotations of SBD, either as benchmark_RELEASE/dataset/ with cls/<name>.mat, "
    "train.txt and val.txt (inside or beside the VOC folder, or named by sbd), or as PNGs in SegmentationClassAug/ "
    "with the list ImageSets/Segmentation/train_aug.txt. SBD can be had from "
    "http://home.bharathh.info/pubs/codes/SBD/download.html"
)
_PERSON_PART_LAYOUT = (
    "JPEGImages/<name>.jpg, pascal_person_part_gt/<name>.png and "
    "pascal_person_part_trainval_list/<split>_id.txt or <split>.txt"
)
_PERSON_PART_SOURCE = (
    "The annotations can be had from http://liangchiehchen.com/data/pascal_person_part.zip (linked from "
    "http://liangchiehchen.com/projects/DeepLab.html), the images are those of PASCAL VOC 2010 or 2012"
)

# The splits that are made of VOC's and SBD's together.
_AUGMENTED = ("train_aug", "trainval_aug", "train_unary", "train_held_out")
_HELD_OUT_SEED = 0
_NUM_HELD_OUT = 200


def voc_folder(
    root: str | Path, split: str = "val", *, sbd: str | Path | None = None, num_held_out: int = _NUM_HELD_OUT
) -> SegmentationFolder:
    """Opens a folder in the layout of PASCAL VOC: 21 labels, background included.

    Besides the lists that are there, as a rule `train` (1464), `val` (1449), `trainval` and `test` (1456),
    there are splits with the annotations of SBD where that is found:

    - `train_aug`: all that SBD annotates and `train`, less `val` (10 582 images);
    - `trainval_aug`: that and `val` (12 031);
    - `train_unary` and `train_held_out`: `train_aug` in two, to train a network and then a CRF on (10 382
      and 200). Held out are the names whose SHA-256 of `0:<name>` is smallest.

    An image that both VOC and SBD annotate has the annotation of VOC, which knows void pixels. Where there
    is no truth at all for `test`, every pixel is void.

    Args:
        root: the folder that holds `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`.
        split: names `ImageSets/Segmentation/<split>.txt`, which lists one example per line, or one of the
            above.
        sbd: the folder that holds SBD's `cls`, `train.txt` and `val.txt`; None looks for
            `benchmark_RELEASE/dataset` inside `root`, beside it and beside the folder it is in, and for
            `SegmentationClassAug` inside.
        num_held_out: how many examples are held out.

    Returns:
        The examples, in the order of the list; sorted by name where there is none.

    Raises:
        ValueError: if a folder or file is missing, or the list is empty.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        ...     (root / folder).mkdir(parents=True)
        >>> _ = (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033")
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "JPEGImages/2007_000033.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "SegmentationClass/2007_000033.png")
        >>> folder = voc_folder(root, "val")
        >>> folder.names, folder.num_labels, folder.label_names[1]
        (('2007_000033',), 21, 'aeroplane')

    References:
        Everingham et al., *The PASCAL Visual Object Classes Challenge*, 2015. Hariharan et al., *Semantic
        Contours from Inverse Detectors*, 2011 (SBD). Teichmann and Cipolla, *Convolutional CRFs for Semantic
        Segmentation*, 2018, section 5.2 (the 200 held out).
    """
    root = Path(root)
    advice = remedy("VOC", _VOC_LAYOUT, _VOC_SOURCE)
    check_folder(root, advice)
    # The archive of the test set has no annotations.
    for part in ("JPEGImages", *([] if split == "test" else ["SegmentationClass"]), "ImageSets/Segmentation"):
        check_folder(root / part, advice)
    sbd = _find_sbd(root) if sbd is None else Path(sbd)
    listing, names = _voc_names(root, split, sbd, num_held_out, advice)
    images = tuple(root / "JPEGImages" / f"{name}.jpg" for name in names)
    official = split in ("train", "val", "trainval", "test")
    labels: list[Path | None] = [_voc_label_path(root, name, None if official else sbd) for name in names]
    for path in (*images, *(path for path in labels if path is not None)):
        if path.is_file():
            continue
        if split == "test" and path in labels and not any(p is not None and p.is_file() for p in labels):
            labels = [None] * len(names)
            break
        raise ValueError(f"{path}: no such file, though {listing} lists {path.stem!r}. {advice}")
    return SegmentationFolder(names, images, tuple(labels), VOC_LABEL_NAMES, label_reader=read_pascal_labels)


def read_pascal_labels(path: Path, name: str) -> Int32[np.ndarray, "height width"]:
    """Reads the annotation of VOC, a PNG, or of SBD, a `.mat` file.

    Args:
        path: the file.
        name: the example's name, which is not needed.

    Returns:
        The labels, int32 `[H, W]`.

    Raises:
        ValueError: if the file is missing, damaged, or not an annotation.
    """
    if path.suffix != ".mat":
        return read_label_file(path, name)
    try:
        labels = read_matlab(path, "GTcls")["Segmentation"][0, 0]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: has no GTcls.Segmentation, so it is none of SBD's cls/*.mat") from error
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: got GTcls.Segmentation of shape {labels.shape} and dtype {labels.dtype}; expected integers "
            "[height, width]"
        )
    return np.ascontiguousarray(labels, np.int32)


def person_part_folder(root: str | Path, split: str = "val") -> SegmentationFolder:
    """Opens a folder in the layout of PASCAL Person-Part: background and 6 parts.

    The layout is that of the DeepLab authors, whose merging of the parts and whose lists (1716 training and
    1817 validation images) are what papers compare on. The unpacked `pascal_person_part` may be the root
    itself, with `JPEGImages` copied or linked into it, or lie in the root beside `JPEGImages`.

    Args:
        root: the folder that holds `JPEGImages`.
        split: `train`, `val` or another list of `pascal_person_part_trainval_list`.

    Returns:
        The examples, in the order of the list.

    Raises:
        ValueError: if a folder or file is missing, or the list is empty.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("JPEGImages", "pascal_person_part_gt", "pascal_person_part_trainval_list"):
        ...     (root / folder).mkdir(parents=True)
        >>> _ = (root / "pascal_person_part_trainval_list/val_id.txt").write_text("2008_000003")
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "JPEGImages/2008_000003.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "pascal_person_part_gt/2008_000003.png")
        >>> folder = person_part_folder(root, "val")
        >>> folder.names, folder.num_labels, folder.label_names[1]
        (('2008_000003',), 7, 'head')

    References:
        Chen et al., *Detect What You Can: Detecting and Representing Objects using Holistic Models and Body
        Parts*, 2014; with the parts merged as in Chen et al., *Attention to Scale*, 2016.
    """
    root = Path(root)
    advice = remedy("PASCAL Person-Part", _PERSON_PART_LAYOUT, _PERSON_PART_SOURCE)
    check_folder(root, advice)
    annotations = _person_part_root(root)
    for path in (root / "JPEGImages", annotations / "pascal_person_part_gt"):
        check_folder(path, advice)
    check_folder(annotations / "pascal_person_part_trainval_list", advice)
    listings = _person_part_lists(root)
    check_split(root, split, listings, advice)
    names = read_names(listings[split], advice)
    images = tuple(root / "JPEGImages" / f"{name}.jpg" for name in names)
    labels = tuple(annotations / "pascal_person_part_gt" / f"{name}.png" for name in names)
    for path in (*images, *labels):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though {listings[split]} lists {path.stem!r}. {advice}")
    return SegmentationFolder(names, images, labels, PERSON_PART_LABEL_NAMES)


def _find_sbd(root: Path) -> Path | None:
    # The archive of VOC unpacks to VOCdevkit/VOC2012, that of SBD to benchmark_RELEASE/dataset.
    above = root.resolve()
    for place in (root, above.parent, above.parent.parent):
        path = place / "benchmark_RELEASE" / "dataset"
        if (path / "cls").is_dir():
            return path
    return None


def _list_of(root: Path, split: str) -> Path:
    lists = root / "ImageSets" / "Segmentation"
    # Both spellings are about.
    if (
        split == "train_aug"
        and not (lists / "train_aug.txt").is_file()
        and (lists / "trainaug.txt").is_file()
    ):
        return lists / "trainaug.txt"
    return lists / f"{split}.txt"


def _voc_names(
    root: Path, split: str, sbd: Path | None, num_held_out: int, advice: str
) -> tuple[Path, tuple[str, ...]]:
    """A split's list, or what stands for it in messages, and its names."""
    listing = _list_of(root, split)
    if listing.is_file():
        return listing, read_names(listing, advice)
    if split not in _AUGMENTED:
        splits = ", ".join(sorted(_voc_splits(root) or ())) or "none"
        raise ValueError(f"{listing}: no such file; the splits found there are: {splits}. {advice}")
    if split == "train_aug":
        if sbd is None:
            raise ValueError(
                f"{listing}: no such file, nor is there a folder benchmark_RELEASE/dataset. {_SBD_ADVICE}."
            )
        for path in (sbd / "train.txt", sbd / "val.txt"):
            if not path.is_file():
                raise ValueError(f"{path}: no such file. {_SBD_ADVICE}.")
        names = {name for part in ("train", "val") for name in read_names(sbd / f"{part}.txt", _SBD_ADVICE)}
        names |= set(_voc_names(root, "train", sbd, num_held_out, advice)[1])
        names -= set(_voc_names(root, "val", sbd, num_held_out, advice)[1])
        return sbd, tuple(sorted(names))
    listing, augmented = _voc_names(root, "train_aug", sbd, num_held_out, advice)
    if split == "trainval_aug":
        return listing, tuple(sorted({*augmented, *_voc_names(root, "val", sbd, num_held_out, advice)[1]}))
    if not 0 < num_held_out < len(augmented):
        raise ValueError(
            f"num_held_out: got {num_held_out} of the {len(augmented)} examples of train_aug ({listing}); expected "
            "at least 1, and fewer than there are"
        )
    held_out = set(hash_order(augmented, _HELD_OUT_SEED)[:num_held_out])
    return listing, tuple(name for name in augmented if (name in held_out) == (split == "train_held_out"))


def _voc_label_path(root: Path, name: str, sbd: Path | None) -> Path:
    """VOC's own annotation where there is one; what is returned last is named when it is missing."""
    own = root / "SegmentationClass" / f"{name}.png"
    if own.is_file():
        return own
    augmented = root / "SegmentationClassAug" / f"{name}.png"
    if sbd is not None and not augmented.is_file():
        return sbd / "cls" / f"{name}.mat"
    return augmented if augmented.is_file() else own


def _voc_splits(root: Path) -> tuple[str, ...] | None:
    lists = root / "ImageSets" / "Segmentation"
    if not lists.is_dir():
        return None
    splits = usual_order(
        "train_aug" if path.stem == "trainaug" else path.stem for path in lists.glob("*.txt")
    )
    sbd = _find_sbd(root)
    if "train_aug" not in splits and not (
        {"train", "val"} <= set(splits)
        and sbd is not None
        and all((sbd / f"{part}.txt").is_file() for part in ("train", "val"))
    ):
        return splits
    count = len(_voc_names(root, "train_aug", sbd, _NUM_HELD_OUT, "")[1])
    augmented = _AUGMENTED if count > _NUM_HELD_OUT else _AUGMENTED[:2]
    return splits + tuple(split for split in augmented if split not in splits)


def _person_part_root(root: Path) -> Path:
    nested = root / "pascal_person_part"
    return nested if nested.is_dir() else root


def _person_part_lists(root: Path) -> dict[str, Path]:
    lists = _person_part_root(root) / "pascal_person_part_trainval_list"
    # train_id.txt lists names, train.txt the same images' paths.
    found = {path.stem: path for path in sorted(lists.glob("*.txt"))}
    return {stem.removesuffix("_id"): path for stem, path in found.items()}


def _person_part_splits(root: Path) -> tuple[str, ...] | None:
    if not (_person_part_root(root) / "pascal_person_part_gt").is_dir():
        return None
    return usual_order(_person_part_lists(root))


VOC = Dataset("voc2012", "VOC", _VOC_LAYOUT, _VOC_SOURCE, voc_folder, _voc_splits)
PERSON_PART = Dataset(
    "person_part",
    "PASCAL Person-Part",
    _PERSON_PART_LAYOUT,
    _PERSON_PART_SOURCE,
    person_part_folder,
    _person_part_splits,
)

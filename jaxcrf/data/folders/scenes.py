"""CamVid and Stanford Background: streets and outdoor scenes, labelled all over."""

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxcrf.data.folders.base import (
    FULL,
    Dataset,
    SegmentationFolder,
    check_folder,
    check_split,
    hash_order,
    images_in,
    paired,
    remedy,
)

CAMVID_LABEL_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
STANFORD_BACKGROUND_LABEL_NAMES = (
    "sky",
    "tree",
    "road",
    "grass",
    "water",
    "building",
    "mountain",
    "foreground object",
)

_CAMVID_LAYOUT = "<split>/images/<name>.jpg or .png and <split>/labels/<name>.png with the same names"
_CAMVID_SOURCE = (
    "CamVid can be had from http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/; its 32 classes are "
    f"merged into 11 ({', '.join(CAMVID_LABEL_NAMES)}: 0 to 10), everything else is 255"
)
_STANFORD_LAYOUT = "images/<name>.jpg and labels/<name>.regions.txt"
_STANFORD_SOURCE = (
    "Stanford Background can be had from http://dags.stanford.edu/projects/scenedataset.html "
    "(the folder is iccv09Data inside the archive)"
)
_NUM_FOLDS = 5


def camvid_folder(root: str | Path, split: str = "val") -> SegmentationFolder:
    """Opens a folder in the layout of CamVid: 11 labels, void is 255.

    Args:
        root: the folder that holds `<split>/images` and `<split>/labels`.
        split: the name of the sub-folder, as a rule `train`, `val` or `test`.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder is missing or empty, or an image has no label map.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("val/images", "val/labels"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "val/images/0016E5_07959.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "val/labels/0016E5_07959.png")
        >>> folder = camvid_folder(root, "val")
        >>> folder.names, folder.num_labels, folder.label_names[1]
        (('0016E5_07959',), 11, 'building')

    References:
        Brostow et al., *Segmentation and Recognition Using Structure from Motion Point Clouds*, 2008, with
        the 11 labels of Badrinarayanan et al., *SegNet*, 2017.
    """
    root = Path(root)
    advice = remedy("CamVid", _CAMVID_LAYOUT, _CAMVID_SOURCE)
    check_folder(root, advice)
    if not (root / split).is_dir():
        splits = ", ".join(_camvid_splits(root) or ()) or "none"
        raise ValueError(f"{root / split}: no such folder; the splits found there are: {splits}. {advice}")
    for part in ("images", "labels"):
        check_folder(root / split / part, advice)
    return paired(
        images_in(root / split / "images", advice),
        lambda image: root / split / "labels" / f"{image.stem}.png",
        CAMVID_LABEL_NAMES,
        advice,
    )


def stanford_background_folder(root: str | Path, split: str = FULL, *, seed: int = 0) -> SegmentationFolder:
    """Opens a folder in the layout of Stanford Background: 8 labels; negative numbers are void.

    The data set has no split of its own and is measured by five-fold cross-validation. Fold k of 5 tests on
    every fifth image, from the k-th on, in an order shuffled by the seed (see `hash_order`), 143 of the 715,
    and trains on the rest.

    Args:
        root: the folder that holds `images` and `labels`.
        split: `full`, or `train_1` to `train_5` and `test_1` to `test_5`.
        seed: another seed gives other folds.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder is missing or empty, or an image has no label map.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("images", "labels"):
        ...     (root / folder).mkdir()
        >>> Image.fromarray(np.zeros((1, 3, 3), np.uint8)).save(root / "images/0000047.jpg")
        >>> _ = (root / "labels/0000047.regions.txt").write_text("7 0 -1")
        >>> folder = stanford_background_folder(root)
        >>> folder[0][1], folder.label_names[7]
        (array([[  7,   0, 255]], dtype=int32), 'foreground object')

    References:
        Gould et al., *Decomposing a Scene into Geometric and Semantically Consistent Regions*, 2009. Five
        folds: Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network
        for Semantic Segmentation*, 2016, section 4.1.
    """
    root = Path(root)
    advice = remedy("Stanford Background", _STANFORD_LAYOUT, _STANFORD_SOURCE)
    check_folder(root, advice)
    for part in ("images", "labels"):
        check_folder(root / part, advice)
    check_split(root, split, _FOLDS, advice)
    folder = paired(
        images_in(root / "images", advice),
        lambda image: root / "labels" / f"{image.stem}.regions.txt",
        STANFORD_BACKGROUND_LABEL_NAMES,
        advice,
        label_reader=read_regions,
    )
    if split == FULL:
        return folder
    part, _, fold = split.partition("_")
    tested = set(hash_order(folder.names, seed)[int(fold) - 1 :: _NUM_FOLDS])
    chosen = [i for i, name in enumerate(folder.names) if (name in tested) == (part == "test")]
    if not chosen:
        raise ValueError(f"{root}: got {len(folder)} images, of which split={split!r} has none. {advice}")
    return SegmentationFolder(
        tuple(folder.names[i] for i in chosen),
        tuple(folder.image_paths[i] for i in chosen),
        tuple(folder.label_paths[i] for i in chosen),
        folder.label_names,
        label_reader=folder.label_reader,
    )


def read_regions(path: Path, name: str) -> Int32[np.ndarray, "height width"]:
    r"""Reads a label map that is written out in text: a line for every row, numbers between blanks.

    Args:
        path: the file.
        name: the example's name, which is not needed.

    Returns:
        The labels, int32 `[H, W]`; every negative one is 255.

    Raises:
        ValueError: if the file is missing or does not hold a matrix of integers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "0000047.regions.txt"
        >>> _ = path.write_text("7 0\n-1 3\n")
        >>> read_regions(path, "0000047")
        array([[  7,   0],
               [255,   3]], dtype=int32)
    """
    del name
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line.strip()]
        labels = np.array(rows, np.str_).astype(np.int32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read as a matrix of integers ({error}); replace the file"
        ) from error
    if labels.ndim != 2:
        raise ValueError(f"{path}: got an empty file; expected one line of labels for every row")
    return np.where(labels < 0, 255, labels).astype(np.int32)


def _camvid_splits(root: Path) -> tuple[str, ...] | None:
    if not root.is_dir():
        return None
    return (
        tuple(
            sorted(
                path.name for path in root.iterdir() if all((path / p).is_dir() for p in ("images", "labels"))
            )
        )
        or None
    )


_FOLDS = (FULL, *(f"{part}_{fold}" for fold in range(1, _NUM_FOLDS + 1) for part in ("train", "test")))


def _stanford_splits(root: Path) -> tuple[str, ...] | None:
    if not (root / "images").is_dir() or not (root / "labels").is_dir():
        return None
    count = sum(1 for _ in (root / "labels").glob("*.regions.txt"))
    if count == 0:
        return None
    return _FOLDS if count >= _NUM_FOLDS else (FULL,)


CAMVID = Dataset("camvid", "CamVid", _CAMVID_LAYOUT, _CAMVID_SOURCE, camvid_folder, _camvid_splits)
STANFORD_BACKGROUND = Dataset(
    "stanford_background",
    "Stanford Background",
    _STANFORD_LAYOUT,
    _STANFORD_SOURCE,
    stanford_background_folder,
    _stanford_splits,
)

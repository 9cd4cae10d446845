"""The data sets by name, and the layout of a folder found out."""

from pathlib import Path

from jaxcrf.data.folders.base import Dataset, SegmentationFolder, check_folder, remedy
from jaxcrf.data.folders.coco import COCO
from jaxcrf.data.folders.generic import IMAGE_MASK
from jaxcrf.data.folders.pascal import PERSON_PART, VOC
from jaxcrf.data.folders.saliency import HKU_IS, MSRA10K, PASCAL_S
from jaxcrf.data.folders.scenes import CAMVID, STANFORD_BACKGROUND

# In the order in which a folder is tried: what few folders look like comes first.
_DATASETS = (
    VOC,
    PERSON_PART,
    STANFORD_BACKGROUND,
    PASCAL_S,
    HKU_IS,
    COCO,
    MSRA10K,
    CAMVID,
    IMAGE_MASK,
)


def datasets() -> dict[str, Dataset]:
    """The data sets that are known by name, each with its layout and where it can be had.

    Returns:
        Descriptions by name.

    Example:
        >>> sorted(datasets())  # doctest: +NORMALIZE_WHITESPACE
        ['camvid', 'coco_voc', 'hku_is', 'image_mask', 'msra10k', 'pascal_s', 'person_part',
         'stanford_background', 'voc2012']
        >>> datasets()["stanford_background"].layout
        'images/<name>.jpg and labels/<name>.regions.txt'
    """
    return {dataset.name: dataset for dataset in _DATASETS}


def find_dataset(name: str) -> Dataset:
    """A data set by its name.

    Args:
        name: one of `datasets()`.

    Returns:
        Its description.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> find_dataset("voc2012").title
        'VOC'
    """
    known = datasets()
    if name not in known:
        raise ValueError(f"dataset: got {name!r}; expected one of {', '.join(sorted(known))}")
    return known[name]


def open_folder(root: str | Path, split: str | None = None, dataset: str | None = None) -> SegmentationFolder:
    """Opens a data set in whichever known layout the folder has.

    A folder that has the layout of CamVid and a file `labels.txt` with names of labels is taken for
    anybody's `image_mask`.

    Args:
        root: a folder in the layout of one of `datasets()`.
        split: which part of the data set; None means `val`, or the only split where there is just one.
        dataset: the name of the data set; None finds it out from the layout.

    Returns:
        The examples.

    Raises:
        ValueError: if the folder has no known layout, or `split` is needed or missing.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("train/images", "train/labels"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "train/images/a.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "train/labels/a.png")
        >>> folder = open_folder(root)
        >>> len(folder), folder.num_labels
        (1, 11)
    """
    root = Path(root)
    if dataset is not None:
        found = find_dataset(dataset)
        check_folder(root, remedy(found.title, found.layout, found.source))
    else:
        known = "; ".join(f"{entry.title}: {entry.layout}" for entry in _DATASETS)
        sources = ". ".join(entry.source for entry in _DATASETS)
        check_folder(root, f"Known are {known}. {sources}.")
        recognised = next((entry for entry in _DATASETS if entry.find_splits(root) is not None), None)
        if recognised is None:
            raise ValueError(f"{root}: got a folder in no known layout. Known are {known}. {sources}.")
        found = recognised
        if found is CAMVID and (root / "labels.txt").is_file():
            found = IMAGE_MASK
    splits = found.find_splits(root) or ()
    if split is None:
        if "val" not in splits and len(splits) != 1:
            listed = ", ".join(splits) or "none"
            raise ValueError(f"{root}: got split=None, but there is no val; pass one of the splits: {listed}")
        split = "val" if "val" in splits else splits[0]
    return found.open(root, split)

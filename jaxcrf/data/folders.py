"""Data sets as folders on disk: lists of image and label files, read one at a time.

Two layouts are known, and `open_folder` tells them apart:

```
VOC       JPEGImages/<name>.jpg  SegmentationClass/<name>.png  ImageSets/Segmentation/<split>.txt
CamVid    <split>/images/<name>.jpg|png        <split>/labels/<name>.png
```
"""

import dataclasses
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Int32, UInt8

from jaxcrf.data.images import read_image, read_labels

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

_VOC_LAYOUT = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt"
_VOC_SOURCE = (
    "PASCAL VOC 2012 can be had from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ "
    "(the folder is VOCdevkit/VOC2012 inside the archive)"
)
_CAMVID_LAYOUT = "<split>/images/<name>.jpg or .png and <split>/labels/<name>.png with the same names"
_CAMVID_SOURCE = (
    "CamVid can be had from http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/; its 32 classes are "
    f"merged into 11 ({', '.join(CAMVID_LABEL_NAMES)}: 0 to 10), everything else is 255"
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

Example = tuple[UInt8[np.ndarray, "height width 3"], Int32[np.ndarray, "height width"]]


@dataclasses.dataclass(frozen=True)
class SegmentationFolder:
    """A data set on disk: a sequence of `(image, labels)` that is read as it is walked through.

    Nothing is kept in memory. An index gives one example, a slice a smaller folder, so that
    `folder[::3]` is every third image.

    Attributes:
        names: one per example, the files' name without folder and suffix.
        image_paths: the images, one per name.
        label_paths: the label maps, one per name.
        label_names: what the labels 0, 1, … stand for.
        ignore_label: the label of void pixels, which belong to no class.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "street.png")
        >>> Image.fromarray(np.full((4, 6), 1, np.uint8)).save(root / "street_labels.png")
        >>> folder = SegmentationFolder(
        ...     names=("street",),
        ...     image_paths=(root / "street.png",),
        ...     label_paths=(root / "street_labels.png",),
        ...     label_names=("road", "car"),
        ... )
        >>> [(image.shape, labels.shape, labels.max().item()) for image, labels in folder]
        [((4, 6, 3), (4, 6), 1)]
    """

    names: tuple[str, ...]
    image_paths: tuple[Path, ...]
    label_paths: tuple[Path, ...]
    label_names: tuple[str, ...]
    ignore_label: int = 255

    def __post_init__(self) -> None:
        counts = {field: len(getattr(self, field)) for field in ("names", "image_paths", "label_paths")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"SegmentationFolder: got {counts}; expected one of each per example")

    @property
    def num_labels(self) -> int:
        """How many labels there are, void not counted."""
        return len(self.label_names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Example]:
        return (self._read(i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "SegmentationFolder": ...
    def __getitem__(self, index: int | slice) -> "Example | SegmentationFolder":
        if isinstance(index, slice):
            return dataclasses.replace(
                self,
                names=self.names[index],
                image_paths=self.image_paths[index],
                label_paths=self.label_paths[index],
            )
        return self._read(operator.index(index))

    def _read(self, index: int) -> Example:
        image_path, label_path = self.image_paths[index], self.label_paths[index]
        image, labels = read_image(image_path), read_labels(label_path)
        if image.shape[:2] != labels.shape:
            raise ValueError(
                f"{label_path}: got a label map of shape {labels.shape} for an image of shape "
                f"{image.shape[:2]} ({image_path}); the two must be of one size"
            )
        strange = (labels != self.ignore_label) & ((labels < 0) | (labels >= self.num_labels))
        if strange.any():
            raise ValueError(
                f"{label_path}: got label {labels[strange][0]}; expected 0 to {self.num_labels - 1}, or "
                f"{self.ignore_label} for void pixels. Store indices of labels, not colours, and write void "
                f"as {self.ignore_label}."
            )
        return image, labels


def voc_folder(root: str | Path, split: str = "val") -> SegmentationFolder:
    """Opens a folder in the layout of PASCAL VOC: 21 labels, background included.

    Args:
        root: the folder that holds `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`.
        split: names `ImageSets/Segmentation/<split>.txt`, which lists one example per line.

    Returns:
        The examples, in the order of the list.

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
    """
    root = Path(root)
    remedy = f"The VOC layout is {_VOC_LAYOUT}. {_VOC_SOURCE}."
    _check_folder(root, remedy)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        _check_folder(root / part, remedy)
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        splits = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        raise ValueError(f"{listing}: no such file; the splits found there are: {splits}. {remedy}")
    names = tuple(line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{listing}: got an empty list; expected one name per line. {remedy}")
    images = tuple(root / "JPEGImages" / f"{name}.jpg" for name in names)
    labels = tuple(root / "SegmentationClass" / f"{name}.png" for name in names)
    for path in (*images, *labels):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though {listing} lists {path.stem!r}. {remedy}")
    return SegmentationFolder(names, images, labels, VOC_LABEL_NAMES)


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
    """
    root = Path(root)
    remedy = f"The CamVid layout is {_CAMVID_LAYOUT}. {_CAMVID_SOURCE}."
    _check_folder(root, remedy)
    if not (root / split).is_dir():
        splits = ", ".join(_camvid_splits(root)) or "none"
        raise ValueError(f"{root / split}: no such folder; the splits found there are: {splits}. {remedy}")
    for part in ("images", "labels"):
        _check_folder(root / split / part, remedy)
    images = tuple(
        sorted(
            (path for path in (root / split / "images").iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES),
            key=lambda path: path.stem,
        )
    )
    if not images:
        raise ValueError(f"{root / split / 'images'}: got a folder without images. {remedy}")
    labels = tuple(root / split / "labels" / f"{path.stem}.png" for path in images)
    for image, path in zip(images, labels, strict=True):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, the label map of {image}. {remedy}")
    return SegmentationFolder(tuple(path.stem for path in images), images, labels, CAMVID_LABEL_NAMES)


def open_folder(root: str | Path, split: str | None = None) -> SegmentationFolder:
    """Opens a data set in whichever known layout the folder has.

    Args:
        root: a folder in the layout of `voc_folder` or `camvid_folder`.
        split: which part of the data set; None means `val`, or the only split where there is just one.

    Returns:
        The examples.

    Raises:
        ValueError: if the folder has neither layout, or `split` is needed or missing.

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
    remedy = f"Known are VOC: {_VOC_LAYOUT}; and CamVid: {_CAMVID_LAYOUT}. {_VOC_SOURCE}. {_CAMVID_SOURCE}."
    _check_folder(root, remedy)
    if (root / "ImageSets" / "Segmentation").is_dir():
        splits = sorted(path.stem for path in (root / "ImageSets" / "Segmentation").glob("*.txt"))
        opener = voc_folder
    else:
        splits = _camvid_splits(root)
        opener = camvid_folder
        if not splits:
            raise ValueError(f"{root}: got a folder in no known layout. {remedy}")
    if split is None:
        if "val" not in splits and len(splits) != 1:
            found = ", ".join(splits) or "none"
            raise ValueError(f"{root}: got split=None, but there is no val; pass one of the splits: {found}")
        split = "val" if "val" in splits else splits[0]
    return opener(root, split)


def _camvid_splits(root: Path) -> list[str]:
    return sorted(
        path.name for path in root.iterdir() if all((path / p).is_dir() for p in ("images", "labels"))
    )


def _check_folder(path: Path, remedy: str) -> None:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. {remedy}")

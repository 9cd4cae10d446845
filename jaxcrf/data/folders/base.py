"""What all folders share: the sequence of examples, the description of a data set, and the checks of files."""

import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
from jaxtyping import Int32, UInt8

from jaxcrf.data.images import read_image, read_labels

Example = tuple[UInt8[np.ndarray, "height width 3"], Int32[np.ndarray, "height width"]]
LabelReader: TypeAlias = Callable[[Path, str], Int32[np.ndarray, "height width"]]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# The one split of data sets that have none of their own; "all" is taken by TFDS.
FULL = "full"


def read_label_file(path: Path, name: str) -> Int32[np.ndarray, "height width"]:
    """Reads a label map that is a file of its own, the pixels' values being the labels.

    Args:
        path: the file.
        name: the example's name, which is not needed.

    Returns:
        The labels, int32 `[H, W]`.

    Raises:
        ValueError: as `jaxcrf.data.read_labels`.

    Example:
        >>> import tempfile
        >>> from jaxcrf.data import write_labels
        >>> path = Path(tempfile.mkdtemp()) / "labels.png"
        >>> write_labels(path, np.array([[0, 1, 255]]))
        >>> read_label_file(path, "labels")
        array([[  0,   1, 255]], dtype=int32)
    """
    del name
    return read_labels(path)


@dataclasses.dataclass(frozen=True)
class SegmentationFolder:
    """A data set on disk: a sequence of `(image, labels)` that is read as it is walked through.

    Nothing is kept in memory. An index gives one example, a slice a smaller folder, so that
    `folder[::3]` is every third image.

    Attributes:
        names: one per example, the files' name without folder and suffix.
        image_paths: the images, one per name.
        label_paths: what the label maps are read from, one per name; None where there is no truth, as in
            test sets, and every pixel is then void.
        label_names: what the labels 0, 1, … stand for.
        ignore_label: the label of void pixels, which belong to no class.
        label_reader: gives the labels, int32 `[H, W]`, from a label path and the example's name. It travels
            to worker processes, so it can be pickled.

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
    label_paths: tuple[Path | None, ...]
    label_names: tuple[str, ...]
    ignore_label: int = 255
    label_reader: LabelReader = read_label_file

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
            return self.subset(range(len(self))[index])
        return self._read(operator.index(index))

    def subset(self, indices: Iterable[int]) -> "SegmentationFolder":
        """A folder of these examples, in this order."""
        chosen = tuple(indices)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            image_paths=tuple(self.image_paths[i] for i in chosen),
            label_paths=tuple(self.label_paths[i] for i in chosen),
        )

    def _read(self, index: int) -> Example:
        image_path, label_path = self.image_paths[index], self.label_paths[index]
        image = read_image(image_path)
        if label_path is None:
            return image, np.full(image.shape[:2], self.ignore_label, np.int32)
        labels = self.label_reader(label_path, self.names[index])
        if image.shape[:2] != labels.shape:
            raise ValueError(
                f"{label_path}: got a label map of shape {labels.shape} for an image of shape "
                f"{image.shape[:2]} ({image_path}); the two must be of one size"
            )
        # Without a sign, what is below zero is far above the largest label: one comparison for both ends.
        strange = (labels.view(np.uint32) >= self.num_labels) & (labels != self.ignore_label)
        if strange.any():
            raise ValueError(
                f"{label_path}: got label {labels[strange][0]}; expected 0 to {self.num_labels - 1}, or "
                f"{self.ignore_label} for void pixels. Store indices of labels, not colours, and write void "
                f"as {self.ignore_label}."
            )
        return image, labels


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set that is known by name: what it looks like on disk, where it comes from, how it is read.

    Attributes:
        name: what to call it by, as in `open_folder(root, dataset=name)`.
        title: what people call it.
        layout: the folders and files that are expected.
        source: where it can be had.
        open: gives the examples of a folder and a split.
        find_splits: the splits that a folder holds; None where the folder is not of this layout.
    """

    name: str
    title: str
    layout: str
    source: str
    open: Callable[[Path, str], SegmentationFolder]
    find_splits: Callable[[Path], tuple[str, ...] | None]


def remedy(title: str, layout: str, source: str) -> str:
    """The end of every message about a file that is missing: the layout, and where the data set can be had.

    Args:
        title: what people call the data set.
        layout: the folders and files that are expected.
        source: where it can be had.

    Returns:
        Two sentences.

    Example:
        >>> remedy("VOC", "JPEGImages/", "It can be had from its web page")
        'The VOC layout is JPEGImages/. It can be had from its web page.'
    """
    return f"The {title} layout is {layout}. {source}."


def check_folder(path: Path, advice: str) -> None:
    """Raises a `ValueError` with the advice unless the path is a folder."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. {advice}")


def check_split(root: Path, split: str, splits: Iterable[str], advice: str) -> None:
    """Raises a `ValueError` with the advice unless the split is among those of the folder."""
    splits = tuple(splits)
    if split not in splits:
        found = ", ".join(splits) or "none"
        raise ValueError(
            f"{root}: got split={split!r}; no such split, the splits found there are: {found}. {advice}"
        )


def images_in(path: Path, advice: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> tuple[Path, ...]:
    """The images of a folder, sorted by name.

    Args:
        path: the folder.
        advice: the end of the messages.
        suffixes: what files are images.

    Returns:
        At least one path; no two have the same stem.

    Raises:
        ValueError: if the folder is missing or has no images, or two of one name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp())
        >>> (path / "b.jpg").touch(), (path / "a.png").touch()
        (None, None)
        >>> [image.name for image in images_in(path, "")]
        ['a.png', 'b.jpg']
    """
    check_folder(path, advice)
    images = tuple(
        sorted((p for p in path.iterdir() if p.suffix.lower() in suffixes), key=lambda p: (p.stem, p.suffix))
    )
    if not images:
        raise ValueError(f"{path}: got a folder without images. {advice}")
    for first, second in itertools.pairwise(images):
        if first.stem == second.stem:
            raise ValueError(f"{path}: got both {first.name} and {second.name}; expected one image of a name")
    return images


def paired(
    images: tuple[Path, ...],
    label_path: Callable[[Path], Path],
    label_names: tuple[str, ...],
    advice: str,
    *,
    ignore_label: int = 255,
    label_reader: LabelReader = read_label_file,
) -> SegmentationFolder:
    """A folder of images, each of which has a label file.

    Args:
        images: the images.
        label_path: gives the label file of an image.
        label_names: what the labels 0, 1, … stand for.
        advice: the end of the message.
        ignore_label: the label of void pixels.
        label_reader: how label files are read.

    Returns:
        The examples, in the order of the images.

    Raises:
        ValueError: if a label file is missing.
    """
    labels = tuple(map(label_path, images))
    for image, path in zip(images, labels, strict=True):
        if not path.is_file():
            raise ValueError(f"{path}: no such file, the label map of {image}. {advice}")
    names = tuple(image.stem for image in images)
    return SegmentationFolder(names, images, labels, label_names, ignore_label, label_reader)


def hash_order(names: Iterable[str], seed: int) -> tuple[str, ...]:
    """Shuffles names in an order that depends on nothing but the names and the seed.

    They are sorted by the SHA-256 of `<seed>:<name>`, so that the order is the same on every machine and
    with every version of NumPy, and a name that is added or left out does not move the others.

    Args:
        names: in any order.
        seed: another seed is another order.

    Returns:
        The names, shuffled.

    Example:
        >>> hash_order(["a", "b", "c", "d"], seed=0), hash_order(["d", "b", "a"], seed=0)
        (('d', 'a', 'c', 'b'), ('d', 'a', 'b'))
    """
    return tuple(sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()))


def usual_order(splits: Iterable[str]) -> tuple[str, ...]:
    """The splits that do not overlap first: train, val and test, and then the others by name.

    Args:
        splits: in any order.

    Returns:
        The same, each once.

    Example:
        >>> usual_order(["train", "trainval", "test", "val"])
        ('train', 'val', 'test', 'trainval')
    """
    usual = {split: place for place, split in enumerate(("train", "val", "test"))}
    return tuple(sorted(set(splits), key=lambda split: (usual.get(split, len(usual)), split)))


def read_lines(path: Path, advice: str) -> tuple[str, ...]:
    """The lines of a list, without blank ones.

    Args:
        path: a text file in UTF-8.
        advice: the end of the messages.

    Returns:
        At least one line.

    Raises:
        ValueError: if the file is not text or has no lines.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "val.txt"
        >>> _ = path.write_text("2007_000033")
        >>> read_lines(path, "")
        ('2007_000033',)
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected a text file. {advice}") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{path}: got an empty list; expected one name per line. {advice}")
    return lines


def read_names(path: Path, advice: str) -> tuple[str, ...]:
    """The names in a list, one per line.

    Lines may also be an image's path and a label map's, as in the lists of the DeepLab authors; the name
    is then that of the image.

    Args:
        path: a text file.
        advice: the end of the messages.

    Returns:
        The names, in the list's order.

    Raises:
        ValueError: if the list cannot be read, is empty or has a name twice.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.txt"
        >>> _ = path.write_text("/JPEGImages/2007_000033.jpg /SegmentationClass/2007_000033.png")
        >>> read_names(path, "")
        ('2007_000033',)
    """
    names = []
    for line in read_lines(path, advice):
        entry = Path(line.split()[0])
        names.append(entry.stem if entry.suffix.lower() in IMAGE_SUFFIXES else entry.name)
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{path}: lists {twice!r} twice; expected every name once. {advice}")
    return tuple(names)

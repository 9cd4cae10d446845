"""Anybody's data set: a folder of images and a folder of label maps with the same names."""

from collections.abc import Sequence
from pathlib import Path

from jaxcrf.data.folders.base import (
    FULL,
    Dataset,
    SegmentationFolder,
    check_folder,
    check_split,
    images_in,
    paired,
    read_lines,
    remedy,
)

_LAYOUT = (
    "images/<name>.jpg or .png and masks/<name>.png (or labels/<name>.png) with the same names, either directly, "
    "or in <split>/images/ and <split>/masks/, or in images/<split>/ and masks/<split>/; and labels.txt with one "
    "label's name per line"
)
_SOURCE = (
    "It fits whatever you have: masks are PNGs whose pixel values are the labels 0, 1, …, and 255 where void"
)


def image_mask_folder(
    root: str | Path,
    split: str = FULL,
    *,
    label_names: Sequence[str] | None = None,
    ignore_label: int = 255,
) -> SegmentationFolder:
    """Opens a folder of images and a folder of label maps, whatever they show.

    Any of these, where `masks` may also be called `labels`:

    ```
    images/<name>.jpg|png            masks/<name>.png              the split is "full"
    <split>/images/<name>.jpg|png    <split>/masks/<name>.png
    images/<split>/<name>.jpg|png    masks/<split>/<name>.png
    ```

    Args:
        root: the folder that holds these.
        split: the name of a sub-folder, or `full` where there are none.
        label_names: what the labels 0, 1, … stand for; None reads them from `labels.txt` in the root, one per
            line.
        ignore_label: the label of void pixels.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder is missing or empty, an image has no label map, or there are no label names.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("images", "masks"):
        ...     (root / folder).mkdir()
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "images/leaf.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "masks/leaf.png")
        >>> folder = image_mask_folder(root, label_names=("healthy", "infected"))
        >>> folder.names, folder[0][1].max().item()
        (('leaf',), 1)
    """
    root = Path(root)
    advice = remedy("images-and-masks", _LAYOUT, _SOURCE)
    check_folder(root, advice)
    places = _places(root)
    if not places:
        check_folder(root / "images", advice)
        check_folder(root / "masks", advice)
    check_split(root, split, places, advice)
    if label_names is None:
        if not (root / "labels.txt").is_file():
            raise ValueError(
                f"{root / 'labels.txt'}: no such file, and no label names are given; write one name per line into it, "
                "that of label 0 first, or pass label_names"
            )
        label_names = read_lines(root / "labels.txt", advice)
    if isinstance(label_names, str) or not label_names:
        raise ValueError(f"label_names: got {label_names!r}; expected a sequence of at least one name")
    images, masks = places[split]
    return paired(
        images_in(images, advice),
        lambda image: masks / f"{image.stem}.png",
        tuple(label_names),
        advice,
        ignore_label=ignore_label,
    )


def _places(root: Path) -> dict[str, tuple[Path, Path]]:
    """Where the images and the masks of every split are."""
    found: dict[str, tuple[Path, Path]] = {}
    for masks in ("masks", "labels"):
        if (root / "images").is_dir() and (root / masks).is_dir():
            parts = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
            found |= {
                part: (root / "images" / part, root / masks / part)
                for part in parts
                if (root / masks / part).is_dir()
            }
            if not parts:
                found[FULL] = (root / "images", root / masks)
        if not found:
            found = {
                path.name: (path / "images", path / masks)
                for path in sorted(root.iterdir())
                if (path / "images").is_dir() and (path / masks).is_dir()
            }
        if found:
            break
    return found


def _splits(root: Path) -> tuple[str, ...] | None:
    return (tuple(_places(root)) or None) if root.is_dir() else None


IMAGE_MASK = Dataset("image_mask", "images-and-masks", _LAYOUT, _SOURCE, image_mask_folder, _splits)

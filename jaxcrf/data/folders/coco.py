"""MS COCO, its objects drawn as label maps with the labels of PASCAL VOC."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jaxcrf.data.folders.base import Dataset, SegmentationFolder, check_folder, check_split, remedy
from jaxcrf.data.folders.pascal import VOC_LABEL_NAMES

_LAYOUT = "annotations/instances_<split>.json and <split>/<name>.jpg or images/<split>/<name>.jpg"
_SOURCE = "MS COCO can be had from https://cocodataset.org/#download"
# COCO's names of VOC's classes, where they are not the same.
_RENAMED = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "dining table": "diningtable",
    "potted plant": "pottedplant",
    "couch": "sofa",
    "tv": "tvmonitor",
}
_VOID = 255


def coco_folder(root: str | Path, split: str = "val2017", *, min_pixels: int = 900) -> SegmentationFolder:
    """Opens a folder in the layout of MS COCO, with the 21 labels of PASCAL VOC.

    Objects of VOC's 20 classes are drawn into a label map; the other 60 classes are background. Where objects
    overlap, the one of fewer pixels wins, as it is as a rule the one in front, or on the table. Crowds, which
    are outlined together and coarsely, are void, except where a single object is drawn on them. Only images
    with more than `min_pixels` pixels of the 20 classes (crowds not counted) are taken.

    A split is opened in one pass over its annotations, which for `train2017` takes a minute or two and some
    gigabytes of memory while it lasts; `jaxcrf.data.prepare` does it once and for all.

    Args:
        root: the folder that holds `annotations`.
        split: names `annotations/instances_<split>.json`, such as `train2017` or `val2017`; `trainval2017` is
            both, and so for other years.
        min_pixels: how many labelled pixels are too few.

    Returns:
        The examples, sorted by name.

    Raises:
        ValueError: if a folder or file is missing or damaged, or no image has enough labelled pixels.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("annotations", "val2017"):
        ...     (root / folder).mkdir()
        >>> Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "val2017/000000000139.jpg")
        >>> contents = {
        ...     "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 40, "width": 60}],
        ...     "categories": [{"id": 5, "name": "airplane"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 139, "category_id": 5, "iscrowd": 0, "area": 1200,
        ...          "segmentation": [[10, 0, 40, 0, 40, 40, 10, 40]]}
        ...     ],
        ... }
        >>> _ = (root / "annotations/instances_val2017.json").write_text(json.dumps(contents))
        >>> folder = coco_folder(root)
        >>> np.bincount(folder[0][1].ravel()), folder.label_names[1]
        (array([1200, 1200]), 'aeroplane')

    References:
        Lin et al., *Microsoft COCO: Common Objects in Context*, 2014. More than 900 pixels: Yan et al., 2016
        (H-ReNet), section 4.2.
    """
    root = Path(root)
    advice = remedy("MS COCO", _LAYOUT, _SOURCE)
    check_folder(root, advice)
    check_folder(root / "annotations", advice)
    check_split(root, split, _splits(root) or (), advice)
    parts = [f"train{split[8:]}", f"val{split[8:]}"] if split.startswith("trainval") else [split]
    rows = []
    for part in parts:
        images = next((path for path in (root / part, root / "images" / part) if path.is_dir()), root / part)
        check_folder(images, advice)
        path = root / "annotations" / f"instances_{part}.json"
        rows += [(name, images / file, path, objects) for name, file, objects in _read(path, min_pixels)]
    if not rows:
        raise ValueError(
            f"{root}: got split={split!r}, none of whose images has more than {min_pixels} pixels of PASCAL VOC's "
            f"20 classes; expected at least one. {advice}"
        )
    rows.sort(key=lambda row: row[0])
    names, paths, annotations, objects = zip(*rows, strict=True)
    for image, path in zip(paths, annotations, strict=True):
        if not image.is_file():
            raise ValueError(f"{image}: no such file, though {path} lists it. {advice}")
    drawer = CocoLabels(dict(zip(names, objects, strict=True)))
    return SegmentationFolder(names, paths, annotations, VOC_LABEL_NAMES, _VOID, drawer)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CocoLabels:
    """Draws the label maps of COCO's images.

    Attributes:
        objects: for every image's name what is in it, as JSON: height, width and the objects, each a label,
            whether it is a crowd, and its outline. As text it takes a tenth of the memory, and travels fast
            to worker processes.
    """

    objects: dict[str, bytes]

    def __call__(self, path: Path, name: str) -> Int32[np.ndarray, "height width"]:
        """Draws one.

        Args:
            path: the file that the objects are from, for messages.
            name: the image's name.

        Returns:
            The labels, int32 `[H, W]`.

        Raises:
            ValueError: if an outline is malformed.
        """
        height, width, objects = json.loads(self.objects[name])
        drawn = []
        for label, crowd, segmentation in objects:
            mask = _mask(segmentation, height, width, path, name)
            drawn.append((not crowd, -np.count_nonzero(mask), _VOID if crowd else label, mask))
        labels = np.zeros((height, width), np.int32)
        # Crowds first, then large before small. The sort is stable, so that it is the file's order that decides ties.
        for _, _, label, mask in sorted(drawn, key=lambda entry: entry[:2]):
            labels[mask] = label
        return labels


def polygon_mask(
    polygons: Iterable[Iterable[float]], height: int, width: int
) -> Bool[np.ndarray, "height width"]:
    """The pixels whose centre lies in a polygon.

    The centre of pixel `[y, x]` is at (x + ½, y + ½). Inside is by the even-odd rule, within each polygon;
    several are joined. A centre exactly on an outline belongs to what is right of or below it, so that two
    polygons with a common edge neither overlap nor leave a gap.

    Args:
        polygons: each a flat list x₀, y₀, x₁, y₁, … of at least three corners, in pixels.
        height: of the image.
        width: of the image.

    Returns:
        A mask `[H, W]`.

    Raises:
        ValueError: if a polygon is not that.

    Example:
        >>> polygon_mask([[1, 0, 3, 0, 3, 2, 1, 2]], 3, 4).astype(int)
        array([[0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]])
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
            raise ValueError(
                f"polygons: got one of shape {corners.shape}; expected x and y of at least three corners"
            )
        x, y = corners.reshape(-1, 2).T
        x_next, y_next = np.roll(x, -1), np.roll(y, -1)
        # The rows whose centre line an edge crosses, and where.
        first = np.clip(np.ceil(np.minimum(y, y_next) - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y, y_next) - 0.5), 0, height).astype(np.int64)
        edge = np.repeat(np.arange(x.size), last - first)
        if edge.size == 0:
            continue
        row = np.arange(edge.size) - np.repeat(np.cumsum(last - first) - last, last - first)
        slope = (x_next - x)[edge] / (y_next - y)[edge]
        crossing = x[edge] + (row + 0.5 - y[edge]) * slope
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        # A pixel is inside if an odd number of edges lies left of its centre.
        top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max()
        shape = (bottom - top, right - left + 1)
        crossed = np.bincount((row - top) * shape[1] + column - left, minlength=shape[0] * shape[1])
        inside = np.cumsum(crossed.reshape(shape), axis=1) % 2 == 1
        mask[top:bottom, left:right] |= inside[:, :-1]
    return mask


def run_length_mask(counts: str | list[int], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The mask that run lengths describe, column by column, beginning with the pixels outside.

    Args:
        counts: the runs' lengths; or, compressed, a text in which each is written with five bits a
            character, lowest first, and from the third on as the difference to the one two before.
        height: of the image.
        width: of the image.

    Returns:
        A mask `[H, W]`.

    Raises:
        ValueError: if the lengths are malformed or do not add up to the image's pixels.

    Example:
        >>> run_length_mask([1, 2, 3], 2, 3).astype(int)
        array([[0, 1, 0],
               [1, 0, 0]])
        >>> run_length_mask("123", 2, 3).astype(int)  # the same, compressed
        array([[0, 1, 0],
               [1, 0, 0]])

    References:
        Lin et al., the COCO API, whose format this is.
    """
    runs = np.asarray(_decompressed(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu") or (runs < 0).any():
        raise ValueError("counts: got something else than run lengths; expected integers of at least 0")
    if runs.sum() != height * width:
        raise ValueError(
            f"counts: got runs of {int(runs.sum())} pixels in all; expected {height} x {width} = {height * width}"
        )
    inside = np.arange(runs.size) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def _decompressed(text: str) -> list[int]:
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"counts: got character {character!r}, which no run length is written with")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more to come
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("counts: got a text that ends within a number; it may be truncated")
    return runs


def _mask(
    segmentation: Any, height: int, width: int, path: Path, name: str
) -> Bool[np.ndarray, "height width"]:
    try:
        if isinstance(segmentation, list):
            return polygon_mask(segmentation, height, width)
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(
                f"size: got {segmentation['size']}; expected that of the image, [{height}, {width}]"
            )
        return run_length_mask(segmentation["counts"], height, width)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: has a malformed segmentation of image {name!r} ({error})") from error


def _read(path: Path, min_pixels: int) -> list[tuple[str, str, bytes]]:
    """Name, file name and objects of the images with enough labelled pixels."""
    try:
        contents = json.loads(path.read_bytes())
        label_of = {
            category["id"]: VOC_LABEL_NAMES.index(name)
            for category in contents["categories"]
            if (name := _RENAMED.get(category["name"], category["name"])) in VOC_LABEL_NAMES[1:]
        }
        by_image: dict[Any, list[tuple[float, list]]] = {}
        for entry in contents["annotations"]:
            if entry["category_id"] in label_of:
                label, crowd = label_of[entry["category_id"]], bool(entry.get("iscrowd", 0))
                drawn = [label, crowd, entry["segmentation"]]
                by_image.setdefault(entry["image_id"], []).append((entry.get("area", 0), drawn))
        images = [
            (Path(image["file_name"]).stem, image["file_name"], image["height"], image["width"], image["id"])
            for image in contents["images"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is not a file of COCO's instances ({type(error).__name__}: {error}); it may be truncated or "
            "damaged, so replace it"
        ) from error
    rows = []
    for name, file, height, width, key in images:
        objects = by_image.get(key, [])
        covered = np.zeros((height, width), bool)
        # Largest first: the first one nearly always settles it.
        for _, (_, crowd, segmentation) in sorted(objects, key=lambda entry: -entry[0]):
            if not crowd:
                covered |= _mask(segmentation, height, width, path, name)
                if np.count_nonzero(covered) > min_pixels:
                    drawn = [height, width, [entry for _, entry in objects]]
                    rows.append((name, file, json.dumps(drawn, separators=(",", ":")).encode()))
                    break
    return rows


def _splits(root: Path) -> tuple[str, ...] | None:
    if not (root / "annotations").is_dir():
        return None
    listed = sorted(
        path.stem.removeprefix("instances_") for path in (root / "annotations").glob("instances_*.json")
    )
    if not listed:
        return None
    found = [split for split in listed if any((root / p / split).is_dir() for p in (".", "images"))]
    years = (split.removeprefix("train") for split in found if split.startswith("train"))
    return tuple(found) + tuple(f"trainval{year}" for year in years if f"val{year}" in found)


COCO = Dataset("coco_voc", "MS COCO", _LAYOUT, _SOURCE, coco_folder, _splits)

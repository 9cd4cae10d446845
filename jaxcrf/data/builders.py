"""TFDS builders of all data sets, on top of the folders that read their layouts.

One builder serves them all: what there is to know about a data set, its folder knows. Files that are what is
wanted are copied as they are, byte for byte; annotations of other kinds (text, `.mat`, outlines, masks in shades
of gray) become PNGs. No TensorFlow is needed, neither to write nor to read.
"""

import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxcrf.data.folders.base import SegmentationFolder, check_folder, read_label_file, remedy
from jaxcrf.data.folders.pascal import read_pascal_labels
from jaxcrf.data.folders.registry import find_dataset
from jaxcrf.data.images import voc_palette

try:
    import tensorflow_datasets as tfds
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "prepared data sets need TensorFlow Datasets: pip install 'jaxcrf[train]'", name="tensorflow_datasets"
    ) from error

VERSION = "1.0.0"

# Files of a size that is easily copied, each of which one process can read from.
_SHARD_BYTES = 256 * 2**20


class SegmentationBuilder(
    tfds.core.ShardBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg, unused-ignore]
):
    """Writes a data set that is known by name to array records, with TFDS.

    Every image is stored once, though splits overlap. A split is written under its own name if none of its
    images is in an earlier one; of a split that is partly stored already the rest is written, as
    `<split>_rest`; and `metadata.json` says what every split consists of. Records keep the order that they
    have in the folder.

    It derives from the builder that writes shard by shard. The other one, `GeneratorBasedBuilder`, sorts all
    records first, in files that only TensorFlow opens if they are more than a gigabyte.

    Args:
        dataset: the name of the data set, one of `jaxcrf.data.datasets()`.
        root: the folder with the data set in its official layout.
        data_dir: where prepared data sets are; this one will be in `<data_dir>/<dataset>/<version>`.

    Raises:
        ValueError: if the folder is not of the data set's layout, a file is missing, or there are no splits.

    Example:
        >>> import tempfile
        >>> root, data_dir = Path(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> for folder in ("val/images", "val/labels"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "val/images/0016E5_07959.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "val/labels/0016E5_07959.png")
        >>> builder = SegmentationBuilder(dataset="camvid", root=root, data_dir=data_dir)
        >>> import contextlib
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     builder.download_and_prepare()
        >>> record = builder.as_data_source("val")[0]
        >>> record["name"], record["image"].shape, record["labels"].shape
        (b'0016E5_07959', (4, 6, 3), (4, 6, 1))
    """

    VERSION = tfds.core.Version(VERSION)
    # There is nothing to download. Left to itself, TFDS looks for a list of checksums, with a package that it does
    # not ask for on Python 3.9 and later.
    url_infos = None

    def __init__(self, *, dataset: str, root: str | Path, data_dir: str | Path):
        known = find_dataset(dataset)
        root = Path(root)
        advice = remedy(known.title, known.layout, known.source)
        check_folder(root, advice)
        splits = known.find_splits(root)
        if not splits:
            raise ValueError(f"{root}: got a folder without any split. {advice}")
        self.name = dataset
        self.folders = {split: known.open(root, split) for split in splits}
        self.parts = _disjoint_parts(self.folders)
        self.on_example: Callable[[], None] = lambda: None
        super().__init__(data_dir=str(data_dir), file_format="array_record")
        # What the base class pickles and calls again.
        self._original_state = {"dataset": dataset, "root": root, "data_dir": data_dir}

    def _info(self) -> Any:
        folder = next(iter(self.folders.values()))
        known = find_dataset(self.name)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{known.title}: images and their label maps. {known.source}.",
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(doc="the file's name"),
                    "image": tfds.features.Image(doc="the image, as it came"),
                    # Of one channel, so that a palette's indices are not looked up.
                    "labels": tfds.features.Image(
                        shape=(None, None, 1), doc="a PNG of labels; nothing where there is no truth"
                    ),
                }
            ),
            metadata=tfds.core.MetadataDict(
                label_names=list(folder.label_names),
                ignore_label=folder.ignore_label,
                splits={split: list(folder.names) for split, folder in self.folders.items()},
                records={part: list(folder.names) for part, folder in self.parts.items()},
            ),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator]]]:
        del dl_manager
        shards: dict[str, list[Callable[[], Iterator]]] = {}
        for part, folder in self.parts.items():
            size = sum(path.stat().st_size for path in folder.image_paths)
            count = min(max(1, math.ceil(size / _SHARD_BYTES)), len(folder))
            bounds = [round(i * len(folder) / count) for i in range(count + 1)]
            shards[part] = [
                functools.partial(self._examples, folder[start:stop])
                for start, stop in itertools.pairwise(bounds)
            ]
        return shards

    def _examples(self, folder: SegmentationFolder) -> Iterator[tuple[str, dict[str, Any]]]:
        # All are read, so that what is prepared is known to be whole.
        for i, (_, labels) in enumerate(folder):
            label_path = folder.label_paths[i]
            stored: Path | bytes
            if label_path is None:
                stored = b""
            elif _is_label_file(folder, label_path):
                stored = label_path
            else:
                stored = _png(labels)
            self.on_example()
            yield (
                folder.names[i],
                {"name": folder.names[i], "image": folder.image_paths[i], "labels": stored},
            )


def _is_label_file(folder: SegmentationFolder, path: Path) -> bool:
    reader = folder.label_reader
    return reader is read_label_file or (reader is read_pascal_labels and path.suffix == ".png")


def _png(labels: np.ndarray) -> bytes:
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _disjoint_parts(folders: dict[str, SegmentationFolder]) -> dict[str, SegmentationFolder]:
    """What is to be stored so that every example is, once."""
    parts: dict[str, SegmentationFolder] = {}
    stored: dict[str, tuple[Path, Path | None]] = {}
    for split, folder in folders.items():
        files = list(zip(folder.names, folder.image_paths, folder.label_paths, strict=True))
        for name, image, label in files:
            if stored.get(name, (image, label)) != (image, label):
                raise ValueError(
                    f"{image}: has the name {name!r} that {stored[name][0]} has, or another label map than in another "
                    "split; expected one example of a name. Rename one of them."
                )
        new = [entry for entry in files if entry[0] not in stored]
        if not new:
            continue
        names, images, labels = zip(*new, strict=True)
        part = SegmentationFolder(
            names, images, labels, folder.label_names, folder.ignore_label, folder.label_reader
        )
        parts[split if len(new) == len(files) else f"{split}_rest"] = part
        stored |= {name: (image, label) for name, image, label in new}
    return parts

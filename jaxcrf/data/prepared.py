"""Data sets prepared once, as a few large files of records, instead of very many small ones in folders.

`prepare` writes a data set with TFDS, `load` opens a split of it, and what it gives is the same sequence of
`(image, labels)` that the folder gives.
"""

import contextlib
import dataclasses
import functools
import io
import json
import operator
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np

from jaxcrf.data.folders.base import Example
from jaxcrf.data.folders.registry import find_dataset
from jaxcrf.data.images import EncodedFile, read_image, read_labels


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A split of a prepared data set: a sequence of `(image, labels)`, as `SegmentationFolder` is one.

    Nothing is kept in memory. An index gives one example, a slice a smaller data set. `load` makes them.

    Attributes:
        directory: where the records are.
        names: one per example.
        records: where every example is: the part of the data set and the index in it.
        label_names: what the labels 0, 1, … stand for.
        ignore_label: the label of void pixels, which belong to no class.
    """

    directory: Path
    names: tuple[str, ...]
    records: tuple[tuple[str, int], ...]
    label_names: tuple[str, ...]
    ignore_label: int = 255

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
    def __getitem__(self, index: slice) -> "PreparedDataset": ...
    def __getitem__(self, index: int | slice) -> "Example | PreparedDataset":
        if isinstance(index, slice):
            return dataclasses.replace(self, names=self.names[index], records=self.records[index])
        return self._read(operator.index(index))

    def _read(self, index: int) -> Example:
        part, position = self.records[index]
        record = _open_records(self.directory, part)[position]
        where = f"{self.directory}, example {self.names[index]!r}"
        image = read_image(EncodedFile(f"{where}, image", record["image"]))
        if not record["labels"]:
            return image, np.full(image.shape[:2], self.ignore_label, np.int32)
        return image, read_labels(EncodedFile(f"{where}, labels", record["labels"]))


def prepare(
    dataset: str,
    root: str | Path,
    data_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Prepares all splits of a data set: reads, checks and stores every example, once.

    The data set takes its place under `<data_dir>/<dataset>` only when it is whole: one that was interrupted is
    as if it had never begun (a process that was killed leaves a folder `.<dataset>-….partial`, to be deleted).
    One that is there already is left as it is, whatever `root` is.

    Args:
        dataset: the name of the data set, one of `jaxcrf.data.datasets()`.
        root: the folder with the data set in its official layout.
        data_dir: where prepared data sets are to be.
        overwrite: prepare it again, and then replace what is there.
        progress: draw a progress bar on the standard error stream.

    Returns:
        How many examples every split has.

    Raises:
        ValueError: if anything is missing or malformed, in the folder or in what is there already.
        OSError: if the disk is full or cannot be written to.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root, data_dir = Path(tempfile.mkdtemp()), tempfile.mkdtemp()
        >>> for folder in ("val/images", "val/labels"):
        ...     (root / folder).mkdir(parents=True)
        >>> Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "val/images/0016E5_07959.jpg")
        >>> Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "val/labels/0016E5_07959.png")
        >>> prepare("camvid", root, data_dir, progress=False)
        {'val': 1}
        >>> load("camvid", "val", data_dir)[0][1].max().item()
        1
    """
    directory = _directory(dataset, data_dir)
    if not directory.exists() or overwrite:
        _write(dataset, Path(root), directory, progress)
    return {split: len(names) for split, names in _metadata(directory, dataset)["splits"].items()}


def load(dataset: str, split: str, data_dir: str | Path) -> PreparedDataset:
    """Opens a split of a data set that `prepare` has stored.

    Args:
        dataset: the name of the data set.
        split: as in the data set's folder.
        data_dir: where prepared data sets are.

    Returns:
        The examples, in the order that they have in the folder.

    Raises:
        ValueError: if the data set is not there, or not whole, or has no such split.

    Example: see `prepare`.
    """
    directory = _directory(dataset, data_dir)
    metadata = _metadata(directory, dataset)
    if split not in metadata["splits"]:
        raise ValueError(f"split: got {split!r}; {directory} has {', '.join(metadata['splits'])}")
    where = {name: (part, i) for part, names in metadata["records"].items() for i, name in enumerate(names)}
    names = tuple(metadata["splits"][split])
    return PreparedDataset(
        directory,
        names,
        tuple(where[name] for name in names),
        tuple(metadata["label_names"]),
        metadata["ignore_label"],
    )


def _directory(dataset: str, data_dir: str | Path) -> Path:
    from jaxcrf.data.builders import VERSION

    return Path(data_dir).expanduser() / find_dataset(dataset).name / VERSION


def _write(dataset: str, root: Path, directory: Path, progress: bool) -> None:
    """Prepares elsewhere on the same disk, and moves it into place in one step."""
    from tensorflow_datasets import download

    from jaxcrf.data.builders import SegmentationBuilder

    data_dir = directory.parent.parent
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dataset}-", suffix=".partial", dir=data_dir) as staging:
        builder = SegmentationBuilder(dataset=dataset, root=root, data_dir=staging)
        count = sum(len(folder) for folder in builder.parts.values())
        # TFDS prints that it downloads, which it does not.
        quiet = contextlib.redirect_stdout(io.StringIO())
        try:
            with _progress_bar(progress, dataset, count) as builder.on_example, quiet:
                builder.download_and_prepare(
                    download_dir=Path(staging) / "downloads",
                    download_config=download.DownloadConfig(try_download_gcs=False),
                )
        # What the writer of records raises, for example when the disk is full.
        except RuntimeError as error:
            raise OSError(f"{directory}: cannot be written, and is left as it was ({error})") from error
        directory.parent.mkdir(exist_ok=True)
        replaced = Path(staging) / "replaced"
        if directory.exists():
            directory.rename(replaced)
        try:
            Path(builder.data_dir).rename(directory)
        except OSError:
            # Another process may have been faster.
            if not directory.exists():
                if replaced.exists():
                    replaced.rename(directory)
                raise
    _open_records.cache_clear()


@functools.lru_cache(maxsize=64)
def _open_records(directory: Path, part: str) -> Any:
    import tensorflow_datasets as tfds

    as_stored = tfds.decode.SkipDecoding()
    return tfds.builder_from_directory(directory).as_data_source(
        part, decoders={"image": as_stored, "labels": as_stored}
    )


def _metadata(directory: Path, dataset: str) -> dict[str, Any]:
    """What `metadata.json` says, once it is certain that the records are all there."""
    prepare_it = f"jaxcrf.data.prepare({dataset!r}, root, {str(directory.parent.parent)!r})"
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder, so the data set is not prepared; call {prepare_it}")
    again = f"Prepare it again: {prepare_it[:-1]}, overwrite=True)"
    try:
        metadata = json.loads((directory / "metadata.json").read_bytes())
        info = json.loads((directory / "dataset_info.json").read_bytes())
        lengths = {part["name"]: sum(map(int, part["shardLengths"])) for part in info["splits"]}
        sizes = {part["name"]: int(part["numBytes"]) for part in info["splits"]}
        expected = {part: len(names) for part, names in metadata["records"].items()}
        (directory / "features.json").stat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: is no whole prepared data set ({error!r}). {again}") from error
    if lengths != expected:
        raise ValueError(f"{directory}: has {lengths} records, but {expected} were written. {again}")
    for part, size in sizes.items():
        files = list(directory.glob(f"{dataset}-{part}.array_record-*"))
        found = sum(file.stat().st_size for file in files)
        if found != size:
            raise ValueError(
                f"{directory / f'{dataset}-{part}.array_record-*'}: got {len(files)} files of {found} bytes together; "
                f"expected {size} bytes. {again}"
            )
    return metadata


@contextlib.contextmanager
def _progress_bar(shown: bool, title: str, total: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)

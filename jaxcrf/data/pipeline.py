"""The input pipeline: batches of a data set, shuffled, augmented and of one shape, as a function of the step."""

import dataclasses
import os
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from jaxcrf._checks import is_whole
from jaxcrf.data.augmentation import (
    Augmentation,
    Outside,
    Padding,
    Size,
    check_example,
    check_padding,
    checked_fill,
    checked_size,
    place,
)

Batch = dict[str, np.ndarray]

# How many freed megabytes of pictures Pillow keeps for the next ones. It keeps none by itself, and asking the
# system for fresh memory takes as long as decoding does.
_PILLOW_BLOCKS = 16

# Grain counts batches in floating point, which is exact up to here; its own endless repetition overflows.
_ENDLESS = 2**52


class Source(Protocol):
    """A sequence of examples: image, uint8 `[H, W, 3]`, and labels, int32 `[H, W]`."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """One of them."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of a data set, for training without end and for evaluation once through.

    **A position in the data is the number of a step**, and that is all there is to save and restore. Batch `s` of
    `batches` holds the examples `s B … (s + 1) B - 1` of one endless sequence: epoch after epoch of the source, each
    in a new order, where the draws of every example's augmentation are tied to its place in the sequence. So a batch
    is the same whatever step the run was started from, and with any number of workers, threads and processes; of `P`
    processes, process `p` gets rows `p B / P … (p + 1) B / P - 1` of each batch. (The orders are those of the
    installed Grain; another version of it may have others.)

    A batch is a dictionary of NumPy arrays: `"image"`, uint8 `[B, H, W, 3]`, and `"labels"`, int32 `[B, H, W]`.

    Threads are enough on a few cores, since decoding and resampling run outside of Python's lock. On many cores, or
    with sources that spend their time in Python, `num_workers` processes help. Each takes a second of a core to start:
    it imports Grain and JAX, but leaves accelerators alone. The script that starts them must do so under
    `if __name__ == "__main__":`, the source must be picklable, and batches come back through shared memory, of which a
    container needs `2 num_workers + 2` batches' worth.

    Attributes:
        source: a sequence of `(image, labels)`, such as `SegmentationFolder`.
        batch_size: `B`, examples per step over all processes together.
        size: height and width of every example. Smaller images are padded at the bottom and on the right; larger
            ones are cropped at a random place for training, and an error in evaluation. None takes images as they
            are, which must then be of one size.
        seed: another seed gives another order and other draws.
        shuffle: whether each epoch of `batches` has an order of its own; `epoch` never does.
        augmentation: what `batches` does to the examples; None leaves them as they are but for `size`.
        num_workers: processes that prepare batches; 0 does so in this one.
        num_threads: threads in each of these processes; 0 means none, so that without workers nothing is prepared
            ahead.
        prefetch: batches that each process keeps ready, at least one for every thread to be busy.
        ignore_label: the label of padding; that of the source, if it says one.
        padding: what shows in images where they are padded: "constant" (`fill`) or "reflect" (the image mirrored).
            Labels are `ignore_label` there either way. None means the augmentation's, or else "constant".
        fill: the colour of constant padding; None means the augmentation's, or else the mean colour of ImageNet.

    Raises:
        ValueError: if a field is out of its range, or the source is empty.

    Example:
        >>> import numpy as np
        >>> source = [(np.full((4, 6, 3), i, np.uint8), np.full((4, 6), i, np.int32)) for i in range(5)]
        >>> pipeline = Pipeline(source, batch_size=2, size=(4, 8), seed=1)
        >>> with pipeline.batches() as batches:
        ...     first, second, third = (next(batches)["labels"] for _ in range(3))
        >>> first.shape, sorted(np.concatenate([first, second, third])[:5, 0, 0].tolist())
        ((2, 4, 8), [0, 1, 2, 3, 4])
        >>> with pipeline.batches(start_step=2) as batches:
        ...     bool((next(batches)["labels"] == third).all())
        True
        >>> with pipeline.epoch() as batches:
        ...     [batch["labels"][:, 0, 0].tolist() for batch in batches]
        [[0, 1], [2, 3], [4, 255]]
    """

    source: Source
    batch_size: int
    size: Size | None = None
    seed: int = 0
    shuffle: bool = True
    augmentation: Augmentation | None = None
    num_workers: int = 0
    num_threads: int = 4
    prefetch: int = 2
    ignore_label: int = 255
    padding: Padding | None = None
    fill: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not len(self.source):
            raise ValueError("source: got a data set without examples; check its folder and its split")
        least = {"batch_size": 1, "seed": 0, "num_workers": 0, "num_threads": 0, "prefetch": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not is_whole(value) or value < bound:
                raise ValueError(f"{name}: got {value!r}; expected a whole number >= {bound}")
        if self.size is not None:
            object.__setattr__(self, "size", checked_size(self.size))
        theirs = getattr(self.source, "ignore_label", self.ignore_label)
        if theirs != self.ignore_label:
            raise ValueError(
                f"ignore_label: got {self.ignore_label}, but void is {theirs} in the source; pass "
                f"ignore_label={theirs}"
            )
        if self.augmentation is not None and not isinstance(self.augmentation, Augmentation):
            raise TypeError(
                f"augmentation: got {self.augmentation!r}; expected an Augmentation or None. By name: "
                "jaxcrf.data.augmentation.get('convcrf')"
            )
        changes: dict[str, Any] = {}
        if self.padding is not None:
            check_padding(self.padding)
            changes["padding"] = self.padding
        if self.fill is not None:
            changes["fill"] = checked_fill(self.fill)
        if self.augmentation is not None and changes:
            object.__setattr__(self, "augmentation", dataclasses.replace(self.augmentation, **changes))

    @property
    def steps_per_epoch(self) -> int:
        """How many batches hold every example once; the last of them may not be full."""
        return -(-len(self.source) // self.batch_size)

    def batches(
        self, start_step: int = 0, *, process_index: int | None = None, process_count: int | None = None
    ) -> "Batches":
        """Batches for training, without end.

        Args:
            start_step: the number of the first batch.
            process_index: which part of each batch to take; None means `jax.process_index()`.
            process_count: how many parts there are; None means `jax.process_count()`.

        Returns:
            An iterator over batches of `batch_size / process_count` examples; close it, or use it in a `with`
            statement.

        Raises:
            ValueError: if an argument is out of its range, and from the iterator what the source raises.

        Example:
            >>> import numpy as np
            >>> source = [(np.full((1, 1, 3), i, np.uint8), np.full((1, 1), i, np.int32)) for i in range(5)]
            >>> pipeline = Pipeline(source, batch_size=2, shuffle=False)
            >>> with pipeline.batches(start_step=2, process_index=1, process_count=2) as batches:
            ...     [next(batches)["labels"].item() for _ in range(3)]
            [0, 2, 4]
        """
        if not is_whole(start_step) or start_step < 0:
            raise ValueError(f"start_step: got {start_step!r}; expected a whole number >= 0")
        index, count = self._part(process_index, process_count)
        import grain

        # Grain counts epochs by adding to the seed: unhashed, seed 1 would start with the second epoch of seed 0.
        order, draws = (int(word) for word in np.random.SeedSequence(self.seed).generate_state(2))
        examples = grain.MapDataset.source(_Examples(self.source))
        if self.shuffle:
            examples = examples.shuffle(seed=order)
        epochs = max(1, _ENDLESS // len(self.source))
        examples = examples.random_map(self._training(), seed=draws).repeat(epochs)
        return self._iterate(examples, start_step * count + index, count, start_step)

    def epoch(self, *, process_index: int | None = None, process_count: int | None = None) -> "Batches":
        """Every example once and in order, as it is but for padding: batches for evaluation.

        The last batch is filled up with images without content, whose labels are all `ignore_label`, so that all
        batches have one shape, and all processes as many of them.

        Args:
            process_index: which part of each batch to take; None means `jax.process_index()`.
            process_count: how many parts there are; None means `jax.process_count()`.

        Returns:
            An iterator over `steps_per_epoch` batches of `batch_size / process_count` examples.

        Raises:
            ValueError: if an argument is out of its range, and from the iterator what the source raises, or if an
                image is larger than `size`.

        Example:
            >>> import numpy as np
            >>> source = [(np.full((1, 1, 3), i, np.uint8), np.full((1, 1), i, np.int32)) for i in range(3)]
            >>> for index in range(2):
            ...     with Pipeline(source, batch_size=2).epoch(process_index=index, process_count=2) as batches:
            ...         print([batch["labels"].item() for batch in batches])
            [0, 2]
            [1, 255]
        """
        index, count = self._part(process_index, process_count)
        import grain

        total = self.steps_per_epoch * self.batch_size
        examples = grain.MapDataset.source(_Examples(self.source, total)).map(self._evaluation())
        return self._iterate(examples, index, count, 0)

    def _part(self, process_index: int | None, process_count: int | None) -> tuple[int, int]:
        if (process_index is None) != (process_count is None):
            raise ValueError(
                f"process_index: got {process_index} with process_count={process_count}; pass both or none"
            )
        if process_index is None or process_count is None:
            import jax

            process_index, process_count = jax.process_index(), jax.process_count()
        if not is_whole(process_count) or process_count < 1 or self.batch_size % process_count:
            raise ValueError(
                f"process_count: got {process_count!r} for batch_size={self.batch_size}, which every process takes "
                "an equal part of; choose a multiple as batch_size"
            )
        if not is_whole(process_index) or not 0 <= process_index < process_count:
            raise ValueError(f"process_index: got {process_index!r}; expected 0 to {process_count - 1}")
        return process_index, process_count

    def _iterate(self, examples: Any, start: int, stride: int, step: int) -> "Batches":
        import grain

        _keep_pictures_memory()
        # Grain divides what is batched here among the workers, whole batches in turn: nothing then depends on how
        # many there are, and stacking is not left to this process, which has a model to feed.
        parts = examples.batch(self.batch_size // stride, batch_fn=_stack)[start::stride]
        ahead = self.prefetch if self.num_threads else 0
        iterator = parts.to_iter_dataset(
            grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=max(ahead, self.num_threads))
        )
        if self.num_workers:
            from absl import flags

            # Grain reads its flags, which outside of an absl application nobody has parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # What is kept ready waits in the workers, not in shared memory.
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=1)
            iterator = iterator.mp_prefetch(options, worker_init_fn=_start_worker)
        return Batches(iter(iterator), step, shared=self.num_workers > 0)

    def _outside(self) -> Outside:
        usual = self.augmentation or Outside()
        return Outside(self.padding or usual.padding, self.fill or usual.fill, self.ignore_label)

    def _training(self) -> "_Training":
        return _Training(self.size, self.augmentation, self._outside())

    def _evaluation(self) -> "_Evaluation":
        shape = self.size
        if shape is None and len(self.source) % self.batch_size:
            shape = np.shape(self.source[len(self.source) - 1][1])
        return _Evaluation(self.size, shape, self._outside())


class Batches(Iterator[Batch]):
    """An iterator over a pipeline's batches, with threads and processes that end when it is closed.

    Closing happens at the end of a `with` statement, when the batches are used up, on an error, and at the latest
    when nothing refers to the iterator any more.

    Attributes:
        step: the number of the batch that comes next: what a checkpoint needs to know.
    """

    def __init__(self, iterator: Any, step: int, *, shared: bool = False):
        self.step = step
        # At the interpreter's exit Grain's iterators must already be gone, even where this one still is not.
        self._held = [iterator]
        self._shared = shared
        self._close = weakref.finalize(self, _close, self._held)

    def __next__(self) -> Batch:
        if not self._held:
            raise StopIteration
        try:
            batch = next(self._held[0])
        except StopIteration:
            self.close()
            raise
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and "exit code -7" in str(error):
                error.add_note(
                    "The system's shared memory is full (in containers, often 64 MB): enlarge it, as with "
                    "docker run --shm-size, or use fewer workers, smaller batches, or num_workers=0."
                )
            raise
        self.step += 1
        # Shared memory is scarce, and who keeps a batch until the interpreter's exit would leave it behind for good.
        return {name: np.array(value) for name, value in batch.items()} if self._shared else batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends threads and processes; there are no more batches after that."""
        self._close()


@dataclasses.dataclass(frozen=True, repr=False)
class _Examples:
    """A source without its other methods, and beyond its end None: Grain asks for `len`, indices and a short name."""

    source: Source
    total: int | None = None

    def __len__(self) -> int:
        return len(self.source) if self.total is None else self.total

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        # A tuple in any case: elements that are None are left out by Grain.
        return (self.source[index] if index < len(self.source) else None,)

    def __repr__(self) -> str:
        return f"{type(self.source).__name__}[{len(self.source)}]"


@dataclasses.dataclass(frozen=True)
class _Training:
    size: Size | None
    augmentation: Augmentation | None
    outside: Outside

    def __call__(self, element: tuple[Any], rng: np.random.Generator) -> Batch:
        [(image, labels)] = element
        if self.augmentation is not None:
            image, labels = self.augmentation(
                image, labels, rng, size=self.size, ignore_label=self.outside.ignore_label
            )
        else:
            check_example(image, labels)
            size = self.size or labels.shape
            room = [max(0, n - m) for n, m in zip(labels.shape, size, strict=True)]
            origin = tuple(int(rng.integers(r + 1)) for r in room)
            image, labels = place(image, labels, size, origin, self.outside)
        return {"image": image, "labels": labels}


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    size: Size | None
    blank: Size | None
    outside: Outside

    def __call__(self, element: tuple[Any]) -> Batch:
        [example] = element
        if example is None:
            assert self.blank is not None
            image = np.empty((*self.blank, 3), np.uint8)
            image[...] = self.outside.fill
            return {"image": image, "labels": np.full(self.blank, self.outside.ignore_label, np.int32)}
        image, labels = example
        check_example(image, labels)
        size = self.size or labels.shape
        if any(n > m for n, m in zip(labels.shape, size, strict=True)):
            raise ValueError(
                f"size: got {size}, but the source holds an image of {labels.shape}, which evaluation does not crop; "
                "evaluate with a pipeline of a size that fits the largest image"
            )
        image, labels = place(image, labels, size, (0, 0), self.outside)
        return {"image": image, "labels": labels}


def _stack(examples: list[Batch]) -> Batch:
    shapes = sorted({example["labels"].shape for example in examples})
    if len(shapes) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width in shapes)
        raise ValueError(f"size: got None for images of several sizes ({listed}); pass size=(height, width)")
    return {name: np.stack([example[name] for example in examples]) for name in ("image", "labels")}


def _close(held: list[Any]) -> None:
    if held:
        held.pop().close()


def _keep_pictures_memory() -> None:
    # A user's own setting, by Pillow's environment variable, stands.
    if "PILLOW_BLOCKS_MAX" not in os.environ and Image.core.get_blocks_max() < _PILLOW_BLOCKS:
        Image.core.set_blocks_max(_PILLOW_BLOCKS)


def _start_worker(index: int, count: int) -> None:
    """What a worker does first."""
    del index, count
    # A source that happens to use JAX must not reach for the accelerator that training holds.
    import jax

    jax.config.update("jax_platforms", "cpu")
    _keep_pictures_memory()

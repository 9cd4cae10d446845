"""The pipeline's one promise, that a batch depends on its step alone, bit for bit; and how it ends and fails."""

import itertools
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from jaxcrf.data import (
    Augmentation,
    Pipeline,
    SegmentationFolder,
    augmentation,
    open_folder,
    write_image,
    write_labels,
)

COUNT = 11
SIZE = (12, 16)


class Source:
    """Examples in memory, whose first pixel says which one it is."""

    label_names = ("a", "b", "c")
    ignore_label = 255

    def __init__(self, shapes=(SIZE,), count=COUNT):
        rng = np.random.default_rng(0)
        self.examples = []
        for i, shape in zip(range(count), itertools.cycle(shapes), strict=False):
            image = rng.integers(100, 200, size=(*shape, 3), dtype=np.uint8)
            image[0, 0] = i
            self.examples.append((image, rng.integers(3, size=shape).astype(np.int32)))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@pytest.fixture(scope="module")
def source():
    return Source()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same on disk, for workers: a class of this file could not be found there."""
    root = tmp_path_factory.mktemp("folder")
    names = tuple(f"{i:02d}" for i in range(COUNT))
    images, labels = (tuple(root / f"{kind}{name}.png" for name in names) for kind in ("image", "labels"))
    for (image, marks), *paths in zip(Source(), images, labels, strict=True):
        write_image(paths[0], image)
        write_labels(paths[1], marks)
    return SegmentationFolder(names, images, labels, ("a", "b", "c"))


def take(pipeline, count, start=0, **part):
    with pipeline.batches(start, **part) as batches:
        return list(itertools.islice(batches, count))


def order(batches):
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "labels"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def augmented(source):
    return Pipeline(source, 4, size=(10, 10), seed=3, augmentation=Augmentation())


@pytest.fixture(scope="module")
def truth(augmented):
    """Seven batches, two and a half epochs, without threads."""
    return take(Pipeline(**(vars(augmented) | {"num_threads": 0})), 7)


def test_batches_are_what_the_contract_says(truth):
    for batch in truth:
        assert isinstance(batch, dict)
        assert batch["image"].shape == (4, 10, 10, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["labels"].shape == (4, 10, 10)
        assert batch["labels"].dtype == np.int32
        assert set(np.unique(batch["labels"])) <= {0, 1, 2, 255}


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 2), (5, 1), (3, 9)])
def test_threads_change_nothing(augmented, truth, threads, prefetch):
    assert_same(
        take(Pipeline(**(vars(augmented) | {"num_threads": threads, "prefetch": prefetch})), 7), truth
    )


@pytest.mark.parametrize("start", [1, 2, 3, 6])
def test_where_a_run_starts_changes_nothing(augmented, truth, start):
    assert_same(take(augmented, 7 - start, start), truth[start:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_take_equal_parts_of_the_same_batches(augmented, truth, count):
    parts = [take(augmented, 3, 2, process_index=p, process_count=count) for p in range(count)]
    assert all(len(batch["labels"]) == 4 // count for part in parts for batch in part)
    whole = [
        {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        for pieces in zip(*parts, strict=True)
    ]
    assert_same(whole, truth[2:5])


def test_workers_change_nothing(folder):
    """All at once: workers, a later start and another process's part; and they are gone at the end."""
    pipeline = Pipeline(folder, 4, size=(10, 10), seed=3, augmentation=Augmentation())
    expected = take(Pipeline(**(vars(pipeline) | {"num_threads": 0})), 8)
    assert_same(take(pipeline, 8), expected)
    working = Pipeline(**(vars(pipeline) | {"num_workers": 2}))
    with working.batches(3, process_index=1, process_count=2) as batches:
        found = list(itertools.islice(batches, 5))
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert_same(found, [{name: batch[name][2:] for name in batch} for batch in expected[3:]])
    assert list(batches) == []


def test_files_and_memory_are_the_same(folder, augmented, truth):
    assert_same(take(Pipeline(**(vars(augmented) | {"source": folder})), 2), truth[:2])


def test_every_epoch_has_every_example_once_and_an_order_of_its_own(source):
    seen = order(take(Pipeline(source, 4), 33)).reshape(12, COUNT)  # 33 batches of 4 are 12 epochs of 11
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(COUNT), (12, 1)))
    assert len({tuple(row) for row in seen.tolist()}) == 12
    # Nor do examples keep their places or their neighbours.
    assert all(len(set(column)) > 3 for column in seen.T.tolist())


def test_seeds_give_other_orders_and_draws(source):
    seen = [order(take(Pipeline(source, COUNT, seed=seed), 4)).reshape(4, COUNT) for seed in range(4)]
    assert len({tuple(row) for orders in seen for row in orders.tolist()}) == 16
    images = [
        take(Pipeline(source, 1, seed=seed, shuffle=False, augmentation=Augmentation()), 1)[0]["image"]
        for seed in range(3)
    ]
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()


def test_without_shuffling_the_order_is_the_source_s(source):
    np.testing.assert_array_equal(order(take(Pipeline(source, 3, shuffle=False), 9)), np.arange(27) % COUNT)


def test_draws_differ_between_epochs_and_examples():
    image = np.random.default_rng(0).integers(256, size=(*SIZE, 3), dtype=np.uint8)
    same = [(image, np.zeros(SIZE, np.int32))] * 2
    images = np.concatenate([b["image"] for b in take(Pipeline(same, 2, augmentation=Augmentation()), 10)])
    assert len({picture.tobytes() for picture in images}) == 20


def test_positions_far_away(source):
    pipeline = Pipeline(source, 4, augmentation=augmentation.get("convcrf"))
    far = 10**12
    assert_same(take(pipeline, 1, far + 1), take(pipeline, 2, far)[1:])
    with pipeline.batches(far) as batches:
        next(batches)
        assert batches.step == far + 1


def test_batch_of_one_and_batch_larger_than_the_source(source):
    np.testing.assert_array_equal(order(take(Pipeline(source, 1, shuffle=False), 12)), [*range(11), 0])
    large = Pipeline(source, 25, shuffle=False)
    np.testing.assert_array_equal(order(take(large, 2)), np.arange(50) % COUNT)
    assert large.steps_per_epoch == 1


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [None, SIZE, (14, 20)])
def test_an_epoch_is_every_example_once_in_order(source, size, count):
    pipeline = Pipeline(source, 4, size=size, augmentation=Augmentation())
    height, width = size or SIZE
    parts = []
    for index in range(count):
        with pipeline.epoch(process_index=index, process_count=count) as batches:
            parts.append(list(batches))
        assert len(parts[-1]) == pipeline.steps_per_epoch == 3
    rows = [
        row
        for pieces in zip(*parts, strict=True)
        for piece in pieces
        for row in zip(*piece.values(), strict=True)
    ]
    assert len(rows) == 12
    for (image, labels), (original, marks) in zip(rows, source, strict=False):
        assert image.shape == (height, width, 3)
        np.testing.assert_array_equal(image[: SIZE[0], : SIZE[1]], original)
        np.testing.assert_array_equal(labels[: SIZE[0], : SIZE[1]], marks)
        assert (labels[SIZE[0] :] == 255).all()
        assert (labels[:, SIZE[1] :] == 255).all()
        assert (image[SIZE[0] :] == Augmentation().fill).all()
    assert (rows[-1][1] == 255).all()
    assert (rows[-1][0] == Augmentation().fill).all()


def test_a_full_last_batch_needs_no_filling(source):
    with Pipeline(source, COUNT).epoch() as batches:
        [batch] = batches
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.arange(COUNT))


def test_sizes_of_all_kinds_come_out_as_one():
    source = Source(shapes=((5, 30), (30, 5), (12, 12)))
    for batch in take(Pipeline(source, 4, size=(10, 11)), 3):
        assert batch["image"].shape == (4, 10, 11, 3)
    with Pipeline(source, 4, size=(30, 30)).epoch() as batches:
        for i, batch in enumerate(batches):
            for j, labels in enumerate(batch["labels"]):
                if 4 * i + j < COUNT:
                    assert (labels != 255).sum() == source[4 * i + j][1].size


def test_cropping_without_augmentation_is_random_and_padding_is_not():
    image = np.arange(20, dtype=np.uint8).reshape(5, 4)[..., None].repeat(3, -1)
    source = [(image, np.zeros((5, 4), np.int32))]
    corners = {int(b["image"][0, 0, 0, 0]) for b in take(Pipeline(source, 1, size=(3, 2)), 150)}
    assert corners == {4 * row + column for row in range(3) for column in range(3)}
    for batch in take(Pipeline(source, 1, size=(7, 8)), 5):
        np.testing.assert_array_equal(batch["image"][0, :5, :4], image)


def test_reflected_padding():
    image = np.random.default_rng(0).integers(256, size=(5, 4, 3), dtype=np.uint8)
    source = [(image, np.zeros((5, 4), np.int32))]
    mirrored = np.pad(image, ((0, 3), (0, 2), (0, 0)), mode="reflect")
    for pipeline in (
        Pipeline(source, 1, size=(8, 6), padding="reflect"),
        Pipeline(source, 1, size=(8, 6), augmentation=augmentation.get("hrenet")),
    ):
        with pipeline.epoch() as batches:
            [batch] = batches
        np.testing.assert_array_equal(batch["image"][0], mirrored)
        assert (batch["labels"] == 255).sum() == 48 - 20
    assert (
        Pipeline(source, 1, padding="reflect", augmentation=Augmentation()).augmentation.padding == "reflect"
    )
    assert Pipeline(source, 1, fill=(1, 2, 3), augmentation=Augmentation()).augmentation.fill == (1, 2, 3)


def test_other_ignore_labels():
    source = Source()
    source.ignore_label = 99
    with pytest.raises(
        ValueError, match="ignore_label: got 255, but void is 99 in the source; pass ignore_label=99"
    ):
        Pipeline(source, 4)
    pipeline = Pipeline(source, 4, size=(20, 20), ignore_label=99, augmentation=Augmentation())
    assert set(np.unique(take(pipeline, 1)[0]["labels"])) == {0, 1, 2, 99}
    with pipeline.epoch() as batches:
        assert all(set(np.unique(batch["labels"])) == {0, 1, 2, 99} for batch in batches)


def test_pipelines_pickle(source):
    pipeline = Pipeline(Source(count=2).examples, 2, size=[6, 6], augmentation=Augmentation())
    again = pickle.loads(pickle.dumps(pipeline))
    assert again.size == (6, 6)
    assert_same(take(again, 2), take(pipeline, 2))


def test_closing_ends_the_threads(source):
    before = set(threading.enumerate())
    batches = Pipeline(source, 4, num_threads=3).batches()
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    batches.close()
    for thread in started:
        thread.join(timeout=20)
        assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)


def test_nobody_holding_the_iterator_closes_it(source):
    batches = Pipeline(source, 4).batches()
    next(batches)
    [inner] = batches._held
    assert not inner._closed
    del batches
    assert inner._closed


def test_errors_of_a_file_name_it(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(folder.image_paths[0].read_bytes()[:60])
    paths = (*folder.image_paths[:5], tmp_path / "broken.png", *folder.image_paths[6:])
    broken = SegmentationFolder(folder.names, paths, folder.label_paths, folder.label_names)
    for num_workers in (0, 1):
        batches = Pipeline(broken, 2, shuffle=False, num_workers=num_workers).batches()
        next(batches)
        next(batches)
        with pytest.raises(ValueError, match=r"broken\.png"):
            next(batches)
        assert batches.step == 2
        assert not multiprocessing.active_children()
        assert list(batches) == []


def test_sizes_that_do_not_fit_are_errors():
    source = Source(shapes=((5, 6), (7, 4)))
    with (
        Pipeline(source, 2).batches() as batches,
        pytest.raises(ValueError, match=r"size: got None .*5×6, 7×4.*pass size="),
    ):
        list(batches)
    with (
        Pipeline(source, 2, size=(6, 6)).epoch() as batches,
        pytest.raises(ValueError, match=r"size: got \(6, 6\), but .*\(7, 4\).*larger|largest"),
    ):
        list(batches)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0; expected a whole number >= 1"),
        ({"batch_size": 2.0}, "batch_size: got 2.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"num_workers": -1}, "num_workers: got -1"),
        ({"num_threads": True}, "num_threads: got True"),
        ({"prefetch": 0}, "prefetch: got 0; expected a whole number >= 1"),
        ({"size": 5}, "size: got 5; expected height and width"),
        ({"size": (5, 0)}, "size: got"),
        ({"padding": "mirror"}, "padding: got 'mirror'; expected one of constant, reflect"),
        ({"fill": 3}, "fill: got 3"),
        ({"source": []}, "source: got a data set without examples"),
    ],
)
def test_fields_out_of_range_are_errors(source, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Pipeline(**({"source": source, "batch_size": 4} | fields))


def test_arguments_out_of_range_are_errors(source):
    pipeline = Pipeline(source, 4)
    for start in (-1, 1.5, None):
        with pytest.raises(ValueError, match="start_step: got"):
            pipeline.batches(start)
    with pytest.raises(ValueError, match=r"process_count: got 3 for batch_size=4.*choose a multiple"):
        pipeline.batches(process_index=0, process_count=3)
    with pytest.raises(ValueError, match="process_index: got 2; expected 0 to 1"):
        pipeline.epoch(process_index=2, process_count=2)
    with pytest.raises(ValueError, match="pass both or none"):
        pipeline.batches(process_index=1)
    with pytest.raises(TypeError, match=r"augmentation: got 'convcrf'.*get\('convcrf'\)"):
        Pipeline(source, 4, augmentation="convcrf")


SCRIPT = """
import sys
from pathlib import Path
import numpy as np

class Probe:
    ignore_label = 255
    def __len__(self): return 4
    def __getitem__(self, index):
        import jax
        from jax._src import xla_bridge
        alive = xla_bridge.backends_are_initialized()
        platform = jax.numpy.zeros(()).device.platform
        return np.full((2, 2, 3), alive, np.uint8), np.full((2, 2), platform == "cpu", np.int32)

if __name__ == "__main__":
    from jaxcrf.data import Pipeline
    batches = Pipeline(Probe(), 1, shuffle=False, num_workers=2, num_threads=0).batches()
    first = next(batches)
    print(int(first["image"].max()), int(first["labels"].min()))
    # And out, without closing.
"""


@pytest.mark.slow
def test_a_script_ends_though_nothing_was_closed_and_workers_start_no_device(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr
    assert "leaked" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_real_data(data_dir):
    try:
        folder = open_folder(data_dir / "camvid", "val")
    except ValueError as error:
        pytest.skip(str(error))
    pipeline = Pipeline(folder, 2, size=(120, 160), augmentation=augmentation.get("convcrf"))
    expected = take(pipeline, 2)
    assert_same(take(pipeline, 1, 1), expected[1:])
    assert expected[0]["image"].std() > 10

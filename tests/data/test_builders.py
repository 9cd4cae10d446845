"""Data sets prepared as records: the same examples as from the folders, or an error."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset_suite import TREES, VOID, same_examples, write_image
from jaxcrf.data import load, open_folder, prepare

pytest.importorskip("tensorflow_datasets")

import tensorflow_datasets as tfds

from jaxcrf.data import builders
from jaxcrf.data.builders import VERSION, SegmentationBuilder


@pytest.fixture(scope="module", params=TREES, ids=str)
def prepared(request, tmp_path_factory):
    """A tree, where it is written and where it is prepared, the truth, and what `prepare` returned."""
    root, data_dir = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("data")
    truth = request.param.write(root)
    return (
        request.param,
        root,
        data_dir,
        truth,
        prepare(request.param.dataset, root, data_dir, progress=False),
    )


@pytest.fixture
def camvid(tmp_path):
    [case] = (case for case in TREES if case.dataset == "camvid")
    return tmp_path / "root", tmp_path / "data", case.write(tmp_path / "root")


def directory(data_dir: Path, dataset: str = "camvid") -> Path:
    return data_dir / dataset / VERSION


def test_suite_records_equal_folders(prepared):
    case, root, data_dir, truth, counts = prepared
    assert counts == {split: len(examples) for split, examples in truth.items()}
    for split, expected in truth.items():
        folder = open_folder(root, split, case.dataset)
        source = load(case.dataset, split, data_dir)
        assert source.label_names == folder.label_names
        assert (source.num_labels, source.ignore_label) == (case.num_labels, VOID)
        for (image, labels), (expected_image, _) in zip(same_examples(source, expected), folder, strict=True):
            np.testing.assert_array_equal(image, expected_image)
            assert image.flags.writeable
            assert labels.flags.writeable


def test_suite_slices_and_pickles(prepared):
    case, _, data_dir, truth, _ = prepared
    source = load(case.dataset, case.split, str(data_dir))
    kept = pickle.loads(pickle.dumps(source[::-2]))
    list(same_examples(kept, dict(list(truth[case.split].items())[::-2])))
    np.testing.assert_array_equal(source[-1][1], list(truth[case.split].values())[-1])
    with pytest.raises(IndexError):
        source[len(source)]


def test_suite_every_example_is_stored_once(prepared):
    case, _, data_dir, truth, _ = prepared
    info = tfds.builder_from_directory(directory(data_dir, case.dataset)).info
    names = {name for examples in truth.values() for name in examples}
    assert sum(part.num_examples for part in info.splits.values()) == len(names)
    assert [path.name for path in data_dir.iterdir()] == [case.dataset]
    assert [path.name for path in (data_dir / case.dataset).iterdir()] == [VERSION]


def test_suite_tfds_reads_the_same(prepared):
    case, _, data_dir, truth, _ = prepared
    builder = tfds.builder_from_directory(directory(data_dir, case.dataset))
    labelled = {name: y for examples in truth.values() for name, y in examples.items() if (y != VOID).any()}
    seen = set()
    for part in builder.info.splits:
        if part == "test":  # VOC's, without labels
            continue
        for record in builder.as_data_source(part):
            name = record["name"].decode()
            np.testing.assert_array_equal(record["labels"][..., 0], labelled[name])
            assert record["image"].shape == (*labelled[name].shape, 3)
            seen.add(name)
    assert seen == set(labelled)


def test_the_splits_of_voc_are_parts_of_their_own(tmp_path):
    [case] = (case for case in TREES if case.dataset == "voc2012")
    case.write(tmp_path)
    builder = SegmentationBuilder(dataset="voc2012", root=tmp_path, data_dir=tmp_path / "data")
    assert {part: len(folder) for part, folder in builder.parts.items()} == {
        "train": 2,
        "val": 2,
        "test": 1,
        "train_aug_rest": 3,
    }


def test_files_are_copied_byte_for_byte(camvid):
    root, data_dir, _ = camvid
    prepare("camvid", root, data_dir, progress=False)
    builder = tfds.builder_from_directory(directory(data_dir))
    as_stored = dict.fromkeys(("image", "labels"), tfds.decode.SkipDecoding())
    [record] = builder.as_data_source("val", decoders=as_stored)
    assert record["image"] == (root / "val/images/0016E5_07959.jpg").read_bytes()
    assert record["labels"] == (root / "val/labels/0016E5_07959.png").read_bytes()


def test_large_data_sets_are_in_several_files(camvid, monkeypatch):
    root, data_dir, truth = camvid
    monkeypatch.setattr(builders, "_SHARD_BYTES", 1)
    prepare("camvid", root, data_dir, progress=False)
    assert len(list(directory(data_dir).glob("camvid-train.array_record-*-of-00002"))) == 2
    list(same_examples(load("camvid", "train", data_dir), truth["train"]))


def test_a_builder_pickles(camvid):
    root, data_dir, _ = camvid
    builder = SegmentationBuilder(dataset="camvid", root=root, data_dir=data_dir)
    again = pickle.loads(pickle.dumps(builder))
    assert (again.name, again.data_dir, again.folders) == ("camvid", builder.data_dir, builder.folders)


def test_a_progress_bar_only_where_asked_for(camvid, capfd):
    root, data_dir, _ = camvid
    prepare("camvid", root, data_dir / "1", progress=False)
    assert capfd.readouterr() == ("", "")
    prepare("camvid", root, data_dir / "2")
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


def test_what_is_prepared_stays_unless_overwritten(camvid):
    root, data_dir, truth = camvid
    prepare("camvid", root, data_dir, progress=False)
    before = load("camvid", "val", data_dir)[0]
    shutil.rmtree(root / "train")
    size = truth["val"]["0016E5_07959"].shape
    write_image(root / "val/images/0016E5_07959.jpg", size, seed=1)
    assert prepare("camvid", root, data_dir, progress=False) == {"train": 2, "val": 1}
    np.testing.assert_array_equal(load("camvid", "val", data_dir)[0][0], before[0])
    assert prepare("camvid", root, data_dir, overwrite=True, progress=False) == {"val": 1}
    assert (load("camvid", "val", data_dir)[0][0] != before[0]).any()
    np.testing.assert_array_equal(load("camvid", "val", data_dir)[0][1], before[1])


def test_malformed_data_are_named_and_leave_nothing(camvid):
    root, data_dir, _ = camvid
    path = root / "val/images/0016E5_07959.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"0016E5_07959\.jpg: cannot be decoded"):
        prepare("camvid", root, data_dir, progress=False)
    assert list(data_dir.iterdir()) == []
    # Nor is anything lost that was there.
    path.write_bytes(whole)
    prepare("camvid", root, data_dir, progress=False)
    write_image(path, (3, 2))
    with pytest.raises(ValueError, match="must be of one size"):
        prepare("camvid", root, data_dir, overwrite=True, progress=False)
    assert len(list(load("camvid", "val", data_dir))) == 1
    with pytest.raises(ValueError, match=r"nowhere: no such folder\. The CamVid layout is.*cam\.ac"):
        prepare("camvid", root / "nowhere", data_dir / "other", progress=False)
    with pytest.raises(ValueError, match=r"images: got a folder without any split\. The CamVid layout"):
        prepare("camvid", root / "val/images", data_dir / "other", progress=False)
    with pytest.raises(ValueError, match=r"dataset: got 'voc'"):
        prepare("voc", root, data_dir / "other", progress=False)


def test_two_examples_of_one_name_are_errors(camvid):
    root, data_dir, _ = camvid
    for part, suffix in (("images", "jpg"), ("labels", "png")):
        (root / "val" / part / f"0016E5_07959.{suffix}").rename(
            root / "val" / part / f"0001TP_006690.{suffix}"
        )
    with pytest.raises(ValueError, match="has the name '0001TP_006690' that"):
        prepare("camvid", root, data_dir, progress=False)


def test_a_process_that_dies_leaves_nothing_that_is_taken_for_whole(camvid):
    root, data_dir, truth = camvid
    code = """
import os, sys
from jaxcrf.data import builders, prepare
def dies(self, folder):
    yield from ((name, {"name": name, "image": folder.image_paths[0], "labels": b""}) for name in folder.names)
    os.kill(os.getpid(), 9)
builders.SegmentationBuilder._examples = dies
prepare("camvid", sys.argv[1], sys.argv[2], progress=False)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, root, data_dir], env=environment, check=False)
    assert done.returncode == -9
    [left] = data_dir.iterdir()
    assert left.name.startswith(".camvid-")
    with pytest.raises(ValueError, match=r"so the data set is not prepared; call jaxcrf\.data\.prepare"):
        load("camvid", "val", data_dir)
    assert prepare("camvid", root, data_dir, progress=False) == {"train": 2, "val": 1}
    list(same_examples(load("camvid", "train", data_dir), truth["train"]))


def test_a_full_disk_is_an_os_error(camvid, monkeypatch):
    root, data_dir, _ = camvid

    def full(self, **options):
        raise RuntimeError("write() failed: No space left on device")  # as the writer of records does

    monkeypatch.setattr(SegmentationBuilder, "download_and_prepare", full)
    with pytest.raises(OSError, match=r"cannot be written, and is left as it was .*No space left"):
        prepare("camvid", root, data_dir, progress=False)
    assert list(data_dir.iterdir()) == []


def damage_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("camvid-val.array_record-00000-of-00001", Path.unlink, "got 0 files of 0 bytes"),
        ("camvid-train.array_record-00000-of-00001", damage_file, "got 1 files of"),
        ("metadata.json", Path.unlink, "is no whole prepared data set"),
        ("metadata.json", damage_file, "is no whole prepared data set"),
        ("metadata.json", lambda path: path.write_text("{}"), "is no whole prepared data set"),
        ("dataset_info.json", Path.unlink, "is no whole prepared data set"),
        ("features.json", Path.unlink, "is no whole prepared data set"),
    ],
)
def test_what_is_not_whole_is_an_error(camvid, file, damage, message):
    root, data_dir, truth = camvid
    prepare("camvid", root, data_dir, progress=False)
    damage(directory(data_dir) / file)
    for attempt in (
        lambda: load("camvid", "val", data_dir),
        lambda: prepare("camvid", root, data_dir, progress=False),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*Prepare it again: .*overwrite=True\)"):
            attempt()
    prepare("camvid", root, data_dir, overwrite=True, progress=False)
    list(same_examples(load("camvid", "val", data_dir), truth["val"]))


def test_records_that_are_missing_are_an_error(camvid):
    root, data_dir, _ = camvid
    prepare("camvid", root, data_dir, progress=False)
    path = directory(data_dir) / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["records"]["val"] = []
    path.write_text(json.dumps(metadata))
    with pytest.raises(
        ValueError, match=r"has \{'train': 2, 'val': 1\} records, but \{'train': 2, 'val': 0\}"
    ):
        load("camvid", "val", data_dir)


def test_unknown_splits_are_errors(camvid):
    root, data_dir, _ = camvid
    prepare("camvid", root, data_dir, progress=False)
    with pytest.raises(ValueError, match=r"split: got 'test'; .* has train, val"):
        load("camvid", "test", data_dir)


def test_nothing_heavy_is_loaded_before_it_is_needed():
    code = "import sys, jaxcrf.data; print(*sys.modules)"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    loaded = set(done.stdout.split())
    assert "jaxcrf.data" in loaded
    assert not {"tensorflow_datasets", "array_record", "scipy.io", "grain", "flax", "matplotlib"} & loaded


def test_real_data(data_dir, tmp_path):
    if not (data_dir / "camvid").is_dir():
        pytest.skip(f"{data_dir} holds no camvid")
    assert prepare("camvid", data_dir / "camvid", tmp_path, progress=False) == {"train": 367, "val": 101}
    folder, source = open_folder(data_dir / "camvid", "val"), load("camvid", "val", tmp_path)
    assert source.names == folder.names
    for (image, labels), (expected_image, expected_labels) in zip(source[::20], folder[::20], strict=True):
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(labels, expected_labels)

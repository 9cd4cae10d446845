"""`jaxcrf train`: runs of a file and of a name, dry runs, and what is refused."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxcrf import cli, data
from jaxcrf.training import load_model, read_log

CONFIG = """
import numpy as np, optax
from jaxcrf.data import Pipeline
from jaxcrf.models import ModelConfig
from jaxcrf.training import Experiment, Stage, Update, objectives

class Halves:
    label_names, ignore_label = ("left", "right"), 255
    def __len__(self):
        return 4
    def __getitem__(self, index):
        labels = np.tile(np.repeat([0, 1], 8), (12, 1)).astype(np.int32)
        return np.repeat(200 * labels[..., None], 3, -1).astype(np.uint8), labels

def experiment(data, seed):
    pipeline = Pipeline(Halves(), batch_size=2, size=(12, 16), seed=seed)
    update = Update("all", objectives.segmentation(), optax.adam(0.01))
    return Experiment(
        "halves", ModelConfig.of("small_fcn", 2, width=8, blocks=[1, 0, 0]),
        data={"train": pipeline, "val": pipeline}, stages=(Stage("all", 4, (update,)),),
        label_names=Halves.label_names, seed=seed, log_every=2,
    )
"""


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(cli, "_use_compilation_cache", lambda: None)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)])


@pytest.mark.slow
def test_a_run_ends_with_a_model_and_can_be_repeated(config, tmp_path):
    result = run(config, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "4 steps done" in result.stdout
    saved = load_model(tmp_path / "run" / "model")
    assert saved.label_names == ("left", "right")
    assert saved.description["figures"]["mean_iou"] >= 0
    assert "experiment halves" in (tmp_path / "run" / "model" / "README.md").read_text()
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["step"] == 2
    again = run(config, "--out", tmp_path / "run")
    assert again.exit_code == 0, again.output
    np.testing.assert_array_equal(
        load_model(tmp_path / "run" / "model").model.classifier.kernel[...],
        saved.model.classifier.kernel[...],
    )
    other = run(config, "--out", tmp_path / "run", "--seed", 1)
    assert other.exit_code == 1
    assert "holds another run" in other.stderr


def test_a_dry_run_says_what_it_takes_and_writes_nothing(config, tmp_path):
    result = run(config, "--dry-run")
    assert result.exit_code == 0, result.output
    for text in ("2 x 12 x 16 x 3", "2 x 12 x 16 x 2", "parameters, classifier", "examples, train", "MiB"):
        assert text in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


@pytest.mark.slow
def test_experiments_by_name_take_their_data_from_a_folder(tmp_path):
    for split in ("train", "val"):
        for stem in ("a", "b", "c"):
            labels = np.zeros((24, 32), np.int32)
            labels[:, 12:] = 3
            data.write_image(
                _made(tmp_path / "camvid" / split / "images") / f"{stem}.png",
                np.repeat(60 * labels[..., None], 3, -1).astype(np.uint8),
            )
            data.write_labels(_made(tmp_path / "camvid" / split / "labels") / f"{stem}.png", labels)
    options = ("--experiment", "camvid_unary", "--scale", "smoke")
    result = run(*options, "--data", tmp_path / "camvid", "--dry-run")
    assert result.exit_code == 0, result.output
    # One of the three training images is held out.
    assert re.search(r"examples, train\W+2\b", result.stdout)
    refused = run(*options, "--dry-run")
    assert refused.exit_code == 2
    assert "--data: camvid_unary needs" in refused.stderr
    empty = run(*options, "--data", tmp_path, "--dry-run")
    assert empty.exit_code == 2
    assert "camvid" in empty.stderr.lower()


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of CONFIG.py and --experiment"),
        (("--experiment", "camvid"), "--experiment: got 'camvid'; expected one of camvid_unary"),
        (("CONFIG", "--scale", "gpu"), "--scale goes with --experiment"),
        (("CONFIG", "--processes", "2"), "go with --coordinator"),
        (("CONFIG", "--coordinator", "localhost:1"), "needs --processes and --process"),
        (("CONFIG", "--dry-run", "--devices", "64"), "num_devices: got 64"),
    ],
)
def test_what_makes_no_sense(config, tmp_path, arguments, message):
    out = () if "--dry-run" in arguments else ("--out", tmp_path / "run")
    result = run(*(config if argument == "CONFIG" else argument for argument in arguments), *out)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "got nothing of that name"),
        ("experiment = 3", "got int"),
        ("def experiment(data, seed):\n    return seed", "got int"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("def experiment(data, seed):\n    raise ValueError('no data')", "ValueError: no data"),
    ],
)
def test_files_that_are_no_experiment(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    result = run(path, "--dry-run")
    assert result.exit_code == 2
    assert message in result.stderr

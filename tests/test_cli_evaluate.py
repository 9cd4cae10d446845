"""`jaxcrf evaluate`: reports of stored predictions and of trained models, and what is refused."""

import json
import re
import types

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxcrf
from jaxcrf import cli, data

SHAPE = (16, 20)
STEMS = ("a", "b", "c.d")


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr(cli, "_use_compilation_cache", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """Three images in the layout of CamVid, with predicted label maps and probabilities."""
    random = np.random.default_rng(0)
    for name in ("data/val/images", "data/val/labels", "labels", "probs"):
        (tmp_path / name).mkdir(parents=True)
    truth = np.zeros(SHAPE, int)
    truth[:, 9:] = 1
    truth[:2] = 255
    for stem in STEMS:
        image = np.where(truth[..., None] == 1, [200, 180, 40], [20, 60, 90]) + random.integers(
            0, 4, (*SHAPE, 3)
        )
        noisy = (truth % 255) ^ (random.random(SHAPE) < 0.1)
        data.write_image(tmp_path / "data/val/images" / f"{stem}.png", image.astype(np.uint8))
        data.write_labels(tmp_path / "data/val/labels" / f"{stem}.png", truth)
        data.write_labels(tmp_path / "labels" / f"{stem}.png", noisy)
        probs = np.where(np.eye(11)[noisy] == 1, 0.7, 0.03).astype("f4")
        data.write_array(tmp_path / "probs" / f"{stem}.npy", probs)
    return tmp_path


def run(folder, *arguments):
    command = ["evaluate", "--data", folder / "data", "--out", folder / "out/report.html", *arguments]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in command])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def total(folder):
    cm = np.zeros((11, 11), np.int64)
    for stem in STEMS:
        truth = data.read_labels(folder / "data/val/labels" / f"{stem}.png")
        cm += np.asarray(
            jaxcrf.metrics.confusion_matrix(truth, data.read_labels(folder / "labels" / f"{stem}.png"), 11)
        )
    return cm


@pytest.mark.parametrize("kind", ["labels", "probs"])
def test_stored_predictions(folder, kind):
    result = run(folder, "--predictions", folder / kind)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.html", "report.json"]
    stored = json.loads((folder / "out/report.json").read_text())
    assert stored["confusion"] == total(folder).tolist()
    assert [image["name"] for image in stored["images"]] == list(STEMS)
    expected = f"{100 * float(jaxcrf.metrics.mean_iou(total(folder))):.2f} %"
    assert re.search(rf"mean iou\W+{re.escape(expected)}", result.stdout)
    assert "commit" in stored["circumstances"]
    assert (folder / "out/report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["labels", "probs"])
def test_refinement_is_compared(folder, kind):
    result = run(
        folder, "--predictions", folder / kind, "--refine", "convcrf", "--json", folder / "numbers.json"
    )
    assert result.exit_code == 0, result.output
    stored = json.loads((folder / "numbers.json").read_text())
    assert stored["baseline"]["confusion"] == total(folder).tolist()
    assert stored["totals"]["mean_iou"] > stored["baseline"]["totals"]["mean_iou"] + 0.05
    assert "before" in result.stdout
    assert "refined by convcrf" in (folder / "out/report.html").read_text()


def test_a_preset_file_reaches_refine(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        jaxcrf, "refine", lambda image, **options: seen.append(options) or options["probs"], raising=False
    )
    result = run(
        folder,
        "--predictions",
        folder / "probs",
        "--refine",
        "densecrf",
        "--preset",
        "densecrf_sharp",
        "--limit",
        1,
    )
    assert result.exit_code == 0, result.output
    assert [(options["method"], options["preset"]) for options in seen] == [("densecrf", "densecrf_sharp")]


@pytest.mark.slow
def test_a_part_of_the_images(folder):
    (folder / "labels/b.png").unlink()
    (folder / "labels/c.d.png").unlink()
    result = run(
        folder, "--predictions", folder / "labels", "--limit", 1, "--around", "void", "--background", 0
    )
    assert result.exit_code == 0, result.output
    stored = json.loads((folder / "out/report.json").read_text())
    assert [image["name"] for image in stored["images"]] == ["a"]
    assert stored["trimap"]["around"] == "void"
    assert stored["per_class"][0]["localization"] is None


def test_a_dry_run_writes_nothing(folder):
    result = run(folder, "--predictions", folder / "probs", "--dry-run", "--refine", "convcrf")
    assert result.exit_code == 0, result.output
    for words in ("3 images, 11 labels", "16 x 20 x 11, float32", "refinement  convcrf", "would write"):
        assert words in result.stdout
    assert not (folder / "out").exists()


CAMVID = [
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
]


@pytest.fixture
def model(monkeypatch):
    """What the command line takes for a model that it has loaded: as small as can be."""
    nnx = pytest.importorskip("flax.nnx")
    saved = types.SimpleNamespace(
        model=nnx.Conv(3, 11, (1, 1), rngs=nnx.Rngs(0)), label_names=tuple(CAMVID), ignore_label=255
    )
    monkeypatch.setattr(jaxcrf.training, "load_model", lambda path: saved, raising=False)
    return saved.model


def confusion_of(model, folder):
    cm = np.zeros((11, 11), np.int64)
    for stem in STEMS:
        image = data.read_image(folder / "data/val/images" / f"{stem}.png")
        truth = data.read_labels(folder / "data/val/labels" / f"{stem}.png")
        prediction = model(image[None].astype(np.float32)).argmax(-1)[0]
        cm += np.asarray(jaxcrf.metrics.confusion_matrix(truth, prediction, 11))
    return cm


def check_report_of(model, folder):
    found = np.array(json.loads((folder / "out/report.json").read_text())["confusion"])
    expected = confusion_of(model, folder)
    # Jitted and eager logits may round to another winner at a tie.
    assert np.abs(found - expected).sum() <= 4
    assert found.sum() == expected.sum()


def test_a_model(folder, model):
    result = run(folder, "--checkpoint", folder, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    check_report_of(model, folder)


@pytest.mark.slow
def test_a_model_that_was_saved(folder, tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    pytest.importorskip("orbax.checkpoint")
    from jaxcrf import models, training

    # One program instead of a hundred small ones.
    model = nnx.jit(lambda: models.create("small_fcn", 11, width=8, rngs=nnx.Rngs(0)))()
    training.save_model(tmp_path / "model", model, label_names=tuple(CAMVID))
    result = run(folder, "--checkpoint", tmp_path / "model")
    assert result.exit_code == 0, result.output
    check_report_of(training.load_model(tmp_path / "model").model, folder)


def test_a_dry_run_of_a_model_says_what_it_takes(folder, model):
    result = run(folder, "--checkpoint", folder, "--dry-run", "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "prediction  2 x 16 x 20 x 11" in result.stdout
    assert "parameters  44\n" in result.stdout
    assert re.search(r"memory      \d+ MiB for a batch of 2", result.stdout)
    assert not (folder / "out").exists()


def test_a_model_for_other_labels_is_refused(folder, model):
    (folder / "data/labels.txt").write_text("sky\ntree\n")
    (folder / "data/val/masks").mkdir()
    for path in (folder / "data/val/labels").iterdir():
        (folder / "data/val/masks" / path.name).write_bytes(path.read_bytes())
    result = run(folder, "--checkpoint", folder, "--dataset", "image_mask")
    assert result.exit_code == 2, result.output
    assert "was trained for the labels sky, building" in result.stderr
    assert "has sky, tree" in result.stderr


def test_what_is_no_model_is_an_error(folder):
    pytest.importorskip("orbax.checkpoint")
    result = run(folder, "--checkpoint", folder / "labels")
    assert result.exit_code == 1
    assert str(folder / "labels") in result.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "b.png",
            np.zeros((16, 21), int),
            "b: its prediction has the shape 16 x 21, but the image is 16 x 20",
        ),
        (
            "b.png",
            np.full(SHAPE, 11),
            "b: its prediction holds the label 11 where the truth counts; expected 0 to 10",
        ),
        ("b.png", b"not an image", "is not an image in a known format"),
        (
            "b.npy",
            np.zeros((*SHAPE, 4), "f4"),
            "b: its prediction has probabilities of 4 labels, but the data have 11",
        ),
        ("b.npy", np.full((*SHAPE, 11), np.nan, "f4"), "b: its prediction holds NaN"),
    ],
)
def test_predictions_that_do_not_fit_leave_nothing_behind(folder, name, content, problem):
    (folder / "labels/b.png").unlink()
    path = folder / "labels" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (data.write_labels if name.endswith(".png") else data.write_array)(path, content)
    result = run(folder, "--predictions", folder / "labels")
    assert result.exit_code == 1, result.output
    assert problem in result.stderr
    assert "Traceback" not in result.stderr
    assert list((folder / "out").iterdir()) == []


def test_usage_errors(folder):
    (folder / "empty/val/images").mkdir(parents=True)
    (folder / "empty/val/labels").mkdir(parents=True)
    predictions = ("--predictions", folder / "labels")
    for arguments, message in (
        ((), "pass exactly one of --predictions and --checkpoint"),
        (
            (*predictions, "--checkpoint", folder / "labels"),
            "pass exactly one of --predictions and --checkpoint",
        ),
        ((*predictions, "--out", folder / "report.pdf"), "expected a name that ends in .html"),
        ((*predictions, "--json", folder / "out/report.html"), "is the report; choose another name"),
        ((*predictions, "--around", "edges"), "--around: got 'edges'"),
        ((*predictions, "--preset", "convcrf"), "--preset goes with --refine"),
        ((*predictions, "--refine", "magic"), "--refine: got 'magic'; expected one of convcrf, densecrf"),
        ((*predictions, "--refine", "convcrf", "--preset", "magic"), "--preset: got 'magic'"),
        ((*predictions, "--split", "test"), "the splits found there are: val"),
        ((*predictions, "--data", folder / "labels"), "got a folder in no known layout"),
        ((*predictions, "--data", folder / "empty"), "--data: "),
        ((*predictions, "--background", 11), "--background: got 11; the data set has the labels 0 to 10"),
        ((*predictions, "--json", folder / "labels/a.png"), "would replace the input"),
    ):
        result = run(folder, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert not (folder / "out").exists()


def test_missing_predictions_are_refused_before_the_run(folder):
    (folder / "labels/b.png").unlink()
    (folder / "labels/c.d.png").unlink()
    result = run(folder, "--predictions", folder / "labels")
    assert result.exit_code == 2
    assert "holds no b.png and no b.npy (nor those of 1 more), of 3 images" in result.stderr
    data.write_array(folder / "labels/a.npy", np.zeros((*SHAPE, 11), "f4"))
    result = run(folder, "--predictions", folder / "labels")
    assert result.exit_code == 2
    assert "holds both" in result.stderr


def test_existing_results_are_replaced_only_when_asked(folder):
    (folder / "out").mkdir()
    (folder / "out/report.json").write_text("mine")
    result = run(folder, "--predictions", folder / "labels")
    assert result.exit_code == 2
    assert "exists already; pass --overwrite" in result.stderr
    assert (folder / "out/report.json").read_text() == "mine"
    assert run(folder, "--predictions", folder / "labels", "--overwrite").exit_code == 0
    assert json.loads((folder / "out/report.json").read_text())["num_images"] == 3


def test_a_folder_that_cannot_be_written_to(folder):
    (folder / "out").touch()
    result = run(folder, "--predictions", folder / "labels")
    assert result.exit_code == 2
    assert "cannot be written to" in result.stderr

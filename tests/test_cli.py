import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import jaxcrf
from jaxcrf import _demo, cli, data

SHAPE = (16, 20)


@pytest.fixture(autouse=True)
def no_compilation_cache(request, monkeypatch):
    # It is a setting of the whole process; the tests that are about it run in processes of their own.
    if "cache" not in request.node.name:
        monkeypatch.setattr(cli, "_use_compilation_cache", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """Three small images with a label map and probabilities each."""
    random = np.random.default_rng(0)
    for name in ("images", "labels", "probs"):
        (tmp_path / name).mkdir()
    truth = np.zeros(SHAPE, int)
    truth[:, 9:] = 1
    for stem in ("a", "b", "c.d"):
        image = np.where(truth[..., None] == 1, [200, 180, 40], [20, 60, 90]) + random.integers(
            0, 4, (*SHAPE, 3)
        )
        noisy = truth ^ (random.random(SHAPE) < 0.1)
        data.write_image(tmp_path / "images" / f"{stem}.png", image.astype(np.uint8))
        data.write_labels(tmp_path / "labels" / f"{stem}.png", noisy)
        data.write_array(
            tmp_path / "probs" / f"{stem}.npy", np.where(np.eye(2)[noisy] == 1, 0.7, 0.3).astype("f4")
        )
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_one_image_with_labels(folder):
    out = folder / "new" / "out"
    result = run("refine", folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 of 1 images refined" in result.stdout
    assert names(out) == ["a.png", "a_overlay.png"]
    expected = np.zeros(SHAPE, int)
    expected[:, 9:] = 1
    np.testing.assert_array_equal(data.read_labels(out / "a.png"), expected)
    with Image.open(out / "a.png") as image:
        assert image.mode == "P"
    image = data.read_image(folder / "images/a.png")
    np.testing.assert_array_equal(
        data.read_image(out / "a_overlay.png"), jaxcrf.plots.overlay(image, expected)
    )


def test_a_folder_with_probs(folder):
    out = folder / "out"
    result = run("refine", folder / "images", "--probs", folder / "probs", "--out", out, "--save-probs")
    assert result.exit_code == 0, result.output
    assert names(out) == sorted(
        f"{stem}{end}" for stem in ("a", "b", "c.d") for end in (".png", "_overlay.png", "_probs.npy")
    )
    image, probs = data.read_image(folder / "images/b.png"), data.read_array(folder / "probs/b.npy")
    refined = data.read_array(out / "b_probs.npy")
    np.testing.assert_allclose(refined, jaxcrf.refine(image, probs), atol=1e-6)
    np.testing.assert_array_equal(data.read_labels(out / "b.png"), refined.argmax(-1))


@pytest.mark.parametrize("filter", ["auto", "lattice"])
def test_the_fully_connected_crf(folder, filter):
    out = folder / "out"
    image, probs = folder / "images/a.png", folder / "probs/a.npy"
    options = ("--method", "densecrf", "--filter", filter, "--save-probs")
    result = run("refine", image, "--probs", probs, "--out", out, *options)
    assert result.exit_code == 0, result.output
    expected = jaxcrf.refine(data.read_image(image), data.read_array(probs), method="densecrf", filter=filter)
    np.testing.assert_allclose(data.read_array(out / "a_probs.npy"), expected, atol=1e-6)


@pytest.mark.parametrize("options", [("--filter", "lattice"), ("--method", "densecrf", "--filter", "window")])
def test_filters_of_another_method_are_refused(folder, options):
    result = run("refine", folder / "images", "--probs", folder / "probs", "--out", folder / "out", *options)
    assert result.exit_code == 2
    assert "--filter: got" in result.stderr
    assert not (folder / "out").exists()


def test_an_image_named_twice_is_refined_once(folder):
    result = run(
        "refine",
        folder / "images",
        folder / "images/a.png",
        "--labels",
        folder / "labels",
        "--out",
        folder / "out",
    )
    assert result.exit_code == 0, result.output
    assert "3 of 3 images refined" in result.stdout


def record_calls(monkeypatch):
    calls = []

    def refine(image, **options):
        calls.append(
            {
                name: np.shape(value) if name in ("probs", "labels") else value
                for name, value in options.items()
            }
        )
        return np.full((*image.shape[:2], options.get("num_labels", 2)), 0.5, np.float32)

    monkeypatch.setattr(jaxcrf, "refine", refine)
    return calls


def test_options_reach_refine(folder, monkeypatch):
    calls = record_calls(monkeypatch)
    arguments = ["refine", folder / "images/a.png", "--out", folder / "out", "--overwrite"]
    run(*arguments, "--probs", folder / "probs/a.npy")
    run(
        *(*arguments, "--labels", folder / "labels/a.png", "--num-labels", 5, "--method", "densecrf"),
        *("--filter", "dense", "--preset", "densecrf_sharp", "--iterations", 3, "--ignore-label", 4),
    )
    defaults = {"method": "convcrf", "filter": "auto", "preset": None}
    defaults |= {"num_iterations": None, "ignore_label": 255}
    given = {"method": "densecrf", "filter": "dense", "preset": "densecrf_sharp"}
    given |= {"num_iterations": 3, "ignore_label": 4}
    assert calls == [{"probs": (*SHAPE, 2), **defaults}, {"labels": SHAPE, "num_labels": 5, **given}]


def test_the_number_of_labels_is_that_of_the_whole_folder(folder, monkeypatch):
    calls = record_calls(monkeypatch)
    data.write_labels(folder / "labels/b.png", np.full(SHAPE, 6))
    data.write_labels(folder / "labels/c.d.png", np.full(SHAPE, 255))
    run("refine", folder / "images", "--labels", folder / "labels", "--out", folder / "out")
    assert [call["num_labels"] for call in calls] == [7, 7, 7]


def test_broken_files_are_reported_and_do_not_stop_the_run(folder):
    whole = (folder / "images/a.png").read_bytes()
    (folder / "images/a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/empty.png").touch()
    data.write_labels(folder / "labels/empty.png", np.zeros(SHAPE, int))
    (folder / "images/lonely.png").write_bytes(whole)
    (folder / "images/colours.png").write_bytes(whole)
    (folder / "labels/colours.png").write_bytes(whole)
    (folder / "images/small.png").write_bytes(whole)
    data.write_labels(folder / "labels/small.png", np.zeros((4, 5), int))
    result = run("refine", folder / "images", "--labels", folder / "labels", "--out", folder / "out")
    assert result.exit_code == 1
    assert "2 of 7 images refined" in result.stdout
    assert "5 not refined" in result.stderr
    for problem in (
        f"{folder / 'images/a.png'}: cannot be decoded",
        "empty.png: is empty",
        "holds no lonely.png to go with it",
        "colours.png: holds RxGxB values, not one label per pixel; convert",
        "small.png: holds an array of 4 x 5, but the image is 16 x 20",
    ):
        assert problem in result.stderr
    assert names(folder / "out") == ["b.png", "b_overlay.png", "c.d.png", "c.d_overlay.png"]


@pytest.mark.parametrize(
    ("probs", "problem"),
    [
        (np.full((*SHAPE, 2), np.nan, np.float32), "a.npy: holds NaN"),
        (np.full((*SHAPE, 2), 0.9, np.float32), "a.npy: do not sum to 1"),
        (np.full((*SHAPE, 2), [2, -1], np.float32), "apply a softmax to unnormalised scores first"),
        (np.full((*SHAPE, 257), 1 / 257, np.float32), "a.npy: holds probabilities of 257 labels"),
        (np.full((2, *SHAPE), 0.5, np.float32), "holds an array of 2 x 16 x 20, but the image is 16 x 20"),
        (np.zeros(SHAPE, np.float32), "expected 16 x 20 x labels"),
        (np.full((*SHAPE, 2), 127, np.uint8), "uint8"),
    ],
)
def test_bad_probabilities(folder, probs, problem):
    data.write_array(folder / "probs/a.npy", probs)
    result = run(
        "refine", folder / "images/a.png", "--probs", folder / "probs/a.npy", "--out", folder / "out"
    )
    assert result.exit_code == 1
    assert problem in result.stderr
    # That is Python, not the command line.
    assert "=…" not in result.stderr
    assert names(folder / "out") == []


def test_labels_beyond_the_number_given(folder):
    data.write_labels(folder / "labels/a.png", np.full(SHAPE, 3))
    result = run(
        *("refine", folder / "images/a.png", "--labels", folder / "labels/a.png"),
        *("--num-labels", 2, "--out", folder / "out"),
    )
    assert result.exit_code == 1
    expected = f"{folder / 'labels/a.png'}: holds label 3; expected 0 to 1 or --ignore-label 255."
    assert expected in result.stderr
    assert "Raise --num-labels" in result.stderr


def save_labels(path, labels):
    Image.fromarray(labels).save(path)


def test_more_labels_than_results_hold_are_refused_before_the_run(folder, monkeypatch):
    calls = record_calls(monkeypatch)
    deep = np.zeros(SHAPE, np.uint16)
    deep[3, 4] = 65444
    save_labels(folder / "labels/b.png", deep)
    arguments = [folder / "images", "--labels", folder / "labels", "--out", folder / "out"]
    result = refuses(folder, "b.png holds label 65444, but there can be at most 256 labels", *arguments)
    assert "--ignore-label 65444" in result.stderr
    assert calls == []
    assert run("refine", *arguments, "--ignore-label", 65444).exit_code == 0
    assert [call["num_labels"] for call in calls] == [2, 2, 2]


def test_256_labels_are_not_too_many(folder, monkeypatch):
    calls = record_calls(monkeypatch)
    data.write_labels(folder / "labels/a.png", np.full(SHAPE, 255))
    arguments = ["--labels", folder / "labels/a.png", "--out", folder / "out", "--ignore-label", -1]
    assert run("refine", folder / "images/a.png", *arguments).exit_code == 0
    assert [call["num_labels"] for call in calls] == [256]


def test_a_mask_of_0_and_255_is_refused_unless_the_number_is_given(folder):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, 9:] = 255
    save_labels(folder / "labels/a.png", mask)
    arguments = [folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", folder / "out"]
    result = refuses(folder, "rescale a 0/255 mask to 0/1", *arguments)
    assert "--ignore-label -1" in result.stderr
    assert "--num-labels" in result.stderr
    assert run("refine", *arguments, "--num-labels", 2).exit_code == 0
    save_labels(folder / "labels/a.png", mask // 255)
    assert run("refine", *arguments, "--ignore-label", -1, "--overwrite").exit_code == 0
    np.testing.assert_array_equal(data.read_labels(folder / "out/a.png"), mask // 255)


def test_label_files_that_cannot_be_read_do_not_count_as_empty_maps(folder):
    (folder / "labels/a.png").write_bytes(b"")
    arguments = [folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", folder / "out"]
    result = run("refine", *arguments)
    assert result.exit_code == 1
    assert "a.png: is empty" in result.stderr


def test_max_pixels(folder):
    arguments = ["refine", folder / "images/a.png", "--labels", folder / "labels/a.png"]
    arguments += ["--out", folder / "out"]
    size = SHAPE[0] * SHAPE[1]
    result = run(*arguments, "--max-pixels", size - 1)
    assert result.exit_code == 1
    assert f"limit of {size - 1} " in result.stderr
    assert "pass a larger --max-pixels" in result.stderr
    assert run(*arguments, "--max-pixels", size).exit_code == 0


def test_max_pixels_can_exceed_pillows_limit(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    arguments = ["refine", folder / "images/a.png", "--labels", folder / "labels/a.png"]
    arguments += ["--out", folder / "out"]
    assert run(*arguments).exit_code == 1
    assert run(*arguments, "--max-pixels", 1000).exit_code == 0


def refuses(folder, message, *arguments):
    before = sorted(folder.rglob("*"))
    result = run("refine", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(folder.rglob("*")) == before
    return result


def test_usage_errors(folder):
    image, labels, out = folder / "images/a.png", folder / "labels/a.png", folder / "out"
    refuses(folder, "pass exactly one of --probs and --labels", image, "--out", out)
    both = ["--labels", labels, "--probs", folder / "probs/a.npy"]
    refuses(folder, "pass exactly one of --probs and --labels", image, *both, "--out", out)
    refuses(folder, "--out", image, "--labels", labels)
    refuses(folder, "missing.png", folder / "missing.png", "--labels", labels, "--out", out)
    refuses(
        folder,
        "pass a folder with files of the same stems",
        folder / "images",
        "--labels",
        labels,
        "--out",
        out,
    )
    probs = ["--probs", folder / "probs/a.npy", "--num-labels", 2]
    refuses(folder, "--num-labels goes with --labels", image, *probs, "--out", out)
    (folder / "nothing").mkdir()
    refuses(folder, "holds no images", folder / "nothing", "--labels", folder / "labels", "--out", out)
    refuses(folder, "--method: got 'magic'", image, "--labels", labels, "--out", out, "--method", "magic")
    missing = folder / "missing.json"
    refuses(
        folder, "missing.json: cannot be read", image, "--labels", labels, "--out", out, "--preset", missing
    )
    refuses(folder, "--preset: got 'magic'", image, "--labels", labels, "--out", out, "--preset", "magic")
    refuses(folder, "--iterations", image, "--labels", labels, "--out", out, "--iterations", 0)


def test_results_that_would_replace_each_other(folder):
    (folder / "more").mkdir()
    (folder / "more/A.png").write_bytes((folder / "images/a.png").read_bytes())
    images = [folder / "images/a.png", folder / "more/A.png"]
    options = ["--labels", folder / "labels", "--out", folder / "out"]
    refuses(folder, "would both write", *images, *options)
    (folder / "images/a_overlay.png").write_bytes((folder / "images/a.png").read_bytes())
    refuses(folder, "would both write", folder / "images", *options)


def test_results_that_would_replace_an_input(folder):
    labels = folder / "labels/a.png"
    for out in (folder / "images", folder / "labels"):
        options = ["--labels", labels, "--out", out, "--overwrite"]
        refuses(folder, "would replace the input", folder / "images/a.png", *options)


def test_existing_results_are_replaced_only_when_asked(folder):
    arguments = [folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", folder / "out"]
    (folder / "out").mkdir()
    (folder / "out/a_overlay.png").write_text("precious")
    refuses(folder, "a_overlay.png exists already; pass --overwrite", *arguments)
    assert (folder / "out/a_overlay.png").read_text() == "precious"
    assert run("refine", *arguments, "--overwrite").exit_code == 0
    assert data.read_image(folder / "out/a_overlay.png").shape == (*SHAPE, 3)


def test_a_folder_that_cannot_be_written_to(folder):
    (folder / "file").touch()
    for out in (folder / "file", folder / "file/out"):
        arguments = ["--labels", folder / "labels/a.png", "--out", out]
        refuses(folder, "cannot be written to", folder / "images/a.png", *arguments)


def test_a_failing_write_is_reported_and_leaves_nothing_half_written(folder, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = run(
        "refine", folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", folder / "out"
    )
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert names(folder / "out") == []


def test_names_with_brackets_are_not_markup(folder):
    (folder / "images/a.png").rename(folder / "images/a[red].png")
    result = run(
        "refine", folder / "images/a[red].png", "--labels", folder / "labels", "--out", folder / "[bold]out"
    )
    assert result.exit_code == 1
    assert "holds no a[red].png to go with it" in result.stderr
    assert "[bold]out" in result.stdout


def searched(folder, *options):
    arguments = ("--images", folder / "images", "--probs", folder / "probs", "--labels", folder / "labels")
    few = ("--vary", "bilateral_weight=1:2:5", "--vary", "bilateral_color_bandwidth=13")
    defaults = ("--out", folder / "best.json", "--method", "convcrf", "--coarse", 1, "--refinements", 0, *few)
    return run("search", *arguments, *defaults, *options)


def test_search_finds_parameters_that_refine_takes(folder):
    result = searched(folder)
    assert result.exit_code == 0, result.output
    assert "3 candidates on 3 images" in result.stdout
    assert "known" not in result.stdout
    best = jaxcrf.presets.load(folder / "best.json")
    assert best.bilateral_weight in (1, 3, 5)
    assert best.filter_size == jaxcrf.presets.get("convcrf").filter_size
    assert len((folder / "best.jsonl").read_text().splitlines()) == 4
    arguments = (
        "refine",
        folder / "images/a.png",
        "--probs",
        folder / "probs/a.npy",
        "--out",
        folder / "out",
    )
    result = run(*arguments, "--preset", folder / "best.json", "--save-probs")
    assert result.exit_code == 0, result.output
    image, probs = data.read_image(folder / "images/a.png"), data.read_array(folder / "probs/a.npy")
    refined = data.read_array(folder / "out/a_probs.npy")
    np.testing.assert_allclose(refined, jaxcrf.refine(image, probs, preset=best), atol=1e-6)


def test_search_goes_on_from_its_log(folder):
    log = folder / "mine.log"
    assert searched(folder, "--log", log).exit_code == 0
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    best = (folder / "best.json").read_bytes()
    result = searched(folder, "--log", log)
    assert result.exit_code == 2
    assert "best.json exists already; pass --overwrite" in result.stderr
    result = searched(folder, "--log", log, "--overwrite")
    assert result.exit_code == 0, result.output
    assert f"3 candidates on 3 images, 2 of them known from {log}" in result.stdout.replace("\n", "")
    assert (folder / "best.json").read_bytes() == best
    result = searched(folder, "--log", log, "--overwrite", "--limit", 2)
    assert result.exit_code == 1
    assert "belongs to another search: images is 3 there and 2 here" in result.stderr


def test_search_tells_an_interruption_from_an_error(folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxcrf.training, "search", interrupted)
    result = searched(folder)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("probs/b.npy", np.full((*SHAPE, 2), 0.9, np.float32), "b.npy: do not sum to 1"),
        ("probs/b.npy", np.full((*SHAPE, 2), [2, -1], np.float32), "apply a softmax to unnormalised scores"),
        ("probs/b.npy", np.full((4, 5, 2), 0.5, np.float32), "b.npy: got shape (4, 5, 2)"),
        ("labels/b.png", np.full(SHAPE, 3), "b.png: holds label 3; expected 0 to 1 or --ignore-label 255"),
        ("labels/b.png", np.zeros((4, 5), int), "labels"),
        ("images/b.png", None, "b.png: is empty"),
    ],
)
def test_search_names_the_file_that_is_wrong(folder, name, content, problem):
    if content is None:
        (folder / name).write_bytes(b"")
    elif name.endswith(".npy"):
        data.write_array(folder / name, content)
    else:
        data.write_labels(folder / name, content)
    result = searched(folder)
    assert result.exit_code == 1
    assert str(folder) in result.stderr
    assert problem in result.stderr
    assert "=…" not in result.stderr
    assert not (folder / "best.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "magic"), "--method: got 'magic'"),
        (("--preset", "magic"), "--preset: got 'magic'"),
        (("--out", "best.txt"), "a name that ends in .json"),
        (("--vary", "bilateral_weight=2"), "names the same field twice"),
        (("--vary", "blurr=2"), "--vary: got 'blurr'; expected"),
        (("--vary", "blur"), "expected FIELD=first:step:last or FIELD=a,b,c"),
        (("--vary", "blur=1,"), "expected FIELD=first:step:last or FIELD=a,b,c"),
        (("--vary", "blur=1:0:3"), "a step above 0"),
        (("--vary", "blur=1:nan:3"), "a step above 0"),
        (("--vary", "blur=1:x:3"), "a step above 0"),
        (("--vary", "blur=3:1:1"), "a step above 0"),
        (("--vary", "unary_weight=much"), "--vary: unary_weight: got 'much'"),
        (("--limit", 0), "--limit"),
        (("--images", "labels/missing"), "--images"),
    ],
)
def test_search_refuses(folder, options, message):
    before = sorted(folder.rglob("*"))
    result = searched(folder, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(folder.rglob("*")) == before


def test_search_refuses_files_that_do_not_fit(folder):
    result = searched(folder, "--probs", folder / "probs/a.npy")
    assert result.exit_code == 2
    assert "for 3 images; pass a folder" in result.stderr
    result = searched(folder, "--log", folder / "best.json")
    assert result.exit_code == 2
    assert "--log" in result.stderr
    (folder / "file").touch()
    result = searched(folder, "--log", folder / "file/log")
    assert result.exit_code == 2
    assert "cannot be written to" in result.stderr
    (folder / "labels/b.png").unlink()
    result = searched(folder)
    assert result.exit_code == 2
    assert "holds no b.png to go with it" in result.stderr
    assert not (folder / "best.json").exists()


def test_values_to_vary():
    assert cli._read_values("bilateral_weight=5:1:7") == ("bilateral_weight", [5, 6, 7])
    assert cli._read_values("unary_weight=0.1:0.1:0.35") == ("unary_weight", [0.1, 0.2, 0.3])
    assert cli._read_values("unary_weight= 1, 2.5 ,1e2") == ("unary_weight", [1, 2.5, 100])
    name = "bilateral_position_bandwidth"
    assert cli._read_values(f"{name}=none,4") == (name, [None, 4])
    assert cli._read_values("normalization=none,symmetric") == ("normalization", ["none", "symmetric"])


def test_demo(tmp_path):
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert names(tmp_path) == ["demo.png"]
    assert "own polygon annotation" in result.stdout
    assert "to compile" in result.stdout
    assert "to run" in result.stdout
    noisy, refined = (
        [float(word) for word in line.replace("│", " ").split() if word.replace(".", "").isdigit()]
        for line in result.stdout.splitlines()
        if "│" in line
    )
    assert refined[0] > max(97, noisy[0])
    assert refined[1] > max(85, noisy[1])
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2
    assert "demo.png exists already" in result.stderr


def test_the_annotation_uses_every_label():
    annotation = _demo.annotation()
    assert annotation.shape == _demo.photograph().shape[:2]
    np.testing.assert_array_equal(np.unique(annotation), np.arange(len(_demo.LABELS)))
    assert len(_demo.COLORS) == len(_demo.LABELS)


def test_info():
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in (
        "jax",
        "jaxlib",
        "python",
        "window_message",
        "pair_message",
        "dense up to 4096 pixels, lattice beyond",
        "convcrf",
        "densecrf_sharp",
        "compilation cache",
    ):
        assert word in result.stdout


def test_version_and_help():
    assert run("--version").stdout.startswith("jaxcrf ")
    assert "refine" in run("--help").stdout
    assert "search" in run("--help").stdout
    assert "--num-labels" in CliRunner().invoke(cli.app, ["refine", "--help"], env={"COLUMNS": "200"}).stdout


def test_loading_the_command_line_does_not_load_jax():
    code = "import sys, jaxcrf.cli; assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


COUNT_CACHE_EVENTS = """
import atexit, collections, jax.monitoring
from jaxcrf.cli import main
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
atexit.register(lambda: print("hits", events["cache_hits"], "misses", events["cache_misses"]))
main()
"""


def test_a_second_process_finds_the_programs_in_the_cache(folder):
    cache = folder / "cache"
    command = [sys.executable, "-c", COUNT_CACHE_EVENTS, "refine", "images/a.png"]
    command += ["--labels", "labels/a.png", "--out", "out", "--overwrite"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def hits_and_misses():
        result = subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        )
        _, hits, _, misses = result.stdout.splitlines()[-1].split()
        return int(hits), int(misses)

    hits, misses = hits_and_misses()
    assert misses > 0
    assert any(cache.iterdir())
    assert hits_and_misses() == (hits + misses, 0)


@pytest.fixture
def restored_cache_config():
    import jax

    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    options += ("jax_persistent_cache_min_entry_size_bytes",)
    before = {option: getattr(jax.config, option) for option in options}
    yield jax.config
    for option, value in before.items():
        jax.config.update(option, value)


def test_the_cache_folder_is_the_users_unless_the_environment_names_another(
    tmp_path, monkeypatch, restored_cache_config
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert cli._use_compilation_cache() == tmp_path / "jaxcrf"
    assert restored_cache_config.jax_compilation_cache_dir == str(tmp_path / "jaxcrf")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "other"))
    assert cli._use_compilation_cache() == tmp_path / "other"
    assert restored_cache_config.jax_compilation_cache_dir == str(tmp_path / "other")


def test_a_cache_folder_that_cannot_be_written_to_does_no_harm(folder, monkeypatch, restored_cache_config):
    (folder / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "file/cache"))
    result = run(
        "refine", folder / "images/a.png", "--labels", folder / "labels/a.png", "--out", folder / "out"
    )
    assert result.exit_code == 0, result.output
    assert restored_cache_config.jax_compilation_cache_dir is None
    assert "off (the folder cannot be written to)" in run("info").stdout

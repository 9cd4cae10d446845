import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf
from jaxcrf import presets
from jaxcrf.presets import Preset
from jaxcrf.training import search

# The function of the same name hides it.
module = sys.modules["jaxcrf.training.search"]

# So small that all lattices have the same capacity, and most tests share what is compiled.
BASE = dataclasses.replace(presets.get("densecrf"), num_iterations=2)
SPACE = {"bilateral_weight": [1, 4, 9], "bilateral_color_bandwidth": [4, 12, 40]}
WINDOW = Preset(normalization="none", filter_size=5, blur=1, num_iterations=3)


def example(seed, size=(12, 14), num_labels=2, contrast=24, noise=8):
    """Stripes that differ in brightness, and a prediction of which a quarter is random."""
    random = np.random.default_rng(seed)
    truth = np.broadcast_to(np.arange(size[-1]) // 5 % num_labels, size)
    image = 100 + contrast * truth[..., None] + random.normal(0, noise, (*size, 3))
    noisy = np.where(random.random(size) < 1 / 4, random.integers(num_labels, size=size), truth)
    probs = np.where(noisy[..., None] == np.arange(num_labels), 0.6, 0.4 / (num_labels - 1))
    labels = np.where(random.random(size) < 0.05, 255, truth)
    return image.clip(0, 255).astype(np.uint8), probs.astype(np.float32), labels


@pytest.fixture(scope="module")
def examples():
    return [example(0), example(1), example(2)]


def quietly(examples, **options):
    return search(examples, **({"progress": False, "coarse": 1, "refinements": 0} | options))


def by_hand(examples, weights, unary_weight):
    total = np.zeros((2, 2), np.int64)
    for image, probs, labels in examples:
        refined = dense_by_hand(image, probs, weights, unary_weight).argmax(-1).astype(jnp.int32)
        total += np.asarray(jaxcrf.metrics.confusion_matrix(labels, refined, 2), np.int64)
    return float(jaxcrf.metrics.mean_iou(total)), float(jaxcrf.metrics.pixel_accuracy(total))


@jax.jit
def dense_by_hand(image, probs, weights, unary_weight):
    features = (jaxcrf.position_features(image.shape[:2], 3.0), jaxcrf.bilateral_features(image, 80, 12))
    k = jaxcrf.filters.Lattice(features, weights=weights, capacity=1024).normalized("symmetric")
    logits = jaxcrf.unary_from_probs(probs)
    return jaxcrf.mean_field(logits, [k], num_iterations=2, unary_weight=unary_weight).probs


def test_sizes_that_are_nearly_the_same_have_one_shape():
    sizes = [(366, 500), (375, 500), (500, 334), (500, 375), (333, 450), (366, 500)]
    assert module._common_shapes(sizes) == {
        (366, 500): (375, 500),
        (375, 500): (375, 500),
        (500, 334): (500, 375),
        (500, 375): (500, 375),
        (333, 450): (375, 500),
    }
    assert module._common_shapes([(360, 480)] * 2) == {(360, 480): (360, 480)}


@pytest.mark.slow
def test_candidates_are_those_of_a_loop_whatever_the_padding(monkeypatch):
    monkeypatch.setattr(module, "_common_shapes", lambda sizes: dict.fromkeys(sizes, (12, 14)))
    examples = [example(0, (11, 12)), example(1, (11, 12))]
    space = {"bilateral_color_bandwidth": [12], "bilateral_weight": [1, 4], "unary_weight": [0.5, 1.0]}
    found = quietly(examples, preset=BASE, space=space)
    assert len(found.trials) == 4
    for trial in found.trials:
        weights = np.array([3, trial.parameters["bilateral_weight"]])
        expected = by_hand(examples, weights, trial.parameters["unary_weight"])
        assert (trial.score, trial.pixel_accuracy) == pytest.approx(expected, abs=2e-4)
    assert len({trial.score for trial in found.trials}) > 1


@pytest.mark.parametrize("blur", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_candidates_of_convcrf_are_those_of_refine(examples, blur):
    base = dataclasses.replace(WINDOW, blur=blur)
    space = {"bilateral_weight": [0.0, 0.1, 0.4], "bilateral_color_bandwidth": [12, 40]}
    found = quietly(examples, method="convcrf", preset=base, space=space)
    assert len(found.trials) == 6
    for trial in found.trials:
        preset = dataclasses.replace(base, **trial.parameters)
        total = np.zeros((2, 2), np.int64)
        for image, probs, labels in examples:
            refined = jaxcrf.refine(image, probs, preset=preset).argmax(-1).astype(jnp.int32)
            total += np.asarray(jaxcrf.metrics.confusion_matrix(labels, refined, 2), np.int64)
        assert trial.score == pytest.approx(float(jaxcrf.metrics.mean_iou(total)), abs=2e-4)
    assert len({trial.score for trial in found.trials}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["before", "after", "symmetric"])
def test_padding_is_invisible_to_the_pixels(normalization):
    image, probs, labels = example(3, (9, 11))
    task = module._Task(
        walk=list,
        data=module._Data((labels.shape,), {labels.shape: (12, 14)}, 2, "", 0.0),
        method="densecrf",
        base=Preset(normalization=normalization),
        axes=[],
        unary="probs",
        ignore_label=255,
    )
    k, shape = task._filter(image, task.base)
    assert shape == k.spatial == (12, 14)
    alone = jaxcrf.filters.Lattice(
        (jaxcrf.position_features(labels.shape, 3.0), jaxcrf.bilateral_features(image, 80, 13))
    ).normalized(normalization)
    padded = np.pad(probs, ((0, 3), (0, 3), (0, 0)), constant_values=np.nan)
    message = k(np.nan_to_num(padded, nan=7.0))
    np.testing.assert_allclose(message[:9, :11], alone(probs), rtol=1e-5, atol=1e-5)


def test_the_best_bandwidth_is_found_coarse_to_fine(examples):
    # Less than the noise of the colours smooths nothing, more than the contrast smooths everything.
    values = [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    base = dataclasses.replace(BASE, bilateral_position_bandwidth=20)
    every = quietly(examples, preset=base, space={"bilateral_color_bandwidth": values})
    scores = [trial.score for trial in every.trials]
    assert 4 <= every.best.bilateral_color_bandwidth <= 32
    assert every.score == max(scores) > every.unrefined + 0.05
    assert every.score > max(scores[0], scores[-1]) + 0.05
    assert every.at_edge == ()
    assert "3 images" in every.best.summary

    fine = quietly(
        examples, preset=base, space={"bilateral_color_bandwidth": values}, coarse=3, refinements=1
    )
    tried = [trial.parameters["bilateral_color_bandwidth"] for trial in fine.trials]
    assert tried[:4] == [0.5, 4, 32, 256]
    assert len(tried) == len(set(tried)) < len(values)
    assert fine.score >= every.score


def test_the_walk_is_that_of_an_ascent(monkeypatch):
    """On a known landscape: the first round, neighbours until none is better, half steps at last."""
    peak = {"bilateral_weight": 7.4, "bilateral_color_bandwidth": 9.0}

    def run(self, candidates, bar):
        def score(c):
            return 1 - sum(abs(v - peak[axis.name]) for axis, v in zip(self.axes, c, strict=True)) / 100

        return {c: module.Trial(self.parameters(c), score(c), 0.5, False) for c in candidates}, 0.0

    monkeypatch.setattr(module._Task, "run", run)
    space = {"bilateral_weight": range(5, 11), "bilateral_color_bandwidth": range(3, 11)}
    found = search([example(0)], space=space, progress=False)
    assert (found.best.bilateral_weight, found.best.bilateral_color_bandwidth) == (7.5, 9.0)
    first = [tuple(trial.parameters.values()) for trial in found.trials[:6]]
    assert first == list(itertools.product((6, 9), (3, 6, 9)))
    assert len(found.trials) < 6 * 8
    assert quietly([example(0)], space=space).best.bilateral_weight == 7
    assert len(quietly([example(0)], space=space).trials) == 6 * 8
    space = {"bilateral_weight": [3, 5, 7], "bilateral_color_bandwidth": [9, 12]}
    found = search([example(0)], space=space, refinements=0, progress=False)
    assert found.at_edge == ("bilateral_weight", "bilateral_color_bandwidth")


@pytest.mark.slow
def test_whole_numbers_and_names_stay_on_the_grid(examples):
    space = {"num_iterations": [3, 2], "normalization": ["symmetric", "none"]}
    found = quietly(examples[:1], preset=BASE, space=space, refinements=2)
    assert [tuple(trial.parameters.values()) for trial in found.trials] == [
        (2, "symmetric"),
        (2, "none"),
        (3, "symmetric"),
        (3, "none"),
    ]
    assert len({trial.score for trial in found.trials}) > 1
    space = {"bilateral_position_bandwidth": [None, 20, (20, 30)], "filter_size": np.array([5, 3])}
    _, axes = module.read_space("convcrf", WINDOW, space)
    assert [(axis.values, axis.is_range) for axis in axes] == [
        ((None, 20.0, (20.0, 30.0)), False),
        ((3, 5), True),
    ]


def test_images_of_all_sizes_share_what_is_compiled():
    sizes = [(10, 13), (12, 10), (9, 14), (8, 11), (12, 12)]
    examples = [example(i, size) for i, size in enumerate(sizes)]
    space = {"bilateral_color_bandwidth": [4, 12, 40], "bilateral_weight": [1, 2, 3, 4]}
    quietly([example(0)], preset=BASE, space=space)
    before = module._confusions._cache_size()
    quietly(examples, preset=BASE, space=space)
    space = {"bilateral_color_bandwidth": [6, 30], "bilateral_weight": [5, 6], "unary_weight": [0.5, 1, 2]}
    quietly(examples[::-1], preset=BASE, space=space)
    assert module._confusions._cache_size() == before


@pytest.mark.parametrize("count", [1, 768, 1024, 1025, 1536, 1537, 70_000])
def test_capacities_are_rounded_up_in_half_octaves(count):
    rounded = module._rounded_up(count)
    assert count <= rounded <= max(1024, 1.5 * count)
    assert bin(rounded).count("1") <= 2


def test_examples_are_read_one_after_the_other(examples):
    walks = []

    def walk():
        walks.append(0)
        for item in examples:
            walks[-1] += 1
            yield item

    found = quietly(walk, space=SPACE, preset=BASE)
    assert walks == [3] * 4  # once in the beginning, then once per bandwidth
    assert quietly(examples, space=SPACE, preset=BASE) == found


@pytest.mark.slow
def test_logits_one_channel_and_volumes():
    # A lattice over one channel compiles fast.
    base = dataclasses.replace(BASE, bilateral_position_bandwidth=None)
    for size in ((12, 14), (3, 8, 7)):
        image, probs, labels = example(4, size)
        options = {"space": {"bilateral_weight": [2, 6]}, "preset": base}
        found = quietly([(image[..., 0], np.log(probs), labels)], unary="logits", **options)
        assert found.trials == quietly([(image[..., :1], probs, labels)], **options).trials


# The log.


class Interrupted(Exception):
    pass


def interrupt_after(count):
    seen = []

    def on_trial(trial):
        seen.append(trial)
        if len(seen) == count:
            raise Interrupted

    return on_trial


def settings(path):
    return {"preset": BASE, "space": SPACE, "coarse": 2, "refinements": 1, "log": path}


@pytest.fixture(scope="module")
def whole(examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "log.jsonl"
    return quietly(examples, **settings(path)), path


def test_an_interrupted_search_goes_on_where_it_was(examples, tmp_path, whole):
    expected, whole_log = whole
    path = tmp_path / "log.jsonl"
    with pytest.raises(Interrupted):
        quietly(examples, **settings(path), on_trial=interrupt_after(4))
    finished = len(path.read_text().splitlines()) - 1
    assert 4 <= finished < len(expected.trials)
    seen = []
    found = quietly(examples, **settings(path), on_trial=seen.append)
    assert [trial.recalled for trial in found.trials].count(True) == finished
    assert len(seen) == len(found.trials)
    assert [trial._replace(recalled=False) for trial in found.trials] == list(expected.trials)
    assert found._replace(trials=()) == expected._replace(trials=())

    def candidates(log):
        return sorted(json.dumps(json.loads(line)["parameters"]) for line in log.read_text().splitlines()[1:])

    assert candidates(path) == candidates(whole_log)
    assert all(trial.recalled for trial in quietly(examples, **settings(path)).trials)


def test_a_line_that_was_cut_off_is_computed_again(examples, tmp_path, whole):
    expected, log = whole
    path = tmp_path / "log.jsonl"
    content = log.read_bytes()
    for cut in (1, 20):
        path.write_bytes(content[:-cut])
        found = quietly(examples, **settings(path))
        assert [trial.recalled for trial in found.trials].count(False) == 1
        assert found.best == expected.best
        assert len(path.read_bytes().splitlines()) == len(content.splitlines())
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
    path.write_bytes(b"")
    assert not any(trial.recalled for trial in quietly(examples[:1], **settings(path)).trials)


def test_other_rounds_begin_with_what_is_known(examples, tmp_path, whole):
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole[1].read_bytes())
    found = quietly(examples, **settings(path) | {"coarse": 1, "refinements": 0})
    assert len(found.trials) == 9
    assert any(trial.recalled for trial in found.trials)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": slice(2)}, "images is 3 there and 2 here"),
        ({"examples": slice(None, None, -1)}, "fingerprint is"),
        ({"space": {"bilateral_weight": [1, 4]}}, r"space.bilateral_weight is \[1.0, 4.0, 9.0\] there and"),
        ({"method": "convcrf"}, "method is densecrf there and convcrf here"),
        ({"preset": Preset(num_iterations=7)}, "preset.num_iterations is 2 there and 7 here"),
        ({"ignore_label": 7}, "ignore_label is 255 there and 7 here"),
    ],
)
def test_the_log_of_another_search_is_refused(examples, whole, change, message):
    _, path = whole
    before = path.read_bytes()
    options = settings(path) | change
    given = examples[options.pop("examples", slice(None))]
    if "ignore_label" in change:
        given = [(image, probs, np.where(labels == 255, 0, labels)) for image, probs, labels in given]
    with pytest.raises(ValueError, match=message) as error:
        quietly(given, **options)
    assert f"log: {path} belongs to another search" in str(error.value)
    assert path.read_bytes() == before


def test_what_does_not_matter_to_the_method_does_not_matter_to_the_log(examples, whole):
    expected, path = whole
    base = dataclasses.replace(BASE, blur=2, summary="mine", bilateral_weight=2)
    assert quietly(examples, **settings(path) | {"preset": base}).score == expected.score


def test_files_that_are_no_log_are_refused(examples, tmp_path, whole):
    path = tmp_path / "log.jsonl"
    for content in ("notes", "notes\n", "{}\n", "[1]\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not the log of a search"):
            quietly(examples, **settings(path))
        assert path.read_text() == content
    header, first, *_ = whole[1].read_text().splitlines()
    broken = ("nonsense", "[]", '{"parameters": {}}', first.replace("bilateral_weight", "w"), first[:-9])
    for line in (*broken, first.replace('"mean_iou": 0', '"mean_iou": 3')):
        path.write_text(f"{header}\n{first}\n{line}\n")
        with pytest.raises(ValueError, match=r"log.jsonl, line 3: is not a candidate of this search"):
            quietly(examples, **settings(path))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method: got 'magic'; expected one of densecrf, convcrf"),
        ({"unary": "labels"}, "unary: got 'labels'; expected one of probs, logits"),
        ({"coarse": 0}, "coarse: got 0"),
        ({"refinements": -1}, "refinements: got -1"),
        ({"preset": "magic"}, "preset: got 'magic'"),
        ({"space": {}}, "space: is empty"),
        ({"space": {"bilateral_wieght": [1]}}, "did you mean 'bilateral_weight'"),
        ({"space": {"summary": ["a"]}}, "space: got 'summary'"),
        ({"space": {"blur": [1]}}, "blur has no effect on method 'densecrf'"),
        ({"space": {"bilateral_weight": 3}}, "bilateral_weight: got 3; expected a list of values"),
        ({"space": {"bilateral_weight": []}}, "bilateral_weight: got no values"),
        ({"space": {"bilateral_color_bandwidth": [3, 0]}}, "space: bilateral_color_bandwidth: got 0"),
        ({"space": {"bilateral_weight": [0, 1], "position_weight": [0, 1]}}, "may both be 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        quietly([example(0)], **options)


def changed(index, change):
    arrays = list(example(0))
    arrays[index] = change(arrays[index])
    return tuple(arrays)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed(0, lambda x: x[1:]), r"example 1: image: got shape \(11, 14, 3\)"),
        (changed(0, lambda x: x[..., :1]), "example 1: image: got 1 channels, but the first example has 3"),
        (changed(0, lambda x: np.where(x > 0, np.nan, x)), "example 1: image: holds NaN"),
        (changed(0, lambda x: x > 3), "example 1: image: got dtype bool"),
        (changed(1, lambda x: x[:, 1:]), r"example 1: probs: got shape \(12, 13, 2\)"),
        (changed(1, lambda x: x * 3), "example 1: probs: do not sum to 1"),
        (changed(1, lambda x: np.full((12, 14, 4), 0.25)), "example 1: unary: got 4 labels"),
        (changed(2, lambda x: x + 2), "example 1: labels: holds label"),
        (changed(2, lambda x: x[None, None]), r"example 1: labels: got shape \(1, 1, 12, 14\)"),
        (changed(2, lambda x: x * 1.0), "example 1: labels: got dtype float64"),
    ],
)
def test_examples_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        quietly([example(0), wrong], space=SPACE)


def test_collections_that_do_not_fit():
    with pytest.raises(TypeError, match="can be walked through only once"):
        quietly(iter([example(0)]))
    with pytest.raises(TypeError, match="examples: got int"):
        quietly(3)
    with pytest.raises(TypeError, match=r"example 0: got list; expected \(image, probs, labels\)"):
        quietly([[1, 2]])
    with pytest.raises(ValueError, match="examples: got none"):
        quietly([])
    with pytest.raises(ValueError, match="no pixel of any label map counts"):
        quietly([changed(2, lambda x: np.full_like(x, 255))])
    with pytest.raises(ValueError, match="logits: got dtype int64"):
        quietly([changed(1, lambda x: x.astype(np.int64))], unary="logits")
    with pytest.warns(UserWarning, match="multiply the image by 255"):
        quietly([changed(0, lambda x: x / 255)], space={"bilateral_weight": [1]}, preset=BASE)


def test_examples_that_change_on_the_way():
    lengths = iter([2, 1, 3])

    def walk():
        return [example(0)] * next(lengths)

    with pytest.raises(ValueError, match="examples: got 1, and 2 at first"):
        quietly(walk, space={"bilateral_weight": [1]}, preset=BASE)
    lengths = iter([2, 3])
    with pytest.raises(ValueError, match="example 2: is not what it was at first"):
        quietly(walk, space={"bilateral_weight": [1]}, preset=BASE)


def test_a_candidate_beyond_the_lattice_is_named():
    with pytest.raises(
        ValueError, match=r"example 0: at bilateral_color_bandwidth=1e-06: features: they span"
    ):
        quietly([example(0)], space={"bilateral_color_bandwidth": [1e-6]}, preset=BASE)


def test_a_kernel_of_weight_0_is_left_out():
    only = dataclasses.replace(BASE, bilateral_weight=0)
    assert quietly([example(0)], preset=only, space={"position_weight": [1]}).best.bilateral_weight == 0
    found = quietly([example(0)], preset=BASE, space={"position_weight": [0.0, 1]})
    only = dataclasses.replace(BASE, position_weight=0)
    alone = quietly([example(0)], preset=only, space={"bilateral_weight": [10]})
    assert found.trials[0].score == pytest.approx(alone.score, abs=2e-4)


def test_the_default_space_is_the_papers():
    space = module.SPACES["densecrf"]
    assert space["bilateral_weight"] == tuple(range(5, 11))
    assert space["bilateral_position_bandwidth"] == tuple(range(50, 101, 10))
    assert space["bilateral_color_bandwidth"] == tuple(range(3, 11))
    base = module.PRESETS["densecrf"]
    assert (base.position_weight, base.position_bandwidth, base.num_iterations) == (3, 3, 10)
    for method in ("densecrf", "convcrf"):
        base, axes = module.read_space(method, None, None)
        assert base == module.PRESETS[method]
        assert {axis.name: axis.values for axis in axes} == module.SPACES[method]


def test_the_bar_goes_to_standard_error(capsys):
    search([example(0)], preset=BASE, space={"bilateral_weight": [1, 2]}, coarse=1, refinements=0)
    out, err = capsys.readouterr()
    assert not out
    assert "Round 1" in err


def test_the_result_is_a_preset_that_refine_takes(examples, tmp_path, whole):
    found, _ = whole
    presets.save(found.best, tmp_path / "best.json")
    image, probs, _ = examples[0]
    refined = jaxcrf.refine(image, probs, preset=tmp_path / "best.json")
    np.testing.assert_array_equal(refined, jaxcrf.refine(image, probs, preset=found.best))
    assert isinstance(refined, jax.Array)

import dataclasses
import json

import numpy as np
import pytest

import jaxcrf
from jaxcrf import presets


def test_published_settings_are_there():
    # position bandwidth / weight; bilateral position, colour / weight; iterations
    expected = {
        "densecrf": (3, 3, 80, 13, 10, 5),
        "densecrf_deeplab_v2": (1, 3, 67, 3, 4, 10),
        "densecrf_sharp": (3, 3, 50, 5, 10, 10),
        "densecrf_sharp_smooth": (3, 7, 50, 5, 10, 10),
    }
    for name, numbers in expected.items():
        p = presets.get(name)
        found = (
            p.position_bandwidth,
            p.position_weight,
            p.bilateral_position_bandwidth,
            p.bilateral_color_bandwidth,
            p.bilateral_weight,
            p.num_iterations,
        )
        assert found == numbers
        assert (p.normalization, p.unary_weight) == ("symmetric", 1.0)


def test_the_references_are_there():
    p = presets.get("densecrf_crf_as_rnn")
    assert (p.position_bandwidth, p.bilateral_position_bandwidth, p.bilateral_color_bandwidth) == (3, 160, 3)
    assert (p.position_weight, p.bilateral_weight, p.normalization, p.num_iterations) == (3, 5, "after", 5)
    p = presets.get("convcrf_reference")
    assert (p.filter_size, p.blur, p.normalization, p.num_iterations) == (11, 4, "none", 5)
    assert (p.bilateral_weight, p.position_weight, p.unary_weight) == pytest.approx(
        (0.2 * 10, 0.2 * 3, 1 - 0.2)
    )
    assert (p.bilateral_position_bandwidth, p.bilateral_color_bandwidth, p.position_bandwidth) == (
        None,
        13,
        3,
    )


def test_presets_are_frozen_hashable_and_described():
    for name in presets.names():
        preset = presets.get(name)
        assert preset.summary != "custom"
        assert hash(preset) == hash(dataclasses.replace(preset))
        with pytest.raises(dataclasses.FrozenInstanceError):
            preset.blur = 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unary_weight", float("nan")),
        ("position_weight", float("inf")),
        ("bilateral_weight", "much"),
        ("position_weight", 10**400),
        ("position_bandwidth", 0),
        ("position_bandwidth", ()),
        ("bilateral_color_bandwidth", None),
        ("bilateral_position_bandwidth", (80.0, -1.0)),
        ("normalization", "sideways"),
        ("num_iterations", float("nan")),
        ("num_iterations", -1),
        ("filter_size", 4),
        ("filter_size", True),
        ("filter_size", ()),
        ("filter_size", None),
        ("blur", 0),
        ("blur", 2.5),
    ],
)
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: got"):
        presets.Preset(**{field: value})


def test_numbers_of_any_kind_become_plain_ones():
    p = presets.Preset(
        unary_weight=np.float32(0.5), filter_size=[3, 5], position_bandwidth=np.array([3.0, 4.0])
    )
    assert p == presets.Preset(unary_weight=0.5, filter_size=(3, 5), position_bandwidth=(3.0, 4.0))
    assert hash(p) == hash(dataclasses.replace(p))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'densecrf'"):
        presets.get("dense_crf")


def test_presets_are_read_as_they_were_written(tmp_path):
    varied = presets.Preset(
        summary="für zwei Achsen",
        position_bandwidth=(3.0, 4.5),
        bilateral_position_bandwidth=None,
        bilateral_weight=1 / 3,
        filter_size=(3, 5),
    )
    for n, preset in enumerate((varied, *map(presets.get, presets.names()))):
        path = tmp_path / f"{n}.json"
        presets.save(preset, path)
        assert presets.load(path) == presets.get(path) == presets.get(str(path)) == preset
    assert len(list(tmp_path.iterdir())) == n + 1


def test_saving_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    presets.save(presets.Preset(blur=2), path)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        presets.save(presets.Preset(blur=3), path)
    assert presets.load(path).blur == 2
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]


def test_fields_that_a_file_leaves_out_are_the_defaults(tmp_path):
    path = tmp_path / "mine"
    path.write_text('{"blur": 2, "bilateral_weight": 7}')
    assert presets.get(path) == presets.Preset(blur=2, bilateral_weight=7)
    path.write_text("{}")
    assert presets.load(path) == presets.Preset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a preset file"),
        (b"{", "is not a preset file"),
        (b"\xff\xfe\x00", "is not a preset file"),
        (b"[" * 100_000, "is not a preset file"),
        (b'{"blur": 2, "blur": 3}', r"is not a preset file \(blur: is given more than once\)"),
        (b"[]", "holds a JSON list; expected one object"),
        (b'"densecrf"', "holds a JSON str; expected one object"),
        (b'{"blurr": 2}', "blurr: is no field of a preset; expected summary, .*; did you mean 'blur'"),
        (b'{"summary": 3}', "summary: got 3; expected a string"),
        (b'{"position_weight": "3"}', "position_weight: got '3'; expected a number"),
        (b'{"position_weight": true}', "position_weight: got True; expected a number"),
        (b'{"position_weight": null}', "position_weight: got None; expected a finite number"),
        (b'{"position_weight": NaN}', "position_weight: got nan; expected a finite number"),
        (b'{"position_weight": [1]}', r"position_weight: got \[1\]; expected a finite number"),
        (b'{"position_bandwidth": ["3", 3]}', "position_bandwidth: got '3'; expected a number"),
        (b'{"position_bandwidth": []}', r"position_bandwidth: got \[\]; a bandwidth must be"),
        (b'{"bilateral_color_bandwidth": {"r": 3}}', "bilateral_color_bandwidth: got {'r': 3}"),
        (b'{"normalization": "sideways"}', "normalization: got 'sideways'; expected one of none, before"),
        (b'{"normalization": []}', "normalization: got"),
        (b'{"num_iterations": 2.5}', "num_iterations: got 2.5; expected a whole number"),
        (b'{"filter_size": [3, 4]}', r"filter_size: got \[3, 4\]; expected an odd number"),
    ],
)
def test_malformed_files_are_named_with_the_field(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"mine.json: {message}"):
        presets.load(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"mine.json: cannot be read \(No such file or directory\)"):
        presets.get(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        presets.get(tmp_path)
    with pytest.raises(ValueError, match=r"preset: got 'mine'; .*, or the path of a .json file"):
        presets.get("mine")


def test_refine_takes_a_file(tmp_path):
    path = tmp_path / "mine.json"
    presets.save(presets.Preset(blur=1, filter_size=3, normalization="none"), path)
    image, labels = np.arange(60, dtype=np.uint8).reshape(5, 4, 3), np.eye(5, 4, dtype=int)
    expected = jaxcrf.refine(image, labels=labels, num_labels=2, preset=presets.load(path))
    for given in (path, str(path)):
        refined = jaxcrf.refine(image, labels=labels, num_labels=2, preset=given)
        np.testing.assert_array_equal(refined, expected)
    with pytest.raises(ValueError, match=r"no.json: cannot be read"):
        jaxcrf.refine(image, labels=labels, num_labels=2, preset="no.json")

import dataclasses

import numpy as np
import pytest

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


def test_the_reference_is_there():
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
        ("position_bandwidth", 0),
        ("bilateral_color_bandwidth", None),
        ("bilateral_position_bandwidth", (80.0, -1.0)),
        ("normalization", "sideways"),
        ("num_iterations", float("nan")),
        ("num_iterations", -1),
        ("filter_size", 4),
        ("filter_size", True),
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

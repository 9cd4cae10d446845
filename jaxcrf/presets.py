"""Named parameters of a two-kernel CRF: those of the papers and those that published scripts use."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from jaxcrf._checks import Normalization, check_normalization


@dataclasses.dataclass(frozen=True)
class Preset:
    """Parameters of the energy with a smoothness and an appearance kernel, and of its inference.

    The pairwise term is Potts with the filter (eq. 4 of the ConvCRF paper, eq. 3 of DeepLab's)

        w⁽²⁾ exp(-‖p_i - p_j‖² / 2θ_γ²) + w⁽¹⁾ exp(-‖p_i - p_j‖² / 2θ_α² - ‖I_i - I_j‖² / 2θ_β²) .

    Attributes:
        summary: one line on where the numbers come from.
        position_weight: `w⁽²⁾` of the smoothness kernel.
        position_bandwidth: `θ_γ` in pixels, one number or one per axis in array order.
        bilateral_weight: `w⁽¹⁾` of the appearance kernel.
        bilateral_position_bandwidth: `θ_α` in pixels, likewise; None leaves positions out of the appearance kernel.
        bilateral_color_bandwidth: `θ_β` in image units (0 to 255).
        unary_weight: weight of the unary logits.
        normalization: of every kernel: "none", "before", "after" or "symmetric".
        num_iterations: mean-field iterations.
        filter_size: odd width of the window, one number or one per axis, on the grid that `blur` leaves
            (window filter only).
        blur: the factor by which the window filter pools the image (window filter only).

    Raises:
        ValueError: if a field is out of its range.

    Example:
        >>> Preset(position_weight=1, blur=2).position_weight
        1.0
    """

    summary: str = "custom"
    position_weight: float = 3.0
    position_bandwidth: float | tuple[float, ...] = 3.0
    bilateral_weight: float = 10.0
    bilateral_position_bandwidth: float | tuple[float, ...] | None = 80.0
    bilateral_color_bandwidth: float | tuple[float, ...] = 13.0
    unary_weight: float = 1.0
    normalization: Normalization = "symmetric"
    num_iterations: int = 5
    filter_size: int | tuple[int, ...] = 11
    blur: int = 4

    def __post_init__(self) -> None:
        """Makes every field a plain Python number, so that presets hash and compare, and checks them."""
        for name in ("position_weight", "bilateral_weight", "unary_weight"):
            self._set(name, self._number(name, getattr(self, name)))
        for name in ("position_bandwidth", "bilateral_position_bandwidth", "bilateral_color_bandwidth"):
            value = getattr(self, name)
            if value is None and name == "bilateral_position_bandwidth":
                continue
            several = isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0
            numbers = tuple(self._number(name, v) for v in (value if several else (value,)))
            if any(not v > 0 for v in numbers):
                raise ValueError(f"{name}: got {value}; a bandwidth must be greater than 0")
            self._set(name, numbers if several else numbers[0])
        check_normalization(self.normalization)
        self._set("num_iterations", self._whole("num_iterations", self.num_iterations, 0))
        self._set("blur", self._whole("blur", self.blur, 1))
        size: Any = self.filter_size
        sizes = tuple(
            self._whole("filter_size", k, 1) for k in (size if isinstance(size, Sequence) else (size,))
        )
        if any(k % 2 == 0 for k in sizes):
            raise ValueError(f"filter_size: got {size}; expected an odd number (a window has a centre)")
        self._set("filter_size", sizes if isinstance(size, Sequence) else sizes[0])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @staticmethod
    def _number(name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name}: got {value!r}; expected a finite number")
        return number

    @staticmethod
    def _whole(name: str, value: Any, least: int) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if isinstance(value, bool) or number < least:
            raise ValueError(f"{name}: got {value!r}; expected a whole number >= {least}")
        return number


_PRESETS = {
    # Learned by experiments/tune_convcrf.py on CamVid training images under synthetic noise; at blur 4 windows
    # of 5 to 13 come out alike, at blur 2 a little better and half as fast.
    "convcrf": Preset(
        summary="7×7 at blur 4, tuned by gradient on CamVid: what `refine` does by default",
        position_weight=7.97,
        position_bandwidth=3.23,
        bilateral_weight=11.5,
        bilateral_position_bandwidth=4.7,
        bilateral_color_bandwidth=15.6,
        unary_weight=0.591,
        normalization="none",
        filter_size=7,
    ),
    "convcrf_fine": Preset(
        summary="11×11 at blur 2, tuned likewise: finer edges for twice the time",
        position_weight=4.46,
        position_bandwidth=3.01,
        bilateral_weight=8.7,
        bilateral_position_bandwidth=4.94,
        bilateral_color_bandwidth=17.8,
        unary_weight=0.73,
        normalization="none",
        blur=2,
    ),
    "convcrf_reference": Preset(
        summary="the public ConvCRF code with its defaults: 11×11 at blur 4, colours without positions",
        position_weight=0.6,
        bilateral_weight=2.0,
        bilateral_position_bandwidth=None,
        unary_weight=0.8,
        normalization="none",
    ),
    "densecrf": Preset(summary="3/3; 80,13/10; 5 iterations: the fully connected CRF's usual demonstration"),
    "densecrf_deeplab_v2": Preset(
        summary="1/3; 67,3/4; 10 iterations: DeepLab-v2 scripts",
        position_bandwidth=1.0,
        bilateral_weight=4.0,
        bilateral_position_bandwidth=67.0,
        bilateral_color_bandwidth=3.0,
        num_iterations=10,
    ),
    "densecrf_sharp": Preset(
        summary="3/3; 50,5/10; 10 iterations: weakly supervised segmentation scripts",
        bilateral_position_bandwidth=50.0,
        bilateral_color_bandwidth=5.0,
        num_iterations=10,
    ),
    "densecrf_sharp_smooth": Preset(
        summary="3/7; 50,5/10; 10 iterations: as densecrf_sharp, smoother",
        position_weight=7.0,
        bilateral_position_bandwidth=50.0,
        bilateral_color_bandwidth=5.0,
        num_iterations=10,
    ),
}


def names() -> tuple[str, ...]:
    """The names of all presets.

    Example:
        >>> "convcrf" in names()
        True
    """
    return tuple(_PRESETS)


def get(name: str) -> Preset:
    """The preset of that name.

    Args:
        name: one of `names()`.

    Returns:
        The preset; vary it with `dataclasses.replace`.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> get("densecrf").bilateral_color_bandwidth
        13.0
    """
    if not isinstance(name, str) or name not in _PRESETS:
        import difflib

        close = difflib.get_close_matches(str(name), _PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"preset: got {name!r}; expected one of {', '.join(_PRESETS)}{hint}")
    return _PRESETS[name]

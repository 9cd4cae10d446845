"""Parameters of a two-kernel CRF: by name, those of the papers and of published scripts, or from a file."""

import dataclasses
import difflib
import json
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
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
            if not numbers or any(not v > 0 for v in numbers):
                raise ValueError(f"{name}: got {value}; a bandwidth must be greater than 0")
            self._set(name, numbers if several else numbers[0])
        check_normalization(self.normalization)
        self._set("num_iterations", self._whole("num_iterations", self.num_iterations, 0))
        self._set("blur", self._whole("blur", self.blur, 1))
        size: Any = self.filter_size
        sizes = tuple(
            self._whole("filter_size", k, 1) for k in (size if isinstance(size, Sequence) else (size,))
        )
        if not sizes or any(k % 2 == 0 for k in sizes):
            raise ValueError(f"filter_size: got {size}; expected an odd number (a window has a centre)")
        self._set("filter_size", sizes if isinstance(size, Sequence) else sizes[0])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @staticmethod
    def _number(name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
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
    "convcrf_trainable": Preset(
        summary="a start for learning: kernels that are averages and weigh as much as the unary; 7×7 at blur 4",
        position_weight=1.0,
        bilateral_weight=1.0,
        bilateral_position_bandwidth=4.7,
        bilateral_color_bandwidth=15.6,
        filter_size=7,
    ),
    "densecrf": Preset(summary="3/3; 80,13/10; 5 iterations: the fully connected CRF's usual demonstration"),
    "densecrf_crf_as_rnn": Preset(
        summary="3/3; 160,3/5; 5 iterations: what CRF-as-RNN is trained from, which is tested with 10",
        bilateral_weight=5.0,
        bilateral_position_bandwidth=160.0,
        bilateral_color_bandwidth=3.0,
        normalization="after",
    ),
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


def get(name: str | os.PathLike) -> Preset:
    """The preset of that name, or the one in that file.

    Args:
        name: one of `names()`; or the path of a preset file, as a `Path` or as a string that ends in `.json`.

    Returns:
        The preset; vary it with `dataclasses.replace`.

    Raises:
        ValueError: if there is none of that name, or the file cannot be read; see `load`.

    Example:
        >>> get("densecrf").bilateral_color_bandwidth
        13.0
    """
    if isinstance(name, os.PathLike) or (isinstance(name, str) and name.lower().endswith(".json")):
        return load(name)
    if not isinstance(name, str) or name not in _PRESETS:
        expected = f"one of {', '.join(_PRESETS)}, or the path of a .json file"
        raise ValueError(f"preset: got {name!r}; expected {expected}{_nearest(str(name), _PRESETS)}")
    return _PRESETS[name]


def load(path: str | os.PathLike) -> Preset:
    """Reads a preset from a file.

    The file holds one JSON object with fields of `Preset`: numbers, lists of numbers where there is one per
    axis, and `null` for a `bilateral_position_bandwidth` that leaves positions out. Fields that it does not
    name are those of `Preset()`.

    Args:
        path: the file.

    Returns:
        The preset.

    Raises:
        ValueError: if there is no such file, or it holds anything else; the message names the file, the field
            and what was expected.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "mine.json")
        >>> _ = path.write_text('{"bilateral_weight": 7, "num_iterations": 10}')
        >>> preset = load(path)
        >>> preset.bilateral_weight, preset.num_iterations, preset.position_weight
        (7.0, 10, 3.0)
    """
    path = Path(path)
    try:
        fields = json.loads(path.read_bytes(), object_pairs_hook=_once_each)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected a preset file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not a preset file ({error}); expected one JSON object") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path}: holds a JSON {type(fields).__name__}; expected one object with the fields of a preset"
        )
    known = [field.name for field in dataclasses.fields(Preset)]
    for name, value in fields.items():
        if name not in known:
            raise ValueError(
                f"{path}: {name}: is no field of a preset; expected {', '.join(known)}{_nearest(name, known)}"
            )
        if name == "summary":
            if not isinstance(value, str):
                raise ValueError(f"{path}: summary: got {value!r}; expected a string")
        # Preset reads numbers from strings and booleans, which in a file are mistakes.
        elif name != "normalization":
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (str, bool)):
                    raise ValueError(f"{path}: {name}: got {number!r}; expected a number")
    try:
        return Preset(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(preset: Preset, path: str | os.PathLike) -> None:
    """Writes a preset as a file that `load`, `refine` and the command line read.

    Args:
        preset: the parameters.
        path: the file, whose name should end in `.json`; one that exists is replaced in one step.

    Raises:
        OSError: if the folder does not exist or cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "mine.json")
        >>> save(Preset(bilateral_weight=7.0), path)
        >>> load(path) == Preset(bilateral_weight=7.0)
        True
    """
    from jaxcrf.data.images import replacing

    with replacing(path) as file:
        file.write((json.dumps(dataclasses.asdict(preset), indent=2) + "\n").encode())


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: is given more than once")
    return dict(pairs)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

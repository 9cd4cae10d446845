"""Named parameters of a two-kernel CRF: those of the papers and those that published scripts use."""

import dataclasses
from typing import Literal

Normalization = Literal["none", "before", "after", "symmetric"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Parameters of the energy with a smoothness and an appearance kernel, and of its inference.

    The pairwise term is Potts with the filter (eq. 4 of the ConvCRF paper, eq. 3 of DeepLab's)

        w⁽²⁾ exp(-‖p_i - p_j‖² / 2θ_γ²) + w⁽¹⁾ exp(-‖p_i - p_j‖² / 2θ_α² - ‖I_i - I_j‖² / 2θ_β²) .

    Attributes:
        summary: one line on where the numbers come from.
        position_weight: `w⁽²⁾` of the smoothness kernel.
        position_bandwidth: `θ_γ` in pixels.
        bilateral_weight: `w⁽¹⁾` of the appearance kernel.
        bilateral_position_bandwidth: `θ_α` in pixels; None leaves positions out of the appearance kernel.
        bilateral_color_bandwidth: `θ_β` in image units (0 to 255).
        unary_weight: weight of the unary logits.
        normalization: of every kernel: "none", "before", "after" or "symmetric".
        num_iterations: mean-field iterations.
        filter_size: odd width of the window, on the grid that `blur` leaves (window filter only).
        blur: the factor by which the window filter pools the image (window filter only).
    """

    summary: str = "custom"
    position_weight: float = 3.0
    position_bandwidth: float = 3.0
    bilateral_weight: float = 10.0
    bilateral_position_bandwidth: float | None = 80.0
    bilateral_color_bandwidth: float = 13.0
    unary_weight: float = 1.0
    normalization: Normalization = "symmetric"
    num_iterations: int = 5
    filter_size: int = 11
    blur: int = 4


_PRESETS = {
    "convcrf": Preset(
        summary="the public ConvCRF reference with its defaults: 11×11 at blur 4, colours without positions",
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
    if name not in _PRESETS:
        import difflib

        close = difflib.get_close_matches(name, _PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"preset: got {name!r}; expected one of {', '.join(_PRESETS)}{hint}")
    return _PRESETS[name]

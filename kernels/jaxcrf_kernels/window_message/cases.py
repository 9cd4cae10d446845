"""The cases that every implementation of the window message must get right.

Tests compare values and gradients on `CASES`, lowering checks add `FULL_SIZE_CASES`, and benchmarks time
the latter: whatever one of them measures, the others have checked.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcrf_kernels._bank import Operands


class Case(NamedTuple):
    """The shapes and static arguments of one call.

    Attributes:
        name: unique, and fit to be a test's identifier.
        spatial: pixels along every spatial axis.
        labels: labels of `q`.
        batch: items of `q`.
        filter_size: as in `window_message`.
        feature_sizes: features per kernel; as many entries as there are kernels.
        position_bandwidths: as in `window_message`.
        scaled: whether both pixel scales are given.
        shared: whether features and scales have one item for the whole batch.
        dtype: of `q`, features and scales; weights are float32 always, as parameters are.
    """

    name: str
    spatial: tuple[int, ...]
    labels: int = 3
    batch: int = 1
    filter_size: int | tuple[int, ...] = 5
    feature_sizes: tuple[int, ...] = (3,)
    position_bandwidths: tuple[tuple[float, ...] | None, ...] | None = None
    scaled: bool = False
    shared: bool = False
    dtype: str = "float32"

    @property
    def static(self) -> dict[str, Any]:
        """The arguments of `window_message` that are not arrays."""
        return {"filter_size": self.filter_size, "position_bandwidths": self.position_bandwidths}

    @property
    def window(self) -> tuple[int, ...]:
        """The window's size along every axis, less the offsets that are longer than the image."""
        size = self.filter_size
        sizes = (size,) * len(self.spatial) if isinstance(size, int) else size
        return tuple(min(k, 2 * n - 1) for k, n in zip(sizes, self.spatial, strict=True))

    @property
    def offsets(self) -> int:
        """How many offsets a pass over the window visits."""
        return math.prod(self.window)


def operands(case: Case, seed: int = 0) -> Operands:
    """Draws the arrays of a case: reproducible, and of sizes at which every term counts.

    Args:
        case: one of `CASES` or `FULL_SIZE_CASES`.
        seed: of the random generator.

    Returns:
        NumPy arrays. Neighbours' features differ by about one bandwidth, so that kernel values spread
        over (0, 1); scales are positive, as normalisations are.

    Example:
        >>> from jaxcrf_kernels import window_message
        >>> window_message(**operands(CASES[0])._asdict(), **CASES[0].static).shape
        (1, 7, 9, 3)
    """
    generator = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    kernels = len(case.feature_sizes)
    shared_batch = 1 if case.shared else case.batch

    def scales() -> np.ndarray | None:
        if not case.scaled:
            return None
        return generator.uniform(0.5, 1.5, (shared_batch, *case.spatial, kernels)).astype(dtype)

    return Operands(
        q=generator.normal(size=(case.batch, *case.spatial, case.labels)).astype(dtype),
        features=tuple(
            generator.normal(
                scale=1 / math.sqrt(2 * max(d, 1)), size=(shared_batch, *case.spatial, d)
            ).astype(dtype)
            for d in case.feature_sizes
        ),
        weights=generator.uniform(0.5, 2.0, kernels).astype(np.float32),
        left=scales(),
        right=scales(),
    )


CASES = (
    Case("plain", (7, 9)),
    Case("even_image", (8, 6)),
    Case("many_labels", (6, 7), labels=21),
    Case("one_label", (6, 7), labels=1),
    Case("one_pixel", (1, 1)),
    Case("one_row", (1, 13)),
    Case("one_column", (13, 1)),
    Case("one_offset", (5, 6), filter_size=1),
    Case("window_beyond_image", (4, 3), filter_size=11),
    Case("oblong_window", (7, 8), filter_size=(3, 7)),
    Case("flat_window", (6, 11), filter_size=(1, 9)),
    Case("wide", (3, 300)),
    Case("box", (6, 7), feature_sizes=(0,)),
    Case("positions_only", (6, 7), feature_sizes=(0,), position_bandwidths=((1.5, 3.0),)),
    Case("positions_and_features", (7, 6), feature_sizes=(3,), position_bandwidths=((2.0, 1.0),)),
    Case("merged", (7, 6), feature_sizes=(5, 0, 1), position_bandwidths=(None, (2.0, 1.0), (3.0, 3.0))),
    Case("scaled", (6, 7), scaled=True),
    Case("merged_scaled", (6, 7), feature_sizes=(3, 0), position_bandwidths=(None, (2.0, 1.0)), scaled=True),
    Case("batch", (5, 7), batch=3, feature_sizes=(3, 2), scaled=True),
    Case("batch_shared", (5, 7), batch=3, feature_sizes=(3, 0), shared=True, scaled=True),
    Case("batch_wide", (2, 150), batch=2, filter_size=3, scaled=True),
    Case("line", (17,)),
    Case("wide_line", (300,), batch=2, filter_size=7, position_bandwidths=((2.0,),)),
    Case(
        "volume", (3, 4, 5), filter_size=3, feature_sizes=(1, 0), position_bandwidths=(None, (1.0, 2.0, 3.0))
    ),
    Case("volume_batch", (2, 3, 7), batch=2, filter_size=(3, 3, 5), shared=True, scaled=True),
    Case("bfloat16", (6, 7), dtype="bfloat16"),
    Case("bfloat16_merged", (6, 7), batch=2, feature_sizes=(3, 0), scaled=True, dtype="bfloat16"),
)

# ConvCRF on PASCAL VOC images: the colour kernel alone and merged with the position kernel (bandwidth 3),
# at full resolution and blurred by four, and the larger window of the deep parsing network.
FULL_SIZE_CASES = (
    Case("voc", (375, 500), labels=21, filter_size=11, feature_sizes=(3,)),
    Case(
        "voc_merged",
        (375, 500),
        labels=21,
        filter_size=11,
        feature_sizes=(3, 0),
        position_bandwidths=(None, (3.0, 3.0)),
    ),
    Case(
        "voc_normalized",
        (375, 500),
        labels=21,
        filter_size=11,
        feature_sizes=(5, 0),
        position_bandwidths=(None, (3.0, 3.0)),
        scaled=True,
    ),
    Case("voc_blurred", (94, 125), labels=21, filter_size=11, feature_sizes=(3,)),
    Case("voc_batch", (94, 125), labels=21, batch=8, filter_size=11, feature_sizes=(3,)),
    Case("voc_large_window", (94, 125), labels=21, filter_size=51, feature_sizes=(5,)),
    Case("voc_bfloat16", (375, 500), labels=21, filter_size=11, feature_sizes=(3,), dtype="bfloat16"),
)

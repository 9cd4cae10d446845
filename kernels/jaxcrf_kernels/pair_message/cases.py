"""The cases that every implementation of the pair message must get right.

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
        feature_sizes: features per kernel; as many entries as there are kernels.
        cutoff: as in `pair_message`.
        scaled: whether both pixel scales are given.
        shared: whether features and scales have one item for the whole batch.
        dtype: of `q`, features and scales; weights are float32 always, as parameters are.
    """

    name: str
    spatial: tuple[int, ...]
    labels: int = 3
    batch: int = 1
    feature_sizes: tuple[int, ...] = (3,)
    cutoff: tuple[int, ...] | None = None
    scaled: bool = False
    shared: bool = False
    dtype: str = "float32"

    @property
    def static(self) -> dict[str, Any]:
        """The arguments of `pair_message` that are not arrays."""
        return {"spatial": self.spatial, "cutoff": self.cutoff}

    @property
    def pixels(self) -> int:
        """How many pixels an item has."""
        return math.prod(self.spatial)


def operands(case: Case, seed: int = 0) -> Operands:
    """Draws the arrays of a case: reproducible, and of sizes at which every term counts.

    Args:
        case: one of `CASES` or `FULL_SIZE_CASES`.
        seed: of the random generator.

    Returns:
        NumPy arrays. Pixels' features differ by about one bandwidth, so that kernel values spread over
        (0, 1); scales are positive, as normalisations are.

    Example:
        >>> from jaxcrf_kernels.pair_message import pair_message
        >>> pair_message(**operands(CASES[0])._asdict(), **CASES[0].static).shape
        (1, 63, 3)
    """
    generator = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    kernels = len(case.feature_sizes)
    shared_batch = 1 if case.shared else case.batch

    def scales() -> np.ndarray | None:
        if not case.scaled:
            return None
        return generator.uniform(0.5, 1.5, (shared_batch, case.pixels, kernels)).astype(dtype)

    return Operands(
        q=generator.normal(size=(case.batch, case.pixels, case.labels)).astype(dtype),
        features=tuple(
            generator.normal(scale=1 / math.sqrt(2 * max(d, 1)), size=(shared_batch, case.pixels, d)).astype(
                dtype
            )
            for d in case.feature_sizes
        ),
        weights=generator.uniform(0.5, 2.0, kernels).astype(np.float32),
        left=scales(),
        right=scales(),
    )


# A tile of a CPU has at most 512 pixels, and several tiles take another path than one.
CASES = (
    Case("plain", (7, 9)),
    Case("many_labels", (6, 7), labels=21),
    Case("one_label", (6, 7), labels=1),
    Case("one_pixel", (1, 1)),
    Case("prime", (13, 1)),
    Case("many_features", (6, 7), feature_sizes=(11,)),
    Case("constant", (6, 7), feature_sizes=(0,)),
    Case("constants", (6, 7), feature_sizes=(0, 0), scaled=True),
    Case("merged", (7, 6), feature_sizes=(5, 0, 1)),
    Case("scaled", (6, 7), scaled=True),
    Case("merged_scaled", (6, 7), feature_sizes=(3, 0), scaled=True),
    Case("batch", (5, 7), batch=3, feature_sizes=(3, 2), scaled=True),
    Case("batch_shared", (5, 7), batch=3, feature_sizes=(3, 2), shared=True, scaled=True),
    Case("batch_shared_plain", (5, 7), batch=3, feature_sizes=(3, 0), shared=True),
    Case("full_tile", (16, 32)),
    Case("tiles", (19, 53), feature_sizes=(5, 2)),
    Case("tiles_constant", (27, 23), feature_sizes=(0,)),
    Case("tiles_scaled", (23, 47), feature_sizes=(2, 1), scaled=True),
    Case("tiles_batch", (17, 31), batch=2, feature_sizes=(2, 0), scaled=True),
    Case("cutoff", (9, 8), cutoff=(2, 2)),
    Case("cutoff_pixel", (7, 6), cutoff=(0, 0)),
    Case("cutoff_row", (5, 9), cutoff=(0, 3)),
    Case("cutoff_beyond", (5, 4), cutoff=(9, 3)),
    Case("cutoff_line", (700,), cutoff=(5,), feature_sizes=(2, 0), scaled=True),
    Case("cutoff_tiles", (31, 37), cutoff=(3, 5), feature_sizes=(3, 0), scaled=True),
    Case("cutoff_batch", (22, 29), cutoff=(7, 2), batch=2, feature_sizes=(0, 2)),
    Case("cutoff_volume", (7, 9, 11), cutoff=(1, 2, 3), feature_sizes=(2,)),
    Case("bfloat16", (6, 7), dtype="bfloat16"),
    Case("bfloat16_merged", (6, 7), batch=2, feature_sizes=(3, 0), scaled=True, dtype="bfloat16"),
)

# The fully connected CRF on PASCAL VOC images: the bilateral kernel, merged with the position kernel,
# normalised, on the grid of a network's output, and cut off at three bandwidths of 3 pixels.
FULL_SIZE_CASES = (
    Case("voc", (375, 500), labels=21, feature_sizes=(5,)),
    Case("voc_merged", (375, 500), labels=21, feature_sizes=(5, 2)),
    Case("voc_normalized", (375, 500), labels=21, feature_sizes=(5, 2), scaled=True),
    Case("voc_blurred", (94, 125), labels=21, feature_sizes=(5, 2)),
    Case("voc_batch", (94, 125), labels=21, batch=8, feature_sizes=(5, 2)),
    Case("voc_cutoff", (375, 500), labels=21, feature_sizes=(2,), cutoff=(9, 9)),
    Case("voc_bfloat16", (94, 125), labels=21, feature_sizes=(5, 2), dtype="bfloat16"),
)

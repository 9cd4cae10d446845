"""What the experiments with recurrent networks have in common: networks applied to images of any size, and pictures."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcrf import plots
from jaxcrf.data import SegmentationFolder
from jaxcrf.filters.resampling import average_pool, bilinear_upsample


class MaskedPredictor:
    """A recurrent network as a function of an image `[H, W, 3]` to its logits, which compiles once for all sizes.

    Images are padded to one size, with a mask: what a recurrent layer says of an image depends on all of it, and would
    depend on the padding. That is the image's reflection, as in training, for what reaches a little across its borders.

    Args:
        network: maps images and masks to logits.
        reduction: how much smaller it sees images: means over squares of pixels.
        whole: `(height, width)` of the largest image.
    """

    def __init__(self, network: Any, reduction: int, whole: Sequence[int]):
        network.eval()
        self.network = network
        self.reduction = reduction
        # Whole squares of pixels, which average pooling would otherwise centre.
        self._whole = tuple(-(-n // reduction) * reduction for n in whole)
        definition, self._state = nnx.split(network)

        def logits(state: Any, image: Any, mask: Any) -> Any:
            model: Any = nnx.merge(definition, state)
            return self._enlarged(model(self._reduced(image), mask))

        def maps(state: Any, image: Any, mask: Any) -> Any:
            model: Any = nnx.merge(definition, state)
            return model.feature_maps(self._reduced(image), mask)

        self._logits, self._maps = jax.jit(logits), jax.jit(maps)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Logits `[H, W, L]`."""
        height, width, _ = image.shape
        return np.asarray(self._logits(self._state, *self._padded(image)))[0, :height, :width]

    def feature_maps(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """What the network's `feature_maps` gives, of one image; padded as it was."""
        found = self._maps(self._state, *self._padded(image))
        return {name: np.asarray(value)[0] for name, value in found.items()}

    def seconds(self, repeats: int = 5) -> float:
        """The best time of one image of the largest size, once compiled."""
        padded = self._padded(np.zeros((*self._whole, 3), np.uint8))
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            jax.block_until_ready(self._logits(self._state, *padded))
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def _padded(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image padded, and the mask of the reduced one."""
        height, width, _ = image.shape
        missing = [(0, n - size) for n, size in zip(self._whole, (height, width), strict=True)]
        whole = np.pad(image, [*missing, (0, 0)], mode="reflect")[None]
        mask = np.zeros((1, *(n // self.reduction for n in self._whole)), bool)
        mask[0, : -(-height // self.reduction), : -(-width // self.reduction)] = True
        return whole, mask

    def _reduced(self, images: Any) -> Any:
        if self.reduction == 1:
            return images
        return average_pool(jnp.asarray(images, jnp.float32), self.reduction, images.shape[-3:-1])

    def _enlarged(self, logits: Any) -> Any:
        if self.reduction == 1:
            return logits
        whole = [n * self.reduction for n in logits.shape[-3:-1]]
        return bilinear_upsample(logits, self.reduction, whole)


def qualitative_figure(
    folder: SegmentationFolder,
    chosen: Sequence[int],
    columns: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    path: Path,
) -> None:
    """Images, truth and what functions of an image label it as."""
    shown: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "truth", *columns)}
    for index in chosen:
        image, truth = folder[index]
        shown["image"].append(image)
        shown["truth"].append(truth)
        for name, function in columns.items():
            shown[name].append(function(image))
    figure = plots.segmentation_grid(shown, label_names=folder.label_names, ignore_label=folder.ignore_label)
    plots.save_figure(figure, path)

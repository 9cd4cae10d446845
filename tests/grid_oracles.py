"""What `models.grids` computes, pixel by pixel in NumPy and float64."""

import numpy as np


def upsample(x, stride, size, offset=0.0):
    """Between cells `i` over pixels `s i + o`, `[rows, columns, channels]`; the first and last cells are repeated."""
    return _interpolated(x, [np.maximum((np.arange(n) - offset) / stride, 0) for n in size])


def resize(x, size):
    """From corner to corner, `[height, width, channels]`."""
    return _interpolated(
        x,
        [
            np.array([i * (n - 1) / (m - 1) if m > 1 else 0.0 for i in range(m)])
            for m, n in zip(size, x.shape, strict=False)
        ],
    )


def max_pool(x, size, stride):
    """The largest of a window that begins `(size - 1) // 2` before the cell's pixel."""
    height, width, channels = x.shape
    found = np.full((-(-height // stride), -(-width // stride), channels), -np.inf)
    for row, column in np.ndindex(*found.shape[:2]):
        top, left = (stride * i - (size - 1) // 2 for i in (row, column))
        window = x[max(top, 0) : top + size, max(left, 0) : left + size]
        found[row, column] = window.max((0, 1))
    return found


def _interpolated(x, places):
    found = np.zeros((*map(len, places), x.shape[-1]))
    for row, y in enumerate(places[0]):
        for column, z in enumerate(places[1]):
            for dy, dx in np.ndindex(2, 2):
                i, j = int(y) + dy, int(z) + dx
                weight = (1 - abs(y - i)) * (1 - abs(z - j))
                found[row, column] += weight * x[min(i, x.shape[0] - 1), min(j, x.shape[1] - 1)]
    return found

"""Answers in float64 NumPy, written for plainness, that the tests compare with.

They hold every pair of pixels at once and share no code with the package.
"""

from typing import NamedTuple

import numpy as np


class MessageGradients(NamedTuple):
    """What a cotangent of the window message becomes at each operand."""

    q: np.ndarray
    features: tuple[np.ndarray, ...]
    weights: np.ndarray
    left: np.ndarray | None
    right: np.ndarray | None


def window_message(
    q, features, weights, left=None, right=None, *, filter_size, position_bandwidths=None, magnitude=False
):
    """The message of every pixel; with `magnitude` the sum of the absolute values of its terms."""
    q, weights = _double(q, magnitude), _double(weights, magnitude)
    result = np.zeros_like(q)
    for item in range(len(q)):
        kernels, _ = _kernels(features, item, q.shape[1:-1], filter_size, position_bandwidths)
        sender, receiver = (_scale(s, item, q, weights, magnitude) for s in (right, left))
        matrix = np.einsum("m,mi,mj,mij->ij", weights, receiver, sender, kernels)
        result[item] = (matrix @ q[item].reshape(len(matrix), -1)).reshape(q.shape[1:])
    return result


def window_message_vjp(
    q,
    features,
    weights,
    left=None,
    right=None,
    *,
    cotangent,
    filter_size,
    position_bandwidths=None,
    magnitude=False,
):
    """Gradients of `⟨cotangent, message⟩`; with `magnitude` the sums of the absolute values of their terms."""
    q, weights, cotangent = (_double(x, magnitude) for x in (q, weights, cotangent))
    features = [np.asarray(f, np.float64) for f in features]
    gradients = MessageGradients(
        q=np.zeros_like(q),
        features=tuple(np.zeros_like(f) for f in features),
        weights=np.zeros_like(weights),
        left=None if left is None else np.zeros(left.shape),
        right=None if right is None else np.zeros(right.shape),
    )
    for item in range(len(q)):
        kernels, differences = _kernels(features, item, q.shape[1:-1], filter_size, position_bandwidths)
        sender, receiver = (_scale(s, item, q, weights, magnitude) for s in (right, left))
        pixels = kernels.shape[-1]
        agreement = cotangent[item].reshape(pixels, -1) @ q[item].reshape(pixels, -1).T
        matrix = np.einsum("m,mi,mj,mij->ij", weights, receiver, sender, kernels)
        gradients.q[item] = (matrix.T @ cotangent[item].reshape(pixels, -1)).reshape(q.shape[1:])
        gradients.weights[:] += np.einsum("mi,mj,mij,ij->m", receiver, sender, kernels, agreement)
        for gradient, terms in (
            (gradients.left, "m,mj,mij,ij->im"),
            (gradients.right, "m,mi,mij,ij->jm"),
        ):
            if gradient is not None:
                other = sender if gradient is gradients.left else receiver
                shared = item if len(gradient) > 1 else 0
                found = np.einsum(terms, weights, other, kernels, agreement)
                gradient[shared] += found.reshape(gradient.shape[1:])
        for m, gradient in enumerate(gradients.features):
            # Pair (i, j) moves with f_i - f_j, which pixel i enters once as receiver and once as sender.
            energy = weights[m] * receiver[m][:, None] * sender[m][None, :] * kernels[m] * agreement
            difference = np.abs(differences[m]) if magnitude else -differences[m]
            found = np.einsum("ij,ijd->id", energy + energy.T, difference)
            gradient[item if len(gradient) > 1 else 0] += found.reshape(gradient.shape[1:])
    return gradients


def _double(x, magnitude):
    x = np.asarray(x, np.float64)
    return np.abs(x) if magnitude else x


def _scale(scale, item, q, weights, magnitude):
    """A pixel scale as `[kernels, pixels]`, ones where there is none."""
    pixels = int(np.prod(q.shape[1:-1]))
    if scale is None:
        return np.ones((len(weights), pixels))
    scale = _double(scale, magnitude)
    return scale[item if len(scale) > 1 else 0].reshape(pixels, -1).T


def _kernels(features, item, spatial, filter_size, position_bandwidths):
    """Kernel values of all pairs `[kernels, pixels, pixels]`, and the differences of their features."""
    grid = np.indices(spatial).reshape(len(spatial), -1).T
    offsets = grid[:, None, :] - grid[None, :, :]
    inside = (np.abs(offsets) <= np.broadcast_to(filter_size, len(spatial)) // 2).all(-1)
    kernels, differences = [], []
    for m, feature in enumerate(features):
        values = np.asarray(feature[item if len(feature) > 1 else 0], np.float64).reshape(len(grid), -1)
        difference = values[:, None, :] - values[None, :, :]
        exponent = (difference**2).sum(-1)
        theta = None if position_bandwidths is None else position_bandwidths[m]
        if theta is not None:
            exponent = exponent + ((offsets / np.asarray(theta)) ** 2).sum(-1)
        kernels.append(np.where(inside, np.exp(-0.5 * exponent), 0.0))
        differences.append(difference)
    return np.stack(kernels), differences

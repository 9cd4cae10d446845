"""Answers in float64 NumPy, written for plainness, that the tests compare with.

They hold every pair of pixels at once and share no code with the package.
"""

from typing import NamedTuple

import numpy as np


class MessageGradients(NamedTuple):
    """What a cotangent of a message becomes at each operand."""

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


def pair_message(q, features, weights, left=None, right=None, *, spatial=None, cutoff=None, magnitude=False):
    """The message of every pixel; with `magnitude` the sum of the absolute values of its terms."""
    q, weights = _double(q, magnitude), _double(weights, magnitude)
    inside = _within(q.shape[1], spatial, cutoff)
    result = np.zeros_like(q)
    for item in range(len(q)):
        for m, feature in enumerate(features):
            kernel, _ = _pairs(feature[item % len(feature)], inside)
            receiver, sender = (_column(s, item, m, q, magnitude) for s in (left, right))
            result[item] += weights[m] * receiver * (kernel @ (sender * q[item]))
    return result


def pair_message_vjp(
    q,
    features,
    weights,
    left=None,
    right=None,
    *,
    cotangent,
    spatial=None,
    cutoff=None,
    magnitude=False,
):
    """Gradients of `⟨cotangent, message⟩`; with `magnitude` the sums of the absolute values of their terms."""
    q, weights, cotangent = (_double(x, magnitude) for x in (q, weights, cotangent))
    inside = _within(q.shape[1], spatial, cutoff)
    gradients = MessageGradients(
        q=np.zeros_like(q),
        features=tuple(np.zeros(f.shape) for f in features),
        weights=np.zeros_like(weights),
        left=None if left is None else np.zeros(left.shape),
        right=None if right is None else np.zeros(right.shape),
    )
    for item in range(len(q)):
        agreement = cotangent[item] @ q[item].T
        for m, feature in enumerate(features):
            kernel, difference = _pairs(feature[item % len(feature)], inside)
            receiver, sender = (_column(s, item, m, q, magnitude) for s in (left, right))
            # A term of `⟨cotangent, message⟩` without its weight, and without either of its scales.
            bare = kernel * agreement
            term = receiver * bare * sender.T
            gradients.q[item] += weights[m] * sender * (kernel.T @ (receiver * cotangent[item]))
            gradients.weights[m] += term.sum()
            if left is not None:
                gradients.left[item % len(left), :, m] += weights[m] * (bare @ sender)[:, 0]
            if right is not None:
                gradients.right[item % len(right), :, m] += weights[m] * (bare.T @ receiver)[:, 0]
            # Both pixels of a pair move their difference, the receiver forwards and the sender backwards.
            slope = np.abs(difference) if magnitude else -difference
            moved = weights[m] * np.einsum("ij,ijd->id", term + term.T, slope)
            gradients.features[m][item % len(feature)] += moved
    return gradients


def _within(pixels, spatial, cutoff):
    """Which pairs of pixels a cut-off leaves."""
    if cutoff is None:
        return np.ones((pixels, pixels), bool)
    grid = np.indices(spatial).reshape(len(spatial), -1).T
    return (np.abs(grid[:, None] - grid[None, :]) <= np.asarray(cutoff)).all(-1)


def _pairs(feature, inside):
    """A Gaussian of all pairs of pixels, and the differences of their features."""
    feature = np.asarray(feature, np.float64)
    difference = feature[:, None, :] - feature[None, :, :]
    return np.where(inside, np.exp(-0.5 * (difference**2).sum(-1)), 0.0), difference


def _column(scale, item, m, q, magnitude):
    """One kernel's pixel scale as a column, ones where there is none."""
    if scale is None:
        return np.ones((q.shape[1], 1))
    return _double(scale[item % len(scale), :, m : m + 1], magnitude)


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


def gaussian_matrix(features, others=None):
    """`exp(-½‖f_i - g_j‖²)` of all pairs, `[pixels, others]`; `g` is `f` where there are no others."""
    f = np.asarray(features, np.float64)
    g = f if others is None else np.asarray(others, np.float64)
    return np.exp(-0.5 * ((f[:, None, :] - g[None, :, :]) ** 2).sum(-1))


# A pixel's edges in their order: down and to the right.
_EDGE_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))


def grid_edges_inside(edges):
    """Which edges `[height, width, E, …]` end inside the image."""
    height, width, count = edges.shape[:3]
    inside = np.zeros((height, width, count), bool)
    for y, x, e in np.ndindex(height, width, count):
        dy, dx = _EDGE_STEPS[e]
        inside[y, x, e] = y + dy < height and 0 <= x + dx < width
    return inside


def grid_matrix(edges):
    """The symmetric matrix of one image's edges, `[height, width, E]` or `[height, width, E, labels, labels]`."""
    edges = np.asarray(edges, np.float64)
    height, width = edges.shape[:2]
    labels = edges.shape[-1] if edges.ndim == 5 else 1
    matrix = np.zeros((height * width, labels, height * width, labels))
    for y, x, e in np.argwhere(grid_edges_inside(edges)):
        dy, dx = _EDGE_STEPS[e]
        i, j = y * width + x, (y + dy) * width + x + dx
        block = np.broadcast_to(edges[y, x, e], (labels, labels))
        matrix[i, :, j] += block
        matrix[j, :, i] += block.T
    return matrix.reshape(height * width * labels, -1)


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def permutohedral(features, q, order=None):
    """One pass over a permutohedral lattice, with a dictionary for its vertices: splat, blur, slice, no gain.

    Written after Adams, Baek and Davis (2010) with every vertex a tuple of whole coordinates.
    """
    features, q = np.asarray(features, np.float64), np.asarray(q, np.float64)
    d = features.shape[1]
    scale = np.sqrt(2 / 3) * (d + 1) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))
    plane = np.zeros((d + 1, d))
    for j in range(d):
        plane[: j + 1, j] = 1
        plane[j + 1, j] = -(j + 1)
    vertices, weights = {}, []
    for x in (features * scale) @ plane.T:
        cell = np.rint(x / (d + 1)).astype(int) * (d + 1)
        order_of = np.argsort(-(x - cell), kind="stable")
        excess = cell.sum() // (d + 1)
        # The plane's sum is zero: too much is taken from the smallest remainders, too little given to the largest.
        chosen = order_of[d + 1 - excess :] if excess > 0 else order_of[:-excess]
        cell[chosen] -= (d + 1) * np.sign(excess)
        remainder = (x - cell) / (d + 1)
        descending = np.argsort(-remainder, kind="stable")
        sorted_remainder = remainder[descending]
        own = {}
        for k in range(d + 1):
            vertex = cell + k
            vertex[descending[d + 1 - k :]] -= d + 1
            weight = (
                1 + sorted_remainder[d] - sorted_remainder[0]
                if k == 0
                else sorted_remainder[d - k] - sorted_remainder[d + 1 - k]
            )
            own[tuple(vertex)] = weight
            vertices.setdefault(tuple(vertex), len(vertices))
        weights.append(own)
    values = np.zeros((len(vertices), q.shape[-1]))
    for own, row in zip(weights, q, strict=True):
        for vertex, weight in own.items():
            values[vertices[vertex]] += weight * row
    for j in range(d + 1) if order is None else order:
        blurred = values.copy()
        for vertex, i in vertices.items():
            for sign in (1, -1):
                neighbour = [c + sign for c in vertex]
                neighbour[j] -= sign * (d + 1)
                if tuple(neighbour) in vertices:
                    blurred[i] += 0.5 * values[vertices[tuple(neighbour)]]
        values = blurred
    return np.stack([sum(w * values[vertices[v]] for v, w in own.items()) for own in weights])

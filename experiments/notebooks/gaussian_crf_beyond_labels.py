"""Gaussian CRFs beyond labels: denoising a photograph and densifying depth, in cells."""

# %% [markdown]
# # Gaussian CRFs beyond labels
#
# The scores of a Gaussian CRF are numbers, not classes: nothing keeps them from being colours or depths. Here one model
# denoises a photograph and turns a few depth measurements into a dense map. Both minimise
#
#     Σ_i c_i (x_i - y_i)² + Σ_(i,j) w_ij (x_i - x_j)²
#
# over the edges of an 8-connected grid: measurements `y` with precisions `c`, and smoothness that a guide image lets go
# of at its edges, `w_ij = strength · exp(-½ |g_i - g_j|² / bandwidth²)`. The minimum solves a sparse linear system,
# `(diag(c + degree) - W) x = c y`, which is a `Grid`, a `Diagonal` and a call of `conjugate_gradient`. Its solution is
# differentiable in everything, so strength and bandwidth are learned by gradient descent through the solve.
#
# The cells (`# %%`) open as a notebook in editors that know them; as a script,
#
#     python experiments/notebooks/gaussian_crf_beyond_labels.py [--out DIR] [--smoke]
#
# takes about two minutes on two CPU cores and writes two pictures and a JSON file.

# %%
import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcrf
from jaxcrf import _demo, plots, reporting
from jaxcrf.filters import Diagonal, Grid
from jaxcrf.filters.grid import OFFSETS

CONNECTIVITY = 8
TOLERANCE = 1e-5


class Smoothness(NamedTuple):
    """How strongly neighbours hold together, and what difference of the guide lets them go; logarithms of both."""

    log_strength: jax.Array
    log_bandwidth: jax.Array


# %% [markdown]
# ## The model
# Ten lines: edges from the guide, then one solve. The inverse of the diagonal is the preconditioner.


# %%
def neighbours(guide: jax.Array) -> jax.Array:
    """The guide at the other end of every edge, `[H, W, E, channels]`; edges that leave the image do not matter."""
    return jnp.stack([jnp.roll(guide, (-dy, -dx), (0, 1)) for dy, dx in OFFSETS[: CONNECTIVITY // 2]], 2)


@jax.jit
def reconstruct(smoothness: Smoothness, guide: jax.Array, values: jax.Array, precision: jax.Array) -> Any:
    """The most probable maps `[H, W, C]` given measurements `values`, each with its precision `[H, W]`; statistics."""
    difference = guide[:, :, None] - neighbours(guide)
    squares = jnp.sum(difference**2, -1) / jnp.exp(2 * smoothness.log_bandwidth)
    weights = jnp.exp(smoothness.log_strength - 0.5 * squares)
    W = Grid(-weights, connectivity=CONNECTIVITY, kind="potts")
    diagonal = precision + W.degrees()
    return jaxcrf.conjugate_gradient(
        Diagonal(diagonal) + W,
        precision[..., None] * values,
        tolerance=TOLERANCE,
        preconditioner=Diagonal(1 / diagonal),
    )


# %%
def learn(smoothness: Smoothness, loss: Any, data: tuple, steps: int) -> tuple[Smoothness, list[float]]:
    """Gradient descent through the solve, on `loss(smoothness, *data)`."""
    optimizer = optax.adam(0.1)
    state = optimizer.init(smoothness)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(steps):
        value, gradient = value_and_grad(smoothness, *data)
        updates, state = optimizer.update(gradient, state)
        smoothness = optax.apply_updates(smoothness, updates)
        losses.append(float(value))
    return smoothness, losses


def psnr(found: Any, truth: Any) -> float:
    """Of images in 0 … 255, in dB."""
    return float(10 * np.log10(255**2 / np.mean((np.asarray(found) - np.asarray(truth)) ** 2)))


# %% [markdown]
# ## Denoising
# The upper part of a photograph with noise of σ = 25. The guide is the noisy image itself after a Gaussian filter;
# parameters are learned on the lower part of the photograph.


# %%
def gaussian_smooth(image: np.ndarray, bandwidth: float) -> np.ndarray:
    """A Gaussian filter, normalised at the border."""
    features = jaxcrf.position_features(image.shape[:2], bandwidth)
    return np.asarray(jaxcrf.filters.Separable(features).normalized("after")(jnp.asarray(image)))


def denoise(size: int, steps: int) -> tuple[dict[str, Any], Any]:
    """PSNR of the noisy image, of the best Gaussian filter, and of the CRF; the figure."""
    photograph = _demo.photograph().astype(np.float32)
    pieces = {
        "test": photograph[20 : 20 + size, 130 : 130 + size],
        "train": photograph[-size:, 130 : 130 + size],
    }
    rng = np.random.default_rng(0)
    noisy = {
        name: piece + rng.normal(0, 25, piece.shape).astype(np.float32) for name, piece in pieces.items()
    }
    guides = {name: jnp.asarray(gaussian_smooth(piece, 1.5)) for name, piece in noisy.items()}
    precision = jnp.ones((size, size))

    def loss(smoothness: Smoothness, guide: jax.Array, noisy: jax.Array, clean: jax.Array) -> jax.Array:
        found, _ = reconstruct(smoothness, guide, noisy, precision)
        return jnp.mean((found - clean) ** 2)

    data = (guides["train"], jnp.asarray(noisy["train"]), jnp.asarray(pieces["train"]))
    smoothness, losses = learn(Smoothness(jnp.log(1.0), jnp.log(30.0)), loss, data, steps)
    found, stats = reconstruct(smoothness, guides["test"], jnp.asarray(noisy["test"]), precision)
    blurred = {b: psnr(gaussian_smooth(noisy["test"], b), pieces["test"]) for b in (0.6, 0.8, 1.0, 1.3, 1.6)}
    best = max(blurred, key=blurred.get)
    scores = {
        "noisy_psnr": psnr(noisy["test"], pieces["test"]),
        "gaussian_filter_psnr": blurred[best],
        "gaussian_crf_psnr": psnr(found, pieces["test"]),
        "strength": float(jnp.exp(smoothness.log_strength)),
        "bandwidth": float(jnp.exp(smoothness.log_bandwidth)),
        "train_losses": [losses[0], losses[-1]],
        "iterations": int(stats.iterations),
        "converged": bool(stats.converged),
    }
    shown = {
        "photograph": pieces["test"],
        f"noisy, {scores['noisy_psnr']:.1f} dB": noisy["test"],
        f"Gaussian filter, {blurred[best]:.1f} dB": gaussian_smooth(noisy["test"], best),
        f"Gaussian CRF, {scores['gaussian_crf_psnr']:.1f} dB": np.asarray(found),
    }
    return scores, plots.segmentation_grid(shown)


# %% [markdown]
# ## Densifying depth
# Balls over a floor before a wall, ray-traced: an image, and the depth of every pixel. Two pixels in a hundred have
# been measured, with noise of one centimetre. Precision is zero elsewhere; the image guides what lies between.


# %%
def scene(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shaded image `[H, W, 3]` in 0 … 255 and depth in metres `[H, W, 1]`."""
    rng = np.random.default_rng(seed)
    v, u = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    rays = np.stack([u, v, np.ones_like(u)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    light = np.array([-0.5, -0.8, -0.4]) / np.linalg.norm([-0.5, -0.8, -0.4])
    distance = np.full((size, size), np.inf)
    image = np.zeros((size, size, 3))

    def put(t: np.ndarray, normals: np.ndarray, color: np.ndarray) -> None:
        nonlocal distance
        hit = (t > 0) & (t < distance)
        shade = 0.35 + 0.65 * np.clip(normals @ light, 0, 1)
        image[hit] = (color * shade[..., None])[hit]
        distance = np.where(hit, t, distance)

    with np.errstate(divide="ignore"):
        put(6 / rays[..., 2], np.broadcast_to([0.0, 0, -1], rays.shape), np.array([150.0, 160, 175]))
        put(1.2 / rays[..., 1], np.broadcast_to([0.0, -1, 0], rays.shape), np.array([120.0, 95, 70]))
    for _ in range(6):
        center = np.array([*rng.uniform(-1.6, 1.6, 1), rng.uniform(-0.9, 0.8), rng.uniform(3, 5.5)])
        radius, along = rng.uniform(0.3, 0.7), rays @ center
        inside = along**2 - center @ center + radius**2
        t = np.where(inside > 0, along - np.sqrt(np.maximum(inside, 0)), np.inf)
        points = np.where(inside > 0, t, 0)[..., None] * rays
        put(t, (points - center) / radius, rng.uniform(60, 255, 3))
    noise = rng.normal(0, 2, image.shape)
    return (image + noise).astype(np.float32), (distance * rays[..., 2])[..., None].astype(np.float32)


def measure(depth: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy measurements `[H, W, 1]`, zero elsewhere, and where they are."""
    rng = np.random.default_rng(seed)
    known = rng.random(depth.shape[:2]) < share
    return np.where(known[..., None], depth + rng.normal(0, 0.01, depth.shape), 0).astype(np.float32), known


def nearest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The nearest measurement of every pixel."""
    places = np.argwhere(known)
    rows = []
    for y in range(known.shape[0]):
        grid = np.stack(np.broadcast_arrays(y, np.arange(known.shape[1])), -1)
        chosen = ((grid[:, None] - places) ** 2).sum(-1).argmin(-1)
        rows.append(values[tuple(places[chosen].T)])
    return np.stack(rows)


def densify(size: int, steps: int) -> tuple[dict[str, Any], Any]:
    """Errors in metres of the nearest measurement, of smoothness without a guide, and of the CRF; the figure."""
    image, depth = scene(size, 1)
    values, known = measure(depth, 0.02, 1)
    training = scene(size, 2)
    training_values, training_known = measure(training[1], 0.02, 2)

    def solve(smoothness: Smoothness, guide: Any, values: Any, known: Any) -> Any:
        return reconstruct(
            smoothness, jnp.asarray(guide), jnp.asarray(values), jnp.asarray(known, jnp.float32)
        )

    def loss(smoothness: Smoothness, guide: Any, values: Any, known: Any, depth: Any) -> jax.Array:
        return jnp.mean(jnp.abs(solve(smoothness, guide, values, known)[0] - depth))

    start = Smoothness(jnp.log(0.1), jnp.log(30.0))
    data = (training[0], training_values, training_known, training[1])
    smoothness, losses = learn(start, loss, data, steps)
    found, stats = solve(smoothness, image, values, known)
    unguided, _ = solve(start, np.zeros_like(image), values, known)
    errors = {
        name: np.asarray(map_) - depth
        for name, map_ in {"nearest": nearest(values, known), "unguided": unguided, "crf": found}.items()
    }
    scores = {f"{name}_mean_absolute_error": float(np.abs(e).mean()) for name, e in errors.items()}
    scores |= {f"{name}_rms_error": float(np.sqrt((e**2).mean())) for name, e in errors.items()}
    scores |= {
        "measured": float(known.mean()),
        "strength": float(jnp.exp(smoothness.log_strength)),
        "bandwidth": float(jnp.exp(smoothness.log_bandwidth)),
        "train_losses": [losses[0], losses[-1]],
        "iterations": int(stats.iterations),
        "converged": bool(stats.converged),
    }

    def gray(map_: Any) -> np.ndarray:
        near, far = depth.min(), depth.max()
        return np.repeat(255 * (1 - (np.asarray(map_) - near) / (far - near)), 3, -1)

    shown = {
        "image": image,
        f"measured, {100 * scores['measured']:.0f} %": np.where(known[..., None], gray(values), (60, 24, 90)),
        f"nearest, {100 * scores['nearest_mean_absolute_error']:.1f} cm": gray(nearest(values, known)),
        f"Gaussian CRF, {100 * scores['crf_mean_absolute_error']:.1f} cm": gray(found),
        "truth": gray(depth),
    }
    return scores, plots.segmentation_grid(shown)


# %%
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs both, and writes what came out."""
    parser = argparse.ArgumentParser(description="Gaussian CRFs that denoise and densify")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="small and short")
    args = parser.parse_args(arguments)
    size, steps = (32, 2) if args.smoke else (192, 40)
    results = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, run in {"denoise": denoise, "densify": densify}.items():
        results[name], figure = run(size, steps)
        plots.save_figure(figure, args.out / f"gaussian_crf_{name}.png")
        print(name, results[name])
    settings = {"size": size, "steps": steps, "connectivity": CONNECTIVITY, "tolerance": TOLERANCE}
    reporting.write_json(
        args.out / "gaussian_crf_beyond_labels.json",
        {**reporting.circumstances(__file__), "settings": settings, "results": results},
    )
    return results


# %%
if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)

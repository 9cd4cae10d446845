r"""Embeddings learned end to end: Gaussian CRFs that clean up noisy labels.

    python experiments/gaussian_crf_embeddings.py --data camvid --out results
    python experiments/gaussian_crf_embeddings.py --smoke

The task of `convcrf_synthetic.py`, with learned pairwise terms instead of hand-made features: every image is shrunk
by four, its labels are made coarse (blocks of 4 × 4) and noisy (one coarse label in five is drawn at random), and
a small convolutional network on the image gives embeddings or edges to a Gaussian CRF whose unary is the noisy
labels. Network and CRF are trained together through the linear solve, on draws of the noise of the training images,
and evaluated on the validation images:

- `general`, `potts`: dense, low-rank pairwise terms (`jaxcrf.nn.GaussianCRF`),
- `sparse potts`: edges between neighbours (`SparseGaussianCRF`, 8-connected),
- `potts, then sparse`: both (`StackedGaussianCRF`).

What only the network knows is kept out: it sees the image and its position, and its output acts through pairwise terms
alone. The output is a JSON file, a Markdown table, the affinities of three pixels and the uncertainties of one
image. Expected cost: about ten minutes on two CPU cores.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convcrf_synthetic import find_data, write_demonstration_folder
from flax import nnx
from PIL import Image
from rich.console import Console
from rich.progress import track

import jaxcrf
from jaxcrf import metrics, plots, reporting
from jaxcrf.data.folders import SegmentationFolder, open_folder
from jaxcrf.data.images import replacing
from jaxcrf.data.synthetic import corrupt_labels
from jaxcrf.nn import GaussianCRF, SparseGaussianCRF, StackedGaussianCRF

SHRINK = 4
BLOCK = 4
KEEP = 0.8
CHANNELS = 32
EMBEDDING_SIZE = 32
BATCH = 4
LEARNING_RATE = 3e-3
IGNORE = 255


class Features(nnx.Module):
    """Four dilated convolutions, which see 31 × 31 pixels; the colours and positions themselves go along."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = [(5, CHANNELS), *[(CHANNELS, CHANNELS)] * 3]
        self.layers = nnx.List(
            [
                nnx.Conv(n_in, n_out, (3, 3), kernel_dilation=dilation, rngs=rngs)
                for (n_in, n_out), dilation in zip(sizes, (1, 2, 4, 8), strict=True)
            ]
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[batch, H, W, 3]` in 0 … 255 to `[batch, H, W, channels]`."""
        y, x = jnp.mgrid[-1 : 1 : image.shape[-3] * 1j, -1 : 1 : image.shape[-2] * 1j]
        place = jnp.broadcast_to(jnp.stack([y, x], -1), (*image.shape[:-1], 2))
        inputs = x = jnp.concatenate([image / 127.5 - 1, place], -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return jnp.concatenate([x, inputs], -1)


class Model(nnx.Module):
    """Features of the image, then a Gaussian CRF over the noisy labels."""

    def __init__(self, layer: Callable[[int], nnx.Module], rngs: nnx.Rngs):
        self.features = Features(rngs)
        self.crf = layer(CHANNELS + 5)

    def __call__(self, image: jax.Array, unary: jax.Array) -> jax.Array:
        """Scores, `[batch, H, W, labels]`."""
        return self.crf(self.features(image), unary)


def layers(num_labels: int, rngs: nnx.Rngs) -> dict[str, Callable[[int], nnx.Module]]:
    """What is compared."""

    def dense(channels: int, **options: Any) -> GaussianCRF:
        return GaussianCRF(channels, num_labels, embedding_size=EMBEDDING_SIZE, rngs=rngs, **options)

    def sparse(channels: int) -> SparseGaussianCRF:
        return SparseGaussianCRF(channels, num_labels, connectivity=8, rngs=rngs)

    return {
        "general": lambda channels: dense(channels, kind="general"),
        "potts": dense,
        "sparse potts": sparse,
        "potts, then sparse": lambda channels: StackedGaussianCRF([dense(channels), sparse(channels)]),
    }


def read(folder: SegmentationFolder, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the folder, shrunk, `[images, H, W, 3]` and `[images, H, W]`."""
    chosen = np.linspace(0, len(folder) - 1, min(limit, len(folder))).round().astype(int)
    images, labels = [], []
    for index in chosen:
        image, truth = folder[int(index)]
        height, width = (n // SHRINK for n in truth.shape)
        images.append(np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)))
        labels.append(truth[SHRINK // 2 :: SHRINK, SHRINK // 2 :: SHRINK][:height, :width])
    return np.stack(images).astype(np.float32), np.stack(labels).astype(np.int32)


def unaries(labels: np.ndarray, num_labels: int, seed: list[int]) -> np.ndarray:
    """Logits of noisy labels."""
    noisy = corrupt_labels(seed, labels, num_labels, factor=BLOCK, keep=KEEP)
    return np.asarray(jaxcrf.unary_from_labels(noisy, num_labels, confidence=KEEP))


def loss(model: Model, image: jax.Array, unary: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the pixels that count."""
    valid = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(model(image, unary), jnp.where(valid, labels, 0))
    return jnp.sum(jnp.where(valid, losses, 0)) / jnp.maximum(valid.sum(), 1)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, image: Any, unary: Any, labels: Any) -> jax.Array:
    """One update; the loss before it."""
    value, gradients = nnx.value_and_grad(loss)(model, image, unary, labels)
    optimizer.update(model, gradients)
    return value


def train(model: Model, data: tuple[np.ndarray, np.ndarray], num_labels: int, steps: int, name: str) -> dict:
    """Trains in place; the mean loss of the first and of the last tenth, and seconds per step."""
    images, labels = data
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), wrt=nnx.Param
    )
    rng = np.random.default_rng(0)
    losses, times = [], []
    for index in track(range(steps), description=name, console=Console(stderr=True)):
        chosen = rng.integers(len(images), size=BATCH)
        unary = unaries(labels[chosen], num_labels, [1, index])
        begin = time.perf_counter()
        losses.append(float(step(model, optimizer, images[chosen], unary, labels[chosen])))
        times.append(time.perf_counter() - begin)
    tenth = max(1, steps // 10)
    return {
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "seconds_per_step": float(np.median(times)),
    }


def evaluate(
    predict: Callable[[Any, Any], Any], data: tuple[np.ndarray, np.ndarray], num_labels: int, seeds: int
) -> dict[str, float]:
    """Accuracy and mIoU in %, mean and spread over draws of the noise."""
    images, labels = data
    accuracies, mious = [], []
    for seed in range(seeds):
        matrix = np.zeros((num_labels, num_labels), np.int64)
        for index in range(len(images)):
            unary = unaries(labels[index : index + 1], num_labels, [2, seed, index])
            found = predict(images[index : index + 1], unary).argmax(-1)
            matrix += np.asarray(metrics.confusion_matrix(labels[index], found[0], num_labels))
        accuracies.append(100 * float(metrics.pixel_accuracy(matrix)))
        mious.append(100 * float(metrics.mean_iou(matrix)))
    return {
        "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies)),
        "miou": float(np.mean(mious)),
        "miou_std": float(np.std(mious)),
    }


def markdown(scores: dict[str, dict]) -> str:
    """The table."""
    lines = ["| | accuracy | mIoU | s per step |", "| --- | --- | --- | --- |"]
    for name, s in scores.items():
        seconds = f"{s['seconds_per_step']:.2f}" if "seconds_per_step" in s else ""
        cells = f"{s['accuracy']:.2f} ± {s['accuracy_std']:.2f} | {s['miou']:.2f} ± {s['miou_std']:.2f}"
        lines.append(f"| {name} | {cells} | {seconds} |")
    return "\n".join(lines) + "\n"


def draw(model: Model, image: np.ndarray, unary: np.ndarray, names: tuple[str, ...], out: Path) -> None:
    """The affinities that a Potts-type model has learned, and how sure it is of its labels."""
    features = model.features(image[None])[0]
    embeddings = model.crf.head(features)
    height, width = image.shape[:2]
    pixels = [(height // 5, width // 2), (height // 2, width // 5), (4 * height // 5, width // 2)]
    K = jaxcrf.filters.Gram(embeddings, kind="potts")
    plots.save_figure(
        plots.affinity(K, pixels, image=image.astype(np.uint8)), out / "gaussian_crf_affinity.png"
    )
    result = model.crf.solve(features, unary, variances=True)
    figure = plots.uncertainty(
        image.astype(np.uint8), result.scores, result.variances, label_names=names, panel_width=3.6
    )
    plots.save_figure(figure, out / "gaussian_crf_uncertainty.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder in the layout of PASCAL VOC or CamVid")
    parser.add_argument("--train-images", type=int, default=120, help="at most so many")
    parser.add_argument("--images", type=int, default=30, help="at most so many validation images")
    parser.add_argument("--steps", type=int, default=300, help="updates of every model")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the noise in the evaluation")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.seeds = 3, 1
    else:
        args.data = find_data(args.data, parser)
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            from jaxcrf import _demo

            write_demonstration_folder(Path(temporary))
            folder = dataclasses.replace(open_folder(temporary), label_names=_demo.LABELS)
            training = evaluation = read(folder, 2)
        else:
            folder = open_folder(args.data, "val")
            training = read(open_folder(args.data, "train"), args.train_images)
            evaluation = read(folder, args.images)
    num_labels = folder.num_labels
    scores = {"unary": evaluate(lambda _, unary: unary, evaluation, num_labels, args.seeds)}
    trained: dict[str, Model] = {}
    for name in layers(num_labels, nnx.Rngs(0)):
        rngs = nnx.Rngs(0)
        model = trained[name] = Model(layers(num_labels, rngs)[name], rngs)
        record = train(model, training, num_labels, args.steps, name)
        predict = nnx.jit(lambda model, image, unary: model(image, unary))
        score = evaluate(
            lambda i, u, p=predict, m=model: np.asarray(p(m, i, u)), evaluation, num_labels, args.seeds
        )
        scores[name] = score | record
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "sizes": [list(evaluation[0].shape), list(training[0].shape)],
        "steps": args.steps,
        "batch": BATCH,
        "embedding_size": EMBEDDING_SIZE,
        "keep": KEEP,
        "smoke": args.smoke,
    }
    reporting.write_json(
        args.out / "gaussian_crf_embeddings.json",
        {**reporting.circumstances(__file__), "settings": settings, "results": scores},
    )
    with replacing(args.out / "gaussian_crf_embeddings.md") as file:
        file.write(markdown(scores).encode())
    shown = len(evaluation[0]) // 2
    unary = unaries(evaluation[1][shown], num_labels, [2, 0, shown])
    draw(trained["potts"], evaluation[0][shown], unary, folder.label_names, args.out)
    print(markdown(scores))
    return scores


if __name__ == "__main__":
    main()

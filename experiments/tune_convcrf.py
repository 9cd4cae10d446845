r"""Tunes ConvCRF's few parameters by gradient descent through mean field, one preset per window and blur.

What is learned are the logarithms of six numbers: the weight and bandwidth of the smoothness kernel, the
weight and the two bandwidths of the appearance kernel, and the unary weight, through five unrolled
mean-field iterations on crops of training images.

    python experiments/tune_convcrf.py --data CamVid --out results
    python experiments/convcrf_synthetic.py --data CamVid --tuned results/tune_convcrf.json
    python experiments/tune_convcrf.py --smoke

The loss is the expected error, `1 - q(truth)`. The cross-entropy will not do: a block of 8 × 8 pixels
that the CRF cannot repair is wrong with certainty for all its pixels, and the price of these few keeps the
weights so small that many others are not repaired.

So that the presets do not fit one noise, one scale or one data set, every step mixes unaries of different
kinds (`UNARIES`) and images at their own and at double size, and wrong labels are drawn from as many as VOC
has.

Expected cost, on 2 CPU cores: 20 to 60 seconds per window at blur 4 and 2; at blur 1, with --batch 4
--steps 60, half a minute (window 5) to three (13).

Expected error over the last 20 steps, on CamVid: 0.048 for every window at blur 4, whose tuned kernels fall
off within 5 × 5 cells; 0.046 to 0.048 at blur 2; 0.047 at blur 1 for windows 11 and 13, but 0.071 for 7 and
0.111 for 5, which are too small for blocks of 8 pixels.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convcrf_synthetic import find_data, write_demonstration_folder
from jax import Array
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jaxcrf
from jaxcrf import reporting
from jaxcrf.data.folders import SegmentationFolder, open_folder
from jaxcrf.data.synthetic import corrupt_labels, corrupt_probs
from jaxcrf.presets import Preset

INITIAL = {
    "position_weight": 4.0,
    "position_bandwidth": 3.5,
    "bilateral_weight": 6.0,
    "bilateral_position_bandwidth": 5.0,
    "bilateral_color_bandwidth": 10.0,
    "unary_weight": 0.8,
}
NUM_ITERATIONS = 5


class Unary(NamedTuple):
    """One kind of prediction to be refined; see `convcrf_synthetic.py` for blocks and smooth."""

    noise: str
    keep: float = 0.8
    confidence: float = 0.81


UNARIES = (
    Unary("blocks"),
    Unary("blocks", confidence=0.7),
    Unary("blocks", confidence=0.95),
    Unary("blocks", keep=0.9, confidence=0.9),
    Unary("blocks", keep=1.0),
    Unary("smooth"),
)


class Batch(NamedTuple):
    """Crops: images `[B, H, W, 3]`, logits `[B, H, W, L]`, labels `[B, H, W]`."""

    image: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


def load(folder: SegmentationFolder, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` images evenly spread over the folder, every other one at double size."""
    examples = []
    for n, index in enumerate(np.linspace(0, len(folder) - 1, min(count, len(folder))).round().astype(int)):
        image, labels = folder[int(index)]
        if n % 2:
            size = (2 * labels.shape[1], 2 * labels.shape[0])
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            labels = labels.repeat(2, 0).repeat(2, 1)
        examples.append((image, labels))
    return examples


def noisy_logits(rng: np.random.Generator, labels: np.ndarray, num_labels: int, unary: Unary) -> np.ndarray:
    if unary.noise == "smooth":
        return corrupt_probs(rng, labels, num_labels, keep=unary.keep)
    noisy = corrupt_labels(rng, labels, num_labels, keep=unary.keep)
    return np.asarray(jaxcrf.unary_from_labels(noisy, num_labels, confidence=unary.confidence))


def batches(examples: list, num_labels: int, size: int, crop: tuple[int, int], seed: int) -> Iterator[Batch]:
    """Random crops of random images; every kind of unary as often as every other."""
    rng = np.random.default_rng(seed)
    kinds: list[Unary] = []
    height, width = crop
    while True:
        crops = []
        for _ in range(size):
            kinds = kinds or [UNARIES[i] for i in rng.permutation(len(UNARIES))]
            image, labels = examples[rng.integers(len(examples))]
            top = int(rng.integers(labels.shape[0] - height + 1))
            left = int(rng.integers(labels.shape[1] - width + 1))
            here = np.s_[top : top + height, left : left + width]
            crops.append(
                (image[here], noisy_logits(rng, labels[here], num_labels, kinds.pop()), labels[here])
            )
        yield Batch(*map(np.stack, zip(*crops, strict=True)))


def expected_error(log_parameters: dict[str, Array], batch: Batch, preset: Preset) -> Array:
    """`1 - q(truth)` on average over the labelled pixels."""
    p = {name: jnp.exp(value) for name, value in log_parameters.items()}
    kernel = jaxcrf.filters.Window(
        (
            jaxcrf.position_features(batch.image.shape[1:3], p["position_bandwidth"]),
            jaxcrf.bilateral_features(
                batch.image, p.get("bilateral_position_bandwidth"), p["bilateral_color_bandwidth"]
            ),
        ),
        preset.filter_size,
        weights=jnp.stack([p["position_weight"], p["bilateral_weight"]]),
        blur=preset.blur,
    ).normalized(preset.normalization)
    marginals = jaxcrf.mean_field(
        batch.logits, kernel, num_iterations=preset.num_iterations, unary_weight=p["unary_weight"]
    ).probs
    labelled = batch.labels != 255
    truth = jnp.where(labelled, batch.labels, 0)
    hit = jnp.take_along_axis(marginals, truth[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(labelled, 1 - hit, 0)) / jnp.sum(labelled)


def tune(
    examples: list, num_labels: int, preset: Preset, initial: dict[str, float], args: argparse.Namespace
) -> tuple[Preset, list[float]]:
    """Adam on the logarithms of `initial`; the tuned preset and the losses."""
    parameters = {name: jnp.log(jnp.float32(value)) for name, value in initial.items()}
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps, alpha=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, batch):
        loss, gradient = jax.value_and_grad(expected_error)(parameters, batch, preset)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, loss

    losses = []
    columns = (
        TextColumn(f"window {preset.filter_size}, blur {preset.blur}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("expected error {task.fields[loss]:.4f}"),
    )
    source = batches(examples, num_labels, args.batch, tuple(args.crop), args.seed)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=args.steps, loss=float("nan"))
        for _ in range(args.steps):
            parameters, state, loss = step(parameters, state, next(source))
            losses.append(float(loss))
            progress.update(task, advance=1, loss=np.mean(losses[-20:]))
    # Three digits are more than the data decide.
    tuned = {name: float(f"{np.exp(value):.3g}") for name, value in parameters.items()}
    return dataclasses.replace(preset, **tuned), losses


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder in the layout of PASCAL VOC or CamVid")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=60, help="how many, evenly spread over the split")
    parser.add_argument("--num-labels", type=int, default=21, help="noise is drawn from at least so many")
    parser.add_argument("--windows", type=int, nargs="+", default=[5, 7, 11, 13])
    parser.add_argument("--blurs", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--normalization", choices=("none", "before", "after", "symmetric"), default="none")
    parser.add_argument("--colors-only", action="store_true", help="no positions in the appearance kernel")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=[160, 208])
    parser.add_argument("--learning-rate", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--name", default="tune_convcrf")
    parser.add_argument("--smoke", action="store_true", help="a minute piece of everything, without data")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.windows, args.blurs, args.steps, args.batch, args.crop = [5], [4], 3, 2, [96, 128]
        args.split = "val"
    else:
        args.data = find_data(args.data, parser)
    return args


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            write_demonstration_folder(Path(temporary))
        folder = open_folder(temporary if args.smoke else args.data, args.split)
        examples = load(folder, args.images)
    num_labels = max(args.num_labels, folder.num_labels)
    initial = dict(INITIAL)
    if args.colors_only:
        del initial["bilateral_position_bandwidth"]

    tuned: dict[str, Preset] = {}
    runs = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for blur in args.blurs:
        for window in args.windows:
            preset = Preset(
                summary=f"tuned on synthetic noise: {window}×{window} at blur {blur}",
                bilateral_position_bandwidth=None,
                normalization=args.normalization,
                num_iterations=NUM_ITERATIONS,
                filter_size=window,
                blur=blur,
            )
            name = f"tuned {window}, blur {blur}"
            start = time.perf_counter()
            tuned[name], losses = tune(examples, num_labels, preset, initial, args)
            runs[name] = {"seconds": time.perf_counter() - start, "losses": losses}
            print(tuned[name])
            settings = {
                key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
            }
            for private in ("data", "out"):
                del settings[private]
            result = {
                **reporting.circumstances(__file__),
                "settings": {**settings, "initial": initial, "unaries": [u._asdict() for u in UNARIES]},
                "presets": {name: dataclasses.asdict(preset) for name, preset in tuned.items()},
                "runs": runs,
            }
            # After every one, so that an interrupted run keeps what it has.
            reporting.write_json(args.out / f"{args.name}.json", result)
    return result


if __name__ == "__main__":
    main()

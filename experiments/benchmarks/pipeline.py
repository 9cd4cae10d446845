"""The input pipeline: images decoded and augmented per second, by workers and threads, on the host and on the device.

    python experiments/benchmarks/pipeline.py [--data FOLDER] [--out DIR] [--smoke]

Measured in one run, on CamVid's training images (`--data`, or `camvid` in the folder that JAXCRF_DATA_DIR names; else
pictures that are drawn and written for the purpose), 360 × 480 pixels, with the augmentation of the ConvCRF paper:

- what the parts take on one core, in processor time: decoding image and labels, the affine map, the colours;
- images per second of the pipeline, for several numbers of workers and threads, once it runs, and the
  seconds until the first batch;
- the same by Pillow and NumPy in one process, step by step as scripts do it: read, mirror, resize, rotate, crop,
  one colour after another;
- the affine map and the colours as one jitted program on the device, for batches that are there already.

Configurations take turns, several rounds of them: a machine that does other things besides slows all down alike, and
the best round is what the machine can do. `load` is how many processes wanted to run when it began. Takes about two
minutes on two cores.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from measuring import measure
from PIL import Image, ImageEnhance

from jaxcrf import reporting
from jaxcrf.data import Pipeline, SegmentationFolder, augmentation, camvid_folder, read_image, read_labels
from jaxcrf.data.augmentation import (
    MEAN_COLOR,
    Outside,
    affine_matrix,
    color_matrix,
    recolor,
    resample,
    truncated_normal,
)

SIZE = (360, 480)
BATCH = 8
# Workers and threads in each.
CONFIGURATIONS = ((0, 0), (0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (2, 1), (2, 2))
# More batches than threads and workers prepare while the first is waited for: these do not count.
READY = 10
TARGET = 150.0
# Maps that are drawn for the device.
DRAWN = 16


def drawn_folder(root: Path, count: int, size: tuple[int, int]) -> SegmentationFolder:
    """Pictures of about the file size of photographs: colour gradients, rectangles and a little noise."""
    rng = np.random.default_rng(0)
    height, width = size
    for part in ("images", "labels"):
        (root / "train" / part).mkdir(parents=True)
    for i in range(count):
        labels = np.zeros(size, np.uint8)
        for label in range(1, 11):
            top, left = rng.integers(height - 4), rng.integers(width - 4)
            labels[top : top + rng.integers(4, height), left : left + rng.integers(4, width)] = label
        colors = rng.integers(30, 220, (11, 3))
        image = colors[labels] + rng.normal(0, 8, (*size, 1)) + np.linspace(-20, 20, width)[:, None]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"train/images/{i}.jpg", quality=90)
        Image.fromarray(labels).save(root / f"train/labels/{i}.png")
    return camvid_folder(root, "train")


def processor_ms(function: Callable[[int], Any], runs: int) -> dict[str, float]:
    """Milliseconds of processor time of a call; other processes' do not count."""
    times = []
    for i in range(runs):
        start = time.process_time()
        function(i)
        times.append(time.process_time() - start)
    return {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times)}


def parts(folder: SegmentationFolder, runs: int) -> dict[str, dict[str, float]]:
    """What an image takes on one core, piece by piece."""
    count = len(folder)
    examples = [folder[i] for i in range(min(count, 16))]
    pictures = [Image.fromarray(image) for image, _ in examples]
    turning = affine_matrix(SIZE, math.radians(5), 1.2, True, (30, 40))
    coefficients = tuple(turning.ravel().tolist())
    colors = color_matrix(10.0, 1.1, 0.9, 0.1)
    whole = augmentation.get("convcrf")
    rng = np.random.default_rng(0)
    size = SIZE[::-1]
    return {
        "decode_image": processor_ms(lambda i: read_image(folder.image_paths[i % count]), runs),
        "decode_labels": processor_ms(lambda i: read_labels(folder.label_paths[i % count]), runs),
        "example": processor_ms(lambda i: folder[i % count], runs),
        "affine": processor_ms(
            lambda i: pictures[i % len(pictures)].transform(
                size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
            ),
            runs,
        ),
        "colors": processor_ms(lambda i: recolor(pictures[i % len(pictures)], colors), runs),
        "augmentation": processor_ms(lambda i: whole(*examples[i % len(examples)], rng), runs),
    }


def plain_batches(folder: SegmentationFolder) -> Iterator[dict[str, np.ndarray]]:
    """Pillow and NumPy in one process, one step after another."""
    rng = np.random.default_rng(0)
    height, width = SIZE

    def draw() -> float:
        return float(np.clip(rng.normal() / 2, -1, 1))

    while True:
        images, marks = [], []
        for index in rng.integers(len(folder), size=BATCH):
            image = Image.open(folder.image_paths[index]).convert("RGB")
            labels = Image.open(folder.label_paths[index])
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            scale = 2 ** draw()
            scaled = round(scale * image.width), round(scale * image.height)
            image = image.resize(scaled, Image.Resampling.BILINEAR)
            labels = labels.resize(scaled, Image.Resampling.NEAREST)
            angle = 10 * draw()
            image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=MEAN_COLOR)
            labels = labels.rotate(angle, Image.Resampling.NEAREST, fillcolor=255)
            left = rng.integers(min(0, scaled[0] - width), max(0, scaled[0] - width) + 1)
            top = rng.integers(min(0, scaled[1] - height), max(0, scaled[1] - height) + 1)
            canvas = Image.new("RGB", (width, height), MEAN_COLOR)
            canvas.paste(image, (-left, -top))
            void = Image.new("L", (width, height), 255)
            void.paste(labels, (-left, -top))
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                canvas = enhance(canvas).enhance(1 + 0.25 * draw())
            hue = np.array(canvas.convert("HSV"))
            hue[..., 0] += np.uint8(round(256 * 0.05 * draw()) % 256)  # round and round
            images.append(np.asarray(Image.fromarray(hue, "HSV").convert("RGB")))
            marks.append(np.asarray(void).astype(np.int32))
        yield {"image": np.stack(images), "labels": np.stack(marks)}


def run(batches: Iterator[dict[str, np.ndarray]], count: int) -> tuple[float, float, float]:
    """Seconds to the first batch; images per second later; and milliseconds of this process for each of them."""
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    for _ in range(READY):
        next(batches)
    begin, busy = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    images = count * BATCH
    return first, images / (time.perf_counter() - begin), 1e3 * (time.process_time() - busy) / images


@jax.jit
def on_device(images: Array, labels: Array, matrices: Array, colors: Array) -> tuple[Array, Array]:
    """Affine maps and colours of a batch in float32: bilinear, from two levels of a pyramid to shrink; and nearest."""
    height, width = images.shape[1:3]
    y, x = jnp.mgrid[:height, :width] + 0.5
    places = jnp.stack([x.ravel(), y.ravel(), jnp.ones(height * width)])

    def interpolated(image: Array, x: Array, y: Array) -> Array:
        height, width = image.shape[:2]
        pixels = image.reshape(-1, 3)
        left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
        right_weight, bottom_weight = (x - 0.5 - left)[:, None], (y - 0.5 - top)[:, None]
        columns = [jnp.clip(left.astype(jnp.int32) + i, 0, width - 1) for i in (0, 1)]
        rows = [jnp.clip(top.astype(jnp.int32) + i, 0, height - 1) for i in (0, 1)]
        upper, lower = (
            (1 - right_weight) * pixels[i * width + columns[0]]
            + right_weight * pixels[i * width + columns[1]]
            for i in rows
        )
        return (1 - bottom_weight) * upper + bottom_weight * lower

    def shrunk(image: Array, x: Array, y: Array, zoom: Array) -> Array:
        half = image[: height // 2 * 2, : width // 2 * 2].astype(jnp.float32)
        half = half.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
        level = jnp.clip(jnp.log2(zoom), 0, 1)
        return (1 - level) * interpolated(image, x, y) + level * interpolated(half, x / 2, y / 2)

    def one(example: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        image, marks, matrix, color = example
        x, y = jnp.matmul(matrix, places, precision="highest")
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        column, row = (
            jnp.clip(jnp.floor(v).astype(jnp.int32), 0, n - 1) for v, n in ((x, width), (y, height))
        )
        nearest = jnp.where(inside, marks.ravel()[row * width + column], 255)
        zoom = jnp.hypot(matrix[0, 0], matrix[1, 0])
        value = jax.lax.cond(
            zoom > 1, shrunk, lambda image, x, y, _: interpolated(image, x, y), image, x, y, zoom
        )
        value = jnp.matmul(value, color[:, :3].T, precision="highest") + color[:, 3]
        value = jnp.where(inside[:, None], jnp.clip(value, 0, 255), jnp.asarray(MEAN_COLOR, jnp.float32))
        return value.reshape(height, width, 3), nearest.reshape(height, width)

    return jax.lax.map(one, (images, labels, matrices, colors))


def device_row(folder: SegmentationFolder, runs: int) -> dict[str, Any]:
    """The device's program on maps such as are drawn: its rate, and how far it is from the host's results."""
    examples = [folder[i % len(folder)] for i in range(DRAWN)]
    rng = np.random.default_rng(0)
    draws = truncated_normal(rng, 2 * DRAWN).reshape(DRAWN, 2) / 2
    matrices = [
        affine_matrix(SIZE, 0.17 * angle, 2**scale, rng.random() < 0.5, (9, 9)) for angle, scale in draws
    ]
    color = color_matrix(5.0, 1.0, 1.2, 0.1)  # which leaves contrast, and so needs no mean
    operands = [
        jnp.asarray(np.stack(arrays))
        for arrays in (
            *zip(*examples, strict=True),
            np.float32(matrices),
            [np.float32(color[:, [0, 1, 2, 4]])] * DRAWN,
        )
    ]
    values, marks = (np.asarray(v) for v in on_device(*operands))
    differences, agreement = [], []
    for (image, labels), matrix, value, found in zip(examples, matrices, values, marks, strict=True):
        host = resample(Image.fromarray(image), labels, SIZE, matrix, color, Outside())
        differences.append(float(np.abs(value - host[0]).mean()))
        agreement.append(float((found == host[1]).mean()))
    busy = processor_ms(lambda _: jax.block_until_ready(on_device(*operands)), runs)
    row = measure(on_device, *operands, runs=runs)
    return {
        **row,
        "images_per_s": DRAWN / (1e-3 * row["min_ms"]),
        "core_ms_per_image": busy["median_ms"] / DRAWN,
        "mean_difference": statistics.mean(differences),
        "equal_labels": statistics.mean(agreement),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder in the layout of CamVid, with a train split")
    parser.add_argument("--out", type=Path, help="folder for pipeline.json")
    parser.add_argument("--smoke", action="store_true", help="few and small pictures, to see that it works")
    arguments = parser.parse_args()
    runs, rounds, count = (3, 1, 2) if arguments.smoke else (60, 4, 15)
    data = arguments.data
    if data is None and os.environ.get("JAXCRF_DATA_DIR"):
        data = Path(os.environ["JAXCRF_DATA_DIR"], "camvid")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.smoke or data is None or not data.is_dir():
            folder = drawn_folder(Path(scratch), 6 if arguments.smoke else 200, SIZE)
            name = "drawn"
        else:
            folder = camvid_folder(data, "train")
            name = "CamVid"
        print(f"{len(folder)} pictures ({name}), jax {jax.__version__}, {os.cpu_count()} cores", flush=True)
        results = measured(folder, runs, rounds, count, CONFIGURATIONS[:: 4 if arguments.smoke else 1])
    if arguments.out is not None:
        reporting.write_json(
            arguments.out / "pipeline.json",
            {
                **reporting.circumstances(__file__),
                "load": load,
                "pictures": name,
                "size": list(SIZE),
                "batch_size": BATCH,
                **results,
            },
        )


def measured(
    folder: SegmentationFolder,
    runs: int,
    rounds: int,
    count: int,
    configurations: tuple[tuple[int, int], ...],
) -> dict[str, Any]:
    """All of it, printed as it comes."""
    convcrf = augmentation.get("convcrf")
    makers: dict[str, Callable[[], Any]] = {"plain": lambda: plain_batches(folder)}
    for workers, threads in configurations:
        pipeline = Pipeline(
            folder, BATCH, size=SIZE, augmentation=convcrf, num_workers=workers, num_threads=threads
        )
        makers[f"{workers} workers, {threads} threads"] = partial(
            pipeline.batches, process_index=0, process_count=1
        )
    unaugmented = Pipeline(folder, BATCH, size=SIZE)
    makers["decoding only, 0 workers, 2 threads"] = partial(
        unaugmented.batches, process_index=0, process_count=1
    )
    found: dict[str, list[tuple[float, float, float]]] = {key: [] for key in makers}
    for _ in range(rounds):
        for key, make in makers.items():
            batches = make()
            found[key].append(run(batches, count))
            batches.close()
    rows = {}
    for key, measurements in found.items():
        first, rate, busy = (list(values) for values in zip(*measurements, strict=True))
        rows[key] = {
            "images_per_s": max(rate),
            "median_images_per_s": statistics.median(rate),
            "first_batch_s": min(first),
            "core_ms_per_image": min(busy),
            "over_plain": max(rate) / max(measured_rate for _, measured_rate, _ in found["plain"]),
        }
        row = rows[key]
        print(
            f"{key:36} {row['images_per_s']:6.0f} images/s (median {row['median_images_per_s']:.0f}), "
            f"{row['over_plain']:.2f} of plain; {row['core_ms_per_image']:.1f} ms of this process each; "
            f"first batch after {row['first_batch_s']:.2f} s",
            flush=True,
        )
    # After the pipeline has told Pillow to keep its memory.
    pieces = parts(folder, runs)
    for key, piece in pieces.items():
        print(f"{key:16} {piece['median_ms']:6.2f} ms of a core ({piece['min_ms']:.2f} at best)", flush=True)
    device = device_row(folder, max(2, runs // 8))
    print(
        f"affine and colours on {jax.devices()[0].device_kind}: {device['images_per_s']:.0f} images/s, "
        f"{device['core_ms_per_image']:.2f} ms of this machine's cores each, besides decoding; "
        f"{device['mean_difference']:.2f} levels from the host's, "
        f"{100 * device['equal_labels']:.2f} % of the labels equal",
        flush=True,
    )
    best = max(row["images_per_s"] for key, row in rows.items() if "workers" in key and "only" not in key)
    print(f"best: {best:.0f} images/s (wanted: {TARGET:.0f})")
    return {"target_images_per_s": TARGET, "rows": rows, "parts": pieces, "device": device}


if __name__ == "__main__":
    main()

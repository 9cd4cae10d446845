"""One image on several devices: what they exchange, and whether the result is that of one.

    python experiments/benchmarks/sharded_window.py [--out DIR] [--smoke]

Five mean-field iterations of ConvCRF (window 11, blur 1 and 4) on one image whose rows, or rows and columns, are
split over 1, 2, 4 and 8 devices, each in a process of its own with so many host devices:

- the bytes that the compiled program says an iteration moves between devices, all of them together, beside the
  least that the windows' halos take: for every cut of the grid, `filter_size // 2` rows of it either way,
- what else is exchanged: nothing but single numbers may be gathered or reduced,
- the largest difference from one device,
- the time. Host devices share the cores of this machine and the halos are computed twice, so this says what splitting
  costs and nothing about speed.

Expected: at blur 1 the least, at blur 4 a fifth more, for the neighbours' row that bilinear up-sampling reads. Where a
device's rows are no multiple of the blur, pixels also follow their cells to another device and back, up to twenty times
the least (360 rows on 8 devices); images whose sides are multiples of devices × blur are spared that, which is why one
is among the sizes. Takes about three minutes on two cores.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcrf
from jaxcrf import presets, reporting

ITERATIONS = 5
SPLITS = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2)]
# height, width, labels, filter size
SIZES = [(384, 512, 21, 11), (360, 480, 12, 11)]
SMOKE_SIZES = [(24, 16, 3, 5)]
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def collectives(text: str) -> dict[str, Any]:
    """What a compiled program exchanges, from its text: in the body of its loop, and everywhere.

    Returns:
        `loop_bytes`, the bytes that permutations in loops move, over all pairs of devices; `permutations`, how many
        of them there are in loops; `largest_other`, the numbers in the largest result of any other collective.
    """
    loop_bytes = permutations = largest_other = 0
    computation = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            computation = "entry" if header[1] else header[2]
        found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if not found:
            continue
        sizes = [math.prod(int(n) for n in s.split(",") if n) for s in re.findall(r"\[([\d,]*)\]", found[1])]
        if found[2] != "collective-permute":
            largest_other = max(largest_other, *sizes)
        elif computation != "entry":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)[1].count("{")
            width = 4 if "f32" in found[1] else 8 if "f64" in found[1] else 2
            loop_bytes += width * sizes[0] * pairs
            permutations += 1
    return {"loop_bytes": loop_bytes, "permutations": permutations, "largest_other": largest_other}


def least_bytes(size: tuple[int, int, int, int], blur: int, split: tuple[int, int]) -> int:
    """The maps' halos of one message: `span` rows either way at every cut, corners included."""
    *spatial, labels, window = size
    cells = [math.ceil(n / blur) for n in spatial]
    span = window // 2
    rows = 2 * span * (split[0] - 1) * cells[1]
    columns = 2 * span * (split[1] - 1) * (cells[0] + 2 * span * (split[0] - 1))
    return 4 * labels * (rows + columns)


def one_split(size: tuple[int, int, int, int], blur: int, split: tuple[int, int], runs: int) -> dict:
    """Measures one case; to be run in a process that has the devices."""
    height, width, labels, window = size
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (height, width, 3)).astype(np.float32)
    logits = rng.normal(size=(height, width, labels)).astype(np.float32)
    preset = dataclasses.replace(
        presets.get("convcrf"), filter_size=window, blur=blur, num_iterations=ITERATIONS
    )
    devices = np.array(jax.devices()[: math.prod(split)]).reshape(split)
    sharding = NamedSharding(Mesh(devices, ("rows", "columns")), PartitionSpec("rows", "columns"))
    expected = jaxcrf.refine_logits(image, logits, jaxcrf.RefineConfig(preset)).probs
    placed = jax.device_put((image, logits), sharding)
    config = jaxcrf.RefineConfig(preset, sharding=sharding if math.prod(split) > 1 else None)
    compiled = jaxcrf.refine_logits.lower(*placed, config).compile()
    found = jax.block_until_ready(compiled(*placed)).probs
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*placed))
        times.append(time.perf_counter() - begin)
    exchanged = collectives(compiled.as_text())
    least = least_bytes(size, blur, split)
    return {
        "size": list(size[:3]),
        "filter_size": window,
        "blur": blur,
        "split": list(split),
        **exchanged,
        "least_bytes": least,
        "bytes_over_least": exchanged["loop_bytes"] / least if least else None,
        "largest_difference": float(np.abs(np.asarray(found) - np.asarray(expected)).max()),
        "median_ms": 1e3 * float(np.median(times)),
    }


def in_its_process(*arguments: Any, devices: int) -> dict:
    """`one_split` in a process with so many host devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--case", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a process with {devices} devices failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for sharded_window.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        size, blur, split, runs = json.loads(arguments.case)
        print(json.dumps(one_split(tuple(size), blur, tuple(split), runs)))
        return

    rows = []
    for size in SMOKE_SIZES if arguments.smoke else SIZES:
        for blur in (4,) if arguments.smoke else (1, 4):
            for split in ((1, 1), (4, 2)) if arguments.smoke else SPLITS:
                row = in_its_process(size, blur, split, 2 if arguments.smoke else 5, devices=math.prod(split))
                rows.append(row)
                ratio = row["bytes_over_least"]
                print(
                    f"{'×'.join(map(str, row['size']))} blur {blur} on {split[0]}×{split[1]} devices: "
                    f"{row['loop_bytes'] / 2**20:7.2f} MiB an iteration"
                    f"{'' if ratio is None else f' ({ratio:.2f} of the least)'}, {row['median_ms']:8.1f} ms, "
                    f"differs by {row['largest_difference']:.1e}",
                    flush=True,
                )
                if row["largest_other"] > 1:
                    raise RuntimeError(f"a collective gathers or reduces {row['largest_other']} numbers")
    results = {
        **reporting.circumstances(__file__),
        "note": "host devices share this machine's cores: times are costs, not speeds",
        "iterations": ITERATIONS,
        "splits": rows,
    }
    if arguments.out is not None:
        reporting.write_json(arguments.out / "sharded_window.json", results)


if __name__ == "__main__":
    main()

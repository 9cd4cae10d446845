"""Networks: the forward pass of VGG-16 beside PyTorch's, and what a CRF adds to a step of training.

    python experiments/benchmarks/models.py [--out DIR] [--smoke]

1. **Forward pass** of DeepLab-LargeFOV, images of 321 × 321, 21 labels, in evaluation mode. On a CPU a batch of one in
   float32, and the same network in PyTorch, with the same weights and as many threads, in the same process; the two
   take turns. PyTorch is given both layouts, and the faster one counts. Target: at most 1.3 times its time. Without
   PyTorch this comparison is left out, and said to be. On a GPU a batch of 32 in bfloat16. Target, of an H200: 1000
   images per second.
2. **A step of training** of ResNet-101 alone, and with ConvCRF on top, whose five iterations are recomputed in the
   backward pass: the compiled program's own memory, and its time; the two take turns. Targets: at most 1.3 times the
   memory, and on a GPU at most 1.15 times the time. On a CPU a batch of one in float32, on a GPU of 16 in bfloat16.

Floating-point operations are those of the program before it is optimised, a multiply-add as two; loops, as those of the
CRF, count once. Weights are random
numbers, which take as long as any others. Cost: three minutes on two CPU cores and 6 GB.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxcrf import models, reporting
from jaxcrf.compat import weights
from jaxcrf.models.parameters import is_key, named_leaves, with_leaves
from jaxcrf.training import (
    Template,
    Update,
    data_mesh,
    init_state,
    make_step,
    objectives,
    put_batch,
    replicate,
    with_optimizers,
)

NUM_LABELS = 21
FORWARD_TARGET, IMAGES_PER_S_TARGET = 1.3, 1000.0
MEMORY_TARGET, STEP_TARGET = 1.3, 1.15


def random_model(name: str, **options: Any) -> nnx.Module:
    """A model of the registry with numbers drawn by NumPy: nothing has to be compiled for them."""
    model: Any = nnx.eval_shape(lambda: models.create(name, NUM_LABELS, rngs=nnx.Rngs(0), **options))
    definition, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> Any:
        if is_key(leaf):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if path.endswith(("/var", "/scale")):
            return np.ones(leaf.shape, leaf.dtype)
        deviation = np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
        return (
            deviation * rng.standard_normal(leaf.shape, np.float32)
            if len(leaf.shape) > 1
            else np.zeros(leaf.shape, leaf.dtype)
        )

    drawn = {path: jax.device_put(draw(path, leaf)) for path, leaf in named_leaves(state).items()}
    return nnx.merge(definition, with_leaves(state, drawn))


def taking_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and best time of each, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        name: {"median_ms": statistics.median(found), "min_ms": min(found)} for name, found in times.items()
    }


def ratio(found: dict[str, dict[str, float]], name: str, reference: str) -> float:
    """Of the best times: what disturbs a machine only ever adds."""
    return found[name]["min_ms"] / found[reference]["min_ms"]


def compiled_with_costs(lowered: Any) -> tuple[Any, dict[str, float]]:
    """A compiled program, and what it took and takes."""
    begin = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    analysis = lowered.cost_analysis()
    return compiled, {
        "compile_s": seconds,
        "extra_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "flops": float(analysis["flops"]),
    }


def forward(args: argparse.Namespace) -> dict[str, Any]:
    """The forward pass of DeepLab-LargeFOV."""
    model = random_model("deeplab_largefov", **args.deeplab)
    model.eval()
    images = np.random.default_rng(1).integers(0, 256, (args.forward_batch, *args.shape, 3))
    definition, state = nnx.split(model)

    def cast(leaf: Any) -> Any:
        return leaf.astype(args.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    operands = (jax.tree.map(cast, state), jnp.asarray(images, args.dtype))
    program = jax.jit(lambda state, images: nnx.merge(definition, state)(images))
    compiled, result = compiled_with_costs(program.lower(*operands))
    # Several calls are queued, as where images follow one another: a GPU hides the host's part so.
    calls = 1 if args.on_cpu else 10

    def run() -> None:
        jax.block_until_ready([compiled(*operands) for _ in range(calls)][-1])

    functions = {"jaxcrf": run}
    if args.on_cpu:
        scores = np.asarray(compiled(*operands))[0]
        functions |= torch_functions(model, images, args.shape, scores)
    found = taking_turns(functions, args.rounds)
    seconds = 1e-3 * found["jaxcrf"]["min_ms"] / calls
    result |= {
        "batch_size": args.forward_batch,
        "dtype": args.dtype,
        "times": found,
        "flops_per_s": result["flops"] / seconds,
        "images_per_s": args.forward_batch / seconds,
        "target_images_per_s": IMAGES_PER_S_TARGET,
    }
    print(
        f"forward, {args.forward_batch} × {args.shape}, {args.dtype}: {1e3 * seconds:.1f} ms, "
        f"{result['images_per_s']:.1f} images/s, {result['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"{result['extra_mib']:.0f} MiB, compiled in {result['compile_s']:.1f} s"
    )
    if "torch, channels last" in found:
        fastest = min((name for name in found if name != "jaxcrf"), key=lambda name: found[name]["min_ms"])
        result |= {"ratio_to_torch": ratio(found, "jaxcrf", fastest), "target": FORWARD_TARGET}
        print(f"  {fastest}: {found[fastest]['min_ms']:.1f} ms; ratio {result['ratio_to_torch']:.2f}")
    return result


def torch_functions(
    model: nnx.Module, images: np.ndarray, shape: tuple[int, int], expected: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """The same network in PyTorch, in two layouts; nothing if there is no PyTorch.

    Raises:
        ValueError: if its logits are others, which would be another network's.
    """
    try:
        import torch
        from torch import nn
    except ImportError:
        print("forward: SKIPPED the comparison with PyTorch, which is not installed")
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    entries = {name: torch.tensor(value) for name, value in weights.export(model).items()}
    last: Any = model
    convolutions = [name.removesuffix(".weight") for name in entries if name.endswith(".weight")]
    layers: list[Any] = []

    def convolution(name: str, dilation: int) -> None:
        weight = entries[f"{name}.weight"]
        weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1)))
        outputs, inputs, size, _ = weight.shape
        layer = nn.Conv2d(inputs, outputs, size, padding=dilation * (size // 2), dilation=dilation)
        layer.load_state_dict({"weight": weight, "bias": entries[f"{name}.bias"]})
        layers.extend([layer, nn.ReLU(inplace=True)])

    pools = {2: 2, 4: 2, 7: 2, 10: 1, 13: 1}
    for number, name in enumerate(convolutions, start=1):
        convolution(name, {14: 12, 15: 1}.get(number, 2 if number > 10 else 1))
        if number in pools:
            layers.append(nn.MaxPool2d(3, pools[number], 1))
    kernel = np.asarray(last.classifier.kernel[...]).transpose(3, 2, 0, 1)
    classifier = nn.Conv2d(kernel.shape[1], NUM_LABELS, 1)
    classifier.load_state_dict(
        {"weight": torch.tensor(kernel), "bias": torch.tensor(np.asarray(last.classifier.bias[...]))}
    )
    # The corners stay corners: 41 cells, 8 pixels apart, reach over 321.
    network = nn.Sequential(
        *layers, classifier, nn.Upsample(shape, mode="bilinear", align_corners=True)
    ).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    channels_last = {"memory_format": torch.channels_last}
    copies = {
        "torch, channels first": (network, x),
        "torch, channels last": (
            nn.Sequential(*network).to(**channels_last),
            x.clone().to(**channels_last),
        ),
    }
    with torch.inference_mode():
        found = network(x)[0].permute(1, 2, 0).numpy()
    if np.abs(found - expected).max() > 1e-3 * np.abs(expected).max():
        raise ValueError(f"torch: its logits differ by {np.abs(found - expected).max()}")

    def call(network: Any, x: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                network(x)

        return run

    return {name: call(*copy) for name, copy in copies.items()}


def training(args: argparse.Namespace) -> dict[str, Any]:
    """A step of training, without and with the CRF."""
    mesh = data_mesh(1)
    rng = np.random.default_rng(2)
    shape = (args.training_batch, *args.shape)
    batch = put_batch(
        {
            "image": rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
            "labels": rng.integers(0, NUM_LABELS, shape).astype(np.int32),
        },
        mesh,
    )
    result: dict[str, Any] = {
        "batch_size": args.training_batch,
        "dtype": args.dtype,
        "target_memory": MEMORY_TARGET,
        "target_step": STEP_TARGET,
    }
    functions = {}
    for name in ("resnet101_fcn", "convcrf"):
        template = Template(random_model(name, **args.resnet))
        update = Update("all", objectives.segmentation(), optax.sgd(1e-6))
        state = replicate(with_optimizers(init_state(template), {"all": update}), mesh)
        step: Any = make_step(
            template, update, mesh=mesh, compute_dtype=None if args.on_cpu else jnp.dtype(args.dtype)
        )
        compiled, result[name] = compiled_with_costs(step.lower(state, batch))
        functions[name] = stepping(compiled, state, batch)
    found = taking_turns(functions, args.rounds)
    for name, times in found.items():
        result[name] |= times
        print(
            f"{name}: a step of {shape} {times['min_ms']:.0f} ms, {result[name]['extra_mib']:.0f} MiB, "
            f"compiled in {result[name]['compile_s']:.1f} s"
        )
    result["memory_ratio"] = result["convcrf"]["extra_mib"] / result["resnet101_fcn"]["extra_mib"]
    result["step_ratio"] = ratio(found, "convcrf", "resnet101_fcn")
    print(
        f"  with the CRF {result['memory_ratio']:.2f} times the memory, {result['step_ratio']:.2f} times the time"
    )
    return result


def stepping(compiled: Any, state: Any, batch: Any) -> Callable[[], None]:
    """A function that makes a step; the state handed in is used up, so that it keeps the next one."""

    def run() -> None:
        nonlocal state
        state, report = compiled(state, batch)
        jax.block_until_ready(report.loss)

    return run


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--only", choices=("forward", "training"), help="one of the two parts")
    parser.add_argument("--out", type=Path, help="folder for models.json")
    args = parser.parse_args()
    args.on_cpu = jax.default_backend() == "cpu"
    args.dtype = "float32" if args.on_cpu else "bfloat16"
    args.shape, args.forward_batch, args.training_batch = (321, 321), *((1, 1) if args.on_cpu else (32, 16))
    args.deeplab, args.resnet = {}, {}
    if args.smoke:
        args.rounds, args.shape = 1, (41, 41)
        args.forward_batch = args.training_batch = 1
        args.deeplab, args.resnet = {"width": 4, "hidden_channels": 8}, {"width": 4, "blocks": (1, 1, 1, 1)}
    result: dict[str, Any] = {"shape": list(args.shape), "num_labels": NUM_LABELS}
    for name, part in (("forward", forward), ("training", training)):
        if args.only in (None, name):
            result[name] = part(args)
    if args.out:
        reporting.write_json(args.out / "models.json", result | reporting.circumstances(__file__))


if __name__ == "__main__":
    main()

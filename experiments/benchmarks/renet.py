"""The recurrent layer group of the H-ReNet: beside Flax's own bidirectional LSTM, and PyTorch's; and whole networks.

    python experiments/benchmarks/renet.py [--out DIR] [--smoke]

A map of 47 × 63 with 512 channels, columns and then rows swept by LSTMs with 120 units in each direction; 240 channels
come out. Forward, and forward and backward (weights and input), batches of 1 and 10, float32. All take turns in one
process, have the same weights, and must give the same numbers. Without PyTorch its rows are left out, and said to be.

Flax's is `nnx.Bidirectional` over columns and rows, a loop for each direction, with `LSTMCell`, and "optimized" with
`OptimizedLSTMCell`. PyTorch's is `torch.nn.LSTM(bidirectional=True)`, with as many threads as the process has cores.

"Products alone" are the group's matrix products in the same loops without what comes between them, a floor for any
implementation of the kind.

Wall time is what users see, on a machine that does nothing else; processor time is what the work takes on any. Targets,
wall time on two CPU cores: at most 2 times PyTorch's for a batch of one and 1.3 times for ten, at least 1.5 times
as fast as Flax; on a GPU at most 2 ms forward for a batch of one, bfloat16 allowed (a row of its own there, and no
PyTorch).

Whole networks, forward, one image and 21 labels: the H-ReNet and its baseline without the group, 321 × 321, in turns;
the group is to add at most 20 % (the paper: 0.24 instead of 0.21 s). The N-ReNet, 240 × 320; on a GPU at most 10 ms
(the paper: 70 ms), bfloat16 allowed. Weights are random numbers.

Rows with `unroll` and `chunk` say what these options cost; memory is the compiled program's own. Two more say what was
chosen otherwise: "directions apart", a loop for each of them in place of one for both, and "projected beforehand", what
the image contributes as one product for all steps, as devices other than CPUs have it. Cost: four minutes on two CPU
cores and 3 GB.
"""

import argparse
import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxcrf
from jaxcrf import recurrent, reporting
from models import random_model

TARGETS = {
    "to torch": {"1": 2.0, "10": 1.3},
    "to flax.nnx": 1 / 1.5,
    "forward_ms on a GPU": 2.0,
    "h_renet to its baseline": 1.2,
    "n_renet_ms on a GPU": 10.0,
}
NETWORKS = {"h_renet_baseline": (321, 321), "h_renet": (321, 321), "n_renet": (240, 320)}
OPTIONS: dict[str, dict[str, Any]] = {
    "jaxcrf": {},
    "jaxcrf, unroll=1": {"unroll": 1},
    "jaxcrf, unroll=2": {"unroll": 2},
    "jaxcrf, chunk=8": {"chunk": 8},
}
BEFOREHAND = "jaxcrf, projected beforehand"
FORWARD_ONLY = ("directions apart", "products alone")


def taking_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and best wall time and best processor time of each, after one round that does not count."""
    walls: dict[str, list[float]] = {name: [] for name in functions}
    processors: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            if number:
                walls[name].append(1e3 * (time.perf_counter() - wall))
                processors[name].append(1e3 * (time.process_time() - processor))
    return {
        name: {
            "median_ms": statistics.median(walls[name]),
            "min_ms": min(walls[name]),
            "processor_ms": min(processors[name]),
        }
        for name in functions
    }


def optimized(channels: int, features: int) -> Any:
    """Flax's LSTM that multiplies by all gates' weights at once."""
    return nnx.OptimizedLSTMCell(channels, features, rngs=nnx.Rngs(0))


def plain(channels: int, features: int) -> Any:
    """Flax's LSTM with a product for each gate."""
    return nnx.LSTMCell(channels, features, rngs=nnx.Rngs(0))


def flax_group(make: Callable[[int, int], Any]) -> Callable[[Any, jax.Array], jax.Array]:
    """Two `nnx.Bidirectional` layers, as a function of the group's parameters and its input."""

    def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """Along the second axis."""
        _, channels, width = params["input_kernel"].shape
        networks = []
        for k in range(2):
            cell = nnx.eval_shape(functools.partial(make, channels, width // 4))
            kernels = params["input_kernel"][k], params["recurrent_kernel"][k]
            if make is optimized:
                cell.dense_i.kernel, cell.dense_h.kernel = map(nnx.Param, kernels)
                cell.dense_h.bias = nnx.Param(params["bias"][k])
            else:
                parts = (jnp.split(a, 4, -1) for a in (*kernels, params["bias"][k]))
                for gate, by_input, by_state, bias in zip("ifgo", *parts, strict=True):
                    # `if` is no name.
                    getattr(cell, "if_" if gate == "f" else f"i{gate}").kernel = nnx.Param(by_input)
                    getattr(cell, f"h{gate}").kernel = nnx.Param(by_state)
                    getattr(cell, f"h{gate}").bias = nnx.Param(bias)
            networks.append(nnx.RNN(cell))
        zeros = jnp.zeros((x.shape[0], width // 4))
        return nnx.Bidirectional(*networks)(x, initial_carry=((zeros, zeros), (zeros, zeros)))

    def group(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        batch, height, width, _ = x.shape
        columns = layer(params["first"], x.swapaxes(1, 2).reshape(batch * width, height, -1))
        rows = columns.reshape(batch, width, height, -1).swapaxes(1, 2).reshape(batch * height, width, -1)
        return layer(params["second"], rows).reshape(batch, height, width, -1)

    return group


def products(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The group's matrix products in the same order, nothing but sums between them: a floor for what LSTMs take."""
    for layer in params.values():
        kernels, recurrent = layer["input_kernel"], layer["recurrent_kernel"]
        steps = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])
        features = recurrent.shape[1]

        def step(hidden: Any, inputs: Any, kernels: Any = kernels, recurrent: Any = recurrent) -> Any:
            both = [a @ kernel for a, kernel in zip(inputs, kernels, strict=True)]
            following = (jnp.stack(both) + jnp.einsum("kmd,kdg->kmg", hidden, recurrent))[
                ..., : hidden.shape[-1]
            ]
            return following, following

        zeros = jnp.zeros((2, steps.shape[1], features))
        _, hidden = jax.lax.scan(step, zeros, (steps, steps[::-1]))
        y = jnp.concatenate([hidden[:, 0], hidden[::-1, 1]], -1)
        # Rows become columns for the other layer.
        x = y.reshape(len(y), x.shape[0], x.shape[2], -1).transpose(1, 2, 0, 3)
    return x


def apart(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The group with a loop for each direction, two steps at a time; forward, its gradients are left to autodiff."""
    for layer in params.values():
        steps = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])
        hidden = []
        for k in range(2):
            by_input, by_state, bias = (
                layer[name][k] for name in ("input_kernel", "recurrent_kernel", "bias")
            )

            def step(
                state: Any, inputs: Any, by_input: Any = by_input, by_state: Any = by_state, bias: Any = bias
            ) -> Any:
                i, f, g, o = jnp.split(inputs @ by_input + state[0] @ by_state + bias, 4, -1)
                memory = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
                following = jax.nn.sigmoid(o) * jnp.tanh(memory)
                return (following, memory), following

            zeros = jnp.zeros((steps.shape[1], len(by_state)))
            hidden.append(jax.lax.scan(step, (zeros, zeros), steps, reverse=bool(k), unroll=2)[1])
        y = jnp.concatenate(hidden, -1)
        x = y.reshape(len(y), x.shape[0], x.shape[2], -1).transpose(1, 2, 0, 3)
    return x


@contextlib.contextmanager
def projecting_beforehand() -> Iterator[None]:
    """What is traced inside computes `W x + b` for all steps at once, whatever it is lowered for."""
    by_platform = recurrent.by_platform
    recurrent.by_platform = lambda *operands, cpu, accelerator: accelerator(*operands)
    jax.clear_caches()
    try:
        yield
    finally:
        recurrent.by_platform = by_platform
        jax.clear_caches()


def torch_functions(
    params: dict[str, dict[str, jax.Array]], x: np.ndarray, weights: np.ndarray, expected: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """Forward, and forward and backward, in PyTorch; nothing if there is none.

    Raises:
        ValueError: if it computes something else.
    """
    try:
        import torch
    except ImportError:
        print("SKIPPED the comparison with PyTorch, which is not installed")
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    networks = []
    for layer in params.values():
        _, channels, width = layer["input_kernel"].shape
        network = torch.nn.LSTM(channels, width // 4, bidirectional=True, batch_first=True)
        entries = {}
        for k, suffix in enumerate(("", "_reverse")):
            entries |= {
                f"weight_ih_l0{suffix}": layer["input_kernel"][k].T,
                f"weight_hh_l0{suffix}": layer["recurrent_kernel"][k].T,
                f"bias_ih_l0{suffix}": layer["bias"][k],
                f"bias_hh_l0{suffix}": 0 * layer["bias"][k],
            }
        network.load_state_dict({name: torch.tensor(np.array(value)) for name, value in entries.items()})
        networks.append(network)
    batch, height, width, _ = x.shape
    inputs = torch.tensor(x, requires_grad=True)
    factors = torch.tensor(weights)

    def group() -> Any:
        columns, _ = networks[0](inputs.transpose(1, 2).reshape(batch * width, height, -1))
        rows = columns.reshape(batch, width, height, -1).transpose(1, 2).reshape(batch * height, width, -1)
        return networks[1](rows)[0].reshape(batch, height, width, -1)

    def forward() -> None:
        with torch.inference_mode():
            group()

    def backward() -> None:
        for network in networks:
            network.zero_grad(set_to_none=True)
        inputs.grad = None
        (factors * group()).sum().backward()

    difference = np.abs(group().detach().numpy() - expected).max()
    if difference > 1e-4:
        raise ValueError(f"torch: its numbers differ by {difference}")
    return {"forward": forward, "forward and backward": backward}


def measured(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """All rows of one batch size."""
    rng = np.random.default_rng(0)
    params = jaxcrf.renet_group_init(jax.random.key(0), args.channels, args.features, scale=0.1)
    x = rng.normal(size=(batch, *args.shape, args.channels)).astype(np.float32)
    weights = rng.normal(size=(batch, *args.shape, 2 * args.features)).astype(np.float32)
    groups: dict[str, Any] = {
        name: lambda params, x, options=options: jaxcrf.renet_group(params, x, **options)
        for name, options in OPTIONS.items()
    }
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:

        def narrow(params: Any, x: Any) -> jax.Array:
            return jaxcrf.renet_group(*jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x)))

        groups["jaxcrf, bfloat16"] = narrow
    groups[BEFOREHAND] = jaxcrf.renet_group
    groups |= {"flax.nnx": flax_group(plain), "flax.nnx, optimized": flax_group(optimized)}
    groups |= {"directions apart": apart, "products alone": products}
    operands = (params, jnp.asarray(x))
    result: dict[str, Any] = {}
    expected = np.asarray(jax.jit(groups["jaxcrf"])(*operands))
    for name in ("flax.nnx", "flax.nnx, optimized", "directions apart"):
        difference = np.abs(np.asarray(jax.jit(groups[name])(*operands)) - expected).max()
        # Products on a GPU are as wide as it likes.
        if difference > (1e-4 if on_cpu else 1e-2):
            raise ValueError(f"{name}: its numbers differ by {difference}")
    others = torch_functions(params, x, weights, expected) if on_cpu else {}
    for kind in ("forward", "forward and backward"):
        functions: dict[str, Callable[[], Any]] = {}
        rows: dict[str, Any] = {}
        for name, group in groups.items():
            if kind == "forward":
                if "chunk" in name:
                    continue
                program = jax.jit(group)
            else:
                if name in FORWARD_ONLY:
                    continue

                def loss(params: Any, x: Any, group: Any = group) -> Any:
                    return jnp.sum(weights * group(params, x))

                program = jax.jit(jax.value_and_grad(loss, (0, 1)))
            begin = time.perf_counter()
            with projecting_beforehand() if name == BEFOREHAND else contextlib.nullcontext():
                compiled = program.lower(*operands).compile()
            rows[name] = {
                "compile_s": time.perf_counter() - begin,
                "extra_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            }
            functions[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*operands))
        if kind in others:
            functions["torch"] = others[kind]
        for name, times in taking_turns(functions, args.rounds).items():
            rows[name] = rows.get(name, {}) | times
            memory = f", {rows[name]['extra_mib']:.0f} MiB" if "extra_mib" in rows[name] else ""
            print(
                f"batch {batch}, {kind}, {name}: {times['min_ms']:.1f} ms, "
                f"{times['processor_ms']:.1f} ms of processors{memory}"
            )
        result[kind] = rows
        for other in ("flax.nnx", "flax.nnx, optimized", "torch"):
            if other in rows:
                ratios = {
                    unit: rows["jaxcrf"][f"{unit}_ms"] / rows[other][f"{unit}_ms"]
                    for unit in ("min", "processor")
                }
                rows["jaxcrf"][f"ratios_to_{other}"] = ratios
                print(
                    f"  jaxcrf takes {ratios['min']:.2f} of {other}'s time, {ratios['processor']:.2f} on processors"
                )
    return result


def networks(args: argparse.Namespace) -> dict[str, Any]:
    """The forward pass of whole networks."""
    functions: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Any] = {}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for name, shape in NETWORKS.items():
        model = random_model(name, **args.small.get(name, {}))
        model.eval()
        definition, state = nnx.split(model)
        state = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
        )
        size = (40, 41) if args.smoke else shape
        images = np.random.default_rng(1).integers(0, 256, (1, *size, 3))
        operands = (state, jnp.asarray(images, dtype))
        program = jax.jit(lambda state, images, definition=definition: nnx.merge(definition, state)(images))
        compiled = program.lower(*operands).compile()
        rows[name] = {
            "shape": list(size),
            "dtype": dtype,
            "extra_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        }
        functions[name] = lambda compiled=compiled, operands=operands: jax.block_until_ready(
            compiled(*operands)
        )
    for name, times in taking_turns(functions, args.rounds).items():
        rows[name] |= times
        print(
            f"{name}, {rows[name]['shape']}, {dtype}: {times['min_ms']:.1f} ms, {times['processor_ms']:.1f} ms of "
            "processors"
        )
    rows["ratio"] = {
        unit: rows["h_renet"][f"{unit}_ms"] / rows["h_renet_baseline"][f"{unit}_ms"]
        for unit in ("min", "processor")
    }
    wall, processors = rows["ratio"].values()
    print(f"  h_renet takes {wall:.2f} of its baseline's time, {processors:.2f} on processors")
    return rows


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10], help="batch sizes")
    parser.add_argument("--only", choices=("group", "networks"), help="one of the two parts")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for renet.json")
    args = parser.parse_args()
    args.shape, args.channels, args.features, args.small = (47, 63), 512, 120, {}
    if args.smoke:
        vgg = {"width": 4, "hidden_channels": 8, "recurrent_channels": 4}
        args.small = {"h_renet_baseline": vgg, "h_renet": vgg, "n_renet": {"width": 2, "multipliers": (1, 2)}}
        args.shape, args.channels, args.features = (9, 11), 6, 4
        args.rounds, args.batches = 1, [2]
    result: dict[str, Any] = {
        "shape": [*args.shape, args.channels],
        "features": args.features,
        "targets": TARGETS,
    }
    if args.only != "networks":
        result["batches"] = {str(batch): measured(args, batch) for batch in args.batches}
    if args.only != "group":
        result["networks"] = networks(args)
    if args.out:
        reporting.write_json(args.out / "renet.json", result | reporting.circumstances(__file__))


if __name__ == "__main__":
    main()

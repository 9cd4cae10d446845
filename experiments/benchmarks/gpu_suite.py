r"""Everything that only an accelerator shows, in one command: first checks, then times, beside what the device can do.

    python experiments/benchmarks/gpu_suite.py [--out DIR] [--only window pair …] [--smoke]

1. **Ceilings** of this device, measured: multiply-adds of an elementwise chain and of matrix products in three
   precisions, exponentials, bytes copied.
2. **Checks.** Every implementation of every message that this device can run, on every case of its list, value and
   gradients, against the reference in float64 on the CPU; mean field, landmarks and Gaussian CRFs against float64
   as well. A failed check is reported and does not stop the rest; the exit status is then 1.
3. **Times**: window message and five iterations of ConvCRF (375×500×21; windows 5, 7, 11, 13; blur 1 and 4; batch 1
   and 16; values and gradients), pair message and ten iterations of the dense CRF, one landmark message, Gaussian CRFs
   (general and Potts, D = 128 … 1024). Each with compile time, the program's own memory, the achieved rates, and the
   floor: the time that its arithmetic or its memory traffic would take at the measured ceilings.

Calls are queued and waited for together, so that the host's part is hidden as it is in a training loop. What does not
exist yet is listed as absent. Ends in eight minutes: what the time has not sufficed for is listed as well. The
result is `gpu_suite.json`, with device, versions and commit. It runs on a CPU too, where it takes what `--smoke` has.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from measuring import floors_ms, measure

import jaxcrf
from jaxcrf import reporting
from jaxcrf_kernels import pair_message, window_message
from jaxcrf_kernels.pair_message import api as pair_api
from jaxcrf_kernels.pair_message import cases as pair_cases
from jaxcrf_kernels.window_message import api as window_api
from jaxcrf_kernels.window_message import cases as window_cases

ABSENT = {"DPN box filter": "not built yet", "ReNet group": "not built yet"}
BUDGET_S = 440.0
ROUNDS = 5
ROUND_S = 0.05
# Of the largest number; sums of a few hundred terms in float32, and one rounding of 16-bit storage.
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class Size(NamedTuple):
    """An image."""

    height: int
    width: int
    labels: int


class Entry(NamedTuple):
    """One thing to be timed.

    Attributes:
        group: what `--only` selects.
        name: unique.
        function: of arrays.
        operands: its arguments.
        work: `multiply_adds`, `exponentials` and `bytes` that it cannot do without, or None.
    """

    group: str
    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    work: dict[str, float] | None


def ceilings(smoke: bool) -> dict[str, float]:
    """What the device reaches, per second."""
    side, count, steps = (256, 1 << 16, 16) if smoke else (4096, 1 << 27, 256)
    a = jnp.ones((side, side))
    x = jnp.linspace(-1.0, 0.0, count)
    few = x[: count // 8]

    def product(precision: Any, dtype: Any = jnp.float32) -> Callable[[Array], Array]:
        return lambda a: jnp.matmul(a.astype(dtype), a.astype(dtype), precision=precision)

    def chain(x: Array) -> Array:
        for _ in range(steps):
            x = x * 0.999 + 0.001
        return x

    def exponentials(x: Array) -> Array:
        for _ in range(8):
            x = jnp.exp(-x)
        return x

    def rate(function: Callable[..., Any], operand: Array, amount: float) -> float:
        return amount / (1e-3 * measure(function, operand, runs=5)["min_ms"])

    return {
        "multiply_adds_per_s": rate(chain, few, few.size * steps),
        "matmul_multiply_adds_per_s": rate(product(lax.Precision.HIGHEST), a, side**3),
        "matmul_tf32_multiply_adds_per_s": rate(product(lax.Precision.DEFAULT), a, side**3),
        "matmul_bfloat16_multiply_adds_per_s": rate(product(None, jnp.bfloat16), a, side**3),
        "exponentials_per_s": rate(exponentials, few, few.size * 8),
        "bytes_per_s": rate(lambda x: x + 1, x, 8 * x.size),
    }


def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
    """Value and all gradients, given a cotangent."""

    def both(cotangent: Array, *operands: Any) -> Any:
        value, pull = jax.vjp(function, *operands)
        return value, pull(cotangent)

    return both


def error(found: Any, expected: Any) -> float:
    """The largest difference in two trees, relative to the largest number of the array that it is in."""
    errors = [0.0]
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for f, e in (tuple(np.asarray(x, np.float64) for x in pair) for pair in leaves):
        if f.size:
            errors.append(float(np.max(np.abs(f - e)) / max(float(np.abs(e).max()), 1e-6)))
    return float("nan") if np.isnan(errors).any() else max(errors)


def in_float64(function: Callable[..., Any], *operands: Any) -> Any:
    """The function's results in float64 on the CPU, as NumPy arrays."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), operands)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def check_messages(smoke: bool) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """Every implementation on every case; `(name, function that finds error and tolerance)`."""
    for operation, function, cases in (
        (window_api.OPERATION, window_message, window_cases),
        (pair_api.OPERATION, pair_message, pair_cases),
    ):
        for case in cases.CASES[:3] if smoke else cases.CASES:
            arrays = cases.operands(case)
            cotangent = cases.operands(case, 1).q

            def message(
                *operands: Any, f: Any = function, c: Any = case, m: Any = cases, i: Any = "xla"
            ) -> Array:
                return f(**m.Operands(*operands)._asdict(), **c.static, implementation=i)

            for implementation in operation.runnable():

                def run(
                    implementation: str = implementation,
                    message: Callable[..., Any] = message,
                    case: Any = case,
                    arrays: Any = arrays,
                    cotangent: Any = cotangent,
                ) -> tuple[float, float]:
                    chosen = with_gradients(lambda *o: message(*o, i=implementation))
                    found = jax.jit(chosen)(cotangent, *arrays)
                    expected = in_float64(with_gradients(message), cotangent, *arrays)
                    return error(found, expected), CLOSE[case.dtype]

                yield f"{operation.name}, {implementation}, {case.name}", run


def check_algorithms() -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """What is made of messages and products, at small sizes."""
    rng = np.random.default_rng(0)
    size = Size(24, 30, 5)
    image = rng.uniform(0, 255, (*size[:2], 3))
    logits = rng.normal(size=size)
    embeddings = rng.normal(size=(*size[:2], 16))

    def convcrf(image: Array, logits: Array, blur: int) -> Array:
        return jaxcrf.mean_field(logits, convcrf_filter(image, 11, blur)).probs

    def densecrf(image: Array, logits: Array) -> Array:
        return jaxcrf.mean_field(logits, dense_filter(image), num_iterations=10).probs

    def landmark(image: Array, logits: Array) -> Array:
        features = jaxcrf.bilateral_features(image, 8.0, 60.0)
        return jaxcrf.filters.Landmark(features, num_landmarks=64)(logits)

    def gaussian(embeddings: Array, logits: Array, kind: str, solver: str) -> Array:
        e = (
            embeddings
            if kind == "potts"
            else embeddings[..., None, :] * jnp.linspace(0.5, 1, size.labels)[:, None]
        )
        return jaxcrf.gaussian_crf(e, logits, kind=kind, regularization=3e3, solver=solver).scores

    functions: dict[str, tuple[Callable[..., Array], Any, float]] = {
        "convcrf, blur 1": (lambda i, l: convcrf(i, l, 1), image, 1e-4),
        "convcrf, blur 4": (lambda i, l: convcrf(i, l, 4), image, 1e-4),
        "dense crf": (densecrf, image, 1e-4),
        "landmark": (landmark, image, 1e-3),
    }
    for kind in ("general", "potts"):
        for solver in ("direct", "cg"):
            functions[f"gaussian crf, {kind}, {solver}"] = (
                lambda e, l, k=kind, s=solver: gaussian(e, l, k, s),
                embeddings,
                1e-4,
            )
    for name, (function, first, tolerance) in functions.items():

        def run(
            function: Callable[..., Array] = function, first: Any = first, tolerance: float = tolerance
        ) -> tuple[float, float]:
            narrow = [np.asarray(x, np.float32) for x in (first, logits)]
            return error(jax.jit(function)(*narrow), in_float64(function, *narrow)), tolerance

        yield name, run


def kernels(image: Array) -> tuple[Any, Any]:
    """The features of a smoothness and of an appearance kernel."""
    return jaxcrf.position_features(image.shape[-3:-1], 3.0), jaxcrf.bilateral_features(image, 80.0, 13.0)


def convcrf_filter(image: Array, window: int, blur: int) -> Any:
    """Both in a window."""
    return jaxcrf.filters.Window(kernels(image), window, weights=jnp.array([3.0, 10.0]), blur=blur)


def dense_filter(image: Array) -> Any:
    """Both between all pairs."""
    return jaxcrf.filters.Dense(kernels(image), weights=jnp.array([3.0, 10.0])).normalized("symmetric")


def times(work: dict[str, float], factor: float) -> dict[str, float]:
    """A work several times."""
    return {key: factor * value for key, value in work.items()}


def window_entries(size: Size, small: bool) -> Iterator[Entry]:
    """The window message and ConvCRF."""
    rng = np.random.default_rng(0)
    coarse = Size(-(-size.height // 4), -(-size.width // 4), size.labels)
    batches = (1, 2) if small else (1, 16)

    def arrays(size: Size, batch: int, dtype: Any = jnp.float32) -> tuple[Array, Array, Array]:
        q = jnp.asarray(rng.random((batch, *size)), dtype)
        colours = jnp.asarray(rng.uniform(0, 255, (batch, *size[:2], 3)) / 13, jnp.float32)
        return q, colours, jnp.ones(1)

    def entry(
        size: Size, window: int, batch: int, implementation: str, gradient: bool, dtype: Any = jnp.float32
    ) -> Entry:
        def message(q: Array, colours: Array, weights: Array) -> Array:
            return window_message(q, [colours], weights, filter_size=window, implementation=implementation)

        operands: tuple[Any, ...] = arrays(size, batch, dtype)
        work = window_api.arithmetic((batch, *size), window, (3,))
        function: Callable[..., Any] = message
        if gradient:
            function, operands = with_gradients(message), (operands[0], *operands)
            work = times(work, 4)  # forward; for q; and two contractions for the rest
        what = "value and gradients" if gradient else "value"
        label = (
            f"{size.height}×{size.width}×{size.labels}, {window}×{window}, batch {batch}, {np.dtype(dtype)}"
        )
        return Entry("window", f"window message, {implementation}, {label}, {what}", function, operands, work)

    for implementation in window_api.OPERATION.runnable():
        for window in (5, 7, 11, 13):
            yield entry(size, window, 1, implementation, False)
        yield entry(size, 11, 1, implementation, True)
        yield entry(size, 11, 1, implementation, False, jnp.bfloat16)
        yield entry(size, 11, batches[1], implementation, False)
        for batch in batches:
            yield entry(coarse, 11, batch, implementation, False)
        yield entry(coarse, 11, batches[1], implementation, True)

    for blur in (1, 4):
        for batch in batches:
            image = jnp.asarray(rng.uniform(0, 255, (batch, *size[:2], 3)), jnp.float32)
            logits = jnp.asarray(rng.normal(size=(batch, *size)), jnp.float32)

            def refine(logits: Array, image: Array, blur: int = blur) -> Array:
                return jaxcrf.mean_field(logits, convcrf_filter(image, 11, blur)).probs

            grid = size if blur == 1 else coarse
            work = times(window_api.arithmetic((batch, *grid), 11, (0, 3)), 5)
            name = f"ConvCRF, 5 iterations, blur {blur}, batch {batch}"
            yield Entry("convcrf", f"{name}, value", refine, (logits, image), work)
            yield Entry(
                "convcrf",
                f"{name}, value and gradients",
                with_gradients(refine),
                (logits, logits, image),
                times(work, 4),
            )


def pair_entries(size: Size) -> Iterator[Entry]:
    """The pair message, the dense CRF and landmarks."""
    rng = np.random.default_rng(0)
    pixels = size.height * size.width
    # A photograph-like image: its features lie close together, as those of real images do.
    y, x = np.mgrid[: size.height, : size.width]
    image = 128 + 60 * np.sin(np.stack([y / 40, x / 50, (x + y) / 60], -1)) + rng.normal(0, 8, (*size[:2], 3))
    image = jnp.asarray(image, jnp.float32)
    q = jnp.asarray(rng.random((1, pixels, size.labels)), jnp.float32)
    features = jaxcrf.bilateral_features(image, 80.0, 13.0).values.reshape(1, pixels, 5)
    work = pair_api.arithmetic((1, pixels, size.labels), (5,))
    for implementation in pair_api.OPERATION.runnable():
        for precision in pair_api.PRECISIONS:

            def message(
                q: Array,
                features: Array,
                weights: Array,
                implementation: str = implementation,
                precision: str = precision,
                spatial: tuple[int, int] | None = None,
            ) -> Array:
                return pair_message(
                    q,
                    [features],
                    weights,
                    implementation=implementation,
                    precision=precision,
                    spatial=spatial,
                )

            name = f"pair message, {implementation}, {precision}"
            operands = (q, features, jnp.ones(1))
            yield Entry("pair", f"{name}, value", message, operands, work)
            yield Entry(
                "pair",
                f"{name}, value, blocks of the image",
                lambda *o, m=message: m(*o, spatial=(size.height, size.width)),
                operands,
                work,
            )
            if precision == "float32":
                yield Entry(
                    "pair",
                    f"{name}, value and gradients",
                    with_gradients(message),
                    (q, *operands),
                    times(work, 4),
                )

    logits = jnp.asarray(rng.normal(size=size), jnp.float32)

    def refine(logits: Array, image: Array) -> Array:
        return jaxcrf.mean_field(logits, dense_filter(image), num_iterations=10).probs

    yield Entry("densecrf", "dense CRF, all pairs, 10 iterations", refine, (logits, image), times(work, 10))
    landmark = jax.jit(
        lambda image: jaxcrf.filters.Landmark(jaxcrf.bilateral_features(image, 80.0, 13.0), num_landmarks=256)
    )(image)
    products = {
        "multiply_adds": 2.0 * pixels * 256 * size.labels,
        "exponentials": 0.0,
        "bytes": 4.0 * pixels * (2 * 256 + 2 * size.labels),
    }
    yield Entry("landmark", "landmark message, K = 256", lambda K, q: K(q), (landmark, logits), products)


def gaussian_entries(small: bool) -> Iterator[Entry]:
    """Gaussian CRFs."""
    rng = np.random.default_rng(0)
    size = Size(7, 6, 3) if small else Size(41, 41, 21)
    for kind in ("general", "potts"):
        for d in (8,) if small else (128, 256, 512, 1024):
            shape = size if kind == "general" else size[:2]
            vectors = int(np.prod(shape))
            e = jnp.asarray(rng.normal(size=(*shape, d)) / np.sqrt(vectors), jnp.float32)
            b = jnp.asarray(rng.normal(size=size), jnp.float32)

            def solve(e: Array, b: Array, kind: str = kind, solver: str = "direct") -> Array:
                return jaxcrf.gaussian_crf(e, b, kind=kind, regularization=9.0, solver=solver).scores

            columns = 1 if kind == "general" else size.labels
            work = {
                "multiply_adds": vectors * d * (d + 2.0 * columns)
                + (d**3 / 3 if kind == "general" else 2 * d**3 / 3),
                "exponentials": 0.0,
                "bytes": 4.0 * vectors * (3 * d + 2 * columns),
            }
            yield Entry("gaussian", f"Gaussian CRF, {kind}, D {d}, direct", solve, (e, b), work)
            yield Entry(
                "gaussian",
                f"Gaussian CRF, {kind}, D {d}, direct, value and gradients",
                with_gradients(solve),
                (b, e, b),
                None,
            )
            yield Entry(
                "gaussian",
                f"Gaussian CRF, {kind}, D {d}, cg",
                lambda e, b, s=solve: s(e, b, solver="cg"),
                (e, b),
                None,
            )


def queued(entry: Entry) -> dict[str, float]:
    """Compiles and times an entry, many calls at once."""
    begin = time.perf_counter()
    compiled = jax.jit(entry.function).lower(*entry.operands).compile()
    compile_s = time.perf_counter() - begin
    analysis = compiled.memory_analysis()
    jax.block_until_ready(compiled(*entry.operands))
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*entry.operands))
    calls = max(1, min(200, int(ROUND_S / max(time.perf_counter() - begin, 1e-6))))
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready([compiled(*entry.operands) for _ in range(calls)][-1])
        found.append((time.perf_counter() - begin) / calls)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "compile_s": compile_s,
        "median_ms": 1e3 * statistics.median(found),
        "min_ms": 1e3 * min(found),
        "calls_per_round": calls,
        "extra_mib": analysis.temp_size_in_bytes / 2**20,
        "process_peak_mib": stats.get("peak_bytes_in_use", 0) / 2**20,
    }


def beside_floor(row: dict[str, Any], work: dict[str, float], ceiling: dict[str, float]) -> dict[str, Any]:
    """The time that the device would need at its ceilings, and what was reached."""
    seconds = 1e-3 * row["median_ms"]
    arithmetic, memory = floors_ms(work, ceiling)
    return row | {
        "floor_ms": max(arithmetic, memory),
        "arithmetic_floor_ms": arithmetic,
        "memory_floor_ms": memory,
        "share_of_floor": max(arithmetic, memory) / row["median_ms"],
        "gflops": 2e-9 * work["multiply_adds"] / seconds,
        "gb_per_s": 1e-9 * work["bytes"] / seconds,
    }


def run_checks(smoke: bool, deadline: float) -> dict[str, Any]:
    """All checks that the time suffices for."""
    results: dict[str, Any] = {}
    for source in (check_algorithms(), check_messages(smoke)):
        for name, run in source:
            if time.perf_counter() > deadline:
                results[name] = {"passed": None, "why": "not reached in time"}
                continue
            try:
                found, tolerance = run()
                results[name] = {"passed": bool(found <= tolerance), "error": found, "tolerance": tolerance}
            except Exception as problem:  # whatever a device does wrong belongs into the report
                results[name] = {"passed": False, "why": f"{type(problem).__name__}: {str(problem)[:500]}"}
            if not results[name]["passed"]:
                print(f"CHECK FAILED: {name}: {results[name]}", flush=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; 1 if a check has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu_suite.json")
    parser.add_argument(
        "--only", nargs="+", help="window, convcrf, pair, densecrf, landmark, gaussian; no checks"
    )
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="after which nothing new is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    args = parser.parse_args(arguments)
    begin = time.perf_counter()
    device = jax.devices()[0]
    smoke = args.smoke or device.platform == "cpu"
    size = Size(24, 30, 3) if smoke else Size(375, 500, 21)
    print(f"jax {jax.__version__} on {device.device_kind}{', tiny sizes' if smoke else ''}", flush=True)
    found = ceilings(smoke)
    print("  ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)
    checks = {} if args.only else run_checks(smoke, begin + 0.5 * args.seconds)
    failed = [name for name, check in checks.items() if check["passed"] is False]
    print(f"{len(checks)} checks, {len(failed)} failed (at {time.perf_counter() - begin:.0f} s)", flush=True)

    rows: dict[str, Any] = {}
    sources = (window_entries(size, smoke), pair_entries(size), gaussian_entries(smoke))
    for entry in (entry for source in sources for entry in source):
        if args.only and entry.group not in args.only:
            continue
        if time.perf_counter() - begin > args.seconds:
            rows[entry.name] = {"absent": "not reached in time"}
            continue
        try:
            row = queued(entry)
        except Exception as problem:  # one operation that fails leaves the others to be measured
            rows[entry.name] = {"absent": f"{type(problem).__name__}: {str(problem)[:500]}"}
            print(f"{entry.name}: {rows[entry.name]['absent']}", flush=True)
            failed.append(entry.name)
            continue
        rows[entry.name] = row if entry.work is None else beside_floor(row, entry.work, found)
        floor = f", floor {rows[entry.name]['floor_ms']:.3f}" if entry.work else ""
        print(f"{entry.name}: {row['median_ms']:.3f} ms{floor}, compile {row['compile_s']:.1f} s", flush=True)
    rows |= {name: {"absent": why} for name, why in ABSENT.items()}

    if args.out is not None:
        reporting.write_json(
            args.out / "gpu_suite.json",
            {
                **reporting.circumstances(__file__),
                "implementations": {
                    operation.name: {"runnable": operation.runnable(), "chosen": operation.select()}
                    for operation in (window_api.OPERATION, pair_api.OPERATION)
                },
                "smoke": smoke,
                "ceilings": found,
                "checks": checks,
                "times": rows,
                "seconds": time.perf_counter() - begin,
            },
        )
    print(f"{time.perf_counter() - begin:.0f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

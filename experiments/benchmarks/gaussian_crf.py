"""Gaussian CRFs against NumPy and SciPy, in the same run.

    python experiments/benchmarks/gaussian_crf.py [--out DIR] [--smoke] [--rounds N]

All in float32, on random embeddings:

- one product `AᵀA v` against NumPy's, of embeddings stored pixel by pixel, as networks make them, and number by
  number, which suits NumPy better,
- the direct solver (factorise and solve, statistics included) against Woodbury's identity by NumPy's products and
  SciPy's Cholesky factorisation, and its value with gradients against its value,
- conjugate gradients against `scipy.sparse.linalg.cg` on a well-conditioned system, stopped at a residual that
  both reach in float32,
- a system with eigenvalues from 1 to 10⁴, where "auto" is direct, against SciPy's conjugate gradients: time, and
  error against a float64 solution,
- the same for Potts-type embeddings,
- Potts-type edges of a grid: "direct" against SciPy's sparse LU factorisations of the same two systems, "cg" against
  `scipy.sparse.linalg.cg` on the whole one.

Both sides of a ratio are timed in turns, several rounds of each with pauses between them (NumPy's threads go on
spinning for a while), so that a busy machine slows both. Ratios are of the fastest runs, medians are there too.
`extra_mib` is what a compiled program needs besides operands and results; the matrix of the system, written out,
would take `matrix_gib`. Takes about five minutes on two cores and 4 GB.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import jaxcrf
from jaxcrf import reporting
from jaxcrf.filters.grid import OFFSETS, edges_inside

# kind, height, width, labels, D
SIZES = [
    ("general", 41, 41, 21, 128),
    ("potts", 41, 41, 21, 128),
    ("potts", 41, 41, 21, 1024),
    ("general", 101, 101, 21, 128),
    ("potts", 101, 101, 21, 128),
    ("potts", 101, 101, 21, 1024),
]
# height, width, labels, connectivity
SPARSE_SIZES = [(41, 41, 21, 4), (41, 41, 21, 8), (101, 101, 21, 4)]
SMOKE_SPARSE = [(7, 6, 3, 4), (6, 7, 3, 12)]
SMOKE_SIZES = [("general", 7, 6, 3, 8), ("potts", 7, 6, 3, 8)]
PAUSE_S = 0.02
CG_TOLERANCE = 1e-5


def race(runners: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Times functions in turns; as many runs a round as fit into a fraction of a second.

    Args:
        runners: by name, functions without arguments.
        rounds: how many.

    Returns:
        `min_ms` and `median_ms` by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            time.sleep(PAUSE_S)
            jax.block_until_ready(run())
            end = time.perf_counter() + 0.15
            while True:
                begin = time.perf_counter()
                jax.block_until_ready(run())
                now = time.perf_counter()
                times[name].append(now - begin)
                if now > end:
                    break
    return {
        name: {"min_ms": 1e3 * min(t), "median_ms": 1e3 * statistics.median(t)} for name, t in times.items()
    }


def compiled(function: Callable[..., Any], *operands: Any) -> tuple[Callable[[], Any], dict[str, float]]:
    """A function of nothing that runs a compiled one, and what compiling it took."""
    begin = time.perf_counter()
    lowered = jax.jit(function).lower(*operands)
    middle = time.perf_counter()
    program = lowered.compile()
    costs = {
        "lower_s": middle - begin,
        "compile_s": time.perf_counter() - middle,
        "extra_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
    }
    return lambda: program(*operands), costs


def woodbury(a: np.ndarray, b: np.ndarray, regularization: np.float32, scale: float = 1.0) -> np.ndarray:
    """`(λI + scale · AᵀA)⁻¹ b` of one or more right-hand sides, embeddings number by number `[D, N]`."""
    small = a @ a.T
    small *= np.float32(scale)
    small.flat[:: len(small) + 1] += regularization
    factor = scipy.linalg.cho_factor(small, lower=True, overwrite_a=True, check_finite=False)
    y = scipy.linalg.cho_solve(factor, a @ b, check_finite=False)
    return (b - np.float32(scale) * (a.T @ y)) / regularization


def potts_woodbury(a: np.ndarray, b: np.ndarray, regularization: np.float32) -> np.ndarray:
    """Of Potts-type embeddings `[D, P]` and `b` `[P, L]`: the mean over labels and the deviations from it."""
    small, mean = a @ a.T, b.mean(-1, keepdims=True)
    parts = []
    for scale, rhs in ((np.float32(b.shape[-1] - 1), mean), (np.float32(-1), b - mean)):
        matrix = scale * small
        matrix.flat[:: len(small) + 1] += regularization
        factor = scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        y = scipy.linalg.cho_solve(factor, a @ rhs, check_finite=False)
        parts.append((rhs - scale * (a.T @ y)) / regularization)
    return parts[0] + parts[1]


def mixed(t: np.ndarray) -> np.ndarray:
    """The sum over all other labels."""
    return t.sum(-1, keepdims=True) - t


def benchmark(kind: str, height: int, width: int, labels: int, d: int, rounds: int) -> dict[str, Any]:
    """All comparisons of one size."""
    rng = np.random.default_rng(0)
    shape = (height, width, labels) if kind == "general" else (height, width)
    vectors = int(np.prod(shape))
    e = (rng.normal(size=(*shape, d)) / np.sqrt(vectors)).astype(np.float32)
    b = rng.normal(size=(height, width, labels)).astype(np.float32)
    rows = e.reshape(vectors, d)
    columns = np.ascontiguousarray(rows.T)
    rhs = b.ravel() if kind == "general" else b.reshape(vectors, labels)
    top = np.linalg.norm(rows, 2) ** 2
    # Condition numbers of 10 and, for Potts, of about 50: a handful of iterations.
    regularization = np.float32(top / 9 if kind == "general" else 1.7 * top)
    unknowns = height * width * labels
    row: dict[str, Any] = {
        "kind": kind,
        "size": [height, width, labels],
        "d": d,
        "embeddings_mib": e.nbytes / 2**20,
        "matrix_gib": 4 * unknowns**2 / 2**30,
    }
    embeddings, unary = jnp.asarray(e), jnp.asarray(b)
    runs: dict[str, Callable[[], Any]] = {}
    compilation: dict[str, Any] = {}

    def add(name: str, function: Callable[..., Any], *operands: Any) -> None:
        runs[name], compilation[name] = compiled(function, *operands)

    def solve(solver: str, tolerance: float = 1e-6) -> Callable[..., Any]:
        return lambda e, b, r: jaxcrf.gaussian_crf(
            e, b, kind=kind, regularization=r, solver=solver, tolerance=tolerance
        )

    def loss(e: jax.Array, b: jax.Array, r: jax.Array) -> jax.Array:
        return jnp.vdot(b, solve("direct")(e, b, r).scores ** 2)

    K = jaxcrf.filters.Gram(embeddings, kind=kind)
    add("product", lambda K, q: K(q), K, unary)
    runs["product, numpy by pixel"] = lambda: rows @ (rows.T @ rhs)
    runs["product, numpy by number"] = lambda: columns.T @ (columns @ rhs)
    row["product"] = race(runs, rounds)

    runs = {}
    add("direct", solve("direct"), embeddings, unary, regularization)
    add("value", loss, embeddings, unary, regularization)
    add("value and gradient", jax.value_and_grad(loss, (0, 1, 2)), embeddings, unary, regularization)
    add(
        "variances",
        lambda e, b, r: jaxcrf.gaussian_crf(e, b, kind=kind, regularization=r, variances=True).variances,
        embeddings,
        unary,
        regularization,
    )
    by_numpy = woodbury if kind == "general" else potts_woodbury
    runs["numpy"] = lambda: by_numpy(columns, rhs, regularization)
    row["direct"] = race(runs, rounds)

    def matvec(x: np.ndarray) -> np.ndarray:
        if kind == "general":
            return columns.T @ (columns @ x) + regularization * x
        x = x.reshape(vectors, labels)
        return (columns.T @ mixed(columns @ x) + regularization * x).ravel()

    operator = scipy.sparse.linalg.LinearOperator((unknowns, unknowns), matvec=matvec, dtype=np.float32)
    runs = {}
    add("cg", solve("cg", CG_TOLERANCE), embeddings, unary, regularization)
    flat = b.ravel()
    runs["scipy"] = lambda: scipy.sparse.linalg.cg(operator, flat, rtol=CG_TOLERANCE)
    row["cg"] = race(runs, rounds)
    stats = runs["cg"]().stats
    counted: list[Any] = []
    scipy.sparse.linalg.cg(operator, flat, rtol=CG_TOLERANCE, callback=lambda x: counted.append(None))
    row["cg"]["iterations"] = {"cg": int(stats.iterations), "scipy": len(counted)}
    row["condition"] = float(stats.condition)
    row["compilation"] = compilation
    ratio = {
        "product over numpy by pixel": ("product", "product", "product, numpy by pixel"),
        "product over numpy by number": ("product", "product", "product, numpy by number"),
        "direct over numpy": ("direct", "direct", "numpy"),
        "gradient over value": ("direct", "value and gradient", "value"),
        "cg over scipy": ("cg", "cg", "scipy"),
    }
    row["ratios"] = {
        name: row[part][ours]["min_ms"] / row[part][theirs]["min_ms"]
        for name, (part, ours, theirs) in ratio.items()
    }
    print_row(row)
    return row


def ill_conditioned(height: int, width: int, labels: int, d: int, rounds: int) -> dict[str, Any]:
    """General embeddings that make a system of eigenvalues from 1 to 10⁴."""
    rng = np.random.default_rng(0)
    count = height * width * labels
    left, _ = np.linalg.qr(rng.normal(size=(count, d)))
    right, _ = np.linalg.qr(rng.normal(size=(d, d)))
    e = ((left * np.sqrt(np.geomspace(1, 1e4, d) - 1)) @ right).astype(np.float32)
    b = rng.normal(size=count).astype(np.float32)
    one = np.float32(1)
    exact = e.astype(np.float64)
    small = np.eye(d) + exact.T @ exact
    exact = b - exact @ np.linalg.solve(small, exact.T @ b)
    columns = np.ascontiguousarray(e.T)
    operator = scipy.sparse.linalg.LinearOperator(
        (count, count), matvec=lambda x: columns.T @ (columns @ x) + x, dtype=np.float32
    )

    def error(x: Any) -> float:
        return float(np.linalg.norm(np.asarray(x, np.float64).ravel() - exact) / np.linalg.norm(exact))

    program, costs = compiled(
        lambda e, b: jaxcrf.gaussian_crf(e, b, kind="general", regularization=one),
        jnp.asarray(e.reshape(height, width, labels, d)),
        jnp.asarray(b.reshape(height, width, labels)),
    )

    def by_scipy() -> Any:
        return scipy.sparse.linalg.cg(operator, b, rtol=1e-6)

    counted: list[Any] = []
    x, _ = scipy.sparse.linalg.cg(operator, b, rtol=1e-6, callback=lambda x: counted.append(None))
    result = program()
    row: dict[str, Any] = {
        "size": [height, width, labels],
        "d": d,
        "times": race({"auto": program, "scipy": by_scipy}, rounds),
        "errors": {"auto": error(result.scores), "scipy": error(x)},
        "scipy_iterations": len(counted),
        "condition": float(result.stats.condition),
        "compilation": {"auto": costs},
    }
    times = row["times"]
    row["scipy over auto"] = times["scipy"]["min_ms"] / times["auto"]["min_ms"]
    print(
        f"ill-conditioned {height}×{width}×{labels} D {d}: auto {times['auto']['min_ms']:.1f} ms, error "
        f"{row['errors']['auto']:.1e}; scipy {times['scipy']['min_ms']:.1f} ms, {len(counted)} iterations, error "
        f"{row['errors']['scipy']:.1e}; {row['scipy over auto']:.1f} times faster",
        flush=True,
    )
    return row


def sparse(height: int, width: int, labels: int, connectivity: int, rounds: int) -> dict[str, Any]:
    """Potts-type edges of a grid."""
    rng = np.random.default_rng(0)
    edges = rng.normal(size=(height, width, connectivity // 2)).astype(np.float32)
    b = rng.normal(size=(height, width, labels)).astype(np.float32)
    y, x, e = np.nonzero(edges_inside((height, width), connectivity))
    steps = np.array(OFFSETS)[e]
    starts, ends = y * width + x, (y + steps[:, 0]) * width + x + steps[:, 1]
    weights = scipy.sparse.coo_matrix((edges[y, x, e], (starts, ends)), shape=(height * width,) * 2)
    weights = (weights + weights.T).tocsc()
    # Definite, with a condition number of about ten.
    low, high = (float(scipy.sparse.linalg.eigsh(weights, 1, which=w)[0][0]) for w in ("SA", "LA"))
    regularization = np.float32(1.2 * max(high, -(labels - 1) * low))
    flat = b.reshape(-1, labels)

    def by_lu() -> np.ndarray:
        mean = flat.mean(-1, keepdims=True)
        parts = []
        for scale, rhs in ((np.float32(labels - 1), mean), (np.float32(-1), flat - mean)):
            system = scale * weights + scipy.sparse.diags_array(np.full(height * width, regularization))
            parts.append(scipy.sparse.linalg.splu(system.tocsc()).solve(rhs))
        return parts[0] + parts[1]

    by_rows = weights.tocsr()

    def matvec(v: np.ndarray) -> np.ndarray:
        v = v.reshape(-1, labels)
        return (by_rows @ mixed(v) + regularization * v).ravel()

    unknowns = flat.size
    operator = scipy.sparse.linalg.LinearOperator((unknowns, unknowns), matvec=matvec, dtype=np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    compilation: dict[str, Any] = {}
    for solver in ("direct", "cg"):

        def solve(edges: jax.Array, b: jax.Array, r: jax.Array, solver: str = solver) -> Any:
            return jaxcrf.sparse_gaussian_crf(
                edges,
                b,
                kind="potts",
                regularization=r,
                connectivity=connectivity,
                solver=solver,
                tolerance=CG_TOLERANCE,
            )

        def loss(
            edges: jax.Array, b: jax.Array, r: jax.Array, solve: Callable[..., Any] = solve
        ) -> jax.Array:
            return jnp.vdot(b, solve(edges, b, r).scores ** 2)

        operands = (jnp.asarray(edges), jnp.asarray(b), regularization)
        for name, function in {
            solver: solve,
            f"{solver}, value and gradient": jax.value_and_grad(loss, (0, 1, 2)),
        }.items():
            runs[name], compilation[name] = compiled(function, *operands)
    runs["scipy lu"] = by_lu
    runs["scipy cg"] = lambda: scipy.sparse.linalg.cg(operator, b.ravel(), rtol=CG_TOLERANCE)
    result = runs["direct"]()
    row: dict[str, Any] = {
        "size": [height, width, labels],
        "connectivity": connectivity,
        "condition": float(result.stats.condition),
        "largest_difference_from_lu": float(
            np.abs(np.asarray(result.scores).reshape(flat.shape) - by_lu()).max()
        ),
        "times": race(runs, rounds),
        "compilation": compilation,
        "iterations": int(runs["cg"]().stats.iterations),
    }
    print(
        f"sparse potts {height}×{width}×{labels}, {connectivity} neighbours, condition {row['condition']:.0f}"
    )
    for name, found in row["times"].items():
        costs = compilation.get(name)
        extra = f"  {costs['extra_mib']:6.1f} MiB, compile {costs['compile_s']:.1f} s" if costs else ""
        print(
            f"    {name:25} {found['min_ms']:9.2f} ms (median {found['median_ms']:9.2f}){extra}", flush=True
        )
    return row


def print_row(row: dict[str, Any]) -> None:
    """What was measured of one size."""
    height, width, labels = row["size"]
    print(f"{row['kind']} {height}×{width}×{labels} D {row['d']}, condition {row['condition']:.0f}")
    for part in ("product", "direct", "cg"):
        for name, found in row[part].items():
            if name == "iterations":
                continue
            costs = row["compilation"].get(name)
            extra = f"  {costs['extra_mib']:6.1f} MiB, compile {costs['compile_s']:.1f} s" if costs else ""
            print(f"    {name:25} {found['min_ms']:9.2f} ms (median {found['median_ms']:9.2f}){extra}")
    print("    " + ", ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items()))
    print(f"    iterations {row['cg']['iterations']}", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gaussian_crf.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--rounds", type=int, default=8, help="turns of every competitor")
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}", flush=True)
    results = {
        **reporting.circumstances(__file__),
        "sizes": [benchmark(*size, rounds) for size in (SMOKE_SIZES if arguments.smoke else SIZES)],
        "sparse": [sparse(*size, rounds) for size in (SMOKE_SPARSE if arguments.smoke else SPARSE_SIZES)],
        "ill_conditioned": ill_conditioned(*((7, 6, 3, 8) if arguments.smoke else (41, 41, 21, 128)), rounds),
    }
    if arguments.out is not None:
        reporting.write_json(arguments.out / "gaussian_crf.json", results)


if __name__ == "__main__":
    main()

"""Conjugate gradients for symmetric positive definite systems, differentiated implicitly."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jaxcrf import _checks, _linalg
from jaxcrf.filters import Filter, LinearOperator
from jaxcrf_kernels._varying import varying_like

Operator = Callable[[Array], Array]

# Unless told otherwise, stop after so many iterations per unknown: rounding delays what would take one.
ITERATIONS_PER_UNKNOWN = 10

# Iterations from whose step lengths the largest eigenvalue is estimated; it is the first that they find.
RITZ_ITERATIONS = 16

# A restart from the true residual that does not at least halve it has met the rounding errors of `A x`.
RESTART_GAIN = 0.5


class ConjugateGradientStats(NamedTuple):
    """How the iterations of every system of the batch went.

    Attributes:
        iterations: how many were done, one application of the operator each.
        residual: `‖b - A x‖ / ‖b‖` of the returned `x`, computed from it rather than from the recurrence, which goes
            on falling where rounding has long stopped `x`. Zero where `b` is.
        converged: whether `‖b - A x‖` is at most `tolerance * ‖b‖`, or at most `absolute_tolerance`. Where it is not,
            the residual is what was reached: at `max_iterations`, at a breakdown, or at the limit of
            the floating-point type.
        indefinite: whether a direction with `pᵀA p <= 0`, or a residual with `rᵀM r <= 0`, ended the iterations:
            the operator or the preconditioner is not positive definite, and `x` is no solution.
        smallest_eigenvalue: an estimate, from above, of the smallest eigenvalue of the operator (of `M A`, where
            preconditioned): the smallest Ritz value of the first 16 iterations. Zero if there were none.
        largest_eigenvalue: likewise of the largest, from below.
    """

    iterations: Int[Array, "*batch"]
    residual: Float[Array, "*batch"]
    converged: Bool[Array, "*batch"]
    indefinite: Bool[Array, "*batch"]
    smallest_eigenvalue: Float[Array, "*batch"]
    largest_eigenvalue: Float[Array, "*batch"]


class _Iterate(NamedTuple):
    """One step of algorithm 1; what has one number per system keeps axes of size one for its unknowns."""

    x: Array
    r: Array
    p: Array
    rr: Array
    rz: Array
    iterations: Array
    stopped: Array
    indefinite: Array
    lanczos: "Lanczos"
    before: tuple[Array, Array]  # β / α and √β / α of the step before, zero at a restart


class _Round(NamedTuple):
    """What is left between restarts."""

    x: Array
    r: Array
    residual: Array
    live: Array
    iterations: Array
    indefinite: Array
    lanczos: "Lanczos"


class Lanczos(NamedTuple):
    """The tridiagonal matrix of Lanczos' iterations, whose eigenvalues are the Ritz values.

    Attributes:
        diagonal: `[steps, *batch]`.
        beside: likewise; entry `k` stands between `k - 1` and `k`, and entry 0 is not used.
    """

    diagonal: Array
    beside: Array

    def extremes(self) -> tuple[Array, Array]:
        """The smallest and the largest Ritz value, `[*batch]`."""
        # What was not used, or came after an exact solution, repeats the first Rayleigh quotient.
        filled = jnp.where(self.diagonal == 0, self.diagonal[:1], self.diagonal)
        diagonal, beside = (jnp.moveaxis(a, 0, -1)[..., None] for a in (filled, self.beside))
        eye, lower = (jnp.eye(diagonal.shape[-2], k=k, dtype=diagonal.dtype) for k in (0, -1))
        below = beside * lower
        matrix = diagonal * eye + below + jnp.swapaxes(below, -1, -2)
        # Not every implementation of eigvalsh lets NaN through.
        finite = jnp.isfinite(matrix).all((-2, -1))
        ritz = _linalg.eigvalsh(jnp.where(finite[..., None, None], matrix, 0))
        ritz = jnp.where(finite[..., None], ritz, jnp.nan)
        return ritz[..., 0], ritz[..., -1]


def conjugate_gradient(
    operator: LinearOperator | Operator,
    b: Float[Array, "*batch_and_unknowns"],
    *,
    x0: Float[Array, "*batch_and_unknowns"] | None = None,
    tolerance: float = 1e-6,
    absolute_tolerance: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Operator | None = None,
    batch_ndim: int | None = None,
) -> tuple[Float[Array, "*batch_and_unknowns"], ConjugateGradientStats]:
    r"""Solves `A x = b` for a symmetric positive definite operator that is only applied, never written out.

    From `r_0 = b - A x_0` and `p_0 = r_0` on,

    .. math::
        \alpha_k = \frac{r_k^\top r_k}{p_k^\top A p_k} , \quad x_{k+1} = x_k + \alpha_k p_k , \quad
        r_{k+1} = r_k - \alpha_k A p_k , \quad \beta_k = \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k} , \quad
        p_{k+1} = r_{k+1} + \beta_k p_k ,

    until `‖r‖ ≤ max(tolerance ‖b‖, absolute tolerance)`. Then `b - A x` is computed afresh; where rounding
    has let it fall behind the recurrence, the iterations start again from it, as long as that helps.

    Every system of a batch has steps of its own and stops by itself, with the result it would have alone; the
    operator is applied to all of them until the last has stopped.

    The solution is differentiated as what it is, `dx = A⁻¹ (db - dA x)`: to any order, in forward and reverse mode,
    in `b` and in whatever the operator closes over. A gradient costs one more solve, to the same tolerance,
    and no memory that grows with the iterations. `x0` and the preconditioner get no gradient.

    Args:
        operator: `A`, a symmetric filter or pixel × label operator, or a linear function of arrays like `b`. A
            filter alone is rarely definite; `K + Diagonal(…)` is.
        b: the right-hand sides. For a filter `[*batch, *spatial, labels]`, each image a system.
        x0: where to start, like `b`; None for zero. Ignored where zero has the smaller residual.
        tolerance: relative to the norm of `b`.
        absolute_tolerance: a residual norm that will do in any case.
        max_iterations: at most so many applications; None for ten times the unknowns of one system.
        preconditioner: `r ↦ M r`, symmetric positive definite and close to `A⁻¹`; a function or filter.
        batch_ndim: how many leading axes of `b` count systems. None is, for a filter, all axes before those that it
            acts on; for a function, none of them.

    Returns:
        `x`, like `b` and at least float32, and `ConjugateGradientStats`, one number per system.

    Raises:
        TypeError, ValueError: if a filter is not symmetric, shapes disagree, or an option is out of range.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> A = jnp.array([[4.0, 1.0], [1.0, 3.0]])
        >>> x, stats = jaxcrf.conjugate_gradient(lambda v: A @ v, jnp.array([1.0, 2.0]))
        >>> x.round(4), stats.iterations, stats.converged
        (Array([0.0909, 0.6364], dtype=float32), Array(2, dtype=int32), Array(True, dtype=bool))

    References:
        Hestenes and Stiefel, 1952; Chandra, Usunier and Kokkinos, 2017, algorithm 1 and, for the gradient in
        `b`, eq. 6. Van der Vorst and Ye, 2000, for residual replacement.
    """
    filtered = isinstance(operator, LinearOperator)
    if not callable(operator):
        raise TypeError(f"operator: got {type(operator).__name__}; expected a filter or a function x ↦ A x")
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            f"preconditioner: got {type(preconditioner).__name__}; expected a filter or a function r ↦ M r"
        )
    if isinstance(operator, LinearOperator):
        if not operator.is_symmetric:
            raise ValueError(
                "operator: a filter that is not symmetric; conjugate gradients need one, e.g. with the "
                "normalisation 'none' or 'symmetric' and without blur"
            )
        b = operator.check(b, "b")
    b = jnp.asarray(b)
    if not jnp.issubdtype(b.dtype, jnp.floating):
        raise ValueError(f"b: got dtype {b.dtype}; expected floating point, e.g. b.astype('float32')")
    b = _checks.as_float(b)
    if batch_ndim is None:
        batch_ndim = b.ndim - 1 - len(operator.spatial) if filtered else 0  # type: ignore[union-attr]
    if not _checks.is_whole(batch_ndim) or not 0 <= batch_ndim <= b.ndim:
        raise ValueError(
            f"batch_ndim: got {batch_ndim!r}; expected a whole number from 0 to {b.ndim}, b's axes"
        )
    for name, value in {"tolerance": tolerance, "absolute_tolerance": absolute_tolerance}.items():
        if np.ndim(value) or (_checks.is_concrete(value) and not 0 <= value < np.inf):
            raise ValueError(f"{name}: got {value}; expected a number >= 0")
    unknowns = int(np.prod(b.shape[batch_ndim:]))
    limit = check_max_iterations(max_iterations, ITERATIONS_PER_UNKNOWN * max(1, unknowns))
    if x0 is not None:
        x0 = jnp.asarray(x0)
        if x0.shape != b.shape:
            raise ValueError(f"x0: got shape {x0.shape}; expected that of b, {b.shape}")
        x0 = x0.astype(b.dtype)
    for name, function in {"operator": operator, "preconditioner": preconditioner}.items():
        if function is not None:
            found = jax.eval_shape(function, b)
            if not hasattr(found, "shape") or found.shape != b.shape:
                raise ValueError(
                    f"{name}: maps shape {b.shape} to {getattr(found, 'shape', found)}; expected the same shape"
                )
    run = (
        _solve_filtered
        if filtered and (preconditioner is None or isinstance(preconditioner, Filter))
        else _solve
    )
    return run(
        operator,
        b,
        x0,
        jnp.asarray(tolerance, b.dtype),
        jnp.asarray(absolute_tolerance, b.dtype),
        preconditioner,
        max_iterations=limit,
        batch_ndim=int(batch_ndim),
    )


def check_max_iterations(max_iterations: Any, default: int) -> int:
    """Checks a limit of iterations; None is the default."""
    if max_iterations is None:
        return min(default, np.iinfo(np.int32).max)
    if not _checks.is_whole(max_iterations) or not 0 <= max_iterations <= np.iinfo(np.int32).max:
        raise ValueError(f"max_iterations: got {max_iterations!r}; expected a whole number >= 0, or None")
    return int(max_iterations)


def _solve(
    operator: Operator,
    b: Array,
    x0: Array | None,
    tolerance: Array,
    absolute_tolerance: Array,
    preconditioner: Operator | None,
    *,
    max_iterations: int,
    batch_ndim: int,
) -> tuple[Array, ConjugateGradientStats]:
    if isinstance(operator, LinearOperator):
        operator, b = varying_like((operator, b), (operator, b))
    frozen = lax.stop_gradient((x0, tolerance, absolute_tolerance))

    def solve(matvec: Operator, rhs: Array) -> tuple[Array, ConjugateGradientStats]:
        return iterate(
            matvec,
            rhs,
            *frozen,
            preconditioner,
            max_iterations=max_iterations,
            batch_ndim=batch_ndim,
        )

    def matvec(x: Array) -> Array:
        return operator(x).astype(b.dtype)

    return lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=True)


# Filters are trees of arrays, so that calls outside any `jit` compile once per shape; functions are for the caller
# to jit.
_solve_filtered = functools.partial(jax.jit, static_argnames=("max_iterations", "batch_ndim"))(_solve)


def iterate(
    operator: Operator,
    b: Array,
    x0: Array | None,
    tolerance: Array,
    absolute_tolerance: Array,
    preconditioner: Operator | None,
    *,
    max_iterations: int,
    batch_ndim: int,
    ritz_iterations: int = RITZ_ITERATIONS,
) -> tuple[Array, ConjugateGradientStats]:
    """The iterations themselves, not differentiable in reverse mode; for use inside a linear solve."""
    axes = tuple(range(batch_ndim, b.ndim))

    def inner(u: Array, v: Array) -> Array:
        return jnp.sum(u * v, axis=axes, keepdims=True)

    def precondition(r: Array) -> Array:
        return r if preconditioner is None else preconditioner(r).astype(r.dtype)

    # Right-hand sides of any size: gradients of a mean over pixels, squared, would leave the range of float32.
    scale = jnp.max(jnp.abs(b), axis=axes, keepdims=True, initial=0)
    scale = jnp.where((scale > 0) & (scale < jnp.inf), scale, 1)
    b = b / scale
    size = jnp.sqrt(inner(b, b))
    target = jnp.maximum(tolerance * size, absolute_tolerance / scale)
    epsilon = jnp.finfo(b.dtype).eps
    places = jnp.arange(min(ritz_iterations, max(1, max_iterations))).reshape(-1, *(1,) * b.ndim)

    def unfinished(s: _Iterate, limit: Array) -> Array:
        return (jnp.sqrt(s.rr) > limit) & (s.iterations < max_iterations) & ~s.stopped

    def step(s: _Iterate, limit: Array) -> _Iterate:
        active = unfinished(s, limit)
        product = operator(s.p)
        curvature = inner(s.p, product)
        steps = active & (curvature > 0) & (s.rz > 0)
        alpha = jnp.where(steps, s.rz / jnp.where(steps, curvature, 1), 0)
        r = s.r - alpha * product
        rr = inner(r, r)
        z = precondition(r)
        rz = rr if preconditioner is None else inner(r, z)
        beta = jnp.where(steps, rz / jnp.where(steps, s.rz, 1), 0)
        inverse = jnp.where(steps, curvature / jnp.where(steps, s.rz, 1), 0)
        here = (places == s.iterations) & steps
        lanczos = Lanczos(
            jnp.where(here, inverse + s.before[0], s.lanczos.diagonal),
            jnp.where(here, s.before[1], s.lanczos.beside),
        )
        return _Iterate(
            x=s.x + alpha * s.p,
            r=r,
            p=z + beta * s.p,
            rr=rr,
            rz=rz,
            iterations=s.iterations + steps,
            stopped=s.stopped | (active & ~steps),
            indefinite=s.indefinite | (active & ((curvature <= 0) | (s.rz <= 0))),
            lanczos=lanczos,
            before=(beta * inverse, jnp.sqrt(jnp.maximum(beta, 0)) * inverse),
        )

    def restart(s: _Round) -> _Round:
        z = precondition(s.r)
        rr = inner(s.r, s.r)
        rz = rr if preconditioner is None else inner(s.r, z)
        none = jnp.zeros_like(rr)
        begin = _Iterate(s.x, s.r, z, rr, rz, s.iterations, ~s.live, s.indefinite, s.lanczos, (none, none))
        # Below what rounding leaves of the residual that it began with, the recurrence says nothing.
        limit = jnp.maximum(target, epsilon * s.residual)
        end = lax.while_loop(
            lambda t: jnp.any(unfinished(t, limit)),
            functools.partial(step, limit=limit),
            varying_like(begin, begin),
        )
        r = b - operator(end.x)
        residual = jnp.sqrt(inner(r, r))
        # Iterations bring x nearer to the solution in the norm of A even where b - A x grows; but not after a
        # breakdown, nor below the rounding errors that restarts meet.
        first = (s.iterations == 0) & (~end.stopped | jnp.isnan(residual))
        better = s.live & (first | (residual < s.residual))
        x, r = jnp.where(better, end.x, s.x), jnp.where(better, r, s.r)
        gains = residual <= RESTART_GAIN * s.residual
        residual = jnp.where(better, residual, s.residual)
        live = s.live & gains & (residual > target) & (end.iterations < max_iterations) & ~end.stopped
        return _Round(x, r, residual, live, end.iterations, end.indefinite, end.lanczos)

    x, r, residual = jnp.zeros_like(b), b, size
    if x0 is not None:
        start = x0 / scale
        started = b - operator(start)
        distance = jnp.sqrt(inner(started, started))
        nearer = distance < size
        x, r = jnp.where(nearer, start, x), jnp.where(nearer, started, r)
        residual = jnp.where(nearer, distance, size)
    no = jnp.zeros(size.shape, bool)
    empty = jnp.zeros((places.size, *size.shape), b.dtype)
    first = _Round(x, r, residual, residual > target, no.astype(jnp.int32), no, Lanczos(empty, empty))
    last = lax.while_loop(lambda s: jnp.any(s.live), restart, varying_like(first, first))

    smallest, largest = last.lanczos.extremes()
    stats = ConjugateGradientStats(
        iterations=last.iterations,
        residual=jnp.where(size > 0, last.residual / jnp.where(size > 0, size, 1), last.residual),
        converged=last.residual <= target,
        indefinite=last.indefinite,
        smallest_eigenvalue=smallest,
        largest_eigenvalue=largest,
    )
    x = jnp.where(jnp.isfinite(last.residual), last.x * scale, jnp.nan)
    return x, jax.tree.map(lambda s: s.reshape(s.shape[:batch_ndim]), stats)

"""ReNet layers: recurrent networks that sweep over an image, up and down or left and right."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from jaxcrf import _checks
from jaxcrf_kernels._platform import by_platform
from jaxcrf_kernels._varying import varying_like

Cell = Literal["lstm", "gru", "irnn"]
Direction = Literal["vertical", "horizontal"]
Parameters = Mapping[str, Array]

# What a cell remembers from one patch to the next; the hidden state, which is its output, comes first.
State = tuple[Array, ...]


def renet_init(
    key: Array,
    in_channels: int,
    features: int,
    *,
    cell: Cell = "lstm",
    patch: tuple[int, int] = (1, 1),
    scale: float = 0.2,
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    r"""Parameters of a ReNet layer, drawn at random.

    With `d = features`, `G` gates and patches of `s × t` pixels they are a dictionary of

    | name | shape | |
    | --- | --- | --- |
    | `input_kernel` | `[2, s t in_channels, G d]` | `W`; rows are the pixels of a patch, row by row, channels last |
    | `recurrent_kernel` | `[2, d, G d]` | `U` |
    | `bias` | `[2, G d]` | `b` |
    | `recurrent_bias` | `[2, d]` | GRU only: `b'`, of the candidate |

    The first axis is the direction of the sweep: 0 down (or to the right), 1 up (or to the left). The last axis
    holds the gates one after the other: input, forget, cell input, output (LSTM, `G = 4`); reset, update, candidate
    (GRU, `G = 3`); the one pre-activation (IRNN, `G = 1`). This is the order of PyTorch and cuDNN, whose two biases of
    a gate are one here.

    Args:
        key: a random key.
        in_channels: channels of the layer's input.
        features: `d`, hidden units of each direction.
        cell: "lstm" and "gru" draw everything from `[-scale, scale]`; "irnn" begins with the identity as recurrent
            kernel and without bias.
        patch: `(s, t)`, height and width of a patch in pixels.
        scale: half the width of the uniform distribution.
        dtype: of the parameters.

    Returns:
        The dictionary above, for `renet_layer`.

    Raises:
        ValueError: if the cell is unknown, or a size is not a whole number of at least 1.

    Example:
        >>> import jax, jaxcrf
        >>> params = jaxcrf.renet_init(jax.random.key(0), 3, 5, patch=(2, 2))
        >>> {name: value.shape for name, value in params.items()}
        {'input_kernel': (2, 12, 20), 'recurrent_kernel': (2, 5, 20), 'bias': (2, 20)}

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for Semantic
        Segmentation*, 2016, §4.2 (uniform over [-0.2, 0.2]); Le, Jaitly and Hinton, *A Simple Way to Initialize
        Recurrent Networks of Rectified Linear Units*, 2015 (IRNN).
    """
    kind = _cell(cell)
    patch = _checked_patch(patch)
    for name, value in (("in_channels", in_channels), ("features", features)):
        if not _checks.is_whole(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}; expected a whole number >= 1")
    if _checks.is_concrete(scale) and not 0 <= scale < np.inf:
        raise ValueError(f"scale: got {scale}; expected a finite number >= 0")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}; parameters are of a floating-point type")
    shapes = _shapes(kind, int(in_channels), int(features), patch)
    drawn = _drawn(key, scale, shapes=tuple(shapes.items()), dtype=jnp.dtype(dtype))
    params = {name: drawn[name] for name in shapes}
    if cell == "irnn":
        identity = jnp.eye(int(features), dtype=dtype)
        params["recurrent_kernel"] = jnp.broadcast_to(identity, shapes["recurrent_kernel"])
        params["bias"] = jnp.zeros(shapes["bias"], dtype)
    return params


# One program for all parameters, which compiles faster than one for each.
@functools.partial(jax.jit, static_argnames=("shapes", "dtype"))
def _drawn(
    key: Array, scale: Any, *, shapes: tuple[tuple[str, tuple[int, ...]], ...], dtype: Any
) -> dict[str, Array]:
    keys = jax.random.split(key, len(shapes))
    return {
        name: (scale * jax.random.uniform(key, shape, minval=-1, maxval=1)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes, strict=True)
    }


def renet_layer(
    params: Parameters,
    x: Float[Array, "*batch height width channels"],
    *,
    direction: Direction = "vertical",
    cell: Cell = "lstm",
    patch: tuple[int, int] = (1, 1),
    mask: Bool[Array, "*batch height width"] | None = None,
    chunk: int | None = None,
    unroll: int | None = None,
    precision: Any = None,
) -> Float[Array, "*batch rows columns features"]:
    r"""Two recurrent networks sweep the patches of an image in opposite directions.

    The image falls into `h × w` patches of `s × t` pixels, `h = ⌈height / s⌉`, `w = ⌈width / t⌉`, its lower and right
    borders reflected where the sizes do not divide. Every column (vertical) or row (horizontal) is a sequence of
    patches `x_1, …, x_n`, and with `F` and `B` for the two networks, each with its own weights,

    .. math::
        h^F_k = F(x_k, h^F_{k-1}) , \qquad h^B_k = B(x_k, h^B_{k+1}) , \qquad y_k = [h^F_k, h^B_k] .

    (The paper's text puts the memories `C^F` and `C^B` together; LSTMs put out `h`, and so do the other tools.) States
    begin with zeros. With `p = W x_k + b`, `σ` the logistic function, `⊙` the product by elements, `h` the
    state before and `p_i`, `U_i`, … the parts of a gate, a cell is one of

    .. math::
        \text{LSTM:}\quad & c_k = σ(p_f + U_f h) ⊙ c + σ(p_i + U_i h) ⊙ \tanh(p_g + U_g h) ,
        \quad h_k = σ(p_o + U_o h) ⊙ \tanh c_k \\
        \text{GRU:}\quad & n = \tanh(p_n + σ(p_r + U_r h) ⊙ (U_n h + b')) ,
        \quad h_k = n + σ(p_z + U_z h) ⊙ (h - n) \\
        \text{IRNN:}\quad & h_k = \max(0, p + U h)

    All columns (or rows) of all images advance together, both directions in one loop. What the image contributes,
    `W x + b`, is computed beforehand for all patches at once, except on CPUs, where their caches make it faster step by
    step.

    A batch of images of several sizes, padded to one, needs a `mask`: where a patch holds no pixel of the image
    the state is carried on unchanged and the output is zero, and patches across the border are filled up by
    reflection, so that every image comes out as it would alone. Whatever is in the padding does not matter.

    Differentiable once, in reverse mode, in the parameters and in `x`.

    Args:
        params: as `renet_init` makes them, for the same cell, patch and number of channels.
        x: images or feature maps, `[*batch, height, width, channels]`.
        direction: "vertical" sweeps along columns, "horizontal" along rows.
        cell: "lstm", "gru" or "irnn".
        patch: `(s, t)`, height and width of a patch in pixels.
        mask: `[*batch, height, width]`, True where there is image: for every image a rectangle, whose upper left
            corner is that of a patch if it is to come out as it would alone; None for everywhere. With patches of
            one pixel any shape will do: sweeps pass over what is left out.
        chunk: how many steps of the sweep to recompute at a time in the backward pass. None recomputes nothing: the
            forward pass keeps, of each patch, all pre-activations and states, `12 d` numbers for the LSTM, `10 d` for
            the GRU and `4 d` for the IRNN. Otherwise only states at every `chunk`-th step are kept, and `x`
            in both orders.
        unroll: steps in one iteration of the loop. None for what was fastest on CPUs: two where nothing is
            differentiated, one where it is.
        precision: of matrix products, as in `jax.lax.dot`; None for the default of the device.

    Returns:
        `y`, `[*batch, h, w, 2 d]`, first the channels that come from above (or the left), then those from below
        (or the right), in the type that `x` and `params` have together, 16-bit floats included: products
        are accumulated, and states kept, in float32 at least.

    Raises:
        ValueError: if an image is smaller than a patch, parameters, mask and images do not go together, concrete
            arrays hold NaN, or an option is unknown.
        TypeError: if the parameters are not a dictionary.

    Example:
        >>> import jax, jax.numpy as jnp, jaxcrf
        >>> params = jaxcrf.renet_init(jax.random.key(0), 3, 5, patch=(2, 2))
        >>> x = jnp.zeros((4, 7, 8, 3))
        >>> jaxcrf.renet_layer(params, x, patch=(2, 2)).shape
        (4, 4, 4, 10)

    References:
        Yan et al., 2016, §3, eq. 1; Visin et al., *ReNet: A Recurrent Neural Network Based Alternative to Convolutional
        Networks*, 2015; Graves, *Generating Sequences with Recurrent Neural Networks*, 2013 (LSTM, without
        peepholes here); Cho et al., 2014 (GRU; the reset gate acts after the product, as in cuDNN).
    """
    x, patch = jnp.asarray(x), _checked_patch(patch)
    _check_images(x, patch)
    maker = f"renet_init(key, {x.shape[-1]}, features, cell={cell!r}, patch={patch})"
    options: dict[str, Any] = {"cell": cell, "chunk": chunk, "unroll": unroll, "precision": precision}
    return _checked_layer(params, x, mask, "params", maker, direction=direction, patch=patch, **options)


def _checked_layer(
    params: Any,
    x: Array,
    mask: Any,
    name: str,
    maker: str,
    *,
    direction: Any,
    cell: Any,
    patch: tuple[int, int],
    chunk: Any,
    unroll: Any,
    precision: Any,
) -> Array:
    """`renet_layer` with parameters that errors call `name`, and of which they say that `maker` makes them."""
    kind = _cell(cell)
    check_options(direction, chunk, unroll)
    arrays = _checked_parameters(params, kind, x.shape[-1], patch, cell=cell, name=name, maker=maker)
    mask = _checked_mask(mask, x, patch)
    _check_values(x, mask)
    for key, value in arrays.items():
        _checks.check_finite(f"{name}[{key!r}]", value)
    dtype = functools.reduce(jnp.promote_types, (value.dtype for value in arrays.values()))
    if jnp.issubdtype(x.dtype, jnp.floating):
        dtype = jnp.promote_types(dtype, x.dtype)
    return _renet_layer(
        {key: value.astype(dtype) for key, value in arrays.items()},
        x.astype(dtype),
        mask,
        vertical=direction == "vertical",
        patch=patch,
        chunk=chunk,
        run=_Run(cell, unroll, precision),
    )


def renet_group_init(
    key: Array,
    in_channels: int,
    features: int,
    *,
    cell: Cell = "lstm",
    patch: tuple[int, int] = (1, 1),
    scale: float = 0.2,
    dtype: Any = jnp.float32,
) -> dict[str, dict[str, Array]]:
    """Parameters of a recurrent layer group, drawn at random.

    Args:
        key: a random key.
        in_channels: channels of the group's input.
        features: `d`, hidden units of each direction of both layers.
        cell: as in `renet_init`.
        patch: of the first layer; the second sweeps over what comes out of it.
        scale: as in `renet_init`.
        dtype: of the parameters.

    Returns:
        `{"first": …, "second": …}`, the parameters of both layers as `renet_init` makes them, the second's for
        `2 d` channels.

    Raises:
        ValueError: as `renet_init` does.

    Example:
        >>> import jax, jaxcrf
        >>> params = jaxcrf.renet_group_init(jax.random.key(0), 3, 5)
        >>> params["first"]["input_kernel"].shape, params["second"]["input_kernel"].shape
        ((2, 3, 20), (2, 10, 20))
    """
    first, second = jax.random.split(key)
    return {
        "first": renet_init(first, in_channels, features, cell=cell, patch=patch, scale=scale, dtype=dtype),
        "second": renet_init(second, 2 * features, features, cell=cell, scale=scale, dtype=dtype),
    }


def renet_group(
    params: Mapping[str, Parameters],
    x: Float[Array, "*batch height width channels"],
    *,
    direction: Direction = "vertical",
    cell: Cell = "lstm",
    patch: tuple[int, int] = (1, 1),
    mask: Bool[Array, "*batch height width"] | None = None,
    chunk: int | None = None,
    unroll: int | None = None,
    precision: Any = None,
) -> Float[Array, "*batch rows columns features"]:
    """A recurrent layer group: two ReNet layers, one across the other, that see the whole image.

    The first layer sweeps over patches in `direction`, the second over the first one's output in the other
    direction: every output depends on every pixel.

    Args:
        params: as `renet_group_init` makes them.
        x: images or feature maps, `[*batch, height, width, channels]`.
        direction: of the first layer, "vertical" or "horizontal".
        cell: of both layers, "lstm", "gru" or "irnn".
        patch: `(s, t)`, of the first layer.
        mask: as in `renet_layer`.
        chunk: as in `renet_layer`.
        unroll: as in `renet_layer`.
        precision: as in `renet_layer`.

    Returns:
        `[*batch, h, w, 2 d]`.

    Raises:
        ValueError: as `renet_layer` does.

    Example:
        >>> import jax, jax.numpy as jnp, jaxcrf
        >>> params = jaxcrf.renet_group_init(jax.random.key(0), 3, 5)
        >>> x = jnp.zeros((7, 8, 3))
        >>> far = jaxcrf.renet_group(params, x.at[0, 0].set(1.0))[-1, -1] - jaxcrf.renet_group(params, x)[-1, -1]
        >>> bool(jnp.any(far != 0))
        True

    References:
        Yan et al., 2016, §3: "recurrent layer group".
    """
    expected = "expected the two layers of a group, 'first' and 'second', as from jaxcrf.renet_group_init"
    if not isinstance(params, Mapping):
        raise TypeError(f"params: got {type(params).__name__}; {expected}")
    if set(params) != {"first", "second"}:
        got = ", ".join(map(repr, sorted(params))) or "an empty dictionary"
        raise ValueError(f"params: got {got}; {expected}")
    x, patch = jnp.asarray(x), _checked_patch(patch)
    _check_images(x, patch)
    maker = f"renet_group_init(key, {x.shape[-1]}, features, cell={cell!r}, patch={patch})"
    options: dict[str, Any] = {"cell": cell, "chunk": chunk, "unroll": unroll, "precision": precision}
    first, second = "params['first']", "params['second']"
    y = _checked_layer(params["first"], x, mask, first, maker, direction=direction, patch=patch, **options)
    if mask is not None:
        mask = renet_mask(mask, patch)
    return _checked_layer(
        params["second"], y, mask, second, maker, direction=across(direction), patch=(1, 1), **options
    )


def renet_mask(
    mask: Bool[Array, "*batch height width"], patch: tuple[int, int]
) -> Bool[Array, "*batch rows columns"]:
    """Which patches hold any pixel of the image: the mask of what a layer returns.

    Args:
        mask: `[*batch, height, width]`, True where there is image.
        patch: `(s, t)`, height and width of a patch in pixels.

    Returns:
        `[*batch, h, w]`, for the layer that comes next.

    Raises:
        ValueError: if the mask is not one, or a patch not two whole numbers of at least 1.

    Example:
        >>> import jax.numpy as jnp, jaxcrf
        >>> jaxcrf.renet_mask(jnp.array([[True, True, True, False, False]]), (1, 2))
        Array([[ True,  True, False]], dtype=bool)
    """
    patch = _checked_patch(patch)
    mask = jnp.asarray(mask)
    if mask.ndim < 2 or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, dtype {mask.dtype}; expected booleans [*batch, height, width]"
        )
    _checks.check_not_empty("mask", mask)
    return _patches(_padded(mask, patch, mode="constant")[..., None], patch).any(-1)


def across(direction: Direction) -> Direction:
    """The other direction."""
    return "horizontal" if direction == "vertical" else "vertical"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A cell, as what can be computed for all units at once around the recurrent product.

    Attributes:
        gates: how many pre-activations a unit has.
        states: how many arrays it remembers.
        combine: `(W x + b, U h, b')` to all that the rest depends on.
        divide: the transpose of `combine`: to the gradients of `W x + b`, of `U h` and of `b'`, a patch at a time.
        update: `(what combine gave, state)` to the next state, unit by unit.
    """

    gates: int
    states: int
    combine: Callable[[Array, Array, Array | None], Array]
    divide: Callable[[Array], tuple[Array, Array, Array | None]]
    update: Callable[[Array, State], State]


def _sum(projected: Array, recurrent: Array, recurrent_bias: Array | None) -> Array:
    return projected + recurrent


def _sum_transposed(gradient: Array) -> tuple[Array, Array, None]:
    return gradient, gradient, None


def _lstm(activation: Array, state: State) -> State:
    _, memory = state
    write, forget, candidate, read = jnp.split(activation, 4, -1)
    memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(write) * jnp.tanh(candidate)
    return jax.nn.sigmoid(read) * jnp.tanh(memory), memory


def _irnn(activation: Array, state: State) -> State:
    return (jax.nn.relu(activation),)


def _gru_combine(projected: Array, recurrent: Array, recurrent_bias: Array | None) -> Array:
    # The reset gate comes between the two parts of the candidate, which therefore stay apart.
    gates = 2 * (projected.shape[-1] // 3)
    assert recurrent_bias is not None
    return jnp.concatenate(
        [
            projected[..., :gates] + recurrent[..., :gates],
            projected[..., gates:],
            recurrent[..., gates:] + recurrent_bias[:, None],
        ],
        -1,
    )


def _gru_divide(gradient: Array) -> tuple[Array, Array, Array]:
    gates, candidate, recurrent = jnp.split(
        gradient, [gradient.shape[-1] // 2, 3 * (gradient.shape[-1] // 4)], -1
    )
    return jnp.concatenate([gates, candidate], -1), jnp.concatenate([gates, recurrent], -1), recurrent


def _gru(activation: Array, state: State) -> State:
    (hidden,) = state
    reset, update, candidate, recurrent = jnp.split(activation, 4, -1)
    candidate = jnp.tanh(candidate + jax.nn.sigmoid(reset) * recurrent)
    return (candidate + jax.nn.sigmoid(update) * (hidden - candidate),)


_CELLS: dict[str, _Kind] = {
    "lstm": _Kind(4, 2, _sum, _sum_transposed, _lstm),
    "gru": _Kind(3, 1, _gru_combine, _gru_divide, _gru),
    "irnn": _Kind(1, 1, _sum, _sum_transposed, _irnn),
}


@dataclasses.dataclass(frozen=True)
class _Run:
    """How a sweep is made: static, and hashed."""

    cell: str
    unroll: int | None
    precision: Any

    @property
    def kind(self) -> _Kind:
        return _CELLS[self.cell]

    def product(self, equation: str, a: Array, b: Array) -> Array:
        """Of operands as narrow as the weights, accumulated in float32 at least."""
        return jnp.einsum(
            equation, a, b, precision=self.precision, preferred_element_type=_accumulator(b.dtype)
        )


# Compiled here, so that calls outside any `jit` compile once per shape.
@functools.partial(jax.jit, static_argnames=("vertical", "patch", "chunk", "run"))
def _renet_layer(
    params: dict[str, Array],
    x: Array,
    mask: Array | None,
    *,
    vertical: bool,
    patch: tuple[int, int],
    chunk: int | None,
    run: _Run,
) -> Array:
    everything = (params, x, mask)
    params, x, mask = varying_like(everything, everything)
    valid = None
    if mask is None:
        x = _padded(x, patch, mode="reflect", trailing=1)
    else:
        x, valid = _filled(x, mask, patch), renet_mask(mask, patch)
    x = _patches(x, patch)
    *batch, rows, columns, _ = x.shape
    axis = len(batch) + (0 if vertical else 1)

    def sequences(a: Array) -> Array:
        """The swept axis first, all others in one."""
        a = jnp.moveaxis(a, axis, 0)
        return a.reshape(a.shape[0], -1, *a.shape[len(batch) + 2 :])

    y = _sweep(
        params,
        sequences(x),
        None if valid is None else sequences(valid),
        run=run,
        chunk=chunk,
    )
    y = y.astype(x.dtype).reshape(y.shape[0], *batch, columns if vertical else rows, y.shape[-1])
    y = jnp.moveaxis(y, 0, axis)
    return y if valid is None else jnp.where(valid[..., None], y, 0)


def _accumulator(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _sweep(params: dict[str, Array], x: Array, valid: Array | None, *, run: _Run, chunk: int | None) -> Array:
    """Outputs `[steps, sequences, 2 d]` of inputs `[steps, sequences, channels]`."""
    steps, sequences, _ = x.shape
    kernel = params["recurrent_kernel"]
    features = kernel.shape[1]
    zeros = jnp.zeros((2, sequences, features), _accumulator(kernel.dtype))
    state = varying_like((zeros,) * run.kind.states, x)
    # The second network reads everything backwards, so that both go the same way through one loop.
    inputs = (x, x[::-1])
    both = None if valid is None else jnp.stack([valid, valid[::-1]], 1)[..., None]

    def advance(state: State, inputs: Any) -> tuple[State, Array]:
        """Through some steps: states, and hidden states `[steps, 2, sequences, d]`."""
        return _recur(run, params, *inputs, state)

    if chunk is None or chunk >= steps:
        _, hidden = (advance if chunk is None else jax.checkpoint(advance))(state, (inputs, both))
    else:
        # What a chunk computes is forgotten, and computed again when its gradient is.
        recomputed = jax.checkpoint(advance, prevent_cse=False)
        whole = steps - steps % chunk
        chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:]), (inputs, both))
        state, hidden = lax.scan(recomputed, state, chunks)
        hidden = hidden.reshape(whole, *hidden.shape[2:])
        if whole < steps:
            rest = jax.tree.map(lambda a: a[whole:], (inputs, both))
            hidden = jnp.concatenate([hidden, jax.checkpoint(advance)(state, rest)[1]])
    return jnp.concatenate([hidden[:, 0], hidden[::-1, 1]], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    run: _Run, params: dict[str, Array], inputs: tuple[Array, Array], valid: Array | None, state: State
) -> tuple[State, Array]:
    """The last state, and all hidden states `[steps, 2, sequences, d]`.

    Differentiated by autodiff, a loop would also keep everything between pre-activations and states, and add up the
    gradients of the weights step by step; here that is one product over all steps.
    """
    operands = params, inputs, valid, state
    state, (hidden,) = _forward(run, *operands, keep=lambda following, _: (following[0],), unroll=2)
    return state, hidden


def _forward(
    run: _Run, *operands: Any, keep: Callable[[State, Array], Any], unroll: int
) -> tuple[State, Any]:
    """The last state, and what is kept of all states and pre-activations; `unroll` unless it was asked for.

    `W x + b` is computed within the loop, or beforehand for all steps in one product: a GPU's products are slow when
    small. On a CPU it is their results that cost, a quarter of the forward pass of large batches, where they no longer
    fit into its caches.
    """
    forward = functools.partial(_forward_steps, run, keep, run.unroll or unroll)
    return by_platform(
        *operands,
        cpu=functools.partial(forward, project_by_step=True),
        accelerator=functools.partial(forward, project_by_step=False),
    )


def _forward_steps(
    run: _Run,
    keep: Callable[[State, Array], Any],
    unroll: int,
    params: dict[str, Array],
    inputs: tuple[Array, Array],
    valid: Array | None,
    state: State,
    *,
    project_by_step: bool,
) -> tuple[State, Any]:
    kernel, bias = params["recurrent_kernel"], params.get("recurrent_bias")

    def project(inputs: tuple[Array, Array]) -> Array:
        kernels = params["input_kernel"]
        both = [run.product("...c,cg->...g", a, w) for a, w in zip(inputs, kernels, strict=True)]
        return jnp.stack(both, -3) + params["bias"][:, None]

    def step(state: State, arguments: Any) -> tuple[State, Any]:
        projected, valid = arguments
        if project_by_step:
            projected = project(projected)
        recurrent = run.product("kmd,kdg->kmg", state[0].astype(kernel.dtype), kernel)
        activation = run.kind.combine(projected, recurrent, bias)
        following = run.kind.update(activation, state)
        if valid is not None:
            following = tuple(jnp.where(valid, a, b) for a, b in zip(following, state, strict=True))
        return following, keep(following, activation)

    beforehand = inputs if project_by_step else project(inputs)
    return lax.scan(step, state, (beforehand, valid), unroll=unroll)


def _forward_for_backward(
    run: _Run, params: dict[str, Array], inputs: tuple[Array, Array], valid: Array | None, state: State
) -> tuple[tuple[State, Array], tuple[Any, ...]]:
    operands = params, inputs, valid, state
    last, (states, activations) = _forward(run, *operands, keep=lambda *kept: kept, unroll=1)
    return (last, states[0]), (params, inputs, valid, state, states, activations)


def _backward(run: _Run, residuals: tuple[Any, ...], gradients: tuple[State, Array]) -> tuple[Any, ...]:
    params, inputs, valid, initial, states, activations = residuals
    kernel = params["recurrent_kernel"]
    before = tuple(jnp.concatenate([a[None], b[:-1]]) for a, b in zip(initial, states, strict=True))

    def step(gradient: State, arguments: Any) -> tuple[State, tuple[Array, ...]]:
        arriving, activation, state, valid = arguments
        gradient = (gradient[0] + arriving, *gradient[1:])
        kept = None
        if valid is not None:
            kept = tuple(jnp.where(valid, 0, a) for a in gradient)
            gradient = tuple(jnp.where(valid, a, 0) for a in gradient)
        _, pull = jax.vjp(run.kind.update, activation, state)
        activation_gradient, (hidden, *others) = pull(gradient)
        recurrent = run.kind.divide(activation_gradient)[1]
        hidden = hidden + run.product("kmg,kdg->kmd", recurrent.astype(kernel.dtype), kernel)
        gradient = (hidden, *others)
        if kept is not None:
            gradient = tuple(a + b for a, b in zip(gradient, kept, strict=True))
        # Apart, the two are the operands of the products below as they lie.
        return gradient, tuple(activation_gradient)

    last, arriving = gradients
    first, both = lax.scan(
        step, last, (arriving, activations, before, valid), reverse=True, unroll=run.unroll or 1
    )
    by_params, by_inputs = [], []
    for k, (x, found) in enumerate(zip(inputs, both, strict=True)):
        projected, recurrent, recurrent_bias = run.kind.divide(found)
        narrow = projected.astype(kernel.dtype)
        hidden = before[0][:, k].astype(kernel.dtype)
        by_params.append(
            {
                "input_kernel": run.product("nmc,nmg->cg", x, narrow),
                "recurrent_kernel": run.product("nmd,nmg->dg", hidden, recurrent.astype(kernel.dtype)),
                "bias": projected.sum((0, 1)),
            }
            | ({} if recurrent_bias is None else {"recurrent_bias": recurrent_bias.sum((0, 1))})
        )
        by_inputs.append(run.product("nmg,cg->nmc", narrow, params["input_kernel"][k]).astype(x.dtype))
    stacked = jax.tree.map(
        lambda a, b, like: jnp.stack([a, b]).astype(like.dtype), by_params[0], by_params[1], params
    )
    return stacked, tuple(by_inputs), None, first


_recur.defvjp(_forward_for_backward, _backward)


def _padded(
    a: Array, patch: tuple[int, int], *, mode: Literal["reflect", "constant"], trailing: int = 0
) -> Array:
    """Whole patches, at the lower and right borders; `trailing` axes come after the spatial ones."""
    leading = a.ndim - 2 - trailing
    widths = [(0, -size % step) for size, step in zip(a.shape[leading:], patch, strict=False)]
    if not any(after for _, after in widths):
        return a
    return jnp.pad(a, [(0, 0)] * leading + widths + [(0, 0)] * trailing, mode=mode)


def _patches(a: Array, patch: tuple[int, int]) -> Array:
    """`[*batch, h s, w t, c]` as `[*batch, h, w, s t c]`."""
    if patch == (1, 1):
        return a
    *batch, height, width, channels = a.shape
    s, t = patch
    a = a.reshape(*batch, height // s, s, width // t, t, channels)
    return jnp.swapaxes(a, -4, -3).reshape(*batch, height // s, width // t, s * t * channels)


def _filled(x: Array, mask: Array, patch: tuple[int, int]) -> Array:
    """Whole patches, where pixels outside the image are its reflection; beyond that, zeros."""
    x = _padded(x, patch, mode="constant", trailing=1)
    mask = _padded(mask, patch, mode="constant")
    for axis, size in enumerate(patch):
        if size == 1:
            continue
        inside = mask.any(-1 if axis == 0 else -2)
        count = inside.shape[-1]
        first = inside.argmax(-1)[..., None]
        last = count - 1 - inside[..., ::-1].argmax(-1)[..., None]
        source = jnp.arange(count)
        source = jnp.where(source > last, 2 * last - source, source)
        source = jnp.where(source < first, 2 * first - source, source)
        # Farther away than the image reaches nothing is looked at.
        source = jnp.clip(source, first, last)
        source = jnp.expand_dims(source, -1 if axis == 0 else -2)
        mask = jnp.take_along_axis(mask, source, axis - 2)
        x = jnp.take_along_axis(x, source[..., None], axis - 3)
    # What is there may be NaN, which no factor of zero would take away.
    return jnp.where(mask[..., None], x, 0)


def _expected(got: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    known = tuple(known)
    near = difflib.get_close_matches(got.lower(), known, n=1, cutoff=0.4) if isinstance(got, str) else []
    return f"{f'did you mean {near[0]!r}? ' if near else ''}expected one of {', '.join(map(repr, known))}"


def _cell(cell: Any) -> _Kind:
    if not isinstance(cell, str) or cell not in _CELLS:
        raise ValueError(f"cell: got {cell!r}; {_expected(cell, _CELLS)}")
    return _CELLS[cell]


def _checked_patch(patch: Any) -> tuple[int, int]:
    if not (
        isinstance(patch, (tuple, list))
        and len(patch) == 2
        and all(_checks.is_whole(size) and size >= 1 for size in patch)
    ):
        raise ValueError(f"patch: got {patch!r}; expected (height, width), two whole numbers >= 1")
    return int(patch[0]), int(patch[1])


def _check_images(x: Array, patch: tuple[int, int]) -> None:
    if x.ndim < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}; expected [*batch, height, width, channels]")
    _checks.check_not_empty("x", x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"x: got dtype {x.dtype}; expected real numbers")
    height, width = x.shape[-3:-1]
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f"x: got images of {height} × {width} pixels, smaller than a patch of {patch[0]} × {patch[1]}; resize or "
            f"pad them to at least {max(height, patch[0])} × {max(width, patch[1])}, or take smaller patches"
        )


def _checked_mask(mask: Any, x: Array, patch: tuple[int, int]) -> Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}; expected {tuple(x.shape[:-1])}, that of x without its channels"
        )
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask: got dtype {mask.dtype}; expected booleans, e.g. mask != 0")
    if patch != (1, 1) and _checks.is_concrete(mask):
        known = np.asarray(mask).reshape(-1, *mask.shape[-2:])
        for number, image in enumerate(known):
            # One without any pixel is left out altogether.
            extents = [
                np.ptp(np.flatnonzero(image.any(1 - axis))) + 1 if image.any() else size
                for axis, size in enumerate(patch)
            ]
            if extents[0] < patch[0] or extents[1] < patch[1]:
                raise ValueError(
                    f"mask: image {number} of the batch has {extents[0]} × {extents[1]} pixels, fewer than a patch of "
                    f"{patch[0]} × {patch[1]}; resize it, or take smaller patches"
                )
    return mask


@jax.jit
def _survey(x: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], jnp.isfinite(x), True).all()


def _check_values(x: Array, mask: Array | None) -> None:
    """Raises if concrete images hold NaN; what the mask leaves out may."""
    if mask is None:
        _checks.check_finite("x", x)
    elif _checks.is_concrete(x) and _checks.is_concrete(mask) and jnp.issubdtype(x.dtype, jnp.floating):
        with jax.ensure_compile_time_eval():
            finite = bool(_survey(x, mask))
        if not finite:
            raise ValueError(
                "x: holds NaN or infinite values where mask is True; replace them, e.g. with numpy.nan_to_num"
            )


def check_options(direction: Any, chunk: Any, unroll: Any) -> None:
    """Raises unless these are what `renet_layer` takes."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction: got {direction!r}; {_expected(direction, get_args(Direction))}")
    if chunk is not None and (not _checks.is_whole(chunk) or chunk < 1):
        raise ValueError(f"chunk: got {chunk!r}; expected a whole number of steps >= 1, or None")
    if unroll is not None and (not _checks.is_whole(unroll) or unroll < 1):
        raise ValueError(f"unroll: got {unroll!r}; expected a whole number of steps >= 1, or None")


def _shapes(
    kind: _Kind, in_channels: int, features: int, patch: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Of all parameters, in the order in which they are drawn."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_kernel": (2, patch[0] * patch[1] * in_channels, kind.gates * features),
        "recurrent_kernel": (2, features, kind.gates * features),
        "bias": (2, kind.gates * features),
    }
    if kind is _CELLS["gru"]:
        shapes["recurrent_bias"] = (2, features)
    return shapes


def _checked_parameters(
    params: Any, kind: _Kind, in_channels: int, patch: tuple[int, int], *, cell: str, name: str, maker: str
) -> dict[str, Array]:
    remedy = f"make them with jaxcrf.{maker}"
    if not isinstance(params, Mapping):
        raise TypeError(f"{name}: got {type(params).__name__}; expected a dictionary, {remedy}")
    wanted = _shapes(kind, in_channels, 1, patch)
    if set(params) != set(wanted):
        raise ValueError(
            f"{name}: got {', '.join(map(repr, sorted(params))) or 'an empty dictionary'}; cell={cell!r} has "
            f"{', '.join(map(repr, wanted))}: {remedy}"
        )
    arrays = {key: jnp.asarray(params[key]) for key in wanted}
    kernel = arrays["recurrent_kernel"]
    features = kernel.shape[1] if kernel.ndim == 3 else 0
    if features < 1:
        raise ValueError(
            f"{name}['recurrent_kernel']: got shape {tuple(kernel.shape)}; expected (2, features, {kind.gates} · "
            f"features): {remedy}"
        )
    for key, shape in _shapes(kind, in_channels, features, patch).items():
        if arrays[key].shape != shape:
            raise ValueError(
                f"{name}[{key!r}]: got shape {tuple(arrays[key].shape)}; expected {shape} for cell={cell!r}, "
                f"patch={patch}, {in_channels} channels and {features} features: {remedy}"
            )
        if not jnp.issubdtype(arrays[key].dtype, jnp.floating):
            raise ValueError(
                f"{name}[{key!r}]: got dtype {arrays[key].dtype}; expected floating-point numbers"
            )
    return arrays

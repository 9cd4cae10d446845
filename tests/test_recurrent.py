"""ReNet layers, against loops over pixels in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcrf

CHANNELS, FEATURES = 2, 3


def exhaustive(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


def parameters(cell="lstm", patch=(1, 1), *, channels=CHANNELS, seed=0, dtype=np.float32):
    """Larger than the initial ones, so that gates leave the middle."""
    gates = {"lstm": 4, "gru": 3, "irnn": 1}[cell]
    shapes = {
        "input_kernel": (2, patch[0] * patch[1] * channels, gates * FEATURES),
        "recurrent_kernel": (2, FEATURES, gates * FEATURES),
        "bias": (2, gates * FEATURES),
    }
    if cell == "gru":
        shapes["recurrent_bias"] = (2, FEATURES)
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(-0.7, 0.7, shape).astype(dtype) for name, shape in shapes.items()}


def images(*shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(*shape, CHANNELS)).astype(dtype)


def logistic(a):
    return 1 / (1 + np.exp(-a))


def oracle(params, x, *, direction="vertical", cell="lstm", patch=(1, 1)):
    """One image, patch by patch in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    s, t = patch
    height, width, _ = x.shape
    rows, columns = -(-height // s), -(-width // t)
    x = np.pad(
        np.asarray(x, np.float64), ((0, rows * s - height), (0, columns * t - width), (0, 0)), mode="reflect"
    )
    d = p["recurrent_kernel"].shape[1]
    y = np.zeros((rows, columns, 2 * d))
    places = [[(r, c) for r in range(rows)] for c in range(columns)]
    if direction == "horizontal":
        places = [[(r, c) for c in range(columns)] for r in range(rows)]
    for k in range(2):
        for line in places:
            h, memory = np.zeros(d), np.zeros(d)
            for r, c in line[:: -1 if k else 1]:
                pixels = x[r * s : (r + 1) * s, c * t : (c + 1) * t].reshape(-1)
                a = pixels @ p["input_kernel"][k] + p["bias"][k]
                b = h @ p["recurrent_kernel"][k]
                if cell == "lstm":
                    i, f, g, o = ((a + b)[n * d : (n + 1) * d] for n in range(4))
                    memory = logistic(f) * memory + logistic(i) * np.tanh(g)
                    h = logistic(o) * np.tanh(memory)
                elif cell == "gru":
                    reset, update = logistic((a + b)[:d]), logistic((a + b)[d : 2 * d])
                    candidate = np.tanh(a[2 * d :] + reset * (b[2 * d :] + p["recurrent_bias"][k]))
                    h = (1 - update) * candidate + update * h
                else:
                    h = np.maximum(a + b, 0)
                y[r, c, k * d : (k + 1) * d] = h
    return y


EQUATIONS = {
    ("lstm", "vertical", (1, 1)),
    ("lstm", "horizontal", (2, 3)),
    ("gru", "vertical", (2, 2)),
    ("irnn", "horizontal", (1, 2)),
}


@pytest.mark.parametrize(
    ("cell", "direction", "patch"),
    [
        case if case in EQUATIONS else exhaustive(*case)
        for cell in ("lstm", "gru", "irnn")
        for direction in ("vertical", "horizontal")
        for patch in ((1, 1), (2, 2), (2, 3), (1, 2), (5, 7))
        for case in [(cell, direction, patch)]
    ],
)
def test_layers_follow_their_equations(cell, direction, patch):
    options = {"direction": direction, "cell": cell, "patch": patch}
    params = parameters(cell, patch)
    x = images(5, 7)
    expected = oracle(params, x, **options)
    found = jaxcrf.renet_layer(params, x, **options)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=5e-6)
    with jax.enable_x64(True):
        found = jaxcrf.renet_layer(*jax.tree.map(np.float64, (params, x)), **options)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize(
    ("cell", "masked", "chunk"),
    [
        ("lstm", True, 2),
        ("gru", True, None),
        ("irnn", False, None),
        exhaustive("lstm", False, None),
        exhaustive("gru", False, 3),
        exhaustive("irnn", True, 2),
    ],
)
def test_gradients_are_those_of_finite_differences(cell, masked, chunk):
    rng = np.random.default_rng(3)
    operands = parameters(cell, (2, 1), dtype=np.float64), images(2, 5, 3, dtype=np.float64)
    directions = [jax.tree.map(lambda a: rng.normal(size=a.shape), operands) for _ in range(3)]
    # One number per operand, so that none hides behind another.
    directions += [
        ({n: d * (n == name) for n, d in directions[0][0].items()}, 0 * operands[1]) for name in operands[0]
    ]
    mask = np.ones((2, 5, 3), bool)
    # Padding, and a hole, across which gradients pass.
    mask[0, 3:] = mask[1, :, 2:] = mask[1, 2:4, 0] = False
    weights = rng.normal(size=(2, 3, 3, 2 * FEATURES))
    with jax.enable_x64(True):

        @jax.jit
        def value(params, x):
            y = jaxcrf.renet_layer(
                params, x, cell=cell, patch=(2, 1), chunk=chunk, mask=jnp.asarray(mask) if masked else None
            )
            return jnp.sum(weights * y)

        gradient = jax.jit(jax.grad(value, (0, 1)))(*operands)
        for direction in directions:
            # Central differences of fourth order, by steps that hardly ever cross a kink of the IRNN.
            minus2, minus1, plus1, plus2 = (
                float(value(*jax.tree.map(lambda a, b, k=k: a + 1e-5 * k * b, operands, direction)))
                for k in (-2, -1, 1, 2)
            )
            expected = (8 * (plus1 - minus1) - (plus2 - minus2)) / 12e-5
            found = sum(
                float(jnp.sum(a * b))
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
            )
            assert found == pytest.approx(expected, rel=1e-7, abs=1e-8)
            assert found != 0
        if masked:
            assert not np.any(np.asarray(gradient[1])[~mask])


@pytest.mark.parametrize(
    ("cell", "direction", "patch"),
    [
        ("lstm", "vertical", (1, 1)),
        exhaustive("gru", "horizontal", (1, 1)),
        exhaustive("lstm", "horizontal", (1, 2)),
    ],
)
def test_every_output_of_a_group_depends_on_every_input(cell, direction, patch):
    params = jaxcrf.renet_group_init(jax.random.key(0), 1, 2, cell=cell, patch=patch)
    x = np.random.default_rng(0).normal(size=(3, 4, 1)).astype(np.float32)

    options = {"direction": direction, "cell": cell, "patch": patch}

    def depends(function):
        """Which outputs depend on which pixels, for the networks of either direction."""
        found = np.asarray(jax.jit(jax.jacrev(function))(x))[..., 0] != 0
        return found[:, :, :2], found[:, :, 2:]

    down, up = depends(lambda x: jaxcrf.renet_group(params, x, **options))
    assert np.all(down | up)
    # One layer sees the columns, or rows, that its patches are in, each network the patches that it has passed.
    r, c, _, y, x_ = np.ogrid[: down.shape[0], : down.shape[1], :2, :3, :4]
    y, x_ = y // patch[0], x_ // patch[1]
    down_expected, up_expected = (
        ((c == x_) & (y <= r), (c == x_) & (y >= r))
        if direction == "vertical"
        else ((r == y) & (x_ <= c), (r == y) & (x_ >= c))
    )
    down, up = depends(lambda x: jaxcrf.renet_layer(params["first"], x, **options))
    np.testing.assert_array_equal(down, np.broadcast_to(down_expected, down.shape))
    np.testing.assert_array_equal(up, np.broadcast_to(up_expected, up.shape))


@pytest.mark.parametrize(
    ("cell", "patch"), [("lstm", (2, 3)), exhaustive("gru", (1, 1)), exhaustive("irnn", (3, 2))]
)
def test_padded_batches_are_their_images_one_by_one(cell, patch):
    sizes = [(5, 7), (3, 7), (5, 4), (4, 3), (0, 0)]
    params = {
        "first": parameters(cell, patch),
        "second": parameters(cell, channels=2 * FEATURES, seed=1),
    }
    options = {"cell": cell, "patch": patch, "direction": "horizontal"}
    x, mask = images(len(sizes), 5, 7), np.zeros((len(sizes), 5, 7), bool)
    for (height, width), image, inside in zip(sizes, x, mask, strict=True):
        inside[:height, :width] = True
        image[~inside] = np.nan
    found = np.asarray(jaxcrf.renet_group(params, x, mask=mask, **options))
    there = np.asarray(jaxcrf.renet_mask(mask, patch))
    for (height, width), image, inside, y in zip(sizes, x, there, found, strict=True):
        rows, columns = -(-height // patch[0]), -(-width // patch[1])
        assert inside[:rows, :columns].all()
        assert inside.sum() == rows * columns
        assert not y[~inside].any()
        if rows:
            first = oracle(params["first"], image[:height, :width], **options)
            expected = oracle(params["second"], first, cell=cell)
            np.testing.assert_allclose(y[:rows, :columns], expected, atol=2e-5)


def test_padding_may_be_anywhere_and_holes_are_passed_over():
    params, x, mask = parameters(), images(6, 2), np.ones((6, 2), bool)
    mask[:2] = mask[4] = False
    found = jaxcrf.renet_layer(params, x, mask=mask)
    expected = oracle(params, x[[2, 3, 5]])
    np.testing.assert_allclose(found[np.array([2, 3, 5])], expected, atol=5e-6)
    # Patches at the upper border are filled up as those at the lower one are.
    mask[:] = True
    mask[:1] = False
    params = parameters(patch=(2, 1))
    found = jaxcrf.renet_layer(params, x, mask=mask, patch=(2, 1))
    np.testing.assert_allclose(found, oracle(params, x[[2, 1, 2, 3, 4, 5]], patch=(2, 1)), atol=5e-6)


def test_batches_are_loops_and_come_in_any_shape():
    params, x = parameters(patch=(2, 2)), images(2, 1, 3, 5)

    def layer(x):
        return jaxcrf.renet_layer(params, x, patch=(2, 2), direction="horizontal")

    found = jax.jit(layer)(x)
    assert found.shape == (2, 1, 2, 3, 2 * FEATURES)
    for number in range(2):
        np.testing.assert_allclose(found[number, 0], layer(x[number, 0]), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(layer)(x), found, atol=1e-6)


@pytest.mark.parametrize(
    ("chunk", "unroll"),
    [(2, 1), exhaustive(1, 1), exhaustive(5, 1), exhaustive(9, 1), exhaustive(None, 3), exhaustive(2, 2)],
)
def test_chunks_and_unrolling_change_nothing(chunk, unroll):
    params, x = parameters("gru"), images(2, 5, 3)

    def values_and_gradients(**options):
        def loss(params, x):
            y = jaxcrf.renet_layer(params, x, cell="gru", **options)
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    found, expected = values_and_gradients(chunk=chunk, unroll=unroll), values_and_gradients()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("cell", ["lstm", exhaustive("gru"), exhaustive("irnn")])
def test_what_devices_do_differently_gives_the_same(cell, monkeypatch):
    params, x, mask = parameters(cell), images(2, 4, 3), np.ones((2, 4, 3), bool)
    mask[1, 2:] = False

    def gradients():
        def loss(params, x):
            y = jaxcrf.renet_layer(params, x, cell=cell, mask=mask)
            return jnp.sum(y**2), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    def accelerated(*operands, cpu, accelerator):
        return accelerator(*operands)

    expected = gradients()
    monkeypatch.setattr("jaxcrf.recurrent.by_platform", accelerated)
    jax.clear_caches()
    found = gradients()
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(("cell", "kept"), [("lstm", 12), ("gru", 10), ("irnn", 4)])
def test_chunks_choose_what_is_kept_for_the_backward_pass(cell, kept):
    params = jax.eval_shape(lambda: jaxcrf.renet_init(jax.random.key(0), 8, 16, cell=cell))
    x = jax.ShapeDtypeStruct((64, 32, 8), jnp.float32)

    def numbers(chunk):
        def pullback(params, x):
            return jax.vjp(
                lambda params, x: jaxcrf.renet_layer(params, x, cell=cell, chunk=chunk), params, x
            )[1]

        sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, params, x))]
        # Inputs, their reverse and weights are there in any case.
        return sum(sizes) - 2 * x.size - sum(leaf.size for leaf in jax.tree.leaves(params))

    patches, features = 64 * 32, 16
    states = {"lstm": 2}.get(cell, 1)
    assert abs(numbers(None) - kept * features * patches) < 0.1 * kept * features * patches
    assert numbers(8) <= 2 * states * features * patches / 8 * 1.01


@pytest.mark.parametrize("direction", ["vertical", exhaustive("horizontal")])
def test_flipping_an_image_swaps_the_directions(direction):
    params, x = parameters("gru"), images(4, 5)
    axis = 0 if direction == "vertical" else 1

    def layer(params, x):
        return np.asarray(jaxcrf.renet_layer(params, x, cell="gru", direction=direction))

    swapped = {name: value[::-1] for name, value in params.items()}
    expected = np.roll(np.flip(layer(params, x), axis), FEATURES, -1)
    np.testing.assert_allclose(layer(swapped, np.flip(x, axis)), expected, atol=1e-6)
    transposed = jaxcrf.renet_layer(
        params, x.swapaxes(0, 1), cell="gru", direction="horizontal" if axis == 0 else "vertical"
    )
    np.testing.assert_allclose(np.asarray(transposed).swapaxes(0, 1), layer(params, x), atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", exhaustive("gru"), exhaustive("irnn")])
def test_bfloat16_accumulates_in_float32(cell):
    # So many equal terms that a sum in bfloat16 would stop growing at 256 times the term.
    params, x = parameters(cell, channels=4096), np.ones((2, 1, 4096))
    params["input_kernel"][:] = 2.0**-12
    exact = oracle(params, x, cell=cell)
    params = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    found = jaxcrf.renet_layer(params, x.astype(jnp.bfloat16), cell=cell)
    assert found.dtype == jnp.bfloat16
    # Weights, states between steps and results are rounded to eight bits.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02)
    gradient = jax.grad(lambda p: jaxcrf.renet_layer(p, jnp.asarray(x), cell=cell).astype(jnp.float32).sum())(
        params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


def test_numbers_of_images_are_converted():
    params = parameters()
    x = np.arange(24, dtype=np.uint8).reshape(3, 4, CHANNELS)
    found = jaxcrf.renet_layer(params, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, oracle(params, x), atol=1e-5)


def test_initial_parameters():
    params = jaxcrf.renet_init(jax.random.key(0), 30, 20, cell="gru", patch=(2, 1))
    assert {name: value.shape for name, value in params.items()} == {
        "input_kernel": (2, 60, 60),
        "recurrent_kernel": (2, 20, 60),
        "bias": (2, 60),
        "recurrent_bias": (2, 20),
    }
    for value in params.values():
        assert 0.15 < np.abs(value).max() <= 0.2
        assert np.std(value) == pytest.approx(0.2 / np.sqrt(3), rel=0.15)
        assert not np.array_equal(value[0], value[1])
    params = jaxcrf.renet_init(jax.random.key(0), 3, 4, cell="irnn", scale=0.1, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(params["recurrent_kernel"], [np.eye(4)] * 2)
    assert not params["bias"].any()
    assert 0.05 < np.abs(params["input_kernel"]).max() <= 0.1
    assert params["input_kernel"].dtype == jnp.bfloat16
    first, second = jaxcrf.renet_group_init(jax.random.key(0), 3, 4).values()
    assert first["input_kernel"].shape == (2, 3, 16)
    assert second["input_kernel"].shape == (2, 8, 16)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.optimized
def test_torch_agrees(cell):
    torch = pytest.importorskip("torch")
    params, x = parameters(cell), images(2, 4, 5)
    network = getattr(torch.nn, cell.upper())(CHANNELS, FEATURES, bidirectional=True, batch_first=True)
    entries = {}
    for k, suffix in enumerate(("", "_reverse")):
        second = np.zeros_like(params["bias"][k])
        if cell == "gru":
            second[2 * FEATURES :] = params["recurrent_bias"][k]
        entries |= {
            f"weight_ih_l0{suffix}": params["input_kernel"][k].T,
            f"weight_hh_l0{suffix}": params["recurrent_kernel"][k].T,
            f"bias_ih_l0{suffix}": params["bias"][k],
            f"bias_hh_l0{suffix}": second,
        }
    network.load_state_dict({name: torch.tensor(value) for name, value in entries.items()})
    sequences = torch.tensor(x.swapaxes(1, 2).reshape(-1, 4, CHANNELS), requires_grad=True)
    y, _ = network(sequences)
    (y**2).sum().backward()

    def loss(params, x):
        y = jaxcrf.renet_layer(params, x, cell=cell)
        return jnp.sum(y**2), y

    (by_params, by_x), found = jax.grad(loss, (0, 1), has_aux=True)(params, x)

    def as_image(a):
        return a.detach().numpy().reshape(2, 5, 4, -1).swapaxes(1, 2)

    np.testing.assert_allclose(found, as_image(y), atol=2e-6)
    np.testing.assert_allclose(by_x, as_image(sequences.grad), atol=2e-5)
    gradients = {name: value.grad.numpy() for name, value in network.named_parameters()}
    for k, suffix in enumerate(("", "_reverse")):
        pairs = [("input_kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"), ("bias", "bias_ih")]
        for ours, theirs in pairs:
            np.testing.assert_allclose(by_params[ours][k], gradients[f"{theirs}_l0{suffix}"].T, atol=1e-4)


SHARED = {"params": parameters(), "x": images(4, 5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "lsmt"}, r"cell: got 'lsmt'; did you mean 'lstm'\? expected one of 'lstm', 'gru', 'irnn'"),
        ({"cell": None}, "cell: got None; expected one of"),
        ({"direction": "vertically"}, r"direction: got 'vertically'; did you mean 'vertical'\?"),
        ({"patch": 2}, r"patch: got 2; expected \(height, width\)"),
        ({"patch": (0, 1)}, r"patch: got \(0, 1\)"),
        ({"chunk": 0}, "chunk: got 0; expected a whole number"),
        ({"unroll": True}, "unroll: got True; expected a whole number"),
        ({"patch": (5, 2)}, "x: got images of 4 × 5 pixels, smaller than a patch of 5 × 2; resize or pad .* 5 × 5"),
        ({"x": np.zeros((0, 5, CHANNELS))}, r"x: got shape \(0, 5, 2\), which holds nothing"),
        ({"x": np.zeros((5, CHANNELS))}, r"x: got shape \(5, 2\); expected \[\*batch, height, width, channels\]"),
        ({"x": np.full((4, 5, CHANNELS), np.nan)}, "x: holds NaN"),
        ({"x": np.zeros((4, 5, CHANNELS), complex)}, "x: got dtype complex"),
        ({"params": parameters() | {"bias": np.full((2, 12), np.inf)}}, r"params\['bias'\]: holds NaN or inf"),
        ({"params": parameters("gru")}, "params: got .*'recurrent_bias'.*; cell='lstm' has .*renet_init"),
        ({"params": parameters("irnn")}, r"'input_kernel'\]: got shape \(2, 2, 3\); expected \(2, 2, 12\) for cell"),
        ({"patch": (2, 2)}, r"'input_kernel'\]: got shape \(2, 2, 12\); expected \(2, 8, 12\) .*patch=\(2, 2\)"),
        ({"params": {}}, "params: got an empty dictionary"),
        ({"params": parameters() | {"recurrent_kernel": np.zeros(3)}}, r"'recurrent_kernel'\]: got shape \(3,\)"),
        ({"params": parameters() | {"bias": np.zeros((2, 12), int)}}, r"params\['bias'\]: got dtype int"),
        ({"mask": np.ones((4, 4), bool)}, r"mask: got shape \(4, 4\); expected \(4, 5\)"),
        ({"mask": np.ones((4, 5))}, "mask: got dtype float.*mask != 0"),
    ],
)  # fmt: skip
def test_bad_input_says_what_to_do(changes, message):
    options = SHARED | changes
    with pytest.raises(ValueError, match=message):
        jaxcrf.renet_layer(options.pop("params"), options.pop("x"), **options)


def test_bad_input_of_the_other_functions():
    params, x = parameters(patch=(2, 1)), images(2, 4, 5)
    mask = np.ones((2, 4, 5), bool)
    mask[1, 1:] = False
    with pytest.raises(
        ValueError, match="mask: image 1 of the batch has 1 × 5 pixels, fewer than a patch of 2 × 1"
    ):
        jaxcrf.renet_layer(params, x, mask=mask, patch=(2, 1))
    x[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="x: holds NaN or infinite values where mask is True"):
        jaxcrf.renet_layer(parameters(), x, mask=mask)
    with pytest.raises(TypeError, match="params: got list; expected a dictionary"):
        jaxcrf.renet_layer([], x)
    with pytest.raises(ValueError, match=r"params: got 'bias', .*; expected the two layers of a group"):
        jaxcrf.renet_group(params, x)
    with pytest.raises(TypeError, match="params: got list; expected the two layers of a group"):
        jaxcrf.renet_group([], x)
    group = {"first": parameters(), "second": parameters()}
    with pytest.raises(
        ValueError,
        match=r"params\['second'\]\['input_kernel'\]: got shape \(2, 2, 12\); expected \(2, 6, 12\) .*"
        r"jaxcrf.renet_group_init\(key, 2, features, cell='lstm', patch=\(1, 1\)\)",
    ):
        jaxcrf.renet_group(group, images(2, 4, 5))
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), dtype float"):
        jaxcrf.renet_mask(np.ones(3), (1, 1))
    with pytest.raises(ValueError, match="cell: got 'gru2'; did you mean 'gru'"):
        jaxcrf.renet_init(jax.random.key(0), 3, 4, cell="gru2")
    for name in ("in_channels", "features"):
        with pytest.raises(ValueError, match=f"{name}: got 0; expected a whole number >= 1"):
            jaxcrf.renet_init(jax.random.key(0), **{"in_channels": 3, "features": 4, name: 0})
    with pytest.raises(ValueError, match="scale: got nan; expected a finite number >= 0"):
        jaxcrf.renet_init(jax.random.key(0), 3, 4, scale=np.nan)
    with pytest.raises(ValueError, match="dtype: got int32"):
        jaxcrf.renet_init(jax.random.key(0), 3, 4, dtype=jnp.int32)

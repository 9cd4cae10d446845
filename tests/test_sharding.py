"""Batches and single images split over devices, in processes with up to eight of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcrf
from jaxcrf.filters.halo import evenly, place, read_sharding, splits
from processes import last_line, run_program

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
image = jnp.asarray(rng.uniform(0, 255, (8, 9, 10, 3)), jnp.float32)
logits = jnp.asarray(rng.normal(size=(8, 9, 10, 3)), jnp.float32)
weights = jnp.array([0.3, 0.5])

def losses(weights, image, logits, **options):
    features = (jaxcrf.position_features((9, 10), 2.0), jaxcrf.bilateral_features(image, None, 60.0))
    K = jaxcrf.filters.Window(features, 3, weights=weights, blur=options.pop("blur")).normalized("symmetric")
    return jnp.sum(jaxcrf.mean_field(logits, [(K, 1.0)], **options).probs[..., 0] ** 2, (-1, -2))

for options in (
    {"blur": 1},
    {"blur": 2, "damping": 0.2},
    {"blur": 1, "num_iterations": 30, "tolerance": 1e-5},
    {"blur": 2, "num_iterations": 60, "gradient": "implicit"},
):
    def run(weights, image, logits):
        return losses(weights, image, logits, **dict(options))

    split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    # One image at a time, since early stopping looks at all images of a batch together.
    alone = jnp.concatenate([run(weights, image[i : i + 1], logits[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(jax.jit(split)(weights, image, logits), alone, rtol=1e-5)

    def total(f, argument):
        return jax.grad(lambda w, u: sum(jnp.sum(part) for part in f(w, u)), argument)

    for argument in (0, 1):  # replicated weights, sharded logits
        found = jax.jit(total(lambda w, u: [split(w, image, u)], argument))(weights, logits)
        loop = lambda w, u: [run(w, image[i : i + 1], u[i : i + 1]) for i in range(8)]
        expected = total(loop, argument)(weights, logits)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
print("eight devices agree")
"""


RECURRENT = """
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
params = jaxcrf.renet_group_init(jax.random.key(0), 2, 3, scale=0.7, patch=(2, 1))
x = rng.normal(size=(4, 5, 6, 2)).astype(np.float32)
mask = np.ones((4, 5, 6), bool)
mask[1, 4:] = mask[2, :, 3:] = False

def values(params, x, mask):
    y = jaxcrf.renet_group(params, x, mask=mask, patch=(2, 1), chunk=2)
    return jnp.sum(y**2, (-3, -2, -1))

split = jax.shard_map(values, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
for f in (values, split):
    def total(params, x, f=f):
        found = f(params, x, mask)
        return found.sum(), found
    found = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)
    if f is values:
        expected = found
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
print("recurrent layers agree")
"""


FULLY_CONNECTED = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxcrf
from jax.sharding import Mesh, PartitionSpec as P

(kind,) = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
image = jnp.asarray(rng.uniform(0, 255, (2, 6, 7, 3)), jnp.float32)
logits = jnp.asarray(rng.normal(size=(2, 6, 7, 3)), jnp.float32)

def run(weights, image, logits):
    features = (jaxcrf.position_features((6, 7), 2.0), jaxcrf.bilateral_features(image, 9.0, 60.0))
    K = jaxcrf.filters.fully_connected(features, kind=kind, weights=weights).normalized("symmetric")
    return jnp.sum(jaxcrf.mean_field(logits, K, num_iterations=2).probs[..., 0] ** 2, (-1, -2))

split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
for f in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2))):
    found, alone = jax.jit(f(split)), jax.jit(f(run))
    weights = jnp.array([0.3, 0.5])
    for a, b in zip(
        jax.tree.leaves(found(weights, image, logits)),
        jax.tree.leaves(alone(weights, image, logits)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print("both devices agree")
"""


SPLIT_IMAGE = r"""
import dataclasses, itertools, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jaxcrf

rng = np.random.default_rng(0)
devices = np.array(jax.devices())
assert len(devices) == 8


def mesh(shape, names):
    return Mesh(devices.reshape(shape), names)


# One sum runs over the same pairs in the same order on one device and on many; what differs is how XLA fuses and
# contracts the arithmetic round it. 200 roundings are what the filters' own suite allows for a sum over a window.
def assert_close(got, expected, roundings=200):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    tolerance = roundings * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def collectives(compiled):
    # Their kinds, and how many numbers the largest result of each has.
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    found = []
    for shapes, name in re.findall(pattern, compiled.as_text()):
        sizes = [np.prod([int(n) for n in s.split(",") if n], dtype=int) for s in re.findall(r"\[([0-9,]*)\]", shapes)]
        found.append((name, max(sizes)))
    return found


def window(image, weights, sharding, size, blur, kind, ndim=2, theta=60.0):
    spatial = image.shape[-1 - ndim : -1]
    features = (
        jaxcrf.position_features(spatial, 2.0),
        jaxcrf.bilateral_features(image, 4.0, theta, spatial_ndim=ndim),
    )
    K = jaxcrf.filters.Window(
        features, size, weights=weights, blur=blur, spatial_ndim=ndim, sharding=sharding
    )
    return K.normalized(kind)
"""

QUICKLY = (
    SPLIT_IMAGE
    + """
# 6 rows and 8 columns on a device, which cells of 4 pixels do not fit: everything that is cut has to move.
split = NamedSharding(mesh((4, 2), ("y", "x")), P("y", "x"))
image = rng.uniform(0, 255, (24, 16, 3)).astype(np.float32)
logits = rng.normal(size=(24, 16, 5)).astype(np.float32)
preset = dataclasses.replace(jaxcrf.presets.get("convcrf"), filter_size=7, normalization="symmetric")
whole, cut = jaxcrf.RefineConfig(preset), jaxcrf.RefineConfig(preset, sharding=split)
compiled = jaxcrf.refine_logits.lower(*jax.device_put((image, logits), split), cut).compile()
found = compiled(*jax.device_put((image, logits), split))
expected = jaxcrf.refine_logits(image, logits, whole)
assert_close(found.probs, expected.probs)
assert found.probs.sharding.is_equivalent_to(split, 3)
# Rows and columns move, and the single numbers of the statistics are reduced; no map is ever brought together.
kinds = collectives(compiled)
assert any(name == "collective-permute" for name, _ in kinds), kinds
assert all(name == "collective-permute" or size == 1 for name, size in kinds), kinds
print("one image on eight devices")
"""
)

WINDOWS = (
    SPLIT_IMAGE
    + """
cases = {
    "rows": ((8,), ("y",), P("y"), (37, 11), 5),
    "both": ((4, 2), ("y", "x"), P("y", "x"), (22, 13), (3, 7)),
    "halos of several blocks": ((8,), ("y",), P("y"), (11, 6), 13),
    "fewer rows than devices": ((8,), ("y",), P("y"), (5, 9), 5),
    "one axis over two of the mesh": ((2, 4), ("a", "b"), P(("a", "b")), (33, 6), 7),
    "a mesh axis to spare": ((2, 4), ("a", "b"), P("b"), (18, 6), 5),
    "batch and rows": ((2, 4), ("n", "y"), P("n", "y"), (2, 18, 7), 5),
    "uneven batch and columns": ((2, 4), ("n", "x"), P("n", None, "x"), (3, 7, 18), 5),
    "batch only": ((8,), ("n",), P("n"), (8, 9, 7), 5),
}
(name,) = sys.argv[1:]
if name == "volume":
    cases[name] = ((2, 2, 2), ("z", "y", "x"), P("z", "y", "x"), (5, 7, 9), 3)
shape, names, spec, size, filter_size = cases[name]
ndim = 3 if name == "volume" else 2
sharding = NamedSharding(mesh(shape, names), spec)
image = rng.uniform(0, 255, (*size, 3)).astype(np.float32)
weights = np.array([0.5, 2.0], np.float32)
q, g = rng.normal(size=(2, *size, 3)).astype(np.float32)

def everything(image, weights, q, s, blur, kind):
    # And the gradients of a bank that two normalisations are merged in.
    K = window(image, weights, s, filter_size, blur, kind, ndim)

    def value(image, weights, q):
        own = window(image, weights, s, filter_size, blur, kind, ndim)
        merged = own + window(image, weights, s, filter_size, blur, "none", ndim)
        assert type(merged) is jaxcrf.filters.Window
        return jnp.vdot(g, merged(q))

    return K(q), K.T(q), K.diagonal(), jax.value_and_grad(value, (0, 1, 2))(image, weights, q)


run = jax.jit(everything, static_argnums=(3, 4, 5))
kinds = [(1, "symmetric"), (4, "before")]
if name == "both":
    kinds += [(1, "none"), (1, "before"), (1, "after"), (4, "none"), (4, "after"), (4, "symmetric")]
for blur, kind in kinds:
    one, many = (run(image, weights, q, s, blur, kind) for s in (None, sharding))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert_close(a, b, 1000)  # gradients of weights are sums over all pixels as well
# Outside of jit as well.
assert_close(*(window(image, weights, s, filter_size, 4, "none", ndim)(q) for s in (sharding, None)))
print("one window on eight devices")
"""
)

MEAN_FIELD = (
    SPLIT_IMAGE
    + """
sharding = NamedSharding(mesh((4, 2), ("y", "x")), P("y", "x"))
image = rng.uniform(0, 255, (20, 16, 3)).astype(np.float32)
logits = rng.normal(size=(20, 16, 3)).astype(np.float32)
weights = np.array([0.1, 0.3], np.float32)

for blur, options in (
    (1, {"exclude_self": True}),
    (4, {"exclude_self": True}),
    (4, {"num_iterations": 30, "tolerance": 1e-5, "damping": 0.2}),
    (1, {"num_iterations": 60, "gradient": "implicit"}),
):
    def loss(image, logits, weights, sharding):
        K = window(image, weights, sharding, 5, blur, "symmetric")
        return jnp.sum(jaxcrf.mean_field(logits, [(K, 1.0)], **options).probs[..., 0] ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    placed = jax.device_put((image, logits), sharding)
    compiled = run.lower(*placed, weights, sharding).compile()
    # A few iterations pass on the roundings of the ones before.
    found, expected = compiled(*placed, weights), run(image, logits, weights, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 2000)
    kinds = collectives(compiled)
    assert all(name == "collective-permute" or size <= 2 for name, size in kinds), kinds


def probs(u, sharding):
    return jaxcrf.mean_field(u, window(image, weights, sharding, 5, 4, "none")).probs

both = np.stack([logits, -logits])
one, many = (jax.vmap(lambda u: probs(u, s))(both) for s in (None, sharding))
assert_close(many, one, 2000)
print("mean field on eight devices")
"""
)

REFINE = (
    SPLIT_IMAGE
    + """
typed = jax.make_mesh((4, 2), ("y", "x"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
image = rng.integers(0, 255, (24, 16, 3)).astype(np.uint8)
probs = rng.dirichlet(np.ones(3), (24, 16)).astype(np.float32)
expected = jaxcrf.refine(image, probs)


def check(found, sharding=None):
    # The default preset's scores reach 130, where float32 numbers lie 1.5e-5 apart, and five updates pass that on.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    if sharding is not None:
        assert found.sharding == sharding, found.sharding

for m, spec in (
    (mesh((4, 2), ("y", "x")), P("y", "x", None)),
    (typed, P("y", None, None)),
    (typed, P(None, ("y", "x"), None)),
):
    sharding = NamedSharding(m, spec)
    given = jax.device_put(probs, sharding)
    check(jaxcrf.refine(image, given), sharding)
    with jax.set_mesh(m):
        check(jaxcrf.refine(image, given), sharding)
check(jaxcrf.refine(image, logits=jnp.log(given)), sharding)
sharding = NamedSharding(typed, P("y", "x"))
check(jaxcrf.refine(image, probs, sharding=sharding))
elsewhere = jax.device_put((image, probs), jax.devices()[3])
check(jaxcrf.refine(*elsewhere, sharding=sharding))
check(jax.jit(lambda p: jaxcrf.refine(image, p, sharding=sharding))(probs))
# An axis that does not divide comes back whole.
expected = jaxcrf.refine(image[:23], probs[:23])
check(jaxcrf.refine(image[:23], probs[:23], sharding=sharding), NamedSharding(typed, P(None, "x", None)))
labels = probs.argmax(-1)
expected = jaxcrf.refine(image, labels=labels, num_labels=3)
check(jaxcrf.refine(image, labels=jax.device_put(labels, sharding), num_labels=3))
expected = np.ones((24, 16, 1), np.float32)
check(jaxcrf.refine(image, expected, sharding=sharding))

# Fully connected filters take batches that are split, and no images.
rows = jax.device_put(probs, NamedSharding(typed, P("y")))
try:
    jaxcrf.refine(image, rows, method="densecrf")
except ValueError as error:
    assert "Split batch axes only" in str(error), error
else:
    raise AssertionError("a fully connected filter split an image")
images, batch = np.stack([image, image[::-1]] * 2), np.stack([probs, probs[::-1]] * 2)
for filter in ("dense", "lattice"):
    expected = jaxcrf.refine(images, batch, method="densecrf", filter=filter)
    sharding = NamedSharding(typed, P("y", None, None, None))
    check(jaxcrf.refine(images, jax.device_put(batch, sharding), method="densecrf", filter=filter), sharding)

K = jaxcrf.filters.Window(jaxcrf.bilateral_features(image, 3.0, 60.0), 5, sharding=NamedSharding(typed, P("y")))
try:
    jax.shard_map(lambda q: K(q), mesh=mesh(8, ("y",)), in_specs=P(), out_specs=P())(jnp.asarray(probs))
except ValueError as error:
    assert "inside shard_map over y" in str(error), error
else:
    raise AssertionError("a split filter ran inside shard_map")
print("refine on eight devices")
"""
)


def exhaustive(case):
    return pytest.param(case, marks=pytest.mark.exhaustive)


@pytest.mark.slow
def test_a_sharded_batch_is_a_loop(tmp_path):
    assert last_line(run_program(PROGRAM, tmp_path, devices=8, quickly=True)) == "eight devices agree"


def test_recurrent_layers_of_a_sharded_batch_are_those_of_the_batch(tmp_path):
    assert last_line(run_program(RECURRENT, tmp_path, devices=2, quickly=True)) == "recurrent layers agree"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "lattice", "landmark"])
def test_fully_connected_filters_are_split_too(kind, tmp_path):
    assert (
        last_line(run_program(FULLY_CONNECTED, tmp_path, kind, devices=2, quickly=True))
        == "both devices agree"
    )


def test_an_image_is_refined_on_eight_devices_by_moving_rows_alone(tmp_path):
    assert last_line(run_program(QUICKLY, tmp_path, devices=8, quickly=True)) == "one image on eight devices"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        exhaustive("rows"),
        "both",
        "halos of several blocks",
        exhaustive("fewer rows than devices"),
        "one axis over two of the mesh",
        exhaustive("a mesh axis to spare"),
        exhaustive("batch and rows"),
        "uneven batch and columns",
        exhaustive("batch only"),
        "volume",
    ],
)
def test_a_window_over_a_split_image_is_the_whole_one(case, tmp_path):
    assert (
        last_line(run_program(WINDOWS, tmp_path, case, devices=8, quickly=True))
        == "one window on eight devices"
    )


@pytest.mark.slow
def test_mean_field_over_a_split_image_is_that_over_the_whole_one(tmp_path):
    assert (
        last_line(run_program(MEAN_FIELD, tmp_path, devices=8, quickly=True)) == "mean field on eight devices"
    )


@pytest.mark.slow
def test_refine_takes_splits_of_all_forms(tmp_path):
    assert last_line(run_program(REFINE, tmp_path, devices=8, quickly=True)) == "refine on eight devices"


class TestOnOneDevice:
    """What needs no second device."""

    @pytest.fixture
    def mesh(self):
        return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("y", "x"))

    def test_shardings_are_read_axis_by_axis(self, mesh):
        found = read_sharding(NamedSharding(mesh, PartitionSpec(None, ("y", "x"))), 3)
        assert tuple(found.spec) == (None, ("y", "x"), None)
        assert not splits(found)  # one device holds it all
        assert tuple(evenly(found, (3, 4, 5)).spec) == (None, ("y", "x"), None)
        typed = jax.make_mesh((1,), ("y",), axis_types=(jax.sharding.AxisType.Explicit,))
        assert set(read_sharding(NamedSharding(typed, PartitionSpec("y")), 1).mesh.axis_types) == {
            jax.sharding.AxisType.Auto
        }

    def test_a_label_axis_may_be_named_whole_but_not_split(self, mesh):
        assert len(read_sharding(NamedSharding(mesh, PartitionSpec("y", None, None)), 2).spec) == 2
        with pytest.raises(ValueError, match=r"splits axis 2.*labels stay together"):
            read_sharding(NamedSharding(mesh, PartitionSpec(None, None, "x")), 2)

    @pytest.mark.parametrize("sharding", [PartitionSpec("y"), "rows", 8])
    def test_what_is_no_sharding_is_refused(self, sharding):
        image, probs = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 2), 0.5, np.float32)
        with pytest.raises(TypeError, match=r"sharding: got .*NamedSharding over a mesh of devices"):
            jaxcrf.refine(image, probs, sharding=sharding)
        with pytest.raises(TypeError, match="sharding: got"):
            jaxcrf.filters.Window(np.zeros((4, 5, 1)), 3, sharding=sharding)

    def test_entries_that_are_no_mesh_axes_are_refused(self, mesh):
        with pytest.raises(ValueError, match="expected mesh axes or None"):
            read_sharding(NamedSharding(mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED)), 2)

    def test_tracers_are_left_where_they_are(self, mesh):
        rows = NamedSharding(mesh, PartitionSpec("y"))
        assert jax.jit(lambda x: place(x, rows))(jnp.ones(3)).shape == (3,)

    def test_maps_of_another_size_are_refused(self, mesh):
        K = jaxcrf.filters.Window(np.zeros((4, 5, 1)), 3, sharding=NamedSharding(mesh, PartitionSpec("y")))
        for wrong in (np.zeros(3, np.float32), np.zeros((5, 4, 2), np.float32)):
            with pytest.raises(ValueError, match="q: got shape"):
                K(wrong)

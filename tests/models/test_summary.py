import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxcrf
from jaxcrf import models
from jaxcrf.models import ModelConfig
from jaxcrf.models.operations import Operations, count_operations
from jaxcrf.models.resnet import ResNet
from jaxcrf.models.vgg import VGG16


def count(f, *args):
    return count_operations(jax.make_jaxpr(f)(*args))


# As published, for classification at 224 × 224 pixels, without the layers behind the last pool or stage: VGG-16 has
# 15,470,264,320 multiply-adds with three of 25088, 4096 and 4096 inputs; ResNets 4.089 and 7.801 billion with one.
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda rngs: VGG16(output_stride=32, rngs=rngs), 15_470_264_320 - 4096 * (25088 + 4096 + 1000)),
        (lambda rngs: ResNet(50, output_stride=32, rngs=rngs), 4_089_184_256 - 2048 * 1000),
        pytest.param(
            lambda rngs: ResNet(101, output_stride=32, rngs=rngs),
            7_801_405_440 - 2048 * 1000,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["vgg16", "resnet50", "resnet101"],
)
def test_backbones_cost_what_is_published(make, expected):
    definition, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def forward(state, images):
        network = nnx.merge(definition, state)
        network.eval()
        return network(images)

    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    assert count(forward, state, images) == Operations(2 * 2 * expected, False)


# The figures of Table 2 of the DeepLab paper, in millions.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("deeplab_7x7", 134.3), ("deeplab", 65.1), ("deeplab_4x4", 65.1), ("deeplab_largefov", 20.5)],
)
def test_parameters_are_the_papers(name, expected):
    found = models.summary(ModelConfig.of(name, 21), (33, 33))
    assert round(found.parameters / 1e6, 1) == expected
    assert found.parameters == sum(found.parts.values())
    assert set(found.parts) == {"backbone", "fc6", "fc7", "classifier"}


def test_a_summary_by_hand():
    class Tiny(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.classifier = nnx.Conv(8, 5, (1, 1), rngs=rngs)

        def __call__(self, images):
            return self.classifier(nnx.relu(self.norm(self.body(images))))

    model = Tiny(nnx.Rngs(0))
    found = models.summary(model, (10, 12), batch_size=4)
    assert found.name == "Tiny"
    assert (found.input_shape, found.output_shape) == ((4, 10, 12, 3), (4, 5, 6, 5))
    assert found.parts == {"body": 9 * 3 * 8 + 8, "norm": 16, "classifier": 8 * 5 + 5}
    assert found.flops == 2 * 4 * 5 * 6 * (9 * 3 * 8 + 8 * 5)
    lines = str(found).splitlines()
    assert lines[0] == "Tiny: 4 × 10 × 12 × 3 → 4 × 5 × 6 × 5"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-2].split() == ["parameters", "285"]
    assert lines[-1].split() == ["GFLOPs", "0.0000614"]
    # The model itself is as it was.
    assert not model.norm.use_running_average


def test_models_with_crfs_show_their_networks():
    options = {"width": 4, "blocks": [0, 0, 0], "in_channels": 4}
    found = models.summary(ModelConfig.of("small_fcn", 3, refine="gaussian_crf", **options), (9, 10))
    plain = models.summary(ModelConfig.of("small_fcn", 3, **options), (9, 10))
    assert found.input_shape == (1, 9, 10, 4)
    assert {f"unary/{part}": n for part, n in plain.parts.items()}.items() < found.parts.items()
    assert {"crf", "pairwise"} < set(found.parts)
    assert found.flops > plain.flops


def test_bad_input():
    config = ModelConfig.of("small_fcn", 3)
    with pytest.raises(TypeError, match="model: got 'small_fcn'; expected a module or a configuration"):
        models.summary("small_fcn")
    for size in ((3, 4, 5), (0, 4), (3.5, 4)):
        with pytest.raises(ValueError, match="size: got"):
            models.summary(config, size)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        models.summary(config, batch_size=0)


class TestCounting:
    a, b = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
    product = 2 * 7 * 3 * 4 * 5

    def test_products(self):
        assert count(lambda a, b: jnp.tanh(a @ b) + 1, self.a, self.b) == Operations(self.product, False)
        assert count(lambda x: jnp.einsum("hwc,hwd->cd", x, x), jnp.ones((3, 5, 4))).flops == 2 * 15 * 16

    def test_whatever_calls(self):
        product = lambda a, b: a @ b  # noqa: E731
        custom = jax.custom_vjp(product)
        custom.defvjp(lambda a, b: (a @ b, b), lambda b, g: (g @ b.swapaxes(-1, -2), None))
        for f in (jax.jit(product), jax.checkpoint(product), custom):
            assert count(f, self.a, self.b).flops == self.product
        # Forward, and once for the derivative by each of both.
        assert count(
            jax.grad(lambda a, b: (jax.jit(product)(a, b) ** 2).sum(), (0, 1)), self.a, self.b
        ).flops == (3 * self.product)

    def test_loops(self):
        square = jnp.ones((4, 4))
        fixed = lambda x: lax.fori_loop(0, 6, lambda _, x: x @ square, x)  # noqa: E731
        assert count(fixed, square) == Operations(6 * 128, False)
        mapped = lambda x: lax.map(lambda row: row @ square, x)  # noqa: E731
        assert count(mapped, jnp.ones((5, 4))) == Operations(5 * 32, False)
        until = lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ square, x)  # noqa: E731
        assert count(jax.jit(until), square) == Operations(128, True)

    def test_of_branches_the_dearest(self):
        x = jnp.ones((4, 4))
        assert (
            count(lambda p, x: lax.cond(p, lambda x: x @ x, lambda x: (x @ x) @ x, x), True, x).flops == 256
        )

    # What a derivative multiplies is what the forward pass does, pair by pair.
    @pytest.mark.parametrize("strides", [1, 2, 4])
    @pytest.mark.parametrize("dilation", [1, 3])
    def test_convolutions(self, strides, dilation):
        x, kernel = jnp.ones((2, 8, 12, 6)), jnp.ones((3, 5, 3, 8))

        def convolve(x, kernel):
            return lax.conv_general_dilated(
                x,
                kernel,
                (strides, strides),
                [(7, 9), (12, 14)],
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2,
            )

        shape = jax.eval_shape(convolve, x, kernel).shape
        once = 2 * np.prod(shape) * 3 * 5 * 3
        assert count(convolve, x, kernel).flops == once
        by_kernel = jax.grad(lambda kernel: convolve(x, kernel).sum())
        assert count(by_kernel, kernel).flops == 2 * once

    @pytest.mark.parametrize("strides", [1, 2, 4])
    def test_transposed_convolutions_do_not_multiply_zeros(self, strides):
        x, kernel = jnp.ones((2, 8, 12, 3)), jnp.ones((4, 4, 3, 5))
        f = lambda x: lax.conv_transpose(x, kernel, (strides, strides), "SAME").sum()  # noqa: E731
        # Every input pixel meets every tap; at the border there are pairs with the padding instead.
        assert count(f, x).flops == 2 * (2 * 8 * 12) * 16 * 3 * 5

    def test_factorisations(self):
        matrix, right = jnp.eye(6), jnp.ones((6, 2))
        assert count(lax.linalg.cholesky, matrix).flops == 72
        assert count(lambda m: lax.linalg.lu(m)[0], matrix).flops == 144
        solve = lambda m, b: lax.linalg.triangular_solve(m, b, left_side=True, lower=True)  # noqa: E731
        assert count(solve, matrix, right).flops == 72

    def test_linear_solves_count_only_what_runs(self):
        matrix = jnp.eye(6)

        def solve(b):
            product = lambda x: matrix @ x  # noqa: E731
            return lax.custom_linear_solve(product, b, lambda _, b: product(product(b)), symmetric=True)

        # The products with the matrix and the solve of the transposed system are for derivatives.
        assert count(solve, jnp.ones(6)).flops == 2 * 72

    @pytest.mark.parametrize("solver", ["direct", "cg"])
    def test_iterative_solvers_have_no_end(self, solver):
        embeddings, unary = jnp.ones((4, 5, 3, 2)), jnp.ones((4, 5, 3))

        def solve(embeddings):
            return jaxcrf.gaussian_crf(
                embeddings, unary, kind="general", regularization=1.0, solver=solver
            ).scores

        found = count(solve, embeddings)
        assert found.is_lower_bound == (solver == "cg")
        # At least a product with Aᵀ and one with A.
        assert found.flops >= 2 * 2 * 60 * 2

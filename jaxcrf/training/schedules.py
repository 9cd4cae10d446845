r"""The papers' learning rates and optimisers, built from Optax.

| paper | optimiser | momentum | weight decay | learning rate | iterations | batch |
|---|---|---|---|---|---|---|
| ConvCRF, §5 | Adam | 0.9, 0.999 ¹ | 5e-4, L2 on kernels | 5e-5 · ((1 - t/T)^0.9)² | 200 epochs; end to end 250 | 16 |
| CRF-as-RNN, ConvCRF's baseline | SGD | 0.99 ² | 5e-4 ² | 1e-13, constant, for a sum over pixels | ³ | 1 |
| dense Gaussian CRF, §4 | SGD ¹ | 0.9 ¹ | 5e-4 ¹ | 1e-3, 1e-3, 2.5e-4 (phases) · (1 - t/T)^0.9 | 20 000 each | 10 |
| DeepLab, §4 | SGD | 0.9 | 5e-4 | 1e-3 (last layer 1e-2), · 0.1 every 2000 | ³ | 20 |
| Deep Parsing Network, §3.3 | SGD ¹ | 0.9 ¹ | 5e-4 ¹ | ¹ 1e-3, · 0.1 every 2000 | ³ | 10 |
| H-ReNet, §4.2 | SGD | 0.9 ¹ | 5e-4 ¹ | 1e-3, ÷ 10 halfway | 12 000 ⁴, 30 000, 40 000 | 10 |
| H-ReNet with COCO | SGD | 0.9 ¹ | 5e-4 ¹ | 1e-3, ÷ 10 every 50 000 | 120 000, then 30 000 on VOC | 10 |

¹ The paper does not say. For Adam these are its authors' values; for networks that were fine-tuned from VGG-16 or
ResNet-101 in Caffe, DeepLab's, which was the usual recipe. The Deep Parsing Network's paper gives no rate at all.
² Of Zheng et al., *Conditional Random Fields as Recurrent Neural Networks*, 2015, whose protocol ConvCRF's baseline
"strictly follows". ³ Not given. ⁴ The baseline without recurrent layers, the H-ReNet, and that with its multi-layer
combination.

Two things that share a name with something else:

*L2 under Adam is not AdamW.* ConvCRF adds `λ w` to the gradient, before Adam's moments, as PyTorch's
`Adam(weight_decay=λ)` does. Adam then divides it by the gradient's magnitude along with the rest, so that weights with
large gradients decay less; AdamW takes `η λ w` off afterwards. With the same `λ` these are different amounts, by orders
of magnitude.

*Momentum takes up the rate before or after.* The papers' SGD is that of Krizhevsky et al. and of Caffe,

.. math::
    v \leftarrow \mu v + \eta\, (g + \lambda w), \qquad w \leftarrow w - v,

with the rate `η` inside the velocity. Optax's `sgd` and PyTorch's multiply by it outside, `v ← μ v + g`, `w ← w - η v`.
While `η` is constant, both take the same steps. Where it drops to a tenth, outside, the next step is at once ten times
shorter; inside, the velocity has been gathered at the old rate and takes some `1 / (1 - μ) = 10` steps to shrink. `sgd`
here is the papers'.

Schedules are functions of the step, counted from 0, that run under `jax.jit`; past their end they keep their last
value.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcrf import _checks

Schedule: TypeAlias = Callable[[Any], Any]

# The polynomial decay of DeepLab-v2 and what follows it.
POLYNOMIAL_POWER = 0.9


def polynomial_decay(initial: float, num_steps: int, power: float = POLYNOMIAL_POWER) -> Schedule:
    r"""A rate that falls to zero, `η₀ (1 - t/T)^power`.

    Args:
        initial: `η₀`.
        num_steps: `T`; the rate is 0 from there on.
        power: 1 is a straight line, more falls faster at first.

    Returns:
        The schedule.

    Raises:
        ValueError: if `num_steps` is not at least 1, or `power` not greater than 0.

    Example:
        >>> schedule = polynomial_decay(1e-3, 20_000)
        >>> [round(float(schedule(t)), 7) for t in (0, 10_000, 20_000, 30_000)]
        [0.001, 0.0005359, 0.0, 0.0]

    References:
        Chandra, Usunier and Kokkinos, 2017, §4.
    """
    _check_steps("num_steps", num_steps)
    if not power > 0:
        raise ValueError(f"power: got {power}; expected a number > 0")
    return optax.polynomial_schedule(initial, 0.0, power, num_steps)


def step_decay(initial: float, every: int, factor: float = 0.1, num_steps: int | None = None) -> Schedule:
    r"""A rate that is multiplied by a factor every so many steps, `η₀ · factor^⌊t / every⌋`.

    Args:
        initial: `η₀`.
        every: steps between two changes.
        factor: 0.1 divides by ten.
        num_steps: the length of the training, after which nothing changes any more; None for no end.

    Returns:
        The schedule.

    Raises:
        ValueError: if `every` or `num_steps` is not at least 1, or `factor` not in `(0, 1]`.

    Example:
        >>> schedule = step_decay(1e-3, 2000)
        >>> [round(float(schedule(t)), 9) for t in (0, 1999, 2000, 4000)]
        [0.001, 0.001, 0.0001, 1e-05]

    References:
        Chen et al., 2015, §4.
    """
    _check_steps("every", every)
    if not 0 < factor <= 1:
        raise ValueError(f"factor: got {factor}; expected a number in (0, 1]")
    last = None if num_steps is None else _check_steps("num_steps", num_steps) - 1

    def schedule(step: Any) -> Array:
        # In whole numbers: compiled, a floating-point `step / every` becomes a product with the rounded `1 / every`,
        # whose floor is one less than it should be at the multiples of one in eight `every`.
        times = (step if last is None else jnp.minimum(step, last)) // every
        return initial * jnp.power(factor, jnp.asarray(times, float))

    return schedule


def warmup(schedule: Schedule, num_steps: int) -> Schedule:
    r"""A schedule whose first steps are shortened, `η(t) · min(1, (t + 1) / T)`.

    None of the papers needs it, since all start from trained networks; one that starts from noise does.

    Args:
        schedule: `η`, whose own course is not shifted.
        num_steps: `T`.

    Returns:
        The schedule.

    Raises:
        ValueError: if `num_steps` is not at least 1.

    Example:
        >>> schedule = warmup(optax.constant_schedule(1.0), 4)
        >>> [float(schedule(t)) for t in (0, 1, 3, 100)]
        [0.25, 0.5, 1.0, 1.0]
    """
    _check_steps("num_steps", num_steps)
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / num_steps)


def schedule_convcrf(max_steps: int, *, learning_rate: float = 5e-5) -> Schedule:
    """ConvCRF's, `5e-5 · ((1 - step/max_steps)^0.9)²`.

    Example:
        >>> schedule = schedule_convcrf(1000)
        >>> [round(float(schedule(t)), 9) for t in (0, 500, 1000)]
        [5e-05, 1.4359e-05, 0.0]

    References:
        Teichmann and Cipolla, 2018, §5.
    """
    return polynomial_decay(learning_rate, max_steps, 2 * POLYNOMIAL_POWER)


def schedule_dense_gaussian_crf(
    phase: Literal[1, 2, 3], *, num_steps: int = 20_000, learning_rate: float | None = None
) -> Schedule:
    """The dense Gaussian CRF's in one of its phases, `η₀ (1 - t/T)^0.9`.

    Args:
        phase: 1 trains the unary, 2 the pairwise stream, 3 both.
        num_steps: `T`.
        learning_rate: `η₀`; None for the phase's, 1e-3, 1e-3 or 2.5e-4.

    Example:
        >>> [round(float(schedule_dense_gaussian_crf(phase)(0)), 7) for phase in (1, 2, 3)]
        [0.001, 0.001, 0.00025]

    References:
        Chandra, Usunier and Kokkinos, 2017, §4.
    """
    rates = {1: 1e-3, 2: 1e-3, 3: 2.5e-4}
    if phase not in rates:
        raise ValueError(f"phase: got {phase!r}; expected 1 (unary), 2 (pairwise) or 3 (both)")
    return polynomial_decay(rates[phase] if learning_rate is None else learning_rate, num_steps)


def schedule_deeplab(*, learning_rate: float = 1e-3, every: int = 2000) -> Schedule:
    """DeepLab's, `1e-3 · 0.1^⌊t / 2000⌋`; its last layer learns ten times as fast.

    Example:
        >>> round(float(schedule_deeplab()(2000)), 9)
        0.0001

    References:
        Chen et al., 2015, §4.
    """
    return step_decay(learning_rate, every)


def schedule_hrenet(
    num_steps: int = 30_000, *, learning_rate: float = 1e-3, every: int | None = None
) -> Schedule:
    """H-ReNet's, divided by ten in the middle of the training.

    Args:
        num_steps: 12 000 for the baseline, 30 000 for the H-ReNet, 40 000 with the multi-layer combination.
        learning_rate: the rate to begin with.
        every: steps between divisions; None for half of `num_steps`. Pre-training with COCO has
            `num_steps=120_000, every=50_000`.

    Example:
        >>> schedule = schedule_hrenet()
        >>> [round(float(schedule(t)), 9) for t in (0, 14_999, 15_000, 30_000)]
        [0.001, 0.001, 0.0001, 0.0001]

    References:
        Yan et al., *Combining the Best of Convolutional Layers and Recurrent Layers: A Hybrid Network for
        Semantic Segmentation*, 2016, §4.2.
    """
    _check_steps("num_steps", num_steps)
    return step_decay(learning_rate, -(-num_steps // 2) if every is None else every, num_steps=num_steps)


def kernels(params: Any) -> Any:
    """Marks the parameters that weight decay is for: those named `kernel`.

    In Flax these are the weights of convolutions and linear layers, and neither biases, nor the scales of
    normalisations, nor the parameters of a CRF, which L2 would pull towards no CRF at all.

    Args:
        params: a pytree with names: an NNX state, nested dictionaries, or a dictionary by paths `a/b/kernel`.

    Returns:
        The same tree of booleans, a mask for Optax.

    Example:
        >>> kernels({"conv": {"kernel": 1.0, "bias": 2.0}, "head/kernel": 3.0})
        {'conv': {'bias': False, 'kernel': True}, 'head/kernel': True}
    """

    def named_kernel(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        # An NNX variable's array is its attribute `value`, and the last key of the path.
        name = "/".join(names).removesuffix("/value")
        return name.rpartition("/")[2] == "kernel"

    return jax.tree.map_with_path(named_kernel, params)


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    mask: Any = kernels,
) -> optax.GradientTransformation:
    r"""Stochastic gradient descent with momentum as the papers have it, the rate inside the velocity.

    .. math::
        v \leftarrow \mu v + \eta_t\, (g + \lambda w), \qquad w \leftarrow w - v.

    Args:
        learning_rate: `η`, a number or a schedule.
        momentum: `μ`.
        weight_decay: `λ`.
        mask: which parameters decay: a tree of booleans, or a function that makes it of the parameters.

    Returns:
        The optimiser.

    Example:
        >>> optimizer = sgd(0.1, weight_decay=0.0)
        >>> params = {"kernel": jnp.ones(1)}
        >>> state = optimizer.init(params)
        >>> for _ in range(2):
        ...     updates, state = optimizer.update({"kernel": jnp.ones(1)}, state, params)
        >>> updates["kernel"].round(4)  # -(0.9 · 0.1 + 0.1)
        Array([-0.19], dtype=float32)

    References:
        Krizhevsky, Sutskever and Hinton, *ImageNet Classification with Deep Convolutional Neural Networks*,
        2012, §5.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum),
    )


def adam(
    learning_rate: float | Schedule, *, weight_decay: float = 5e-4, mask: Any = kernels
) -> optax.GradientTransformation:
    """Adam on the gradient of the loss plus `½ λ ‖w‖²`, which is not AdamW (see above).

    Args:
        learning_rate: a number or a schedule.
        weight_decay: `λ`.
        mask: which parameters decay: a tree of booleans, or a function that makes it of the parameters.

    Returns:
        The optimiser.

    Example:
        >>> optimizer = adam(0.1, weight_decay=0.5)
        >>> params = {"kernel": 4 * jnp.ones(1), "bias": 4 * jnp.ones(1)}
        >>> zero = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = optimizer.update(zero, optimizer.init(params), params)
        >>> updates["kernel"].round(3), updates["bias"].round(3)  # a full step, whatever the kernel's size
        (Array([-0.1], dtype=float32), Array([-0.], dtype=float32))
    """
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.adam(learning_rate))


def optimizer_convcrf(
    max_steps: int, *, learning_rate: float = 5e-5, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
    """ConvCRF's: `adam` with L2 on the kernels, after `schedule_convcrf`.

    Args:
        max_steps: of the whole training; 200 epochs of 10 382 images in batches of 16 are 129 775.
        learning_rate: the rate to begin with.
        weight_decay: of the kernels.

    Returns:
        The optimiser.

    Example:
        >>> optimizer = optimizer_convcrf(129_775)

    References:
        Teichmann and Cipolla, 2018, §5.
    """
    return adam(schedule_convcrf(max_steps, learning_rate=learning_rate), weight_decay=weight_decay)


def optimizer_crf_as_rnn(
    *, learning_rate: float = 1e-13, momentum: float = 0.99, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
    """CRF-as-RNN's, which ConvCRF compares its own training with: `sgd` at a constant, tiny rate.

    The rate belongs to batches of one image and a loss that is summed over pixels,
    `cross_entropy(…, reduction="sum")`; with a mean nothing would move.

    Example:
        >>> optimizer = optimizer_crf_as_rnn()

    References:
        Teichmann and Cipolla, 2018, supplement; Zheng et al., 2015.
    """
    return sgd(learning_rate, momentum=momentum, weight_decay=weight_decay)


def optimizer_dense_gaussian_crf(
    phase: Literal[1, 2, 3],
    *,
    num_steps: int = 20_000,
    learning_rate: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> optax.GradientTransformation:
    """The dense Gaussian CRF's in one of its phases: `sgd` after `schedule_dense_gaussian_crf`.

    Example:
        >>> unary, pairwise, joint = (optimizer_dense_gaussian_crf(phase) for phase in (1, 2, 3))

    References:
        Chandra, Usunier and Kokkinos, 2017, §4.
    """
    schedule = schedule_dense_gaussian_crf(phase, num_steps=num_steps, learning_rate=learning_rate)
    return sgd(schedule, momentum=momentum, weight_decay=weight_decay)


def optimizer_deeplab(
    *,
    learning_rate: float = 1e-3,
    every: int = 2000,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> optax.GradientTransformation:
    """DeepLab's: `sgd` after `schedule_deeplab`.

    The factor of ten for the last layer is not in here: multiply the updates of that layer by it, as
    `jaxcrf.training.Update(…, learning_rates={"classifier/*": 10.0})` does.

    Example:
        >>> optimizer = optimizer_deeplab()

    References:
        Chen et al., 2015, §4.
    """
    schedule = schedule_deeplab(learning_rate=learning_rate, every=every)
    return sgd(schedule, momentum=momentum, weight_decay=weight_decay)


def optimizer_deep_parsing_network(
    *,
    learning_rate: float = 1e-3,
    every: int = 2000,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> optax.GradientTransformation:
    """The Deep Parsing Network's, for one of its four stages: DeepLab's, since its paper gives no numbers.

    Each stage begins anew, with a schedule and a velocity of its own.

    Example:
        >>> stages = [optimizer_deep_parsing_network() for _ in range(4)]

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §3.3 (stages and batch only).
    """
    return optimizer_deeplab(
        learning_rate=learning_rate, every=every, momentum=momentum, weight_decay=weight_decay
    )


def optimizer_hrenet(
    num_steps: int = 30_000,
    *,
    learning_rate: float = 1e-3,
    every: int | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> optax.GradientTransformation:
    """H-ReNet's: `sgd` after `schedule_hrenet`.

    Example:
        >>> pascal, coco = optimizer_hrenet(), optimizer_hrenet(120_000, every=50_000)

    References:
        Yan et al., 2016, §4.2.
    """
    schedule = schedule_hrenet(num_steps, learning_rate=learning_rate, every=every)
    return sgd(schedule, momentum=momentum, weight_decay=weight_decay)


def _check_steps(name: str, steps: Any) -> int:
    if not _checks.is_whole(steps) or steps < 1:
        raise ValueError(f"{name}: got {steps!r}; expected a whole number of steps >= 1")
    return int(steps)

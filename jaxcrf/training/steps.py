"""The jitted step: gradients over a mesh of devices, an optimiser's update, a guard against NaN."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcrf.metrics import confusion_matrix
from jaxcrf.models.parameters import is_key, named_leaves, split, with_leaves
from jaxcrf.training.updates import Batch, Outcome, Update, select

DATA_AXIS = "data"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training: a pytree, the same on every device.

    Attributes:
        step: updates made so far, of all kinds.
        params: the parameters by path, in the dtype they were made in, as a rule float32.
        variables: what else the model holds: statistics of batch normalisation, random streams.
        optimizers: the states of the optimisers in use, by the name of their update.
        average: the exponential moving average of the parameters; None if none is kept.
        failed: whether a loss or gradient was not finite. From then on no step changes anything.
    """

    step: Array
    params: dict[str, Array]
    variables: dict[str, Array]
    optimizers: dict[str, Any]
    average: dict[str, Array] | None
    failed: Array

    @property
    def evaluated(self) -> dict[str, Array]:
        """The parameters that are evaluated and handed on: the average where one is kept."""
        return self.params if self.average is None else self.average


class Report(NamedTuple):
    """What one step tells, on the device.

    Attributes:
        loss: the loss before the update.
        gradient_norm: the Euclidean norm of all gradients, before any clipping.
        finite: whether both are finite.
        figures: the loss function's own scalars.
        confusion: the batch's confusion matrix, rows the truth; None if the loss gave no logits.
    """

    loss: Array
    gradient_norm: Array
    finite: Array
    figures: dict[str, Array]
    confusion: Array | None


class Template:
    """A model without its arrays: what turns the arrays of a `TrainState` back into a module.

    Args:
        model: the module. It is not changed.

    Example:
        >>> template = Template(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> sorted(template.params)
        ['bias', 'kernel']
        >>> template.build(template.params, template.variables)(jnp.ones((1, 2))).shape
        (1, 3)
    """

    def __init__(self, model: nnx.Module):
        self._model = nnx.clone(model)
        self._definitions: dict[tuple[str, ...], Any] = {}
        _, params, variables = split(self._model)
        self.params, self.variables = named_leaves(params), named_leaves(variables)
        self._states = tuple(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
            for state in (params, variables)
        )

    def build(
        self,
        params: Mapping[str, Array],
        variables: Mapping[str, Array],
        *,
        evaluating: tuple[str, ...] = ("*",),
    ) -> nnx.Module:
        """The module with these arrays, in training mode but for the modules that match `evaluating`."""
        states = (
            with_leaves(state, leaves)
            for state, leaves in zip(self._states, (params, variables), strict=True)
        )
        return nnx.merge(self._definition(evaluating), *states)

    def _definition(self, evaluating: tuple[str, ...]) -> Any:
        if evaluating not in self._definitions:
            copy = nnx.clone(self._model)
            copy.train()
            modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(copy)}
            if evaluating == ("*",):
                copy.eval()
            else:
                for path in select(modules, evaluating, "evaluating", "modules"):
                    modules[path].eval()
            self._definitions[evaluating] = split(copy)[0]
        return self._definitions[evaluating]


def data_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of devices that share out the examples of a batch.

    Args:
        num_devices: how many, of all processes together; None for all there are.

    Returns:
        A mesh with one axis, `data`.

    Raises:
        ValueError: if there are fewer devices.

    Example:
        >>> data_mesh(1).axis_names
        ('data',)
    """
    devices = jax.devices()
    wanted = len(devices) if num_devices is None else num_devices
    if not 1 <= wanted <= len(devices):
        raise ValueError(
            f"num_devices: got {wanted}, but JAX sees {len(devices)} ({devices[0].platform}); ask for at most that "
            "many. On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N in the environment makes N of it."
        )
    return jax.make_mesh((wanted,), (DATA_AXIS,), (AxisType.Auto,), devices=devices[:wanted])


def init_state(template: Template, *, average: bool = False) -> TrainState:
    """The state before the first step, with no optimiser in use yet.

    Args:
        template: the model's; its arrays are copied.
        average: whether an average of the parameters is to be kept.

    Returns:
        The state.

    Example:
        >>> state = init_state(Template(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
        >>> state.step.item(), state.optimizers
        (0, {})
    """
    # Copies, because steps give their state's buffers away.
    copy = lambda leaves: {path: jnp.copy(leaf) for path, leaf in leaves.items()}  # noqa: E731
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copy(template.params),
        variables=copy(template.variables),
        optimizers={},
        average=copy(template.params) if average else None,
        failed=jnp.zeros((), bool),
    )


def with_optimizers(state: TrainState, updates: Mapping[str, Update]) -> TrainState:
    """The state with the optimisers of these updates: new ones start, those of no further use are dropped.

    Args:
        state: the state.
        updates: the updates that will be made from now on, by name.

    Returns:
        The state; parameters and the other optimisers are untouched.

    Raises:
        ValueError: if a pattern of an update matches no parameter.

    Example:
        >>> state = init_state(Template(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
        >>> update = Update("all", loss=lambda model, batch: None, optimizer=optax.sgd(0.1, momentum=0.9))
        >>> list(with_optimizers(state, {"all": update}).optimizers)
        ['all']
    """
    optimizers = {
        name: state.optimizers[name]
        if name in state.optimizers
        else update.transformation().init(_chosen(state.params, update))
        for name, update in updates.items()
    }
    return dataclasses.replace(state, optimizers=optimizers)


def make_step(
    template: Template,
    update: Update,
    *,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    compute_dtype: Any = None,
    average_decay: float | None = None,
    ignore_label: int = 255,
) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
    r"""Compiles one kind of update into a pure function of a state and a batch.

    The batch is split over the devices of the mesh and, on each, over `accumulate` parts that run one after
    the other. With the loss :math:`ℓ_k` of part `k` and the number :math:`n_k` of its pixels that count, what
    is minimised is

    .. math:: \sum_k n_k ℓ_k \Big/ \sum_k n_k ,

    so that a mean over pixels stays the mean over the pixels of the whole batch, however it is split. Batch
    normalisation sees the part of the batch on its device, unless the layer names the axis `data`; its running
    statistics are averaged over the devices. Random streams differ between devices.

    Args:
        template: the model's.
        update: the loss, the parameters it moves, the optimiser.
        mesh: with one axis `data`; None for one device.
        accumulate: parts of a device's share of the batch, for less memory.
        compute_dtype: what parameters and images are cast to for the forward and backward pass, as
            `jnp.bfloat16`; the parameters themselves, their gradients and the optimiser keep their dtype.
        average_decay: `d` of the moving average `a ← d a + (1 - d) θ` of the parameters; None for none. During
            the first steps `(1 + step) / (10 + step)` is taken where it is smaller.
        ignore_label: pixels of this label do not count.

    Returns:
        A jitted function `(state, batch) → (state, report)`. The state handed in is used up. If the loss or
        a gradient is not finite the state stays as it was, but for `failed`.

    Raises:
        ValueError: at the first call, if the batch does not divide by the devices and by `accumulate`.

    Example:
        >>> from jaxcrf.training import losses
        >>> class Model(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.conv = nnx.Conv(3, 2, (1, 1), rngs=rngs)
        ...     def __call__(self, images):
        ...         return self.conv(images / 255)
        >>> def loss(model, batch):
        ...     logits = model(batch["image"])
        ...     return Outcome(losses.cross_entropy(logits, batch["labels"]), logits)
        >>> template, update = Template(Model(nnx.Rngs(0))), Update("all", loss, optax.sgd(0.1))
        >>> step = make_step(template, update)
        >>> state = with_optimizers(init_state(template), {"all": update})
        >>> batch = {"image": np.ones((2, 4, 5, 3), np.uint8), "labels": np.ones((2, 4, 5), np.int32)}
        >>> state, report = step(state, batch)
        >>> state.step.item(), report.finite.item(), report.confusion.sum().item()
        (1, True, 40)
    """
    mesh = data_mesh(1) if mesh is None else mesh
    transformation = update.transformation()
    if accumulate < 1:
        raise ValueError(f"accumulate: got {accumulate}; expected at least 1")

    def compute(moving: dict, fixed: dict, variables: dict, batch: Batch, share: Array) -> tuple:
        """A part's share of the loss, with what comes along."""
        params = moving | fixed
        if compute_dtype is not None:
            params, batch = _cast(params, compute_dtype), dict(batch)
            batch["image"] = jnp.asarray(batch["image"]).astype(compute_dtype)
        model = template.build(params, variables, evaluating=update.evaluating)
        outcome = Outcome(*update.loss(model, batch))
        confusion = None
        if outcome.logits is not None and "labels" in batch:
            num_labels = outcome.logits.shape[-1]
            confusion = confusion_matrix(
                batch["labels"], outcome.logits.argmax(-1), num_labels, ignore_label=ignore_label
            )
        loss = outcome.loss.astype(jnp.float32) * share
        figures = {name: value * share for name, value in outcome.figures.items()}
        _, _, variables = split(model)
        return loss, (figures, confusion, named_leaves(variables))

    def on_device(moving: dict, fixed: dict, variables: dict, batch: Batch) -> tuple:
        size = next(iter(batch.values())).shape[0]
        if size % accumulate:
            raise ValueError(
                f"accumulate: got {accumulate}, which does not divide the {size} examples of a device; change it or "
                "the batch size"
            )
        parts = jax.tree.map(lambda x: x.reshape(accumulate, size // accumulate, *x.shape[1:]), dict(batch))
        if "labels" in parts:
            counts = (parts["labels"] != ignore_label).reshape(accumulate, -1).sum(1).astype(jnp.float32)
        else:
            counts = jnp.full(accumulate, size // accumulate, jnp.float32)
        shares = counts / jnp.maximum(lax.psum(counts.sum(), DATA_AXIS), 1)

        here = lax.axis_index(DATA_AXIS)
        keys = {path: leaf for path, leaf in variables.items() if is_key(leaf)}
        variables = variables | {path: jax.random.fold_in(key, here) for path, key in keys.items()}
        differentiated = jax.value_and_grad(compute, has_aux=True)

        def part(variables: dict, inputs: tuple) -> tuple[dict, tuple]:
            batch, share = inputs
            (loss, (figures, confusion, variables)), gradients = differentiated(
                moving, fixed, variables, batch, share
            )
            return variables, (gradients, loss, figures, confusion)

        variables, sums = part(variables, jax.tree.map(lambda x: x[0], (parts, shares)))
        if accumulate > 1:

            def add(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
                variables, sums = carry
                variables, new = part(variables, inputs)
                return (variables, jax.tree.map(jnp.add, sums, new)), None

            rest = jax.tree.map(lambda x: x[1:], (parts, shares))
            (variables, sums), _ = lax.scan(add, (variables, sums), rest)
        variables = {
            path: lax.pmean(leaf, DATA_AXIS) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            for path, leaf in (variables | keys).items()
        }
        return (*lax.psum(sums, DATA_AXIS), variables)

    everywhere, shared_out = PartitionSpec(), PartitionSpec(DATA_AXIS)
    # Replication is not checked statically, so that models need no annotations for scans within them.
    over_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, shared_out),
        out_specs=everywhere,
        check_vma=False,
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Report]:
        moving = _chosen(state.params, update)
        fixed = {path: leaf for path, leaf in state.params.items() if path not in moving}
        gradients, loss, figures, confusion, variables = over_devices(
            moving, fixed, state.variables, dict(batch)
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        changes, optimizer = transformation.update(gradients, state.optimizers[update.name], moving)
        params = state.params | optax.apply_updates(moving, changes)
        average = state.average
        if average_decay is not None and average is not None:
            decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
            average = optax.incremental_update(params, average, 1 - decay)
        new = TrainState(
            step=state.step + 1,
            params=params,
            variables=variables,
            optimizers=state.optimizers | {update.name: optimizer},
            average=average,
            failed=state.failed,
        )
        sound = finite & ~state.failed
        new = jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, state)
        new = dataclasses.replace(new, failed=state.failed | ~finite)
        return new, Report(loss, norm, finite, figures, confusion)

    return jax.jit(step, donate_argnums=0)


def make_predict(template: Template, *, mesh: Mesh | None = None) -> Callable[[dict, dict, Any], Array]:
    """Compiles the model in evaluation mode into a function of its arrays and images.

    Args:
        template: the model's.
        mesh: with one axis `data`, over which the images are split; None for one device.

    Returns:
        A jitted function `(params, variables, images) → logits`.

    Example:
        >>> template = Template(nnx.Conv(3, 2, (1, 1), rngs=nnx.Rngs(0)))
        >>> predict = make_predict(template)
        >>> predict(template.params, template.variables, np.ones((1, 4, 5, 3), np.float32)).shape
        (1, 4, 5, 2)
    """
    mesh = data_mesh(1) if mesh is None else mesh

    def on_device(params: dict, variables: dict, images: Array) -> Array:
        return template.build(params, variables)(images)

    everywhere, shared_out = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(everywhere, everywhere, shared_out),
            out_specs=shared_out,
            check_vma=False,
        )
    )


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, Array]:
    """Moves a process's part of a batch onto its devices of the mesh.

    Args:
        batch: NumPy arrays whose first axis is the examples of this process.
        mesh: with one axis `data`.

    Returns:
        Arrays of the whole batch, each device holding its part.

    Raises:
        ValueError: if the examples cannot be shared out evenly.

    Example:
        >>> put_batch({"labels": np.zeros((2, 4, 5), np.int32)}, data_mesh(1))["labels"].shape
        (2, 4, 5)
    """
    size = len(next(iter(batch.values())))
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    if local == 0 or size % local:
        raise ValueError(
            f"batch_size: got {size} examples for the {local} devices of this process; expected a multiple"
        )
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays onto all devices of the mesh.

    Example:
        >>> replicate({"w": np.ones(3)}, data_mesh(1))["w"].shape
        (3,)
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> Array:
        if is_key(leaf):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def _chosen(params: Mapping[str, Array], update: Update) -> dict[str, Array]:
    return {path: params[path] for path in select(params, update.trainable)}


def _cast(params: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    return {
        path: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in params.items()
    }

"""What a run will need, before it is started: shapes, parameters, memory, arithmetic."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrf.models.operations import count_operations
from jaxcrf.training.loop import Experiment, check_batches, place_batch
from jaxcrf.training.steps import Template, data_mesh, init_state, make_step, replicate, with_optimizers
from jaxcrf.training.updates import select


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """One kind of update.

    Attributes:
        trained: numbers that it changes.
        arguments: bytes of the parameters, this update's optimiser and a batch on one device.
        temporaries: further bytes on one device while the step runs, as the compiler counts them.
        operations: floating-point operations of a step on one device, forward and backward, as
            `jaxcrf.models.operations.count_operations` counts them.
    """

    trained: int
    arguments: int
    temporaries: int
    operations: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found out.

    Attributes:
        shapes: of a batch's arrays, those of all devices together.
        logits: their shape for one batch.
        params: how many numbers each part of the model holds, by the first part of their path.
        updates: by the name of the update.
        devices: how many.
        num_steps: of the whole protocol.
    """

    shapes: Mapping[str, tuple[int, ...]]
    logits: tuple[int, ...]
    params: Mapping[str, int]
    updates: Mapping[str, UpdatePlan]
    devices: int
    num_steps: int


def plan(experiment: Experiment, *, num_devices: int | None = None) -> Plan:
    """Reads one batch, compiles every kind of update and says what it takes; nothing is trained.

    Args:
        experiment: the run to be.
        num_devices: over how many devices batches are split; None for all.

    Returns:
        The plan.

    Raises:
        ValueError: whatever `train` would refuse to begin with.

    Example:
        >>> import optax
        >>> from jaxcrf.data import Pipeline
        >>> from jaxcrf.models import ModelConfig
        >>> from jaxcrf.training import Stage, Update, objectives
        >>> source = [(np.zeros((16, 24, 3), np.uint8), np.zeros((16, 24), np.int32))] * 2
        >>> experiment = Experiment(
        ...     "test",
        ...     ModelConfig.of("small_fcn", 2, width=8),
        ...     data={"train": Pipeline(source, batch_size=2)},
        ...     stages=[Stage("all", 10, (Update("all", objectives.segmentation(), optax.adam(1e-3)),))],
        ...     validation=None,
        ... )
        >>> found = plan(experiment)
        >>> found.shapes["image"], found.logits, found.updates["all"].trained == sum(found.params.values())
        ((2, 16, 24, 3), (2, 16, 24, 2), True)
    """
    mesh = data_mesh(num_devices)
    check_batches(experiment, mesh)
    template = Template(experiment.create())
    state = init_state(template, average=experiment.average_decay is not None)
    params: dict[str, int] = {}
    for path, leaf in state.params.items():
        part = path.split("/")[0]
        params[part] = params.get(part, 0) + leaf.size
    batches: dict[str, Any] = {}
    for split in {stage.split for stage in experiment.stages}:
        with experiment.data[split].batches() as iterator:
            batches[split] = place_batch(next(iterator), mesh)
    updates: dict[str, UpdatePlan] = {}
    for stage in experiment.stages:
        for update in stage.updates:
            if update.name in updates:
                continue
            step = make_step(template, update, mesh=mesh, **experiment.step_options)
            placed = replicate(with_optimizers(state, {update.name: update}), mesh)
            traced = step.trace(placed, batches[stage.split])  # type: ignore[attr-defined]
            memory = traced.lower().compile().memory_analysis()
            updates[update.name] = UpdatePlan(
                trained=sum(state.params[path].size for path in select(state.params, update.trainable)),
                arguments=memory.argument_size_in_bytes,
                temporaries=memory.temp_size_in_bytes,
                operations=count_operations(traced.jaxpr).flops,
            )
    first = next(iter(batches.values()))
    image = jax.ShapeDtypeStruct(first["image"].shape, jnp.asarray(np.zeros((), np.uint8)).dtype)
    logits = jax.eval_shape(template.build(template.params, template.variables), image)
    return Plan(
        shapes={name: array.shape for name, array in first.items()},
        logits=tuple(logits.shape),
        params=params,
        updates=updates,
        devices=mesh.size,
        num_steps=experiment.num_steps,
    )

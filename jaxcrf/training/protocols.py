"""The papers' training protocols as lists of stages.

| protocol | paper | stages |
|---|---|---|
| `decoupled` | ConvCRF, §5.2; DeepLab | the unary; then the CRF alone, on held-out images |
| `end_to_end` | ConvCRF, §5.3 | the unary; then epochs of unary and joint updates in turn, each followed by the CRF |
| `three_phase` | dense Gaussian CRF, §4 | the unary; the pairwise terms; both |
| `incremental` | Deep Parsing Network, §4.2 | one group of layers after the other; then all |

A stage says what is updated, how often and on which data; nothing else happens in it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxcrf import _checks
from jaxcrf.training.updates import Update


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        name: what the log calls it.
        num_steps: how many updates.
        updates: made in turn, one per step.
        split: which data the batches come from.

    Raises:
        ValueError: if there is no step or no update.

    Example:
        >>> import optax
        >>> unary = Update("unary", loss=lambda model, batch: None, optimizer=optax.adam(1e-3))
        >>> Stage("unary", 1000, (unary,)).update(3).name
        'unary'
    """

    name: str
    num_steps: int
    updates: tuple[Update, ...]
    split: str = "train"

    def __post_init__(self) -> None:
        if not _checks.is_whole(self.num_steps) or self.num_steps < 1:
            raise ValueError(f"num_steps: got {self.num_steps!r} in stage {self.name!r}; expected at least 1")
        if not self.updates:
            raise ValueError(f"updates: got none in stage {self.name!r}; expected at least one Update")

    def update(self, step: int) -> Update:
        """The update of a step, counted from the beginning of the stage."""
        return self.updates[step % len(self.updates)]


class Position(NamedTuple):
    """Where a step lies in a protocol.

    Attributes:
        stage: its number.
        step: the steps of that stage before it.
        batches: how many batches of each split were used before it.
    """

    stage: int
    step: int
    batches: dict[str, int]


def num_steps(stages: Iterable[Stage]) -> int:
    """The steps of all stages together.

    Example:
        >>> update = Update("all", loss=lambda model, batch: None, optimizer=None)
        >>> num_steps([Stage("a", 3, (update,)), Stage("b", 4, (update,))])
        7
    """
    return sum(stage.num_steps for stage in stages)


def locate(stages: Sequence[Stage], step: int) -> Position:
    """Finds a step, counted from the beginning of the protocol, among the stages.

    Args:
        stages: the protocol.
        step: from 0; the number of all steps means the end.

    Returns:
        The position.

    Example:
        >>> update = Update("all", loss=lambda model, batch: None, optimizer=None)
        >>> locate([Stage("a", 3, (update,)), Stage("b", 4, (update,), split="held_out")], 5)
        Position(stage=1, step=2, batches={'train': 3, 'held_out': 2})
    """
    batches = dict.fromkeys((stage.split for stage in stages), 0)
    for number, stage in enumerate(stages):
        if step < stage.num_steps:
            return Position(number, step, batches | {stage.split: batches[stage.split] + step})
        step -= stage.num_steps
        batches[stage.split] += stage.num_steps
    if step:
        raise ValueError(f"step: got {step} more than the protocol has")
    return Position(len(stages), 0, batches)


def updates_from(stages: Sequence[Stage], stage: int) -> dict[str, Update]:
    """The updates whose optimisers a stage needs: its own, and those that go on after it.

    Raises:
        ValueError: if two different updates have one name.

    Example:
        >>> unary, crf = (Update(name, loss=lambda model, batch: None, optimizer=None) for name in ("unary", "crf"))
        >>> stages = [Stage("a", 3, (unary,)), Stage("b", 4, (crf,)), Stage("c", 5, (unary,))]
        >>> [list(updates_from(stages, number)) for number in range(4)]
        [['unary'], ['unary', 'crf'], ['unary'], []]
    """
    known: dict[str, Update] = {}
    for other in itertools.chain.from_iterable(s.updates for s in stages):
        if known.setdefault(other.name, other) is not other:
            raise ValueError(
                f"updates: two different ones are called {other.name!r}; name them apart, or use one object twice"
            )
    begun = {update.name for s in stages[: stage + 1] for update in s.updates}
    needed = {update.name for s in stages[stage:] for update in s.updates}
    return {name: update for name, update in known.items() if name in begun and name in needed}


def decoupled(
    unary: Update,
    crf: Update,
    *,
    unary_steps: int,
    crf_steps: int,
    split: str = "train",
    held_out: str = "held_out",
) -> tuple[Stage, ...]:
    """The unary first; then the CRF alone, on images that the unary has not seen.

    On images it was trained on, a network is surer than on new ones, and a CRF would learn to trust it too much.

    Args:
        unary: trains everything below the CRF.
        crf: trains the CRF; should run the unary in evaluation mode.
        unary_steps: of the first stage.
        crf_steps: of the second stage.
        split: data of the first stage.
        held_out: data of the second stage.

    Returns:
        Two stages.

    Example:
        >>> unary, crf = (Update(name, loss=lambda model, batch: None, optimizer=None) for name in ("unary", "crf"))
        >>> [stage.name for stage in decoupled(unary, crf, unary_steps=1000, crf_steps=100)]
        ['unary', 'crf']

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.2.
    """
    return (
        Stage("unary", unary_steps, (unary,), split),
        Stage("crf", crf_steps, (crf,), held_out),
    )


def end_to_end(
    unary: Update,
    joint: Update,
    crf: Update,
    *,
    steps_per_epoch: int,
    crf_steps: int,
    unary_epochs: int = 100,
    joint_epochs: int = 150,
    split: str = "train",
    held_out: str = "held_out",
) -> tuple[Stage, ...]:
    """The unary first; then updates of the unary alone and of everything in turn, the CRF tuned at each epoch's end.

    Args:
        unary: trains everything below the CRF, by its own loss.
        joint: trains everything, as a rule with an auxiliary loss of the unary.
        crf: trains the CRF alone, on held-out images; should run the unary in evaluation mode.
        steps_per_epoch: updates per epoch, of both kinds together.
        crf_steps: updates of the CRF after each joint epoch; 0 for none.
        unary_epochs: of the first stage.
        joint_epochs: afterwards.
        split: data of the unary and joint updates.
        held_out: data of the CRF's.

    Returns:
        One stage, then two for every joint epoch.

    Example:
        >>> updates = [Update(n, loss=lambda model, batch: None, optimizer=None) for n in ("unary", "joint", "crf")]
        >>> stages = end_to_end(*updates, steps_per_epoch=10, crf_steps=2, unary_epochs=3, joint_epochs=2)
        >>> [(stage.name, stage.num_steps) for stage in stages]
        [('unary', 30), ('joint', 10), ('crf', 2), ('joint', 10), ('crf', 2)]

    References:
        Teichmann and Cipolla, *Convolutional CRFs for Semantic Segmentation*, 2018, §5.3.
    """
    epoch = [Stage("joint", steps_per_epoch, (unary, joint), split)]
    if crf_steps:
        epoch.append(Stage("crf", crf_steps, (crf,), held_out))
    return (Stage("unary", unary_epochs * steps_per_epoch, (unary,), split), *(epoch * joint_epochs))


def three_phase(
    unary: Update,
    pairwise: Update,
    joint: Update,
    *,
    steps: Sequence[int] = (20_000, 20_000, 20_000),
    split: str = "train",
) -> tuple[Stage, ...]:
    """The unary, then the pairwise terms by a loss of their own, then everything.

    Args:
        unary: trains the unary stream.
        pairwise: trains the pairwise stream, as a rule by `losses.pairwise_embedding`.
        joint: trains both through the CRF.
        steps: of the three phases.
        split: their data.

    Returns:
        Three stages.

    Example:
        >>> names = ("unary", "pairwise", "joint")
        >>> updates = [Update(name, loss=lambda model, batch: None, optimizer=None) for name in names]
        >>> num_steps(three_phase(*updates))
        60000

    References:
        Chandra, Usunier and Kokkinos, *Dense and Low-Rank Gaussian CRFs Using Deep Embeddings*, 2017, §4.
    """
    if len(steps) != 3:
        raise ValueError(f"steps: got {len(steps)} numbers; expected three")
    return tuple(
        Stage(update.name, count, (update,), split)
        for update, count in zip((unary, pairwise, joint), steps, strict=True)
    )


def incremental(
    updates: Sequence[Update], steps: Sequence[int], *, split: str = "train"
) -> tuple[Stage, ...]:
    """One group of layers after the other, the last update as a rule everything together.

    Training everything from the start is the protocol with the last update alone.

    Args:
        updates: one per stage. The Deep Parsing Network has four: the unary, the triple penalty, the label contexts,
            all jointly.
        steps: of each.
        split: their data.

    Returns:
        As many stages.

    Example:
        >>> names = ("b1-b11", "b12", "b13", "all")
        >>> updates = [Update(name, loss=lambda model, batch: None, optimizer=None) for name in names]
        >>> [stage.name for stage in incremental(updates, (100, 10, 10, 50))]
        ['b1-b11', 'b12', 'b13', 'all']

    References:
        Liu et al., *Semantic Image Segmentation via Deep Parsing Network*, 2015, §4.2.
    """
    if len(steps) != len(updates):
        raise ValueError(f"steps: got {len(steps)} numbers for {len(updates)} updates; expected one for each")
    return tuple(
        Stage(update.name, count, (update,), split) for update, count in zip(updates, steps, strict=True)
    )


def describe(stages: Iterable[Stage]) -> list[Mapping[str, object]]:
    """The stages as JSON can hold them, repetitions counted.

    Example:
        >>> update = Update("all", loss=lambda model, batch: None, optimizer=None)
        >>> describe([Stage("all", 5, (update,))] * 3)
        [{'stages': [{'name': 'all', 'num_steps': 5, 'updates': ['all'], 'split': 'train'}], 'times': 3}]
    """
    rows = [
        {"name": s.name, "num_steps": s.num_steps, "updates": [u.name for u in s.updates], "split": s.split}
        for s in stages
    ]
    described: list[Mapping[str, object]] = []
    i = 0
    while i < len(rows):
        # An epoch that repeats is one stage or a pair of them.
        for length in (1, 2):
            block, times = rows[i : i + length], 1
            while len(block) == length and rows[i + times * length : i + (times + 1) * length] == block:
                times += 1
            if times > 1 or length == 2:
                break
        if times == 1:
            block = rows[i : i + 1]
        described.append({"stages": block, "times": times})
        i += times * len(block)
    return described

import collections

import pytest

from jaxcrf.training import Stage, Update, protocols
from jaxcrf.training.protocols import describe, locate, num_steps, updates_from


def update(name):
    return Update(name, loss=lambda model, batch: None, optimizer=None)


UNARY, JOINT, CRF = map(update, ("unary", "joint", "crf"))
END_TO_END = protocols.end_to_end(
    UNARY, JOINT, CRF, steps_per_epoch=4, crf_steps=3, unary_epochs=2, joint_epochs=3
)


def test_positions_are_those_of_walking_through():
    batches = collections.Counter()
    step = 0
    for number, stage in enumerate(END_TO_END):
        for within in range(stage.num_steps):
            found = locate(END_TO_END, step)
            assert (found.stage, found.step) == (number, within)
            assert {split: batches[split] for split in ("train", "held_out")} == found.batches
            batches[stage.split] += 1
            step += 1
    assert step == num_steps(END_TO_END)
    assert locate(END_TO_END, step).stage == len(END_TO_END)
    with pytest.raises(ValueError, match="step"):
        locate(END_TO_END, step + 1)


def test_end_to_end_alternates_as_the_paper_says():
    names = [stage.update(i).name for stage in END_TO_END for i in range(stage.num_steps)]
    epoch = ["unary", "joint"] * 2 + ["crf"] * 3
    assert names == ["unary"] * 8 + epoch * 3


def test_optimisers_live_from_their_first_to_their_last_stage():
    alive = [sorted(updates_from(END_TO_END, number)) for number in range(len(END_TO_END) + 1)]
    everything = ["crf", "joint", "unary"]
    # unary | joint crf joint crf joint crf | end
    assert alive == [
        ["unary"],
        ["joint", "unary"],
        everything,
        everything,
        everything,
        everything,
        ["crf"],
        [],
    ]


def test_one_name_is_one_update():
    stages = [Stage("a", 1, (UNARY,)), Stage("b", 1, (update("unary"),))]
    with pytest.raises(ValueError, match="two different ones are called 'unary'"):
        updates_from(stages, 0)


def test_protocols_of_the_papers():
    decoupled = protocols.decoupled(UNARY, CRF, unary_steps=5, crf_steps=2)
    assert [(s.name, s.num_steps, s.split) for s in decoupled] == [
        ("unary", 5, "train"),
        ("crf", 2, "held_out"),
    ]
    phases = protocols.three_phase(UNARY, CRF, JOINT)
    assert [s.num_steps for s in phases] == [20_000] * 3
    stages = protocols.incremental([UNARY, CRF, JOINT], (3, 2, 1))
    assert [s.update(0).name for s in stages] == ["unary", "crf", "joint"]
    with pytest.raises(ValueError, match="steps: got 2 numbers for 3"):
        protocols.incremental([UNARY, CRF, JOINT], (3, 2))
    with pytest.raises(ValueError, match="expected three"):
        protocols.three_phase(UNARY, CRF, JOINT, steps=(1, 2))


def test_descriptions_are_short_and_lose_nothing():
    found = describe(END_TO_END)
    assert [entry["times"] for entry in found] == [1, 3]
    unrolled = [stage for entry in found for _ in range(entry["times"]) for stage in entry["stages"]]
    assert [(s["name"], s["num_steps"], s["split"]) for s in unrolled] == [
        (s.name, s.num_steps, s.split) for s in END_TO_END
    ]


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_stages_have_steps(steps):
    with pytest.raises(ValueError, match="num_steps"):
        Stage("a", steps, (UNARY,))
    with pytest.raises(ValueError, match="updates: got none"):
        Stage("a", 1, ())

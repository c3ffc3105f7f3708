"""parts/evolution: by how much labels changed, and how likely they leave therefore."""

import pytest
import torch

from espnet_pl.parts.evolution import Evolution

OLD = [[1, 2, 3], [], [4]]


@pytest.mark.parametrize(
    "new, change",
    [
        (OLD, 0.0),
        ([[1, 2], [], [4]], 1 / 4),
        ([[1, 9, 3], [5], []], 3 / 4),
        ([[], [], []], 1.0),
        ([[7] * 9, [7] * 9, [7] * 9], 1.0),  # more edits than tokens
    ],
)
def test_the_change_is_that_of_the_batch(new, change):
    changed, settled = Evolution(1.0, settled=False), Evolution(0.5, settled=True)
    assert changed.see(OLD, new) == settled.see(OLD, new) == pytest.approx(change)
    assert changed.chance(0) == pytest.approx(change)
    assert settled.chance(0) == pytest.approx(0.5 * (1 - change))


def test_where_nothing_was_said_nothing_changed_until_something_is():
    evolution = Evolution(1.0, settled=False)
    assert evolution.see([[], []], [[], []]) == 0.0
    assert evolution.see([[], []], [[1], []]) == 1.0


def test_every_update_is_remembered_also_by_a_checkpoint():
    evolution, again = Evolution(1.0, settled=False), Evolution(1.0, settled=False)
    for new in ([[1]], [[2]], [[1]]):
        evolution.see([[1]], new)
    state = evolution.state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    again.load_state_dict(state)
    assert [again.chance(turn) for turn in range(3)] == [0.0, 1.0, 0.0]
    again.see([[1]], [[2]])
    assert again.chance(3) == 1.0 and len(evolution.changes) == 3


def test_an_update_that_was_not_made_has_no_chance():
    with pytest.raises(IndexError, match="update 0 is asked about before it was made"):
        Evolution(1.0, settled=False).chance(0)


def test_old_and_new_are_of_the_same_utterances():
    with pytest.raises(ValueError):
        Evolution(1.0, settled=False).see([[1]], [])

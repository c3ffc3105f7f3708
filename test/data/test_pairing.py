"""data/pairing: ratios, passes, and the slimIPL cache against its authors' loop."""

from collections import Counter
from itertools import islice

import pytest

from espnet_pl.data.pairing import Pairing, Step, plan


def steps(pairing, n, n_labelled=7, n_unlabelled=11, seed=0):
    return list(islice(plan(pairing, n_labelled, n_unlabelled, seed), n))


def test_in_turn_the_ratio_is_exact_in_every_block_and_the_order_is_not_always_the_same():
    found = steps(Pairing(labelled=2, unlabelled=3), 50)
    blocks = [found[i : i + 5] for i in range(0, 50, 5)]
    patterns = [tuple(s.labelled is not None for s in block) for block in blocks]
    assert all(sum(p) == 2 for p in patterns) and len(set(patterns)) > 1
    assert all((s.labelled is None) != (s.unlabelled is None) for s in found)


def test_together_every_update_sees_both():
    found = steps(Pairing(unlabelled=1, together=True), 20)
    assert all(s.labelled is not None and s.unlabelled is not None for s in found)


def test_exploration_hears_unlabelled_speech_alone():
    def kinds(n=20, **how):
        found = steps(Pairing(unlabelled=1, together=True, **how), n)
        assert all(s.unlabelled is not None for s in found)
        return "".join("u" if s.labelled is None else "b" for s in found)

    assert kinds(explore=3, joint=2) == "uuubb" * 4
    assert kinds(explore=3) == "uuu" + 17 * "b"
    assert kinds(joint=4) == kinds() == 20 * "b"
    found = steps(Pairing(unlabelled=1, together=True, explore=2, joint=1), 33)
    both = [s for s in found if s.labelled is not None]
    alone = steps(Pairing(unlabelled=1, together=True), 11)
    assert [s.labelled for s in both] == [s.labelled for s in alone]  # no batch is lost
    assert sorted(s.unlabelled for s in found) == sorted(3 * [*range(11)])


def test_exploration_begins_after_the_warm_up():
    found = steps(Pairing(unlabelled=1, together=True, explore=2, joint=1, warmup=3), 9)
    assert [(s.labelled is not None, s.unlabelled is not None) for s in found] == [
        *[(True, False)] * 3, *[(False, True), (False, True), (True, True)] * 2
    ]  # fmt: skip


def test_each_stream_is_passed_whole_shuffled_anew_and_the_shorter_cycles():
    found = steps(Pairing(unlabelled=1, together=True), 33)
    unlabelled = [s.unlabelled for s in found]
    passes = [unlabelled[i : i + 11] for i in range(0, 33, 11)]
    assert all(sorted(p) == list(range(11)) for p in passes)
    assert passes[0] != passes[1] and passes[0] != list(range(11))
    labelled = [s.labelled for s in found]
    assert sorted(labelled[7:14]) == list(range(7)) and labelled[:7] != labelled[7:14]


def test_warmup_is_labelled_only():
    found = steps(Pairing(unlabelled=1, warmup=9, capacity=2), 30)
    assert all(s.labelled is not None and not s.fresh for s in found[:9])
    assert any(s.unlabelled is not None for s in found[9:])


def test_the_same_seed_gives_the_same_plan_and_another_another():
    pairing = Pairing(labelled=1, unlabelled=4, capacity=5)
    assert steps(pairing, 100) == steps(pairing, 100)
    assert steps(pairing, 100) != steps(pairing, 100, seed=1)


def unlabelled_turns(capacity, replace, n, n_unlabelled):
    """What fills the cache; then used batch and newly labelled ones of n updates."""
    pairing = Pairing(labelled=0, unlabelled=1, capacity=capacity, replace=replace)
    found = [(s.unlabelled, s.fresh) for s in steps(pairing, n, n_unlabelled=n_unlabelled)]
    used, fresh = found[0]
    return fresh[:capacity], [(used, fresh[capacity:]), *found[1:]]


@pytest.mark.parametrize("seed", range(20))
def test_every_batch_is_labelled_before_it_is_used(seed):
    """Labelled in an earlier update or first thing in the same one, never later."""
    pairing = Pairing(labelled=1, unlabelled=4, capacity=6, replace=0.5)
    labelled, used = set(), 0
    for step in steps(pairing, 200, seed=seed):
        labelled |= set(step.fresh)
        if step.unlabelled is not None:
            assert step.unlabelled in labelled
            used += 1
    assert used > 100


def test_filling_takes_no_update_where_labelled_ones_exist():
    pairing = Pairing(labelled=1, unlabelled=4, capacity=6)
    found = steps(pairing, 40)
    first = next(i for i, s in enumerate(found) if s.unlabelled is not None)
    assert all(s.labelled is not None for s in found[:first])
    # The batch of this very update may be followed by a replacement of its own.
    assert sum(len(s.fresh) for s in found[: first + 1]) in (6, 7)


def test_a_sweep_uses_every_entry_once():
    """Between sweeps nothing is lost: with p = 0 the cache is passed over and over."""
    filled, turns = unlabelled_turns(capacity=5, replace=0.0, n=20, n_unlabelled=50)
    for sweep in (turns[0:5], turns[5:10], turns[10:15]):
        assert sorted(used for used, _ in sweep) == sorted(filled)
        assert all(fresh == () for _, fresh in sweep)
    assert turns[:5] != turns[5:10]


def test_a_new_entry_waits_for_the_next_sweep():
    _, turns = unlabelled_turns(capacity=5, replace=1.0, n=40, n_unlabelled=100)
    for begin in range(0, 30, 5):
        entered = sorted(fresh[0] for _, fresh in turns[begin : begin + 5])
        used_next = sorted(used for used, _ in turns[begin + 5 : begin + 10])
        assert used_next == entered


def test_an_entry_is_used_one_over_p_times_in_the_mean():
    p = 0.25
    _, turns = unlabelled_turns(capacity=20, replace=p, n=40_000, n_unlabelled=10**6)
    uses = Counter(used for used, _ in turns)
    replaced = sum(len(fresh) for _, fresh in turns)
    assert replaced / 40_000 == pytest.approx(p, rel=0.05)
    assert sum(uses.values()) / len(uses) == pytest.approx(1 / p, rel=0.05)


def test_without_a_cache_nothing_is_announced():
    found = steps(Pairing(labelled=1, unlabelled=1), 20)
    assert all(s.fresh == () for s in found)


def live(chance, ahead=1, capacity=5, n=200, n_unlabelled=50):
    """The steps of a run in which what an update used is replaced by a chance known later."""
    pairing = Pairing(labelled=0, unlabelled=1, capacity=capacity, replace_when="changed")
    return list(islice(plan(pairing, 1, n_unlabelled, 0, chance, ahead), n))


def test_what_is_replaced_may_depend_on_the_update_that_used_it():
    used = []

    def chance(turn):
        assert turn < len(used), "asked before the update was made"
        return float(used[turn] % 2)  # odd ones leave, even ones stay

    kept = set()
    pairing = Pairing(labelled=0, unlabelled=1, capacity=5, replace_when="changed")
    for step in islice(plan(pairing, 1, 50, 0, chance, 1), 400):
        kept |= set(step.fresh)
        assert step.unlabelled in kept
        used.append(step.unlabelled)
        kept -= set(step.gone)
    assert all(batch % 2 == 0 for batch in used[-100:]) and len(kept) in (5, 6)
    assert max(Counter(b for b in used if b % 2).values()) <= 2  # asked one turn later


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_as_many_turns_are_planned_ahead_as_was_said(ahead):
    asked = []

    def chance(turn):
        asked.append(turn)
        return 0.5

    found = live(chance, ahead, capacity=20)
    assert asked == list(range(len(found) - ahead))
    assert sum(len(s.fresh) for s in found) - 20 == pytest.approx(100, abs=25)
    assert all(len(s.fresh) <= 1 for s in found[1:])


def test_a_known_chance_makes_the_same_plan_again():
    chances = [(17 * turn % 10) / 10 for turn in range(200)]
    assert live(chances.__getitem__, 3) == live(chances.__getitem__, 3)
    assert live(chances.__getitem__, 3) != live(lambda turn: 1 - chances[turn], 3)


@pytest.mark.parametrize("replace, n_unlabelled", [(0.5, 11), (1.0, 6), (1.0, 7), (0.3, 100)])
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_what_is_gone_is_not_used_unless_it_enters_again(replace, n_unlabelled, ahead):
    pairing = Pairing(labelled=1, unlabelled=3, capacity=6)
    kept, gone = set(), 0
    for step in islice(plan(pairing, 7, n_unlabelled, 0, lambda _: replace, ahead), 500):
        kept |= set(step.fresh)
        assert step.unlabelled is None or step.unlabelled in kept
        kept -= set(step.gone)
        gone += len(step.gone)
        assert len(kept) <= 6
    assert gone > 20


def test_batches_that_do_not_come_again_are_numbered_on():
    pairing = Pairing(labelled=2, unlabelled=3)
    found = steps(pairing, 50, n_unlabelled=None)
    assert [s.unlabelled for s in found if s.unlabelled is not None] == list(range(30))
    assert [s.labelled for s in found] == [s.labelled for s in steps(pairing, 50)]
    both = steps(Pairing(unlabelled=1, together=True), 20, n_labelled=None, n_unlabelled=None)
    assert both == [Step(i, i) for i in range(20)]
    with pytest.raises(ValueError, match="a cache is of unlabelled batches that come again"):
        plan(Pairing(unlabelled=1, capacity=3), 7, None)


def test_labelled_only():
    assert steps(Pairing(), 3, n_unlabelled=0) == [
        Step(labelled=i) for i in [s.labelled for s in steps(Pairing(), 3)]
    ]


@pytest.mark.parametrize(
    "bad",
    [
        dict(labelled=-1),
        dict(labelled=0, unlabelled=0),
        dict(replace=1.5),
        dict(together=True, unlabelled=4),
        dict(capacity=-1),
        dict(unlabelled=1, replace_when="settled"),
        dict(unlabelled=1, explore=2),
        dict(unlabelled=1, joint=2),
        dict(unlabelled=1, together=True, explore=-1),
        dict(unlabelled=1, together=True, joint=-1),
    ],
)
def test_impossible_pairings_are_refused(bad):
    with pytest.raises(ValueError):
        Pairing(**bad)


def test_missing_streams_are_refused_at_once():
    with pytest.raises(ValueError, match="no labelled"):
        plan(Pairing(), 0, 5)
    with pytest.raises(ValueError, match="no unlabelled"):
        plan(Pairing(unlabelled=1), 5, 0)

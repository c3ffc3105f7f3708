"""data/label_aware: the law of the draws, what is in a batch, passes, ranks, and their limits."""

from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest

from espnet_pl.data import label_aware
from espnet_pl.data.label_aware import CHUNK, Batching, Index, LabelAwareBatches

TINY = {"u0": "ab", "u1": "abc", "u2": "acc", "u3": "bd", "u4": "a", "u5": "e"}


def batches(tokens=None, sizes=None, bins=8, of_a_pass=5, seed=0, rank=0, ranks=1, **settings):
    tokens = TINY if tokens is None else tokens
    sizes = sizes or dict.fromkeys(tokens, 1)
    settings = Batching(**settings)
    return LabelAwareBatches(settings, tokens.items(), sizes, bins, of_a_pass, seed, rank, ranks)


def corpus(n=300, labels=60, length=8, seed=0):
    """Utterances of tokens with a long tail, and of many lengths."""
    random = Random(seed)
    tokens = {
        f"u{i}": [int(labels * random.random() ** 2) for _ in range(length)] for i in range(n)
    }
    return tokens, {utt_id: random.randint(10, 60) for utt_id in tokens}


def of_passes(made, passes):
    return [batch for number in passes for batch in made.of_pass(number)]


@pytest.mark.parametrize("n", [0, 1, 5, CHUNK, 2 * CHUNK + 3])
def test_the_index_is_the_inverse_of_what_it_was_made_of(n):
    random = Random(n)
    # The first utterance of each label is known: labels are numbered as they come.
    labels = [[random.randrange(40) for _ in range(random.randrange(4))] for _ in range(n)]
    index = Index(labels)
    names = list(dict.fromkeys(label for own in labels for label in set(own)))
    expected = {name: [i for i, own in enumerate(labels) if name in own] for name in names}
    assert len(index.counts) == len(names) and index.size == n
    found = [index.containing(c).tolist() for c in range(len(names))]
    assert sorted(found) == sorted(expected.values())
    assert index.counts.tolist() == [len(own) for own in found]


def test_the_index_takes_four_bytes_for_each_label_of_each_utterance():
    index = Index([[1, 2, 2, 3], [3], [], [1, 3]])  # 3 + 1 + 0 + 2 places, 3 labels
    assert index.nbytes == 4 * 6 + 8 * (3 + 1)
    assert index.utterances.dtype == np.int32


def weight(label, power):
    """The written formula, over the tiny corpus."""
    n = sum(label in tokens for tokens in TINY.values())
    return n**-power if n >= 2 else 0.0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_law_is_the_written_one(power):
    law = Index(TINY.values()).law(power)
    total = sum(weight(label, power) for label in "abcde")
    assert sorted(law) == pytest.approx(sorted(weight(c, power) / total for c in "abcde"))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_labels_and_pairs_are_drawn_by_the_law(power):
    """The first draw of 4000 passes, by χ² against p(c) / (pairs of utterances that contain c)."""
    made = batches(bins=2, of_a_pass=1, power=power)
    observed = Counter()
    for number in range(4000):
        ((pair,),) = made.of_pass(number)
        n = made.index.counts[pair.label]  # of another number of utterances for each label
        observed[n, frozenset(made.utt_ids[u] for u in pair[1:])] += 1
    total = sum(weight(label, power) for label in "abcde")
    expected = {}
    for label in "abc":
        own = [utt_id for utt_id, tokens in TINY.items() if label in tokens]
        pairs = [frozenset(pair) for pair in combinations(own, 2)]
        for pair in pairs:
            expected[len(own), pair] = 4000 * weight(label, power) / total / len(pairs)
    assert len(expected) == 6 + 3 + 1 and observed.keys() <= expected.keys()
    chi2 = sum((observed[k] - expected[k]) ** 2 / expected[k] for k in expected)
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_the_same_law_holds_inside_batches_where_labels_are_of_many_utterances():
    """No label runs short: what is in a batch does not change what is drawn next."""
    tokens = {f"u{i}": "a" if i % 4 else "b" for i in range(4000)}  # 3000 and 1000 utterances
    made = batches(tokens, bins=20, of_a_pass=400)
    pairs = [pair for batch in made.of_pass(0) for pair in batch]
    assert len(pairs) == 4000
    rare = sum(made.index.counts[pair.label] == 1000 for pair in pairs)
    assert rare / 4000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("order", [1, 2])
def test_a_batch_holds_each_drawn_label_twice_no_utterance_twice_and_no_more_than_fits(order):
    tokens, sizes = corpus()
    made = batches(tokens, sizes, bins=600, of_a_pass=40, order=order)
    seen = set()
    for batch in of_passes(made, range(2)):
        ids = [made.utt_ids[u] for pair in batch for u in pair[1:]]
        assert len(set(ids)) == len(ids) == 2 * len(batch) > 2
        assert max(sizes[u] for u in ids) * len(ids) <= 600
        for pair in batch:
            grams = [
                {tuple(tokens[u][i : i + order]) for i in range(len(tokens[u]) - order + 1)}
                for u in (made.utt_ids[v] for v in pair[1:])
            ]
            assert grams[0] & grams[1]
            own = made.index.containing(pair.label)
            assert pair.first in own and pair.second in own
        seen |= {pair.label for pair in batch}
    assert len(seen) > 30


def test_a_pair_that_is_too_much_begins_the_next_batch():
    """Batch and next pair together would overfill; nothing that was drawn is lost."""
    tokens, sizes = corpus()
    sizes = {utt_id: 60 if size > 58 else 20 for utt_id, size in sizes.items()}  # few are long
    found = batches(tokens, sizes, bins=600, of_a_pass=40).of_pass(0)
    assert {len(batch) for batch in found} >= {15, 5}
    size = {i: sizes[utt_id] for i, utt_id in enumerate(tokens)}
    for batch, following in zip(found, found[1:]):
        together = [u for pair in [*batch, following[0]] for u in pair[1:]]
        assert max(size[u] for u in together) * len(together) > 600


def test_long_utterances_are_drawn_as_often_as_short_ones():
    tokens = {f"u{i}": "a" for i in range(100)}
    sizes = {utt_id: 60 if i < 20 else 10 for i, utt_id in enumerate(tokens)}
    found = of_passes(batches(tokens, sizes, bins=240, of_a_pass=500), range(1))
    drawn = [u for batch in found for pair in batch for u in pair[1:]]
    share = sum(u < 20 for u in drawn) / len(drawn)
    # Of pairs without replacement inside a batch: a little noise, no bias.
    assert share == pytest.approx(0.2, abs=0.03)


def test_the_order_of_labels_counts_tokens_in_a_row():
    tokens = {"x": "abc", "y": "cab", "z": "bca"}
    made = batches(tokens, order=2)
    assert sorted(made.index.counts) == [2, 2, 2]  # ab, bc and ca
    assert sorted(batches(tokens, order=1).index.counts) == [3, 3, 3]
    with pytest.raises(ValueError, match="no label is in two utterances, of 3"):
        batches(tokens, order=3)


def test_a_pass_depends_on_seed_and_number_only():
    tokens, sizes = corpus()
    make = dict(tokens=tokens, sizes=sizes, bins=600, of_a_pass=20)
    one, other = batches(**make), batches(**make)
    passes = [one.of_pass(number) for number in range(4)]
    assert other.of_pass(3) == passes[3] and other.of_pass(1) == passes[1]
    assert all(a != b for a, b in combinations(passes, 2))
    assert batches(**make, seed=1).of_pass(0) != passes[0]


def test_batches_are_numbered_on_from_pass_to_pass():
    tokens, sizes = corpus()
    make = dict(tokens=tokens, sizes=sizes, bins=600, of_a_pass=7)
    running = batches(**make)
    whole = [running[i] for i in range(21)]
    assert [batches(**make)[i] for i in range(10, 21)] == whole[10:]
    pairs = running.of_pass(2)[6]
    assert sorted(whole[20]) == sorted(running.utt_ids[u] for pair in pairs for u in pair[1:])
    assert all(sizes[a] >= sizes[b] for ids in whole for a, b in zip(ids, ids[1:]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_a_batch_and_keep_pairs_together(ranks):
    tokens, sizes = corpus()
    make = dict(tokens=tokens, sizes=sizes, bins=600, of_a_pass=9, ranks=ranks)
    several = [batches(**make, rank=rank) for rank in range(ranks)]
    for i in range(18):
        shares = [made[i] for made in several]
        together = [utt_id for share in shares for utt_id in share]
        pairs = several[0].of_pass(i // 9)[i % 9]
        assert len(set(together)) == len(together) == 2 * len(pairs)
        assert all(shares) and max(map(len, shares)) - min(map(len, shares)) in (0, 2)
        for place, pair in enumerate(pairs):
            both = {several[0].utt_ids[u] for u in pair[1:]}
            assert both <= set(shares[place % ranks])


def test_what_is_never_seen_is_counted_and_what_is_seen_measured():
    tokens = {"a": "xy", "b": "xz", "c": "x", "alone": "q", "silent": ""}
    made = batches(tokens, bins=2, of_a_pass=1)
    assert made.index.never() == 2
    assert made.seen(0) == 2 / 5
    assert batches(tokens, bins=2, of_a_pass=50).seen(0) == 3 / 5
    assert "1 of 4 labels" in made.report() and "2 are never seen" in made.report()
    assert "sees 40.0% of 5 utterances" in made.report()


def test_all_others_are_seen_sooner_or_later():
    tokens, sizes = corpus(n=60)
    made = batches(tokens, sizes, bins=300, of_a_pass=10)
    seen = {u for batch in of_passes(made, range(30)) for pair in batch for u in pair[1:]}
    assert made.index.never() == 0 and len(seen) == 60


def test_an_utterance_that_is_too_long_is_left_out_and_counted():
    sizes = dict.fromkeys(TINY, 2) | {"u1": 9}
    made = batches(sizes=sizes, bins=16)
    assert made.too_long == 1 and "1 were left out, because 2 of their length" in made.report()
    place = made.utt_ids.index("u1")
    assert all(place not in pair[1:] for b in of_passes(made, range(20)) for pair in b)
    assert batches(sizes=sizes, bins=18).too_long == 0
    assert batches(sizes=sizes, bins=18, ranks=2).too_long == 1
    with pytest.raises(ValueError, match=r"of 6 \(6 were left out.* batch of 3\)"):
        batches(sizes=sizes, bins=3)


def test_two_utterances_are_found_wherever_two_are_outside_the_batch(monkeypatch):
    monkeypatch.setattr(label_aware, "TRIES", 1)
    made = batches(dict.fromkeys("uvwxy", "a"), bins=100, of_a_pass=50)
    assert [len(batch) for batch in made.of_pass(0)] == [2] * 50


def test_a_batch_that_could_hold_everything_ends():
    found = batches(bins=1000, of_a_pass=3).of_pass(0)
    assert [len(batch) for batch in found] == [2, 2, 2]  # u0 … u4, in pairs


@pytest.mark.parametrize(
    "tokens, match",
    [
        ({"u0": "ab", "u1": "cd"}, "no label is in two utterances, of 2"),
        ({"u0": "", "u1": ""}, "no label is in two utterances, of 2"),
        ({"u0": "aa"}, "no label is in two utterances, of 1"),
        ({}, "no label is in two utterances, of 0"),
    ],
)
def test_labels_that_nothing_shares_are_refused(tokens, match):
    with pytest.raises(ValueError, match=match):
        batches(tokens)


def test_pairs_that_are_too_few_for_the_ranks_are_refused():
    made = batches({"u0": "a", "u1": "a", "u2": "a"}, ranks=2)
    with pytest.raises(ValueError, match="found 1 pairs of utterances .* for 2 ranks"):
        made.of_pass(0)


@pytest.mark.parametrize(
    "bad", [{"power": -1.0}, {"power": float("nan")}, {"power": float("inf")}, {"order": 0}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        Batching(**bad)


def test_a_great_power_draws_the_rarest_labels_and_overflows_nothing():
    made = batches(bins=2, of_a_pass=50, power=1e4)
    assert {made.index.counts[pair.label] for b in made.of_pass(0) for pair in b} == {2}

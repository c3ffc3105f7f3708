"""parts/cache: keyed by id, whole through a checkpoint, clear about what is missing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espnet_pl.parts.cache import PseudoLabelCache

LABELS = st.dictionaries(
    st.text(min_size=1).filter(lambda s: s.encode("utf-8", "ignore").decode() == s),
    st.tuples(st.lists(st.integers(0, 2**31 - 1)), st.integers(0, 2**40)),
)


@given(LABELS)
def test_a_checkpoint_brings_everything_back(entries):
    cache, restored = PseudoLabelCache(), PseudoLabelCache()
    for utt_id, (label, step) in entries.items():
        cache.put(utt_id, label, step)
    state = cache.state_dict()["_extra_state"]
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    restored.load_state_dict(cache.state_dict())
    assert len(restored) == len(entries)
    for utt_id, (label, step) in entries.items():
        assert restored.get(utt_id) == label and restored.made_at(utt_id) == step


def test_records_come_back_with_their_shapes_and_types():
    cache, restored = PseudoLabelCache(), PseudoLabelCache()
    records = {
        "a": {
            "log_p": torch.randn(3, 2),
            "said": torch.tensor([True]),
            "k": torch.zeros(0, 4).int(),
        },
        "b": {
            "log_p": torch.randn(0, 2),
            "said": torch.tensor([False]),
            "k": torch.ones(5, 4).int(),
        },
    }
    for utt_id, record in records.items():
        cache.put(utt_id, [1], 0, record)
    restored.load_state_dict(cache.state_dict())
    for utt_id, record in records.items():
        assert restored.record(utt_id).keys() == record.keys()
        for name, tensor in record.items():
            found = restored.record(utt_id)[name]
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert all(isinstance(t, torch.Tensor) for t in cache.state_dict()["_extra_state"].values())
    cache.put("a", [2], 1)
    assert cache.record("a") == {}


def test_what_was_known_is_forgotten_and_the_label_is_not():
    cache, restored = PseudoLabelCache(), PseudoLabelCache()
    for number, utt_id in enumerate("abc"):
        cache.put(utt_id, [number], 7, {"x": torch.full((2,), number)})
    cache.forget(["a", "never seen"])
    cache.put("b", [1], 8, {"x": torch.full((3,), 11)})  # not where it was before
    restored.load_state_dict(cache.state_dict())
    for made in (cache, restored):
        assert made.get("a") == [0] and made.record("a") == {}
        assert made.record("b")["x"].tolist() == [11] * 3
        assert made.record("c")["x"].tolist() == [2] * 2
    assert cache.state_dict()["_extra_state"]["record x"].numel() == 5


def test_a_new_label_replaces_the_old_one():
    cache = PseudoLabelCache()
    cache.put("a", [1, 2], 3)
    cache.put("b", [], 4)
    cache.put("a", [7], 5)
    assert cache.get("a") == [7] and cache.made_at("a") == 5 and len(cache) == 2


def test_what_is_kept_is_a_copy():
    cache, label = PseudoLabelCache(), [1]
    cache.put("a", label, 0)
    label.append(2)
    assert cache.get("a") == [1]


def test_an_unlabelled_utterance_is_named():
    with pytest.raises(KeyError, match="no pseudo-label for utterance 'x'.*start|Start"):
        PseudoLabelCache().get("x")

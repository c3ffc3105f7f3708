"""tools/teacher_records.py: means by hand, of records in a store."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from espnet_pl.parts.store import Writer

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("records", ROOT / "tools/teacher_records.py")
records = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(records)

THREE_TO_ONE = {"lengths": torch.tensor([4, 2]), "log_p": torch.tensor([3.0, 1.0]).log() - 9}
ALONE = {"lengths": torch.tensor([7]), "log_p": torch.tensor([-5.0])}
NONE = {"lengths": torch.tensor([], dtype=torch.long), "log_p": torch.tensor([])}


def test_means_are_over_the_utterances_that_have_one():
    first, second = records.by_place([THREE_TO_ONE, ALONE, NONE])
    assert first == (2, 5.5, pytest.approx((0.75 + 1) / 2))
    assert second == (1, 2.0, pytest.approx(0.25))
    assert records.by_place([NONE]) == []


def test_an_impossible_hypothesis_has_no_share():
    (_, _, w), (*_, other) = records.by_place(
        [{"lengths": torch.tensor([1, 1]), "log_p": torch.tensor([-2.0, -math.inf])}]
    )
    assert (w, other) == (1.0, 0.0)


def test_records_without_scores_are_refused():
    with pytest.raises(ValueError, match="log_p"):
        records.by_place([{"lengths": torch.tensor([1])}])


def test_from_a_store(tmp_path, capsys):
    with Writer(tmp_path / "store") as writer:
        for name, record in (("a", THREE_TO_ONE), ("b", ALONE), ("c", NONE)):
            writer.put(name, record)
        writer.finish()
    (tmp_path / "wav.scp").write_text("a a.wav\nc c.wav\n")
    records.main([str(tmp_path / "store"), str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "place  utterances  tokens  posterior",
        "    1           1    4.00     0.7500",
        "    2           1    2.00     0.2500",
    ]

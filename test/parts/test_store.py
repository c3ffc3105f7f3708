"""parts/store: what comes back · kills, damage and strangers are noticed, and said in words."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from espnet_pl.parts.store import Reader, StoreError, Writer

ROOT = Path(__file__).parents[2]
META = {"teacher": "abc", "asked": {"beam": 4}, "tokens": ["a", "b"]}
IDS = ["a", "ü ñ 漢字", "with 'quotes' and \"more\"", "../../etc/x", "", "a/b\\c", "%20;--"]
DTYPES = [
    torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def filled(folder, ids=("a", "b", "c"), shard=1, shards=1, meta=META, finish=True):
    with Writer(folder, shard, shards, meta) as writer:
        for k, utt_id in enumerate(ids):
            writer.put(utt_id, {"x": torch.full((3,), float(k))})
        if finish:
            writer.finish()
    return folder / f"records.{shard}of{shards}.sqlite"


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def test_everything_comes_back(tmp_path):
    g = torch.Generator().manual_seed(0)
    made = {}
    for k, utt_id in enumerate(IDS):
        made[utt_id] = {
            str(d): (torch.randn(2, k, 3, generator=g) * 50).abs().to(d) for d in DTYPES
        } | {
            "file": torch.tensor(k), "allow_pickle": torch.empty(0, 2),
            "a/b c": torch.arange(6).view(2, 3).t(), "inf": torch.tensor([-torch.inf]),
        }  # fmt: skip
    made["nothing"] = {}
    with Writer(tmp_path / "deep/er", meta=META) as writer:
        for utt_id, record in made.items():
            writer.put(utt_id, record)
        writer.finish()
    reader = Reader(tmp_path / "deep/er", META)
    assert len(reader) == len(made) and reader.meta == META | {"format": 2}
    assert all(equal(reader.get(utt_id), record) for utt_id, record in made.items())
    assert "a" in reader and "zz" not in reader
    assert reader.missing(["x", *made, "y"]) == ["x", "y"]
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["records.1of1.sqlite"]
    with pytest.raises(KeyError, match="no record of utterance 'zz' among the 8"):
        reader.get("zz")


def test_gradients_and_views_are_left_behind(tmp_path):
    with Writer(tmp_path) as writer:
        writer.put("a", {"x": torch.ones(4, requires_grad=True)[::2]})
        writer.finish()
    found = Reader(tmp_path).get("a")["x"]
    found += 1  # it can be written to, and is nobody else's
    assert torch.equal(Reader(tmp_path).get("a")["x"], torch.ones(2))


def test_shards_are_one_store(tmp_path):
    filled(tmp_path, "ac", 1, 2)
    with pytest.raises(StoreError, match=r"records.2of2.sqlite not there"):
        Reader(tmp_path)
    filled(tmp_path, "bd", 2, 2)
    reader = Reader(tmp_path, {"teacher": "abc"})
    assert len(reader) == 4 and reader.missing("abcde") == ["e"]
    assert torch.equal(reader.get("d")["x"], torch.ones(3))
    filled(tmp_path, "ab")
    with pytest.raises(StoreError, match="several divisions, 1 and 2"):
        Reader(tmp_path)


def test_a_shard_goes_on_where_it_stopped(tmp_path):
    path = filled(tmp_path, "ab", finish=False)
    with pytest.raises(StoreError, match="not finished, 2 utterances are there.*run again"):
        Reader(tmp_path)
    with Writer(tmp_path, meta=META) as writer:
        assert writer.done == {"a", "b"}
        writer.put("c", {"x": torch.zeros(1)})
        writer.put("a", {"x": torch.ones(1)})
        writer.finish()
    assert len(Reader(tmp_path)) == 3 and torch.equal(Reader(tmp_path).get("a")["x"], torch.ones(1))
    with Writer(tmp_path, meta=META) as writer:  # finished: it may be opened, and stays so
        assert len(writer.done) == 3
    assert len(Reader(tmp_path)) == 3
    with Writer(tmp_path, meta=META) as writer:
        writer.put("d", {})
    with pytest.raises(StoreError, match="not finished, 4"):
        Reader(tmp_path)
    assert path.exists()


def test_what_fails_keeps_what_was_put(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path) as writer:
        writer.put("a", {})
        raise ZeroDivisionError
    with Writer(tmp_path) as writer:
        assert writer.done == {"a"}


KILLED = """
import sys, torch
from espnet_pl.parts.store import Writer
writer = Writer(sys.argv[1])
for k in range(10_000):
    writer.put(f"u{k}", {"x": torch.randn(5000)})
    if k % 10 == 9:
        writer.commit()
        print(k + 1, flush=True)
"""


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_kill_loses_nothing_that_was_committed(after, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    for _ in range(after):
        committed = int(child.stdout.readline())
    with pytest.raises(StoreError, match="another process is writing it"):
        Writer(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with pytest.raises(StoreError, match="not finished"):
        Reader(tmp_path)
    with Writer(tmp_path) as writer:
        assert {f"u{k}" for k in range(committed)} <= writer.done
        writer.finish()
    reader = Reader(tmp_path)
    assert all(reader.get(utt_id)["x"].shape == (5000,) for utt_id in writer.done)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"teacher": "abd"}, "teacher is 'abc' there, 'abd' is wanted"),
        ({"asked": {"beam": 5}}, r"asked.beam is 4 there, 5 is wanted"),
        ({"asked": {"beam": 4, "keep": 1}}, r"asked.keep is None there, 1 is wanted"),
        ({"tokens": ["a", "c"]}, r"tokens\[1\] is 'b' there, 'c' is wanted"),
        ({"tokens": ["a"]}, "tokens has 2 entries there, 1 are wanted"),
        ({"more": (1, 2)}, r"more is None there, \[1, 2\] is wanted"),
    ],
)
def test_records_of_something_else_are_refused_by_name(meta, message, tmp_path):
    filled(tmp_path)
    with pytest.raises(StoreError, match=message):
        Reader(tmp_path, META | meta)
    with pytest.raises(StoreError, match=message + ".*Give another folder"):
        Writer(tmp_path, meta=META | meta)
    with Writer(tmp_path, meta=META):
        pass


def test_shards_of_different_things_are_refused(tmp_path):
    filled(tmp_path, "a", 1, 2)
    filled(tmp_path, "b", 2, 2, META | {"teacher": "abd"})
    with pytest.raises(StoreError, match="2of2.*teacher"):
        Reader(tmp_path)


@pytest.mark.parametrize("part", ["payload = x'00'", "checksum = 1", "utt_id = 'z'", "payload = 3"])
def test_a_damaged_record_is_noticed(part, tmp_path):
    path = filled(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE records SET {part} WHERE utt_id = 'b'")
    reader = Reader(tmp_path)
    assert torch.equal(reader.get("c")["x"], torch.full((3,), 2.0))
    with pytest.raises(StoreError, match="the record of utterance '[bz]' is damaged; remove"):
        reader.get("z" if "utt_id" in part else "b")


def test_a_record_that_is_gone_is_noticed(tmp_path):
    with sqlite3.connect(filled(tmp_path)) as db:
        db.execute("DELETE FROM records WHERE utt_id = 'b'")
    with pytest.raises(StoreError, match=r"damaged \(2 records of 3\)"):
        Reader(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_a_cut_file_is_noticed(share, tmp_path):
    path = filled(tmp_path, [f"u{k}" for k in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StoreError, match=r"1of1.sqlite"):
        Reader(tmp_path)


def test_a_file_of_something_else_is_noticed(tmp_path):
    filled(tmp_path).write_bytes(b"something else" * 1000)
    for opens in (Reader, Writer):
        with pytest.raises(StoreError, match="is damaged"):
            opens(tmp_path)


def test_no_store(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="no records here"):
            Reader(folder)
    with pytest.raises(StoreError, match="shard 3 of 2"):
        Writer(tmp_path, 3, 2)


def test_a_folder_that_is_read_only(tmp_path):
    path = filled(tmp_path / "odd #?% name")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert torch.equal(Reader(path.parent).get("b")["x"], torch.ones(3))
    finally:
        path.parent.chmod(0o755)

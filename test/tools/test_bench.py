"""tools/bench: the benchmarks run, and what they compare agrees."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
reads_memory = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="memory is read from /proc"
)


@pytest.fixture
def bench(tmp_path):
    """Run a benchmark in small; what it prints, and what it writes."""

    def run(name, *words):
        result = tmp_path / "result.json"
        command = [sys.executable, f"tools/bench/{name}.py", *(words or ["--small"])]
        command += ["--json", result]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(result.read_text())

    return run


@reads_memory
def test_batching(bench):
    printed, result = bench("batching", "--utterances", "500", "--seconds", "200")
    places, labels = result["labels of utterances"], result["labels"]
    assert 500 < places < 60 * 500  # some are there twice
    assert result["index MB"] == (4 * places + 8 * (labels + 1)) / 1e6
    assert 0.3 < result["speech of padded"] < 1 and 0 < result["utterances seen"] < 1
    assert all(f"{name}: " in printed for name in result)


@reads_memory
def test_contrastive(bench):
    printed, result = bench("contrastive")
    rows = result["frames"]["256"]
    assert {"ours", "dense torch"} <= rows.keys()
    assert ("pytorch-metric-learning" in rows) != ("is not installed" in printed)
    for name, row in rows.items():
        assert row["seconds"] > 0 and f"| {name} |" in printed
        if row["difference"] is not None:  # of the same loss
            assert abs(row["loss"] - rows["ours"]["loss"]) < 1e-4 and row["difference"] < 1e-4
    assert [name for name, row in rows.items() if row["difference"] is None] == [*rows][-3:]


@reads_memory
def test_ctc(bench):
    printed, result = bench("ctc")
    sums, soft = result["cases"].values()
    assert len(sums) == 3 and len(soft) == 4
    for name, row in (sums | soft).items():
        assert row["seconds"] > 0 and f"| {name} |" in printed
        assert row["value_error"] < 1e-5 and row["gradient_error"] < 1e-4
    assert len({round(row["mean"], 3) for row in sums.values()}) == 1
    # Of some classes in one the divergence cannot be greater.
    assert all(row["mean"] < soft["torch, dense"]["mean"] + 1e-4 for row in soft.values())


def test_steps(bench):
    printed, result = bench("steps")
    assert result["rows"]["supervised"]["ratio"] == 1.0 and len(result["rows"]) == 20
    for name, row in result["rows"].items():
        assert row["seconds"] > 0 and f"| {name} |" in printed


@reads_memory
def test_distillation(bench):
    printed, result = bench("distillation")
    assert result["rows"]["supervised"]["ratio"] == 1.0 and len(result["rows"]) == 9
    for name, row in result["rows"].items():
        assert row["seconds"] > 0 and f"| {name} |" in printed


def test_proposals(bench):
    printed, result = bench("proposals")
    for title, rows in result["cases"].items():
        own = {}
        for row in rows:
            assert f"| {row['search']} |" in printed
            if "why" in row:  # a peer that is not installed
                assert row["why"] in printed and title == "CTC"
                continue
            assert row["times_real_time"] > 0 and row["best"] <= 0 and 0 < row["mass"] <= 1
            found = [math.exp(row["best"]), row["mass"], row["sequences"]]
            own.setdefault((row["search"], row.get("beam"), row.get("tokens")), []).append(found)
        for of_batches in own.values():  # which have the same utterances first
            assert all(found == pytest.approx(of_batches[0], rel=1e-4) for found in of_batches)
    rows = [row for row in result["cases"]["CTC"] if "why" not in row]
    greedy, *several = rows
    assert {row["search"] for row in result["cases"]["CTC"]} == {
        "greedy", "ours", "flashlight-text", "torchaudio"
    }  # fmt: skip
    for row in several:
        assert row["best"] >= greedy["best"] - 1e-4 and row["mass"] > greedy["mass"]
        same = [r for r in several if (r["beam"], r["tokens"]) == (row["beam"], row["tokens"])]
        assert [r["mass"] for r in same] == pytest.approx([row["mass"]] * len(same), rel=0.05)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen by Linux's call")
def test_ranks(bench):
    printed, result = bench("ranks")
    one, two = result["rows"]
    assert (one["batches"], two["batches"]) == (1, 2) and one["to half"] is None
    assert all(min(*row["1"], *row["2"]) > 0 for row in (one, two))
    assert two["to half"] == pytest.approx(2 * one["1"][0] / two["2"][0])
    assert f"| {two['to 1']:.2f} | {two['to half']:.2f} |" in printed


def test_store(bench):
    printed, result = bench("store", "--repeat", "50")
    assert [*result["rows"]] == ["the store", "numpy", "torch"]
    assert result["rows"]["the store"]["ratio"] == 1.0 and "| numpy |" in printed
    assert all(row["bytes"] > 100 and row["write"] > 0 for row in result["rows"].values())

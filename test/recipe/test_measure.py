"""Error rates against counts by hand, intervals against enumeration, tables from files."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from espnet_pl.recipe import markers, measure, report, scoring
from espnet_pl.recipe.config import Recipe

# reference, hypothesis, (hits, substitutions, deletions, insertions) of words
BY_HAND = [
    ("a b c", "a b c", (3, 0, 0, 0)),
    ("a b c", "a x c", (2, 1, 0, 0)),
    ("a b c", "a c", (2, 0, 1, 0)),
    ("a b", "a b c d", (2, 0, 0, 2)),
    ("a b", "", (0, 0, 2, 0)),
    ("", "x y", (0, 0, 0, 2)),
    ("", "", (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("reference", "hypothesis", "counts"), BY_HAND)
def test_words_by_hand(reference, hypothesis, counts):
    assert scoring.align([reference], [hypothesis], "word").tolist() == [list(counts)]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [("ab c", "abc", (3, 0, 1, 0)), ("ab", "", (0, 0, 2, 0)), ("", "ab", (0, 0, 0, 2))],
)
def test_characters_by_hand(reference, hypothesis, counts):
    """A space is a character, as in ESPnet."""
    assert scoring.align([reference], [hypothesis], "character").tolist() == [list(counts)]


def test_the_nine_columns():
    references, hypotheses, _ = zip(*BY_HAND, strict=True)
    figures = scoring.summary(scoring.align(references, hypotheses, "word"))
    # 13 words: 9 right, 1 substituted, 3 deleted; 4 inserted; 5 of 7 sentences wrong
    assert figures == pytest.approx(
        {
            "snt": 7, "wrd": 13, "corr": 900 / 13, "sub": 100 / 13, "del": 300 / 13,
            "ins": 400 / 13, "err": 800 / 13, "s_err": 500 / 7,
        }
    )  # fmt: skip


@pytest.mark.skipif(scoring.find_sclite() is None, reason="sclite is not installed")
def test_sclite_counts_the_same():
    references, hypotheses, _ = zip(*BY_HAND, strict=True)
    texts = [{str(i): t for i, t in enumerate(side)} for side in (references, hypotheses)]
    expected = scoring.align(references, hypotheses, "word").sum(axis=0).tolist()
    assert scoring.sclite(scoring.find_sclite(), *texts) == expected


def resampled(run, base, units, clusters=None):
    """`measure.interval` from errors [s, n] and units [n]."""
    clusters = np.arange(len(units)) if clusters is None else clusters
    sums = measure.resample(np.column_stack([*run, *base, units]), clusters, 10_000)
    s = len(run)
    return measure.interval(sums[:, :s], sums[:, s : 2 * s], sums[:, -1])


def enumerated(run, base, units):
    """The same from every sample there is: n^n of utterances times s^s of seeds."""
    seeds, n = run.shape
    values = [
        100 * (run[np.ix_(picked, drawn)] - base[np.ix_(picked, drawn)]).sum()
        / (seeds * units[list(drawn)].sum())
        for drawn in itertools.product(range(n), repeat=n)
        for picked in itertools.product(range(seeds), repeat=seeds)
    ]  # fmt: skip
    return np.percentile(values, [2.5, 97.5])


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_interval_by_enumeration(seeds):
    rng = np.random.default_rng(seeds)
    units = rng.integers(5, 30, size=5)
    run, base = rng.integers(0, 5, size=(2, seeds, 5))
    expected = enumerated(run, base, units)
    spread = expected[1] - expected[0]
    assert resampled(run, base, units) == pytest.approx(expected, abs=0.03 * spread)


def test_interval_by_the_normal_limit():
    """Many utterances: ±1.96 standard deviations of a mean."""
    rng = np.random.default_rng(0)
    units, run = np.full(4000, 10), rng.binomial(10, 0.1, size=(1, 4000))
    low, high = resampled(run, np.zeros((1, 4000)), units)
    deviation = 100 * run.std() / 10 / np.sqrt(4000)
    centre = 100 * run.mean() / 10
    assert (low, high) == pytest.approx(
        (centre - 1.96 * deviation, centre + 1.96 * deviation), abs=0.1 * deviation
    )


def test_identical_systems_do_not_differ():
    errors = np.random.default_rng(0).integers(0, 5, size=(3, 20))
    assert resampled(errors, errors, np.full(20, 7)) == [0, 0]


def test_a_constant_difference_has_no_spread():
    """The samples are paired: what is the same in both runs does not blur the difference."""
    base = np.random.default_rng(0).integers(0, 5, size=(3, 20))
    assert resampled(base + 1, base, np.full(20, 10)) == pytest.approx([10, 10])


def test_clusters_are_drawn_as_a_whole():
    """Two speakers who differ: only three different samples, hence the extremes."""
    errors, clusters = np.array([[0] * 10 + [1] * 10]), np.repeat([0, 1], 10)
    zero, units = np.zeros_like(errors), np.ones(20)
    assert resampled(errors, zero, units, clusters) == pytest.approx([0, 100])
    low, high = resampled(errors, zero, units)
    assert 20 < low < high < 80


def test_resampling_is_repeatable_and_independent_of_memory(monkeypatch):
    columns, clusters = np.arange(12.0).reshape(6, 2), np.arange(6)
    one = measure.resample(columns, clusters, 50)
    monkeypatch.setattr(measure, "CHUNK", 7)
    assert np.array_equal(one, measure.resample(columns, clusters, 50))


@pytest.mark.parametrize(
    ("low", "high", "seeds", "word"),
    [
        (-2, -1, 3, "better"), (1, 2, 3, "worse"), (-1, 1, 3, "inconclusive"),
        (0, 0, 3, "inconclusive"), (-2, -1, 2, "inconclusive"), (-2, 0, 5, "inconclusive"),
    ],
)  # fmt: skip
def test_verdicts(low, high, seeds, word):
    assert measure.verdict(low, high, seeds) == word


def test_the_interval_of_a_recovery():
    rng = np.random.default_rng(0)
    base = rng.normal(300, 5, (10_000, 3))
    oracle, run = base - rng.normal(200, 4, (10_000, 3)), base - 50.0
    low, high = measure.recovery_interval(run, base, oracle)
    assert low < 25 < high < 27 and low > 23
    # The oracle itself recovers all, the baseline nothing, in every replicate.
    assert measure.recovery_interval(oracle, base, oracle) == pytest.approx([100, 100])
    assert measure.recovery_interval(base, base, oracle) == [0, 0]
    # Where the oracle gains nothing too often, the share could be anything.
    assert measure.recovery_interval(run, base, base) == [-np.inf, np.inf]


def test_recovery():
    assert measure.recovery(20, 10, 10) == 100
    assert measure.recovery(20, 20, 10) == 0
    assert measure.recovery(20, 15, 10) == 50
    assert measure.recovery(10, 15, 10) is None


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with 10 speakers, a baseline, a better run and an oracle, three seeds each."""
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    for run, init in (("supervised", ""), ("base", "{init: supervised}"), ("pl", "{init: base}"),
                      ("oracle", "")):  # fmt: skip
        Path(f"conf/{run}.yaml").write_text(f"method: x\nrecipe: {init or '{}'}\n")
    Path("recipe.yaml").write_text(
        "test: [test, far]\nreport_together: [test, far]\nbaseline: base\nseeds: [1, 2, 3]\n"
    )
    words = "a b c d e f g h i j".split()
    for name in ("test", "far"):
        Path(f"data/{name}").mkdir(parents=True)
        keys = [f"s{s}-u{u}" for s in range(10) for u in range(4)]
        lines = "".join(f"{key} {' '.join(words)}\n" for key in keys)
        Path(f"data/{name}/text").write_text(lines)
        Path(f"data/{name}/utt2spk").write_text("".join(f"{k} {k[:2]}\n" for k in keys))
        for run, wrong in (("supervised", 5), ("base", 4), ("pl", 2), ("oracle", 1)):
            for seed in (1, 2, 3):
                folder = Path("exp", *([f"seed{seed}"] if seed > 1 else []), run)
                (folder / "infer" / name).mkdir(parents=True)
                text = " ".join(["x"] * wrong + words[wrong:])
                said = "".join(f"{key} {text}\n" for key in keys)
                (folder / "infer" / name / "text").write_text(said)
                made = {"commit": "abc", "python": "3", "machine": "m"}
                markers.write(
                    folder / "train.job.json",
                    {"wall_s": 60.0, "cpu_s": 30.0, "gpus": 0, "environment": made,
                     "shell": f"train {run}", "finished": "then", "max_rss_mb": 1},
                )  # fmt: skip
                (folder / "config.yaml").write_text("accum_grad: 2\n")
                epoch = "epoch results: [train] loss=1, total_count={}, [valid] total_count=7\n"
                log = "1" + epoch.format(10) + "2" + epoch.format(20)
                (folder / "train.log").write_text(log)
    return tmp_path


def test_from_files_to_the_table(recipe, capsys):
    measure.main([])
    result = json.loads(Path("exp/results.json").read_text())
    text = Path("RESULTS.md").read_text()
    assert text == capsys.readouterr().out[:-1]
    found = result["sets"]["test"]["against"]["base"]
    assert found["pl"] == {
        "seeds": [1, 2, 3], "difference": pytest.approx(-20), "relative": pytest.approx(50),
        "interval": pytest.approx([-20, -20]), "recovery": pytest.approx(200 / 3),
        "verdict": "better",
    }  # fmt: skip
    assert found["supervised"]["verdict"] == "worse"
    assert result["sets"]["test"]["against"]["supervised"]["oracle"]["recovery"] == 100
    assert result["sets"]["test+far"]["utterances"] == 80
    assert result["sets"]["test"]["drawn"] == "speakers"
    assert result["runs"]["pl"]["1"]["updates"] == 10
    assert "|test|pl|**20.00**|20.00|20.00|20.00|" in text
    assert "|test|pl|-20.00|[-20.00, -20.00]|50.0|66.7|3|better|" in text
    assert "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|" in text
    assert "|pl/test|40|400|80.0|20.0|0.0|0.0|20.0|100.0|" in text
    assert "|pl|base|1, 2, 3|10|1 min 00 s|30 s|0|" in text
    assert "./run.sh --method base,oracle,pl,supervised --seed 1,2,3" in text
    assert "# pl, training\ntrain pl\n" in text and "- commit: abc" in text
    assert str(recipe) not in text


def test_what_comes_before_a_run_is_counted_too(recipe):
    Path("exp/seed2/supervised/train.job.json").unlink()
    measure.main(["--run", "pl:1", "--run", "pl:2"])
    text = Path("RESULTS.md").read_text()
    assert "|supervised|random|1|10|1 min 00 s|30 s|0|" in text
    assert "|base|supervised|1, 2|10|1 min 00 s|30 s|0|" in text
    assert "All trainings together: 5 min 00 s of wall time, 2 min 30 s of CPU time." in text
    assert "./run.sh --method pl --seed 1,2" in text and "# base, training\ntrain base\n" in text


def test_the_table_is_the_same_twice(recipe):
    measure.main([])
    first = Path("RESULTS.md").read_text(), Path("exp/results.json").read_text()
    measure.main([])
    assert first == (Path("RESULTS.md").read_text(), Path("exp/results.json").read_text())


def test_two_seeds_are_inconclusive(recipe):
    measure.main(["--run", "base:1", "--run", "base:2", "--run", "pl:1", "--run", "pl:2"])
    found = json.loads(Path("exp/results.json").read_text())["sets"]["test"]["against"]["base"]
    assert found["pl"]["verdict"] == "inconclusive"
    assert found["pl"]["recovery"] is None  # no oracle was run


def test_only_seeds_that_both_have_are_compared(recipe):
    measure.main(["--run", "base:1", "--run", "base:2", "--run", "pl:2", "--run", "pl:3"])
    found = json.loads(Path("exp/results.json").read_text())["sets"]["test"]["against"]["base"]
    assert found["pl"]["seeds"] == [2]
    assert "|test|pl|**20.00**|–|20.00|20.00|" in Path("RESULTS.md").read_text()


def test_a_missing_hypothesis_is_deleted_words(recipe):
    path = Path("exp/pl/infer/test/text")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]) + "s0-u0\n")
    measure.main(["--run", "pl:1"])
    assert "no hypothesis" not in Path("RESULTS.md").read_text()  # recognised as nothing
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    measure.main(["--run", "pl:1"])
    text = Path("RESULTS.md").read_text()
    assert "pl seed 1, test: 1 utterances have no hypothesis" in text
    assert "|pl/test|40|400|78.0|19.5|2.5|0.0|22.0|100.0|" in text


def test_hypotheses_of_something_else_are_refused(recipe):
    with open("exp/pl/infer/test/text", "a") as file:
        file.write("other a b\n")
    with pytest.raises(SystemExit, match="1 hypotheses without reference: .*other"):
        measure.main([])
    with open("exp/pl/infer/test/text", "a") as file:
        file.write("other a b\n")
    with pytest.raises(SystemExit, match="'other' occurs twice"):
        measure.main([])


def test_few_speakers_are_not_drawn(recipe):
    lines = Path("data/test/text").read_text().splitlines()
    pairs = [f"{line.split()[0]} {line[1:2] > '4'}\n" for line in lines]
    Path("data/test/utt2spk").write_text("".join(pairs))
    reference = measure.read_reference("test", ["test"])
    assert reference.drawn == "utterances" and len(set(reference.clusters)) == 40
    Path("data/test/utt2spk").unlink()
    assert measure.read_reference("test", ["test"]).drawn == "utterances"


def test_different_origins_are_told_apart(recipe):
    marker = markers.read(Path("exp/pl/train.job.json"))
    marker["environment"]["commit"] = "def"
    markers.write(Path("exp/pl/train.job.json"), marker)
    measure.main([])
    text = Path("RESULTS.md").read_text()
    assert re.search(r"\npl seed 1:\n\n- commit: def", text)


def test_sclite_is_named_where_it_differs():
    row = {"run": "a", "seed": 1, "set": "t", "sclite": [1, 0, 0, 0], "jiwer": [0, 1, 0, 0]}
    result = {"sets": {}, "sclite": {"found": True, "differs": [row]}}
    assert "counts otherwise" in "\n".join(report._details(result, "word", "WER"))
    result["sclite"]["differs"] = []
    assert "sclite counts the same" in "\n".join(report._details(result, "word", "WER"))


def test_nothing_to_measure(recipe):
    Recipe()  # the defaults are valid
    with pytest.raises(SystemExit, match="no hypotheses in nowhere"):
        measure.main(["--expdir", "nowhere"])

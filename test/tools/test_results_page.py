"""tools/results_page.py: tables of pages from those of the recipes."""

import importlib.util
from pathlib import Path

import pytest

from espnet_pl.recipe import report
from espnet_pl.recipe.config import Recipe

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("results_page", ROOT / "tools/results_page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)

RATES = {"supervised": 30.0, "csl": 24.0, "oracle": 10.0}  # of words, in per cent
COSTS = {"supervised": (800, 100), "csl.first": (300, 30), "csl": (500, 100.5), "oracle": (800, 5)}


def result(**more):
    """The numbers of three runs of which one has phases; of two seeds and two sets of speech."""
    figures = {"snt": 9, "wrd": 90, "corr": 70, "sub": 30, "del": 0, "ins": 0, "s_err": 50}
    rates = RATES | more
    scores = {
        run: {
            "missing": {},
            "word": {seed: {**figures, "err": rate + seed} for seed in (-1, 1)},
            "character": {seed: {**figures, "err": 7.0} for seed in (-1, 1)},
        }
        for run, rate in rates.items()
    }
    against = {
        run: {
            "difference": rate - 30.0, "interval": [rate - 31, rate - 29.0], "relative": 1.0,
            "recovery": 5.0 * (30 - rate), "seeds": [-1, 1], "verdict": "inconclusive",
        }
        for run, rate in rates.items()
        if run != "supervised"
    }  # fmt: skip
    entry = {"drawn": "speakers", "runs": scores, "against": {"supervised": against}}
    costs = {
        run: {
            seed: {"updates": updates, "wall_s": 1, "cpu_s": cpu_s, "gpus": 0, "shell": "",
                   "environment": None}
            for seed in (-1, 1)
        }
        for run, (updates, cpu_s) in COSTS.items()
    }  # fmt: skip
    before = {"csl.first": costs.pop("csl.first")}
    return {
        "sets": {"dev": entry, "test+far": entry}, "runs": costs, "before": before, "inits": {},
        "sclite": {"found": False}, "asr_config": "conf/x.yaml", "expdir": "exp", "output": "X.md",
    }  # fmt: skip


@pytest.fixture
def egs(tmp_path):
    """Two recipes, of which the first has another model, too."""
    for name, other in (("toy", result(csl=18.0)), ("small", None)):
        folder = tmp_path / name / "pl1"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("baseline: supervised\n")
        (folder / "RESULTS.md").write_text(report.markdown(result(), Recipe(), other))
    return tmp_path


def test_the_table_of_a_recipe(egs):
    text = "By hand.\n<!-- results toy: test+far -->\nold\n<!-- end -->\nMore.\n"
    filled = page.fill(text, egs)
    assert filled.startswith("By hand.\n<!-- results toy") and filled.endswith("end -->\nMore.\n")
    assert filled.splitlines()[4:-2] == [
        "|`supervised`|**30.00**|||800|1.00|",
        "|`csl`|**24.00**|-6.00 [-7.00, -5.00] inconclusive|30.0|800|1.30|",  # 30 + 100 of 100 s
        "|`oracle`|**10.00**|-20.00 [-21.00, -19.00] inconclusive|100.0|800|0.05|",
        "|a transducer||||||",
        "|`supervised`|**30.00**|||800|1.00|",
        "|`csl`|**18.00**|-12.00 [-13.00, -11.00] inconclusive|60.0|800|1.30|",
        "|`oracle`|**10.00**|-20.00 [-21.00, -19.00] inconclusive|100.0|800|0.05|",
    ]
    assert page.fill(filled, egs) == filled


def test_costs_that_are_not_known(egs):
    path = egs / "small/pl1/RESULTS.md"
    path.write_text(path.read_text().replace("|300|", "|?|"))  # of its first phase
    filled = page.fill("<!-- results small: dev -->\n<!-- end -->\n", egs).splitlines()
    assert filled[3].endswith("|800|1.00|")
    assert filled[4].endswith("|30.0|?|?|")


def test_a_table_of_several_recipes(egs):
    text = "<!-- rates small dev, toy test+far: csl oracle lpm -->\n<!-- end -->\n"
    assert page.fill(text, egs).splitlines()[1:-1] == [
        "|run|small|toy|",
        "|---|---|---|",
        "|`csl`|24.0|24.0|",
        "|`oracle`|10.0|10.0|",
        "|`csl`, a transducer|–|18.0|",
        "|`oracle`, a transducer|–|10.0|",
    ]


@pytest.mark.parametrize("name", page.PAGES)
def test_pages_say_what_the_results_are(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.fill(text) == text


@pytest.mark.parametrize(
    ("said", "seconds"), [("0.7 s", 0.7), ("12 s", 12), ("3 min 05 s", 185), ("2 h 04 min", 7440)]
)
def test_durations(said, seconds):
    assert page.seconds(said) == seconds

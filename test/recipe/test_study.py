"""recipe/study: cells from a grid, what is run of them, and what is kept."""

import json
from pathlib import Path

import pytest

from espnet_pl.recipe import record, study
from espnet_pl.recipe.config import RecipeError
from test.recipe.toy import call

STUDY = """
question: does it?
common: {method: slimipl, recipe: {init: supervised}, method_conf: {capacity: 0}}
grid:
    target: {hard: {}, soft: {method_conf: {soft: 1.0}}}
    ratio: {1: {method_conf: {unlabelled: 1}}, 10: {method_conf: {unlabelled: 10}}}
cells:
    soft-10-ema: {like: soft-10, method_conf: {teacher: ema}, seeds: [1, 2]}
    again: {like: soft-10-ema}
    alone: {method: supervised, recipe: {init: continued}}
"""
LOG = """
[x] 2026-01-01 (trainer:1) INFO: 1epoch:train:1-50batch: iter_time=0.01, blank_share=0.9, pseudo=8.0
[x] 2026-01-01 (trainer:1) INFO: 1epoch:train:51-100batch: blank_share=9.5e-01, pseudo=nan, clip=1.0
(trainer:394) INFO: 1epoch results: [train] pseudo=8.0, total_count=100, [valid] cer_ctc=0.3, t=1
[x] 2026-01-01 (trainer:1) INFO: 2epoch:train:1-50batch: blank_share=1.0
(trainer:394) INFO: 2epoch results: [train] pseudo=8.0, total_count=200, [valid] cer_ctc=-0.2, t=1
"""


@pytest.fixture(autouse=True)
def cells(recipe):
    Path("conf/studies").mkdir()
    Path("conf/studies/soft.yaml").write_text(STUDY)


def records():
    return sorted(path.name for path in Path("../../../docs/studies/data/soft").glob("*"))


def test_cells_are_all_combinations_and_those_named():
    found = study.cells(study.config.mapping(Path("conf/studies/soft.yaml")), "x")
    assert [*found] == ["hard-1", "hard-10", "soft-1", "soft-10", "soft-10-ema", "again", "alone"]
    conf = {"capacity": 0, "soft": 1.0, "unlabelled": 10}
    assert found["soft-10"]["method_conf"] == conf
    assert found["soft-10-ema"]["method_conf"] == {**conf, "teacher": "ema"}
    # Whoever is like another has its settings, and not its seeds.
    assert found["again"] == {k: v for k, v in found["soft-10-ema"].items() if k != "seeds"}
    assert found["hard-1"]["method_conf"] == {"capacity": 0, "unlabelled": 1}
    assert found["alone"]["recipe"] == {"init": "continued"}


def test_a_study_runs_its_cells_and_keeps_a_record_of_each():
    code, started = call("--study", "soft")
    assert code == 0
    assert started.count("train supervised seed 1") == 1
    assert "train supervised seed 2" in started  # the second seed of one cell starts there
    first = [name for name in started if "soft.hard-1 " in name]
    assert [name.split()[0] for name in first] == ["train", "export", "infer", "join", "record"]
    assert started.index("record soft.hard-1 seed 1") < started.index("train soft.hard-10 seed 1")
    assert records() == [
        "toy.again.1.json", "toy.alone.1.json", "toy.hard-1.1.json", "toy.hard-10.1.json",
        "toy.soft-1.1.json", "toy.soft-10-ema.1.json", "toy.soft-10-ema.2.json",
        "toy.soft-10.1.json",
    ]  # fmt: skip
    path = Path("../../../docs/studies/data/soft/toy.soft-10-ema.2.json")
    kept = json.loads(path.read_text())
    assert (kept["corpus"], kept["cell"], kept["seed"]) == ("toy", "soft-10-ema", 2)
    assert kept["settings"]["method_conf"]["teacher"] == "ema"
    # Said: one, two, three; recognised by the stand-in: one, one, one.
    assert kept["errors"] == {
        "dev": {"s1-a": [1, 0, 0, 0], "s1-b": [0, 1, 0, 0], "s2-c": [0, 1, 0, 0]}
    }
    assert call("--study", "soft") == (0, [])  # nothing is done twice
    assert not Path("RESULTS.md").exists()


def test_a_study_leaves_the_other_runs_alone():
    assert call()[0] == 0
    started = call("--study", "soft")[1]
    assert "train supervised seed 1" not in started and "create_dataset" not in started
    assert "validate" not in started
    assert call() == (0, [])


@pytest.mark.parametrize("before", [(), ("--method", "hard-1")])
def test_dry_run_touches_nothing(before, capsys):
    if before:
        assert call("--study", "soft", *before)[0] == 0
        Path("exp/studies/soft/soft-1.yaml").unlink()
    there = set(Path(".").rglob("*"))
    assert call("--study", "soft", "--dry_run") == (0, [])
    assert set(Path(".").rglob("*")) == there
    out = capsys.readouterr().out
    assert "exp/studies/soft/soft-1.yaml" in out and "espnet_pl.recipe.record" in out


def test_cells_and_seeds_can_be_chosen():
    started = call("--study", "soft", "--method", "soft-10*", "--seed", "2")[1]
    trained = [name for name in started if name.startswith("train soft.")]
    assert trained == ["train soft.soft-10-ema seed 2"]
    started = call("--study", "soft", "--method", "alone,hard-1")[1]
    trained = [name for name in started if name.startswith("train soft.")]
    assert trained == ["train soft.hard-1 seed 1", "train soft.alone seed 1"]


def test_a_changed_cell_is_not_taken_for_the_old_one(capsys):
    assert call("--study", "soft", "--method", "hard-1")[0] == 0
    Path("conf/studies/soft.yaml").write_text(STUDY.replace("capacity: 0", "capacity: 9"))
    assert call("--study", "soft", "--method", "hard-1")[0] == 1
    assert "capacity" in capsys.readouterr().err
    started = call("--study", "soft", "--method", "hard-1", "--force")[1]
    assert "train soft.hard-1 seed 1" in started and "record soft.hard-1 seed 1" in started


def test_records_of_a_trial_stay_in_it():
    assert call("--study", "soft", "--method", "hard-1", "--expdir", "trial")[0] == 0
    assert Path("trial/records/soft/toy.hard-1.1.json").exists() and not records()


def test_alarms_of_the_monitor_are_kept():
    assert call("--study", "soft", "--method", "hard-1")[0] == 0
    (path,) = Path("../../../docs/studies/data/soft").glob("*")
    assert json.loads(path.read_text())["alarms"] == []
    folder = Path("exp/soft.hard-1")
    with (folder / "train.log").open("a") as log:
        log.write("WARNING: collapse at update 112: loops\nWARNING: collapse at update 90: x\n")
    assert record.record(folder, folder.parent / "studies/soft/hard-1.yaml", ["dev"], 1)[
        "alarms"
    ] == [112, 90]


def test_curves_count_updates_over_epochs():
    found = record.curves(LOG)
    assert found["train"]["blank_share"] == [[50, 0.9], [100, 0.95], [150, 1.0]]
    assert found["train"]["pseudo"][0] == [50, 8.0] and found["train"]["pseudo"][1][1] is None
    assert found["valid"]["cer_ctc"] == [[100, 0.3], [200, -0.2]]
    assert not {"iter_time", "clip", "time", "total_count"} & {*found["train"], *found["valid"]}


@pytest.mark.parametrize(
    "change, message",
    [
        (("question", "questoin"), "did you mean 'question'"),
        (("like: soft-10", "like: soft-11"), "'soft-11' is not known"),
        (("init: continued", "init: continud"), "did you mean 'continued'"),
        (("[1, 2]", "many"), "seeds: expected a list of numbers"),
        (("alone:", "a/b:"), "a cell is named by"),
        (("question: does it?", "sets: [tset]"), "did you mean 'test'"),
        (("question: does it?", "sets: test"), "sets: expected a list of test sets, got 'test'"),
        (
            ("alone: {method: supervised, recipe: {init: continued}}", "alone: supervised"),
            "conf/studies/soft.yaml, alone: expected 'name: value' lines, got 'supervised'",
        ),
        (
            (
                "ratio: {1: {method_conf: {unlabelled: 1}}, 10: {method_conf: {unlabelled: 10}}}",
                "ratio: [1, 2]",
            ),
            "grid: ratio: expected 'name: value' lines, got [1, 2]",
        ),
        (("hard: {}", "hard: 1"), "grid: target: hard: expected 'name: value' lines, got 1"),
        (("question: does it?", "model: 3"), "model: expected a file such as conf/asr.yaml, got 3"),
        (("question: does it?", "model: conf/ars.yaml"), "did you mean 'conf/asr.yaml'"),
    ],
)
def test_mistakes_are_told_before_work(change, message, capsys):
    Path("conf/studies/soft.yaml").write_text(STUDY.replace(*change))
    assert call("--study", "soft") == (2, [])
    assert message in capsys.readouterr().err


def test_a_study_is_of_the_model_that_it_names(capsys):
    Path("conf/asr_transducer.yaml").write_text("task: asr_transducer\n")
    Path("conf/decode_asr_transducer.yaml").write_text("beam_size: 1\n")
    named = STUDY.replace("question: does it?", "model: conf/asr_transducer.yaml")
    Path("conf/studies/soft.yaml").write_text(named)
    assert call("--study", "soft", "--method", "hard-1")[0] == 0
    assert records() == ["toy.hard-1.1.json"]
    assert Path("exp_asr_transducer/soft.hard-1/model/model.pth").exists()
    assert not Path("exp").exists()
    # The same cell of another model would take the place of its record.
    assert call("--study", "soft", "--asr_config", "conf/asr.yaml") == (2, [])
    message = "--asr_config conf/asr.yaml: the study soft is of conf/asr_transducer.yaml"
    assert message in capsys.readouterr().err
    assert call("--study", "soft", "--asr_config", "conf/asr_transducer.yaml", "--dry_run")[0] == 0


def test_studies_cells_and_seeds_that_are_not_there(capsys):
    for words, message in (
        (("--study", "sotf"), "did you mean 'soft'"),
        (("--study", "soft", "--method", "hrad-1"), "did you mean 'hard-1'"),
        (("--study", "soft", "--method", "alone", "--seed", "7"), "asks for none of [7]"),
    ):
        assert call(*words) == (2, [])
        assert message in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no cells"):
        study.cells({"seeds": [1]}, "x")
    with pytest.raises(RecipeError, match="like: 'x'"):
        study.cells({"cells": {"a": {"like": "x"}}}, "x")

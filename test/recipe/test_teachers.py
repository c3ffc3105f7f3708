"""Runs that are taught: who says what for whom, when it is said again, and what is refused."""

import json
from pathlib import Path

import pytest

from espnet_pl.recipe import check, stages
from espnet_pl.recipe.config import RecipeError
from test.recipe.toy import call, plan, tree

TAUGHT = "method: taught\nmethod_conf: {{beam: {}}}\nmax_epoch: {}\nrecipe: {{teachers: [{}]}}\n"


@pytest.fixture(autouse=True)
def taught(recipe):
    """``a`` and ``b`` ask the same, ``c`` another thing."""
    for name, beam, epochs in (("a", 4, 1), ("b", 4, 2), ("c", 8, 1)):
        write(name, beam, epochs)


def write(name, beam=4, epochs=1, teacher="continued", more=""):
    Path(f"conf/{name}.yaml").write_text(TAUGHT.format(beam, epochs, teacher) + more)


def jobs(*chosen, seeds=(1,), **more):
    return {job.name: job for job in stages.train(plan(chosen, seeds, **more))}


def labels(found):
    return [name for name in found if name.startswith("label ")]


def test_runs_that_ask_the_same_share_what_is_said():
    found = jobs("a", "b", "c", seeds=(1, 3))
    names = [*found]
    first, other, *third = labels(found)
    assert len(third) == 2 and first.split()[:2] == ["label", "continued"]
    assert (
        names.index("export continued seed 1") < names.index(first) < names.index("train a seed 1")
    )
    store = found[first].log.parent
    assert store == Path("exp/continued/teaches") / first.split()[2]
    assert found[first].outputs == (store / "done.json",)
    assert found[first].shell() == (
        "python3 -m espnet_pl.bridge.label --config conf/asr.yaml --config conf/a.yaml "
        "--teacher exp/continued/model --wav data/train_unlabelled/wav.scp "
        f"--shape data/train_unlabelled/speech_shape --output {store} --ngpu 0"
    )
    for name, of in (("a", first), ("b", first), ("c", other)):
        job, store = found[f"train {name} seed 1"], found[of].log.parent
        assert f"--teachers exp/continued/model --teacher_store {store} " in job.shell()
        assert "--teacher_mode" not in job.argv
        assert {store / "done.json", Path("exp/continued/model/model.pth")} <= {*job.inputs}
    third = found[third[0]]
    assert third.log.parent == Path("exp/seed3/continued/teaches") / first.split()[2]
    assert f"--teacher_store {third.log.parent} " in found["train b seed 3"].shell()


def test_another_unlabelled_set_is_another_store():
    Path("conf/b.yaml").write_text(
        "method: taught\nmethod_conf: {beam: 4}\nrecipe: {teachers: [continued], unlabelled: far}\n"
    )
    assert len(labels(jobs("a", "b"))) == 2


@pytest.mark.parametrize(
    ("teacher", "model", "files"),
    [
        ("old/model", "old/model", ["old/model/config.yaml", "old/model/model.pth"]),
        ("old/model.zip", "old/model.zip", ["old/model.zip"]),
        ("model.zip", "model.zip", ["model.zip"]),
        ("x/valid.pth", "x/valid.pth", ["x/config.yaml", "x/valid.pth"]),
    ],
)
def test_a_model_from_elsewhere_is_asked_once_for_all_seeds(teacher, model, files):
    write("a", teacher=teacher)
    write("b", teacher=teacher)
    found = jobs("a", "b", seeds=(1, 2))
    (name,) = labels(found)
    stem = Path(teacher).stem
    assert name.split()[1] == stem and "seed" not in name
    store = Path(f"exp/teaches/{stem}-{name.split()[2]}")
    assert found[name].outputs == (store / "done.json",)
    assert {*map(Path, files)} <= {*found[name].inputs} & {*found["train b seed 2"].inputs}
    for run, seed in (("a", 1), ("b", 2)):
        job = found[f"train {run} seed {seed}"]
        assert f"--teachers {model} --teacher_store {store} " in job.shell()
    assert "train continued seed 1" not in found


def test_models_of_the_same_name_are_not_mixed_up():
    write("a", teacher="old/model")
    write("b", teacher="new/model")
    assert (
        len({job.log for name, job in jobs("a", "b").items() if name in labels(jobs("a", "b"))})
        == 2
    )


def test_a_file_that_batches_are_made_of_is_watched():
    write("a", more="batching: label_aware\nbatching_labels: local/rare.txt\n")
    write("b")
    found = jobs("a", "b")
    assert Path("local/rare.txt") in found["train a seed 1"].inputs
    assert Path("local/rare.txt") not in found["train b seed 1"].inputs


def test_online_nothing_is_stored():
    write("b", more="teacher_mode: online\n")
    found = jobs("b")
    assert not labels(found)
    job = found["train b seed 1"]
    assert "--teachers exp/continued/model" in job.shell()
    assert not {"--teacher_store", "--teacher_mode"} & {*job.argv}
    found = jobs("a", "b", teacher_mode="online")
    assert not labels(found)
    assert "--teacher_mode online" in found["train a seed 1"].shell()
    assert "--teacher_mode" not in found["train b seed 1"].argv
    found = jobs("b", teacher_mode="stored")
    assert len(labels(found)) == 1
    assert "--teacher_mode stored --teacher_store" in found["train b seed 1"].shell()


def test_a_teacher_may_have_other_tokens():
    Path("conf/continued.yaml").write_text("method: supervised\nrecipe: {token_type: char}\n")
    assert "train a seed 1" in jobs("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: taught\n", "a.yaml, recipe: teachers: method taught learns from one.* are 0"),
        (TAUGHT.format(1, 1, "continued, oracle"), "there are 2"),
        (TAUGHT.format(1, 1, "continud"), "did you mean 'continued'"),
        (TAUGHT.format(1, 1, "a"), "need each other: a <- a"),
        ("method: supervised\nrecipe: {teachers: [oracle]}\n", "no use for other teachers"),
        ("method: slimipl\nrecipe: {teachers: [x/y]}\n", "x/y: method slimipl takes runs only"),
    ],
)
def test_teachers_that_cannot_be(text, message, capsys):
    Path("conf/a.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        jobs("a")
    before = tree()
    assert call("--method", "a") == (2, []) and tree().keys() <= before.keys() | {
        Path("exp"), Path("exp/checked.json")
    }  # fmt: skip


def test_everything_is_said_once():
    started = call("--method", "a")[1]
    (said,) = labels(started)
    assert started.index(said) == started.index("train a seed 1") - 1
    assert call("--method", "a") == (0, [])
    started = call("--method", "b")[1]  # another configuration, which asks the same
    assert "train b seed 1" in started and not labels(started)
    assert call("--method", "a,b") == (0, [])
    assert len(labels(call("--method", "c")[1])) == 1


def test_what_is_asked_may_change_and_the_rest_too(capsys):
    call("--method", "a")
    write("a", epochs=5)
    assert call("--method", "a")[0] == 1  # the training is another one
    started = call("--method", "a", "--force")[1]
    assert "train a seed 1" in started and not labels(started)
    write("a", beam=5, epochs=5)
    started = call("--method", "a", "--force")[1]
    assert len(labels(started)) == 1
    assert len([*Path("exp/continued/teaches").iterdir()]) == 2


def test_a_teacher_that_has_changed_says_everything_anew(capsys):
    call("--method", "a")
    Path("conf/continued.yaml").write_text("method: supervised\nmax_epoch: 7\n")
    assert call("--method", "a")[0] == 1
    assert "train continued seed 1" in capsys.readouterr().err
    started = call("--method", "continued,a", "--force")[1]
    assert len(labels(started)) == 1 and "train a seed 1" in started
    (old,) = Path("exp").glob("continued.old-*")
    assert [*old.glob("teaches/*/done.json")] and [*Path("exp").glob("continued/teaches/*")]


def test_a_model_from_elsewhere_that_has_changed(capsys):
    Path("old").mkdir()
    Path("old/m.zip").write_text("1")
    write("a", teacher="old/m.zip")
    assert len(labels(call("--method", "a")[1])) == 1
    assert not labels(call("--method", "a", "--force")[1])
    Path("old/m.zip").write_text("2")
    assert call("--method", "a")[0] == 1
    assert "old/m.zip changed" in capsys.readouterr().err
    assert len(labels(call("--method", "a", "--force")[1])) == 1
    Path("old/m.zip").unlink()
    assert call("--method", "a", "--force")[0] == 1
    assert "missing old/m.zip" in capsys.readouterr().err


def test_the_flag_of_a_call(capsys):
    assert call("--method", "a", "--teacher_mode", "onlin")[0] == 2
    assert "invalid choice" in capsys.readouterr().err
    before = tree()
    assert call("--method", "a", "--dry_run") == (0, []) and tree() == before
    out = capsys.readouterr().out
    assert "espnet_pl.bridge.label" in out and "--teacher_store exp/continued/teaches/" in out
    call("--method", "a", "--teacher-mode", "online", "--dry_run")
    out = capsys.readouterr().out
    assert "bridge.label" not in out and "--teacher_mode online" in out


def test_cells_of_a_study_share_too():
    Path("conf/studies").mkdir()
    Path("conf/studies/s.yaml").write_text(
        "common: {method: taught, method_conf: {beam: 4}, recipe: {teachers: [continued]}}\n"
        "cells: {x: {max_epoch: 1}, y: {max_epoch: 2}, z: {like: x, method_conf: {beam: 9}}}\n"
    )
    code, started = call("--study", "s")
    assert code == 0 and len(labels(started)) == 2
    assert call("--study", "s") == (0, [])
    assert not labels(call("--method", "a")[1])  # and with the runs


def test_verdicts_of_an_older_release_are_asked_for_again(monkeypatch):
    call("--method", "a", "--stop_stage", "train")
    memory = Path("exp/checked.json")
    known = json.loads(memory.read_text())
    assert all(isinstance(verdict, dict) for verdict in known.values())
    memory.write_text(json.dumps(dict.fromkeys(known, True)))
    assert call("--method", "a", "--stop_stage", "train") == (0, [])
    monkeypatch.setattr(check, "ask", lambda files: pytest.fail("asked again"))
    assert call("--method", "a", "--stop_stage", "train") == (0, [])

"""Runs in phases: what each starts from, goes on from, and is redone for; cells; mistakes."""

import json
from pathlib import Path

import pytest

from espnet_pl.recipe import config, record, stages, study
from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.runs import load_phases, load_runs
from test.recipe.test_study import LOG
from test.recipe.toy import call, plan, tree

PHASED = """
optim_conf: {lr: 0.1}
recipe:
    init: supervised
    phases:
        contrast: {method: taught, method_conf: {beam: 4}, recipe: {teachers: [continued]}}
        more: {method: slimipl, max_epoch: 3}
        tune: {method: supervised, optim_conf: {lr: 0.2}, recipe: {take: encoder}}
"""
STUDY = """
common: {recipe: {init: supervised}}
cells:
    whole:
        recipe:
            phases:
                first: {method: slimipl, method_conf: {capacity: 4}, max_epoch: 2}
                last: {method: supervised, max_epoch: 3}
    other: {like: whole, recipe: {phases: {first: {method_conf: {capacity: 9}}}}}
"""


@pytest.fixture(autouse=True)
def phased(recipe):
    Path("conf/phased.yaml").write_text(PHASED)


def jobs(chosen=("phased",), seeds=(1,)):
    return {job.name: job for job in stages.train(plan(chosen, seeds))}


def confs(**contents):
    return {Path(f"conf/{name}.yaml"): content for name, content in contents.items()}


def test_each_phase_starts_from_the_one_before():
    found = jobs(seeds=(1, 3))
    names = [name for name in found if name.startswith("train") and "3" not in name]
    ordered = ["supervised", "phased.contrast", "phased.more", "phased"]
    assert [n for n in names if "continued" not in n] == [f"train {n} seed 1" for n in ordered]
    first, more, last = (found[f"train phased{n} seed 3"] for n in (".contrast", ".more", ""))
    for job, start in (
        (first, "exp/seed3/supervised/model/model.pth"),
        (more, "exp/seed3/phased.contrast/model/model.pth"),
        (last, "exp/seed3/phased.more/model/model.pth"),
    ):
        assert Path(start) in job.inputs
        own = f"--init_param {start}" + (":encoder:encoder" if job is last else "")
        assert own in [f"{a} {b}" for a, b in zip(job.argv, job.argv[1:])]
    assert first.log == Path("exp/seed3/phased.contrast/train.log")
    assert last.log == Path("exp/seed3/phased/train.log")
    # Each phase's own configuration, wherever it is trained; teachers are of the one that asks.
    assert "--config conf/asr.yaml --config exp/phases/phased.contrast.yaml --seed" in first.shell()
    assert "--config exp/phases/phased.tune.yaml" in last.shell()
    assert "--teachers" in first.argv and "--teachers" not in last.argv
    assert "--unlabelled_shape_file" in more.argv and "--unlabelled_shape_file" not in last.argv


def test_what_a_phase_says_is_over_what_the_run_says():
    runs = load_runs(config.load_recipe())
    first, last = runs["phased.contrast"], runs["phased"]
    assert (first.method, last.method) == ("taught", "supervised")
    assert last.before == ("phased.contrast", "phased.more") and first.before == ()
    assert first.written["optim_conf"] == {"lr": 0.1} and last.written["optim_conf"] == {"lr": 0.2}
    assert "method_conf" not in last.written and "phases" not in last.written["recipe"]
    model = Path("conf/asr")
    model.mkdir()
    (model / "phased.yaml").write_text("recipe: {phases: {tune: {max_epoch: 7}}}\n")
    last = load_runs(config.load_recipe())["phased"]
    assert last.written["max_epoch"] == 7 and last.method == "supervised"


def test_one_phase_is_a_run():
    Path("conf/phased.yaml").write_text("recipe: {phases: {only: {method: supervised}}}\n")
    runs = load_runs(config.load_recipe())
    assert runs["phased"].before == () and "phased.only" not in runs


def test_everything_once_and_then_nothing():
    code, started = call("--method", "phased")
    assert code == 0
    trained = [name.split()[1] for name in started if name.startswith("train ")]
    assert trained[-3:] == ["phased.contrast", "phased.more", "phased"]
    assert {n.split()[1] for n in started if n.startswith("infer")} == {"phased"}
    assert call("--method", "phased") == (0, [])
    found = json.loads(Path("exp/results.json").read_text())
    assert [*found["runs"]] == ["phased"]
    assert {"phased.contrast", "phased.more", "supervised"} <= {*found["before"]}
    assert "phased.more" in Path("RESULTS.md").read_text()  # what it cost


def test_a_changed_phase_is_refused_and_force_redoes_it_and_those_after(capsys):
    assert call("--method", "phased,continued")[0] == 0
    assert call("--method", "continued", "--stage", "measure")[0] == 0
    assert "left out" not in capsys.readouterr().out
    assert "|phased/" in Path("RESULTS.md").read_text()
    Path("conf/phased.yaml").write_text(PHASED.replace("max_epoch: 3", "max_epoch: 4"))
    assert call("--method", "phased") == (1, [])
    assert "phased.more.yaml: max_epoch: 3 -> 4" in capsys.readouterr().err
    assert call("--method", "continued", "--stage", "measure")[0] == 0
    assert "left out of the table: phased seed 1" in capsys.readouterr().out
    code, started = call("--method", "phased", "--force")
    trained = [name.split()[1] for name in started if name.startswith("train ")]
    assert code == 0 and trained == ["phased.contrast", "phased.more", "phased"]
    assert [*Path("exp").glob("phased.more.old-*")] and [*Path("exp").glob("phased.old-*")]


def test_it_goes_on_with_the_phase_that_failed():
    from test.recipe.toy import BAD

    BAD.add("train phased.more seed 1")
    try:
        assert call("--method", "phased")[0] == 1
    finally:
        BAD.clear()
    code, started = call("--method", "phased")
    trained = [name.split()[1] for name in started if name.startswith("train ")]
    assert code == 0 and trained == ["phased.more", "phased"]


def test_dry_run_touches_nothing(capsys):
    before = tree()
    assert call("--method", "phased", "--dry_run") == (0, []) and tree() == before
    out = capsys.readouterr().out
    assert "exp/phases/phased.contrast.yaml" in out and "train phased.more seed 1" in out


def test_help_lists_them(capsys):
    before = tree()
    with pytest.raises(SystemExit):
        call("--help")
    assert "starts from phased.more" in capsys.readouterr().out and tree() == before


def test_cells_change_a_phase_and_records_are_of_all():
    Path("conf/studies").mkdir()
    Path("conf/studies/s.yaml").write_text(STUDY)
    code, started = call("--study", "s")
    assert code == 0
    trained = [name.split()[1] for name in started if name.startswith("train s.")]
    assert trained == ["s.whole.first", "s.whole", "s.other.first", "s.other"]
    files = config.mapping(Path("exp/studies/s/other.first.yaml"))
    assert files["method_conf"] == {"capacity": 9} and files["recipe"]["init"] == "supervised"
    folder = Path("../../../docs/studies/data/s")
    assert sorted(p.name for p in folder.glob("*")) == ["toy.other.1.json", "toy.whole.1.json"]
    kept = json.loads((folder / "toy.other.1.json").read_text())
    phases = kept["settings"]["recipe"]["phases"]
    assert phases["first"]["method_conf"]["capacity"] == 9 and phases["last"]["max_epoch"] == 3
    made = [json.loads(Path(f"exp/{n}/train.job.json").read_text()) for n in trained[2:]]
    assert kept["wall_s"] == sum(marker["wall_s"] for marker in made)
    assert call("--study", "s") == (0, [])
    changed = STUDY.replace("max_epoch: 2", "max_epoch: 5")
    Path("conf/studies/s.yaml").write_text(changed)
    assert call("--study", "s", "--method", "whole")[0] == 1
    started = call("--study", "s", "--method", "whole", "--force")[1]
    assert "train s.whole.first seed 1" in started and "record s.whole seed 1" in started


def test_updates_and_curves_go_on_over_phases():
    assert call("--method", "phased", "--stop_stage", "infer")[0] == 0
    folders = [Path(f"exp/phased{name}") for name in (".contrast", "")]
    for folder in folders:
        (folder / "train.log").write_text(LOG)
        (folder / "infer/dev").mkdir(parents=True, exist_ok=True)
    for folder, update in zip(folders, (90, 112)):
        with (folder / "train.log").open("a") as log:
            log.write(f"WARNING: collapse at update {update}: loops\n")
    (folders[0] / "config.yaml").write_text("accum_grad: 2\n")
    (folders[1] / "infer/dev/text").write_text(Path("data/dev/text").read_text())
    kept = record.record(folders[1], Path("conf/phased.yaml"), ["dev"], 1, folders[:1])
    assert kept["updates"] == 200 // 2 + 200
    assert kept["alarms"] == [90, 100 + 112]
    assert kept["curves"]["train"]["blank_share"][3:] == [[250, 0.9], [300, 0.95], [350, 1.0]]
    assert [update for update, _ in kept["curves"]["valid"]["cer_ctc"]] == [100, 200, 300, 400]
    alone = record.record(folders[1], Path("conf/phased.yaml"), ["dev"], 1)
    assert alone["updates"] == 200 and alone["wall_s"] <= kept["wall_s"]
    (folders[0] / "train.log").write_text("")
    kept = record.record(folders[1], Path("conf/phased.yaml"), ["dev"], 1, folders[:1])
    assert kept["updates"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": {}}, "conf/x.yaml, recipe: phases: expected 'name: {what differs}' lines"),
        ({"phases": [{"method": "supervised"}]}, "phases: expected 'name:"),
        ({"phases": {"a": ["x"]}}, "phases: a: expected 'name: value' lines"),
        ({"phases": {"a": {"recipe": "x"}}}, "phases: a: expected 'name: value' lines"),
        ({"phases": {"a": {"max_epoch": 1}}}, "phases: a: it has no method"),
        ({"phases": {"a/b": {"method": "supervised"}}}, "named by letters"),
        (
            {"phases": {"a": {"method": "x"}, "b": {"method": "x", "recipe": {"init": "a"}}}},
            "phases: b: init: it starts from the phase before",
        ),
        ({"phases": {"a": {"method": "x", "recipe": {"tkae": "x"}}}}, "did you mean 'take'"),
        ({"phases": {"a": {"method": "x", "recipe": {"take": "encodr"}}}}, "mean 'encoder'"),
        ({"phsaes": {}}, "'phsaes' is not known"),
    ],
)
def test_phases_that_cannot_be(options, message):
    contents = confs(asr={}, x={"recipe": options, "method": "x"})
    if "no method" in message:
        del contents[Path("conf/x.yaml")]["method"]
    with pytest.raises(RecipeError) as refused:
        load_phases("x", contents, config.Recipe(), Path("exp/phases/x"))
    assert message in str(refused.value)


def test_a_cell_without_a_method_is_named():
    Path("conf/studies").mkdir()
    Path("conf/studies/s.yaml").write_text("cells: {a: {max_epoch: 1}}\n")
    with pytest.raises(RecipeError, match="a: it has no method"):
        study.load("s", config.Recipe(), {}, config.ASR, Path("exp"))

"""./run.sh of a recipe from its first stage to its table, with little data and a few updates."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from espnet_pl.bridge.merge import merge
from espnet_pl.recipe import check, config
from espnet_pl.recipe.runs import load_runs, write_phases
from test.egs.corpora import SMALL, needs_speech

ROOT = Path(__file__).parents[2]


def small_recipe(corpus, folder):
    """A copy of the recipe in which every run ends after a few updates."""
    shutil.copytree(
        ROOT / f"egs/{corpus}/pl1",
        folder,
        ignore=lambda top, names: (
            {n for n in names if n in ("data", "dump", "log")}
            | {n for n in names if n.startswith(("exp", "RESULTS"))}
        ),
    )
    (folder / "path.sh").write_text("")  # the environment is this one; path.sh has its own tests
    for conf in folder.glob("conf/**/*.yaml"):
        settings = yaml.safe_load(conf.read_text()) or {}
        if conf.name.startswith("asr"):
            settings.update(num_iters_per_epoch=4, log_interval=2)
        phases = (settings.get("recipe") or {}).get("phases", {}).values()
        for part in (settings, *phases):
            if "max_epoch" in part:
                part["max_epoch"] = 1
        conf.write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def run_sh(folder, corpus, *options):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ours = {"PATH": path, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["./run.sh", *options],
        cwd=folder,
        env={**os.environ, **ours, "local_data_opts": SMALL[corpus]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("corpus", SMALL)
def test_every_run_has_a_configuration_that_can_be(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(small_recipe(corpus, tmp_path / corpus / "pl1"))
    recipe = config.load_recipe()
    runs = load_runs(recipe)
    assert {*recipe.methods} <= {*runs}
    write_phases(runs.values())
    others = load_runs(recipe, Path(recipe.other_model), tmp_path)
    asked = runs | {f"transducer {name}": others[name] for name in recipe.other_methods}
    verdicts = check.check_runs(asked, (), asked, tmp_path)
    assert verdicts.keys() == asked.keys()
    assert verdicts["transducer transducer_kd"].taught and verdicts["lpm"].language_model
    explored, tuned = runs["bljust.joint"], runs["bljust"]
    assert (explored.method, tuned.method) == ("bljust", "supervised")
    assert verdicts["bljust.joint"].unlabelled and not verdicts["bljust"].unlabelled
    assert verdicts["pretrain_finetune.pretrain"].unlabelled
    assert runs["pretrain_finetune"].before == (
        "pretrain_finetune.pretrain", "pretrain_finetune.finetune"
    )  # fmt: skip


@pytest.mark.parametrize("corpus", SMALL)
def test_the_table_has_all_families_with_as_many_updates(corpus, monkeypatch, tmp_path):
    """From the seed, in all phases together; and from the same sets, but for the oracle."""
    monkeypatch.chdir(ROOT / f"egs/{corpus}/pl1")
    recipe = config.load_recipe()
    other = Path(recipe.other_model)
    used = set()
    for asr, names in ((config.ASR, recipe.methods), (other, recipe.other_methods)):
        runs = load_runs(recipe, asr, tmp_path)
        seed, shares = runs["supervised"], {}
        assert {recipe.baseline, recipe.oracle, "supervised"} <= {*names}
        for name in names:
            trainings = [runs[one] for one in (*runs[name].before, name)]
            used |= {one.method for one in trainings}
            if name != "supervised":
                assert trainings[0].options.init == "supervised"
                shares[name] = sum(updates(one, asr) for one in trainings)
            sets = {(one.options.labelled, one.options.unlabelled) for one in trainings}
            if name != recipe.oracle:
                assert sets == {(seed.options.labelled, recipe.unlabelled)}, name
        assert len(set(shares.values())) == 1, shares
    assert used == {
        "supervised", "iterative", "slimipl", "mpl", "lpm", "ce_pl", "csl", "bljust",
        "transducer_kd",
    }  # fmt: skip


def updates(run, asr):
    conf = config.mapping(asr)
    for path in run.files[1:]:
        conf = merge(conf, run.written if run.written is not None else config.mapping(path))
    return conf["max_epoch"] * conf["num_iters_per_epoch"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "corpus, model, last",
    [
        ("mini_alnum", "asr", "bljust"),
        pytest.param("an4", "asr_transducer", "transducer_kd", marks=needs_speech),
    ],
)
def test_from_audio_to_the_table(corpus, model, last, tmp_path):
    pytest.importorskip("espeakng_loader")
    folder = small_recipe(corpus, tmp_path / corpus / "pl1")
    methods = ["supervised", "slimipl", "csl", "lpm", last]
    options = ["--method", ",".join(methods), "--seed", "1"]
    own = "" if model == "asr" else f"_{model}"
    if own:
        options += ["--asr_config", f"conf/{model}.yaml"]
    run_sh(folder, corpus, *options)
    experiments = folder / f"exp{own}"
    runs = json.loads((experiments / "results.json").read_text())["runs"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    table = (folder / f"RESULTS{own}.md").read_text()
    tokens = "char" if own else "word"  # the transducer spells
    assert (experiments / f"lm/{tokens}/valid.loss.ave.pth").exists()
    assert "csl.contrast" in json.loads((experiments / "results.json").read_text())["before"]
    for run in methods:
        for heard in recipe["test"]:
            assert f"|{run}/{heard}|" in table
            decoded = experiments / run / "infer" / heard / "text"
            utterances = (folder / "data" / heard / "text").read_text().splitlines()
            assert len(decoded.read_text().splitlines()) == len(utterances) > 0
        assert "1" in runs[run]
        with zipfile.ZipFile(experiments / run / f"{corpus}_{run}.zip") as packed:
            assert any(name.endswith(".pth") for name in packed.namelist())
    before = {p: p.stat().st_mtime_ns for p in experiments.rglob("*") if p.is_file()}
    run_sh(folder, corpus, *options)
    assert {p: p.stat().st_mtime_ns for p in experiments.rglob("*") if p.is_file()} == before

"""What the stages plan, what a call runs, and what it leaves alone."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from espnet_pl.recipe import check, stages
from espnet_pl.recipe.config import RecipeError
from test.recipe.toy import BAD, call, plan, tree

pytestmark = pytest.mark.usefixtures("recipe")


# --- planning ------------------------------------------------------------------------------------


def test_a_run_comes_after_the_one_it_starts_from():
    names = [job.name for job in stages.train(plan(("slimipl", "continued"), (1, 2)))]
    assert names == [
        f"{what} {run} seed {seed}"
        for seed in (1, 2)
        for run in ("supervised", "slimipl", "continued")
        for what in ("train", "export")
    ]


def test_every_seed_has_its_folder_and_starts_from_its_own_seed():
    jobs = {job.name: job for job in stages.train(plan(seeds=(1, 3)))}
    assert jobs["train slimipl seed 1"].log == Path("exp/slimipl/train.log")
    third = jobs["train slimipl seed 3"]
    assert third.log == Path("exp/seed3/slimipl/train.log")
    assert "--init_param exp/seed3/supervised/model/model.pth" in third.shell()
    assert Path("exp/seed3/supervised/model/model.pth") in third.inputs
    assert "--seed 3" in third.shell()


def test_unlabelled_speech_goes_to_methods_that_need_it():
    jobs = {job.name: job.shell() for job in stages.train(plan())}
    assert "unlabelled" not in jobs["train supervised seed 1"]
    assert (
        "--unlabelled_shape_file data/train_unlabelled/speech_shape" in jobs["train slimipl seed 1"]
    )
    assert "--truth data/train_oracle/text" in jobs["train slimipl seed 1"]
    assert "--truth" not in jobs["train supervised seed 1"]


def test_the_recipe_mapping_of_a_run():
    train, export = stages.train(plan(("oracle",)))
    assert "data/train_oracle/wav.scp,speech,sound" in train.argv
    assert export.argv[-2:] == ("--source", "student")
    assert Path("data/train_oracle/speech_shape") in train.inputs


def test_several_processes_train_and_do_nothing_else():
    several = replace(plan(), num_processes=3)
    for job, alone in zip(stages.train(several), stages.train(plan()), strict=True):
        if job.name.startswith("train "):
            assert "--num_processes 3" in job.shell() and "--num_processes" not in alone.shell()
        else:
            assert job.argv == alone.argv


def test_statistics_are_collected_where_they_are_needed():
    assert list(stages.collect_stats(plan())) == []
    Path("conf/asr.yaml").write_text("normalize: global_mvn\n")
    Path("conf/oracle.yaml").write_text("method: supervised\nnormalize: utterance_mvn\n")
    (job,) = stages.collect_stats(plan())
    assert "--collect_stats true --normalize none" in job.shell()
    jobs = {job.name: job.shell() for job in stages.train(plan(("slimipl", "oracle")))}
    stats = "--normalize_conf stats_file=exp/stats/train/feats_stats.npz"
    assert stats in jobs["train slimipl seed 1"] and stats not in jobs["train oracle seed 1"]
    packed = {job.name: job.shell() for job in stages.pack_model(plan(("slimipl", "oracle")))}
    assert "--option exp/slimipl/model/feats_stats.npz" in packed["pack slimipl seed 1"]
    assert "--option" not in packed["pack oracle seed 1"]


def test_pieces_of_words():
    Path("recipe.yaml").write_text("token_type: bpe\nnbpe: 30\n")
    (job,) = stages.train_tokenizer(plan())
    assert job.outputs == (
        Path("data/token_list/bpe30/tokens.txt"),
        Path("data/token_list/bpe30/bpe.model"),
    )
    assert "--bpemodel data/token_list/bpe30/bpe.model" in next(stages.train(plan())).shell()
    assert "--option exp/slimipl/model/bpe.model" in next(stages.pack_model(plan())).shell()


def test_a_run_with_other_tokens_hands_over_its_encoder_only():
    Path("conf/supervised.yaml").write_text("method: supervised\nrecipe: {token_type: bpe}\n")
    words, pieces = stages.train_tokenizer(plan(("slimipl",)))
    assert (words.name, words.outputs[0]) == (
        "train_tokenizer", Path("data/token_list/word/tokens.txt")
    )  # fmt: skip
    assert (pieces.name, pieces.outputs[0]) == (
        "train_tokenizer bpe", Path("data/token_list/bpe500/tokens.txt")
    )  # fmt: skip
    jobs = {job.name: job for job in stages.train(plan(("slimipl", "oracle")))}
    first, then = jobs["train supervised seed 1"], jobs["train slimipl seed 1"]
    assert "--token_type bpe --token_list data/token_list/bpe500/tokens.txt" in first.shell()
    assert set(pieces.outputs) <= set(first.inputs)
    assert "--token_type word --token_list data/token_list/word/tokens.txt" in then.shell()
    assert "--init_param exp/supervised/model/model.pth:encoder:encoder" in then.shell()
    packed = {job.name: job.shell() for job in stages.pack_model(plan(("slimipl", "supervised")))}
    assert "bpe.model" in packed["pack supervised seed 1"]
    assert "bpe.model" not in packed["pack slimipl seed 1"]


def test_a_run_waits_for_its_teachers_and_gets_their_models():
    Path("conf/slimipl.yaml").write_text(
        "method: slimipl\nrecipe: {init: supervised, teachers: [continued]}\n"
    )
    names = [job.name for job in stages.train(plan(("slimipl",), seeds=(3,)))]
    assert names.index("export continued seed 3") < names.index("train slimipl seed 3")
    job = next(j for j in stages.train(plan(("slimipl",), seeds=(3,))) if "slimipl" in j.name)
    assert "--teachers exp/seed3/continued/model" in job.shell()
    assert Path("exp/seed3/continued/model/model.pth") in job.inputs


def test_a_teacher_may_name_the_token_type_of_the_recipe():
    Path("conf/continued.yaml").write_text("method: supervised\nrecipe: {token_type: word}\n")
    Path("conf/slimipl.yaml").write_text("method: slimipl\nrecipe: {teachers: [continued]}\n")
    jobs = {job.name: job.shell() for job in stages.train(plan(("slimipl",)))}
    assert "--teachers exp/continued/model" in jobs["train slimipl seed 1"]


@pytest.mark.parametrize(
    "teachers, message",
    [
        ("[suprevised]", "did you mean 'supervised'"),
        ("[slimipl]", "need each other: slimipl <- slimipl"),
        ("[chars]", "chars has another token type"),
    ],
)
def test_teachers_that_cannot_be(teachers, message):
    Path("conf/chars.yaml").write_text("method: supervised\nrecipe: {token_type: char}\n")
    Path("conf/slimipl.yaml").write_text(f"method: slimipl\nrecipe: {{teachers: {teachers}}}\n")
    with pytest.raises(RecipeError, match=message):
        list(stages.train(plan(("slimipl",))))


# --- whole calls ---------------------------------------------------------------------------------


def test_everything_once_and_then_nothing(capsys):
    code, started = call("--method", "all")
    assert code == 0 and started[:4] == [
        "create_dataset",
        "validate",
        "train_tokenizer",
        "train supervised seed 1",
    ]
    assert Path("exp/slimipl/toy_slimipl.zip").exists() and Path("RESULTS.md").exists()
    assert "Against continued" in capsys.readouterr().out
    began = time.monotonic()
    assert call("--method", "all") == (0, [])
    assert time.monotonic() - began < 5
    out = capsys.readouterr().out
    assert "up to date: create_dataset, validate" in out
    assert out.startswith("# ") and "./run.sh --nj 1 --method all" in out.splitlines()[0]


def test_only_what_depends_on_a_change_runs_again():
    call()
    Path("conf/decode.yaml").write_text("beam_size: 2\n")
    _, started = call()
    assert {name.split()[0] for name in started} == {"infer"}  # the text came out the same
    Path("conf/decode.yaml").write_text("# a comment\nbeam_size: 2\n")
    assert call() == (0, [])
    Path("local/data.sh").write_text("true # changed\n")
    assert call() == (0, ["create_dataset"])  # and it wrote what was there


def test_a_changed_training_is_refused_and_force_moves_it_aside(capsys):
    call()
    Path("conf/slimipl.yaml").write_text(
        "method: slimipl\nrecipe: {init: supervised}\nmax_epoch: 9\n"
    )
    before = tree()
    assert call("--stage", "train") == (1, [])
    error = capsys.readouterr().err
    assert "conf/slimipl.yaml: max_epoch: absent -> 9" in error and "--force" in error
    assert tree().keys() == before.keys()
    code, started = call("--method", "slimipl", "--stage", "train", "--force")
    assert code == 0 and "train slimipl seed 1" in started
    assert "train supervised seed 1" not in started  # it was not named
    assert len([*Path("exp").glob("slimipl.old-*")]) == 1


def test_results_older_than_their_settings_are_left_out(capsys):
    call("--method", "all")
    Path("conf/oracle.yaml").write_text("method: supervised\nmax_epoch: 9\n")
    assert call("--method", "slimipl", "--stage", "measure")[0] == 0
    assert "left out of the table: oracle seed 1" in capsys.readouterr().out
    text = Path("RESULTS.md").read_text()
    assert "oracle/test" not in text and "continued/test" in text


def test_another_seed_joins_the_table():
    call()
    assert call("--seed", "2", "--method", "slimipl")[0] == 0
    found = json.loads(Path("exp/results.json").read_text())["runs"]
    assert [*found["slimipl"]] == ["1", "2"] and [*found["supervised"]] == ["1"]


def test_a_trial_leaves_the_table_alone():
    assert call("--expdir", "trial")[0] == 0
    assert Path("trial/RESULTS.md").exists() and not Path("RESULTS.md").exists()
    assert "--expdir trial" in Path("trial/RESULTS.md").read_text()


def test_another_model_has_experiments_and_a_table_of_its_own(capsys):
    Path("conf/asr_transducer.yaml").write_text("task: asr_transducer\n")
    Path("conf/decode_asr_transducer.yaml").write_text("beam_size: 1\n")
    assert call()[0] == 0
    before = Path("RESULTS.md").read_text(), tree()
    code, started = call("--asr_config", "conf/asr_transducer.yaml")
    assert code == 0 and "train supervised seed 1" in started
    kept = {path for path in before[1] if path.parts[0] != "log"}
    assert {path: time for path, time in tree().items() if path in kept} == {
        path: time for path, time in before[1].items() if path in kept
    }
    assert Path("exp_asr_transducer/slimipl/model/model.pth").exists()
    table = Path("RESULTS_asr_transducer.md").read_text()
    assert "--seed 1 --asr_config conf/asr_transducer.yaml\n" in table
    transducers = plan(asr=Path("conf/asr_transducer.yaml"), expdir=Path("exp_asr_transducer"))
    shells = {job.name: job.shell() for job in stages.infer(transducers)}
    assert "-m espnet2.bin.asr_transducer_inference" in shells["infer slimipl test seed 1"]
    assert "--config conf/decode_asr_transducer.yaml" in shells["infer slimipl test seed 1"]
    shells = {job.name: job.shell() for job in stages.train(transducers)}
    confs = "--config conf/asr_transducer.yaml --config conf/slimipl.yaml "
    assert confs + "--seed" in shells["train slimipl seed 1"]
    Path("conf/asr_transducer").mkdir()
    Path("conf/asr_transducer/slimipl.yaml").write_text("max_epoch: 3\n")
    transducers = plan(asr=Path("conf/asr_transducer.yaml"), expdir=Path("exp_asr_transducer"))
    shells = {job.name: job.shell() for job in stages.train(transducers)}
    own = "--config conf/asr_transducer/slimipl.yaml"
    assert confs + own in shells["train slimipl seed 1"]
    assert own not in shells["train supervised seed 1"]
    # A run that only this model has, from which another one starts.
    first = "method: supervised\nmax_epoch: 2\nrecipe: {labelled: train_oracle}\n"
    Path("conf/asr_transducer/ctc.yaml").write_text(first)
    Path("conf/asr_transducer/supervised.yaml").write_text("recipe: {init: ctc}\n")
    of_model = plan(asr=Path("conf/asr_transducer.yaml"), expdir=Path("exp_asr_transducer"))
    shells = {job.name: job.shell() for job in stages.train(of_model)}
    assert "data/train_oracle/wav.scp" in shells["train ctc seed 1"]
    assert "exp_asr_transducer/ctc/model/model.pth" in shells["train supervised seed 1"]
    assert "train ctc seed 1" not in {job.name for job in stages.train(plan())}
    assert call("--method", "ctc") == (2, [])
    message = "--method: ctc is of another model: --asr_config conf/asr_transducer.yaml"
    assert message in capsys.readouterr().err
    Path("conf/asr_transducer/ctc.yaml").unlink()
    Path("conf/asr_transducer/supervised.yaml").unlink()
    again = (
        "--asr_config",
        "conf/asr_transducer.yaml",
        "--stop_stage",
        "train",
        "--method",
        "slimipl",
    )
    assert call(*again)[0] == 1  # a run is not continued with other settings
    started = call(*again, "--force")[1]
    assert started[-2:] == ["train slimipl seed 1", "export slimipl seed 1"]
    assert "train supervised seed 1" not in started
    assert call("--stop_stage", "train")[1] == []


def test_a_call_for_all_is_about_both_models(capsys):
    Path("conf/asr_transducer.yaml").write_text("task: asr_transducer\n")
    Path("conf/decode_asr_transducer.yaml").write_text("beam_size: 1\n")
    recipe = Path("recipe.yaml").read_text()
    other = "other_model: conf/asr_transducer.yaml\nother_methods: [supervised, continued]\n"
    Path("recipe.yaml").write_text(recipe + other)
    code, started = call("--method", "all")
    assert code == 0
    trained = [name for name in started if name.startswith("train ")]
    ours = ["supervised", "continued", "slimipl", "oracle"]
    assert trained == [f"train {run} seed 1" for run in ("supervised", "continued", *ours)]
    assert Path("exp_asr_transducer/continued/train.log").exists()
    assert not Path("exp_asr_transducer/slimipl").exists()
    table, own = Path("RESULTS.md").read_text(), Path("RESULTS_asr_transducer.md").read_text()
    above, block = table.split("## Students of another model: conf/asr_transducer.yaml\n")
    assert "|test|slimipl|" in above and "### Word error rate\n\n|set|run|" in block
    assert "|test|continued|" in block and "|slimipl|" not in block.partition("## Details")[0]
    assert "RESULTS_asr_transducer.md" in block and "## Students" not in own
    assert call("--method", "all") == (0, [])
    # One model alone, and all there is of the other one.
    assert call("--method", "all", "--asr_config", "conf/asr_transducer.yaml") == (0, [])
    assert call("--method", "slimipl")[1] == [] and Path("RESULTS.md").read_text() == table
    # A trial has both beside each other.
    assert call("--method", "all", "--expdir", "trial")[0] == 0
    assert Path("trial_asr_transducer/RESULTS.md").exists()
    assert "## Students of another model" in Path("trial/RESULTS.md").read_text()
    # The block is as new as what it shows.
    capsys.readouterr()
    assert (
        call("--method", "continued", "--asr_config", "conf/asr_transducer.yaml", "--seed", "2")[0]
        == 0
    )
    assert call("--method", "slimipl")[1] == ["measure"]
    assert "|test|continued|**66.67**|66.67|66.67|" in Path("RESULTS.md").read_text()
    Path("recipe.yaml").write_text(recipe + other.replace("continued", "contineud"))
    before = tree()
    assert call("--method", "all") == (2, [])
    assert "recipe.yaml: 'contineud' is not known; did you mean" in capsys.readouterr().err
    assert tree() == before


def test_a_model_may_have_tokens_of_its_own():
    Path("conf/asr_transducer.yaml").write_text(
        "task: asr_transducer\nrecipe: {token_type: char}\n"
    )
    transducers = plan(asr=Path("conf/asr_transducer.yaml"), expdir=Path("exp_asr_transducer"))
    for made, tokens in ((plan(), "word"), (transducers, "char")):
        trained = [job.shell() for job in stages.train(made) if job.name.startswith("train")]
        assert trained and all(f"--token_type {tokens}" in shell for shell in trained)


def test_a_failure_is_told_and_mended(capsys):
    BAD.add("train slimipl seed 1")
    try:
        assert call()[0] == 1
    finally:
        BAD.clear()
    error = capsys.readouterr().err
    assert (
        "it broke" in error
        and "exp/slimipl/train.log" in error
        and "--config conf/slimipl.yaml" in error
    )
    code, started = call()
    assert code == 0 and started[0] == "train slimipl seed 1"


def test_large_sets_are_recognised_in_parts(monkeypatch):
    monkeypatch.setattr(stages, "PART", 2)
    code, started = call("--method", "supervised")
    assert code == 0 and "infer supervised far seed 1 part 2 of 2" in started
    assert Path("data/test/split2/keys.2").read_text() == "s1-b two\ns2-c three\n"
    expected = "s1-a one\ns1-b one\ns2-c one\n"
    assert Path("exp/supervised/infer/test/text").read_text() == expected
    assert call("--method", "supervised", "--nj", "3") == (0, [])


def test_dry_run_touches_nothing(capsys):
    before = tree()
    assert call("--method", "all", "--dry_run", "--seed", "1,2") == (0, [])
    assert tree() == before
    out = capsys.readouterr().out
    modules = "data.sh validate tokens bridge.train bridge.export asr_inference measure pack"
    assert all(module in out for module in modules.split())
    assert str(Path.cwd()) not in out and sys.executable not in out


def test_a_wrong_configuration_is_refused_before_any_work(monkeypatch, capsys):
    asked = []

    def ask(files):
        asked.extend(files)
        return ["conf/slimipl.yaml: 'max_epohc' is not known"] * len(files)

    monkeypatch.setattr(check, "ask", ask)
    before = tree()
    assert call() == (2, []) and tree() == before
    assert "max_epohc" in capsys.readouterr().err
    assert ["conf/asr.yaml", "conf/slimipl.yaml"] in asked


def test_configurations_are_checked_once(monkeypatch):
    call("--stop_stage", "train")
    monkeypatch.setattr(check, "ask", lambda files: pytest.fail("asked again"))
    assert call("--stop_stage", "train")[0] == 0


# --- a model from elsewhere ----------------------------------------------------------------------


def elsewhere(folder, tokens=("<blank>", "the", "<sos/eos>")):
    folder.mkdir()
    (folder / "config.yaml").write_text(f"token_list: {list(tokens)}\n")
    (folder / "model.pth").write_text("weights")
    return folder


def test_a_run_may_start_from_a_model_from_elsewhere(tmp_path, capsys):
    folder = elsewhere(tmp_path / "mine")
    for named in (folder, folder / "model.pth"):
        Path("conf/slimipl.yaml").write_text(f"method: slimipl\nrecipe: {{init: {named}}}\n")
        jobs = {job.name: job for job in stages.train(plan(("slimipl",), seeds=(3,)))}
        assert f"--init_param {folder}/model.pth " in jobs["train slimipl seed 3"].shell()
        assert folder / "model.pth" in jobs["train slimipl seed 3"].inputs
        assert "train supervised seed 3" not in jobs
    code, started = call("--method", "slimipl")  # whose tokens are none of a real list
    assert code == 2 and "train_tokenizer" in started and "train slimipl seed 1" not in started
    assert "mine/config.yaml has other tokens than data/token_list/word" in capsys.readouterr().err
    tokens = Path("data/token_list/word/tokens.txt").read_text().splitlines()
    (folder / "config.yaml").write_text(f"token_list: {tokens}\n")
    assert "train slimipl seed 1" in call("--method", "slimipl")[1]
    (folder / "config.yaml").write_text("token_list: [others]\n")
    Path("conf/slimipl.yaml").write_text(
        f"method: slimipl\nrecipe: {{init: {folder}, take: encoder}}\n"
    )
    jobs = {job.name: job for job in stages.train(plan(("slimipl",)))}
    part = f"--init_param {folder}/model.pth:encoder:encoder"
    assert part in jobs["train slimipl seed 1"].shell()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("a/b.zip", "init: a/b.zip is packed: unpack it"),
        ("a/b", "there is no a/b/config.yaml: name a folder"),
        ("half/ave.pth", "there is no half/ave.pth: name a folder"),
    ],
)
def test_models_that_are_not_there_are_told_before_work(named, message, capsys):
    Path("half").mkdir()
    Path("half/config.yaml").write_text("token_list: []\n")
    Path("conf/slimipl.yaml").write_text(f"method: slimipl\nrecipe: {{init: {named}}}\n")
    assert call("--method", "slimipl") == (2, [])
    assert message in capsys.readouterr().err

"""Language models of runs: what they are trained on, who waits for them, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_pl.recipe import language_models, lm_text, stages
from espnet_pl.recipe.config import RecipeError
from test.recipe.toy import ROOT, call, plan, tree

RUN = "method: lpm\nrecipe: {init: supervised%s}\n"


@pytest.fixture(autouse=True)
def with_lpm(recipe):
    Path("conf/lpm.yaml").write_text(RUN % "")
    Path("conf/lm.yaml").write_text("lm_conf: {unit: 8}\n")


def add(line):
    with open("recipe.yaml", "a") as file:
        file.write(line + "\n")


def jobs(*chosen, **more):
    planned = plan(chosen, **more)
    found = [*stages.train_lm(planned), *stages.train(planned)]
    return {job.name: job for job in found}


def test_a_run_that_needs_one_waits_for_the_recipe_s_own():
    found = jobs("lpm", "slimipl", seeds=(1, 2))
    assert [*found][:2] == ["lm_text", "train_lm word"]
    text, train = found["lm_text"], found["train_lm word"]
    assert text.shell() == (
        "python3 -m espnet_pl.recipe.lm_text exp/lm/text --text data/train_labelled/text "
        "--labelled data/train_labelled/text --unlabelled data/train_unlabelled/wav.scp"
    )
    assert text.outputs == (Path("exp/lm/text"),) and {*text.outputs} <= {*train.inputs}
    shell = train.shell()
    for part in (
        "-m espnet_pl.bridge.lm_train --config conf/lm.yaml --token_type word ",
        "--token_list data/token_list/word/tokens.txt --train",
        "--train_data_path_and_name_and_type exp/lm/text,text,text --train_shape_file exp/lm/text",
        "--valid_data_path_and_name_and_type data/dev/text,text,text",
        "--output_dir exp/lm/word",
    ):
        assert part in shell, part
    assert {Path("conf/lm.yaml"), Path("data/dev/text")} <= {*train.inputs}
    for seed in (1, 2):
        job = found[f"train lpm seed {seed}"]
        assert "--language_model exp/lm/word/valid.loss.ave.pth" in job.shell()
        assert {*train.outputs} <= {*job.inputs}
        assert "--language_model" not in found[f"train slimipl seed {seed}"].argv
    assert [*stages.train_lm(plan(("slimipl", "oracle")))] == []


def test_every_type_of_tokens_has_its_own():
    Path("conf/pieces.yaml").write_text(RUN % ", token_type: bpe")
    found = jobs("lpm", "pieces", expdir=Path("trial"))
    assert [name for name in found if name.startswith("train_lm")] == [
        "train_lm word", "train_lm bpe"
    ]  # fmt: skip
    assert "--bpemodel data/token_list/bpe500/bpe.model" in found["train_lm bpe"].shell()
    model = "--language_model trial/lm/bpe500/valid.loss.ave.pth"
    assert model in found["train pieces seed 1"].shell()


def test_the_text_may_be_of_other_sets():
    add("lm_text: [train_labelled, books]")
    found = jobs("lpm")
    assert "--text data/train_labelled/text data/books/text --lab" in found["lm_text"].shell()
    create, _ = stages.create_dataset(plan(("lpm",)))
    assert Path("data/books/text") in create.outputs
    assert Path("data/books/wav.scp") not in create.outputs


@pytest.mark.parametrize(
    ("path", "given", "files"),
    [
        ("lm.arpa", "lm.arpa", ["lm.arpa"]),
        ("old/lm/valid.pth", "old/lm/valid.pth", ["old/lm/config.yaml", "old/lm/valid.pth"]),
        ("there", "there", ["there/config.yaml", "there/valid.loss.ave.pth"]),
    ],
)
def test_a_run_may_have_one_from_elsewhere(path, given, files):
    Path("there").mkdir()
    Path("there/valid.loss.ave.pth").write_text("")
    Path("conf/lpm.yaml").write_text(RUN % f", language_model: {path}")
    Path("conf/lm.yaml").unlink()
    found = jobs("lpm")
    assert not [name for name in found if name.startswith(("lm_text", "train_lm"))]
    job = found["train lpm seed 1"]
    assert f"--language_model {given} " in job.shell() + " "
    assert {*map(Path, files)} <= {*job.inputs}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("lm_text: [train_labelled, train_oracle]", "'train_oracle' holds what is said in the un"),
        ("lm_text: [test]", "lm_text: 'test' is recognised and scored"),
        ("lm_text: dev", "lm_text: 'dev' is recognised"),
        ("lm_text: 3", "lm_text: expected str"),
        ("lm_txt: [a]", "did you mean 'lm_text'"),
    ],
)
def test_text_that_may_not_be_known_is_refused_by_name(line, match, capsys):
    add(line)
    before = tree()
    assert call("--method", "lpm", "--dry_run") == (2, []) and tree() == before
    assert match in capsys.readouterr().err


def test_without_its_settings_there_is_none():
    Path("conf/lm.yaml").unlink()
    with pytest.raises(RecipeError, match=r"conf/lm.yaml is missing: .*language_model: PATH"):
        jobs("lpm")


def test_a_call_does_it_once_and_again_when_the_text_has_changed(capsys):
    code, started = call("--method", "lpm")
    assert code == 0 and started.index("lm_text") < started.index("train_lm word")
    assert started.index("train_lm word") < started.index("train lpm seed 1")
    assert call("--method", "lpm") == (0, [])
    started = call("--method", "lpm", "--stage", "train_lm", "--force")[1]
    assert "train lpm seed 1" in started and "train_lm word" not in started
    Path("conf/lm.yaml").write_text("lm_conf: {unit: 9}\n")
    assert call("--method", "lpm")[0] == 1
    assert "conf/lm.yaml: lm_conf.unit: 8 -> 9" in capsys.readouterr().err
    started = call("--method", "lpm", "--force", "--stage", "train_lm")[1]
    assert {"train_lm word", "train lpm seed 1"} <= {*started}


def test_a_method_that_has_no_use_for_one_is_told_before_work(capsys):
    Path("conf/mpl.yaml").write_text("method: slimipl\nrecipe: {language_model: a/b.arpa}\n")
    assert call("--method", "mpl") == (2, [])
    assert "mpl.yaml, recipe: language_model: method slimipl has no use" in capsys.readouterr().err
    phases = "{first: {method: lpm}, tune: {method: supervised}}"
    common = "recipe: {init: supervised, language_model: a/b.arpa, phases: %s}\n"
    Path("conf/mpl.yaml").write_text(common % phases)
    assert call("--method", "mpl") == (2, [])
    assert "method supervised has no use for one (of phases, only" in capsys.readouterr().err


def test_cells_of_a_study_have_one_too():
    Path("conf/studies").mkdir()
    Path("conf/studies/s.yaml").write_text("common: {method: lpm}\ncells: {x: {}, y: {seed: 2}}\n")
    code, started = call("--study", "s")
    assert code == 0 and started.count("train_lm word") == 1
    assert started.index("train_lm word") < started.index("train s.x seed 1")
    assert call("--study", "s") == (0, [])


# --- the text ------------------------------------------------------------------------------------


def write(path, *lines):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{line}\n" for line in lines))
    return Path(path)


def test_the_lines_of_all_sets_are_gathered():
    a = write("data/a/text", "u1 ONE TWO", "u2", "u3  THREE ")
    b = write("data/b/text", "u1 FOUR")
    lm_text.gather(Path("out/text"), [a, b], a, [])
    assert Path("out/text").read_text() == "a-u1 ONE TWO\na-u3 THREE\nb-u1 FOUR\n"
    with pytest.raises(SystemExit, match="no words in data/c/text"):
        lm_text.gather(Path("out/text"), [write("data/c/text", "u1")], a, [])


@pytest.mark.parametrize("utt_id", ["s-u2", "sp0.9-s-u2"])
def test_transcripts_of_unlabelled_speech_are_found_by_their_utterance(utt_id):
    labelled = write("data/labelled/text", "s-u1 ONE")
    wavs = write("data/unlabelled/wav.scp", "s-u1 a.wav", "s-u2 b.wav")
    lm_text.gather(Path("text"), [labelled], labelled, [wavs])  # u1 is known to be said
    truth = write("data/everything/text", "s-u1 ONE", f"{utt_id} TWO")
    before = Path("text").read_text()
    with pytest.raises(SystemExit, match=f"everything/text has tr.* of 1 unlabelled .*{utt_id}"):
        lm_text.gather(Path("text"), [labelled, truth], labelled, [wavs])
    assert Path("text").read_text() == before


def test_what_espnet_makes_of_it_is_a_language_model(tmp_path):
    """The commands of the jobs, as they are, on a few sentences."""
    pytest.importorskip("espnet2")
    from espnet_pl.bridge.language_models import load

    write("data/train_labelled/text", *(f"l{i} A B A B" for i in range(12)))
    write("data/train_unlabelled/wav.scp", "u1 a.wav")
    write("data/dev/text", "d1 A B", "d2 A B A B")
    tokens = ["<blank>", "<unk>", "A", "B", "<sos/eos>"]
    write("data/token_list/word/tokens.txt", *tokens)
    write(
        "conf/lm.yaml", "lm_conf: {unit: 16, nlayers: 1}", "optim: adam", "optim_conf: {lr: 0.05}",
        "batch_size: 4", "max_epoch: 6", "keep_nbest_models: 2", "num_workers: 0",
    )  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for job in language_models.jobs(plan(("lpm",))):
        argv = [sys.executable, *job.argv[1:]]
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert all(path.exists() for path in job.outputs)
    a, b = 2, 3
    log_p = load("exp/lm/word", tokens).log_p([[a, b, a, b], [b, a, b, a], [a, a, a, a]])
    assert log_p[0] > log_p[1] + 1 and log_p[0] > log_p[2] + 1
    assert log_p[0] > -2 and log_p.exp().sum() < 1

"""What is refused: flags, recipe.yaml, conf/*.yaml; and the small tools between the stages."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espnet_pl.recipe import check, config, parts, tokens
from test.recipe.toy import ROOT, call, tree

ASK = check.ask  # before the stand-in
pytestmark = pytest.mark.usefixtures("recipe")


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop-stag", "3"], "'--stop_stag' is not known; did you mean '--stop_stage'?"),
        (["--metod=all"], "did you mean '--method'?"),
        (["--asr_config", "conf/ars.yaml"], "did you mean 'conf/asr.yaml'?"),
        (["--method", "slimpl"], "--method: 'slimpl' is not known; did you mean 'slimipl'?"),
        (["--stage", "trian"], "--stage: 'trian' is not known; did you mean 'train'?"),
        (["--stage", "9"], "--stage: '9' is not known"),
        (["--stage", "train", "--stop_stage", "2"], "is after"),
        (["--seed", "one"], "--seed one: expected numbers"),
        (["--ngpu", "x"], "--ngpu: invalid int value"),
        (["--cmd", "slurm"], "no conf/slurm.conf"),
        (["--num_processes", "0"], "--num_processes 0"),
        (["--num_processes", "2", "--ngpu", "2"], "of CPUs, or GPUs, which have one each"),
        (["--dry_run", "maybe"], "expected true or false"),
        (["extra"], "'extra' is not known"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(words, message, capsys):
    before = tree()
    code, started = call(*words)
    assert code in (1, 2) and not started and tree() == before
    assert message in capsys.readouterr().err


def test_both_spellings_names_and_numbers(capsys):
    for words in (
        ["--stop-stage", "2", "--skip-stages=1"],
        ["--stop_stage=train_tokenizer", "--skip_stages", "create_dataset"],
    ):
        assert call("--dry-run", "true", *words)[0] == 0
        assert re.findall(r"Stage \d: (\w+)", capsys.readouterr().out) == ["train_tokenizer"]
    assert call("--dry_run", "--stage", "7", "--stop_stage", "10000")[0] == 0


def test_where_jobs_run_is_read_from_cmd_sh(capsys, monkeypatch):
    Path("cmd.sh").write_text("# a comment\nexport cmd_backend='slurm'\n")
    assert call("--dry_run")[0] == 1 and "no conf/slurm.conf" in capsys.readouterr().err
    Path("conf/slurm.conf").write_text("command sbatch --export=PATH\n")
    assert call("--dry_run", "--slurm_opts", "--time 0:10:00")[0] == 0
    assert "\n#SBATCH --time 0:10:00\n" in capsys.readouterr().out
    assert call("--dry_run", "--cmd", "local")[0] == 0
    assert "#SBATCH" not in capsys.readouterr().out


def test_help_is_quick_and_complete():
    began = time.monotonic()
    code = (
        "import sys; from espnet_pl.recipe import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert not {'torch', 'espnet2', 'numpy'} & {*sys.modules}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert time.monotonic() - began < 5  # 0.2 s on a quiet machine
    assert out.returncode == 0, out.stderr
    assert (
        "5 train " in out.stdout
        and "method slimipl, starts from supervised (default)" in out.stdout
    )


# --- recipe.yaml and conf ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.yaml", "labeled: a\n", "'labeled' is not known; did you mean 'labelled'?"),
        ("recipe.yaml", "rate: fast\n", "recipe.yaml: rate: expected int, got 'fast'"),
        ("recipe.yaml", "token_type: chars\n", "did you mean 'char'?"),
        ("conf/a.yaml", "method: x\nrecipe: {token_type: words}\n", "did you mean 'word'?"),
        ("recipe.yaml", "test: [a]\nreport_together: [b]\n", "report_together: 'b' is not known"),
        ("recipe.yaml", "other_methods: [a]\n", "of which model? Give other_model, too"),
        ("recipe.yaml", "default: [superwised]\n", "did you mean 'supervised'?"),
        ("recipe.yaml", "default: [oracle]\nbaseline: continue\n", "did you mean 'continued'?"),
        ("recipe.yaml", "default: [oracle]\noracle: orakel\n", "did you mean 'oracle'?"),
        ("recipe.yaml", "a: [", "recipe.yaml is not valid YAML"),
        ("recipe.yaml", "- a\n", "expected 'name: value' lines"),
        ("conf/a.yaml", "method: x\nrecipe: {inti: supervised}\n", "did you mean 'init'?"),
        ("conf/a.yaml", "method: x\nrecipe: {init: supervisd}\n", "did you mean 'supervised'?"),
        ("conf/a.yaml", "method: x\nrecipe: {export: both}\n", "must be student or teacher"),
        ("conf/a.yaml", "method: x\nrecipe: [init]\n", "a.yaml, recipe: expected 'name: value'"),
        ("conf/supervised.yaml", "method: x\nrecipe: {init: slimipl}\n", "slimipl <- supervised"),
    ],
)  # fmt: skip
def test_mistakes_in_the_recipe_are_named(file, content, message, capsys):
    Path(file).write_text(content)
    assert call("--dry_run") == (2, [])
    assert message in capsys.readouterr().err


def test_one_test_set_needs_no_list():
    Path("recipe.yaml").write_text("test: eval\nunlabelled: null\n")
    recipe = config.load_recipe()
    assert recipe.test == ["eval"] and recipe.unlabelled is None
    assert recipe.tokens_from == ["train_labelled"]


def test_a_reader_that_goes_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "espnet_pl.recipe.stages", "--stop_stage", "1", "--dry_run"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_outside_a_recipe(capsys):
    Path("recipe.yaml").unlink()
    assert call()[0] == 2
    assert "no recipe.yaml here" in capsys.readouterr().err


# --- the small tools -----------------------------------------------------------------------------


def test_parts_are_joined_completely():
    Path("keys").write_text("b 1\na 2\n")
    for part, key in (("x", "a"), ("y", "b")):
        Path(part).mkdir()
        for name in parts.FILES:
            Path(part, name).write_text(f"{key} word\n")
    Path("y/text").write_text("b \n")  # nothing recognised is a hypothesis
    parts.join(Path("keys"), Path("out"), [Path("x"), Path("y")])
    assert Path("out/text").read_text() == "a word\nb \n"
    with pytest.raises(SystemExit, match="1 hypotheses for 2 utterances; first that differ: b"):
        parts.join(Path("keys"), Path("out"), [Path("x")])
    with pytest.raises(SystemExit, match="3 hypotheses for 2 utterances"):
        parts.join(Path("keys"), Path("out"), [Path("x"), Path("y"), Path("y")])


@pytest.mark.parametrize(("lines", "n"), [(10, 3), (3, 3), (7, 1)])
def test_cutting_loses_nothing(lines, n):
    Path("list").write_text("".join(f"{i} x\n" for i in range(lines)))
    parts.split(Path("list"), n, Path("out"))
    cut = [Path(f"out/keys.{k + 1}").read_text() for k in range(n)]
    assert "".join(cut) == Path("list").read_text()
    assert max(map(len, cut)) - min(map(len, cut)) <= 4


@pytest.mark.parametrize("kind", ["word", "char", "bpe"])
def test_token_lists_have_espnets_frame(kind, monkeypatch):
    Path("a").write_text("u the cat sat on the mat\nv the dog ran to the cat\n" * 20)
    Path("b").write_text("v1 a dog\n")
    tokens.main(kind, 20, Path("out"), [Path("a"), Path("b")])
    found = Path("out/tokens.txt").read_text().splitlines()
    assert found[:2] == ["<blank>", "<unk>"] and found[-1] == "<sos/eos>"
    assert len(found) == len(set(found))
    assert {"word": "cat", "char": "<space>", "bpe": "▁t"}[kind] in found
    if kind == "bpe":
        assert len(found) == 20 and Path("out/bpe.model").exists()
    if kind == "word":
        assert sorted(found[2:-1]) == sorted("the cat sat on mat a dog ran to".split())


def test_the_bridge_is_asked(monkeypatch):
    """In one process for all configurations; a mistake in one is that one's verdict."""
    pytest.importorskip("espnet2")
    Path("conf/asr.yaml").write_text(
        "encoder: conformer\nbest_model_criterion: [[valid, loss, min]]\n"
    )
    Path("conf/oracle.yaml").write_text("method: supervised\nmax_epohc: 3\n")
    files = [["conf/asr.yaml", f"conf/{name}.yaml"] for name in ("supervised", "slimipl", "oracle")]
    Path("conf/taught.yaml").write_text("method: test.bridge.taught\nmethod_conf: {weight: 2.0}\n")
    Path("conf/wider.yaml").write_text("method: test.bridge.taught\nmethod_conf: {beam: 3}\n")
    Path("conf/same.yaml").write_text("method: test.bridge.taught\nmethod_conf: {beam: 2}\n")
    files += [["conf/asr.yaml", f"conf/{name}.yaml"] for name in ("taught", "wider", "same")]
    Path("conf/lpm.yaml").write_text("method: lpm\n")
    files.append(["conf/asr.yaml", "conf/lpm.yaml"])
    supervised, slimipl, oracle, taught, wider, same, lpm = ASK(files)
    assert check.Verdict(**lpm) == (
        True,
        False,
        None,
        True,
        ["language_model", "teachers", "truth"],
    )
    assert check.Verdict(**supervised) == (False, False, None, False, ["truth"])
    assert check.Verdict(**slimipl) == (True, False, None, False, ["teachers", "truth"])
    assert taught["unlabelled"] and taught["taught"] and taught == same
    assert wider["asked"] not in (taught["asked"], None)
    assert "max_epohc" in oracle and "max_epoch" in oracle

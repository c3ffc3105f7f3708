from pathlib import Path

import pytest

from espnet_pl.recipe import check, local, markers
from test.recipe import toy


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A small recipe, with a stand-in for every command (`test.recipe.toy`)."""
    folder = tmp_path / "egs" / "toy" / "pl1"
    (folder / "conf").mkdir(parents=True)
    (folder / "local").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("cmd_backend", raising=False)
    monkeypatch.setattr(markers, "environment", lambda: {"commit": "none"})
    monkeypatch.setattr(check, "ask", toy.verdicts)
    monkeypatch.setattr(local, "_start", toy.stand_in)
    toy.STARTED.clear()
    Path("recipe.yaml").write_text(
        "test: [test, far]\ntoken_type: word\nrate: 8000\nbaseline: continued\n"
        "methods: [supervised, continued, slimipl, oracle]\ndefault: [supervised, slimipl]\n"
        "truth: train_oracle\n"
    )
    Path("local/data.sh").write_text("true\n")
    Path("conf/asr.yaml").write_text("encoder: conformer\n")
    Path("conf/decode.yaml").write_text("beam_size: 1\n")
    Path("conf/supervised.yaml").write_text("method: supervised\n")
    start = "recipe: {init: supervised}\n"
    Path("conf/continued.yaml").write_text("method: supervised\nmax_epoch: 2\n" + start)
    Path("conf/slimipl.yaml").write_text("method: slimipl\n" + start)
    Path("conf/oracle.yaml").write_text(
        "method: supervised\nrecipe: {labelled: train_oracle, export: student}\n"
    )
    return folder

"""methods/lpm through ESPnet's trainer: language models of both kinds, and who proposes when."""

import re

import pytest
import torch
import yaml
from espnet2.tasks.asr import ASRTask

from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, load_config, main, needs_language_model
from test.bridge.conftest import ASR, DECODER, TRANSDUCER
from test.bridge.models import arpa_file, lm_folder
from test.bridge.test_train import same, weights

ANY = {"length_band": None, "unlabelled": 2}


@pytest.fixture
def learn(arguments, tmp_path):
    """Train by LPM; the checkpoint."""

    def call(out="exp", conf=ANY, model=None, base=ASR, resume=False, **changes):
        argv = arguments("lpm", out, conf, base=base, **{"max_epoch": 1, **changes})
        model = model or arpa_file(tmp_path / "lm.arpa")
        main([*argv, "--language_model", str(model), "--resume", str(resume)])
        return weights(tmp_path / out / "checkpoint.pth")

    return call


@pytest.mark.parametrize("proposal", ["better", "frozen", "ema"])
@pytest.mark.parametrize("kind", ["arpa", "espnet"])
def test_a_restart_continues_bit_by_bit(kind, proposal, learn, tmp_path):
    model = lm_folder(tmp_path / "lm") if kind == "espnet" else None
    conf = ANY | {"proposal": proposal, "weights": "shuffled", "decay": 0.5}
    how = dict(conf=conf, model=model)
    whole = learn("whole", max_epoch=4, **how)
    learn("parts", max_epoch=2, **how)
    parts = learn("parts", max_epoch=4, resume=True, **how)
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    assert whole["optimizers"][0]["method"]["step"] == 20


def validation(text, name):
    """What the log says of the validation of each epoch."""
    parts = re.findall(r"epoch results: .*\[valid\] (.*)", text)
    found = (re.search(rf"(?<![a-z_]){name}=([\d.e+-]+)", part) for part in parts)
    return [float(match[1]) for match in found if match]


@pytest.mark.parametrize("base", [ASR, TRANSDUCER, ASR | DECODER])
def test_the_student_proposes_when_validation_has_found_it_better(base, learn, tmp_path, caplog):
    caplog.set_level("INFO")
    changes = (
        {"model_conf": {"ctc_weight": 0.3}} if "decoder_conf" in base and "task" not in base else {}
    )
    state = learn(max_epoch=3, base=base, keep_nbest_models=3, **changes)
    method = state["optimizers"][0]["method"]
    mine, rivals = validation(caplog.text, "loss"), validation(caplog.text, "rival_loss")
    assert len(mine) == 3 and len(rivals) == 1  # the seed is validated once
    best, chosen = rivals[0], None
    for epoch, loss in enumerate(mine, 1):
        if loss < best:
            best, chosen = loss, epoch
    assert chosen is not None
    assert float(method["best"]) == pytest.approx(best, rel=1e-2)  # the log rounds
    expected = weights(tmp_path / f"exp/{chosen}epoch.pth")
    for name, value in expected.items():
        assert torch.equal(method[f"teacher._average.module.net.{name}"], value), name


def test_a_student_that_gets_no_better_does_not_propose(learn, tmp_path, caplog):
    caplog.set_level("INFO")
    state = learn(max_epoch=2, optim_conf={"lr": 3.0})["optimizers"][0]["method"]
    (seed,) = validation(caplog.text, "rival_loss")
    assert state["replaced"] == 0 and float(state["best"]) == pytest.approx(seed, rel=1e-2)
    assert all(loss > seed for loss in validation(caplog.text, "loss"))


def test_what_is_chosen_by_may_be_the_larger_the_better(learn):
    criterion = [["valid", "acc", "max"]]
    both = dict(base=ASR | DECODER, model_conf={"ctc_weight": 0.3}, best_model_criterion=criterion)
    state = learn(**both)["optimizers"][0]["method"]
    assert -1 <= float(state["best"]) <= 0


def test_the_log_says_what_the_prior_is_like(learn, tmp_path, caplog):
    caplog.set_level("INFO")
    learn(model=lm_folder(tmp_path / "lm"))
    for name in (
        "pseudo_sequences", "supervised", "prior_entropy", "prior_length", "hypotheses",
        "hypotheses_length", "hypotheses_no_text", "hypotheses_infeasible", "utterances_left_out",
        "label_error_rate", "proposals_replaced",
    ):  # fmt: skip
        assert re.search(rf"\b{name}=", caplog.text), name


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_what_is_exported_is_a_stock_model_without_language_model(source, learn, tmp_path):
    state = learn(model=lm_folder(tmp_path / "lm"), keep_nbest_models=1)
    exp = tmp_path / "exp"
    export(exp, exp / "model", source)
    kept = yaml.safe_load((exp / "model/config.yaml").read_text())
    assert not [k for k in kept if k.startswith(("language", "method"))]
    net, _ = ASRTask.build_model_from_file(exp / "model/config.yaml", exp / "model/model.pth")
    prefix = "teacher._average.module.net."
    method = state["optimizers"][0]["method"]
    for name, value in net.state_dict().items():
        expected = method[prefix + name] if source == "teacher" else state["model"][name]
        assert torch.equal(value, expected), name
    assert not [name for name in method if "lm." in name]


def test_another_language_model_teaches_another_thing(learn, tmp_path):
    first = learn("first", model=arpa_file(tmp_path / "a.arpa", shares=(0.9, 0.04, 0.03)))
    again = learn("again", model=arpa_file(tmp_path / "b.arpa", shares=(0.9, 0.04, 0.03)))
    other = learn("other", model=arpa_file(tmp_path / "c.arpa", shares=(0.03, 0.04, 0.9)))
    assert same(first["model"], again["model"]) and not same(first["model"], other["model"])


def test_mistakes_are_told_before_training(arguments, tmp_path):
    def refused(match, method="lpm", conf=None, *more, **changes):
        with pytest.raises(ConfigError, match=match):
            main([*arguments(method, "bad", conf, **changes), *more])
        assert not [*(tmp_path / "bad").glob("*.pth")]

    model = "--language_model", str(arpa_file(tmp_path / "lm.arpa"))
    refused("lpm needs a language model .*: --language_model")
    refused("mpl has no use for a language model", "mpl", {}, *model)
    refused("gone.arpa.*No such file", "lpm", {}, "--language_model", "gone.arpa")
    other = str(arpa_file(tmp_path / "other.arpa", words="ABD"))
    refused("1 tokens are not in it: C", "lpm", {}, "--language_model", other)
    criterion = [["train", "loss", "min"]]
    refused("is not of validation", "lpm", {}, *model, best_model_criterion=criterion)
    refused("weights is 'text'", "lpm", {"weights": "text"})


def test_any_criterion_will_do_where_validation_decides_nothing(learn):
    learn(conf=ANY | {"proposal": "ema"}, best_model_criterion=[["train", "loss", "min"]])


def test_a_criterion_that_validation_does_not_know(learn):
    with pytest.raises(ConfigError, match="validation says nothing of 'accuracy'; it says .*loss"):
        learn(best_model_criterion=[["valid", "accuracy", "max"]])


def test_who_needs_a_language_model(tmp_path):
    for conf, needs in (({}, True), ({"weights": "uniform"}, False)):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump({"method": "lpm", "method_conf": conf}))
        assert needs_language_model(load_config([path])) == needs
    assert not needs_language_model({"method": "mpl"})


@pytest.mark.parametrize("base", [TRANSDUCER, ASR | DECODER | {"model_conf": {"ctc_weight": 0.3}}])
def test_where_no_sentence_can_end_nothing_is_learnt_and_all_layers_have_a_gradient(
    base, learn, tmp_path, caplog
):
    caplog.set_level("INFO")
    model = arpa_file(tmp_path / "endless.arpa")
    lines = ["-99\t</s>" if "</s>" in x else x for x in model.read_text().split("\n")]
    model.write_text("\n".join(lines))
    conf = {"labelled": 0, "unlabelled": 1, "proposal": "frozen"}
    optimizer = learn(conf=conf, base=base, model=model)["optimizers"][0]
    assert "utterances_left_out=1.000" in caplog.text and "hypotheses=0.000" in caplog.text
    assert optimizer["method"]["step"] == 5
    state = optimizer["state"]
    without = [i for i in optimizer["param_groups"][0]["params"] if i not in state]
    # Without attention or a score of its own a layer has none: of a transducer, that of CTC.
    assert len(without) <= (2 if base is TRANSDUCER else 0)
    assert not any(own["exp_avg"].any() for own in state.values())

"""methods/transducer_kd through ESPnet's trainer: from any teacher to a stock transducer."""

import pytest
import torch
import yaml
from espnet2.tasks.asr_transducer import ASRTransducerTask

from espnet_pl.bridge import label
from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, main
from test.bridge.conftest import ASR, TRANSDUCER
from test.bridge.models import CONFS, model_folder

SEQUENCES = {"hard": 0.5, "full_sum": 1.0, "discriminative": 1.0, "ranking": 0.5, "beam": 4}
NODES = {"full_sum": 0.0, "collapsed": 0.1, "one_best": 0.1, "shift": 1, "beam": 2}


@pytest.fixture
def learn(arguments, corpus, tmp_path):
    """Train one epoch from a teacher, which is asked before or meanwhile; the student's weights."""

    def call(teacher, conf, out="exp", stored=True, base=TRANSDUCER, **changes):
        argv = arguments("transducer_kd", out, conf, base=base, max_epoch=1, **changes)
        given = ["--teachers", str(teacher)]
        if stored:
            data = corpus / "data/unlabelled"
            words = ["--wav", str(data / "wav.scp"), "--shape", str(data / "speech_shape")]
            configs = argv[:4]
            folder = tmp_path / f"{out}_said"
            label.main([*configs, "--teacher", str(teacher), "--output", str(folder), *words])
            given += ["--teacher_store", str(folder)]
        else:
            given += ["--teacher_mode", "online"]
        main([*argv, *given])
        return torch.load(tmp_path / out / "1epoch.pth")

    return call


@pytest.mark.parametrize("kind", CONFS)
def test_a_transducer_learns_from_any_teacher_and_is_a_stock_one(kind, learn, tmp_path, caplog):
    caplog.set_level("INFO")
    teacher = model_folder(tmp_path / "teacher", kind)
    learn(teacher, (NODES if kind == "transducer" else {}) | SEQUENCES)
    nodes = ["pseudo_collapsed", "pseudo_one_best"]
    for name in ("pseudo", "pseudo_full_sum", "pseudo_discriminative", "pseudo_ranking", *nodes):
        assert (f" {name}=" in caplog.text) == (name not in nodes or kind == "transducer"), name
    assert "student_surer=" in caplog.text and "hypotheses_same=" in caplog.text
    exp = tmp_path / "exp"
    export(exp, exp / "model")
    net, _ = ASRTransducerTask.build_model_from_file(
        exp / "model/config.yaml", exp / "model/model.pth", "cpu"
    )
    expected = torch.load(exp / "valid.loss.ave.pth")
    assert all(torch.equal(expected[name], x) for name, x in net.state_dict().items())
    kept = yaml.safe_load((exp / "model/config.yaml").read_text())
    assert not [key for key in kept if key.startswith(("teacher", "method"))]


def test_what_was_stored_teaches_what_the_teacher_would(learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher", "transducer")
    # One utterance in a batch, so that the teacher hears it without padding both times.
    same = dict(batch_type="unsorted", batch_size=1, optim="sgd", optim_conf={"lr": 1e-3})
    for conf, exact in ((SEQUENCES, 1e-6), (NODES, 1e-3)):  # nodes are kept in half precision
        stored = learn(teacher, conf, f"stored{exact}", **same)
        online = learn(teacher, conf, f"online{exact}", stored=False, **same)
        for name in stored:
            torch.testing.assert_close(stored[name], online[name], rtol=exact, atol=exact)
    other = learn(model_folder(tmp_path / "other", "transducer", seed=1), conf, "other", **same)
    assert any(not torch.equal(other[name], stored[name]) for name in stored)


def test_all_tokens_of_all_nodes_are_learnt_from_a_teacher_that_is_there(learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher", "transducer", joint_network_conf={
        "joint_space_size": 12
    })  # fmt: skip
    conf = {"full_sum": 0.0, "full_lattice": 0.1}
    assert all(x.isfinite().all() for x in learn(teacher, conf, stored=False).values())
    with pytest.raises(ConfigError, match="teacher_mode: online"):
        learn(teacher, conf, "stored")


def test_full_sums_of_ctc_are_distilled_alike(learn, tmp_path, caplog):
    caplog.set_level("INFO")
    learn(model_folder(tmp_path / "teacher", "transducer"), {"labelled": 0}, base=ASR)
    assert "pseudo_full_sum=" in caplog.text and "supervised=" not in caplog.text


@pytest.mark.parametrize(
    "kind, changes, match",
    [
        ("ctc", {}, "collapsed takes a transducer as teacher; hard, full_sum"),
        ("transducer", {"tokens": list("ABCD")}, "a teacher with the same tokens"),
        ("transducer", {"subsampling_factor": 2}, "as many frames a second"),
    ],
)
def test_nodes_of_other_lattices_are_refused_before_training(kind, changes, match, learn, tmp_path):
    own = dict(changes)
    words = ["<blank>", "<unk>", *own.pop("tokens", "ABC"), "<sos/eos>"]
    if own:
        conf = TRANSDUCER["encoder_conf"]
        own = {"encoder_conf": {**conf, "input_conf": {**conf["input_conf"], **own}}}
    teacher = model_folder(tmp_path / "teacher", kind, words, **own)
    with pytest.raises(ConfigError, match=match):
        learn(teacher, NODES, stored=False)
    full_sum = learn(teacher, {}, "full_sum", stored=False)  # does not need them
    assert all(x.isfinite().all() for x in full_sum.values())

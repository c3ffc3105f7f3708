"""Frame labels through ESPnet's trainer: from any teacher with a CTC layer to a stock model."""

import pytest
import torch
import yaml
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask

from espnet_pl.bridge import label
from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, main
from espnet_pl.parts.store import Reader
from test.bridge.conftest import ASR, TRANSDUCER
from test.bridge.models import model_folder
from test.bridge.test_train import same, weights

LETTERS = ["<blank>", "<unk>", "<space>", *"ABCDE", "<sos/eos>"]
SMALL = {"hidden": 8, "out": 4, "beam": 2}


@pytest.fixture
def said(arguments, corpus, tmp_path):
    """The store of what a teacher says, as a method's configuration asks for it."""

    def call(teacher, method="csl", conf=SMALL, out="said"):
        data, folder = corpus / "data/unlabelled", tmp_path / out
        words = ["--wav", str(data / "wav.scp"), "--shape", str(data / "speech_shape")]
        argv = arguments(method, f"{out}_asks", conf)[:4]
        label.main([*argv, "--teacher", str(teacher), "--output", str(folder), *words])
        return folder

    return call


@pytest.fixture
def learn(arguments, tmp_path):
    """Train one epoch, from a store or from the teacher itself; the checkpoint."""

    def call(teacher, store=None, conf=SMALL, out="exp", method="csl", **changes):
        argv = arguments(method, out, conf, **{"max_epoch": 1, **changes})
        given = ["--teacher_store", str(store)] if store else ["--teacher_mode", "online"]
        main([*argv, "--teachers", str(teacher), *given])
        return weights(tmp_path / out / "checkpoint.pth")

    return call


@pytest.mark.parametrize("base, stock", [(ASR, ASRTask), (TRANSDUCER, ASRTransducerTask)])
def test_from_a_teacher_of_other_tokens_to_a_stock_model(base, stock, said, learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher", "attention", LETTERS, "char", seed=3)
    store = said(teacher)
    reader = Reader(store)
    frames = set()
    for i in range(10):
        own = reader.get(f"unlabelled{i:02d}")
        assert set(own) == {"labels", "lengths"} and own["labels"].max() < len(LETTERS)
        frames.add(int(own["lengths"].sum()))
    assert len(frames) > 1 and reader.meta["asked"]["method"] == "frame_labels"
    state = learn(teacher, store, base=base)
    exp = tmp_path / "exp"
    export(exp, exp / "model")
    net, _ = stock.build_model_from_file(exp / "model/config.yaml", exp / "model/model.pth", "cpu")
    trained, _ = stock.build_model_from_file(exp / "config.yaml", exp / "1epoch.pth", "cpu")
    assert not [name for name in net.state_dict() if "projection" in name]
    assert net.state_dict().keys() == state["model"].keys()
    speech = torch.randn(2, 5000), torch.tensor([5000, 4000])
    outputs = [model.eval().encode(*speech)[0] for model in (net, trained)]
    assert torch.equal(*outputs)
    kept = yaml.safe_load((exp / "model/config.yaml").read_text())
    assert not [key for key in kept if key.startswith(("teacher", "method"))]


def test_the_projection_is_optimised_and_in_the_checkpoint_only(learn, tmp_path, caplog):
    caplog.set_level("INFO")
    teacher = model_folder(tmp_path / "teacher")
    state = learn(teacher)
    optimizer = state["optimizers"][0]
    of_student, of_method = (group["params"] for group in optimizer["param_groups"])
    own = [name for name in optimizer["method"] if name.startswith("projection.")]
    assert len(own) == len(of_method) == 4
    moments = optimizer["state"]
    assert all(moments[i]["exp_avg"].any() for i in of_method)
    untouched = [i for i in of_student if i not in moments or not moments[i]["exp_avg"].any()]
    assert len(untouched) < 5  # the CTC layer, and what of an encoder has no gradient
    for name in ("contrastive", "segments", "segments_skipped", "positives", "frames_labelled"):
        assert f" {name}=" in caplog.text, name
    assert " supervised=" not in caplog.text
    learn(teacher, conf=SMALL | {"labelled": 1}, out="mixed")
    assert " supervised=" in caplog.text


def test_what_was_stored_teaches_what_the_teacher_would(said, learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher", "transducer", encoder_conf={
        **TRANSDUCER["encoder_conf"],
        "input_conf": {**TRANSDUCER["encoder_conf"]["input_conf"], "subsampling_factor": 2},
    })  # fmt: skip
    alone = dict(batch_type="unsorted", batch_size=1)  # heard without padding both times
    conf = SMALL | {"units": "argmax", "blank": "drop"}
    stored = learn(teacher, said(teacher, conf=conf), conf, "stored", **alone)
    online = learn(teacher, None, conf, "online", **alone)
    assert same(stored["model"], online["model"])
    assert same(stored["optimizers"], online["optimizers"])
    other = learn(model_folder(tmp_path / "other", seed=1), None, conf, "other", **alone)
    assert not same(stored["model"], other["model"])


def test_gradients_of_several_batches_make_one_update(learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher")
    changes = dict(num_iters_per_epoch=6, accum_grad=3)
    whole = learn(teacher, out="whole", max_epoch=3, **changes)
    assert whole["optimizers"][0]["method"]["step"] == 6
    assert whole["optimizers"][0]["method"]["turn"] == 18
    learn(teacher, out="parts", **changes)
    parts = learn(teacher, out="parts", max_epoch=3, resume=True, **changes)
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])


def test_a_teacher_without_frames_is_refused(said, learn, tmp_path):
    teacher = model_folder(tmp_path / "teacher", "transducer", model_conf={})
    for call in (said, learn):
        with pytest.raises(ConfigError, match="the teacher has no CTC layer"):
            call(teacher)


def test_both_methods_read_the_same_records(said, learn, tmp_path, caplog):
    caplog.set_level("INFO")
    teacher = model_folder(tmp_path / "teacher")
    store = said(teacher, "ce_pl", {"beam": 2})
    conf = {"order": 2, "beam": 2}
    state = learn(teacher, store, conf, "ce", "ce_pl")["optimizers"][0]
    assert state["method"]["prediction.weight"].shape == ((6 + 1) ** 2, 8)
    assert " cross_entropy=" in caplog.text and " frames_wrong=" in caplog.text
    state = learn(teacher, store, SMALL | {"alternate": True}, "csl")["optimizers"][0]
    assert state["method"]["prediction.weight"].shape == (6 + 1, 8)
    assert [len(group["params"]) for group in state["param_groups"]][1] == 6
    with pytest.raises(ConfigError, match="asked.settings.beam is 2 there, 3 is wanted"):
        learn(teacher, store, SMALL | {"beam": 3}, "other")

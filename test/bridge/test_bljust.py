"""BL-JUST through ESPnet's trainer: restarts, all families, and what is hidden from encoders."""

import math
import re

import pytest
import torch
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask

from espnet_pl.bridge.export import export
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.teachers import FAMILIES
from espnet_pl.bridge.train import ConfigError, main, needs_unlabelled
from espnet_pl.methods.base import Utterances
from espnet_pl.parts.hiding import hide_future
from test.bridge.conftest import ASR, DECODER, TRANSDUCER
from test.bridge.models import CONFS, model_folder
from test.bridge.test_train import same, weights

SMALL = {"out": 4, "codes": 8, "steps": 3, "explore": 2, "joint": 2, "least_heard": 0.3}
MASKED = SMALL | {"hide": "spans", "predict": "codes", "span": 12, "share_hidden": 0.5}
SPEECH = 0.1 * torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([6000, 4000, 5000])


@pytest.fixture
def learn(arguments, tmp_path):
    """Train; the checkpoint."""

    def call(conf=SMALL, out="exp", method="bljust", argv=(), **changes):
        main([*arguments(method, out, conf, **{"max_epoch": 1, **changes}), *argv])
        return weights(tmp_path / out / "checkpoint.pth")

    return call


def logged(text, name):
    """What ESPnet's log says of a number, one value an update."""
    lines = re.findall(r"train:\d+-\d+batch.*", text)
    found = [re.search(rf"(?<![a-z_]){name}=([-\d.e+]+|nan)", line) for line in lines]
    return [float(f.group(1)) if f else math.nan for f in found]


@pytest.mark.parametrize("conf", [SMALL, MASKED])
def test_a_restart_within_exploration_continues_bit_by_bit(conf, learn, tmp_path):
    # Epochs of 5 updates, blocks of 2 + 2: they end in exploration and in joint updates.
    conf = conf | {"gamma": 0.1, "growth": 0.2, "norms_every": 2}
    whole = learn(conf, "whole", max_epoch=4)
    for epoch in (1, 3, 4):
        parts = learn(conf, "parts", max_epoch=epoch, resume=True)
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    kept = parts["optimizers"][0]["method"]
    assert (kept["step"], kept["joint"]) == (20, 10)


def test_what_was_killed_goes_on(learn, tmp_path, monkeypatch):
    from espnet_pl.methods.bljust import Method

    whole = learn(out="whole", max_epoch=3)
    after_step, conf = Method.after_step, dict(out="parts", max_epoch=3, resume=True)

    def dies(self, student):
        if self.step == 7:
            raise KeyboardInterrupt
        after_step(self, student)

    monkeypatch.setattr(Method, "after_step", dies)
    with pytest.raises(KeyboardInterrupt):
        learn(**conf)
    monkeypatch.undo()
    parts = learn(**conf)
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])


def test_gamma_and_both_gradients_are_in_the_log(learn, caplog):
    caplog.set_level("INFO")
    conf = SMALL | {"gamma": 0.1, "growth": 0.2, "gamma_max": 0.5, "norms_every": 2}
    learn(conf, num_iters_per_epoch=12)
    gamma = logged(caplog.text, "gamma")
    joint = [g for g in gamma if g == g]
    assert [g != g for g in gamma] == [True, True, False, False] * 3
    assert joint == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.5, 0.5], rel=1e-3)
    for name in ("gradient_upper", "gradient_lower"):
        found = logged(caplog.text, name)
        assert [i for i, v in enumerate(found) if v > 0] == [2, 6, 10], name
    supervised, alone = logged(caplog.text, "supervised"), logged(caplog.text, "unsupervised")
    assert [v != v for v in supervised] == [g != g for g in gamma]
    assert all(v > 0 for v in alone)
    for name in ("frame_loss", "frame_chance", "frames_predicted", "gradient_cosine"):
        assert f" {name}=" in caplog.text, name


def test_exploration_leaves_the_layers_for_tokens_alone(learn, tmp_path):
    conf = SMALL | {"labelled": 0}
    assert needs_unlabelled({"method": "bljust", "method_conf": conf})
    learn(conf, "a", max_epoch=1)
    init = ["--init_param", str(tmp_path / "a/1epoch.pth")]
    learn(conf, "b", argv=init)
    a, b = (weights(tmp_path / f"{out}/1epoch.pth") for out in "ab")
    assert torch.equal(a["ctc.ctc_lo.weight"], b["ctc.ctc_lo.weight"])
    for name in ("encoder.embed.conv.0.weight", "encoder.encoders.0.feed_forward.w_1.weight"):
        assert not torch.equal(a[name], b[name])


def test_a_gamma_of_0_is_supervised_training(learn, tmp_path):
    # The learning rate is the same for both, and unlabelled speech moves the encoder's statistics
    # of batch normalisation only.
    still = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    base = ASR | {"specaug": None, "encoder_conf": ASR["encoder_conf"] | still}
    conf = SMALL | {"explore": 0, "joint": 0, "growth": 0.0}
    penalty = learn(conf, "penalty", base=base, grad_clip=1e9)["model"]
    alone = learn({}, "alone", "supervised", base=base, grad_clip=1e9)["model"]
    assert penalty.keys() == alone.keys()
    for name, value in penalty.items():
        if not any(part in name for part in ("running", "num_batches")):
            torch.testing.assert_close(value, alone[name], msg=name)
    other = learn(conf | {"gamma": 0.5}, "other", base=base, grad_clip=1e9)["model"]
    assert not torch.allclose(other["ctc.ctc_lo.weight"], alone["ctc.ctc_lo.weight"])


@pytest.mark.parametrize(
    "base, stock",
    [
        (ASR, ASRTask),
        (ASR | DECODER | {"model_conf": {"ctc_weight": 0.3}}, ASRTask),
        (TRANSDUCER, ASRTransducerTask),
    ],
)
@pytest.mark.parametrize("conf", [SMALL, MASKED])
def test_every_family_becomes_a_stock_model(conf, base, stock, learn, tmp_path, caplog):
    caplog.set_level("INFO")
    state = learn(conf | {"gamma": 0.3, "norms_every": 1}, base=base)
    exp = tmp_path / "exp"
    export(exp, exp / "model")
    net, _ = stock.build_model_from_file(exp / "model/config.yaml", exp / "model/model.pth", "cpu")
    assert net.state_dict().keys() == state["model"].keys()
    assert not [k for k in net.state_dict() if "predictor." in k or "embedding." in k]
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    assert all(v > 0 for v in logged(caplog.text, "gradient_upper") if v == v)
    assert any(v > 0 for v in logged(caplog.text, "gradient_lower"))
    optimizer = state["optimizers"][0]
    own = optimizer["param_groups"][1]["params"]
    assert len(own) == (3 if conf is SMALL else 2)
    assert all(optimizer["state"][i]["exp_avg"].any() for i in own)


@pytest.mark.parametrize("base", [{}, TRANSDUCER])
def test_measuring_gradients_does_not_change_the_training(base, learn):
    base = {"base": base} if base else {}
    trained = [learn(SMALL | {"norms_every": n}, f"every{n}", **base) for n in (0, 1)]
    assert same(trained[0]["model"], trained[1]["model"])


def student(kind, **changes):
    """An untrained student of that family, in training mode; SpecAugment hides much."""
    conf = CONFS[kind] | changes
    stock, wrapper = FAMILIES[conf.get("task", "asr")]
    args = stock.get_parser().parse_args([])
    for name, value in conf.items():
        setattr(args, name, value)
    args.token_list, args.token_type = ["<blank>", "<unk>", "A", "B", "C", "<sos/eos>"], "word"
    args.model_conf = {**args.model_conf}
    torch.manual_seed(0)
    return wrapper(stock.build_model(args))


@pytest.mark.parametrize("kind", CONFS)
def test_what_is_hidden_does_not_reach_the_encoder(kind, monkeypatch):
    model = student(kind).eval()
    x = Utterances(["a", "b", "c"], SPEECH, LENGTHS)
    assert "inputs" in model.answers and model.input_size == 16

    def second_half(frames, width):
        return (torch.arange(width) >= frames[:, None] // 2) & (
            torch.arange(width) < frames[:, None]
        )

    given = model.hear(x, second_half).inputs()
    features, frames, hidden = given
    assert features.shape == (3, int(frames.max()), 16) and hidden.shape == features.shape[:2]
    assert not features.requires_grad and frames.tolist() == [76, 51, 63]
    feats, lengths = model.net._extract_feats(SPEECH, LENGTHS)
    torch.testing.assert_close(features, model.net.normalize(feats, lengths)[0])

    heard, forward = [], model.net.encoder.forward
    with monkeypatch.context() as patch:
        patch.setattr(model.net.encoder, "forward", lambda x, t: heard.append(x) or forward(x, t))
        model.hear(x, second_half)
    assert torch.equal(heard[0], features.masked_fill(hidden[..., None], 0.0))
    whole, _ = model.hear(x).features()
    none, _ = model.hear(x, lambda t, s: torch.zeros(len(t), s).bool()).features()
    assert torch.equal(whole, none)  # and no hook is left
    assert not torch.allclose(model.hear(x, second_half).features()[0], whole)
    assert not model.net.encoder._forward_pre_hooks


@pytest.mark.parametrize("kind", CONFS)
def test_hiding_takes_the_place_of_specaugment(kind):
    model = student(kind).train()
    x = Utterances(["a", "b", "c"], SPEECH, LENGTHS)
    for _ in range(5):
        given = model.hear(x, lambda t, s: hide_future(t, s, 0.5)).inputs()
        feats, lengths = model.net._extract_feats(SPEECH, LENGTHS)
        torch.testing.assert_close(given.features, model.net.normalize(feats, lengths)[0])
    strong = [model.hear(x).features()[0] for _ in range(2)]
    assert not torch.allclose(*strong) and model.net.specaug is not None


def test_an_error_leaves_the_model_as_it_was():
    model = student("ctc")
    specaug = model.net.specaug
    x = Utterances(["a", "b", "c"], SPEECH, LENGTHS)
    with pytest.raises(ZeroDivisionError):
        model.hear(x, lambda t, s: 1 / 0)
    assert not model.net.encoder._forward_pre_hooks
    assert specaug is not None and model.net.specaug is specaug


def test_features_in_place_of_speech_are_refused(arguments):
    base = {k: v for k, v in ASR.items() if not k.startswith("frontend")}
    with pytest.raises(ConfigError, match="for inputs, .* a front end"):
        main(arguments("bljust", base=base | {"input_size": 16, "frontend": None}))


def test_gradients_of_several_batches_make_one_update(learn):
    changes = dict(num_iters_per_epoch=8, accum_grad=4, max_epoch=2)
    whole = learn(SMALL | {"explore": 4, "joint": 4}, "whole", **changes)
    kept = whole["optimizers"][0]["method"]
    assert (kept["step"], kept["joint"]) == (4, 2)


def test_an_epoch_without_a_length_sees_every_labelled_batch_once(learn):
    state = learn(num_iters_per_epoch=None, batch_type="unsorted", batch_size=2)
    kept = state["optimizers"][0]["method"]
    assert (kept["step"], kept["joint"]) == (8, 4)  # 4 batches, in blocks of 2
    state = learn(SMALL | {"joint": 0}, "first", num_iters_per_epoch=None, batch_type="unsorted",
                  batch_size=2)  # fmt: skip
    kept = state["optimizers"][0]["method"]
    assert (kept["step"], kept["joint"]) == (6, 4)


def test_a_teacher_s_records_do_not_say_that_it_has_inputs(tmp_path):
    from espnet_pl.bridge import teachers, teaching

    loaded = teachers.load(model_folder(tmp_path / "teacher"))
    assert isinstance(loaded.network, Recogniser) and "inputs" in loaded.network.answers
    config = {"method": "csl", "method_conf": {}}
    assert teaching.meta(loaded, config, ["a"])["answers"] == [
        "features", "frame_log_probs", "propose", "score", "supervised"
    ]  # fmt: skip

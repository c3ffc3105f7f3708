"""Transducers of ESPnet's task ``asr``, with tools/warprnnt_pytorch: stock programs, and ours."""

import inspect
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from espnet2.tasks.asr import ASRTask

from espnet_pl.bridge.export import export
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.train import ConfigError, main
from espnet_pl.losses import transducer
from test.bridge.conftest import ASR
from test.bridge.test_stock import read
from test.bridge.test_train import same, weights
from test.bridge.test_transducer import TOKENS, batch, dense_loss
from test.tools.test_install import ROOT
from test.tools.test_warprnnt_pytorch import INSTALL, environment, load

HYBRID = ASR | {
    "decoder": "transducer",
    "decoder_conf": {"hidden_size": 8},
    "joint_net_conf": {"joint_space_size": 8},
    "model_conf": {"ctc_weight": 0.3},
}


def logits_of(net):
    """The same numbers here and in another process."""
    speech = torch.linspace(0, 3000, 6000).sin()[None]
    with torch.no_grad():
        encoded, _ = net.eval().encode(speech, torch.tensor([6000]))
        predicted = net.decoder(torch.tensor([[0, 2, 3]]))
        return net.joint_network(encoded[:, :, None], predicted[:, None]).numpy()


LOAD = f"""
import sys, numpy, torch
from espnet2.bin.asr_inference import Speech2Text
{inspect.getsource(logits_of)}
numpy.save("logits.npy", logits_of(Speech2Text(*sys.argv[1:], beam_size=1).asr_model))
"""
WITHOUT_BRIDGE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    theirs = [name for name in sys.modules if name.startswith("espnet_pl.")]
    assert theirs and not [n for n in theirs if not n.startswith("espnet_pl.losses")], theirs
"""


@pytest.fixture
def module(monkeypatch):
    """As if it were installed here."""
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", load())


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A way to run stock programs in an environment with the drop-in."""
    run = environment(tmp_path_factory.mktemp("hybrid"), ROOT)
    installed = run(INSTALL)
    assert installed.returncode == 0, installed.stderr
    return run


def decode(run, folder, model, wav_scp):
    """What stock inference says."""
    done = run(
        "python", "-c", WITHOUT_BRIDGE, "espnet2.bin.asr_inference", "--ngpu", "0",
        "--beam_size", "2", "--asr_train_config", model[0], "--asr_model_file", model[1],
        "--data_path_and_name_and_type", f"{wav_scp},speech,sound", "--output_dir", "decoded",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return read(folder / "decoded/1best_recog/text")


def test_stock_training_and_inference(stock, corpus, tmp_path):
    (tmp_path / "asr.yaml").write_text(yaml.safe_dump(HYBRID | {"num_att_plot": 0}))
    argv = ["--config", "asr.yaml", "--output_dir", "exp", "--ngpu", "0", "--token_type", "word"]
    argv += ["--token_list", str(corpus / "tokens.txt"), "--use_tensorboard", "false"]
    argv += ["--use_matplotlib", "false"]
    for flag, name in (("train", "labelled"), ("valid", "dev")):
        data = corpus / "data" / name
        for file in ("wav.scp,speech,sound", "text,text,text"):
            argv += [f"--{flag}_data_path_and_name_and_type", f"{data}/{file}"]
        argv += [f"--{flag}_shape_file", f"{data}/speech_shape"]
    trained = stock("python", "-c", WITHOUT_BRIDGE, "espnet2.bin.asr_train", *argv, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    losses = re.findall(r"loss_transducer=([a-z]*[0-9.]*)", trained.stderr)
    assert len(losses) >= 14 and all(0 < float(loss) < 100 for loss in losses)
    wav_scp = corpus / "data/dev/wav.scp"
    model = ["exp/config.yaml", "exp/valid.loss.best.pth"]
    assert set(decode(stock, tmp_path, model, wav_scp)) == set(read(wav_scp))


def network(**changes):
    """A stock model with random weights."""
    torch.manual_seed(0)
    args = ASRTask.get_parser().parse_args([])
    for name, value in (HYBRID | changes).items():
        setattr(args, name, value)
    args.token_list = TOKENS
    return ASRTask.build_model(args)


def test_the_loss_and_its_gradients_are_those_of_the_dense_network(module):
    net = network(model_conf={"ctc_weight": 0.0, "report_cer": False, "report_wer": False}).eval()
    expected = dense_loss(net)
    parameters = [p for name, p in net.named_parameters() if not name.startswith("ctc.")]
    gradients = torch.autograd.grad(expected, parameters, materialize_grads=True)
    loss, stats, _ = net(**{k: v.clone() for k, v in batch().items()})
    torch.testing.assert_close(loss.squeeze().double(), expected)
    torch.testing.assert_close(stats["loss_transducer"].squeeze(), loss.detach().squeeze())
    ours = torch.autograd.grad(loss.squeeze(), parameters, materialize_grads=True)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-5)


def test_half_precision_is_trained(module):
    net = network().eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = net(**{k: v.clone() for k, v in batch().items()})
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.joint_network.lin_out.weight.grad.any()


def test_it_is_a_student_that_is_trained_exported_and_decoded(
    module, stock, arguments, corpus, tmp_path
):
    main(arguments("supervised", "whole", base=HYBRID))
    main(arguments("supervised", "parts", base=HYBRID, max_epoch=1))
    main([*arguments("supervised", "parts", base=HYBRID), "--resume", "true"])
    whole, parts = (weights(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    exp = tmp_path / "whole"
    export(exp, exp / "model")
    assert same(weights(exp / "model/model.pth"), weights(exp / "valid.loss.ave.pth"))
    wav_scp = corpus / "data/dev/wav.scp"
    model = ["whole/model/config.yaml", "whole/model/model.pth"]
    assert set(decode(stock, tmp_path, model, wav_scp)) == set(read(wav_scp))
    loaded = stock("python", "-c", LOAD, *model, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    net, _ = ASRTask.build_model_from_file(exp / "config.yaml", exp / "valid.loss.ave.pth", "cpu")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), logits_of(net))


def test_it_answers_what_it_can(module, arguments):
    always = {"supervised", "features", "inputs"}
    assert Recogniser(network()).answers == always | {"frame_log_probs"}
    assert Recogniser(network(model_conf={"ctc_weight": 0.0})).answers == always
    with pytest.raises(ConfigError, match="asks the student for score"):
        main(arguments("mpl", base=HYBRID))


def test_without_the_module_the_error_says_how_to_get_it(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", None)
    with pytest.raises(ConfigError, match=r"tools/install_warprnnt.sh .* asr_transducer do with"):
        main(arguments("supervised", base=HYBRID))
    assert not [*tmp_path.glob("exp/*.pth")]


def test_a_wrong_sum_is_refused_before_training(module, arguments, tmp_path, monkeypatch):
    true = transducer.full_sum
    monkeypatch.setattr(transducer, "full_sum", lambda *a: true(*a) + 1e-3)
    transducer.self_test.cache_clear()
    with pytest.raises(RuntimeError, match="nothing should be trained with it"):
        main(arguments("supervised", base=HYBRID))
    assert not [*tmp_path.glob("exp/*.pth")]

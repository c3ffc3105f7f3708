"""bridge/transducer: the loss by hand · real training and restart · stock inference · refusals."""

import copy
import sys

import pytest
import torch
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.asr_transducer.joint_network import JointNetwork
from espnet2.tasks.asr_transducer import ASRTransducerTask
from rapidfuzz.distance import Levenshtein

from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, main
from espnet_pl.bridge.transducer import TransducerRecogniser, lend_loss
from espnet_pl.losses import transducer
from espnet_pl.losses.lattice import full_sum
from espnet_pl.methods.base import Utterances
from test.bridge.conftest import TRANSDUCER
from test.bridge.test_train import same, weights

TOKENS = ["<blank>", "<unk>", "A", "B", "C", "<sos/eos>"]
SPEECH = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))
SAMPLES = [6000, 4000, 5000]
TEXT = torch.tensor([[2, 2, 3, 4], [3, -1, -1, -1], [4, 2, -1, -1]])
LENGTHS = torch.tensor([4, 1, 2])


def network(**changes):
    """A stock model with random weights."""
    torch.manual_seed(0)
    parser = ASRTransducerTask.get_parser()
    args = parser.parse_args([])
    for name, value in (TRANSDUCER | changes).items():
        setattr(args, name, value)
    args.token_list = TOKENS
    args.model_conf = {**args.model_conf}
    return ASRTransducerTask.build_model(args)


def batch():
    return {
        "speech": SPEECH, "speech_lengths": torch.tensor(SAMPLES),
        "text": TEXT, "text_lengths": LENGTHS,
    }  # fmt: skip


def dense_loss(net):
    """All logits by the stock joint network."""
    encoded, frames = net.encode(SPEECH, torch.tensor(SAMPLES))
    labels = torch.nn.functional.pad(TEXT.clamp(min=0), (1, 0))
    predicted = net.decoder(labels)
    logits = JointNetwork.forward(net.joint_network, encoded[:, :, None], predicted[:, None])
    log_p = logits.log_softmax(-1).transpose(1, 2)  # n u1 t v
    following = labels[:, 1:, None, None].expand(-1, -1, log_p.shape[2], 1)
    label = log_p[:, :-1].gather(3, following)[..., 0]
    return -full_sum(log_p[..., 0], label, frames, LENGTHS).mean()


@pytest.mark.parametrize("decoder", ["stateless", "rnn"])
@pytest.mark.parametrize("activation", ["tanh", "hardtanh", "swish"])
def test_the_loss_and_its_gradients_are_those_of_the_dense_network(decoder, activation):
    conf = {"embed_size": 8} if decoder == "stateless" else {"embed_size": 8, "hidden_size": 8}
    net = network(
        decoder=decoder, decoder_conf=conf, model_conf={},
        joint_network_conf={"joint_space_size": 8, "joint_activation_type": activation},
    ).eval()  # fmt: skip
    names = [*net.state_dict()]
    lend_loss(net)
    assert [*net.state_dict()] == names
    expected = dense_loss(net)
    gradients = torch.autograd.grad(expected, [*net.parameters()], materialize_grads=True)
    loss, stats, _ = net(**batch())
    torch.testing.assert_close(loss.squeeze().double(), expected)
    torch.testing.assert_close(stats["loss_transducer"].squeeze(), loss.detach().squeeze())
    ours = torch.autograd.grad(loss.squeeze(), [*net.parameters()], materialize_grads=True)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-5)


def test_the_score_is_the_loss_of_each_utterance():
    student = TransducerRecogniser(network(model_conf={})).eval()
    x = Utterances(["a", "b", "c"], SPEECH, torch.tensor(SAMPLES))
    labels = [row[:n].tolist() for row, n in zip(TEXT, LENGTHS)]
    loss, _ = student.supervised(Utterances(x.utt_id, SPEECH, x.speech_lengths, TEXT, LENGTHS))
    torch.testing.assert_close(-student.hear(x).score(labels).mean(), loss)
    empty = student.hear(x).score([[], [], []])
    assert empty.isfinite().all() and (empty < 0).all()


def test_features_are_what_the_joint_network_sees():
    student = TransducerRecogniser(network()).eval()
    heard = student.hear(Utterances(["a", "b", "c"], SPEECH, torch.tensor(SAMPLES)))
    features, frames = heard.features()
    assert features.shape == (3, int(frames.max()), student.feature_size)
    lattices = heard.lattices([[2], [3], [4]])
    torch.testing.assert_close(student.net.joint_network.lin_enc(features), lattices.encoded)
    torch.testing.assert_close(student.net.ctc_lin(features).log_softmax(2), heard._log_p)
    assert frames.equal(lattices.frames)


@pytest.mark.parametrize("decoder", ["stateless", "rnn"])
def test_the_best_path_is_that_of_each_utterance_alone(decoder):
    conf = {"embed_size": 8} if decoder == "stateless" else {"embed_size": 8, "hidden_size": 8}
    net = lend_loss(network(decoder=decoder, decoder_conf=conf, model_conf={})).eval()
    net.joint_network.lin_out.weight.data *= 8  # so that it speaks
    encoded, frames = net.encode(SPEECH, torch.tensor(SAMPLES))
    frames = torch.tensor([14, 9, 11])
    found = net.best_path(encoded, frames, most=3)
    assert any(found) and found != found[:1] * 3
    for own, e, t_end in zip(found, encoded, frames.tolist()):
        labels = [0]
        for frame in e[:t_end]:
            for _ in range(3):
                predicted = net.decoder(torch.tensor([labels]))[0, -1]
                best = int(JointNetwork.forward(net.joint_network, frame, predicted).argmax())
                if best == 0:
                    break
                labels.append(best)
        assert own == labels[1:]


def test_validation_reports_the_errors_of_the_best_path():
    net = lend_loss(network(model_conf={"report_cer": True, "report_wer": True})).eval()
    _, stats, _ = net(**batch())
    encoded, frames = net.encode(SPEECH, torch.tensor(SAMPLES))
    said, meant = (
        ["".join(TOKENS[k] for k in y) for y in rows]
        for rows in (net.best_path(encoded, frames), ([2, 2, 3, 4], [3], [4, 2]))
    )
    edits = sum(Levenshtein.distance(y, z) for y, z in zip(said, meant))
    assert stats["cer_transducer"] == pytest.approx(edits / 7)
    assert stats["wer_transducer"] is not None
    twin = copy.deepcopy(lend_loss(network(model_conf={"report_cer": True})))
    assert twin.error_calculator.net is twin


@pytest.mark.parametrize("auxiliary", [0.0, 0.3])
def test_proposals_have_their_full_sums(auxiliary):
    student = TransducerRecogniser(network(model_conf={"auxiliary_ctc_weight": auxiliary})).eval()
    x = Utterances(["a", "b", "c"], SPEECH, torch.tensor(SAMPLES))
    with torch.no_grad():
        proposals = student.hear(x).propose(4)
        assert all(2 <= len(own) <= 4 for own in proposals)
        for place in range(2):
            scores = student.hear(x).score([own[place].labels for own in proposals])
            said = torch.tensor([own[place].log_p for own in proposals])
            torch.testing.assert_close(scores, said)
    for own in proposals:
        assert len({tuple(p.labels) for p in own}) == len(own)
        assert [p.log_p for p in own] == sorted((p.log_p for p in own), reverse=True)


def test_fast_emit_is_the_stock_option():
    plain, pushed = (network(model_conf={"fastemit_lambda": f}).eval() for f in (0.0, 0.3))
    losses = [lend_loss(net)(**batch())[0] for net in (plain, pushed)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(x, n.joint_network.lin_out.bias)[0] for x, n in zip(
        losses, (plain, pushed))]  # fmt: skip
    assert not torch.allclose(*gradients)


def test_training_needs_no_compiled_loss_and_restarts_bit_by_bit(arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", None)  # as if it were not installed
    main(arguments("mpl", "whole", base=TRANSDUCER, max_epoch=3))
    main(arguments("mpl", "parts", base=TRANSDUCER, max_epoch=1))
    main([*arguments("mpl", "parts", base=TRANSDUCER, max_epoch=3), "--resume", "true"])
    whole, parts = (weights(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    assert whole["optimizers"][0]["method"]["step"] == 15


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_what_is_exported_is_a_stock_model(source, arguments, tmp_path):
    main(arguments("mpl", base=TRANSDUCER, max_epoch=1, keep_nbest_models=1))
    exp = tmp_path / "exp"
    export(exp, exp / "model", source)
    files = exp / "model/config.yaml", exp / "model/model.pth"
    net, args = ASRTransducerTask.build_model_from_file(*files, "cpu")
    assert type(net) is ESPnetASRTransducerModel and not hasattr(args, "task")
    state = weights(exp / "checkpoint.pth")["optimizers"][0]["method"]
    prefix = "teacher._average.module.net."
    expected = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if source == "student":
        expected = weights(exp / "valid.loss.ave.pth")
    assert same(dict(net.state_dict()), dict(expected))


def test_a_transducer_teaches_beside_the_own_teacher(arguments, tmp_path):
    main(arguments("supervised", "seed", base=TRANSDUCER, max_epoch=1))
    export(tmp_path / "seed", tmp_path / "seed/model")
    argv = arguments("mpl", base=TRANSDUCER, max_epoch=1)
    main([*argv, "--teachers", str(tmp_path / "seed/model")])
    said = weights(tmp_path / "exp/checkpoint.pth")["optimizers"][0]["method"]
    assert any(key.startswith("said.") for key in said)


def test_pseudo_labels_come_from_the_auxiliary_ctc_layer(arguments):
    with pytest.raises(ConfigError, match="asks the student for frame_log_probs"):
        main(arguments("mpl", base=TRANSDUCER | {"model_conf": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_conf": {"use_k2_pruned_loss": True}}, "use_k2_pruned_loss replaces the loss"),
        ({"task": "asr_transducr"}, "did you mean 'asr_transducer'"),
        ({"encoder": "conformer"}, "unknown 'encoder'"),
        ({"decoder": "statless"}, "did you mean 'stateless'"),
        ({"decoder_conf": {"embed": 8}}, "did you mean 'embed_pad'|did you mean 'embed_size'"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message, arguments):
    with pytest.raises(ConfigError, match=message):
        main(arguments("supervised", base=TRANSDUCER | changes))


def test_an_activation_with_parameters_is_refused():
    net = network()
    net.joint_network.joint_activation = torch.nn.PReLU()
    with pytest.raises(ConfigError, match="an activation with parameters"):
        lend_loss(net)


def test_a_wrong_sum_is_refused_before_training(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(transducer, "full_sum", lambda *a: full_sum(*a) + 1e-3)
    transducer.self_test.cache_clear()
    with pytest.raises(RuntimeError, match="nothing should be trained with it"):
        main(arguments("supervised", base=TRANSDUCER))
    assert not [*tmp_path.glob("exp/*.pth")]

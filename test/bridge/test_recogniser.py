"""bridge/recogniser: what a stock CTC or attention/CTC model proposes, and how that is scored."""

import pytest
import torch
from espnet2.tasks.asr import ASRTask

from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.methods.base import Utterances
from test.bridge.conftest import ASR, DECODER

SPEECH = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))


def student(**changes):
    torch.manual_seed(0)
    args = ASRTask.get_parser().parse_args([])
    for name, value in (ASR | changes).items():
        setattr(args, name, value)
    args.token_list = ["<blank>", "<unk>", "A", "B", "C", "<sos/eos>"]
    return Recogniser(ASRTask.build_model(args)).eval()


@pytest.mark.parametrize("changes", [{}, {**DECODER, "model_conf": {"ctc_weight": 0.3}}])
def test_proposals_have_the_scores_of_the_training_criterion(changes):
    model = student(**changes)
    x = Utterances(["a", "b", "c"], SPEECH, torch.tensor([6000, 4000, 5000]))
    with torch.no_grad():
        proposals = model.hear(x).propose(5)
        for place in range(5):
            scores = model.hear(x).score([own[place].labels for own in proposals])
            said = torch.tensor([own[place].log_p for own in proposals])
            torch.testing.assert_close(scores, said, rtol=1e-4, atol=1e-4)
        several = [(p.labels, i) for i in (2, 0) for p in proposals[i][:3]]
        scores = model.hear(x).score([y for y, _ in several], [i for _, i in several])
        said = torch.tensor([p.log_p for i in (2, 0) for p in proposals[i][:3]])
        torch.testing.assert_close(scores.float(), said, rtol=1e-4, atol=1e-4)
        assert model.hear(x).score([[2] * 999], [1]).isneginf()
    nothing = model.hear(x).score([], [])
    assert nothing.shape == (0,) and nothing.requires_grad
    for own in proposals:
        assert len({tuple(p.labels) for p in own}) == 5
        assert [p.log_p for p in own] == sorted((p.log_p for p in own), reverse=True)


def test_features_are_what_every_head_sees():
    model = student()
    x = Utterances(["a", "b", "c"], SPEECH, torch.tensor([6000, 4000, 5000]))
    heard = model.hear(x)
    features, frames = heard.features()
    assert features.shape == (3, int(frames.max()), model.feature_size)
    log_p, same = heard.frame_log_probs()
    assert frames.equal(same)
    torch.testing.assert_close(model.net.ctc.log_softmax(features), log_p)
    weak, _ = model.hear(x).features()
    assert torch.equal(weak, features)
    strong, _ = model.train().hear(x).features()  # masked, and with dropout
    assert not torch.allclose(strong, features)
    strong.sum().backward()
    assert model.net.encoder.embed.conv[0].weight.grad.any()

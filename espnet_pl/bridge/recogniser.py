"""A stock ESPnet model as a student: it answers a method's questions.

Student and teacher are both one, so a method cannot tell them apart.
"""

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from torch import Tensor, nn

from espnet_pl.losses.ctc import ctc, feasible, log_probability
from espnet_pl.methods.base import Utterances
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.search import Proposal, flat, prefix_search, rank


class Recogniser(nn.Module):
    """CTC and attention/CTC models of ESPnet's ``asr`` task.

    Transducers (ESPnet's ``asr_transducer`` task) are another student; a method sees no difference.
    Those of the ``asr`` task have no score here: they are trained, and give CTC's frames.
    """

    def __init__(self, net: ESPnetASRModel) -> None:
        super().__init__()
        self.net = net
        self.blank = net.blank_id
        answers = {"supervised"}
        if net.ctc is not None:
            answers.add("frame_log_probs")
            if not net.use_transducer_decoder:
                answers |= {"score", "propose"}
        self.answers = frozenset(answers)

    def supervised(self, x: Utterances) -> tuple[Tensor, dict[str, Tensor]]:
        """ESPnet's own forward pass, untouched."""
        loss, parts, _ = self.net(
            speech=x.speech,
            speech_lengths=x.speech_lengths,
            text=x.text,
            text_lengths=x.text_lengths,
        )
        parts = {k: v for k, v in parts.items() if v is not None and k != "loss"}
        return loss.squeeze(), {k: v.squeeze() for k, v in parts.items()}

    def frame_log_probs(self, x: Utterances) -> tuple[Tensor, Tensor]:
        """Log-softmax of the CTC layer, (n, t, v), and the valid frames, (n,)."""
        return self._frames(*self._encode(x))

    def score(self, x: Utterances, labels: list[list[int]]) -> Tensor:
        """w · log p_ctc + (1 − w) · log p_att with ESPnet's ``ctc_weight`` w, (n,) nats."""
        encoded, frames = self._encode(x)
        log_p, frames = self._frames(encoded, frames)
        text, lengths = pad(labels, log_p.device)
        log_p_y = self._with_attention(
            -ctc(log_p, frames, text, lengths, self.blank), encoded, frames, text, lengths
        )
        never = torch.full_like(log_p_y, -torch.inf)
        return torch.where(feasible(frames, text, lengths), log_p_y, never)

    def propose(self, x: Utterances, beam: int) -> list[list[Proposal]]:
        """The likeliest sequences of the CTC layer, with the scores of ``score`` in float64."""
        encoded, frames = self._encode(x)
        log_p, frames = self._frames(encoded, frames)
        found = prefix_search(log_p, frames, beam, blank=self.blank)
        text, lengths, of = flat(found, encoded.device)
        log_p_y = log_probability(log_p, frames, text, lengths, of, self.blank)
        return rank(found, self._with_attention(log_p_y, encoded[of], frames[of], text, lengths))

    def _with_attention(self, log_p_ctc, encoded, frames, text, lengths) -> Tensor:
        weight = self.net.ctc_weight
        if weight == 1.0:
            return log_p_ctc
        return weight * log_p_ctc - (1 - weight) * self.net.nll(encoded, frames, text, lengths)

    def _encode(self, x: Utterances) -> tuple[Tensor, Tensor]:
        encoded, frames = self.net.encode(x.speech, x.speech_lengths)
        if isinstance(encoded, tuple):  # with the outputs of intermediate layers
            encoded = encoded[0]
        # In 202511 the frames of a short utterance can exceed the padded axis by one or two.
        return encoded, frames.clamp(max=encoded.shape[1])

    def _frames(self, encoded: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        head = self.net.ctc
        hidden = nn.functional.dropout(encoded, head.dropout_rate, self.training)
        return head.ctc_lo(hidden).log_softmax(dim=-1), frames

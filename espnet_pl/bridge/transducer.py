"""ESPnet's transducers (task ``asr_transducer``) as students, with our loss.

Stock ESPnet asks warp-transducer for the loss, which has to be compiled, and hands it the logits
of every pair of frame and label.  Here the joint network hands over its two projections instead,
and the loss is ``losses/transducer``.  Everything else of the stock model runs as it is, under the
names it has: what is trained decodes where espnet_pl is not installed.
"""

import functools
from typing import Any, NamedTuple

import torch
from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer, Hypothesis
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.encoder.blocks.conv_input import ConvInput
from espnet2.asr_transducer.error_calculator import ErrorCalculator
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.asr_transducer.joint_network import JointNetwork
from torch import Tensor, nn

from espnet_pl.bridge.recogniser import Encoded, Recogniser, input_size
from espnet_pl.losses.joint import Joint
from espnet_pl.losses.transducer import (
    Hypotheses,
    Lattices,
    hypotheses,
    log_probability,
    self_test,
)
from espnet_pl.methods.base import ConfigError, Hide, Utterances
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.search import Proposal, flat, prefix_search, rank


class TransducerRecogniser(Recogniser):
    """A stock transducer as a student.

    Its score is the full sum; its frames are those of the auxiliary CTC layer, if it has one
    (``model_conf: {auxiliary_ctc_weight: 0.3}``).
    """

    def __init__(self, net: ESPnetASRTransducerModel) -> None:
        nn.Module.__init__(self)
        self.net = lend_loss(net)
        self.blank = 0
        self.feature_size = net.encoder.output_size
        self.input_size = input_size(net)
        frames = ["frame_log_probs"] if net.use_auxiliary_ctc else []
        frames += ["inputs"] if self.input_size else []
        always = ("supervised", "features", "score", "propose", "lattices")
        self.answers = frozenset([*always, *frames])

    @property
    def joint(self) -> Joint:
        """The joint network, behind its projections."""
        return self.net.joint

    def hear(self, x: Utterances, hide: Hide | None = None) -> "EncodedForTransducer":
        """The speech, encoded once."""
        return EncodedForTransducer(self.net, x, self.training, hide)


class EncodedForTransducer(Encoded):
    """What a transducer has made of utterances."""

    def score(self, labels: list[list[int]], of: list[int] | None = None) -> Tensor:
        """log P(y|x) over all alignments, (k,) nats."""
        text, lengths = pad(labels, self.encoded.device)
        rows = torch.arange(len(labels)) if of is None else torch.tensor(of, dtype=torch.long)
        return self._of_hypotheses(text, lengths, rows.to(self.encoded.device))

    def lattices(self, labels: list[list[int]]) -> Lattices:
        """The lattice of a label sequence of each utterance."""
        return self.net.lattices(self.encoded, self.frames, *pad(labels, self.encoded.device))

    def propose(self, beam: int) -> list[list[Proposal]]:
        """The best path, and the likeliest sequences of the CTC layer.

        Each has its full sum: no search through the transducer is as wide, or as fast.  Without
        that layer it is searched all the same, one utterance after the other.
        """
        found = [[Proposal(y, 0.0)] for y in self.net.best_path(self.encoded, self.frames)]
        if beam > 1:
            ctc = self.net.use_auxiliary_ctc
            more = prefix_search(self._log_p, self.frames, beam) if ctc else self._search(beam)
            for own, others in zip(found, more):
                own += [p for p in others if p.labels != own[0].labels][: beam - 1]
        return rank(found, self._of_hypotheses(*flat(found, self.encoded.device)))

    def _search(self, beam: int) -> list[list[Proposal]]:
        """The stock search, synchronous in time, of all its kinds the fastest."""
        net = self.net
        beam = min(beam, len(net.token_list))
        search = BeamSearchTransducer(
            net.decoder, net.joint_network, beam, search_type="tsd", nbest=beam
        )
        with torch.no_grad():
            several = [search(e[:t]) for e, t in zip(self.encoded, self.frames.tolist())]
        different = [{tuple(h.yseq[1:]): h.score for h in reversed(own)} for own in several]
        return [[Proposal(list(y), float(p)) for y, p in own.items()] for own in different]

    @functools.cached_property
    def _log_p(self) -> Tensor:
        hidden = nn.functional.dropout(self.encoded, self.net.ctc_dropout_rate, self.training)
        return self.net.ctc_lin(hidden).log_softmax(dim=-1)

    def _of_hypotheses(self, text, lengths, rows) -> Tensor:
        return self.net.log_probability(self.encoded, self.frames, text, lengths, rows)


def lend_loss(net: ESPnetASRTransducerModel) -> ESPnetASRTransducerModel:
    """Let a stock model compute its transducer loss with ours, in training and validation.

    Raises:
        ConfigError: a joint network that is more than a function of each element.
        RuntimeError: on this machine the loss is not what it should be.
    """
    self_test()
    if net.use_k2_pruned_loss:
        raise ConfigError("model_conf: use_k2_pruned_loss replaces the loss; leave it out")
    if next(net.joint_network.joint_activation.parameters(), None) is not None:
        raise ConfigError("joint_network_conf: an activation with parameters cannot be used")
    net.__class__, net.joint_network.__class__ = _Transducer, _Projections
    if type(net.encoder.embed) is ConvInput:
        net.encoder.embed.__class__ = _ConvInput
    return net


class _Operands(NamedTuple):
    """What the joint network would combine, each with its own axis of length 1."""

    encoded: Tensor
    predicted: Tensor


class _Projections(JointNetwork):
    def forward(self, enc_out: Tensor, dec_out: Tensor, no_projection: bool = False) -> Any:
        # Four axes: all frames with all labels, as in training.  A search asks for single nodes.
        if enc_out.dim() < 4 or no_projection:
            return super().forward(enc_out, dec_out, no_projection)
        return _Operands(self.lin_enc(enc_out), self.lin_dec(dec_out))


class _ConvInput(ConvInput):
    """Knows what of its output is padding.

    The stock one cuts the mask of the frames before subsampling to the length of those after it, so
    that in a batch padding is speech to the encoder and the loss, unless an utterance is shorter
    than a fourth of the longest.  Alone, as in recognition, none is padded.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x, _ = super().forward(x)
        if mask is None:
            return x, None
        frames = _after(self.conv, (~mask).sum(1))
        return x, torch.arange(x.shape[1], device=x.device) >= frames[:, None]


def _after(layers: nn.Sequential, frames: Tensor) -> Tensor:
    """How many of these frames there are behind convolutions and poolings."""
    for layer in layers:
        if not hasattr(layer, "kernel_size"):
            continue
        of_time = (layer.kernel_size, layer.stride, layer.padding)
        kernel, stride, padding = (x if isinstance(x, int) else x[0] for x in of_time)
        room = frames + 2 * padding - kernel
        frames = room.div(stride, rounding_mode="floor") + 1
        if getattr(layer, "ceil_mode", False):  # one more that sees some, if any are left
            frames = frames + ((room % stride > 0) & (frames * stride < room + kernel - padding))
    return frames.clamp(min=0)


class _Errors(ErrorCalculator):
    """The stock error rates, of the best path: the stock search takes longer than the training."""

    def __init__(self, net: "_Transducer") -> None:
        super().__init__(
            net.decoder, net.joint_network, net.token_list, net.sym_space, net.sym_blank,
            report_cer=net.report_cer, report_wer=net.report_wer,
        )  # fmt: skip
        self.net = net

    def __call__(self, encoder_out, target, encoder_out_lens):
        paths = iter(self.net.best_path(encoder_out, encoder_out_lens))
        self.beam_search = lambda _: [Hypothesis(0.0, [0, *next(paths)])]
        return super().__call__(encoder_out, target, encoder_out_lens)


class _Transducer(ESPnetASRTransducerModel):
    @property
    def error_calculator(self) -> _Errors:
        """Made anew: what a model keeps is copied with it, and a copy's would be the original's."""
        return _Errors(self)

    def log_probability(
        self, encoded: Tensor, frames: Tensor, labels: Tensor, lengths: Tensor, utterance: Tensor
    ) -> Tensor:
        """log P of each hypothesis (k,), from the encoder's output (n, t, d)."""
        hyps = hypotheses(labels, lengths, utterance, context=self._context())
        return self._full_sum(self._lattices(encoded, frames, labels, hyps))

    def lattices(
        self, encoded: Tensor, frames: Tensor, labels: Tensor, lengths: Tensor
    ) -> Lattices:
        """The lattices of one label sequence of each utterance, no state in two of them."""
        return self._lattices(encoded, frames, labels, hypotheses(labels, lengths))

    def _lattices(self, encoded, frames, labels, hyps: Hypotheses) -> Lattices:
        labels = labels.clamp(min=0)  # whatever the padding, the predictor embeds it
        start = labels.new_zeros(len(labels), 1)
        self.decoder.set_device(encoded.device)
        predicted = hyps.of_states(self.decoder(torch.cat([start, labels], 1)))
        network = self.joint_network
        projected = network.lin_enc(encoded)
        return Lattices(self.joint, projected, frames, network.lin_dec(predicted), hyps)

    @property
    def joint(self) -> Joint:
        """The joint network, behind its projections."""
        head = self.joint_network.lin_out
        return Joint(head.weight, head.bias, self.joint_network.joint_activation)

    @torch.no_grad()
    def best_path(self, encoded: Tensor, frames: Tensor, most: int = 5) -> list[list[int]]:
        """The likeliest label or blank at each step, for all utterances at once.

        Args:
            most: labels in a frame at most.
        """
        network, decoder = self.joint_network, self.decoder
        decoder.set_device(encoded.device)
        own = [Hypothesis(0.0, [0], decoder.init_state(1)) for _ in encoded]
        projected = network.lin_enc(encoded)
        nothing = projected.new_zeros(len(own), projected.shape[2])
        predicted = self._predict(own, [*range(len(own))], nothing)
        for t, frame in enumerate(projected.unbind(1)):
            going = (frames > t).nonzero()[:, 0]
            for _ in range(most):
                hidden = network.joint_activation(frame[going] + predicted[going])
                best = network.lin_out(hidden).argmax(1)
                going, best = going[best != 0], best[best != 0]
                if not len(going):
                    break
                for i, label in zip(going.tolist(), best.tolist()):
                    own[i].yseq.append(label)
                predicted = self._predict(own, going.tolist(), predicted)
        return [h.yseq[1:] for h in own]

    def _predict(self, own, which, predicted: Tensor) -> Tensor:
        """The projected predictor output (n, j), new for these hypotheses; they keep its state."""
        output, states = self.decoder.batch_score([own[i] for i in which])
        for place, i in enumerate(which):
            own[i].dec_state = self.decoder.select_state(states, place)
        rows = torch.tensor(which, device=output.device)
        return predicted.index_copy(0, rows, self.joint_network.lin_dec(output))

    def _calc_transducer_loss(self, encoder_out, joint_out, target, t_len, u_len):
        own = torch.arange(len(target), device=target.device)
        hyps = hypotheses(target.long(), u_len.long(), own, context=self._context())
        predicted = hyps.of_states(joint_out.predicted.squeeze(1))
        encoded = joint_out.encoded.squeeze(2)
        return -self._full_sum(Lattices(self.joint, encoded, t_len.long(), predicted, hyps)).mean()

    def _full_sum(self, of: Lattices) -> Tensor:
        log_p = log_probability(
            of.joint, of.encoded, of.frames, of.predicted, of.hyps, fast_emit=self.fastemit_lambda
        )
        return log_p.float()

    def _context(self) -> int | None:
        return 1 if isinstance(self.decoder, StatelessDecoder) else None

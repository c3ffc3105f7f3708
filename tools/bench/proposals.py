#!/usr/bin/env python3
"""The searches that propose pseudo-labels: how many times real time, and how good their proposals.

    tools/bench/proposals.py [--peers PYTHON] [--small] [--json FILE]

CTC: our ``prefix_search`` in batches, flashlight-text's decoder without a lexicon (``log_add``, so
that it sums alignments as ours does), torchaudio's ``ctc_decoder`` around it as it comes (without),
and greedy search.  The peers may need another Python: --peers (tools/bench/peers.sh makes one).
Utterances have 10 s of 25 frames.  Their posteriors are synthetic and peaky: in four of five frames
the blank has 0.998; in the fifth, logits of a label (13), a rival (10) and the blank (9), each
plus normal noise of deviation 2, stand out of 500 tokens of standard normal logits, and a label
after a label is the same in half of the cases.

Transducer: our ``best_path`` in batches, ESPnet's ``BeamSearchTransducer`` by default with a beam
of 1, and that of its error calculator (mAES).  The models are stock with their default predictor
and joint network; the encoder is not run.  With random weights a model says a label again and again
in a frame or nothing for long, and what a search gains in log P means little.  So the weights of
the one without memory are set: tokens have random signs for codes, the joint network sees the
encoder's output less the code of the last label, and a token's logit is what of its own code it
finds there.  In a fifth of the frames that output is 0.5 to 1.2 times the code of a label and up to
0.5 times that of a rival, otherwise nothing, all with normal noise of deviation 0.3.  The one with
an LSTM has random weights, 20 times as great in its output, with a bias of the blank that gives its
best path a label in every fifth frame of normal noise.

Speed is of one thread: the least processor time of --repeat calls, or of fewer that take 5 s, for
80 s of speech, or as much as a batch has; ratios are to the first peer with the same setting.
Quality is of the first 80 s: all that was found is scored by the full sum, whatever the search
thinks of it; 'best' is the mean of the greatest log p of each utterance, 'mass' the mean of the sum
of p over the n different sequences found, 'labels' the mean length of the best ones.
"""

import argparse
import itertools
import json
import tempfile

import torch
from common import fresh, machine, parser, timed

RATE = 25  # frames per second
SETTINGS = [(8, 5), (8, 20), (20, 5), (20, 20)]  # beam, tokens of a frame
FEW = 8  # utterances, of which quality is measured
SIZE = 256  # of encoder, predictor and joint network: ESPnet's default
TRANSDUCER = {
    "input_size": 80,  # no frontend
    "encoder_conf": {
        "main_conf": {},
        "input_conf": {"vgg_like": False, "subsampling_factor": 4, "conv_size": 8},
        "body_conf": [
            {"block_type": "conformer", "linear_size": 8, "hidden_size": SIZE, "heads": 2,
             "conv_mod_kernel_size": 3}
        ],
    },
}  # fmt: skip


# --- CTC -----------------------------------------------------------------------------------------


def posteriors(n: int, t: int, v: int = 500) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, t, v, generator=g)
    logits[..., 0] = 13.0
    says = torch.rand(n, t, generator=g) < 0.2
    label, rival = torch.randint(1, v, (2, n, t), generator=g)
    again = says[:, :-1] & (torch.rand(n, t - 1, generator=g) < 0.5)
    label[:, 1:] = torch.where(again, label[:, :-1], label[:, 1:])
    for token, height in ((torch.zeros_like(label), 9.0), (rival, 10.0), (label, 13.0)):
        place, noise = token[..., None], torch.randn(n, t, 1, generator=g)
        peak = torch.where(says[..., None], height + 2 * noise, logits.gather(2, place))
        logits.scatter_(2, place, peak)
    return logits.log_softmax(-1)


def ours(log_p, beam: int, tokens: int, batch: int) -> list[list[list[int]]]:
    from espnet_pl.parts.search import prefix_search

    parts = (prefix_search(part, _full(part), beam, tokens) for part in log_p.split(batch))
    return [[p.labels for p in own] for own in itertools.chain(*parts)]


def greedily(log_p) -> list[list[list[int]]]:
    from espnet_pl.parts.decoding import greedy

    return [[y] for y in greedy(log_p, _full(log_p))]


def _full(x) -> torch.Tensor:
    return torch.full((len(x),), x.shape[1])


def flashlight(log_p, beam: int, tokens: int):
    from flashlight.lib.text import decoder

    options = decoder.LexiconFreeDecoderOptions(
        beam_size=beam, beam_size_token=tokens, beam_threshold=50.0, lm_weight=0.0,
        sil_score=0.0, log_add=True, criterion_type=decoder.CriterionType.CTC,
    )  # fmt: skip
    search = decoder.LexiconFreeDecoder(options, decoder.ZeroLM(), 0, 0, [])

    def decode():
        paths = [[h.tokens for h in search.decode(x.data_ptr(), *x.shape)[:beam]] for x in log_p]
        return [[[c for c, _ in itertools.groupby(path) if c] for path in own] for own in paths]

    return decode


def torchaudio(log_p, beam: int, tokens: int):
    from torchaudio.models.decoder import ctc_decoder

    names = [*map(str, range(log_p.shape[2]))]
    # The blank for silence too, which it would put before and after each sequence.
    search = ctc_decoder(
        None, names, nbest=beam, beam_size=beam, beam_size_token=tokens, blank_token="0",
        sil_token="0",
    )  # fmt: skip
    return lambda: [[h.tokens.tolist() for h in own] for own in search(log_p, _full(log_p))]


PEERS = {"flashlight-text": flashlight, "torchaudio": torchaudio}


def run_peer(name: str, folder: str, repeat: int) -> dict:
    """Seconds and sequences for each setting, in this process."""
    log_p = torch.load(f"{folder}/log_p.pt")
    decoders = {f"{beam},{tokens}": PEERS[name](log_p, beam, tokens) for beam, tokens in SETTINGS}
    return {setting: timed(repeat, decode) for setting, decode in decoders.items()}


def ctc(batches: list[int], t: int, args) -> list[dict]:
    from espnet_pl.losses.ctc import log_probability

    log_p = posteriors(max(FEW, *batches), t)
    few, rows = log_p[:FEW], []

    def row(search, setting, batch, seconds, found):
        quality = judge(found[:FEW], lambda *y: log_probability(few, _full(few), *y))
        amount = {"batch": batch, "times_real_time": len(found) * t / RATE / seconds}
        names = {"search": search, **dict(zip(("beam", "tokens"), setting))}
        rows.append(names | amount | {"cpu_s": seconds} | quality)

    row("greedy", (1, 1), FEW, *timed(args.repeat, greedily, few))
    for setting, batch in itertools.product(SETTINGS, batches):
        part = log_p[: max(FEW, batch)]
        ours(part[:, :2], *setting, batch)  # the first call chooses kernels
        row("ours", setting, batch, *timed(args.repeat, ours, part, *setting, batch))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(few.clone(), f"{folder}/log_p.pt")
        for name in PEERS:
            command = ("--one", name, "--folder", folder, "--repeat", str(args.repeat))
            answer = fresh(args.peers, __file__, *command)
            if "why" in answer:
                rows.append({"search": name, "why": answer["why"]})
                continue
            for setting in SETTINGS:
                row(name, setting, 1, *answer[",".join(map(str, setting))])
    return rows


def judge(found: list[list[list[int]]], score) -> dict:
    """What the full sum says of the sequences that were found."""
    from espnet_pl.parts.decoding import pad

    own = [[*dict.fromkeys(map(tuple, several))] for several in found]  # each once
    labels, lengths = pad([[*y] for several in own for y in several])
    sizes = [len(several) for several in own]
    utterance = torch.arange(len(own)).repeat_interleave(torch.tensor(sizes))
    with torch.no_grad():
        log_p = score(labels.clamp(min=0), lengths, utterance).double().split(sizes)
    best = [several[int(x.argmax())] for several, x in zip(own, log_p)]
    return {
        "best": sum(x.max().item() for x in log_p) / len(own),
        "mass": sum(x.exp().sum().item() for x in log_p) / len(own),
        "sequences": sum(sizes) / len(own),
        "labels": sum(map(len, best)) / len(own),
    }


# --- transducer ----------------------------------------------------------------------------------


def network(decoder: str, v: int = 500):
    """A stock model that speaks in every fifth frame or so."""
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    from espnet_pl.bridge.transducer import lend_loss

    torch.manual_seed(0)
    args = ASRTransducerTask.get_parser().parse_args([])
    for name, value in (TRANSDUCER | {"decoder": decoder}).items():
        setattr(args, name, value)
    args.token_list = ["<blank>", *map(str, range(2, v)), "<sos/eos>"]
    net = lend_loss(ASRTransducerTask.build_model(args)).eval().requires_grad_(False)
    joint = net.joint_network
    if decoder == "stateless":
        net.decoder.embed.weight[1:] = torch.randn(v - 1, SIZE).sign()
        net.decoder.embed.weight[0] = 0  # of the blank, with which each sequence begins
        joint.lin_enc.weight.copy_(0.5 * torch.eye(SIZE))
        joint.lin_enc.bias.zero_()
        joint.lin_dec.weight.copy_(-0.5 * torch.eye(SIZE))
        joint.lin_out.weight.copy_(0.2 * net.decoder.embed.weight)
        joint.lin_out.bias.zero_()[0] = 12.0
        return net
    joint.lin_out.weight *= 20
    noise, bias = encoder_output(None, 4, 50), joint.lin_out.bias
    low, high = 0.0, 40.0
    for _ in range(12):
        bias[0] = middle = (low + high) / 2
        labels = sum(map(len, net.best_path(noise, _full(noise))))
        low, high = (middle, high) if labels > 40 else (low, middle)
    return net


def encoder_output(codes: torch.Tensor | None, n: int, t: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(n, t, SIZE, generator=g)
    if codes is None:
        return noise
    says = torch.rand(n, t, 1, generator=g) < 0.2
    label, rival = torch.randint(1, len(codes), (2, n, t), generator=g)
    most, less = torch.rand(2, n, t, 1, generator=g)
    speech = (0.5 + 0.7 * most) * codes[label] + 0.5 * less * codes[rival]
    return 0.3 * noise + speech.where(says, 0.0)


def transducer(decoder: str, batches: list[int], t: int, args) -> list[dict]:
    from espnet2.asr_transducer.beam_search_transducer import BeamSearchTransducer
    from espnet2.asr_transducer.error_calculator import ErrorCalculator

    net = network(decoder)
    parts = net.decoder, net.joint_network
    codes = net.decoder.embed.weight if decoder == "stateless" else None
    encoded = encoder_output(codes, max(FEW, *batches), t)
    few, rows = encoded[:FEW], []

    def row(search, batch, seconds, found):
        quality = judge(found[:FEW], lambda *y: net.log_probability(few, _full(few), *y))
        amount = {"batch": batch, "times_real_time": len(found) * t / RATE / seconds}
        rows.append({"search": search} | amount | {"cpu_s": seconds} | quality)

    def best_paths(x, batch):
        return [[y] for p in x.split(batch) for y in net.best_path(p, _full(p))]

    def one_by_one(search):
        with torch.no_grad():
            return [[search(x)[0].yseq[1:]] for x in few]

    for batch in batches:
        part = encoded[: max(FEW, batch)]
        row("ours, best path", batch, *timed(args.repeat, best_paths, part, batch))
    stock = ErrorCalculator(*parts, net.token_list, "<space>", "<blank>").beam_search
    peers = {"ESPnet, beam 1": BeamSearchTransducer(*parts, beam_size=1), "ESPnet, mAES": stock}
    for name, search in peers.items():
        row(name, 1, *timed(args.repeat, one_by_one, search))
    return rows


# --- the table -----------------------------------------------------------------------------------


def table(title: str, rows: list[dict]) -> str:
    """Markdown."""

    def setting(row):
        return row.get("beam"), row.get("tokens")

    lines = [
        f"{title}\n",
        "| search | beam | tokens | batch | times real time | ratio | best | mass | n | labels |",
        "|-|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        if "why" in row:
            lines.append(f"| {row['search']} | {row['why']} |" + " |" * 8)
            continue
        peers = (r for r in rows if r["search"][:4] not in ("ours", "gree") and "why" not in r)
        base = next((r for r in peers if setting(r) == setting(row)), None)
        ratio = f"{row['times_real_time'] / base['times_real_time']:.2f}" if base else ""
        lines.append(
            f"| {row['search']} | {row.get('beam', '')} | {row.get('tokens', '')} | {row['batch']} "
            f"| {row['times_real_time']:.0f} | {ratio} | {row['best']:.3f} | {row['mass']:.2e} "
            f"| {row['sequences']:.1f} | {row['labels']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__, 3, "calls")
    options.add_argument("--peers", help="a Python that has flashlight-text and torchaudio")
    options.add_argument("--small", action="store_true", help="short speech, to see that it runs")
    options.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(json.dumps(run_peer(args.one, args.folder, args.repeat)))
        return
    t = 20 if args.small else 10 * RATE
    cases = {"CTC": lambda: ctc([1, 8] if args.small else [1, 8, 64], t, args)}
    for name in ("stateless",) if args.small else ("stateless", "rnn"):
        batches = [1, 8] if args.small else [1, 8, 32]
        cases[f"transducer, {name}"] = lambda n=name, b=batches: transducer(n, b, t, args)
    result: dict = {"machine": machine(), "cases": {}}
    for title, case in cases.items():
        result["cases"][title] = case()
        print(table(title, result["cases"][title]), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

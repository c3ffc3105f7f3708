#!/usr/bin/env python3
"""Joint network and RNN-T loss, forward and backward: ours against what else can be had.

    tools/bench/fullsum.py [--shape 4,400,100,1000]... [--trained DIR] [--peers PYTHON]
        [--json FILE]

Every variant gets the same inputs, in a fresh process, one thread: CPU time is the least of two
calls in each of --repeat rounds, a round being all variants in turn; memory is the growth of the
peak resident set, error the relative L2 distance of the gradients (encoder, predictor, weight,
bias; the worst) to those of float64.  Peers are what a user
would write: the joint network in PyTorch, then a loss that wants logits.  torchaudio's needs the
torch it was built for, so its Python may be another: --peers (tools/bench/peers.sh makes one).

--trained DIR adds the posteriors of a trained model (tools/bench/transducer_seed.sh): generated
speech it was trained on, joined to the frames and labels of the shape, and labelled by itself.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, fresh, machine, parser, reset_peak, status

SHAPES = ["8,200,40,500", "4,400,100,1000", "16,100,20,100"]  # utterances, frames, labels, tokens
JOINT = 512
CALLS = 2  # in a process: the second has the first one's memory
NAMES = ("encoded", "predicted", "weight", "bias")


# --- variants: (inputs) -> log P, one number per utterance ----------------------------------------


def ours(x, **how):
    from espnet_pl.losses.joint import Joint
    from espnet_pl.losses.transducer import hypotheses, log_probability

    own = torch.arange(len(x["labels"])) if x["context"] else None
    hyps = hypotheses(x["labels"], x["lengths"], own, context=x["context"])
    predicted = hyps.of_states(x["predicted"])
    joint = Joint(x["weight"], x["bias"])
    return log_probability(joint, x["encoded"], x["frames"], predicted, hyps, **how)


def exact(x):
    return ours(x, exact=True)


def logits(x):
    hidden = torch.tanh(x["encoded"][:, :, None] + x["predicted"][:, None])
    return torch.nn.functional.linear(hidden, x["weight"], x["bias"])


def torchaudio(x):
    from torchaudio.functional import rnnt_loss

    sizes = [x[name].int() for name in ("labels", "frames", "lengths")]
    return -rnnt_loss(logits(x).float(), *sizes, blank=0, reduction="none")


def espnet_numba(x):
    from espnet2.asr.transducer.rnnt_multi_blank.rnnt_multi_blank import RNNTLossNumba

    sizes = [x[name].int() for name in ("labels", "frames", "lengths")]
    return -RNNTLossNumba(blank=0, reduction="none")(logits(x).float(), *sizes)


def ours_given(x, in_place=False):
    from espnet_pl.losses.transducer import log_probability_of_logits

    sizes = [x[name] for name in ("frames", "labels", "lengths")]
    return log_probability_of_logits(x["logits"], *sizes, in_place=in_place)


def ours_in_place(x):
    return ours_given(x, in_place=True)


def torchaudio_given(x):
    from torchaudio.functional import rnnt_loss

    sizes = [x[name].int() for name in ("labels", "frames", "lengths")]
    return -rnnt_loss(x["logits"], *sizes, blank=0, reduction="none")


# Without the joint network: what the loss alone takes, if somebody has the logits.
GIVEN = {
    "ours, logits given": ours_given,
    "ours, logits given, in place": ours_in_place,
    "torchaudio, logits given": torchaudio_given,
}
VARIANTS = {
    "ours": (ours, False),
    "ours, exact": (exact, False),
    "ours, bf16": (ours, True),
    "eager + torchaudio": (torchaudio, False),
    "eager + torchaudio, bf16": (torchaudio, True),
    "eager + ESPnet's numba loss": (espnet_numba, False),
}


def run_one(name: str, folder: Path) -> dict:
    """Time, memory and error of a variant, in this process."""
    torch.set_num_threads(1)
    function, short = VARIANTS[name]
    x = torch.load(folder / "inputs.pt")
    reference = folder / "reference.pt"
    if name == "reference":
        x |= {key: x[key].double() for key in NAMES}
    tensors = [x[key].requires_grad_() for key in NAMES]
    if name != "reference":  # the first call imports and chooses kernels
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            warm = function({**x, **_corner(x)}).sum()
        warm.backward()
        for tensor in tensors:
            tensor.grad = None
    before = reset_peak()
    times = []
    for _ in range(1 if name == "reference" else CALLS):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            log_p = function(x)
        gradients = torch.autograd.grad(-log_p.sum(), tensors)
        times.append(time.process_time() - began)
    peak = status("VmHWM") - before
    if name == "reference":
        torch.save((log_p.detach(), gradients), reference)
        return {}
    exact_log_p, exact_gradients = torch.load(reference)
    errors = [
        ((mine.double() - theirs).norm() / theirs.norm()).item()
        for key, mine, theirs in zip(NAMES, gradients, exact_gradients)
        # Where states are shared, a gradient goes to the first of the rows that are one state.
        if not (key == "predicted" and x["context"])
    ]
    return {
        "cpu_s": min(times),
        "peak_mb": peak,
        "gradient_error": max(errors),
        "loss_error": ((log_p.double() - exact_log_p) / exact_log_p).abs().max().item(),
        "torch": torch.__version__,
    }


VARIANTS["reference"] = (exact, False)


def run_given(name: str, folder: Path) -> dict:
    """Time and memory of a loss that is given logits, in this process."""
    torch.set_num_threads(1)
    x = torch.load(folder / "inputs.pt")
    with torch.no_grad():
        dense = logits(x)
    times, peak = [], 0.0
    for _ in range(CALLS):
        x["logits"] = dense.clone().requires_grad_()
        before = reset_peak()
        began = time.process_time()
        log_p = GIVEN[name](x)
        gradient = torch.autograd.grad(-log_p.sum(), x["logits"])
        times.append(time.process_time() - began)
        peak = status("VmHWM") - before
        value = log_p.detach().double()
        del log_p, gradient, x["logits"]  # or the next ones find their place
    exact_log_p, _ = torch.load(folder / "reference.pt")
    error = ((value - exact_log_p) / exact_log_p).abs().max().item()
    return {"cpu_s": min(times), "peak_mb": peak, "loss_error": error, "torch": torch.__version__}


def _corner(x):
    """Few frames of the same inputs."""
    few = {"encoded": x["encoded"][:, :2].detach().requires_grad_()}
    return few | {"frames": x["frames"].clamp(max=2)}


# --- inputs --------------------------------------------------------------------------------------


def random_inputs(n: int, t: int, u: int, v: int) -> dict:
    """As after the initialisation of PyTorch's linear layers."""
    g = torch.Generator().manual_seed(0)
    bound = JOINT**-0.5
    return {
        "encoded": torch.randn(n, t, JOINT, generator=g) * 0.5,
        "predicted": torch.randn(n, u + 1, JOINT, generator=g) * 0.5,
        "weight": (torch.rand(v, JOINT, generator=g) * 2 - 1) * bound,
        "bias": (torch.rand(v, generator=g) * 2 - 1) * bound,
        "labels": torch.randint(1, v, (n, u), generator=g),
        "frames": torch.full((n,), t),
        "lengths": torch.full((n,), u),
        "context": None,
    }


def trained_inputs(folder: Path, n: int, t: int, u: int) -> dict:
    """Real speech through a trained model, labelled by its own greedy search."""
    import soundfile
    from espnet2.tasks.asr_transducer import ASRTransducerTask

    files = folder / "model/config.yaml", folder / "model/model.pth"
    net, args = ASRTransducerTask.build_model_from_file(*files, "cpu")
    net.eval()
    recipe = ROOT / "egs/mini_alnum/pl1"
    scp = (recipe / "data/train_labelled/wav.scp").read_text().splitlines()
    paths = iter(recipe / line.split(maxsplit=1)[1] for line in scp)
    encoded, labels = [], []
    with torch.no_grad():
        for _ in range(n):
            frames, speech = 0, []
            while frames < t:
                speech.append(torch.from_numpy(soundfile.read(next(paths), dtype="float32")[0]))
                wave = torch.cat(speech)[None]
                output, _ = net.encode(wave, torch.tensor([wave.shape[1]]))
                frames = output.shape[1]
            own, used = greedy(net, output[0, :t], u)
            encoded.append(net.joint_network.lin_enc(output[0, :used]))
            labels.append(own)
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
        start = padded.new_zeros(n, 1)
        predicted = net.joint_network.lin_dec(net.decoder(torch.cat([start, padded], 1)))
    return {
        "encoded": torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True),
        "predicted": predicted,
        "weight": net.joint_network.lin_out.weight.detach(),
        "bias": net.joint_network.lin_out.bias.detach(),
        "labels": padded,
        "frames": torch.tensor([len(e) for e in encoded]),
        "lengths": torch.tensor([len(y) for y in labels]),
        "context": None,
    }


def greedy(net, encoded, most: int):
    """Labels, and the frames until there are more than ``most`` of them."""
    labels = [0]
    for t, frame in enumerate(encoded):
        for _ in range(5):
            predicted = net.decoder(torch.tensor([[labels[-1]]]))[0, 0]
            best = int(net.joint_network(frame, predicted).argmax())
            if best == 0:
                break
            if len(labels) > most:
                return torch.tensor(labels[1:]), t
            labels.append(best)
    return torch.tensor(labels[1:]), len(encoded)


# --- the table -----------------------------------------------------------------------------------


def measure(inputs: dict, args) -> dict[str, dict]:
    """All variants that can run, one process each and round."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(inputs, folder / "inputs.pt")
        reference = start("reference", folder, args, inputs)
        if "why" in reference:
            raise SystemExit(reference["why"])
        for _ in range(args.repeat):
            for variant in (*(v for v in VARIANTS if v != "reference"), *GIVEN):
                before = found.get(variant, {})
                if "why" not in before:
                    found[variant] = better(before, start(variant, folder, args, inputs))
    return found


def better(one: dict, other: dict) -> dict:
    """The figures of the faster run, and the greater memory."""
    if not one or "why" in other:
        return other
    peak = max(one["peak_mb"], other["peak_mb"])
    return {**min(one, other, key=lambda run: run["cpu_s"]), "peak_mb": peak}


def start(variant: str, folder: Path, args, inputs) -> dict:
    """A variant in a process of its own; its figures, or why there are none."""
    python = args.peers if "torchaudio" in variant and args.peers else sys.executable
    if (
        "numba" in variant
        and inputs["encoded"][..., 0].numel() * inputs["labels"].shape[1] * len(inputs["bias"])
        > 1e7
    ):
        return {"why": "left out: minutes at this size"}
    return fresh(python, __file__, "--one", variant, "--folder", str(folder))


def table(found: dict[str, dict]) -> str:
    """Markdown; ratios to torchaudio, with and without the joint network."""
    lines = [
        "|variant|CPU s|times as fast|extra MB|share of its memory|gradient error|loss error|",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if "why" in row:
            lines.append(f"|{name}|{row['why']}||||||")
            continue
        base = found["torchaudio, logits given" if name in GIVEN else "eager + torchaudio"]
        speed = f"{base['cpu_s'] / row['cpu_s']:.1f}" if "cpu_s" in base else ""
        share = f"1/{base['peak_mb'] / max(row['peak_mb'], 1):.0f}" if "cpu_s" in base else ""
        lines.append(
            f"|{name}|{row['cpu_s']:.3f}|{speed}|{row['peak_mb']:.0f}|{share}|"
            f"{row.get('gradient_error', math.nan):.1e}|{row['loss_error']:.1e}|"
        )
    return "\n".join(lines)


def main() -> None:
    """All shapes."""
    options = parser(__doc__, 3, "rounds")
    options.add_argument("--shape", action="append", help=f"B,T,U,V (default: {' '.join(SHAPES)})")
    options.add_argument("--trained", type=Path, help="folder of a trained transducer's experiment")
    options.add_argument(
        "--peers", help="a Python that has torchaudio and the torch it was built for"
    )
    options.add_argument("--one", choices=[*VARIANTS, *GIVEN], help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        run = run_given if args.one in GIVEN else run_one
        print(json.dumps(run(args.one, args.folder)))
        return
    result = {"machine": machine(), "cases": {}}
    for shape in args.shape or SHAPES:
        n, t, u, v = map(int, shape.split(","))
        cases = {f"({shape}), random initialisation": random_inputs(n, t, u, v)}
        if args.trained:
            inputs = trained_inputs(args.trained, n, t, u)
            if len(inputs["bias"]) == v:
                cases[f"({shape}), trained"] = inputs
                # What its predictor is: it remembers one label.
                cases[f"({shape}), trained, states shared"] = {**inputs, "context": 1}
        for title, inputs in cases.items():
            found = measure(inputs, args)
            result["cases"][title] = found
            sizes = f"{inputs['frames'].tolist()} frames, {inputs['lengths'].tolist()} labels"
            print(f"\n{title}: {sizes}\n\n{table(found)}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

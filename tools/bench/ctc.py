#!/usr/bin/env python3
"""CTC of several hypotheses, and soft labels of a linear layer: forward and backward beside torch.

    tools/bench/ctc.py [--shape 4,400,100,1000]... [--small] [--json FILE]

CTC: each utterance has 1, 4 or 16 hypotheses, of which those after the first differ from it in a
tenth of their labels; log-probabilities are random and given.  torch's ``ctc_loss`` knows one
hypothesis, so they are repeated, or it is called for one after the other.

Soft labels: 5000 tokens of 6400 frames from 512 dimensions.  'Dense' compares with all of the
teacher's log-probabilities, the others with its 32 likeliest tokens and the rest; what they are
given of the teacher is not extra memory, and stands in a column.

Every variant gets the same inputs, in a fresh process, one thread: processor time is the least of
--repeat runs, memory the growth of the peak resident set in the first (Linux).  Errors are relative
to float64, by torch's functions alone: of values the greatest, of gradients the L2 distance, the
worst tensor.  torch's gradient is right for the logits beneath log-probabilities only, so both are
carried there before they are compared.
"""

import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
from common import machine, parser, reset_peak, status, timed
from torch.nn.functional import ctc_loss, kl_div, linear

from espnet_pl.losses.ctc import log_probability
from espnet_pl.losses.soft_labels import SoftLabels, kl, kl_of_linear, soft_labels

SHAPES = ["8,200,40,500", "4,400,100,1000"]  # utterances, frames, labels, tokens
HYPOTHESES = [1, 4, 16]
OUTPUT = (8, 800, 512, 5000, 32)  # utterances, frames, dimensions, tokens, of which kept
FRAMEWISE = ("log_p", "hidden", "kept", "tokens", "log_rest", "teacher")


# --- variants: (inputs) -> one number per hypothesis or utterance ---------------------------------


def ours(x):
    sizes = [x[name] for name in ("frames", "labels", "lengths", "utterance")]
    return -log_probability(x["log_p"], *sizes)


def repeated(x):
    own = x["utterance"]
    log_p, frames = x["log_p"][own].transpose(0, 1), x["frames"][own]
    return ctc_loss(log_p, x["labels"], frames, x["lengths"], reduction="none")


def one_by_one(x):
    log_p, n = x["log_p"].transpose(0, 1), len(x["frames"])
    several = x["labels"].unflatten(0, (n, -1)).unbind(1)
    lengths = x["lengths"].view(n, -1).unbind(1)
    losses = [
        ctc_loss(log_p, y, x["frames"], u, reduction="none") for y, u in zip(several, lengths)
    ]
    return torch.stack(losses, 1).flatten()


def chunked(x):
    return kl_of_linear(x["hidden"], x["weight"], x["bias"], x["frames"], _target(x))


def plain(x):
    return kl(linear(x["hidden"], x["weight"], x["bias"]), x["frames"], _target(x))


def _target(x):
    return SoftLabels(x["kept"], x["tokens"], x["log_rest"], x["frames"])


def written_out(x):
    """The same loss as one would write it first."""
    log_q = linear(x["hidden"], x["weight"], x["bias"]).log_softmax(-1)
    rest = log_q.scatter(-1, x["tokens"], -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, x["tokens"]), rest], -1)
    log_p = torch.cat([x["kept"], x["log_rest"][..., None]], -1)
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum((1, 2))


def dense(x):
    """Kullback-Leibler divergence of all tokens: another loss, of which the first are a bound."""
    log_q = linear(x["hidden"], x["weight"], x["bias"]).log_softmax(-1)
    return kl_div(log_q, x["teacher"], log_target=True, reduction="none").sum((1, 2))


# Each with the function that is its reference in float64.
CTC = {
    "ours": (ours, one_by_one),
    "torch, repeated": (repeated, one_by_one),
    "torch, one hypothesis at a time": (one_by_one, one_by_one),
}
SOFT = {
    "ours, of the linear layer": (chunked, written_out),
    "ours, of logits": (plain, written_out),
    "torch, written out": (written_out, written_out),
    "torch, dense": (dense, dense),
}
TEACHER = {"torch, dense": ("teacher",)}  # others: the tokens kept


# --- inputs --------------------------------------------------------------------------------------


def hypotheses(shape: list[int], several: int) -> dict:
    n, t, u, v = shape
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(1, v, (n, 1, u), generator=g).repeat(1, several, 1)
    changed = torch.rand(labels.shape, generator=g) < 0.1
    changed[:, 0] = False
    other = torch.randint(1, v, labels.shape, generator=g)
    return {
        "log_p": torch.randn(n, t, v, generator=g).log_softmax(-1),
        "frames": torch.full((n,), t),
        "labels": torch.where(changed, other, labels).flatten(0, 1),
        "lengths": torch.full((n * several,), u),
        "utterance": torch.arange(n).repeat_interleave(several),
    }


def output_layer(n: int, t: int, d: int, v: int, k: int) -> dict:
    """A teacher that is the student with noise in its last hidden layer, logits spread by 3."""
    g = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(2, n, t, d, generator=g)
    weight, bias = torch.randn(v, d, generator=g) * 3 / d**0.5, torch.zeros(v)
    teacher = linear(hidden + 0.5 * noise, weight).log_softmax(-1)
    frames = torch.full((n,), t)
    target = soft_labels(teacher, frames, k)
    given = {"kept": target.log_p, "tokens": target.tokens, "log_rest": target.log_rest}
    student = {"hidden": hidden, "weight": weight, "bias": bias}
    return student | given | {"teacher": teacher, "frames": frames}


# --- figures -------------------------------------------------------------------------------------


def gradients(function, x) -> tuple[torch.Tensor, list[torch.Tensor]]:
    names = ("log_p",) if "log_p" in x else ("hidden", "weight", "bias")
    tensors = [x[name].requires_grad_() for name in names]
    values = function(x)
    return values.detach(), torch.autograd.grad(values.sum(), tensors)


def beneath(gradient, x) -> list[torch.Tensor]:
    """With respect to logits, if it is with respect to log-probabilities, in float64."""
    gradient = [g.double() for g in gradient]
    if "log_p" in x:
        gradient[0] -= x["log_p"].detach().double().exp() * gradient[0].sum(-1, keepdim=True)
    return gradient


def run_one(name: str, folder: str, repeat: int) -> dict:
    """Time, memory and errors of a variant, in this process."""
    torch.set_num_threads(1)
    function, reference = (CTC | SOFT)[name]
    x = torch.load(f"{folder}/inputs.pt")
    corner = {key: value[:, :2].detach() for key, value in x.items() if key in FRAMEWISE}
    gradients(function, x | corner | {"frames": x["frames"].clamp(max=2)})  # chooses kernels
    before = reset_peak()
    first, _ = timed(1, gradients, function, x)
    peak = status("VmHWM") - before
    seconds, (values, gradient) = timed(repeat - 1 or 1, gradients, function, x)
    exact, exact_gradient = torch.load(f"{folder}/{reference.__name__}.pt")
    pairs = zip(beneath(gradient, x), exact_gradient)
    held = TEACHER.get(name, ("kept", "tokens", "log_rest") if name in SOFT else ())
    return {
        "seconds": min(first, seconds),
        "megabytes": peak,
        "given_megabytes": sum(x[key].nbytes for key in held) / 2**20,
        "mean": values.double().mean().item(),
        "value_error": ((values - exact) / exact).abs().max().item(),
        "gradient_error": max(((mine - own).norm() / own.norm()).item() for mine, own in pairs),
    }


def measure(variants: dict, x: dict, repeat: int) -> dict[str, dict]:
    """All variants, one process each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(x, f"{folder}/inputs.pt")
        double = {
            key: value.double() if value.is_floating_point() else value for key, value in x.items()
        }
        for function in {reference for _, reference in variants.values()}:
            values, gradient = gradients(function, double)
            torch.save((values, beneath(gradient, double)), f"{folder}/{function.__name__}.pt")
        context = multiprocessing.get_context("forkserver")  # fresh, but with its imports done
        context.set_forkserver_preload(["espnet_pl.losses.ctc", "espnet_pl.losses.soft_labels"])
        found = {}
        for name in variants:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found[name] = pool.submit(run_one, name, folder, repeat).result()
        return found


def table(title: str, rows: dict) -> str:
    """Markdown; ratios are to ours."""
    lines = [
        f"{title}\n",
        "| | CPU s | ratio | extra MB | ratio | given MB | mean nats | error | gradient error |",
        "|-|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    mine = next(iter(rows.values()))
    for name, row in rows.items():
        memory = row["megabytes"] / max(mine["megabytes"], 1)
        lines.append(
            f"| {name} | {row['seconds']:.4f} | {row['seconds'] / mine['seconds']:.2f} "
            f"| {row['megabytes']:.0f} | {memory:.1f} | {row['given_megabytes']:.0f} "
            f"| {row['mean']:.3f} | {row['value_error']:.1e} | {row['gradient_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__, 5, "runs")
    options.add_argument("--shape", action="append", help=f"N,T,U,V (default: {' '.join(SHAPES)})")
    options.add_argument("--small", action="store_true", help="to see that it runs")
    args = options.parse_args()
    torch.set_num_threads(1)
    several, output = ([4], (2, 20, 16, 50, 4)) if args.small else (HYPOTHESES, OUTPUT)
    result: dict = {"machine": machine(), "cases": {}}

    def case(title, variants, x):
        result["cases"][title] = measure(variants, x, args.repeat)
        print(table(title, result["cases"][title]), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    for shape in args.shape or (["2,30,5,20"] if args.small else SHAPES):
        for h in several:
            case(
                f"CTC ({shape}), {h} hypotheses", CTC, hypotheses([*map(int, shape.split(","))], h)
            )
    case(f"soft labels ({','.join(map(str, output))})", SOFT, output_layer(*output))


if __name__ == "__main__":
    main()

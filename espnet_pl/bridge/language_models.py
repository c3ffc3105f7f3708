"""Language models from files: ESPnet's own (task ``lm``), and n-grams."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from espnet2.lm.espnet_model import ESPnetLanguageModel
from espnet2.tasks.lm import LMTask
from jaxtyping import Float64
from torch import Tensor

from espnet_pl.bridge import model_files
from espnet_pl.bridge.model_files import Files
from espnet_pl.bridge.teachers import fill, read_config, read_token_list, read_weights
from espnet_pl.methods.base import ConfigError
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.language_model import (
    KenLM,
    LanguageModel,
    LanguageModelError,
    NGram,
    Remembering,
    refuse_other_tokens,
)

WHAT = "language model"
TEXT, BINARY = (".arpa", ".arpa.gz", ".lm", ".lm.gz"), (".bin", ".binary", ".klm", ".kenlm")
CELLS = 2**23  # logits at a time, 64 MiB of them
# Scores are of whole steps of it.  What batch a sequence is in changes the last of the 53 bits of a
# float64, and a training that was restarted has other batches: it remembers nothing.
STEP = 2.0**-12  # nats


class NeuralLanguageModel:
    """A language model of ESPnet.

    Args:
        net: the stock model.
        device: where it computes, in float64.
    """

    def __init__(self, net: ESPnetLanguageModel, device: torch.device | str = "cpu") -> None:
        self.net = net.double().to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @torch.no_grad()
    def log_p(self, sequences: Sequence[Sequence[int]]) -> Float64[Tensor, " k"]:
        """As any language model; scores are rounded to steps of 1/4096 nat."""
        scores = torch.zeros(len(sequences), dtype=torch.float64)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        vocabulary, part = self.net.sos + 1, []
        for i in order:
            with_next = (len(part) + 1) * (len(sequences[i]) + 1) * vocabulary
            if part and with_next > CELLS:
                scores[part] = self._of([sequences[j] for j in part])
                part = []
            part.append(i)
        if part:
            scores[part] = self._of([sequences[j] for j in part])
        return (scores / STEP).round() * STEP

    def _of(self, sequences: list[Sequence[int]]) -> Tensor:
        text, lengths = pad([list(y) for y in sequences], self.device)
        with torch.autocast(self.device.type, enabled=False):
            nll, _ = self.net.nll(text.clamp(min=0), lengths)
        return -nll.sum(1).cpu()


def load(
    path: str | Path, token_list: Sequence[str], device: torch.device | str = "cpu"
) -> LanguageModel:
    """A language model that never changes, and remembers what it said.

    Args:
        path: a folder or a file of weights beside its ``config.yaml``, as ``espnet2.bin.lm_train``
            writes them; n-grams as text (``.arpa``, ``.lm``, also ``.gz``) or of KenLM (``.bin``,
            ``.binary``, ``.klm``, ``.kenlm``).
        token_list: the student's tokens.

    Raises:
        ConfigError: a file is missing or damaged, or its tokens are not the student's.
    """
    name = Path(path).name
    try:
        if name.endswith(TEXT):
            return Remembering(NGram(path, token_list))
        if name.endswith(BINARY):
            if not Path(path).is_file():
                raise ConfigError(f"{WHAT}: {path} is missing")
            return Remembering(KenLM(path, token_list))
        return Remembering(NeuralLanguageModel(_stock(Path(path), list(token_list)), device))
    except LanguageModelError as error:
        raise ConfigError(str(error)) from None


def _stock(path: Path, token_list: list[str]) -> ESPnetLanguageModel:
    if path.suffix == ".zip":
        raise ConfigError(f"{WHAT}: {path} is packed; unpack it, and give its folder")
    with model_files.found(_weights_of(path), WHAT) as files:
        config = read_config(files, WHAT)
        _check(files, config, token_list)
        # What a method draws later is the same whether it has a language model or none.
        with torch.random.fork_rng(devices=[]):
            net = LMTask.build_model(argparse.Namespace(**config))
        fill(net, read_weights(files, WHAT), files.weights, WHAT)
        return net


def _weights_of(path: Path) -> Path:
    """In a folder of ``lm_train``, the average of its best epochs."""
    averages = path / "model.pth", path / "valid.loss.ave.pth"
    return next((p for p in averages if p.is_file()), path)


def _check(files: Files, config: dict, token_list: list[str]) -> None:
    if "lm" not in config or "lm_conf" not in config:
        raise ConfigError(f"{WHAT}: {files.config} is none of task lm; train with lm_train")
    own = read_token_list(config, WHAT)
    if own == token_list:
        return
    refuse_other_tokens(
        files.config,
        [token for token in token_list if token not in {*own}],
        [token for token in own if token not in {*token_list}],
    )
    place = next(i for i, (a, b) in enumerate(zip(own, token_list)) if a != b)
    raise ConfigError(
        f"{WHAT}: {files.config} has the student's tokens in another order: number {place} is "
        f"{own[place]!r} there, {token_list[place]!r} here; train it with the same token_list"
    )

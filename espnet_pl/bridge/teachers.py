"""Trained models as teachers: any that ESPnet's tasks ``asr`` and ``asr_transducer`` can load."""

import argparse
import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from espnet2.tasks.abs_task import AbsTask
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.text.build_tokenizer import build_tokenizer
from torch import Tensor

from espnet_pl.bridge import compat
from espnet_pl.bridge.model_files import Files, found
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.transducer import TransducerRecogniser
from espnet_pl.methods.base import ConfigError, Utterances
from espnet_pl.parts.teacher import weak_view

FAMILIES = {
    "asr": (ASRTask, Recogniser),
    "asr_transducer": (ASRTransducerTask, TransducerRecogniser),
}
# What of a configuration decides what the weights compute; a path in it would not be the same.
ARCHITECTURE = (
    "frontend_conf", "normalize", "encoder", "encoder_conf", "decoder", "decoder_conf", "ctc_conf",
    "joint_net_conf", "joint_network_conf", "model_conf",
)  # fmt: skip
NO_WORDS = {"<blank>", "<unk>", "<sos/eos>", "<sos>", "<eos>"}
PROBES = (16000, 24120, 32040)  # samples; two models that subsample otherwise differ in one of them


class Tokens(NamedTuple):
    """What a model says, and how it is spelt; all that is needed to translate it, in JSON."""

    token_list: list[str]
    token_type: str
    bpe_model: str | None  # base64

    def speller(self) -> Callable[[Sequence[str]], str]:
        """From tokens to text, as ESPnet does it.

        Raises:
            ConfigError: these tokens are not made of letters, or their model is not there.
        """
        if self.token_type in ("word", "char"):
            return build_tokenizer(self.token_type).tokens2text
        if self.token_type != "bpe":
            raise ConfigError(
                f"teacher: tokens of type {self.token_type} cannot be written as others; train it "
                "with the tokens of the student"
            )
        if self.bpe_model is None:
            raise ConfigError("teacher: its bpe.model is missing; put it beside its config.yaml")
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.bpe_model))
        return lambda tokens: pieces.DecodePieces(list(tokens))


@dataclass(frozen=True)
class LoadedTeacher:
    """A trained network that never changes, and what it says."""

    network: Recogniser
    tokens: Tokens
    hash: str  # of weights, tokens and architecture, wherever they lie

    @property
    def frames(self) -> list[int]:
        """See ``frames``."""
        return frames(self.network)


def load(path: str | Path) -> LoadedTeacher:
    """A teacher, in eval mode and without gradients.

    Args:
        path: a model folder, a file of weights beside its ``config.yaml``, or a packed zip.

    Raises:
        ConfigError: a file is missing or unsafe, or the weights are not those of the model.
    """
    with found(Path(path)) as files:
        config = read_config(files)
        stock, student = FAMILIES[_family(files, config)]
        normalize = config.get("normalize_conf") or {}
        if normalize.get("stats_file"):
            stats = files.beside(normalize["stats_file"], "feats_stats.npz")
            if stats is None:
                raise ConfigError(f"teacher: {normalize['stats_file']} of {path} is missing")
            normalize["stats_file"] = str(stats)
        bpe = config.get("bpemodel") and files.beside(config["bpemodel"], "bpe.model")
        bpe = base64.b64encode(bpe.read_bytes()).decode() if bpe else None
        tokens = Tokens(read_token_list(config), config.get("token_type") or "bpe", bpe)
        state = read_weights(files)
        own_hash = _hash(state, config)  # before ESPnet changes what it was given
        # What a method draws later is the same whether its teacher is loaded, or was asked before.
        with torch.random.fork_rng(devices=[]):
            net = build_net(stock, argparse.Namespace(**config))
        fill(net, state, files.weights)
        network = student(net).eval().requires_grad_(False)
        return LoadedTeacher(network, tokens, own_hash)


def hash_of(path: str | Path) -> str:
    """The hash of a teacher, without building it."""
    with found(Path(path)) as files:
        return _hash(read_weights(files), read_config(files))


def build_net(stock: type[AbsTask], args: argparse.Namespace) -> torch.nn.Module:
    """The stock model of stock options.

    Raises:
        ConfigError: it needs a module that is not installed.
    """
    try:
        return stock.build_model(args)
    except ModuleNotFoundError as error:
        if error.name != "warprnnt_pytorch":
            raise
        raise ConfigError(
            f"decoder: {args.decoder} of task asr needs the module warprnnt_pytorch, for "
            "decoding too: tools/install_warprnnt.sh installs one that is not compiled. "
            "Transducers of task asr_transducer do without"
        ) from None


def frames(network: Recogniser) -> list[int]:
    """How many frames a network makes of some lengths of speech; changes nothing in it."""
    device = next(network.parameters()).device
    counts = []
    with weak_view(network):
        for samples in PROBES:
            silence = torch.zeros(1, samples, device=device)
            x = Utterances(["probe"], silence, torch.tensor([samples], device=device))
            counts.append(int(network.hear(x).frames))
    return counts


def translation(
    tokens: Tokens, token_list: Sequence[str], tokenise: Callable[[str], list[int]]
) -> Callable[[list[int]], list[int] | None]:
    """From a teacher's labels to the student's.

    Args:
        tokens: the teacher's.
        token_list: the student's.
        tokenise: from text to the student's labels.

    Returns:
        A function that leaves labels as they are if both have the same tokens.  Otherwise they go
        through text, and it gives None where that is empty or has no spelling in the student's
        tokens.
    """
    if tokens.token_list == list(token_list):
        return list
    spell = tokens.speller()
    unknown = list(token_list).index("<unk>") if "<unk>" in token_list else None

    def translate(labels: list[int]) -> list[int] | None:
        said = [tokens.token_list[label] for label in labels]
        if not NO_WORDS.isdisjoint(said):
            return None
        written = tokenise(" ".join(spell(said).split()))
        return None if not written or unknown in written else written

    return translate


def read_config(files: Files, what: str = "teacher") -> dict[str, Any]:
    """The configuration of a trained model.

    Args:
        what: the model is, for messages.

    Raises:
        ConfigError: it is none of ESPnet.
    """
    try:
        config = yaml.safe_load(files.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: {files.config} is not YAML: {error}") from None
    if not isinstance(config, dict) or "token_list" not in config:
        raise ConfigError(f"{what}: {files.config} is no configuration of an ESPnet model")
    return config


def _family(files: Files, config: Mapping[str, Any]) -> str:
    """The task; a stock configuration does not name it, but each has an option of its own."""
    task = "asr_transducer" if "joint_network_conf" in config else "asr"
    if task == "asr" and ("ctc_conf" not in config or "src_token_list" in config):
        raise ConfigError(
            f"teacher: {files.config} is of another task than {' and '.join(FAMILIES)}"
        )
    if config.get("input_size") is not None:
        raise ConfigError(f"teacher: {files.config}: a model of features (input_size), not speech")
    return task


def read_token_list(config: Mapping[str, Any], what: str = "teacher") -> list[str]:
    """The tokens of a configuration, in it or in the file that it names.

    Raises:
        ConfigError: the file is not there.
    """
    tokens = config["token_list"]
    if isinstance(tokens, str):  # as ESPnet reads it
        try:
            lines = Path(tokens).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except OSError as error:
            raise ConfigError(f"{what}: its token_list {tokens}: {error.strerror}") from None
        return [line.rstrip() for line in lines]
    return list(tokens)


def read_weights(files: Files, what: str = "teacher") -> dict[str, Tensor]:
    """The weights of a trained model, on the CPU.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        state = torch.load(files.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise ConfigError(f"{what}: {files.weights} holds no weights: {error}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"{what}: {files.weights} holds more than weights; give a model.pth")
    return state


def fill(net: torch.nn.Module, state: dict[str, Tensor], path: Path, what: str = "teacher") -> None:
    """Load all weights.  Stock loading is not strict: a wrong name would leave a layer random.

    Raises:
        ConfigError: they are not those of the model.
    """
    names = set(net.state_dict())
    state = compat.rename_for_installed(state, names)
    if wrong := sorted(names ^ set(state)):
        raise ConfigError(
            f"{what}: {path} is not of its config.yaml: {len(wrong)} tensors are in one of them "
            f"only, the first is {wrong[0]}"
        )
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{what}: {path} is not of its config.yaml: {error}") from None


def _hash(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    made_of = [read_token_list(config), {name: config.get(name) for name in ARCHITECTURE}]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

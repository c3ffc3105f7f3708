"""Ask a trained teacher about speech, once, and keep what it says.

``python -m espnet_pl.bridge.label --config conf/asr.yaml --config conf/kd.yaml
--teacher exp/teacher/model --wav data/x/wav.scp --shape data/x/speech_shape --output FOLDER``

Killed, it goes on where it stopped when it is run again.  ``--shard 1/4`` does a quarter; when all
four are done, ``FOLDER/done.json`` says so.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.train.collate_fn import CommonCollateFn
from espnet2.train.dataset import ESPnetDataset
from espnet2.train.preprocessor import CommonPreprocessor

from espnet_pl.bridge import teachers, teaching
from espnet_pl.bridge.train import load_config
from espnet_pl.methods.base import ConfigError, Utterances
from espnet_pl.methods.registry import config_of, module_of
from espnet_pl.parts.store import Reader, StoreError, Writer, same

COMMIT_EVERY = 5.0  # seconds; so much is lost when it is killed
REPORT_EVERY = 20.0  # seconds
SAMPLED_TOGETHER = 200  # utterances among which neighbours in length are heard together


def label(
    config: Mapping[str, Any],
    teacher: str | Path,
    wav: Path,
    shape: Path,
    output: Path,
    shard: tuple[int, int] = (1, 1),
    device: str = "cpu",
    batch_bins: int | None = None,
) -> None:
    """Keep the records that the method of a configuration asks a teacher for.

    Args:
        config: of the training that will use them.
        teacher: what ``teachers.load`` loads.
        wav: the speech, ``utterance-id path`` lines.
        shape: its lengths, ``utterance-id samples`` lines.
        output: the folder of the store.
        shard: which part of the utterances, and of how many.
        batch_bins: padded samples that are heard at once; None: as in the configuration.

    Raises:
        ConfigError: the method asks no teacher, or a recording cannot be used.
        StoreError: what is in the folder is of something else.
    """
    if not teaching.is_taught(config):
        raise ConfigError(f"method {config.get('method')} learns from no teacher: nothing to ask")
    method, settings = module_of(config["method"]).Method, _settings(config)
    lengths = _lengths(shape)
    loaded = teachers.load(teacher)
    network = loaded.network.to(device)
    speech, bins = _Speech(wav, config), batch_bins or config.get("batch_bins") or 1_000_000
    output.mkdir(parents=True, exist_ok=True)
    meta = teaching.meta(loaded, config, list(lengths))
    known = _known(
        output / "known.pt",
        meta,
        lambda: method.survey(settings, network, _sample(speech, lengths, bins, device)),
    )
    meta |= {"known": _hash(known)} if known else {}
    own = sorted(lengths, key=lambda utt_id: (-lengths[utt_id], utt_id))[shard[0] - 1 :: shard[1]]
    with Writer(output, *shard, meta) as writer, torch.no_grad():
        todo = [utt_id for utt_id in own if utt_id not in writer.done]
        logging.info("%d of %d utterances are there already", len(own) - len(todo), len(own))
        progress = _Progress(len(own), len(todo), sum(lengths[utt_id] for utt_id in todo))
        committed = time.monotonic()
        for ids in _batches(todo, lengths, bins):
            x = speech.read(ids, device)
            records = method.ask(settings, network, x, known)
            if len(records) != len(ids):
                raise RuntimeError(f"{config['method']}: {len(records)} records of {len(ids)}")
            for utt_id, record in zip(ids, records):
                writer.put(utt_id, record)
            if time.monotonic() - committed > COMMIT_EVERY:
                writer.commit()
                committed = time.monotonic()
            progress.step(len(ids), int(x.speech_lengths.sum()), speech.rate)
        writer.finish()
    progress.end()
    _say_done(output, meta)


def _settings(config: Mapping[str, Any]) -> Any:
    return config_of(config["method"], config.get("method_conf") or {})


def _lengths(shape: Path) -> dict[str, int]:
    """Samples by utterance."""
    lengths = {}
    for number, line in enumerate(shape.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            utt_id, samples = line.split()
            lengths[utt_id] = int(samples.split(",")[0])
        except ValueError:
            raise ConfigError(f"{shape}:{number}: expected 'utterance-id samples'") from None
    if not lengths:
        raise ConfigError(f"{shape}: no utterances")
    return lengths


def _batches(ids: Sequence[str], lengths: Mapping[str, int], bins: int) -> Iterator[list[str]]:
    """Neighbours in length, longest first: what does not fit into memory fails at once."""
    batch: list[str] = []
    for utt_id in ids:
        if batch and lengths[batch[0]] * (len(batch) + 1) > bins:
            yield batch
            batch = []
        batch.append(utt_id)
    if batch:
        yield batch


def _sample(
    speech: "_Speech", lengths: Mapping[str, int], bins: int, device: str
) -> Iterator[Utterances]:
    """All utterances in random order, the same for every shard."""
    ids = sorted(lengths)
    random.Random(0).shuffle(ids)
    for i in range(0, len(ids), SAMPLED_TOGETHER):
        some = sorted(ids[i : i + SAMPLED_TOGETHER], key=lengths.__getitem__, reverse=True)
        for batch in _batches(some, lengths, bins):
            yield speech.read(batch, device)


def _known(
    path: Path, meta: Mapping[str, Any], find: Callable[[], Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What a method knows of the speech as a whole: found by the shard that is first, kept for all.

    A shard that comes late finds it in the folder; of two at the same time one is first.

    Raises:
        StoreError: it is of another teacher, other settings or other speech than ``meta`` says.
    """
    if not path.exists():
        with torch.no_grad():
            found = find()
        if not found:
            return {}
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        torch.save({"meta": dict(meta), "found": dict(found)}, temporary)
        with contextlib.suppress(FileExistsError):  # another shard was quicker: its findings count
            os.link(temporary, path)
        temporary.unlink()
    kept = torch.load(path, weights_only=True)
    same(path, kept["meta"], meta)
    return kept["found"]


def _hash(known: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(known):
        digest.update(name.encode() + known[name].cpu().numpy().tobytes())
    return digest.hexdigest()


class _Speech:
    """Recordings as ESPnet hears them in training, but for what it adds to them there."""

    def __init__(self, wav: Path, config: Mapping[str, Any]) -> None:
        hear = CommonPreprocessor(
            train=False, speech_volume_normalize=config.get("speech_volume_normalize")
        )
        names = [(str(wav), "speech", "sound")]
        self.data = ESPnetDataset(names, preprocess=hear, float_dtype="float32")
        self.collate = CommonCollateFn(float_pad_value=0.0, int_pad_value=-1)

    @property
    def rate(self) -> int:
        """Samples per second, known when something was read."""
        return self.data.loader_dict["speech"].rate

    def read(self, ids: Sequence[str], device: str) -> Utterances:
        """Recordings, padded.

        Raises:
            ConfigError: one cannot be read, or has samples that are no numbers.
        """
        items = []
        for utt_id in ids:
            try:
                items.append(self.data[utt_id])
            except Exception as error:  # of many kinds, by what is wrong with the file
                raise ConfigError(f"utterance {utt_id} cannot be read: {error!r}") from error
            if not np.isfinite(items[-1][1]["speech"]).all():
                raise ConfigError(f"utterance {utt_id} has samples that are not finite")
        _, batch = self.collate(items)
        return Utterances(list(ids), batch["speech"].to(device), batch["speech_lengths"].to(device))


class _Progress:
    def __init__(self, total: int, todo: int, samples: int) -> None:
        self.total, self.done, self.samples = total, total - todo, samples
        self.heard, self.began = 0, time.monotonic()
        self.said, self.last = self.began, ""

    def step(self, utterances: int, samples: int, rate: int) -> None:
        """So many more are done."""
        self.done, self.heard = self.done + utterances, self.heard + samples
        now = time.monotonic()
        spent = now - self.began
        left = spent * max(self.samples - self.heard, 0) / max(self.heard, 1)
        self.last = (
            f"{self.done}/{self.total} utterances, {spent * rate / max(self.heard, 1):.3f} times "
            f"real time, {left / 60:.0f} min left"
        )
        if now - self.said > REPORT_EVERY:
            logging.info(self.last)
            self.said = now

    def end(self) -> None:
        """The last word."""
        if self.last:
            logging.info(self.last)


def _say_done(output: Path, meta: Mapping[str, Any]) -> None:
    """The file that says that all shards are there, and of what."""
    try:
        records = Reader(output, meta)
    except StoreError as error:
        logging.info("this shard is done; the store is not yet: %s", error)
        return
    content = {key: value for key, value in records.meta.items() if key != "tokens"}
    temporary = output / f".done.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, output / "done.json")
    logging.info("%d records in %s", len(records), output)


def _shard(word: str) -> tuple[int, int]:
    own, _, of = word.partition("/")
    if not (own.isdigit() and of.isdigit() and 1 <= int(own) <= int(of)):
        raise argparse.ArgumentTypeError(f"{word!r} is no shard; expected 1/4 … 4/4")
    return int(own), int(of)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, help="as in training")
    parser.add_argument("--teacher", required=True, help="model folder, weights or packed zip")
    parser.add_argument("--wav", type=Path, required=True, help="wav.scp of the speech")
    parser.add_argument("--shape", type=Path, required=True, help="speech_shape of the speech")
    parser.add_argument("--output", type=Path, required=True, help="folder of the store")
    parser.add_argument("--shard", type=_shard, default=(1, 1), help="1/4: the first of four")
    parser.add_argument("--ngpu", type=int, default=0, choices=[0, 1])
    parser.add_argument("--batch_bins", type=int, help="padded samples heard at once")
    args = parser.parse_args(argv)
    for path in (args.wav, args.shape):
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
    label(
        load_config(args.config), args.teacher, args.wav, args.shape, args.output, args.shard,
        "cuda" if args.ngpu else "cpu", args.batch_bins,
    )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    try:
        main()
    except (ConfigError, StoreError) as error:
        raise SystemExit(f"error: {error}") from None

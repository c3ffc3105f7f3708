"""Kaldi data directories: ``wav.scp``, ``text``, ``utt2spk``, ``spk2utt`` and their audio.

Every file holds one ``key value`` line per key, sorted by key as bytes (the C locale), because
ESPnet and Kaldi merge these files without sorting them again.  Files are written under a
temporary name and renamed when complete: a killed job leaves the old file or the new one.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile


class Utterance(NamedTuple):
    """One recording: ``wav`` is an audio file, ``text`` is None where nobody transcribed it."""

    id: str
    speaker: str
    wav: str
    text: str | None = None


def read_scp(path: str | Path) -> dict[str, str]:
    """``key value`` lines of one file, in the order of the file.

    Raises:
        ValueError: a key without a value, or a key twice; the message names file and line.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        key, *value = line.strip().split(maxsplit=1)
        if not value:
            raise ValueError(f"{path}:{number}: nothing after the key {key!r}")
        if key in table:
            raise ValueError(f"{path}:{number}: the key {key!r} occurs twice")
        table[key] = value[0]
    return table


def write_scp(path: str | Path, table: Mapping[str, object]) -> None:
    """Writes ``key value`` lines sorted by key; the file appears complete or not at all."""
    # Python sorts by code point, which is the byte order of UTF-8: LC_ALL=C sort.
    _replace(path, "".join(f"{key} {table[key]}\n" for key in sorted(table)))


def read_dir(path: str | Path) -> list[Utterance]:
    """The utterances of a data directory, sorted by id; ``text`` may be missing."""
    path = Path(path)
    speakers = read_scp(path / "utt2spk")
    texts = read_scp(path / "text") if (path / "text").exists() else {}
    wavs = read_scp(path / "wav.scp")
    return [Utterance(key, speakers[key], wavs[key], texts.get(key)) for key in sorted(wavs)]


def write_dir(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Writes a data directory; without any transcript it has no ``text``.

    ``wav.scp`` is written last, so a directory that has one is complete.  Lists made from an
    earlier content (``utt2num_samples``, ``speech_shape``) are removed.

    Raises:
        ValueError: no utterances, an id twice, an id or speaker with a space, an id that does
            not start with its speaker (Kaldi's two sort orders would disagree), or transcripts
            for only some of the utterances.
    """
    path, table = Path(path), {}
    for utterance in utterances:
        key, speaker = utterance.id, utterance.speaker
        if key in table:
            raise ValueError(f"{path}: the id {key!r} occurs twice")
        if len(key.split()) != 1 or len(speaker.split()) != 1 or not key.startswith(speaker):
            raise ValueError(f"{path}: id {key!r} must be one word starting with {speaker!r}")
        table[key] = utterance
    texts = {key: u.text for key, u in table.items() if u.text is not None}
    if not table or len(texts) not in (0, len(table)):
        raise ValueError(f"{path}: {len(table)} utterances, {len(texts)} with a transcript")
    members = defaultdict(list)
    for key in sorted(table):
        members[table[key].speaker].append(key)
    path.mkdir(parents=True, exist_ok=True)
    for stale in ("wav.scp", "text", "utt2num_samples", "speech_shape"):
        (path / stale).unlink(missing_ok=True)
    if texts:
        write_scp(path / "text", texts)
    write_scp(path / "utt2spk", {key: u.speaker for key, u in table.items()})
    write_scp(path / "spk2utt", {speaker: " ".join(keys) for speaker, keys in members.items()})
    write_scp(path / "wav.scp", {key: u.wav for key, u in table.items()})


def write_audio(path: str | Path, samples: np.ndarray, rate: int) -> None:
    """Writes mono samples (float in [-1, 1] or int16, shape [n]) as 16-bit FLAC or WAV by suffix.

    Raises:
        ValueError: not one channel, nothing in it, or samples outside [-1, 1] or not finite.
    """
    path, samples = Path(path), np.asarray(samples)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"{path}: need samples of shape [n], n > 0; got {samples.shape}")
    if samples.dtype != np.int16:
        if not np.abs(samples).max() <= 1:  # written so that NaN fails too
            raise ValueError(f"{path}: samples outside [-1, 1] or not finite")
        samples = np.round(samples * 32767).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    kind = path.suffix[1:].upper()
    soundfile.write(temporary, samples, rate, subtype="PCM_16", format=kind)
    os.replace(temporary, path)


def summary(name: str, utterances: Sequence[Utterance]) -> str:
    """One line about a set: utterances, minutes, words (if transcribed) and speakers."""
    seconds = sum(soundfile.info(u.wav).duration for u in utterances)
    words = sum(len(u.text.split()) for u in utterances if u.text)
    return (
        f"{name}: {len(utterances)} utterances, {seconds / 60:.1f} min, "
        + (f"{words} words, " if words else "no transcripts, ")
        + f"{len({u.speaker for u in utterances})} speakers"
    )


class Stamp:
    """Remembers with which parameters and which code a corpus was made.

    Args:
        path: the stamp file, written by `write` when everything else is complete.
        parameters: whatever changes the result; must be JSON.
        sources: code files whose content changes the result.
    """

    def __init__(self, path: str | Path, parameters: Mapping, sources: Iterable[str | Path]):
        self.path = Path(path)
        digest = hashlib.sha256(json.dumps(dict(parameters), sort_keys=True).encode())
        for source in sources:
            digest.update(Path(source).read_bytes())
        self.value = digest.hexdigest() + "\n"

    def is_current(self, directories: Iterable[str | Path]) -> bool:
        """True if the stamp matches and the directories' audio is still there."""
        try:
            if self.path.read_text() != self.value:
                return False
            return all(os.path.getsize(u.wav) for path in directories for u in read_dir(path))
        except (OSError, ValueError, KeyError):
            return False

    def clear(self) -> None:
        """Forgets; call it before the first change to what the stamp vouches for."""
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Everything has been made; called last."""
        _replace(self.path, self.value)


def _replace(path: str | Path, content: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(content, encoding="utf-8", newline="\n")
    os.replace(temporary, path)

"""Finds what is wrong with a recipe's data before a training run does.

    python -m espnet_pl.data.validate --labelled data/l --unlabelled data/u \\
        --valid data/d --test data/t --rate 8000 --write_shapes

Lists everything it finds at once, by name, and exits with 1 if any of it would spoil a run.  Every
audio file is decoded to its end, once: what was learnt about it is kept in the data directory
until its size or time changes.

Warnings do not fail: silent or clipped audio is for the user to judge, and so is a speaker who is
both in the labelled set and in a test set.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from espnet_pl.data import kaldi

SHORTEST = 0.1  # seconds; less leaves no frame after a recogniser's subsampling
ROLES = ("labelled", "unlabelled", "valid", "test")
CACHE = ".audio_checks.json"


class Problem(NamedTuple):
    """One fault: ``kind`` of it, in which set, of which utterance or line, and more about it."""

    kind: str
    where: str
    name: str
    detail: str = ""
    is_warning: bool = False


class Audio(NamedTuple):
    """What decoding a file told: samples per channel, rate, digest of the samples, faults."""

    samples: int
    rate: int
    channels: int
    digest: str
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def check(
    recipe_sets: Mapping[str, str | Path | Sequence[str | Path]],
    rate: int | None = None,
    nj: int = 1,
    write_shapes: bool = False,
) -> list[Problem]:
    """Every problem of a recipe's data directories; an empty list is a clean bill.

    Args:
        recipe_sets: directories of each role: labelled, unlabelled, valid, test.  All but the
            unlabelled need transcripts.
        rate: samples per second that all audio must have; None: all the same.
        nj: processes that decode audio.
        write_shapes: write ``utt2num_samples`` and ESPnet's ``speech_shape`` (``id samples``)
            into every directory whose audio has no faults.

    Raises:
        ValueError: an unknown role.
    """
    if unknown := set(recipe_sets) - set(ROLES):
        raise ValueError(f"unknown roles {sorted(unknown)}; known are {', '.join(ROLES)}")
    problems: list[Problem] = []
    sets: dict[str, list[_Set]] = {role: [] for role in ROLES}
    for role, paths in recipe_sets.items():
        for path in [paths] if isinstance(paths, str | Path) else paths:
            sets[role].append(_read_set(Path(path), role != "unlabelled", problems))
    everything = [s for role in ROLES for s in sets[role]]
    for data in everything:
        data.audio = _decode(data, nj)
    if rate is None:
        rates = Counter(a.rate for s in everything for a in s.audio.values() if a.rate)
        rate, kind = rates.most_common(1)[0][0] if rates else 0, "mixed rate"
    else:
        kind = "wrong rate"
    for data in everything:
        faults = _check_audio(data, rate, kind)
        problems += faults
        if write_shapes and not any(not p.is_warning for p in faults):
            _write_shapes(data)
    problems += _check_overlap(sets)
    return problems


# --- lists --------------------------------------------------------------------------------------


class _Set:
    def __init__(self, path: Path):
        self.path = path
        self.wavs: dict[str, str] = {}
        self.speakers: dict[str, str] = {}
        self.audio: dict[str, Audio] = {}  # by utterance


def _read_set(path, needs_text, problems):
    data = _Set(path)

    def report(kind, name, detail=""):
        problems.append(Problem(kind, str(path), name, detail))

    tables = {}
    for name in ("wav.scp", "utt2spk", "spk2utt", *(["text"] if needs_text else [])):
        tables[name] = _read_table(path / name, report)
    wavs = tables["wav.scp"]
    for key, wav in wavs.items():
        # kaldiio hands such a line to a shell.
        if wav.startswith("|") or wav.endswith("|"):
            report("command instead of a file", key, wav)
        else:
            data.wavs[key] = wav
        # Ids become file names (attention plots, caches) and words on command lines.
        if "/" in key or key.startswith(("-", ".")):
            report("unsafe id", key)
    data.speakers = {key: speaker for key, speaker in tables["utt2spk"].items() if key in wavs}
    for name in ("text", "utt2spk"):
        if name in tables:
            for key in sorted(wavs.keys() - tables[name].keys()):
                report(f"audio without {name}", key)
            for key in sorted(tables[name].keys() - wavs.keys()):
                report(f"{name} without audio", key)
    members = defaultdict(set)
    for key, speaker in tables["utt2spk"].items():
        members[speaker].add(key)
    for speaker in sorted(members.keys() | tables["spk2utt"].keys()):
        if set(tables["spk2utt"].get(speaker, "").split()) != members[speaker]:
            report("spk2utt and utt2spk differ", speaker)
    return data


def _read_table(path, report):
    """``key value`` lines, whatever can be read of them; reports the rest."""
    table: dict[str, str] = {}
    try:
        content = path.read_bytes()
    except OSError as error:
        report("unreadable list", path.name, error.strerror or str(error))
        return table
    if not content.strip():
        report("empty list", path.name)
    previous = ""
    lines = content.split(b"\n")
    for number, raw in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        line_name = f"{path.name}:{number}"
        if b"\0" in raw:
            report("NUL byte", line_name)
        if raw.endswith(b"\r"):
            report("CRLF line end", line_name)
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            report("not UTF-8", line_name, str(error))
            line = raw.decode("utf-8", errors="replace")
        # Python splits words at U+3000 and the like, other tools do not.
        if odd := [c for c in line.rstrip("\r") if c.isspace() and c not in " \t"]:
            report("unusual white space", line_name, f"U+{ord(odd[0]):04X}")
        key, value = (*line.strip().split(maxsplit=1), "", "")[:2]
        if not key:
            report("blank line", line_name)
        elif not value:
            report("empty text" if path.name == "text" else "no value", key, line_name)
        if key in table:
            report("duplicate id", key, line_name)
        elif key:
            table[key] = value
            if key < previous:
                report("unsorted", key, line_name)
            previous = key
    return table


# --- audio --------------------------------------------------------------------------------------


def inspect(path: str) -> Audio:
    """Decodes one audio file to its end, in blocks: a long file takes no more memory."""
    try:
        if os.path.getsize(path) == 0:
            return _unreadable("zero-length audio", "")
        if missing := _missing_bytes(path):
            return _unreadable("truncated audio", f"{missing} bytes missing")
        with soundfile.SoundFile(path) as file:
            return _decode_blocks(file)
    except FileNotFoundError:
        return _unreadable("missing audio", "")
    except (OSError, RuntimeError, ValueError, struct.error) as error:
        return _unreadable("unreadable audio", str(error))


def _unreadable(kind, why):
    return Audio(0, 0, 0, "", (f"{kind}: {why}" if why else kind,), ())


def _decode_blocks(file):
    digest, count, low, high, clipped, finite = hashlib.sha256(), 0, np.inf, -np.inf, 0, True
    for block in file.blocks(1 << 16, dtype="float32", always_2d=True):
        digest.update(block.tobytes())
        count += len(block)
        finite = finite and bool(np.isfinite(block).all())
        low, high = min(low, block.min()), max(high, block.max())
        clipped += int(np.count_nonzero(np.abs(block) >= 0.9999))
    faults, warnings = [], []
    if count == 0:
        faults.append("zero-length audio")
    elif count < file.frames:
        faults.append(f"truncated audio: {count} of {file.frames} samples")
    elif not finite:
        faults.append("NaN or infinite samples")
    elif count < SHORTEST * file.samplerate:
        faults.append(f"too short: {count} samples")
    elif low == high:
        warnings.append(f"silent audio: all samples are {low:g}")
    elif clipped > 0.01 * count * file.channels:
        warnings.append(f"clipped audio: {clipped} samples")
    if file.channels != 1:
        faults.append(f"not mono: {file.channels} channels")
    sizes = (count, file.samplerate, file.channels)
    return Audio(*sizes, digest.hexdigest(), tuple(faults), tuple(warnings))


def _missing_bytes(path):
    """Bytes that a WAV header promises and the file lacks; libsndfile says nothing about them."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if not re.fullmatch(rb"RIFF....WAVE", file.read(12), re.DOTALL):
            return 0
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                # Writers that stream leave 0 or the largest number here.
                streamed = length in (0, 0xFFFFFFFF)
                return 0 if streamed else max(length - (size - file.tell()), 0)
            file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def _decode(data, nj):
    """Utterance -> `Audio`; from the set's cache where a file has not changed since."""
    cache_path, known = data.path / CACHE, {}
    try:
        known = json.loads(cache_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    signatures, found = {}, {}
    for wav in sorted(set(data.wavs.values())):
        try:
            status = os.stat(wav)
            signatures[wav] = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            signatures[wav] = None  # never from the cache: it may come back
        try:
            signature, *fields = known[wav]
            if signature == signatures[wav]:
                found[wav] = Audio(*fields[:4], tuple(fields[4]), tuple(fields[5]))
        except (KeyError, TypeError, ValueError, IndexError):
            pass
    todo = [wav for wav in signatures if wav not in found]
    if nj > 1 and len(todo) > 1:
        # A forked copy of a process with threads (torch, BLAS) can hang.
        with ProcessPoolExecutor(nj, mp_context=get_context("spawn")) as pool:
            found.update(zip(todo, pool.map(inspect, todo, chunksize=32), strict=True))
    else:
        found.update((wav, inspect(wav)) for wav in todo)
    if todo and data.path.is_dir():
        kept = {wav: [signatures[wav], *a] for wav, a in found.items() if signatures[wav]}
        temporary = cache_path.with_name(f"{CACHE}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(temporary, cache_path)
        except OSError:  # a read-only directory costs time, not correctness
            temporary.unlink(missing_ok=True)
    return {key: found[wav] for key, wav in data.wavs.items()}


def _check_audio(data, rate, kind):
    problems = []
    for key, audio in data.audio.items():
        path = data.wavs[key]
        for is_warning, texts in ((False, audio.faults), (True, audio.warnings)):
            for text in texts:
                name, _, detail = text.partition(": ")
                detail = f"{path}: {detail}" if detail else path
                problems.append(Problem(name, str(data.path), key, detail, is_warning))
        if audio.rate and audio.rate != rate:
            detail = f"{path}: {audio.rate} Hz, not {rate}"
            problems.append(Problem(kind, str(data.path), key, detail))
    return problems


def _write_shapes(data):
    lengths = {key: audio.samples for key, audio in data.audio.items()}
    for name in ("utt2num_samples", "speech_shape"):
        try:
            current = kaldi.read_scp(data.path / name)
        except (OSError, ValueError):
            current = None
        # Left alone when right, so nothing downstream looks newer than it is.
        if current != {key: str(length) for key, length in lengths.items()}:
            kaldi.write_scp(data.path / name, lengths)


# --- between sets -------------------------------------------------------------------------------


def _check_overlap(sets):
    problems = []
    pairs = [
        (train, held_out, False)
        for train in sets["labelled"] + sets["unlabelled"]
        for held_out in sets["valid"] + sets["test"]
    ]
    pairs += [(valid, test, True) for valid in sets["valid"] for test in sets["test"]]
    for one, other, is_warning in pairs:
        where = f"{one.path} and {other.path}"
        for key in sorted(one.wavs.keys() & other.wavs.keys()):
            problems.append(Problem("same id in both", where, key, "", is_warning))
        heard = {a.digest: key for key, a in one.audio.items() if _is_telling(a)}
        for key, audio in other.audio.items():
            if _is_telling(audio) and audio.digest in heard:
                detail = f"is {heard[audio.digest]} of {one.path}"
                problems.append(Problem("same audio in both", where, key, detail, is_warning))
    for one in sets["labelled"]:
        for other in sets["test"]:
            where = f"{one.path} and {other.path}"
            for speaker in sorted(set(one.speakers.values()) & set(other.speakers.values())):
                problems.append(Problem("same speaker in both", where, speaker, "", True))
    return problems


def _is_telling(audio):
    """Two silent files are equal and prove nothing."""
    return audio.samples > 0 and not any(w.startswith("silent") for w in audio.warnings)


# --- command line -------------------------------------------------------------------------------


def describe(problems: Sequence[Problem], most: int = 5) -> str:
    """One line per kind and set: how many, and the first few by name."""
    groups = defaultdict(list)
    for problem in problems:
        groups[problem.is_warning, problem.where, problem.kind].append(problem)
    lines = []
    for (is_warning, where, kind), group in sorted(groups.items(), key=lambda item: item[0]):
        names = [p.name + (f" ({p.detail})" if p.detail else "") for p in group[:most]]
        names += ["..."] if len(group) > most else []
        label = "warning" if is_warning else "problem"
        lines.append(f"{label}: {where}: {len(group)} x {kind}: {', '.join(names)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for role in ROLES:
        parser.add_argument(f"--{role}", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--rate", type=int, help="required samples per second")
    parser.add_argument("--nj", type=int, default=1, help="processes that decode audio")
    parser.add_argument("--write_shapes", action="store_true")
    args = parser.parse_args(arguments)
    sets = {role: getattr(args, role) for role in ROLES if getattr(args, role)}
    if not sets:
        parser.error("no data directory given")
    problems = check(sets, args.rate, args.nj, args.write_shapes)
    if problems:
        print(describe(problems))
    fatal = sum(not p.is_warning for p in problems)
    print(f"{fatal} problems, {len(problems) - fatal} warnings")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())

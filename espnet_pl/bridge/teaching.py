"""What a method that is taught gets of its teacher: the network itself, or what it said before.

A teacher that never changes says the same in every epoch.  ``bridge/label.py`` asks it once and
keeps the records (``teacher_mode: stored``); the other way is to ask it in training (``online``).
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from espnet_pl.bridge import teachers
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.teachers import LoadedTeacher, Tokens
from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import config_of, module_of, unknown
from espnet_pl.parts.store import Reader, StoreError

MODES = ("stored", "online")
RECORDS = 2  # other than 1, they say how many hypotheses were dropped; records of 1 are made anew


def is_taught(config: Mapping[str, Any]) -> bool:
    """Whether the method of a configuration learns from one trained teacher."""
    return module_of(config.get("method") or "supervised").Method.taught


def asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the method of a configuration asks a teacher, and about what speech, in JSON."""
    name = config["method"]
    settings, method = config_of(name, config.get("method_conf") or {}), module_of(name).Method
    return {
        "records": RECORDS,
        "method": method.records or name,
        "settings": method.asked(settings),
        "speech_volume_normalize": config.get("speech_volume_normalize"),
    }


def hash_of_asked(config: Mapping[str, Any]) -> str | None:
    """The same for all configurations that ask the same; None if the method asks no teacher."""
    if not is_taught(config):
        return None
    return hashlib.sha256(json.dumps(asked(config), sort_keys=True).encode()).hexdigest()


def meta(teacher: LoadedTeacher, config: Mapping[str, Any], utt_ids: list[str]) -> dict[str, Any]:
    """What records are of: enough to use them without the teacher."""
    ids = "\n".join(sorted(utt_ids)).encode()
    return {
        "teacher": teacher.hash,
        "asked": asked(config),
        "answers": sorted(_answers(teacher)),
        "frames": teacher.frames,
        "utterances": len(utt_ids),
        "wav_ids": hashlib.sha256(ids).hexdigest(),
        "tokens": teacher.tokens._asdict(),
    }


def _answers(teacher: LoadedTeacher) -> frozenset[str]:
    # No teacher is asked what was hidden from it, and older records do not know of that.
    return teacher.network.answers - {"inputs"}


def check_mode(mode: str) -> None:
    """Refuse a mode that there is not; argparse looks at flags only, not at YAML."""
    if mode not in MODES:
        raise ConfigError(unknown("teacher_mode", str(mode), MODES))


def resources(
    args: argparse.Namespace, student: Recogniser, tokenise: Callable[[str], list[int]]
) -> dict[str, Any]:
    """The resources of a method that is taught (``methods.registry.build``).

    Args:
        args: the options of the training.
        tokenise: from text to the student's labels.

    Raises:
        ConfigError: not one teacher, or records that are not there or of something else.
    """
    check_mode(args.teacher_mode)
    if len(args.teachers) != 1:
        raise ConfigError(
            f"method {args.method} learns from one teacher, {len(args.teachers)} are given: "
            "--teachers, a model folder or a packed zip"
        )
    if args.teacher_mode == "online":
        teacher = teachers.load(args.teachers[0])
        given = {"teacher": teacher.network, "records": None}
        tokens, answers, frames = teacher.tokens, _answers(teacher), teacher.frames
    else:
        records = _records(args)
        given = {"teacher": None, "records": records}
        tokens, answers = Tokens(**records.meta["tokens"]), records.meta["answers"]
        frames = records.meta["frames"]
    return given | {
        "translate": teachers.translation(tokens, args.token_list, tokenise),
        "same_tokens": tokens.token_list == list(args.token_list),
        "same_frames": frames == teachers.frames(student),
        "teacher_tokens": len(tokens.token_list),
        "teacher_answers": frozenset(answers),
    }


def _records(args: argparse.Namespace) -> Reader:
    how = f"To make them:\n    {_command(args)}\nor train with --teacher_mode online"
    if not args.teacher_store:
        raise ConfigError(
            "teacher_mode stored: give the folder with the teacher's records, --teacher_store. "
            + how
        )
    expected = {"teacher": teachers.hash_of(args.teachers[0]), "asked": asked(vars(args))}
    try:
        records = Reader(args.teacher_store, expected)
        missing = records.missing(_utterances(args))
    except StoreError as error:
        raise ConfigError(f"teacher_store: {error}. {how}") from None
    if missing:
        raise ConfigError(
            f"teacher_store: {args.teacher_store} has no record of {len(missing)} unlabelled "
            f"utterances: {', '.join(missing[:3])}{', …' if missing[3:] else ''}. {how}"
        )
    return records


def _utterances(args: argparse.Namespace) -> list[str]:
    """The ids of the unlabelled speech."""
    if not args.unlabelled_shape_file:
        return []  # refused later, where the speech is read
    lines = Path(args.unlabelled_shape_file[0]).read_text(encoding="utf-8").split("\n")
    return [line.split(maxsplit=1)[0] for line in lines if line.strip()]


def _command(args: argparse.Namespace) -> str:
    speech = args.unlabelled_data_path_and_name_and_type
    wav = speech[0][0] if speech else "data/SET/wav.scp"
    shape = [*args.unlabelled_shape_file, "data/SET/speech_shape"][0]
    argv = ["python3", "-m", "espnet_pl.bridge.label", "--config", str(args.config)]
    argv += ["--teacher", args.teachers[0], "--wav", wav, "--shape", shape]
    return shlex.join([*argv, "--output", args.teacher_store or "FOLDER"])

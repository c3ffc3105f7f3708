"""Label-aware batches in place of ESPnet's, where a configuration asks for them.

The labels are tokens: those of the transcripts (labelled speech), those of a text file, or what a
method that is taught finds in the records of its teacher (unlabelled speech).
"""

import argparse
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.fileio.read_text import load_num_sequence_text
from espnet2.iterators.sequence_iter_factory import RawSampler, SequenceIterFactory

from espnet_pl.data.label_aware import Batching, LabelAwareBatches
from espnet_pl.data.pairing import Pairing
from espnet_pl.methods.base import ConfigError, Method
from espnet_pl.methods.registry import settings, unknown

KINDS = ("random", "label_aware")
Tokens = Iterator[tuple[str, Sequence]]  # of each utterance


def settings_of(config: Mapping[str, Any]) -> Batching | None:
    """What a configuration says of label-aware batches; None if it has none.

    Raises:
        ConfigError: it says what cannot be.
    """
    kind, conf = config.get("batching") or "random", config.get("batching_conf") or {}
    if kind not in KINDS:
        raise ConfigError(unknown("batching", str(kind), KINDS))
    made = settings("batching_conf", Batching, conf)
    if kind == "label_aware":
        if config.get("batching_labels") and made.stream == "labelled":
            raise ConfigError("batching_labels: they are of unlabelled speech; labelled has text")
        return made
    if conf or config.get("batching_labels"):
        raise ConfigError("batching_conf and batching_labels go with batching: label_aware")
    return None


def streams(args: argparse.Namespace, pairing: Pairing) -> tuple[str, ...]:
    """The kinds of batches that are to be label-aware.

    Raises:
        ConfigError: the method has no such batches, or ESPnet none of their size.
    """
    found = settings_of(vars(args))
    if found is None:
        return ()
    own = ("labelled", "unlabelled") if found.stream == "both" else (found.stream,)
    for kind in own:
        if not getattr(pairing, kind):
            raise ConfigError(
                f"batching: method {args.method} has no {kind} batches; batching_conf: stream says "
                "which are label-aware"
            )
    if "unlabelled" in own and pairing.capacity:
        raise ConfigError(
            "batching: a cache keeps batches, label-aware ones do not come again; "
            "method_conf: capacity: 0, or batching_conf: stream: labelled"
        )
    if args.batch_type not in ("numel", "unsorted"):
        raise ConfigError(
            f"batching: label-aware batches take batch_type 'numel' (batch_bins) or 'unsorted' "
            f"(batch_size), not {args.batch_type!r}"
        )
    return own


def fill(
    factory: SequenceIterFactory,
    kind: str,
    args: argparse.Namespace,
    distributed: bool,
    tokenise: Callable[[str], list[int]],
    method: Method,
) -> None:
    """Put label-aware batches into a factory, as many in a pass as ESPnet made.

    Args:
        factory: of all ranks' batches, with a data set of all their speech.
        kind: "labelled" or "unlabelled".
        tokenise: from a transcript to tokens.
        method: that the batches are for.

    Raises:
        ConfigError: tokens that are missing, of other speech, or never in two utterances.
    """
    files = args.train_shape_file if kind == "labelled" else args.unlabelled_shape_file
    shapes = [load_num_sequence_text(path, loader_type="csv_int") for path in files]
    if args.batch_type == "numel":
        bins = args.batch_bins
        sizes = {u: sum(math.prod(shape[u]) for shape in shapes) for u in shapes[0]}
    else:
        bins, sizes = args.batch_size, dict.fromkeys(shapes[0], 1)
    if kind == "labelled":
        tokens = of_text(_transcripts(args), sizes, tokenise, others=True)
    elif args.batching_labels:
        tokens = of_text(args.batching_labels, sizes, str.split)
    else:
        tokens = of_records(method, sizes)
    rank = torch.distributed.get_rank() if distributed else 0
    ranks = torch.distributed.get_world_size() if distributed else 1
    seed = f"{kind} {args.seed}"
    found, batches = settings_of(vars(args)), len(factory.sampler)
    try:
        made = LabelAwareBatches(found, tokens, sizes, bins, batches, seed, rank, ranks)
        logging.info("label-aware batches of %s speech: %s", kind, made.report())
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"batching, {kind} speech: {error}") from None
    factory.sampler = RawSampler(made)


def of_text(
    path: str | Path,
    utt_ids: Collection[str],
    tokenise: Callable[[str], Sequence],
    others: bool = False,
) -> Tokens:
    """Utterances with their tokens, of a file of lines 'utterance-id text'.

    Args:
        others: whether the file may be of more utterances.

    Raises:
        ConfigError: utterances that are missing, there twice or, if not ``others``, unknown.
    """
    left = set(utt_ids)
    try:
        file = open(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"batching: {path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            utt_id, text = (*line.split(maxsplit=1), "", "")[:2]
            if utt_id in left:
                left.remove(utt_id)
                yield utt_id, tokenise(text.strip())
            elif utt_id and (utt_id in utt_ids or not others):
                why = "is there twice" if utt_id in utt_ids else "is none of the speech"
                raise ConfigError(f"batching: {path}:{number}: utterance {utt_id!r} {why}")
    if left:
        some = ", ".join(sorted(left)[:3]) + (", …" if len(left) > 3 else "")
        raise ConfigError(f"batching: {path} has no line of {len(left)} utterances: {some}")


def of_records(method: Method, utt_ids: Iterable[str]) -> Tokens:
    """Utterances with what a method finds in the stored records of its teacher.

    Raises:
        ConfigError: there are none, or the method does not say what is in them.
    """
    records = method.resources.get("records")
    for utt_id in utt_ids:
        said = None if records is None else records.get(utt_id)
        labels = None if said is None else method.labels_of(method.config, said)
        if labels is None:
            why = "does not say what is in its records" if said else "has no stored records"
            raise ConfigError(
                f"batching: {type(method).__module__} {why}; give batching_labels, a text file of "
                "lines 'utterance-id token token …': transcripts of any recogniser"
            )
        yield utt_id, [int(label) for label in labels]


def _transcripts(args: argparse.Namespace) -> str:
    for path, name, kind in args.train_data_path_and_name_and_type:
        if (name, kind) == ("text", "text"):
            return path
    raise ConfigError("batching: labelled speech has no transcripts of type 'text'")

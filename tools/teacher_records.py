#!/usr/bin/env python3
"""What has a teacher said: how many hypotheses, how long, and how sure was it of each?

    tools/teacher_records.py exp/<teacher>/teaches/<store> data/train_unlabelled

run in a recipe's folder, of records with several hypotheses.  By place among the hypotheses of an
utterance, the likeliest first: how many utterances have one there, and of these the mean number of
the teacher's tokens and the mean posterior, P(y|x) over the sum of the utterance's hypotheses.  A
student that learns hypotheses against each other learns how much likelier the first is than the
others: where these are shorter, to say more; where they are longer, to say less.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from espnet_pl.data.kaldi import read_scp
from espnet_pl.parts.cache import Record
from espnet_pl.parts.store import Reader


def by_place(records: Iterable[Record]) -> list[tuple[int, float, float]]:
    """Of each place: utterances that have a hypothesis there, its tokens, and its posterior.

    Raises:
        ValueError: records without a score of each hypothesis, ``log_p``.
    """
    rows: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        if "log_p" not in record:
            raise ValueError("these records have no scores of hypotheses, log_p: another method's?")
        w = record["log_p"].double().softmax(0)
        for place, row in enumerate(zip(record["lengths"].tolist(), w.tolist())):
            rows[place].append(row)
    of_places = [rows[place] for place in range(len(rows))]
    return [
        (len(own), *torch.tensor(own, dtype=torch.float64).mean(0).tolist()) for own in of_places
    ]


def main(argv: list[str] | None = None) -> None:
    """Print a row for each place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("data", type=Path, help="a folder with wav.scp: whose records")
    args = parser.parse_args(argv)
    reader = Reader(args.store)
    utterances = read_scp(args.data / "wav.scp")
    print(f"{args.store}, {len(utterances)} utterances of {args.data}")
    print("place  utterances  tokens  posterior")
    for place, row in enumerate(by_place(reader.get(u) for u in utterances), 1):
        print("{:5}  {:10}  {:6.2f}  {:9.4f}".format(place, *row))


if __name__ == "__main__":
    main()

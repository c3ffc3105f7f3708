"""Gathers the text of a recipe's language model, and looks for what must not be in it.

Usage: ``lm_text OUTPUT --text data/SET/text... --labelled data/SET/text --unlabelled WAV_SCP...``
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from espnet_pl.recipe.parts import keys


def gather(output: Path, texts: Sequence[Path], labelled: Path, unlabelled: Sequence[Path]) -> None:
    """Writes the lines of all texts, 'set-utterance words', without those that are empty.

    Raises:
        SystemExit: a text holds transcripts of unlabelled speech, or there are none at all.
    """
    hidden = {utt_id for path in unlabelled for utt_id in keys(path)} - {*keys(labelled)}
    lines = []
    for path in texts:
        known = [utt_id for utt_id in keys(path) if _plain(utt_id) in hidden or utt_id in hidden]
        if known:
            raise SystemExit(
                f"{path} has transcripts of {len(known)} unlabelled utterances ({known[0]} is the "
                "first): a language model may not know them. recipe.yaml: lm_text: other sets"
            )
        for line in path.read_text(encoding="utf-8").split("\n"):
            utt_id, *words = line.split(maxsplit=1)[:2] or [""]
            if words and words[0].strip():
                lines.append(f"{path.parent.name}-{utt_id} {words[0].strip()}")
    if not lines:
        raise SystemExit(f"no words in {', '.join(map(str, texts))}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, output)


def _plain(utt_id: str) -> str:
    """The utterance that a copy at another speed is of, by Kaldi's names: ``sp0.9-<id>``."""
    return re.sub(r"^sp\d+(\.\d+)?-", "", utt_id)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--unlabelled", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    gather(args.output, args.text, args.labelled, args.unlabelled)


if __name__ == "__main__":
    main()

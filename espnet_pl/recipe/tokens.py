"""Makes the token list: words and characters by ESPnet's own tool, BPE by SentencePiece.

Usage: ``tokens TYPE SIZE FOLDER TEXT...`` writes FOLDER/tokens.txt (and bpe.model).
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BLANK, UNKNOWN, ENDS = "<blank>", "<unk>", "<sos/eos>"  # ESPnet's names and places


def words_or_characters(kind: str, folder: Path, lines: Sequence[str]) -> None:
    """Runs ``espnet2.bin.tokenize_text`` over the transcripts."""
    flags = {
        "--token_type": kind, "--input": "-", "--output": str(folder / "tokens.txt"),
        "--non_linguistic_symbols": "none", "--cleaner": "none", "--g2p": "none",
        "--write_vocabulary": "true",
    }  # fmt: skip
    argv = [sys.executable, "-m", "espnet2.bin.tokenize_text"]
    argv += [word for flag in flags.items() for word in flag]
    for symbol in (f"{BLANK}:0", f"{UNKNOWN}:1", f"{ENDS}:-1"):
        argv += ["--add_symbol", symbol]
    subprocess.run(argv, input="".join(f"{line}\n" for line in lines), text=True, check=True)


def bpe(size: int, folder: Path, lines: Sequence[str]) -> None:
    """Trains a SentencePiece model with the settings of ESPnet's recipes."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "bpe"),
        vocab_size=size,
        model_type="unigram",
        character_coverage=1.0,
        num_threads=1,  # more would make the pieces depend on the machine
    )
    vocabulary = (folder / "bpe.vocab").read_text(encoding="utf-8").splitlines()
    pieces = [line.split("\t")[0] for line in vocabulary[3:]]  # after <unk> <s> </s>
    tokens = [BLANK, UNKNOWN, *pieces, ENDS]
    (folder / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")


def main(kind: str, size: int, folder: Path, texts: Sequence[Path]) -> None:
    """Writes the token list of the transcripts in Kaldi ``text`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        line.strip().partition(" ")[2].strip()
        for path in texts
        for line in path.read_text(encoding="utf-8").split("\n")
    ]
    lines = [line for line in lines if line]
    if not lines:
        raise SystemExit(f"no words in {', '.join(map(str, texts))}")
    if kind == "bpe":
        bpe(size, folder, lines)
    else:
        words_or_characters(kind, folder, lines)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [Path(text) for text in sys.argv[4:]])

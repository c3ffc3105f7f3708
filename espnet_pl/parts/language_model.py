r"""Language models: how probable a sequence of tokens is as text, whatever was heard.

    log p(y) = Σ_{i=1}^{u+1} log p(y_i | y_1 … y_{i−1}),   y_{u+1}: the end of the sentence

An n-gram model with back-off knows the probabilities p̂ of some n-grams and a factor b for some
histories h; a longer history is tried first,

    p(w|h) = p̂(w|h) if it is there, else b(h) · p(w|h without its first word),   b = 1 if not there

Source: Katz, "Estimation of probabilities from sparse data for the language model component of a
speech recognizer", IEEE Transactions on Acoustics, Speech, and Signal Processing 35, 1987; the file
format is that of SRILM's manual page ngram-format(5), known from use and not read.
Unit: nats.
"""

import gzip
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
NO_TEXT = frozenset({"<blank>", UNKNOWN, "<sos/eos>", "<sos>", "<eos>"})  # in lists of tokens
NOTHING = -99.0  # as a decimal logarithm, what SRILM writes for a probability of 0
ENTRY = 200  # bytes that Python takes for a score beside its key, about


class LanguageModelError(ValueError):
    """A language model that cannot be used: says which, why, and what to do."""


@runtime_checkable
class LanguageModel(Protocol):
    """What a method asks."""

    def log_p(self, sequences: Sequence[Sequence[int]]) -> Float64[Tensor, " k"]:
        """log p of whole sequences, with the end of the sentence, in nats, on the CPU.

        Args:
            sequences: numbers of tokens; an empty one is a sentence without words.

        Returns:
            The same for a sequence whatever the others are; −inf where it cannot be.
        """


class Remembering:
    """A language model that is not asked twice, as long as there is room.

    Args:
        model: the one that is asked.
        megabytes: of memory for scores, about; those that were not asked for longest go first.
    """

    def __init__(self, model: LanguageModel, megabytes: float = 64.0) -> None:
        if not megabytes >= 0:
            raise ValueError(f"megabytes is {megabytes}, it must not be negative")
        self.model, self.room = model, megabytes * 2**20
        self._scores: OrderedDict[bytes, float] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._scores)

    def log_p(self, sequences: Sequence[Sequence[int]]) -> Float64[Tensor, " k"]:
        """As any language model."""
        keys = [np.asarray(y, dtype=np.int32).tobytes() for y in sequences]
        new = {key: y for key, y in zip(keys, sequences) if key not in self._scores}
        for key in keys:
            if key in self._scores:
                self._scores.move_to_end(key)
        known = {key: self._scores[key] for key in keys if key in self._scores}
        if new:
            said = dict(zip(new, self.model.log_p([*new.values()]).tolist(), strict=True))
            known |= said
            for key, score in said.items():
                self._scores[key] = score
                self._size += len(key) + ENTRY
            while self._size > self.room:
                key, _ = self._scores.popitem(last=False)
                self._size -= len(key) + ENTRY
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)


class NGram:
    """An n-gram model with back-off, from an ARPA file of tokens.

    Args:
        path: text, or gzip if it ends in ``.gz``.
        token_list: the tokens, by number; those of ``NO_TEXT`` need not be in the file.

    Raises:
        LanguageModelError: the file is damaged or no ARPA file, or tokens are not in it.
    """

    def __init__(self, path: str | Path, token_list: Sequence[str]) -> None:
        self.path = Path(path)
        number = {token: i for i, token in enumerate(token_list)}
        # Names of our own list that mean something else in the file are no words of it.
        for name in NO_TEXT - {UNKNOWN}:
            number.pop(name, None)
        self._begin, self._end = len(token_list), len(token_list) + 1
        number |= {BEGIN: self._begin, END: self._end}
        self._log_p: dict[tuple[int, ...], float] = {}
        self._back_off: dict[tuple[int, ...], float] = {}
        self.order = 0
        for words, log_p, back_off in _ngrams(self.path):
            self.order = max(self.order, len(words))
            if not all(word in number for word in words):
                continue  # of words that are no tokens: nobody asks
            key = tuple(number[word] for word in words)
            self._log_p[key] = -math.inf if log_p <= NOTHING else log_p * math.log(10)
            if back_off:
                self._back_off[key] = back_off * math.log(10)
        there = {key[0] for key in self._log_p if len(key) == 1}
        refuse_other_tokens(
            self.path, [t for t in token_list if t not in NO_TEXT and number[t] not in there]
        )
        if self._end not in there:
            raise LanguageModelError(f"language model: {self.path} has no 1-gram {END}")

    def log_p(self, sequences: Sequence[Sequence[int]]) -> Float64[Tensor, " k"]:
        """As any language model."""
        return torch.tensor([self._of(y) for y in sequences], dtype=torch.float64)

    def _of(self, sequence: Sequence[int]) -> float:
        total, history = 0.0, (self._begin,)
        for word in (*sequence, self._end):
            history = history[max(len(history) - self.order + 1, 0) :]
            total += self._next(history, word)
            history = (*history, word)
        return total

    def _next(self, history: tuple[int, ...], word: int) -> float:
        log_p = self._log_p.get((*history, word))
        if log_p is not None:
            return log_p
        if not history:
            return -math.inf
        return self._back_off.get(history, 0.0) + self._next(history[1:], word)


class KenLM:
    """An n-gram model in KenLM's own binary format, for files that are too large as text.

    Args:
        path: what KenLM's ``build_binary`` wrote.
        token_list: the tokens, by number; those of ``NO_TEXT`` need not be in the model.

    Raises:
        LanguageModelError: the module ``kenlm`` is not installed or cannot read the file, or tokens
            are not in it.
    """

    def __init__(self, path: str | Path, token_list: Sequence[str]) -> None:
        try:
            import kenlm
        except ModuleNotFoundError:
            raise LanguageModelError(
                f"language model: {path} is read by the module kenlm, which is not installed: "
                "pip install kenlm, or give the ARPA file"
            ) from None
        try:
            self._model = kenlm.Model(str(path))
        except (OSError, RuntimeError) as error:
            raise LanguageModelError(f"language model: {path}: {error}") from None
        self.token_list = list(token_list)
        words = (token for token in token_list if token not in NO_TEXT)
        refuse_other_tokens(path, [word for word in words if word not in self._model])

    def log_p(self, sequences: Sequence[Sequence[int]]) -> Float64[Tensor, " k"]:
        """As any language model; KenLM's numbers are in single precision."""
        return torch.tensor([self._of(y) for y in sequences], dtype=torch.float64)

    def _of(self, sequence: Sequence[int]) -> float:
        words = " ".join(self.token_list[i] for i in sequence)
        log_p = [own for own, *_ in self._model.full_scores(words, bos=True, eos=True)]
        return -math.inf if min(log_p) <= NOTHING else sum(log_p) * math.log(10)


def refuse_other_tokens(path: Any, lost: Sequence[str], others: Sequence[str] = ()) -> None:
    """Whether a model has the tokens that it must have.

    Args:
        lost: tokens that the model does not have.
        others: tokens that only the model has.

    Raises:
        LanguageModelError: there are some.
    """
    if not lost and not others:
        return
    differ = [
        f"{len(names)} tokens are {where}: {', '.join(names[:5])}{', …' if names[5:] else ''}"
        for names, where in ((lost, "not in it"), (others, "in it only"))
        if names
    ]
    raise LanguageModelError(
        f"language model: {path} has other tokens than the student: {'; '.join(differ)}; train it "
        "on text in the student's tokens"
    )


def _ngrams(path: Path) -> Iterator[tuple[list[str], float, float]]:
    """Each n-gram: its words, log10 of its probability and of its back-off factor."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from _sections(path, file)
    except UnicodeDecodeError as error:
        raise LanguageModelError(f"language model: {path} is no text: {error}") from None
    except (OSError, EOFError) as error:
        raise LanguageModelError(f"language model: {path}: {error}") from None


def _sections(path: Path, file: Iterable[str]) -> Iterator[tuple[list[str], float, float]]:
    declared: dict[int, int] = {}
    found: dict[int, int] = {}
    order, place = 0, "before"  # the header, then in it, in n-grams of an order, or at the end
    for number, line in enumerate(file, 1):
        # Not split(): a word may hold a space that is none of ASCII's.
        fields = [field for field in line.rstrip("\r\n").replace("\t", " ").split(" ") if field]
        if not fields:
            continue
        if fields[0] == "\\data\\":
            order, place = 0, "header"
        elif place == "before":
            continue
        elif fields[0] == "\\end\\":
            place = "end"
            break
        elif fields[0].startswith("\\") and fields[0].endswith("-grams:"):
            order, place = _number(path, number, int, fields[0][1:-7]), "ngrams"
        elif place == "header":
            if fields[0] == "ngram":
                size, _, count = "".join(fields[1:]).partition("=")
                size = _number(path, number, int, size)
                declared[size] = _number(path, number, int, count)
        else:
            if not order + 1 <= len(fields) <= order + 2:
                raise LanguageModelError(
                    f"language model: {path}:{number}: a line of {order}-grams has a logarithm, "
                    f"{order} words and perhaps another logarithm, not {len(fields)} fields"
                )
            back_off = 0.0
            if len(fields) == order + 2:
                back_off = _number(path, number, float, fields[-1])
            found[order] = found.get(order, 0) + 1
            yield fields[1 : order + 1], _number(path, number, float, fields[0]), back_off
    if place != "end" or not declared:
        raise LanguageModelError(
            f"language model: {path} is no complete ARPA file: it begins with \\data\\ and ends "
            "with \\end\\; write it again"
        )
    _compare(path, declared, found)


def _compare(path: Path, declared: Mapping[int, int], found: Mapping[int, int]) -> None:
    for order in sorted({*declared, *found}):
        if declared.get(order, 0) != found.get(order, 0):
            raise LanguageModelError(
                f"language model: {path} says that it has {declared.get(order, 0)} {order}-grams, "
                f"and has {found.get(order, 0)}; write it again"
            )


def _number(path: Path, line: int, kind: type, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if value != value:
        raise LanguageModelError(f"language model: {path}:{line}: {text!r} is no number")
    return value

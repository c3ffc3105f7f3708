"""parts/language_model: back-off by hand, KenLM as a witness, damaged files, what is remembered."""

import gzip
import itertools
import math

import pytest
import torch

from espnet_pl.parts.language_model import (
    ENTRY,
    KenLM,
    LanguageModelError,
    NGram,
    Remembering,
    refuse_other_tokens,
)

TOKENS = ["<blank>", "<unk>", "a", "b", "c", "<sos/eos>"]
A, B, C = 2, 3, 4
ARPA = """\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-99\t<s>\t-0.5
-0.7\t</s>
-0.6\ta\t-0.3
-0.9\tb\t-0.2
-1.1\tc

\\2-grams:
-0.2\t<s> a\t-0.1
-0.4\ta b\t-0.6
-0.8\tb </s>
-0.3\tb a

\\3-grams:
-0.05\t<s> a b
-0.15\ta b a

\\end\\
"""
# By hand, in decimal logarithms: which n-gram is found, and the factors on the way to it.
BY_HAND = {
    (): -0.5 - 0.7,  # no '<s> </s>'
    (A,): -0.2 + (-0.1 - 0.3 - 0.7),  # no '<s> a </s>', no 'a </s>'
    (A, B): -0.2 - 0.05 + (-0.6 - 0.8),  # no 'a b </s>', but 'b </s>'
    (A, B, A): -0.2 - 0.05 - 0.15 + (-0.3 - 0.7),  # 'b a' has no factor
    (C,): (-0.5 - 1.1) - 0.7,  # neither '<s> c' nor 'c' has a factor
    (B, B, A): (-0.5 - 0.9) + (-0.2 - 0.9) + -0.3 + (-0.3 - 0.7),
    (C, A, B): (-0.5 - 1.1) + -0.6 + -0.4 + (-0.6 - 0.8),
}


@pytest.fixture
def arpa(tmp_path):
    def make(text=ARPA, name="lm.arpa"):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(text)
        return path

    return make


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_back_off_is_what_one_calculates_by_hand(name, arpa):
    model = NGram(arpa("a comment before\n\n" + ARPA, name), TOKENS)
    scores = model.log_p([*BY_HAND])
    assert scores.dtype == torch.float64 and model.order == 3
    assert scores.tolist() == pytest.approx([math.log(10) * x for x in BY_HAND.values()])


def test_probabilities_after_a_history_sum_to_one(arpa):
    """Of a model whose factors are right: p(·|h) is a distribution, also where it backs off."""
    one = {"a": 0.5, "b": 0.3, "</s>": 0.2}
    factor = (1 - 0.6) / (1 - one["a"])  # 'b a' is known, with 0.6
    text = (
        "\\data\\\nngram 1=4\nngram 2=1\n\\1-grams:\n-99 <s> 0\n"
        f"{math.log10(0.5)} a\n{math.log10(0.3)} b {math.log10(factor)}\n{math.log10(0.2)} </s>\n"
        f"\\2-grams:\n{math.log10(0.6)} b a\n\\end\\\n"
    )
    model = NGram(arpa(text), ["<blank>", "a", "b", "<sos/eos>"])
    # Sentences of n words at most have all the mass but that of n words going on.
    for n in (1, 4):
        ended, going = 0.0, {"<s>": 1.0}
        for _ in range(n + 1):
            ended += sum(mass * (0.2 * factor if w == "b" else 0.2) for w, mass in going.items())
            after_b, other = going.get("b", 0.0), sum(going.values()) - going.get("b", 0.0)
            going = {
                "a": 0.6 * after_b + 0.5 * other,
                "b": 0.3 * factor * after_b + 0.3 * other,
            }
        assert ended + sum(going.values()) == pytest.approx(1)
        several = [[*y] for k in range(n + 1) for y in itertools.product([1, 2], repeat=k)]
        assert model.log_p(several).exp().sum().item() == pytest.approx(ended)


def test_tokens_that_are_no_text_cannot_be(arpa):
    scores = NGram(arpa(), TOKENS).log_p([[A, 1], [0], [A, 5], [A]])
    assert scores.isneginf().tolist() == [True, True, True, False]
    known = ARPA.replace("1=5", "1=6").replace("-1.1\tc\n", "-1.1\tc\n-3\t<unk>\n")
    scores = NGram(arpa(known), TOKENS).log_p([[1], [5]])
    assert scores[0].item() == pytest.approx(math.log(10) * (-0.5 - 3 - 0.7))
    assert scores[1].isneginf()


def test_a_word_of_probability_zero_cannot_be(arpa):
    scores = NGram(arpa(ARPA.replace("-1.1\tc", "-99\tc")), TOKENS).log_p([[C], [A, B]])
    assert scores.isneginf().tolist() == [True, False]


def test_other_words_of_the_file_do_not_matter(arpa):
    more = ARPA.replace("1=5", "1=6").replace("2=4", "2=5")
    more = more.replace("-1.1\tc\n", "-1.1\tc\n-2\telse\t-1\n").replace(
        "-0.3\tb a\n", "-0.3\tb a\n-0.1\telse a\n"
    )
    sequences = [*BY_HAND]
    found = NGram(arpa(more), TOKENS).log_p(sequences)
    assert torch.equal(found, NGram(arpa(name="b.arpa"), TOKENS).log_p(sequences))


def test_agrees_with_kenlm(arpa):
    kenlm = pytest.importorskip("kenlm")
    known = ARPA.replace("1=5", "1=6").replace("-1.1\tc\n", "-1.1\tc\n-3\t<unk>\n")
    path = arpa(known)
    sequences = [[*y] for n in range(5) for y in itertools.product([1, A, B, C], repeat=n)]
    found, witness = NGram(path, TOKENS).log_p(sequences), kenlm.Model(str(path))
    words = [" ".join(TOKENS[i] for i in y) for y in sequences]
    expected = [math.log(10) * witness.score(y, bos=True, eos=True) for y in words]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    by_kenlm = KenLM(path, TOKENS).log_p(sequences)
    torch.testing.assert_close(by_kenlm, found, rtol=1e-5, atol=1e-5)
    with pytest.raises(LanguageModelError, match="1 tokens are not in it: d;"):
        KenLM(path, [*TOKENS, "d"])
    with pytest.raises(LanguageModelError, match="not.arpa"):
        KenLM(arpa("no", "not.arpa"), TOKENS)


def test_without_kenlm_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(LanguageModelError, match="pip install kenlm, or give the ARPA file"):
        KenLM("lm.bin", TOKENS)


@pytest.mark.parametrize(
    "good, bad, match",
    [
        ("\\end\\\n", "", "no complete ARPA file"),
        ("\\data\\", "", "no complete ARPA file"),
        ("-0.3\tb a\n", "", "says that it has 4 2-grams, and has 3"),
        ("ngram 3=2", "", "says that it has 0 3-grams, and has 2"),
        ("-0.9\tb", "nine\tb", "lm.arpa:10: 'nine' is no number"),
        ("-0.9\tb", "nan\tb", "'nan' is no number"),
        ("-0.4\ta b", "-0.4\ta", ":15: a line of 2-grams has a logarithm, 2 words"),
        ("\\2-grams:", "\\two-grams:", "'two' is no number"),
        ("ngram 2=4", "ngram 2=x", "'x' is no number"),
        ("\tc\n", "\td\n", "1 tokens are not in it: c"),
        ("-0.7\t</s>\n", "-0.7\td\n", "no 1-gram </s>"),
    ],
)
def test_damaged_files_are_refused_by_what_is_wrong(good, bad, match, arpa):
    assert good in ARPA
    text = ARPA.replace(good, bad)
    if good == "-0.4\ta b":
        text = text.replace("-0.4\ta\t-0.6", "-0.4\ta")
    with pytest.raises(LanguageModelError, match=match):
        NGram(arpa(text), TOKENS)


def test_files_that_are_none(arpa, tmp_path):
    (tmp_path / "bytes.arpa").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "no.arpa.gz").write_bytes(b"plain")
    for name, match in (
        ("bytes.arpa", "is no text"), ("no.arpa.gz", "gzip"), ("gone.arpa", "No such file"),
    ):  # fmt: skip
        with pytest.raises(LanguageModelError, match=match):
            NGram(tmp_path / name, TOKENS)


class Counting:
    """Says how long a sequence is, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def log_p(self, sequences):
        self.asked.append([list(y) for y in sequences])
        return torch.tensor([-float(sum(y)) for y in sequences], dtype=torch.float64)


def test_nothing_is_asked_twice():
    model = Remembering(counting := Counting())
    assert model.log_p([[1, 2], [3], [1, 2], []]).tolist() == [-3, -3, -3, 0]
    assert counting.asked == [[[1, 2], [3], []]]
    assert model.log_p([[3], [2, 1]]).tolist() == [-3, -3]
    assert counting.asked[1:] == [[[2, 1]]]
    model.log_p([[3]])
    assert len(counting.asked) == 2 and model.log_p([]).shape == (0,)


def test_memory_is_bounded_and_what_was_not_asked_for_longest_goes():
    room = 3 * (ENTRY + 4)  # three sequences of one token
    model = Remembering(counting := Counting(), room / 2**20)
    model.log_p([[1], [2], [3]])
    model.log_p([[1]])
    model.log_p([[4]])
    assert len(model) == 3
    model.log_p([[1], [3], [4]])
    assert len(counting.asked) == 2
    assert model.log_p([[2]]).tolist() == [-2] and len(counting.asked) == 3
    many = [[i] for i in range(10)]
    assert model.log_p(many).tolist() == [-float(i) for i in range(10)]  # more than there is room
    assert len(model) == 3
    forgetful = Remembering(counting, 0.0)
    assert forgetful.log_p([[7]]).tolist() == [-7] and len(forgetful) == 0
    with pytest.raises(ValueError, match="megabytes is -1"):
        Remembering(counting, -1.0)


def test_tokens_that_differ_are_named():
    refuse_other_tokens("x", [])
    with pytest.raises(
        LanguageModelError, match="x has other tokens.*1 tokens are not in it: a; 6"
    ):
        refuse_other_tokens("x", ["a"], list("bcdefg"))

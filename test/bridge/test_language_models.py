"""bridge/language_models: ESPnet's own scores, whatever the batch; other files are refused."""

import subprocess
import sys

import pytest
import torch
import yaml
from espnet2.tasks.lm import LMTask

from espnet_pl.bridge import language_models
from espnet_pl.bridge.language_models import STEP, load
from espnet_pl.methods.base import ConfigError
from test.bridge.models import WORDS, arpa_file, lm_folder, model_folder

KINDS = {
    "lstm": {},
    "transformer": {
        "lm": "transformer",
        "lm_conf": {"embed_unit": 8, "att_unit": 8, "head": 2, "unit": 8, "layer": 1},
    },
}
SEQUENCES = [[2, 3], [4], [], [2, 2, 3, 4, 1], [3, 2, 4], [4, 4, 4, 4, 4, 4, 4], [2]]


def by_token(net, y):
    """The sum of log-probabilities, one token after the other, as a search asks for them."""
    state, total = None, 0.0
    history = [net.sos]
    for token in [*y, net.eos]:
        log_p, state = net.lm.score(torch.tensor(history), state, torch.zeros(1, 1))
        total += float(log_p[token])
        history.append(token)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_stock_search(kind, tmp_path):
    folder = lm_folder(tmp_path / "lm", **KINDS[kind])
    scores = load(folder, WORDS).log_p(SEQUENCES)
    net, _ = LMTask.build_model_from_file(folder / "config.yaml", folder / "model.pth", "cpu")
    expected = [by_token(net.double().eval(), y) for y in SEQUENCES]
    assert scores.dtype == torch.float64 and len({*scores.tolist()}) == len(SEQUENCES)
    torch.testing.assert_close(
        scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=STEP / 2 + 1e-9
    )


def test_scores_are_those_of_stock_perplexities(tmp_path):
    folder = lm_folder(tmp_path / "lm")
    text = {f"u{i}": [WORDS[t] for t in y] for i, y in enumerate(SEQUENCES) if y}
    (tmp_path / "text").write_text("".join(f"{u} {' '.join(y)}\n" for u, y in text.items()))
    command = [
        sys.executable, "-m", "espnet2.bin.lm_calc_perplexity", "--output_dir", "ppl",
        "--data_path_and_name_and_type", "text,text,text", "--train_config", "lm/config.yaml",
        "--model_file", "lm/model.pth", "--ngpu", "0", "--dtype", "float64",
    ]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    lines = (tmp_path / "ppl/utt2ppl").read_text().split("\n")[:-1]
    stock = {u: float(ppl) for u, ppl in map(str.split, lines)}
    scores = load(folder, WORDS).log_p([y for y in SEQUENCES if y])
    for (u, y), score in zip(text.items(), scores):
        assert (-score / (len(y) + 1)).exp().item() == pytest.approx(stock[u], rel=1e-3), u


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_same_to_the_last_bit_in_every_batch(kind, tmp_path, monkeypatch):
    folder = lm_folder(tmp_path / "lm", **KINDS[kind])
    together = load(folder, WORDS).log_p(SEQUENCES)
    alone = torch.cat([load(folder, WORDS).log_p([y]) for y in SEQUENCES])
    backwards = load(folder, WORDS).log_p(SEQUENCES[::-1]).flip(0)
    monkeypatch.setattr(language_models, "CELLS", 40)
    parts = load(folder, WORDS).log_p(SEQUENCES)
    for other in (alone, backwards, parts):
        assert torch.equal(together, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(load(folder, WORDS).log_p(SEQUENCES), together)


@pytest.mark.parametrize("where", ["lm/valid.loss.ave.pth", "lm"])
def test_what_lm_train_leaves_is_found(where, tmp_path):
    lm_folder(tmp_path / "lm", weights="valid.loss.ave.pth")
    expected = load(lm_folder(tmp_path / "other"), WORDS).log_p(SEQUENCES)
    assert torch.equal(load(tmp_path / where, WORDS).log_p(SEQUENCES), expected)


def test_loading_draws_nothing_and_changes_no_random_number(tmp_path):
    folder = lm_folder(tmp_path / "lm")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    model = load(folder, WORDS)
    assert torch.equal(torch.rand(3), expected)
    assert not any(p.requires_grad for p in model.model.net.parameters())
    assert model.log_p([]).shape == (0,)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.lm"])
def test_n_grams_are_told_by_the_name(name, tmp_path):
    path = arpa_file(tmp_path / name)
    scores = load(str(path), WORDS).log_p([[2, 3], [1]])
    assert scores[0].exp().item() == pytest.approx(0.6 * 0.2 * 0.1) and scores[1].isneginf()


def refused(path, match, tokens=WORDS):
    with pytest.raises(ConfigError, match=match):
        load(path, tokens)


def test_other_tokens_are_refused_by_name(tmp_path):
    folder = lm_folder(tmp_path / "lm")
    words = ["<blank>", "<unk>", "A", "D", "B", "E", "<sos/eos>"]
    refused(folder, "2 tokens are not in it: D, E; 1 tokens are in it only: C;", words)
    order = ["<blank>", "<unk>", "A", "C", "B", "<sos/eos>"]
    refused(folder, "in another order: number 3 is 'B' there, 'C' here", order)
    refused(arpa_file(tmp_path / "lm.arpa"), "2 tokens are not in it: D, E", words)


def test_files_that_are_no_language_model(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "language model: .*config.yaml is missing")
    lm_folder(tmp_path / "lm")
    (tmp_path / "lm/model.pth").unlink()
    refused(tmp_path / "lm", "language model: .*model.pth is missing")
    torch.save([1], tmp_path / "lm/model.pth")
    refused(tmp_path / "lm", "language model: .*holds more than weights")
    torch.save({"x": torch.ones(1)}, tmp_path / "lm/model.pth")
    refused(tmp_path / "lm", "language model: .*is not of its config.yaml")
    refused(model_folder(tmp_path / "asr"), "none of task lm")
    refused(tmp_path / "lm.zip", "is packed; unpack it")
    refused(tmp_path / "lm.arpa", "No such file")
    refused(tmp_path / "lm.bin", "lm.bin is missing")
    folder = lm_folder(tmp_path / "words")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"token_list": "gone.txt"}))
    refused(folder, "language model: its token_list gone.txt")

"""bridge/teachers: every family loads, strictly; zips are not trusted; tokens are translated."""

import stat
import zipfile

import numpy as np
import pytest
import torch
import yaml
from espnet2.main_funcs.pack_funcs import pack, unpack

from espnet_pl.bridge import compat
from espnet_pl.bridge.export import export
from espnet_pl.bridge.teachers import FAMILIES, Tokens, frames, hash_of, load, translation
from espnet_pl.bridge.train import main
from espnet_pl.methods.base import ConfigError, Utterances
from espnet_pl.recipe.tokens import bpe
from test.bridge.models import CONFS, WORDS, model_folder

SPEECH = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))
X = Utterances(["a", "b", "c"], SPEECH, torch.tensor([6000, 4000, 5000]))
LABELS = [[2, 3], [4], []]


def packed(folder, path, option=()):
    pack(
        files={"asr_model_file": folder / "model.pth"},
        yaml_files={"asr_train_config": folder / "config.yaml"},
        option=option,
        outpath=path,
    )
    return path


def says(network):
    with torch.no_grad():
        heard = network.hear(X)
        return heard.score(LABELS), heard.propose(3)


@pytest.mark.parametrize("kind", CONFS)
def test_every_family_says_what_the_stock_model_says(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = model_folder(tmp_path / "exp/model", kind)
    stock, student = FAMILIES["asr_transducer" if kind == "transducer" else "asr"]
    net, _ = stock.build_model_from_file(folder / "config.yaml", folder / "model.pth", "cpu")
    expected = says(student(net).eval())
    assert any(p.labels for own in expected[1] for p in own)
    zipped = packed(folder, tmp_path / "model.zip")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    monkeypatch.chdir(outside)  # ESPnet then names the files by whole paths
    absolute = packed(folder, tmp_path / "absolute.zip")
    for path in (folder, folder / "model.pth", zipped, absolute):
        teacher = load(path)
        assert type(teacher.network) is student and teacher.tokens.token_list == WORDS
        score, proposals = says(teacher.network)
        assert torch.equal(score, expected[0]) and proposals == expected[1]
        assert not any(m.training for m in teacher.network.modules())
        assert not any(p.requires_grad for p in teacher.network.parameters())
        assert teacher.hash == hash_of(zipped)
    encoded, lengths = net.eval().encode(torch.zeros(1, 16000), torch.tensor([16000]))
    assert teacher.frames[0] == int(lengths) == encoded.shape[1]


def test_a_model_of_ours_is_a_teacher_before_and_after_its_export(arguments, tmp_path):
    main(arguments("supervised", "seed", max_epoch=1))
    exp = tmp_path / "seed"
    with pytest.raises(ConfigError, match=r"model.pth is missing; give one of .*loss.ave"):
        load(exp)
    export(exp, exp / "model")
    assert load(exp / "valid.loss.ave.pth").hash == hash_of(exp / "model")


def test_the_hash_is_of_what_a_teacher_says(tmp_path):
    first = hash_of(model_folder(tmp_path / "a"))
    assert first == hash_of(model_folder(tmp_path / "b"))
    others = [
        model_folder(tmp_path / "c", seed=1),
        model_folder(tmp_path / "d", token_list=[*WORDS[:2], "B", "A", *WORDS[4:]]),
        model_folder(tmp_path / "e", encoder_conf=CONFS["ctc"]["encoder_conf"] | {
            "attention_heads": 4}),
    ]  # fmt: skip
    assert len({first, *map(hash_of, others)}) == 4


def test_frames_tell_how_a_model_subsamples_and_leave_it_alone(tmp_path):
    conf = CONFS["ctc"]["encoder_conf"]
    teacher = load(model_folder(tmp_path / "a"))
    twice = load(model_folder(tmp_path / "b", encoder_conf=conf | {"input_layer": "conv2d2"}))
    again = load(model_folder(tmp_path / "c", "attention"))
    assert teacher.frames == again.frames != twice.frames
    teacher.network.train()
    state = torch.random.get_rng_state()
    assert frames(teacher.network) == again.frames
    assert teacher.network.training and torch.equal(state, torch.random.get_rng_state())


def test_statistics_and_pieces_are_found_beside_the_model(tmp_path, monkeypatch):
    bpe(10, tmp_path, ["ab ba", "abba aab b"] * 20)
    tokens = (tmp_path / "tokens.txt").read_text().split()
    n = np.full(16, 10.0)
    np.savez(tmp_path / "stats.npz", count=10, sum=n, sum_square=2 * n)
    gone = {"bpemodel": str(tmp_path / "bpe.model"), "normalize": "global_mvn"}
    gone["normalize_conf"] = {"stats_file": str(tmp_path / "stats.npz")}
    folder = model_folder(tmp_path / "exp/x", token_list=tokens, token_type="bpe", **gone)
    monkeypatch.chdir(tmp_path)
    zipped = packed(folder, tmp_path / "m.zip", [tmp_path / "stats.npz", tmp_path / "bpe.model"])
    first = load(folder)
    assert first.tokens.bpe_model
    (tmp_path / "stats.npz").rename(folder / "feats_stats.npz")
    (tmp_path / "bpe.model").rename(folder / "bpe.model")
    # A relative name, from where the model was trained.
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"bpemodel": "data/bpe.model", "normalize_conf": {"stats_file": "exp/stats.npz"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    moved = load(folder)
    assert moved.tokens == first.tokens
    assert moved.hash == first.hash == load(zipped).hash
    assert load(zipped).tokens == first.tokens
    (folder / "feats_stats.npz").unlink()
    with pytest.raises(ConfigError, match="exp/stats.npz of .* is missing"):
        load(folder)


def test_weights_that_are_not_the_model_s(tmp_path):
    folder = model_folder(tmp_path / "a")
    state = torch.load(folder / "model.pth")
    for change, message in (
        (lambda s: s.pop("ctc.ctc_lo.bias"), "1 tensors are in one .*the first is ctc.ctc_lo.bias"),
        (lambda s: s.update(more=torch.ones(1)), "the first is more"),
        (lambda s: s.update({"ctc.ctc_lo.bias": torch.ones(9)}), "size mismatch"),
        (lambda s: s.update(epoch=3), "holds more than weights"),
    ):
        own = dict(state)
        change(own)
        torch.save(own, folder / "model.pth")
        with pytest.raises(ConfigError, match=f"(?s)model.pth.*{message}"):
            load(folder)
    (folder / "model.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no weights"):
        load(folder)


def test_weights_of_the_other_release_are_renamed(tmp_path):
    folder = model_folder(tmp_path / "a")
    state = torch.load(folder / "model.pth")
    here, there = (".out.0.", ".out.") if compat.version() == "202511" else (".out.", ".out.0.")
    other = {k.replace(f".embed{here}", f".embed{there}"): v for k, v in state.items()}
    assert other.keys() != state.keys()
    expected = says(load(folder).network)
    torch.save(other, folder / "model.pth")
    assert torch.equal(says(load(folder).network)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctc_conf": None}, "of another task"),
        ({"src_token_list": ["a"]}, "of another task"),
        ({"input_size": 80}, "a model of features"),
        ({"token_list": None}, "no configuration of an ESPnet model"),
    ],
)
def test_models_that_are_no_recognisers_of_speech(change, message, tmp_path):
    folder = model_folder(tmp_path / "a")
    config = yaml.safe_load((folder / "config.yaml").read_text()) | change
    config = {k: v for k, v in config.items() if v is not None or k not in change}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_what_is_not_there(tmp_path):
    for name, message in (("none", "none/config.yaml is missing"), ("x.zip", "x.zip is missing")):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / name)


# --- zips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/tmp/evil", "../evil", "a/../../evil", "..\\evil", "C:\\evil", "\\evil", "link"]
)
def test_a_zip_is_not_trusted(name, tmp_path):
    path = tmp_path / "a/evil.zip"
    path.parent.mkdir()
    member = zipfile.ZipInfo("x")
    member.filename = name
    if name == "link":
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.yaml", "files: {}\nyaml_files: {}\n")
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(ConfigError, match="not safe to unpack: it has a member"):
        load(path)
    assert [*tmp_path.rglob("*")] == [path.parent, path]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "has no meta.yaml"),
        ({"meta.yaml": "- a"}, "has no asr_train_config where"),
        ({"meta.yaml": "files: 3\nyaml_files: {asr_train_config: ../../etc/x}"}, "has no asr_tr"),
        ({"meta.yaml": "yaml_files: {asr_train_config: c}", "c": ""}, "has no asr_model_file"),
        ({"meta.yaml": "a: ["}, "is no packed model"),
        ({"meta.yaml": "!!python/object/apply:os.system [id]"}, "is no packed model"),
    ],
)
def test_a_zip_of_something_else(members, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="is no packed model"):
        load(tmp_path / "a.zip")


def test_espnet_unpacks_what_we_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = packed(model_folder(tmp_path / "exp/m"), tmp_path / "m.zip")
    theirs = unpack(path, tmp_path / "out", use_cache=False)
    assert hash_of(theirs["asr_model_file"]) == hash_of(path)


# --- tokens --------------------------------------------------------------------------------------

LETTERS = ["<blank>", "<unk>", "<space>", "A", "B", "C", "<sos/eos>"]


def tokens_of(kind, folder):
    if kind == "word":
        return Tokens(["<blank>", "<unk>", "BA", "AB", "C", "ABC", "<sos/eos>"], kind, None)
    if kind == "char":
        return Tokens(LETTERS, kind, None)
    bpe(10, folder, ["AB BA", "ABC C AB", "BA AB C"] * 20)
    config = {"bpemodel": str(folder / "bpe.model"), "token_type": "bpe"}
    tokens = (folder / "tokens.txt").read_text().split()
    return load(model_folder(folder / "model", token_list=tokens, **config)).tokens


def tokeniser(tokens, folder):
    """What a training does with text."""
    from espnet2.train.preprocessor import CommonPreprocessor

    prepare = CommonPreprocessor(
        train=False, token_type=tokens.token_type, token_list=tokens.token_list,
        bpemodel=str(folder / "bpe.model"),
    )  # fmt: skip
    return lambda text: prepare("", {"text": text})["text"].tolist()


@pytest.mark.parametrize("theirs", ["word", "char", "bpe"])
@pytest.mark.parametrize("ours", ["word", "char", "bpe"])
def test_labels_are_translated_through_text(theirs, ours, tmp_path):
    a, b = tokens_of(theirs, tmp_path), tokens_of(ours, tmp_path)
    write, read = tokeniser(a, tmp_path), tokeniser(b, tmp_path)
    translate = translation(a, b.token_list, read)
    for text in ("AB", "AB C", "BA AB ABC C"):
        assert translate(write(text)) == read(text)
    if theirs == ours:
        assert all(translate(y) == y for y in ([], [1, 1], [2]))
        return
    assert translate([]) is None
    assert translate([a.token_list.index("<unk>")]) is None
    assert translate([a.token_list.index("<sos/eos>"), *write("AB")]) is None
    if ours == "word":
        assert translate(write("C BB")) is None


def test_what_has_no_spelling(tmp_path):
    letters = Tokens(["<blank>", "<unk>", "<space>", "A", "Z", "<sos/eos>"], "char", None)
    translate = translation(letters, LETTERS, tokeniser(Tokens(LETTERS, "char", None), tmp_path))
    assert translate([3, 4]) is None and translate([2, 2]) is None
    assert translate([2, 3, 2, 2, 3, 2]) == [3, 2, 3]  # one space between words
    for tokens, message in (
        (letters._replace(token_type="phn"), "of type phn cannot be written as others"),
        (letters._replace(token_type="bpe"), "its bpe.model is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            translation(tokens, LETTERS, str.split)
        assert translation(tokens, tokens.token_list, str.split)([3, 1]) == [3, 1]

"""tools/embedding_picture.py: from recordings to a picture, and its number by hand."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("picture", ROOT / "tools/embedding_picture.py")
picture = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(picture)


def test_the_nearest_of_another_utterance_counts():
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    names, utterance = np.array([*"aabbb"]), np.array([0, 0, 1, 1, 2])
    # The nearest of dots 0 to 4: 2 (not 1, of its own), 2, 0, 4, 3.
    assert picture.nearest_is_alike(z, names, utterance) == pytest.approx(2 / 5)


@pytest.fixture
def drawn(tmp_path, capsys):
    import soundfile

    from test.bridge.models import WORDS, model_folder

    rng, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    lines = {"wav.scp": [], "text": []}
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(6000), 8000)
        lines["wav.scp"].append(f"u{i} {tmp_path / f'{i}.wav'}")
        lines["text"].append(f"u{i} {' '.join(rng.choice(list('ABC'), 3))}")
    for name, rows in lines.items():
        (data / name).write_text("".join(f"{row}\n" for row in rows))
    one = model_folder(tmp_path / "one", "ctc", WORDS)
    other = model_folder(tmp_path / "other", "transducer", WORDS, seed=2)
    argv = ["--data", str(data), "--align", str(one), "--output", str(tmp_path / "a.png")]
    picture.main([*argv, "--model", f"a model={one}", "--model", f"b={other}"])
    tokens = sum(len([*itertools.groupby(row.split()[1:])]) for row in lines["text"])
    return tmp_path / "a.png", tokens, capsys.readouterr().out


def test_from_recordings_to_a_picture(drawn):
    file, tokens, printed = drawn
    assert file.read_bytes()[:4] == b"\x89PNG"
    for name in ("a model", "b"):
        assert f"{name}: {tokens} tokens, the nearest is alike for " in printed

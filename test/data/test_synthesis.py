"""data/synthesis: a function of its arguments, at the rate, noise and reverberation asked for."""

import builtins

import numpy as np
import pytest

from espnet_pl.data import synthesis
from espnet_pl.data.synthesis import Room, Voice

RATE = 8000


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def engine():
    pytest.importorskip("espeakng_loader")


def spectral_centre(samples, rate=RATE):
    power = np.abs(np.fft.rfft(samples)) ** 2
    return np.sum(np.fft.rfftfreq(len(samples), 1 / rate) * power) / np.sum(power)


def test_sentences_have_words_of_the_closed_classes_only(rng):
    sentences = [synthesis.random_sentence(rng) for _ in range(3000)]
    words = {word for sentence in sentences for word in sentence}
    assert words == synthesis.CLOSED_CLASSES
    assert len({" ".join(s) for s in sentences}) > 2400
    assert max(map(len, sentences)) <= 12


def test_days_exist(rng):
    days = {" ".join(synthesis._day(rng)) for _ in range(2000)}
    assert len(days) == 31
    assert {"FIRST", "TWENTIETH", "TWENTY FIRST", "THIRTIETH", "THIRTY FIRST"} <= days


def test_speech_is_a_function_of_its_arguments(engine):
    def say(text, variant):
        voice = Voice("en-us", variant)
        return synthesis.speak(text.split(), voice, RATE, np.random.default_rng(0))

    first = say("ENTER A B SIX", "m1")
    say("HELP", "f2")  # the engine has a memory, `speak` has none
    np.testing.assert_array_equal(say("ENTER A B SIX", "m1"), first)
    assert len(first) != len(say("ENTER A B SIX", "f2"))


@pytest.mark.parametrize("accent", synthesis.ACCENTS)
def test_every_accent_speaks(engine, rng, accent):
    assert len(synthesis.speak(["YES"], Voice(accent, "f1"), RATE, rng)) > 0.3 * RATE


def test_every_variant_is_known(engine, rng):
    for variant in synthesis.VARIANTS:
        speech = synthesis.speak(["GO"], Voice("en-us", variant), RATE, rng)
        assert np.sqrt(np.mean(speech**2)) > 0.005, variant


def test_rate_and_tempo_are_those_asked_for(engine):
    def seconds(rate=RATE, speed=150, warp=1.0, text="ONE FIVE TWO ONE SEVEN"):
        voice = Voice("en-us", "m1", speed=speed, warp=warp)
        rng = np.random.default_rng(0)
        return len(synthesis.speak(text.split(), voice, rate, rng)) / rate

    assert seconds(16000) == pytest.approx(seconds(8000), abs=0.01)
    assert seconds(speed=200) < 0.85 * seconds(speed=150)
    # Warping moves frequencies, not the tempo.
    assert seconds(warp=1.2) == pytest.approx(seconds(warp=0.85), rel=0.1)
    # People take 0.3 to 0.6 s for a spelled letter; the engine alone takes 0.2 s.
    assert 0.3 < seconds(text="H I N I C H") / 6 < 0.6


def test_warp_moves_the_spectrum(engine, rng):
    low, high = (
        synthesis.speak("SIX A SEVEN".split(), Voice("en-us", "m1", warp=w), RATE, rng)
        for w in (0.85, 1.2)
    )
    assert spectral_centre(high) > 1.1 * spectral_centre(low)


def test_the_article_and_the_letters_are_told_apart():
    groups = synthesis._groups("A Z ONE AND A HALF RUBOUT A".split())
    assert groups == [("eigh zee", True), ("one and a half rub out", False), ("eigh", True)]


def test_an_unknown_voice_is_refused(engine, rng):
    with pytest.raises(ValueError, match="no voice 'xx-none"):
        synthesis.speak(["YES"], Voice("xx-none", "m1"), RATE, rng)


def test_a_long_path_to_the_engine_works(engine, rng, tmp_path, monkeypatch):
    import espeakng_loader

    folder = tmp_path / ("x" * 120) / ("y" * 60)
    folder.parent.mkdir()
    folder.symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(folder))
    monkeypatch.setattr(synthesis.tempfile, "gettempdir", lambda: str(tmp_path))
    assert len(str(folder)) > 160
    assert len(synthesis.speak(["YES"], Voice("en-us", "m1"), RATE, rng))


def test_a_missing_engine_comes_with_its_remedy(rng, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ModuleNotFoundError, match="pip install espeakng-loader"):
        synthesis.speak(["YES"], Voice("en-us", "m1"), RATE, rng)


@pytest.mark.parametrize("snr", [0, 5, 20, 40])
@pytest.mark.parametrize("slope", [0, -3, -6])
def test_noise_has_the_level_asked_for(rng, snr, slope):
    speech = np.sin(np.arange(3 * RATE) / 3) * np.linspace(0, 1, 3 * RATE)
    noise = synthesis.add_noise(speech, snr, slope, RATE, rng) - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(snr, abs=1e-6)


@pytest.mark.parametrize("slope", [-6, -3, 0, 3])
def test_noise_has_the_slope_asked_for(rng, slope):
    samples = synthesis.shape_spectrum(rng.standard_normal(1 << 18), slope, RATE)
    power, f = np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(1 << 18, 1 / RATE)
    bands = [np.mean(power[(f >= low) & (f < 1.1 * low)]) for low in (250, 2000)]
    assert 10 * np.log10(bands[1] / bands[0]) / 3 == pytest.approx(slope, abs=0.3)


@pytest.mark.parametrize("t60", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("distance", [-10, 0])
def test_reverberation_decays_in_the_time_asked_for(rng, t60, distance):
    response = synthesis.impulse_response(t60, distance, RATE, rng)
    assert response[0] == 1
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(distance, abs=1e-6)
    # Schroeder's backward integral, from -5 to -25 dB (T20), as rooms are measured.
    energy = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1])
    energy -= energy[0]
    fit = (energy < -5) & (energy > -25)
    slope = np.polyfit(np.flatnonzero(fit) / RATE, energy[fit], 1)[0]
    assert -60 / slope == pytest.approx(t60, rel=0.15)


def test_recording_keeps_length_and_level_and_does_not_clip(rng):
    speech = np.sin(np.arange(RATE) / 5) * 0.3
    quiet = synthesis.record(speech, Room(t60=0.3, snr=20, level=-30), RATE, rng)
    assert quiet.shape == speech.shape
    assert 20 * np.log10(np.sqrt(np.mean(quiet**2))) == pytest.approx(-30, abs=1e-6)
    loud = synthesis.record(speech, Room(level=6), RATE, rng)
    assert np.abs(loud).max() == pytest.approx(0.95)


def test_without_anything_in_the_way_the_room_only_scales(rng):
    speech = np.sin(np.arange(RATE) / 5) * 0.3
    heard = synthesis.record(speech, Room(snr=300), RATE, rng)
    np.testing.assert_allclose(heard / heard[1], speech / speech[1], atol=1e-9)

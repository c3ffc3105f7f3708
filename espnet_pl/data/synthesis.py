"""Generated speech: short spoken strings, said by eSpeak NG with many voices in many rooms.

Three pieces that know nothing of each other: what is said (`random_sentence`), who says it
(`Voice`, `speak`) and where it is recorded (`Room`, `record`).  Everything is a pure function of
its arguments; randomness comes in as a ``numpy.random.Generator``.

Samples are float arrays of shape [n] in [-1, 1]; times are in seconds, levels in decibels.

Generated speech shows that a pipeline works.  It says little about real speech: within one voice
a phone sounds nearly the same each time, and variants of one voice are not independent speakers.
"""

import ctypes
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.signal import fftconvolve, resample_poly

# --- what is said -------------------------------------------------------------------------------

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
TEENS = (
    *("TEN", "ELEVEN", "TWELVE", "THIRTEEN", "FOURTEEN"),
    *("FIFTEEN", "SIXTEEN", "SEVENTEEN", "EIGHTEEN", "NINETEEN"),
)
TENS = ("TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY")
MONTHS = (
    *("JANUARY", "FEBRUARY", "MARCH", "APRIL", "MAY", "JUNE"),
    *("JULY", "AUGUST", "SEPTEMBER", "OCTOBER", "NOVEMBER", "DECEMBER"),
)
ORDINALS = (
    *("FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH", "SIXTH", "SEVENTH", "EIGHTH", "NINTH"),
    *("TENTH", "ELEVENTH", "TWELFTH", "THIRTEENTH", "FOURTEENTH", "FIFTEENTH", "SIXTEENTH"),
    *("SEVENTEENTH", "EIGHTEENTH", "NINETEENTH", "TWENTIETH", "THIRTIETH"),
)
ALONE = ("YES", "NO", "GO", "HELP", "START", "STOP", "REPEAT")
BEFORE = ("ENTER", "ERASE", "RUBOUT")
CLOSED_CLASSES = frozenset(
    (*LETTERS, *DIGITS, *TEENS, *TENS, *MONTHS, *ORDINALS, *ALONE, *BEFORE)
) | {"OH", "HUNDRED", "THOUSAND", "AND", "HALF"}


def random_sentence(rng: np.random.Generator, spelling: float = 0.5) -> list[str]:
    """One string of the alphanumeric grammar, as upper-case words.

    Args:
        spelling: share of names, addresses, telephone numbers and dates; the rest are control
            words and arbitrary strings of letters and numbers.
    """
    pick = rng.random()
    if rng.random() >= spelling:
        if pick < 0.12:
            return [_one(rng, ALONE)]
        command = [_one(rng, BEFORE)] if pick < 0.6 else []
        letters = [_one(rng, LETTERS) for _ in range(rng.integers(0 if command else 1, 6))]
        return command + letters + _number(rng)
    if pick < 0.45:
        return list(_name(rng))
    if pick < 0.6:
        return [_digit(rng) for _ in range(_one(rng, (5, 7)))]
    if pick < 0.8:
        half = ["AND", "A", "HALF"] if rng.random() < 0.05 else []
        return _number(rng) + half
    year = ["NINETEEN", *_pair(rng)] if rng.random() < 0.8 else []
    return [_one(rng, MONTHS), *_day(rng), *year]


def _one(rng, items):
    return items[rng.integers(len(items))]


def _digit(rng):
    # People read a zero inside a number as OH about as often as ZERO.
    digit = _one(rng, DIGITS)
    return "OH" if digit == "ZERO" and rng.random() < 0.5 else digit


def _pair(rng):
    """10 to 99, and OH FIVE."""
    number = rng.integers(5, 100)
    if number < 10:
        return ["OH", DIGITS[number]]
    if number < 20:
        return [TEENS[number - 10]]
    tens, unit = divmod(number, 10)
    return [TENS[tens - 2], *([DIGITS[unit]] if unit else [])]


def _number(rng):
    kind = rng.integers(16)
    if kind < 2:
        return [_one(rng, DIGITS)]
    if kind < 5:
        return _pair(rng)
    if kind < 8:
        return [DIGITS[rng.integers(1, 10)], *_pair(rng)]
    if kind < 11:
        return [*_pair(rng), *_pair(rng)]
    if kind == 11:
        return [DIGITS[rng.integers(1, 10)], _one(rng, ("HUNDRED", "THOUSAND"))]
    return [_digit(rng) for _ in range(rng.integers(2, 5))]


def _day(rng):
    day = int(rng.integers(1, 32))
    if day <= 20:
        return [ORDINALS[day - 1]]
    if day == 30:
        return ["THIRTIETH"]
    return ["TWENTY" if day < 30 else "THIRTY", ORDINALS[day % 10 - 1]]


def _name(rng):
    """A name to spell, of 4 to 10 letters, with about the letter statistics of surnames."""
    onsets = "B BR C CH CL CR D DR F FR G GR H J K KR L M N P PH QU R S SCH SH ST T TH TR V W Z"
    codas = " CK D FF L LL LD M N N NG NN NT R R RD RS S S SS ST T TT TZ X Y"
    name = ""
    for _ in range(rng.integers(2, 4)):  # one syllable is too often a rude word
        vowel = _one(rng, ("A", "A", "E", "E", "E", "I", "I", "O", "O", "U", "EA", "IE", "OO"))
        name += _one(rng, onsets.split()) + vowel + _one(rng, codas.split(" "))
    return name[:10]


# --- who says it --------------------------------------------------------------------------------

ENGINE_RATE = 22050

ACCENTS = (
    *("en-us", "en-us-nyc", "en-029", "en-gb-scotland"),
    *("en-gb-x-rp", "en-gb-x-gbcwmd", "en-gb-x-gbclan"),
)
# The engine's voice variants that resemble people; robots and whispers are left out.
VARIANTS = tuple(
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario "
    "Michael Mike Nguyen Reed adam anika antonio aunty belinda benjamin boris caleb david ed "
    "edward edward2 f1 f2 f3 f4 f5 gustave ian iven iven2 iven3 iven4 john kaukovalta klatt "
    "klatt2 klatt3 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel mike2 norbert pablo "
    "paul pedro quincy rob robert sandro shelby steph steph2 steph3 travis victor zac".split()
)


@dataclass(frozen=True)
class Voice:
    """A generated speaker.

    Attributes:
        accent, variant: the engine's names, of `ACCENTS` and `VARIANTS`.
        pitch: the engine's scale, 0 to 99.
        speed: words per minute; people read strings at about 130.
        pause: between groups of words, in seconds; each pause varies by half.
        warp: factor on all frequencies (formants and pitch), as from a shorter vocal tract.
    """

    accent: str
    variant: str
    pitch: int = 50
    speed: int = 150
    pause: float = 0.1
    warp: float = 1.0

    @property
    def name(self) -> str:
        """The name by which eSpeak knows accent and variant."""
        return f"{self.accent}+{self.variant}"


def speak(words: Sequence[str], voice: Voice, rate: int, rng: np.random.Generator) -> np.ndarray:
    """The words in that voice, with a short silence around them; shape [n] at ``rate`` Hz.

    Raises:
        ModuleNotFoundError: the engine is not installed.
        ValueError: the engine does not know the voice, or has nothing to say.
    """
    # A warped voice is made by playing faster or slower; the engine makes up for the tempo.
    speed = voice.speed / voice.warp
    pieces = [np.zeros(round(0.1 * ENGINE_RATE))]
    seed = zlib.crc32(" ".join((voice.name, *words)).encode())
    with _Engine(voice, seed) as engine:
        for text, is_spelling in _groups(words):
            # Left alone the engine says a letter in 0.2 s; people take twice that.
            pieces.append(engine.say(text, speed * (0.8 if is_spelling else 1), 4 * is_spelling))
            pause = voice.pause * voice.warp * rng.uniform(0.5, 1.5)
            pieces.append(np.zeros(round(pause * ENGINE_RATE)))
    speech = np.concatenate([*pieces[:-1], pieces[0]])
    step = Fraction(rate / (ENGINE_RATE * voice.warp)).limit_denominator(500)
    return resample_poly(speech, step.numerator, step.denominator)


def _groups(words):
    """(text for the engine, is it spelled?) for each run of letters and each run of words."""
    groups: list[tuple[list[str], bool]] = []
    for index, word in enumerate(words):
        is_article = word == "A" and words[index + 1 : index + 2] == ["HALF"]
        is_letter = len(word) == 1 and not is_article
        # The engine reads a lone A as an article, Z as 'zed' in British voices and RUBOUT as one
        # word with a long U.
        spoken = {"A": "eigh", "Z": "zee", "RUBOUT": "rub out"}.get(word, word.lower())
        if not groups or groups[-1][1] != is_letter:
            groups.append(([], is_letter))
        groups[-1][0].append("a" if is_article else spoken)
    return [(" ".join(group), is_letter) for group, is_letter in groups]


class _Engine:
    """eSpeak NG for one utterance.

    The library keeps state (random numbers, flutter, noise phase) that no call resets, so an
    utterance would depend on those before it; loading it afresh costs 3 ms and makes it a
    function of its arguments.
    """

    _callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

    def __init__(self, voice: Voice, seed: int):
        self._voice, self._seed, self._heard = voice, seed, []
        self._callback = self._callback_type(self._hear)

    def _hear(self, samples, count, _events):
        if samples and count > 0:
            self._heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    def __enter__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ModuleNotFoundError(
                "generated speech needs the speech synthesiser eSpeak NG: "
                "python -m pip install espeakng-loader"
            ) from error
        self._library = library = ctypes.CDLL(espeakng_loader.get_library_path())
        retrieval, do_not_exit = 2, 0x8000
        data = _short_path(espeakng_loader.get_data_path()).encode()
        if library.espeak_Initialize(retrieval, 0, data, do_not_exit) != ENGINE_RATE:
            raise RuntimeError(f"eSpeak NG does not start with its data in {data.decode()}")
        library.espeak_SetSynthCallback(self._callback)
        library.espeak_ng_SetRandSeed(ctypes.c_long(self._seed))
        if library.espeak_SetVoiceByName(self._voice.name.encode()) != 0:
            raise ValueError(f"eSpeak NG knows no voice {self._voice.name!r}")
        return self

    def __exit__(self, *_):
        import _ctypes

        self._library.espeak_Terminate()
        handle, self._library = self._library._handle, None
        if hasattr(_ctypes, "dlclose"):
            _ctypes.dlclose(handle)

    def say(self, text: str, speed: float, gap: int) -> np.ndarray:
        """Samples [n] at 22050 Hz without the silence around them; ``gap`` in 10 ms units."""
        speed_id, pitch_id, gap_id = 1, 3, 7
        library, data = self._library, text.encode()
        library.espeak_SetParameter(speed_id, min(max(round(speed), 80), 400), 0)
        library.espeak_SetParameter(pitch_id, self._voice.pitch, 0)
        library.espeak_SetParameter(gap_id, gap, 0)
        self._heard.clear()
        size, by_character, utf8 = ctypes.c_size_t(len(data) + 1), 1, 1
        library.espeak_Synth(data, size, 0, by_character, 0, utf8, None, None)
        samples = np.frombuffer(b"".join(self._heard), dtype=np.int16) / 32768
        loud = np.flatnonzero(np.abs(samples) > 1e-3)
        if not len(loud):
            raise ValueError(f"eSpeak NG says nothing for {text!r} as {self._voice.name}")
        return samples[loud[0] : loud[-1] + 1]


def _short_path(path: str) -> str:
    """The path, or a link to it where the engine's buffer of 160 bytes is too small."""
    if len(path.encode()) < 140:
        return path
    name = f"espeak-ng-data-{os.getuid()}-{zlib.crc32(path.encode()):08x}"
    link = os.path.join(tempfile.gettempdir(), name)
    if not os.path.islink(link) or os.readlink(link) != path:
        temporary = f"{link}.{os.getpid()}"
        os.symlink(path, temporary)
        os.replace(temporary, link)
    return link


# --- where it is recorded -----------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What lies between mouth and file.

    Attributes:
        t60: reverberation time; 0 is none.
        distance: energy of the reverberation relative to the direct sound, in dB.
        snr: signal to noise ratio.
        noise_slope: of the noise spectrum, dB per octave; 0 is white, -6 brown.
        tilt: of the speech spectrum, dB per octave; microphones close to the mouth are darker.
        level: root mean square of the result, dB below full scale; lowered where it would clip.
    """

    t60: float = 0.0
    distance: float = -6.0
    snr: float = 40.0
    noise_slope: float = -3.0
    tilt: float = 0.0
    level: float = -26.0


def record(speech: np.ndarray, room: Room, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Speech [n] as heard in the room: tilt, then reverberation, then noise; shape [n]."""
    heard = shape_spectrum(speech, room.tilt, rate)
    if room.t60 > 0:
        heard = reverberate(heard, impulse_response(room.t60, room.distance, rate, rng))
    heard = add_noise(heard, room.snr, room.noise_slope, rate, rng)
    gain = 10 ** (room.level / 20) / np.sqrt(np.mean(heard**2))
    return heard * min(gain, 0.95 / np.abs(heard).max())


def impulse_response(t60: float, distance: float, rate: int, rng: np.random.Generator):
    """A direct impulse and exponentially decaying noise, shape [t60 · rate].

    Source: J. D. Polack's stochastic model of the room impulse response; the amplitude falls as
    exp(-3 ln(10) · t / T60), so the energy falls by 60 dB in ``t60``.  ``distance`` is the energy
    of the tail relative to the impulse, in dB.
    """
    time = np.arange(1, max(round(t60 * rate), 2)) / rate
    tail = rng.standard_normal(len(time)) * np.exp(-3 * np.log(10) * time / t60)
    tail *= 10 ** (distance / 20) / np.sqrt(np.sum(tail**2))
    return np.concatenate([[1.0], tail])


def reverberate(speech: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Speech [n] convolved with the response, cut to [n]."""
    return fftconvolve(speech, response)[: len(speech)]


def add_noise(speech: np.ndarray, snr: float, slope: float, rate: int, rng) -> np.ndarray:
    """Speech [n] plus stationary noise, ``snr`` dB below it in mean power over the utterance."""
    noise = shape_spectrum(rng.standard_normal(len(speech)), slope, rate)
    power = np.mean(speech**2) / np.mean(noise**2)
    return speech + noise * np.sqrt(power) * 10 ** (-snr / 20)


def shape_spectrum(samples: np.ndarray, slope: float, rate: int) -> np.ndarray:
    """Samples [n] with their spectrum tilted by ``slope`` dB per octave, 0 dB at 1 kHz."""
    if not slope:
        return samples
    # Below 60 Hz there is no speech, and a steep slope would spend all its energy there.
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(samples), 1 / rate), 60.0) / 1000.0)
    spectrum = np.fft.rfft(samples) * 10 ** (slope * octaves / 20)
    return np.fft.irfft(spectrum, n=len(samples))

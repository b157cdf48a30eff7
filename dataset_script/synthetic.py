"""
The embedded corpus: synthetic voices, and synthetic listeners who vote.

It shows that the software works, end to end and offline, and says nothing about people. Affect (four numbers per
utterance) drives a small source-filter voice: speaking rate, pitch height, its course over the utterance, voice
quality, pauses. It also drives how likely a listener is to perceive each emotion; a finite panel votes, and the share
is votes over listeners. Speakers, "languages", microphones and levels vary and mean nothing. Most shares are low, as
in the paper's Figure 2.
"""

import csv
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from filelock import FileLock
from scipy.signal import istft, stft
from scipy.stats import spearmanr

from ..fields_emoshare import EMOTIONS
from .labels import read_folder
from .tables import FILENAME, SPLITS
from .whole_files import put_in_place, work_folder, writing

SAMPLING_RATE = 16000
MIN_SECONDS, MAX_SECONDS = 1.0, 8.0
FRAME = 512  # STFT window of the vocal tract filter, in samples

# How likely an emotion is perceived (logit), by affect: columns are activation, rise, effort, deliberateness.
AFFECT_TO_EMOTION = np.array(
    [
        [1.0, -0.9, 1.1, -0.2],  # Anger
        [-0.9, -0.5, -0.3, -0.9],  # Boredom
        [-0.8, 0.7, -0.7, 0.4],  # Calmness
        [-0.2, -0.1, 0.4, 1.3],  # Concentration
        [0.5, 0.4, 0.9, 0.9],  # Determination
        [1.2, 0.9, 0.3, -0.6],  # Excitement
        [0.5, 1.2, -0.3, 0.4],  # Interest
        [-0.7, -1.2, -0.4, 0.1],  # Sadness
        [-1.1, -0.6, -0.8, -0.4],  # Tiredness
    ]
)
MEAN_LOGIT = -2.2
LISTENERS = (12, 24)  # fewest and most in a panel

# Formants F1 to F3 in Hz of each "language"'s vowels, its syllables per second, and how unequal they are.
LANGUAGES = (
    (((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480)), 4.5, 0.15),
    (((660, 1200, 2550), (400, 2000, 2550), (440, 1020, 2240), (500, 1500, 2500), (310, 1700, 2200)), 5.0, 0.35),
    (((850, 1610, 2900), (310, 2790, 3300), (370, 950, 2670)), 5.4, 0.08),
)


@dataclass
class Speaker:
    language: int
    pitch: float  # Hz
    tract: float  # formant scale, about 1
    breath: float  # fraction of noise in the source
    tilt: float  # dB per octave


@dataclass
class Utterance:
    filename: str
    speaker: Speaker
    affect: np.ndarray  # (4,): activation, rise, effort, deliberateness; standard normal
    seconds: float
    probabilities: np.ndarray  # (9,): that one listener perceives the emotion
    shares: np.ndarray  # (9,): votes over listeners
    seed: int  # of everything in the sound that says nothing about the shares


@dataclass
class SyntheticCorpus:
    """
    Args:
        train, devel, test: utterances per split.
        train_speakers, other_speakers: speakers of `train`, and of each other split; no speaker is in two splits.
        seed: everything follows from it.
    """

    train: int = 1000
    devel: int = 300
    test: int = 300
    train_speakers: int = 40
    other_speakers: int = 15
    seed: int = 0

    def utterances(self, split):
        """Draws the utterances of a split, without their sound."""
        index = SPLITS.index(split)
        rng = np.random.default_rng([self.seed, index])
        count = self.train_speakers if split == "train" else self.other_speakers
        speakers = [_draw_speaker(rng) for _ in range(count)]
        return [_draw_utterance(rng, f"{split}_{number:05d}.wav", speakers) for number in range(getattr(self, split))]

    def noise_ceiling(self, split):
        """
        The best score that a model can be expected to reach: the mean over emotions of Spearman's ρ between the true
        vote probabilities and the drawn shares. The votes of a finite panel scatter, so it is below 1.
        """
        utterances = self.utterances(split)
        probabilities = np.array([utterance.probabilities for utterance in utterances])
        shares = np.array([utterance.shares for utterance in utterances])
        return float(np.mean([spearmanr(probabilities[:, e], shares[:, e]).statistic for e in range(len(EMOTIONS))]))

    def load(self, info, data_dir, cache_dir):
        """`CorpusInfo.loader` of the synthetic corpus; there is no `data_dir`."""
        return read_folder(self.build(cache_dir), info.labels)

    def build(self, cache_dir):
        """Writes the corpus under `cache_dir`, in the ComParE 2023 layout, unless it is there; returns its folder."""
        source = Path(__file__).read_bytes()
        folder = Path(cache_dir).expanduser() / "emoshare_synthetic" / Hasher.hash((self, source))
        if folder.is_dir():  # asked here already, because there is no lock in a cache that may only be read
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process that makes it is waited for
            if folder.is_dir():
                return folder
            with work_folder(folder.with_name(f"unfinished-{folder.name}")) as place, writing(folder):
                unfinished = place / "corpus"
                (unfinished / "wav").mkdir(parents=True)
                (unfinished / "lab").mkdir()
                for split in SPLITS:
                    self._write_split(unfinished, split)
                put_in_place(unfinished, folder)
        return folder

    def _write_split(self, folder, split):
        utterances = self.utterances(split)
        for utterance in tqdm(utterances, desc=f"Synthesising {split} clips", unit=" clips"):
            content = BytesIO()  # soundfile does not say that a disk is full
            soundfile.write(content, synthesize(utterance), SAMPLING_RATE, "PCM_16", format="WAV")
            (folder / "wav" / utterance.filename).write_bytes(content.getbuffer())
        with (folder / "lab" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([FILENAME, *EMOTIONS])
            for utterance in utterances:
                writer.writerow([utterance.filename, *(f"{share:.4f}" for share in utterance.shares)])


def _draw_speaker(rng):
    return Speaker(
        language=int(rng.integers(len(LANGUAGES))),
        pitch=float(rng.choice([115, 205]) * np.exp(rng.normal(0, 0.12))),
        tract=float(np.exp(rng.normal(0, 0.08))),
        breath=float(rng.uniform(0.05, 0.3)),
        tilt=float(rng.normal(-6, 1.5)),
    )


def _draw_utterance(rng, filename, speakers):
    affect = rng.standard_normal(4)
    probabilities = 1 / (1 + np.exp(-(AFFECT_TO_EMOTION @ affect + MEAN_LOGIT)))
    listeners = rng.integers(LISTENERS[0], LISTENERS[1] + 1)
    return Utterance(
        filename=filename,
        speaker=speakers[rng.integers(len(speakers))],
        affect=affect,
        seconds=float(MIN_SECONDS + (MAX_SECONDS - MIN_SECONDS) * rng.beta(1.3, 4.0)),
        probabilities=probabilities,
        shares=rng.binomial(listeners, probabilities) / listeners,
        seed=int(rng.integers(2**32)),
    )


def synthesize(utterance):
    """
    Source-filter synthesis of an utterance.

    Returns:
        `np.ndarray`: (samples,) float32 in [-1, 1], 16 kHz.
    """
    rng = np.random.default_rng(utterance.seed)
    activation, rise, effort, deliberateness = utterance.affect
    speaker = utterance.speaker
    num_samples = round(utterance.seconds * SAMPLING_RATE)
    progress = np.linspace(-0.5, 0.5, num_samples)

    syllables = _syllables(rng, speaker, utterance.seconds, activation, deliberateness)
    loudness, accent, vowel = _syllable_tracks(rng, syllables, num_samples, speaker.language, activation)

    # Semitones: the course over the utterance rises or falls with affect, whatever its height.
    semitones = 2.5 * activation + 8.0 * rise * progress + np.exp(0.5 + 0.4 * activation) * accent + rng.normal(0, 1)
    jitter = np.exp((0.004 + 0.004 * max(effort, 0)) * rng.standard_normal(num_samples))
    phase = np.cumsum(speaker.pitch * 2 ** (semitones / 12) * jitter / SAMPLING_RATE) % 1.0
    breath = np.clip(speaker.breath * np.exp(-0.8 * effort), 0.01, 0.7)
    source = (1 - breath) * _glottal_pulses(phase) + breath * 0.3 * rng.standard_normal(num_samples)
    source = source * loudness * 10 ** (10.0 * rise * progress / 20)

    tilt = speaker.tilt + 2.5 * effort + 1.5 * activation + rng.normal(0, 1)
    voice = _vocal_tract(source, vowel, speaker, tilt, microphone=rng.normal(0, 2, size=6))
    voice /= np.sqrt(np.mean(voice**2)) + 1e-9
    noise = np.cumsum(rng.standard_normal(num_samples))
    noise -= np.linspace(noise[0], noise[-1], num_samples)
    noise = 0.5 * noise / (noise.std() + 1e-9) + 0.5 * rng.standard_normal(num_samples)
    voice += noise * 10 ** (-rng.uniform(20, 40) / 20)
    level = min(10 ** (rng.uniform(-32, -20) / 20), 0.99 / np.abs(voice).max())
    return (level * voice).astype(np.float32)


def _syllables(rng, speaker, seconds, activation, deliberateness):
    """
    Start and end of each syllable in seconds. Activation makes syllables faster; deliberateness makes them more even,
    and puts pauses between them.
    """
    _, rate, unevenness = LANGUAGES[speaker.language]
    rate = rate * np.exp(0.35 * activation + rng.normal(0, 0.05))
    syllables, now = [], rng.uniform(0, 0.1)
    while now < seconds:
        length = np.exp(rng.normal(0, unevenness + 0.15 * np.exp(-0.8 * deliberateness))) / rate
        syllables.append((now, min(now + length, seconds)))
        now += length
        if rng.random() < min(0.12 * np.exp(1.1 * deliberateness), 0.7):
            now += rng.uniform(0.1, 0.3)
    return syllables


def _syllable_tracks(rng, syllables, num_samples, language, activation):
    """Per sample: loudness in [0, 1], pitch accent in [-1, 1], and the formants (samples, 3) in Hz."""
    sharpness = np.exp(0.6 * activation)  # the syllables of an active speaker begin sharply
    vowels = np.array(LANGUAGES[language][0], dtype=float)
    loudness, accent = np.zeros(num_samples), np.zeros(num_samples)
    times, targets = [], []
    for start, end in syllables:
        first, last = round(start * SAMPLING_RATE), min(round(end * SAMPLING_RATE), num_samples)
        bump = np.sin(np.pi * np.linspace(0, 1, max(last - first, 0)) ** (1 / (1 + sharpness))) ** 0.7
        loudness[first:last] = rng.uniform(0.2, 1.0) ** (0.6 * sharpness) * bump
        accent[first:last] = rng.uniform(-1, 1) * bump
        times.append((start + end) / 2 * SAMPLING_RATE)
        targets.append(vowels[rng.integers(len(vowels))])
    targets = np.array(targets) * [np.exp(0.12 * activation), 1.0, 1.0]  # an active speaker opens the mouth wider
    samples = np.arange(num_samples)
    return loudness, accent, np.stack([np.interp(samples, times, formant) for formant in targets.T], axis=1)


def _glottal_pulses(phase):
    """Derivative of a Rosenberg pulse: a slow opening, a sharp closing, a closed phase."""
    opening, closing = 0.45, 0.62
    flow_rate = np.where(phase < opening, np.sin(np.pi * phase / opening), 0.0)
    is_closing = (phase >= opening) & (phase < closing)
    return np.where(is_closing, -2.5 * np.sin(np.pi / 2 * (phase - opening) / (closing - opening)), flow_rate)


def _vocal_tract(source, formants, speaker, tilt, microphone):
    """Shapes the source, frame by frame in the frequency domain, by formants, spectral tilt and microphone."""
    frequencies, times, spectrum = stft(source, SAMPLING_RATE, nperseg=FRAME, noverlap=FRAME * 3 // 4)
    frames = np.clip((times * SAMPLING_RATE).astype(int), 0, len(source) - 1)
    centres = speaker.tract * np.concatenate([formants[frames], np.full((len(frames), 1), 3500.0)], axis=1)
    widths = 60 + 0.05 * centres
    distance = (frequencies[:, None, None] - centres) / widths  # (frequencies, frames, formants)
    tract = np.sum(1 / np.sqrt(1 + distance**2) * np.array([1.0, 0.7, 0.4, 0.25]), axis=-1)
    octaves = np.log2(np.maximum(frequencies, 100) / 500)
    bands = np.linspace(0, SAMPLING_RATE / 2, len(microphone))
    decibels = (tilt + 6) * octaves + np.interp(frequencies, bands, microphone)
    spectrum = spectrum * tract * 10 ** (decibels / 20)[:, None]
    _, shaped = istft(spectrum, SAMPLING_RATE, nperseg=FRAME, noverlap=FRAME * 3 // 4)
    return shaped[: len(source)]

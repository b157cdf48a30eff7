"""Small real things to test on: WAV files, corpora, backbones with random weights, trained model folders."""

import csv
import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path

# Before any Hugging Face library is imported: nothing is read from or left in the user's caches, nothing is fetched.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="emoshare-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: tests run next to each other, one on each core.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script.synthetic import SyntheticCorpus, synthesize
from emoshare.training.precision import can_train_in_bfloat16

ROOT = Path(__file__).resolve().parent.parent

needs_bfloat16 = pytest.mark.skipif(
    not can_train_in_bfloat16(torch.device("cpu")), reason="this CPU cannot train in bfloat16"
)

SMALL_BACKBONE = {
    # oneDNN's bfloat16 convolution with 12 channels per group, which 24 would make, is wrong by more than its result.
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
SMALL_HEAD = {"conv_channels": (16, 8), "lstm_hidden_size": 12, "ffn_sizes": (8,)}
SMALL_HEAD_FLAGS = ["--conv_channels", "16", "8", "--lstm_hidden_size", "12", "--ffn_sizes", "8"]


def pytest_collection_modifyitems(items):
    """Runs files with many slow tests first: a test process takes whole files, and one that starts late runs alone."""
    slow_tests = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_tests[item.path])


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"])


def backbone_config(model_type="hubert", **fields):
    """A small backbone's config; layer norm in the style of HuBERT Large unless `fields` say otherwise."""
    if model_type == "data2vec-audio":
        fields = {"num_conv_pos_embeddings": 5, **fields}  # here the number of stacked convolutions, as published
    elif model_type == "whisper":
        fields = {"encoder_ffn_dim": 32, "decoder_layers": 1, "decoder_attention_heads": 2, **fields}
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        fields = {"vocab_size": 8, **tokens, **fields}
    else:
        fields = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, **fields}
    return AutoConfig.for_model(model_type, **{**SMALL_BACKBONE, **fields})


def speech(seconds, seed=0, sampling_rate=16000):
    """A synthetic utterance, (samples,) float32."""
    utterance = SyntheticCorpus(seed=seed, train=1).utterances("train")[0]
    utterance.seconds = seconds
    waveform = synthesize(utterance)
    if sampling_rate == 16000:
        return waveform
    times = np.arange(round(seconds * sampling_rate)) / sampling_rate
    return np.interp(times, np.arange(len(waveform)) / 16000, waveform).astype(np.float32)


def write_corpus(folder, sizes, labels=EMOTIONS, mixed_formats=False, seed=0, seconds=(0.4, 1.2)):
    """Writes a corpus of real WAV files in the ComParE 2023 layout."""
    rng = np.random.default_rng(seed)
    (folder / "wav").mkdir(parents=True)
    (folder / "lab").mkdir()
    formats = [(16000, 1), (22050, 2), (44100, 1), (48000, 2)] if mixed_formats else [(16000, 1)]
    for split, size in sizes.items():
        rows = []
        for number in range(size):
            sampling_rate, channels = formats[number % len(formats)]
            waveform = speech(rng.uniform(*seconds), seed=int(rng.integers(10**6)), sampling_rate=sampling_rate)
            stereo = np.stack([waveform, 0.5 * waveform], axis=1) if channels == 2 else waveform
            filename = f"{split}_{number:03d}.wav"
            soundfile.write(folder / "wav" / filename, stereo, sampling_rate)
            rows.append([filename, *(f"{share:.3f}" for share in rng.beta(0.6, 2.5, size=len(labels)))])
        write_csv(folder / "lab" / f"{split}.csv", ["filename", *labels], rows)
    return folder


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def run_python(*arguments, cwd, check=True, **environment):
    """Runs this interpreter in a process of its own; its output goes into the failure message."""
    return run_command(sys.executable, *arguments, cwd=cwd, check=check, **environment)


def run_command(*command, cwd, check=True, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} gave {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["emoshare.training.run", "emoshare.reproduction.run"])


def run_script(script, *arguments, cwd, check=True, **environment):
    """
    Runs a script in a process of its own that need not import torch and Transformers: it is forked from one that has.
    That takes seconds less than `run_python`, and is for what does not depend on how a run is launched.
    """
    command = [str(part) for part in (script, *arguments)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start_script(*command, cwd=cwd, stdout=stdout, stderr=stderr, **environment)
        process.join()
        output = []
        for file in (stdout, stderr):
            file.seek(0)
            output.append(file.read())
    if check and process.exitcode != 0:
        pytest.fail(f"{' '.join(command)} gave {process.exitcode}\n{output[0]}\n{output[1]}")
    return subprocess.CompletedProcess(command, process.exitcode, *output)


def start_script(script, *arguments, cwd, stdout, stderr, **environment):
    """As `run_script`, without waiting for its end; returns a `multiprocessing.Process`."""
    command = [str(part) for part in (script, *arguments)]
    files = DupFd(stdout.fileno()), DupFd(stderr.fileno())
    process = _forks.Process(target=_run_script, args=(command, cwd, environment, *files))
    process.start()
    return process


def _run_script(command, cwd, environment, stdout, stderr):
    os.dup2(stdout.detach(), 1)
    os.dup2(stderr.detach(), 2)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@contextmanager
def torch_threads(number):
    """Torch with this many intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_disk(size):
    """Ends each write in the middle, as a full disk does: no file gets larger than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Resets the number of threads that a run in this process sets, which would slow down later tests."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wav(tmp_path_factory):
    """A speech-like WAV file of 1.3 s, 16 kHz mono."""
    path = tmp_path_factory.mktemp("wav") / "clip.wav"
    soundfile.write(path, speech(1.3), 16000)
    return path


@pytest.fixture
def wav_not_in_utf_8(wav, tmp_path):
    """`wav` under a name that is not UTF-8, as `str`."""
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9.wav"))
    try:
        shutil.copy(wav, path)
    except OSError:
        pytest.skip("this file system has no such names")
    return path


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A small HuBERT with random weights, saved as a Hub repository is: it wants waveforms that are not normalised."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(1)
    AutoModel.from_config(backbone_config()).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, backbone_folder):
    """A complete model repository, untrained."""
    folder = tmp_path_factory.mktemp("repository") / "emo-share.model"
    torch.manual_seed(2)
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, **SMALL_HEAD)
    model.save_pretrained(folder)
    EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A corpus in the ComParE 2023 layout: WAV files of mixed length, sampling rate and channels."""
    return write_corpus(
        tmp_path_factory.mktemp("corpus") / "data", {"train": 12, "devel": 8, "test": 4}, mixed_formats=True
    )


def small_model(**fields):
    return EmoShareModel(EmoShareConfig(**{**SMALL_HEAD, **fields})).eval()

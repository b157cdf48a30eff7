"""
Load test of `emoshare serve`: 1,000 requests from 32 clients against the pipeline on the same clips, and bad uploads.

    python benchmarks/serve.py

Two models with random weights: one like the demo's acoustic model, and one of HuBERT Base's size. In each of several
rounds, the pipeline and the service take turns to predict the same clips of 1 to 8 s with the same batch size, so that
other load on the machine affects both. The pipeline reads files; the clients, in one process, send the same files. Then
come uploads that must be refused, and SIGTERM while clients wait. A clip's shares are "equal" if they are within 1e-5
of the pipeline's for the clip alone. Memory is the anonymous memory of the server's process (RssAnon) after the first
and the last round.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import soundfile
import torch
from corpus import voices
from machine import anonymous_memory, describe
from transformers import AutoConfig, pipeline

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel

BATCH_SIZE = 8
CLIENTS = 32
ROUNDS = 5
CLIPS = {"acoustic": 200, "HuBERT Base": 32}  # per round: 1,000 and 160 requests in total
DEMO_HEAD = {"conv_channels": (32, 32, 32), "pool_size": 4, "lstm_hidden_size": 32, "ffn_sizes": (32,)}
LIMITS = {"max_megabytes": 1, "max_seconds": 20, "upload_seconds": 2}
HERE = Path(__file__).parent


def main():
    torch.manual_seed(0)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print("| model | requests | lost | equal | service against pipeline | median wait | memory, first and last |")
        print("|---|---|---|---|---|---|---|")
        for name, num_clips in CLIPS.items():
            model, clips = folder / name, folder / f"clips of {name}"
            write_model(model, name)
            write_clips(clips, np.random.default_rng(0).uniform(1.0, 8.0, size=num_clips))
            compare(name, model, clips)
        with serving(folder / "acoustic", **LIMITS) as (server, url):
            print("\n| upload | answer |\n|---|---|")
            for kind, answer in refused(url, folder):
                print(f"| {kind} | {answer} |", flush=True)
            print_stop(server, url, folder / "clips of acoustic")


def write_model(folder, name):
    if name == "acoustic":
        config = EmoShareConfig(feature_size=40, **DEMO_HEAD)
        extractor = EmoShareFeatureExtractor(feature_type="mel", min_frames=config.pool_size)
    else:
        backbone = AutoConfig.for_model("hubert", mask_time_prob=0.0)
        config = EmoShareConfig(backbone_config=backbone, **DEMO_HEAD)
        extractor = EmoShareFeatureExtractor(min_frames=config.pool_size)
    EmoShareModel(config).save_pretrained(folder)
    extractor.save_pretrained(folder)


def write_clips(folder, seconds):
    folder.mkdir()
    for number, waveform in enumerate(voices(seconds)):
        soundfile.write(folder / f"{number:04d}.wav", waveform, 16000)


@contextmanager
def serving(model, **limits):
    """Runs `emoshare serve` in a process of its own; yields that process and the URL to post to."""
    flags = [f"--{name}={value}" for name, value in limits.items()]
    command = [sys.executable, "-m", "emoshare.cli", "serve", str(model), "--port=0", f"--batch_size={BATCH_SIZE}"]
    server = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        yield server, server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait()


def ask(url, clips, num_requests):
    """Returns the seconds that all requests took together, and the answers."""
    command = [sys.executable, HERE / "clients.py", url, clips, num_requests, CLIENTS]
    result = json.loads(subprocess.run(map(str, command), capture_output=True, text=True, check=True).stdout)
    return result["seconds"], result["answers"]


def compare(name, model, clips):
    emotion_share = pipeline("emotion-share", model=str(model))
    paths = sorted(map(str, clips.iterdir()))
    expected = {Path(path).name: emotion_share(path) for path in paths}
    ratios, answers, memory = [], [], []
    with serving(model) as (server, url):
        ask(url, clips, BATCH_SIZE)  # warm-up
        for _ in range(ROUNDS):
            began = time.perf_counter()
            emotion_share(paths, batch_size=BATCH_SIZE)
            of_pipeline = time.perf_counter() - began
            of_service, own = ask(url, clips, len(paths))
            ratios.append(of_pipeline / of_service)
            answers += own
            memory.append(anonymous_memory(server.pid) / 1e6)
    good = [answer for answer in answers if answer["status"] == 200]
    equal = sum(difference(answer["answer"], expected[answer["clip"]]) <= 1e-5 for answer in good)
    print(
        f"| {name} | {len(answers)} | {ROUNDS * len(paths) - len(good)} | {equal} | {np.median(ratios):.2f}x "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {np.median([answer['seconds'] for answer in good]):.2f} s | "
        f"{memory[0]:.0f} and {memory[-1]:.0f} MB |",
        flush=True,
    )


def difference(shares, expected):
    """The largest difference between shares, whatever their order."""
    expected = {share["label"]: share["score"] for share in expected}
    assert len(shares) == len(expected)
    return max(abs(share["score"] - expected[share["label"]]) for share in shares)


def refused(url, folder):
    """Yields each upload that the service must refuse, and its answer."""
    write_clips(folder / "long", [LIMITS["max_seconds"] + 5])
    (long,) = (folder / "long").iterdir()
    soundfile.write(folder / "silence.flac", np.zeros(3600 * 4000), 4000)
    megabytes = LIMITS["max_megabytes"] << 20
    yield f"a clip of {LIMITS['max_seconds'] + 5} s", post(url, long.read_bytes())
    yield "an hour of silence as FLAC", post(url, (folder / "silence.flac").read_bytes())
    yield "too many bytes, as its header says", post(url, bytes(megabytes + 1))
    yield "too many bytes, in chunks", post(url, iter([bytes(1000)] * (megabytes // 1000 + 2)))
    yield "no audio", post(url, b"no audio")
    yield "WAV, cut off", post(url, long.read_bytes()[:50000])
    yield "nothing", post(url, b"")
    yield "10 bytes a second", post(url, drip())


def post(url, content):
    server = urlsplit(url)
    connection = HTTPConnection(server.hostname, server.port)
    began = time.perf_counter()
    with suppress(ConnectionError):  # the server has answered, and then closed the connection
        connection.request("POST", server.path, content)
    response = connection.getresponse()
    return f"{response.status} after {time.perf_counter() - began:.1f} s: {json.loads(response.read())['detail']}"


def print_stop(server, url, clips):
    """Sends SIGTERM while clients wait: every request must be answered."""
    command = [sys.executable, HERE / "clients.py", url, clips, CLIENTS, CLIENTS]
    clients = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    while waiting(url) < CLIENTS / 4:
        assert clients.poll() is None, "the clients got their answers too soon"
    server.send_signal(signal.SIGTERM)
    answers = json.loads(clients.communicate()[0])["answers"]
    good = sum(answer["status"] == 200 for answer in answers)
    print(f"\nSIGTERM: {good} of {CLIENTS} requests answered; exit code {server.wait()}")


def waiting(url):
    """The number of clips that wait for their answer."""
    server = urlsplit(url)
    connection = HTTPConnection(server.hostname, server.port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith("emoshare_waiting_clips "))
    return float(line.split()[1])


def drip():
    yield b"RIFF"
    while True:
        time.sleep(1)
        yield bytes(10)


if __name__ == "__main__":
    main()

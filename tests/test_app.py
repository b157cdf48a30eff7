"""The demo in a real browser: app.py alone in a folder, as a Space has it, where this package cannot be imported."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from base64 import b64encode
from contextlib import contextmanager
from threading import Event, Thread

import altair
import gradio
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, small_model, speech
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from playwright.sync_api import expect, sync_playwright
from transformers import pipeline

from emoshare import EMOTIONS, EmoShareFeatureExtractor, EmotionSharePipeline, EmotionShareStream, app
from emoshare.dataset_script import Corpus
from emoshare.evaluation.card import model_card
from emoshare.evaluation.scores import MEAN, Score
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments

pytestmark = pytest.mark.slow

# As on a Space, the package cannot be imported. Also logs each host that the server tries to reach.
START = """
import runpy, sys
sys.modules["emoshare"] = None
sys.addaudithook(lambda event, args: event == "socket.getaddrinfo" and print("looked up:", args[0]))
runpy.run_path("app.py", run_name="__main__")
"""
CARD = """---
tags: [speech, synthetic]
---

# A model

## Results

These numbers show little.

## Limits

- It hears little.

## Licences

- Nobody's.
"""


@contextmanager
def serving(folder, model):
    """Starts `folder`/app.py in a process of its own; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"EMOSHARE_MODEL": str(model), "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "clips")}
    log = folder / "app.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-u", "-c", START],
            cwd=folder,
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 120
            while "Running on local URL" not in log.read_text():
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the demo did not start: {log.read_text()}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


@pytest.fixture(scope="module")
def space(tmp_path_factory, model_folder):
    """Folder and address of a running demo, with an example clip next to it."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copy(ROOT / "app.py", folder)
    (folder / "examples").mkdir()
    soundfile.write(folder / "examples" / "A voice.wav", speech(0.9, seed=3), 16000)
    model = shutil.copytree(model_folder, folder / "model")
    (model / "README.md").write_text(CARD)
    with serving(folder, model) as url:
        yield folder, url


@pytest.fixture(scope="module")
def launch():
    """Starts Debian's Chromium, without a window. What its microphone hears is a WAV file, again and again."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    microphone = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        yield lambda heard: playwright.chromium.launch(
            executable_path=executable, args=[*microphone, f"--use-file-for-fake-audio-capture={heard}"]
        )


@pytest.fixture(scope="module")
def browser(launch, wav):
    browser = launch(wav)
    yield browser
    browser.close()


@pytest.fixture
def page(browser, space):
    """The opened demo; checks at the end that it requested nothing from elsewhere."""
    _, url = space
    requested = []
    page = opened(browser, url, requested)
    yield page
    page.close()
    assert not [address for address in requested if not address.startswith((url, "blob:", "data:"))]


def opened(browser, url, requested):
    """The page, ready for a clip; the list `requested` gets the addresses of all its requests."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, permissions=["microphone"])
    page.on("request", lambda request: requested.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(url)
    page.get_by_text("its shares appear here").wait_for()
    return page


def upload(page, path):
    page.locator("#clip input[type=file]").set_input_files(path)


def shares_on(page):
    """What the bars tell a screen reader, once they are there: `{emotion: share}`."""
    bars = page.locator("#shares [aria-roledescription=bar]")
    expect(bars).to_have_count(9, timeout=60_000)
    labels = bars.evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))")
    rows = [dict(field.split(": ") for field in label.split("; ")) for label in labels]
    return {row["emotion"]: float(row["share of listeners"].rstrip("%")) / 100 for row in rows}


def shares_of(result):
    return {share["label"]: share["score"] for share in result}


def test_the_nine_shares_of_a_clip_are_the_pipelines(page, wav, emotion_share):
    upload(page, wav)
    expected = emotion_share(str(wav))
    assert shares_on(page) == pytest.approx(shares_of(expected), abs=1e-5)
    written = page.locator("#shares .mark-text.role-mark text").all_text_contents()
    assert written == [f"{share['score']:.1%}" for share in expected]
    assert page.locator("#waveform .mark-area path").count() == 1
    cells = page.locator("#attention .mark-rect.role-mark path").count()
    assert cells == 9 * len(emotion_share(str(wav), return_attention=True)["attention"]["time"])
    assert page.locator("#timeline").count() == 0


def test_a_long_clip_has_a_timeline(page, tmp_path, emotion_share):
    path = tmp_path / "long.flac"
    soundfile.write(path, speech(17.0, sampling_rate=22050), 22050)
    upload(page, path)
    expected = emotion_share(str(path), return_timeline=True)
    assert shares_on(page) == pytest.approx(shares_of(expected["shares"]), abs=1e-5)
    page.locator("#timeline .mark-text.role-mark text").first.wait_for()
    assert page.locator("#timeline .mark-text.role-mark text").all_text_contents() == [
        f"{window['shares'][share['label']]:.0%}" for window in expected["timeline"] for share in expected["shares"]
    ]


def test_a_broken_file_takes_the_place_of_shares_with_a_readable_message(page, wav, tmp_path):
    upload(page, wav)
    shares_on(page)
    (tmp_path / "broken.wav").write_bytes(b"no audio at all" * 100)
    page.get_by_role("button", name="Clear").click()
    upload(page, tmp_path / "broken.wav")
    message = page.locator("#results p[role=alert]")
    expect(message).to_contain_text("broken.wav: not an audio file that can be decoded")
    assert "/" not in message.inner_text()  # nothing of the server's folders
    assert page.locator("#shares").count() == 0


def test_a_chosen_example_is_heard(page, space, emotion_share):
    page.get_by_role("button", name="A voice").click()
    expected = emotion_share(str(space[0] / "examples" / "A voice.wav"))
    assert shares_on(page) == pytest.approx(shares_of(expected), abs=1e-5)


def test_a_recording_is_heard(page, space, emotion_share):
    page.get_by_role("button", name="Record audio").click()
    page.locator("#clip .record-button").click()
    page.wait_for_timeout(2000)
    page.locator("#clip .stop-button").click()
    shares = shares_on(page)
    recording = max((space[0] / "clips").rglob("*.wav"), key=lambda path: path.stat().st_mtime)
    assert soundfile.info(recording).duration > 1
    assert shares == pytest.approx(shares_of(emotion_share(str(recording))), abs=1e-5)


def test_shares_are_drawn_while_somebody_speaks(page):
    page.get_by_role("tab", name="Live").click()
    page.locator("#live").get_by_text("It hears little.").wait_for()
    cells = page.locator("#live_timeline .mark-rect.role-mark path")
    clicked = time.monotonic()
    page.locator("#microphone").get_by_role("button", name="Speak").click()
    cells.first.wait_for()
    first_drawn = time.monotonic()
    page.wait_for_timeout(3000)
    least = time.monotonic() - first_drawn
    page.locator("#microphone").get_by_role("button", name="Stop").click()
    most = time.monotonic() - clicked
    # Exactly the spoken audio arrives: nothing is lost or heard twice.
    expect(cells.nth(9 * math.floor(least))).to_be_attached()
    page.wait_for_timeout(500)
    assert cells.count() <= 9 * math.ceil(most)
    bars = page.locator("#live_shares [aria-roledescription=bar]")
    labels = bars.evaluate_all("bars => bars.map(bar => bar.getAttribute('aria-label'))")
    assert [label.partition("emotion: ")[2] for label in labels] == list(EMOTIONS)
    assert page.locator("[role=alert]:not(:empty)").count() == 0


def pieces(waveform, sampling_rate, sizes):
    """A recording as the browser sends it."""
    ends = np.cumsum(sizes)
    for number, samples in enumerate(np.split((waveform * 32767).astype(np.int16), ends)):
        yield {
            "samples": b64encode(samples.tobytes()).decode(),
            "sampling_rate": sampling_rate,
            "is_first": number == 0,
            "is_last": number == len(sizes),
        }


def test_live_shares_are_those_of_the_whole_recording(emotion_share):
    waveform = speech(9.5, sampling_rate=48000)
    expected = emotion_share((48000, (waveform * 32767).astype(np.int16)), hop_length_s=1.0, return_timeline=True)
    heard, charts = None, []
    for piece in pieces(waveform, 48000, [24000] * 10 + [100_000]):
        heard, alert, *drawn = app.listen(emotion_share, heard, piece)
        assert alert == ""
        charts += [drawn] if isinstance(drawn[0], altair.TopLevelMixin) else []
    bars, cells = (chart.to_dict()["data"]["values"] for chart in charts[-1])
    last = expected["timeline"][-1]["shares"]
    assert {bar["label"]: bar["score"] for bar in bars} == pytest.approx(last, abs=1e-5)
    assert len(cells) == 10 * 9
    for window in expected["timeline"]:
        drawn = {cell["emotion"]: cell["value"] for cell in cells if cell["start"] == window["start"]}
        assert drawn == pytest.approx(window["shares"], abs=1e-5)


def test_of_a_long_recording_the_last_minute_is_drawn_and_ten_minutes_are_heard(emotion_share, monkeypatch):
    monkeypatch.setattr(type(emotion_share), "forward", lambda self, inputs: {**inputs, "logits": torch.zeros(1, 9)})
    heard, (first, *further) = None, pieces(np.full(601 * 1000, 0.1), 1000, [150_000] * 4)
    for piece in (first, *further[:-1]):
        heard, alert, _, chart = app.listen(emotion_share, heard, piece)
        assert "The shares are 150 seconds behind." in alert  # so much in one piece
    cells = chart.to_dict()
    assert cells["encoding"]["x"]["scale"]["domain"] == [539.0, 599.0]
    assert len(cells["data"]["values"]) == 60 * 9
    heard, *_ = app.listen(emotion_share, heard, {**further[-1], "is_last": False})
    with pytest.raises(ValueError, match="A recording may last 10 minutes"):
        app.listen(emotion_share, heard, further[-1])


def test_a_microphone_that_hears_nothing_is_said(emotion_share):
    (piece,) = pieces(np.zeros(48000), 48000, [])
    assert "What it hears is digital silence" in app.listen(emotion_share, None, piece)[1]
    with pytest.raises(ValueError, match="begin again"):
        app.listen(emotion_share, None, {**piece, "is_first": False})


def test_a_model_of_an_earlier_version_has_no_live_page(emotion_share, monkeypatch):
    def parts():
        return {block.elem_id for block in app.page(emotion_share, None).blocks.values()}

    assert {"clip", "microphone"} <= parts()
    monkeypatch.delattr(EmotionSharePipeline, "stream")
    assert "clip" in parts()
    assert "microphone" not in parts()


def test_the_cards_limits_and_a_synthetic_corpus_are_in_view(page):
    assert page.get_by_text("trained on synthetic voices").is_visible()
    assert page.get_by_text("It hears little.").is_visible()
    assert not page.get_by_text("Nobody's").is_visible()


def test_the_server_reaches_for_no_other_host(space):
    lines = (space[0] / "app.log").read_text().splitlines()
    assert {line for line in lines if line.startswith("looked up:")} == {"looked up: 127.0.0.1"}


@pytest.mark.parametrize(
    ("corpus", "dataset", "warning"),
    [
        ("synthetic", "synthetic", app.SYNTHETIC),
        ("synthetic", "someone/synthetic-voices", app.SYNTHETIC),
        ("compare2023", "compare2023", ""),
    ],
)
def test_the_card_that_training_writes_is_understood(corpus, dataset, warning):
    scores = {label: Score(0.5) for label in (MEAN, *EMOTIONS)}
    data = DataArguments(dataset=dataset, data_dir="somewhere" if dataset == "compare2023" else None)
    arguments = Arguments(data, ModelArguments(backbone="acoustic"), RunArguments(output_dir="here"))
    splits = {split: Dataset.from_dict({"filename": ["a.wav"]}) for split in ("train", "devel")}
    loaded = Corpus(corpus, DatasetDict(splits), list(EMOTIONS))
    card = model_card(arguments, small_model(), EmoShareFeatureExtractor(), scores, loaded)
    assert app.warning(card) == warning
    assert "Not for surveillance" in app.limits(card)
    assert "Licences" not in app.limits(card)


def test_cards_of_earlier_versions_say_synthetic_in_their_text_alone():
    text = "---\ntags: [speech]\n---\n\n**These numbers show that the software works:** the corpus is synthetic.\n"
    assert app.warning(ModelCard(text)) == app.SYNTHETIC
    assert app.warning(ModelCard(text.replace("synthetic", "large"))) == ""


def test_a_folder_without_a_card_is_said_to_be_unknown(tmp_path):
    card = app.load_card(str(tmp_path))
    assert "has no card" in app.warning(card)
    (tmp_path / "README.md").write_text("---\ntags: [speech]\n---\n\n## Limits\nMany.\n")
    assert app.load_card(str(tmp_path)).data.tags == ["speech"]


@pytest.mark.parametrize("metadata", ["tags: [a", "- a list"])
def test_a_card_that_cannot_be_read_is_one_line(metadata, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n\n## Limits\nMany.\n")
    with pytest.raises(ValueError, match=r"its card \(README.md\) cannot be read: .+") as raised:
        app.load_card(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_model_without_a_card_is_said_to_be_unknown():
    assert "has no card" in app.warning(None)
    assert app.limits(None) == ""


def test_a_model_without_attention_shows_none(tmp_path, wav):
    small_model(architecture="cnn_lstm").save_pretrained(tmp_path)
    EmoShareFeatureExtractor(feature_type="mel").save_pretrained(tmp_path)
    with gradio.Blocks() as blocks:
        app.show_results(pipeline("emotion-share", model=str(tmp_path)), str(wav))
    assert [block.elem_id for block in blocks.blocks.values() if block.elem_id] == ["shares", "waveform"]


def test_intervals_are_drawn_for_a_model_that_knows_them(wav):
    torch.manual_seed(0)
    emotion_share = EmotionSharePipeline(
        model=small_model(loss="beta_binomial"), feature_extractor=EmoShareFeatureExtractor("mel"), device="cpu"
    )
    with gradio.Blocks() as blocks:
        app.show_results(emotion_share, str(wav))
    texts = [block.value for block in blocks.blocks.values() if isinstance(block, gradio.Markdown)]
    assert any("90% of panels of 20 listeners would" in text for text in texts)
    shares = emotion_share(str(wav), return_interval=True, listeners=20)
    chart = app.shares_chart(shares).to_dict()
    assert [layer["mark"]["type"] for layer in chart["layer"]] == ["bar", "errorbar", "text"]
    assert [[row["low"], row["high"]] for row in chart["data"]["values"]] == [share["interval"] for share in shares]
    without = app.shares_chart([{"label": "joy", "score": 0.25}]).to_dict()
    assert [layer["mark"]["type"] for layer in without["layer"]] == ["bar", "text"]


def shown_for(emotion_share, path):
    """What the page shows for a clip: names of its charts, and its alerts."""
    with gradio.Blocks() as blocks:
        app.show_results(emotion_share, str(path))
    alerts = [block.value for block in blocks.blocks.values() if isinstance(block, gradio.HTML)]
    return [block.elem_id for block in blocks.blocks.values() if block.elem_id], alerts


def test_hours_of_silence_are_refused_before_they_are_heard(emotion_share, tmp_path, monkeypatch):
    """40 minutes are a FLAC of 120 kB."""
    path = tmp_path / "hours.flac"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for _ in range(40):
            file.write(np.zeros(60 * 16000, np.int16))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(type(emotion_share), "forward", None)
    start = time.monotonic()
    charts, (alert,) = shown_for(emotion_share, path)
    assert time.monotonic() - start < 10
    assert charts == []
    assert "hours.flac: lasts more than 10 minutes" in alert


def test_a_large_file_is_refused_before_it_is_read(emotion_share, tmp_path):
    path = tmp_path / "large.wav"
    with path.open("wb") as file:
        file.truncate(101 * 2**20)
    charts, (alert,) = shown_for(emotion_share, path)
    assert charts == []
    assert alert.endswith("large.wav: is larger than 100 MB</p>")


@pytest.mark.parametrize(
    "error",
    [ValueError("of {}"), OSError(5, "cannot read {}"), RuntimeError("libsndfile: {}"), soundfile.LibsndfileError(1)],
)
def test_whatever_a_clip_raises_is_shown_on_the_page(error, emotion_share, wav, monkeypatch):
    error.args = tuple(str(part).format(wav) for part in error.args)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(app, "hear", fail)
    charts, (alert,) = shown_for(emotion_share, wav)
    assert charts == []
    assert "This clip cannot be used." in alert
    assert str(wav.parent) not in alert


def test_warnings_of_a_clip_and_of_a_microphone_do_not_mix(emotion_share, wav, monkeypatch):
    """A recording ends while a clip is heard, and is still ending when the clip has been."""
    is_ending, is_shown, hear, finish = Event(), Event(), app.hear, EmotionShareStream.finish

    def hear_meanwhile(*given):
        thread.start()
        is_ending.wait(1)
        return hear(*given)

    def finish_later(self):
        is_ending.set()
        is_shown.wait(60)
        return finish(self)

    monkeypatch.setattr(app, "hear", hear_meanwhile)
    monkeypatch.setattr(EmotionShareStream, "finish", finish_later)
    (piece,) = pieces(speech(1.0), 16000, [])
    thread = Thread(target=app.listen, args=(emotion_share, None, piece))
    before = warnings.showwarning, list(warnings.filters)
    shown_for(emotion_share, wav)
    is_shown.set()
    thread.join()
    assert (warnings.showwarning, warnings.filters) == before


@pytest.mark.parametrize(("name", "rate", "subtype"), [("a.wav", 8000, "GSM610"), ("a.mp3", 16000, None)])
def test_gsm_and_mp3_are_drawn_without_noise(name, rate, subtype, emotion_share, tmp_path, capfd):
    soundfile.write(tmp_path / name, speech(3.0, sampling_rate=rate), rate, subtype=subtype)
    charts, alerts = shown_for(emotion_share, tmp_path / name)
    assert charts == ["shares", "waveform", "attention"]
    assert alerts == []
    assert capfd.readouterr().err == ""


def test_digital_silence_is_said_next_to_its_shares(emotion_share, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    charts, (alert,) = shown_for(emotion_share, tmp_path / "silence.wav")
    assert charts == ["shares", "waveform", "attention"]
    assert "silence.wav: is digital silence" in alert


def test_pictures_of_a_long_clip_keep_what_is_short_in_it_where_it_was():
    waveform = np.zeros(100 * 16000, dtype=np.float32)
    waveform[50 * 16000] = 0.5
    drawn = app.waveform_chart(waveform, 100.0).to_dict()["data"]["values"]
    assert len(drawn) == app.TIME_STEPS
    assert [moment["time"] for moment in drawn if moment["highest"] > 0.4] == [pytest.approx(50.0, abs=0.5)]

    times = np.arange(5000) * 0.02 + 0.01
    weights = np.where(np.abs(times - 25.0) < 0.2, 5.0, 1.0)
    attention = {"time": times.tolist(), "Anger": (weights / weights.sum()).tolist()}
    cells = app.attention_chart(attention, ["Anger"], 100.0).to_dict()["data"]["values"]
    assert [cell["start"] for cell in cells] == [0.0, *(cell["end"] for cell in cells[:-1])]
    assert cells[-1]["end"] == 100.0
    highest = max(cells, key=lambda cell: cell["value"])
    assert highest["start"] <= 25.0 <= highest["end"]
    assert np.mean([cell["value"] for cell in cells]) == pytest.approx(1.0)


def test_a_missing_model_is_one_clear_message(tmp_path, model_folder, monkeypatch):
    monkeypatch.delenv("EMOSHARE_MODEL", raising=False)
    monkeypatch.setattr(app, "TRAINED_HERE", tmp_path / "none")
    with pytest.raises(SystemExit, match="none: run `make train` first"):
        app.main([])
    (tmp_path / "empty").mkdir()
    (tmp_path / "hubert").mkdir()
    (tmp_path / "hubert" / "config.json").write_text('{"model_type": "hubert"}')
    (tmp_path / "no_weights").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(model_folder / name, tmp_path / "no_weights")
    for name, message in (
        (str(tmp_path / "missing"), r"/missing: no such folder here, and from the Hub: "),
        ("outputs/mising", "outputs/mising: no such folder here, and from the Hub: "),
        (str(tmp_path / "empty"), "/empty: "),
        (str(tmp_path / "hubert"), "/hubert: "),
        (str(tmp_path / "no_weights"), "/no_weights: .*model.safetensors"),
    ):
        with pytest.raises(SystemExit, match=f"no model .*{message}") as exit:
            app.main([name])
        assert "\n" not in str(exit.value)


@pytest.mark.skipif("EMOSHARE_SCREENSHOTS" not in os.environ, reason="made on request: make screenshot")
def test_the_screenshots_show_the_trained_model(launch, tmp_path):
    shutil.copy(ROOT / "app.py", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (voices,) = (ROOT / "examples").glob("Synthetic voices*")
    soundfile.write(tmp_path / "heard.wav", *soundfile.read(voices))
    folder, browser = ROOT / os.environ["EMOSHARE_SCREENSHOTS"], launch(tmp_path / "heard.wav")
    with serving(tmp_path, ROOT / "outputs" / "demo") as url:
        page = opened(browser, url, [])
        page.get_by_role("button", name="Synthetic voices").click()
        page.locator("#timeline .mark-text.role-mark text").first.wait_for()
        page.screenshot(path=folder / "demo.png", full_page=True)
        page.get_by_role("tab", name="Live").click()
        page.locator("#microphone").get_by_role("button", name="Speak").click()
        expect(page.locator("#live_timeline .mark-rect.role-mark path")).to_have_count(9 * 40, timeout=60_000)
        page.screenshot(path=folder / "live.png", full_page=True)
    browser.close()

"""Batches of clips from many requests: the results are the pipeline's, and no clip affects another."""

import asyncio
import inspect
import io
import json
import time
from threading import Event

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech
from transformers import pipeline

from emoshare.serving.application import Metrics, Options, application
from emoshare.serving.batches import Batches, ModelError, NoRoomError, TooLongError
from emoshare.serving.urls import AllowedUrls


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


@pytest.fixture
def batches(emotion_share):
    sizes = []
    batches = Batches(emotion_share, batch_size=4, max_seconds=30, max_waiting=50, observe_batch=sizes.append)
    batches.sizes = sizes
    yield batches
    batches.close()


def wav(seconds, seed=0):
    return written(speech(seconds, seed))


def written(samples, **kind):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", **kind)
    return file.getvalue()


def result_of(batches, clip):
    return batches.emotion_share.postprocess(clip.windows.result(timeout=60), **clip.postprocess)


def flat(result):
    """Labels and numbers of a result, in their order."""
    if isinstance(result, dict):
        return [part for name, value in result.items() for part in (name, *flat(value))]
    return [part for value in result for part in flat(value)] if isinstance(result, list) else [result]


def assert_same(result, expected):
    for own, other in zip(flat(result), flat(expected), strict=True):
        assert own == (other if isinstance(other, str) else pytest.approx(other, abs=1e-5))


def hold(batches, monkeypatch):
    """Gives the model a clip, on which it waits until the returned event is set; later clips run as usual."""
    begun, go, run_batch = Event(), Event(), batches.emotion_share.run_batch

    def wait_and_run(windows, **params):
        begun.set()
        assert go.wait(60)
        return run_batch(windows, **params)

    with monkeypatch.context() as patch:
        patch.setattr(batches.emotion_share, "run_batch", wait_and_run)
        batches.submit(io.BytesIO(wav(0.3)))
        assert begun.wait(60)
    return go


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


OPTIONS = [{}, {"top_k": 2}, {"return_timeline": True, "chunk_length_s": 0.5}, {"return_attention": True}]


def test_results_are_the_pipelines_whatever_they_are_computed_with(batches, emotion_share, monkeypatch):
    clips = [wav(0.3 + 0.2 * number, seed=number) for number in range(6)] + [wav(17.0), wav(9.0)]
    expected = [emotion_share(clip, **OPTIONS[number % 4]) for number, clip in enumerate(clips)]
    go = hold(batches, monkeypatch)
    submitted = [batches.submit(io.BytesIO(clip), **OPTIONS[number % 4]) for number, clip in enumerate(clips)]
    go.set()
    for clip, result in zip(submitted, expected, strict=True):
        assert_same(result_of(batches, clip), result)
    assert max(batches.sizes) > 1
    for number, clip in enumerate(clips):
        alone = batches.submit(io.BytesIO(clip), **OPTIONS[number % 4])
        assert_same(result_of(batches, alone), expected[number])
    assert not batches.unanswered


def test_what_waits_runs_in_batches_of_like_length(batches, monkeypatch):
    go, seen, run_batch = hold(batches, monkeypatch), [], batches.emotion_share.run_batch

    def note_and_run(windows, **params):
        seen.append([window["num_samples"] for window in windows])
        return run_batch(windows, **params)

    monkeypatch.setattr(batches.emotion_share, "run_batch", note_and_run)
    clips = [batches.submit(io.BytesIO(wav(seconds))) for seconds in (1.0, 2.0) * 4]
    wait_until(lambda: batches.queue.qsize() == 8)
    go.set()
    for clip in clips:
        clip.windows.result(timeout=60)
    assert seen == [[16000] * 4, [32000] * 4]


def test_a_broken_clip_fails_alone(batches, emotion_share, monkeypatch):
    good = [wav(0.5, seed=number) for number in range(3)]
    go = hold(batches, monkeypatch)
    kinds = {
        "not an audio file": b"no audio",
        "not finite": written(np.full(16000, np.nan, np.float32), subtype="FLOAT"),
        "its header promises": good[0][:9000],
        "expected at least": written(speech(0.5)[:500]),
        "lasts more than 30 s": wav(31.0),
    }
    clips = [batches.submit(io.BytesIO(content)) for content in [good[0], *kinds.values(), *good[1:]]]
    go.set()
    for clip, content in zip([clips[0], *clips[-2:]], good, strict=True):
        assert_same(result_of(batches, clip), emotion_share(content))
    for clip, message in zip(clips[1:], kinds, strict=False):
        error = clip.windows.exception(timeout=60)
        assert message in str(error)
        assert isinstance(error, TooLongError) == ("lasts" in message)


def test_a_clip_is_decoded_no_further_than_it_may_last(batches, monkeypatch):
    """An hour of silence, which is a small file."""
    hour = io.BytesIO()
    soundfile.write(hour, np.zeros(3600 * 4000), 4000, format="FLAC")
    decoded, read = [], soundfile.SoundFile.read

    def note_and_read(*given, **more):
        decoded.append(read(*given, **more))
        return decoded[-1]

    monkeypatch.setattr(soundfile.SoundFile, "read", note_and_read)
    with pytest.raises(TooLongError):
        batches.submit(hour).windows.result(timeout=60)
    assert sum(map(len, decoded)) <= 2 * 60 * 4000


@pytest.mark.parametrize("options", [{"hop_length_s": 0.09}, {"stride_length_s": 3.95}])
def test_windows_that_overlap_too_much_are_refused_before_one_is_queued(options, batches, emotion_share, monkeypatch):
    monkeypatch.setattr(emotion_share, "run_batch", None)
    ((name, seconds),) = options.items()
    message = rf"^audio file object: with {name}={seconds}, its overlapping windows last [\d,]+ s in total; "
    message += "expected at most 240 s"
    with pytest.raises(TooLongError, match=message):
        batches.submit(io.BytesIO(wav(30.0)), **options).windows.result(timeout=60)
    assert batches.sizes == []


@pytest.mark.parametrize("options", [{"hop_length_s": 1.0}, {"stride_length_s": 3.0}, {"chunk_length_s": 0.1}])
def test_windows_of_the_longest_clip_may_overlap_as_those_of_a_stream(options, batches, emotion_share, monkeypatch):
    monkeypatch.setattr(
        emotion_share,
        "run_batch",
        lambda windows, **params: [{**window, "logits": torch.zeros(1, 9)} for window in windows],
    )
    result = result_of(batches, batches.submit(io.BytesIO(wav(30.0)), return_timeline=True, **options))
    assert result["timeline"][-1]["end"] == 30.0


def test_a_clip_that_the_model_fails_on_takes_none_with_it(batches, emotion_share, monkeypatch):
    go, run_batch = hold(batches, monkeypatch), emotion_share.run_batch

    def fail_on_one(windows, **params):
        if 8016 in [window["num_samples"] for window in windows]:
            raise RuntimeError("no memory")
        return run_batch(windows, **params)

    monkeypatch.setattr(emotion_share, "run_batch", fail_on_one)
    contents = [wav(length / 16000) for length in (8000, 8000, 8016, 8000)]
    clips = [batches.submit(io.BytesIO(content)) for content in contents]
    wait_until(lambda: batches.queue.qsize() == 4)
    go.set()
    with pytest.raises(ModelError, match="RuntimeError"):
        clips.pop(2).windows.result(timeout=60)
    for clip, content in zip(clips, contents[:2] + contents[3:], strict=True):
        assert_same(result_of(batches, clip), emotion_share(content))
    assert batches.model.is_alive()


def test_what_is_cancelled_is_not_computed(batches, monkeypatch):
    go = hold(batches, monkeypatch)
    clips = [batches.submit(io.BytesIO(wav(0.5))) for _ in range(5)]
    wait_until(lambda: batches.queue.qsize() == 5)
    for clip in clips[1:]:
        assert clip.windows.cancel()
    assert len(batches.unanswered) == 2
    go.set()
    clips[0].windows.result(timeout=60)
    assert batches.sizes == [1, 1]


def test_no_more_wait_than_may(batches, monkeypatch):
    batches.max_waiting = 3
    go = hold(batches, monkeypatch)
    clips = [batches.submit(io.BytesIO(wav(0.5))) for _ in range(2)]
    with pytest.raises(NoRoomError, match=r"the queue is full \(3 clips\)"):
        batches.submit(io.BytesIO(wav(0.5)))
    go.set()
    for clip in clips:
        clip.windows.result(timeout=60)
    batches.submit(io.BytesIO(wav(0.5))).windows.result(timeout=60)


def test_closing_waits_for_every_answer(emotion_share):
    batches = Batches(emotion_share, batch_size=2, max_seconds=30, max_waiting=50)
    clips = [batches.submit(io.BytesIO(wav(0.5))) for _ in range(5)]
    batches.close()
    assert all(clip.windows.done() for clip in clips)
    assert not batches.model.is_alive()


# Through the application: what happens while the model is busy, or fails


def ask(batches, content, seconds_until_gone=None, metrics=None):
    """Status, headers and answer of a request."""
    app = application(batches, AllowedUrls([], 1, 1), metrics or Metrics(), 1 << 20, 10)
    messages, sent = [{"type": "http.request", "body": content, "more_body": False}], []

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(60 if seconds_until_gone is None else seconds_until_gone)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_a_full_queue_is_answered_with_when_to_come_again(batches, monkeypatch):
    batches.max_waiting = 1
    go = hold(batches, monkeypatch)
    status, headers, answer = ask(batches, wav(0.5))
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer["detail"] == "the queue is full (1 clips); try again later"
    go.set()


def test_a_client_that_has_gone_leaves_nothing_to_compute(batches, monkeypatch):
    go = hold(batches, monkeypatch)
    status, *_ = ask(batches, wav(0.5), seconds_until_gone=0.2)
    assert status == 499
    wait_until(lambda: len(batches.unanswered) == 1)
    go.set()
    wait_until(lambda: not batches.unanswered)
    assert batches.sizes == [1]


def test_a_model_that_fails_is_an_error_of_the_server(batches, emotion_share, monkeypatch):
    def fail(windows, **params):
        raise RuntimeError("no memory, at a secret place")

    monkeypatch.setattr(emotion_share, "run_batch", fail)
    status, _, answer = ask(batches, wav(0.5))
    assert (status, answer) == (500, {"detail": "the model failed on this clip (RuntimeError)"})


def test_an_error_that_nobody_has_foreseen_is_counted(batches, emotion_share, monkeypatch):
    def fail(windows, **params):
        raise LookupError

    monkeypatch.setattr(emotion_share, "postprocess", fail)
    metrics = Metrics()
    with pytest.raises(LookupError):
        ask(batches, wav(0.5), metrics=metrics)
    assert metrics.registry.get_sample_value("emoshare_requests_total", {"status": "500"}) == 1
    assert metrics.registry.get_sample_value("emoshare_request_seconds_count") == 1


def test_its_options_are_the_pipelines(emotion_share):
    of_pipeline = set(inspect.signature(emotion_share._sanitize_parameters).parameters)
    assert set(Options.model_fields) == of_pipeline - {"return_embedding", "turns"}  # which are arrays

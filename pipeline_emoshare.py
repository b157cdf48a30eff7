"""From audio in any form to the shares of the emotions: `load_audio` and the "emotion-share" pipeline."""

import io
import os
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import soundfile
import torch
import torchaudio
from torch.utils.data import DataLoader
from transformers.pipelines.base import ChunkPipeline, no_collate_fn, pad_collate_fn
from transformers.pipelines.pt_utils import PipelineChunkIterator, PipelineIterator, PipelinePackIterator

# Remote code is copied to where it runs by following relative imports: these two bring along what the repository needs.
from .feature_extraction_emoshare import EmoShareFeatureExtractor
from .modeling_emoshare import EmoShareModel

SAMPLING_RATE = 16000
# Batches that are read ahead, so that windows of like length can be run together: with eight, little is padded.
BATCHES_READ_AHEAD = 8


class EmotionSharePipeline(ChunkPipeline):
    """
    Predicts the share of listeners who would perceive each emotion in a speech clip.

    ```python
    >>> from transformers import pipeline
    >>> emotion_share = pipeline("emotion-share", model=repo, trust_remote_code=True)
    >>> emotion_share("clip.wav")
    [{'label': 'Calmness', 'score': 0.41}, {'label': 'Interest', 'score': 0.22}, ...]
    ```

    Takes what [`load_audio`] takes, or a list, generator or `KeyDataset` of it (so a waveform must be an array or a
    tensor, not a list of numbers). A clip longer than the feature extractor's `chunk_length_s` is cut into windows,
    each predicted on its own, and their shares are averaged by duration. With `batch_size=n`, n windows of like length
    go through the model at a time, with the same result as one by one; 8 n windows are read ahead for that.
    """

    _load_feature_extractor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_processor = False

    def __init__(self, model: EmoShareModel, feature_extractor: EmoShareFeatureExtractor, **kwargs):
        # Remote code comes as several copies of one class, so the kind of model is told by its config.
        if model.config.model_type != "emoshare":
            raise ValueError(f"the emotion-share pipeline needs an EmoShare model; got {model.config.model_type!r}")
        super().__init__(model=model, feature_extractor=feature_extractor, **kwargs)

    def __call__(self, inputs, **kwargs):
        """
        Args:
            inputs: audio, as [`load_audio`] takes it, or a list, generator or `KeyDataset` of it.
            top_k (`int`, *optional*): return only so many emotions, the highest.
            batch_size (`int`, *optional*, defaults to 1): windows per pass through the model.

        Returns:
            `list[dict]`: `{"label": str, "score": float}` for every emotion, highest share first. A list for a list;
            an iterator for a generator or dataset.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, top_k=None):
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: got {top_k}; expected at least 1")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def get_inference_context(self):
        return torch.inference_mode

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """As in Transformers, except that a batch holds windows of like length."""
        windows = DataLoader(
            PipelineChunkIterator(inputs, self.preprocess, preprocess_params),
            num_workers=min(num_workers, 1),  # each of several workers would go through all of the inputs
            batch_size=1,
            collate_fn=no_collate_fn,
        )
        forward = partial(self.forward, **forward_params)
        if batch_size > 1:
            collate = pad_collate_fn(None, self.feature_extractor)
            windows, forward = BatchesByLength(windows, forward, collate, batch_size), dict
        return PipelineIterator(PipelinePackIterator(windows, forward, {}), self.postprocess, postprocess_params)

    def preprocess(self, audio):
        sampling_rate = self.feature_extractor.sampling_rate
        waveform = load_audio(audio, sampling_rate)
        windows = self.feature_extractor.windows(len(waveform))
        for start, end in windows:
            try:
                features = self.feature_extractor(waveform[start:end], sampling_rate=sampling_rate, return_tensors="pt")
            except ValueError as error:
                raise ValueError(f"{audio if isinstance(audio, str | os.PathLike) else 'audio'}: {error}") from error
            yield {"is_last": end == len(waveform), "num_samples": end - start, **features}

    def _forward(self, model_inputs):
        is_last, num_samples = model_inputs.pop("is_last"), model_inputs.pop("num_samples")
        outputs = self.model(**model_inputs)
        return {"logits": outputs.logits, "num_samples": num_samples, "is_last": is_last}

    def postprocess(self, windows, top_k=None):
        shares = average_by_duration(
            np.concatenate([window["logits"].float().numpy() for window in windows]),
            np.array([window["num_samples"] for window in windows]),
        )
        labelled = [{"label": self.model.config.id2label[i], "score": float(share)} for i, share in enumerate(shares)]
        return sorted(labelled, key=lambda share: -share["score"])[:top_k]


class BatchesByLength:
    """
    Runs windows in batches of like length, so that little is padded; their outputs come one by one, in the windows'
    own order.

    Args:
        windows: `DataLoader` of what `EmotionSharePipeline.preprocess` yields.
        forward: from a batch of windows to their outputs.
        collate: from a list of windows to a batch.
        batch_size: windows per batch.
    """

    def __init__(self, windows, forward, collate, batch_size):
        self.windows = windows
        self.forward = forward
        self.collate = collate
        self.batch_size = batch_size

    def __len__(self):
        return len(self.windows.dataset)  # clips: Transformers' own iterators count these too

    def __iter__(self):
        windows = iter(self.windows)
        while pool := list(islice(windows, BATCHES_READ_AHEAD * self.batch_size)):
            by_length = sorted(range(len(pool)), key=lambda index: pool[index]["num_samples"])
            outputs = {}
            for start in range(0, len(pool), self.batch_size):
                indices = by_length[start : start + self.batch_size]
                batch = self.forward(self.collate([pool[index] for index in indices]))
                for row, index in enumerate(indices):
                    outputs[index] = {
                        "logits": batch["logits"][row : row + 1],
                        "num_samples": batch["num_samples"][row],
                        "is_last": batch["is_last"][row],
                    }
            yield from (outputs[index] for index in range(len(pool)))


def average_by_duration(shares, num_samples):
    """(windows, labels) shares of one clip's windows -> (labels,), each window weighted by its length in samples."""
    return np.average(shares, axis=0, weights=num_samples)


def load_audio(audio, sampling_rate=SAMPLING_RATE):
    """
    Reads audio in any of the forms that users of Hugging Face libraries have it in.

    Args:
        audio: one of
            - a path to an audio file, its content as `bytes`, or a binary file object: whatever libsndfile decodes
              (WAV, FLAC, OGG, MP3, ...), any sampling rate, channels averaged;
            - a 1D floating-point array, tensor or list of numbers at `sampling_rate`;
            - `{"array" or "raw": waveform, "sampling_rate": int}`;
            - `{"bytes": bytes or None, "path": str or None}`, as `datasets` stores audio that is not decoded;
            - `{"audio": ...}`: a row of a dataset, with any of these in its column `audio`.
        sampling_rate (`int`): wanted sampling rate in Hz.

    Returns:
        `np.ndarray`: (samples,) float32, mono, at `sampling_rate`.

    Raises:
        ValueError: if the audio is empty, broken or not finite, or an array is not 1D floating point; the message
            names the file.
        FileNotFoundError: if there is no such file.
        TypeError: on anything else.
    """
    if isinstance(audio, dict):
        return _load_dict(audio, sampling_rate)
    if isinstance(audio, str | os.PathLike):
        path = os.fspath(audio)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such audio file")
        return _decode(path, path, sampling_rate)
    if isinstance(audio, bytes | bytearray):
        return _decode(io.BytesIO(audio), "audio bytes", sampling_rate)
    if hasattr(audio, "read"):
        return _decode(audio, getattr(audio, "name", "audio file object"), sampling_rate)
    if isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
        return _checked(audio, "audio array")
    raise TypeError(f"got audio as {type(audio).__name__}; expected a path, bytes, a file object, an array or a dict")


def _load_dict(audio, sampling_rate):
    if "audio" in audio:
        return load_audio(audio["audio"], sampling_rate)
    waveform = audio["array"] if audio.get("array") is not None else audio.get("raw")
    if waveform is not None and "sampling_rate" in audio:
        return _resample(_checked(waveform, "audio array"), audio["sampling_rate"], sampling_rate)
    if audio.get("bytes") is not None:
        return _decode(io.BytesIO(audio["bytes"]), audio.get("path") or "audio bytes", sampling_rate)
    if audio.get("path") is not None:
        return load_audio(audio["path"], sampling_rate)
    raise ValueError(
        f"got audio as a dict with the keys {sorted(audio)}; expected 'array' (or 'raw') and 'sampling_rate', or "
        "'bytes' or 'path'"
    )


def _decode(file, name, sampling_rate):
    try:
        samples, file_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: raw samples, without a header
        raise ValueError(f"{name}: not an audio file that can be decoded ({error})") from error
    return _resample(_checked(samples.mean(axis=1), name), file_rate, sampling_rate)


def _checked(waveform, name):
    waveform = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if waveform.size == 0:
        raise ValueError(f"{name}: holds no samples")
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"{name}: got shape {waveform.shape} of {waveform.dtype}; expected a mono waveform, 1D, floating point in "
            "[-1, 1]"
        )
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name}: {int((~np.isfinite(waveform)).sum())} of {waveform.size} samples are not finite")
    return waveform.astype(np.float32)


def _resample(waveform, from_rate, to_rate):
    if from_rate == to_rate:
        return waveform
    return _resampler(from_rate, to_rate)(torch.from_numpy(waveform)).numpy()


@lru_cache(maxsize=16)
def _resampler(from_rate, to_rate):
    return torchaudio.transforms.Resample(from_rate, to_rate)

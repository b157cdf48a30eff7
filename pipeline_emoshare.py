"""From audio in any form to the shares of the emotions: the "emotion-share" pipeline."""

import math
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from types import GeneratorType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.pipelines.base import ChunkPipeline, no_collate_fn, pad_collate_fn
from transformers.pipelines.pt_utils import PipelineChunkIterator, PipelineIterator, PipelinePackIterator

# Transformers copies remote code by following relative imports, so the model and the extractor are imported here.
from .audio_emoshare import audio_blocks, audio_name, load_audio
from .checks_emoshare import check_no_label_is
from .embeddings_emoshare import embeddings_noted
from .feature_extraction_emoshare import EmoShareFeatureExtractor
from .fields_emoshare import BACKBONE, TIME
from .modeling_emoshare import EmoShareModel
from .passes_emoshare import CLIPS_PER_CPU_PASS, passes
from .repository_emoshare import copy_card, create_repository, fetch_file, publish_folder
from .segments_emoshare import checked_turns, conversation, turn_windows
from .stream_emoshare import EmotionShareStream
from .votes_emoshare import DEFAULT_LISTENERS, MOST_LISTENERS, share_intervals
from .windows_emoshare import average_by_duration, stream_windows

__all__ = ["EmotionSharePipeline", "EmotionShareStream", "load_audio"]

# Batches that are read ahead, so that windows of similar length can run together. With eight, there is little padding.
BATCHES_READ_AHEAD = 8
# The largest fraction of a batch that may be padding, on which the heads waste time.
MOST_PADDING = 0.35
# What is passed around the model, from `preprocess` to `postprocess`; names of embeddings there begin with `EMBEDDING`.
OF_WINDOW = ("is_last", "num_samples", "first", "part", "turn")
EMBEDDING = "embedding of "


class EmotionSharePipeline(ChunkPipeline):
    """
    Predicts the share of listeners who would perceive each emotion in a speech clip.

    ```python
    >>> from transformers import pipeline
    >>> emotion_share = pipeline("emotion-share", model=repo, trust_remote_code=True)
    >>> emotion_share("clip.wav")
    [{'label': 'Calmness', 'score': 0.41}, {'label': 'Interest', 'score': 0.22}, ...]
    ```

    Takes what `load_audio` takes, or a list, generator or `KeyDataset` of it (so a waveform must be an array or a
    tensor, not a list of numbers). A clip longer than the feature extractor's `chunk_length_s` is cut into windows,
    each predicted separately, and their shares are averaged by duration. With `batch_size=n`, up to n windows of
    similar length go through the model together, with the same result as one by one; 8 n windows are read ahead for
    that. A file is decoded in blocks, so that hours of audio need no more memory than a minute.

    ```python
    >>> emotion_share("meeting.wav", stride_length_s=1.0, return_timeline=True)["timeline"]
    [{'start': 0.0, 'end': 6.0, 'shares': {'Anger': 0.02, 'Boredom': 0.31, ...}}, {'start': 6.0, ...}, ...]
    ```

    A model that was trained with the loss `"beta_binomial"` also says how sure it is:

    ```python
    >>> emotion_share("clip.wav", return_interval=True, listeners=20)
    [{'label': 'Calmness', 'score': 0.41, 'interval': [0.2, 0.6]}, ...]
    ```

    For a conversation with known turns, it predicts each turn, each speaker and the whole:

    ```python
    >>> emotion_share("meeting.wav", segments=[{"start": 0.5, "end": 3.2, "speaker": "Ada"}, ...])["speakers"]["Ada"]
    [{'label': 'Interest', 'score': 0.37}, ...]
    ```
    """

    _load_feature_extractor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_processor = False

    def __init__(self, model: EmoShareModel, feature_extractor: EmoShareFeatureExtractor, **kwargs):
        # Remote code has several copies of one class, so `isinstance` cannot recognise the model.
        if model.config.model_type != "emoshare":
            raise ValueError(f"the emotion-share pipeline needs an EmoShare model; got {model.config.model_type!r}")
        super().__init__(model=model, feature_extractor=feature_extractor, **kwargs)

    def __call__(self, inputs, segments=None, **kwargs):
        """
        Args:
            inputs: audio, as `load_audio` takes it, or a list, generator or `KeyDataset` of it.
            segments (`list[dict]`, *optional*): the turns of one recording, in any order, which may overlap: `"start"`
                and `"end"` in seconds and, if known, `"speaker"`; `"place"` names the turn in messages. Each is cut out
                of the recording at the feature extractor's sampling rate, from the sample nearest to its start to the
                one nearest to its end, and predicted as a separate clip. The recording is read once, in blocks. A turn
                that is too short for the model gets no shares, and causes a warning.
            strict (`bool`, *optional*, defaults to `False`): refuse a file that holds less than it promises, because it
                was cut off or is damaged. Otherwise the part that can be decoded is heard, with a warning that names
                the file. See `load_audio`, also for other warnings.
            top_k (`int`, *optional*): return only this many emotions, the highest.
            batch_size (`int`, *optional*, defaults to 1): largest number of windows per pass through the model. On a
                CPU, the backbone divides them into passes of the fastest size, and the windows of a list or of a long
                clip, whose results all come at the end, go through several at a time whatever the batch size.
            chunk_length_s (`float`, *optional*): longest window in seconds; the feature extractor's, which is what the
                model was trained on, if not given, and no more than that.
            stride_length_s (`float`, *optional*, defaults to 0): seconds at either end of a window, except at the ends
                of the clip, that are heard but not counted: windows overlap by twice this.
            hop_length_s (`float`, *optional*): instead of a stride: each window counts for this many seconds, and hears
                these and the audio before them, up to `chunk_length_s`, as in `EmotionShareStream`.
            return_timeline (`bool`, *optional*): also return the shares of each window.
            return_attention (`bool`, *optional*): return what each emotion's head attended to.
            return_interval (`bool`, *optional*): return a 90 % interval of each share, as `share_intervals` makes it.
                For a clip of several windows, their concentrations are averaged by duration.
            return_embedding (`bool`, *optional*): return the input of each emotion's regressor, and the mean of the
                backbone's frame features.
            listeners (`int`, *optional*, defaults to 20): size of the listener panel whose shares the intervals cover.

        Returns:
            `list[dict]`: `{"label": str, "score": float}` for every emotion, highest share first, and `"interval":
            [low, high]` if requested. With a timeline, attention or embedding, a dict with this list as
            `"shares"`, and

            - `"timeline"`: `{"start": float, "end": float, "shares": {label: float}}` for the part of each window that
              counts, in seconds. The clip's shares are their average by duration.
            - `"attention"`: `"time"`, the times of the steps in seconds, and for each label its weights at these times.
              In a clip of one window they sum to 1; those of several windows are weighted by the windows' durations.
            - `"embedding"`: for each label (width,) float32, the output of its head's pooling over time, which its
              feed-forward network takes; and under `"backbone"` (feature_size,) float32, the mean of the frame features
              that the heads take (without a backbone, of the acoustic features; with `backbone_layer="weighted"`, over
              all layers). Those of several windows are averaged by duration.

            With segments, a dict with

            - `"turns"`: in the order of the segments, `"start"`, `"end"` and `"speaker"` as given, and the results for
              the turn: its `"shares"`, and `"timeline"`, `"attention"` (in seconds of the recording) and `"embedding"`
              if requested. `"shares"` is `None` for a turn that is too short.
            - `"speakers"`: the shares of each speaker, `{speaker: list}`, averaged over all turns by duration.
            - `"shares"`: the shares of all turns, averaged by duration.

            A list for a list; an iterator for a generator or dataset.

        Raises:
            ValueError: on a length that does not fit, on `return_attention` for a model without attention or with a
                label `"time"`, on `return_embedding` for one with a label `"backbone"`, on `return_interval` for one
                whose loss knows no concentrations, and on segments for several clips or that do not begin before they
                end, or end more than 10 ms after the recording.
            ValueError, FileNotFoundError, OSError, TypeError: on audio, as in `load_audio`.
        """
        if segments is not None:
            return self._conversation(inputs, segments, **kwargs)
        if isinstance(inputs, list) and not inputs:  # Transformers would look at the first element
            return []
        return super().__call__(inputs, **kwargs)

    def _conversation(self, recording, segments, **kwargs):
        if isinstance(recording, list | Dataset | GeneratorType):
            raise ValueError(f"segments: expected one recording; got a {type(recording).__name__}")
        extractor = self.feature_extractor
        turns = checked_turns(segments, extractor.sampling_rate, extractor.min_samples)
        if any(turn.is_heard for turn in turns):
            with suppress(StopIteration):  # no windows: the only turn is cut short by the end of the recording
                return super().__call__(recording, turns=turns, **kwargs)
            return self.postprocess([], turns=turns)
        # Transformers expects at least one window. The arguments are checked and the recording is read all the same.
        options = {name: value for name, value in kwargs.items() if name not in ("batch_size", "num_workers")}
        preprocess, _, _ = self._sanitize_parameters(turns=turns, **options)
        windows = self.preprocess(recording, **{**self._preprocess_params, **preprocess})
        return self.postprocess(list(windows), turns=turns)

    def stream(self, **options):
        """Returns an `EmotionShareStream` that predicts with this pipeline; `options` are its other arguments."""
        return EmotionShareStream(self, **options)

    def save_pretrained(self, save_directory, **kwargs):
        """
        As in Transformers. Also saves the model card, if the model was loaded from a repository or folder that has one
        for a model with the same labels.

        Args:
            save_directory: folder.
            kwargs: as in `EmoShareModel.save_pretrained`, including `include_backbone`.
        """
        super().save_pretrained(save_directory, **kwargs)
        config, source = self.model.config, self.model.name_or_path
        config_file = fetch_file("config.json", source)
        if config_file is not None and type(config).from_json_file(config_file).labels == config.labels:
            copy_card(save_directory, source)

    def push_to_hub(
        self,
        repo_id,
        commit_message="EmoShare pipeline",
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        include_backbone=True,
    ):
        """
        Publishes model, feature extractor, pipeline, code and card on the Hub, in one commit.

        Args:
            repo_id (`str`): `ORG/NAME` of the repository, which is created if it does not exist.
            commit_message, token, revision, create_pr: as in Transformers.
            private (`bool`, *optional*): whether the repository is to be private.
            include_backbone (`bool`): as in `EmoShareModel.save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            ValueError: if the repository exists and is public where it should be private, or the reverse; if the
                backbone is to be left out, but is a local folder.
        """
        if not include_backbone and Path(self.model.config.backbone_name_or_path or "").is_dir():
            raise ValueError(
                f"include_backbone=False: the backbone is the local folder {self.model.config.backbone_name_or_path}, "
                "which nobody else could fetch"
            )
        repo_id = create_repository(repo_id, private, token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_backbone=include_backbone)
            return publish_folder(folder, repo_id, commit_message, token, revision, create_pr)

    def _sanitize_parameters(
        self,
        top_k=None,
        chunk_length_s=None,
        stride_length_s=None,
        return_timeline=None,
        return_attention=None,
        strict=None,
        return_interval=None,
        listeners=None,
        hop_length_s=None,
        return_embedding=None,
        turns=None,
    ):
        if top_k is not None and not (isinstance(top_k, Integral) and top_k >= 1):
            raise ValueError(f"top_k: got {top_k!r}; expected a whole number, 1 or more")
        if return_attention:
            check_no_label_is(TIME, self.model.config.labels, "return_attention")
            if not self.model.config.has_attention:
                raise ValueError(f"return_attention: architecture {self.model.config.architecture!r} has no attention")
        if return_embedding:
            check_no_label_is(BACKBONE, self.model.config.labels, "return_embedding")
        if return_interval and not self.model.config.has_concentrations:
            raise ValueError(
                f"return_interval: this model was trained with loss={self.model.config.loss!r}, which does not say how "
                "sure a share is; expected a model that was trained with loss='beta_binomial'"
            )
        if listeners is not None and not (isinstance(listeners, int) and 1 <= listeners <= MOST_LISTENERS):
            raise ValueError(f"listeners: got {listeners!r}; expected a whole number from 1 to {MOST_LISTENERS}")
        preprocess = {
            "chunk_length_s": chunk_length_s,
            "stride_length_s": stride_length_s,
            "hop_length_s": hop_length_s,
            "strict": strict,
            "turns": turns,
        }
        forward = {"output_attentions": return_attention, "return_embedding": return_embedding}
        postprocess = {
            "top_k": top_k,
            "return_timeline": return_timeline,
            "return_attention": return_attention,
            "return_embedding": return_embedding,
            "turns": turns,
            "return_interval": return_interval,
            "listeners": listeners,
        }
        return tuple(
            {name: value for name, value in given.items() if value is not None}
            for given in (preprocess, forward, postprocess)
        )

    def get_inference_context(self):
        return torch.inference_mode

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """As in Transformers, except that a batch holds windows of similar length."""
        windows = DataLoader(
            PipelineChunkIterator(inputs, self.preprocess, preprocess_params),
            num_workers=min(num_workers, 1),  # each of several workers would process all inputs
            batch_size=1,
            collate_fn=no_collate_fn,
        )
        forward = partial(self.forward, **forward_params)
        if isinstance(inputs, list) and self.device.type == "cpu":
            batch_size = max(batch_size, CLIPS_PER_CPU_PASS)
        if batch_size > 1:
            windows, forward = BatchesByLength(windows, partial(self.run_batch, **forward_params), batch_size), dict
        return PipelineIterator(PipelinePackIterator(windows, forward, {}), self.postprocess, postprocess_params)

    def preprocess(self, audio, chunk_length_s=None, stride_length_s=0.0, hop_length_s=None, strict=False, turns=None):
        cutting = self.cutting(chunk_length_s, stride_length_s, hop_length_s)
        sampling_rate = self.feature_extractor.sampling_rate
        blocks = audio_blocks(audio, sampling_rate, strict)
        if turns is None:
            name = audio_name(audio)
            for window in stream_windows(blocks, *cutting):
                yield self.window_inputs(window, name)
        else:
            for turn, window in turn_windows(blocks, turns, sampling_rate, cutting):
                yield {"turn": turn, **self.window_inputs(window, turns[turn].place)}

    def run_batch(self, windows, **forward_params):
        """
        Runs windows through the model together.

        Args:
            windows: `list` of what `preprocess` yields.
            forward_params: as in `_forward`.

        Returns:
            `list[dict]`: the outputs of each window, as `postprocess` takes them.
        """
        batch = self.forward(pad_collate_fn(None, self.feature_extractor)(windows), **forward_params)
        return [
            {
                name: values[row : row + 1] if isinstance(values, torch.Tensor) else values[row]
                for name, values in batch.items()
            }
            for row in range(len(windows))
        ]

    def window_inputs(self, window, name):
        """Returns the inputs of `forward` for a `Window`; errors begin with `name`."""
        extractor = self.feature_extractor
        try:
            features = extractor(window.waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return {
            "is_last": window.is_last,
            "num_samples": len(window.waveform),
            "first": window.first,
            "part": (window.start, window.end),
            **features,
        }

    def cutting(self, chunk_length_s=None, stride_length_s=0.0, hop_length_s=None):
        """Checks lengths in seconds, and returns the arguments of `WindowCutter`."""
        extractor = self.feature_extractor
        if chunk_length_s is None:
            chunk_length_s = extractor.chunk_length_s
        chunk = self._num_samples("chunk_length_s", chunk_length_s)
        stride = self._num_samples("stride_length_s", stride_length_s)
        if not 2 * extractor.min_samples <= chunk <= extractor.max_window_samples:
            raise ValueError(
                f"chunk_length_s: got {chunk_length_s}; expected "
                f"{2 * extractor.min_samples / extractor.sampling_rate} to {extractor.chunk_length_s} s, the longest "
                "windows that the model was trained on"
            )
        if stride < 0 or chunk - 2 * stride < 2 * extractor.min_samples:
            raise ValueError(
                f"stride_length_s: got {stride_length_s}; expected 0 or more, and less than half of chunk_length_s, "
                f"{chunk_length_s} s"
            )
        hop = None if hop_length_s is None else self._num_samples("hop_length_s", hop_length_s)
        if hop is not None and (stride > 0 or not 2 * extractor.min_samples <= hop <= chunk):
            raise ValueError(
                f"hop_length_s: got {hop_length_s}; expected {2 * extractor.min_samples / extractor.sampling_rate} to "
                f"chunk_length_s, {chunk_length_s} s, and no stride_length_s"
            )
        return chunk, extractor.min_samples, stride, hop

    def _num_samples(self, name, seconds):
        """A length in samples; -1, which is no legal length, if it is infinite or NaN."""
        if not isinstance(seconds, Real) or isinstance(seconds, bool):
            raise ValueError(f"{name}: got {seconds!r}; expected a number of seconds")
        samples = seconds * self.feature_extractor.sampling_rate
        return round(samples) if abs(samples) < math.inf else -1

    def _forward(self, model_inputs, output_attentions=False, return_embedding=False):
        window = {name: model_inputs.pop(name) for name in OF_WINDOW if name in model_inputs}
        with embeddings_noted(self.model) if return_embedding else nullcontext({}) as embeddings:
            outputs = self.model(**model_inputs, output_attentions=output_attentions)
        window.update({EMBEDDING + name: vectors for name, vectors in embeddings.items()})
        window["logits"] = outputs.logits
        if outputs.concentrations is not None:
            window["concentrations"] = outputs.concentrations
        if output_attentions:
            window["attentions"] = outputs.attentions
        return window

    def postprocess(self, windows, turns=None, **options):
        if turns is not None:
            return conversation(windows, turns, partial(self._result, **options))
        result = self._result(windows, **options)
        return result if len(result) > 1 else result["shares"]

    def _result(
        self,
        windows,
        top_k=None,
        return_timeline=False,
        return_attention=False,
        return_embedding=False,
        return_interval=False,
        listeners=DEFAULT_LISTENERS,
    ):
        """Returns a dict with a clip's shares and what else was requested."""
        sampling_rate = self.feature_extractor.sampling_rate
        labels = self.model.config.labels
        rows = _rows(windows, "logits")
        durations = np.array([window["part"][1] - window["part"][0] for window in windows])
        (shares,) = average_by_duration(rows, durations)
        labelled = [{"label": label, "score": float(share)} for label, share in zip(labels, shares, strict=True)]
        if return_interval:
            (concentrations,) = average_by_duration(_rows(windows, "concentrations"), durations)
            low, high, _ = share_intervals(shares, concentrations, listeners)
            for share, *interval in zip(labelled, low, high, strict=True):
                share["interval"] = list(map(float, interval))
        result = {"shares": sorted(labelled, key=lambda share: -share["score"])[:top_k]}
        if return_timeline:
            result["timeline"] = [
                {
                    "start": window["part"][0] / sampling_rate,
                    "end": window["part"][1] / sampling_rate,
                    "shares": dict(zip(labels, map(float, row), strict=True)),
                }
                for window, row in zip(windows, rows, strict=True)
            ]
        if return_attention:
            result["attention"] = self._attention(windows, labels, durations / durations.sum())
        if return_embedding:
            result["embedding"] = {
                name: average_by_duration(_rows(windows, EMBEDDING + name), durations)[0].astype(np.float32)
                for name in (*labels, BACKBONE)
            }
        return result

    def _attention(self, windows, labels, fractions):
        """Weights of the steps that count in each window; `fractions`: each window's part of the clip's duration."""
        extractor, pool_size = self.feature_extractor, self.model.config.pool_size
        times, weights = [], []
        for window, fraction in zip(windows, fractions, strict=True):
            steps = extractor.num_frames(window["num_samples"]) // pool_size
            # A step's time is the middle of the `pool_size` frames that were pooled into it.
            frames = np.arange(steps) * pool_size + (pool_size - 1) / 2
            samples = window["first"] + extractor.first_center + frames * extractor.hop_length
            counts = (samples >= window["part"][0]) & (samples < window["part"][1])
            times.append(samples[counts] / extractor.sampling_rate)
            weights.append(window["attentions"][0, :, :steps].float().numpy()[:, counts] * fraction)
        weights = np.concatenate(weights, axis=1)
        by_label = {label: row.tolist() for label, row in zip(labels, weights, strict=True)}
        return {TIME: np.concatenate(times).tolist(), **by_label}


def _rows(windows, name):
    """The model's outputs of this name, (windows, labels) float32."""
    return np.concatenate([window[name].float().numpy() for window in windows])


class BatchesByLength:
    """
    Runs windows in batches of similar length, so that there is little padding, and yields their outputs one by one in
    the original order.

    Args:
        windows: `DataLoader` of what `EmotionSharePipeline.preprocess` yields.
        run_batch: function from a list of windows to their outputs.
        batch_size: largest number of windows per batch.
    """

    def __init__(self, windows, run_batch, batch_size):
        self.windows = windows
        self.run_batch = run_batch
        self.batch_size = batch_size

    def __len__(self):
        return len(self.windows.dataset)  # clips: Transformers' own iterators count these too

    def __iter__(self):
        windows = iter(self.windows)
        while pool := list(islice(windows, BATCHES_READ_AHEAD * self.batch_size)):
            outputs = {}
            for indices in passes([window["num_samples"] for window in pool], self.batch_size, MOST_PADDING):
                batch = self.run_batch([pool[index] for index in indices])
                outputs.update(zip(indices, batch, strict=True))
            yield from (outputs[index] for index in range(len(pool)))

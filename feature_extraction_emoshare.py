"""From waveforms to what an EmoShare model takes."""

import json
import math
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

from .backbone_emoshare import family_of
from .batched_features_emoshare import BatchedSpectra, BatchedWaveforms
from .checks_emoshare import check_choice, check_known
from .descriptors_emoshare import descriptors
from .fields_emoshare import FEATURE_TYPES
from .filter_banks_emoshare import FilterBanks
from .mel_emoshare import cosine_transform, mel_spectrogram
from .repository_emoshare import ACCESS, PushToHub
from .whisper_emoshare import WhisperLogMels
from .windows_emoshare import cut

logger = logging.get_logger(__name__)

# As in configuration_emoshare.py: a feature extractor may be loaded without a config.
OTHER_MODULES = """
import .architectures_emoshare
import .encoder_layers_emoshare
import .frames_emoshare
import .losses_emoshare
import .offload_emoshare
import .onnx_layers_emoshare
import .wav2vec2_bert_emoshare
import .wav2vec2_convolutions_emoshare
import .wav2vec2_emoshare
"""


ACOUSTIC_WINDOW_S = 0.025
ACOUSTIC_HOP_S = 0.010
# Added to mel energies before the logarithm: "relative" to those of the clip at unit variance, "absolute" to those of
# the clip as it is. For a clip at -30 dBFS, the two are equivalent.
LOG_FLOORS = {"relative": 1e-3, "absolute": 1e-6}
VARIANCE_FLOOR = 1e-7  # as in Transformers' Wav2Vec2FeatureExtractor
MIN_FRAMES = 2
# By feature type, what computes the inputs of backbones that do not take waveforms, as their own extractors do.
BACKBONE_INPUTS = {"filter_banks": FilterBanks(), "whisper_log_mels": WhisperLogMels()}
# Fields of saved preprocessor configs that are not arguments of the feature extractor.
SAVED_FIELDS = {
    "auto_map",
    "feature_extractor_type",
    "feature_size",
    "padding_side",
    "processor_class",
    "return_attention_mask",
}


class EmoShareFeatureExtractor(PushToHub, SequenceFeatureExtractor):
    r"""
    Turns mono waveforms into `input_values` (for models with a backbone) or `input_features` (acoustic features, for
    models without), each with an attention mask.

    Args:
        feature_type (`str`, *optional*, defaults to `"waveform"`):
            `"waveform"`: samples as `input_values`, (batch, samples). `"mel"`: 40 log-mel bands from 0 to 8,000 Hz,
            25 ms windows every 10 ms, as `input_features`, (batch, frames, 40). `"mfcc"`: 40 cepstral coefficients of
            the same bands. `"descriptors"`: the first 14 of them and 16 low-level descriptors of spectrum and voice, as
            `descriptors_emoshare.DESCRIPTORS` names them, (batch, frames, 30), of clips at zero mean and unit variance
            (`do_normalize=True`, `floor="relative"`). `"filter_banks"`: what w2v-BERT 2.0 takes, (batch, frames, 160):
            80 bands in 25 ms windows every 10 ms, two windows to a frame, each band normalised over the clip.
            `"whisper_log_mels"`: what Whisper takes, (batch, log-mels, 80 or 128): 25 ms windows every 10 ms, with four
            windows of silence after the clip; the encoder makes one frame of two windows.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate in Hz that waveforms must have.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether each clip is normalised to zero mean and unit variance, over its samples or over its log-mel map, so
            that its recording level does not matter. For a backbone, as its own preprocessor config says.
        chunk_length_s (`float`, *optional*, defaults to 8.0):
            Longest window in seconds; [`~EmoShareFeatureExtractor.windows`] cuts longer clips. Whisper hears 30 s at
            most.
        frame_length (`int`, *optional*):
            Samples per frame. Defaults to 400 (25 ms), which pretrained backbones have as well.
        hop_length (`int`, *optional*):
            Samples from one frame to the next. Defaults to 320 for waveforms, 160 for acoustic features.
        min_frames (`int`, *optional*, defaults to 2):
            Number of frames of the shortest clip or window; the model's `pool_size` if that is more.
        padding_value (`float`, *optional*, defaults to 0.0):
            Value of the padding to the right of normalised clips.
        floor (`str`, *optional*, defaults to `"relative"`):
            What the normalisation does with quiet clips. `"relative"`: the same as with loud ones, whatever their
            level; digital silence stays zero. `"absolute"`: a constant is added to the variance of a waveform, or to
            the mel energies before the logarithm, so that a clip far below -30 dBFS has other features than a louder
            copy of it. Transformers' `Wav2Vec2FeatureExtractor` does so, and models of earlier versions were trained
            with it: a saved preprocessor config without this field means `"absolute"`. Without effect if
            `do_normalize` is `False`: the level then matters. `"filter_banks"` and `"whisper_log_mels"` are made by
            Transformers and ignore `floor`: for filter banks, Transformers' own floor only affects digital silence, and
            log-mels for Whisper depend on the level.
        num_mel_bins (`int`, *optional*):
            Number of bands of `"filter_banks"` and `"whisper_log_mels"`, 80 if not given; other feature types do not
            take it.

    Raises:
        ValueError: on an unknown field or an illegal value, or windows that could not be cut into two of `min_frames`;
            the message begins with the field's name.
    """

    _auto_class = "AutoFeatureExtractor"  # saving it writes this module next to preprocessor_config.json

    def __init__(
        self,
        feature_type="waveform",
        sampling_rate=16000,
        do_normalize=True,
        chunk_length_s=8.0,
        frame_length=None,
        hop_length=None,
        min_frames=MIN_FRAMES,
        padding_value=0.0,
        floor="relative",
        num_mel_bins=None,
        **kwargs,
    ):
        check_choice("feature_type", feature_type, FEATURE_TYPES)
        check_choice("floor", floor, LOG_FLOORS)
        check_known(kwargs, EmoShareFeatureExtractor, SAVED_FIELDS)
        is_waveform = feature_type == "waveform"
        kwargs.pop("feature_size", None)  # saved files have it; it follows from the feature type
        super().__init__(FEATURE_TYPES[feature_type][1], sampling_rate, padding_value, **kwargs)
        self.feature_type = feature_type
        self.do_normalize = do_normalize
        self.floor = floor
        self.chunk_length_s = chunk_length_s
        self.return_attention_mask = True
        _check_type(self, bool, "True or False", "do_normalize")
        _check_type(self, Real, "a number", "chunk_length_s", "padding_value")
        _check_type(self, Integral, "a whole number, 1 or more", "sampling_rate")
        default_length = round(ACOUSTIC_WINDOW_S * sampling_rate)
        default_hop = 320 if is_waveform else round(ACOUSTIC_HOP_S * sampling_rate)
        inputs = BACKBONE_INPUTS.get(feature_type)
        if inputs is not None:
            default_length, default_hop = inputs.frame_length, inputs.hop_length
        self.frame_length = default_length if frame_length is None else frame_length
        self.hop_length = default_hop if hop_length is None else hop_length
        self.min_frames = min_frames
        _check_type(self, Integral, "a whole number, 1 or more", "frame_length", "hop_length", "min_frames")
        self._set_bands(inputs, num_mel_bins)
        self._check_windows()
        self._check_level()

    @classmethod
    def from_dict(cls, feature_extractor_dict, **kwargs):
        """As in Transformers. A saved config without `floor` is from an earlier version, and means `"absolute"`."""
        return super().from_dict({"floor": "absolute", **feature_extractor_dict}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As `from_dict`, with the content of a file."""
        return cls.from_dict(json.loads(Path(json_file).read_text(encoding="utf-8")))

    def _set_bands(self, inputs, num_mel_bins):
        """Sets `num_mel_bins` and the width that follows from it; other feature types do not have this field."""
        if inputs is not None:
            self.num_mel_bins = inputs.num_mel_bins if num_mel_bins is None else num_mel_bins
            _check_type(self, Integral, "a whole number, 1 or more", "num_mel_bins")
            self.feature_size = inputs.width(self)
        elif num_mel_bins is not None:
            raise ValueError(f"num_mel_bins: got {num_mel_bins!r}; feature_type={self.feature_type!r} does not take it")

    def _check_windows(self):
        # Twice the shortest clip, because the last cut may move back by the length of the shortest clip.
        if not (math.isfinite(self.chunk_length_s) and self.max_window_samples >= 2 * self.min_samples):
            raise ValueError(
                f"chunk_length_s: got {self.chunk_length_s} s; expected at least "
                f"{2 * self.min_samples / self.sampling_rate:.3f} s, twice the shortest clip's {self.min_frames} frames"
            )

    def _check_level(self):
        for field, only in [("do_normalize", True), ("floor", "relative")]:
            if self.feature_type == "descriptors" and getattr(self, field) != only:
                raise ValueError(
                    f"{field}: got {getattr(self, field)!r}; feature_type='descriptors' has thresholds for clips at "
                    f"unit variance, so it needs {only!r}"
                )

    @property
    def model_input_names(self):
        return ["input_values" if self.feature_type == "waveform" else "input_features", "attention_mask"]

    @property
    def min_samples(self):
        """Samples of the shortest clip: `min_frames` frames."""
        return self.samples_of(self.min_frames)

    @property
    def max_window_samples(self):
        """Samples of the longest window."""
        return round(self.chunk_length_s * self.sampling_rate)

    @property
    def first_center(self):
        """Samples from the start of a clip to the middle of its first frame; Whisper's first frame starts earlier."""
        return 0 if self.feature_type == "whisper_log_mels" else self.frame_length / 2

    def samples_of(self, frames):
        """The smallest number of samples that gives this many frames."""
        return self.frame_length + (frames - 1) * self.hop_length

    def num_frames(self, num_samples):
        """Number of frames in `num_samples` samples."""
        return (num_samples - self.frame_length) // self.hop_length + 1

    def limit_windows(self, max_frames):
        """
        Shortens `chunk_length_s`, if necessary, so that no window has more than `max_frames` frames.

        Raises:
            ValueError: if windows would become too short.
        """
        longest = self.samples_of(max_frames + 1) - 1
        if self.max_window_samples > longest:
            # A multiple of 1 ms at 16 kHz, so that the length in seconds has few digits.
            self.chunk_length_s = longest // 16 * 16 / self.sampling_rate
            self._check_windows()
            logger.warning(
                f"windows are cut to {self.chunk_length_s} s, {max_frames} frames, the most that the model takes"
            )

    @classmethod
    def for_backbone(
        cls,
        name_or_path,
        backbone_config,
        revision=None,
        token=None,
        cache_dir=None,
        local_files_only=False,
        force_download=False,
        **kwargs,
    ):
        """
        Creates the feature extractor that fits a pretrained backbone.

        Args:
            name_or_path: Hub id or local folder of the backbone, whose preprocessor config says whether it was trained
                on normalised waveforms.
            backbone_config: its config, which determines the frame length.
            revision: its branch, tag or commit.
            token, cache_dir, local_files_only, force_download: as in Transformers, for reading from the Hub; never
                saved.
            kwargs: further arguments of `EmoShareFeatureExtractor`.

        Returns:
            `EmoShareFeatureExtractor`.

        Raises:
            ValueError: if the backbone is not supported, or its preprocessor config does not fit it.
            OSError: if its preprocessor config cannot be read, or the Hub cannot be reached.
        """
        values = (token, cache_dir, local_files_only, force_download)
        access = {"revision": revision, **dict(zip(ACCESS, values, strict=True))}
        family = family_of(backbone_config)
        inputs = BACKBONE_INPUTS.get(family.feature_type)
        what = "waveforms" if inputs is None else FEATURE_TYPES[family.feature_type][0]
        if _has_preprocessor_config(name_or_path, access):
            own = AutoFeatureExtractor.from_pretrained(name_or_path, **access)
        else:
            how = "normalised to zero mean and unit variance" if inputs is None else "made"
            logger.warning(
                f"{name_or_path} has no preprocessor config; {what} at 16 kHz are {how} as Transformers does by default"
            )
            own = cls() if inputs is None else inputs.own_extractor(backbone_config)
        frame_length, hop_length = family.frame_geometry(backbone_config)
        fields = {"frame_length": frame_length, "hop_length": hop_length}
        try:
            fields |= {"do_normalize": own.do_normalize} if inputs is None else inputs.fields(own, backbone_config)
        except AttributeError as error:
            raise ValueError(
                f"{name_or_path}: its preprocessor config is of a {type(own).__name__}, which has no {error.name}; "
                f"it cannot produce {what}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error
        return cls(feature_type=family.feature_type, sampling_rate=own.sampling_rate, **fields, **kwargs)

    def windows(self, num_samples):
        """
        The windows of a clip: consecutive, each `chunk_length_s` long; the last one holds the rest.

        Args:
            num_samples: length of the clip in samples.

        Returns:
            `list[tuple[int, int]]`: first sample and end of each window, as `windows_emoshare.cut` gives them.
        """
        return cut(num_samples, self.max_window_samples, self.min_samples)

    def __call__(
        self,
        raw_speech,
        sampling_rate=None,
        padding=True,
        max_length=None,
        truncation=False,
        pad_to_multiple_of=None,
        return_tensors=None,
    ):
        """
        Args:
            raw_speech: a mono waveform, or a list of them: 1D floating-point arrays, tensors or lists of numbers,
                usually in [-1, 1].
            sampling_rate: their sampling rate in Hz. Always pass it, so that a wrong rate is noticed.
            padding, max_length, truncation, pad_to_multiple_of, return_tensors: as in Transformers. Clips are
                normalised before they are padded.

        Returns:
            `BatchFeature` with `input_values` (batch, samples) or `input_features` (batch, frames, width), float32,
            and `attention_mask` (batch, samples or frames), int32.

        Raises:
            ValueError: on another sampling rate, or a waveform that is empty, too short, not finite, not 1D or not
                floating point.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"{type(self).__name__} was called without sampling_rate; the waveforms are taken to be sampled at "
                f"{self.sampling_rate} Hz"
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: got {sampling_rate} Hz, expected {self.sampling_rate} Hz; resample the audio first, "
                "or let the emotion-share pipeline do it"
            )
        clips = raw_speech if _is_batch(raw_speech) else [raw_speech]
        if len(clips) == 0:
            raise ValueError("raw_speech: got an empty list; expected at least one waveform")
        features = [self._features(self._checked(clip)) for clip in clips]
        return self.pad(
            BatchFeature({self.model_input_names[0]: features}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )

    def _checked(self, clip):
        if isinstance(clip, torch.Tensor):
            # NumPy has no bfloat16.
            clip = (clip.float() if clip.is_floating_point() else clip).detach().cpu().numpy()
        waveform = np.asarray(clip)
        if waveform.ndim != 1:
            raise ValueError(
                f"raw_speech: got an array of shape {waveform.shape}; expected mono waveforms, 1D each "
                "(average the channels; give a batch as a list)"
            )
        if waveform.size == 0:
            raise ValueError("raw_speech: got an empty waveform")
        if not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(
                f"raw_speech: got {waveform.dtype} samples; expected floating point in [-1, 1] "
                "(divide 16-bit integers by 32768)"
            )
        with np.errstate(over="ignore"):  # values too large for float32 become infinite
            waveform = waveform.astype(np.float32)
        if not np.isfinite(waveform).all():
            count = int((~np.isfinite(waveform)).sum())
            raise ValueError(f"raw_speech: {count} of {waveform.size} samples are not finite")
        if waveform.size < self.min_samples:
            raise ValueError(
                f"raw_speech: got {waveform.size} samples ({waveform.size / self.sampling_rate:.3f} s); expected at "
                f"least {self.min_samples} ({self.min_samples / self.sampling_rate:.3f} s), {self.min_frames} frames"
            )
        if waveform.size > self.max_window_samples:
            logger.warning_once(
                f"a waveform of {waveform.size / self.sampling_rate:.1f} s is longer than chunk_length_s="
                f"{self.chunk_length_s}: the model was trained on shorter windows; cut it with windows(), as the "
                "emotion-share pipeline does"
            )
        return waveform

    def as_module(self):
        """
        Does what `__call__` does for padded waveforms, in PyTorch operators only, so that a model can be exported.

        Returns:
            `nn.Module` that maps waveforms (batch, samples) float32 and lengths (batch,) int64 to features and their
            lengths.

        Raises:
            ValueError: if the features are computed by the backbone's own extractor.
        """
        if self.feature_type in BACKBONE_INPUTS:
            raise ValueError(f"feature_type: {self.feature_type!r} cannot be exported yet")
        is_waveform, is_relative = self.feature_type == "waveform", self._is_relative()
        waveforms = BatchedWaveforms(
            do_normalize=self.do_normalize if is_waveform else is_relative,
            variance_floor=None if is_relative else VARIANCE_FLOOR,
        )
        if is_waveform:
            return waveforms
        mel = mel_spectrogram(*self._frame_geometry())
        return BatchedSpectra(
            waveforms,
            mel.spectrogram.window,
            mel.mel_scale.fb,
            self.hop_length,
            self._log_floor(),
            variance_floor=VARIANCE_FLOOR if self._is_standardized() else None,
            cosine_transform=None if self.feature_type == "mel" else torch.from_numpy(cosine_transform()),
            describe=self._describe if self.feature_type == "descriptors" else None,
        )

    def _is_relative(self):
        """Whether waveforms are normalised independently of their level."""
        return self.do_normalize and self.floor == "relative"

    def _is_standardized(self):
        """Whether log-mels get zero mean and unit variance."""
        return self.do_normalize and self.feature_type != "descriptors"

    def _log_floor(self):
        return LOG_FLOORS["relative" if self._is_relative() else "absolute"]

    def _frame_geometry(self):
        return self.sampling_rate, self.frame_length, self.hop_length

    def _describe(self, waveforms, cepstra, num_frames):
        return descriptors(waveforms, cepstra, num_frames, *self._frame_geometry())

    def _features(self, waveform):
        if self.feature_type in BACKBONE_INPUTS:
            return BACKBONE_INPUTS[self.feature_type].features(waveform, self)
        if self._is_relative():
            waveform = _at_unit_variance(waveform)
        if self.feature_type == "waveform":
            return _standardized(waveform) if self.do_normalize and not self._is_relative() else waveform
        waveform = torch.from_numpy(waveform)
        # Only whole windows (`center=False`), so that no frame covers anything outside the clip.
        power = mel_spectrogram(*self._frame_geometry())(waveform)
        features = (power + self._log_floor()).log().T.numpy()  # (frames, 40)
        if self._is_standardized():
            features = _standardized(features)
        if self.feature_type != "mel":
            features = features @ cosine_transform()
        if self.feature_type == "descriptors":
            num_frames = torch.tensor(len(features), device="cpu")
            features = self._describe(waveform, torch.from_numpy(features), num_frames).numpy()
        return features


def _has_preprocessor_config(name_or_path, access):
    """Whether a repository or folder has a preprocessor config. An unreachable Hub raises."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if Path(name_or_path).is_dir():
            if (Path(name_or_path) / name).is_file():
                return True
            continue
        try:
            hf_hub_download(name_or_path, name, **access)
            return True
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    return False


def _is_batch(raw_speech):
    return isinstance(raw_speech, list | tuple) and not (raw_speech and np.isscalar(raw_speech[0]))


def _at_unit_variance(waveform):
    """
    Scales to zero mean and unit variance, whatever the level; zeros if all samples are equal. In float64, the mean of
    equal samples is exactly their value, and no level overflows or underflows.
    """
    waveform = waveform.astype(np.float64)
    waveform -= waveform.mean()
    deviation = waveform.std()
    return (waveform / deviation if deviation > 0 else waveform).astype(np.float32)


def _standardized(features):
    """Zero mean and unit variance over the whole array; the variance floor keeps silence at zero."""
    return ((features - features.mean()) / np.sqrt(features.var() + VARIANCE_FLOOR)).astype(np.float32)


def _check_type(extractor, kind, expected, *names):
    for name in names:
        value = getattr(extractor, name)
        is_of_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_of_kind or (kind is Integral and value < 1):
            raise ValueError(f"{name}: got {value!r}; expected {expected}")

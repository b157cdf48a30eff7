"""The filter banks that w2v-BERT 2.0 takes: Kaldi's, as Transformers' `SeamlessM4TFeatureExtractor` makes them."""

from functools import lru_cache

from transformers import SeamlessM4TFeatureExtractor

WINDOW, HOP = 400, 160  # length of Kaldi's windows, and samples from one to the next
BANDS, STRIDE = 80, 2  # defaults: bands per window, and windows per frame


def geometry(stride):
    """Length in samples of a frame of `stride` consecutive windows, and samples from one frame to the next."""
    return WINDOW + (stride - 1) * HOP, stride * HOP


class FilterBanks:
    """
    An entry of `feature_extraction_emoshare.BACKBONE_INPUTS`: log-mels, `stride` consecutive windows per frame.

    Attributes:
        num_mel_bins, frame_length, hop_length: defaults of these fields of `EmoShareFeatureExtractor`.
    """

    num_mel_bins = BANDS
    frame_length, hop_length = geometry(STRIDE)

    def own_extractor(self, backbone_config):
        """The feature extractor of a backbone whose repository has no preprocessor config: Transformers' default."""
        return SeamlessM4TFeatureExtractor()

    def fields(self, own, backbone_config):
        """
        Args:
            own: the backbone's own feature extractor.
            backbone_config: its config.

        Returns:
            `dict`: fields of the `EmoShareFeatureExtractor` that gives the same features.

        Raises:
            ValueError: if the backbone takes frames of another width.
        """
        width, expected = own.num_mel_bins * own.stride, backbone_config.feature_projection_input_dim
        if width != expected:
            raise ValueError(
                f"its preprocessor config makes frames of {own.stride} x {own.num_mel_bins} values, but its config has "
                f"feature_projection_input_dim={expected}"
            )
        frame_length, hop_length = geometry(own.stride)
        return {"num_mel_bins": own.num_mel_bins, "frame_length": frame_length, "hop_length": hop_length}

    def width(self, extractor):
        """
        Width of the frames of an `EmoShareFeatureExtractor`.

        Raises:
            ValueError: if its frames are not a whole number of windows.
        """
        length, hop = extractor.frame_length, extractor.hop_length
        stride = hop // HOP
        if (length, hop) != geometry(stride):
            raise ValueError(
                f"frame_length: got {length} with hop_length {hop}; expected n windows of {WINDOW} samples "
                f"every {HOP}, and a hop_length of n times {HOP}"
            )
        return stride * extractor.num_mel_bins

    def features(self, waveform, extractor):
        """
        Computes the filter banks of a clip. Only whole windows and whole frames are used, so that no frame covers
        anything outside the clip.

        Args:
            waveform: (samples,) float32.
            extractor: `EmoShareFeatureExtractor` with the settings.

        Returns:
            (frames, width) float32.
        """
        made = _own_extractor(extractor.sampling_rate, extractor.num_mel_bins, extractor.hop_length // HOP)(
            waveform,
            sampling_rate=extractor.sampling_rate,
            do_normalize_per_mel_bins=extractor.do_normalize,
            pad_to_multiple_of=None,
            return_tensors="np",
        )
        return made["input_features"][0]


@lru_cache
def _own_extractor(sampling_rate, num_mel_bins, stride):
    return SeamlessM4TFeatureExtractor(num_mel_bins, sampling_rate, num_mel_bins, stride=stride)

"""
The w2v-BERT 2.0 family of speech encoders: filter banks and conformer layers.

With an attention mask, Transformers' own implementation is exact in a batch: padding is set to zero before each
convolution, which is causal, and attention does not see it. What remains are position embeddings, which are cached from
call to call.
"""

import copy
from types import MethodType

from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask

from .encoder_layers_emoshare import EncoderFamily, EncoderLayers
from .filter_banks_emoshare import BANDS, geometry
from .frames_emoshare import padding_mask


class Wav2Vec2BertFamily(EncoderFamily):
    """The `BackboneFamily` of w2v-BERT 2.0."""

    model_types = ("wav2vec2-bert",)
    feature_type = "filter_banks"
    input_name = "input_features"
    attention_projections = ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v", "self_attn.linear_out")

    def check(self, config, is_frozen):
        """Raises ValueError for a backbone config that would not be exact in a batch."""
        if config.add_adapter:
            raise ValueError(
                "backbone_config: add_adapter=True is not supported: the adapter shortens the frames and mixes "
                "padding into them"
            )
        if config.conv_depthwise_kernel_size % 2 == 0:
            raise ValueError(
                f"backbone_config: conv_depthwise_kernel_size is {config.conv_depthwise_kernel_size}; expected an odd "
                "number"
            )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"backbone_config: hidden_size is {config.hidden_size}; expected a multiple of num_attention_heads, "
                f"{config.num_attention_heads}"
            )

    def frame_geometry(self, config):
        """Length and hop of frames in samples, if their windows have 80 bands."""
        return geometry(config.feature_projection_input_dim // BANDS)

    def num_frames(self, config, lengths):
        """As many frames as the feature extractor has made: `lengths`."""
        return lengths

    def build(self, config):
        """A backbone with random weights."""
        return AutoModel.from_config(config)

    def prepare(self, backbone, fast=True):
        """
        Changes a backbone in place so that frame features depend on nothing but the clip. With `fast`, layers of the
        encoder above the highest requested one do not run, and on a CPU, frozen linear layers in bfloat16 keep their
        weights in the layout of its matrix unit.
        """
        positions = backbone.encoder.embed_positions
        if positions is not None:
            positions.forward = MethodType(_without_memory, positions)
        if fast:
            backbone.encoder.layers = EncoderLayers(backbone.encoder.layers)

    def hidden_states(self, backbone, input_features, lengths, layers):
        """
        Runs a prepared backbone once on a batch of padded clips.

        Args:
            backbone: after `prepare`.
            input_features: (batch, frames, bands of a frame), padded on the right.
            lengths: (batch,) int64, each clip's number of frames.
            layers: which hidden states: -1 is Transformers' `last_hidden_state`, k >= 0 its `hidden_states[k]`.

        Returns:
            `dict` from layer to (batch, frames, width), arbitrary past a clip's last frame.

        Raises:
            ValueError: if the width of the frames is not the backbone's.
        """
        width, expected = input_features.shape[-1], backbone.config.feature_projection_input_dim
        if width != expected:
            raise ValueError(f"input_features: got frames of width {width}; expected {expected}")
        return self.run(backbone, input_features, padding_mask(lengths, input_features.shape[1]), layers)

    def upper_states(self, backbone, hidden_states, lengths, first, layer):
        """As `BackboneFamily.upper_states`."""
        mask, encoder, states = padding_mask(lengths, hidden_states.shape[1]), backbone.encoder, hidden_states
        positions = None if encoder.embed_positions is None else encoder.embed_positions(states)
        attention_mask = create_bidirectional_mask(backbone.config, states, mask)
        for module in self.layers(backbone, first, layer):
            states = module(
                states,
                attention_mask=attention_mask,
                relative_position_embeddings=positions,
                conv_attention_mask=mask,
            )
        return states


def _without_memory(positions, frames):
    """
    The embedding of positions, computed for these frames. Transformers' modules cache the last one, in the precision of
    its batch, and reuse it for other batches of the same length.
    """
    copied = copy.copy(positions)
    copied._buffers = dict(positions._buffers)
    return type(positions).forward(copied, frames)

"""
The w2v-BERT 2.0 family of speech encoders: filter banks and conformer layers.

With an attention mask, Transformers' own implementation is exact in a batch: padding is zero before each convolution,
which looks back alone, and attention does not see it. What is left is what its positions keep from call to call.
"""

import copy
from types import MethodType

from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask

from .encoder_layers_emoshare import EncoderLayers, cut_encoder, running
from .filter_banks_emoshare import BANDS, geometry
from .frames_emoshare import padding_mask


class Wav2Vec2BertFamily:
    """What `BackboneFamily` asks for, of w2v-BERT 2.0."""

    model_types = ("wav2vec2-bert",)
    feature_type = "filter_banks"
    input_name = "input_features"
    # SpecAugment's mask, which only pretraining and fine-tuning use: a checkpoint may lack it.
    optional_weights = ("masked_spec_embed",)
    attention_projections = ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v", "self_attn.linear_out")
    paddings = ()

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

    def width(self, config):
        """Width of the frame features."""
        return config.hidden_size

    def num_layers(self, config):
        """Layers of the encoder: there is one more hidden state than layers."""
        return config.num_hidden_layers

    def frame_geometry(self, config):
        """Samples that one frame sees, and samples from one frame to the next, where its windows have 80 bands."""
        return geometry(config.feature_projection_input_dim // BANDS)

    def num_frames(self, config, lengths):
        """As many (int or int tensor, as given) as the feature extractor has made."""
        return lengths

    def build(self, config):
        """A backbone with random weights."""
        return AutoModel.from_config(config)

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""
        return AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)

    def prepare(self, backbone, fast=True):
        """
        Changes a backbone in place so that frame features depend on nothing but the clip. With `fast`, layers of the
        encoder above the highest one that is asked for are not run, and on a CPU, frozen linear layers in bfloat16 keep
        their weights in the layout of its matrix unit.
        """
        positions = backbone.encoder.embed_positions
        if positions is not None:
            positions.forward = MethodType(_without_memory, positions)
        if fast:
            backbone.encoder.layers = EncoderLayers(backbone.encoder.layers)

    def cut(self, backbone, layer):
        """A view without the layers of the encoder that `hidden_states` does not run for this layer."""
        return cut_encoder(backbone, layer)

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
            ValueError: if frames have another number of bands.
        """
        width, expected = input_features.shape[-1], backbone.config.feature_projection_input_dim
        if width != expected:
            raise ValueError(f"input_features: got frames of width {width}; expected {expected}")
        if isinstance(backbone.encoder.layers, EncoderLayers):
            backbone.encoder.layers.pack_linears(backbone.dtype, input_features.device)
        with running(layers):
            outputs = backbone(
                input_features,
                attention_mask=padding_mask(lengths, input_features.shape[1]),
                output_hidden_states=any(layer != -1 for layer in layers),
                return_dict=True,
            )
        return {layer: outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer] for layer in layers}

    def run_all_layers(self, backbone):
        """Switches LayerDrop and SpecAugment off, in place."""
        backbone.config.layerdrop = 0.0
        backbone.config.apply_spec_augment = False

    def layers(self, backbone, first, layer):
        """The modules of the encoder's layers that `upper_states` runs, in their order."""
        return list(backbone.encoder.layers.children())[first : None if layer == -1 else layer]

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
    The embedding of positions, computed for these frames. Transformers' modules keep the last one, in the precision of
    the batch that it was made for, which others of the same length would then get.
    """
    copied = copy.copy(positions)
    copied._buffers = dict(positions._buffers)
    return type(positions).forward(copied, frames)

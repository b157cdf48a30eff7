"""The head of an EmoShare model: frame features to the share of an emotion (paper, section 2.4)."""

import math
from functools import partial
from itertools import chain, pairwise

import torch
from torch import nn
from transformers.activations import ACT2FN

from .architectures_emoshare import ARCHITECTURES
from .backbone_emoshare import family_of
from .frames_emoshare import last_step, length_mask
from .offload_emoshare import weights_in_place
from .pooling_emoshare import POOLINGS
from .threads_emoshare import side_by_side

TRANSFORMER_LAYERS = 2
# A concentration is this times the exponential of a head's output, which is clamped to these limits.
CONCENTRATION_AT_ZERO = 10.0
LIMITS_OF_LOGARITHM = (-9.0, 9.0)


class EmotionHead(nn.Module):
    """
    CNN > LSTM > attention > feed-forward: frame features to the share of one emotion, or of all with a shared trunk
    (paper, section 2.4; here Architecture 2).

    - stem: convolutions with ReLU, and max-pooling from frames to steps; or none, so that the steps are the frames;
    - encoder: an LSTM; or transformer layers, which see the order of frames only through the stem; or none;
    - pooling: the mean over time (Eq. 1), attention (Eq. 2a, 2b), or statistics over time;
    - regressor: a feed-forward network and the output activation.

    In training, dropout (`config.dropout`) acts on the output of the stem, between LSTM layers or on what the parts of
    a transformer layer add, on the output of the pooling, and after each hidden layer of the feed-forward network.

    `ARCHITECTURES[config.architecture]` names stem, encoder and pooling. Each part is a submodule under its name, which
    is also its name in checkpoints.

    Args:
        config: the model's `EmoShareConfig`.
        num_outputs: number of shares that this head predicts. If the loss needs concentrations, the last layer has as
            many further outputs for them, after those for the shares.
    """

    def __init__(self, config, num_outputs=1):
        super().__init__()
        self.architecture = ARCHITECTURES[config.architecture]
        self.num_outputs = num_outputs
        self.layer_weights = None
        if config.backbone_layer == "weighted":
            # One weight for the input of the backbone's first layer and one for the output of each, before the softmax.
            num_layers = family_of(config.backbone_config).num_layers(config.backbone_config)
            self.layer_weights = nn.Parameter(torch.zeros(num_layers + 1))
        stem = STEMS[self.architecture.stem](config)
        self.add_module(self.architecture.stem, stem)
        self.dropout = Dropout(config.dropout)
        self.lstm_norm = _norm_of_steps(config)
        encoder = ENCODERS[self.architecture.encoder](config, stem.width)
        self.add_module(self.architecture.encoder, encoder)
        pooling = POOLINGS[self.architecture.pooling](config, encoder.width)
        self.add_module(self.architecture.pooling, pooling)
        self.ffn = _feed_forward(pooling.width, config)
        columns = 2 * num_outputs if config.has_concentrations else num_outputs
        width = [pooling.width, *config.ffn_sizes][-1]
        self.has_shortcut = self.architecture.has_shortcut and len(self.ffn) > 0
        self.output = nn.Linear(width + pooling.width if self.has_shortcut else width, columns)
        self.output_activation = ACT2FN[config.output_activation]

    @property
    def dtype(self):
        """Dtype of the floating-point weights; quantised layers may have none."""
        return next(tensor.dtype for tensor in chain(self.parameters(), self.buffers()) if tensor.is_floating_point())

    @property
    def stem(self):
        return self.get_submodule(self.architecture.stem)

    @property
    def encoder(self):
        return self.get_submodule(self.architecture.encoder)

    @property
    def pooling(self):
        return self.get_submodule(self.architecture.pooling)

    def rescale_concentrations(self, factor, exponent=1.0):
        """Replaces each concentration c that this head predicts by `factor` times c to the power of `exponent`."""
        offset = math.log(factor) + (exponent - 1) * math.log(CONCENTRATION_AT_ZERO)
        with torch.no_grad():
            self.output.weight[self.num_outputs :] *= exponent
            self.output.bias[self.num_outputs :] = exponent * self.output.bias[self.num_outputs :] + offset

    def forward(self, features, lengths):
        """
        Args:
            features: (batch, frames, width), or (batch, layers, frames, width) for `backbone_layer="weighted"`. If they
                are in bfloat16, so are the convolutions; what follows is in the dtype of the weights.
            lengths: (batch,) int64, each clip's number of frames, at least `pool_size`.

        Returns:
            Shares (batch, outputs), and attention weights (batch, steps) or `None`. If the loss needs concentrations,
            they follow the shares: (batch, 2 * outputs).
        """
        with weights_in_place(self):
            states, last_states, mask = self._states(features, lengths)
            pooled, weights = self.pooling(states, last_states, mask)
            hidden = self.ffn(pooled, self.dropout)
            if self.has_shortcut:
                hidden = torch.cat([hidden, pooled], dim=1)
            # Autocast would round shares above 0.998 to 1, where a likelihood has no gradient.
            with torch.autocast(hidden.device.type, enabled=False):
                outputs = self.output(self.dropout(hidden).to(self.dtype))
            shares = self.output_activation(outputs[:, : self.num_outputs])
            if outputs.shape[1] > self.num_outputs:
                shares = torch.cat([shares, _concentrations(outputs[:, self.num_outputs :])], dim=1)
            return shares, weights

    def statistics_of(self, features, lengths):
        """The statistics over time of a `StatisticsPooling`, not yet scaled, (batch, statistics); args as `forward`."""
        states, _, mask = self._states(features, lengths)
        return self.pooling.statistics(states, mask)

    def _states(self, features, lengths):
        if self.layer_weights is not None:
            features = torch.einsum("l,blfw->bfw", self.layer_weights.softmax(dim=0).to(features.dtype), features)
        steps = self.stem(features, lengths).to(self.dtype)  # (batch, steps, channels)
        step_lengths = lengths // self.stem.pool_size
        mask = length_mask(step_lengths, steps.shape[1])
        if self.architecture.stem != "no_stem":
            steps = self.dropout(self.lstm_norm(steps))
        return *self.encoder(steps, step_lengths, mask), mask


def run_heads(heads, features, lengths):
    """
    Returns the outputs of several heads, a list; `features` and `lengths` are as in `EmotionHead.forward`. On a CPU,
    heads run side by side if no gradients are needed.
    """
    tasks = [partial(head, features, lengths) for head in heads]
    if features.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return [task() for task in tasks]
    if torch.compiler.is_compiling():
        return [task() for task in tasks]
    mode = torch.is_inference_mode_enabled()
    return side_by_side([partial(_without_gradients, task, mode) for task in tasks])


def _without_gradients(function, inference_mode):
    """Calls a function in a thread of its own, which does not inherit these modes."""
    with torch.no_grad(), torch.inference_mode(inference_mode):
        return function()


class Convolutions(nn.ModuleList):
    """The stem: 1D convolutions over frames, each with ReLU, then max-pooling over time."""

    def __init__(self, config):
        widths = [config.feature_size, *config.conv_channels]
        super().__init__(
            nn.Conv1d(width_in, width_out, config.conv_kernel_size, padding="same")
            for width_in, width_out in pairwise(widths)
        )
        self.width = config.conv_channels[-1]
        self.pool_size = config.pool_size
        # The released network pads every clip to this length, and masks no convolution.
        self.padded_frames = config.max_frames if config.normalization == "sequence" else None

    def forward(self, features, lengths):
        """(batch, frames, width) and (batch,) frames -> (batch, steps, channels)"""
        mask = length_mask(lengths, features.shape[1])
        features = features.masked_fill(~mask[..., None], 0)
        if self.padded_frames is not None:
            features = nn.functional.pad(features, (0, 0, 0, self.padded_frames - features.shape[1]))
            mask = torch.ones_like(features[..., 0], dtype=torch.bool)
        maps = features.transpose(1, 2)  # (batch, width, frames)
        for convolution in self:
            maps = _convolve(convolution, maps).relu() * mask[:, None]
        return nn.functional.max_pool1d(maps, self.pool_size).transpose(1, 2)


class NoStem(nn.Module):
    """The steps are the frames."""

    def __init__(self, config):
        super().__init__()
        self.width = config.feature_size
        self.pool_size = 1

    def forward(self, features, lengths):
        """(batch, frames, width) and (batch,) frames -> (batch, frames, width), zero on padding"""
        return features.masked_fill(~length_mask(lengths, features.shape[1])[..., None], 0)


class FeedForward(nn.Sequential):
    """The layers of `_feed_forward`."""

    def forward(self, states, dropout):
        """(batch, width) -> (batch, last hidden size), with dropout on the input of each linear layer"""
        for layer in self:
            states = layer(dropout(states) if isinstance(layer, nn.Linear) else states)
        return states


class Dropout(nn.Dropout):
    """
    Dropout that can have its own random generator. Heads that train on threads side by side would draw from the global
    one in an order that differs from run to run.

    Attributes:
        generator: `torch.Generator` on the device of the states; `None` for the global one.
    """

    generator = None

    def forward(self, states):
        """States of any shape -> the same shape"""
        if not self.training or self.p == 0:
            return states
        if self.generator is None:
            return super().forward(states)
        kept = torch.rand(states.shape, generator=self.generator, device=states.device) >= self.p
        return states * kept.to(states.dtype).div_(1 - self.p)


class LSTMEncoder(nn.ModuleList):
    """One `nn.LSTM` per layer, because the attention's query takes every layer's state at a clip's own last step."""

    def __init__(self, config, width):
        widths = [width] + [config.lstm_hidden_size] * config.lstm_num_layers
        super().__init__(nn.LSTM(*layer, batch_first=True) for layer in pairwise(widths))
        self.add_module("dropout", Dropout(config.dropout))
        self.width = config.lstm_hidden_size

    def forward(self, steps, lengths, mask):
        """
        Args:
            steps: (batch, steps, channels).
            lengths: (batch,) int64, each clip's number of steps.
            mask: (batch, steps) bool, true on a clip's own steps. Not needed: the LSTM runs forward in time from a
                clip's first step, so padding after its last step cannot reach it.

        Returns:
            States (batch, steps, width), and every layer's state at each clip's last step, first layer first,
            (batch, layers * width).
        """
        first, *further, dropout = self
        steps, _ = first(steps)
        last_states = [last_step(steps, lengths)]
        for layer in further:
            steps, _ = layer(dropout(steps))
            last_states.append(last_step(steps, lengths))
        return steps, torch.cat(last_states, dim=-1)


class TransformerEncoder(nn.ModuleList):
    """Post-norm encoder layers. There is no dropout on attention weights."""

    def __init__(self, config, width):
        attention_heads = ARCHITECTURES[config.architecture].attention_heads
        super().__init__(
            nn.TransformerEncoderLayer(width, attention_heads, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(TRANSFORMER_LAYERS)
        )
        self.width = width
        for layer in self:
            layer.dropout, layer.dropout1, layer.dropout2 = (Dropout(config.dropout) for _ in range(3))
            # Switches off PyTorch's fused layer for inference. It reads the weights of linear layers directly, which
            # then could not be quantised.
            layer.activation_relu_or_gelu = 0

    def forward(self, steps, lengths, mask):
        """As `LSTMEncoder.forward`; there are no last states."""
        for layer in self:
            steps = layer(steps, src_key_padding_mask=~mask)
        return steps, None


class NoEncoder(nn.Module):
    """Leaves the steps as they are."""

    def __init__(self, config, width):
        super().__init__()
        self.width = width

    def forward(self, steps, lengths, mask):
        """As `LSTMEncoder.forward`; there are no last states."""
        return steps, None


# The parts that an `Architecture` names, together with `POOLINGS`. These are also their names in checkpoints.
STEMS = {"convolutions": Convolutions, "no_stem": NoStem}
ENCODERS = {"lstm": LSTMEncoder, "transformer": TransformerEncoder, "no_encoder": NoEncoder}


def _concentrations(outputs):
    """
    Concentrations, above 0, in float32. Outputs are on a logarithmic scale because concentrations differ by orders of
    magnitude: 1 / (1 + concentration), the correlation between the votes of two listeners of a clip, is then a sigmoid.
    """
    return CONCENTRATION_AT_ZERO * outputs.float().clamp(*LIMITS_OF_LOGARITHM).exp()


def _convolve(convolution, maps):
    """
    (batch, width, frames) -> (batch, channels, frames). In 16 bits, maps and weights are passed as images one pixel
    high, channels last, which is several times as fast on CPUs. In float32 that gains little, and PyTorch's own conv1d
    rounds as it did when the weights were trained.
    """
    if maps.dtype == torch.float32:
        return convolution(maps)
    weight = convolution.weight[:, :, None].to(maps.dtype, memory_format=torch.channels_last)
    padding = (0, convolution.kernel_size[0] // 2)
    return nn.functional.conv2d(maps[:, :, None], weight, convolution.bias.to(maps.dtype), padding=padding)[:, :, 0]


def _norm_of_steps(config):
    """LayerNorm between stem and encoder, if there is a stem, and the normalization has one there."""
    if ARCHITECTURES[config.architecture].stem == "no_stem":
        return nn.Identity()
    channels = config.conv_channels[-1]
    if config.normalization == "frame":
        return nn.LayerNorm(channels)
    if _has_released_norms(config):
        return nn.LayerNorm((config.max_frames // config.pool_size, channels))
    return nn.Identity()


def _feed_forward(width, config):
    """From `width`: Linear, ReLU and, if the normalization has one there, LayerNorm for each hidden size."""
    widths = [width, *config.ffn_sizes]
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        if config.normalization == "frame" or _has_released_norms(config):
            layers.append(nn.LayerNorm(width_out))
    return FeedForward(*layers)


def _has_released_norms(config):
    return config.normalization == "sequence" and ARCHITECTURES[config.architecture].has_released_norms

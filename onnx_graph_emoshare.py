"""
An EmoShare model in a form that can be exported to ONNX: from padded waveforms to shares, with preprocessing.

It computes the same numbers as the model, in another form: no control flow depends on the values of tensors,
convolutions over frames are matrix products, which onnxruntime quantises like those of linear layers, and an LSTM is
ONNX's own operator.
"""

import copy

import torch
from torch import nn

from .frames_emoshare import length_mask
from .onnx_layers_emoshare import OnnxLSTM, kernel_matrix, seen_by_kernel
from .pooling_emoshare import SLOPE_STEPS, FunctionalsPooling


class WaveformsToShares(nn.Module):
    """
    Args:
        model: `EmoShareModel` in float32, which is not changed; its family must have `exportable`.
        features: module that turns waveforms into the model's inputs, from `EmoShareFeatureExtractor.as_module`.
    """

    def __init__(self, model, features):
        super().__init__()
        self.features = features
        self.config, self.family = model.config, None
        self.shares_and_concentrations = model.shares_and_concentrations
        self.backbone = None
        if model.backbone is not None:
            self.family = model.family
            self.backbone = self.family.exportable(self.family.cut(model.backbone, model.config.backbone_layer))
        self.heads = copy.deepcopy(model.heads).cpu()
        for head in self.heads:
            _replace(head)
        self.output_names = ["shares"]
        if self.config.has_attention:
            self.output_names.append("attention")
        if self.config.has_concentrations:
            self.output_names.append("concentrations")

    def forward(self, waveforms, lengths):
        """
        Args:
            waveforms: (batch, samples) float32 at the extractor's sampling rate; padding may have any values.
            lengths: (batch,) int64, each clip's number of samples, at least the extractor's `min_samples`.

        Returns:
            `tuple`, in the order of `output_names`: shares (batch, labels); attention (batch, labels, steps) if the
            architecture has it; concentrations (batch, labels) if the loss has them.
        """
        features, lengths = self.features(waveforms, lengths)
        if self.backbone is not None:
            features, lengths = self._run_backbone(features, lengths)
        if isinstance(self.heads[0].pooling, FunctionalsPooling):
            # Slopes need more frames than the shortest clip has; padding never changes a clip's shares.
            features = nn.functional.pad(features, (0, 0, 0, 2 * SLOPE_STEPS))
        outputs, weights = zip(*(head(features, lengths) for head in self.heads), strict=True)
        shares, concentrations = self.shares_and_concentrations(outputs)
        attention = None
        if weights[0] is not None:
            attention = torch.stack(weights, dim=1).expand(-1, shares.shape[1], -1)
        return tuple(output for output in (shares, attention, concentrations) if output is not None)

    def _run_backbone(self, inputs, lengths):
        layer = self.config.backbone_layer
        layers = range(self.family.num_layers(self.backbone.config) + 1) if layer == "weighted" else [layer]
        states = self.family.hidden_states(self.backbone, inputs, lengths, layers)
        features = torch.stack([states[layer] for layer in layers], dim=1) if layer == "weighted" else states[layer]
        return features, self.family.num_frames(self.backbone.config, lengths)


def _replace(head):
    """Replaces, in place, the parts of a head that ONNX needs in another form."""
    if head.architecture.stem == "convolutions":
        head.convolutions = OnnxConvolutions(head.convolutions)
    for parent in head.modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.LSTM):
                setattr(parent, name, OnnxLSTM(module))


class OnnxConvolutions(nn.Module):
    """`Convolutions` with each convolution as one matrix product."""

    def __init__(self, stem):
        super().__init__()
        self.width, self.pool_size, self.padded_frames = stem.width, stem.pool_size, stem.padded_frames
        (self.taps,) = {convolution.kernel_size[0] for convolution in stem}
        self.weights = nn.ParameterList(map(kernel_matrix, stem))
        self.biases = nn.ParameterList(convolution.bias for convolution in stem)

    def forward(self, features, lengths):
        """As `Convolutions.forward`."""
        mask = length_mask(lengths, features.shape[1])
        maps = features.masked_fill(~mask[..., None], 0)
        if self.padded_frames is not None:
            maps = nn.functional.pad(maps, (0, 0, 0, self.padded_frames - features.shape[1]))
            mask = torch.ones_like(maps[..., 0], dtype=torch.bool)
        margin = self.taps // 2
        for weight, bias in zip(self.weights, self.biases, strict=True):
            seen = seen_by_kernel(nn.functional.pad(maps, (0, 0, margin, margin)), self.taps)
            maps = (seen @ weight + bias).relu() * mask[..., None]
        steps = maps.shape[1] // self.pool_size
        return maps[:, : steps * self.pool_size].unflatten(1, (steps, self.pool_size)).amax(dim=2)

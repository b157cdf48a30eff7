"""
The oracle: the authors' released network, one per emotion, written plainly from its published facts.

It shares no code with the package. Slow and obvious on purpose: packed LSTM, Python loops over the clips of a batch,
everything padded to the full length. Sizes are arguments, so that small ones can be tried often.
"""

import math

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class ReleasedNetwork(nn.Module):
    """
    Args:
        architecture: 1 (mean over time) or 2 (attention).
        emotion: index of the emotion, part of some parameter names.
        width: of the frame features.
        frames: that all inputs are padded to.
        channels, hidden, ffn: sizes of the convolutions, the LSTM and the feed-forward network.
    """

    def __init__(self, architecture, emotion, width=1024, frames=398, channels=(768, 384, 192), hidden=512, ffn=None):
        super().__init__()
        self.architecture, self.emotion = architecture, emotion
        self.frames, self.steps, self.hidden = frames, frames // 2, hidden
        one, two, three = channels
        self.layer_cnn = nn.Sequential(
            nn.Conv1d(width, one, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv1d(one, two, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv1d(two, three, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2, 2),
        )
        self.lstm = nn.LSTM(three, hidden, num_layers=2, batch_first=True)
        if architecture == 1:
            a, b, c = ffn or (256, 64, 8)
            layers = [nn.Linear(hidden, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU()]
            setattr(self, f"fc_emotion_{emotion}", nn.Sequential(*layers, nn.Linear(c, 1), nn.ReLU()))
        else:
            a, b, c = ffn or (256, 128, 64)
            self.Q_scale = nn.Sequential(nn.Linear(2 * hidden, hidden))
            self.fc_emotion_01 = nn.Sequential(nn.Linear(hidden, a), nn.ReLU())
            self.fc_emotion_02 = nn.Sequential(nn.Linear(a, b), nn.ReLU())
            self.fc_emotion_03 = nn.Sequential(nn.Linear(b, c), nn.ReLU())
            self.fc_emotion_04 = nn.Sequential(nn.Linear(c, 1), nn.ReLU())
            self.ln1 = nn.LayerNorm((self.steps, three))
            self.ln2 = nn.LayerNorm((self.steps, hidden))  # never used
            self.ln3 = nn.LayerNorm((1, self.steps))
            self.ln4, self.ln5, self.ln6 = nn.LayerNorm(a), nn.LayerNorm(b), nn.LayerNorm(c)

    def fully_connected(self):
        """The Linear layers after the summary of a clip, first to last."""
        modules = [getattr(self, name) for name in dir(self) if name.startswith("fc_emotion")]
        return [layer for module in modules for layer in module if isinstance(layer, nn.Linear)]

    def forward(self, features, lengths):
        """Zero-padded features (batch, width, frames) and lengths (batch,) to shares (batch, 1)."""
        assert features.shape[2] == self.frames
        valid = [int(length) // 2 for length in lengths]
        pooled = self.layer_cnn(features).transpose(1, 2)  # (batch, steps, channels)
        if self.architecture == 2:
            pooled = self.ln1(pooled)
        packed = pack_padded_sequence(pooled, torch.tensor(valid), batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        states, _ = pad_packed_sequence(states, batch_first=True)  # (batch, longest, hidden), zeros past each end
        if self.architecture == 1:
            summary = torch.stack([clip[:own].mean(dim=0) for clip, own in zip(states, valid, strict=True)])
            return getattr(self, f"fc_emotion_{self.emotion}")(summary)
        summary = torch.stack([self.attend(*clip) for clip in zip(last[0], last[1], states, valid, strict=True)])
        summary = self.ln4(self.fc_emotion_01(summary))
        summary = self.ln5(self.fc_emotion_02(summary))
        summary = self.ln6(self.fc_emotion_03(summary))
        return self.fc_emotion_04(summary)

    def attend(self, last_of_layer_0, last_of_layer_1, states, own):
        """One clip: final states (hidden,) of both layers, LSTM outputs (longest, hidden), to (hidden,)."""
        query = self.Q_scale(torch.cat([last_of_layer_0, last_of_layer_1]))
        scores = torch.stack([(query * state).sum() / math.sqrt(self.hidden) for state in states[:own]])
        weights = torch.cat([torch.softmax(scores, dim=0), torch.zeros(self.steps - own)])
        weights = self.ln3(weights[None])[0]
        return (weights[: len(states), None] * states).sum(dim=0)

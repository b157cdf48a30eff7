"""The table of architectures: which parts a head is made of."""

from dataclasses import dataclass

# These take statistics of the frames themselves: see `Architecture.pooling`.
POOLINGS_OF_FRAMES = ("statistics", "functionals")
ENCODERS_WITHOUT_LAST_STATES = ("transformer", "no_encoder")


@dataclass(frozen=True)
class Architecture:
    """
    Which parts a head is made of. A new architecture needs an entry in `ARCHITECTURES`, and nothing else if its parts
    are in the tables `STEMS`, `ENCODERS` and `POOLINGS` of `head_emoshare`.

    Attributes:
        encoder: the part that relates steps to each other; a key of `ENCODERS`.
        pooling: the part that pools all steps into one vector; a key of `POOLINGS` of `pooling_emoshare`. `"attention"`
            needs an encoder that returns last states; `"statistics"` and `"functionals"` must have neither stem nor
            encoder, because they are standardised over the training set once, before the first epoch.
        ffn_sizes: default hidden sizes of the feed-forward network.
        title: short name in tables and figures.
        summary: its parts in a few words, for legends.
        description: one phrase for model cards, without a full stop.
        has_attention: whether it returns attention weights over the steps.
        is_released: whether the authors released this network, so that `normalization="sequence"` can reproduce it.
        has_released_norms: whether the released network has LayerNorms.
        attention_heads: number of the encoder's attention heads, which must divide its width; `None` if it has none.
        stem: the part that turns frames into steps; a key of `STEMS`.
        has_shortcut: whether the last layer also takes the output of the pooling, past the feed-forward network.

    Raises:
        ValueError: if the parts cannot be combined.
    """

    encoder: str
    pooling: str
    ffn_sizes: tuple[int, ...]
    title: str
    summary: str
    description: str
    has_attention: bool = False
    is_released: bool = False
    has_released_norms: bool = False
    attention_heads: int | None = None
    stem: str = "convolutions"
    has_shortcut: bool = False

    def __post_init__(self):
        has_stem, has_encoder = self.stem != "no_stem", self.encoder != "no_encoder"
        if self.pooling in POOLINGS_OF_FRAMES and (has_stem or has_encoder):
            raise ValueError(
                f"pooling: got {self.pooling!r} after stem {self.stem!r} and encoder {self.encoder!r}; it needs "
                "'no_stem' and 'no_encoder', because its statistics are scaled once, before anything is trained"
            )
        if self.pooling == "attention" and self.encoder in ENCODERS_WITHOUT_LAST_STATES:
            raise ValueError(f"pooling: got 'attention', whose query needs last states; {self.encoder!r} has none")
        if not has_stem and (self.encoder == "transformer" or self.has_attention):
            raise ValueError(
                "stem: got 'no_stem'; a transformer sees the order of frames through the stem alone, and attention "
                "weights are those of its steps"
            )


# The first two have the sizes of the authors' released code. The transformer was not released, and its feed-forward
# network has the sizes of Architecture 2.
ARCHITECTURES = {
    "cnn_lstm": Architecture(
        encoder="lstm",
        pooling="mean",
        ffn_sizes=(256, 64, 8),
        title="Architecture 1",
        summary="CNN, LSTM",
        description="Architecture 1 of the paper: convolutions, an LSTM, the mean over time and a feed-forward network",
        is_released=True,
    ),
    "cnn_lstm_attention": Architecture(
        encoder="lstm",
        pooling="attention",
        ffn_sizes=(256, 128, 64),
        title="Architecture 2",
        summary="CNN, LSTM, attention",
        description="Architecture 2 of the paper: convolutions, an LSTM, attention over time and a feed-forward "
        "network",
        has_attention=True,
        is_released=True,
        has_released_norms=True,
    ),
    "transformer": Architecture(
        encoder="transformer",
        pooling="mean",
        ffn_sizes=(256, 128, 64),
        title="Transformer (ours)",
        summary="CNN, transformer",
        description="The multi-headed transformer that the paper mentions (section 3.2), in sizes of our own: "
        "convolutions, two encoder layers, the mean over time and a feed-forward network",
        attention_heads=8,
    ),
    "cnn_lstm_statistics": Architecture(
        encoder="lstm",
        pooling="attentive_statistics",
        ffn_sizes=(256, 128, 64),
        title="Attentive statistics (ours)",
        summary="CNN, LSTM, attentive statistics",
        description="Convolutions, an LSTM, mean and standard deviation over time weighted by four attention queries, "
        "and a feed-forward network",
        has_attention=True,
    ),
    "statistics": Architecture(
        stem="no_stem",
        encoder="no_encoder",
        pooling="statistics",
        ffn_sizes=(),
        title="Linear probe (ours)",
        summary="mean and deviation, linear",
        description="A linear probe: mean and standard deviation of the frame features over time, and one linear layer",
    ),
    "functionals": Architecture(
        stem="no_stem",
        encoder="no_encoder",
        pooling="functionals",
        ffn_sizes=(256,),
        has_shortcut=True,
        title="Functionals (ours)",
        summary="functionals, FFN",
        description="What classical systems compute over a clip: mean, standard deviation and quantiles over time of "
        "each frame feature and of its slope; and a feed-forward network with a linear path past it",
    ),
}

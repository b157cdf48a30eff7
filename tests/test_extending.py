"""
An extension takes one table entry or one file. It then trains, saves, loads, is reported and predicts.

Each new thing is added to its table alone, and a grid of one cell is run with it.
"""

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import speech
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor, pipeline

from emoshare import EmoShareModel, backbone_emoshare
from emoshare.architectures_emoshare import ARCHITECTURES, Architecture
from emoshare.dataset_script import load_corpus
from emoshare.dataset_script.corpora import CORPORA, CorpusInfo
from emoshare.dataset_script.tables import ClipTable, CorpusTables
from emoshare.losses_emoshare import LOSSES
from emoshare.reproduction.command import main
from emoshare.training.arguments import parse_arguments

pytestmark = pytest.mark.slow
LABELS = ["joy", "awe"]


def run_grid(folder, corpus_folder, wav, **flags):
    """Runs one cell with `flags` of train.py; returns its model, its card and the grid's report."""
    architecture = flags.pop("architecture", "cnn_lstm")
    grid = {
        "title": "A new entry",
        "output_dir": str(folder / "grid"),
        "train": {
            "dataset": "compare2023",
            "data_dir": str(corpus_folder),
            "conv_channels": [8],
            "lstm_hidden_size": 8,
            "ffn_sizes": [4],
            "num_train_epochs": 2,
            "bootstrap": 0,
            "mixed_precision": "no",
            **flags,
        },
        "features": {"Features": {}},
        "architectures": {architecture: {}},
        "seeds": [0],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["--config", str(folder / "grid.yaml")]) == 0
    (cell,) = (folder / "grid" / "cells").iterdir()
    model = EmoShareModel.from_pretrained(cell).eval()
    scores = pipeline("emotion-share", model=str(cell))(str(wav))
    assert sorted(share["label"] for share in scores) == sorted(model.config.labels)
    assert all(0 <= share["score"] <= 1 for share in scores)
    return model, (cell / "README.md").read_text(), (folder / "grid" / "README.md").read_text()


def test_an_architecture_is_one_entry(tmp_path, corpus_folder, wav, monkeypatch):
    new = Architecture(
        encoder="transformer",
        pooling="mean",
        ffn_sizes=(6,),
        title="Architecture X",
        summary="CNN, two heads",
        description="A throw-away architecture: convolutions and two attention heads",
        attention_heads=2,
    )
    monkeypatch.setitem(ARCHITECTURES, "throw_away", new)
    model, card, report = run_grid(tmp_path, corpus_folder, wav, architecture="throw_away", ffn_sizes=None)
    assert model.config.architecture == "throw_away"
    assert model.config.ffn_sizes == (6,)
    assert model.heads[0].encoder[0].self_attn.num_heads == 2
    assert new.description in card
    assert "Architecture X" in report
    assert (tmp_path / "grid" / "figures" / "architectures.svg").read_text().count("two heads") >= 1


def test_a_loss_is_one_entry(tmp_path, corpus_folder, wav, monkeypatch):
    called = []

    def mean_absolute_error(predicted, true, weights=None):
        called.append(predicted.shape)
        known = ~true.isnan()
        return (predicted - true).masked_fill(~known, 0).abs().sum() / known.sum()

    monkeypatch.setitem(LOSSES, "mae", mean_absolute_error)
    model, card, report = run_grid(tmp_path, corpus_folder, wav, loss="mae")
    assert called
    assert model.config.loss == "mae"
    assert "| loss | mae |" in card
    assert "| loss | mae |" in report
    shares, true = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.2]])
    assert model.loss(shares, true) == pytest.approx(0.35)


def test_a_corpus_is_one_file_and_one_entry(tmp_path, wav, monkeypatch):
    (tmp_path / "sounds").mkdir()

    def load(info, data_dir, cache_dir):
        rng, splits = np.random.default_rng(0), {}
        for split in ("train", "devel"):
            paths = [data_dir / "sounds" / f"{split}{number}.flac" for number in range(4)]
            for number, path in enumerate(paths):
                soundfile.write(path, speech(0.5, seed=number), 16000)
            splits[split] = ClipTable(
                filenames=[path.name for path in paths],
                paths=paths,
                shares=rng.uniform(size=(4, 2)).round(2).tolist(),
                facts={"speaker": ["a", "b", "a", None]},
            )
        return CorpusTables(LABELS, splits)

    new = CorpusInfo(
        title="Throw-away corpus",
        description="Four clips per split.",
        licence="mit",
        licence_note="The data: nobody's.",
        source="A test.",
        caution="Do not quote these numbers.",
        loader=load,
        layout="sounds/*.flac",
        test_is_optional=True,
    )
    monkeypatch.setitem(CORPORA, "throw_away", new)
    model, card, report = run_grid(tmp_path, tmp_path, wav, dataset="throw_away")
    assert model.config.labels == LABELS
    for text in (new.description, new.licence_note, new.caution):
        assert text in card
    assert new.title in report
    assert new.caution in report


class ConvolutionConfig(PreTrainedConfig):
    model_type = "throw-away-encoder"

    def __init__(self, width=6, **kwargs):
        super().__init__(**kwargs)
        self.width = width


class ConvolutionEncoder(PreTrainedModel):
    config_class = ConvolutionConfig
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.frames = torch.nn.Conv1d(1, config.width, 400, stride=320)
        self.post_init()

    def forward(self, input_values):
        return self.frames(input_values[:, None]).transpose(1, 2)


class ConvolutionFamily:
    """An encoder of one convolution whose kernel sees a single frame."""

    model_types = ("throw-away-encoder",)
    feature_type = "waveform"
    input_name = "input_values"
    optional_weights = ()
    paddings = ()

    def check(self, config, is_frozen):
        pass

    def width(self, config):
        return config.width

    def num_layers(self, config):
        return 0

    def frame_geometry(self, config):
        return 400, 320

    def num_frames(self, config, lengths):
        return (lengths - 400) // 320 + 1

    def build(self, config):
        return AutoModel.from_config(config)

    def load(self, name_or_path, **kwargs):
        return AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)

    def prepare(self, backbone, fast=True):
        pass

    def cut(self, backbone, layer):
        return backbone

    def hidden_states(self, backbone, inputs, lengths, layers):
        return dict.fromkeys(layers, backbone(inputs))


@pytest.fixture
def _registered_encoder():
    """What a library, or Transformers itself, does for an encoder of its own."""
    AutoConfig.register(ConvolutionConfig.model_type, ConvolutionConfig, exist_ok=True)
    AutoModel.register(ConvolutionConfig, ConvolutionEncoder, exist_ok=True)


@pytest.mark.usefixtures("_registered_encoder")
def test_a_backbone_family_is_one_file_and_one_entry(tmp_path, corpus_folder, wav, monkeypatch):
    monkeypatch.setattr(backbone_emoshare, "FAMILIES", [*backbone_emoshare.FAMILIES, ConvolutionFamily()])
    torch.manual_seed(0)
    ConvolutionEncoder(ConvolutionConfig()).save_pretrained(tmp_path / "encoder")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "encoder")
    model, card, report = run_grid(tmp_path, corpus_folder, wav, backbone=str(tmp_path / "encoder"))
    assert model.config.backbone_config.model_type == "throw-away-encoder"
    assert model.config.feature_size == 6
    assert "throw-away-encoder" in card
    assert "encoder" in report
    waveforms, mask = torch.zeros(2, 16000), torch.ones(2, 16000, dtype=torch.long)
    waveforms[0, :9000], waveforms[1] = torch.from_numpy(speech(1.0))[:9000], torch.from_numpy(speech(1.0, seed=1))
    mask[0, 9000:] = 0
    with torch.no_grad():
        alone = model(input_values=waveforms[:1, :9000]).logits
        in_batch = model(input_values=waveforms, attention_mask=mask).logits[:1]
    torch.testing.assert_close(alone, in_batch, atol=1e-5, rtol=0)


def test_a_fact_about_clips_is_a_column(tmp_path, corpus_folder):
    """No code at all."""
    copy = tmp_path / "corpus"
    copy.mkdir()
    (copy / "wav").symlink_to(corpus_folder / "wav")
    (copy / "lab").mkdir()
    for path in (corpus_folder / "lab").iterdir():
        (copy / "lab" / path.name).write_text(path.read_text())
    (copy / "lab" / "clips.csv").write_text("filename,dialect\ndevel_000.wav,northern\n")
    with pytest.warns(UserWarning, match="not comparable"):
        corpus = load_corpus("compare2023", data_dir=copy, cache_dir=tmp_path / "cache")
    assert corpus.metadata["devel"]["dialect"][:2] == ["northern", None]
    assert "dialect" not in corpus.labels


def test_unknown_entries_are_refused_before_anything_is_read(tmp_path, capsys):
    for flag in ("--architecture", "--loss", "--dataset"):
        with pytest.raises(SystemExit):
            parse_arguments([flag, "throw_away"])
        assert "throw_away" in capsys.readouterr().err

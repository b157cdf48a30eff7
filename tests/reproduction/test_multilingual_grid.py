"""configs/multilingual_grid.yaml, with a small random folder in place of each encoder."""

import re

import pytest
import yaml
from conftest import ROOT, backbone_config, torch_threads, write_corpus, write_csv
from transformers import AutoModel, SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from emoshare.evaluation import figures as shares_figure
from emoshare.reproduction import figures, report
from emoshare.reproduction.command import main
from emoshare.reproduction.grid import read_grid

# Layers of the published encoders, and what stands for each here.
LAYERS = {
    "facebook/hubert-large-ll60k": (24, "hubert", {}),
    "microsoft/wavlm-large": (24, "wavlm", {}),
    "facebook/wav2vec2-xls-r-300m": (24, "wav2vec2", {"conv_bias": True}),
    "facebook/mms-300m": (24, "wav2vec2", {"conv_bias": True, "adapter_attn_dim": None}),
    "utter-project/mHuBERT-147": (12, "hubert", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    "facebook/w2v-bert-2.0": (24, "wav2vec2-bert", {}),
    "openai/whisper-large-v3": (32, "whisper", {"num_mel_bins": 128}),
}
EXTRACTORS = {
    "wav2vec2-bert": SeamlessM4TFeatureExtractor,
    "whisper": lambda: WhisperFeatureExtractor(feature_size=128),
}
SMALL = {
    "num_train_epochs": 1,
    "bootstrap": 0,
    "conv_channels": [8],
    "lstm_hidden_size": 4,
    "ffn_sizes": [4],
    "early_stopping_patience": None,
    "mixed_precision": "no",
}


def grid_of(tmp_path, rows=None, **changes):
    """Writes the grid, of some of its rows, to a file in which small random encoders stand for the published ones."""
    grid = yaml.safe_load((ROOT / "configs" / "multilingual_grid.yaml").read_text())
    assert {flags["backbone"] for flags in grid["features"].values()} == set(LAYERS)
    for row, flags in list(grid["features"].items()):
        num_layers, model_type, fields = LAYERS[flags["backbone"]]
        assert flags["backbone_layer"] == num_layers // 2
        if rows is not None and flags["backbone"] not in rows:
            del grid["features"][row]
            continue
        folder = tmp_path / flags["backbone"]
        AutoModel.from_config(backbone_config(model_type, **fields)).save_pretrained(folder)
        EXTRACTORS.get(model_type, Wav2Vec2FeatureExtractor)().save_pretrained(folder)
        flags.update(backbone=str(folder), backbone_layer=1)
    grid = {**grid, "train": {**grid["train"], **SMALL}, "output_dir": str(tmp_path / "grid"), **changes}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return tmp_path / "grid.yaml", list(grid["features"])


def test_every_encoder_has_its_cells(tmp_path):
    path, rows = grid_of(tmp_path)
    cells = read_grid(path, data_dir="DIR").cells
    assert [(cell.feature_set, cell.seed) for cell in cells] == [(row, seed) for row in rows for seed in (0, 1, 2)]
    assert len(rows) == 7


@pytest.mark.slow
def test_the_report_has_rhos_by_language(tmp_path, monkeypatch):
    """Of one encoder from each family."""
    for module in (figures, shares_figure):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())
    monkeypatch.setattr(report, "RESAMPLES", 20)
    monkeypatch.setattr(report, "MIN_CLIPS", 3)
    families = ("utter-project/mHuBERT-147", "facebook/w2v-bert-2.0", "openai/whisper-large-v3")
    path, rows = grid_of(tmp_path, families, seeds=[0])
    corpus = write_corpus(tmp_path / "corpus", {"train": 2, "devel": 7}, labels=["joy", "awe"], seconds=(0.1, 0.2))
    clips = sorted(path.name for path in (corpus / "wav").iterdir())
    languages = ["?" if number == 0 else ("Twi", "Zulu")[number % 2] for number in range(len(clips))]
    write_csv(corpus / "lab" / "clips.csv", ["filename", "language"], zip(clips, languages, strict=True))
    with torch_threads(1):  # a run sets its own number
        assert main(["--config", str(path), "--data_dir", str(corpus)]) == 0
    page = (tmp_path / "grid" / "README.md").read_text()
    assert "Finished: 3 of 3 cells" in page
    (found,) = [part for part in page.split("\n## ") if part.startswith("Languages")]
    assert "| features | architecture | Twi, 3 clips | Zulu, 3 clips |" in found
    rho = r"-?\d\.\d{3} \(-?\d\.\d{3} to -?\d\.\d{3}\)"
    for row in rows:
        assert re.search(rf"\| {re.escape(row)}, layer 1 \| Architecture 2 \| {rho} \| {rho} \|", found)
    assert "fewer than 3 clips: 1." in found

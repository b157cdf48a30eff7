"""The benchmark `benchmarks/real_speech.py` without openSMILE: all systems are scored on the same folds and split."""

import json
import sys

import datasets
import numpy as np
import pytest
import soundfile
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import real_speech

pytestmark = pytest.mark.filterwarnings("ignore:the splits have")  # of a corpus smaller than Emo-DB
VERSIONS = {"03": "abc", "10": "ab", "15": "abcd"}  # of each speaker's clips


@pytest.fixture
def folder(tmp_path):
    """In the layout of Emo-DB, clips of anger, which 80 % recognised, and of sadness, which all listeners did."""
    (tmp_path / "wav").mkdir()
    rng, rows = np.random.default_rng(0), []
    clips = [(speaker, emotion, version) for speaker in VERSIONS for emotion in "WT" for version in VERSIONS[speaker]]
    for number, (speaker, emotion, version) in enumerate(clips):
        name, noise = f"{speaker}a01{emotion}{version}.wav", 0.01 * rng.standard_normal(8000)
        soundfile.write(tmp_path / "wav" / name, noise if emotion == "W" else 0.1 * np.cumsum(noise), 16000)
        rows.append(f"{number}\t{name}\t{80 if emotion == 'W' else 100},00\t50,00")
    (tmp_path / "erkennung.txt").write_text("\n".join(["Nr.\tSatz\terkannt\tnatuerlich", *rows]) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_scores_of_all_speakers_and_of_the_own_split(folder, tmp_path, capsys):
    systems, output = ["control", "control_ranks", "emotion"], tmp_path / "output"
    real_speech.main(["--data_dir", str(folder), "--systems", *systems, "--output", str(output)])
    results = json.loads((output / "real_speech.json").read_text())["systems"]
    assert list(results) == systems
    assert results["emotion"]["of_speakers"] == [pytest.approx([1, 1, 1])]
    for scores in results.values():
        assert np.shape(scores["of_speakers"]) == (1, len(VERSIONS))
        assert min(*scores["of_speakers"][0], *scores["devel"], *scores["test"], scores["pooled"][0]) > 0.8
    assert (output / "real_speech.png").stat().st_size
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(systems)


def test_the_recipe_is_trained_on_the_same_folds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(real_speech, "CONFIGS", tmp_path)
    recipe = (ROOT / "configs" / real_speech.RECIPE).read_text().replace("num_train_epochs: ", "num_train_epochs: 1 # ")
    (tmp_path / real_speech.RECIPE).write_text(recipe)
    data = real_speech.Data(folder, tmp_path)
    shares = real_speech.SYSTEMS["recipe"].predict(data, 2, 0)
    assert {split: of_split.shape for split, of_split in shares.items()} == {"devel": (6, 7), "test": (8, 7)}
    assert set(data.divisions[2].metadata["test"]["speaker"]) == {"15"}


def test_missing_libraries_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(real_speech, "find_spec", lambda module: None)
    with pytest.raises(SystemExit):
        real_speech.main(["--data_dir", str(folder)])
    assert capsys.readouterr().err.endswith(
        "error: pip install opensmile scikit-learn; or choose --systems without opensmile\n"
    )

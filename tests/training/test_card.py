import math

import pytest
from conftest import backbone_config, small_model
from huggingface_hub import ModelCard

from emoshare import EMOTIONS, EmoShareFeatureExtractor
from emoshare.training.arguments import DataArguments, ModelArguments, RunArguments
from emoshare.training.card import model_card


def card_of(dataset, backbone, rho=0.5, **fields):
    data = DataArguments(dataset=dataset, data_dir="/somewhere/else")
    arguments = ModelArguments(backbone=backbone, **fields)
    model = small_model(backbone_config=None if backbone == "acoustic" else backbone_config(), **fields)
    results = {"spearman": rho, "spearman_ci95": [0.4, 0.6]}
    for emotion in EMOTIONS:
        results |= {f"spearman_{emotion}": rho, f"spearman_{emotion}_ci95": [0.4, 0.6]}
    clips = {"train": 31745, "devel": 9925, "test": 10143}
    run = RunArguments(output_dir="outputs/here")
    return model_card(data, arguments, run, model, EmoShareFeatureExtractor(), results, clips)


@pytest.mark.parametrize(
    ("architecture", "anger", "mean"), [("cnn_lstm", 0.450, 0.517), ("cnn_lstm_attention", 0.467, 0.522)]
)
def test_the_papers_row_stands_beside_the_same_backbone(architecture, anger, mean):
    card = card_of("compare2023", "facebook/hubert-large-ll60k", architecture=architecture)
    assert f"| Anger | 0.500 | 0.400 to 0.600 | {anger:.3f} |" in card.text
    assert f"| **mean** | 0.500 | 0.400 to 0.600 | {mean:.3f} |" in card.text
    assert card.data.base_model == "facebook/hubert-large-ll60k"
    assert "31,745 clips" in card.text
    assert "does not let it be passed on" in card.text


@pytest.mark.parametrize(
    ("dataset", "backbone"), [("csv", "facebook/hubert-large-ll60k"), ("compare2023", "microsoft/wavlm-large")]
)
def test_other_data_and_backbones_have_no_row_of_the_paper(dataset, backbone):
    assert "| | ρ | 95 % interval |\n" in card_of(dataset, backbone).text


def test_the_synthetic_corpus_is_called_synthetic():
    card = card_of("synthetic", "acoustic")
    assert "show that the software works, and nothing about people" in card.text
    assert "There is no backbone." in card.text
    assert "nothing about people" not in card_of("csv", "acoustic").text


def test_a_score_that_does_not_exist_is_no_result(tmp_path):
    card_of("csv", "acoustic", rho=math.nan).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "| Anger | none |" in card.text


def test_the_metadata_come_back_as_they_went(tmp_path):
    card = card_of("compare2023", "facebook/hubert-large-ll60k")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert [result.metric_name for result in loaded.data.eval_results][1:] == [f"Spearman's ρ, {e}" for e in EMOTIONS]
    assert {result.dataset_split for result in loaded.data.eval_results} == {"devel"}
    assert "/somewhere/else" not in loaded.content

import math

import pytest
from conftest import backbone_config, small_model
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard

from emoshare import EMOTIONS, EmoShareFeatureExtractor
from emoshare.dataset_script import Corpus
from emoshare.dataset_script.corpora import corpus_named
from emoshare.evaluation.card import NO_CEILING, model_card
from emoshare.evaluation.ceiling import NoiseCeiling
from emoshare.evaluation.scores import MEAN, Score
from emoshare.evaluation.selections import SELECTIONS
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments


def card_of(
    dataset,
    backbone,
    rho=0.5,
    interval=(0.4, 0.6),
    corpus=None,
    ceiling=NO_CEILING,
    run=None,
    of_fold=None,
    tuned=None,
    **fields,
):
    data = DataArguments(dataset=dataset, data_dir=None if corpus else "/somewhere/else")
    run = RunArguments(output_dir="outputs/here", **(run or {}))
    arguments = Arguments(data, ModelArguments(backbone=backbone, **fields, **flags_of_tuning(tuned or {})), run)
    config = None if backbone == "acoustic" else backbone_config(num_hidden_layers=4)
    model = small_model(backbone_config=config, **fields, **(tuned or {}))
    scores = {label: Score(rho, *interval) for label in (MEAN, *EMOTIONS)}
    corpus = corpus_of_full_size(corpus or dataset)
    return model_card(arguments, model, EmoShareFeatureExtractor(), scores, corpus, ceiling, of_fold=of_fold)


def flags_of_tuning(tuned):
    """Flags of train.py that give a config these fields."""
    flags = {"finetune": "all"} if tuned.get("freeze_backbone") is False else {}
    if "backbone_layer" in tuned:
        flags["backbone_layer"] = str(tuned["backbone_layer"])
    names = {"finetuned_layers": "finetune_last_layers", "lora_rank": "lora_rank"}
    return flags | {names[field]: value for field, value in tuned.items() if field in names}


def corpus_of_full_size(configuration):
    sizes = {"train": 31745, "devel": 9925, "test": 10143}
    splits = {split: Dataset.from_dict({"filename": [""] * size}) for split, size in sizes.items()}
    return Corpus(corpus_named(configuration), DatasetDict(splits), list(EMOTIONS))


@pytest.mark.parametrize(
    ("architecture", "anger", "mean"), [("cnn_lstm", 0.450, 0.517), ("cnn_lstm_attention", 0.467, 0.522)]
)
def test_the_papers_row_is_given_for_the_same_backbone(architecture, anger, mean):
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
    assert "| label | ρ | 95 % interval |\n" in card_of(dataset, backbone).text


@pytest.mark.parametrize(
    ("corpus", "texts"),
    [
        ("compare2023", ["ComParE 2023 challenge", "does not let it be passed on", "0.400 to 0.600 | 0.467 |"]),
        ("synthetic", ["synthetic corpus", "nothing about people"]),
        ("csv", ["The data: see [org/corpus]", "| label | ρ | 95 % interval |\n"]),
        ("default", ["The data: see [org/corpus]", "| label | ρ | 95 % interval |\n"]),
    ],
)
def test_a_dataset_on_the_hub_is_named_and_is_the_corpus_that_it_says(corpus, texts):
    card = card_of("org/corpus", "facebook/hubert-large-ll60k", corpus=corpus)
    assert card.data.datasets == ["org/corpus"]
    assert {result.dataset_type for result in card.data.eval_results} == {"org/corpus"}
    for text in ["[org/corpus](https://huggingface.co/datasets/org/corpus)", *texts]:
        assert text in card.text
    assert "local folder" not in card.text


def test_a_card_says_that_splits_are_folds_and_what_test_gave():
    card = card_of("csv", "acoustic", of_fold={MEAN: Score(0.4321)})
    folds = "Devel and test are folds of the corpus, not its own splits."
    assert f"{folds} On test, which nothing was selected on, the mean ρ is 0.432.\n" in card.text
    assert f"{folds}\n" in card_of("csv", "acoustic", of_fold={MEAN: Score(math.nan)}).text
    assert "folds" not in card_of("csv", "acoustic").text


def test_a_dataset_in_a_folder_is_shown_by_its_name_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    card = card_of(str(tmp_path / "mine"), "facebook/hubert-large-ll60k", corpus="compare2023")
    assert card.data.datasets is None
    assert "| dataset | mine |" in card.text
    assert "0.400 to 0.600 | 0.467 |" in card.text
    assert str(tmp_path) not in card.content


def test_the_synthetic_corpus_is_called_synthetic():
    card = card_of("synthetic", "acoustic")
    assert "show that the software works. They say nothing about people" in card.text
    assert "There is no backbone." in card.text
    assert "synthetic" in card.data.tags
    other = card_of("csv", "acoustic")
    assert "nothing about people" not in other.text
    assert "synthetic" not in other.data.tags


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_card_says_how_weights_were_selected(selection):
    text = card_of("csv", "acoustic", run={"selection": selection}).text
    assert f"(9925 clips). {SELECTIONS[selection].result} Intervals are" in text
    assert SELECTIONS[selection].limit in text
    assert f"| selection | {selection} |" in text


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


def test_the_noise_ceiling_stands_next_to_the_scores():
    listeners = NoiseCeiling({MEAN: 0.75, "Anger": 0.8}, clips=400)
    card = card_of("csv", "acoustic", ceiling=listeners)
    assert "| label | ρ | 95 % interval | noise ceiling |\n" in card.text
    assert "| Anger | 0.500 | 0.400 to 0.600 | 0.800 |\n| Boredom | 0.500 | 0.400 to 0.600 |  |" in card.text
    assert "| **mean** | 0.500 | 0.400 to 0.600 | 0.750 |\n\nNoise ceiling: because panels are small, " in card.text
    card = card_of("csv", "acoustic", ceiling=NoiseCeiling(clips=400, reason="votes are weighted"))
    assert "| label | ρ | 95 % interval |\n" in card.text
    assert "\n\nNo noise ceiling: votes are weighted.\n\n" in card.text


def test_the_card_says_what_was_resampled_where_there_are_intervals():
    text = card_of("csv", "acoustic", interval=(), run={"bootstrap": 0}).text
    assert "so the scores are a little optimistic.\n" in text
    assert "ootstrapped" not in text
    assert "Intervals are\nbootstrapped over clips." in card_of("csv", "acoustic").text
    assert (
        "bootstrapped over groups of clips (`speaker`)." in card_of("csv", "acoustic", run={"resample": "speaker"}).text
    )


@pytest.mark.parametrize(
    ("tuned", "text"),
    [
        ({}, "on the frozen features of facebook/hubert-large-ll60k; one head"),
        ({"finetuned_layers": 1}, "on the features of facebook/hubert-large-ll60k, whose last layer was trained with"),
        ({"finetuned_layers": 2}, "ll60k, whose last 2 layers were trained with the heads; one head"),
        ({"finetuned_layers": 2, "backbone_layer": 3}, "ll60k, whose layers 2 to 3 were trained with the heads; one"),
        ({"finetuned_layers": 1, "backbone_layer": 3}, "ll60k, whose layer 3 was trained with the heads; one head"),
        (
            {"finetuned_layers": 2, "lora_rank": 4},
            "trained with the heads by adapters (LoRA) of rank 4 on the attention of its last 2 layers; one head",
        ),
        (
            {"freeze_backbone": False},
            "on the features of facebook/hubert-large-ll60k, which was trained with the heads;",
        ),
    ],
)
def test_a_card_says_what_was_tuned(tuned, text):
    card = card_of("compare2023", "facebook/hubert-large-ll60k", tuned=tuned)
    assert text in card.text
    paper = "0.400 to 0.600 | 0.467 |"
    assert (paper in card.text) == (not tuned)  # the paper's features are frozen
    assert ("`peft`" in card.text) == ("lora_rank" in tuned)


@pytest.mark.parametrize(
    ("tuned", "text"),
    [
        ({}, "This repository holds only the heads."),
        ({"finetuned_layers": 1}, "This repository holds only the heads and tuned layers."),
        ({"finetuned_layers": 1, "lora_rank": 4}, "This repository holds only the heads and adapters."),
    ],
)
def test_a_card_says_what_is_fetched_when_the_model_is_loaded(tuned, text):
    backbone = "facebook/hubert-large-ll60k"
    card = card_of("compare2023", backbone, tuned=tuned, run={"push_backbone": False})
    assert f"{text} When the model is loaded, the frozen part of its backbone is fetched from {backbone}, " in card.text
    assert text not in card_of("compare2023", backbone, tuned=tuned).text

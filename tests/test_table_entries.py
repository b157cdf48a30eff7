"""Every entry of every table is complete wherever it is read: in help texts, cards, tables, figures and reports."""

import re

import datasets
import pytest
from conftest import small_model, speech
from fabricated_grid import fabricated_corpus, finish_cell, plan_cell
from huggingface_hub import ModelCard

from emoshare import EmoShareFeatureExtractor, app, cli
from emoshare.architectures_emoshare import ARCHITECTURES
from emoshare.dataset_script.corpora import CORPORA
from emoshare.dataset_script.publishing import dataset_card
from emoshare.evaluation.card import model_card
from emoshare.evaluation.scores import MEAN, Score
from emoshare.fields_emoshare import ACOUSTIC_FEATURES, FEATURE_TYPES, NORMALIZATIONS, OUTPUT_ACTIVATIONS
from emoshare.head_emoshare import ENCODERS, STEMS
from emoshare.losses_emoshare import LOSSES
from emoshare.pooling_emoshare import POOLINGS
from emoshare.reproduction import report
from emoshare.reproduction.figures import style_of
from emoshare.reproduction.grid import Grid
from emoshare.reproduction.report import write_report
from emoshare.training.arguments import arguments_of, parse_arguments

LABELS = ["joy", "awe"]


def help_text(capsys, command, *argv):
    with pytest.raises(SystemExit):
        command([*argv, "--help"])
    return " ".join(capsys.readouterr().out.split())


def card_of(corpus_name, **flags):
    """The card of a model as `train.py` with these flags makes it, read back from its text."""
    arguments = arguments_of({"dataset": corpus_name, **flags}, "test")
    fields = {name: flags[name] for name in ("architecture", "loss") if name in flags}
    model = small_model(id2label=dict(enumerate(LABELS)), **fields)
    scores = {label: Score(0.5) for label in (MEAN, *LABELS)}
    corpus = fabricated_corpus(LABELS, name=corpus_name)
    return ModelCard(str(model_card(arguments, model, EmoShareFeatureExtractor(), scores, corpus)))


def page_of(folder, corpus, cells, monkeypatch):
    """The report of a grid of one or more finished cells."""
    monkeypatch.setattr(report, "RESAMPLES", 5)
    cells = [finish_cell(cell, corpus) for cell in cells]
    write_report(Grid("A grid", folder / "grid", cells, {}), corpus, {})
    return (folder / "grid" / "README.md").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, tmp_path, capsys, monkeypatch):
    architecture = ARCHITECTURES[name]
    assert architecture.stem in STEMS
    assert architecture.encoder in ENCODERS
    assert architecture.pooling in POOLINGS
    assert name in help_text(capsys, parse_arguments)
    assert architecture.description in card_of("csv", architecture=name).text
    page = page_of(tmp_path, fabricated_corpus(LABELS), [plan_cell(tmp_path, "mel", name)], monkeypatch)
    assert f"| mel | {architecture.title} |" in page
    for figure in ("architectures", "training_loss"):
        text = (tmp_path / "grid" / "figures" / f"{figure}.svg").read_text()
        assert f"<!-- {architecture.title}: {architecture.summary} -->" in text


def test_architectures_differ_in_every_figure():
    styles = [style_of(name) for name in ARCHITECTURES]
    for part in ("color", "marker", "linestyle", "legend"):
        assert len({getattr(style, part) for style in styles}) == len(styles)


@pytest.mark.parametrize("name", CORPORA)
def test_corpora(name, tmp_path, capsys, monkeypatch):
    info = CORPORA[name]
    card = card_of(name)
    for text in (info.description, info.licence_note, info.caution):
        assert text in card.text
    assert ("synthetic" in card.data.tags) == info.is_synthetic
    assert (app.warning(card) == app.SYNTHETIC) == info.is_synthetic
    page = page_of(
        tmp_path, fabricated_corpus(LABELS, name=name), [plan_cell(tmp_path, "mel", dataset=name)], monkeypatch
    )
    assert info.title in page
    assert info.caution in page
    assert ("These are not the paper's results" in page) == (not info.is_papers)
    for command in ((parse_arguments,), (cli.main, "evaluate"), (cli.main, "ensemble")):
        text = help_text(capsys, *command)
        assert re.search(rf"\b{name}\b", text)
        assert info.layout is None or info.layout in text

    splits = datasets.SplitDict({"train": datasets.SplitInfo("train", 0, 7)})
    published = dataset_card(datasets.DatasetInfo(config_name=name, splits=splits), "org/corpus", LABELS, [])
    assert info.title in published.data.pretty_name
    assert published.data.license == info.licence
    assert info.source in published.text
    assert info.citation in published.text


def test_one_corpus_is_the_papers():
    assert len([info for info in CORPORA.values() if info.is_papers]) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, capsys):
    assert arguments_of({"loss": name}, "test").model.config_fields["loss"] == name
    assert re.search(rf"\b{name}\b", help_text(capsys, parse_arguments))
    assert f"| loss | {name} |" in card_of("csv", loss=name).text


@pytest.mark.parametrize(
    ("flag", "choices"), [("normalization", NORMALIZATIONS), ("output_activation", OUTPUT_ACTIVATIONS)]
)
def test_choices_of_a_head(flag, choices, capsys):
    text = help_text(capsys, parse_arguments)
    for name in choices:
        assert name in text
        assert f"| {flag} | {name} |" in card_of("csv", **{flag: name}).text


@pytest.mark.parametrize("name", ACOUSTIC_FEATURES)
def test_acoustic_features(name, capsys):
    description, width = FEATURE_TYPES[name]
    card = card_of("csv", acoustic_features=name).text
    assert f"on the {description} of the clip" in card
    assert f"# EmoShare: {description}\n" in card
    assert re.search(rf"\b{name}\b", help_text(capsys, parse_arguments))
    extractor = EmoShareFeatureExtractor(feature_type=name)
    assert extractor(speech(0.5), sampling_rate=16000)["input_features"][0].shape == (48, width)
    assert extractor.feature_size == width

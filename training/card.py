"""The model card of a run: what the Hub shows of it, and reads from it."""

import math
from dataclasses import asdict
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..dataset_script.corpora import is_published
from .arguments import ACOUSTIC
from .paper import PAPER, row_of

TEMPLATE = Path(__file__).parent / "model_card.md"

# Arguments that change nothing in the model.
UNTOLD = {
    "data_dir",
    "feature_cache_dir",
    "output_dir",
    "bootstrap",
    "controls",
    "checkpoint_minutes",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "push_backbone",
}
ARCHITECTURES = {
    "cnn_lstm": "Architecture 1 of the paper: convolutions, an LSTM, the mean over time and a feed-forward network",
    "cnn_lstm_attention": "Architecture 2 of the paper: convolutions, an LSTM, attention over time and a feed-forward "
    "network",
    "transformer": "The multi-headed transformer that the paper mentions (section 3.2), in sizes of our own: "
    "convolutions, two encoder layers, the mean over time and a feed-forward network",
}
DATASETS = {
    "synthetic": "The **synthetic corpus** that comes with the code: voices made of pulses and filters, and simulated "
    "listeners.",
    "compare2023": "The Emotion Share corpus of the ComParE 2023 challenge (a part of HUME-Prosody).",
    "csv": "A corpus in a local folder.",
}
CAUTION = {
    "synthetic": "\n**These numbers show that the software works, and nothing about people:** the corpus is "
    "synthetic.\n"
}
DATA_LICENCES = {
    "synthetic": "The data: made by the code, and under its licence.",
    "compare2023": "The data: given to participants of the challenge under an agreement of its own, which does not let "
    "it be passed on; ask its owners which uses of a model that was trained on it they allow.",
    "csv": "The data: whoever trained this model knows its licence.",
}


def model_card(data, model_arguments, run, model, feature_extractor, results, clips, corpus):
    """
    Args:
        data, model_arguments, run: the run's arguments.
        model: the trained `EmoShareModel`.
        feature_extractor: its `EmoShareFeatureExtractor`.
        results: of `Scorer.scores` on devel.
        clips: number of clips per split.
        corpus: which corpus the data are, whether in a local folder or published: the name of their configuration.

    Returns:
        `huggingface_hub.ModelCard`, its metadata as the Hub reads it: task, base model, dataset, metrics, and a result
        for each label that has one.
    """
    corpus = corpus if corpus in DATASETS else "csv"
    dataset_id = data.dataset if is_published(data.dataset) and not Path(data.dataset).exists() else None
    labels = list(model.config.id2label.values())
    is_acoustic = model_arguments.backbone == ACOUSTIC
    is_on_hub = not is_acoustic and not Path(model_arguments.backbone).exists()
    if is_acoustic:
        features = {"mel": "log-mel spectrum", "mfcc": "MFCC"}[model_arguments.acoustic_features]
    else:
        kind = model.config.backbone_config.model_type
        features = model_arguments.backbone if is_on_hub else f"a backbone of the kind {kind}"
    name = (run.hub_model_id or Path(run.output_dir).resolve().name).rpartition("/")[2]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        base_model=model_arguments.backbone if is_on_hub else None,
        datasets=[dataset_id] if dataset_id else None,
        license="other",  # those of code, backbone and data differ: the card has a section on them
        license_name="see-licences-in-the-card",
        metrics=["spearmanr"],
        tags=["emotion-share", "speech", "emotion", "regression"],
        model_name=name,
        eval_results=_eval_results(corpus, dataset_id, labels, results) or None,
    )
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        features=features,
        labels=", ".join(labels),
        first_label=labels[0],
        model_id=run.hub_model_id or run.output_dir,
        chunk_length_s=f"{feature_extractor.chunk_length_s:g}",
        architecture=_architecture(model, features, is_acoustic),
        num_devel=clips["devel"],
        caution=CAUTION.get(corpus, ""),
        results=_results_table(labels, results, _paper_row(corpus, model_arguments)),
        dataset=_dataset(corpus, dataset_id),
        training_clips=f"{clips['train']:,}",
        settings=_settings(data, model_arguments, run),
        backbone_licence=_backbone_licence(model_arguments.backbone, is_acoustic, is_on_hub, run.push_backbone),
        data_licence=_data_licence(corpus, dataset_id),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _eval_results(corpus, dataset_id, labels, results):
    """A result for the mean and each label; one that does not exist (NaN) is left out."""
    scores = [("Spearman's ρ, mean", results["spearman"])]
    scores += [(f"Spearman's ρ, {label}", results[f"spearman_{label}"]) for label in labels]
    return [
        EvalResult(
            task_type="audio-classification",
            task_name="Emotion share",
            dataset_type=dataset_id or f"emotion-share-{corpus}",
            dataset_name=f"Emotion Share ({dataset_id or corpus})",
            dataset_split="devel",
            metric_type="spearmanr",
            metric_name=name,
            metric_value=score,
        )
        for name, score in scores
        if not math.isnan(score)
    ]


def _architecture(model, features, is_acoustic):
    config = model.config
    source = f"the {features} of the clip" if is_acoustic else f"the frozen frame features of {features}"
    networks = "a network for each emotion" if config.separate_heads else "one network for all emotions"
    size = sum(parameter.numel() for parameter in model.heads.parameters())
    parameters = f"{size:,} trained parameters in all"
    return f"{ARCHITECTURES[config.architecture]}, on {source}; {networks}, {parameters}."


def _paper_row(corpus, arguments):
    """The paper's ρ of each emotion, with the same features and architecture; empty if it has none."""
    row = row_of(arguments.backbone, arguments.acoustic_features, arguments.backbone_layer)
    if corpus != "compare2023" or row is None or arguments.architecture not in PAPER["table_1"][row]:
        return {}
    return dict(zip(PAPER["emotions"], PAPER["table_1"][row][arguments.architecture], strict=True))


def _results_table(labels, results, paper):
    names = [(label, f"spearman_{label}") for label in labels] + [("**mean**", "spearman")]
    paper = {**paper, "**mean**": sum(paper.values()) / len(paper)} if paper else {}
    lines = ["| | ρ | 95 % interval |", "|---|---|---|"]
    if paper:
        lines = ["| | ρ | 95 % interval | paper |", "|---|---|---|---|"]
    for name, key in names:
        low, high = results.get(f"{key}_ci95", (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        score = "none" if math.isnan(results[key]) else f"{results[key]:.3f}"
        lines.append(f"| {name} | {score} | {interval} |" + (f" {paper[name]:.3f} |" if paper else ""))
    return "\n".join(lines)


def _settings(data, model_arguments, run):
    settings = {**asdict(data), **asdict(model_arguments), **asdict(run)}
    untold = UNTOLD if model_arguments.backbone == ACOUSTIC else UNTOLD | {"acoustic_features"}
    lines = ["| setting | value |", "|---|---|"]
    for name, value in settings.items():
        if value is not None and name not in untold:
            # A folder is told by its name alone: where it lies on someone's disk is nobody's business.
            is_folder = name in ("backbone", "dataset") and Path(value).exists()
            lines.append(f"| {name} | {Path(value).name if is_folder else value} |")
    return "\n".join(lines)


def _dataset(corpus, dataset_id):
    if dataset_id is None:
        return DATASETS[corpus]
    link = f"The dataset [{dataset_id}](https://huggingface.co/datasets/{dataset_id})."
    return link if corpus == "csv" else f"{link} {DATASETS[corpus]}"


def _data_licence(corpus, dataset_id):
    if corpus == "csv" and dataset_id is not None:
        return f"The data: see [{dataset_id}](https://huggingface.co/datasets/{dataset_id})."
    return DATA_LICENCES[corpus]


def _backbone_licence(backbone, is_acoustic, is_on_hub, is_included):
    if is_acoustic:
        return "There is no backbone."
    place = "are among these" if is_included else "are not among these, and fetched when the model is loaded"
    if is_on_hub:
        return f"The backbone, whose weights {place}: see [{backbone}](https://huggingface.co/{backbone})."
    return f"The backbone, whose weights {place}, came from a local folder: see where that is from."

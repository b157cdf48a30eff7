"""The model card of a run, with the metadata that the Hub reads."""

import math
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..architectures_emoshare import ARCHITECTURES
from ..dataset_script.corpora import is_published
from ..fields_emoshare import FEATURE_TYPES
from .ceiling import NoiseCeiling
from .markdown import markdown_table
from .paper import rhos_of, row_of
from .scores import MEAN
from .selections import SELECTIONS

CALIBRATION_FIGURE = "calibration_devel.png"
NO_CEILING = NoiseCeiling()
ONE_EPOCH = " All labels share trained layers, and so one epoch: the best one for their mean."
OF_TUNING = ("finetune", "finetune_last_layers", "lora_rank", "finetune_learning_rate")
TEMPLATE = Path(__file__).parent / "model_card.md"
CALIBRATION_TEMPLATE = TEMPLATE.with_name("model_card_calibration.md")


def model_card(
    arguments, model, feature_extractor, scores, corpus, ceiling=NO_CEILING, calibrations=None, of_fold=None
):
    """
    Args:
        arguments: the run's `Arguments`.
        model: the trained `EmoShareModel`.
        feature_extractor: its `EmoShareFeatureExtractor`.
        scores: what `Scorer.scores` returned on devel.
        corpus: the `Corpus` that the model was trained on.
        ceiling: `NoiseCeiling` of devel.
        calibrations: `Calibration`s by split, of a model that predicts concentrations.
        of_fold: what `Scorer.scores` returned on test, if test is a fold of the corpus.

    Returns:
        `huggingface_hub.ModelCard`. Its metadata give the task, base model, dataset, metrics, and a result for each
        label that has one; the tag `synthetic` marks a corpus of synthetic voices.
    """
    backbone, dataset_id = _backbone_id(arguments.model), _dataset_id(arguments.data)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        base_model=backbone,
        datasets=[dataset_id] if dataset_id else None,
        license="other",  # code, backbone and data have different licences, which the card lists
        license_name="see-licences-in-the-card",
        metrics=["spearmanr"],
        tags=corpus.info.tags,  # app.py looks for "synthetic" among them
        model_name=(arguments.run.hub_model_id or Path(arguments.run.output_dir).resolve().name).rpartition("/")[2],
        eval_results=_eval_results(scores, corpus.name, dataset_id) or None,
    )
    features = _features(arguments.model, model.config)
    selection = SELECTIONS[arguments.run.selection]
    labels = model.config.labels
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        features=features,
        labels=", ".join(labels),
        first_label=labels[0],
        model_id=arguments.run.hub_model_id or arguments.run.output_dir,
        chunk_length_s=f"{feature_extractor.chunk_length_s:g}",
        needs=_needs(arguments, model.config),
        architecture=_architecture(model, features),
        selection=selection.result + (ONE_EPOCH if model.config.tunes_backbone else ""),
        limit_of_score=selection.limit,
        num_devel=len(corpus.splits["devel"]),
        intervals=_intervals(scores, arguments.run.resample),
        folds=_folds(of_fold),
        caution=f"\n**{corpus.info.caution}**\n" if corpus.info.caution else "",
        results=_results_table(scores, ceiling, _paper_rhos(arguments.model, corpus.info)),
        ceiling=f"\n{ceiling.text}\n" if ceiling.text else "",
        calibration=_calibration(calibrations),
        dataset=_dataset(corpus.info, dataset_id),
        training_clips=f"{len(corpus.splits['train']):,}",
        settings=_settings_table(arguments),
        backbone_licence=_backbone_licence(arguments, backbone),
        data_licence=_data_licence(corpus.info, dataset_id),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def shown_settings(arguments):
    """
    The flags that cards and reports show.

    Args:
        arguments: `Arguments`.

    Returns:
        `dict`: values of flags by name, without flags that have no value or no meaning for this run. A folder is shown
        by its name alone, without the path on the disk of whoever trained the model.
    """
    settings = {name: value for name, value in arguments.values("on_card").items() if value is not None}
    if not arguments.model.is_acoustic:
        del settings["acoustic_features"]
    if not arguments.model.tunes_backbone:
        settings = {name: value for name, value in settings.items() if name not in OF_TUNING}
    for name in ("backbone", "dataset"):
        if Path(settings[name]).exists():
            settings[name] = Path(settings[name]).name
    return settings


def _backbone_id(arguments):
    """The backbone's Hub id; `None` if there is no backbone, or if it came from a folder."""
    return None if arguments.is_acoustic or Path(arguments.backbone).exists() else arguments.backbone


def _dataset_id(arguments):
    """The dataset's Hub id; `None` if it is not on the Hub."""
    return arguments.dataset if is_published(arguments.dataset) and not Path(arguments.dataset).exists() else None


def _features(arguments, config):
    """The name of the frame features that the heads take."""
    if arguments.is_acoustic:
        return FEATURE_TYPES[arguments.acoustic_features][0]
    return _backbone_id(arguments) or f"a backbone of the kind {config.backbone_config.model_type}"


def _eval_results(scores, corpus_name, dataset_id):
    """Results for the mean and for each label; labels without a ρ (NaN) are left out."""
    return [
        EvalResult(
            task_type="audio-classification",
            task_name="Emotion share",
            dataset_type=dataset_id or f"emotion-share-{corpus_name}",
            dataset_name=f"Emotion Share ({dataset_id or corpus_name})",
            dataset_split="devel",
            metric_type="spearmanr",
            metric_name=f"Spearman's ρ, {'mean' if label is MEAN else label}",
            metric_value=score.rho,
        )
        for label, score in scores.items()
        if not math.isnan(score.rho)
    ]


def _architecture(model, features):
    config = model.config
    source = f"the {features} of the clip" if config.backbone_config is None else _tuning(config, features)
    heads = "one head for each emotion" if config.separate_heads else "one head for all emotions"
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    description = ARCHITECTURES[config.architecture].description
    return f"{description}, on {source}; {heads}, {size:,} trained parameters in all."


def _tuning(config, features):
    """The features of a backbone, and which of its layers were trained."""
    if not config.tunes_backbone:
        return f"the frozen features of {features}"
    if not config.finetuned_layers:
        return f"the features of {features}, which was trained with the heads"
    number, top = config.finetuned_layers, config.backbone_layer
    if top == -1:
        layers = f"last {number} layers" if number > 1 else "last layer"
    else:
        layers = f"layers {top - number + 1} to {top}" if number > 1 else f"layer {top}"
    if config.lora_rank:
        layers = f"adapters (LoRA) of rank {config.lora_rank} on the attention of its {layers}"
        return f"the features of {features}, trained with the heads by {layers}"
    return f"the features of {features}, whose {layers} {'were' if number > 1 else 'was'} trained with the heads"


def _needs(arguments, config):
    """What is needed to load the model besides the usual packages; empty if nothing is."""
    needs = ""
    if config.lora_rank:
        needs += "\nThe adapters also need `peft`; `emoshare merge` makes a copy of the model that does not.\n"
    if not (arguments.run.push_backbone or arguments.model.is_acoustic):
        tuned = " and adapters" if config.lora_rank else " and tuned layers" if config.finetuned_layers else ""
        needs += (
            f"\nThis repository holds only the heads{tuned}. When the model is loaded, the frozen part of its backbone "
            f"is fetched from {_backbone_id(arguments.model) or 'the folder that it came from'}, which must be "
            "reachable, and checked to be the backbone that the heads were trained on.\n"
        )
    return needs


def _paper_rhos(arguments, info):
    """The paper's ρ with the same features and architecture; empty if it has none, or on another corpus."""
    return rhos_of(row_of(arguments), arguments.architecture) if info.is_papers else {}


def _results_table(scores, ceiling, paper):
    rows = []
    for label in [*(label for label in scores if label is not MEAN), MEAN]:
        score = scores[label]
        name = "**mean**" if label is MEAN else label
        rho = "none" if math.isnan(score.rho) else f"{score.rho:.3f}"
        interval = "" if math.isnan(score.low) else f"{score.low:.3f} to {score.high:.3f}"
        highest = [f"{ceiling.rhos[label]:.3f}" if label in ceiling.rhos else ""] if ceiling.rhos else []
        rows.append([name, rho, interval, *highest, *([f"{paper[label]:.3f}"] if paper else [])])
    header = [
        "label",
        "ρ",
        "95 % interval",
        *(["noise ceiling"] if ceiling.rhos else []),
        *(["paper"] if paper else []),
    ]
    return markdown_table(header, rows)


def _intervals(scores, resample):
    """A sentence on what was resampled for the intervals; empty if there are no intervals."""
    if all(math.isnan(score.low) for score in scores.values()):
        return ""
    return f" Intervals are\nbootstrapped over {f'groups of clips (`{resample}`)' if resample else 'clips'}."


def _folds(of_fold):
    """A note that devel and test are folds of the corpus; empty if they are its own splits."""
    if of_fold is None:
        return ""
    text = "\nDevel and test are folds of the corpus, not its own splits."
    rho = of_fold[MEAN].rho
    return (
        f"{text}\n" if math.isnan(rho) else f"{text} On test, which nothing was selected on, the mean ρ is {rho:.3f}.\n"
    )


def _calibration(calibrations):
    """The section on calibration; empty without calibrations."""
    if not calibrations:
        return ""
    rows = [
        [split, f"{calibration.held[-1]:.1%}", f"{calibration.stated[-1]:.1%}", f"{calibration.error:.3f}"]
        for split, calibration in calibrations.items()
    ]
    columns = ["split", "empirical coverage", "nominal coverage", "expected calibration error"]
    table, template = markdown_table(columns, rows), CALIBRATION_TEMPLATE.read_text(encoding="utf-8")
    return "\n" + Template(template).substitute(table=table, figure=CALIBRATION_FIGURE)


def _settings_table(arguments):
    return markdown_table(
        ["setting", "value"], [[name, str(value)] for name, value in shown_settings(arguments).items()]
    )


def _dataset(info, dataset_id):
    if dataset_id is None:
        return info.description
    link = f"The dataset [{dataset_id}](https://huggingface.co/datasets/{dataset_id})."
    return f"{link} {info.description}" if info.is_named else link


def _data_licence(info, dataset_id):
    if dataset_id is not None and not info.is_named:
        return f"The data: see [{dataset_id}](https://huggingface.co/datasets/{dataset_id})."
    return info.licence_note


def _backbone_licence(arguments, backbone_id):
    if arguments.model.is_acoustic:
        return "There is no backbone."
    place = "are in this repository" if arguments.run.push_backbone else "are fetched when the model is loaded"
    if backbone_id is not None:
        return f"The backbone, whose weights {place}: see [{backbone_id}](https://huggingface.co/{backbone_id})."
    return f"The backbone, whose weights {place}, came from a local folder: see the licence of its source."

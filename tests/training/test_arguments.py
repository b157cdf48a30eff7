import pytest
from conftest import ROOT
from transformers import HfArgumentParser

from emoshare import EMOTIONS, EmoShareConfig
from emoshare.training.arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    parse_arguments,
)


def refused(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_no_arguments_are_the_demo():
    assert parse_arguments([]) == parse_arguments([str(ROOT / "configs" / "demo.yaml")])
    arguments = parse_arguments([])
    assert (arguments.data.dataset, arguments.model.backbone, arguments.run.controls) == ("synthetic", "acoustic", True)


def test_flags_override_the_yaml_file(tmp_path):
    path = config(tmp_path, "seed: 3\nlearning_rate: 2e-3\nconv_channels: [8, 4]\nseparate_heads: false\n")
    arguments = parse_arguments([path, "--seed", "5", "--conv_channels", "7"])
    assert (arguments.run.seed, arguments.run.learning_rate) == (5, 2e-3)
    assert (arguments.model.conv_channels, arguments.model.separate_heads) == ([7], False)


HUBERT = ["--backbone", "facebook/hubert-base-ls960"]
TWO_LAYERS = ["--finetune_last_layers", "2"]


@pytest.mark.parametrize("name", ["demo.yaml", "compare2023_hubert_large.yaml", "finetune.yaml", "paper_recipe.yaml"])
def test_the_configs_are_valid(name):
    parse_arguments([str(ROOT / "configs" / name)])


def test_the_papers_settings():
    arguments = parse_arguments([str(ROOT / "configs" / "compare2023_hubert_large.yaml")])
    model, run = arguments.model, arguments.run
    assert (run.per_device_train_batch_size, run.learning_rate) == (128, 1e-4)
    assert model.backbone == "facebook/hubert-large-ll60k"
    assert (model.conv_channels, model.lstm_hidden_size, model.lstm_num_layers) == ([768, 384, 192], 512, 2)


def test_the_papers_recipe():
    arguments = parse_arguments([str(ROOT / "configs" / "paper_recipe.yaml")])
    model, run = arguments.model, arguments.run
    assert (model.normalization, model.output_activation, model.max_frames) == ("sequence", "relu", 398)
    assert (model.conv_channels, model.ffn_sizes) == ([768, 384, 192], None)  # the released ones
    assert run.head_seeds == [66 if emotion in ("Boredom", "Concentration") else 999 for emotion in EMOTIONS]
    assert (run.per_device_train_batch_size, run.learning_rate, run.num_train_epochs) == (128, 1e-4, 150)
    assert run.early_stopping_patience == run.num_train_epochs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3", "unknown key 'sed'; did you mean 'seed'?"),
        ("seed: three", "--seed: invalid int value: 'three'"),
        ("seed: 1.5", "--seed: invalid int value: '1.5'"),
        ("seed: true", "--seed: invalid int value"),
        ("seed: [1, 2]", "seed is [1, 2]; expected a single value"),
        ("seed: 1\nseed: 2", "given more than once: seed"),
        ("output_dir: true", "output_dir is True; expected text"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint is True; expected 'last', or the folder of a"),
        ("learning_rate: .inf", "--learning_rate: got inf"),
        ("seed: {a: 1}", "seed is {'a': 1}"),
        ("architecture: gru", "invalid choice: 'gru'"),
        ("separate_heads: maybe", "separate_heads"),
        ("- seed", "expected lines of the form"),
        ("seed: [", "not valid YAML"),
    ],
)
def test_wrong_yaml_is_named(text, message, tmp_path, capsys):
    assert message in refused([config(tmp_path, text)], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--leraning_rate", "1"], "unrecognized arguments: --leraning_rate"),
        (["--learning", "1"], "unrecognized arguments: --learning"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (
            ["--dataset", "iemocap"],
            "--dataset: got 'iemocap'; expected synthetic, compare2023, crema_d, emodb, csv, a Hub id",
        ),
        (["--dataset", "org/name", "--data_dir", "here"], "--data_dir is for compare2023, crema_d, emodb, csv"),
        (["--num_train_epochs", "0"], "--num_train_epochs: got 0"),
        (["--learning_rate", "-1"], "--learning_rate: got -1.0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--max_train_samples", "0"], "--max_train_samples: got 0"),
        (["--backbone_layer", "last"], "--backbone_layer: got 'last'"),
        (["--seed", "5000000000"], "--seed: got 5000000000"),
        (["--head_seeds", "1", "-2"], "--head_seeds: got -2"),
        (["--restart_dead_heads", "-1"], "--restart_dead_heads: got -1"),
        (
            ["--restart_dead_heads", "1", "--separate_heads", "false"],
            "--restart_dead_heads is for one head per emotion",
        ),
        (["--head_seeds", "1", "--separate_heads", "false"], "--head_seeds is for one head per emotion"),
        (["--pool_size", "0"], "--pool_size: got 0"),
        (["--dropout", "1"], "--dropout: got 1.0; expected a number from 0 to less than 1"),
        (["--weight_decay", "-1"], "--weight_decay: got -1.0"),
        (["--max_grad_norm", "inf"], "--max_grad_norm: got inf"),
        (["--mixup", "nan"], "--mixup: got nan"),
        (["--time_stretch", "1"], "--time_stretch: got 1.0"),
        (["--listener_dropout", "-0.1"], "--listener_dropout: got -0.1"),
        (["--selection", "best"], "--selection: invalid choice: 'best'"),
        (["--lr_scheduler", "linear"], "invalid choice: 'linear' (choose from 'constant', 'cosine')"),
        (["--finetune_last_layers", "-1"], "--finetune_last_layers: got -1"),
        (["--finetune_last_layers", "1"], "--finetune_last_layers is for a backbone; got --backbone acoustic"),
        (["--finetune", "all"], "--finetune all is for a backbone; got --backbone acoustic"),
        (["--finetune", "some"], "invalid choice: 'some'"),
        ([*HUBERT, "--lora_rank", "4"], "--lora_rank is for the layers of --finetune_last_layers"),
        ([*HUBERT, "--finetune", "all", "--finetune_last_layers", "1"], "got --finetune_last_layers as well"),
        ([*HUBERT, *TWO_LAYERS, "--backbone_layer", "weighted"], "counts down from one layer; got --backbone_layer w"),
        ([*HUBERT, *TWO_LAYERS, "--backbone_layer", "1"], "--finetune_last_layers: got 2; expected at most 1"),
        (
            [*HUBERT, *TWO_LAYERS, "--restart_dead_heads", "1"],
            "--restart_dead_heads is for heads that train",
        ),
        ([*HUBERT, "--finetune", "all", "--mixup", "0.2"], "--mixup changes stored features; --finetune all trains on"),
        ([*HUBERT, "--finetune", "all", "--part", "1/2"], "--part extracts features to a store; --finetune all trains"),
        ([*HUBERT, "--finetune", "all", "--push_backbone", "false"], "--push_backbone false: --finetune all trains"),
        ([*HUBERT, "--finetune_learning_rate", "0.1"], "--finetune_learning_rate is for --finetune_last_layers or"),
        ([*HUBERT, "--gradient_checkpointing"], "--gradient_checkpointing is for --finetune_last_layers or"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps: got 0"),
        (["--chunk_length_s", "nan"], "--chunk_length_s: got nan"),
        (["--output_dir", ""], "--output_dir: got nothing"),
        (["--backbone_layer", "weighted"], "got --backbone acoustic"),
        (["--acoustic_features", "mfcc", "--backbone", "facebook/hubert-base-ls960"], "--acoustic_features is for"),
        (
            ["--folds", "2", "--fold", "0"],
            "--folds: got '2'; expected a number from 3, for test, devel and train, or leave",
        ),
        (["--folds", "leave_two_out", "--fold", "0"], "--folds: got 'leave_two_out'"),
        (["--folds", "5"], "--folds: needs --fold"),
        (["--folds", "5", "--fold", "5"], "--fold: got 5; expected 0 to 4"),
        (["--folds", "leave_one_out", "--fold", "-1", "--group_by", "sex"], "--fold: got -1; expected 0 or more"),
        (["--folds", "leave_one_out", "--fold", "0"], "--folds: leave_one_out needs --group_by"),
        (["--fold", "0"], "--fold is for --folds, which was not given"),
        (["--group_by", "sex"], "--group_by is for --folds, which was not given"),
        (["--part", "3"], "--part: got '3'; expected K/N, with K from 1 to N, such as 3/16"),
        (["--part", "0/3"], "--part: got '0/3'; expected K/N"),
        (["--part", "4/3"], "--part: got '4/3'; expected K/N"),
        (["missing.yaml"], "missing.yaml: no such config file"),
        (["--seed", "1", "demo.yaml"], "unrecognized arguments: demo.yaml"),
    ],
)
def test_wrong_flags_are_named(argv, message, capsys):
    assert message in refused(argv, capsys)


def test_a_folder_of_clips_is_no_published_dataset(corpus_folder, tmp_path, capsys):
    assert f"expected --dataset csv --data_dir {corpus_folder}" in refused(["--dataset", str(corpus_folder)], capsys)
    assert parse_arguments(["--dataset", str(tmp_path)]).data.dataset == str(tmp_path)


def test_an_empty_value_in_yaml_is_the_default(tmp_path):
    assert parse_arguments([config(tmp_path, "data_dir:\nseed: 1\n")]).data.data_dir is None


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], None), (["--resume_from_checkpoint"], "last"), (["--resume_from_checkpoint", "some/folder"], "some/folder")],
)
def test_resume_from_checkpoint(argv, value):
    assert parse_arguments(["--seed", "0", *argv]).run.resume_from_checkpoint == value


def values(kind, *argv):
    return parse_arguments(["--seed", "0", *argv]).values(kind)


def test_settings_that_may_not_change_on_resuming():
    kind = "fixed_on_resume"
    first = values(kind, "--output_dir", "a", "--num_train_epochs", "3")
    assert first == values(kind, "--output_dir", "b", "--num_train_epochs", "5")
    assert first != values(kind, "--output_dir", "a", "--learning_rate", "0.1")
    assert {"dataset", "architecture", "seed", "loss"} <= set(first)


def test_settings_that_change_results():
    kind = "changes_results"
    first = values(kind, "--output_dir", "a", "--controls", "--push_backbone", "false")
    assert first == values(kind, "--output_dir", "b", "--report_to", "tensorboard")
    for other in (["--num_train_epochs", "3"], ["--bootstrap", "10"], ["--feature_dtype", "float32"]):
        assert first != values(kind, *other)


def test_places_and_the_hub_are_not_on_the_card():
    shown = values("on_card", "--data_dir", "here")
    assert {"dataset", "architecture", "num_train_epochs", "learning_rate"} <= set(shown)
    assert not {"data_dir", "output_dir", "feature_cache_dir", "hub_model_id", "push_to_hub", "bootstrap"} & set(shown)


def test_flags_of_the_head_have_the_defaults_of_the_config():
    config = EmoShareConfig(**ModelArguments().config_fields)
    assert config.to_dict() == EmoShareConfig().to_dict()
    assert set(ModelArguments().config_fields) >= {
        "architecture",
        "conv_channels",
        "ffn_sizes",
        "loss",
        "separate_heads",
    }


def test_the_flags_are_those_that_transformers_would_make(capsys):
    class Stock(HfArgumentParser):
        def add_argument(self, *names, changes_results=None, fixed_on_resume=None, on_card=None, **options):
            options.pop("is_config_field", None)
            return super().add_argument(*names, **options)

    groups = (DataArguments, ModelArguments, RunArguments)
    stock = Stock(groups, prog="train.py", usage="train.py [CONFIG.yaml] [--FLAG VALUE ...]", allow_abbrev=False)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert capsys.readouterr().out == stock.format_help()
    flags = ["--no-separate-heads", "--controls", "--push_backbone", "n", "--ffn-sizes", "3", "4", "--fold", "1"]
    flags += ["--folds", "3", "--warmup_ratio", "0.5", "--resume_from_checkpoint", "--acoustic_features", "mfcc"]
    parsed, expected = parse_arguments(flags), stock.parse_args_into_dataclasses(flags)
    assert (parsed.data, parsed.model, parsed.run) == expected

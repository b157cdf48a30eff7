"""Checkpoints with and without the backbone's weights, and fine-tuning by Transformers' own Trainer."""

import json
import shutil

import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, small_model, speech
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Trainer, TrainingArguments, pipeline
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from emoshare import EmoShareFeatureExtractor, EmoShareModel


@pytest.fixture
def backbone(tmp_path, backbone_folder):
    """A backbone folder for this test alone."""
    return shutil.copytree(backbone_folder, tmp_path / "backbone")


@pytest.fixture
def heads_alone(tmp_path, backbone):
    """A model, and the folder of its heads."""
    model = EmoShareModel.from_backbone_pretrained(backbone, **SMALL_HEAD).eval()
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    return model, tmp_path / "heads"


def change_one_weight(backbone):
    weights = load_file(backbone / "model.safetensors")
    weights["feature_projection.projection.weight"][0, 0] += 1e-6
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})


def shares(model):
    waveform = torch.from_numpy(speech(1.0))[None]
    with torch.no_grad():
        return model(input_values=waveform, attention_mask=torch.ones_like(waveform)).logits


def assert_same_weights(model, expected):
    """Bit for bit, of backbone and heads."""
    weights, others = model.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name, weight in weights.items() if weight.dtype != others[name].dtype] == []
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []


def assert_same_model(model, expected):
    """Weights bit for bit, shares to 1e-6: kernels may round differently for another alignment of memory."""
    assert_same_weights(model, expected)
    torch.testing.assert_close(shares(model), shares(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_alone_are_the_whole_model_bit_for_bit(dtype, heads_alone, tmp_path):
    model, folder = heads_alone
    model.save_pretrained(tmp_path / "whole")
    assert all(name.startswith("heads.") for name in load_file(folder / "model.safetensors"))
    alone = EmoShareModel.from_pretrained(folder, dtype=dtype)
    whole = EmoShareModel.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert alone.backbone.dtype == dtype
    assert not alone.training
    assert not any(parameter.requires_grad for parameter in alone.backbone.parameters())
    assert_same_weights(alone, whole)
    if dtype == torch.float32:
        assert_same_weights(alone, model)
    # Rounding to the 8 bits of bfloat16 moves these shares by 2e-4, and kernels that add in another order round
    # differently, but no farther. Another backbone moves them by more than 1e-2.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for other in (whole, model):
        torch.testing.assert_close(shares(alone), shares(other), atol=tolerance, rtol=0)


def test_a_backbone_stored_in_16_bits_is_known_again(tmp_path, backbone_folder):
    AutoModel.from_pretrained(backbone_folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    model = EmoShareModel.from_backbone_pretrained(tmp_path / "half", **SMALL_HEAD).eval()
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    assert_same_model(EmoShareModel.from_pretrained(tmp_path / "heads"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_backbone_is_an_error(dtype, heads_alone, backbone):
    """The change is far below what bfloat16 can hold."""
    change_one_weight(backbone)
    with pytest.raises(ValueError, match="these heads were trained on weights with the hash"):
        EmoShareModel.from_pretrained(heads_alone[1], dtype=dtype)


def test_a_backbone_that_has_moved_is_named_and_can_be_given(heads_alone, backbone):
    model, folder = heads_alone
    moved = backbone.rename(backbone.with_name("moved"))
    with pytest.raises(OSError, match=r"heads alone, and their backbone '.*backbone'.*give backbone_name_or_path"):
        EmoShareModel.from_pretrained(folder)
    assert_same_model(EmoShareModel.from_pretrained(folder, backbone_name_or_path=str(moved)), model)


def test_heads_alone_load_without_a_word_about_the_backbone(heads_alone):
    _, folder = heads_alone
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as captured:
        EmoShareModel.from_pretrained(folder)
    assert captured.out == ""


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("heads.3.output.bias"), r"heads: .*lacks 1 weight\(s\): heads.3.output.bias"),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("heads.8.")],
            r"lacks 22 weight\(s\): heads.8",
        ),
        (
            lambda weights: weights.update({"heads.9.output.bias": torch.zeros(1)}),
            r"holds 1 unexpected weight\(s\): heads.9.output.bias",
        ),
    ],
)
def test_head_weights_that_are_missing_or_left_over_are_an_error(change, message, heads_alone):
    """Transformers would initialise the missing ones at random: shares that change from run to run."""
    _, folder = heads_alone
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        EmoShareModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        EmoShareModel.from_pretrained(folder, output_loading_info=True)


def test_a_whole_checkpoint_that_lacks_backbone_weights_is_an_error(heads_alone, tmp_path):
    model, _ = heads_alone
    model.save_pretrained(tmp_path / "whole")
    change_weights(tmp_path / "whole", lambda weights: weights.pop("backbone.feature_projection.projection.bias"))
    with pytest.raises(ValueError, match=r"lacks 1 weight.*backbone.feature_projection.projection.bias"):
        EmoShareModel.from_pretrained(tmp_path / "whole")


def test_other_labels_can_be_asked_for_as_in_transformers(tmp_path):
    """The heads of a shared trunk have other shapes then, and are initialised anew because the caller says so."""
    small_model(separate_heads=False).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        EmoShareModel.from_pretrained(tmp_path, id2label={0: "a", 1: "b"})
    model = EmoShareModel.from_pretrained(tmp_path, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True)
    assert model.heads[0].output.out_features == 2


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2\n"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: POINTER, "model.safetensors: holds a Git LFS pointer"),
        (lambda content: content[:-100], "the weights cannot be read.*incomplete metadata"),
        (lambda content: b"", "the weights cannot be read"),
    ],
)
def test_a_damaged_file_of_weights_is_a_short_error(damage, message, heads_alone, backbone):
    _, folder = heads_alone
    for damaged, load in [
        (folder, lambda: EmoShareModel.from_pretrained(folder)),
        (backbone, lambda: EmoShareModel.from_backbone_pretrained(backbone, **SMALL_HEAD)),
    ]:
        weights = damaged / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        with pytest.raises(ValueError, match=f"{damaged.name}.*{message}") as raised:
            load()
        assert len(str(raised.value)) < 300


def test_a_damaged_pickle_is_a_short_error(backbone):
    (backbone / "model.safetensors").unlink()
    for content in (b"", POINTER, b"PK\x03\x04 truncated"):
        (backbone / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"backbone.*(the weights cannot be read|Git LFS pointer)") as raised:
            EmoShareModel.from_backbone_pretrained(backbone, **SMALL_HEAD)
        assert len(str(raised.value)) < 400


def test_load_save_load_keeps_everything_with_and_without_the_backbone(heads_alone, backbone, tmp_path):
    model, folder = heads_alone
    loaded = EmoShareModel.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again", include_backbone=False)
    loaded.save_pretrained(tmp_path / "whole")
    again = EmoShareModel.from_pretrained(tmp_path / "again")
    shutil.rmtree(backbone)
    whole = EmoShareModel.from_pretrained(tmp_path / "whole")
    assert_same_model(again, model)
    assert_same_model(whole, model)


def test_a_pipeline_saves_heads_alone(heads_alone, tmp_path):
    model, folder = heads_alone
    EmoShareFeatureExtractor(do_normalize=False).save_pretrained(folder)
    emotion_share = pipeline("emotion-share", model=str(folder))
    emotion_share.save_pretrained(tmp_path / "copy", include_backbone=False)
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    copy = pipeline("emotion-share", model=str(tmp_path / "copy"))
    assert_same_weights(copy.model, emotion_share.model)
    scores, expected = (
        {share["label"]: share["score"] for share in saved(speech(1.0))} for saved in (copy, emotion_share)
    )
    assert list(scores) and scores == pytest.approx(expected, abs=1e-6)
    assert scores["Anger"] == pytest.approx(shares(model)[0, 0].item(), abs=1e-6)


def test_a_backbone_that_could_not_be_fetched_again_is_not_left_out(heads_alone, tmp_path):
    model, folder = heads_alone
    half = EmoShareModel.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="loaded in 16 bits"):
        half.save_pretrained(tmp_path / "half", include_backbone=False)
    with torch.no_grad():
        model.backbone.feature_projection.projection.weight[0, 0] += 1
    with pytest.raises(ValueError, match="they were changed"):
        model.save_pretrained(tmp_path / "changed", include_backbone=False)
    new = small_model(backbone_config=backbone_config())
    with pytest.raises(ValueError, match="not loaded by from_backbone_pretrained"):
        new.save_pretrained(tmp_path / "new", include_backbone=False)
    assert new.config.include_backbone  # a save that is refused changes nothing
    assert not [path for name in ("half", "changed", "new") for path in tmp_path.glob(f"{name}/*")]


@pytest.mark.parametrize("fields", [{}, {"freeze_backbone": False}])
def test_there_may_be_nothing_to_leave_out(fields, tmp_path, backbone):
    """A model without a backbone, and one that trains it."""
    model = EmoShareModel.from_backbone_pretrained(backbone, **fields, **SMALL_HEAD) if fields else small_model()
    model.save_pretrained(tmp_path / "model", include_backbone=False)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["include_backbone"] is True
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(model.state_dict())


@pytest.mark.slow
def test_the_stock_trainer_fine_tunes_backbone_and_heads(tmp_path, backbone):
    model = EmoShareModel.from_backbone_pretrained(backbone, freeze_backbone=False, **SMALL_HEAD)
    extractor = EmoShareFeatureExtractor(do_normalize=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    clips = [{"waveform": speech(0.4 + 0.1 * seed, seed), "labels": torch.rand(9)} for seed in range(8)]

    def collate(rows):
        inputs = extractor([row["waveform"] for row in rows], sampling_rate=16000, return_tensors="pt")
        return {**inputs, "labels": torch.stack([row["labels"] for row in rows])}

    arguments = TrainingArguments(
        tmp_path / "trainer",
        num_train_epochs=10,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        remove_unused_columns=False,
        report_to="none",
        logging_steps=1,
        save_strategy="epoch",
        save_total_limit=1,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=clips, eval_dataset=clips)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * untrained
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any(name.startswith("backbone.encoder") for name in changed)
    assert any(name.startswith("heads.8") for name in changed)
    trainer.save_model(tmp_path / "tuned")
    tuned = EmoShareModel.from_pretrained(tmp_path / "tuned")
    assert not tuned.config.freeze_backbone
    assert_same_model(tuned.eval(), model.eval())


POST_NORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False}


@pytest.mark.parametrize(
    ("model_type", "fields"), [("hubert", {}), ("hubert", POST_NORM), ("wavlm", {}), ("data2vec-audio", {})]
)
@pytest.mark.parametrize(("layer", "kept"), [(0, 1), (1, 1), (2, 2), (3, 3), (-1, 3), ("weighted", 3)])
def test_a_model_that_reads_a_layer_is_stored_without_those_above_it(model_type, fields, layer, kept, tmp_path):
    config = backbone_config(model_type, num_hidden_layers=3, **fields)
    model = small_model(backbone_config=config, backbone_layer=layer, id2label={0: "joy"})
    expected, weights = shares(model), dict(model.state_dict())
    model.save_pretrained(tmp_path)
    assert model.config.backbone_config.num_hidden_layers == 3
    assert model.state_dict().keys() == weights.keys()
    assert torch.equal(shares(model), expected)

    stored = {name.split(".")[3] for name in load_file(tmp_path / "model.safetensors") if ".encoder.layers." in name}
    assert stored == {str(number) for number in range(kept)}
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.backbone_config.num_hidden_layers == len(loaded.backbone.encoder.layers) == kept
    assert torch.equal(shares(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(shares(AutoModel.from_pretrained(tmp_path / "again").eval()), expected)


def test_a_cut_backbone_knows_what_it_lacks_and_where_it_came_from(tmp_path, backbone):
    model = EmoShareModel.from_backbone_pretrained(backbone, backbone_layer=1, **SMALL_HEAD).eval()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(
        ValueError, match="backbone_layer: got -1, for which 1 of the backbone's 2 layers do not suffice"
    ):
        AutoModel.from_pretrained(tmp_path / "whole", backbone_layer=-1)
    loaded = AutoModel.from_pretrained(tmp_path / "whole", backbone_name_or_path=str(backbone)).eval()
    loaded.save_pretrained(tmp_path / "heads", include_backbone=False)
    heads_alone = AutoModel.from_pretrained(tmp_path / "heads").eval()
    assert_same_model(heads_alone, loaded)
    assert torch.equal(shares(heads_alone), shares(model))
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    model.save_pretrained(tmp_path / "changed")  # its hash stays that of other weights
    changed = AutoModel.from_pretrained(tmp_path / "changed", backbone_name_or_path=str(backbone))
    with pytest.raises(ValueError, match="weights are not those of"):
        changed.save_pretrained(tmp_path / "heads", include_backbone=False)

"""Models whose backbone is trained in part: upper layers or adapters, saved with the heads, whole, and merged."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, run_python, small_model, speech
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.backbone_emoshare import family_of, load_backbone
from emoshare.cli import main

LAYERS, RANK = 2, 4  # what is tuned, of three layers
BACKBONES = ("hubert", "wavlm", "wav2vec2-bert", "whisper")  # one of each kind of attention
CLIPS = [speech(seconds, seed) for seed, seconds in enumerate((0.5, 1.3, 0.8))]
LABELS = torch.tensor([[0.1, 0.8], [0.6, 0.3], [0.9, 0.5]])
FIELDS = {**SMALL_HEAD, "finetuned_layers": LAYERS, "id2label": {0: "anger", 1: "joy"}}
OF_BACKBONE = {"whisper": {"backbone_padding": "clip"}}
KINDS = {"layers": 0, "adapters": RANK}


def tune(folder, model_type, rank, **fields):
    """A model around a new backbone in `folder`, tuned for a few steps of Adam, with its weights before."""
    torch.manual_seed(1)
    AutoModel.from_config(backbone_config(model_type, num_hidden_layers=3)).save_pretrained(folder)
    torch.manual_seed(2)
    fields = {**FIELDS, **OF_BACKBONE.get(model_type, {}), **fields}
    model = EmoShareModel.from_backbone_pretrained(folder, lora_rank=rank, **fields)
    extractor = EmoShareFeatureExtractor.for_backbone(folder, model.config.backbone_config)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(**inputs_of(extractor, CLIPS), labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(
        model=model.eval(), extractor=extractor, backbone=folder, before=before, rank=rank, fields=fields
    )


def inputs_of(extractor, clips):
    return extractor(clips, sampling_rate=16000, return_tensors="pt")


def shares(tuned, clips=CLIPS, model=None):
    with torch.no_grad():
        return (model or tuned.model)(**inputs_of(tuned.extractor, clips)).logits


@pytest.fixture(scope="module", params=[(name, kind) for name in BACKBONES for kind in KINDS], ids=", ".join)
def tuned(request, tmp_path_factory):
    model_type, kind = request.param
    return tune(tmp_path_factory.mktemp("backbone"), model_type, KINDS[kind])


of_adapters = pytest.mark.parametrize(
    "tuned", [(name, "adapters") for name in BACKBONES], indirect=True, ids=BACKBONES, scope="module"
)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("backbone"), "hubert", RANK)


@pytest.fixture(scope="module")
def layers_tuned(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("backbone"), "hubert", 0)


@pytest.fixture(params=KINDS)
def hubert(request):
    """As `tuned`, of one backbone."""
    return request.getfixturevalue({"layers": "layers_tuned", "adapters": "adapted"}[request.param])


def is_tuned(name, model):
    """Whether a weight of the model is trained, by its name."""
    if model.config.lora_rank:
        return name.startswith("heads.") or ".lora_" in name
    prefixes = ("layers.1.", "layers.2.")
    return name.startswith("heads.") or name.removeprefix("backbone.").removeprefix("encoder.").startswith(prefixes)


def assert_trains_what_is_tuned(model):
    wanted = {name for name, _ in model.named_parameters() if is_tuned(name, model)}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == wanted
    layers = family_of(model.config.backbone_config).layers(model.backbone, 0, -1)
    model.train()
    assert not model.backbone.training
    assert [layer.training for layer in layers] == [False, True, True]
    model.eval()
    assert not any(module.training for module in model.modules())


def test_training_changes_what_is_tuned_and_nothing_else(tuned):
    assert_trains_what_is_tuned(tuned.model)
    weights = tuned.model.state_dict()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, tuned.before[name])}
    assert changed == {name for name, _ in tuned.model.named_parameters() if is_tuned(name, tuned.model)}


def test_a_clip_has_the_same_shares_alone_and_in_any_batch(tuned):
    alone = torch.cat([shares(tuned, [clip]) for clip in CLIPS])
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        together = shares(tuned, [CLIPS[index] for index in order])
        torch.testing.assert_close(together, alone[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("include_backbone", [True, False])
def test_what_was_saved_gives_the_same_shares_bit_for_bit(include_backbone, tuned, tmp_path):
    tuned.model.save_pretrained(tmp_path, include_backbone=include_backbone)
    stored = set(load_file(tmp_path / "model.safetensors"))
    weights = set(tuned.model.state_dict())
    assert stored == (weights if include_backbone else {name for name in weights if is_tuned(name, tuned.model)})
    expected = shares(tuned)
    model = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(shares(tuned, model=model), expected)
    assert_trains_what_is_tuned(model)
    in_16_bits = AutoModelForAudioClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for name, weight in in_16_bits.named_parameters() if ".lora_" in name} <= {torch.float32}
    assert in_16_bits.backbone.dtype == torch.bfloat16
    # Rounding to bfloat16 moves the shares of these random networks by up to 1e-3.
    torch.testing.assert_close(shares(tuned, model=in_16_bits), expected, atol=3e-3, rtol=0)


def test_the_weights_of_a_backbone_keep_their_names(tuned):
    pretrained = set(load_backbone(tuned.backbone, tuned.model.config.backbone_config).state_dict())
    names = set(tuned.model.backbone.state_dict())
    assert pretrained <= names
    added = names - pretrained
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in added)
    assert len(added) == (2 * 4 * LAYERS if tuned.rank else 0)


@of_adapters
def test_new_adapters_follow_the_seed_and_change_nothing(tuned):
    torch.manual_seed(2)
    plain = EmoShareModel.from_backbone_pretrained(tuned.backbone, **{**tuned.fields, "finetuned_layers": 0}).eval()
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(EmoShareModel.from_backbone_pretrained(tuned.backbone, lora_rank=RANK, **tuned.fields).eval())
    for model in models:
        torch.testing.assert_close(shares(tuned, model=model), shares(tuned, model=plain), atol=1e-6, rtol=0)
        assert all(torch.equal(weight, tuned.before[name]) for name, weight in model.state_dict().items())
    assert all(weight.any() for name, weight in model.named_parameters() if ".lora_A." in name)


@of_adapters
def test_merged_adapters_give_the_same_shares_without_peft(tuned, tmp_path, monkeypatch):
    merged = copy.deepcopy(tuned.model).merge_adapters()
    torch.testing.assert_close(shares(tuned, model=merged), shares(tuned), atol=1e-6, rtol=0)
    assert (merged.config.finetuned_layers, merged.config.lora_rank) == (LAYERS, 0)
    assert set(merged.state_dict()) == {name for name in tuned.model.state_dict() if ".lora_" not in name}
    assert_trains_what_is_tuned(merged)
    merged.save_pretrained(tmp_path, include_backbone=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(shares(tuned, model=loaded), shares(tuned, model=merged))
    assert torch.equal(shares(tuned, model=tuned.model), shares(tuned))  # the copy shared nothing with it


def test_both_pipelines_take_a_tuned_model(hubert, tmp_path):
    hubert.model.save_pretrained(tmp_path, include_backbone=False)
    hubert.extractor.save_pretrained(tmp_path)
    expected = dict(zip(hubert.model.config.labels, shares(hubert, CLIPS[:1])[0].tolist(), strict=True))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        for task in ("emotion-share", "audio-classification"):
            result = pipeline(task, model=str(tmp_path), dtype=dtype)(CLIPS[0])
            assert {share["label"]: share["score"] for share in result} == pytest.approx(expected, abs=tolerance)


WITHOUT_THE_PACKAGE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "emoshare":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

def check(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = load_file(f"{folder}.safetensors")
    expected, clip = inputs.pop("shares"), inputs.pop("clip").numpy()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected), folder
    for task in ("emotion-share", "audio-classification"):
        shares = pipeline(task, model=folder, trust_remote_code=True)(clip)
        shares = torch.tensor([share["score"] for share in sorted(shares, key=lambda share: share["label"])])
        torch.testing.assert_close(shares, expected[0], atol=1e-6, rtol=0)

with_adapters, others = (group.split(",") for group in sys.argv[1:])
sys.modules["peft"] = None
for folder in others:
    check(folder)
for folder in with_adapters:
    try:
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    except ImportError as error:
        message = str(error)
        assert "\\n" not in message and "pip install peft" in message and "emoshare merge" in message, message
    else:
        raise AssertionError("adapters were loaded without PEFT")
del sys.modules["peft"]
for folder in with_adapters:
    check(folder)
"""


@pytest.mark.slow
def test_tuned_models_load_in_another_process_without_the_package(adapted, layers_tuned, tmp_path):
    """Bit for bit. Models with adapters ask for PEFT in one line if it is missing; other models do not need it."""
    merged = SimpleNamespace(model=copy.deepcopy(adapted.model).merge_adapters(), extractor=adapted.extractor)
    folders = {True: [], False: []}
    for each, name, include_backbone in [
        (adapted, "adapters", False),
        (adapted, "adapters and backbone", True),
        (layers_tuned, "layers", False),
        (merged, "merged", True),
    ]:
        each.model.save_pretrained(tmp_path / name, include_backbone=include_backbone)
        each.extractor.save_pretrained(tmp_path / name)
        expected = {"clip": torch.from_numpy(CLIPS[0]), "shares": shares(each)}
        save_file({**inputs_of(each.extractor, CLIPS), **expected}, tmp_path / f"{name}.safetensors")
        folders[each is adapted].append(str(tmp_path / name))
    script = tmp_path / "downstream.py"
    script.write_text(WITHOUT_THE_PACKAGE)
    groups = [",".join(folders[has_adapters]) for has_adapters in (True, False)]
    same = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # on which the last bits depend
    run_python(script, *groups, cwd=tmp_path, HF_HOME=str(tmp_path / "home"), **same)


def change(path, name, by=1e-3):
    """Changes one weight of a stored checkpoint, or removes it with `by=None`."""
    weights = load_file(path)
    if by is None:
        del weights[name]
    else:
        weights[name].view(-1)[0] += by
    save_file(weights, path, metadata={"format": "pt"})


FROZEN, TUNED = "encoder.layers.0.attention.q_proj.weight", "encoder.layers.2.attention.q_proj.weight"


@pytest.fixture
def moved(hubert, tmp_path):
    """What was tuned of `hubert`, saved next to a copy of its backbone that a test may change."""
    backbone = shutil.copytree(hubert.backbone, tmp_path / "backbone")
    model = copy.deepcopy(hubert.model)
    model.config.backbone_name_or_path = str(backbone)
    model.save_pretrained(tmp_path / "tuned", include_backbone=False)
    return tmp_path / "tuned", backbone


def test_another_frozen_part_is_an_error(moved):
    folder, backbone = moved
    change(backbone / "model.safetensors", FROZEN)
    with pytest.raises(ValueError, match="these heads were trained on weights with the hash"):
        AutoModel.from_pretrained(folder)


def test_layers_that_were_tuned_are_not_taken_from_where_the_rest_is(hubert, moved):
    folder, backbone = moved
    change(backbone / "model.safetensors", TUNED)
    if hubert.rank:  # the adapters belong to the layers as they were
        with pytest.raises(ValueError, match="these heads were trained on weights with the hash"):
            AutoModel.from_pretrained(folder)
    else:
        assert torch.equal(shares(hubert, model=AutoModel.from_pretrained(folder)), shares(hubert))


@pytest.mark.parametrize("include_backbone", [True, False])
def test_a_tuned_weight_that_is_missing_is_an_error(include_backbone, hubert, tmp_path):
    hubert.model.save_pretrained(tmp_path, include_backbone=include_backbone)
    name = "lora_B.default.weight" if hubert.rank else "weight"
    name = f"backbone.encoder.layers.1.attention.v_proj.{name}"
    change(tmp_path / "model.safetensors", name, by=None)
    with pytest.raises(ValueError, match=rf"lacks 1 weight\(s\): {name}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_frozen_weight_that_was_changed_is_an_error_when_the_rest_is_saved(hubert, tmp_path):
    model = copy.deepcopy(hubert.model)
    with torch.no_grad():
        model.backbone.get_parameter(FROZEN)[0, 0] += 1
    with pytest.raises(ValueError, match=r"include_backbone=False: .* they were changed"):
        model.save_pretrained(tmp_path / "changed", include_backbone=False)
    assert not (tmp_path / "changed").exists()


def test_load_save_load_keeps_everything(hubert, tmp_path):
    hubert.model.save_pretrained(tmp_path / "tuned", include_backbone=False)
    AutoModel.from_pretrained(tmp_path / "tuned").save_pretrained(tmp_path / "whole")
    whole = AutoModel.from_pretrained(tmp_path / "whole", backbone_name_or_path=str(hubert.backbone))
    whole.save_pretrained(tmp_path / "again", include_backbone=False)
    for name in ("tuned", "again"):
        assert torch.equal(shares(hubert, model=AutoModel.from_pretrained(tmp_path / name)), shares(hubert))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_above_the_tuned_ones_are_left_out_of_a_whole_model(kind, tmp_path):
    tuned = tune(tmp_path / "backbone", "hubert", KINDS[kind], backbone_layer=2, finetuned_layers=1)
    tuned.model.save_pretrained(tmp_path / "whole")
    assert not any(".layers.2." in name for name in load_file(tmp_path / "whole" / "model.safetensors"))
    whole = AutoModel.from_pretrained(tmp_path / "whole", backbone_name_or_path=str(tuned.backbone))
    assert torch.equal(shares(tuned, model=whole), shares(tuned))
    whole.save_pretrained(tmp_path / "tuned", include_backbone=False)
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name.split(".")[3] for name in stored if name.startswith("backbone.")} == {"1"}
    assert torch.equal(shares(tuned, model=AutoModel.from_pretrained(tmp_path / "tuned")), shares(tuned))


@pytest.mark.parametrize(("fields", "message"), [({"lora_rank": 0}, "no adapters"), ({}, "load it in float32")])
def test_what_cannot_be_merged_is_said(fields, message):
    config = backbone_config()
    model = small_model(**{"backbone_config": config, "finetuned_layers": 1, "lora_rank": RANK, **fields})
    with pytest.raises(ValueError, match=f"merge_adapters: .*{message}"):
        model.to(torch.bfloat16).merge_adapters()


def test_adapters_of_a_backbone_in_16_bits_are_in_float32(adapted):
    model = EmoShareModel.from_backbone_pretrained(adapted.backbone, dtype="bfloat16", lora_rank=RANK, **FIELDS)
    weights = model.state_dict()
    assert {weight.dtype for name, weight in weights.items() if is_tuned(name, model)} == {torch.float32}
    assert {weight.dtype for name, weight in weights.items() if not is_tuned(name, model)} == {torch.bfloat16}
    model(**inputs_of(adapted.extractor, CLIPS), labels=LABELS).loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if is_tuned(name, model))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_dynamic_quantisation_leaves_adapters_as_they_are(adapted):
    quantised = torch.ao.quantization.quantize_dynamic(adapted.model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(shares(adapted, model=quantised), shares(adapted), atol=2e-2, rtol=0)


def test_the_command_merges_a_model(adapted, tmp_path, capsys):
    folder, merged = tmp_path / "adapted", tmp_path / "merged"
    adapted.model.save_pretrained(folder, include_backbone=False)
    adapted.extractor.save_pretrained(folder)
    (folder / "README.md").write_text("# The card")
    assert main(["merge", "--model", str(folder), "--output_dir", str(merged)]) == 0
    assert capsys.readouterr().out == f"Model without adapters: {merged}\n"
    config = json.loads((merged / "config.json").read_text())
    assert (config["lora_rank"], config["include_backbone"]) == (0, False)
    assert (merged / "README.md").read_text() == "# The card"
    assert AutoFeatureExtractor.from_pretrained(merged).to_dict() == adapted.extractor.to_dict()
    model = AutoModel.from_pretrained(merged)
    torch.testing.assert_close(shares(adapted, model=model), shares(adapted), atol=1e-6, rtol=0)

    assert main(["merge", "--model", str(merged), "--output_dir", str(tmp_path / "again")]) == 2
    assert f"emoshare merge: error: --model: {merged} has no adapters\n" in capsys.readouterr().err
    for model, other in ((folder, merged), (folder, folder)):
        before = {path: path.read_bytes() for path in other.iterdir()}
        assert main(["merge", "--model", str(model), "--output_dir", str(other)]) == 2
        assert f"{other}: is not empty; expected a new or empty folder\n" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in other.iterdir()} == before


def test_the_command_asks_for_peft_in_a_line(adapted, wav, tmp_path, capsys, monkeypatch):
    adapted.model.save_pretrained(tmp_path)
    adapted.extractor.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["predict", str(wav), "--model", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after a progress bar
    assert line.startswith(f"emoshare predict: error: cannot load {tmp_path}: lora_rank: ")
    assert "pip install peft" in line

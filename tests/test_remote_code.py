"""A model folder as it is used without this package, with `trust_remote_code=True`."""

import ast
import json
import re
import shutil
from pathlib import Path
from sys import stdlib_module_names

import pytest
import torch
from conftest import ROOT, run_python, speech
from transformers import AutoModel, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

MODULES = sorted(path.name for path in ROOT.glob("*_emoshare.py"))
RUNTIME = "emoshare_runtime.py"

WITHOUT_THE_PACKAGE = """
import base64, importlib.util, json, sys
from pathlib import Path

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "emoshare":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
try:
    import emoshare
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")

import soundfile
from huggingface_hub import hf_hub_download
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline,
)

folder, wav, copies, output = sys.argv[1:]

def scores_of(folder):
    waveform = soundfile.read(wav, dtype="float32")[0]
    own = pipeline("emotion-share", model=folder, trust_remote_code=True)
    stock = pipeline("audio-classification", model=folder, trust_remote_code=True)
    return own, [own(wav), own([wav, waveform], batch_size=2)[1], stock(waveform, top_k=9)]

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "EmoShareModel"
assert not model.backbone.training and not any(p.requires_grad for p in model.backbone.parameters())
same = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
assert type(same).__name__ == "EmoShareModel"
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
own, scores = scores_of(folder)

# Load, save, load again, once by the parts and once by the pipeline; and the copy of a copy.
model.save_pretrained(f"{copies}/parts")
extractor.save_pretrained(f"{copies}/parts")
own.save_pretrained(f"{copies}/pipeline")
own, again = scores_of(f"{copies}/parts")
scores += again
own.save_pretrained(f"{copies}/second")
for name in ("pipeline", "second"):
    scores += scores_of(f"{copies}/{name}")[1]

# What an Inference Endpoint does with the repository, and with a copy of a copy.
content, waveform = Path(wav).read_bytes(), soundfile.read(wav, dtype="float32")[0].tolist()
for path in (folder, f"{copies}/second"):
    file = f"{path}/handler.py" if Path(path).is_dir() else hf_hub_download(path, "handler.py")
    spec = importlib.util.spec_from_file_location("handler", file)
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    answer = handler.EndpointHandler(path)
    scores.append(answer({"inputs": content}))
scores.append(answer({"inputs": base64.b64encode(content).decode(), "parameters": {"top_k": "9"}}))
scores.append(answer({"inputs": waveform, "parameters": {}}))
scores.append(answer({"inputs": {"array": waveform, "sampling_rate": 16000}}))
json.dump(scores, open(output, "w"))
"""


@pytest.mark.slow
def test_everything_loads_without_the_package_and_copies_work(model_folder, wav, tmp_path):
    script, output = tmp_path / "downstream.py", tmp_path / "scores.json"
    script.write_text(WITHOUT_THE_PACKAGE)
    run_python(script, model_folder, wav, tmp_path / "copies", output, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    expected = {
        share["label"]: share["score"] for share in pipeline("emotion-share", model=str(model_folder))(str(wav))
    }
    all_scores = json.loads(output.read_text())
    assert len(all_scores) == 17
    for shares in all_scores:
        assert {share["label"]: share["score"] for share in shares} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_copy_whose_source_is_gone_has_all_that_a_config_brings(model_folder, wav, tmp_path):
    script = tmp_path / "downstream.py"
    script.write_text(
        """
import shutil, sys
sys.modules["emoshare"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
shutil.rmtree(sys.argv[1])
model.save_pretrained(sys.argv[2])
AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
"""
    )
    source = shutil.copytree(model_folder, tmp_path / "source")
    result = run_python(script, source, tmp_path / "copy", cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert set(re.findall(r"is saved without (\S+),", result.stderr)) == {"handler.py", RUNTIME}
    assert sorted(path.name for path in (tmp_path / "copy").glob("*_emoshare.py")) == MODULES
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["custom_pipelines"]


def test_the_installed_package_needs_no_trust(model_folder):
    shares = pipeline("emotion-share", model=str(model_folder))(speech(0.5))
    assert len(shares) == 9


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("audio_emoshare.py", {"torch", "numpy", "soundfile"}),
        ("backbone_emoshare.py", {"torch", "transformers", "huggingface_hub", "safetensors"}),
        ("batched_features_emoshare.py", {"torch"}),
        ("checks_emoshare.py", {"torch"}),
        ("configuration_emoshare.py", {"transformers", "huggingface_hub"}),
        ("containers_emoshare.py", set()),
        ("finetuning_emoshare.py", {"torch"}),
        ("encoder_layers_emoshare.py", {"torch", "transformers"}),
        ("embeddings_emoshare.py", set()),
        ("feature_extraction_emoshare.py", {"torch", "transformers", "numpy", "huggingface_hub"}),
        ("filter_banks_emoshare.py", {"transformers"}),
        ("frames_emoshare.py", {"torch"}),
        ("handler.py", {"torch", "transformers", "numpy"}),
        ("head_emoshare.py", {"torch", "transformers"}),
        ("losses_emoshare.py", set()),
        ("mel_emoshare.py", {"torch"}),
        ("offload_emoshare.py", set()),
        ("modeling_emoshare.py", {"torch", "transformers"}),
        ("onnx_export_emoshare.py", {"torch"}),
        ("onnx_graph_emoshare.py", {"torch"}),
        ("onnx_layers_emoshare.py", {"torch"}),
        ("other_formats_emoshare.py", set()),
        ("outputs_emoshare.py", {"torch", "transformers"}),
        ("pipeline_emoshare.py", {"torch", "transformers", "numpy"}),
        ("repository_emoshare.py", {"transformers", "huggingface_hub"}),
        ("resampling_emoshare.py", {"torch", "numpy", "torchaudio"}),
        ("saving_emoshare.py", set()),
        ("segments_emoshare.py", {"numpy"}),
        ("stream_emoshare.py", {"numpy"}),
        ("votes_emoshare.py", {"torch", "numpy"}),
        ("wav2vec2_bert_emoshare.py", {"transformers"}),
        ("wav2vec2_emoshare.py", {"torch", "transformers"}),
        ("whisper_emoshare.py", {"torch", "transformers"}),
        ("windows_emoshare.py", {"numpy"}),
    ],
)
def test_modules_that_travel_need_no_more_than_they_may(module, allowed):
    assert set(get_imports(ROOT / module)) - set(stdlib_module_names) == allowed


def test_every_flat_module_travels(model_folder):
    # The runtime of ONNX files is no module of the repository: an export copies it.
    assert sorted(path.name for path in model_folder.glob("*.py")) == sorted([*MODULES, RUNTIME, "handler.py"])


@pytest.mark.parametrize("entry", ["configuration_emoshare.py", "feature_extraction_emoshare.py"])
def test_an_entry_module_names_all_that_it_needs(entry):
    """Otherwise a repository whose download was interrupted might never load: see `OTHER_MODULES`."""
    needed = {Path(path).name for path in get_relative_import_files(ROOT / entry)} - {entry}
    assert {f"{name}.py" for name in get_relative_imports(ROOT / entry)} == needed


def test_the_config_names_every_module():
    assert {f"{name}.py" for name in get_relative_imports(ROOT / "configuration_emoshare.py")} == {*MODULES} - {
        "configuration_emoshare.py"
    }


def test_the_model_card_names_what_they_import():
    card = (ROOT / "evaluation" / "model_card.md").read_text()
    named = re.search(r"The code of this repository imports(.*?)\.\n", card, re.DOTALL)[1]
    imported = {name for module in MODULES for name in get_imports(ROOT / module)} - set(stdlib_module_names)
    assert set(re.findall(r"`(\w+)`", named)) == imported


WATCH_THE_IMPORT = """
import importlib, sys

allowed, seen = (".py", ".pyc", ".so"), []

def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith(allowed):
        seen.append((event, arguments[0]))
    elif event.split(".")[0] in ("socket", "subprocess", "urllib", "pickle", "shutil", "tempfile", "marshal", "ctypes"):
        if event != "marshal.loads":  # of the modules' own byte code
            seen.append((event, arguments))
    elif event in ("os.system", "os.remove", "os.rename", "os.mkdir", "os.putenv"):
        seen.append((event, arguments))

# What they import may do as it likes.
for name in sys.argv[2:]:
    importlib.import_module(name)
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel, SequenceFeatureExtractor
import transformers.modeling_layers, transformers.pipelines.base, transformers.pipelines.pt_utils, urllib.request
sys.addaudithook(watch)
importlib.import_module(f"repository.{sys.argv[1]}")
assert not seen, seen
"""


@pytest.mark.slow
def test_to_import_them_touches_no_file_and_no_network(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "__init__.py").touch()
    for name in MODULES:
        shutil.copy(ROOT / name, tmp_path / "repository")
    third_party = {name for module in MODULES for name in get_imports(ROOT / module)} - set(stdlib_module_names)
    # The pipeline imports all others, or what it imports does.
    run_python("-c", WATCH_THE_IMPORT, "pipeline_emoshare", *third_party, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")


@pytest.mark.parametrize("module", [*MODULES, "handler.py"])
def test_they_run_no_code_from_data_and_unpickle_nothing(module):
    tree = ast.parse((ROOT / module).read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    forbidden = r"eval|exec|compile|__import__|importlib\.import_module|(torch|np|joblib|pickle)\.loads?"
    assert not {call for call in calls if re.fullmatch(forbidden, call)}
    assert not {"pickle", "marshal", "shelve", "dill", "subprocess", "ctypes"} & set(get_imports(ROOT / module))


def test_weights_that_would_have_to_be_unpickled_are_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "pickled")
    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(folder)

"""Importing the package: light where a command only reads its arguments, and registered where Transformers is used."""

import json

import pytest
from conftest import run_python

import emoshare
from emoshare.audio_emoshare import load_audio

HEAVY = ("accelerate", "datasets", "gradio", "matplotlib", "pandas", "pyarrow", "scipy", "torch", "transformers")
HELP = """
import contextlib, io, json, sys
from importlib import import_module

imported = {}
for module, *argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            import_module(module).main(argv)
        except SystemExit as end:
            code = end.code
    imported[" ".join([module, *argv])] = code, errors.getvalue(), sorted(set(sys.argv[2:]) & set(sys.modules))
print(json.dumps(imported))
"""
# Slow imports that do not matter here come once, before the processes that import the package start.
ORDERS = """
import os, sys
import torch._dynamo, scipy.optimize

for first in sys.argv[1:]:
    if os.fork() == 0:
        exec(first)
        from transformers import AutoConfig, AutoModel, AutoModelForAudioClassification
        from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
        from transformers.pipelines import PIPELINE_REGISTRY

        config = AutoConfig.for_model("emoshare", conv_channels=(2,), lstm_hidden_size=2)
        models = {type(auto.from_config(config)) for auto in (AutoModel, AutoModelForAudioClassification)}
        import emoshare

        assert models == {emoshare.EmoShareModel}
        assert FEATURE_EXTRACTOR_MAPPING[emoshare.EmoShareConfig] is emoshare.EmoShareFeatureExtractor
        assert PIPELINE_REGISTRY.check_task("emotion-share")[1]["impl"] is emoshare.EmotionSharePipeline
        print("registered after", first, flush=True)
        os._exit(0)
    os.wait()
"""


def test_help_and_wrong_flags_import_nothing_that_takes_long(tmp_path):
    commands = [[], ["predict"], ["evaluate"], ["ensemble"], ["train"], ["reproduce"]]
    calls = [["emoshare.cli", *command, "--help"] for command in commands]
    calls += [["emoshare.train", "--help"], ["emoshare.reproduce", "--help"]]
    calls += [["emoshare.cli", *argv] for argv in (["train", "--nonsense"], ["predict"], ["reproduce"])]
    result = run_python("-c", HELP, json.dumps(calls), *HEAVY, cwd=tmp_path)
    for call, (code, errors, heavy) in json.loads(result.stdout).items():
        assert (code, heavy) == (0 if call.endswith("--help") else 2, []), call
        assert bool(errors) == (code == 2)


@pytest.mark.slow
def test_classes_are_registered_whether_transformers_is_imported_before_the_package_or_after_it(tmp_path):
    orders = ["import emoshare", "from emoshare.backbone_emoshare import family_of"]  # the second one is in the middle
    result = run_python("-c", ORDERS, *orders, cwd=tmp_path)
    assert result.stdout.splitlines() == [f"registered after {first}" for first in orders]


def test_public_names_are_listed_and_others_refused():
    assert set(emoshare.__all__) <= set(dir(emoshare))
    assert emoshare.load_audio is load_audio
    with pytest.raises(AttributeError, match="module 'emoshare' has no attribute 'EmotionShare'"):
        _ = emoshare.EmotionShare

"""Publishing and loading through the Hub's own clients, against a Hub on loopback."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_HEAD_FLAGS, run_python, write_corpus
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, Handler, LoopbackHub, Repository
from safetensors.torch import load
from test_remote_code import WITHOUT_THE_PACKAGE
from transformers import pipeline

pytestmark = pytest.mark.slow

MODEL_ID = "org/emotion-share"
PUSH = ["--push_to_hub", "--hub_model_id", MODEL_ID, "--hub_private"]


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def train_and_push(tmp_path_factory, backbone_folder):
    """Trains on two labels and a small backbone, and publishes; gives the output folder and the finished process."""
    folder = tmp_path_factory.mktemp("pushed")
    corpus = write_corpus(folder / "corpus", {"train": 8, "devel": 6}, labels=["joy", "awe"])

    def train(hub, name, token="hf_loopback", check=True, flags=PUSH, backbone=backbone_folder, start=()):
        arguments = ["--dataset", "csv", "--data_dir", corpus, "--backbone", backbone, *SMALL_HEAD_FLAGS]
        arguments += ["--num_train_epochs", "1", "--bootstrap", "20", "--output_dir", folder / name, *flags]
        environment = hub.environment(folder / f"cache_{name}", token)
        return folder / name, run_python(*start, ROOT / "train.py", *arguments, cwd=folder, check=check, **environment)

    return train


@pytest.fixture(scope="module")
def pushed(hub, train_and_push):
    return train_and_push(hub, "output")


def test_a_run_is_published_in_one_commit(hub, pushed):
    output_dir, result = pushed
    repository = hub.repositories[MODEL_ID]
    assert repository.private
    assert len(repository.commits) == 2  # the first is the Hub's own
    sha, files = repository.commits[-1]
    assert f"/commit/{sha}" in result.stdout
    assert set(files) == {
        "README.md",
        "config.json",
        "eval_results.json",
        "model.safetensors",
        "preprocessor_config.json",
        "shares_devel.png",
        *(path.name for path in ROOT.glob("*_emoshare.py")),
        "emoshare_runtime.py",
        "handler.py",
    }
    for name, (content, _) in files.items():
        assert content == (output_dir / name).read_bytes()


def test_everything_loads_by_id_without_the_package(hub, pushed, wav, tmp_path):
    script, output = tmp_path / "downstream.py", tmp_path / "scores.json"
    script.write_text(WITHOUT_THE_PACKAGE.replace("top_k=9", "top_k=2"))
    environment = hub.environment(tmp_path / "home")
    run_python(script, MODEL_ID, wav, tmp_path / "copies", output, cwd=tmp_path, **environment)
    local = pipeline("emotion-share", model=str(pushed[0]))(str(wav))
    for shares in json.loads(output.read_text()):
        assert {share["label"]: share["score"] for share in shares} == pytest.approx(
            {share["label"]: share["score"] for share in local}, abs=1e-6
        )


def test_a_private_model_is_not_there_for_strangers(hub, pushed, tmp_path):
    script = (
        "from transformers import AutoConfig; AutoConfig.from_pretrained('org/emotion-share', trust_remote_code=True)"
    )
    environment = hub.environment(tmp_path / "home", token="hf_stranger")
    result = run_python("-c", script, cwd=tmp_path, check=False, **environment)
    assert result.returncode != 0
    assert "org/emotion-share" in result.stderr


def test_without_a_token_nothing_is_trained(hub, train_and_push):
    output_dir, result = train_and_push(hub, "refused", token=None, check=False)
    assert result.returncode != 0
    assert "401" in result.stderr
    assert "epoch 1" not in result.stdout
    assert not list(output_dir.rglob("*.arrow"))


WITH_SHORT_WAITS = """
import runpy, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the Hub's client waits for seconds before it tries again
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_upload_that_breaks_off_publishes_nothing_and_then_the_model_alone(train_and_push, tmp_path):
    with LoopbackHub() as hub:
        hub.cut_uploads = 1000
        output_dir, result = train_and_push(hub, "broken", check=False, start=("-c", WITH_SHORT_WAITS))
        assert result.returncode != 0
        assert (output_dir / "model.safetensors").exists()
        assert [list(files) for _, files in hub.repositories[MODEL_ID].commits] == [[]]
        hub.cut_uploads = 0
        expected = {path.name for path in output_dir.iterdir() if path.suffix in (".json", ".md", ".png", ".py")}
        for name in ("eval_results_devel.json", "notes.json", "speakers.png", "private.py", "model_old.safetensors"):
            (output_dir / name).write_text('{"speaker": ["Ada"]}')
        script = """
import sys
from emoshare.repository_emoshare import publish_folder
publish_folder(sys.argv[1], sys.argv[2], commit_message="EmoShare model")
"""
        run_python("-c", script, output_dir, MODEL_ID, cwd=tmp_path, **hub.environment(tmp_path / "home"))
        assert set(hub.repositories[MODEL_ID].commits[-1][1]) == {*expected, "model.safetensors"}


def test_a_pipeline_publishes_itself_and_its_card_in_one_commit(hub, model_folder, wav, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: other\n---\n\n# The card\n")
    script = """
import sys
from transformers import pipeline
pipeline("emotion-share", model=sys.argv[1], trust_remote_code=True).push_to_hub("org/pipeline", private=True)
sys.modules["emoshare"] = None  # from here on as remote code, from the Hub
loaded = pipeline("emotion-share", model="org/pipeline", trust_remote_code=True)
loaded.push_to_hub("org/copy")
"""
    run_python("-c", script, folder, cwd=tmp_path, **hub.environment(tmp_path / "home"))
    assert hub.repositories["org/pipeline"].private
    for name in ("org/pipeline", "org/copy"):
        (_, nothing), (_, files) = hub.repositories[name].commits
        assert not nothing
        assert files["README.md"][0] == (folder / "README.md").read_bytes()
        assert {path.name for path in folder.iterdir()} == set(files)
    script = """
import json, sys
sys.modules["emoshare"] = None
from transformers import pipeline
loaded = pipeline("emotion-share", model="org/copy", revision=sys.argv[2], trust_remote_code=True)
print(json.dumps(loaded(sys.argv[1])))
"""
    sha = hub.repositories["org/copy"].commits[-1][0]
    result = run_python("-c", script, wav, sha, cwd=tmp_path, **hub.environment(tmp_path / "other"))
    shares = json.loads(result.stdout.splitlines()[-1])
    expected = pipeline("emotion-share", model=str(model_folder))(str(wav))
    assert shares == [{**share, "score": pytest.approx(share["score"], abs=1e-6)} for share in expected]


class HubWithoutAdapters(LoopbackHub):
    """Closes the connection when it is asked for adapters, which Transformers does where PEFT is installed."""

    class handler(Handler):  # noqa: N801
        def do_HEAD(self):  # noqa: N802
            if self.path.endswith("/adapter_config.json"):
                self.close_connection = True
            else:
                self.handle_request()


def test_a_connection_that_breaks_off_ends_in_one_line(model_folder, tmp_path):
    script = """
from emoshare import EmoShareModel
try:
    EmoShareModel.from_pretrained("org/model")
except OSError as error:
    assert str(error).startswith("org/model: the connection to the Hub broke off ("), error
else:
    raise AssertionError
"""
    with HubWithoutAdapters() as hub:
        repository = hub.repositories["org/model"] = Repository(private=False)
        repository.commit({path.name: (path.read_bytes(), False) for path in model_folder.iterdir()})
        run_python("-c", script, cwd=tmp_path, **hub.environment(tmp_path / "home"))


# Access


PRIVATELY = """
import os, sys
from pathlib import Path
sys.modules["emoshare"] = None
from transformers import AutoConfig, AutoModel, pipeline
token, wav = sys.argv[1:]
model = AutoModel.from_pretrained("org/private", trust_remote_code=True, token=token)
model.save_pretrained("parts")
AutoConfig.from_pretrained("org/private", trust_remote_code=True, token=token).save_pretrained("config")
own = pipeline("emotion-share", model="org/private", trust_remote_code=True, token=token)
own.save_pretrained("pipeline")
own.push_to_hub("org/again", private=True, token=token)
"""


def everything_in(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_private_model_that_was_loaded_with_a_token_is_saved_whole_and_without_the_token(model_folder, wav, tmp_path):
    with LoopbackHub() as hub:
        private = hub.repositories["org/private"] = Repository(private=True)
        private.commit({path.name: (path.read_bytes(), False) for path in model_folder.iterdir()})
        environment = hub.environment(tmp_path / "home", token=None)
        run_python("-c", PRIVATELY, TOKEN, wav, cwd=tmp_path, **environment)
        expected = {path.name for path in model_folder.iterdir()}
        for name in ("parts", "pipeline"):
            assert {path.name for path in (tmp_path / name).iterdir()} >= expected - {"preprocessor_config.json"}
            assert TOKEN.encode() not in everything_in(tmp_path / name)
            assert str(tmp_path).encode() not in everything_in(tmp_path / name)
        assert {path.name for path in (tmp_path / "config").iterdir()} >= {"config.json", "pipeline_emoshare.py"}
        assert set(hub.repositories["org/again"].commits[-1][1]) == expected


FROM_A_PRIVATE_BACKBONE = """
import sys
import torch
from pathlib import Path
from emoshare import EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.repository_emoshare import create_repository, publish_folder
from transformers import pipeline
access = {"token": sys.argv[1], "cache_dir": "cache"}
model = EmoShareModel.from_backbone_pretrained(
    "org/hubert", lstm_hidden_size=4, conv_channels=(4,), ffn_sizes=(4,), dtype="bfloat16", **access
)
assert model.backbone.dtype == torch.bfloat16 and model.heads[0].dtype == torch.float32
extractor = EmoShareFeatureExtractor.for_backbone("org/hubert", model.config.backbone_config, **access)
EmotionSharePipeline(model, extractor).save_pretrained("whole")
Path("whole/README.md").write_text("# The card")
first = publish_folder("whole", create_repository("org/own", True, sys.argv[1]), "A model", sys.argv[1]).oid
Path("whole/README.md").write_text("# The card of another model")
publish_folder("whole", "org/own", "Another model", sys.argv[1])
pipeline("emotion-share", model="org/own", revision=first, token=sys.argv[1]).save_pretrained("again")
assert Path("again/README.md").read_text() == "# The card"
"""


def test_arguments_of_the_hub_are_used_for_every_load_and_never_saved(backbone_folder, tmp_path):
    with LoopbackHub() as hub:
        private = hub.repositories["org/hubert"] = Repository(private=True)
        private.commit({path.name: (path.read_bytes(), False) for path in backbone_folder.iterdir()})
        environment = hub.environment(tmp_path / "home", token=None)
        run_python("-c", FROM_A_PRIVATE_BACKBONE, TOKEN, cwd=tmp_path, **environment)
    assert list((tmp_path / "cache").glob("models--org--hubert"))
    assert not list((tmp_path / "home").rglob("models--org--hubert"))
    for name in ("whole", "again"):
        assert TOKEN.encode() not in everything_in(tmp_path / name)
    assert b"cache_dir" not in (tmp_path / "whole" / "config.json").read_bytes()


def test_nothing_meant_to_be_private_goes_into_a_repository_that_is_public(model_folder, tmp_path):
    script = """
import sys
from functools import partial
import emoshare
from transformers import pipeline
own = pipeline("emotion-share", model=sys.argv[1])
pushes = [partial(what.push_to_hub, "org/public") for what in (own, own.model, own.model.config, own.feature_extractor)]
pushes += [
    partial(what.save_pretrained, "saved", push_to_hub=True, repo_id="org/public")
    for what in (own.model, own.model.config, own.feature_extractor)
]
for push in pushes:
    try:
        push(private=True)
    except ValueError as error:
        assert "org/public: the repository exists and is public; expected a private one" in str(error), error
    else:
        raise AssertionError(push)
own.model.push_to_hub("org/public")
"""
    with LoopbackHub() as hub:
        public = hub.repositories["org/public"] = Repository(private=False)
        commits = len(public.commits)
        run_python("-c", script, model_folder, cwd=tmp_path, **hub.environment(tmp_path / "home"))
        assert len(public.commits) == commits + 1


@pytest.fixture
def public_hub():
    with LoopbackHub() as hub:
        hub.repositories[MODEL_ID] = Repository(private=False)
        yield hub


def test_a_run_that_should_be_private_is_not_trained_for_a_public_repository(public_hub, train_and_push):
    _, result = train_and_push(public_hub, "public", check=False)
    assert result.returncode != 0
    assert f"{MODEL_ID}: the repository exists and is public; expected a private one" in result.stderr
    assert "epoch 1" not in result.stdout
    assert len(public_hub.repositories[MODEL_ID].commits) == 1


def test_no_file_of_a_run_names_a_folder_of_this_machine_or_the_token(pushed, backbone_folder):
    output_dir, _ = pushed
    published = [path for path in output_dir.iterdir() if path.is_file()]
    assert len(published) > 10
    for path in published:
        content = path.read_bytes()
        for private in (TOKEN, output_dir.parent, backbone_folder):
            assert str(private).encode() not in content, path


# Heads alone


def test_heads_alone_find_their_backbone_on_the_hub(train_and_push, backbone_folder, wav, tmp_path):
    with LoopbackHub() as hub:
        backbone = hub.repositories["org/hubert"] = Repository(private=False)
        backbone.commit({path.name: (path.read_bytes(), False) for path in backbone_folder.iterdir()})
        trained_on, _ = backbone.commits[-1]
        heads_id = "org/heads"
        flags = ["--push_to_hub", "--hub_model_id", heads_id, "--push_backbone", "false"]
        output_dir, _ = train_and_push(hub, "heads", flags=flags, backbone="org/hubert")
        files = hub.repositories[heads_id].commits[-1][1]
        config = json.loads(files["config.json"][0])
        assert config["backbone_name_or_path"] == "org/hubert"
        assert config["backbone_revision"] == trained_on
        names = load(files["model.safetensors"][0])
        assert names
        assert all(name.startswith("heads.") for name in names)
        card = ModelCard.load(output_dir / "README.md")
        assert card.data.base_model == "org/hubert"
        assert "fetched when the model is loaded" in card.text

        backbone.commit({})  # what is on main by now counts for nothing
        script, output = tmp_path / "downstream.py", tmp_path / "scores.json"
        script.write_text(WITHOUT_THE_PACKAGE.replace("top_k=9", "top_k=2"))
        environment = hub.environment(tmp_path / "home")
        result = run_python(script, heads_id, wav, tmp_path / "copies", output, cwd=tmp_path, **environment)
        assert "MISSING" not in result.stderr
        shares = json.loads(output.read_text())
        asked = len(hub.requests)

    # The Hub is gone, the cache is there.
    environment["HF_HUB_OFFLINE"] = "1"
    run_python(script, heads_id, wav, tmp_path / "offline", output, cwd=tmp_path, **environment)
    assert json.loads(output.read_text()) == shares
    assert len(hub.requests) == asked
    # In this process, the same heads around the local folder: the same weights, found by another name.
    local = pipeline(
        "emotion-share", model=str(output_dir), model_kwargs={"backbone_name_or_path": str(backbone_folder)}
    )
    expected = {share["label"]: pytest.approx(share["score"], abs=1e-6) for share in local(str(wav))}
    for each in shares:
        assert {share["label"]: share["score"] for share in each} == expected


def test_heads_alone_of_a_local_backbone_are_not_published(hub, train_and_push):
    flags = [*PUSH, "--push_backbone", "false"]
    output_dir, result = train_and_push(hub, "local", check=False, flags=flags)
    assert result.returncode == 2
    assert "which nobody else could fetch" in result.stderr
    assert not output_dir.exists()


def test_a_bare_model_publishes_a_repository_that_loads(hub, model_folder, wav, tmp_path):
    script = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("org/bare")
AutoModel.from_pretrained("org/bare", trust_remote_code=True)
sys.modules["emoshare"] = None
"""
    run_python("-c", script, model_folder, cwd=tmp_path, **hub.environment(tmp_path / "home"))
    files = hub.repositories["org/bare"].commits[-1][1]
    named = json.loads(files["config.json"][0])
    modules = [*named["auto_map"].values(), named["custom_pipelines"]["emotion-share"]["impl"]]
    assert {f"{name.split('.')[0]}.py" for name in modules} <= set(files)
    script = "import sys; sys.modules['emoshare'] = None; from transformers import AutoModel; "
    script += "print(type(AutoModel.from_pretrained('org/bare', trust_remote_code=True)).__module__)"
    result = run_python("-c", script, cwd=tmp_path, **hub.environment(tmp_path / "other"))
    assert result.stdout.startswith("transformers_modules.org")


# The card


def test_the_card_says_what_the_results_are(pushed):
    output_dir, _ = pushed
    card = ModelCard.load(output_dir / "README.md")
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "audio-classification"
    shown = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert shown == pytest.approx(
        {
            "Spearman's ρ, mean": results["eval_spearman"],
            "Spearman's ρ, joy": results["eval_spearman_joy"],
            "Spearman's ρ, awe": results["eval_spearman_awe"],
        }
    )
    low, high = results["eval_spearman_joy_ci95"]
    assert f"| joy | {results['eval_spearman_joy']:.3f} | {low:.3f} to {high:.3f} |" in card.text
    assert f'model="{MODEL_ID}"' in card.text
    assert "not what a speaker feels" in card.text


def test_the_card_names_no_folder_of_whoever_trained(pushed, backbone_folder):
    output_dir, _ = pushed
    text = (output_dir / "README.md").read_text()
    assert str(Path(output_dir).parent) not in text
    assert str(backbone_folder) not in text
    assert "base_model" not in text


def test_hub_arguments_that_do_not_fit_are_refused(tmp_path):
    for flags in (["--push_to_hub"], ["--hub_model_id", "org/name"]):
        result = run_python(ROOT / "train.py", *flags, cwd=tmp_path, check=False)
        assert result.returncode == 2
        assert "--hub_model_id" in result.stderr

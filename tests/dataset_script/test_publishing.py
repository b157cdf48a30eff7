"""Publishing a corpus in a folder and on the Hub, and reading it back with the unmodified clients."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import datasets
import pytest
from conftest import SMALL_HEAD_FLAGS, full_disk, read_csv, run_python, write_corpus, write_csv
from huggingface_hub import DatasetCard, constants
from loopback_hub import LoopbackHub, Repository

from emoshare import EMOTIONS, load_audio
from emoshare.dataset_script import EmotionShare
from emoshare.dataset_script.__main__ import main
from emoshare.dataset_script.publishing import dataset_card, push_dataset, write_dataset

pytestmark = pytest.mark.slow

NAME = "org/corpus"
FILES = ["README.md", "data/devel.parquet", "data/test.parquet", "data/train.parquet"]
# Reads a dataset without emoshare and torchcodec, at once and in streaming mode. On a busy machine,
# threads that read ahead for the streaming mode can crash Python while it ends, so it ends at once.
READ = """
import hashlib, json, os, sys
sys.modules["emoshare"] = sys.modules["torchcodec"] = None
from datasets import load_dataset
rows = []
for streaming in (False, True):
    for split, clips in load_dataset(sys.argv[1], streaming=streaming).items():
        for row in clips:
            audio = [hashlib.sha256(row["audio"]["bytes"]).hexdigest(), row["audio"]["path"]]
            rows.append([streaming, split, {**row, "audio": audio}])
print(json.dumps(rows), flush=True)
os._exit(0)
"""
# Runs the command several times in one process, and says how each ended.
PUBLISH = """
import json, os, sys, warnings
from emoshare.dataset_script.__main__ import main
for arguments in json.loads(sys.argv[1]):
    if arguments[0] == "no token":
        del os.environ["HF_TOKEN"], arguments[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            main(arguments)
            error = None
        except Exception as exception:
            error = str(exception)
    print(json.dumps([error, [str(warning.message) for warning in caught]]))
"""
TRAIN = """
import json, sys
from emoshare.train import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""


LOAD = """
import json, sys
from emoshare.dataset_script import load_corpus
loaded = {name: load_corpus(name) for name in sys.argv[1:]}
columns = {name: corpus.splits["train"].column_names for name, corpus in loaded.items()}
print(json.dumps({name: [c.name, c.labels, c.facts, c.metadata, columns[name]] for name, c in loaded.items()}))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two labels, unknown in the test split; three facts, known for some clips."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(folder, {"train": 8, "devel": 6, "test": 3}, labels=["joy", "awe"])
    unknown = [[row[0], "?", ""] for row in read_csv(folder / "lab" / "test.csv")[1:]]
    write_csv(folder / "lab" / "test.csv", ["filename", "joy", "awe"], unknown)
    facts = [
        ["train_001.wav", "eve", "31", "12"],
        ["devel_000.wav", "?", "27.5", "9"],
        ["test_002.wav", "adam", "", ""],
    ]
    write_csv(folder / "lab" / "clips.csv", ["filename", "speaker", "age", "listeners"], facts)
    return folder


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def repository(hub, corpus, tmp_path_factory):
    """The corpus on the Hub, published by a command whose first try died in the middle of the upload."""
    folder = tmp_path_factory.mktemp("publisher")
    command = ["-m", "emoshare.dataset_script", "--config", "csv", "--data_dir", str(corpus), "--push_to_hub", NAME]
    environment = hub.environment(folder / "home")

    hub.cut_uploads = 1000
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env={**os.environ, **environment})
    deadline = time.monotonic() + 120
    while not [path for method, path in hub.requests if method == "PUT"]:
        assert process.poll() is None, "it ended before it uploaded anything"
        assert time.monotonic() < deadline, "nothing is uploaded"
        time.sleep(0.02)
    process.kill()
    process.wait()
    repository = hub.repositories[f"datasets/{NAME}"]
    assert [list(files) for _, files in repository.commits] == [[]]  # half of it cannot be loaded

    hub.cut_uploads = 0
    result = run_python(*command, cwd=folder, **environment)
    assert f"/commit/{repository.commits[-1][0]}" in result.stdout
    # The shards, as large as the corpus, do not stay in the cache.
    assert not [path for path in (folder / "home").rglob("publishing-*") if path.is_dir()]
    return repository


def rows_of(corpus):
    """What `READ` should print of a corpus."""
    rows = []
    facts = {row[0]: row[1:] for row in read_csv(corpus / "lab" / "clips.csv")[1:]}
    for split in ("train", "devel", "test"):
        header, *table = read_csv(corpus / "lab" / f"{split}.csv")
        for filename, *shares in table:
            audio = [hashlib.sha256((corpus / "wav" / filename).read_bytes()).hexdigest(), filename]
            known = [float(share) if share not in ("", "?") else None for share in shares]
            speaker, *numbers = (fact if fact not in ("", "?") else None for fact in facts.get(filename, [""] * 3))
            age, listeners = (number and float(number) for number in numbers)
            row = {"filename": filename, "audio": audio, **dict(zip(header[1:], known, strict=True))}
            rows.append([split, {**row, "speaker": speaker, "age": age, "listeners": listeners}])
    return [[streaming, *row] for streaming in (False, True) for row in rows]


def read(name, folder, **environment):
    return json.loads(run_python("-c", READ, name, cwd=folder, **environment).stdout)


def write(corpus, folder):
    write_dataset(EmotionShare("csv", data_dir=corpus), folder, folder.name)
    return folder


# On the Hub


def test_a_corpus_is_published_in_one_commit(repository, corpus):
    assert repository.private
    assert len(repository.commits) == 2  # the first is the Hub's own
    _, files = repository.commits[1]
    assert sorted(files) == FILES
    assert not any(str(corpus.parent).encode() in content for content, _ in files.values())


def test_it_loads_by_id_without_the_package(hub, repository, corpus, tmp_path):
    assert read(NAME, tmp_path, **hub.environment(tmp_path / "home")) == rows_of(corpus)


@pytest.fixture(scope="module")
def loaded(hub, repository, corpus, tmp_path_factory):
    """What `LOAD` prints of several datasets, online and then offline: two dicts by name."""
    folder = tmp_path_factory.mktemp("reader")
    environment = hub.environment(folder / "home")
    # Published by an earlier version, whose card does not describe the columns; and a dataset without a card.
    plain = write(write_corpus(folder / "plain", {"train": 2, "devel": 2}, labels=["joy", "awe"]), folder / "old")
    card = (plain / "README.md").read_text()
    assert card.count("\nemoshare:\n  labels:\n  - joy\n  - awe\n  facts: []\n") == 1
    (plain / "README.md").write_text(card.replace("emoshare:\n  labels:\n  - joy\n  - awe\n  facts: []\n", ""))
    data = {split: ((plain / "data" / f"{split}.parquet").read_bytes(), True) for split in ("train", "devel")}
    for name, path, files in (
        ("org/old", "data/{}.parquet", {"README.md": ((plain / "README.md").read_bytes(), False)}),
        ("org/cardless", "data/{}-00000-of-00001.parquet", {}),
    ):
        hub.blobs |= {hashlib.sha256(content).hexdigest(): content for content, _ in data.values()}
        hub.repositories[f"datasets/{name}"] = Repository(private=False)
        of_splits = {path.format(split): file for split, file in data.items()}
        hub.repositories[f"datasets/{name}"].commit(files | of_splits)

    def load(*names, **offline):
        printed = run_python("-c", LOAD, *names, cwd=folder, **{**environment, **offline}).stdout
        return json.loads(printed.splitlines()[-1])

    online = load(NAME, "org/old", "org/cardless", str(plain))
    # Another card is published, and gets into the cache, without its data.
    files = repository.commits[-1][1]
    repository.commit({**files, "README.md": (files["README.md"][0].replace(b"speaker", b"voice"), False)})
    load_card = f"from huggingface_hub import DatasetCard; print(DatasetCard.load({NAME!r}).data.emoshare)"
    assert "voice" in run_python("-c", load_card, cwd=folder, **environment).stdout
    offline = load(NAME, "org/old", "org/cardless", HF_HUB_OFFLINE="1")
    repository.commit(files)
    return online, offline


def test_labels_and_facts_are_told_apart(loaded, corpus):
    name, labels, facts, metadata, columns = loaded[0][NAME]
    assert (name, labels, facts) == ("csv", ["joy", "awe"], ["speaker", "age", "listeners"])
    assert columns == ["filename", "audio", *labels, *facts]
    for split, size in {"train": 8, "devel": 6, "test": 3}.items():
        rows = [row for streaming, part, row in rows_of(corpus) if part == split and not streaming]
        assert metadata[split] == {fact: [row[fact] for row in rows] for fact in facts}
        assert len(rows) == size
    assert set(metadata["train"]["speaker"]) == {None, "eve"}


def test_data_and_card_are_of_the_same_revision(loaded):
    online, offline = loaded
    assert offline[NAME] == online[NAME]


def test_without_a_word_on_the_columns_all_are_labels(loaded):
    online, offline = loaded
    assert len(online) == 4
    expected = ["csv", ["joy", "awe"], [], {"train": {}, "devel": {}}, ["filename", "audio", "joy", "awe"]]
    assert [value for name, value in online.items() if name != NAME] == [expected] * 3
    assert [offline["org/old"], offline["org/cardless"]] == [expected] * 2


def test_training_on_it_is_training_on_the_corpus(hub, repository, corpus, tmp_path):
    flags = ["--num_train_epochs", "1", "--bootstrap", "20", *SMALL_HEAD_FLAGS]
    sources = {"local": ["--dataset", "csv", "--data_dir", str(corpus)], "hub": ["--dataset", NAME]}
    sources["streamed"] = [*sources["hub"], "--streaming"]
    runs = [[*source, *flags, "--output_dir", str(tmp_path / name)] for name, source in sources.items()]
    result = run_python("-c", TRAIN, json.dumps(runs), cwd=tmp_path, **hub.environment(tmp_path / "home"))
    assert result.stdout.count("Clips: 8 train, 6 devel, 3 test") == 3
    for name in ("predictions_devel.csv", "predictions_test.csv", "eval_results.json"):
        assert (tmp_path / "hub" / name).read_text() == (tmp_path / "local" / name).read_text()
    assert f"datasets:\n- {NAME}\n" in (tmp_path / "hub" / "README.md").read_text()
    for name in ("predictions_devel.csv", "predictions_test.csv"):  # results name the files that they are made from
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "local" / name).read_text()


def test_what_is_not_right_is_said_and_changes_nothing(hub, repository, corpus, corpus_folder, tmp_path):
    # A shard of an earlier, larger version, and a file of somebody's own.
    _, files = repository.commits[-1]
    repository.commit({**files, "data/train-00001-of-00002.parquet": (b"", True), "notes.md": (b"", False)})
    number_of_commits = len(repository.commits)
    broken = tmp_path / "broken"
    (broken / "wav").mkdir(parents=True)
    (broken / "lab").symlink_to(corpus / "lab")
    of_corpus = ["--config", "csv", "--data_dir", str(corpus)]
    challenge = ["--config", "compare2023", "--data_dir", str(corpus_folder), "--push_to_hub"]
    runs = {
        "again": [*of_corpus, "--push_to_hub", NAME],
        "public now": [*of_corpus, "--push_to_hub", NAME, "--public"],
        "wrong name": [*of_corpus, "--push_to_hub", "a/b/c"],
        "broken": ["--config", "csv", "--data_dir", str(broken), "--push_to_hub", "org/broken"],
        "private": [*challenge, "org/private"],
        "public": [*challenge, "org/public", "--public"],
        "private now": [*challenge, "org/public"],
        "nowhere": ["--config", "csv", "--data_dir", "nowhere", "--push_to_hub", "org/nowhere", "--public"],
        "no token": ["no token", *of_corpus, "--push_to_hub", NAME],
    }
    environment = hub.environment(tmp_path / "home")
    result = run_python("-c", PUBLISH, json.dumps(list(runs.values())), cwd=tmp_path, **environment)
    ends = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    errors, warned = ({name: end[part] for name, end in zip(runs, ends, strict=True)} for part in (0, 1))

    assert {name for name, error in errors.items() if error is None} == {"again", "private", "public"}
    assert sorted(repository.commits[-1][1]) == [*FILES, "notes.md"]
    assert repository.commits[-1][1]["README.md"] == files["README.md"]
    assert len(repository.commits) == number_of_commits + 1

    assert f"{NAME}: the repository exists and is private; expected a public one" in errors["public now"]
    assert "org/public: the repository exists and is public; expected a private one" in errors["private now"]
    assert "a/b/c" in errors["wrong name"]
    assert "401" in errors["no token"]
    assert "17 problem(s)" in errors["broken"]
    assert "nowhere: no such folder" in errors["nowhere"]
    assert not {"datasets/org/broken", "datasets/org/nowhere"} & set(hub.repositories)
    assert (hub.repositories["datasets/org/private"].private, hub.repositories["datasets/org/public"].private) == (1, 0)
    assert {name for name, texts in warned.items() if "may not be redistributed" in str(texts)} == {"public"}
    left = (tmp_path / "home" / "datasets").glob("publishing-*")
    assert {path.suffix for path in left} == {".lock"}  # which the next run waits for


# In a folder


def test_a_hub_that_is_out_of_reach_is_an_oserror(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus", {"train": 2, "devel": 2}, labels=["joy", "awe"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub tries a few times
    with pytest.raises(OSError, match="org/corpus: the Hub cannot be reached"):
        push_dataset(EmotionShare("csv", data_dir=tmp_path / "corpus", cache_dir=tmp_path / "cache"), NAME)


def test_a_folder_holds_the_same_rows(corpus, tmp_path, capsys):
    main(["--config", "csv", "--data_dir", str(corpus), "--output_dir", str(tmp_path / "out" / "corpus")])
    assert str(tmp_path / "out" / "corpus") in capsys.readouterr().out
    assert os.listdir(tmp_path / "out") == ["corpus"]
    assert read(tmp_path / "out" / "corpus", tmp_path, HF_HOME=str(tmp_path / "home")) == rows_of(corpus)


def test_a_large_corpus_is_written_in_shards(corpus, tmp_path, monkeypatch):
    """The last one has a single row, which `datasets` writes differently."""
    monkeypatch.setattr("emoshare.dataset_script.emotion_share.ROWS_PER_TABLE", 7)
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "50KB")
    folder = write(corpus, tmp_path / "out")
    shards = {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "devel.parquet", "test.parquet"}
    assert set(os.listdir(folder / "data")) == shards
    rows = datasets.load_dataset(str(folder))["train"]
    expected = [row for streaming, split, row in rows_of(corpus) if split == "train" and not streaming]
    assert rows["filename"][:] == [row["filename"] for row in expected]
    for row in rows:
        assert row["audio"]["bytes"] == (corpus / "wav" / row["filename"]).read_bytes()
        assert (load_audio(row["audio"]) == load_audio(corpus / "wav" / row["filename"])).all()


def test_audio_that_is_not_whole_is_listed_and_nothing_written(corpus, tmp_path):
    spoiled = shutil.copytree(corpus, tmp_path / "corpus")
    cut_off = spoiled / "wav" / "train_003.wav"
    cut_off.write_bytes(cut_off.read_bytes()[:-1000])
    (spoiled / "wav" / "devel_000.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 problem\(s\)") as raised:
        main(["--config", "csv", "--data_dir", str(spoiled), "--output_dir", str(tmp_path / "out")])
    assert "lab/train.csv, row 5: train_003.wav: its header promises" in str(raised.value)
    assert "lab/devel.csv, row 2: devel_000.wav: " in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_breaks_off_leaves_no_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("emoshare.dataset_script.publishing.dataset_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(corpus, tmp_path / "out" / "corpus")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_an_error_and_leaves_no_folder(corpus, tmp_path):
    with pytest.raises(OSError, match=r"parquet cannot be written: .*File too large"), full_disk(10_000):
        write(corpus, tmp_path / "out" / "corpus")
    assert not list((tmp_path / "out").iterdir())
    write(corpus, tmp_path / "out" / "corpus")


def test_a_folder_with_something_in_it_is_refused(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="out: is not empty"):
        write(corpus, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


# The card


@pytest.mark.parametrize(
    ("corpus_name", "license_", "text"),
    [
        ("compare2023", "other", "**It may not be redistributed**"),
        ("synthetic", "apache-2.0", "say nothing about people"),
        ("csv", "unknown", "This is the place to say so"),
    ],
)
def test_the_card_comes_back_as_it_went(corpus_name, license_, text, tmp_path):
    features = {"filename": datasets.Value("string"), "audio": datasets.Audio(decode=False)}
    features |= dict.fromkeys(EMOTIONS, datasets.Value("float64"))
    splits = {"train": 31745, "devel": 9925}
    info = datasets.DatasetInfo(
        config_name=corpus_name,
        features=datasets.Features(features),
        splits=datasets.SplitDict({split: datasets.SplitInfo(split, 10, clips) for split, clips in splits.items()}),
    )
    card = dataset_card(info, NAME, EMOTIONS, ["speaker", "age"])
    card.save(tmp_path / "README.md")
    loaded = DatasetCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.license == license_
    assert loaded.data.size_categories == ["10K<n<100K"]
    data_files = [{"split": split, "path": f"data/{split}*.parquet"} for split in splits]
    assert loaded.data.configs == [{"config_name": corpus_name, "data_files": data_files}]
    assert loaded.data.emoshare == {"labels": list(EMOTIONS), "facts": ["speaker", "age"]}
    assert ("synthetic" in loaded.data.tags) == (corpus_name == "synthetic")
    assert text in loaded.text
    assert "| train | 31,745 |" in loaded.text
    assert "\n| `speaker`, `age` | facts about the clip; null where they are not known |\n" in loaded.text
    assert f'load_dataset("{NAME}")' in loaded.text
    assert "$" not in loaded.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "csv"], "one of the arguments --push_to_hub --output_dir is required"),
        (["--config", "csv", "--output_dir", "a", "--push_to_hub", NAME], "not allowed with"),
        (["--config", "iemocap", "--output_dir", "a"], "invalid choice: 'iemocap'"),
        (["--config", "csv", "--output_dir", "a", "--public"], "--public is for --push_to_hub"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

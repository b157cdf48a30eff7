"""The runs to kill: the product's own commands on small inputs, and everything that they leave on disk."""

import hashlib
import shutil

import yaml

from . import fixtures
from .forks import run_to_end

CLIPS_PER_SHARD = 4  # so that an extraction can be interrupted between shards

GRID = {
    "title": "A grid to kill",
    "output_dir": "unused",
    "train": {
        **fixtures.FIELDS,
        **fixtures.HEADS,
        "dataset": "csv",
        "num_train_epochs": 2,
        "checkpoint_minutes": 0,
    },
    "features": {
        "Log-mels": {"backbone": "acoustic"},
        "Random HuBERT": {"random_backbone": {"model_type": "hubert", **fixtures.BACKBONE, "num_hidden_layers": 1}},
    },
    "architectures": {"cnn_lstm": {}},
    "seeds": [0],
}


class Scenario:
    """
    A run on the inputs in `place`. It writes everything to `place / "made"`: results, the cache of Hugging Face
    libraries, and temporary files.

    Args:
        place (`Path`): folder with the corpus and the backbone.
        hub: `HubClient`, for scenarios that publish.

    Attributes:
        name: name in the table.
        processes: number of processes of a run.
        whole: the result of an undisturbed run, once there has been one.
    """

    processes = 1

    def __init__(self, place, hub=None):
        self.place = place
        self.hub = hub
        self.made = place / "made"
        self.output = self.made / "output"

    def run(self):
        """Runs in a forked process. When it is restarted, it does what a user would do."""
        raise NotImplementedError

    def prepare(self):
        """Makes the inputs; runs in a forked process."""
        fixtures.make_corpus(self.place / "corpus")
        fixtures.make_backbone(self.place / "backbone")

    def reset(self):
        """Removes everything that runs have written."""
        shutil.rmtree(self.made, ignore_errors=True)
        for name in ("output", "home", "tmp"):
            (self.made / name).mkdir(parents=True)

    def result(self):
        """
        What must equal an undisturbed run's in the end: the content of every file in the output folder, and the names
        of all other files. Files in the system's temporary folder do not count, because the system removes them.
        """
        result = {}
        for path in sorted(self.made.rglob("*")):
            name = path.relative_to(self.made).as_posix()
            if path.is_file() and not name.startswith("tmp/") and path.suffix != ".pyc":
                is_output = name.startswith("output/")
                result[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_output else "there"
        return result

    def problems_after_kill(self):
        """Problems that must never exist at any moment, as a list."""
        return []


class Extraction(Scenario):
    name = "extraction"

    def run(self):
        from emoshare.training.arguments import parse_arguments
        from emoshare.training.corpus import load_run_corpus
        from emoshare.training.features import extract_frame_features
        from emoshare.training.launch import start
        from emoshare.training.model import build_model

        arguments = parse_arguments(fixtures.training_flags(self.place, output_dir=self.output))
        accelerator = start(arguments)
        corpus = load_run_corpus(arguments.data, accelerator)
        model, feature_extractor = build_model(arguments, corpus.labels)
        for split in corpus.splits:
            extract_frame_features(
                corpus, split, model, feature_extractor, arguments.feature_cache_dir, accelerator, "float16"
            )


class Training(Scenario):
    name = "training"

    def run(self):
        from emoshare.training.checkpoints import checkpoints
        from emoshare.training.command import main

        flags = fixtures.training_flags(self.place, output_dir=self.output)
        return main([*flags, "--resume_from_checkpoint"] if checkpoints(self.output) else flags)


class TrainingWithTwoProcesses(Training):
    name = "training, two processes"
    processes = 2


class Grid(Scenario):
    name = "grid"

    def prepare(self):
        super().prepare()
        (self.place / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))

    def run(self):
        from emoshare.reproduction.command import main

        where = ["--config", self.place / "grid.yaml", "--data_dir", self.place / "corpus"]
        return main([*map(str, where), "--output_dir", str(self.output)])


class Publishing(Scenario):
    """Publishes a model, and then a corpus, on the Hub."""

    name = "publishing"

    def prepare(self):
        super().prepare()
        fixtures.make_model(self.place)

    def run(self):
        from transformers import pipeline

        from emoshare.dataset_script.__main__ import main

        pipeline("emotion-share", model=str(self.place / "model")).push_to_hub("org/model", private=True)
        return main(["--config", "csv", "--data_dir", str(self.place / "corpus"), "--push_to_hub", "org/corpus"])

    def reset(self):
        super().reset()
        self.hub.control("clear")

    def result(self):
        repositories = self.hub.control("look")["repositories"]
        return {**super().result(), **{name: commits[-1] for name, commits in repositories.items()}}

    def problems_after_kill(self):
        return half_published(self.hub, self.whole)


def half_published(hub, whole):
    """Describes all commits that are incomplete, other than the first, empty commit of a repository."""
    repositories = hub.control("look")["repositories"]
    return [
        f"{name}: a commit holds {len(files)} of {len(whole[name])} files"
        for name, commits in repositories.items()
        for files in commits
        if files and files != whole[name]
    ]


SCENARIOS = {
    "extraction": Extraction,
    "training": Training,
    "two-processes": TrainingWithTwoProcesses,
    "grid": Grid,
    "publishing": Publishing,
}


def undisturbed(scenario, log):
    """
    Runs a scenario twice without any fault.

    Returns:
        The result, and the seconds that a run takes.

    Raises:
        RuntimeError: if a run fails, or the two results differ.
    """
    results = []
    for _ in range(2):
        scenario.reset()
        run = run_to_end(scenario.run, log, scenario.processes)
        if run.code != 0:
            raise RuntimeError(f"{scenario.name}: an undisturbed run failed:\n{run.output(40)}")
        results.append(scenario.result())
        if not results[-1]:
            raise RuntimeError(f"{scenario.name}: an undisturbed run leaves nothing")
    if results[0] != results[1]:
        raise RuntimeError(f"{scenario.name}: two undisturbed runs differ: {differences(*results)}")
    scenario.whole = results[0]
    return results[0], run.seconds


def differences(expected, found):
    """Describes the differences between two results."""
    texts = [f"{name} is missing" for name in expected if name not in found]
    texts += [f"{name} should not be there" for name in found if name not in expected]
    texts += [f"{name} differs" for name in expected if name in found and expected[name] != found[name]]
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")

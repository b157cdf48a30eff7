"""The targets of fuzzing: real files, how each kind is damaged, and its documented errors."""

from collections.abc import Callable
from dataclasses import dataclass

from .fixtures import ROOT
from .mutations import cut_short, damaged_bytes, damaged_json, damaged_text
from .readers import Reader, predictions_csv, results_json

DOCUMENTED = (ValueError, OSError)  # FileNotFoundError is an OSError
# Containers in which truncation is detected: by `containers_emoshare.contents`, or because decoding fails. An MP3 needs
# a Xing header for that.
SHOW_LENGTH = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "OGG", "FLAC", "SVX")


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        name: name in the table.
        fraction: fraction of all inputs.
        seeds: intact files, as bytes.
        damage: `damage(data, rng, seeds)` returns a damaged file.
        read: method of `Reader` that reads a file as the product does.
        suffix: suffix of failing inputs that are kept.
        names: an error's message must contain one of these: the file, or the flag.
        errors: the documented errors.
    """

    name: str
    fraction: float
    seeds: list
    damage: Callable
    read: Callable
    suffix: str = ""
    names: tuple = ("",)
    errors: tuple = DOCUMENTED

    def damaged(self, rng):
        return self.damage(rng.choice(self.seeds), rng, self.seeds)


def targets(place):
    """The `Target`s, of the files that `fixtures.make_everything` has written into `place`."""
    reader = Reader(place)
    audio = {path.name: path.read_bytes() for path in sorted((place / "audio").iterdir())}
    with_length = [content for name, content in audio.items() if name.split("-")[0] in SHOW_LENGTH]
    configs = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    grids = [content for content in configs if b"random_backbone:" in content]
    runs = [content for content in configs if b"\nfeatures:" not in content]
    lab, model = place / "corpus" / "lab", place / "model"
    (store,) = (path for path in (place / "stores").iterdir() if path.is_dir())
    shard = min(store.glob("shard-*"))
    return [
        Target("audio", 0.44, list(audio.values()), damaged_bytes, reader.audio, names=("audio bytes",)),
        Target("audio, cut short", 0.1, with_length, _cut, reader.cut_audio, names=("audio bytes",)),
        Target("label CSV", 0.08, [_bytes(lab / "train.csv")], damaged_text, reader.labels, ".csv", ("lab/",)),
        Target("lab/clips.csv", 0.06, [_bytes(lab / "clips.csv")], damaged_text, reader.facts, ".csv", ("lab/",)),
        Target(
            "predictions CSV",
            0.06,
            [predictions_csv(reader.predictions)],
            damaged_text,
            reader.predicted,
            ".csv",
            ("predictions.csv",),
        ),
        Target("results", 0.02, [results_json()], damaged_json, reader.results, ".json", ("eval_results.json",)),
        Target("YAML of a run", 0.05, runs, damaged_text, reader.run_config, ".yaml", ("run.yaml", "--")),
        Target("YAML of a grid", 0.02, grids, damaged_text, reader.grid_config, ".yaml", ("grid.yaml",)),
        Target("config.json", 0.06, [_bytes(model / "config.json")], damaged_json, reader.config, ".json"),
        Target(
            "preprocessor_config.json",
            0.04,
            [_bytes(model / "preprocessor_config.json")],
            damaged_json,
            reader.preprocessor,
            ".json",
        ),
        Target("weights", 0.03, [_bytes(model / "model.safetensors")], damaged_bytes, reader.weights),
        *(
            Target(f"feature store, {kind}", 0.01, [_bytes(store / name)], damage, reader.store(name, kind == "shard"))
            for kind, name, damage in [
                ("state.json", "state.json", damaged_json),
                ("dataset_info.json", "dataset_info.json", damaged_json),
                ("shard", shard.name, cut_or_damaged),
                ("index", "windows.arrow", cut_or_damaged),
            ]
        ),
    ]


def _bytes(path):
    return path.read_bytes()


def _cut(data, rng, seeds):
    return cut_short(data, rng)


def cut_or_damaged(data, rng, seeds):
    return cut_short(data, rng) if rng.random() < 0.5 else damaged_bytes(data, rng, seeds)

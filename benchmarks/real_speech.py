"""
Prediction of shares on real speech, on Emo-DB: the recipe for small corpora against linear models on openSMILE's
ComParE_2016 functionals, and against the built-in control.

    pip install opensmile scikit-learn
    python benchmarks/real_speech.py --data_dir DIR

Each of the ten actors is the test speaker once, with the next one as devel, for all systems; the corpus's own split is
also used. Networks are trained as in `train.py`, with the flags of the current YAML file; linear models are fitted to
shares or to their ranks. Settings are chosen on devel, nothing on test. Intervals resample the actors.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
from machine import describe
from matplotlib.figure import Figure
from scipy.stats import rankdata

from emoshare import load_audio
from emoshare.dataset_script import load_corpus
from emoshare.dataset_script.folds import divide, fold_of
from emoshare.dataset_script.whole_files import whole_file
from emoshare.evaluation.controls import PENALTIES, clip_functionals
from emoshare.evaluation.figures import save_figure
from emoshare.evaluation.predictions import read_predictions
from emoshare.evaluation.ridge import ridge
from emoshare.evaluation.scores import MEAN, Scorer
from emoshare.reproduction.grid import Grid, make_random_backbones
from emoshare.reproduction.significance import mean_scores
from emoshare.training.arguments import LEAVE_ONE_OUT, arguments_of, read_yaml
from emoshare.training.launch import start
from emoshare.training.run import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECIPE = "small_corpus.yaml"
GROUP = "speaker"
SCORED = ("devel", "test")
RESAMPLES = 1000
RATE = 16000
LIBRARIES = {"opensmile": "opensmile", "sklearn": "scikit-learn"}  # names in Python and for pip
RANDOM_BACKBONE = ("synthetic_grid.yaml", "Random HuBERT, Base style")  # a grid, and its row of features
# C and epsilon of support vector regression, on standardised features.
SVR_SETTINGS = tuple(product((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.1)))


class Data:
    """
    Emo-DB and the inputs of all systems, which are computed once.

    Args:
        data_dir: the corpus's folder.
        folder: for features, runs and a backbone.

    Attributes:
        corpus: `Corpus`.
        divisions: `Corpus` by number of the fold that is test; `None` is the number of the corpus's own splits.
        speakers: (clips,) of all clips, split after split; so are `references`, (clips, labels).
    """

    def __init__(self, data_dir, folder):
        self.data_dir, self.folder = data_dir, Path(folder)
        self.corpus = load_corpus("emodb", data_dir=data_dir)
        splits = self.corpus.splits
        ends = np.cumsum([len(clips) for clips in splits.values()])
        own = {split: np.arange(end - len(splits[split]), end) for split, end in zip(splits, ends, strict=True)}
        folds = range(len(divide(self.corpus, group_by=GROUP)))
        self.divisions = {fold: fold_of(self.corpus, fold, group_by=GROUP) for fold in folds}
        self.divisions[None] = self.corpus.resplit(own)
        self.speakers = np.concatenate([facts[GROUP] for facts in self.corpus.metadata.values()])
        self.references = np.concatenate([self.corpus.shares(split) for split in splits])

    @cached_property
    def functionals(self):
        """The inputs of the built-in control: (clips, functionals)."""
        of_splits = [clip_functionals(clips) for clips in self.corpus.splits.values()]
        return np.concatenate([next(iter(of_split.values())) for of_split in of_splits])

    @cached_property
    def compare_2016(self):
        """openSMILE's functionals: (clips, 6373)."""
        import opensmile

        smile = opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
        clips = [row["audio"] for clips in self.corpus.splits.values() for row in clips]
        return np.concatenate([smile.process_signal(load_audio(clip, RATE), RATE).to_numpy() for clip in clips])

    @cached_property
    def random_hubert(self):
        """The folder of a small HuBERT with random weights."""
        grid, row = RANDOM_BACKBONE
        folder, fields = self.folder / "random_hubert", read_yaml(CONFIGS / grid)["features"][row]["random_backbone"]
        make_random_backbones(Grid("", self.folder, [], {folder: fields}))
        return str(folder)


def trained(config, data, fold, seed, **changes):
    """Predictions of a run of `train.py` with the flags of a YAML file."""
    output_dir = Path(tempfile.mkdtemp(dir=data.folder))
    flags = {
        **read_yaml(CONFIGS / config),
        **changes,
        **({} if fold is None else {"folds": LEAVE_ONE_OUT, "group_by": GROUP, "fold": fold}),
        "dataset": "emodb",
        "data_dir": str(data.data_dir),
        "output_dir": str(output_dir),
        "feature_cache_dir": str(data.folder / "features"),
        "seed": seed,
        "bootstrap": 0,
        "controls": False,
    }
    arguments = arguments_of(flags, config)
    with redirect_stdout(io.StringIO()):  # only the table goes to stdout
        train(arguments, start(arguments))
    division = data.divisions[fold]
    files = {split: (output_dir / f"predictions_{split}.csv", division.filenames(split)) for split in SCORED}
    return {split: read_predictions(*file, division.labels) for split, file in files.items()}


def on_random_hubert(data, fold, seed):
    return trained(RECIPE, data, fold, seed, backbone=data.random_hubert, acoustic_features="mel")


def linear(inputs, fit, data, fold, seed, on_ranks=False):
    """Predicts shares or ranks with a linear model on an attribute of `Data`, with the settings best on devel."""
    division = data.divisions[fold]
    train, *others = (getattr(data, inputs)[division.origins[split]] for split in ("train", *SCORED))
    targets = division.shares("train")
    if on_ranks:
        targets = rankdata(targets, axis=0) / len(targets)
    predicted = fit(train, targets, others)
    scorer = Scorer(division.shares("devel"), division.labels)
    best = np.argmax([scorer.scores(shares)[MEAN].rho for shares in predicted[0]])
    return {split: of_settings[best] for split, of_settings in zip(SCORED, predicted, strict=True)}


def support_vectors(train_inputs, targets, inputs):
    """Like `ridge`, with linear support vector regression. All settings and labels share one kernel."""
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    scaler = StandardScaler().fit(train_inputs)
    train_inputs, *inputs = map(scaler.transform, (train_inputs, *inputs))
    kernel, *kernels = (rows @ train_inputs.T for rows in (train_inputs, *inputs))
    fits = [[SVR(kernel="precomputed", C=c, epsilon=e).fit(kernel, y) for y in targets.T] for c, e in SVR_SETTINGS]
    return [np.array([np.stack([fit.predict(k) for fit in own], axis=1) for own in fits]) for k in kernels]


def mean_of_emotion(data, fold, seed):
    """Predicts the mean training shares of the clips with the same intended emotion."""
    division = data.divisions[fold]
    emotions = {split: np.array(facts["emotion"]) for split, facts in division.metadata.items()}
    shares = division.shares("train")
    means = {emotion: shares[emotions["train"] == emotion].mean(axis=0) for emotion in np.unique(emotions["train"])}
    return {split: np.array([means.get(own, shares.mean(axis=0)) for own in emotions[split]]) for split in SCORED}


@dataclass(frozen=True)
class System:
    """`predict(data, fold, seed)` returns (clips, labels) for devel and test; `has_seed`: whether the seed matters."""

    title: str
    predict: Callable
    has_seed: bool = False


CONTROL = partial(linear, "functionals", partial(ridge, penalties=PENALTIES))
SVR_ON_COMPARE = partial(linear, "compare_2016", support_vectors)
RIDGE_ON_COMPARE = partial(linear, "compare_2016", partial(ridge, penalties=PENALTIES))
SYSTEMS = {
    "recipe": System(f"`configs/{RECIPE}`", partial(trained, RECIPE), has_seed=True),
    "control": System("built-in control: ridge on clip functionals", CONTROL),
    "control_ranks": System("built-in control, on ranks", partial(CONTROL, on_ranks=True)),
    "opensmile_svr": System("openSMILE + linear SVR", SVR_ON_COMPARE),
    "opensmile_svr_ranks": System("openSMILE + linear SVR, on ranks", partial(SVR_ON_COMPARE, on_ranks=True)),
    "opensmile_ridge": System("openSMILE + ridge", RIDGE_ON_COMPARE),
    "opensmile_ridge_ranks": System("openSMILE + ridge, on ranks", partial(RIDGE_ON_COMPARE, on_ranks=True)),
    "random_hubert": System("the recipe on a small random HuBERT", on_random_hubert, has_seed=True),
    "emotion": System("the emotion that was meant is known", mean_of_emotion),
    "demo": System("`configs/demo.yaml`, 30 epochs", partial(trained, "demo.yaml", num_train_epochs=30), has_seed=True),
}


def measure(system, data, seeds):
    """The scores of a system, as in the JSON file; `of_speakers` has a mean ρ for each seed and speaker."""
    started, labels = time.perf_counter(), data.corpus.labels
    of_folds, own_splits = [], {split: [] for split in SCORED}
    for seed in seeds if system.has_seed else seeds[:1]:
        test = np.full(data.references.shape, np.nan)
        for fold, division in data.divisions.items():
            print(f"{system.title}: seed {seed}, {'own splits' if fold is None else f'fold {fold}'}", file=sys.stderr)
            shares = system.predict(data, fold, seed)
            if fold is not None:
                test[division.origins["test"]] = shares["test"]
                continue
            for split in SCORED:
                scores = Scorer(division.shares(split), labels).scores(shares[split])
                own_splits[split].append(scores[MEAN].rho)
        of_folds.append(test)
    of_folds, clips = np.array(of_folds), [data.speakers == speaker for speaker in np.unique(data.speakers)]
    of_speakers = [
        [mean_scores(run[None, own], data.references[own], labels)[MEAN].rho for own in clips] for run in of_folds
    ]
    pooled = mean_scores(of_folds, data.references, labels, data.speakers, RESAMPLES)[MEAN]
    return {
        "title": system.title,
        "mean_over_speakers": mean_with_interval(np.mean(of_speakers, axis=0)),
        "pooled": [pooled.rho, pooled.low, pooled.high],
        "of_speakers": of_speakers,
        **own_splits,
        "seconds": round(time.perf_counter() - started, 1),
    }


def mean_with_interval(of_speakers):
    """The mean of (speakers,) values, and the ends of its 95 % interval over resamples of the speakers."""
    number = len(of_speakers)
    draws = np.random.default_rng(0).integers(number, size=(RESAMPLES, number))
    return [float(of_speakers.mean()), *np.percentile(of_speakers[draws].mean(axis=1), [2.5, 97.5]).tolist()]


def print_table(results):
    print("| | mean over test speakers | the recipe minus it | all clips together | own split: devel | test |")
    print("|---|---|---|---|---|---|")
    for name, scores in results.items():
        difference = ""
        if "recipe" in results and name != "recipe":
            own, recipe = (np.mean(results[key]["of_speakers"], axis=0) for key in (name, "recipe"))
            difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(*mean_with_interval(recipe - own))
        mean, pooled = ("{:.3f} ({:.3f} to {:.3f})".format(*scores[key]) for key in ("mean_over_speakers", "pooled"))
        devel, test = (f"{np.mean(scores[split]):.3f}" for split in SCORED)
        print(f"| {scores['title']} | {mean} | {difference} | {pooled} | {devel} | {test} |")


def plot(folder, results, seeds):
    """Draws bars with intervals, and a mark for each speaker."""
    figure = Figure((7.5, 1.4 + 0.4 * len(results)), layout="constrained")
    panel = figure.subplots()
    panel.set_title("Emo-DB, each actor once the test speaker", fontsize="medium")
    for height, (name, scores) in enumerate(results.items()):
        rho, low, high = scores["mean_over_speakers"]
        panel.barh(height, rho, 0.6, color="#E69F00" if name == "recipe" else "#56B4E9")
        panel.plot([low, high], [height, height], color="black")
        of_speakers = np.mean(scores["of_speakers"], axis=0)
        panel.plot(of_speakers, np.full(len(of_speakers), height), "|", color="0.4", markersize=7)
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(results)), [scores["title"].replace("`", "") for scores in results.values()])
    panel.invert_yaxis()
    of_seeds = f"\nnetworks: mean over {len(seeds)} seeds" if len(seeds) > 1 else ""
    text = f"mean Spearman's ρ\nline: 95 % interval over speakers; marks: speakers{of_seeds}"
    panel.set_xlabel(text, fontsize="small")
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    for suffix in (".png", ".svg"):
        save_figure(figure, folder / f"real_speech{suffix}")


def parse_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, type=Path, help="folder of Emo-DB: wav/*.wav and erkennung.txt")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the networks")
    default = [name for name in SYSTEMS if name != "demo"]
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=default, help="systems to compare (default: all but demo)"
    )
    parser.add_argument("--with_demo", action="store_true", help="add configs/demo.yaml, which takes much longer")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for a JSON file and a figure")
    flags = parser.parse_args(argv)
    flags.systems = dict.fromkeys([*flags.systems, *(["demo"] if flags.with_demo else [])])
    missing = [package for module, package in LIBRARIES.items() if find_spec(module) is None]
    if missing and any(name.startswith("opensmile") for name in flags.systems):
        parser.error(f"pip install {' '.join(missing)}; or choose --systems without opensmile")
    return parser, flags


def main(argv=None):
    parser, flags = parse_flags(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            data = Data(flags.data_dir, folder)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        results = {name: measure(SYSTEMS[name], data, flags.seeds) for name in flags.systems}
    print(describe())
    print(f"{len(data.speakers)} clips of {len(np.unique(data.speakers))} speakers; seeds of networks: {flags.seeds}\n")
    print_table(results)
    if flags.output:
        flags.output.mkdir(parents=True, exist_ok=True)
        with whole_file(flags.output / "real_speech.json", encoding="utf-8") as file:
            file.write(json.dumps({"machine": describe(), "seeds": flags.seeds, "systems": results}, indent=2) + "\n")
        plot(flags.output, results, flags.seeds)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")

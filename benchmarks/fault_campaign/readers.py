"""Reads damaged files as the product does, and checks that its answers are right."""

import csv
import io
import json
import math
import shutil
from functools import cached_property

import numpy as np
import safetensors.torch
import soundfile
import torch
import torchaudio

from . import fixtures

ACCURACY = 1e-4
LARGEST_KERNEL = 1_000_000  # entries of torchaudio's resampling kernel, the reference for waveforms
SECONDS_OF_FRAMES = 0.6  # that an MP3 encoder may have added at the ends, at the lowest sampling rate
SECONDS_LOST = 0.05  # a larger loss from a truncated file must be noticed


class Reader:
    """
    Each method reads the bytes of a damaged file. It raises what the product raises, or AssertionError if the product
    gives a wrong answer.

    Args:
        place (`Path`): folder with the files of `fixtures.make_everything`.
    """

    def __init__(self, place):
        self.place = place
        self.predictions = [(f"clip_{number}.wav", number / 7, 1 - number / 7) for number in range(7)]

    @cached_property
    def scratch(self):
        """A folder of this process, with copies of all files that are read together with a damaged one."""
        folder = self.place / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "corpus").mkdir(parents=True)
        (folder / "corpus" / "wav").symlink_to(self.place / "corpus" / "wav")
        shutil.copytree(self.place / "corpus" / "lab", folder / "corpus" / "lab")
        shutil.copytree(self.place / "model", folder / "model")
        return folder

    def _damaged(self, name, content):
        """Writes the damaged file in place of the intact one."""
        path = self.scratch / name
        path.write_bytes(content)
        return path

    def audio(self, content):
        from emoshare import load_audio

        waveform = load_audio(content)
        assert waveform.ndim == 1 and waveform.dtype == np.float32 and np.isfinite(waveform).all()
        try:
            samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError, ValueError):
            return  # the product reads more than libsndfile alone
        if len(samples) == 0 or rate * 16000 / math.gcd(rate, 16000) ** 2 > LARGEST_KERNEL:
            return
        expected = torch.from_numpy(samples.mean(axis=1))
        expected = torchaudio.functional.resample(expected, rate, 16000).numpy()
        if content[:1] == b"\xff":  # MP3, whose length libsndfile only estimates
            lost = (len(expected) - len(waveform)) / 16000
            assert lost < SECONDS_OF_FRAMES, f"got {len(waveform)} samples; expected {len(expected)}"
            return
        assert len(waveform) == len(expected), f"got {len(waveform)} samples; expected {len(expected)}"
        difference = np.abs(waveform - expected).max() / max(np.abs(expected).max(), 1)
        assert difference < ACCURACY, f"the waveform differs by {difference:.2g}"

    def cut_audio(self, content):
        """A truncated file must raise an error, unless only bytes after the samples are missing."""
        from emoshare import load_audio

        waveform = load_audio(content)
        lost = fixtures.AUDIO_SECONDS - len(waveform) / 16000
        assert lost < SECONDS_LOST, f"{lost:.2f} s of {fixtures.AUDIO_SECONDS} s are missing without an error"

    def labels(self, content):
        from emoshare.dataset_script.labels import read_folder

        path = self.scratch / "corpus" / "lab" / "train.csv"
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            tables = read_folder(self.scratch / "corpus", test_is_optional=True)
        finally:
            path.write_bytes(whole)
        header, *rows = _csv_rows(content)
        table = tables.splits["train"]
        assert table.filenames == [row[header.index("filename")] for row in rows]
        for label, shares in zip(tables.labels, zip(*table.shares, strict=True), strict=True):
            assert list(shares) == [float(row[header.index(label)]) for row in rows]
            assert all(0 <= share <= 1 for share in shares)

    def facts(self, content):
        from emoshare.dataset_script.labels import read_folder

        tables = read_folder(self._damaged("corpus/lab/clips.csv", content).parent.parent, test_is_optional=True)
        header, *rows = _csv_rows(content)
        assert sorted(tables.facts) == sorted(name for name in header if name != "filename")
        known = {row[header.index("filename")]: row for row in rows}
        for table in tables.splits.values():
            for fact, values in table.facts.items():
                for filename, value in zip(table.filenames, values, strict=True):
                    text = known[filename][header.index(fact)] if filename in known else ""
                    expected = None if text in ("", "?") else text
                    assert value == expected or value == float(expected), f"{fact} of {filename}: {value!r}"

    def predicted(self, content):
        from emoshare.evaluation.predictions import read_predictions

        filenames = [filename for filename, *_ in self.predictions]
        shares = read_predictions(self._damaged("predictions.csv", content), filenames, fixtures.LABELS)
        expected = [[float(text) for text in row[1:]] for row in _csv_rows(content)[1:]]
        assert np.isfinite(shares).all() and shares.tolist() == expected

    def run_config(self, content):
        from emoshare.training.arguments import arguments_of, read_yaml

        path = self._damaged("run.yaml", content)
        arguments = arguments_of(read_yaml(path), path)
        for value in arguments.values("changes_results").values():
            assert not isinstance(value, float) or math.isfinite(value)

    def grid_config(self, content):
        from emoshare.reproduction.grid import read_grid

        assert read_grid(self._damaged("grid.yaml", content)).cells

    def results(self, content):
        from emoshare.evaluation.scores import read_scores

        scores = read_scores(self._damaged("eval_results.json", content), fixtures.LABELS)
        assert all(isinstance(number, float | int) for score in scores.values() for number in vars(score).values())

    def config(self, content):
        self._damaged("model/config.json", content)
        self._load_model((self.place / "model" / "model.safetensors").read_bytes())

    def weights(self, content):
        self._damaged("model/model.safetensors", content)
        self._load_model(content)

    def _load_model(self, weights):
        """Loads the model in the scratch folder, which must have exactly the weights of the file."""
        from emoshare import EmoShareModel

        try:
            model = EmoShareModel.from_pretrained(self.scratch / "model")
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):  # documented, as in Transformers
                raise ValueError("weights of other shapes") from error
            raise
        expected, found = safetensors.torch.load(weights), model.state_dict()
        assert expected.keys() == found.keys(), "the model has other weights than the file"
        for name, tensor in expected.items():
            same = torch.equal(tensor.float().nan_to_num(), found[name].float().nan_to_num())
            assert same, f"{name} is not what the file holds"
        samples = torch.zeros(1, 8000)
        samples[:, ::100] = 0.5
        shares = model.eval()(samples).logits
        assert shares.shape == (1, model.config.num_labels)

    def preprocessor(self, content):
        from emoshare import EmoShareFeatureExtractor

        self._damaged("model/preprocessor_config.json", content)
        extractor = EmoShareFeatureExtractor.from_pretrained(self.scratch / "model")
        waveform = np.sin(np.arange(8000) / 10).astype(np.float32)
        batch = extractor(waveform, sampling_rate=extractor.sampling_rate)
        assert np.isfinite(batch[extractor.model_input_names[0]]).all()

    @cached_property
    def extraction(self):
        """The inputs of an extraction: corpus, model, feature extractor, accelerator."""
        return fixtures.extraction_inputs(self.place)

    @cached_property
    def features(self):
        """The features of all windows of the intact store."""
        return self._extract(self.place / "stores")

    def _extract(self, folder):
        from emoshare.training.features import extract_frame_features

        corpus, model, feature_extractor, accelerator = self.extraction
        store = extract_frame_features(corpus, "train", model, feature_extractor, folder, accelerator)
        return [store[index]["frame_features"].copy() for index in range(len(store))]

    def store(self, name, holds_features=False):
        """
        Returns a function that reads the store with a damaged file of this name. The features must equal those of the
        intact store, except that flipped bits within features are not detected.
        """

        def read(content):
            expected = self.features
            shutil.rmtree(self.scratch / "stores", ignore_errors=True)
            shutil.copytree(self.place / "stores", self.scratch / "stores")
            (folder,) = (path for path in (self.scratch / "stores").iterdir() if path.is_dir())
            (folder / name).write_bytes(content)
            features = self._extract(self.scratch / "stores")
            assert len(features) == len(expected)
            for own, other in zip(features, expected, strict=True):
                assert own.shape == other.shape
                assert holds_features or np.array_equal(own, other)

        return read


def _csv_rows(content):
    """Header and rows, stripped, without empty rows."""
    rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    return [[text.strip() for text in row] for row in rows if row]


def predictions_csv(rows):
    return "\n".join(["filename,joy,awe", *(f"{name},{joy:.6g},{awe:.6g}" for name, joy, awe in rows), ""]).encode()


def results_json():
    values = {"eval_spearman": 0.25, "eval_spearman_joy": 0.5, "eval_spearman_awe": None}
    intervals = {f"{name}_ci95": [-0.125, 0.75] for name in values}
    return json.dumps({**values, **intervals}).encode()

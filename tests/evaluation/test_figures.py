import re

import numpy as np
from PIL import Image

from emoshare.evaluation.figures import plot_shares
from emoshare.evaluation.scores import MEAN, Score


def test_a_panel_for_each_label_with_its_rho(tmp_path):
    rng = np.random.default_rng(0)
    references = rng.random((10_000, 4))
    references[:, 2] = np.nan  # a label of which nothing is known
    references[:5000, 3] = np.nan
    rhos = {MEAN: 0.4, "joy": 0.5, "awe": -0.25, "envy": float("nan"), "relief": 1.0}
    scores = {label: Score(rho) for label, rho in rhos.items()}
    plot_shares(tmp_path / "shares.svg", references, rng.random((10_000, 4)), scores, "On devel")
    texts = set(re.findall("<!-- (.*?) -->", (tmp_path / "shares.svg").read_text()))
    titles = {"On devel", "joy: ρ = 0.50", "awe: ρ = -0.25", "envy: no ρ", "relief: ρ = 1.00"}
    assert titles | {"share of listeners", "predicted share"} <= texts


def test_many_clips_in_one_place_are_darker_than_few(tmp_path):
    references = np.concatenate([np.full((1000, 1), 0.25), np.full((1, 1), 0.75)])
    plot_shares(tmp_path / "shares.png", references, references, {MEAN: Score(1.0), "joy": Score(1.0)}, "On devel")
    pixels = np.asarray(Image.open(tmp_path / "shares.png").convert("RGB")).astype(int)
    colours = pixels[np.ptp(pixels, axis=-1) > 60]  # the two cells: all else is black, white or grey
    assert len(np.unique(colours, axis=0)) >= 2
    few, many = colours[colours.sum(axis=1).argmax()], colours[colours.sum(axis=1).argmin()]
    assert few.sum() - many.sum() > 150

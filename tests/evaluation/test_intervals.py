import numpy as np
from conftest import read_csv

from emoshare.evaluation.intervals import clip_intervals, write_intervals
from emoshare.evaluation.predictions import VotePredictions
from emoshare.votes_emoshare import share_intervals

PREDICTIONS = VotePredictions(np.array([[0.2, 0.7], [0.5, 0.1], [0.4, 0.9]]), np.array([[5.0, 50], [20, 2], [9, 9]]))


def test_each_clip_has_an_interval_for_its_own_listeners():
    intervals = clip_intervals(PREDICTIONS, np.array([3, 20, 3]))
    for clip, listeners in enumerate([3, 20, 3]):
        shares, concentrations = (of_clips[clip] for of_clips in PREDICTIONS)
        expected = share_intervals(shares, concentrations, listeners)
        np.testing.assert_array_equal([of_clips[clip] for of_clips in intervals], expected)


def test_intervals_are_written_with_a_row_for_each_clip_and_label(tmp_path):
    listeners = np.array([3.0, np.nan, 4.0])
    write_intervals(tmp_path / "i.csv", ["a.wav", "b.wav", "c.wav"], PREDICTIONS, listeners, ["joy", "awe"])
    header, *rows = read_csv(tmp_path / "i.csv")
    assert header == ["filename", "label", "share", "low", "high", "listeners"]
    assert [row[:2] for row in rows] == [[f"{clip}.wav", label] for clip in "abc" for label in ("joy", "awe")]
    low, high, _ = clip_intervals(PREDICTIONS, np.array([3, 20, 4]))
    numbers = np.array([row[2:] for row in rows], dtype=float)
    np.testing.assert_allclose(numbers[:, :3].T, [PREDICTIONS.shares.ravel(), low.ravel(), high.ravel()], rtol=1e-8)
    assert numbers[:, 3].tolist() == [3, 3, 20, 20, 4, 4]

"""Intervals of the predicted shares of clips, for panels as large as each clip's own."""

import csv

import numpy as np

from ..dataset_script.tables import FILENAME
from ..dataset_script.whole_files import whole_file
from ..votes_emoshare import DEFAULT_LISTENERS, LEVEL, share_intervals


def clip_intervals(predictions, listeners, level=LEVEL):
    """
    Args:
        predictions: `VotePredictions` of the clips.
        listeners: (clips,) number of listeners of each clip.
        level: as in `share_intervals`.

    Returns:
        The lower ends, the upper ends, and the nominal coverage of the intervals, each (clips, labels) float64.
    """
    low, high, stated = (np.empty(predictions.shares.shape) for _ in range(3))
    for number in np.unique(listeners):
        own = listeners == number
        shares, concentrations = predictions.shares[own], predictions.concentrations[own]
        low[own], high[own], stated[own] = share_intervals(shares, concentrations, int(number), level)
    return low, high, stated


def write_intervals(path, filenames, predictions, listeners, labels):
    """
    Writes 90 % intervals as CSV, with a row for each clip and label: the predicted share, the ends of the interval, and
    the size of the panel that the interval is for.

    Args:
        path: of the file.
        filenames: names of the clips.
        predictions: `VotePredictions` of the clips.
        listeners: (clips,) number of listeners of each clip; where it is NaN, the interval is for 20.
        labels: label names.
    """
    listeners = np.nan_to_num(listeners, nan=DEFAULT_LISTENERS)
    low, high, _ = clip_intervals(predictions, listeners)
    with whole_file(path, newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([FILENAME, "label", "share", "low", "high", "listeners"])
        for clip, filename in enumerate(filenames):
            for index, label in enumerate(labels):
                numbers = (values[clip, index] for values in (predictions.shares, low, high))
                writer.writerow([filename, label, *(f"{number:.9g}" for number in numbers), int(listeners[clip])])

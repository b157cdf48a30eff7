import math

import pytest
import torch
from conftest import small_model

from emoshare.training.selection import SMOOTHED_EPOCHS, BestEpoch, RunningAverage

NAN = math.nan


def taken(selection, scores):
    """The weights kept after these scores, and the epoch that they come from."""
    best = BestEpoch()
    for epoch, score in enumerate(scores, start=1):
        best.take(selection, epoch, score, {"weight": torch.tensor(float(epoch))})
    return best, best.weights["weight"].item()


@pytest.mark.parametrize(
    ("selection", "scores", "epoch"),
    [
        ("best_epoch", [0.1, 0.5, 0.2], 2),
        ("last_epoch", [0.1, 0.5, 0.2], 3),
        ("last_epoch", [0.1, 0.5, NAN], 3),
        # A lucky epoch among bad ones loses against one among good ones.
        ("average", [0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3], 11),
        ("average", [0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.1, 0.1], 7),
        ("average", [0.2, 0.3, NAN, 0.0], 2),
    ],
)
def test_which_epoch_is_kept(selection, scores, epoch):
    best, weights = taken(selection, scores)
    assert best.epoch == weights == epoch


def test_the_smoothed_score_is_the_mean_of_the_latest_epochs():
    best, _ = taken("average", [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert SMOOTHED_EPOCHS == 5
    assert best.score == pytest.approx(0.4)  # of the last five; the first is out of sight
    assert best.latest == [0.2, 0.3, 0.4, 0.5, 0.6]


def test_a_head_that_begins_again_has_no_scores_yet():
    best, _ = taken("average", [0.4, 0.4])
    best.restart(2)
    assert (best.restarts, best.restarted, best.latest) == (1, 2, [])


def test_without_any_rho_the_latest_weights_are_kept():
    for selection in ("best_epoch", "average"):
        best, weights = taken(selection, [NAN, NAN])
        assert (best.epoch, weights) == (0, 2)


def test_the_average_is_the_mean_of_all_steps_and_then_fades():
    model = small_model(id2label={0: "joy"})
    weight = model.heads[0].output.bias
    average, expected = RunningAverage(model, 4), []
    for step in range(7):
        weight.data.fill_(step**2)
        average.update()
        expected.append(step**2 if step == 0 else expected[-1] + (step**2 - expected[-1]) / min(step + 1, 4))
        with average.in_place():
            assert weight.item() == pytest.approx(expected[-1])
        assert weight.item() == step**2
    assert expected[3] == pytest.approx((0 + 1 + 4 + 9) / 4)


def test_the_average_comes_back():
    model = small_model(id2label={0: "joy"})
    average, other = RunningAverage(model, 4), RunningAverage(model, 4)
    for value in (1.0, 2.0):
        model.heads[0].output.bias.data.fill_(value)
        average.update()
    other.load_state_dict(average.state_dict())
    for part in (average, other):
        part.update()
    assert all(torch.equal(*pair) for pair in zip(average.averages, other.averages, strict=True))
    average.begin()
    model.heads[0].output.bias.data.fill_(5.0)
    average.update()
    with average.in_place():
        assert model.heads[0].output.bias.item() == 5.0

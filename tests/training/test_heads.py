import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_model, write_corpus

from emoshare import EmoShareFeatureExtractor
from emoshare.dataset_script import load_emotion_share
from emoshare.training.arguments import RunArguments
from emoshare.training.features import extract_frame_features
from emoshare.training.heads import Progress, mean_rho, train_heads

LABELS = {0: "joy", 1: "awe"}


def progress(separate_heads=True, patience=2):
    model = small_model(id2label=LABELS, separate_heads=separate_heads)
    run = RunArguments(early_stopping_patience=patience)
    return model, Progress(model, run)


def mark(model, value):
    """Makes the weights of an epoch recognisable."""
    for head in model.heads:
        head.output.bias.data.fill_(value)


def test_each_emotion_keeps_the_weights_of_its_own_best_epoch():
    model, state = progress()
    for epoch, rhos in enumerate([[0.1, 0.5], [0.4, 0.3], [0.2, 0.4]], start=1):
        mark(model, epoch)
        state.update(np.array(rhos))
    assert [best.epoch for best in state.best] == [2, 1]
    assert [best.score for best in state.best] == [0.4, 0.5]
    state.restore_best()
    assert [head.output.bias.item() for head in model.heads] == [2, 1]


def test_a_shared_trunk_keeps_the_epoch_of_the_best_mean():
    model, state = progress(separate_heads=False)
    for epoch, rhos in enumerate([[0.1, 0.5], [0.4, 0.3], [0.2, 0.4]], start=1):
        mark(model, epoch)
        state.update(np.array(rhos))
    assert state.best[0].epoch == 2
    assert state.best[0].score == pytest.approx(0.35)


def test_training_is_over_when_every_emotion_has_waited_long_enough():
    _, state = progress(patience=2)
    over = []
    for rhos in ([0.1, 0.1], [0.2, 0.0], [0.1, 0.3], [0.0, 0.2], [0.0, 0.1]):
        state.update(np.array(rhos))
        over.append(state.is_over)
    assert over == [False, False, False, False, True]


def test_an_emotion_without_rho_keeps_its_latest_weights_and_holds_nobody_up():
    model, state = progress(patience=2)
    for epoch, rho in enumerate([0.2, 0.1, 0.1], start=1):
        mark(model, epoch)
        state.update(np.array([np.nan, rho]))
    assert state.is_over
    state.restore_best()
    assert [best.epoch for best in state.best] == [0, 1]
    assert [head.output.bias.item() for head in model.heads] == [3, 1]


def test_the_mean_is_over_the_emotions_with_a_rho():
    assert mean_rho(np.array([0.2, np.nan, 0.4])) == pytest.approx(0.3)
    assert np.isnan(mean_rho(np.array([np.nan])))


def test_the_state_comes_back():
    model, state = progress()
    mark(model, 7.0)
    state.update(np.array([0.3, 0.1]))
    mark(model, 0.0)
    other_model, other = progress()
    other.load_state_dict(state.state_dict())
    assert other.epochs_done == 1
    other.restore_best()
    assert other_model.heads[0].output.bias.item() == 7.0


def test_snapshots_are_not_touched_by_further_training():
    model, state = progress()
    mark(model, 1.0)
    state.update(np.array([0.5, 0.5]))
    with torch.no_grad():
        model.heads[0].output.bias.add_(1)
    assert state.best[0].weights["output.bias"].item() == 1.0


def test_trained_heads_end_with_their_best_weights_and_stop_early(tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"train": 4, "devel": 2}, labels=["joy", "awe"])
    splits = load_emotion_share("csv", data_dir=folder, cache_dir=tmp_path / "cache")
    model = small_model(id2label=LABELS)
    accelerator = Accelerator(cpu=True)
    extractor = EmoShareFeatureExtractor("mel")
    stores = {
        split: extract_frame_features(clips, split, model, extractor, tmp_path / "store", accelerator)
        for split, clips in splits.items()
    }
    seen = []

    def score(shares):
        assert shares.shape == (2, 2)
        seen.append([head.output.bias.item() for head in model.heads])
        return np.array([[0.9, 0.1], [0.8, 0.5], [0.7, 0.2], [0.6, 0.1], [0.5, 0.9]][len(seen) - 1])

    run = RunArguments(
        output_dir=str(tmp_path / "output"),
        num_train_epochs=5,
        early_stopping_patience=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
    )
    state = train_heads(model, stores["train"], stores["devel"], score, run, accelerator, {})
    assert len(seen) == 4  # awe was best in epoch 2 and has waited for two
    assert len({bias for bias, _ in seen}) == 4  # every epoch trained
    assert [best.epoch for best in state.best] == [1, 2]
    assert [head.output.bias.item() for head in model.heads] == [seen[0][0], seen[1][1]]

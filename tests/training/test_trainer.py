import copy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import full_disk, needs_bfloat16, run_command, small_model, torch_threads, write_corpus

from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.predictions import predict
from emoshare.training import steps as steps_of_training
from emoshare.training import trainer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.features import extract_frame_features
from emoshare.training.label_weights import smoothed_weights
from emoshare.training.trainer import HeadTrainer, Progress, mean_rho, predict_after_shuffling

LABELS = {0: "joy", 1: "awe"}
ALIVE = np.array([False, False])


def progress(separate_heads=True, patience=2):
    model = small_model(id2label=LABELS, separate_heads=separate_heads)
    run = RunArguments(early_stopping_patience=patience)
    return model, Progress(model, run)


def update(state, rhos, is_dead):
    """Takes an epoch, whose losses are 0.1 for the first head that trains, 0.2 for the second."""
    state.update([0.1 * (1 + number) for number in range(len(state.training))], rhos, is_dead)


def mark(model, value):
    """Marks the weights of an epoch, to recognise them."""
    for head in model.heads:
        head.output.bias.data.fill_(value)


def test_each_emotion_keeps_the_weights_of_its_own_best_epoch():
    model, state = progress()
    for epoch, rhos in enumerate([[0.1, 0.5], [0.4, 0.3], [0.2, 0.4]], start=1):
        mark(model, epoch)
        update(state, np.array(rhos), ALIVE)
    assert [head.best.epoch for head in state.heads] == [2, 1]
    assert [head.best.score for head in state.heads] == [0.4, 0.5]
    state.restore_best()
    assert [head.output.bias.item() for head in model.heads] == [2, 1]


def test_a_shared_trunk_keeps_the_epoch_of_the_best_mean():
    model, state = progress(separate_heads=False)
    for epoch, rhos in enumerate([[0.1, 0.5], [0.4, 0.3], [0.2, 0.4]], start=1):
        mark(model, epoch)
        update(state, np.array(rhos), ALIVE)
    assert state.heads[0].best.epoch == 2
    assert state.heads[0].best.score == pytest.approx(0.35)
    assert state.history[2:4] == [(2, 0, 0.1, 0.4), (2, 1, 0.1, 0.3)]


def test_each_emotion_stops_when_it_has_waited_long_enough():
    _, state = progress(patience=2)
    training = []
    for rhos in ([0.1, 0.1], [0.2, 0.0], [0.1, 0.3], [0.0, 0.2], [0.9, 0.1]):
        trained = [head.labels[0] for head in state.training]
        update(state, np.array(rhos)[trained], ALIVE[trained])
        training.append([head.labels[0] for head in state.training])
    assert training == [[0, 1], [0, 1], [0, 1], [1], []]
    assert [(epoch, label) for epoch, label, _, _ in state.history] == [
        (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (5, 1)
    ]  # fmt: skip


def test_an_emotion_without_rho_keeps_its_latest_weights_and_holds_nobody_up():
    model, state = progress(patience=2)
    for epoch, rho in enumerate([0.2, 0.1], start=1):
        mark(model, epoch)
        update(state, np.array([np.nan, rho]), ALIVE)
    assert [head.labels for head in state.training] == [[1]]
    state.restore_best()
    assert [head.best.epoch for head in state.heads] == [0, 1]
    assert [head.output.bias.item() for head in model.heads] == [2, 1]


def test_the_mean_is_over_the_emotions_with_a_rho():
    assert mean_rho(np.array([0.2, np.nan, 0.4])) == pytest.approx(0.3)
    assert np.isnan(mean_rho(np.array([np.nan])))


def test_the_state_comes_back():
    model, state = progress()
    mark(model, 7.0)
    update(state, np.array([0.3, 0.1]), np.array([False, True]))
    mark(model, 0.0)
    other_model, other = progress()
    other.load_state_dict(state.state_dict())
    assert (other.epochs_done, other.dead) == (1, [1])
    assert other.history == [(1, 0, 0.1, 0.3), (1, 1, 0.2, 0.1)]
    other.restore_best()
    assert other_model.heads[0].output.bias.item() == 7.0


def test_snapshots_are_not_touched_by_further_training():
    model, state = progress()
    mark(model, 1.0)
    update(state, np.array([0.5, 0.5]), ALIVE)
    with torch.no_grad():
        model.heads[0].output.bias.add_(1)
    assert state.heads[0].best.weights["heads.0.output.bias"].item() == 1.0


def test_a_dead_head_has_no_best_epoch_until_it_lives():
    model, state = progress()
    for epoch, (rhos, is_dead) in enumerate(
        [([0.0, 0.3], [True, False]), ([-0.1, 0.0], [False, True]), ([0.0, 0.2], [True, False])], start=1
    ):
        mark(model, epoch)
        update(state, np.array(rhos), np.array(is_dead))
        assert state.dead == np.flatnonzero(is_dead).tolist()
    assert [head.best.epoch for head in state.heads] == [2, 1]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Log-mels of a few clips with two labels."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", {"train": 4, "devel": 3}, labels=["joy", "awe"])
    corpus = load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")
    model, extractor = small_model(id2label=LABELS), EmoShareFeatureExtractor("mel")
    return {
        split: extract_frame_features(corpus, split, model, extractor, folder / "store", Accelerator(cpu=True))
        for split in corpus.splits
    }


def train(model, stores, score, output_dir, **fields):
    fields = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, **fields}
    run = RunArguments(output_dir=str(output_dir), **fields)
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    return HeadTrainer(model, stores, score, arguments, Accelerator(cpu=True)).fit()


def test_trained_heads_end_with_their_best_weights_and_stop_early(stores, tmp_path):
    model = small_model(id2label=LABELS)
    seen, asked = [], []

    def score(shares, labels):
        assert shares.shape == (3, len(labels))
        seen.append([head.output.bias.item() for head in model.heads])
        asked.append(labels)
        return np.array([[0.9, 0.1], [0.8, 0.5], [0.7, 0.2], [0.6, 0.1], [0.5, 0.9]][len(seen) - 1])[labels]

    state = train(model, stores, score, tmp_path, num_train_epochs=5, early_stopping_patience=2)
    assert len(seen) == 4  # awe was best in epoch 2 and has waited for two
    assert asked == [[0, 1], [0, 1], [0, 1], [1]]  # joy was best in epoch 1: from epoch 4 on it costs nothing
    assert len({bias for _, bias in seen}) == 4  # every epoch trained
    assert seen[2][0] == seen[3][0]
    assert [head.best.epoch for head in state.heads] == [1, 2]
    assert [head.output.bias.item() for head in model.heads] == [seen[0][0], seen[1][1]]


def dying_model():
    """The last ReLU of joy's head is closed for every clip."""
    torch.manual_seed(5)
    model = small_model(id2label=LABELS, normalization="sequence", max_frames=200, output_activation="relu")
    torch.nn.init.constant_(model.heads[0].output.bias, -10.0)
    torch.nn.init.constant_(model.heads[1].output.bias, 3.0)  # far from closing
    return model


def spread(shares, labels):
    return np.ptp(shares, axis=0)


def test_a_dead_head_is_named_and_left_alone_unless_it_may_restart(stores, tmp_path, capsys):
    model = dying_model()
    before = {name: tensor.clone() for name, tensor in model.heads[0].state_dict().items()}
    state = train(model, stores, spread, tmp_path, num_train_epochs=2)
    assert capsys.readouterr().out.count("joy dead") == 2
    assert state.heads[0].best.epoch == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.heads[0].state_dict().items())


@pytest.mark.parametrize(("is_dead", "rho"), [(False, np.nan), (True, 0.0)])
def test_a_head_that_is_done_without_a_score_counts_with_its_latest(is_dead, rho, stores, tmp_path, monkeypatch):
    """As in the report at the end of the run."""
    model = dying_model() if is_dead else small_model(id2label=LABELS)
    printed, logged = [], []
    monkeypatch.setattr(Accelerator, "print", lambda self, text: printed.append(text))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    rising = RisingScore()

    def score(shares, labels):
        return np.array([rho, rising(shares, [1])[0]])[labels]

    state = train(model, stores, score, tmp_path, num_train_epochs=3, early_stopping_patience=2)
    assert [head.best.epoch for head in state.heads] == [0, 3]
    assert f"(joy {rho:.2f} done, awe 0.30)" in printed[-1]
    assert logged[-1]["devel_spearman_joy"] == pytest.approx(rho, nan_ok=True)
    assert logged[-1]["devel_spearman"] == pytest.approx(0.15 if is_dead else 0.3)


def test_a_dead_head_restarts_by_itself(stores, tmp_path, capsys):
    left_alone, restarted = dying_model(), dying_model()
    train(left_alone, stores, spread, tmp_path / "a", num_train_epochs=6, early_stopping_patience=2)
    capsys.readouterr()
    state = train(
        restarted, stores, spread, tmp_path / "b", num_train_epochs=6, restart_dead_heads=5, early_stopping_patience=2
    )
    printed = capsys.readouterr().out
    assert (
        "joy is dead: its head gives the same share for every devel clip; re-initialised with seed 1 (1 of 5)"
        in printed
    )
    assert "awe is dead" not in printed
    assert state.heads[0].best.restarts >= 1
    assert state.heads[0].best.epoch > 1  # alive
    # The other head is what it would have been.
    for name, tensor in left_alone.heads[1].state_dict().items():
        assert torch.equal(tensor, restarted.heads[1].state_dict()[name])


@pytest.mark.parametrize(("head_seeds", "expected"), [([30, 40], [31, 32]), (None, [8, 9])])
def test_a_head_restarts_no_more_often_than_allowed_and_from_its_own_seed(
    head_seeds, expected, stores, tmp_path, monkeypatch
):
    seeds = []
    monkeypatch.setattr(EmoShareModel, "initialize_head", lambda model, *head: seeds.append(head))  # stays dead
    fields = {"num_train_epochs": 5, "restart_dead_heads": 2, "head_seeds": head_seeds, "seed": 7}
    state = train(dying_model(), stores, spread, tmp_path, **fields)
    assert seeds == [(0, seed) for seed in expected]
    assert state.heads[0].best.restarts == 2


def test_a_restart_is_not_lost_on_resuming(stores, tmp_path):
    arguments = {"restart_dead_heads": 5, "early_stopping_patience": 9}
    whole, parts = dying_model(), dying_model()
    train(whole, stores, spread, tmp_path / "whole", num_train_epochs=4, **arguments)
    train(parts, stores, spread, tmp_path / "parts", num_train_epochs=1, **arguments)  # joy is dead at this moment
    resumed = dying_model()
    state = train(
        resumed, stores, spread, tmp_path / "parts", num_train_epochs=4, resume_from_checkpoint="last", **arguments
    )
    assert state.heads[0].best.restarts >= 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


# Each of the flags that are off by default.
REGULARISED = {
    "weight_decay": 0.1,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.4,
    "max_grad_norm": 0.01,
    "mixup": 0.4,
    "time_mask": 0.3,
    "feature_mask": 0.3,
    "time_stretch": 0.1,
    "listener_dropout": 0.5,
    "selection": "average",
}


@pytest.fixture(scope="module")
def votes(stores):
    """The stores, each clip of which was heard by 9 listeners."""
    found = {split: copy.copy(store) for split, store in stores.items()}
    for store in found.values():
        store.listeners = np.full(len(store.shares), 9, dtype=np.float32)
    return found


def trained_weights(stores, output_dir, dropout=0.0, score=spread, **fields):
    torch.manual_seed(5)
    model = small_model(id2label=LABELS, dropout=dropout)
    state = train(model, stores, score, output_dir, **{"num_train_epochs": 2, **fields})
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), state


def test_every_flag_of_regularisation_does_something(votes, tmp_path):
    batch = {"per_device_train_batch_size": 4}  # of more than one clip
    plain, _ = trained_weights(votes, tmp_path, **batch)
    for flags in [{"dropout": 0.3}, *({name: value} for name, value in REGULARISED.items())]:
        assert not torch.equal(plain, trained_weights(votes, tmp_path, **batch, **flags)[0]), flags


@pytest.mark.parametrize("separate_heads", [True, False])
def test_a_regularised_run_that_was_killed_ends_as_if_it_had_not_been(separate_heads, votes, tmp_path):
    def run(folder, killed_after=99, **fields):
        torch.manual_seed(5)
        model = small_model(id2label=LABELS, dropout=0.3, separate_heads=separate_heads)
        scored = []

        def score(shares, labels):
            scored.append(labels)
            if len(scored) > killed_after:
                raise KeyboardInterrupt
            return spread(shares, labels)

        fields = {**REGULARISED, "num_train_epochs": 5, "checkpoint_minutes": 0, **fields}
        fields["per_device_train_batch_size"] = 4  # of more than one clip, which are mixed
        state = train(model, votes, score, tmp_path / folder, **fields)
        return model.state_dict(), [(head.best.epoch, head.best.latest) for head in state.heads], state.history

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", killed_after=2)
    parts = run("parts", resume_from_checkpoint="last")
    assert whole[1:] == parts[1:]
    assert all(torch.equal(tensor, parts[0][name]) for name, tensor in whole[0].items())


def test_devel_is_scored_with_the_averages_which_are_kept(stores, tmp_path):
    seen = []

    def score(shares, labels):
        seen.append((shares.copy(), model.heads[0].output.bias.item()))
        return spread(shares, labels)

    torch.manual_seed(5)
    model = small_model(id2label=LABELS)
    state = train(model, stores, score, tmp_path, num_train_epochs=3, selection="average")
    assert [head.best.epoch for head in state.heads] == state.selected
    assert model.heads[0].output.bias.item() == seen[state.selected[0] - 1][1]
    latest, _ = trained_weights(stores, tmp_path, num_train_epochs=3, selection="last_epoch")
    kept = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert not torch.equal(latest, kept)
    torch.testing.assert_close(latest, kept, atol=0.05, rtol=0)


def test_the_last_epoch_is_kept_whatever_devel_says(stores, tmp_path):
    def falling(shares, labels):
        scored.append(labels)
        return np.full(len(labels), 1.0 / len(scored))

    scored = []
    fields = {"num_train_epochs": 4, "early_stopping_patience": 1, "score": falling}
    kept, state = trained_weights(stores, tmp_path, selection="last_epoch", **fields)
    assert state.selected == [4, 4]
    scored.clear()
    # Plain training, in which every epoch is better than the one before, keeps the last one too.
    assert torch.equal(kept, trained_weights(stores, tmp_path, num_train_epochs=4, score=RisingScore())[0])


class RisingScore:
    calls = 0

    def __call__(self, shares, labels):
        self.calls += 1
        return np.full(len(labels), self.calls / 10)


def test_a_head_that_restarts_has_an_average_and_a_schedule_of_its_own(stores, tmp_path):
    def run(folder, killed_after=99, **fields):
        model, scored = dying_model(), []

        def score(shares, labels):
            scored.append(labels)
            if len(scored) > killed_after:
                raise KeyboardInterrupt
            return spread(shares, labels)

        fields |= {"restart_dead_heads": 5, "early_stopping_patience": 9, "num_train_epochs": 6}
        fields |= {"selection": "average", "lr_scheduler": "cosine", "checkpoint_minutes": 0}
        return model, train(model, stores, score, tmp_path / folder, **fields)

    model, state = run("whole")
    restarted, other = state.heads
    assert 0 < restarted.best.restarted < 5
    steps_per_epoch = other.average.steps // 6
    assert restarted.average.steps == (6 - restarted.best.restarted) * steps_per_epoch
    assert restarted.optimizer.schedule.last_epoch == restarted.average.steps
    assert restarted.optimizer.adam.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)

    with pytest.raises(KeyboardInterrupt):
        run("parts", killed_after=5)  # when the head is alive
    resumed, _ = run("parts", resume_from_checkpoint="last")
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_heads_do_not_drop_out_alike(stores):
    model = small_model(id2label=LABELS, dropout=0.5).train()
    model.heads[1].load_state_dict(model.heads[0].state_dict())
    loader = FeatureLoader(stores["train"], model.config, 4, Accelerator(cpu=True))
    batch = next(iter(loader))
    batch["frame_features"] = batch["frame_features"].float()
    batch["labels"][:, 1] = batch["labels"][:, 0]
    heads = steps_of_training.heads_in_training(model, 0.1)
    losses = [head.compute_gradients(batch, (0, 0, 0, 0)) for head in heads]
    assert losses[0] != losses[1]
    assert losses[0] == heads[0].compute_gradients(batch, (0, 0, 0, 0))
    assert losses[0] != heads[0].compute_gradients(batch, (0, 0, 0, 1))


def test_a_run_with_a_schedule_does_not_resume_with_other_epochs(stores, tmp_path):
    """Its first epochs would have had other learning rates."""
    trained_weights(stores, tmp_path, num_train_epochs=1, lr_scheduler="cosine")
    with pytest.raises(ValueError, match="num_train_epochs: 1 then, 2 now"):
        trained_weights(stores, tmp_path, lr_scheduler="cosine", resume_from_checkpoint="last")


def test_a_run_does_not_resume_what_another_version_trained(stores, tmp_path, monkeypatch):
    trained_weights(stores, tmp_path, num_train_epochs=1)
    then = trainer.TRAINING_VERSION
    monkeypatch.setattr(trainer, "TRAINING_VERSION", then + 1)
    for name in ("last", str(tmp_path / "checkpoint-epoch-1")):
        with pytest.raises(ValueError, match=f"training_version: {then} then, {then + 1} now"):
            trained_weights(stores, tmp_path, resume_from_checkpoint=name)


def test_what_is_left_of_an_older_checkpoint_does_not_stay(stores, tmp_path):
    train(dying_model(), stores, spread, tmp_path, num_train_epochs=2)
    older = tmp_path / "checkpoint-epoch-1"
    older.mkdir()
    (older / "files.json").touch()  # the run was killed while it removed it
    train(dying_model(), stores, spread, tmp_path, num_train_epochs=2, resume_from_checkpoint="last")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-epoch-2"]


def damage(checkpoint, how):
    state = checkpoint / "custom_checkpoint_0.pkl"
    if how == "truncated":
        state.write_bytes(state.read_bytes()[:-100])
    elif how == "one bit":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    else:
        (checkpoint / "run.json").write_text("")


def test_what_a_kill_left_of_a_checkpoint_is_left_out(stores, tmp_path, capsys):
    """Whichever of its files were removed first: the run resumes from the one before it."""
    train(small_model(id2label=LABELS), stores, spread, tmp_path, num_train_epochs=1)
    first, second = (tmp_path / f"checkpoint-epoch-{epoch}" for epoch in (1, 2))
    for removed in (["run.json"], ["files.json"], ["run.json", "files.json", "custom_checkpoint_0.pkl"]):
        shutil.copytree(first, second)
        for name in removed:
            (second / name).unlink()
        capsys.readouterr()
        train(small_model(id2label=LABELS), stores, spread, tmp_path, num_train_epochs=1, resume_from_checkpoint="last")
        printed = capsys.readouterr().out
        assert f"{second} is damaged (it has no {removed[0]}); it is left out" in printed
        assert f"Resuming after epoch 1, from {first}" in printed
        assert not second.exists()


@pytest.mark.parametrize("how", ["truncated", "one bit", "settings"])
def test_a_damaged_checkpoint_is_left_out(how, stores, tmp_path, capsys):
    """The run resumes from the one before it, or begins again, and ends as if nothing had happened."""
    torch.manual_seed(5)
    start = small_model(id2label=LABELS).state_dict()

    def run(folder, **fields):
        model = small_model(id2label=LABELS)
        model.load_state_dict(start)
        train(model, stores, spread, tmp_path / folder, **fields)
        return model.state_dict()

    whole = run("whole", num_train_epochs=3)
    run("parts", num_train_epochs=1)
    first, second = (tmp_path / "parts" / f"checkpoint-epoch-{epoch}" for epoch in (1, 2))
    shutil.copytree(first, tmp_path / "first")
    run("parts", num_train_epochs=2, resume_from_checkpoint="last")
    shutil.copytree(tmp_path / "first", first)
    damage(second, how)
    with pytest.raises(ValueError, match="checkpoint-epoch-2 is damaged: "):
        run("parts", num_train_epochs=3, resume_from_checkpoint=str(second))
    capsys.readouterr()
    shutil.copytree(tmp_path / "parts", tmp_path / "both")
    damage(tmp_path / "both" / first.name, how)
    for folder, damaged, message in [("parts", 1, "Resuming after epoch 1, from"), ("both", 2, "the run begins again")]:
        found = run(folder, num_train_epochs=3, resume_from_checkpoint="last")
        printed = capsys.readouterr().out
        assert printed.count("is damaged (") == damaged
        assert message in printed
        assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


def test_a_full_disk_leaves_the_last_checkpoint(stores, tmp_path, monkeypatch):
    train(small_model(id2label=LABELS), stores, spread, tmp_path, num_train_epochs=1)
    (checkpoint,) = tmp_path.glob("checkpoint-epoch-*")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    sizes = [0, 100, max(map(len, before.values())) - 1]
    save, fields = trainer.save_checkpoint, {"num_train_epochs": 2, "resume_from_checkpoint": "last"}

    def save_on_a_full_disk(*arguments):
        with full_disk(sizes.pop()):
            save(*arguments)

    monkeypatch.setattr(trainer, "save_checkpoint", save_on_a_full_disk)
    message = r"checkpoint-epoch-2 cannot be written: .*\. The last checkpoint is kept"
    while sizes:
        with pytest.raises(OSError, match=message):
            train(small_model(id2label=LABELS), stores, spread, tmp_path, **fields)
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    monkeypatch.undo()
    assert train(small_model(id2label=LABELS), stores, spread, tmp_path, **fields).epochs_done == 2


@needs_bfloat16
def test_a_live_head_is_not_taken_for_dead_in_bfloat16(stores, tmp_path, capsys):
    """Clips of an untrained head differ by less than bfloat16 can tell apart: predictions are in float32."""
    model = small_model(id2label=LABELS, architecture="cnn_lstm", normalization="none")
    with torch.no_grad():
        for head in model.heads:
            head.output.weight.mul_(1e-2)
    fields = {"mixed_precision": "bf16", "restart_dead_heads": 3, "num_train_epochs": 1}
    train(model, stores, spread, tmp_path, **fields)
    printed = capsys.readouterr().out
    assert "in bfloat16" in printed
    assert "dead" not in printed


@needs_bfloat16
def test_weights_stay_in_float32_and_bfloat16_trains_like_it(stores, tmp_path):
    shares = {}
    for precision in ("no", "bf16"):
        torch.manual_seed(1)
        model = small_model(id2label=LABELS)
        train(model, stores, spread, tmp_path / precision, mixed_precision=precision, num_train_epochs=3)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        loader = FeatureLoader(stores["devel"], model.config, 2, Accelerator(cpu=True))
        shares[precision] = predict(model, loader, Accelerator(cpu=True))
    np.testing.assert_allclose(shares["bf16"], shares["no"], atol=5e-3)
    assert not np.array_equal(shares["bf16"], shares["no"])


def test_checkpoints_are_written_no_more_often_than_asked_for(stores, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *arguments: epochs.append(arguments[2].epochs_done))
    for minutes in (60, 0):
        fields = {"num_train_epochs": 3, "checkpoint_minutes": minutes}
        train(small_model(id2label=LABELS), stores, spread, tmp_path, **fields)
    assert epochs == [3, 1, 2, 3]


def test_the_number_of_threads_changes_nothing(stores, tmp_path):
    weights = {}
    for threads in (1, 2, 3):
        torch.manual_seed(1)
        model = small_model(id2label={index: str(index) for index in range(2)}, dropout=0.2)
        with torch_threads(threads):
            state = train(model, stores, spread, tmp_path / str(threads), num_train_epochs=3)
        weights[threads] = (model.state_dict(), state.history)
    for threads in (2, 3):
        assert weights[threads][1] == weights[1][1]
        assert all(torch.equal(tensor, weights[1][0][name]) for name, tensor in weights[threads][0].items())


@pytest.fixture(scope="module")
def uneven_store(tmp_path_factory):
    """Log-mels of clips of very different lengths, some of several windows, for a model of two labels."""
    folder = tmp_path_factory.mktemp("uneven")
    write_corpus(folder / "data", {"train": 11, "devel": 1}, labels=["joy", "awe"], seconds=(0.1, 1.9))
    corpus = load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")
    model, extractor = small_model(id2label=LABELS), EmoShareFeatureExtractor("mel", chunk_length_s=0.8)
    store = extract_frame_features(corpus, "train", model, extractor, folder, Accelerator(cpu=True), "float32")
    assert len(store) > 11
    store.shares[[2, 5, 6], 0] = np.nan
    return store


@pytest.mark.parametrize("separate_heads", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_clip_weighs_the_same_in_an_epochs_gradient_and_loss(processes, separate_heads, uneven_store):
    """Whatever the other clips in its batch, the number of its windows and of processes; a share not known is none."""
    store, model = uneven_store, small_model(id2label=LABELS, separate_heads=separate_heads).train()
    heads, steps, sizes, losses = steps_of_training.heads_in_training(model, 0.1), [], [], []
    for process in range(processes):
        accelerator = SimpleNamespace(num_processes=processes, process_index=process, device=torch.device("cpu"))
        loader = FeatureLoader(store, model.config, 3, accelerator, seed=1)
        steps.append(len(loader))
        for batch in loader:
            sizes.append(len(batch["window"]))
            losses.append([head.compute_gradients(batch) for head in heads])
    assert len(set(steps)) == 1
    assert max(sizes) > min(sizes)
    gradients = {name: parameter.grad / sum(steps) for name, parameter in model.heads.named_parameters()}
    model.zero_grad()

    for head, loss in zip(heads, torch.tensor(losses).mean(dim=0), strict=True):
        weighted, known = 0.0, 0.0
        for item in store:
            batch = store.collate([item])
            shares = head.model(frame_features=batch["frame_features"], attention_mask=batch["attention_mask"]).logits
            true = batch["labels"][:, head.labels]
            is_known = ~true.isnan()
            windows_of_clip = np.flatnonzero(store.clip_of_window == store.clip_of_window[item["window"]])
            part = store.num_samples[item["window"]] / store.num_samples[windows_of_clip].sum()
            weighted = weighted + part * (shares[is_known] - true[is_known]).square().sum()
            known = known + part * is_known.sum()
        expected = weighted / known
        torch.testing.assert_close(loss, expected.detach())
        expected.backward()
    for name, parameter in model.heads.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("separate_heads", [True, False])
def test_weights_of_shares_reach_the_gradient_of_an_epoch(separate_heads, uneven_store, tmp_path):
    """With smoothed label weights, the mean over an epoch is that by the weights of clips and shares."""
    run = RunArguments(output_dir=str(tmp_path), label_weights="smoothed", per_device_train_batch_size=3)
    model = small_model(id2label=LABELS, separate_heads=separate_heads)
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    stores = {"train": uneven_store, "devel": uneven_store}
    trained = HeadTrainer(model, stores, spread, arguments, Accelerator(cpu=True))
    heads = trained.progress.heads
    losses = torch.tensor([[head.compute_gradients(batch) for head in heads] for batch in trained.loader]).mean(dim=0)
    weights, sums, totals = smoothed_weights(uneven_store.shares), np.zeros(2), np.zeros(2)
    for item in uneven_store:
        batch, clip = uneven_store.collate([item]), uneven_store.clip_of_window[item["window"]]
        with torch.no_grad():
            output = model(frame_features=batch["frame_features"], attention_mask=batch["attention_mask"])
        errors = (output.logits - batch["labels"]).square()[0].numpy()
        of_shares = np.where(np.isnan(errors), 0, weights[clip] * item["weights"])
        sums, totals = sums + of_shares * np.nan_to_num(errors), totals + of_shares
    expected = sums / totals if separate_heads else [sums.sum() / totals.sum()]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


TWO_PROCESSES = """
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoConfig

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.training.optimization import PLAIN, Optimization
from emoshare.training.steps import EncoderInTraining, heads_in_training, train_step

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)
config = EmoShareConfig(id2label={0: "joy", 1: "awe"}, conv_channels=(4,), lstm_hidden_size=4, ffn_sizes=())
torch.manual_seed(0)
model = EmoShareModel(config)


def batch(process):
    generator = torch.Generator().manual_seed(process)
    features = torch.rand(3, 20, 40, generator=generator)
    labels = torch.rand(3, 2, generator=generator)
    return {
        "frame_features": features,
        "attention_mask": torch.ones(3, 20),
        "labels": labels,
        "weights": torch.ones(3),
        "weight_per_step": torch.full((2,), 3.0),
    }


OPTIONS = Optimization(weight_decay=0.1, max_grad_norm=0.01), "average"
heads = heads_in_training(model, 0.1, *OPTIONS)
train_step(heads, batch(accelerator.process_index), accelerator, 2)
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
for other in gather_object([[average for head in heads for average in head.average.averages]]):
    assert torch.equal(torch.cat([average.flatten() for average in other]), weights)  # of one step
for other in gather_object([weights]):
    assert torch.equal(other, weights)  # the processes took the same step

# One process that sees both batches takes it too: the mean of two means over equally many shares is the mean of all.
torch.manual_seed(0)
alone = EmoShareModel(config)
both = {name: torch.cat([batch(0)[name], batch(1)[name]]) for name in batch(0)}
both["weight_per_step"] = torch.full((2,), 6.0)
heads = heads_in_training(alone, 0.1, *OPTIONS)
for head in heads:
    head.compute_gradients(both)
    head.update_weights()
expected = torch.cat([parameter.detach().flatten() for parameter in alone.parameters()])
torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)

# So do layers of an encoder that are tuned with the heads.
HUBERT = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
config.backbone_config, config.feature_size, config.finetuned_layers = AutoConfig.for_model(**HUBERT), 16, 1


def after_a_step(batch, accelerator):
    torch.manual_seed(0)
    model = EmoShareModel(config).eval()
    heads = heads_in_training(model, 0.1)
    encoder = EncoderInTraining(model.trained_part(), torch.float32, 0.1, PLAIN, "best_epoch")
    batch = {**batch, "frame_features": batch["frame_features"][..., :16]}
    train_step(heads, batch, accelerator, 1, encoder=encoder)
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


weights = after_a_step(batch(accelerator.process_index), accelerator)
for other in gather_object([weights]):
    assert torch.equal(other, weights)
torch.testing.assert_close(weights, after_a_step(both, SimpleNamespace(num_processes=1)), atol=1e-4, rtol=0)
print("the same step")
"""


@pytest.mark.slow
def test_processes_average_their_gradients(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    torchrun = Path(sys.executable).with_name("torchrun")
    assert (
        run_command(torchrun, "--standalone", "--nproc_per_node", 2, script, cwd=tmp_path).stdout.count("the same step")
        == 2
    )


def test_a_control_on_shuffled_labels_leaves_the_model_and_the_stores_as_they_were(stores, tmp_path):
    model = small_model(id2label=LABELS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = stores["train"].shares.copy()
    run = RunArguments(output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=2)
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    predicted = predict_after_shuffling(model, stores, spread, arguments, Accelerator(cpu=True))
    assert predicted.shape == (3, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    np.testing.assert_array_equal(stores["train"].shares, shares)

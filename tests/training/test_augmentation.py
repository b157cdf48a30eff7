from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emoshare import EmoShareConfig
from emoshare.frames_emoshare import length_mask
from emoshare.training.arguments import RunArguments
from emoshare.training.augmentation import MASKS, Augmentation, drop_listeners, mask, mix, stretch
from emoshare.training.corpus import check_listeners

LENGTHS = [40, 37, 25, 3]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def batch_of(lengths=LENGTHS, layers=(), width=20):
    """Zero-padded clips of random features."""
    lengths = torch.tensor(lengths)
    own = length_mask(lengths, int(lengths.max()))
    features = torch.randn(len(lengths), *layers, own.shape[1], width) + 5
    shares = torch.rand(len(lengths), 2)
    return {
        "frame_features": features * own.view(len(lengths), *[1] * len(layers), -1, 1),
        "attention_mask": own,
        "labels": shares,
        "weights": torch.rand(len(lengths)),
        "window": torch.arange(len(lengths)),
    }


def clips_of(batch):
    """The features of each clip without its padding."""
    lengths = batch["attention_mask"].sum(dim=1)
    assert torch.equal(batch["attention_mask"], length_mask(lengths, batch["attention_mask"].shape[1]))
    return [features[..., :length, :] for features, length in zip(batch["frame_features"], lengths, strict=True)]


def test_dropped_listeners_leave_votes_of_the_others(rng):
    votes, listeners = rng.integers(0, 10, (2000, 3)), np.full(2000, 9, dtype=np.float32)
    shares = (votes / 9).clip(max=1).astype(np.float32)
    drawn, kept = drop_listeners(shares, listeners, 0.5, rng)
    assert drawn.dtype == kept.dtype == np.float32
    assert set(kept) == set(range(1, 10))
    assert kept.mean() == pytest.approx(4.5, abs=0.15)
    new_votes = drawn * kept[:, None]
    np.testing.assert_allclose(new_votes, new_votes.round(), atol=1e-5)
    assert (new_votes.round() <= np.round(shares * 9)).all()
    assert (kept[:, None] - new_votes.round() <= 9 - np.round(shares * 9)).all()
    assert np.abs(drawn - shares).mean() > 0.1


def test_on_average_shares_stay_what_they_are(rng):
    shares = np.repeat(np.array([[0.0, 1 / 3, 0.41, 1.0]], dtype=np.float32), 20000, axis=0)
    drawn, _ = drop_listeners(shares, np.full(20000, 3, dtype=np.float32), 0.4, rng)
    np.testing.assert_allclose(drawn.mean(axis=0), shares[0], atol=0.01)


def test_clips_without_known_listeners_or_shares_stay_as_they_are(rng):
    shares = np.array([[0.31, np.nan], [0.5, np.nan]], dtype=np.float32)
    drawn, kept = drop_listeners(shares, np.array([np.nan, 4], dtype=np.float32), 0.9, rng)
    assert drawn[0, 0] == shares[0, 0]
    assert np.isnan(drawn[:, 1]).all()
    assert np.isnan(kept[0])
    assert 1 <= kept[1] <= 4


def test_listener_dropout_needs_listeners():
    corpus = SimpleNamespace(listeners=lambda split: np.full(3, np.nan))
    check_listeners(corpus, "mse", 0.0)
    with pytest.raises(ValueError, match=r"^--listener_dropout: needs the number of listeners of each clip"):
        check_listeners(corpus, "mse", 0.2)
    with pytest.raises(ValueError, match=r"^--loss beta_binomial: needs to know how many listeners voted"):
        check_listeners(corpus, "beta_binomial", 0.0)


@pytest.mark.parametrize("layers", [(), (3,)])
def test_a_stretched_clip_is_interpolated_from_its_first_to_its_last_frame(layers, rng):
    batch = batch_of(layers=layers)
    before = clips_of(batch)
    stretch(batch, 0.2, rng, shortest=2)
    after = clips_of(batch)
    lengths = [clip.shape[-2] for clip in after]
    assert lengths != LENGTHS
    assert all(0.8 * old - 1 <= new <= 1.2 * old + 1 for old, new in zip(LENGTHS, lengths, strict=True))
    for old, new in zip(before, after, strict=True):
        places = np.linspace(0, old.shape[-2] - 1, new.shape[-2])
        frames = np.arange(old.shape[-2])
        for series, expected in zip(new.flatten(0, -3), old.flatten(0, -3), strict=True) if layers else [(new, old)]:
            for feature in (0, 7):
                found = series[:, feature].numpy()
                np.testing.assert_allclose(found, np.interp(places, frames, expected[:, feature]), atol=1e-5)


def test_a_stretched_clip_has_a_length_that_the_model_takes(rng):
    batch = batch_of([40, 39, 4, 4])
    stretch(batch, 0.9, rng, shortest=4, longest=40)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.min() == 4
    assert lengths.max() <= 40


@pytest.mark.parametrize("layers", [(), (3,)])
def test_clips_are_mixed_in_pairs_and_have_the_shorter_ones_length(layers, rng):
    batch = batch_of(layers=layers)
    batch["labels"][1, 0] = torch.nan
    batch["listeners"] = torch.tensor([10.0, 20.0, torch.nan, 5.0])
    before = dict(batch)
    expected_rng = np.random.default_rng(0)
    other, part = expected_rng.permutation(4), expected_rng.beta(0.4, 0.4, 4)
    assert len(set(part)) == 4
    mix(batch, 0.4, rng)
    for clip, (own, partner, weight) in enumerate(zip(clips_of(batch), other, part, strict=True)):
        length = min(LENGTHS[clip], LENGTHS[partner])
        assert own.shape[-2] == length
        pair = [before["frame_features"][index][..., :length, :] for index in (clip, partner)]
        torch.testing.assert_close(own, weight * pair[0] + (1 - weight) * pair[1], atol=1e-5, rtol=0, check_dtype=False)
        for name in ("labels", "weights", "listeners"):
            values = before[name].nan_to_num(nan=1.0) if name == "listeners" else before[name]  # unknown counts as one
            expected = weight * values[clip] + (1 - weight) * values[partner]
            torch.testing.assert_close(batch[name][clip], expected.float(), equal_nan=True)


@pytest.mark.parametrize("layers", [(), (3,)])
def test_masked_frames_are_the_mean_of_their_clip(layers, rng):
    batch = batch_of([200, 150, 40], layers=layers)
    before = clips_of(batch)
    mask(batch, 0.3, 0.0, rng)
    fractions = []
    for old, new in zip(before, clips_of(batch), strict=True):
        changed = (old != new).flatten(0, -3).any(dim=0) if layers else old != new
        is_masked = changed.all(dim=-1)
        assert torch.equal(is_masked, changed.any(dim=-1))
        expected = old.mean(dim=-2, keepdim=True).expand_as(new)
        torch.testing.assert_close(new[..., is_masked, :], expected[..., is_masked, :])
        fractions.append(is_masked.float().mean().item())
        assert (is_masked.int().diff() == 1).sum() + is_masked[0] <= MASKS
    assert max(fractions) <= 0.3
    assert sum(fractions) > 0


@pytest.mark.parametrize("layers", [(), (3,)])
def test_masked_features_are_their_mean_over_the_batch(layers, rng):
    batch = batch_of([50, 30], layers=layers, width=40)
    before = clips_of(batch)
    means = torch.cat(before, dim=-2).mean(dim=-2, keepdim=True)
    mask(batch, 0.0, 0.5, rng)
    fractions = []
    for old, new in zip(before, clips_of(batch), strict=True):
        is_masked = (old != new).flatten(0, -2).all(dim=0)
        assert torch.equal(is_masked, (old != new).flatten(0, -2).any(dim=0))
        torch.testing.assert_close(new[..., is_masked], means.expand_as(new)[..., is_masked], atol=1e-4, rtol=0)
        fractions.append(is_masked.float().mean().item())
    assert fractions[0] != fractions[1]
    assert max(fractions) <= 0.5


def test_masks_are_anywhere_and_of_any_width(rng):
    frames = torch.zeros(30)
    widths = set()
    for _ in range(300):
        batch = batch_of([30])
        before = batch["frame_features"].clone()
        mask(batch, 0.2, 0.0, rng)
        masked = (before != batch["frame_features"])[0].all(dim=-1)
        frames += masked
        widths.add(int(masked.sum()))
    assert widths == set(range(7))  # two of 0 to 3
    assert (frames > 0).all()


def augmentation(process=0, store=None, **flags):
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=process)
    return Augmentation(RunArguments(**flags), EmoShareConfig(), store, accelerator)


ALL = {"mixup": 0.4, "time_mask": 0.2, "feature_mask": 0.2, "time_stretch": 0.1}


def test_an_epoch_that_is_run_again_changes_batches_in_the_same_way():
    batch = batch_of([60, 58, 57])
    before = {name: tensor.clone() for name, tensor in batch.items()}

    def changed(epoch, step, **options):
        augment = augmentation(**ALL, **options)
        augment.set_epoch(epoch)
        return augment(batch, step)["frame_features"]

    first = changed(1, 2)
    assert torch.equal(first, changed(1, 2))
    for other in (changed(2, 2), changed(1, 3), changed(1, 2, process=1), changed(1, 2, seed=5)):
        assert not torch.equal(first, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in batch.items())


def test_without_flags_a_batch_stays_what_it_is():
    batch = batch_of()
    augment = augmentation()
    augment.set_epoch(0)
    changed = augment(batch, 0)
    assert all(changed[name] is tensor for name, tensor in batch.items())


@pytest.mark.parametrize("flag", ALL)
def test_16_bits_stay_16_bits(flag):
    batch = batch_of()
    batch["frame_features"] = batch["frame_features"].bfloat16()
    augment = augmentation(**{flag: ALL[flag]})
    augment.set_epoch(0)
    changed = augment(batch, 0)["frame_features"]
    assert changed.dtype == torch.bfloat16
    assert changed.isfinite().all()


def test_windows_of_a_clip_have_the_same_listeners_and_each_epoch_has_others():
    shares = np.random.default_rng(1).integers(0, 21, (5, 2)).astype(np.float32) / 20
    store = SimpleNamespace(
        shares=shares, listeners=np.full(5, 20, dtype=np.float32), clip_of_window=np.array([0, 0, 1, 2, 3, 4])
    )
    batch = {"labels": torch.from_numpy(shares[[0, 4, 0]]), "window": torch.tensor([1, 5, 0])}
    batch["listeners"] = torch.full((3,), 20.0)
    drawn = []
    for epoch, process, step in [(0, 0, 0), (0, 1, 3), (1, 0, 0)]:
        augment = augmentation(process, store, listener_dropout=0.5)
        augment.set_epoch(epoch)
        changed = augment(batch, step)
        assert torch.equal(changed["labels"][0], changed["labels"][2])
        assert (changed["listeners"] < 20).all()
        drawn.append(changed["labels"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])

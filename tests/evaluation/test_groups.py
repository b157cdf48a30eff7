import json
import math

import numpy as np
import pytest

from emoshare.dataset_script.facts import are_names
from emoshare.evaluation import groups
from emoshare.evaluation.groups import as_json, as_text, compare, groups_of
from emoshare.evaluation.scores import MEAN, Scorer

LABELS = ["joy", "awe", "fear", "calm"]


def draw(rng, clips):
    """Predicted and true shares (clips, 4) whose labels depend on each other; true ones are votes of 8 listeners."""
    common = rng.standard_normal((clips, 4)) + rng.standard_normal((clips, 1))
    true = common + rng.standard_normal((clips, 4))
    return common + rng.standard_normal((clips, 4)), np.round(8 / (1 + np.exp(-true))) / 8


def sexes(clips):
    return [("female", "male")[clip % 2] for clip in range(clips)]


def test_each_group_has_the_scores_of_its_clips_alone():
    predictions, references = draw(np.random.default_rng(1), 50)
    speakers = [clip // 10 for clip in range(50)]
    comparison = compare(sexes(50), predictions, references, LABELS, 30, 4, speakers)
    assert comparison.clips == {"female": 25, "male": 25}
    for start, sex in enumerate(["female", "male"]):
        own = slice(start, None, 2)
        expected = Scorer(references[own], LABELS).scores(predictions[own], 30, 4, speakers[own])
        assert list(comparison.scores[sex]) == [MEAN, *LABELS]
        for label, score in comparison.scores[sex].items():
            found = (score.rho, score.low, score.high)
            assert found == pytest.approx((expected[label].rho, expected[label].low, expected[label].high))
    gap = comparison.gaps["awe"]
    of_sexes = {sex: comparison.scores[sex]["awe"].rho for sex in ("female", "male")}
    assert gap.size == pytest.approx(max(of_sexes.values()) - min(of_sexes.values()))
    assert of_sexes[gap.lowest] < of_sexes[gap.highest]


def flagged(comparison):
    return {label for label, gap in comparison.gaps.items() if gap.is_significant}


def test_gaps_by_chance_are_flagged_in_one_comparison_of_twenty_at_most(monkeypatch):
    """Without a correction for the nine labels and their mean, one in four would be flagged."""
    monkeypatch.setattr(groups, "PERMUTATIONS", 200)
    rng = np.random.default_rng(2)
    labels = [f"label {number}" for number in range(9)]
    draws = [
        compare(sexes(40), rng.standard_normal((40, 9)), rng.standard_normal((40, 9)), labels, seed=number)
        for number in range(50)
    ]
    assert sum(bool(flagged(comparison)) for comparison in draws) <= 5
    assert np.mean([comparison.gaps["label 0"].p for comparison in draws]) > 0.5


def test_a_planted_gap_is_flagged_and_no_other():
    rng = np.random.default_rng(3)
    predictions, references = draw(rng, 400)
    predictions[::2, 1] = rng.standard_normal(200)
    comparison = compare(sexes(400), predictions, references, LABELS)
    assert flagged(comparison) - {MEAN} == {"awe"}
    assert (comparison.gaps["awe"].lowest, comparison.gaps["awe"].highest) == ("female", "male")
    assert comparison.gaps["awe"].p < 0.01
    lines = [line.split() for line in as_text("sex", comparison).splitlines() if line.endswith("   significant")]
    assert [line[0] for line in lines] == ["mean", "awe"]


def test_groups_with_other_shares_are_not_flagged_for_that(monkeypatch):
    """One group has higher predicted and true shares than the other, but its clips rank the same."""
    monkeypatch.setattr(groups, "PERMUTATIONS", 200)
    for seed in range(4):
        predictions, references = draw(np.random.default_rng(seed), 60)
        as_they_are = compare(sexes(60), predictions, references, LABELS)
        predictions[::2] = 3 * predictions[::2] + 9
        references[::2] = references[::2] / 3 + 2
        assert not flagged(compare(sexes(60), predictions, references, LABELS)) - flagged(as_they_are)


def test_speakers_that_are_few_show_nothing_about_their_sex():
    """One speaker's clips are predicted badly: over clips this is a gap between the sexes, over speakers it is not."""
    predictions, references = draw(np.random.default_rng(5), 400)
    speakers = np.arange(400) % 8
    predictions[speakers == 0] *= -1
    by_clips = compare(sexes(400), predictions, references, LABELS)
    assert flagged(by_clips)
    by_speakers = compare(sexes(400), predictions, references, LABELS, units=speakers)
    assert not flagged(by_speakers)
    assert by_speakers.scores == by_clips.scores


def test_clips_are_permuted_within_units_that_are_of_several_groups():
    units, assigned = np.repeat([0, 1, 2], 6), np.array([0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1])
    permutation = groups.Permutation(assigned, units)
    permutations = list(permutation.draws(seed=0))
    assert (permutation.num_units, permutation.num_divided) == (3, 3)
    assert len(permutations) == groups.PERMUTATIONS
    assert {tuple(permuted.reshape(3, 6).sum(axis=1)) for permuted in permutations} == {(5, 1, 3)}
    assert len({tuple(permuted) for permuted in permutations}) > 200
    assigned = np.repeat([0, 1, 1], 6)
    whole = {tuple(permuted) for permuted in groups.Permutation(assigned, units).draws(seed=0)}
    assert whole == {tuple(np.repeat(of_units, 6)) for of_units in ([0, 1, 1], [1, 0, 1], [1, 1, 0])}


def test_one_wrong_fact_is_warned_of_since_it_changes_what_is_permuted():
    predictions, references = draw(np.random.default_rng(8), 80)
    speakers = [clip // 10 for clip in range(80)]
    sex_of = [("female", "male")[speaker % 2] for speaker in speakers]
    whole = compare(sex_of, predictions, references, LABELS, units=speakers)
    assert as_json(whole)["permutation"] == {"units": 8, "in_several_groups": 0}
    sex_of[0] = "male"
    with pytest.warns(UserWarning, match="1 of 8 units of --resample have clips in several groups"):
        wrong = compare(sex_of, predictions, references, LABELS, units=speakers)
    assert as_json(wrong)["permutation"] == {"units": 8, "in_several_groups": 1}
    assert "clips within the 8 units of --resample, 1 of which are in several groups" in as_text("sex", wrong)


def test_means_of_groups_are_over_the_same_labels(monkeypatch):
    """Nobody hears awe in one group; the other is not worse for having an emotion more, which is hard to predict."""
    monkeypatch.setattr(groups, "PERMUTATIONS", 200)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        references = rng.random((100, 2))
        predictions = references + rng.normal(0, [0.15, 1], (100, 2))
        references[::2, 1] = 0
        comparison = compare(sexes(100), predictions, references, ["joy", "awe"], bootstrap=20)
        assert not flagged(comparison)
        for scores in comparison.scores.values():
            assert scores[MEAN] == scores["joy"]
        assert comparison.gaps[MEAN].size == comparison.gaps["joy"].size
        assert comparison.not_in_mean == as_json(comparison)["labels_not_in_mean"] == ["awe"]
        assert "Not in the mean, without a rho in some group: awe" in as_text("sex", comparison)


def test_small_groups_and_unknown_facts_are_named_and_left_out():
    predictions, references = draw(np.random.default_rng(6), 45)
    values = ["b"] * 20 + ["a"] * 12 + ["rare"] * 9 + [None] * 4
    comparison = compare(values, predictions, references, LABELS)
    assert (comparison.clips, comparison.too_small, comparison.unknown) == ({"a": 12, "b": 20}, {"rare": 9}, 4)
    text = as_text("kind", comparison)
    assert "\nLeft out, with fewer than 10 clips: rare (9)\nLeft out, of unknown kind: 4 clips" in text
    alone = compare(["a"] * 40 + ["rare"] * 5, predictions, references, LABELS)
    assert alone.gaps == {}
    assert "kind: nothing to compare; expected two groups of 10 clips or more" in as_text("kind", alone)


def test_a_label_without_a_rho_in_a_group_has_no_gap():
    predictions, references = draw(np.random.default_rng(7), 60)
    references[::2, 2] = 0.0
    comparison = compare(sexes(60), predictions, references, LABELS, bootstrap=20)
    assert math.isnan(comparison.scores["female"]["fear"].rho)
    assert list(comparison.gaps) == [MEAN, "joy", "awe", "calm"]
    written = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert written["groups"]["female"]["clips"] == 30
    assert written["groups"]["female"]["spearman_fear"] is None
    assert written["groups"]["male"]["spearman_joy"] == comparison.scores["male"]["joy"].rho
    assert len(written["groups"]["male"]["spearman_ci95"]) == 2
    assert written["largest_gaps"]["spearman_joy"] == {
        "lowest": comparison.gaps["joy"].lowest,
        "highest": comparison.gaps["joy"].highest,
        "gap": comparison.gaps["joy"].size,
        "p": comparison.gaps["joy"].p,
        "significant": comparison.gaps["joy"].is_significant,
    }


def test_groups_are_the_values_of_a_fact_or_quarters_of_its_numbers():
    names, of_clips = groups_of(["m", None, "f", "m"])
    assert (names, of_clips.tolist()) == (["f", "m"], [1, -1, 0, 1])
    names, of_clips = groups_of([10.0, 9.0, None, 10.0, 4.5])
    assert (names, of_clips.tolist()) == (["4.5", "9", "10"], [2, 1, -1, 2, 0])
    ages = [float(age) for age in range(20, 60)]
    names, of_clips = groups_of([*ages, None])
    assert names == ["20 to 29", "30 to 39", "40 to 49", "50 to 59"]
    assert np.bincount(of_clips[:-1]).tolist() == [10] * 4
    names, of_clips = groups_of([20.0] * 90 + ages[:13])
    assert (names[0], sum(of_clips == 0)) == ("20 to 20", 91)
    assert groups_of([None, None])[0] == []
    names, _ = groups_of([1690000001.0 + second for second in range(40)])  # which do not differ in six digits
    assert names[:2] == ["1690000001 to 1690000010", "1690000011 to 1690000020"]


def test_numbers_of_speakers_are_groups_however_many_there_are():
    names, of_clips = groups_of([float(clip % 20) for clip in range(60)], are_names=True)
    assert names == [str(speaker) for speaker in range(20)]
    assert of_clips.tolist() == [clip % 20 for clip in range(60)]
    assert all(map(are_names, ["speaker", "Speakers", "actor", "id", "speaker_id", "ID"]))
    assert not any(map(are_names, ["age", "valid", "listeners", "identity score"]))

"""Scores of groups of clips, such as women's and men's, and a test of whether they differ by more than chance."""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from ..dataset_script.facts import is_known
from ..metrics.emotion_share_spearman.spearman import INTERVAL, ResampledSpearman, mean_rho
from .scores import MEAN, bootstrapped_scores, metric_name, number_or_null, score_table

MIN_CLIPS = 10  # smaller groups are not scored
MOST_NUMBERS = 12  # a numeric fact with more different values, such as age, is cut at its quartiles
PERMUTATIONS = 1000
# p is an upper confidence bound, so flags do not depend on the seed.
CONFIDENCE_IN_P = 0.99
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Gap:
    """The largest gap between the ρ of two groups, and the probability of as large a gap by chance in any label."""

    lowest: str
    highest: str
    size: float
    p: float

    @property
    def is_significant(self):
        return self.p < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        scores: for each scored group, a `dict` of `Score`s by label and by `MEAN`. The mean is over the labels that
            have a ρ in every scored group, so that all groups have the mean over the same emotions.
        not_in_mean: labels that have a ρ in some of the scored groups, but not in all of them.
        clips: number of clips of each scored group.
        too_small: number of clips of each group that is too small to be scored.
        unknown: number of clips for which the fact is unknown.
        gaps: `Gap`s by label and by `MEAN`, without labels for which fewer than two groups have a ρ.
        permutation: the `Permutation` that the gaps were tested with; `None` if there is nothing to test.
    """

    scores: dict
    not_in_mean: list
    clips: dict
    too_small: dict
    unknown: int
    gaps: dict
    permutation: "Permutation | None"


def compare(values, predictions, references, labels, bootstrap=0, seed=0, units=None, are_names=False):
    """
    Scores each group of clips that have the same value of a fact, and tests the largest gap between their ρ.

    The test permutes 1,000 times which clip belongs to which group. It uses the ranks of clips within their groups,
    so that groups whose shares are generally higher or lower do not count as different for that reason. Gaps are
    standardised, and each is compared with the largest one of any label (and the mean) in each permutation. So if no
    group differs, at most 5 % of all comparisons flag anything, however many labels there are.

    Args:
        values: (clips,) the fact, `None` where unknown.
        predictions, references: (clips, labels) predicted and true shares, NaN where a true share is unknown.
        labels: label names.
        bootstrap: number of resamples for the 95 % intervals; 0 for none.
        seed: seed of the resamples and permutations.
        units: (clips,) the unit that each clip belongs to, such as its speaker, if clips of a unit are not independent.
            Whole units are then resampled. Whole units are also permuted if the fact is the same for all clips of each
            unit; otherwise clips are permuted within units, with a warning if only some units have several values.
        are_names: as in `groups_of`.

    Returns:
        `Comparison`.
    """
    names, group_of_clip = groups_of(values, are_names)
    sizes = np.bincount(group_of_clip[group_of_clip >= 0], minlength=len(names)).tolist()
    scored = [group for group, size in enumerate(sizes) if size >= MIN_CLIPS]
    rhos_of = ResampledSpearman(predictions[None], references)
    clips_of = {group: np.flatnonzero(group_of_clip == group) for group in scored}
    have_rho = np.array([~np.isnan(rhos_of(clips)[0]) for clips in clips_of.values()]).reshape(-1, len(labels))
    in_mean = have_rho.all(axis=0)
    scores = {}
    for group, clips in clips_of.items():
        own_units = None if units is None else np.asarray(units)[clips]
        scores[names[group]] = bootstrapped_scores(rhos_of, labels, clips, own_units, bootstrap, seed, in_mean)
    permutation = None
    if len(scored) > 1:
        tested = np.flatnonzero(np.isin(group_of_clip, scored))
        permutation = Permutation(group_of_clip[tested], None if units is None else np.asarray(units)[tested])
        permutation.warn()
    return Comparison(
        scores,
        not_in_mean=[labels[index] for index in np.flatnonzero(have_rho.any(axis=0) & ~in_mean)],
        clips={names[group]: sizes[group] for group in scored},
        too_small={name: size for name, size in zip(names, sizes, strict=True) if size < MIN_CLIPS},
        unknown=int((group_of_clip < 0).sum()),
        gaps=_gaps(rhos_of, scores, clips_of, in_mean, permutation, seed) if permutation else {},
        permutation=permutation,
    )


def groups_of(values, are_names=False):
    """
    Args:
        values: values of a fact, text or numbers, `None` where unknown.
        are_names: whether each number is a group of its own, however many there are, such as a speaker's number.

    Returns:
        The names of the groups, in order, and the index of each clip's group (clips,) int64, -1 where the fact is
        unknown. Unless they are names, many different numbers are cut into quarters, such as `"20 to 31"`.
    """
    known = [value for value in values if is_known(value)]
    if are_names or all(isinstance(value, str) for value in known) or len(set(known)) <= MOST_NUMBERS:
        places = {value: place for place, value in enumerate(sorted(set(known)))}
        names = [value if isinstance(value, str) else repr(value).removesuffix(".0") for value in places]
    else:
        quarters = np.searchsorted(np.quantile(known, [0.25, 0.5, 0.75]), known).tolist()
        quarter_of = dict(zip(known, quarters, strict=True))
        order = sorted(set(quarters))
        places = {value: order.index(quarter) for value, quarter in quarter_of.items()}
        members = [[value for value in known if quarter_of[value] == quarter] for quarter in order]
        for digits in (6, 17):  # 17 digits distinguish all numbers
            names = [f"{min(quarter):.{digits}g} to {max(quarter):.{digits}g}" for quarter in members]
            if len(set(names)) == len(names):
                break
    return names, np.array([places[value] if is_known(value) else -1 for value in values], dtype=np.int64)


def check_fact(flag, fact, corpus):
    """Raises ValueError, which lists the corpus's facts, if the `Corpus` does not have this one."""
    if fact not in corpus.facts:
        known = f"has {', '.join(corpus.facts)}" if corpus.facts else "has no facts about its clips"
        raise ValueError(f"{flag}: got {fact!r}; the corpus {known}")


def resampled_units(corpus, split, fact):
    """
    The units that `--resample FACT` resamples.

    Args:
        corpus: `Corpus`.
        split: name of the split.
        fact: name of a fact, or `None`.

    Returns:
        The value of the fact for each clip of the split; `None` without a fact, to resample single clips.

    Raises:
        ValueError: if the corpus has no such fact, or it is unknown for a clip.
    """
    if fact is None:
        return None
    check_fact("--resample", fact, corpus)
    values = corpus.metadata[split][fact]
    if None in values:
        raise ValueError(
            f"--resample: {fact} is not known for {values.count(None)} of the {len(values)} clips of {split}"
        )
    return values


def _gaps(rhos_of, scores, clips_of, in_mean, permutation, seed):
    """The `Gap` of each label, `MEAN` among them, between the groups that have scores."""
    labels = list(next(iter(scores.values())))
    # Ranks within groups, because if one group had higher shares than the other, ρ over clips of both groups would be
    # higher than over those of either, and gaps between permuted groups would be too small.
    rhos_of = _of_ranks_within(rhos_of, (len(in_mean), len(rhos_of.clips)), clips_of.values())
    clips = np.sort(np.concatenate([*clips_of.values()]))
    gaps = np.array(
        [
            _largest_gaps([rhos_of(clips[assigned == group])[0] for group in clips_of], in_mean)
            for assigned in [permutation.groups, *permutation.draws(seed)]
        ]
    )
    found = {}
    for label, gap, p in zip(labels, gaps[0], _adjusted(gaps), strict=True):
        known = {name: of_labels[label].rho for name, of_labels in scores.items()}
        known = {name: rho for name, rho in known.items() if not np.isnan(rho)}
        if len(known) > 1:
            found[label] = Gap(min(known, key=known.get), max(known, key=known.get), float(gap), float(p))
    return found


def _of_ranks_within(rhos_of, shape, groups):
    """
    `ResampledSpearman` of the ranks of clips within their own group, scaled to -0.5 to 0.5.

    Args:
        rhos_of: `ResampledSpearman` of the clips' shares.
        shape: (labels, clips).
        groups: the indices of the clips of each group.
    """
    columns = np.full((2, *shape), np.nan)
    for clips in groups:
        ranks, known = rhos_of.ranks(clips)
        columns[..., clips] = np.where(known, ranks / np.maximum(known.sum(axis=1), 1)[:, None], np.nan)
    references, predictions = columns.swapaxes(1, 2)
    return ResampledSpearman(np.nan_to_num(predictions)[None], references)


def _largest_gaps(rhos, in_mean):
    """
    Highest minus lowest ρ of the groups, for the mean and each label; 0 where fewer than two groups have a ρ.

    Args:
        rhos: (groups, labels) ρ, NaN where a group has none.
        in_mean: (labels,) bool, the labels that the mean is over, if all of these groups have a ρ for them.
    """
    rhos = np.array(rhos)
    means = mean_rho(np.where(in_mean & ~np.isnan(rhos).any(axis=0), rhos, np.nan))
    of_groups = np.column_stack([means, rhos])
    is_known = ~np.isnan(of_groups)
    highest = np.where(is_known, of_groups, -np.inf).max(axis=0)
    lowest = np.where(is_known, of_groups, np.inf).min(axis=0)
    return np.where(is_known.sum(axis=0) > 1, highest - lowest, 0.0)


class Permutation:
    """
    What is permuted to test gaps: clips; whole units, if each unit is in one group; otherwise clips within units.

    Args:
        groups: (clips,) the group of each clip.
        units: (clips,) the unit of each clip; `None` if clips are independent.

    Attributes:
        num_units: how many units there are; 0 if clips are independent.
        num_divided: how many of them have clips in several groups.
    """

    def __init__(self, groups, units):
        self.groups = groups
        self.num_units = self.num_divided = 0
        if units is not None:
            _, self.first, self.unit = np.unique(units, return_index=True, return_inverse=True)
            self.num_units = len(self.first)
            self.num_divided = len(np.unique(self.unit[groups[self.first][self.unit] != groups]))

    @property
    def text(self):
        if not self.num_units:
            return "clips"
        units = f"the {self.num_units} units of --resample"
        return f"clips within {units}, {self.num_divided} of which are in several groups" if self.num_divided else units

    def warn(self):
        """Warns if some units are in one group and others in several: the former then say nothing about a gap."""
        whole = self.num_units - self.num_divided
        if self.num_divided and whole:
            warnings.warn(
                f"{self.num_divided} of {self.num_units} units of --resample have clips in several groups, so clips "
                f"are permuted within units, and the {whole} units that are in one group say nothing about gaps; if "
                "each unit should be in one group, the fact is wrong for some clips",
                stacklevel=3,
            )

    def draws(self, seed):
        """Yields the groups of the clips (clips,) in each permutation."""
        rng = np.random.default_rng(seed)
        for _ in range(PERMUTATIONS):
            if not self.num_units:
                yield rng.permutation(self.groups)
            elif not self.num_divided:
                yield rng.permutation(self.groups[self.first])[self.unit]
            else:
                assigned = np.empty_like(self.groups)
                in_units = self.groups[np.argsort(self.unit, kind="stable")]
                assigned[np.lexsort([rng.random(len(self.unit)), self.unit])] = in_units
                yield assigned


def _adjusted(gaps):
    """p of each label, corrected for their number, from gaps (1 + permutations, labels), the observed gaps first."""
    spread = gaps.std(axis=0)
    in_deviations = (gaps - gaps.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    largest = in_deviations[1:].max(axis=1)
    exceeding = (largest[:, None] >= in_deviations[0] - 1e-9).sum(axis=0)
    p = beta.ppf(CONFIDENCE_IN_P, exceeding + 1, len(largest) - exceeding)
    return np.nan_to_num(p, nan=1.0)  # NaN if every permutation has as large a gap


def as_text(fact, comparison):
    """A `Comparison` as text for the terminal."""
    lines = []
    for group, scores in comparison.scores.items():
        lines += [f"\n{fact} {group}: {comparison.clips[group]} clips", score_table(scores)]
    if comparison.gaps:
        lines.append(f"\nLargest gaps by {fact}, from the lowest rho to the highest")
        lines.append(f"p: {PERMUTATIONS:,} permutations of {comparison.permutation.text}, corrected for all gaps")
    for label, gap in comparison.gaps.items():
        name = "mean" if label is MEAN else label
        flag = "   significant" if gap.is_significant else ""
        lines.append(f"  {name:<15} {gap.size:.3f}   {gap.lowest} to {gap.highest}   p {gap.p:.3f}{flag}")
    if len(comparison.scores) < 2:
        lines.append(f"\n{fact}: nothing to compare; expected two groups of {MIN_CLIPS} clips or more")
    if comparison.not_in_mean:
        lines.append(f"Not in the mean, without a rho in some group: {', '.join(comparison.not_in_mean)}")
    if comparison.too_small:
        small = ", ".join(f"{group} ({clips})" for group, clips in comparison.too_small.items())
        lines.append(f"Left out, with fewer than {MIN_CLIPS} clips: {small}")
    if comparison.unknown:
        lines.append(f"Left out, of unknown {fact}: {comparison.unknown} clips")
    return "\n".join(lines)


def as_json(comparison):
    """A `Comparison` as a dict for JSON, for `write_scores`: scores under the metric's names, `None` for NaN."""
    groups = {}
    for group, scores in comparison.scores.items():
        groups[group] = {"clips": comparison.clips[group]}
        for label, score in scores.items():
            groups[group][metric_name(label)] = number_or_null(score.rho)
            if not np.isnan(score.low):
                groups[group][metric_name(label) + INTERVAL] = [score.low, score.high]
    gaps = {
        metric_name(label): {
            "lowest": gap.lowest,
            "highest": gap.highest,
            "gap": gap.size,
            "p": gap.p,
            "significant": gap.is_significant,
        }
        for label, gap in comparison.gaps.items()
    }
    permutation = comparison.permutation
    return {
        "groups": groups,
        "labels_not_in_mean": comparison.not_in_mean,
        "largest_gaps": gaps,
        "permutation": permutation and {"units": permutation.num_units, "in_several_groups": permutation.num_divided},
        "left_out_as_too_small": comparison.too_small,
        "clips_of_unknown_group": comparison.unknown,
    }

"""Which labels are wrong, how many, how sure that is, and whether this run can tell at all.

A vote such as "the run would rather have another label" says how long was trained and how hard the task is. Here the
labels of the others speak, read from features that have not yet learnt the example's own (``training.evidence``): their
confident joint with the given labels (Northcutt et al. 2021, 1911.00068) tells how many labels are wrong, the audit's
ranking which. Where even the surest of them contradict no more labels than chance would, nobody can tell.

Index legend: ``n`` examples, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_influence.training.evidence import LabelEvidence

Matrix = NDArray[np.float64]

# Share of the noise rate that the surest examples must contradict; less where the features are late ones.
_NEEDED, _NEEDED_LATE = 0.87, 0.58
# More wrong labels are not believed in: most of what a run sees must be right. From so many on, chance is no excuse.
_MOST, _MANY = 0.45, 0.3
# So few wrong labels are none to be feared, whoever they are: the surest tell how many.
_FEW = 0.05
# Accuracy, below that of the belief, from which untrained features are of no use.
_USELESS = 0.10
_SUREST = (0.2, 0.1)
_FEWEST = 10
# The joint is kept for up to so many classes.
_JOINT = 100
# Where the run cannot tell, no label is called wrong with more probability than this.
DOUBT = 0.45
_NUMBERS = ("noise_rate", "noise_rate_low", "noise_rate_high", "noise_rate_surest")
# Of the posterior: fitted on 146 runs (digits, tables, reviews; random flips, none, and others), half of them held out.
_POSTERIOR = {
    "depth": -1.098,
    "deep": 1.360,
    "early": -0.721,
    "late": -0.525,
    "support": -2.217,
    "differs": 2.279,
    "rate": -0.304,
    "rate early": -0.031,
    "rate differs": 0.673,
    "rate support": -0.267,
}


@dataclass(frozen=True, eq=False)
class LabelBeliefs:
    """What an audit believes of the labels as a whole.

    Attributes:
        verdict: ``"told"``, or ``"cannot tell"``: then nobody is a candidate, and the ranking is all there is.
        reason: Why not.
        noise_rate: Share of the examples whose label is probably wrong; NaN if nothing is known of it.
        low: Lower end of an interval that should hold the true share in nine of ten runs.
        high: Its upper end.
        surest: The share among the examples that are easiest to tell, at most the noise rate: so many can be acted on;
            NaN for as many as are wrong.
        joint: Examples by given (row) and probable label (column), ``[c, c]``; None with many classes.
        trusted: Number of labels that were known to be right.
    """

    verdict: Literal["told", "cannot tell"] = "cannot tell"
    reason: str = ""
    noise_rate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    surest: float = np.nan
    joint: Matrix | None = field(default=None, repr=False)
    trusted: int = 0

    @property
    def told(self) -> bool:
        """Whether the run can tell."""
        return self.verdict == "told"

    @property
    def counted(self) -> str:
        """Which mistakes the noise rate counts, in words."""
        beside = f"beside {self.trusted:,} known to be right"
        return beside if self.trusted else "mistakes that the network shares not counted"

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> LabelBeliefs:
        """Read back what ``described`` has returned; in a manifest, null stands for NaN."""
        rate, low, high, surest = (np.nan if about.get(name) is None else float(about[name]) for name in _NUMBERS)
        joint = np.asarray(about["joint"], dtype=np.float64) if about.get("joint") is not None else None
        reason = about.get("reason", "nothing is recorded of it")
        return cls(
            about.get("verdict", "cannot tell"), reason, rate, low, high, surest, joint, int(about.get("trusted", 0))
        )

    def described(self) -> dict[str, Any]:
        """Return it in terms of JSON."""
        about: dict[str, Any] = {"verdict": self.verdict, "reason": self.reason}
        about |= dict(zip(_NUMBERS, (self.noise_rate, self.low, self.high, self.surest), strict=True))
        if self.trusted:
            about["trusted"] = self.trusted
        if self.joint is not None:
            about |= {"classes": list(range(len(self.joint))), "joint": self.joint.tolist()}
        return about


def believe(
    labels: NDArray[np.int64], evidence: LabelEvidence, order: NDArray[np.int64]
) -> tuple[LabelBeliefs, dict[str, NDArray[Any]]]:
    """Return what to believe of the labels of some examples, as a whole and one by one.

    Args:
        labels: Given labels ``[n]``, -1 for unknown ones.
        evidence: Of the same examples.
        order: Their rows, the most suspicious first.

    Returns:
        The whole, and the columns ``suggested`` (the most probable other class) and ``wrong_probability`` (-1 and NaN
        where nothing is known).
    """
    columns: dict[str, NDArray[Any]] = {
        "suggested": np.full(len(labels), -1),
        "wrong_probability": np.full(len(labels), np.nan),
    }
    early, late, first, trained = (_array(getattr(evidence, name)) for name in ("early", "late", "first", "trained"))
    known = (labels >= 0) & (early.sum(1) > 0)
    if not known.any() or early.shape[1] < 2:
        return LabelBeliefs(reason="nothing was recorded that tells labels apart"), columns
    given = labels[known]
    early, late, first, trained = early[known], late[known], first[known], trained[known]
    n = len(given)
    joint = _confident_joint(early, given)
    raw = 1 - np.trace(joint) / n
    differs = early.argmax(1) != given
    rate = float(min(raw, differs.mean()))
    beliefs = _verdict(first, early, given, rate, raw, float(differs.mean()), joint)
    others = _without(early + late + 1e-9 * trained, given)  # the run breaks ties
    others[:, np.bincount(given, minlength=early.shape[1]) == 0] = -np.inf  # classes that nobody has
    columns["suggested"][known] = np.where(np.isfinite(others).any(1), others.argmax(1), -1)
    place = np.empty(len(labels))
    place[order] = np.arange(len(order))
    # Among the known ones only: the others have no label that could be wrong.
    places = place[known].argsort(kind="stable").argsort(kind="stable") / n
    odds = _log_odds(places, rate, given, early, late, trained, differs)
    wrong = _with_mean(odds, min(rate, beliefs.noise_rate))
    if not beliefs.told:
        wrong = np.minimum(wrong, DOUBT)
    columns["wrong_probability"][known] = wrong
    return beliefs, columns


def _array(shares: Any) -> Matrix:
    return np.asarray(shares, dtype=np.float64)


def _own(shares: Matrix, given: NDArray[np.int64]) -> NDArray[np.float64]:
    return shares[np.arange(len(given)), given]


def _without(shares: Matrix, given: NDArray[np.int64]) -> Matrix:
    """Return a copy in which the given labels are out of the question."""
    others = shares.copy()
    others[np.arange(len(given)), given] = -np.inf
    return others


def _confident_joint(shares: Matrix, given: NDArray[np.int64]) -> Matrix:
    """Count examples by given and probable label ``[c, c]``, rows summing to the sizes of the classes.

    Probable is the class with the largest share among those whose share is at least what it is on average among the
    examples that carry the label.
    """
    classes = shares.shape[1]
    sizes = np.bincount(given, minlength=classes)
    usual = np.bincount(given, _own(shares, given), minlength=classes) / np.maximum(sizes, 1)
    confident = np.where((shares >= usual) & (sizes > 0), shares, -1.0)
    probable, some = confident.argmax(1), confident.max(1) >= 0
    joint = np.zeros((classes, classes))
    np.add.at(joint, (given[some], probable[some]), 1.0)
    counted = joint.sum(1)
    joint[counted == 0] = np.diag(sizes)[counted == 0]
    scaled: Matrix = joint * (sizes / np.maximum(joint.sum(1), 1))[:, None]
    return scaled


def _verdict(
    first: Matrix,
    early: Matrix,
    given: NDArray[np.int64],
    rate: float,
    raw: float,
    differs: float,
    joint: Matrix,
) -> LabelBeliefs:
    """Tell whether a run can tell.

    Of every class, the examples are asked of which the features are surest. Where a label is hard to tell they are
    right all the same; where labels are wrong at random, as many of theirs are as of any. Where features tell nothing,
    that is so as well, but then nearly all labels look wrong.
    """
    late = float((first.argmax(1) == given).mean()) < 1 - differs - _USELESS
    asked = [_contradicted(early if late else first, given, surest) for surest in _SUREST]
    surest, error = np.mean(asked, 0)
    enough = (_NEEDED_LATE if late else _NEEDED) * raw
    low, high = _interval(rate, differs, len(given))
    found = LabelBeliefs("told", "", rate, low, high, min(asked[0][0], rate), joint if len(joint) <= _JOINT else None)
    # Where many labels look wrong, chance is no excuse.
    if raw <= _MOST and surest + (error if raw <= _MANY else 0.0) >= enough:
        return found
    if raw <= _FEW:
        return replace(found, noise_rate=found.surest, low=0.0)
    reason = (
        f"{raw:.1%} of the labels look wrong, but among the examples that are easiest to tell only "
        f"{asked[0][0]:.1%} do: the classes overlap, or the network has learnt mistakes that are no accident"
        if raw <= _MOST
        else f"{raw:.1%} of the labels look wrong: the network has learnt too little to tell them from right ones"
    )
    return replace(found, verdict="cannot tell", reason=reason, noise_rate=asked[0][0], low=0.0, surest=0.0)


def _contradicted(shares: Matrix, given: NDArray[np.int64], surest_share: float) -> tuple[float, float]:
    """Return which share of the labels the surest examples of every class contradict, and its standard error."""
    predicted = shares.argmax(1)
    two = np.partition(shares, -2, axis=1)[:, -2:]
    margin = two[:, 1] - two[:, 0]
    total, variance = 0.0, 0.0
    for own in np.unique(predicted):
        rows = np.flatnonzero(predicted == own)
        asked = min(max(_FEWEST, int(np.ceil(surest_share * len(rows)))), len(rows))
        surest = rows[np.argsort(-margin[rows], kind="stable")[:asked]]
        share, weight = float((given[surest] != own).mean()), len(rows) / len(given)
        total += weight * share
        variance += weight**2 * max(share * (1 - share), 0.25 / asked) / asked
    return total, variance**0.5


def _interval(rate: float, differs: float, n: int) -> tuple[float, float]:
    """Return an interval for the rate: what chance does to a count, and more the harder the task is to tell."""
    half = 2 * (max(rate * (1 - rate), 0.25 / n) / n) ** 0.5 + 0.3 * (differs - rate) + 0.005
    return max(rate - half, 0.0), min(rate + half, 1.0)


def _with_mean(odds: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """Return the probabilities whose log odds are these plus a constant, such that their mean is as it should be.

    At least half a label in all is wrong: that none is cannot be known.
    """
    mean = max(mean, 0.5 / len(odds))
    below, above = -40.0, 40.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if np.mean(1 / (1 + np.exp(-odds - middle))) < mean else (below, middle)
    return np.asarray(1 / (1 + np.exp(-odds - above)))


def _log_odds(
    places: NDArray[np.float64],
    rate: float,
    given: NDArray[np.int64],
    early: Matrix,
    late: Matrix,
    trained: Matrix,
    differs: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return the log odds that each label is wrong, from its place in the ranking (0 first, 1 last) and the rest."""
    odds = np.log((rate + 0.003) / (1 - rate + 0.003))
    depth = np.clip(np.log((places + 0.003) / (rate + 0.003)), -3, 3)
    in_early, in_late = (
        np.log((_own(shares, given) + 0.02) / (_without(shares, given).max(1) + 0.02)) for shares in (early, late)
    )
    support = _own(trained, given) - _without(trained, given).max(1)
    terms = {
        "depth": depth,
        "deep": np.maximum(depth, 0),
        "early": in_early,
        "late": in_late,
        "support": support,
        "differs": differs,
        "rate": odds,
        "rate early": odds * in_early,
        "rate differs": odds * differs,
        "rate support": odds * support,
    }
    return np.asarray(sum(_POSTERIOR[name] * term for name, term in terms.items()))

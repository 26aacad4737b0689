"""Which labels are wrong, how many, how sure that is, and whether this run can tell at all.

A vote such as "the run would rather have another label" says how long was trained and how hard the task is. Here the
labels of the others speak, read from features that have not yet learnt the example's own (``training.evidence``): their
confident joint with the given labels (Northcutt et al. 2021, 1911.00068) tells how many labels are wrong, the audit's
ranking which. Where even the surest of them contradict no more labels than chance would, nobody can tell.

Index legend: ``n`` examples, ``c`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_influence.training.class_shares import ClassShares
from lightning_influence.training.evidence import LabelEvidence

Matrix = NDArray[np.float64]

# Of the examples that look most like each class, those labelled otherwise, as a share of the noise rate: where labels
# are wrong at random. Fewer where classes overlap (or the features are late ones), more where no class is told apart.
_LEAST, _LEAST_LATE, _MOST = 0.9, 0.5, 1.75
# How many are asked, as shares of a class: more tell more surely, fewer are easier to tell.
_ASKED = (1 / 2, 1 / 4)
# More wrong labels are not believed in: most of what a run sees must be right.
_TOO_MANY = 0.45
# So few wrong labels are none to be feared, whoever they are.
_FEW = 0.05
# Accuracy, below that of the belief, from which untrained features are of no use.
_USELESS = 0.10
# A label that nothing contradicts counts so much where the features are not sure of it either.
_UNSURE = 0.5
# The joint is kept for up to so many classes.
_JOINT = 100
# Where the run cannot tell, no label is called wrong with more probability than this.
DOUBT = 0.45
_ROWS = 2**12
_EVIDENCE = ("early", "late", "first", "trained")
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
    early, late, first, trained = (getattr(evidence, name) for name in _EVIDENCE)
    known = (labels >= 0) & (early.totals() > 0).numpy()
    if not known.any() or early.classes < 2:
        return LabelBeliefs(reason="nothing was recorded that tells labels apart"), columns
    given = labels[known]
    if (given == given[0]).all():
        return LabelBeliefs(reason="all given labels are the same"), columns
    if not known.all():
        rows = torch.from_numpy(known.nonzero()[0])
        early, late, first, trained = (shares.some(rows) for shares in (early, late, first, trained))
    n = len(given)
    joint = _confident_joint(early, given)
    differs = early.first() != given
    rate = float(min(1 - np.trace(joint) / n, differs.mean()))
    beliefs = _verdict(first, early, given, rate, joint)
    nobodys, suggested = np.bincount(given, minlength=early.classes) == 0, []
    for soon, later, run, own in _blocks(early, late, trained, given):
        others = _without(soon + later + 1e-9 * run, own)  # the run breaks ties
        others[:, nobodys] = -np.inf
        suggested.append(np.where(np.isfinite(others).any(1), others.argmax(1), -1))
    columns["suggested"][known] = np.concatenate(suggested)
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


def _blocks(*tables: ClassShares | NDArray[Any]) -> Iterator[list[NDArray[Any]]]:
    """Yield some rows of each at a time, shares in float64: evidence is most of the memory, and kept in float32."""
    size = next(table.size for table in tables if isinstance(table, ClassShares))
    for start in range(0, size, _ROWS):
        parts = (table[start : start + _ROWS] for table in tables)
        yield [part.double().numpy() if isinstance(part, Tensor) else part for part in parts]


def _own(shares: Matrix, given: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(shares[np.arange(len(given)), given], np.float64)


def _best_other(shares: ClassShares, given: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.concatenate([_without(part, own).max(1) for part, own in _blocks(shares, given)])


def _without(shares: Matrix, given: NDArray[np.int64]) -> Matrix:
    """Return a copy in which the given labels are out of the question."""
    others = shares.copy()
    others[np.arange(len(given)), given] = -np.inf
    return others


def _confident_joint(shares: ClassShares, given: NDArray[np.int64]) -> Matrix:
    """Return how many examples of each given class (rows) are probably of each class (columns).

    Another class is probable where its share is as large as usual among those labelled so, and larger than that of the
    given one: where most of a small class's labels are wrong, its usual share is so small that anybody reaches it.
    """
    classes = shares.classes
    sizes, own = np.bincount(given, minlength=classes), shares.of_labels(given)
    usual = np.bincount(given, own, minlength=classes) / np.maximum(sizes, 1)
    joint = np.zeros((classes, classes))
    for part, labels in _blocks(shares, given):
        held = _own(part, labels)
        others = np.where((part >= usual) & (part > held[:, None]) & (sizes > 0), part, -1.0)
        contradicted, sure = others.max(1) >= 0, held >= usual[labels]
        counts = np.where(contradicted | sure, 1.0, np.where(held >= part.max(1), _UNSURE, 0.0))
        np.add.at(joint, (labels, np.where(contradicted, others.argmax(1), labels)), counts)
    counted = joint.sum(1)
    joint[counted == 0] = np.diag(sizes)[counted == 0]
    scaled: Matrix = joint * (sizes / np.maximum(joint.sum(1), 1))[:, None]
    return scaled


def _verdict(
    first: ClassShares, early: ClassShares, given: NDArray[np.int64], rate: float, joint: Matrix
) -> LabelBeliefs:
    """Tell whether a run can tell.

    Of every class, the examples are asked that look most like it: half and a quarter as many as its labels that are
    believed to be right. Where labels are wrong at random, as many of theirs are as of any. Where classes overlap,
    fewer: those that are easy to tell are right. Where a class is not told from others, more: nobody looks like it.
    Where next to no label looks wrong, those that are hard to tell do not count.
    """
    likeliest = early.first()
    differs = likeliest != given
    there = (first.totals() > 0).numpy()  # before some examples turned up
    gained = (first.first() != given)[there].sum() - differs[there].sum()  # labels that early features uphold more
    late = gained >= _USELESS * there.sum()
    shares, labels = (early, given) if late else (first.some(torch.from_numpy(there.nonzero()[0])), given[there])
    sizes, labelled = (np.bincount(some, minlength=len(joint)) for some in (given, labels))
    right = np.diag(joint) / np.maximum(sizes, 1)
    asked = [_contradicted(shares, labels, share * right * labelled, labelled) for share in _ASKED]
    surest = float(np.mean(asked))
    unlike = _contradicted(early, given, max(_ASKED) * right * sizes, sizes)
    kept = joint if len(joint) <= _JOINT else None
    if rate <= _FEW:
        predicted = np.bincount(likeliest, minlength=len(joint))
        rate = min(rate, _contradicted(early, given, min(_ASKED) * predicted, predicted))
        return LabelBeliefs("told", "", rate, *_interval(rate, differs.mean(), len(given)), rate, kept)
    low, high = _interval(rate, differs.mean(), len(given))
    found = LabelBeliefs("told", "", rate, low, high, min(*asked, rate), kept)
    looks = f"{rate:.1%} of the labels look wrong"
    if rate > _TOO_MANY:
        reason = f"{looks}: the network has learnt too little to tell them from right ones"
    elif surest < (_LEAST_LATE if late else _LEAST) * rate:
        reason = (
            f"{looks}, but among the examples that are easiest to tell only {surest:.1%} do: the classes overlap, or "
            "the network has learnt mistakes that are no accident"
        )
    elif unlike > _MOST * rate:
        reason = (
            f"{looks}, but of the examples that look most like each class {unlike:.1%} are labelled otherwise: some "
            "class cannot be told from the others"
        )
    else:
        return found
    return replace(found, verdict="cannot tell", reason=reason, noise_rate=min(surest, rate), low=0.0, surest=0.0)


def _contradicted(
    shares: ClassShares, given: NDArray[np.int64], asked: NDArray[Any], weights: NDArray[np.int64]
) -> float:
    """Return the share of other labels among the ``asked`` examples that look most like each class, weighted."""
    two, predicted, by_class, total = shares.two_largest().double().numpy(), shares.first(), shares.by_class(), 0.0
    for own in np.flatnonzero(weights):
        rows, held = by_class(int(own))
        labels = given[rows]
        if not len(labels):  # nobody looks like it
            total += float(weights[own])
            continue
        number = min(max(int(np.ceil(asked[own])), 1), len(labels))
        lead = held.double().numpy() - np.where(predicted[rows] == own, two[rows, 0], two[rows, 1])
        most = np.argpartition(-lead, number - 1)[:number]
        total += float(weights[own] * (labels[most] != own).mean())
    return total / float(weights.sum())


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
    early: ClassShares,
    late: ClassShares,
    trained: ClassShares,
    differs: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return the log odds that each label is wrong, from its place in the ranking (0 first, 1 last) and the rest."""
    odds = np.log((rate + 0.003) / (1 - rate + 0.003))
    depth = np.clip(np.log((places + 0.003) / (rate + 0.003)), -3, 3)
    in_early, in_late = (
        np.log((shares.of_labels(given) + 0.02) / (_best_other(shares, given) + 0.02)) for shares in (early, late)
    )
    support = trained.of_labels(given) - _best_other(trained, given)
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

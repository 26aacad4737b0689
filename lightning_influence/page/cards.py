"""The figures of an audit that stand at the top of the page, ready to be read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning_influence.audit.report import AuditReport

_NAMES = {"kfac": "K-FAC", "ekfac": "EK-FAC", "ggn": "GGN", "block_ggn": "block GGN"}


def cards(report: AuditReport) -> list[dict[str, str]]:
    """Return title, value and note of each card; what an audit does not know has no card."""
    found = [
        *_examples(report),
        *_candidates(report),
        *_noise(report),
        *_cost(report.manifest),
        *_damping(report.manifest),
        *_methods(report.manifest),
        *_weights(report.manifest),
        *_detection(report.manifest),
    ]
    return [{"title": title, "value": value, "note": note} for title, value, note in found]


Card = Iterator[tuple[str, str, str]]


def _examples(report: AuditReport) -> Card:
    coverage = report.manifest.get("coverage") or {}
    yield "examples", f"{len(report):,}", str(coverage.get("summary", ""))
    if count := len(report.nonfinite):
        yield "non-finite", f"{count:,}", "a loss or gradient that is no number: look at their inputs first"


def _candidates(report: AuditReport) -> Card:
    if report.status != "complete" or "suspicion" not in report.columns:
        return  # there are none as long as a run is not over
    count, note = len(report.candidates), ""
    if report.manifest.get("labels") and "label" in report.columns:
        advised = report.advice()
        if len(advised):
            share = advised.expected / len(advised)
            note = f"{len(advised):,} are sure enough to act on; expected precision {share:.0%}"
        else:
            note = advised.reason if report.beliefs.told else "none is sure enough to be named; the ranking is there"
    yield "candidates", f"{count:,}", note or f"{count / max(len(report), 1):.1%} of the examples"


def _noise(report: AuditReport) -> Card:
    if not report.manifest.get("labels"):
        return
    believed = report.beliefs
    if not believed.told:
        yield "wrong labels", "can't tell", believed.reason
        return
    between = f"{believed.low:.1%} to {believed.high:.1%}" if math.isfinite(believed.low + believed.high) else ""
    yield "wrong labels", f"{believed.noise_rate:.1%}", f"estimated; {between or 'no interval'}"


def _cost(manifest: Mapping[str, Any]) -> Card:
    seconds = {name: value for name, value in (manifest.get("seconds") or {}).items() if value is not None}
    if seconds:
        longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
        yield "cost", _time(sum(seconds.values())), ", ".join(f"{name} {_time(seconds[name])}" for name in longest)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _damping(manifest: Mapping[str, Any]) -> Card:
    swept = manifest.get("damping_sweep") or {}
    told = [value for value in swept.get("stability", ()) if value is not None]
    if told:
        low, high = min(swept["factors"]), max(swept["factors"])
        yield (
            "damping stability",
            f"{min(told):.3f}",
            f"least rank correlation of self-influence, {low:g} to {high:g} times the damping",
        )


def _methods(manifest: Mapping[str, Any]) -> Card:
    name = (manifest.get("curvature") or {}).get("name")
    if name:
        ranked = ", ".join(manifest.get("ranked_by") or ())
        yield "curvature", _NAMES.get(str(name), str(name)), f"ranked by {ranked}" if ranked else ""


def _weights(manifest: Mapping[str, Any]) -> Card:
    told = (manifest.get("audited_weights") or {}).get("told")
    step = manifest.get("step")
    if told or step is not None:
        after = f"step {step:,}" if isinstance(step, int) else ""
        note = str(told or "") if after else ""
        yield "weights audited", after or str(told), note.replace(f", {after}", "")  # once is enough


def _detection(manifest: Mapping[str, Any]) -> Card:
    about = (manifest.get("detection") or {}).get("suspicion") or {}
    if about.get("auroc") is not None and np.isfinite(about["auroc"]):
        recall = about.get("recall_at")
        note = "against the known label noise" + ("" if recall is None else f"; {recall:.0%} in the first 10%")
        yield "AUROC", f"{about['auroc']:.3f}", note

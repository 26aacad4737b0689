"""What can be asked of the callback once its audit is done."""

from __future__ import annotations

from lightning_influence.audit.report import AuditReport
from lightning_influence.audit.unlearning import Unlearner
from lightning_influence.callbacks.from_child import FromChild
from lightning_influence.callbacks.lightning import AuditCallback
from lightning_influence.callbacks.run import AuditRun
from lightning_influence.curvature import CurvatureName
from lightning_influence.influence import Influence

WITHOUT_TRAINING = "`InfluenceAudit.audit(model, data, ckpt_path=...)` audits a model without training it"
"""What to say where a training ends without an audit."""


class Answers(AuditCallback):
    """The report, and what else the model and its training data can be asked."""

    def __init__(self) -> None:
        self._report: AuditReport | None = None
        self._no_report = f"`trainer.fit` has not run with this callback; {WITHOUT_TRAINING}"
        self._child = FromChild()
        # From the start of training until the next `fit`.
        self._run: AuditRun | None = None

    @property
    def report(self) -> AuditReport:
        """The audit, once training has ended.

        Raises:
            RuntimeError: If there is none, with the reason.
        """
        if not self.has_report or self._report is None:
            raise RuntimeError(f"there is no report: {self._no_report}. `has_report` tells whether there is one.")
        return self._report

    @property
    def has_report(self) -> bool:
        """Whether there is a ``report``: on rank zero, once training has ended and the audit has not failed."""
        if (told := self._child.taken()) is not None:
            self._report, self._no_report = told
        return self._report is not None

    def influence(self, curvature: CurvatureName = "ggn") -> Influence:
        """Return everything else that can be asked of the model and its training data, as ``Influence`` does.

        The curvature is fitted with the audit's arguments, at the weights that the model has now, so load the weights
        that are meant first. With several processes, call it on all of them.

        Args:
            curvature: For removal and repair, the GGN comes closest to retraining; Kronecker factors with their
                relative damping, good for ranking, step far too wide (``benchmarks/unlearning.py``).

        Raises:
            RuntimeError: Before an audit is complete.
            ValueError, IndefiniteError: As ``Influence.fit``.

        Example:
            >>> update = audit.influence().remove(audit.report.candidates[:10], leverage=True)
            >>> cleaner = update.applied_to_copy(model)
        """
        if self._run is None or self._run.make_influence is None:
            raise RuntimeError(
                "training ran in processes of its own, which are gone with what they had set up: call `audit(model, "
                "data)` first, which audits the model as it is now, in this process."
                if self.has_report
                else "there is no complete audit yet; let `trainer.fit` end first."
            )
        return self._run.make_influence().fit(**{**self._run.arguments.fitting, "curvature": curvature})

    def unlearner(self, curvature: CurvatureName = "ggn") -> Unlearner:
        """Return removal and repair alone; see ``influence``."""
        found = self.influence(curvature)
        return Unlearner(
            found.training, found.curvature, found.examples, labels=found.labels, weight_decay=found.weight_decay
        )

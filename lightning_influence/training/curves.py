"""How training went for each example, epoch by epoch, from the sums that the dynamics keep anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.core import distributed
from lightning_influence.training.dynamics import RIVAL, TrainingDynamics
from lightning_influence.training.example_sums import lengthened

CURVES = ("loss", "margin", "probability")
"""What there may be a curve of: the example's loss, the logit of its given label minus the largest other, and the
probability of its given label; each the mean over its visits in the epoch and over its class decisions."""

_MOST_EPOCHS = 64
_BUDGET = 2**28  # bytes of all epochs
_COUNT = "times_seen"
_ENTRY = 4  # bytes of float32


class CurveRecord:
    """Differences between what the dynamics had summed up at the ends of epochs.

    Over 64 epochs, or 256 MB, every second one is given up, and every second of those that follow: what is kept lies
    evenly, and the last epoch is always there.

    Args:
        dynamics: Whose sums they are.

    Attributes:
        kept: Epoch to curve name to values ``[size]``, float32, NaN for examples that were not trained on in it; and
            to ``rival``, by which the probability of the suggested label is known once there is one.
        missing: Epochs that were recorded before training was resumed, and are not in memory so far.
        epoch: The one that is going on.
    """

    def __init__(self, dynamics: TrainingDynamics) -> None:
        self._dynamics = dynamics
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.missing: list[int] = []
        self.epoch = 0
        self._stride = 1
        self._before: dict[str, Tensor] = {}

    def begin(self, epoch: int) -> None:
        """Go on with an epoch; one that a checkpoint was written at the very end of is ended."""
        if epoch != self.epoch:
            self.end(self.epoch)
        self.epoch = epoch

    def end(self, epoch: int) -> None:
        """Keep what was summed up since the last epoch ended, by all processes if they have told each other."""
        since = self._since()
        self._before = self._totals()
        count = since.pop(_COUNT, torch.zeros(0))
        if not bool((count > 0).any()):
            return
        visits = torch.where(count > 0, count, torch.nan)
        curves = {name: (total / visits).float() for name, total in since.items()}
        if RIVAL in self._dynamics.sums:
            rival = self._dynamics.sums[RIVAL].float()
            # Of an example that several processes have visited it is a mean, which means nothing.
            known = (rival >= 0) & ((count == 1) | ((count > 0) & (distributed.world_size() == 1)))
            curves[RIVAL] = torch.where(known, rival, torch.nan)
        self.kept = {known: values for known, values in self.kept.items() if self._lasts(known)} | {epoch: curves}
        most = max(2, min(_MOST_EPOCHS, _BUDGET // (_ENTRY * (len(CURVES) + 1) * max(self._dynamics.size, 1))))
        while len(self.kept) + len(self.missing) > most:
            self._stride *= 2
            self.kept = {k: values for k, values in self.kept.items() if self._lasts(k) or k == epoch}
            self.missing = [k for k in self.missing if self._lasts(k)]

    def lasting(self) -> dict[int, dict[str, Tensor]]:
        """Return those that the next epoch does not replace."""
        return {epoch: values for epoch, values in self.kept.items() if self._lasts(epoch)}

    def _lasts(self, epoch: int) -> bool:
        return epoch % self._stride == 0

    def restore(self, found: Mapping[int, Mapping[str, Tensor]]) -> list[int]:
        """Take over the curves before training was resumed, read from files; return the epochs that are not there."""
        size = self._dynamics.size
        usable = {
            epoch: {name: lengthened(values, size, torch.nan) for name, values in found[epoch].items()}
            for epoch in self.missing
            if epoch in found and all(len(values) <= size for values in found[epoch].values())
        }
        lost = [epoch for epoch in self.missing if epoch not in usable]
        self.kept, self.missing = usable | self.kept, []
        return lost

    def grow(self, size: int) -> None:
        """Have room for more examples."""
        for curves in self.kept.values():
            curves |= {name: lengthened(values, size, torch.nan) for name, values in curves.items()}
        self._before = {name: lengthened(total, size) for name, total in self._before.items()}

    def _totals(self) -> dict[str, Tensor]:
        self._dynamics.flush()
        sums = self._dynamics.sums
        return {name: sums[name].clone() for name in (_COUNT, *CURVES) if name in sums}

    def _since(self) -> dict[str, Tensor]:
        return {name: total - self._before.get(name, 0.0) for name, total in self._totals().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what is not in files: of an epoch that goes on 16 bytes an example, and nothing else that grows."""
        since = self._since()
        begun = _COUNT in since and bool((since[_COUNT] > 0).any())
        return {
            "epochs": sorted({*self.lasting(), *self.missing}),
            "epoch": self.epoch,
            "stride": self._stride,
            "since": {name: values.float() for name, values in since.items()} if begun else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, once the dynamics have; curves begin now if it is of an earlier version."""
        self.kept, self.missing = {}, list(state.get("epochs", ()))
        self.epoch, self._stride = state.get("epoch", self.epoch), state.get("stride", 1)
        since = state.get("since", {})
        self._before = {name: total - since.get(name, 0.0) for name, total in self._totals().items()}

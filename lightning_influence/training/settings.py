"""How TracIn is computed along a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_influence.core.errors import check_count, is_number, short
from lightning_influence.gradients.coverage import Layers, listed_layers

Mode = Literal["auto", "epoch", "step"]


def check_overhead(value: object) -> None:
    """Raise ``ValueError`` unless this is a share of the training time, or None."""
    if value is not None and not is_number(value, above=0):
        raise ValueError(f"overhead={short(value)}; expected a share of the training time > 0, such as 0.1, or None.")


@dataclass(frozen=True)
class TracIn:
    """How TracIn is computed during training.

    Attributes:
        mode: ``"epoch"``: at ends of epochs, one pass over the training data scores every example at the weights of
            the moment. ``"auto"``: the same at as many ends of epochs as the callback's ``overhead`` leaves room for,
            eight at most, evenly spaced; the steps between two count with the later one. ``"step"``: in flight, from
            the training pass itself: every example counts ``η_t ‖g‖²`` at each step that trains on it, with the
            gradient of that very pass (its dropout and its augmentation included, before clipping). No pass over the
            data is added.
        every_n_epochs: Epochs between checkpoints: between passes in mode ``"epoch"``, between kept checkpoints in
            mode ``"step"``; not in mode ``"auto"``, which finds it out.
        every_n_steps: Mode ``"step"`` only: of so many consecutive batches one is measured, drawn at random from a
            stream of its own. An example's sum over its measured visits is scaled by its number of visits over
            that of the measured ones; it is NaN if none was measured.
        layers: Mode ``"step"`` only: layers to measure, as the callback's ``layers``, a part of those; the scores are
            then about these layers. None for all.
        overhead: Largest share of the training time to add, such as 0.1, the training dynamics included; never more
            than the callback's ``overhead``. In mode ``"step"`` the first batches are timed with and without, and
            ``every_n_steps`` is raised as far as needed; the audit's notes say to what. Mode ``"auto"`` counts the
            whole audit, and has the callback's by default. Not in mode ``"epoch"``.
        keep_checkpoints: Number of checkpoints to keep in the audit directory, for scores of pairs; 0 for none.
            With more, those that are left stay spread evenly over the training, and the step sizes of a dropped one
            count towards the next.
        keep_bytes: Bytes that they may take together.

    Raises:
        ValueError: If a value is out of range, or is about the other mode.

    Example:
        >>> InfluenceAudit(tracin=TracIn(mode="step", overhead=0.1))
    """

    mode: Mode = "epoch"
    every_n_epochs: int = 1
    every_n_steps: int = 1
    layers: Layers = None
    overhead: float | None = None
    keep_checkpoints: int = 10
    keep_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={short(self.mode)}; expected one of {', '.join(map(repr, get_args(Mode)))}.")
        # Numbers of numpy would make the Trainer's checkpoint unreadable with `weights_only`.
        for name, least in (("every_n_epochs", 1), ("every_n_steps", 1), ("keep_checkpoints", 0), ("keep_bytes", 0)):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=least))
        check_overhead(self.overhead)
        object.__setattr__(self, "overhead", None if self.overhead is None else float(self.overhead))
        asked = ["layers"] if self.layers is not None else []
        asked += ["overhead"] if self.overhead is not None and self.mode == "epoch" else []
        asked += ["every_n_steps"] if self.every_n_steps != 1 else []
        if self.mode != "step" and asked:
            raise ValueError(f'{asked[0]}={getattr(self, asked[0])!r} is about TracIn in flight; pass mode="step".')
        if self.mode == "auto" and self.every_n_epochs != 1:
            raise ValueError(
                f'every_n_epochs={self.every_n_epochs} is what mode="auto" finds out; pass mode="epoch" to set it.'
            )

    def described(self) -> dict[str, Any]:
        """Return the settings in primitives."""
        layers = None if self.layers is None else [getattr(e, "__name__", e) for e in listed_layers(self.layers)]
        return {**vars(self), "layers": layers}

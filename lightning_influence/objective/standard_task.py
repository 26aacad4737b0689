"""``task="classification"`` and its kin: the plain loss of a model's outputs, for the labels of the batch.

For steps that mix examples (mixup, CutMix) or do more than there is a loss for: what is audited is then the loss of
each example alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.core.torch_private import ahead_of
from lightning_influence.objective.scale import TaskError

TaskName: TypeAlias = Literal["classification", "binary", "regression"]
_LABELS = ("labels", "label", "y", "target", "targets")
_INPUTS = (
    *("x", "input", "inputs", "image", "images", "img", "pixel_values", "input_values", "input_features"),
    *("input_ids", "tokens", "features", "data"),
)
_WRITE = "write it out: `task=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])`"


class _Parts(NamedTuple):
    """A batch, taken apart: what the model is called with, the labels, and both as code."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor
    call: str
    label: str


class StandardTask:
    """The mean loss of a model's outputs for the labels of a batch.

    The batch is ``(inputs, labels)`` or a mapping with usual names (``x``, ``image``, ``pixel_values``, ``input_ids``;
    ``label``, ``labels``, ``y``, ``target``); what a mapping has under the names of ``forward``'s arguments is passed
    by name. Outputs may have ``logits``. One output for each example, and labels of 0 and 1, make a binary loss.

    Args:
        name: ``"classification"``, ``"binary"`` or ``"regression"``.
        within: Keys that lead to the batch in what it is given, which holds one of each loader.
    """

    def __init__(self, name: TaskName, within: Sequence[Any] = ()) -> None:
        self.name = self.__name__ = name
        self.within = within

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """Return the loss.

        Raises:
            TaskError: If inputs, labels or outputs are not to be found, or do not fit.
        """
        parts = _parts(module, reduce(getitem, self.within, batch))
        found = module(*parts.args, **parts.kwargs)
        outputs = _outputs(found)
        labels = parts.labels
        if self.name == "classification" and "input_ids" in parts.kwargs:
            ids = parts.kwargs["input_ids"]
            if labels.shape == ids.shape and bool(((labels == ids) | (labels == -100)).all()):
                raise TaskError(
                    f"`{parts.label}` are the tokens themselves, so the model is trained on the next ones; expected "
                    f"labels of their own for task={self.name!r}: pass a function (module, batch) -> loss."
                )
        if self.name == "regression":
            return F.mse_loss(outputs, _shaped(labels, outputs, self.name).to(outputs.dtype))
        one = outputs.numel() == labels.numel() == len(labels)
        if self.name == "binary" or (one and not _is_soft(labels, outputs)):
            return _binary(outputs, _shaped(labels, outputs, self.name))
        return _cross_entropy(outputs, labels)

    def written_out(self, module: Any, batch: Any) -> str:
        """Return what it computes for such batches, as code."""
        place = "".join(f"[{json.dumps(key)}]" for key in self.within)
        return self._code(module, reduce(getitem, self.within, batch)).replace("batch[", f"batch{place}[")

    def _code(self, module: Any, batch: Any) -> str:
        parts = _parts(module, batch)
        with torch.enable_grad():
            found = module(*parts.args, **parts.kwargs)
        outputs, labels = _outputs(found), parts.labels
        call = parts.call + ("" if isinstance(found, Tensor) else ".logits" if hasattr(found, "logits") else "[0]")
        one = outputs.numel() == labels.numel() == len(labels)
        if self.name != "classification" or (one and not _is_soft(labels, outputs)):
            call += "" if outputs.shape == labels.shape else f".reshape({parts.label}.shape)"
            if self.name == "regression":
                return f"F.mse_loss({call}, {parts.label})"
            suffix = "" if _made_by(outputs, "Sigmoid") else "_with_logits"
            return f"F.binary_cross_entropy{suffix}({call}, {parts.label}.float())"
        call += ".log()" if _made_by(outputs, "Softmax") else ""
        if outputs.ndim > 2 and labels.shape == outputs.shape[:-1]:
            call += ".movedim(-1, 1)"
        column = labels.ndim == outputs.ndim and labels.shape[1] == 1
        return f"F.cross_entropy({call}, {parts.label}{'.squeeze(1)' if column else ''})"


def checked_task(task: Any) -> Any:
    """Return the task that a word stands for; raise ``ValueError`` for any other word."""
    if not isinstance(task, str):
        return task
    if task not in get_args(TaskName):
        names = ", ".join(f'"{name}"' for name in get_args(TaskName))
        raise ValueError(f"task={task!r}; expected one of {names}, or a function (module, batch) -> loss.")
    return StandardTask(task)  # type: ignore[arg-type]


def suggested(module: nn.Module, batch: Any) -> str | None:
    """Return the line that passes the plain loss of such batches as the task, and its short form; None without any.

    What is returned has been run on the batch.
    """
    try:
        labels = _parts(module, batch).labels
        whole = not labels.is_floating_point() or bool(((labels == 0) | (labels == 1)).all())
        mixed = labels.ndim == 2 and labels.shape[1] > 1 and bool((labels >= 0).all())
        mixed = mixed and bool(torch.isclose(labels.sum(1), labels.new_ones(()), atol=1e-3).all())
        task = StandardTask("classification" if whole or mixed else "regression")
        code = task.written_out(module, batch)
        with torch.no_grad():
            task(module, batch)
    except Exception:  # whatever the model makes of it: there is no such line then
        return None
    return f'`InfluenceAudit(task=lambda module, batch: {code})`, in short `task="{task.name}"`'


def _parts(module: Any, batch: Any) -> _Parts:
    parameters = inspect.signature(module.forward).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL}
    if isinstance(batch, Mapping):
        label = next((name for name in _LABELS if isinstance(batch.get(name), Tensor)), None)
        if label is None:
            raise TaskError(
                f"no labels among {sorted(map(str, batch))}; expected one of {', '.join(_LABELS)}: {_WRITE}."
            )
        code = f'batch["{label}"]'
        if named == {"batch"}:
            return _Parts((batch,), {}, batch[label], "module(batch)", code)
        others = [name for name in batch if name not in _LABELS]
        by_name = [name for name in others if name in named]
        if not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters):
            by_name = [name for name in others if isinstance(batch[name], Tensor)]
        if by_name:
            listed = ", ".join(f'{name}=batch["{name}"]' for name in by_name)
            return _Parts((), {name: batch[name] for name in by_name}, batch[label], f"module({listed})", code)
        key = next((name for name in _INPUTS if name in others), others[0] if len(others) == 1 else None)
        if key is None:
            raise TaskError(
                f"which of {others} are the inputs is not known; expected one of {', '.join(_INPUTS)}: {_WRITE}."
            )
        return _Parts((batch[key],), {}, batch[label], f'module(batch["{key}"])', code)
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise TaskError(f"the batch is a {type(batch).__name__}; expected (inputs, labels) or a mapping: {_WRITE}.")
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    count = len(required) if len(required) == len(batch) - 1 else 1
    if not isinstance(batch[count], Tensor):
        raise TaskError(f"`batch[{count}]` is a {type(batch[count]).__name__}; expected a tensor of labels: {_WRITE}.")
    listed = ", ".join(f"batch[{k}]" for k in range(count))
    return _Parts(tuple(batch[:count]), {}, batch[count], f"module({listed})", f"batch[{count}]")


def _outputs(found: Any) -> Tensor:
    if isinstance(found, (tuple, list)) and not hasattr(found, "logits"):
        found = found[0] if found else None
    elif isinstance(found, Mapping):
        found = found.get("logits")
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise TaskError(
            f"the model returned a {type(found).__name__}; expected logits, or an object with `logits`: {_WRITE}."
        )
    return found


def _made_by(outputs: Tensor, function: str) -> bool:
    """Tell whether outputs are the probabilities that a function makes: through squeezes, which change nothing."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(("Squeeze", "View", "Select", "Unsqueeze")):
        node = ahead_of(node)[0][0]
    return node is not None and node.name().startswith(function)


def _is_soft(labels: Tensor, outputs: Tensor) -> bool:
    return labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1 and labels.shape == outputs.shape


def _shaped(labels: Tensor, outputs: Tensor, name: str) -> Tensor:
    """Return labels in the shape of the outputs, from which dimensions of size 1 may be missing."""
    if [size for size in labels.shape if size > 1] != [size for size in outputs.shape if size > 1]:
        raise TaskError(
            f"outputs {tuple(outputs.shape)} do not fit labels {tuple(labels.shape)} for task={name!r}; expected one "
            f"output for each label: {_WRITE}."
        )
    return labels.reshape(outputs.shape)


def _binary(outputs: Tensor, labels: Tensor) -> Tensor:
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise TaskError(
            f"labels are between {float(labels.min()):g} and {float(labels.max()):g} where the model has one output "
            'for each; expected 0 and 1, or `task="regression"`.'
        )
    if _made_by(outputs, "Sigmoid"):
        return F.binary_cross_entropy(outputs, labels.to(outputs.dtype))
    return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype))


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    if _made_by(outputs, "Softmax"):
        outputs = outputs.log()
    if labels.ndim == outputs.ndim > 1 and labels.shape[1] == 1 and not labels.is_floating_point():
        labels = labels.squeeze(1)
    if not (_is_soft(labels, outputs) or not labels.is_floating_point()):
        raise TaskError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for outputs {tuple(outputs.shape)}; expected "
            'integers, or a distribution for each output; `task="regression"` takes numbers.'
        )
    first = labels.shape == (outputs.shape[0], *outputs.shape[2:])
    if not first and labels.shape == outputs.shape[:-1]:
        outputs = outputs.movedim(-1, 1)
    elif not first and not _is_soft(labels, outputs):
        raise TaskError(
            f"outputs {tuple(outputs.shape)} do not fit labels {tuple(labels.shape)}; expected [n, classes, ...] and "
            f"[n, ...]: {_WRITE}."
        )
    return F.cross_entropy(outputs, labels if labels.is_floating_point() else labels.long())

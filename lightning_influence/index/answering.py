"""Questions about new examples, answered by an index: with the model, without its training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_influence.core.errors import check_count, short
from lightning_influence.core.progress import shown
from lightning_influence.core.weights import parameters_of
from lightning_influence.curvature.saved import Saved, restored
from lightning_influence.data.at_hand import BatchSource
from lightning_influence.data.given import Data, Indices, positions, source_of
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.index.coding import CodedQueries, Coder, Layout
from lightning_influence.index.files import DIGEST, ExampleIndexError, read_about, read_layout, read_shards
from lightning_influence.index.search import Search
from lightning_influence.index.writer import coded_queries, digests, told
from lightning_influence.objective.given import Loss, check_model, task_of
from lightning_influence.objective.scale import LossScale, TermKey
from lightning_influence.objective.task import Task
from lightning_influence.objective.terms import TermForm
from lightning_influence.scores.pairs import PairwiseScores, TopScores
from lightning_influence.scores.queries import run_on_queries

Order = Literal["none", "relative"]
"""What the strongest are the strongest by: their scores, or these over the root of the example's self-influence."""

# Of the gradients of queries that are held at a time.
_QUERY_BYTES = 2**30


@dataclass(frozen=True, eq=False, repr=False)
class Answers(TopScores):
    """Answers of an index.

    Attributes:
        told: ``loss``, ``label`` and ``predicted`` of the queries ``[q]``, as far as the loss tells.
    """

    told: dict[str, Tensor] = field(default_factory=dict)


class ExampleIndex:
    """The gradients of training examples on disk, curvature-weighted and compressed; see ``docs/pairs.md``.

    Get it from ``report.index``, ``Influence.index`` or ``open_index``. Nothing but the model is needed for answers,
    with the weights that the index was made at.

    Args:
        folder: Where it lies.
        factors: Reads the curvature that lies beside it.

    Attributes:
        about: Its size, and how its scores compare with exact ones.

    Raises:
        ExampleIndexError: If there is none, or it can't be read.
    """

    def __init__(self, folder: Path, factors: Callable[[], Saved]) -> None:
        self.folder, self.about = folder, read_about(folder)
        self._factors = factors
        self._shards = read_shards(folder, self.about["sizes"])
        tensors = read_layout(folder)
        self._projection = tensors.pop("projection")
        self.layout = Layout.of_tensors(tensors, self.about["whole"], self.about["prefix"])

    def __len__(self) -> int:
        """Return the number of training examples."""
        return int(self.about["examples"])

    def __repr__(self) -> str:
        return f"ExampleIndex({len(self):,} examples, {self.about['numbers']:,} numbers each, {str(self.folder)!r})"

    def __str__(self) -> str:
        return told(self.about)

    @cached_property
    def examples(self) -> Tensor:
        """Dataset indices of the training examples ``[n]``, in the order in which they lie."""
        return torch.from_numpy(np.concatenate([shard.examples["index"] for shard in self._shards]))

    def ask(
        self,
        model: nn.Module,
        batch: Any,
        k: int = 10,
        *,
        loss: Loss | None = None,
        indices: Indices | None = None,
        normalise: Order = "none",
        within: Data | None = None,
        everything: bool | None = None,
    ) -> Answers:
        """Return the training examples that help and harm new examples most.

        Args:
            model: With the weights that the index was made at. It is left as it is.
            batch: What its training step takes; or a data set, or a ``DataLoader``.
            k: How many proponents and opponents of each.
            loss: What it was trained on, as for ``Influence``; None for its ``training_step``.
            indices: Which examples of the batch or data set; all by default.
            normalise: ``"none"``, the strongest; or ``"relative"``, the most specific: by the score over the root of
                the training example's self-influence, which is given then.
            within: A data set that holds the training examples in another order, or some of them: indices are then
                those that they have in it, -1 for examples that it lacks. They are known by what they hold.
            everything: Whether to multiply queries with all examples instead of with those that a search finds; by
                default where that takes no longer than a few seconds.

        Returns:
            As ``Influence.top``; queries are numbered as in the batch.

        Raises:
            ValueError: For another model, other weights, other layers, a batch without examples, ``k`` beyond the
                number of training examples, or an index that does not tell examples by what they hold.
            QueryError: If the loss can't be computed on the queries.
        """
        self._check(k, normalise)
        names = self.examples if within is None else self.places_in(within)
        found: list[tuple[Tensor, Tensor]] = []
        order: list[int] = []
        said: list[Mapping[str, Tensor]] = []
        search: Search | None = None
        for chosen, coder, queries in self._asked(model, batch, loss, indices):
            search = search or Search(coder, self._shards, self._projection)
            best = search.strongest(queries, k, relative=normalise == "relative", everything=everything)
            found.append((best.scores.double(), names[best.rows].masked_fill(best.rows < 0, -1)))
            order += chosen
            said.append(queries.told)
        top = TopScores.of(order, found)
        top.notes.append(told(self.about))
        names_told = set.intersection(*(set(each) for each in said))
        return Answers(**vars(top), told={name: torch.cat([each[name] for each in said]) for name in names_told})

    def scores(
        self, model: nn.Module, batch: Any, *, loss: Loss | None = None, indices: Indices | None = None
    ) -> PairwiseScores:
        """Return the scores of new examples with all training examples; arguments as for ``ask``."""
        order: list[int] = []
        parts: list[Tensor] = []
        for chosen, coder, queries in self._asked(model, batch, loss, indices):
            every = Search(coder, self._shards, self._projection).all_scores(queries)
            found = torch.cat([part for _, part in every], 1).double()
            parts.append(found.masked_fill(~queries.finite.unsqueeze(1), torch.nan))
            order += chosen
        examples, places = self.examples.sort()
        scores = torch.cat(parts)[:, places]
        unknown = np.concatenate([np.isnan(shard.examples["self_influence"]) for shard in self._shards])
        scores[:, torch.from_numpy(unknown)[places]] = torch.nan
        return PairwiseScores(torch.tensor(order), examples, scores, notes=[told(self.about)])

    def places_in(self, dataset: Data) -> Tensor:
        """Return where the training examples are in a data set ``[n]``, in the order of ``examples``; -1 for none.

        Examples are known by what they hold; of several with the same content, the first is taken for the first.

        Raises:
            ValueError: If the index does not tell, the data set is not the same twice, or holds none of them.
        """
        if not self.about["hashed"]:
            raise ExampleIndexError(
                f"{self.folder} does not tell examples by what they hold: it was made with `Index(hashes=False)`, of a "
                "stream, or of data that are not the same each time they are asked for."
            )
        source, every = source_of(dataset)
        held = digests(source, list(every))
        if held is None:
            raise ExampleIndexError("the examples of `within` are not the same each time they are asked for.")
        where: dict[bytes, list[int]] = {}
        for index, content in zip(reversed(every), reversed(held), strict=True):
            where.setdefault(content, []).append(index)
        own = np.concatenate([shard.examples["digest"] for shard in self._shards])
        contents = np.frombuffer(own.tobytes(), dtype=np.uint8).reshape(-1, DIGEST)
        found = torch.full((len(self),), -1)
        for place in self.examples.argsort().tolist():
            if left := where.get(contents[place].tobytes()):
                found[place] = left.pop()
        if bool((found < 0).all()):
            raise ExampleIndexError(
                f"none of the {len(self):,} training examples is in `within`, of {len(source):,}; expected the same "
                "examples, as the data set of then returned them."
            )
        return found

    # ------------------------------------------------------------------------------------------------------- asking

    def _check(self, k: int, normalise: object) -> None:
        check_count("k", k)
        if k > len(self):
            raise ExampleIndexError(f"k={k}; expected at most {len(self):,}, the number of training examples.")
        if normalise not in get_args(Order):
            raise ExampleIndexError(
                f'normalise={short(normalise)}; expected "none" or "relative" (`Influence.top` has more).'
            )

    def _asked(
        self, model: nn.Module, batch: Any, loss: Loss | None, indices: Indices | None
    ) -> Iterator[tuple[list[int], Coder, CodedQueries]]:
        """Yield the queries, some at a time: as many as there is room for."""
        check_model(model)
        if isinstance(batch, (Dataset, DataLoader)):
            source, every = source_of(batch)
        else:
            source = BatchSource(batch)
            every = range(len(source))
        chosen = positions(indices, every, "queries")
        task = task_of(model, loss)
        with _thawed(model, self.about["parameters"]):
            coverage = self._coverage(model, task, source, chosen)
            coder = Coder(self.layout, restored(self._factors(), coverage))
            passes = ExampleGradients(model, task, source, coverage, progress=shown)
            passes = passes.with_scale(self._scale(coverage.trace.forms))
            size = 12 * (self.layout.coordinates + sum(k * o * i for k, o, i in self.layout.whole.values()))
            step = max(1, _QUERY_BYTES // max(1, size))
            for start in range(0, len(chosen), step):
                some = chosen[start : start + step]
                with run_on_queries():
                    queries = coded_queries(coder, passes, some)
                yield some, coder, queries

    def _coverage(self, model: nn.Module, task: Task, source: ExampleSource, chosen: Sequence[int]) -> Coverage:
        """Return the coverage of the layers that the index is about."""
        known = parameters_of(model)
        then: Mapping[str, list[int]] = self.about["layers"]
        if lacking := [name for name in self.about["parameters"] if name not in known]:
            raise ExampleIndexError(
                f"the index is about the layers {list(then)[:5]}, and {type(model).__name__} has no {lacking[:3]}; "
                "pass the model that was audited."
            )
        uncovered: Literal["exact", "report"] = "exact" if self.about["one_by_one"] else "report"
        with run_on_queries():
            names = self.about["parameters"]
            coverage = discover(model, task, source, indices=chosen, layers=names, uncovered=uncovered)
        now = {name: list(block.shape) for name, block in coverage.blocks.items()}
        if now != then:
            differing = [name for name in {**then, **now} if then.get(name) != now.get(name)][:3]
            told_of = ", ".join(f"{name}: {then.get(name)}, now {now.get(name)}" for name in differing)
            raise ExampleIndexError(
                f"{type(model).__name__} has other layers than the index is about ({told_of}); pass the model that was "
                "audited."
            )
        return coverage

    def _scale(self, forms: Mapping[TermKey, TermForm]) -> LossScale | None:
        """Return how the terms of the loss were weighed, also if its lines have moved since."""
        entries = self.about["scale"]
        if entries is None:
            return None
        scale = {
            TermKey(kind, tuple((str(a), int(b), int(c)) for a, b, c in place), occurrence): float(value)
            for kind, place, occurrence, value in entries
        }
        if all(key in scale for key in forms):
            return LossScale(scale)
        if [key.kind for key in forms] != [key.kind for key in scale]:
            raise ExampleIndexError(
                f"the loss has the terms {', '.join(map(str, forms))}; that of the audit had "
                f"{', '.join(map(str, scale)) or 'none that is known'}. Pass the model and the loss of then."
            )
        return LossScale(dict(zip(forms, scale.values(), strict=True)))


@contextmanager
def _thawed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let parameters have gradients: who loads a model for answers may have frozen it."""
    known = parameters_of(model)
    frozen = [known[name] for name in names if name in known and not known[name].requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

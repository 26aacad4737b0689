"""Lists of an audit's queries by replay, beside those by influence functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_influence.audit.columns import TOKEN_DESCRIPTIONS
from lightning_influence.audit.queries import Columns, Queries, with_examples
from lightning_influence.scores.pairs import PairwiseScores

REPLAY = "replay"
"""Name of the list."""


def with_replayed(
    table: Columns, scores: Mapping[int, PairwiseScores], asked: Queries, columns: Mapping[str, NDArray[Any]]
) -> Columns:
    """Return a table of pairs with a further list of each query, by scores of all training examples.

    Args:
        table: Of an audit.
        scores: Of the queries of each set, by its number.
        asked: What was asked.
        columns: The scores table.
    """
    of_pair = [name for name in table if name not in TOKEN_DESCRIPTIONS]
    parts = [table]
    for first in np.unique(table["number"], return_index=True)[1]:
        found = scores[int(table["query_set"][first])]
        known = np.isin(found.examples.numpy(), columns["index"])
        index = found.examples.numpy()[known]
        row = found.queries.tolist().index(int(table["query"][first]))
        own = np.nan_to_num(found.scores[row].double().numpy()[known])
        for kind, sign in (("proponent", 1), ("opponent", -1)):
            # A positive score lowers what is measured: where more is better, that is an opponent.
            towards = own * (-sign if asked.statistic.higher_is_better else sign)
            best = np.argsort(-towards, kind="stable")[: asked.top]
            best = best[towards[best] > 0]
            part = {name: np.repeat(table[name][first : first + 1], len(best)) for name in of_pair}
            part |= {each: np.full(len(best), text, dtype=object) for each, text in (("kind", kind), ("list", REPLAY))}
            part |= {"rank": np.arange(len(best)) + 1, "index": index[best], "score": sign * towards[best]}
            part = with_examples(part, columns) | {"relative": np.full(len(best), np.nan)}
            if "tokens" in table:
                part |= {"tokens": np.full(len(best), "", dtype=object), "tokens_rest": np.full(len(best), np.nan)}
            parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in table}
    order = np.argsort(joined["number"], kind="stable")
    return {name: values[order] for name, values in joined.items()}

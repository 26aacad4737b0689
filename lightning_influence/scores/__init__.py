"""Scores of examples and of pairs, and what a query measures."""

from __future__ import annotations

from lightning_influence.scores.examples import score_examples
from lightning_influence.scores.pairs import PairwiseScores, TopScores, mean_scores, pairwise_scores, top_scores
from lightning_influence.scores.plan import InfluencePlan, InfluenceScores, influence_scores
from lightning_influence.scores.products import Normalisation
from lightning_influence.scores.queries import PreparedQueries, QueryError, prepared_queries

__all__ = [
    "InfluencePlan",
    "InfluenceScores",
    "Normalisation",
    "PairwiseScores",
    "PreparedQueries",
    "QueryError",
    "TopScores",
    "influence_scores",
    "mean_scores",
    "pairwise_scores",
    "prepared_queries",
    "score_examples",
    "top_scores",
]

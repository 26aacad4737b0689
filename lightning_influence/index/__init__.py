"""Every training example's gradient, curvature-weighted and compressed, kept for questions that come later."""

from lightning_influence.index.answering import ExampleIndex
from lightning_influence.index.settings import Index
from lightning_influence.index.writer import IndexWriter

__all__ = ["ExampleIndex", "Index", "IndexWriter"]

"""The page without TensorBoard: a small server for this machine, and one file to pass on; torch is not imported."""

from __future__ import annotations

from lightning_influence.view.export import export_html
from lightning_influence.view.server import ViewServer, serve

__all__ = ["ViewServer", "export_html", "serve"]

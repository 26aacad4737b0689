"""The Influence tab of TensorBoard.

TensorBoard imports this module when it starts, and ends if that fails: here is the loader alone.
"""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

__all__ = ["InfluenceLoader"]


class InfluenceLoader(base_plugin.TBLoader):  # type: ignore[misc]  # it has no types
    """Loads the plugin; what fails costs the tab, and nothing else."""

    def load(self, context: Any) -> Any:
        """Return the plugin, None if it can't be had."""
        try:
            from lightning_influence.tensorboard_plugin.plugin import InfluencePlugin

            return InfluencePlugin(context)
        except Exception:
            logging.getLogger(__name__).exception("no Influence tab: reinstall lightning-influence.")
            return None

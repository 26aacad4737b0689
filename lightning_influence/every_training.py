"""What Lightning asks, for every Trainer, for further callbacks: none, unless ``LIGHTNING_INFLUENCE`` names a file.

Programs that have nothing to do with audits import this too, so it imports nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_influence.callbacks.uninvited import UninvitedAudit


def callbacks() -> list[UninvitedAudit]:
    """Return the audit that the YAML file named by ``LIGHTNING_INFLUENCE`` describes, if there is one."""
    path = os.environ.get("LIGHTNING_INFLUENCE")
    if not path:
        return []
    from lightning_influence.callbacks.uninvited import audit_of

    return [audit_of(path)]

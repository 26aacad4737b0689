"""The command line: `lightning-influence audit`, `report` and `compare`."""

from lightning_influence.cli.main import main

__all__ = ["main"]

"""Dataset indices as callers give them, see ``data.indices``."""

from lightning_influence.data.indices import Indices as Indices
from lightning_influence.data.indices import distinct as distinct
from lightning_influence.data.indices import integers as integers

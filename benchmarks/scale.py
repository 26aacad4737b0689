"""What audits of large models take: memory by formula, held against real layers, and one audit of GPT-2, measured.

python benchmarks/scale.py            the table of docs/scale.md, from models without weights or with random ones
python benchmarks/scale.py --audit    an audit of GPT-2 (124M, random weights; 64 texts of 128 tokens) end to end
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_influence import InfluenceAudit

TEXTS, TOKENS, BATCH = 64, 128, 4
GB = 1e9


class Texts(Dataset[Any]):
    """Texts of random tokens, of which every fourth begins like another one."""

    def __init__(self, size: int, words: int) -> None:
        self.tokens = torch.randint(words, (size, TOKENS), generator=torch.Generator().manual_seed(0))
        self.tokens[3::4, : TOKENS // 2] = self.tokens[2::4, : TOKENS // 2]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class LanguageModel(pl.LightningModule):
    """GPT-2 with random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        self.model: nn.Module = transformers.GPT2LMHeadModel(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def audit(texts: int, epochs: int) -> None:
    """Train GPT-2 for a while, with an audit, and print times and memory."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    model, data = LanguageModel(), Texts(texts, 50257)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {texts} texts of {TOKENS} tokens, "
          f"{torch.get_num_threads()} threads; {peak():.2f} GB with the model loaded", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = InfluenceAudit()
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, default_root_dir=directory, callbacks=[_Clock(), seen],
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(model, DataLoader(data, BATCH, shuffle=True))
        print(f"whole fit {time.perf_counter() - start:.0f} s, peak {peak():.2f} GB")
        print(seen.report)


class _Clock(pl.Callback):
    """Says when training is over."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(
            f"epoch {trainer.current_epoch} after {time.perf_counter() - self.start:.0f} s, {peak():.2f} GB", flush=True
        )


def main() -> None:
    """Print the table, or audit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    if options.audit:
        audit(options.texts, options.epochs)


if __name__ == "__main__":
    main()

"""What audits of large models take: memory by formula, held against real layers, and one audit of GPT-2, measured.

python benchmarks/scale.py            the table of docs/scale.md, from models without weights or with random ones
python benchmarks/scale.py --audit    GPT-2 (124M, random weights; 64 texts of 128 tokens) trained with AdamW by a
                                      Trainer, without an audit and with one: memory of the process, and time
"""

from __future__ import annotations

import argparse
import logging
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence import InfluenceAudit
from lightning_influence.curvature.blocks.block import KEPT_INVERSES
from lightning_influence.curvature.registry import decompositions, fitted_bytes, kept_shapes
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.coverage import Coverage
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.trace import Trace

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

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(n_layer=layers, use_cache=False, **dropout)
        self.model: nn.Module = transformers.GPT2LMHeadModel(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Adapted(nn.Module):
    """A frozen linear map with a low-rank adapter (LoRA; Hu et al. 2021, 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., i] -> [..., o]``."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def resnet50() -> tuple[nn.Module, Tensor]:
    """ResNet-50 for 1,000 classes, and images to trace it with."""
    config = transformers.ResNetConfig(num_labels=1000)
    return transformers.ResNetForImageClassification(config), torch.randn(6, 3, 64, 64)


def vit() -> tuple[nn.Module, Tensor]:
    """ViT-B/16 for 1,000 classes."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)), torch.randn(6, 3, 224, 224)


def bert() -> tuple[nn.Module, Tensor]:
    """BERT-base with a classifier."""
    return transformers.BertForSequenceClassification(transformers.BertConfig()), torch.randint(30000, (6, 8))


def gpt2() -> tuple[nn.Module, Tensor]:
    """GPT-2 (124M), its head tied to the embedding."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)), torch.randint(50000, (6, 8))


def llama_layer(rank: int = 16) -> tuple[nn.Module, Tensor]:
    """One layer of Llama-7B with adapters of q, k and v; all 32 are alike."""
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=128, use_cache=False)
    module = transformers.LlamaForCausalLM(config).requires_grad_(False)
    attention = module.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, Adapted(getattr(attention, name), rank))
    return module, torch.randint(128, (6, 8))


MODELS = {
    "ResNet-50": (resnet50, 1),
    "ViT-B/16": (vit, 1),
    "BERT-base": (bert, 1),
    "GPT-2 124M": (gpt2, 1),
    "Llama-7B, LoRA of rank 16 on q, k, v": (llama_layer, 32),
}
"""Name to what makes a model, and how often what is traced of it is there."""


def traced(module: nn.Module, inputs: Tensor) -> Coverage:
    """Return what a trace finds of a model."""

    def task(module: nn.Module, batch: Any) -> Tensor:
        logits = module(batch[0]).logits
        loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].repeat_interleave(
            logits[..., 0].numel() // len(logits)
        ))  # fmt: skip
        return loss

    source = ExampleSource(TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.long)), batch_size=2)
    return discover(module.eval(), task, source)


def table() -> None:
    """Print a line for each model: what EK-FAC takes, by the functions that tell it before training."""
    titles = ["model", "covered parameters", "layers (that share an input)", "bases", "eigenvalues", "EK-FAC in all"]
    titles += ["without sharing", "eigendecompositions", "`diagonal`", "one query"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, (make, times) in MODELS.items():
        torch.manual_seed(0)
        coverage = traced(*make())
        apart = replace(coverage, trace=Trace())
        shapes = kept_shapes("ekfac", coverage).values()
        bases = sum(math.prod(s) for each in shapes for key, s in each.items() if key != "eigenvalues")
        size = coverage.covered_parameters
        cubes = sum(1.6e-10 * k * m**3 for each in decompositions("ekfac", coverage).values() for k, m in each)
        sizes = [4e-9 * bases * times, 4e-9 * size * times]
        sizes += [whole("ekfac", coverage, times), whole("ekfac", apart, times)]
        cells = [name, f"{size * times:,}"]
        cells += [f"{len(coverage.blocks) * times} ({len(coverage.shared_inputs) * times})"]
        cells += [f"{each:.2f} GB" for each in sizes]
        cells += [f"{cubes * times:.0f} s", f"{whole('diagonal', coverage, times):.2f} GB", f"{sizes[1]:.2f} GB"]
        print(f"| {' | '.join(cells)} |", flush=True)


def whole(name: str, coverage: Coverage, times: int) -> float:
    """Return what a curvature takes at most, in GB, of a model that has so many of these layers."""
    one = fitted_bytes(name, coverage)
    kept = sum(4 * math.prod(shape) for each in kept_shapes(name, coverage).values() for shape in each.values())
    eigenvalues = [math.prod(each["eigenvalues"]) for each in kept_shapes(name, coverage).values()]
    inverses = 4 * sum(size for size in eigenvalues if size <= KEPT_INVERSES)
    return max(one + (times - 1) * kept, times * (kept + inverses)) / GB


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def audit(layers: int, texts: int, epochs: int, *, plain: bool) -> None:
    """Train GPT-2 for a while, with an audit or without, and print times and memory."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    model, data = LanguageModel(layers), Texts(texts, 50257)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {texts} texts of {TOKENS} tokens, "
          f"{torch.get_num_threads()} threads; {peak():.2f} GB with the model loaded", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = InfluenceAudit()
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, default_root_dir=directory, callbacks=[_Clock(), *([] if plain else [seen])],
        )  # fmt: skip
        start, spent = time.perf_counter(), time.process_time()
        trainer.fit(model, DataLoader(data, BATCH, shuffle=True))
        print(f"{'plain' if plain else 'audited'} fit: {time.perf_counter() - start:.0f} s, "
              f"{time.process_time() - spent:.0f} s of CPU, peak {peak():.2f} GB", flush=True)  # fmt: skip
        if not plain:
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
    parser.add_argument("--layers", type=int, default=12, help="fewer for a first try")
    parser.add_argument("--plain", action="store_true", help="without an audit only")
    options = parser.parse_args()
    if options.audit or options.plain:
        if not options.plain:  # in a process of its own: the largest memory of this one is to be the audit's
            subprocess.run([sys.executable, *sys.argv, "--plain"], check=True)
        audit(options.layers, options.texts, options.epochs, plain=options.plain)
    else:
        table()


if __name__ == "__main__":
    main()

"""Known architectures, tiny and with random weights: built from their configurations, nothing is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import default_collate
from which_lightning import pl

TOKENS, CLASSES, EXAMPLES = 60, 3, 7
IGNORED = -100
Batch = dict[str, Tensor]
# Arguments of configurations that these do not declare.
LABELS: dict[str, Any] = {"num_labels": CLASSES}
START: dict[str, Any] = {"decoder_start_token_id": 0}

for _name in ("transformers", "transformers.configuration_utils", "transformers.loss.loss_utils"):
    # Remarks about ids of special tokens that these vocabularies are too small for.
    logging.getLogger(_name).setLevel(logging.ERROR)


class Wrapped(pl.LightningModule):
    """What a user writes around a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@dataclass(frozen=True)
class Architecture:
    """A model and its data.

    Attributes:
        make: Makes the model.
        examples: Makes the examples.
        collate: Makes a batch of them.
        dtype: Of the model. The language models of one stack compute their loss in single precision.
        weigh: Number of terms in an example's loss where the batch loss is a mean over terms; else 1 for each.
    """

    make: Callable[[], nn.Module]
    examples: Callable[[], Sequence[Batch]]
    collate: Callable[[list[Batch]], Batch] = default_collate
    dtype: torch.dtype = torch.float64
    weigh: Callable[[Batch], int] = lambda example: 1

    def module(self) -> Wrapped:
        return Wrapped(self.make()).to(self.dtype)

    def data(self) -> list[Batch]:
        return [
            {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in example.items()}
            for example in self.examples()
        ]


def _lengths() -> list[int]:
    return [5, 3, 7, 4, 7, 2, 6]


def _words(length: int, generator: torch.Generator) -> Tensor:
    # Ids that no configuration takes for padding or for the beginning or end of a text.
    return torch.randint(5, TOKENS, (length,), generator=generator)


def texts() -> list[Batch]:
    """Texts of different lengths with a class each."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": _words(length, generator), "labels": torch.tensor(number % CLASSES)}
        for number, length in enumerate(_lengths())
    ]


def sentences() -> list[Batch]:
    """Texts of different lengths, to be predicted word by word."""
    return [{"input_ids": example["input_ids"], "labels": example["input_ids"].clone()} for example in texts()]


def masked() -> list[Batch]:
    """Texts of which some words are masked (id 4) and have to be found."""
    examples = []
    for example in texts():
        ids = example["input_ids"].clone()
        hidden = torch.arange(len(ids)) % 3 == 1
        examples.append({"input_ids": ids.masked_fill(hidden, 4), "labels": ids.masked_fill(~hidden, IGNORED)})
    return examples


def translations() -> list[Batch]:
    """Pairs of texts, each of its own length."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": _words(length, generator), "labels": _words(2 + number % 4, generator)}
        for number, length in enumerate(_lengths())
    ]


def padded(examples: list[Batch]) -> Batch:
    """Bring the texts of a batch to the length of the longest."""
    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if labels[0].ndim:
        return batch | {"labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)}
    return batch | {"labels": torch.stack(labels)}


def pictures() -> list[Batch]:
    """Pictures of 16 x 16 pixels with a class each."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "pixel_values": torch.randn(3, 16, 16, generator=generator, dtype=torch.float64),
            "labels": torch.tensor(number % CLASSES),
        }
        for number in range(EXAMPLES)
    ]


def _labels(example: Batch) -> int:
    return int((example["labels"] != IGNORED).sum())


def _next_words(example: Batch) -> int:
    return _labels(example) - 1


def bert() -> hf.BertConfig:
    return hf.BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        pad_token_id=1,
        **LABELS,
    )


def albert() -> hf.AlbertConfig:
    return hf.AlbertConfig(
        vocab_size=TOKENS,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        **LABELS,
    )


def roberta() -> hf.RobertaConfig:
    return hf.RobertaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        **LABELS,
    )


def gpt2() -> hf.GPT2Config:
    return hf.GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=2, eos_token_id=3
    )


def t5() -> hf.T5Config:
    return hf.T5Config(
        vocab_size=TOKENS,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        pad_token_id=1,
        **START,
    )


def bart() -> hf.BartConfig:
    return hf.BartConfig(
        vocab_size=TOKENS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=12,
    )


def llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=12,
    )


def gemma() -> hf.GemmaConfig:
    return hf.GemmaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=12,
    )


def vit() -> hf.ViTConfig:
    return hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        **LABELS,
    )


def swin() -> hf.SwinConfig:
    return hf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        **LABELS,
    )


def resnet() -> hf.ResNetConfig:
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", **LABELS)


def convnext() -> hf.ConvNextConfig:
    return hf.ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[1, 2],
        num_stages=2,
        patch_size=2,
        image_size=16,
        layer_scale_init_value=0.5,
        **LABELS,
    )


def mobilenet() -> nn.Module:
    config = hf.MobileNetV2Config(
        depth_multiplier=0.25,
        min_depth=8,
        depth_divisible_by=4,
        image_size=16,
        output_stride=8,
        finegrained_output=False,
        **LABELS,
    )
    return with_statistics(hf.MobileNetV2ForImageClassification(config))


def with_statistics(model: nn.Module) -> nn.Module:
    """Take the statistics of batch norms from pictures: with zeros and ones, nothing passes so many narrow layers."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.stack([example["pixel_values"] for example in pictures()]).float())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture(lambda: hf.BertForSequenceClassification(bert()), texts, padded),
    "BERT, masked words": Architecture(lambda: hf.BertForMaskedLM(bert()), masked, padded, weigh=_labels),
    "ALBERT": Architecture(lambda: hf.AlbertForSequenceClassification(albert()), texts, padded),
    "RoBERTa": Architecture(lambda: hf.RobertaForSequenceClassification(roberta()), texts, padded),
    "GPT-2": Architecture(lambda: hf.GPT2LMHeadModel(gpt2()), sentences, padded, torch.float32, _next_words),
    "Llama": Architecture(lambda: hf.LlamaForCausalLM(llama()), sentences, padded, torch.float32, _next_words),
    "Gemma": Architecture(lambda: hf.GemmaForCausalLM(gemma()), sentences, padded, torch.float32, _next_words),
    "T5": Architecture(lambda: hf.T5ForConditionalGeneration(t5()), translations, padded, weigh=_labels),
    "BART": Architecture(lambda: hf.BartForConditionalGeneration(bart()), translations, padded, weigh=_labels),
    "ViT": Architecture(lambda: hf.ViTForImageClassification(vit()), pictures),
    "Swin": Architecture(lambda: hf.SwinForImageClassification(swin()), pictures),
    "ResNet": Architecture(lambda: with_statistics(hf.ResNetForImageClassification(resnet())), pictures),
    "ConvNeXt": Architecture(lambda: hf.ConvNextForImageClassification(convnext()), pictures),
    "MobileNetV2": Architecture(mobilenet, pictures),
}

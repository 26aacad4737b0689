"""Scores of pairs by token: against copies of the weights for each position, in sum, and in real audits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import loader, make_trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset
from which_lightning import pl

from lightning_influence import AuditReport, InfluenceAudit, Queries
from lightning_influence.curvature import CurvatureName, FactorExamples, fit
from lightning_influence.data.source import ExampleSource
from lightning_influence.gradients.discover import discover
from lightning_influence.gradients.passes import ExampleGradients
from lightning_influence.gradients.visitors import visit
from lightning_influence.page.document import document
from lightning_influence.scores.pairs import pairwise_scores
from lightning_influence.scores.queries import prepared_queries
from lightning_influence.scores.token_scores import TokenScores

pytestmark = pytest.mark.usefixtures("unverified")

N, Q, S, WORDS, C, D = 9, 3, 5, 11, 3, 4


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class States(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.layer(x)[0]
        return states


class Transformer(nn.Module):
    """A small one, with position embeddings and a head that shares the tokens' table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, D), nn.Embedding(S, D)
        self.layer = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(D, WORDS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=self.tokens.weight.dtype)
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        logits: Tensor = self.head(self.layer(hidden, mask, is_causal=True))
        return logits


def classify(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def predict_next(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def lstm(**options: Any) -> nn.Module:
    out = 2 * D if options.get("bidirectional") else D
    states = States(nn.LSTM(D, D, batch_first=True, **options))
    return nn.Sequential(nn.Embedding(WORDS, D), states, Mean(), nn.Linear(out, C))


MODELS: dict[str, Any] = {
    "transformer": (Transformer, predict_next),
    "lstm": (lstm, classify),
    "two layers both ways": (lambda: lstm(num_layers=2, bidirectional=True), classify),
}


NO_TOKENS = {"transformer": "norm|places", "lstm": "3", "two layers both ways": "3"}


def texts(n: int, seed: int, length: int = S) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (n, length), generator=generator)
    return TensorDataset(ids, torch.randint(C, (n,), generator=generator))


def passes(net: nn.Module, task: Any, data: Any) -> ExampleGradients:
    source = ExampleSource(data, batch_size=4)
    return ExampleGradients(net, task, source, discover(net, task, source))


@pytest.mark.parametrize("curvature", ["identity", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up_to_the_score(name: str, curvature: CurvatureName) -> None:
    torch.manual_seed(0)
    make, task = MODELS[name]
    net = make().double()
    gradients, queries = passes(net, task, texts(N, 1)), passes(net, task, texts(Q, 2))
    fitted = fit(gradients, curvature, range(N), examples=FactorExamples(N, N, N), labels=("true", "true"), damping=0.1)
    (prepared,) = prepared_queries(fitted, queries.like(gradients), [list(range(Q))], N)
    visitor = TokenScores(prepared, S)
    visit(gradients, range(N), [visitor])
    assert visitor.told
    found = torch.stack([visitor.found[index] for index in range(N)], 1)  # qns
    pairs = pairwise_scores(gradients, range(N), fitted, queries, range(Q), by_layer=True)
    torch.testing.assert_close(found.sum(2), pairs.scores, rtol=1e-9, atol=1e-12)
    # Norms, places that the batch shares and the head on pooled features are no token's, and nothing else.
    assert pairs.parts is not None
    rest = [part for block, part in pairs.parts.items() if re.search(NO_TOKENS[name], block)]
    assert 0 < len(rest) < len(pairs.parts)
    torch.testing.assert_close(found[..., -1], torch.stack(rest).sum(0), rtol=1e-9, atol=1e-12)


def test_each_token_has_its_own_part() -> None:
    """As with weights of its own for each position, of a recurrent layer in both directions, too."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(WORDS, D),
        nn.Linear(D, D),
        States(nn.RNN(D, 3, batch_first=True, bidirectional=True)),
        Mean(),
        nn.Linear(6, C),
    ).double()
    data, asked = texts(N, 1), texts(Q, 2)
    gradients, queries = passes(net, classify, data), passes(net, classify, asked)
    (prepared,) = prepared_queries(None, queries.like(gradients), [list(range(Q))])
    visitor = TokenScores(prepared, S)
    visit(gradients, range(N), [visitor])

    head = {name: p for name, p in net.named_parameters() if name.startswith("4.")}
    by_token = {name: p for name, p in net.named_parameters() if name not in head}
    vectors = []
    for x, y in asked:
        loss = classify(net, (x[None], y[None]))
        vectors.append(dict(zip(by_token, torch.autograd.grad(loss, list(by_token.values())), strict=True)))

    def state(own: dict[str, Tensor], x: Tensor, before: Tensor, side: str) -> Tensor:
        weights = [own[f"2.layer.{name}_l0{side}"] for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        return (weights[0] @ x + weights[1] + weights[2] @ before + weights[3]).tanh()

    for index, (ids, label) in enumerate(data):
        copies = [{name: p.detach().clone().requires_grad_() for name, p in by_token.items()} for _ in ids]
        inputs = [
            own["1.weight"] @ own["0.weight"][token] + own["1.bias"] for own, token in zip(copies, ids, strict=True)
        ]
        forth, back = [torch.zeros(3).double()], [torch.zeros(3).double()]
        for own, x in zip(copies, inputs, strict=True):
            forth.append(state(own, x, forth[-1], ""))
        for own, x in zip(reversed(copies), reversed(inputs), strict=True):
            back.append(state(own, x, back[-1], "_reverse"))
        out = torch.stack([torch.cat(pair) for pair in zip(forth[1:], back[:0:-1], strict=True)])
        loss = F.cross_entropy(F.linear(out.mean(0), head["4.weight"], head["4.bias"]), label)
        for place, own in enumerate(copies):
            found = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            parts = [sum((v[name] * g).sum() for name, g in zip(own, found, strict=True)) for v in vectors]
            torch.testing.assert_close(
                visitor.found[index][:, place], torch.stack([torch.as_tensor(part) for part in parts]).detach()
            )


# ------------------------------------------------------------------------------------------------- real audits


class Tokenizer:
    pad_token_id = 0

    def decode(self, tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)


class Texts(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return classify(self.net, batch)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Masked(nn.Module):
    """Does not look at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(WORDS, D), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids > 0).unsqueeze(2)
        hidden = self.body(self.tokens(ids)).tanh() * mask
        logits: Tensor = self.head(hidden.sum(1) / mask.sum(1))
        return logits


class Ragged(Dataset[Any]):
    """Texts of several lengths, without padding."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = [
            (torch.randint(1, WORDS, (3 + k % 4,), generator=generator), torch.tensor(k % C)) for k in range(n)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def filled_up(items: list[Any]) -> tuple[Tensor, Tensor]:
    """Padding comes first, as decoders want it: tokens are not where they are in their own text."""
    ids, labels = zip(*items, strict=True)
    return pad_sequence([each.flip(0) for each in ids], batch_first=True).flip(1), torch.stack(labels)


def ragged(n: int, seed: int) -> DataLoader[Any]:
    return DataLoader(Ragged(n, seed), 4, collate_fn=filled_up)


def audited(folder: Path, net: nn.Module, training: Any, validation: Any, **options: Any) -> InfluenceAudit:
    torch.manual_seed(0)
    audit = InfluenceAudit(queries=options.pop("queries", Queries(count=2, top=3)), damping=0.1, **options)
    make_trainer(folder, callbacks=[audit], max_epochs=2).fit(Texts(net.double()), training, validation)
    return audit


@pytest.mark.parametrize(("kind", "measurement"), [("one length", "margin"), ("padded", "loss"), ("ragged", "loss")])
def test_pairs_of_an_audit(kind: str, measurement: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    training, validation = texts(N, 1), texts(Q, 2)
    if kind == "padded":
        training.tensors[0][::2, 3:] = 0
    loaders = (ragged(N, 1), ragged(Q, 2)) if kind == "ragged" else (loader(training), loader(validation))
    queries = Queries(count=2, top=3, measurement=measurement)
    net = Masked() if kind == "ragged" else lstm()
    report = audited(tmp_path, net, *loaders, queries=queries, describe=Tokenizer()).report
    pairs = report.pairs
    assert pairs is not None
    assert (pairs["tokens"] != "").all()
    for row, text in enumerate(pairs["tokens"]):
        told, index = json.loads(text), int(pairs["index"][row])
        ids = loaders[0].dataset[index][0].tolist()
        assert [word for word, _ in told] == [f"w{token}" for token in ids if token]
        total = sum(part for _, part in told) + pairs["tokens_rest"][row]
        np.testing.assert_allclose(total, pairs["score"][row], rtol=1e-8)
        assert sum(abs(part) for _, part in told) > 0
    assert report.directory is not None
    assert AuditReport.load(report.directory).pairs["tokens"].tolist() == pairs["tokens"].tolist()  # type: ignore[index]
    shown = document(report)["pairs"]
    assert [word for word, _ in shown[0]["tokens"]] == [word for word, _ in json.loads(pairs["tokens"][0])]
    assert shown[0]["tokens_rest"] == pairs["tokens_rest"][0]
    files = json.loads((report.directory / "audit.json").read_text())
    assert [pair["tokens"] is None for pair in files["pairs"]] == [False] * len(shown)


def begun(items: list[Any]) -> tuple[Tensor, Tensor]:
    """Puts a token before each text, and cuts the last one: as many positions, other tokens."""
    ids = torch.stack([each[0] for each in items])
    first = torch.full((len(items), 1), WORDS - 1)
    return torch.cat([first, ids[:, :-1]], 1), torch.stack([torch.as_tensor(each[1]) for each in items])


class Words(Dataset[Any]):
    """The data set holds words, which only the collate function knows how to number."""

    def __init__(self, of: TensorDataset) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Any:
        ids, label = self.of[index]
        return " ".join(f"w{token}" for token in ids.tolist()), label


def numbered(items: list[Any]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[int(word[1:]) for word in words.split()] for words, _ in items])
    return ids, torch.stack([label for _, label in items])


def masked(items: list[Any]) -> tuple[Tensor, Tensor]:
    ids, labels = numbered(items) if isinstance(items[0][0], str) else (torch.stack([i[0] for i in items]), None)
    ids = torch.where(torch.rand(ids.shape) < 0.1, WORDS - 1, ids)
    return ids, torch.stack([torch.as_tensor(each[1]) for each in items]) if labels is None else labels


@pytest.mark.parametrize("kind", ["a first token", "words", "masked"])
def test_tokens_are_those_that_the_model_sees(kind: str, tmp_path: Path) -> None:
    """With a first token put before them, each word got the score of the one before it."""
    plain = texts(N, 1)
    data, collate = {
        "a first token": (plain, begun),
        "words": (Words(plain), numbered),
        "masked": (plain, masked),
    }[kind]
    training = DataLoader(data, 4, collate_fn=collate)  # type: ignore[arg-type]
    validation = DataLoader(texts(Q, 2), 4)
    net = Masked()
    pairs = audited(tmp_path, net, training, validation, describe=Tokenizer()).report.pairs
    assert pairs is not None
    assert (pairs["tokens"] != "").all()
    for text, index in zip(pairs["tokens"], pairs["index"].tolist(), strict=True):
        ids = plain.tensors[0][index].tolist()
        seen = [WORDS - 1, *ids[:-1]] if kind == "a first token" else ids
        assert [word for word, _ in json.loads(text)] == [f"w{token}" for token in seen]


def test_without_a_tokenizer_there_is_no_further_pass(tmp_path: Path) -> None:
    def described(example: Any) -> str:
        return " ".join(map(str, example[0].tolist()))

    audit = audited(tmp_path, lstm(), loader(texts(N, 1)), loader(texts(Q, 2)), describe=described)
    assert "tokens" not in audit.report.pairs  # type: ignore[operator]
    assert not any("token" in note for note in audit.report.manifest["notes"])


def test_what_no_layer_tells_is_said(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(WORDS, D).requires_grad_(False), Mean(), nn.Linear(D, C))
    report = audited(tmp_path, net, loader(texts(N, 1)), loader(texts(Q, 2)), describe=Tokenizer()).report
    assert "tokens" not in report.pairs  # type: ignore[operator]
    assert "pairs are not told by token: no layer has a position for each" in report.manifest["notes"]


class Slots(nn.Module):
    """Has four positions for texts of any length, and no other layer with positions that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, D, padding_idx=0).requires_grad_(False)
        self.slots, self.head = nn.Linear(1, 2), nn.Linear(2 * D, C)

    def forward(self, ids: Tensor) -> Tensor:
        pooled = self.tokens(ids).sum(1)
        logits: Tensor = self.head(self.slots(pooled.unsqueeze(2)).tanh().flatten(1))
        return logits


def test_as_many_positions_by_chance_are_no_tokens(tmp_path: Path) -> None:
    """Of texts with four words, the slots were taken for these."""
    report = audited(tmp_path, Slots(), ragged(N, 1), ragged(Q, 2), describe=Tokenizer()).report
    lengths = {len(Ragged(N, 1)[index][0]) for index in report.pairs["index"].tolist()}  # type: ignore[index]
    assert D in lengths
    assert len(lengths) > 1
    assert "tokens" not in report.pairs  # type: ignore[operator]
    assert "pairs are not told by token: no layer has a position for each" in report.manifest["notes"]


def test_a_tokenizer_that_fails_costs_nothing_else(tmp_path: Path) -> None:
    class Failing(Tokenizer):
        def decode(self, tokens: list[int]) -> str:
            if len(tokens) == 1:
                raise KeyError(tokens[0])
            return super().decode(tokens)

    report = audited(tmp_path, lstm(), loader(texts(N, 1)), loader(texts(Q, 2)), describe=Failing()).report
    assert len(report.pairs["index"]) > 8  # type: ignore[index]
    assert any("pairs are not told by token: KeyError" in note for note in report.manifest["notes"])


def test_long_texts_leave_room_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = audited(tmp_path, lstm(), loader(texts(N, 1)), loader(texts(Q, 2)), describe=Tokenizer()).report
    monkeypatch.setattr("lightning_influence.page.document._TOKENS", 500)
    told = {pair["rank"] for pair in document(report)["pairs"] if pair["tokens"]}
    assert told == {1}

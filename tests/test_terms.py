"""What a batch loss is made of, wherever the examples are: every example's own part, the same in every batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    BATCH_SIZE,
    LAYOUTS,
    PAD,
    PICKED,
    SCALES,
    Batch,
    C,
    Loss,
    N,
    S,
    Tagger,
    evaluate,
    head_of_picked,
    l1_loss,
    masked_mean,
    sequences,
    taken,
    token_losses,
    token_sums,
    tokens_per_example,
)
from torch import Tensor, nn

from lightning_influence.core.layout import BatchLayout
from lightning_influence.gradients.discover import term_forms
from lightning_influence.objective.losses import CrossEntropy
from lightning_influence.objective.scale import LossScale, ScaleTally, TermKey
from lightning_influence.objective.tap import LossTap, calls_in
from lightning_influence.objective.terms import BatchLoss, TermForm, placed_calls

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def _forms(loss: Loss, net: nn.Module, batch: Batch) -> dict[TermKey, TermForm]:
    small, large = (evaluate(loss, net, taken(batch, rows), len(rows)) for rows in ([0, 1], [0, 1, 0]))
    return term_forms(small, large)


def _gradients(result: BatchLoss, weight: Tensor) -> Tensor:
    """Gradient of the sum of the own losses."""
    outputs, gradients = result.true_outputs()
    return torch.autograd.grad(outputs, weight, gradients, retain_graph=True)[0]


# -------------------------------------------------------------------------------------------- where the examples are


@pytest.mark.parametrize("steps", [1, 2, S, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_examples_are_found_wherever_they_are(name: str, steps: int) -> None:
    """Whatever number of steps and examples, also equal ones: two tiny batches have told where the examples are."""
    loss, layout = LAYOUTS[name]
    net = Tagger()
    forms = _forms(loss, net, sequences())
    assert list(forms.values()) == [TermForm(layout, False)]
    batch = sequences(steps=steps)
    for n in (1, 2, 4, 5, 8, N):
        part = taken(batch, range(n))
        result = evaluate(loss, net, part, n, forms=forms)
        own = token_losses(net(part["x"]), part["y"]).sum(1) * n / part["real"].sum()
        assert result.tapped
        assert result.values is not None
        torch.testing.assert_close(result.values, own.detach(), **EXACT)
        torch.testing.assert_close(result.values.mean(), result.loss.detach(), **EXACT)
        expected = torch.autograd.grad(own.sum(), net.head.weight)[0]
        torch.testing.assert_close(_gradients(result, net.head.weight), expected, **EXACT)


@pytest.mark.parametrize("name", ["time-major, flat", "time-major", "examples last"])
def test_labels_sampled_for_an_example_reach_that_example(name: str) -> None:
    """Noise that is extreme for one example alone: only its rows have the gradient of the last class.

    Of ``± (p - onehot)`` the entry of the drawn class is the largest, whatever the sign.
    """
    loss, _ = LAYOUTS[name]
    net, batch = Tagger(), sequences()
    forms = _forms(loss, net, batch)
    seen: list[Tensor] = []

    def task(module: Any, data: Batch) -> Tensor:
        seen.append(module(data["x"]) if not seen else seen[0])
        return loss(lambda x: seen[0] if x is data["x"] else seen[0].transpose(0, 1), data)

    (key,) = [term.key for term in evaluate(task, net, batch, N).seen]
    result = evaluate(task, net, batch, N, forms=dict.fromkeys([key], *forms.values()))

    def noise(shape: tuple[int, ...]) -> Tensor:
        values = torch.full((N, *shape), 1e-12, dtype=torch.float64)
        values[7] = 1 - 1e-12
        return values

    outputs, gradients = result.sampled_outputs(noise)
    (at_logits,) = torch.autograd.grad(outputs, seen[0], gradients)
    drawn = at_logits.abs().argmax(-1).masked_fill(~batch["real"], PAD)
    expected = torch.zeros(N, S, dtype=torch.long)
    expected[7] = C - 1
    assert torch.equal(drawn, expected.masked_fill(~batch["real"], PAD))


def test_time_major_squared_errors() -> None:
    net, batch = Tagger(), sequences()

    def loss(module: Any, b: Batch) -> Tensor:
        return F.mse_loss(module(b["x"].transpose(0, 1)), b["t"].transpose(0, 1))

    forms = _forms(loss, net, batch)
    assert list(forms.values()) == [TermForm(BatchLayout(1, "major"), False)]
    result = evaluate(loss, net, batch, N, forms=forms)
    own = (net(batch["x"]) - batch["t"]).square().mean((1, 2))
    torch.testing.assert_close(result.values, own.detach(), **EXACT)
    assert result.exact_draws() == S * C
    columns = [gradient for _, (gradient,) in result.exact_outputs()]
    assert all(len(column.nonzero()) == N for column in columns), "one output of each example at a time"
    assert all(sorted(column.nonzero()[:, 1].tolist()) == list(range(N)) for column in columns)
    statistics = result.terms[0].call.statistics(N)
    torch.testing.assert_close(statistics["loss"], own.detach(), **EXACT)


def test_rows_that_do_not_fit_are_not_shared_out_by_force() -> None:
    """Without a look at two batches, time-major rows are no term unless they fit: then nothing tells them apart."""
    net, batch = Tagger(), sequences(8)
    result = evaluate(LAYOUTS["time-major"][0], net, batch, 8)
    assert not result.terms
    assert len(result.seen) == 1
    assert result.values is None


def test_a_batch_that_contradicts_the_form_is_not_shared_out() -> None:
    net = Tagger()
    forms = dict.fromkeys(_forms(LAYOUTS["rows"][0], net, sequences()), TermForm(BatchLayout(1, "major"), False))
    result = evaluate(LAYOUTS["rows"][0], net, sequences(), N, forms=forms)
    assert not result.tapped
    assert result.values is None


def test_values_that_do_not_tell_leave_rows_side_by_side() -> None:
    """Every token alike: rows in turn and rows side by side are the same then."""
    net, batch = Tagger(), sequences()
    same = {name: value[:1, :1].expand(value.shape) if value.ndim > 1 else value for name, value in batch.items()}
    (form,) = _forms(LAYOUTS["time-major, flat"][0], net, same).values()
    assert form.layout == BatchLayout(0, "major")


# ---------------------------------------------------------------------------------------------------- picked rows


@pytest.mark.parametrize("name", PICKED)
def test_picked_rows_belong_to_the_examples_they_were_picked_from(name: str) -> None:
    """Of three examples 9 tokens are real: shared out evenly, 3 of them would go to each, whatever their lengths."""
    loss, net, batch = PICKED[name], Tagger(), sequences()
    forms = _forms(loss, net, batch)
    exact: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7} if "precision" in name else EXACT
    divisible = 0
    for n in range(1, N + 1):
        part = taken(batch, range(n))
        result = evaluate(loss, net, part, n, forms=forms)
        own = token_losses(net(part["x"]), part["y"]).sum(1) * n / part["real"].sum()
        assert result.tapped, n
        assert result.values is not None
        torch.testing.assert_close(result.values, own.detach(), **exact)
        divisible += n > 1 and int(part["real"].sum()) % n == 0
        statistics = result.terms[0].call.statistics(n)
        mean = token_losses(net(part["x"]), part["y"]).sum(1) / part["lengths"]
        torch.testing.assert_close(statistics["loss"], mean.detach(), **exact)
    assert divisible, "no batch in which the rows could pass for even shares"


def test_the_head_of_picked_rows() -> None:
    """Rows picked before a linear map, an activation and a norm: whose they are is known all the same."""
    net, batch = Tagger(), sequences()
    result = evaluate(head_of_picked, net, batch, N, forms=_forms(head_of_picked, net, batch))
    z = net.head(net.norm(F.gelu(net.features(batch["x"]))))
    own = token_losses(z, batch["y"]).sum(1) * N / batch["real"].sum()
    torch.testing.assert_close(result.values, own.detach(), **EXACT)


def test_elements_picked_one_by_one() -> None:
    """A mask over single outputs leaves a vector of numbers, of any length for each example."""
    net, batch = Tagger(), sequences()
    mask = torch.rand(N, S, C, generator=torch.Generator().manual_seed(5)) < 0.4
    batch["mask"] = mask

    def loss(module: Any, b: Batch) -> Tensor:
        return F.mse_loss(module(b["x"]).masked_select(b["mask"]), b["t"].masked_select(b["mask"]), reduction="sum")

    result = evaluate(loss, net, batch, N)
    own = N * (mask * (net(batch["x"]) - batch["t"]).square()).sum((1, 2))
    torch.testing.assert_close(result.values, own.detach(), **EXACT)
    draws = result.exact_draws()
    assert draws == int(mask.sum((1, 2)).max())
    passes = [gradient for _, (gradient,) in result.exact_outputs()]
    assert len(passes) == draws
    # Every picked element once, no two of one example in a pass.
    assert torch.stack(passes).count_nonzero(0).tolist() == [1] * int(mask.sum())
    owners = torch.arange(N).view(N, 1, 1).expand_as(mask)[mask]
    assert all(len(set(owners[gradient != 0].tolist())) == int((gradient != 0).sum()) for gradient in passes)


@pytest.mark.parametrize(
    "pick",
    [
        lambda z, b: z[torch.arange(len(z)), b["last"]],
        lambda z, b: z[torch.arange(len(z)), b["last"]][:, torch.arange(C)],
        lambda z, b: z.transpose(0, 1)[b["last"], torch.arange(len(z))],
        lambda z, b: z[:, torch.tensor([1])].squeeze(1),
    ],
)
def test_one_picked_row_per_example_is_a_decision(pick: Callable[[Tensor, Batch], Tensor]) -> None:
    net, batch = Tagger(), sequences()

    def loss(module: Any, b: Batch) -> Tensor:
        return F.cross_entropy(pick(module(b["x"]), b), b["y"][:, 0])

    forms = _forms(loss, net, batch)
    result = evaluate(loss, net, batch, N, None, forms)
    z = pick(net(batch["x"]), batch)
    torch.testing.assert_close(result.values, F.cross_entropy(z, batch["y"][:, 0], reduction="none"), **EXACT)
    assert result.exact_draws() == C
    assert torch.equal(result.terms[0].call.statistics(N)["predicted"], z.argmax(1))


def test_decisions_on_some_examples_only() -> None:
    """A head for the labelled half: the others have no loss, no label and no prediction."""
    net, batch = Tagger(), sequences()
    labelled = torch.arange(N) % 2 == 1

    def loss(module: Any, b: Batch) -> Tensor:
        return F.cross_entropy(module(b["x"])[:, 0][labelled[: len(b["x"])]], b["y"][:, 0][labelled[: len(b["x"])]])

    result = evaluate(loss, net, batch, N)
    z = net(batch["x"])[:, 0]
    own = 2 * labelled * F.cross_entropy(z, batch["y"][:, 0], reduction="none")
    torch.testing.assert_close(result.values, own.detach(), **EXACT)
    statistics = result.terms[0].call.statistics(N)
    assert statistics["label"].tolist() == batch["y"][:, 0].masked_fill(~labelled, -1).tolist()
    assert statistics["predicted"].tolist() == z.argmax(1).masked_fill(~labelled, -1).tolist()
    assert statistics["probabilities"].isnan().any(1).tolist() == (~labelled).tolist()
    assert statistics["loss"].isnan().tolist() == (~labelled).tolist()
    assert result.exact_draws() == C


@pytest.mark.parametrize(
    "pick",
    [
        pytest.param(lambda z, real: z[real].flip(0), id="flipped"),
        pytest.param(lambda z, real: z[real].roll(1, 0), id="rolled"),
        pytest.param(lambda z, real: z[real].cumsum(0), id="mixed"),
        pytest.param(lambda z, real: torch.cat([z[0][real[0]], z[1:][real[1:]]]), id="joined"),
        pytest.param(lambda z, real: z[real][:, None, :].expand(-1, 2, -1).flatten(0, 1), id="repeated"),
        pytest.param(lambda z, real: z[real].view(-1).view(-1, 1).expand(-1, C), id="scattered over classes"),
    ],
)
def test_picked_rows_that_cannot_be_followed_are_never_shared_out(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Even where their number is a multiple of that of the examples: two batches have told that this is chance."""
    net, batch = Tagger(), sequences()

    def loss(module: Any, b: Batch) -> Tensor:
        z = pick(module(b["x"]), b["real"])
        return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))

    forms = _forms(loss, net, batch)
    assert list(forms.values()) == [TermForm(None, False)]
    by_chance = 0
    for n in range(2, N + 1):
        part = taken(batch, range(n))
        result = evaluate(loss, net, part, n, forms=forms)
        assert result.values is None
        assert not result.tapped
        by_chance += len(pick(net(part["x"]), part["real"])) % n == 0
    assert by_chance


def test_steps_before_the_picking_do_not_matter() -> None:
    net, batch = Tagger(), sequences()

    def loss(module: Any, b: Batch) -> Tensor:
        mixed = module(b["x"]).cumsum(1).roll(1, 1)
        return F.cross_entropy(mixed[b["real"]], b["y"][b["real"]])

    result = evaluate(loss, net, batch, N, forms=_forms(loss, net, batch))
    own = token_losses(net(batch["x"]).cumsum(1).roll(1, 1), batch["y"]).sum(1) * N / batch["real"].sum()
    torch.testing.assert_close(result.values, own.detach(), **EXACT)


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("each", [1, 3])
def test_rows_looked_up_in_a_table_belong_to_who_asked(each: int, derived: bool) -> None:
    """12 rows of 4 features, looked up by 12 examples: the rows of the table are nobody's."""
    torch.manual_seed(0)
    net = nn.ParameterDict({"table": nn.Parameter(torch.randn(12, 4)), "head": nn.Parameter(torch.randn(4, C))})
    batch = {"ids": torch.arange(N * each).view(N, each) * 5 % 12, "y": torch.arange(N) % C}

    def loss(module: Any, b: Batch) -> Tensor:
        table = F.normalize(module["table"]) if derived else module["table"]
        rows = torch.tanh(table[b["ids"].flatten()] @ module["head"])
        return F.cross_entropy(rows, b["y"].repeat_interleave(b["ids"].shape[1]))

    forms = _forms(loss, net, batch)
    assert list(forms.values()) == [TermForm(BatchLayout(0, "major"), False, follow=not derived)]
    for known in (forms, {key: TermForm(BatchLayout(0, "major"), False, follow=False) for key in forms}):
        result = evaluate(loss, net, batch, N, forms=known)
        table = F.normalize(net["table"]) if derived else net["table"]
        z = torch.tanh(table[batch["ids"]] @ net["head"])
        own = F.cross_entropy(z.transpose(1, 2), batch["y"].unsqueeze(1).expand(-1, z.shape[1]), reduction="none")
        torch.testing.assert_close(result.values, own.mean(1).detach())


def test_owners_of_rows_that_repeat() -> None:
    """Hard negatives, several draws of one example: rows count for the example they were picked from."""
    net, batch = Tagger(), sequences()
    rows = torch.tensor([3, 3, 0, 11, 3, -1])

    def loss(module: Any, b: Batch) -> Tensor:
        return F.cross_entropy(module(b["x"])[:, 0][rows], b["y"][:, 0][rows], reduction="sum")

    result = evaluate(loss, net, batch, N)
    each = F.cross_entropy(net(batch["x"])[:, 0], batch["y"][:, 0], reduction="none")
    counts = torch.zeros(N, dtype=torch.float64)
    counts[[0, 3, 11]] = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(result.values, (N * counts * each).detach(), **EXACT)


# ---------------------------------------------------------------------------------------------- scales of examples


def _calibrated(loss: Loss, net: nn.Module, batch: Batch, forms: dict[TermKey, TermForm]) -> LossScale:
    tally = ScaleTally()
    for start in range(0, N, BATCH_SIZE):
        part = taken(batch, range(start, min(start + BATCH_SIZE, N)))
        n = len(part["x"])
        terms = evaluate(loss, net, part, n, forms=forms).terms
        tally.add(n, {term.key: term.share(n) for term in terms})
    return tally.scale(BATCH_SIZE)


@pytest.mark.parametrize("name", SCALES)
def test_an_example_weighs_the_same_in_every_batch(name: str) -> None:
    """Whoever divides, torch or the task: after calibration no batch matters, and all batches make the mean."""
    loss, sums, divisor = SCALES[name]
    net, batch = Tagger(), sequences()
    forms = _forms(loss, net, batch)
    single: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6} if "huggingface" in name else EXACT
    for n in (1, 3, 4, 7, N):
        part = taken(batch, range(n))
        alone = evaluate(loss, net, part, n, forms=forms)
        assert alone.tapped
        assert alone.values is not None
        torch.testing.assert_close(alone.values.mean(), alone.loss.detach().to(alone.values), **single)
    scale = _calibrated(loss, net, batch, forms)
    expected = (sums(net(batch["x"]), batch) / divisor(batch)).detach()
    for n in (1, 2, 3, 5, N):
        values, gradients = [], torch.zeros_like(net.head.weight)
        for start in range(0, N, n):
            part = taken(batch, range(start, min(start + n, N)))
            result = evaluate(loss, net, part, len(part["x"]), scale, forms)
            assert result.values is not None
            values.append(result.values)
            gradients += _gradients(result, net.head.weight)
        torch.testing.assert_close(torch.cat(values), expected.to(values[0]), **single)
        own = (sums(net(batch["x"]), batch) / divisor(batch)).sum()
        torch.testing.assert_close(gradients, torch.autograd.grad(own, net.head.weight)[0], **single)


def _spread(level: float, shape: tuple[int, ...]) -> Tensor:
    return torch.full((N, *shape), level, dtype=torch.float64)


@pytest.mark.parametrize("name", SCALES)
def test_the_fisher_weighs_examples_as_their_losses(name: str) -> None:
    """Twice the weight of an example's loss is twice its Fisher: the traces agree with the Hessian's."""
    loss, sums, divisor = SCALES[name]
    net, batch = Tagger(), sequences()
    seen: list[Tensor] = []

    def task(module: Any, data: Batch) -> Tensor:
        seen[:] = [net(data["x"])]
        return loss(lambda x: seen[0], data)

    forms = _forms(task, net, batch)
    scale = _calibrated(task, net, batch, forms)
    result = evaluate(task, net, batch, N, scale, forms)
    draws = 40
    trace = torch.zeros(N, dtype=torch.float64)
    for draw in range(draws):  # evenly spread noise: the trace asks for no independence
        outputs, gradients = result.sampled_outputs(functools.partial(_spread, (draw + 0.5) / draws))
        (at_logits,) = torch.autograd.grad(outputs, seen[0], gradients, retain_graph=True)
        trace += at_logits.square().sum((1, 2)) / draws
    hessian = torch.autograd.functional.hessian(lambda z: (sums(z, batch) / divisor(batch)).sum(), seen[0].detach())
    expected = torch.stack([hessian[n, :, :, n].reshape(S * C, S * C).trace() for n in range(N)])
    assert bool(((trace - expected).abs() <= 0.06 * expected + 1e-9).all())


def test_a_batch_in_which_nothing_counts() -> None:
    """0 / 0 in the task: such examples have no loss, and do not spoil those of other batches."""
    net, batch = Tagger(), sequences()
    batch["real"] = batch["real"].clone()
    batch["real"][8:] = False
    batch["y"] = batch["y"].masked_fill(~batch["real"], PAD)
    for name in ("mean by hand", "sum over tokens", "tokens"):
        loss = SCALES[name][0]
        forms = _forms(loss, net, batch)
        scale = LossScale(dict.fromkeys(forms, 2.5))
        if name == "sum over tokens":  # divides integers
            continue
        result = evaluate(loss, net, taken(batch, range(8, N)), 4, scale, forms)
        assert result.values is not None
        assert result.values.tolist() == [0.0] * 4
        assert result.terms[0].share(4).total == 0.0
        assert not bool(_gradients(result, net.head.weight).any())


# ----------------------------------------------------------------------------------------------------- many terms


def test_terms_keep_their_keys_where_one_is_missing_its_rows() -> None:
    """The first call's rows do not fit: the second has its own key, by which its reference goes."""
    net, batch = Tagger(), sequences()

    def loss(module: Any, b: Batch) -> Tensor:
        z = module(b["x"])
        return F.mse_loss(z.flatten()[: N * S * C - 1], b["t"].flatten()[: N * S * C - 1]) + F.cross_entropy(
            z[:, 0], b["y"][:, 0], torch.tensor([1.0, 2.0, 3.0]).double()
        )

    (of_squares, of_labels) = [term.key for term in evaluate(loss, net, batch, N).seen]
    result = evaluate(loss, net, batch, N, LossScale({of_labels: 2.0}))
    assert [term.key for term in result.seen] == [of_squares, of_labels]
    assert [term.key for term in result.terms] == [of_labels]
    assert result.terms[0].reference == 2.0
    assert not result.tapped


def test_several_terms_in_several_layouts() -> None:
    """A multi-task step: tokens, time-major auxiliary squares, a head on some rows, a loss that is only logged."""
    net, batch = Tagger(), sequences()
    logged: list[Tensor] = []

    def loss(module: Any, b: Batch) -> Tensor:
        z = module(b["x"])
        logged.append(F.l1_loss(z, b["t"]))
        tokens = F.cross_entropy(z.flatten(0, 1), b["y"].flatten())
        squares = F.mse_loss(z.transpose(0, 1), b["t"].transpose(0, 1), reduction="sum") / len(z)
        first = masked_mean(
            F.binary_cross_entropy_with_logits(z[..., 0], b["real"].double(), reduction="none"), b["real"]
        )
        return tokens + 0.3 * squares + 0.1 * first

    forms = _forms(loss, net, batch)
    assert [form.layout for form in forms.values()] == [
        BatchLayout(0, "major"),
        BatchLayout(1, "major"),
        BatchLayout(0, "major"),
    ]
    scale = _calibrated(loss, net, batch, forms)
    z = net(batch["x"])
    bits = F.binary_cross_entropy_with_logits(z[..., 0], batch["real"].double(), reduction="none") * batch["real"]
    tokens = tokens_per_example(batch)
    own = (
        token_sums(z, batch) / tokens + 0.3 * (z - batch["t"]).square().sum((1, 2)) + 0.1 * bits.sum(1) / tokens
    ).detach()
    values = []
    for start in range(0, N, 5):
        part = taken(batch, range(start, min(start + 5, N)))
        result = evaluate(loss, net, part, len(part["x"]), scale, forms)
        assert result.tapped
        assert len(result.terms) == 3
        assert result.values is not None
        values.append(result.values)
    torch.testing.assert_close(torch.cat(values), own, **EXACT)


def test_the_call_that_training_records() -> None:
    """The first call that the loss is made of, with its examples where the form says."""
    net, batch = Tagger(), sequences()
    loss, layout = LAYOUTS["time-major, flat"]
    forms = _forms(loss, net, batch)

    def step() -> tuple[Tensor, LossTap]:
        with LossTap() as tap:
            F.mse_loss(net(batch["x"]), batch["t"])  # only logged
            total = loss(net, batch)
        return total, tap

    total, tap = step()
    assert len(tap.calls) == 2
    (used,) = calls_in(total, tap.calls)
    keyed = {key: form for (key, _, _), form in zip(placed_calls([used], {}), forms.values(), strict=True)}
    ((_, call, _),) = placed_calls([used], keyed)
    assert isinstance(call, CrossEntropy)
    assert call.input is used.input
    assert call.layout == layout
    own = token_losses(net(batch["x"]), batch["y"]).sum(1) / batch["lengths"]
    torch.testing.assert_close(call.statistics(N)["loss"], own.detach(), **EXACT)
    assert not call.rows_match(7)


def test_the_weight_of_an_absolute_error_is_not_lost() -> None:
    """`F.l1_loss` does not tell function modes of its `weight`: without it the training loss would be another one."""
    z = torch.randn(N, C, requires_grad=True)
    target, weight = torch.randn(N, C), torch.rand(N, C)
    expected = l1_loss(z, target, weight=weight)
    assert float(expected.detach()) != float(F.l1_loss(z.detach(), target))
    with LossTap() as tap:
        assert torch.equal(l1_loss(z, target, weight=weight), expected)
        assert torch.equal(F.l1_loss(z, target), F.l1_loss(z.detach(), target))
    (weighted, plain) = tap.calls
    assert getattr(weighted, "element_weights") is weight  # noqa: B009 - of one kind of call only
    assert getattr(plain, "element_weights") is None  # noqa: B009

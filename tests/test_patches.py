"""Patches of convolutions: their layout, and their second moment without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracing import covered

from lightning_influence.core.layout import BatchLayout
from lightning_influence.gradients.capture import Capture
from lightning_influence.layers import patches, per_sample
from lightning_influence.layers.call import Layouts
from lightning_influence.layers.convolution import ConvolutionCall
from lightning_influence.layers.patches import Patches, laid_out
from lightning_influence.layers.per_sample import forming
from lightning_influence.layers.rows import rotate, second_moment

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

# Padded images, then what the patches are.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3 x 3": ((5, 4, 9, 8), {"kernel": (3, 3)}),
    "without a bias": ((5, 4, 9, 8), {"kernel": (3, 3), "ones": False}),
    "not square": ((5, 4, 9, 8), {"kernel": (4, 2)}),
    "one column": ((5, 4, 9, 8), {"kernel": (3, 1)}),
    "groups": ((5, 6, 9, 8), {"kernel": (3, 3), "groups": 3}),
    "depthwise": ((5, 3, 9, 8), {"kernel": (3, 3), "groups": 3}),
    "stride along the rows": ((5, 4, 9, 8), {"kernel": (3, 3), "stride": (1, 2)}),
    "dilation": ((5, 4, 11, 9), {"kernel": (3, 2), "dilation": (2, 3)}),
    "reversed": ((5, 4, 9, 8), {"kernel": (3, 2), "flipped": True}),
    "three dimensions": ((5, 2, 8, 4, 5), {"kernel": (2, 3, 2)}),
    "as many rows as the kernel": ((5, 4, 5, 8), {"kernel": (3, 3)}),
    "nothing in common": ((5, 4, 11, 8), {"kernel": (3, 3), "dilation": (4, 1)}),
    "several images each": ((6, 4, 9, 8), {"kernel": (3, 3), "n": 2}),
    "margins": ((5, 4, 9, 8), {"kernel": (3, 3), "margin": (1, 2)}),
    "mostly margin": ((5, 4, 9, 8), {"kernel": (3, 3), "margin": (5, 4)}),
}


def case(name: str) -> Patches:
    shape, changes = CASES[name]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = len(changes["kernel"])
    before, after = changes.get("margin", (0, 0))
    images[:, :, :before] = 0
    images[:, :, shape[2] - after :] = 0
    options = {"n": shape[0], "stride": (1,) * d, "dilation": (1,) * d, "ones": True, **changes}
    return Patches(images, **options)


def dense(of: Patches) -> Tensor:
    """``[k, n, s, i]``, entry by entry of the kernel."""
    outputs = of.outputs
    columns = []
    kernel = torch.zeros(of.kernel)
    for entry in (kernel == 0).nonzero().tolist():
        places = [size - 1 - a for size, a in zip(of.kernel, entry, strict=True)] if of.flipped else entry
        starts = [place * step for place, step in zip(places, of.dilation, strict=True)]
        window = tuple(
            slice(start, start + (out - 1) * step + 1, step)
            for start, out, step in zip(starts, outputs, of.stride, strict=True)
        )
        columns.append(of.images[(slice(None), slice(None), *window)].flatten(2))  # n c s
    stacked = torch.stack(columns, 2).unflatten(1, (of.groups, -1)).flatten(2, 3)  # n k i s
    if of.ones:
        stacked = F.pad(stacked, (0, 0, 0, 1), value=1.0)
    return stacked.permute(1, 0, 3, 2).reshape(of.groups, of.n, -1, stacked.shape[2])


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_LEAST_INPUTS", 0)


@pytest.mark.parametrize("name", CASES)
class TestPatches:
    def test_laid_out(self, name: str) -> None:
        found = case(name)
        rows = found.laid_out()
        assert rows.shape == found.shape
        assert torch.equal(rows, dense(found))

    def test_products_of_positions(self, name: str) -> None:
        found, rows = case(name), dense(case(name))
        if math.isinf(found.gram_cost()):
            assert found.n < len(found.images)
            return
        torch.testing.assert_close(found.gram(), rows @ rows.mT, **EXACT)

    @pytest.mark.parametrize("elements", [1, 20_000, 2**22])
    @pytest.mark.parametrize("form", ["auto", "gram", "pixels", "form"])
    def test_norms(self, name: str, form: Any, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one example at a time, of a few, of all at once."""
        monkeypatch.setattr(forming, "_CHUNK_ELEMENTS", elements)
        found, rows = case(name), dense(case(name))
        if form == "pixels" and math.isinf(found.gram_cost()):  # several images each
            form = "auto"
        generator = torch.Generator().manual_seed(1)
        g = torch.randn(*rows.shape[:3], 3, generator=generator, dtype=torch.float64)
        expected = torch.einsum("knso,knsi->knoi", g, rows).square().sum((0, 2, 3))
        torch.testing.assert_close(per_sample.squared_norms(found, g, form=form), expected, **EXACT)
        of_weight, of_bias = per_sample.squared_norms_with_bias(found, g)
        torch.testing.assert_close(of_weight, expected, **EXACT)
        torch.testing.assert_close(of_bias, g.sum(2).square().sum((0, 2)), **EXACT)

    @pytest.mark.usefixtures("of_any_size")
    def test_second_moment(self, name: str) -> None:
        """From the images, in fewer products than the patches would take."""
        found, rows = case(name), dense(case(name))
        moment = found.second_moment()
        assert moment is not None
        torch.testing.assert_close(moment, torch.einsum("knsi,knsj->kij", rows, rows), **EXACT)
        assert torch.equal(second_moment(found), moment)

    def test_moments_and_rotations_of_the_layout(self, name: str) -> None:
        """Laid out with the examples beside the positions, and cut into batches."""
        rows, expected = case(name).laid_out(), dense(case(name))
        basis = torch.linalg.qr(torch.randn(rows.shape[0], rows.shape[3], rows.shape[3], dtype=torch.float64))[0]
        for part in (slice(None), slice(1, 3), slice(0, 1)):
            some, wanted = rows[:, part], expected[:, part]
            torch.testing.assert_close(second_moment(some), torch.einsum("knsi,knsj->kij", wanted, wanted), **EXACT)
            torch.testing.assert_close(second_moment(some, diagonal=True), wanted.square().sum((1, 2)), **EXACT)
            torch.testing.assert_close(rotate(some, basis), wanted @ basis.unsqueeze(1), **EXACT)


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        lambda: nn.Conv2d(3, 4, (3, 2), padding=(2, 0), dilation=(1, 2)),
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
        lambda: nn.Conv2d(3, 4, 4, padding="same"),
        lambda: nn.Conv3d(3, 4, 2, padding=1),
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    ],
)
def test_padding_of_a_call(make: Callable[[], nn.Module]) -> None:
    """What a call says of its margins leaves nothing out."""
    layer = make().double()
    inputs = torch.randn(4, 4 if layer.groups > 1 else 3, *(7,) * (layer.weight.ndim - 2), dtype=torch.float64)
    with Capture(covered(layer, inputs)) as capture:
        with capture.forward():
            loss = layer(inputs).square().sum()
        capture.backward([loss], [torch.ones_like(loss)])
        (io,) = capture.layers(4)
    (found,) = io.activations
    assert isinstance(found, Patches)
    assert any(found.margin)
    rows = dense(found)
    torch.testing.assert_close(second_moment(found), torch.einsum("knsi,knsj->kij", rows, rows), **EXACT)


def test_where_products_of_pixels_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many channels on few pixels: nothing is laid out. On many pixels there are too many pairs of them."""
    one = (1, 1)
    small = Patches(torch.randn(2, 64, 9, 9, dtype=torch.float64), 2, (3, 3), one, one, ones=True)
    large = Patches(torch.randn(2, 8, 34, 34, dtype=torch.float64), 2, (3, 3), one, one)
    few, many = torch.randn(1, 2, 49, 128, dtype=torch.float64), torch.randn(1, 2, 1024, 16, dtype=torch.float64)
    expected = torch.einsum("knso,knsi->knoi", few, dense(small)).square().sum((0, 2, 3))

    def fail(*_: Any) -> Tensor:
        raise AssertionError("laid out, or all pairs of pixels")

    with monkeypatch.context() as patched:
        patched.setattr(Patches, "laid_out", fail)
        torch.testing.assert_close(per_sample.squared_norms(small, few), expected, **EXACT)
        torch.testing.assert_close(per_sample.squared_norms_with_bias(small, few)[0], expected, **EXACT)
    monkeypatch.setattr(Patches, "gram", fail)
    per_sample.squared_norms(large, many)


def test_where_it_does_not_pay() -> None:
    """Strides between rows, one dimension, few inputs: the patches themselves are multiplied."""
    images = torch.randn(3, 40, 9, 9)
    one = (1, 1)
    assert Patches(images, 3, (3, 3), one, one).second_moment() is not None
    assert Patches(images[:, :4], 3, (3, 3), one, one).second_moment() is None
    assert Patches(images, 3, (3, 3), (2, 1), one).second_moment() is None
    assert Patches(images, 3, (1, 3), one, one).second_moment() is None
    assert Patches(images[:, :, :4], 3, (3, 3), one, one).second_moment() is None
    assert Patches(images.flatten(2), 3, (30,), (1,), (1,)).second_moment() is None


def test_fewer_multiplications() -> None:
    """A third of the rows are copied, and of nine products of kernel rows three are made, for 3 x 3."""
    found = Patches(torch.randn(2, 16, 34, 34), 2, (3, 3), (1, 1), (1, 1), margin=(1, 1))
    rows = found._kernel_rows()
    assert rows.numel() == 34 * 16 * 3 * 2 * 32
    multiplied: list[int] = []

    class Counted(Patches):
        def _add(self, total: Tensor, rows: Tensor, start: int, stop: int, apart: int) -> None:
            multiplied.append(max(0, min(stop, 33 - apart) - max(start, 1)) * math.prod(rows.shape[1:]) * rows.shape[2])
            super()._add(total, rows, start, stop, apart)

    Counted(found.images, 2, (3, 3), (1, 1), (1, 1), margin=(1, 1)).second_moment()
    assert sum(multiplied) < 0.35 * 2 * 32 * 32 * (16 * 9) ** 2


def test_laid_out_leaves_tensors_alone() -> None:
    rows = torch.randn(1, 2, 3, 4)
    assert laid_out([rows])[0] is rows


def test_by_example() -> None:
    """Examples that share the first dimension with time, time first."""
    images = torch.randn(3 * 2, 4, 5, 5)
    call = ConvolutionCall(images, {"weight": torch.zeros(1)}, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))
    rows = call.activations(2, Layouts(BatchLayout(0, "minor")))
    unfolded = F.unfold(images, 3).transpose(1, 2)  # [n·m, s, i]
    ordered = unfolded.view(3, 2, 9, -1).transpose(0, 1).reshape(1, 2, 27, -1)
    torch.testing.assert_close(rows, ordered)

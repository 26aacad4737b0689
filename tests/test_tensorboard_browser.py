"""The Influence tab of a real TensorBoard in a real browser: from a training to decisions, and back to the labels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_trainer
from page_data import HOSTILE, report_of
from tensorboard_data import tensorboard, write_blobs, write_page
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from which_lightning import TensorBoardLogger, pl

from lightning_influence import InfluenceAudit
from lightning_influence.audit.report import AuditReport

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (`make test-browser` does)")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian, Ubuntu: apt install chromium)")

# Where screenshots go, for people: a folder, or nowhere.
SHOTS = os.environ.get("SCREENSHOTS")
SIZE, CLASSES, WRONG = 240, 4, 16


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def bars(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures with a bright bar in one of four places, which is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    pixels = torch.rand(n, 1, 8, 8, generator=generator) / 2
    for label in range(CLASSES):
        pixels[labels == label, :, 2 * label : 2 * label + 2] += 1
    return pixels, labels


def train(directory: Path, data: Any, version: str) -> AuditReport:
    audit = InfluenceAudit(queries="worst", verify=False)
    logger = TensorBoardLogger(directory, name="", version=version)
    trainer = make_trainer(directory, max_epochs=5, logger=logger, callbacks=[audit])
    pl.seed_everything(0)
    trainer.fit(Net(), DataLoader(data, 32, shuffle=True), DataLoader(TensorDataset(*bars(60, 1)), 32))
    assert audit.report is not None
    return audit.report


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TensorDataset, torch.Tensor]:
    """A log directory; data with wrong labels; the right ones."""
    root = tmp_path_factory.mktemp("logs")
    pixels, right = bars(SIZE, 0)
    given = right.clone()
    given[:: SIZE // WRONG] = (given[:: SIZE // WRONG] + 1) % CLASSES
    data = TensorDataset(pixels, given)
    train(root, data, "noisy")
    texts = report_of(90, classes=3, label_names=["good", HOSTILE, "bad"], created="2025-12-31")
    write_page(root / "other", texts)
    write_blobs(root / "damaged", "audit/influence", [b'{"format": 1, "col'])
    write_page(root / "going_on", report_of(80, status="recording"), "recording/influence", step=1, epochs=2)
    return root, data, right


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def address(trained: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    with tensorboard(trained[0], "--load_fast", request.param, "--reload_interval", "1") as found:
        yield found


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True).new_page()
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: said.append(str(error)))
        yield opened
        browser.close()
    # TensorBoard's own page asks fonts of the network, if there is one.
    assert [line for line in said if "fonts" not in line and "ERR_NAME" not in line] == []


def tab(page: Any, address: str) -> Any:
    """Open the tab, and return its frame."""
    page.goto(f"{address}#influence")
    page.wait_for_selector("iframe")
    handle = page.locator("iframe").element_handle()
    frame = handle.content_frame()
    frame.wait_for_selector("main > *:not(.nothing)")
    return frame


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"tensorboard-{name}.png"))


def test_from_a_training_to_decisions_and_to_the_labels_of_the_next(
    page: Any, address: str, trained: Any, tmp_path: Path
) -> None:
    root, data, right = trained
    report = AuditReport.load(root / "noisy" / "influence")
    order = [int(index) for index in report.candidates]
    suggested = dict(zip(report.columns["index"].tolist(), report.columns["suggested"].tolist(), strict=True))
    assert len(order) >= 10
    frame = tab(page, address)
    frame.get_by_label("audit", exact=True).select_option("noisy/influence")
    shot(page, "overview")
    frame.get_by_role("button", name="Triage", exact=True).click()
    frame.wait_for_selector(".progress")
    frame.wait_for_selector("img[src^='data:image/png']")
    for key in "rrrrkrrdrr":
        page.keyboard.press(key)
    frame.get_by_text(f"10 of {len(order)} candidates decided").wait_for()
    shot(page, "triage")
    with page.expect_download() as download:
        frame.get_by_role("button", name="Export CSV").click()
    path = tmp_path / "review.csv"
    download.value.save_as(path)
    review = report.apply_review(path)
    chosen = [index for place, index in enumerate(order[:10]) if place not in (4, 7)]
    assert dict(review.labels) == {index: suggested[index] for index in chosen}
    assert (tuple(review.kept), tuple(review.dropped)) == ((order[4],), (order[7],))
    mended = report.relabelled(data, labels=dict(review.labels))
    changed = [index for index in range(SIZE) if int(mended[index][1]) != int(data[index][1])]
    assert changed == sorted(chosen)
    assert all(int(mended[index][1]) == int(right[index]) for index in chosen)
    again = train(tmp_path, mended, "mended")
    labels = dict(zip(again.columns["index"].tolist(), again.columns["label"].tolist(), strict=True))
    assert [labels[index] for index in chosen] == [int(right[index]) for index in chosen]
    # They are there again after a reload.
    frame = tab(page, address)
    frame.get_by_label("audit", exact=True).select_option("noisy/influence")
    frame.get_by_role("button", name="Triage", exact=True).click()
    frame.get_by_text(f"10 of {len(order)} candidates decided").wait_for()


@pytest.mark.parametrize("view", ["Overview", "Queries", "Class pairs", "Compare"])
def test_every_view_shows(page: Any, address: str, view: str) -> None:
    frame = tab(page, address)
    frame.get_by_label("audit", exact=True).select_option("noisy/influence")
    frame.get_by_role("button", name=view, exact=True).click()
    frame.wait_for_selector("main > *:not(.nothing)")
    page.wait_for_timeout(300)
    shot(page, view.replace(" ", "_").lower())


def test_what_cannot_be_read_and_what_goes_on(page: Any, address: str) -> None:
    frame = tab(page, address)
    chooser = frame.get_by_label("audit", exact=True)
    chooser.select_option("damaged/influence")
    frame.get_by_text("it is damaged, or no audit's").first.wait_for()
    shot(page, "damaged")
    chooser.select_option("going_on/influence")
    frame.get_by_text("2 of 5").first.wait_for()
    shot(page, "going_on")
    chooser.select_option("other/influence")
    frame.wait_for_selector("main > *:not(.nothing)")
    assert "hacked" not in (frame.title(), page.title())

"""The Influence tab of a real TensorBoard in a real browser, with its fast loader and with the other one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page_runs
import pytest
from browser_page import NEEDED, SHOTS, opened
from page_data import HOSTILE, report_of
from tensorboard_data import tensorboard, write_blobs, write_page

pytestmark = NEEDED


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log directory."""
    root = tmp_path_factory.mktemp("logs")
    page_runs.train("pictures", root, "noisy")
    texts = report_of(90, classes=3, label_names=["good", HOSTILE, "bad"], created="2025-12-31")
    write_page(root / "other", texts)
    write_blobs(root / "damaged", "audit/influence", [b'{"format": 1, "col'])
    write_page(root / "going_on", report_of(80, status="recording"), "recording/influence", step=1, epochs=2)
    return root


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast", "slow"])
def address(trained: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    with tensorboard(trained, "--load_fast", request.param, "--reload_interval", "1") as found:
        yield found


@pytest.fixture
def page() -> Iterator[Any]:
    yield from opened()


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


def test_decisions_are_there_again_after_a_reload(page: Any, address: str) -> None:
    for decided in (2, 4):
        frame = tab(page, address)
        frame.get_by_label("audit", exact=True).select_option("noisy/influence")
        frame.get_by_role("button", name="Triage", exact=True).click()
        frame.get_by_text(re.compile(f"^{decided - 2} of \\d+ candidates decided$")).wait_for()
        page.keyboard.press("Home")
        for key in ["ArrowDown"] * (decided - 2) + ["r", "k"]:
            page.keyboard.press(key)
        frame.get_by_text(re.compile(f"^{decided} of ")).wait_for()
    shot(page, "triage")


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

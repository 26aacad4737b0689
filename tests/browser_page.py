"""A page in a real browser, beside TensorBoard; tests that import this are skipped where there is no browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (`make test-browser` does)")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian, Ubuntu: apt install chromium)")

# Where screenshots go, for people: a folder, or nowhere.
SHOTS = os.environ.get("SCREENSHOTS")


def opened() -> Iterator[Any]:
    """Yield a page, for a fixture: afterwards nothing may have been wrong in it."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True).new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        yield page
        browser.close()
    # TensorBoard's own page asks fonts of the network, if there is one.
    assert [line for line in said if "fonts" not in line and "ERR_NAME" not in line] == []

"""Take the pictures of the page that the README shows, of the demo's audit and of one after its labels were mended.

Run with ``make screenshots``; needs playwright, and a Chromium (``CHROMIUM=...`` names one).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import lightning as L
from digits import Digits, noisy_digits
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from playwright.sync_api import sync_playwright
from torch.utils.data import DataLoader

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.view import ViewServer

SIZE, SMALL = {"width": 1280, "height": 800}, {"width": 1024, "height": 640}
# What is pressed in the animated picture, and for how many milliseconds what came of it is shown.
KEYS = (
    *(("ArrowDown", 500), ("ArrowDown", 500), ("ArrowUp", 500), ("ArrowUp", 700)),
    *(
        ("r", 900),
        ("r", 700),
        ("r", 600),
        ("k", 900),
        ("u", 1000),
        ("r", 700),
        ("the suggested digit", 1000),
        ("r", 600),
    ),
    *(("s", 800), ("r", 500), ("r", 500), ("r", 500), ("r", 500), ("r", 1800)),
)
SHOWN = {"ArrowDown": "↓", "ArrowUp": "↑"}
# Shows a key as it is pressed.
CAP = """(key) => {
  const cap = document.querySelector('.pressed') ?? document.body.appendChild(document.createElement('div'));
  cap.className = 'pressed';
  cap.textContent = key;
  cap.style.cssText = 'position: fixed; left: 290px; bottom: 16px; min-width: 62px; padding: 0 14px;'
    + 'text-align: center; border-radius: 12px; background: #1a1f26; color: #fff; '
    + 'font: 600 34px/62px sans-serif; outline: 2px solid #fff';
}"""


def main() -> None:
    """Open the page of the newest audit, go through its views, and decide by keys."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, help="where the demo has written its logs")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not (arguments.logs / "mended").exists():
        mended(arguments.logs)
    for path in arguments.logs.rglob("review.csv"):  # of the time before: `view` keeps what is decided
        path.unlink()
    with ViewServer(arguments.logs, port=0) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            page.goto(server.url)
            page.get_by_label("audit", exact=True).select_option(label="mislabelled_digits/version_0/influence")
            views(page, arguments.out, scheme)
        page = browser.new_context(viewport=SMALL).new_page()
        page.goto(server.url)
        page.get_by_label("audit", exact=True).select_option(label="mislabelled_digits/version_0/influence")
        animated(page, arguments.out / "triage.webp")
        browser.close()
        server.shutdown()


def views(page: Any, out: Path, scheme: str) -> None:
    """Show one view after the other, and write what each looks like."""

    def take(name: str) -> None:
        still(page, out / f"page-{name}-{scheme}.png")

    page.get_by_role("heading", name="Scores").wait_for()
    take("overview")
    for name in ("Example", "Queries", "Compare"):
        page.get_by_role("button", name=name, exact=True).click()
        page.wait_for_selector("main > *:not(.nothing)")
        take(name.lower())


def still(page: Any, path: Path) -> None:
    """Write what is to be seen once it stands still."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)
    frame(page).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def animated(page: Any, path: Path) -> None:
    """Write what keys do in triage, each key beside what it did."""
    page.get_by_role("button", name="Look at").click()
    page.wait_for_selector(".panel img[src]")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    frames, times = [frame(page)], [1200]
    for key, time in KEYS:
        pressed = page.locator(".panel .labels .suggested").inner_text() if "digit" in key else key
        page.evaluate(CAP, SHOWN.get(pressed, pressed.upper()))
        page.keyboard.press(pressed)
        page.wait_for_timeout(300)
        frames.append(frame(page))
        times.append(time)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {len(frames)} frames, {sum(times) / 1000:.0f} s")


def frame(page: Any) -> Image.Image:
    """Return what is to be seen."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def mended(logs: Path) -> None:
    """Train the demo again on the labels that its audit suggests: what `Compare` shows."""
    train, validation, _ = noisy_digits(0.1, 0)
    report = AuditReport.load(logs / "mislabelled_digits" / "version_0")
    L.seed_everything(0)
    logger = TensorBoardLogger(logs, name="", version="mended")
    trainer = L.Trainer(max_epochs=8, accelerator="cpu", logger=logger, callbacks=[InfluenceAudit()])
    repaired = DataLoader(report.relabelled(train), batch_size=32, shuffle=True)
    trainer.fit(Digits(), repaired, DataLoader(validation, batch_size=256))


if __name__ == "__main__":
    main()

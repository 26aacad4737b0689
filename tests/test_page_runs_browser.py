"""Real trainings in a real browser: by keys alone, while they go on, and back to the labels of the next."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import page_runs
import pytest
from browser_page import NEEDED, SHOTS, opened, sync_api
from tensorboard_data import tensorboard

from lightning_influence.audit.report import AuditReport

pytestmark = NEEDED

VIEW = "import sys; from lightning_influence.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    for kind in page_runs.KINDS:
        page_runs.train(kind, root, kind)
    return root


@pytest.fixture
def page() -> Iterator[Any]:
    yield from opened()


@contextmanager
def viewed(directory: Path) -> Iterator[str]:
    """Run the real program on a free port; yield its address."""
    command = [sys.executable, "-c", VIEW, "view", str(directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield next(found[0] for line in running.stdout if (found := re.search(r"http://\S+", line)))
        finally:
            running.kill()


@contextmanager
def in_a(host: str, directory: Path, page: Any) -> Iterator[Any]:
    """Open the page from TensorBoard or from `view`; yield what holds it."""
    if host == "view":
        with viewed(directory) as address:
            page.goto(address)
            yield page
            page.goto("about:blank")  # else it asks a server that is not there any more
        return
    with tensorboard(directory, "--reload_interval", "1") as address:
        page.goto(f"{address}#influence")
        yield page.wait_for_selector("iframe").content_frame()
        page.goto("about:blank")


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"runs-{name}.png"))


def reach(page: Any, name: str) -> None:
    """Go to a control by the tabulator, as whoever has no mouse does."""
    named = "((e) => (e.ariaLabel || e.innerText || '').split('\\n')[0].trim())(document.activeElement)"
    for _ in range(400):
        page.keyboard.press("Tab")
        if page.evaluate(named) == name:
            return
    raise AssertionError(f"{name} can't be reached by keys")


def use(page: Any, name: str, *keys: str) -> None:
    reach(page, name)
    for key in keys or ("Enter",):
        page.keyboard.press(key)


# ---------------------------------------------------------------------------------------------- without a mouse


@pytest.mark.parametrize("kind", page_runs.KINDS)
def test_each_area_by_keys_alone(page: Any, logs: Path, kind: str, tmp_path: Path) -> None:
    report = AuditReport.load(logs / kind / "influence")
    listed = report.candidates if len(report.candidates) else report.ranking
    many = f"{len(listed):,} {'candidates' if len(report.candidates) else 'examples'}"
    with viewed(logs) as address:
        page.goto(address)
        page.get_by_role("heading", name="Scores").wait_for()
        reach(page, "audit")
        page.keyboard.type(kind)
        sync_api.expect(page.get_by_label("audit", exact=True)).to_have_value(f"{kind}/influence")
        page.get_by_text(f"Look at {many}").wait_for()
        # Overview: another column, its epochs, and on.
        reach(page, "column")
        page.keyboard.type("margin")
        use(page, "epoch", "ArrowLeft")
        assert page.locator("output").inner_text() == f"epoch {page_runs.EPOCHS - 2}"
        reach(page, "class")
        page.keyboard.press("ArrowDown")
        page.locator(".chart rect.bar").first.wait_for()
        shot(page, f"{kind}-overview")
        use(page, f"Look at {many}")
        # Triage.
        page.get_by_role("listbox").wait_for()
        for key in ("k", "r", "d", "s", "u", "ArrowUp", "ArrowUp"):
            page.keyboard.press(key)
        page.get_by_text(re.compile("^3 (of .* candidates decided|decisions)$")).wait_for()
        assert page.locator(".panel strong").inner_text() == f"#{listed[1]}"
        shot(page, f"{kind}-triage")
        with page.expect_download() as download:
            use(page, "Export CSV")
        download.value.save_as(tmp_path / "review.csv")
        review = report.apply_review(tmp_path / "review.csv")
        assert (review.kept, review.confirmed, review.dropped) == ((listed[0],), (listed[1],), (listed[2],))
        with page.expect_file_chooser() as chooser:
            use(page, "Import")
        chooser.value.set_files(tmp_path / "review.csv")
        page.get_by_text("3 decisions taken over").wait_for()
        use(page, "search")
        page.keyboard.type(f"#{listed[4]}")
        page.keyboard.press("Escape")
        assert page.locator(".panel strong").inner_text() == f"#{listed[4]}"
        # Example.
        page.keyboard.press("Enter")
        page.get_by_role("heading", name=f"Example {listed[4]}").wait_for()
        page.locator(".figures .curve").nth(2).wait_for()
        page.keyboard.press("k")
        page.locator(".badge.keep").wait_for()
        shot(page, f"{kind}-example")
        page.keyboard.press("ArrowRight")
        page.get_by_role("heading", name=f"Example {report.ranking[5]}").wait_for()
        # Queries, and from one to an example.
        use(page, "Queries")
        page.get_by_role("heading", name="Query 1:").wait_for()
        page.keyboard.press("ArrowDown")
        page.get_by_role("heading", name="Query 2:").wait_for()
        use(page, "list", "ArrowDown")
        page.get_by_text("relative to how much the example moves").wait_for()
        shot(page, f"{kind}-queries")
        opponent = page.locator(".opponent .entry .index").first.inner_text()
        use(page, opponent)
        page.get_by_role("heading", name=f"Example {opponent[1:]}").wait_for()
        # Class pairs: a pair, and a box.
        use(page, "Class pairs")
        shot(page, f"{kind}-pairs")
        pair = page.locator(".matrix .cell button").first.get_attribute("aria-label")
        use(page, pair)
        page.get_by_text("listed").wait_for()
        use(page, "Class pairs")
        reach(page, "prob_margin to")
        page.keyboard.type(f"{sorted(report.columns['prob_margin'])[9]:.3f}")
        page.keyboard.press("Enter")
        told = page.get_by_role("button", name="Look at").inner_text()
        use(page, told)
        page.get_by_text(f"{told.removeprefix('Look at ')} listed").wait_for()
        # Compare.
        use(page, "Compare")
        use(page, "compare with", "ArrowDown")
        page.get_by_text("examples in both").wait_for()
        shot(page, f"{kind}-compare")


# --------------------------------------------------------------------------------------- while training goes on


def started(kind: str, directory: Path) -> subprocess.Popen[str]:
    """Start a training that waits at the end of each epoch."""
    command = [sys.executable, page_runs.__file__, kind, str(directory)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes, text=True)


def ended(running: subprocess.Popen[str], epoch: int) -> None:
    """Wait until an epoch is over."""
    assert running.stdout is not None
    assert any(line.startswith(f"epoch {epoch}") for line in iter(running.stdout.readline, ""))


def shows(page: Any, frame: Any, text: str) -> None:
    """Wait until the page has looked again, and found it."""
    for _ in range(100):
        page.clock.fast_forward(11_000)
        page.wait_for_timeout(200)
        if frame.get_by_text(text).count():
            return
    raise AssertionError(f"{text!r} is not in {frame.locator('body').inner_text()!r}")


@pytest.mark.parametrize("host", ["tensorboard", "view"])
def test_a_training_that_goes_on_and_ends(page: Any, tmp_path: Path, host: str) -> None:
    with started("pictures", tmp_path) as running:
        assert running.stdin is not None
        try:
            ended(running, 0)
            page.clock.install()
            with in_a(host, tmp_path, page) as frame:
                shows(page, frame, f"Training goes on: 1 epoch recorded of {page_runs.EPOCHS}.")
                running.stdin.write("\n")
                running.stdin.flush()
                ended(running, 1)
                shows(page, frame, f"Training goes on: 2 epochs recorded of {page_runs.EPOCHS}.")
                assert frame.locator(".card").get_by_text("candidates").count() == 0  # not none, but none so far
                # What there is so far, epoch by epoch; what is to come is said where one would look for it.
                frame.get_by_label("column", exact=True).select_option("loss")
                frame.locator(".chart rect.bar").first.wait_for()
                slider = frame.get_by_role("slider", name="epoch")
                assert slider.get_attribute("max") == "1"
                slider.focus()
                page.keyboard.press("ArrowLeft")
                assert frame.locator("output").inner_text() == "epoch 0"
                shot(page, f"{host}-going_on")
                frame.get_by_role("button", name="Queries", exact=True).click()
                frame.get_by_text("Queries come at the end of training.").wait_for()
                frame.get_by_role("button", name="Triage", exact=True).click()
                frame.get_by_text(f"{page_runs.SIZE} examples listed").wait_for()
                shot(page, f"{host}-going_on-triage")
                running.stdin.write("\n" * page_runs.EPOCHS)
                running.stdin.flush()
                assert running.wait(120) == 0
                shows(page, frame, f"complete, {page_runs.EPOCHS} of {page_runs.EPOCHS} epochs")
                report = AuditReport.load(tmp_path / "run" / "influence")
                frame.get_by_text(f"0 of {len(report.candidates)} candidates decided").wait_for()
                frame.wait_for_selector("img[src^='data:image/png']")
                shot(page, f"{host}-over")
        finally:
            running.kill()


# ------------------------------------------------------------------------------------------------ the whole loop


def test_the_labels_of_the_next_training_are_those_decided(page: Any, logs: Path, tmp_path: Path) -> None:
    report = AuditReport.load(logs / "pictures" / "influence")
    order = [int(index) for index in report.candidates]
    suggested = dict(zip(report.columns["index"].tolist(), report.columns["suggested"].tolist(), strict=True))
    with in_a("tensorboard", logs, page) as frame:
        frame.get_by_label("audit", exact=True).select_option("pictures/influence")
        frame.get_by_role("button", name="Triage", exact=True).click()
        frame.get_by_text(f"0 of {len(order)} candidates decided").wait_for()
        frame.get_by_role("button", name="Export CSV").click()
        frame.get_by_text("nothing is decided yet: R relabels").wait_for()
        frame.get_by_role("listbox").focus()
        for key in "rrkrrdrrsr":
            page.keyboard.press(key)
        frame.get_by_text(f"9 of {len(order)} candidates decided").wait_for()
        with page.expect_download() as download:
            frame.get_by_role("button", name="Export CSV").click()
        download.value.save_as(tmp_path / "review.csv")
        frame.get_by_text("10 decisions in review.csv").wait_for()
    chosen = {index: suggested[index] for place, index in enumerate(order[:10]) if place not in (2, 5, 8)}
    *_, given, _, _ = page_runs.KINDS["pictures"]()
    review = report.apply_review(tmp_path / "review.csv")
    again, _ = page_runs.train("pictures", tmp_path, "mended", data=review.cleaned(given))
    # The next training has seen other labels where that was decided, and nowhere else; what was dropped is not in it.
    before = given.tensors[1].tolist()
    after = dict(zip(again.columns["original_index"].tolist(), again.columns["label"].tolist(), strict=True))
    assert {index: label for index, label in after.items() if label != before[index]} == chosen
    assert set(range(page_runs.SIZE)) - set(after) == {order[5]}
    right = page_runs.bars(page_runs.SIZE, 0).tensors[1].tolist()
    assert all(right[index] == label for index, label in chosen.items())
    found = set(again.columns["original_index"][again.columns["candidate"]].tolist())
    assert found.isdisjoint(chosen)

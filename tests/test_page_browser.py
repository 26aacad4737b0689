"""The page in a real browser, by clicks and keys, from its server and as one file."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_data import HOSTILE, add_tokens, picture, report_of, write_audit, write_several

from lightning_influence.audit.curves import Curves
from lightning_influence.audit.report import AuditReport
from lightning_influence.page.document import files
from lightning_influence.view import ViewServer, export_html

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

VIEWS = "overview", "triage", "example", "queries", "pairs", "compare"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_several(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def server(audits: dict[str, Path]) -> Iterator[ViewServer]:
    yield from serving(audits["pictures"].parent.parent)


def serving(root: Path) -> Iterator[ViewServer]:
    with ViewServer(root, port=0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    # What was refused on purpose is in the console, too.
    assert [text for text in said if "412 (Precondition Failed)" not in text] == []
    context.close()


def show(page: Any, server: ViewServer, view: str, run: str, **more: str) -> None:
    rest = "".join(f"&{name}={value}" for name, value in more.items())
    page.goto(f"{server.url}#view={view}&run={run}{rest}")
    page.wait_for_selector("main > *:not(.nothing)")


def candidates(report: AuditReport) -> list[int]:
    return [int(index) for index in report.candidates]


def saved(page: Any) -> None:
    page.get_by_text("saved in review.csv").wait_for()


# -------------------------------------------------------------------------------------------------- decisions


def test_decisions_by_keys_are_what_apply_review_reads(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    report = AuditReport.load(audits["pictures"])
    order = candidates(report)
    given = dict(zip(report.columns["index"].tolist(), report.columns["label"].tolist(), strict=True))
    suggested = dict(zip(report.columns["index"].tolist(), report.columns["suggested"].tolist(), strict=True))
    show(page, server, "triage", "digits/influence")
    other = next(label for label in range(4) if label not in (given[order[4]], suggested[order[4]]))
    for key in ("r", "k", "d", "s", str(other), str(given[order[5]]), "r", "r", "u", "ArrowDown", "R", "k"):
        page.keyboard.press(key)
    saved(page)
    review = report.apply_review("review.csv")
    expected = {order[0], order[6], order[8]}
    assert {**review.labels} == {**{index: suggested[index] for index in expected}, order[4]: other}
    assert set(review.kept) == {order[1], order[5], order[9]}
    assert review.dropped == (order[2],)
    assert review.undecided == (order[3],)
    # What is said of it, and what is exported, is the same; and it is there again after a reload.
    assert "8 of 40 candidates decided" in page.locator(".progress").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export CSV").click()
    exported = Path(download.value.path()).read_bytes()
    assert exported == (audits["pictures"] / "review.csv").read_bytes()
    page.reload()
    page.get_by_text("8 of 40 candidates decided").wait_for()
    # An edited table, as of a spreadsheet in another country, is taken over.
    text = f"index;decision;new_label\n{order[20]};Keep;\n{order[21]};;{suggested[order[21]]}\n999999;keep;\n"
    page.get_by_label("import a review").set_input_files(
        [{"name": "a.csv", "mimeType": "text/csv", "buffer": text.encode()}]
    )
    page.get_by_text("2 decisions taken over; 1 rows can't be used").wait_for()
    page.get_by_text("10 of 40 candidates decided").wait_for()
    page.keyboard.press("u")
    page.get_by_text("8 of 40 candidates decided").wait_for()


def test_filters_sorting_search_and_the_grid(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    report = AuditReport.load(audits["again"])
    columns = report.columns
    show(page, server, "triage", "digits_again/influence")
    listed = page.locator(".progress")
    page.get_by_label("given", exact=True).select_option("2")
    count = int((columns["candidate"] & (columns["label"] == 2)).sum())
    assert f"{count} example" in listed.inner_text()
    page.get_by_label("given", exact=True).select_option("")
    page.get_by_label("show").select_option("all")
    page.get_by_label("sort", exact=True).select_option("harm")
    first = int(columns["index"][np.argmax(columns["harm"])])
    assert page.locator(".item.chosen, .item").first.is_visible()
    page.get_by_role("listbox").focus()
    page.keyboard.press("Home")
    assert page.locator(".panel strong").inner_text() == f"#{first}"
    page.get_by_role("button", name="sort by rank").click()
    page.keyboard.press("Home")
    assert page.locator(".panel strong").inner_text() == f"#{int(report.ranking[0])}"
    page.keyboard.press("/")
    page.keyboard.type(str(int(report.ranking[7])))
    page.keyboard.press("Escape")
    assert f"#{int(report.ranking[7])}" in page.locator(".panel strong").inner_text()
    page.get_by_label("search").fill("")
    page.get_by_role("button", name="Grid").click()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator(".panel strong").inner_text() == f"#{int(report.ranking[1])}"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Example {int(report.ranking[1])}").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("listbox").wait_for()
    assert page.locator(".panel strong").inner_text() == f"#{int(report.ranking[1])}"


def test_without_labels_only_keep_drop_and_skip(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    report = AuditReport.load(audits["table"])
    show(page, server, "triage", "table/influence")
    for key in ("k", "r", "1", "d", "s"):
        page.keyboard.press(key)
    saved(page)
    review = report.apply_review("review.csv")
    order = candidates(report)
    assert (review.kept, review.dropped, review.undecided) == ((order[0],), (order[1],), (order[2],))


def test_one_can_decide_where_all_is_told(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    report = AuditReport.load(audits["texts"])
    first, second = report.candidates[:2].tolist()
    show(page, server, "example", "texts/influence", index=str(first))
    page.keyboard.press("r")
    page.locator(".badge.relabel").wait_for()
    page.keyboard.press("ArrowRight")
    page.get_by_role("heading", name=f"Example {second}").wait_for()
    page.get_by_role("button", name="Drop").click()
    page.locator(".badge.drop").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("2 of 9 candidates decided").wait_for()
    saved(page)
    page.wait_for_timeout(600)  # what was said is of the first; the second is on its way
    review = report.apply_review("review.csv")
    assert (review.confirmed, review.dropped) == ((first,), (second,))


def test_a_review_that_others_write_to_is_never_lost(page: Any, tmp_path: Path) -> None:
    report = report_of(50)
    directory = write_audit(tmp_path / "influence", report)
    path, order = directory / "review.csv", candidates(report)
    for server in serving(tmp_path):
        show(page, server, "triage", "influence")
        page.keyboard.press("k")
        saved(page)
        path.write_text(f"decision,index\ndrop,{order[1]}\n")  # by hand, meanwhile
        page.keyboard.press("ArrowDown")
        with page.expect_response(lambda answer: answer.status == 412):
            page.keyboard.press("k")
        page.get_by_text("changed by somebody else; reload the page").wait_for()
        assert path.read_text() == f"decision,index\ndrop,{order[1]}\n"
        page.reload()
        saved(page)
        review = report.apply_review(path)
        assert (set(review.kept), review.dropped) == ({order[0], order[2]}, (order[1],))
        # Rows that the page does not understand are not written over.
        mine = f"decision,index\nperhaps,{order[1]}\nkeep,{order[3]}\n"
        path.write_text(mine)
        page.reload()
        page.get_by_text("review.csv can't be used as it is: row 2: “perhaps” is none of").wait_for()
        page.keyboard.press("d")
        page.get_by_text("2 of 5 candidates decided").wait_for()
        page.wait_for_timeout(600)
        assert path.read_text() == mine
        # Nor are columns that somebody has added.
        mine = f"decision,index,comment\nkeep,{order[3]},asked Ann\n"
        path.write_text(mine)
        page.reload()
        page.get_by_text("it has columns of its own, comment, which would be lost; it stays").wait_for()
        page.keyboard.press("d")
        page.wait_for_timeout(600)
        assert path.read_text() == mine


def test_what_is_decided_while_the_audit_goes_on_is_saved(page: Any, tmp_path: Path) -> None:
    report = report_of(50)
    directory = write_audit(tmp_path / "influence", report)
    for server in serving(tmp_path):
        page.clock.install()
        show(page, server, "triage", "influence")
        page.keyboard.press("k")
        (directory / "audit.json").write_bytes(files(report, epochs=(4, 5))["audit.json"])
        page.evaluate("document.title = 'before'")
        page.clock.pause_at(page.evaluate("Date.now() + 100"))
        # The list is asked for before the decision is written, which takes a while.
        page.route("**/review?*", lambda route: (page.wait_for_timeout(100), route.continue_()))
        page.clock.fast_forward(11_000)
        page.clock.resume()
        page.get_by_text("complete, 4 of 5 epochs").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("d")
        saved(page)
        page.get_by_text("2 of 5 candidates decided").wait_for()
        assert len(report.apply_review(directory / "review.csv")) == 2


def test_new_labels_that_can_be_several_classes_are_refused(page: Any, tmp_path: Path) -> None:
    report = report_of(50, classes=4, label_names=["ab", "AB", "Cat", "cats"])
    directory = write_audit(tmp_path / "influence", report)
    columns = report.columns
    order = columns["index"][columns["label"] == 3][:5].tolist()
    # As it is written it is one class; without regard to case, the first could be two.
    rows = [f"{index},{name}" for index, name in zip(order, ("Ab,", "ab,", "AB,", "CAT,", "1,AB"), strict=True)]
    for server in serving(tmp_path):
        show(page, server, "triage", "influence")
        text = "\n".join(["index,new_label,new_label_name", *rows]).encode()
        box = page.get_by_label("import a review")
        box.set_input_files([{"name": "a.csv", "mimeType": "text/csv", "buffer": text}])
        page.get_by_text(
            "4 decisions taken over; 1 rows can't be used: row 2: “Ab” can be any of the classes 0, 1"
        ).wait_for()
        saved(page)
        assert report.apply_review(directory / "review.csv").labels == {
            order[1]: 0,
            order[2]: 1,
            order[3]: 2,
            order[4]: 1,
        }


def test_what_is_decided_is_read_back_whatever_a_class_is_called(page: Any, tmp_path: Path) -> None:
    """Names with a sign are written as spreadsheets don't run them, and cells have no spaces around them."""
    report = report_of(50, classes=6, label_names=["+", "-", " b ", "'q", "=1+1", "@home"])
    directory = write_audit(tmp_path / "influence", report)
    order = report.candidates[:5].tolist()
    given = dict(zip(report.columns["index"].tolist(), report.columns["label"].tolist(), strict=True))
    wanted = {index: (given[index] + 1 + place) % 6 for place, index in enumerate(order)}
    assert len(set(wanted.values())) > 2
    rows = "".join(f"\n{index},{label}" for index, label in wanted.items())
    for server in serving(tmp_path):
        show(page, server, "triage", "influence")
        file = {"name": "a.csv", "mimeType": "text/csv", "buffer": f"index,new_label{rows}".encode()}
        page.get_by_label("import a review").set_input_files([file])
        page.get_by_text("5 decisions taken over").wait_for()
        saved(page)
        page.reload()
        page.get_by_text("5 of 5 candidates decided").wait_for()
        assert page.get_by_text("can't be used").count() == 0
        assert report.apply_review(directory / "review.csv").labels == wanted


# ----------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("run", ["digits", "texts", "table"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_of_every_kind_fits(page: Any, server: ViewServer, view: str, run: str) -> None:
    for width in (1280, 640):  # 640: what is left of it at 200 %
        page.set_viewport_size({"width": width, "height": 800 * width // 1280})
        show(page, server, view, f"{run}/influence")
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.title") != "hacked"
        assert page.locator("img[src=x]").count() == 0
        unnamed = "[...document.querySelectorAll('button, input, select')].filter((e) => !e.hidden && !(e.ariaLabel || "
        unnamed += "e.innerText?.trim() || e.labels?.length || e.querySelector('kbd'))).length"
        assert page.evaluate(unnamed) == 0


def test_untrusted_text_is_shown_as_text(page: Any, server: ViewServer) -> None:
    show(page, server, "triage", "texts/influence")
    page.locator(".row").get_by_text(HOSTILE).first.wait_for()
    show(page, server, "queries", "texts/influence")
    page.locator(".about").get_by_text(HOSTILE).first.wait_for()


def test_tokens_by_their_part_of_a_score_and_what_was_likely(page: Any, tmp_path: Path) -> None:
    report = report_of(90, classes=3, label_names=["good", "fair", "bad"])
    assert report.pairs is not None
    first = int(report.pairs["index"][0])
    texts = {int(index): "it was long" for index in report.columns["index"]}
    add_tokens(write_audit(tmp_path / "influence", report, texts=texts), first)
    for server in serving(tmp_path):
        show(page, server, "queries", "influence")
        for kind, signs in (("proponent", ["3", "−1.5"]), ("opponent", ["−3", "1.5"])):
            told = page.locator(f"section.{kind} .shaded").first
            assert told.inner_text() == f"it {HOSTILE} was long"
            assert [each.get_attribute("title") for each in told.locator(".token").all()] == signs
            strengths = "(e) => [e.className, e.style.getPropertyValue('--strength')]"
            other = "opponent" if kind == "proponent" else "proponent"
            found = [each.evaluate(strengths) for each in told.locator(".token").all()]
            assert found == [[f"token {kind}", "100%"], [f"token {other}", "50%"]]
            spoken = f"strongest: {HOSTILE} {signs[0]}, long {signs[1]}; of no token: 0.25"
            assert told.get_attribute("aria-description") == spoken
        page.get_by_text("blue over a line: positive, makes the query better").wait_for()
        page.keyboard.press("ArrowDown")  # a query without
        page.get_by_role("heading", name="Query 2").wait_for()
        assert page.locator(".shaded, .legend.tokens").count() == 0
        show(page, server, "example", "influence", index=str(first))
        page.locator(".kin .shaded").first.wait_for()
        row = report.columns["index"].tolist().index(first)
        names = ["good", "fair", "bad"]
        given, suggested = (names[int(report.columns[name][row])] for name in ("label", "suggested"))
        page.get_by_text(f"given {given}", exact=True).wait_for()
        page.get_by_text(f"suggested {suggested}", exact=True).wait_for()
        assert page.locator(".dot.other title").all_text_contents() == [
            "epoch 1: 0.25",
            "epoch 2: 0.5",
            "epoch 4: 0.75",
        ]
        assert page.locator(".figures figure").count() == 3


def test_from_a_query_to_an_example_and_back(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    report = AuditReport.load(audits["pictures"])
    assert report.pairs is not None
    show(page, server, "queries", "digits/influence")
    page.keyboard.press("ArrowDown")
    page.get_by_role("heading", name="Query 2").wait_for()
    first = int(report.pairs["index"][(report.pairs["number"] == 2) & (report.pairs["kind"] == "opponent")][0])
    page.locator(".opponent .entry").first.click()
    page.get_by_role("heading", name=f"Example {first}").wait_for()
    page.get_by_text("Makes these validation examples worse").wait_for()
    page.get_by_role("button", name="query 10").first.click()
    page.get_by_role("heading", name="Query 2").wait_for()


@pytest.mark.parametrize("queries", [True, False])
def test_an_audit_with_an_index_tells_how_to_ask(browser: Any, queries: bool, tmp_path: Path) -> None:
    report = report_of(40) if queries else replace(report_of(40), pairs=None)
    directory = write_audit(tmp_path / "one" / "influence", report)
    (directory / "index").mkdir()
    (directory / "index" / "index.json").write_text("{}")
    (directory / "audit.json").write_bytes(files(replace(report, directory=directory))["audit.json"])
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    for server in serving(tmp_path):
        show(page, server, "queries", "one/influence")
        page.locator(".asking").get_by_role("button", name="copy").click()
        page.get_by_role("button", name="copied").wait_for()
        told = page.evaluate("navigator.clipboard.readText()")
        assert told == page.locator(".asking pre").inner_text()
        assert f"AuditReport.load({str(directory.resolve())!r})" in told
        # Where that is not allowed, they are marked.
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')) }")
        page.locator(".asking").get_by_role("button").click()
        page.get_by_role("button", name="marked").wait_for()
        assert page.evaluate("getSelection().toString()").strip() == told.strip()
        if shots := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{shots}/ask-{queries}.png")
    context.close()


def test_from_classes_and_from_a_box_to_triage(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    columns = AuditReport.load(audits["pictures"]).columns
    show(page, server, "pairs", "digits/influence")
    count = int((columns["candidate"] & (columns["label"] == 1) & (columns["suggested"] == 2)).sum())
    page.get_by_role("button", name="given 1, likely 2").click()
    page.get_by_role("listbox").wait_for()
    assert f"{count} example" in page.locator(".progress").inner_text()
    page.go_back()
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    page.mouse.move(place["x"] + 80, place["y"] + 20)
    page.mouse.down()
    page.mouse.move(place["x"] + 500, place["y"] + 300)
    page.mouse.up()
    page.get_by_label("prob_margin to").fill("-0.5")
    page.keyboard.press("Enter")
    low, high = (float(page.get_by_label(f"self_influence {end}").input_value()) for end in ("from", "to"))
    start = float(page.get_by_label("prob_margin from").input_value())
    button = page.get_by_role("button", name="Look at")
    told = button.inner_text()
    inside = (columns["prob_margin"] >= start) & (columns["prob_margin"] <= -0.5)
    inside &= (columns["self_influence"] >= low) & (columns["self_influence"] <= high)
    assert abs(int(told.split()[2].replace(",", "")) - int(inside.sum())) <= 1  # the ends are shown rounded
    assert inside.sum() > 5
    button.click()
    page.get_by_role("button", name="show the list again").click()
    assert "listed" in page.locator(".progress").inner_text()


def test_two_audits_are_compared(page: Any, server: ViewServer, audits: dict[str, Path]) -> None:
    first, second = (AuditReport.load(audits[name]) for name in ("pictures", "again"))
    show(page, server, "compare", "digits/influence")
    page.get_by_label("compare with").select_option("digits_again/influence")
    page.get_by_text("400 examples in both").wait_for()
    expected = np.corrcoef(first.columns["rank"], second.columns["rank"])[0, 1]
    assert f"Spearman's rank correlation {expected:.3f}".replace("-", "−") in page.locator(".compare").inner_text()
    left = len(set(candidates(first)) - set(candidates(second)))
    assert page.get_by_role("heading", name="alone").first.inner_text().endswith(f" {left}")


def test_histograms_by_column_class_and_epoch(page: Any, server: ViewServer) -> None:
    show(page, server, "overview", "digits/influence")
    page.get_by_label("column").select_option("loss")
    slider = page.get_by_role("slider", name="epoch")
    assert page.locator("output").inner_text() == "epoch 4"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("output").inner_text() == "epoch 2"
    page.get_by_label("column").select_option("suspicion")
    page.locator(".chart rect.marked").nth(1).wait_for()
    page.get_by_label("class").select_option("1")
    page.locator(".chart rect.marked").first.wait_for()


def test_while_training_goes_on(page: Any, tmp_path: Path) -> None:
    report = report_of(60, labelled=False)
    so_far = {name: report.columns[name] for name in ("index", "rank", "finite", "loss_mean")}
    so_far["candidate"] = np.zeros(60, dtype=bool)
    recorded = replace(report, columns=so_far, pairs=None, manifest={**report.manifest, "status": "recording"})
    directory = tmp_path / "influence"
    directory.mkdir()

    def write(audit: AuditReport, done: int) -> None:
        (directory / "audit.json").write_bytes(files(audit, epochs=(done, 5))["audit.json"])

    write(recorded, 2)
    for server in serving(tmp_path):
        page.clock.install()
        show(page, server, "overview", "influence")
        page.get_by_text("Training goes on: 2 epochs recorded of 5.").wait_for()
        page.locator(".chart rect.bar").first.wait_for()
        page.get_by_role("button", name="Queries").click()
        page.get_by_text("Queries come at the end of training.").wait_for()
        page.get_by_role("button", name="Triage").click()
        page.get_by_label("sort", exact=True).select_option("loss_mean")
        write(recorded, 3)
        page.clock.fast_forward(11_000)
        page.get_by_text("recording, 3 of 5 epochs").wait_for()
        assert page.get_by_label("sort", exact=True).input_value() == "loss_mean"
        write(report, 5)
        page.clock.fast_forward(11_000)
        page.get_by_text("complete, 5 of 5 epochs").wait_for()
        assert page.get_by_label("show").input_value() == "candidates"


def test_values_that_are_all_the_same_and_large(page: Any, tmp_path: Path) -> None:
    report = report_of(20)
    large = {"self_influence": np.full(20, 1e30), "suspicion": np.full(20, -3e38), "loss_mean": np.full(20, np.nan)}
    write_audit(tmp_path / "influence", replace(report, columns={**report.columns, **large}))
    for server in serving(tmp_path):
        for view in VIEWS:
            show(page, server, view, "influence")
        show(page, server, "example", "influence")
        page.get_by_text("suspicion among all").wait_for()
        page.locator(".columns .chart text").first.wait_for()


@pytest.mark.parametrize("count", [0, 1])
def test_an_audit_of_hardly_any_examples(page: Any, tmp_path: Path, count: int) -> None:
    report = report_of(20)
    columns = {name: values[:count] for name, values in report.columns.items()}
    curves = Curves(range(5), {name: table[:count] for name, table in report.curves.items()})
    small = replace(report, columns=columns, curves=curves, pairs=None)
    write_audit(tmp_path / "a" / "influence", small)
    write_audit(tmp_path / "b" / "influence", small)
    for server in serving(tmp_path):
        for view in VIEWS:
            show(page, server, view, "a/influence")
            page.wait_for_timeout(50)
            text = page.inner_text("body")
            assert not [word for word in ("NaN", "undefined", "Infinity") if word in text]


def test_a_control_that_draws_anew_keeps_the_focus(page: Any, server: ViewServer) -> None:
    for view, label in (("compare", "column"), ("compare", "compare with"), ("pairs", "up"), ("pairs", "count")):
        show(page, server, view, "digits/influence")
        box = page.get_by_label(label, exact=True)
        if box.locator("option").count() > 1:
            box.focus()
            page.keyboard.press("ArrowDown")
        box.focus()
        page.evaluate("document.activeElement.dispatchEvent(new Event('change'))")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == label
    show(page, server, "example", "digits/influence")
    page.set_viewport_size({"width": 1280, "height": 300})
    page.evaluate("document.querySelector('main').scrollTop = 120")
    page.get_by_role("button", name="Skip").focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.textContent") == "SkipS"
    assert page.evaluate("document.querySelector('main').scrollTop") == 120
    page.keyboard.press("u")


# ------------------------------------------------------------------------------------------- ten thousand rows


def test_ten_thousand_rows_scroll_without_gaps(page: Any, tmp_path: Path) -> None:
    report = report_of(10_000, classes=12)
    pictures = {int(index): picture(place % 50) for place, index in enumerate(report.ranking[:1000])}
    write_audit(tmp_path / "influence", report, pictures=pictures)
    for server in serving(tmp_path):
        show(page, server, "triage", "influence")
        page.get_by_label("show").select_option("all")
        page.get_by_role("listbox").wait_for()
        gaps = page.evaluate(
            """async () => {
              const list = document.querySelector('.scroller');
              const box = list.getBoundingClientRect();
              let gaps = 0;
              for (let step = 0; step < 120; step += 1) {
                list.scrollTop += step % 10 ? 130 : 40000;
                await new Promise((done) => requestAnimationFrame(done));
                for (const y of [2, box.height / 2, box.height - 2]) {
                  const found = document.elementFromPoint(box.left + 60, box.top + y);
                  if (!found?.closest('.item')) gaps += 1;
                }
              }
              return [gaps, document.querySelectorAll('.item').length, list.scrollTop > 300000];
            }"""
        )
        assert gaps[0] == 0
        assert gaps[1] < 60
        assert gaps[2]
        page.get_by_role("listbox").focus()
        page.keyboard.press("End")
        assert page.locator(".panel strong").inner_text() == f"#{int(report.ranking[-1])}"


def test_millions_of_rows_can_be_reached(page: Any, server: ViewServer) -> None:
    """Browsers cap the height of elements: of 3 million rows, 80 % could not be scrolled to."""
    show(page, server, "overview", "digits/influence")
    found = page.evaluate(
        """async () => {
          const { VirtualList } = await import('./virtual.js');
          const draw = (place) => Object.assign(document.createElement('div'), { textContent: String(place) });
          const nothing = () => {};
          const about = { label: 'l', height: 56, least: Infinity, draw, onPick: nothing, onOpen: nothing };
          const list = new VirtualList(about);
          Object.assign(list.element.style, { position: 'fixed', inset: '0', height: '560px', zIndex: 9 });
          document.body.append(list.element);
          const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const at = (y) => Number(document.elementFromPoint(80, y)?.closest('.item')?.textContent ?? NaN);
          const seen = [];
          list.reset(3_000_000);
          await drawn();
          for (const place of [0, 2_999_999, 1_234_567, 17, 0]) {
            list.choose(place);
            await drawn();
            const rows = [];
            for (let y = 28; y < 560; y += 56) rows.push(at(y));
            seen.push([place, rows.includes(place), rows.every((row, k) => !k || row === rows[k - 1] + 1)]);
          }
          // By the wheel, no row is left out; with the bar, every part can be reached, and both ends.
          let [last, gaps] = [at(28), 0];
          for (let step = 0; step < 400; step += 1) {
            list.element.scrollTop += 100;
            await drawn();
            if (!(at(28) - last <= 2)) gaps += 1;
            last = at(28);
          }
          const dragged = [];
          for (const share of [0.5, 1, 0.25, 0]) {
            list.element.scrollTop = share * (list.element.scrollHeight - 560);
            await drawn();
            dragged.push(at(28) / 3e6);
          }
          list.element.scrollTop = 1e9;
          await drawn();
          const end = at(540);
          list.element.remove();
          return { seen, gaps, last, dragged, end, height: list.space.offsetHeight };
        }"""
    )
    assert all(here and whole for _, here, whole in found["seen"])
    assert found["gaps"] == 0
    assert 700 < found["last"] < 730  # 400 steps of 100 pixels
    assert found["dragged"] == pytest.approx([0.5, 1, 0.25, 0], abs=1e-4)
    assert found["end"] == 2_999_999
    assert found["height"] < 10_000_000


def test_pictures_of_an_audit_that_took_its_place_are_not_shown(page: Any, tmp_path: Path) -> None:
    report = report_of(50)
    shown = {index: picture(index) for index in candidates(report)}
    directory = write_audit(tmp_path / "influence", report, pictures=shown)
    for server in serving(tmp_path):
        page.route("**/pictures?*", lambda route: (page.wait_for_timeout(300), route.continue_()))
        page.goto(f"{server.url}#view=triage&run=influence")
        page.locator(".panel .picture img").wait_for(state="attached")
        others = {index: picture(index + 1000) for index in candidates(report)}
        (directory / "pictures-0.json").write_bytes(files(report, pictures=others)["pictures-0.json"])
        page.locator(".panel .picture.empty").wait_for()
        assert page.locator("img[src]").count() == 0
        page.unroute("**/pictures?*")
        (directory / "audit.json").write_bytes(files(report, pictures=others)["audit.json"])
        page.reload()
        page.locator(".panel img[src]").wait_for()


def test_a_drag_that_the_system_takes_leaves_the_box_as_it_was(page: Any, server: ViewServer) -> None:
    show(page, server, "pairs", "digits/influence")
    box = page.get_by_label("prob_margin to")
    box.fill("-0.5")
    page.keyboard.press("Enter")
    told = page.get_by_role("button", name="Look at").inner_text()
    page.locator("canvas").evaluate(
        """(canvas) => {
          const at = (type, clientX, clientY) =>
            canvas.dispatchEvent(new PointerEvent(type, { clientX, clientY, pointerId: 1 }));
          canvas.setPointerCapture = () => {};
          at('pointerdown', 200, 200);
          at('pointermove', 400, 300);
          at('pointercancel', 400, 300);
          at('pointermove', 500, 350);
        }"""
    )
    assert page.get_by_role("button", name="Look at").inner_text() == told
    assert box.input_value() == "-0.5"


# ------------------------------------------------------------------------------------------ other surroundings


def test_what_cannot_be_read_says_why_and_the_rest_stays(page: Any, tmp_path: Path) -> None:
    write_audit(tmp_path / "fine" / "influence", report_of(20))
    for name, content in (("damaged", "{"), ("future", '{"format": 9, "created": "2030"}')):
        (tmp_path / name / "influence").mkdir(parents=True)
        (tmp_path / name / "influence" / "audit.json").write_text(content)
    for server in serving(tmp_path):
        page.goto(f"{server.url}#run=damaged/influence")
        page.get_by_role("alert").get_by_text("audit.json can't be read").wait_for()
        page.get_by_label("audit").select_option("future/influence")
        page.get_by_role("alert").get_by_text("the audit has format 9; this page reads format 1").wait_for()
        page.get_by_label("audit").select_option("fine/influence")
        page.get_by_role("heading", name="Scores").wait_for()


def test_a_page_without_its_token_says_where_to_look(browser: Any, server: ViewServer) -> None:
    page = browser.new_page()
    page.goto(server.url.partition("?")[0])
    page.get_by_text("open the address that was printed").wait_for()
    page.close()


def test_one_file_works_without_a_server(page: Any, audits: dict[str, Path], tmp_path: Path) -> None:
    path = export_html(audits["pictures"].parent.parent, tmp_path / "out.html")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri() + "#view=triage&run=0")
    page.get_by_role("listbox").wait_for()
    for key in "rk":
        page.keyboard.press(key)
    assert "2 of 40 candidates decided" in page.locator(".progress").inner_text()
    assert page.locator(".panel img").get_attribute("src").startswith("data:image/png")
    page.reload()
    page.get_by_text("2 of 40 candidates decided").wait_for()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}


def test_dark_where_the_system_is(page: Any, server: ViewServer) -> None:
    show(page, server, "overview", "digits/influence")
    colour = "getComputedStyle(document.querySelector('#influence')).backgroundColor"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")
    assert page.evaluate(colour) != light

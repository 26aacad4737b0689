"""The Influence tab: what its routes answer, in the loaders that TensorBoard has, and what it costs to load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from page_data import HOSTILE, report_of
from tensorboard import errors
from tensorboard.backend import application
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard_data import tensorboard, write_blobs, write_page, write_runs
from werkzeug.test import Client, TestResponse

from lightning_influence.page import document, static_files
from lightning_influence.tensorboard_plugin import InfluenceLoader, events

ROUTE = "/data/plugin/influence"
Get = Callable[..., TestResponse]


def client_of(logdir: Path) -> Client:
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    plugin = InfluenceLoader().load(TBContext(data_provider=provider, logdir=str(logdir)))
    return Client(application.TensorBoardWSGI([plugin], data_provider=provider))


def getter(client: Client) -> Get:
    def get(route: str, **asked: Any) -> TestResponse:
        return client.get(f"{ROUTE}/{route}", query_string=asked)

    return get


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    write_runs(root)
    write_blobs(root / "damaged", "audit/influence", [b'{"format": 1, "col'])
    write_blobs(root / "foreign", "something", [b"\x89PNG and so on"])
    write_blobs(root / "later", "audit/influence", [b'{"format": 7}'])
    write_blobs(root / "empty", "audit/influence", [])
    odd = '"format": 1, "columns": [], "examples": 3'
    write_blobs(root / "number", "audit/influence", [f'{{{odd}, "epochs_done": NaN}}'.encode()])
    deep = "[" * 900 + "]" * 900
    write_blobs(root / "deep", "audit/influence", [f'{{{odd}, "status": {deep}, "epochs_done": {deep}}}'.encode()])
    types = f'{{{odd}, "status": ["<img>"], "created": 7, "epochs_done": "<img>"}}'
    write_blobs(root / "types", "audit/influence", [types.encode()])
    # What is left of files by a full disk, and what is none of TensorBoard's.
    (written,) = (root / "digits").glob("events.*")
    for name, content in (
        ("cut", written.read_bytes()[:5000]),
        ("huge", b"\xff" * 7 + b"\x7f" + b"\0" * 100),
        ("noise", bytes(range(256)) * 50),
        ("nothing", b""),
    ):
        (root / name).mkdir()
        (root / name / written.name).write_bytes(content)
    return root


TOLD = {"damaged", "foreign", "later", "empty", "number", "types", "deep", "digits", "again", "going_on"}


@pytest.fixture(scope="module")
def client(logs: Path) -> Client:
    return client_of(logs)


@pytest.fixture
def get(client: Client) -> Get:
    return getter(client)


# ------------------------------------------------------------------------------------------------------ loading


def test_loading_it_takes_neither_torch_nor_lightning_nor_long() -> None:
    source = """
import sys, time
from tensorboard.plugins import base_plugin
before = set(sys.modules)
start = time.perf_counter()
from lightning_influence.tensorboard_plugin import InfluenceLoader
first, took = sorted(set(sys.modules) - before), time.perf_counter() - start
plugin = InfluenceLoader().load(base_plugin.TBContext())
plugin.get_plugin_apps()
heavy = [name for name in ("torch", "lightning", "pytorch_lightning", "pyarrow", "PIL") if name in sys.modules]
print([name for name in first if "influence" in name], heavy, took)
"""
    run = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    loaded, _, rest = run.stdout.strip().partition("] ")
    heavy, _, took = rest.partition("] ")
    # At the start of TensorBoard, the loader alone.
    assert loaded == "['lightning_influence', 'lightning_influence.tensorboard_plugin'"
    assert heavy == "["
    assert float(took) < 0.3


def test_tensorboard_finds_it() -> None:
    (found,) = [each for each in entry_points(group="tensorboard_plugins") if each.name == "influence"]
    assert found.load() is InfluenceLoader


def test_a_plugin_that_fails_costs_the_tab_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert InfluenceLoader().load(None) is None
    assert "no Influence tab" in caplog.text


def test_the_tab_comes_with_data_alone(client: Client, tmp_path: Path) -> None:
    about = client.get("/data/plugins_listing").json["influence"]
    assert about["enabled"]
    assert about["tab_name"] == "Influence"
    assert about["loading_mechanism"] == {"type": "IFRAME", "module_path": f"{ROUTE}/static/index.js"}
    write_blobs(tmp_path, "audit/influence", [b"{}"])
    assert client_of(tmp_path).get("/data/plugins_listing").json["influence"]["enabled"]
    assert not client_of(tmp_path / "nothing").get("/data/plugins_listing").json["influence"]["enabled"]


# ------------------------------------------------------------------------------------------------------ answers


def test_runs_are_told_and_those_that_cannot_be_read_say_why(get: Get) -> None:
    runs = {run["id"]: run for run in get("runs").json}
    good = {"digits/influence": 5, "again/influence": 5, "going_on/influence": 2, "types/influence": None}
    deep = runs.pop("deep/influence")  # how deep JSON can be nested, depends on the version of Python
    assert deep["error"] or (deep["status"], deep["epochs_done"]) == ("", None)
    assert {key: run["epochs_done"] for key, run in runs.items() if not run["error"]} == good
    assert (runs["types/influence"]["status"], runs["types/influence"]["created"]) == ("", "")
    assert "NaN, which is no number" in runs["number/influence"]["error"]
    assert runs["digits/influence"]["status"] == "complete"
    assert runs["going_on/influence"]["status"] == "recording"
    assert next(iter(runs)) == "digits/influence"  # the newest
    assert "damaged" in runs["damaged/influence"]["error"]
    assert "damaged, or no audit's" in runs["foreign/something"]["error"]
    assert "format 7" in runs["later/influence"]["error"]
    assert runs["empty/influence"]["error"]
    assert {key.partition("/")[0] for key in runs} == TOLD - {"deep"}


def test_an_audit_that_the_provider_fails_on_leaves_the_others_up(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logs))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logs))
    read = provider.read_blob_sequences

    def failing(context: Any, **asked: Any) -> Any:
        if "again" in asked["run_tag_filter"].runs:
            raise errors.NotFoundError("its file is gone")
        return read(context, **asked)

    monkeypatch.setattr(provider, "read_blob_sequences", failing)
    runs = {run["id"]: run for run in events.EventAudits(provider).runs(RequestContext(), "")}
    assert "its file is gone" in runs["again/influence"]["error"]
    assert not runs["digits/influence"]["error"]


def test_documents_and_pictures(get: Get) -> None:
    for run in ("digits", "again", "going_on"):
        answer = get("audit", id=f"{run}/influence")
        assert answer.status_code == 200
        assert answer.mimetype == "application/json"
        found = answer.json
        assert found["name"] == run
        for chunk, place in [*found["pictures"].values(), *found["query_pictures"].values()]:
            picture = get("pictures", id=f"{run}/influence", chunk=chunk).json[place]
            assert picture.startswith("data:image/png;base64,")
    assert get("audit", id="going_on/influence").json["epochs_done"] == 2


def test_what_is_over_takes_the_place_of_what_was_recorded(tmp_path: Path) -> None:
    write_page(tmp_path / "a", report_of(50, status="recording"), "recording/influence", step=9)
    write_page(tmp_path / "a", report_of(50), "audit/influence", step=9)
    (run,) = client_of(tmp_path).get(f"{ROUTE}/runs").json
    assert (run["id"], run["status"]) == ("a/influence", "complete")


def test_two_audits_of_one_run(tmp_path: Path) -> None:
    write_page(tmp_path, report_of(50), "audit/influence")
    write_page(tmp_path, report_of(60), "audit/influence-v1")
    get = getter(client_of(tmp_path))
    assert sorted(run["id"] for run in get("runs").json) == ["./influence", "./influence-v1"]
    assert get("audit", id="./influence-v1").json["examples"] == 60


def test_new_data_of_a_training_come_in(tmp_path: Path) -> None:
    write_page(tmp_path / "a", report_of(50, status="recording"), "recording/influence", step=1, epochs=1)
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    audits = events.EventAudits(MultiplexerDataProvider(multiplexer, str(tmp_path)))
    context = RequestContext()
    assert audits.runs(context, "")[0]["epochs_done"] == 1
    write_page(tmp_path / "a", report_of(50, status="recording"), "recording/influence", step=2, epochs=2)
    multiplexer.Reload()
    assert audits.runs(context, "")[0]["epochs_done"] == 2
    assert json.loads(audits.document(context, "", "a/influence"))["epochs_done"] == 2


def test_page_and_scripts_are_served_as_they_are(get: Get) -> None:
    served = {name: file for name, file in static_files().items() if not name.endswith(".html")}
    assert "index.js" in served
    for name, (kind, content) in served.items():
        answer = get(f"static/{name}")
        assert answer.data == content
        assert answer.mimetype == kind.partition(";")[0]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_formats_are_those_that_are_written() -> None:
    assert events._FORMAT == document.FORMAT


# ------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("route", "status"),
    [
        ("audit", 400),
        ("audit?id=", 400),
        ("audit?id=digits/influence&id=again/influence", 400),
        (f"audit?id={'x' * 5000}", 400),
        ("audit?id=nobody/influence", 404),
        ("audit?id=../digits/influence", 404),
        ("audit?id=/etc/passwd", 404),
        ("audit?id=digits/influence%00", 404),
        ("audit?id=%ff%fe", 404),
        (f"audit?id={HOSTILE}", 404),
        ("audit?id=damaged/influence", 422),
        ("audit?id=foreign/something", 422),
        ("audit?id=later/influence", 422),
        ("audit?id=number/influence", 422),
        ("audit?id=cut/influence", 404),
        ("audit?id=huge/influence", 404),
        ("audit?id=digits%252Finfluence", 404),
        ("audit?id=digits%5cinfluence", 404),
        ("audit?id=%ed%a0%80", 404),
        ("audit;id=digits/influence", 404),
        ("pictures?id=digits/influence&chunk=%d9%a0", 400),
        ("pictures?id=digits/influence&chunk=0%00", 400),
        ("pictures?id=digits/influence&chunk=+0", 400),
        ("audit?id=empty/influence", 404),
        ("pictures?id=digits/influence", 400),
        ("pictures?id=digits/influence&chunk=-1", 400),
        ("pictures?id=digits/influence&chunk=1e3", 400),
        ("pictures?id=digits/influence&chunk=²", 400),
        ("pictures?id=digits/influence&chunk=99999999999", 400),
        ("pictures?id=digits/influence&chunk=77", 404),
        ("pictures?id=nobody&chunk=0", 404),
        ("static/../plugin.py", 404),
        ("static/..%2f..%2fpyproject.toml", 404),
        ("static//etc/passwd", 404),
        ("static/index.html", 404),
        ("static/", 404),
        ("review?id=digits/influence", 404),
        ("nothing", 404),
    ],
)
def test_bad_requests_leak_nothing(client: Client, route: str, status: int) -> None:
    answer = client.get(f"{ROUTE}/{route}")
    assert answer.status_code == status
    text = answer.get_data(as_text=True)
    assert len(text) < 500
    for leaked in ("Traceback", "root:", "[project]", "onerror", str(Path(__file__).parent)):
        assert leaked not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("route", ["runs", "audit?id=digits/influence", "static/index.js"])
def test_only_get(client: Client, method: str, route: str) -> None:
    assert client.open(f"{ROUTE}/{route}", method=method, data=b"x" * 100).status_code == 405


def test_what_is_too_large_is_not_handed_out(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_LARGEST", 100)
    assert get("audit", id="digits/influence").status_code == 422


# ------------------------------------------------------------------------------------------- the real program


@pytest.mark.parametrize("fast", ["true", "false"])
def test_real_tensorboard_with_either_loader(logs: Path, fast: str) -> None:
    with tensorboard(logs, "--load_fast", fast) as address:

        def ask(route: str) -> Any:
            with urllib.request.urlopen(f"{address}{ROUTE[1:]}/{route}", timeout=30) as answer:
                return json.load(answer)

        end = time.monotonic() + 60
        while len(runs := ask("runs")) < len(TOLD) and time.monotonic() < end:
            time.sleep(0.2)
        wrong = {run["id"].partition("/")[0]: run["error"] for run in runs}
        assert wrong.keys() == TOLD
        assert [key for key, error in wrong.items() if not error and key != "deep"] == [
            "digits",
            "again",
            "going_on",
            "types",
        ]
        found = ask("audit?id=going_on/influence")
        assert found["epochs_done"] == 2
        chunk, place = next(iter(found["pictures"].values()))
        assert ask(f"pictures?id=going_on/influence&chunk={chunk}")[place].startswith("data:image/png")
        with urllib.request.urlopen(f"{address}data/plugins_listing", timeout=30) as answer:
            assert json.load(answer)["influence"]["enabled"]

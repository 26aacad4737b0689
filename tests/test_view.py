"""The server of the page: what it hands out, what it refuses, and reviews on disk; the page as a file."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_data import picture, report_of, write_audit, write_several

from lightning_influence.audit.report import AuditReport
from lightning_influence.page import static_files
from lightning_influence.view import ViewServer, export_html
from lightning_influence.view.audits import Audits, ViewError, tag_of
from lightning_influence.view.server import TOKEN_HEADER, serve


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_several(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def server(audits: dict[str, Path]) -> Iterator[ViewServer]:
    with ViewServer(audits["pictures"].parent.parent, port=0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(
    server: ViewServer,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    token: str | None = None,
    **headers: str,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, body, {TOKEN_HEADER: server.token if token is None else token, **headers})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.msg
    connection.close()
    return found


def test_runs_documents_and_pictures(server: ViewServer, audits: dict[str, Path]) -> None:
    status, body, headers = ask(server, "/runs")
    runs = json.loads(body)
    assert status == 200
    assert [run["id"] for run in runs] == [f"{n}/influence" for n in ("digits", "digits_again", "texts", "table")]
    assert all(run["error"] is None and run["status"] == "complete" for run in runs)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(server, "/audit?id=digits/influence")[1] == (audits["pictures"] / "audit.json").read_bytes()
    assert ask(server, "/audit?id=digits%2Finfluence")[0] == 200
    assert (
        ask(server, "/pictures?id=digits/influence&chunk=0")[1] == (audits["pictures"] / "pictures-0.json").read_bytes()
    )


def test_the_page_itself_needs_no_token(server: ViewServer) -> None:
    assert ask(server, f"/?token={server.token}", token="")[1] == static_files()["index.html"][1]
    for name, (kind, content) in static_files().items():
        status, body, headers = ask(server, f"/{name}", token="")
        assert (status, body, headers["Content-Type"]) == (200, content, kind)


@pytest.mark.parametrize("path", ["/runs", "/audit?id=digits/influence", "/review?id=digits/influence", "/nothing"])
@pytest.mark.parametrize("token", ["", "wrong", "é"])
def test_data_need_the_token(server: ViewServer, path: str, token: str) -> None:
    for method in ("GET", "POST"):
        status, body, _ = ask(server, path, method, b"index,decision\n" if method == "POST" else None, token=token)
        assert status == 403
        assert b"digits" not in body
    assert ask(server, f"/runs?token={server.token}", token="")[0] == 403  # it is in histories and logs


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/audit?id=../digits/influence", 404),
        ("/audit?id=..%2F..%2Fetc", 404),
        ("/audit?id=/etc", 404),
        ("/audit?id=%00", 404),
        ("/audit", 404),
        ("/audit?id=digits", 404),
        ("/pictures?id=digits/influence&chunk=../../secret", 404),
        ("/pictures?id=digits/influence&chunk=-1", 404),
        ("/pictures?id=digits/influence&chunk=00", 404),
        ("/pictures?id=digits/influence&chunk=99", 404),
        ("/pictures?id=digits/influence", 404),
        ("/../view/server.py", 404),
        ("/..%2fserver.py", 404),
        ("/static_files.py", 404),
        ("//etc/passwd", 404),
        ("/audit?id=" + "&".join(["a"] * 20), 400),
    ],
)
def test_other_addresses_are_refused(server: ViewServer, path: str, expected: int) -> None:
    status, body, _ = ask(server, path)
    assert status == expected
    assert json.loads(body).keys() == {"error"}
    assert str(server.audits.root) not in body.decode()


def test_long_addresses_and_other_methods_are_refused(server: ViewServer) -> None:
    assert ask(server, "/audit?id=" + "a" * 70_000)[0] == 414
    for method in ("HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
        status, body, headers = ask(server, "/runs", method)
        assert (status, headers["Allow"], b"<" in body) == (405, "GET, POST", False)


OWN = "X-Influence-Token: {token}\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("GET /runs\r\n" + OWN, 200),  # as before HTTP/1.0
        ("GET /runs HTTP/9.9\r\n" + OWN, 400),
        ("GET /runs <b>HTTP/1.1\r\n" + OWN, 400),
        ("\x16\x03\x01\x02\r\n", 400),
        ("\0 \0 \0\r\n", 400),
        ("GET http://[::1/runs HTTP/1.1\r\n" + OWN, 400),
        ("GET /audit?id=%00 HTTP/1.1\r\n" + OWN, 404),
        ("GET /audit?id=%ed%a0%80 HTTP/1.1\r\n" + OWN, 404),
        ("GET /%61udit?id=digits/influence HTTP/1.1\r\n" + OWN, 404),
        ("GET /audit?id=digits%5cinfluence HTTP/1.1\r\n" + OWN, 404),
        ("GET /audit?id=digits/./influence HTTP/1.1\r\n" + OWN, 404),
        ("GET /pictures?id=digits/influence&chunk=%d9%a0 HTTP/1.1\r\n" + OWN, 404),
        ("GET /runs HTTP/1.1\r\nHost: [::1\r\n", 400),
        ("GET /runs HTTP/1.1\r\nX-Influence-Token: {token}\r\n", 403),
        ("GET /runs HTTP/1.1\r\nHost: evil.example\r\n" + OWN, 403),
        ("GET /runs HTTP/1.1\r\n" + OWN + "X-Long: " + "a" * 70_000 + "\r\n", 431),
        ("GET /runs HTTP/1.1\r\n" + OWN + "X-Many: 1\r\n" * 200, 431),
        ("POST /review?id=digits/influence HTTP/1.1\r\n" + OWN + "Transfer-Encoding: chunked\r\n", 411),
        ("POST /review?id=digits/influence HTTP/1.1\r\n" + OWN + "Content-Length: " + "9" * 5000 + "\r\n", 400),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_is_hardly_a_request(server: ViewServer, sent: str, expected: int) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall((sent.replace("{token}", server.token) + "\r\n").encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == str(expected).encode()
    assert b"nosniff" in head
    if expected != 200:
        assert json.loads(body).keys() == {"error"}
        assert b"<b>" not in answer


def test_clients_that_say_nothing_keep_nobody_waiting(server: ViewServer) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(40)]
    for number, each in enumerate(slow):
        each.sendall(b"POST /review?id=texts/influence HTTP/1.1\r\nContent-Le"[: number + 1])
    start = time.monotonic()
    assert ask(server, "/runs")[0] == 200
    assert time.monotonic() - start < 5
    for each in slow:
        each.close()


def test_a_name_that_points_here_is_refused(server: ViewServer) -> None:
    port = server.server_address[1]
    for host, expected in (
        (f"evil.example:{port}", 403),
        (f"localhost.evil.example:{port}", 403),
        (f"localhost:{port}", 200),
        (f"127.0.0.1:{port}", 200),
    ):
        assert ask(server, "/runs", Host=host)[0] == expected


# ---------------------------------------------------------------------------------------------------- reviews

REVIEW = b"decision,new_label,index\r\nkeep,,0\r\n"
NOTHING = {"If-Match": tag_of(b"")}


def test_a_review_is_kept_beside_the_audit(server: ViewServer, audits: dict[str, Path]) -> None:
    path = audits["again"] / "review.csv"
    address = "/review?id=digits_again/influence"
    assert ask(server, address)[:2] == (200, b"")
    status, _, headers = ask(server, address, "POST", REVIEW, **NOTHING)
    assert (status, headers["ETag"]) == (200, tag_of(REVIEW))
    assert path.read_bytes() == REVIEW
    _, body, headers = ask(server, address)
    assert (body, headers["ETag"]) == (REVIEW, tag_of(REVIEW))
    assert len(AuditReport.load(audits["again"]).apply_review("review.csv")) == 1
    assert not list(path.parent.glob(".tmp-*"))


def test_what_somebody_else_has_decided_stays(server: ViewServer, audits: dict[str, Path]) -> None:
    path, address = audits["table"] / "review.csv", "/review?id=table/influence"
    path.write_bytes(REVIEW)
    for sent in (NOTHING, {}, {"If-Match": "*"}, {"If-Match": tag_of(b"else")}):
        status, body, _ = ask(server, address, "POST", REVIEW + b"drop,,1\r\n", **sent)
        assert status == 412
        assert "changed by somebody else; reload" in json.loads(body)["error"]
    assert path.read_bytes() == REVIEW
    assert ask(server, address, "POST", REVIEW + b"drop,,1\r\n", **{"If-Match": tag_of(REVIEW)})[0] == 200
    path.unlink()


@pytest.mark.parametrize("body", [b"", b"hello", b"index,else\n", b"\xff\xfe\x00", b"<html>"])
def test_what_is_no_review_is_refused(server: ViewServer, audits: dict[str, Path], body: bytes) -> None:
    assert ask(server, "/review?id=texts/influence", "POST", body, **NOTHING)[0] == 400
    assert not (audits["texts"] / "review.csv").exists()


def test_reviews_too_long_or_of_no_audit_are_refused(server: ViewServer) -> None:
    assert ask(server, "/review?id=nobody", "POST", REVIEW)[0] == 404
    assert ask(server, "/audit?id=texts/influence", "POST", REVIEW)[0] == 404
    for length, expected in (("99999999999", 413), ("-1", 411), ("many", 411), ("²", 411)):
        sent = {"Content-Length": length.encode("latin-1").decode("latin-1")}
        assert ask(server, "/review?id=texts/influence", "POST", None, **sent)[0] == expected


def test_of_those_who_write_at_once_one_wins(server: ViewServer, audits: dict[str, Path]) -> None:
    told: list[tuple[int, bytes]] = []

    def write(body: bytes) -> None:
        told.append((ask(server, "/review?id=texts/influence", "POST", body, **NOTHING)[0], body))

    threads = [threading.Thread(target=write, args=(REVIEW + b"drop,,%d\r\n" % k,)) for k in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(status for status, _ in told) == [200] + [412] * 11
    path = audits["texts"] / "review.csv"
    assert [body for status, body in told if status == 200] == [path.read_bytes()]
    path.unlink()


def test_a_review_that_breaks_off_changes_nothing(server: ViewServer, audits: dict[str, Path]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest("POST", "/review?id=table/influence")
    for name, value in ((TOKEN_HEADER, server.token), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders(REVIEW)
    assert connection.sock is not None
    connection.sock.shutdown(1)
    assert connection.getresponse().status == 400
    connection.close()
    assert not (audits["table"] / "review.csv").exists()


def test_a_full_disk_is_told(server: ViewServer, monkeypatch: pytest.MonkeyPatch, audits: dict[str, Path]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, body, _ = ask(server, "/review?id=texts/influence", "POST", REVIEW, **NOTHING)
    assert status == 422
    assert "No space left" in json.loads(body)["error"]
    assert not list(audits["texts"].glob("*.tmp-*"))
    assert not (audits["texts"] / "review.csv").exists()


# ----------------------------------------------------------------------------------------------- other audits


def test_damaged_and_foreign_audits_leave_the_rest_up(tmp_path: Path) -> None:
    fine = write_audit(tmp_path / "fine" / "influence", report_of(20))
    for name, content in (("cut", '{"format": 1'), ("list", "[]"), ("deep", "[" * 100_000), ("text", "\0")):
        (tmp_path / name / "influence").mkdir(parents=True)
        (tmp_path / name / "influence" / "audit.json").write_text(content)
    found = Audits(tmp_path)
    runs = {run["id"]: run for run in found.runs()}
    assert runs["fine/influence"]["error"] is None
    for name in ("cut", "list", "deep", "text"):
        assert "audit.json can't be read" in runs[f"{name}/influence"]["error"]
    odd = {
        "number": '{"epochs_done": NaN}',
        "deep": '{"status": ' + "[" * 900 + "]" * 900 + ', "epochs_done": ' + "[" * 900 + "]" * 900 + "}",
        "digits": '{"epochs_done": 1' + "0" * 6000 + "}",
        "types": '{"status": [], "created": {"a": 1}, "epochs_done": "<img>"}',
        "large": '{"status": "' + "x" * 100_000 + '", "epochs_done": 1' + "0" * 400 + "}",
    }
    for name, content in odd.items():
        (tmp_path / name / "influence").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "influence" / "audit.json").write_text(content)
    text = json.dumps(found.runs(), allow_nan=False)
    runs = {run["id"].partition("/")[0]: run for run in json.loads(text)}
    assert "NaN, which is no number" in runs["number"]["error"]
    assert "digits" in runs["digits"]["error"]
    for name in ("types", "large"):
        assert (runs[name]["error"], runs[name]["epochs_done"], runs[name]["created"]) == (None, None, "")
    assert len(text) < 5000
    os.remove(fine / "audit.json")
    (fine / "scores.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ViewError, match=r"scores\.parquet"):
        found.document("fine/influence")


def test_an_audit_from_before_the_page(tmp_path: Path) -> None:
    report = report_of(30).save(tmp_path / "influence")
    assert report.directory is not None
    for folder, key in ((tmp_path / "influence", "."), (tmp_path, "influence")):
        content = json.loads(Audits(folder).document(key))
        assert content["examples"] == 30
        assert [card["title"] for card in content["cards"]] == ["examples", "candidates"]
    assert not (tmp_path / "influence" / "audit.json").exists()  # looking at it changes nothing
    made = Audits(tmp_path)
    assert made.document("influence") is made.document("influence")


def test_an_audit_that_changes_is_told_anew(tmp_path: Path) -> None:
    directory = write_audit(tmp_path / "influence", report_of(30))
    audits = Audits(tmp_path)
    assert audits.runs()[0]["status"] == "complete"
    content = (directory / "audit.json").read_text()
    (directory / "audit.json").write_text(content.replace('"complete"', '"interrupted"'))
    assert audits.runs()[0]["status"] == "interrupted"
    shutil.rmtree(directory)
    assert audits.runs() == []


def test_only_directories_with_audits_are_taken(tmp_path: Path) -> None:
    with pytest.raises(ViewError, match="does not exist"):
        ViewServer(tmp_path / "nothing", 0)
    with pytest.raises(ViewError, match="holds no audit: expected manifest.json"):
        ViewServer(tmp_path, 0)
    (tmp_path / "file").touch()
    with pytest.raises(ViewError, match="is a file"):
        export_html(tmp_path / "file", tmp_path / "out.html")


def test_links_to_elsewhere_are_not_followed(tmp_path: Path) -> None:
    write_audit(tmp_path / "outside" / "influence", report_of(10))
    write_audit(tmp_path / "inside" / "influence", report_of(10))
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    audits = Audits(tmp_path / "inside")
    assert list(audits.found()) == ["influence"]
    (tmp_path / "inside" / "influence").rename(tmp_path / "away")
    (tmp_path / "inside" / "influence").symlink_to(tmp_path / "outside" / "influence")
    with pytest.raises(KeyError):  # it was no link when it was found
        audits.document("influence")


@pytest.mark.parametrize("inside", [True, False])
def test_files_that_are_links(inside: bool, tmp_path: Path) -> None:
    """As tools for versions of data make them; one that somebody else has packed may lead anywhere."""
    directory = write_audit(tmp_path / "logs" / "influence", report_of(10), pictures={0: picture(0)})
    elsewhere = tmp_path / ("logs/store" if inside else "secrets")
    elsewhere.mkdir()
    (directory / "review.csv").write_bytes(REVIEW)
    for name in ("audit.json", "pictures-0.json", "review.csv"):
        (directory / name).rename(elsewhere / f"kept-{name}")
        (directory / name).symlink_to(elsewhere / f"kept-{name}")
    audits = Audits(tmp_path / "logs")
    (run,) = audits.runs()
    asked = [
        lambda: audits.document("influence"),
        lambda: audits.pictures("influence", "0"),
        lambda: audits.review("influence"),
        lambda: audits.write_review("influence", REVIEW + b"drop,,1\r\n", tag_of(REVIEW)),
    ]
    if inside:
        assert run["error"] is None
        assert all(ask() for ask in asked)
        return
    assert "audit.json is a link to elsewhere" in run["error"]
    for ask in asked:
        with pytest.raises(ViewError, match="is a link to elsewhere; view a directory that holds both"):
            ask()
    assert (elsewhere / "kept-review.csv").read_bytes() == REVIEW


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_folders_whose_names_are_no_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    write_audit(folder / "influence", report_of(10))
    write_audit(tmp_path / "fine" / "influence", report_of(10))
    audits = Audits(tmp_path)
    for run in audits.runs():
        run["name"].encode()
        assert audits.document(run["id"])
    assert export_html(tmp_path, tmp_path / "out.html").read_text().count('id="influence-audit-') == 2


def test_the_directory_is_walked_for_the_list_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_audit(tmp_path / "a" / "influence", report_of(10), pictures={0: picture(0)})
    audits, walks = Audits(tmp_path), []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **more: walks.append(args) or walk(*args, **more))
    audits.document("a/influence"), audits.pictures("a/influence", "0"), audits.review("a/influence")
    assert not walks
    write_audit(tmp_path / "b" / "influence", report_of(10))
    audits.document("b/influence")  # one that came in since
    assert len(walks) == 1


def test_a_port_that_is_taken(server: ViewServer) -> None:
    port = server.server_address[1]
    with pytest.raises(ViewError, match=f"port {port} on 127.0.0.1 can't be had"):
        ViewServer(server.audits.root, port)
    with pytest.raises(ViewError, match="can't be had"):
        ViewServer(server.audits.root, 70_000)


def test_serving_says_where_and_ends_with_ctrl_c(audits: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: ViewServer, poll_interval: float = 0.5) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ViewServer, "serve_forever", interrupted)
    said: list[str] = []
    serve(audits["pictures"], 0, say=said.append)
    assert "http://127.0.0.1:" in said[0]
    assert "?token=" in said[0]
    assert said[-1] == "stopped"


def test_viewing_does_not_load_torch(audits: dict[str, Path]) -> None:
    source = """
import sys
from lightning_influence.view import export_html
from lightning_influence.view.audits import Audits
from pathlib import Path
audits = Audits(Path(sys.argv[1]))
audits.document(audits.runs()[0]["id"])
export_html(sys.argv[1], sys.argv[2])
print([name for name in ("torch", "lightning", "numpy") if name in sys.modules])
"""
    root = audits["pictures"].parent
    arguments = [sys.executable, "-c", source, str(root), str(root / "out.html")]
    found = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- one file


def test_one_file_of_several_audits(audits: dict[str, Path], tmp_path: Path) -> None:
    root = audits["pictures"].parent.parent
    path = export_html(root, tmp_path / "new" / "out.html")
    text = path.read_text(encoding="utf-8")
    assert text.count('id="influence-audit-') == 4
    assert "data:image/png;base64" in text
    assert [each.name for each in path.parent.iterdir()] == ["out.html"]


def test_one_file_holds_a_chunk_of_pictures_at_a_time(tmp_path: Path) -> None:
    """Six copies of all of them were held before: 87 MB for the 20 MB that an audit may have."""
    noise = {index: b"\x89PNG" + bytes([index]) * 500_000 for index in range(12)}
    write_audit(tmp_path / "influence", report_of(30), pictures=noise)
    export_html(tmp_path, tmp_path / "out.html")  # what is read once and kept
    tracemalloc.start()
    try:
        path = export_html(tmp_path, tmp_path / "out.html")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 8_000_000
    assert peak < 4_000_000


def test_one_file_without_pictures_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {index: b"\x89PNG" + bytes([index]) * 900_000 for index in range(3)}
    directory = write_audit(tmp_path / "influence", report_of(30), pictures=noise)
    with open(directory / "pictures-1.json", "ab") as file:
        file.truncate(3_000_000)
    monkeypatch.setattr("lightning_influence.view.audits._LARGEST", 2_000_000)
    with pytest.warns(UserWarning, match="influence, its pictures from chunk 1 on: pictures-1.json has 3,000"):
        text = export_html(tmp_path, tmp_path / "out.html").read_text()
    assert re.findall(r'id="influence-([a-z]+-?\d?-?\d?)"', text) == ["audit-0", "pictures-0-0", "runs"]
    assert text.endswith("</html>\n")


def test_one_file_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    directory = write_audit(tmp_path / "influence", report_of(10), pictures={0: picture(0)})
    os.remove(directory / "pictures-0.json")
    assert "influence-pictures-0-0" not in export_html(tmp_path, tmp_path / "out.html").read_text()
    write_audit(tmp_path / "fine" / "influence", report_of(10), pictures={0: picture(0)})
    for damaged in ("{", "[]", '{"pictures": []}', '{"pictures": {"0": [1000000000, 0]}}'):
        (directory / "audit.json").write_text(damaged)
        if "pictures" in damaged:  # of these, the page tells
            export_html(tmp_path, tmp_path / "out.html")
            continue
        with pytest.warns(UserWarning, match=r"without audits that can't be read:\n  influence: audit.json"):
            text = export_html(tmp_path, tmp_path / "out.html").read_text()
        assert text.count('id="influence-audit-') == 1
    shutil.rmtree(tmp_path / "fine")
    (directory / "audit.json").write_text("{")
    with pytest.raises(ViewError, match="none of the audits"):
        export_html(tmp_path, tmp_path / "out.html")

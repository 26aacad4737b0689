"""The audit directory: every file whole or absent, nothing overwritten, nothing lost."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lightning_influence.audit.columns import COLUMNS
from lightning_influence.audit.store.store import SCHEMA_VERSION, AuditStore, StoreError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path: Path) -> AuditStore:
    return AuditStore.create(tmp_path / "influence")


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes every write beyond `size` bytes fail as a full disk does: in the middle, with an `OSError`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


class TestCreate:
    def test_makes_parents_and_a_readable_manifest(self, tmp_path: Path) -> None:
        made = AuditStore.create(tmp_path / "version_0" / "influence")
        assert made.directory == tmp_path / "version_0" / "influence"
        opened = AuditStore.open(made.directory)
        assert opened.manifest == {"schema_version": SCHEMA_VERSION, "status": "recording"}
        assert opened.status == "recording"
        assert list(opened.factors()) == []

    def test_never_takes_what_exists(self, tmp_path: Path) -> None:
        first = AuditStore.create(tmp_path / "influence")
        first.write_scores({"index": [1, 2]})
        names = [AuditStore.create(tmp_path / "influence").directory.name for _ in range(2)]
        assert names == ["influence-v1", "influence-v2"]
        assert first.read_scores()["index"].tolist() == [1, 2]

        (tmp_path / "file").write_text("mine")
        assert AuditStore.create(tmp_path / "file").directory.name == "file-v1"
        assert (tmp_path / "file").read_text() == "mine"

        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "notes.txt").write_text("mine")
        assert AuditStore.create(tmp_path / "folder").directory.name == "folder-v1"
        assert files_below(tmp_path / "folder") == ["notes.txt"]

        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        assert AuditStore.create(tmp_path / "link").directory.name == "link-v1"

    def test_takes_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert AuditStore.create(tmp_path / "empty").directory == tmp_path / "empty"

    @pytest.mark.parametrize("exists", [False, True])
    def test_racing_creators_get_different_directories(self, tmp_path: Path, exists: bool) -> None:
        wanted = tmp_path / "influence"
        if exists:
            wanted.mkdir()
        barrier = threading.Barrier(8)
        made: list[str] = []

        def create() -> None:
            barrier.wait()
            made.append(AuditStore.create(wanted).directory.name)

        threads = [threading.Thread(target=create) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # No number may be passed over either: whoever gives way does so to somebody who keeps the place.
        assert sorted(made) == ["influence", *(f"influence-v{n}" for n in range(1, 8))]

    def test_rival_between_look_and_claim(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the exclusive claim both would write into the folder that both saw empty."""
        (tmp_path / "influence").mkdir()
        mkdir = os.mkdir
        rivals: list[AuditStore | None] = []

        def slow_mkdir(path: Any, *args: Any) -> None:
            if Path(path).name == "factors" and not rivals:
                rivals.append(None)
                rivals[0] = AuditStore.create(tmp_path / "influence")
            mkdir(path, *args)

        monkeypatch.setattr(os, "mkdir", slow_mkdir)
        loser = AuditStore.create(tmp_path / "influence")
        assert [rival.directory.name for rival in rivals if rival] == ["influence"]
        assert loser.directory.name == "influence-v1"

    @pytest.mark.parametrize("below", ["influence", "deeper/influence"])
    def test_place_below_a_file(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StoreError, match=r"Cannot create .*file/.*influence: tried .*`dirpath=`"):
            AuditStore.create(tmp_path / "file" / below)

    def test_forbidden_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbid(path: Any, *args: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        (tmp_path / "home").mkdir()
        monkeypatch.setattr(os, "mkdir", forbid)
        with pytest.raises(StoreError, match=r"home/influence.*Permission denied.*`dirpath=`"):
            AuditStore.create(tmp_path / "home" / "influence")
        assert list((tmp_path / "home").iterdir()) == []

    def test_folder_that_can_be_made_but_not_written(self, tmp_path: Path) -> None:
        with (
            largest_file(10),
            pytest.raises(StoreError, match=r"Cannot create .*influence: tried .*File too large.*`dirpath=`"),
        ):
            AuditStore.create(tmp_path / "influence")
        assert AuditStore.create(tmp_path / "influence").directory.name == "influence"

    def test_remote_address(self) -> None:
        with pytest.raises(StoreError, match=r"s3://bucket/x is a remote address; pass `dirpath=`"):
            AuditStore.create("s3://bucket/x")

    def test_home_folder_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert AuditStore.create("~/influence").directory == tmp_path / "influence"


class TestOpen:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"nowhere does not exist; expected .* manifest\.json"):
            AuditStore.open(tmp_path / "nowhere")

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="file is a file; expected an audit directory"):
            AuditStore.open(tmp_path / "file")

    def test_no_manifest_names_what_was_found(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"expected manifest\.json, found nothing\."):
            AuditStore.open(tmp_path)
        for number in range(10):
            (tmp_path / f"events.{number}").write_text("")
        with pytest.raises(StoreError, match=r"found events\.0, .*events\.7 and more\."):
            AuditStore.open(tmp_path)

    def test_newer_schema(self, store: AuditStore) -> None:
        (store.directory / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
        with pytest.raises(StoreError, match=r"schema version 2; this package reads up to 1: upgrade"):
            AuditStore.open(store.directory)

    @pytest.mark.parametrize(
        "text", ["[1]", "{}", '{"schema_version": "1"}', '{"schema_version": 0}', '{"schema_version": true}']
    )
    def test_foreign_manifest(self, store: AuditStore, text: str) -> None:
        (store.directory / "manifest.json").write_text(text)
        with pytest.raises(StoreError, match="expected a schema_version, found"):
            AuditStore.open(store.directory)

    @pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "sta', b"\xff\xfe\x00"])
    def test_damaged_manifest(self, store: AuditStore, content: bytes) -> None:
        (store.directory / "manifest.json").write_bytes(content)
        with pytest.raises(StoreError, match=r"manifest\.json cannot be read: .*Run the audit again"):
            AuditStore.open(store.directory)

    def test_unreadable_directory(self, store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbid(self: Path) -> Iterator[Path]:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "iterdir", forbid)
        with pytest.raises(StoreError, match="influence cannot be read: .*Permission denied"):
            AuditStore.open(store.directory)


class TestManifest:
    def test_round_trip_of_everything_allowed(self, store: AuditStore) -> None:
        store.write_manifest(
            {
                "status": "complete",
                "arguments": {"damping": np.float32(0.5), "dirpath": Path("a/b"), "dtype": torch.float64},
                "device": torch.device("cpu"),
                "label_names": {0: "chat, «noir»", 1: "猫"},
                "seconds": (torch.tensor(1.5, requires_grad=True), np.int64(3), np.bool_(True), None),
                "matrix": np.eye(2, dtype=np.int8),
                "half": torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
            }
        )
        assert AuditStore.open(store.directory).manifest == {
            "status": "complete",
            "arguments": {"damping": 0.5, "dirpath": "a/b", "dtype": "torch.float64"},
            "device": "cpu",
            "label_names": {"0": "chat, «noir»", "1": "猫"},
            "seconds": [1.5, 3, True, None],
            "matrix": [[1, 0], [0, 1]],
            "half": [0.5, 2.0],
            "schema_version": SCHEMA_VERSION,
        }
        assert store.status == "complete"

    def test_not_a_number_becomes_null(self, store: AuditStore) -> None:
        """Python's own default writes the word NaN, which browsers refuse to parse."""
        store.write_manifest({"a": math.nan, "b": [math.inf, 1.0], "c": torch.tensor([-math.inf, 0.1]).double()})
        store.write_manifest({**store.manifest, "d": np.float32("nan")})

        def refuse(word: str) -> None:
            raise AssertionError(word)

        data = json.loads((store.directory / "manifest.json").read_text(), parse_constant=refuse)
        assert [data[name] for name in "abcd"] == [None, [None, 1.0], [None, pytest.approx(0.1)], None]

    def test_status_is_kept_and_checked(self, store: AuditStore) -> None:
        store.write_manifest({"status": "interrupted"})
        store.write_manifest({"epochs": 3})
        assert store.status == "interrupted"
        with pytest.raises(ValueError, match="status is 'done'; expected one of"):
            store.write_manifest({"status": "done"})
        (store.directory / "manifest.json").write_text('{"schema_version": 1, "status": "half"}')
        with pytest.raises(StoreError, match="has status 'half'; expected one of"):
            _ = store.status

    @pytest.mark.parametrize(
        ("manifest", "error", "message"),
        [
            ({"a": {"b": [1, {2}]}}, TypeError, r"\{2\} is a set, which the manifest cannot hold"),
            ({"a": torch.tensor(1j)}, TypeError, r"1j is a complex"),
            ({"a": {(1, 2): 1}}, TypeError, r"keys must be str, int"),
        ],
    )
    def test_what_json_cannot_hold(
        self, store: AuditStore, manifest: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            store.write_manifest(manifest)
        assert store.status == "recording"


class TestScores:
    def test_bits_and_dtypes_survive(self, store: AuditStore) -> None:
        generator = torch.Generator().manual_seed(0)
        odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324])
        odd.view(np.int64)[2] |= 77  # a NaN with a payload
        doubles = torch.cat([torch.from_numpy(odd), torch.randn(994, dtype=torch.float64, generator=generator)])
        columns: dict[str, Any] = {
            "index": torch.arange(1000).flip(0) + 2**53 + 1,
            "loss": doubles,
            "aum": doubles.float(),
            "half": doubles.to(torch.float16),
            "candidate": torch.arange(1000) % 3 == 0,
            "small": np.arange(1000, dtype=np.int32)[::-1],
            "label": np.array(["a", 'b, "c"', "猫\n\x00"] * 333 + [""], dtype=object),
            "strided": torch.arange(2000, dtype=torch.float64)[::2],
        }
        store.write_scores(columns)
        back = AuditStore.open(store.directory).read_scores()
        assert list(back) == list(columns)
        for name, column in columns.items():
            expected = column.numpy() if isinstance(column, torch.Tensor) else column
            assert back[name].dtype == expected.dtype, name
            assert back[name].flags.writeable, name
            if expected.dtype == object:
                assert back[name].tolist() == expected.tolist()
            else:
                assert back[name].tobytes() == expected.tobytes(), name

    def test_sequences(self, store: AuditStore) -> None:
        store.write_scores(
            {"i": [1, 2], "f": (0.1, 2), "b": [True, False], "s": ["x", "yy"], "u": np.array(["p", "qq"])}
        )
        back = store.read_scores()
        assert {name: str(column.dtype) for name, column in back.items()} == {
            "i": "int64", "f": "float64", "b": "bool", "s": "object", "u": "object",
        }  # fmt: skip
        assert back["s"].tolist() == ["x", "yy"]
        assert back["u"].tolist() == ["p", "qq"]

    def test_no_examples(self, store: AuditStore) -> None:
        store.write_scores({"index": torch.zeros(0, dtype=torch.int64), "label": np.array([], dtype=object)})
        assert {name: len(column) for name, column in store.read_scores().items()} == {"index": 0, "label": 0}

    def test_meaning_of_the_columns_is_stored(self, store: AuditStore) -> None:
        store.write_scores({"harm": [0.5], "mine": [1]})
        schema = pq.read_schema(store.directory / "scores.parquet")
        assert schema.field("harm").metadata[b"description"].decode() == COLUMNS["harm"].description
        assert b"description" not in (schema.field("mine").metadata or {})
        assert schema.metadata[b"lightning_influence.schema_version"] == b"1"

    @pytest.mark.parametrize(
        ("columns", "error", "message"),
        [
            ({"index": [0, 1], "loss": torch.zeros(3)}, ValueError, "expected length 2 but got length 3"),
            ({"loss": torch.zeros(2, 3)}, ValueError, "only handle 1-dimensional arrays"),
            ({"loss": torch.tensor(1.0)}, ValueError, "only handle 1-dimensional arrays"),
        ],
    )
    def test_wrong_columns(
        self, store: AuditStore, columns: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            store.write_scores(columns)
        assert files_below(store.directory) == ["manifest.json"]

    def test_missing_and_damaged(self, store: AuditStore) -> None:
        with pytest.raises(StoreError, match=r"scores\.parquet does not exist .*'recording'"):
            store.read_scores()
        store.write_scores({"index": [1, 2, 3]})
        path = store.directory / "scores.parquet"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(StoreError, match=r"scores\.parquet cannot be read: .*Run the audit again"):
            store.read_scores()


class TestCandidates:
    @staticmethod
    def rows(store: AuditStore) -> list[dict[str, str]]:
        with open(store.directory / "candidates.csv", encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))

    def test_rows_order_and_format(self, store: AuditStore) -> None:
        store.write_candidates(
            {
                "extra": [1.0, 2.0, 3.0, 4.0],
                "loss_mean": torch.tensor([0.1, 1 / 3, 123456789.0, math.nan], dtype=torch.float64),
                "suspicion": [0.25, -1e-9, math.inf, 1.0],
                "index": [10, 11, 12, 13],
                "finite": [True, True, False, True],
                "candidate": [True, False, True, True],
                "rank": [3, 4, 1, 2],
            }
        )
        assert (store.directory / "candidates.csv").read_bytes() == (
            b"decision,rank,index,suspicion,finite,loss_mean,extra\r\n"
            b",1,12,inf,false,1.23457e+08,3\r\n"
            b",2,13,1,true,,4\r\n"
            b",3,10,0.25,true,0.1,1\r\n"
        )

    def test_label_names(self, store: AuditStore) -> None:
        columns: dict[str, Any] = {
            "candidate": [True] * 4,
            "rank": [1, 2, 3, 4],
            "label": torch.tensor([0, 1, 2, 3]),
            "predicted": [1, 2, 3, -1],
        }
        names = ['tabby, "grey"', "猫 – Häuschen", "two\r\nlines", ""]
        store.write_candidates(columns, label_names=names)
        rows = self.rows(store)
        named = ["label", "label_name", "predicted", "predicted_name"]
        assert list(rows[0]) == ["decision", "new_label", "rank", *named]
        assert [row["label_name"] for row in rows] == names
        assert [row["predicted_name"] for row in rows] == [*names[1:], ""]
        assert [row["predicted"] for row in rows] == ["1", "2", "3", "-1"]
        store.write_candidates(columns, label_names=names[:1])
        assert [row["label_name"] for row in self.rows(store)] == [names[0], "", "", ""]

    def test_formulas_are_disarmed_but_numbers_are_not_touched(self, store: AuditStore) -> None:
        names = ["=1+1", "+49", "-x", "@SUM(A1)", "\t=1", "\uff1d1", "a=b", "'q"]
        count = len(names)
        columns: dict[str, Any] = {
            "candidate": [True] * count,
            "rank": list(range(1, count + 1)),
            "label": list(range(count)),
            "aum": [-1.5] * count,
            "=file": ["-rm"] * count,
        }
        store.write_candidates(columns, label_names=names)
        rows = self.rows(store)
        assert [row["label_name"] for row in rows] == [
            "'=1+1", "'+49", "'-x", "'@SUM(A1)", "'\t=1", "'\uff1d1", "a=b", "'q",
        ]  # fmt: skip
        assert {row["aum"] for row in rows} == {"-1.5"}
        assert {row["'=file"] for row in rows} == {"'-rm"}

    def test_text_that_is_not_unicode(self, store: AuditStore) -> None:
        store.write_candidates({"candidate": [True], "rank": [1], "label": [0]}, label_names=["b\udcff"])
        assert self.rows(store)[0]["label_name"] == r"b\udcff"

    def test_no_candidates(self, store: AuditStore) -> None:
        store.write_candidates({"rank": [1, 2], "candidate": [False, False]})
        assert (store.directory / "candidates.csv").read_bytes() == b"decision,rank\r\n"


class TestFactors:
    NAMES = (
        "encoder.0.conv", "", ".", "..", "../../x", "a/b", "a\\b", "/etc/passwd", "con:1", "con", "CON.1",
        "nul.x", "Layer", "layer", "%", "%41", "A", "%25", "a b*?[x]", "schicht.größe", "猫", "\x00",
        "\udcff", ".tmp-12345678-a", "a.safetensors", "a", "~", "a\n",
    )  # fmt: skip

    def test_any_block_name(self, store: AuditStore) -> None:
        for number, name in enumerate(self.NAMES):
            store.write_factors(name, {"A": torch.full((2,), number)}, {"name": str(number)})
        assert list(AuditStore.open(store.directory).factors()) == sorted(self.NAMES)
        for number, name in enumerate(self.NAMES):
            tensors, metadata = store.factors()[name]
            assert tensors["A"].tolist() == [number, number], name
            assert metadata == {"name": str(number)}

        files = [path.name for path in (store.directory / "factors").iterdir()]
        assert "encoder.0.conv.safetensors" in files
        assert len({name.lower() for name in files}) == len(self.NAMES), "one file for Layer and layer"
        assert not [name for name in files if name.split(".")[0] in {"con", "nul", ""}]
        assert len(files_below(store.directory.parent)) == len(self.NAMES) + 1, "a file outside factors/"

    def test_tensors_of_every_kind(self, store: AuditStore) -> None:
        base = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        complex_ = torch.complex(base, base + 1).to(torch.complex64)
        tensors = {
            "plain": base.clone(),
            "transposed": base.T,
            "slice": base[1:3],
            "shared": base,
            "shared_again": base,
            "expanded": torch.ones(1, 3).expand(5, 3),
            "parameter": torch.nn.Parameter(base[:, 0]),
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 3),
            "empty_again": torch.zeros(0, 3),
            "half": base.bfloat16(),
            "mask": base > 0,
            # A plain save of these two loses the pending conjugation and the pending minus sign.
            "conjugate": complex_.conj(),
            "imaginary": complex_[0, :1].conj().imag,
        }
        expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        store.write_factors("block", tensors)
        back, metadata = store.factors()["block"]
        assert metadata == {}
        assert back.keys() == expected.keys()
        for name, tensor in expected.items():
            assert back[name].dtype == tensor.dtype, name
            assert torch.equal(back[name], tensor), name
        back["plain"].zero_()
        assert torch.equal(store.factors()["block"][0]["plain"], base), "writes through to the file"
        size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
        assert (store.directory / "factors" / "block.safetensors").stat().st_size < size + 2000

    def test_file_mode_is_the_users(self, store: AuditStore) -> None:
        """A private mode would hide the factors from the group that shares the log folder."""
        store.write_factors("block", {"A": torch.eye(2)})
        store.write_scores({"index": [0]})
        (store.directory / "plain").write_text("")
        mode = (store.directory / "plain").stat().st_mode
        assert (store.directory / "factors" / "block.safetensors").stat().st_mode == mode
        assert (store.directory / "scores.parquet").stat().st_mode == mode

    def test_wrong_tensors_and_metadata(self, store: AuditStore) -> None:
        wrong: Any = {"epoch": 3}
        with pytest.raises(TypeError, match="metadata"):
            store.write_factors("block", {"A": torch.eye(2)}, wrong)
        assert files_below(store.directory) == ["manifest.json"]

    def test_missing_and_damaged(self, store: AuditStore) -> None:
        store.write_factors("fc1", {"A": torch.eye(2)})
        path = store.directory / "factors" / "fc1.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(StoreError, match=r"fc1\.safetensors cannot be read"):
            store.factors()["fc1"]

    def test_reader_meets_one_version(self, store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Safetensors' `safe_open` opens the file twice: the old metadata would come with the new tensors."""
        store.write_factors("fc", {"A": torch.zeros(3)}, {"version": "old"})
        read_bytes, reads = Path.read_bytes, []

        def overtaken(path: Path) -> bytes:
            reads.append(read_bytes(path))
            store.write_factors("fc", {"A": torch.ones(3)}, {"version": "new"})
            return reads[-1]

        monkeypatch.setattr(Path, "read_bytes", overtaken)
        tensors, metadata = store.factors()["fc"]
        assert len(reads) == 1
        assert (tensors["A"].tolist(), metadata) == ([0.0, 0.0, 0.0], {"version": "old"})

    def test_name_too_long_for_a_file(self, store: AuditStore) -> None:
        with pytest.raises(StoreError, match=r"Cannot write .*File name too long"):
            store.write_factors("x" * 300, {"A": torch.eye(2)})

    def test_lost_and_foreign_files(self, store: AuditStore) -> None:
        (store.directory / "factors").rmdir()  # as tools that copy only files leave it
        assert list(store.factors()) == []
        store.write_factors("fc", {"A": torch.eye(2)})
        (store.directory / "factors" / "Other.safetensors").write_text("not made here")
        assert list(store.factors()) == ["fc"]

    def test_audit_removed_meanwhile(self, store: AuditStore) -> None:
        """What is computed is not lost to somebody who tidies up; a file in its place is not written over."""
        moved = store.directory.with_name("moved")
        store.directory.rename(moved)
        store.write_factors("fc", {"A": torch.eye(2)})
        store.write_scores({"index": [1]})
        assert store.read_scores()["index"].tolist() == [1]
        store.directory.rename(store.directory.with_name("moved again"))
        store.directory.write_text("a file now")
        with pytest.raises(StoreError, match=r"Cannot write .*scores\.parquet: "):
            store.write_scores({"index": [1]})
        assert store.directory.read_text() == "a file now"


WRITERS: dict[str, Callable[[AuditStore, int], None]] = {
    "manifest.json": lambda store, n: store.write_manifest({"status": "complete", "n": [n] * 5000}),
    "scores.parquet": lambda store, n: store.write_scores({"index": np.full(5000, n) + np.arange(5000)}),
    "candidates.csv": lambda store, n: store.write_candidates({"rank": [n] * 5000, "candidate": [1] * 5000}),
    "factors/fc.safetensors": lambda store, n: store.write_factors("fc", {"A": torch.full((5000,), n)}),
}


@pytest.mark.parametrize("file", WRITERS)
class TestCrash:
    """Each kind of file, written once (1), then again (2) with a failure on the way."""

    @pytest.fixture
    def first(self, store: AuditStore, file: str) -> bytes:
        WRITERS[file](store, 1)
        return (store.directory / file).read_bytes()

    @pytest.mark.parametrize("function", ["replace", "fsync"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_old_file_stays(
        self,
        store: AuditStore,
        file: str,
        first: bytes,
        monkeypatch: pytest.MonkeyPatch,
        function: str,
        error: BaseException,
    ) -> None:
        before = files_below(store.directory)

        def fail(*args: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            if isinstance(error, OSError):
                with pytest.raises(StoreError, match=rf"Cannot write .*{file}: .*No space left.*`dirpath=`"):
                    WRITERS[file](store, 2)
            else:
                with pytest.raises(KeyboardInterrupt):
                    WRITERS[file](store, 2)
        assert (store.directory / file).read_bytes() == first
        assert files_below(store.directory) == before
        WRITERS[file](store, 2)
        assert (store.directory / file).read_bytes() != first

    def test_disk_full_in_the_middle(self, store: AuditStore, file: str, first: bytes) -> None:
        before = files_below(store.directory)
        with largest_file(4096), pytest.raises(StoreError, match=rf"Cannot write .*{file}: .*File too large"):
            WRITERS[file](store, 2)
        assert (store.directory / file).read_bytes() == first
        assert files_below(store.directory) == before

    def test_forbidden_file(self, store: AuditStore, file: str, first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbid(path: Any, *args: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("builtins.open", forbid)
        with pytest.raises(StoreError, match=rf"Cannot write .*{file}: .*Permission denied"):
            WRITERS[file](store, 2)

    def test_leftovers_are_ignored_then_removed(self, store: AuditStore, file: str, first: bytes) -> None:
        path = store.directory / file
        leftover = path.with_name(f".tmp-0123abcd-{path.name}")
        leftover.write_bytes(first[:100])
        # Belongs to another file, whose writer may be at work.
        bystander = path.with_name(f".tmp-0123abcd-x{path.name}")
        bystander.write_bytes(b"")
        names = list(store.factors())
        assert names == (["fc"] if "factors" in file else [])
        assert list(AuditStore.open(store.directory).factors()) == names
        WRITERS[file](store, 2)
        assert not leftover.exists()
        assert bystander.exists()

    def test_folder_in_the_way(self, store: AuditStore, file: str) -> None:
        (store.directory / file).unlink(missing_ok=True)
        (store.directory / file).mkdir()
        with pytest.raises(StoreError, match=rf"Cannot write .*{file}"):
            WRITERS[file](store, 2)
        assert not [name for name in files_below(store.directory) if ".tmp-" in name]

    def test_rival_writer_gets_an_error_and_no_mixture(
        self, store: AuditStore, file: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = os.replace

        def rival_first(source: Any, target: Any) -> None:
            monkeypatch.setattr(os, "replace", replace)
            WRITERS[file](store, 3)
            replace(source, target)

        monkeypatch.setattr(os, "replace", rival_first)
        with pytest.raises(StoreError, match="only one process may write an audit"):
            WRITERS[file](store, 2)
        written = (store.directory / file).read_bytes()
        WRITERS[file](store, 3)
        assert (store.directory / file).read_bytes() == written


KILLED = """
import os, signal, torch
from lightning_influence.audit.store.store import AuditStore

mode, directory = input(), input()
store = AuditStore.open(directory)
if mode == "killed at the rename":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for n in range(10**9):
    size = 1000 + n % 7 * 3000
    store.write_scores({"index": torch.full((size,), n), "loss": torch.full((size,), float(n)).double()})
    store.write_factors("fc", {"A": torch.full((size,), n)}, {"n": str(n)})
    store.write_manifest({"n": [n] * 3000})
    if n == 3:
        print("ready", flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def writers() -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes waiting for orders, started ahead because importing torch takes them seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", KILLED]
    processes = [subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    yield list(processes)
    for process in processes:
        process.kill()
        process.communicate()


def order(process: subprocess.Popen[str], mode: str, directory: Path) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{mode}\n{directory}\n")
    process.stdin.flush()


def assert_whole(store: AuditStore) -> None:
    scores = store.read_scores()
    number = scores["index"][0]
    assert [len(column) for column in scores.values()] == [1000 + number % 7 * 3000] * 2
    assert {*np.unique(scores["index"]).tolist(), *np.unique(scores["loss"]).tolist()} == {number}
    tensors, metadata = store.factors()["fc"]
    assert np.unique(tensors["A"]).tolist() == [int(metadata["n"])]
    assert len(set(store.manifest["n"])) == 1


def test_killed_writer_leaves_whole_files(store: AuditStore, writers: list[subprocess.Popen[str]]) -> None:
    process = writers.pop()
    order(process, "killed from outside", store.directory)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    seen = set()
    # While the writer is at work: a reader that opens a file twice meets two versions within these rounds.
    for _ in range(150):
        assert_whole(AuditStore.open(store.directory))
        seen.add(store.manifest["n"][0])
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(seen) > 1, "nothing was written meanwhile"
    assert_whole(AuditStore.open(store.directory))


def test_writer_killed_before_the_rename(store: AuditStore, writers: list[subprocess.Popen[str]]) -> None:
    store.write_scores({"index": [7]})
    process = writers.pop()
    order(process, "killed at the rename", store.directory)
    assert process.wait() == -signal.SIGKILL
    left = [name for name in files_below(store.directory) if ".tmp-" in name]
    assert len(left) == 1, "the writer was not killed in the middle"
    again = AuditStore.open(store.directory)
    assert again.read_scores()["index"].tolist() == [7]
    again.write_scores({"index": [8]})
    assert files_below(store.directory) == ["manifest.json", "scores.parquet"]
    assert again.read_scores()["index"].tolist() == [8]


def test_nothing_is_pickled(store: AuditStore) -> None:
    for write in WRITERS.values():
        write(store, 1)
    assert files_below(store.directory) == sorted(WRITERS)
    sources = list((ROOT / "lightning_influence" / "audit").rglob("*.py"))
    assert len(sources) > 5
    for source in (path.read_text() for path in sources):
        assert "import pickle" not in source
        assert "torch.save(" not in source.replace("safetensors.torch.save(", "")

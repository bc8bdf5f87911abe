"""Inputs and results behind URLs: what one gets is what one gets from files."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from controlnet.model.work.batch import read_jobs_file
from controlnet.preprocessors import remote
from controlnet.preprocessors.errors import Exit, InputError, OutputError, UsageError
from controlnet.preprocessors.files import exists, is_dir, is_file, read_text, write_file, write_new
from controlnet.preprocessors.images import png_bytes, read_bytes, read_image
from controlnet.preprocessors.metadata import load
from controlnet.preprocessors.shards import MANIFEST
from controlnet.preprocessors.tars import write_tar
from helpers import run

STORE = "memory://store"


@pytest.fixture(autouse=True)
def store():
    """An empty store, which answers as s3:// and gs:// do."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return png_bytes(np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((12, 12, 1), np.uint8)))


def pixels(name):
    return read_image(read_bytes(str(name)), "")[0]


def test_files_behind_urls(store):
    path = remote.place(f"{STORE}/a/b.txt")
    write_file(path, b"words")
    assert is_file(path) and exists(str(path)) and is_dir(f"{STORE}/a") and not exists(f"{STORE}/x")
    assert read_text(path) == "words" and str(path) == f"{STORE}/a/b.txt"
    assert not write_new(path, b"others") and write_new(path.with_name("c.txt"), b"new")
    assert read_bytes(f"{STORE}/a/c.txt") == b"new" and read_bytes(str(path)) == b"words"
    write_tar(remote.place(f"{STORE}/a.tar"), [("x.txt", b"1")])
    assert store.exists("/store/a.tar")


def test_detect(photo, tmp_path, capsys):
    for i in range(2):
        write_file(remote.place(f"{STORE}/photos/{i}.png"), photo)
        write_file(tmp_path / f"{i}.png", photo)
    assert run("detect", "canny", f"{STORE}/photos/", "-o", f"{STORE}/maps/", "--size", "96", "--json") == 0
    assert run("detect", "canny", tmp_path, "-o", tmp_path / "maps", "--size", "96") == 0
    told = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()[:2]]
    assert told == [f"{STORE}/maps/{i}.canny.png" for i in range(2)]
    assert read_bytes(told[1]) == (tmp_path / "maps/1.canny.png").read_bytes()
    assert run("detect", "canny", f"{STORE}/photos/0.png", "--size", "96") == 0  # beside the photo
    assert is_file(f"{STORE}/photos/0.canny.png")
    assert run("detect", "canny", f"{STORE}/photos/0.png", "--size", "96") == Exit.OUTPUT  # exists already
    assert run("detect", "canny", f"{STORE}/photos/0.png", "--size", "96", "--skip-existing") == 0
    assert '"skipped": true' not in capsys.readouterr().err


@pytest.fixture
def jobs(small_base_folder, tmp_path, monkeypatch):
    """Four jobs: their values, and flags that go with them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    given = []
    for i in range(4):
        lines = np.kron((rng.random((8, 8)) > 0.6).astype(np.uint8) * 255, np.ones((8, 8), np.uint8))
        write_file(tmp_path / f"{i}.canny.png", png_bytes(lines))
        given.append({"cond": [f"{i}.canny.png,net={small_base_folder / 'net'}"], "prompt": f"a cube {i}", "seed": i})
    return given, ["--base", small_base_folder / "base", "--steps", "2", "--dtype", "float32", "--size", "64"]


def test_generate(jobs, tmp_path, capsys):
    given, flags = jobs
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in given))
    assert run("generate", "--jobs", "jobs.jsonl", *flags, "-o", tmp_path / "here") == 0
    for i, job in enumerate(given):
        write_file(remote.place(f"{STORE}/maps/{i}.canny.png"), (tmp_path / f"{i}.canny.png").read_bytes())
        job["cond"] = [f"{STORE}/maps/{job['cond'][0]}"]
    write_file(remote.place(f"{STORE}/jobs.jsonl"), "".join(json.dumps(job) + "\n" for job in given).encode())
    command = ["generate", "--jobs", f"{STORE}/jobs.jsonl", *flags, "-o", f"{STORE}/set/"]
    assert run(*command, "--shard", "1/2") == 0 and run(*command, "--shard", "2/2") == 0
    assert is_file(f"{STORE}/set/{MANIFEST}")
    for i in range(4):
        assert np.array_equal(pixels(f"{STORE}/set/{i}-{i}.png"), pixels(tmp_path / f"here/{i}-{i}.png"))
    capsys.readouterr()
    assert run(*command, "--skip-existing", "--json") == 0
    assert capsys.readouterr().out.count('"skipped": true') == 4
    assert run(*command) == Exit.PARTIAL and "exists already" in capsys.readouterr().err
    assert run(*command[:-1], f"{STORE}/tars", "--tar", "3") == 0
    assert is_file(f"{STORE}/tars/000000.tar")
    folder = f"{STORE}/maps/,{given[0]['cond'][0].partition(',')[2]}"
    assert run("generate", "--cond", folder, *flags, "--prompt", "x", "--seed", "1", "-o", f"{STORE}/f/") == 0
    assert all(is_file(f"{STORE}/f/1-{i}.png") for i in range(4))
    capsys.readouterr()
    assert run("score", f"{STORE}/set/0-0.png", "--cond", f"{STORE}/maps/0.canny.png", "--json") == 0
    assert 0 <= json.loads(capsys.readouterr().out)["f1"] <= 1


def test_jobs_in_parquet_and_in_tar_files_are_those_in_text(jobs, tmp_path, small_base_folder):
    import pyarrow
    import pyarrow.parquet

    given, flags = jobs
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in given))
    rows = [job | {"negative": None, "num": None} for job in given]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "jobs.parquet")
    assert [one for _, one in read_jobs_file("jobs.parquet")] == [one for _, one in read_jobs_file("jobs.jsonl")]

    net = f",net={small_base_folder / 'net'}"
    for number in range(2):
        files = []
        for i in (2 * number, 2 * number + 1):
            files.append((f"{i}.canny.png", (tmp_path / f"{i}.canny.png").read_bytes()))
            files.append((f"{i}.json", json.dumps({"seed": i, "num": 1}).encode()))
            files.append((f"{i}.txt", given[i]["prompt"].encode()))
        write_tar(tmp_path / f"{number}.tar", files)
    write_tar(tmp_path / "2.tar", [("9.png", png_bytes(np.zeros((8, 8, 3), np.uint8))), ("9.txt", b"caf\xe9")])
    (spoiled,) = [one for _, one in read_jobs_file("2.tar")]
    assert isinstance(spoiled, UsageError) and "not UTF-8" in str(spoiled)  # that line alone
    read = [one for _, one in read_jobs_file("{0..1}.tar")]
    assert [job["prompt"] for job in read] == [job["prompt"] for job in given]
    assert read[3] == {"seed": 3, "num": 1, "prompt": "a cube 3", "cond": ["1.tar#3.canny.png"]}
    for job, line in zip(read, given, strict=True):
        job["cond"] = [job["cond"][0] + net]
        assert np.array_equal(pixels(job["cond"][0].split(",")[0]), pixels(line["cond"][0].split(",")[0]))
    (tmp_path / "tar.jsonl").write_text("".join(json.dumps(job) + "\n" for job in read))
    assert run("generate", "--jobs", "tar.jsonl", *flags, "-o", "a/") == 0
    assert run("generate", "--jobs", "jobs.parquet", *flags, "-o", "b/") == 0
    a, b = (sorted(Path(name).glob("*.png")) for name in "ab")
    assert len(a) == len(b) == 4 and all(np.array_equal(pixels(x), pixels(y)) for x, y in zip(a, b, strict=True))


def test_jobs_of_a_tar_file_behind_a_url_are_known_by_it(jobs, tmp_path, small_base_folder, capsys):
    """Their records name the URL, so shards agree and images are made again; a template adds what samples lack."""
    given, flags = jobs
    files = [(f"{i}.canny.png", (tmp_path / f"{i}.canny.png").read_bytes()) for i in range(4)]
    files += [(f"{i}.json", json.dumps({"prompt": given[i]["prompt"], "seed": i}).encode()) for i in range(4)]
    for path in (remote.place(f"{STORE}/0.tar"), tmp_path / "0.tar"):
        write_tar(path, files)
    cond = ["--cond", f"@sample,net={small_base_folder / 'net'},scale=0.5"]
    assert run("generate", "--jobs", "0.tar", *flags, *cond, "-o", "here/") == 0
    for part in ("1/2", "2/2"):
        assert run("generate", "--jobs", f"{STORE}/0.tar", *flags, *cond, "-o", "there/", "--shard", part) == 0
    for i in range(4):
        assert np.array_equal(pixels(f"here/{i}-{i}.png"), pixels(f"there/{i}-{i}.png"))
    entry = load(read_image(Path("there/2-2.png").read_bytes(), "")[1])["conditions"][0]
    assert entry["path"] == f"{STORE}/0.tar#2.canny.png" and entry["scale"] == 0.5
    assert run("replay", "there/2-2.png") == 0 and run("score", "there/2-2.png") == 0
    write_tar(tmp_path / "empty.tar", [])
    capsys.readouterr()
    assert run("generate", "--jobs", "empty.tar", *flags, "-o", "x/") == Exit.INPUT
    assert "no jobs in it" in capsys.readouterr().err


@pytest.mark.parametrize("name, error, told", [
    ("memory://nowhere.png", InputError, "no such file"),
    ("http://127.0.0.1:9/photo.png", InputError, "connect.*asked 4 times"),
    ("nosuch://a/b.png", UsageError, "nosuch"),
    ("s3://bucket/photo.png", UsageError, "s3fs"),
])  # fmt: skip
def test_urls_that_cannot_be_read(monkeypatch, name, error, told):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(error, match=told) as raised:
        read_bytes(name)
    assert raised.value.hint


def test_what_cannot_be_written_is_said(photo, monkeypatch, capsys):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with pytest.raises(OutputError):
        remote.put(remote.place("http://127.0.0.1:9/x"), b"1")
    assert run("detect", "canny", "memory://nowhere/x.png") == Exit.INPUT
    assert "memory://nowhere/x.png: no such file" in capsys.readouterr().err


class NoCredentialsError(Exception):
    """As botocore has it."""


class ResponseError(Exception):
    """As aiohttp has it."""

    status = 403


@pytest.mark.parametrize("error", [
    NoCredentialsError("Unable to locate credentials"), PermissionError("Forbidden"), ResponseError("Forbidden"),
])  # fmt: skip
def test_missing_credentials_are_said_at_once(monkeypatch, error):
    calls = []

    def refused():
        calls.append(1)
        raise error

    monkeypatch.setattr(remote, "place", lambda name: SimpleNamespace(read_bytes=refused))
    with pytest.raises(InputError, match=str(error)) as raised:
        remote.read_url(f"{STORE}/a")
    assert len(calls) == 1 and "credentials" in raised.value.hint


def test_a_full_disk_under_a_copy_is_told_at_once(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    write_file(remote.place(f"{STORE}/a.tar"), b"1")
    monkeypatch.setattr(remote, "open", lambda *a: Full(), raising=False)
    with pytest.raises(OutputError, match="No space left"):
        remote.fetch(f"{STORE}/a.tar", tmp_path / "a.tar")


def test_a_store_that_fails_for_a_moment_is_asked_again(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    write_file(remote.place(f"{STORE}/a"), b"1")
    calls = []

    def shaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return b"1"

    monkeypatch.setattr(remote, "place", lambda name: SimpleNamespace(read_bytes=shaky))
    assert remote.read_url(f"{STORE}/a") == b"1" and len(calls) == 3

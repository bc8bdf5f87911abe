"""Files are whole or not there; JSON and text that others wrote are errors of theirs, never ours."""

import os
import subprocess
import sys

import pytest
from controlnet.preprocessors import files, jsons
from controlnet.preprocessors.errors import InputError, ModelError, OutputError
from controlnet.preprocessors.metadata import dump, load
from hypothesis import given
from hypothesis import strategies as st


def names(folder):
    return sorted(path.name for path in folder.iterdir())


DEEP = "[" * 100_000 + "]" * 100_000


def test_a_file_is_whole_or_not_there(tmp_path):
    files.write_file(tmp_path / "a" / "b.txt", b"first")
    with pytest.raises(RuntimeError), files.beside(tmp_path / "a/b.txt") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a/b.txt").read_bytes() == b"first" and names(tmp_path / "a") == ["b.txt"]


def test_a_folder_replaces_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    with files.beside(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert names(tmp_path / "model") == ["new"] and names(tmp_path) == ["model"]


def test_a_name_as_long_as_the_system_allows(tmp_path):
    files.write_file(tmp_path / ("n" * 251 + ".png"), b"x")
    assert len(names(tmp_path)[0]) == 255
    with pytest.raises(OutputError, match="cannot be written"):
        files.write_file(tmp_path / ("n" * 300), b"x")
    assert not files.is_file(tmp_path / ("n" * 300)) and not files.exists("n" * 5000) and not files.is_dir("\0")


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    """And nothing else: not what a living process writes, not what another machine wrote."""
    code = f"""
import os, sys
from pathlib import Path
from controlnet.preprocessors.files import beside
with beside(Path({str(tmp_path / "x.png")!r})) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = names(tmp_path)
    assert left.endswith(".tmp")
    here, there = f".{files._HOST}-{files._SPACE}", f".{files._HOST}-0123"  # another container
    others = [f"{here}-{os.getppid()}-7.tmp", f"{there}-999999-1.tmp", ".00000000-1-7.tmp", "mine.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / f"{there}-999999-2.tmp").touch()
    os.utime(tmp_path / f"{there}-999999-2.tmp", (0, 0))  # long silent
    files.write_file(tmp_path / "x.png", b"whole")
    assert names(tmp_path) == sorted([*others, "x.png"])


@pytest.mark.parametrize("text", ["{", DEEP, '{"a":' * 100_000, b"\xff\xfe", "", "NaN x"])
def test_what_is_no_json(text):
    with pytest.raises(ModelError, match=r"x\.json: not valid JSON"):
        jsons.read_object(text, "x.json", ModelError)
    assert jsons.object_or_empty(text) == {}


@pytest.mark.parametrize("text, named", [("null", "null"), ("[1]", "a list"), ("5", "a number"), ('"a"', "a text")])
def test_json_of_another_shape(text, named):
    with pytest.raises(InputError, match=rf"x\.json: {named}, expected a JSON object"):
        jsons.read_object(text, "x.json")
    assert load({"controlnet": text}) == {}


@given(st.dictionaries(st.text(), st.text(st.characters(codec=None)) | st.integers()))
def test_what_is_written_can_be_written_and_read(fields):
    """Lone surrogates, which file names with bytes that are no text have, are among them."""
    (text,) = dump(fields).values()
    text.encode()
    assert load({"controlnet": text}) == fields


def test_captions_in_another_coding_name_the_command(tmp_path):
    for coding, told in (("utf-16", "-f utf-16"), ("latin-1", "-f latin1")):
        (tmp_path / "a b.txt").write_bytes("caf\xe9".encode(coding))
        with pytest.raises(InputError, match="not UTF-8") as error:
            files.read_text(tmp_path / "a b.txt")
        assert told in error.value.hint and "'" in error.value.hint
    (tmp_path / "c.txt").write_bytes("\ufeffcaf\xe9".encode())
    assert files.read_text(tmp_path / "c.txt") == "caf\xe9"

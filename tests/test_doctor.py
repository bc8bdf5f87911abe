"""`controlnet doctor`."""

import json

import pytest
from controlnet.model.work import doctor
from helpers import run


def test_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "versions", "machine", "cache", "models", "extras",
    ]  # fmt: skip
    assert len(lines) < 50 and max(map(len, lines)) <= 80
    assert any("tiny" in line for line in lines) and any("cores" in line for line in lines)


def test_what_is_missing_comes_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path / "nothing" / "here"))
    monkeypatch.setattr(doctor, "EXTRAS", {"openvino": "no_such_module", "heic": "json"})
    assert run("doctor", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    fixes = {row["what"]: row["fix"] for row in rows if row["fix"]}
    assert fixes["not installed"] == "pip install 'controlnet-toolkit[openvino]'"
    assert fixes["of default detectors"] == "controlnet models pull blazepose hed"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(("size", "told"), [(0, "0.0 MB"), (250_000_000, "0.2 GB")])
def test_sizes(tmp_path, size, told):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(size)
    assert doctor._size(tmp_path) == told


def test_a_cache_that_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path / "file"))
    assert run("doctor") == 0
    assert "set CONTROLNET_CACHE to a folder" in capsys.readouterr().out

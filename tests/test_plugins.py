"""Another package adds detectors: installed beside ours, found, used; a broken one is named and the rest works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from controlnet.preprocessors.detectors.detector import Detector
from controlnet.preprocessors.detectors.plugins import GROUP, add_all
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.kinds import KINDS, Kind
from controlnet.preprocessors.weights import WEIGHTS
from PIL import Image

PACKAGE = """
from dataclasses import dataclass

import numpy as np
from controlnet.preprocessors.detectors.detector import Detector
from controlnet.preprocessors.kinds import Kind


@dataclass(frozen=True)
class Options:
    levels: int = 4
    \"\"\"Levels of grey.\"\"\"


def posters(image, options):
    grey = image.mean(2)
    return (grey // (256 / options.levels) * (255 / (options.levels - 1))).astype(np.uint8)


ROWS = [
    Kind("poster"),
    Detector("poster", "flat", "own_maps:posters", "own_maps:Options", "The photo in few greys."),
    Detector("canny", "flat", "own_maps:posters", "own_maps:Options", "Not quite edges."),
]
"""


def installed(folder: Path, name: str, code: str, value: str) -> None:
    """A package as pip leaves it: its module, and its metadata with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")


@pytest.fixture
def place(tmp_path):
    installed(tmp_path, "own_maps", PACKAGE, "own_maps:ROWS")
    Image.new("RGB", (64, 64), (200, 100, 30)).save(tmp_path / "a.png")
    return tmp_path


def controlnet(place: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "controlnet.cli.main", *args]
    environment = os.environ | {"PYTHONPATH": str(place)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_another_packages_detectors_are_used_like_our_own(place):
    done = controlnet(place, "detect", "poster", "a.png", "--size", "64", "--levels", "2")
    assert (done.returncode, done.stdout) == (0, "a.poster.png\n"), done.stderr
    assert set(Image.open(place / "a.poster.png").tobytes()) == {0}
    record = json.loads(Image.open(place / "a.poster.png").text["controlnet"])
    assert record["kind"] == "poster" and record["options"] == {"levels": 2}
    done = controlnet(place, "detect", "canny", "a.png", "--detector", "flat", "--size", "64")
    assert done.returncode == 0, done.stderr
    listed = controlnet(place, "detect", "--list").stdout
    assert "poster: The photo in few greys." in listed and listed.count("  flat ") == 2
    assert "poster" in controlnet(place, "detect", "--help").stdout
    assert "--levels" in controlnet(place, "detect", "poster", "--help").stdout


BROKEN = {
    "import nowhere": "No module named 'nowhere'",
    "": "no attribute 'ROWS'",
    "ROWS = [1]": "expected rows of Detector, Kind and Weights",
    "raise SystemExit(3)": "3",
    "from controlnet.preprocessors.kinds import Kind; ROWS = Kind('canny')": "canny is in the table",
    **{
        f"from controlnet.preprocessors.detectors.detector import Detector; ROWS = Detector({row})": said
        for row, said in {
            "'a/b', 'c', 'own_maps:posters', 'own_maps:Options', ''": "named by small letters",
            "3, None, 'own_maps:posters', 'own_maps:Options', ''": "named by small letters",
            "'all', 'c', 'own_maps:posters', 'own_maps:Options', ''": "named by small letters",
            "'p', 'c', 'own_maps:posters', 'own_maps:Missing', ''": "Missing",
            "'p', 'c', 'own_maps:posters', 'own_maps:posters', ''": "expected a dataclass",
            "'p', 'c', 'own_maps:posters', 'own_maps:Options', '', ('nosuch',)": "no weights nosuch",
        }.items()
    },
}
"""Code of a plug-in -> what is said of it."""


@pytest.mark.parametrize("code, said", BROKEN.items())
def test_a_broken_one_is_named_and_the_rest_works(place, code, said):
    installed(place, "broken", f"print('hello'); {code}" if code else code, "broken:ROWS")
    listed = controlnet(place, "detect", "--list")
    assert listed.returncode == 0 and "poster" in listed.stdout and "blazepose" in listed.stdout
    assert "warning: plug-in broken of broken is left out: " in listed.stderr and said in listed.stderr
    assert "hello" not in listed.stdout
    assert listed.stderr.count("warning: plug-in") == 1 and "Traceback" not in listed.stderr
    unknown = controlnet(place, "detect", "broken", "a.png")
    assert unknown.returncode == 2 and "plug-in broken of broken is left out" in unknown.stderr
    canny = controlnet(place, "detect", "canny", "a.png", "--size", "64")
    assert canny.returncode == 0 and "plug-in" not in canny.stderr  # it was not looked for


@pytest.mark.parametrize("returned, said", [
    ("None", "returns a map NoneType"), ("image[:10, :10]", "expected uint8 of (64, 64)"), ("image / 2", "float64"),
    ("(image, {'kind': 'canny'})", "returns fields"), ("(image, {'a': np.ones(3)})", "no JSON"),
    ("1 / 0", "fails: division by zero"), ("exit(0)", "fails: 0"), ("image", None),
])  # fmt: skip
def test_what_a_plugins_detector_returns_is_looked_at(monkeypatch, returned, said):
    import types

    module = types.ModuleType("another_one")
    exec(f"import numpy as np\ndef f(image, options): return {returned}", vars(module))
    monkeypatch.setitem(sys.modules, "another_one", module)
    row = Detector("tile", "x", "another_one:f", ".pictures:PictureOptions", "", plugin="a-package")
    ready = row.ready(row.load_options()())
    image = np.zeros((64, 64, 3), np.uint8)
    if said is None:
        assert ready(image)[1] == {}
        return
    with pytest.raises(ModelError) as error:
        ready(image)
    assert said in str(error.value) and "tile/x of a-package" in str(error.value)
    assert error.value.hint == "pip uninstall a-package"


def test_a_plugin_is_added_whole_or_not_at_all(monkeypatch):
    class Point:
        name, value, dist = "half", "half:ROWS", None

        def load(self):
            twice = Detector("canny", "opencv", "x:y", "x:z", "")
            return [Kind("halftone"), Detector("halftone", "one", "x:y", "x:z", ""), twice]

    monkeypatch.setattr("controlnet.preprocessors.detectors.plugins.entry_points", lambda group: [Point()])
    table = {"canny": {"opencv": None}}
    assert "canny/opencv is in the table already" in add_all(table)[0]
    assert table == {"canny": {"opencv": None}} and "halftone" not in KINDS and "halftone" not in WEIGHTS

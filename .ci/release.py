"""Is a build fit to be published? Install the wheel as a user would, in a bare environment, and use it.

    python .ci/release.py dist/controlnet_toolkit-0.2.0-py3-none-any.whl     # make release-check; 8 GB, minutes

Nothing of this repository is seen: the work is done in a temporary folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHOTO = """
import numpy as np
from PIL import Image
y, x = np.mgrid[:256, :256]
Image.fromarray(np.uint8(255 * ((x - 128) ** 2 + (y - 128) ** 2 < 70**2))).save("photo.png")
"""


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    version = wheel.name.split("-")[1]
    changes = (ROOT / "CHANGELOG.md").read_text()
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    if f"## {version} (" not in changes or cited != version:
        raise SystemExit(f"error: {version} has no entry in CHANGELOG.md, or CITATION.cff says {cited}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"

        def run(*command: str | Path) -> str:
            print("$", *(str(part) for part in command), flush=True)
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"error: exit code {done.returncode}")
            return done.stdout

        run(programs / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
        size = sum(
            file.stat().st_size for file in (folder / "venv").rglob("*") if file.is_file() and not file.is_symlink()
        )
        told = run(programs / "controlnet", "--version").strip()
        if told != f"controlnet {version}":
            raise SystemExit(f"error: it says {told!r}")
        run(programs / "python", "-c", PHOTO)
        run(programs / "controlnet", "detect", "canny", "photo.png", "--offline")
        asked = ("--prompt", "a red cube, blue wall", "--steps", "4", "--seed", "1", "--offline")
        run(programs / "controlnet", "generate", "--cond", "photo.canny.png", *asked)
        run(programs / "controlnet", "replay", "out/1-photo.png", "--offline")
        run(programs / "controlnet", "report", "out", "--offline")
        run(programs / "controlnet", "doctor")
    print(f"{wheel.name}: installed in {size / 1e9:.1f} GB, made a map, an image, the same again, and a page of it")


if __name__ == "__main__":
    main()

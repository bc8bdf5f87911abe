"""The site: the pages of this folder, those that lie elsewhere in the repository, and the code that they link to.

    python docs/build.py [out/docs]      # make docs

Links in the pages are those of the repository, so that they work wherever its files are shown. Here a link to a page
becomes one to that page of the site, and a link to a line of code one to that line.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from reference import write

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = {
    "benchmarks/LOG.md": "log.md", "benchmarks/parity.md": "parity.md", "benchmarks/ablations.md": "ablations.md",
    "model/tiny/weights/README.md": "card.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
}  # fmt: skip
"""Of the repository -> of the site."""
LINK = re.compile(r"\]\((?!https?:|#)(?P<path>[^)#\s]+)(?P<place>#[^)\s]*)?\)")


def main() -> None:
    out = (Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "docs").resolve()
    shutil.rmtree(out, ignore_errors=True)
    source = out / "source"
    shutil.copytree(HERE / "pictures", source / "pictures")
    write()
    linked: set[Path] = set()
    for page in sorted(HERE.glob("*.md")):
        (source / page.name).write_text(rewritten(page, linked))
    for path, name in PAGES.items():
        (source / name).write_text(rewritten(ROOT / path, linked))
    for path in linked:
        if path.suffix == ".png":
            shutil.copy(ROOT / path, source / "pictures")
            continue
        page = source / place_of(path)
        page.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / path).read_text()
        page.write_text(f'# {path}\n\n````{path.suffix[1:].replace("sh", "bash")} linenums="1"\n{text}````\n')
    package = out / "package" / "controlnet"  # the folders under the name that they are imported by
    package.mkdir(parents=True)
    for part in ("cli", "model", "preprocessors"):
        (package / part).symlink_to(ROOT / part)
    shutil.copy(HERE / "zensical.toml", out)
    done = subprocess.run([Path(sys.executable).parent / "zensical", "build", "--strict"], cwd=out)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(out / "site" / "index.html")


def rewritten(page: Path, linked: set[Path]) -> str:
    """A page with its links as the site has them. Files outside of the pages that it links to are added to `linked`.
    Raises SystemExit for a link to what is not there."""

    def link(match: re.Match) -> str:
        path, place = match["path"], match["place"] or ""
        target = (page.parent / path).resolve()
        if not target.exists():
            raise SystemExit(f"error: {page.relative_to(ROOT)} links to {path}, which is not there")
        inside = target.relative_to(ROOT)
        if inside.parts[0] == "docs":
            return f"]({inside.relative_to('docs').as_posix()}{place})"
        if inside.as_posix() in PAGES:
            return f"]({PAGES[inside.as_posix()]}{place})"
        if inside == Path("README.md"):
            return "](index.md)"
        if target.is_dir():
            return "](code.md)"
        linked.add(inside)
        if inside.suffix == ".png":
            return f"](pictures/{inside.name})"
        return f"]({place_of(inside).as_posix()}{place.replace('#L', '#__codelineno-0-')})"

    return LINK.sub(link, page.read_text())


def place_of(path: Path) -> Path:
    """The page of a file of code."""
    return Path("code") / path.with_name(path.name + ".md")


if __name__ == "__main__":
    main()

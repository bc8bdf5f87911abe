"""Many photos: `controlnet detect` beside a loop over controlnet_aux's detector, and its memory over 10,000 files.

    python benchmarks/batch.py [--photos FOLDER] [--parts speed,first,memory]

Equal work: the same photos at 512 pixels (without a folder: 200 cuttings of scikit-image's), files in, PNG files out,
and the same weights (those of line art and MiDaS are random). Whole processes, each on as many cores as the table says,
start included; besides, the pace without the start, from the times of few and of many photos. One round unmeasured,
then ROUNDS in turn; medians.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
AUX = """
import sys
from pathlib import Path
from PIL import Image
from controlnet_aux import CannyDetector, HEDdetector, LineartDetector, LineartStandardDetector, MidasDetector
name, folder, out = sys.argv[1:4]
LEARNED = {"softedge": HEDdetector, "informative": LineartDetector, "midas": MidasDetector}
if name in LEARNED:
    detector = LEARNED[name].from_pretrained(sys.argv[4])
else:
    detector = {"canny": CannyDetector, "lineart": LineartStandardDetector}[name]()
for path in sorted(Path(folder).iterdir()):
    sizes = {"detect_resolution": 512} | ({} if name == "lineart" else {"image_resolution": 512})
    map_ = detector(Image.open(path), **sizes, output_type="pil")
    map_.save(f"{out}/{path.stem}.png")
"""
OURS = "controlnet.cli.detect, controlnet.preprocessors.detectors.canny"
"""What `detect canny` imports."""


def cuttings(folder: Path, count: int = 200) -> Path:
    """640 x 480 parts of scikit-image's colour photos, as JPEG files."""
    import numpy as np
    import skimage.data
    from PIL import Image

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(p) for p in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(),
                                           skimage.data.rocket(), skimage.data.stereo_motorcycle()[0])]  # fmt: skip
    folder.mkdir()
    for i in range(count):
        photo = photos[i % len(photos)].resize((960, 720))
        x, y = int(rng.integers(0, 321)), int(rng.integers(0, 241))
        photo.crop((x, y, x + 640, y + 480)).save(folder / f"{i:04d}.jpg", quality=92)
    return folder


def timed(command: list[str], cores: int) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    pinned = ["taskset", "-c", ",".join(map(str, range(cores))), *command]
    start = time.perf_counter()
    subprocess.run(pinned, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def random_weights(folder: Path) -> Path:
    """Networks of controlnet-aux with random numbers in its own files: the work is the same."""
    import torch
    from controlnet.preprocessors.detectors.controlnet_aux import detector_class

    torch.manual_seed(0)
    folder.mkdir()
    for name in ("LineartDetector", "MidasDetector"):
        detector_class(name)
    Generator = sys.modules["controlnet_aux.lineart"].Generator
    for file in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), folder / file)
    network = sys.modules["controlnet_aux.midas.midas.dpt_depth"].DPTDepthModel(
        path=None, backbone="vitb_rn50_384", non_negative=True
    )
    torch.save(network.state_dict(), folder / "dpt_hybrid-midas-501f0c75.pt")
    return folder


LEARNED = {
    "softedge": ["softedge"], "informative": ["lineart", "--detector", "informative"],
    "midas": ["depth", "--detector", "midas"],
}  # fmt: skip
"""What AUX calls it -> what `controlnet detect` does."""


def speed(program: str, photos: Path, work: Path, hed: Path, kinds: list[str]) -> None:
    print("| kind, cores | program | photos | s | photos a second | without the start | times controlnet_aux |")
    print("|---|---|---|---|---|---|---|")
    everything = sorted(photos.iterdir())
    folders = {len(everything): photos}
    for count in (5, 20):
        folders[count] = work / f"first{count}"
        folders[count].mkdir()
        for path in everything[:count]:
            (folders[count] / path.name).symlink_to(path)
    weights = {"softedge": hed, "canny": hed}
    if set(kinds) - set(weights):
        weights |= dict.fromkeys(LEARNED.keys() - weights.keys(), random_weights(work / "weights"))
    for kind in kinds:
        less, more = (20, len(everything)) if kind == "canny" else (5, 20)  # networks take long
        asked = LEARNED.get(kind, [kind])
        own = ["--weights", str(weights[kind])] if kind != "canny" else []
        for cores in (1, 2) if kind in ("canny", "softedge") else (1,):
            times: dict[tuple[str, int], list[float]] = {}
            for turn in range(ROUNDS + 1):
                for count in (less, more):
                    out = work / "out"
                    shutil.rmtree(out, ignore_errors=True), out.mkdir()
                    ours = [program, "detect", *asked, *own, str(folders[count]), "-o", f"{out}/", "--overwrite", "-q"]
                    aux = [AUX, kind, str(folders[count]), str(out), str(weights[kind])]
                    for name, command in (
                        ("controlnet", ours), ("controlnet_aux", [sys.executable, "-W", "ignore", "-c", *aux])
                    ):  # fmt: skip
                        seconds = timed(command, cores)
                        if turn:
                            times.setdefault((name, count), []).append(seconds)
            found = {}
            for name in ("controlnet", "controlnet_aux"):
                short, long = (statistics.median(times[name, count]) for count in (less, more))
                found[name] = (long, more / long, (more - less) / max(long - short, 1e-9))
            for name, (s, pace, steady) in found.items():
                ratio = f"{pace / found['controlnet_aux'][1]:.1f}, {steady / found['controlnet_aux'][2]:.1f}"
                print(f"| {kind}, {cores} | {name} | {more} | {s:.2f} | {pace:.1f} | {steady:.1f} | {ratio} |",
                      flush=True)  # fmt: skip


def first(program: str, photos: Path, work: Path, hed: Path) -> None:
    """One photo, whole process."""
    print("\n| first map | s | with controlnet_aux s |\n|---|---|---|")
    photo = sorted(photos.iterdir())[0]
    one = work / "one"
    one.mkdir()
    (one / photo.name).symlink_to(photo)
    imports = [[sys.executable, "-W", "ignore", "-c", f"import {names}"]
               for names in (OURS, "controlnet_aux")]  # fmt: skip
    times = [[timed(command, 2) for command in imports] for _ in range(ROUNDS + 1)][1:]
    ours_s, aux_s = (statistics.median(t[i] for t in times) for i in (0, 1))
    print(f"| import of the canny detector | {ours_s:.2f} | {aux_s:.2f} |", flush=True)
    for kind in ("canny", "lineart", "softedge", "scribble", "pose", "depth", "normal"):
        aux = [sys.executable, "-W", "ignore", "-c", AUX, kind, str(one), str(work), str(hed)]
        ours = [program, "detect", kind, str(photo), "-o", f"{work}/first.png", "--overwrite"]
        ours += ["--allow-empty"] if kind == "pose" else []
        comparable = kind in ("canny", "lineart", "softedge")
        mine, theirs = [], []
        for turn in range(ROUNDS + 1):
            a, b = timed(ours, 2), timed(aux, 2) if comparable else 0.0
            if turn:
                mine.append(a), theirs.append(b)
        told = f"{statistics.median(theirs):.2f}" if comparable else ""
        print(f"| {kind} | {statistics.median(mine):.2f} | {told} |", flush=True)


def memory(program: str, photos: Path, work: Path, count: int) -> None:
    """Resident memory while `count` files are worked on, at every tenth of them."""
    import psutil

    many, out = work / "many", work / "maps"
    many.mkdir(), out.mkdir()
    sources = sorted(photos.iterdir())
    for i in range(count):
        (many / f"{i:06d}.jpg").symlink_to(sources[i % len(sources)])
    process = subprocess.Popen(
        [program, "detect", "canny", str(many), "-o", f"{out}/", "--json", "--size", "256"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    watched = psutil.Process(process.pid)
    print("\n| files done | resident MB |\n|---|---|")
    assert process.stdout is not None
    for done, _ in enumerate(process.stdout, 1):
        if done % (count // 10) == 0 and done < count:
            print(f"| {done:,} | {watched.memory_info().rss / 1e6:.0f} |", flush=True)
    if process.wait():
        sys.exit(f"controlnet detect failed with {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photos (default: cuttings of scikit-image's)")
    parser.add_argument("--parts", default="speed,first,memory")
    parser.add_argument("--kinds", default="canny,softedge,informative,midas", help="for the speed")
    parser.add_argument("--files", type=int, default=10_000, help="for the memory")
    args = parser.parse_args()
    from controlnet.preprocessors.weights import find

    program = shutil.which("controlnet", path=str(Path(sys.executable).parent)) or sys.exit(
        "controlnet is not installed"
    )
    parts = args.parts.split(",")
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {ROUNDS} rounds\n")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        photos = args.photos or cuttings(work / "photos")
        if "speed" in parts:
            speed(program, photos, work, find("hed"), args.kinds.split(","))
        if "first" in parts:
            first(program, photos, work, find("hed"))
        if "memory" in parts:
            memory(program, photos, work, args.files)


if __name__ == "__main__":
    main()

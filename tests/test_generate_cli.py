"""`controlnet generate` as a user types it, on a base with random weights."""

import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from controlnet.cli.main import main
from controlnet.preprocessors.errors import Exit
from controlnet.preprocessors.images import read_image
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """`controlnet generate ARGS` in a folder of its own -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: run("generate", *args)


@pytest.fixture
def common(small_base_folder, tmp_path, photo):
    """Flags that make the small base run: base, condition and net."""
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    Image.fromarray(lines).save(tmp_path / "map.canny.png")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return ["--base", small_base_folder / "base", "--cond", f"map.canny.png,net={small_base_folder}/net", "--steps", 2]


def pixels(path):
    return read_image(path.read_bytes(), str(path))[0]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts)


def test_an_image_and_what_it_says(run, common, tmp_path):
    code, out, err = run(*common, "--prompt", "a red cube", "--seed", 5)
    assert code == 0 and out == "out/5-map.png\n"
    assert "on cpu in " in err and "no safety checker" in err and "canvas 64x64" in err
    image, text = read_image((tmp_path / "out/5-map.png").read_bytes(), "x")
    assert image.shape == (64, 64, 3)
    made = json.loads(text["controlnet"])
    assert (made["seed"], made["prompt"], made["steps"], made["guidance"]) == (5, "a red cube", 2, 7.5)
    assert made["control_on"] == "both"  # the way of every base that says nothing
    condition = made["conditions"][0]
    assert condition["kind"] == "canny" and len(condition["sha256"]) == len(condition["net_sha256"]) == 64
    assert text["parameters"].startswith("a red cube\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 5, Size: 64x64")


def test_a_map_from_a_pipe(run, common, small_base_folder, tmp_path, monkeypatch):
    """Read once, though it is looked at more than once."""
    made = SimpleNamespace(buffer=io.BytesIO((tmp_path / "map.canny.png").read_bytes()))
    assert run(*common, "-p", "x", "--seed", 1, "-o", "file.png")[0] == 0
    monkeypatch.setattr(sys, "stdin", made)
    common[common.index("--cond") + 1] = f"-,kind=canny,net={small_base_folder}/net"
    code, _, err = run(*common, "-p", "x", "--seed", 1, "-o", "piped.png")
    assert code == 0, err
    assert np.array_equal(pixels(tmp_path / "piped.png"), pixels(tmp_path / "file.png"))


def test_seeds_up_to_their_bound(run, common, tmp_path):
    """A float tells whole numbers apart up to 2^53 alone."""
    for seed in (2**53 + 1, 2**63 - 2):
        code, out, err = run(*common, "-p", "x", "--seed", seed)
        assert code == 0 and out == f"out/{seed}-map.png\n", err


def test_more_steps_than_a_scheduler_makes(run, common, tmp_path):
    """One job's mistake."""
    lines = [{"prompt": "x", "steps": steps, "seed": steps} for steps in (60, 2)]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run(*common, "--jobs", "jobs.jsonl", "--scheduler", "lcm")
    assert code == Exit.PARTIAL and "--steps 60" in err and out == "out/2-map.png\n"


def test_jobs_that_are_all_bad(run, common, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"nonsense": 1}\n')
    code, out, err = run(*common, "--jobs", "jobs.jsonl", "--tar", 5, "-o", "set/")
    assert code == Exit.PARTIAL and "none is done" in err and out == ""


def test_a_window_that_the_second_pass_never_meets_is_told(run, common):
    common[common.index("--cond") + 1] += ",end=0.3"
    flags = ["-p", "x", "--steps", 10, "--seed", 1, "--hires", "2x"]
    code, _, err = run(*common[:4], *flags, "--hires-strength", 0.2, "-o", "a.png")
    assert code == 0 and "acts in none of the 2 evaluations of --hires" in err
    assert "acts in none" not in run(*common[:4], *flags, "--hires-strength", 0.8, "-o", "b.png")[2]


def test_seeds_repeat_and_count_up(run, common, tmp_path):
    run(*common, "-p", "a red cube", "--seed", 5, "--num", 3)
    assert files(tmp_path / "out") == ["5-map.png", "6-map.png", "7-map.png"]
    run(*common, "-p", "a red cube", "--seed", 6, "-o", "again.png")
    difference = pixels(tmp_path / "out/6-map.png").astype(int) - pixels(tmp_path / "again.png")
    assert np.abs(difference).max() <= 1
    assert np.abs(pixels(tmp_path / "out/6-map.png").astype(int) - pixels(tmp_path / "out/7-map.png")).max() > 1


def test_condition_prompt_scale_scheduler_and_negative_matter(run, common, tmp_path):
    base, cond = common[:2], common[3]
    variants = {
        "a": [*common], "scale": [*base, "--cond", f"{cond},scale=0"], "window": [*base, "--cond", f"{cond},end=0.5"],
        "prompt": [*common, "-p", "a person"], "negative": [*common, "--negative", "blue"],
        "sampler": [*common, "--scheduler", "euler_a"],
        "guidance": [*common, "--guidance", 3], "none": [*base, "-p", "a red cube"],
    }  # fmt: skip
    seen = {}
    for name, flags in variants.items():
        flags = flags if "-p" in flags else [*flags, "-p", "a red cube"]
        flags = flags if "--guidance" in flags else [*flags, "--guidance", 100]  # a random base hardly reads its text
        code, _, err = run(*flags, "--steps", 2, "--seed", 1, "-o", f"{name}.png")
        assert code == 0, err
        seen[name] = pixels(tmp_path / f"{name}.png").tobytes()
    assert seen.pop("none") == seen["scale"]  # scale 0 is no condition
    same = [(a, b) for a, b in itertools.combinations(seen, 2) if seen[a] == seen[b]]
    assert same == []


def test_detect_in_the_same_process_equals_two_commands(run, common, tmp_path, small_base_folder, capsys):
    with pytest.raises(SystemExit):
        main(["detect", "canny", "photo.png", "--size", "704x512"])
    capsys.readouterr()
    net = f"net={small_base_folder}/net"
    base = [*common[:2], "--steps", 2, "-p", "x", "--seed", 3]
    code, _, err = run(*base, "--cond", f"photo.canny.png,{net}", "-o", "two.png")
    assert code == 0 and "canvas 88x64" in err
    code, _, err = run(*base, "--cond", f"photo.png,detect=canny,{net}", "-o", "one.png")
    assert code == 0, err
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))
    _, text = read_image((tmp_path / "one.png").read_bytes(), "x")
    assert json.loads(text["controlnet"])["conditions"][0]["detect"]["kind"] == "canny"


def test_words_that_the_base_cannot_read_are_told(run, common):
    code, _, err = run(*common, "-p", "a red zebra " + "cube " * 60, "--seed", 1, "--plain-prompt")
    assert code == 0
    assert "never met these words in training: zebra" in err
    assert "reads 38 tokens; these words are beyond: cube cube" in err


def test_existing_and_skipped(run, common, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1-map.png").write_bytes(b"mine")
    code, _, err = run(*common, "-p", "x", "--seed", 1, "--num", 2)
    assert code == Exit.OUTPUT and "1-map.png: exists already" in err
    assert files(tmp_path / "out") == ["1-map.png"]
    code, out, _ = run(*common, "-p", "x", "--seed", 1, "--num", 2, "--skip-existing", "--json")
    assert code == 0 and [json.loads(line)["seed"] for line in out.splitlines()] == [1, 2]
    assert (tmp_path / "out/1-map.png").read_bytes() == b"mine"


def test_a_condition_of_another_aspect_is_stretched_and_said(run, common):
    _, _, err = run(*common, "-p", "x", "--size", "128x64", "--seed", 1)
    assert "stretched to the canvas 128x64" in err


@pytest.mark.parametrize("args, code, said", [
    ([], Exit.USAGE, "nothing to go by"), (["-p", "x", "--num", "0"], Exit.USAGE, "--num 0"),
    (["-p", "x", "--steps", "0"], Exit.USAGE, "--steps 0"), (["-p", "x", "--size", "500"], Exit.USAGE, "--size 504"),
    (["-p", "x", "--guidance", "nan"], Exit.USAGE, "--guidance nan"),
    (["-p", "x", "--seed", "-1"], Exit.USAGE, "--seed -1"),
    (["-p", "x", "--scheduler", "eulr"], Exit.USAGE, "--scheduler euler"),
    (["-p", "x", "--base", "none"], Exit.USAGE, "unknown base 'none'"),
    (["-p", "x", "-o", "a.bmp"], Exit.USAGE, "-o a.png"), (["-p", "x", "-n", "2", "-o", "a.png"], Exit.USAGE, "-o a/"),
    (["-p", "x", "--device", "tpu"], Exit.USAGE, "--device tpu"),
    (["-p", "x", "--dtype", "int8"], Exit.USAGE, "--dtype int8"),
    (["--cond", "photo.png"], Exit.USAGE, "says its kind"),
    (["--cond", "none.canny.png"], Exit.INPUT, "no such file"),
    (["--cond", "photo.png,detect=cany"], Exit.USAGE, "unknown kind 'cany'"),
    (["--cond", "photo.png,kind=seg"], Exit.MODEL, "no ControlNet is known for kind 'seg'"),
    (["--cond", "map.canny.png,net=nowhere"], Exit.USAGE, "no such ControlNet"),
    (["-p", "x", "--base", "someone/model", "--offline"], Exit.MODEL, "not on this machine"),
])  # fmt: skip
def test_mistakes_are_told_and_leave_nothing(run, common, tmp_path, args, code, said):
    before = files(tmp_path)
    args = args if "--base" in args else [*args, "--base", common[1]]
    found, out, err = run(*args)
    assert (found, out) == (code, ""), err
    assert "error: " in err and said in err and "Traceback" not in err
    assert files(tmp_path) == before


def copy_of(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def test_a_base_with_a_missing_file(run, common, tmp_path):
    folder = copy_of(common[1], tmp_path)
    shutil.rmtree(folder / "vae")
    code, _, err = run("-p", "x", "--base", folder)
    assert code == Exit.MODEL and "no folder vae/" in err
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(common[1] / "vae", folder / "vae")
    code, _, err = run("-p", "x", "--base", folder)
    assert code == Exit.MODEL and "unet" in err and "Traceback" not in err


def break_nan(state):
    next(iter(state.values())).view(-1)[0] = float("nan")


def break_shape(state):
    name = next(iter(state))
    state[name] = torch.zeros(3)


def break_name(state):
    state["surprise"] = state.pop(next(iter(state)))


@pytest.mark.parametrize("damage, said", [(break_nan, "NaN"), (break_shape, "shape"), (break_name, "lack 1 tensors")])
def test_damaged_weights_of_a_net(run, common, small_base_folder, tmp_path, damage, said):
    folder = copy_of(small_base_folder / "net", tmp_path)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    damage(state)
    save_file(state, path)
    code, out, err = run(*common[:2], "--cond", f"map.canny.png,net={folder}", "-p", "x")
    assert code == Exit.MODEL and said in err and out == ""


def test_damaged_weights_of_a_base(run, common, tmp_path):
    folder = copy_of(common[1], tmp_path)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    break_nan(state)
    save_file(state, path)
    code, _, err = run("-p", "x", "--base", folder)
    assert code == Exit.MODEL and "NaN" in err
    break_shape(state)
    save_file(state, path)
    code, _, err = run("-p", "x", "--base", folder)
    assert code == Exit.MODEL and "Traceback" not in err
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = run("-p", "x", "--base", folder)
    assert code == Exit.MODEL and "Traceback" not in err


class Bomb:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("part", ["net", "base"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(run, common, small_base_folder, tmp_path, part):
    exploded = tmp_path / "exploded"
    if part == "net":
        folder = copy_of(small_base_folder / "net", tmp_path)
        weights = folder / "diffusion_pytorch_model"
        flags = [*common[:2], "--cond", f"map.canny.png,net={folder}"]
    else:
        folder = copy_of(common[1], tmp_path)
        weights = folder / "unet/diffusion_pytorch_model"
        flags = ["--base", folder]
    torch.save({"conv_in.weight": Bomb(exploded)}, weights.with_suffix(".bin"))
    weights.with_suffix(".safetensors").unlink()
    code, _, err = run(*flags, "-p", "x")
    assert code == Exit.MODEL and "Traceback" not in err
    assert not exploded.exists()
    torch.load(weights.with_suffix(".bin"), weights_only=False)["conv_in.weight"].close()
    assert exploded.exists()  # the bomb is live: only the refusal kept it from running


def test_a_net_of_another_family_is_refused_before_its_weights_are_read(run, common, small_base_folder, tmp_path):
    folder = copy_of(small_base_folder / "net", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    code, _, err = run(*common[:2], "--cond", f"map.canny.png,net={folder}", "-p", "x")
    assert code == Exit.MODEL and "cross_attention_dim is 768, the base's is 16" in err


def test_interruption_leaves_nothing_half_written(common, tmp_path):
    command = [
        sys.executable,
        "-m",
        "controlnet.cli.main",
        "generate",
        *map(str, common),
        "-p",
        "x",
        "--steps",
        "999",
        "--seed",
        "1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "no safety checker" in process.stderr.readline() + process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == Exit.INTERRUPTED
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert files(tmp_path) == ["map.canny.png", "photo.png"]


def test_the_best_of_several_may_have_a_name(run, common, tmp_path):
    code, out, err = run(*common, "-p", "x", "--seed", 1, "-n", 3, "--keep-best", 1, "-o", "best.png")
    assert code == 0 and out == "best.png\n" and "scores by seed, * is kept: 1: " in err and err.count(" *") == 2
    assert files(tmp_path) == ["best.png", "map.canny.png", "photo.png"]
    code, _, err = run(*common, "-p", "x", "-n", 3, "--keep-best", 2, "-o", "two.png")
    assert code == Exit.USAGE and "-o two/" in err


def test_a_preview_and_a_prompt_from_a_file(run, common, tmp_path):
    (tmp_path / "words.txt").write_text("a red\ncube\n")
    code, out, err = run(*common, "-p", "@words.txt", "--seed", 1, "-n", 2, "--preview", "sheet.png", "--json")
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["a red cube"] * 2
    sheet = pixels(tmp_path / "sheet.png")
    assert "look at sheet.png" in err and sheet.shape[1] == 4 * 264 + 8 and sheet.std() > 10
    code, _, err = run(*common, "-p", "@none.txt")
    assert code == Exit.USAGE and "--prompt @none.txt: no such file" in err
    code, out, err = run(*common, "-p", "x", "-o", "-", "--json")
    assert (code, out) == (Exit.USAGE, "") and "--json and an image" in err


def test_a_photo_is_detected_at_the_aspect_of_the_canvas(run, common, tmp_path, small_base_folder):
    """Not at its own and squashed."""
    net = f"net={small_base_folder}/net"
    base = [*common[:2], "--steps", 2, "-p", "x", "--seed", 3]
    code, out, err = run(*base, "--cond", f"photo.png,detect=canny,{net}", "--size", 64, "--json")
    made = json.loads(out)["conditions"][0]["detect"]
    assert code == 0 and made["size"] == [512, 512] and made["resize"] == "crop", err


@pytest.mark.parametrize("args, said", [
    (["--init", "a.png"], "a.png: no such file"), (["-p", "x", "--lora=x"], "--lora x: no such file"),
    (["-p", "x", "--base", "sdxll"], "--base sdxl"), (["-p", "x", "--base", "sd15x"], "--base sd15"),
    (["--cond", "photo.png"], "detect=canny"), (["--cond", "map.canny.png,region=none.png"], "none.png: no such file"),
    (["-p", "x", "--size", "8"], "8 pixels, expected 64 to 8192"), (["-p", "x", "--size", "100"], "a multiple of 8"),
    (["--cond", "map.png,kind=cany"], "no such file"), (["--cond", "map.canny.png,kind=cany"], "kind=canny"),
])  # fmt: skip
def test_what_is_wrong_is_told_before_libraries_load(run, common, monkeypatch, args, said):
    import controlnet.model.work.studio

    monkeypatch.setattr(controlnet.model.work.studio, "Studio", lambda *a: pytest.fail("the libraries were loaded"))
    code, out, err = run(*args)
    assert code != 0 and out == "" and said in err, err


def test_a_canvas_beyond_the_memory(run, common, monkeypatch):
    monkeypatch.setattr("controlnet.model.sampling.memory.free_memory", lambda device: 2 * 10**6)
    code, _, err = run(*common, "-p", "x", "--size", "1024")
    assert code == Exit.USAGE and "size 1024x1024: needs about" in err and "--size " in err


@pytest.mark.parametrize("most, code, said", [(2, 0, "made one by one"), (0, Exit.MODEL, "out of memory at 64x64")])
def test_memory_that_runs_out(run, common, tmp_path, monkeypatch, most, code, said):
    """Too much at once is made one by one, and gives the same images up to rounding; too much alone is an error."""
    import controlnet.model.sampling.generate as module

    assert run(*common, "-p", "x", "--seed", 1, "-n", 4, "-o", "whole/", "--dtype", "float32")[0] == 0
    sample = module.sample

    def limited(unet, scheduler, start, *args, **more):
        if len(start.noise) > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
        return sample(unet, scheduler, start, *args, **more)

    monkeypatch.setattr(module, "sample", limited)
    found, _, err = run(*common, "-p", "x", "--seed", 1, "-n", 4, "-o", "parts/", "--dtype", "float32")
    assert found == code and said in err, err
    for seed in range(1, 5) if code == 0 else ():
        a, b = (pixels(tmp_path / place / f"{seed}-map.png").astype(int) for place in ("whole", "parts"))
        assert np.abs(a - b).max() <= 1

"""Jobs from files and folders, made together, and images made again."""

import csv
import io
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from controlnet.model.work.batch import read_jobs, spread
from controlnet.model.work.jobs import KEYS, Job, make_job, stem_of
from controlnet.preprocessors.errors import Exit, InputError, UsageError
from controlnet.preprocessors.images import read_image
from helpers import Counter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """`controlnet ARGS` in a folder of its own -> (exit code, stdout lines, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code, out, err = run(*args)
        return code, out.splitlines(), err

    return call


@pytest.fixture
def maps(tmp_path):
    """Three canny maps (64, 64) in maps/ and poses of the same names in poses/."""
    rng = np.random.default_rng(0)
    for folder, kind in (("maps", "canny"), ("poses", "pose")):
        (tmp_path / folder).mkdir()
        for name in "abc":
            lines = np.zeros((64, 64), np.uint8)
            lines[rng.integers(5, 60)] = lines[:, rng.integers(5, 60)] = 255
            Image.fromarray(lines).save(tmp_path / folder / f"{name}.{kind}.png")
    return tmp_path / "maps"


@pytest.fixture
def flags(small_base_folder):
    return ["generate", "--base", small_base_folder / "base", "--steps", 2, "-p", "a red cube"]


@pytest.fixture
def net(small_base_folder):
    return f"net={small_base_folder}/net"


def write_jobs(path, jobs):
    path.write_text("\n".join(job if isinstance(job, str) else json.dumps(job) for job in jobs))
    return path


def pixels(path):
    return read_image(path.read_bytes(), str(path))[0].astype(int)


job_fields = st.fixed_dictionaries(
    {"prompt": st.text("abc ,\"'é\n", min_size=1, max_size=12).filter(str.strip)},
    optional={
        "cond": st.lists(st.sampled_from(["a.png", "b,c.png,scale=0.5", "d.png,weighting=1/2"]), min_size=1),
        "num": st.integers(1, 9), "seed": st.integers(0, 2**40), "steps": st.integers(1, 99),
        "guidance": st.floats(1, 20).map(lambda v: round(v, 2)), "size": st.sampled_from(["64", "128x64"]),
        "mode": st.sampled_from(["guess", "prompt"]), "weighting": st.sampled_from(["soft", "1/0/.5"]),
    },
)  # fmt: skip


@given(job_fields)
def test_a_job_is_the_same_in_json_and_in_csv(given_fields):
    line = json.dumps(given_fields).encode()
    table = io.StringIO()
    cells = {k: " | ".join(v) if isinstance(v, list) else v for k, v in given_fields.items()}
    writer = csv.DictWriter(table, list(cells))
    writer.writeheader(), writer.writerow(cells)
    ((_, one),) = read_jobs("jobs.jsonl", line)
    ((_, two),) = read_jobs("jobs.csv", table.getvalue().encode())
    assert make_job(one, {}) == make_job(two, {}) == make_job(given_fields, {})


def test_what_a_job_does_not_say_is_the_flags(tmp_path):
    job = make_job({"prompt": "x", "control-on": "cond"}, {"steps": 7, "prompt": "y", "weighting": None})
    assert (job.steps, job.prompt, job.control_on, job.acts_on) == (7, "x", "cond", "cond")
    assert make_job({"prompt": ""}, {"prompt": "y", "cond": ["a.png"]}).prompt == ""
    ways = [make_job({"prompt": "x", "mode": mode}, {}).acts_on for mode in (None, "balanced", "guess")]
    assert ways == [None, "both", "cond"]  # None: the base's own
    (flag,) = make_job({"cond": "a.png"}, {"mode": "control"}).cond
    assert make_job({"cond": "a.png"}, {"mode": "control"}).weighting_of(flag) == "resolution"
    assert make_job({"cond": "a.png"}, {"mode": "control", "weighting": "soft"}).weighting_of(flag) == "soft"


@pytest.mark.parametrize("given_fields, said", [
    ({"promt": "x"}, "unknown key 'promt'"), ({"prompt": "x", "steps": "many"}, "steps: 'many'"),
    ({"prompt": "x", "steps": 2.5}, "whole number"), ({"prompt": "x", "num": True}, "whole number"),
    ({"prompt": 3}, "expected text"), ({"cond": {"a": 1}}, "list of texts"), ({}, "nothing to go by"),
    ({"prompt": "x", "mode": "gues"}, "expected one of balanced"), ({"prompt": "x", "size": "65"}, "multiple of 8"),
    ({"prompt": "x", "weighting": "sof"}, "expected uniform"), ({"cond": "a,weighting=1/x"}, "'x'"),
    ({"cond": "a,scale=1@.5/1@.2"}, "rising"), ({"cond": "a,scale=nan@0"}, "finite"),
    ({"cond": "a,scale=1@2"}, "rising"), ({"cond": "a,scale=-inf"}, "finite"),
])  # fmt: skip
def test_mistakes_in_a_job(given_fields, said):
    with pytest.raises(UsageError, match=said):
        make_job(given_fields, {})


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_jobs(data):
    with pytest.raises(InputError):
        list(read_jobs("jobs.jsonl", data))


def test_folders_are_paired_by_name(tmp_path, maps):
    one = make_job({"cond": [f"{maps},scale=0.5", f"{tmp_path}/poses"]}, {})
    assert [[stem_of(flag.path) for flag in job.cond] for job in spread(one)] == [["a", "a"], ["b", "b"], ["c", "c"]]
    assert {job.cond[0].scale for job in spread(one)} == {0.5}
    (tmp_path / "poses/b.pose.png").unlink()
    with pytest.raises(InputError, match="b is in one and not in the other"):
        spread(one)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no pictures"):
        spread(make_job({"cond": str(tmp_path / "none")}, {}))


def test_alike_jobs_are_made_together_and_as_if_alone(run, maps, flags, net, tmp_path, monkeypatch):
    """One load of each model; images of jobs that share a batch are those of the jobs alone, within a level."""
    from controlnet.model.work import models

    loads, counters = [], []
    for name in ("load_base", "load_net"):
        load = getattr(models, name)
        monkeypatch.setattr(models, name, lambda *a, load=load, name=name: loads.append(name) or watched(load(*a)))

    def watched(model):
        if hasattr(model, "unet"):
            counters.append(Counter(model.unet.conv_out))
        return model

    jobs = [
        {"cond": f"maps/a.canny.png,{net}", "seed": 1},
        {"cond": f"maps/b.canny.png,{net}", "seed": 2, "prompt": "blue"},
        {"cond": f"maps/c.canny.png,{net}", "seed": 3, "negative": "a floor"},
        {"cond": f"maps/a.canny.png,{net},scale=0.5", "seed": 4}, {"seed": 5},
    ]  # fmt: skip
    code, out, err = run(*flags, "--jobs", write_jobs(tmp_path / "jobs.jsonl", jobs), "--json")
    assert code == 0, err
    assert [json.loads(line)["seed"] for line in out] == [1, 2, 3, 4, 5]
    assert [json.loads(line)["batch"] for line in out] == [3, 3, 3, 1, 1]
    assert loads == ["load_base", "load_net"]
    assert counters[0].batches == [6, 6, 2, 2, 2, 2]
    for job, line in zip(jobs, out, strict=True):
        alone = [f"--{key}={value}" for key, value in job.items()]
        assert run(*flags, *alone, "-o", f"alone-{job['seed']}.png")[0] == 0
        off = pixels(tmp_path / json.loads(line)["output"]) - pixels(tmp_path / f"alone-{job['seed']}.png")
        assert np.abs(off).max() <= 1
    assert np.abs(pixels(tmp_path / "out/1-a.png") - pixels(tmp_path / "out/4-a.png")).max() > 1


def test_a_bad_line_is_told_and_the_rest_goes_on(run, maps, flags, net, tmp_path):
    good = {"cond": f"maps/a.canny.png,{net}", "seed": 1}
    jobs = [
        good, {**good, "sead": 2}, "not json", {**good, "cond": f"maps/x.canny.png,{net}", "seed": 3, "num": 2}, good,
        {**good, "cond": f"maps/b.canny.png,{net},weighting=1/2"}, "[1]", {**good, "seed": 9},
    ]  # fmt: skip
    code, out, err = run(*flags, "--jobs", write_jobs(tmp_path / "jobs.jsonl", jobs))
    assert code == Exit.PARTIAL and out == ["out/1-a.png", "out/9-a.png"]
    for said in (
        "line 2: unknown key 'sead'", "hint: seed", "line 3: not json: not valid JSON",
        "line 4: maps/x.canny.png: no such file",
        "line 5: out/1-a.png: ", "line 1 is written there too", "line 6: --cond", "line 7: [1]", "6 jobs failed",
    ):  # fmt: skip
        assert said in err, (said, err)
    assert err.count("maps/x.canny.png") == 1  # once, not for each of its images


def test_a_folder_is_a_batch_and_what_exists_is_skipped(run, maps, flags, net, tmp_path):
    code, out, err = run(*flags, "--cond", f"maps,{net}", "--seed", 7, "-o", "set")
    assert code == 0 and out == ["set/7-a.png", "set/7-b.png", "set/7-c.png"], err
    (tmp_path / "set/7-b.png").unlink()
    before = (tmp_path / "set/7-a.png").stat().st_mtime_ns
    code, out, _ = run(*flags, "--cond", f"maps,{net}", "--seed", 7, "-o", "set/", "--skip-existing", "--json")
    assert [json.loads(line).get("skipped", False) for line in out] == [True, True, False]
    assert (tmp_path / "set/7-a.png").stat().st_mtime_ns == before
    code, _, err = run(*flags, "--cond", f"maps,{net}", "-o", "set/", "--skip-existing")
    assert code == Exit.PARTIAL and "without a seed" in err


@pytest.mark.parametrize("name, text, code, said", [
    ("jobs.jsonl", "", Exit.INPUT, "no jobs in it"), ("jobs.csv", "prompt,seed\nx,1,2\n", Exit.PARTIAL, "more values"),
    ("jobs.csv", "prompt,seed\nx\n", Exit.PARTIAL, "fewer values"),
    ("none.jsonl", None, Exit.INPUT, "no such file"),
])  # fmt: skip
def test_files_that_are_no_jobs(run, flags, tmp_path, name, text, code, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    found, out, err = run(*flags, "--jobs", name)
    assert (found, out) == (code, []) and said in err


def test_killed_in_the_middle_only_the_images_in_work_are_lost(maps, flags, net, tmp_path):
    jobs = [{"cond": f"maps/a.canny.png,{net}", "seed": i, "steps": 20 + i} for i in range(40)]
    write_jobs(tmp_path / "jobs.jsonl", jobs)
    command = [
        sys.executable,
        "-m",
        "controlnet.cli.main",
        *map(str, flags),
        "--jobs",
        "jobs.jsonl",
        "-o",
        "set/",
        "-q",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told = [process.stdout.readline().strip() for _ in range(2)]
    process.kill()
    told += process.communicate()[0].split()
    there = sorted(p.name for p in (tmp_path / "set").glob("[0-9]*.png"))
    assert 2 <= len(there) < 40 and len(there) - len(told) in (0, 1)
    assert all(pixels(tmp_path / "set" / name).shape == (64, 64, 3) for name in there)


def test_an_image_is_made_again(run, maps, flags, net, tmp_path):
    cond = f"maps/a.canny.png,{net},scale=1@0/.5@.5,weighting=soft"
    more = ["--mode", "control", "--scheduler", "euler_a", "--negative", "blue", "--seed", 3]
    assert run(*flags, "--cond", cond, *more, "-o", "a.png")[0] == 0
    code, out, err = run("replay", "a.png", "-o", "again.png")
    assert (code, out) == (0, ["identical"]) and "not as recorded" not in err
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "again.png")).all()
    shutil.copy(tmp_path / "maps/b.canny.png", tmp_path / "maps/a.canny.png")
    code, out, err = run("replay", "a.png")
    assert code == Exit.DIFFERENT and out[0].startswith("differs: by up to ")
    assert "maps/a.canny.png: sha256" in err and "map_sha256" in err
    code, out, _ = run("replay", "a.png", "--cond", "maps/c.canny.png", "--json")
    told = json.loads(out[0])
    assert code == Exit.DIFFERENT and not told["identical"] and told["largest"] > 1 and len(told["differs"]) == 2


def test_a_record_holds_no_place_of_this_machines_package(run, tmp_path, maps):
    code, out, err = run(
        "generate", "--cond", "maps/a.canny.png", "-p", "a red cube", "--steps", 1, "--seed", 1, "--json"
    )
    assert code == 0, err
    entry = json.loads(out[0])["conditions"][0]
    assert entry["net"] == "tiny-canny"
    assert run("replay", json.loads(out[0])["output"])[:2] == (0, ["identical"])


@pytest.mark.parametrize("name, args, code, said", [
    ("photo.png", [], Exit.INPUT, "no record"), ("a.png", ["--cond", "x", "--cond", "y"], Exit.USAGE, "given 2 times"),
    ("a.png", ["--cond", "x.png"], Exit.INPUT, "x.png: no such file"), ("none.png", [], Exit.INPUT, "no such file"),
    ("a.png", ["-o", "photo.png"], Exit.OUTPUT, "exists already"), ("resized.png", [], Exit.INPUT, "32x32 pixels"),
    ("cut.png", [], Exit.INPUT, "not whole"),
])  # fmt: skip
def test_what_cannot_be_made_again(run, maps, flags, net, tmp_path, photo, name, args, code, said):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    run(*flags, "--cond", f"maps/a.canny.png,{net}", "--seed", 1, "-o", "a.png")
    with Image.open(tmp_path / "a.png") as made:
        from PIL.PngImagePlugin import PngInfo

        info, cut = PngInfo(), PngInfo()
        info.add_text("controlnet", made.text["controlnet"])
        record = json.loads(made.text["controlnet"])
        del record["size"]
        cut.add_text("controlnet", json.dumps(record))
        made.resize((32, 32)).save(tmp_path / "resized.png", pnginfo=info)
        made.save(tmp_path / "cut.png", pnginfo=cut)
    found, out, err = run("replay", name, *args)
    assert (found, out) == (code, []) and said in err, err


def test_a_record_gives_back_its_job():
    """Every recorded field, through JSON and back; what is not recorded is what other entries of the record say."""
    from controlnet.model.work.jobs import OPTIONS

    values = {"prompt": "a, b", "negative": "c", "steps": 7, "guidance": 2.5, "scheduler": "euler", "base": "sd15",
              "size": (768, 512), "seed": 3, "control_on": "cond", "prompt2": "d", "negative2": "e",
              "clip_skip": 1, "vae": "v.safetensors", "original_size": (800, 600), "crop": (3, 5),
              "target_size": (64, 72), "init": "photo.jpg", "strength": 0.3, "mask": "m.png",
              "invert_mask": True, "feather": 3, "region_only": True, "tiles": True,
              "hires": 1.5, "hires_strength": 0.4,
              "lora": ("a.safetensors:0.5", "b"), "embedding": ("w.pt:word",), "plain_prompt": True}  # fmt: skip
    recorded = {name for name, option in OPTIONS.items() if option.recorded}
    assert recorded == set(values) and set(OPTIONS) - recorded == {
        "cond", "out", "num", "mode", "weighting", "same_seed",
    }  # fmt: skip
    job = Job("map.canny.png", **values)
    again = Job("map.canny.png", **json.loads(json.dumps(job.record())))
    assert again == job and again.shared() == job.shared()
    for name in recorded - {"prompt", "negative", "prompt2", "negative2", "seed", "init", "mask"}:
        others = {k: v for k, v in values.items() if k not in (name, name + "_strength")}
        assert Job("map.canny.png", **others).shared() != job.shared(), name


def test_keys_are_flags():
    """Every key of a job is a flag of `generate` of the same name."""
    import inspect

    from controlnet.cli.generate import generate

    assert set(KEYS) <= set(inspect.signature(generate).parameters)
    assert Job(prompt="x").stem == "image"


def test_the_scripts_of_the_examples(maps, small_base_folder, data, tmp_path):
    """As a user runs them, on the embedded model; a second run makes nothing again."""
    import os
    from pathlib import Path

    examples = Path(__file__).parent.parent / "examples"
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(data / name, photos)
    command = tmp_path / "bin" / "controlnet"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m controlnet.cli.main "$@"\n')
    command.chmod(0o755)
    env = os.environ | {"STEPS": "2", "PATH": f"{command.parent}:{os.environ['PATH']}"}

    def script(name, *args):
        done = subprocess.run([examples / name, *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    assert len(script("batch.sh", "photos", "set").stdout.split()) == 2 + 6
    assert sorted(p.name for p in (tmp_path / "set/images").iterdir()) == [
        f"{s}-{i}.png" for s in (1, 2, 3) for i in (0, 1)
    ]
    first = (tmp_path / "set/images/1-0.png").stat().st_mtime_ns
    script("batch.sh", "photos", "set")
    assert (tmp_path / "set/images/1-0.png").stat().st_mtime_ns == first
    script("sweep.sh", "maps/a.canny.png", "a red cube", "sweep")
    made = {p.name: pixels(p) for p in (tmp_path / "sweep").glob("*.png")}
    assert len(made) == 10 and np.abs(made["scale-0.png"] - made["scale-2.png"]).max() > 1


@pytest.mark.parametrize("size", [64, 96])
def test_each_image_of_a_batch_is_made_again_as_it_was(run, maps, flags, net, tmp_path, size):
    """Away from the native size as well: as many images are sampled together, and it has its place among them."""
    assert run(*flags, "--cond", f"maps/a.canny.png,{net}", "--size", size, "-n", 3, "--seed", 7)[0] == 0
    for seed in (7, 8, 9):
        code, out, err = run("replay", f"out/{seed}-a.png")
        assert (code, out) == (0, ["identical"]) and "not as recorded" not in err, err


def test_an_image_made_otherwise(run, maps, flags, net, tmp_path):
    assert run(*flags, "--cond", f"maps/a.canny.png,{net}", "--seed", 3, "-o", "a.png")[0] == 0
    code, out, err = run("replay", "a.png", "--size", 128, "--steps", 3, "--seed", 4)
    assert (code, out) == (Exit.USAGE, []) and "-o again.png" in err
    code, out, _ = run("replay", "a.png", "--size", 128, "--steps", 3, "--seed", 4, "-o", "b.png", "--json")
    made = json.loads(out[0])
    assert code == 0 and (made["size"], made["steps"], made["seed"]) == ([128, 128], 3, 4)
    assert pixels(tmp_path / "b.png").shape == (128, 128, 3)


def test_places_in_a_file_of_jobs_are_below_the_folder_of_o(run, maps, flags, net, tmp_path):
    jobs = [
        {"cond": f"maps/a.canny.png,{net}", "seed": 1, "out": "x.png"}, {"cond": f"maps/b.canny.png,{net}", "seed": 2},
        {"cond": f"maps/c.canny.png,{net}", "seed": 3, "out": str(tmp_path / "own.png")},
    ]  # fmt: skip
    code, out, _ = run(*flags, "--jobs", write_jobs(tmp_path / "jobs.jsonl", jobs), "-o", "set/")
    assert code == 0 and out == ["set/x.png", "set/2-b.png", str(tmp_path / "own.png")]


def test_a_line_that_is_no_text_spoils_itself_alone(run, maps, flags, net, tmp_path):
    good = json.dumps({"cond": f"maps/a.canny.png,{net}", "seed": 1})
    lines = [good.encode(), b'{"prompt": "caf\xe9"}', b'{"prompt": "a\0b"}', b"[" * 100_000,
             json.dumps({"prompt": "\ud800"}).encode()]  # fmt: skip
    (tmp_path / "jobs.jsonl").write_bytes(b"\n".join(lines))
    code, out, err = run(*flags, "--jobs", "jobs.jsonl")
    assert code == Exit.PARTIAL and out == ["out/1-a.png"]
    for said in ("line 2: not UTF-8", "line 3: holds a NUL byte", "line 4: ", "nested too deeply", "line 5: --prompt",
                 "4 jobs failed; the others are done"):  # fmt: skip
        assert said in err, err
    (tmp_path / "jobs.csv").write_bytes(b"prompt,seed\na\0b,1\ncaf\xe9,2\n")
    code, out, err = run(*flags, "--jobs", "jobs.csv")
    assert (code, out) == (Exit.PARTIAL, []) and "line 2: holds a NUL byte" in err and "line 3: not UTF-8" in err
    assert "2 jobs failed; none is done" in err
    (tmp_path / "jobs.jsonl").write_text(good, encoding="utf-16")
    code, _, err = run(*flags, "--jobs", "jobs.jsonl")
    assert code == Exit.INPUT and "-f utf-16" in err

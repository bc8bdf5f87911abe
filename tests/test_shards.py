"""Parts of many jobs that need not talk to each other: together they are what one command makes, byte for byte."""

import gc
import json
import os
import sys
import tarfile
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from controlnet.model.work import cluster, pool
from controlnet.model.work.batch import Wanted, in_units, targets
from controlnet.model.work.jobs import Job
from controlnet.model.work.studio import fail
from controlnet.preprocessors.errors import Exit, ModelError, OutputError, UsageError
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.shards import MANIFEST, WHOLE, Shard, claim, parse_shard
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 50), st.text())
def test_every_content_is_in_one_shard(count, content):
    holders = [i for i in range(1, count + 1) if Shard(i, count).holds(content)]
    assert len(holders) == 1 and parse_shard(f"{holders[0]}/{count}") == Shard(holders[0], count)


def test_shards_are_about_equal():
    sizes = [sum(Shard(i, 4).holds(f"photo {n}") for n in range(4000)) for i in range(1, 5)]
    assert sum(sizes) == 4000 and min(sizes) > 900


@pytest.mark.parametrize("environment, expected", [
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3",
      "SLURM_ARRAY_TASK_STEP": "2"}, Shard(3, 4)),
    ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, Shard(1, 2)),
    ({"RANK": "5", "WORLD_SIZE": "8"}, Shard(6, 8)),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Shard(2, 2)),
])  # fmt: skip
def test_launchers(environment, expected):
    assert parse_shard("auto", environment) == expected


@pytest.mark.parametrize("text, environment", [
    ("3/2", {}), ("0/2", {}), ("1", {}), ("a/b", {}), ("1/0", {}), ("-1/2", {}), ("", {}), ("auto", {}),
    ("auto", {"RANK": "2", "WORLD_SIZE": "2"}), ("auto", {"RANK": "x", "WORLD_SIZE": "2"}),
    ("auto", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_STEP": "0"}),
])  # fmt: skip
def test_shards_that_cannot_be(text, environment):
    with pytest.raises(UsageError):
        parse_shard(text, environment)
    assert parse_shard(None) == WHOLE


def test_a_folder_belongs_to_shards_of_one_command(tmp_path):
    claim(tmp_path, Shard(1, 3), ["a"])
    claim(tmp_path, Shard(2, 3), ["a"])
    claim(tmp_path, WHOLE, ["b"])
    with pytest.raises(OutputError, match="other settings or jobs"):
        claim(tmp_path, Shard(2, 3), ["b"])
    with pytest.raises(OutputError, match="holds results of 3 shards"):
        claim(tmp_path, Shard(2, 4), ["a"])
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


@pytest.fixture
def jobs(small_base_folder, tmp_path, monkeypatch):
    """Eleven images in seven jobs: alike neighbours, other steps, several seeds; and a bad line."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(7):
        edges = (rng.random((64, 64)) < 0.1).astype(np.uint8) * 255
        (tmp_path / f"{i}.canny.png").write_bytes(png_bytes(edges))
        job = {"cond": f"{i}.canny.png,net={small_base_folder / 'net'}", "prompt": f"a cube {i}", "seed": 10 * i}
        lines.append(job | ({"num": 3} if i in (1, 4) else {}) | ({"steps": 3} if i == 5 else {}))
    lines.append({"nonsense": 1})
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--jobs", "jobs.jsonl", "--steps", 2, "--dtype", "float32", "-q", "-o"]
    return ["generate", "--base", small_base_folder / "base", *flags]


def images(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_shards_together_are_the_whole_byte_for_byte(run, jobs, tmp_path):
    told = 0
    for part in ("1/3", "2/3", "3/3"):
        code, out, err = run(*jobs, "parts/", "--shard", part)
        told += "unknown key 'nonsense'" in err
        assert code in (Exit.OK, Exit.PARTIAL) and len(out.splitlines()) < 11
    assert told == 1
    run(*jobs, "whole/", "--shard", "1/1")
    assert images(tmp_path / "parts") == images(tmp_path / "whole") and len(images(tmp_path / "whole")) == 11


def test_a_seed_that_is_not_given_follows_from_the_job():
    job = Job("a.canny.png", "x")
    assert job.seeded(fixed=True).seed == job.seeded(fixed=True).seed != Job("b.canny.png", "x").seeded(fixed=True).seed
    assert job.seeded().seed != job.seeded().seed and Job("a.canny.png", "x", seed=3).seeded(fixed=True).seed == 3


def test_shards_may_have_folders_of_their_own(run, tmp_path, small_base_folder, monkeypatch):
    """Neither the choice of the shard nor a seed depends on where the results go."""
    monkeypatch.chdir(tmp_path)
    jobs = [{"prompt": f"a cube {i}", "out": f"f{i}.png", "steps": 1 + i % 2} for i in range(9)]
    jobs.append({"prompt": "many", "num": 20})
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    command = ["generate", "--jobs", "jobs.jsonl", "--base", small_base_folder / "base", "--dtype", "float32", "-q"]
    command += ["--size", 64]
    made = [dict(), dict()]
    for together, names in zip(made, (("only/",) * 3, ("./n1", f"{tmp_path}/n2/", "n3/")), strict=True):
        for number, name in enumerate(names, 1):
            code, _, _ = run(*command, "-o", name, "--shard", f"{number}/3")
            assert code == Exit.OK
        for name in dict.fromkeys(names):
            found = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}
            assert not found.keys() & together.keys()
            together |= found
    assert made[0].keys() == made[1].keys() and len(made[0]) == 29
    assert all(made[0][name] == made[1][name] for name in made[0])
    # Which shard has what follows from the base's path as well, which is another one each time.
    assert sum(any((tmp_path / name).glob("*.png")) for name in ("n1", "n2", "n3")) > 1
    run(*command, "-o", "whole/", "--shard", "1/1")
    assert images(tmp_path / "whole") == made[0]  # one shard has the same seeds
    (tmp_path / "one.jsonl").write_text(json.dumps(jobs[0]) + "\n")
    command[2] = "one.jsonl"
    told = [run(*command, "-o", f"e{i}/", "--shard", f"{i}/2")[2] for i in (1, 2)]
    assert sum("nothing to make here" in text for text in told) == 1


def test_a_shard_goes_on_where_it_was_killed(run, jobs, tmp_path):
    for part in ("1/2", "2/2"):
        run(*jobs, "set/", "--shard", part)
    before = images(tmp_path / "set")
    for name in ("11-1.png", "40-4.png", "42-4.png"):
        (tmp_path / "set" / name).unlink()
    for part in ("1/2", "2/2"):
        code, out, _ = run(*jobs, "set/", "--shard", part, "--skip-existing", "--json")
        assert all(json.loads(line).get("skipped") or "prompt" in json.loads(line) for line in out.splitlines())
    assert images(tmp_path / "set") == before
    codes = [run(*jobs, "set/", "--shard", part)[0] for part in ("1/2", "2/2")]
    assert Exit.PARTIAL in codes and {*codes} <= {Exit.OK, Exit.PARTIAL} and images(tmp_path / "set") == before
    code, _, err = run(*jobs, "set/", "--shard", "1/2", "--steps", "4", "--skip-existing")
    assert code == Exit.OUTPUT and "other settings or jobs" in err


@pytest.fixture
def photos(tmp_path, monkeypatch, photo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(9):
        (tmp_path / f"photos/{i}.png").write_bytes(png_bytes(np.roll(photo, 7 * i, 1)))
        (tmp_path / f"photos/{i}.txt").write_text(f"a disc {i}")
    (tmp_path / "photos/8.png").write_bytes(b"not a picture")
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}  # fmt: skip


def test_maps_of_shards(run, photos):
    lines = []
    for part in ("1/2", "2/2", "1/1"):
        out = "whole/" if part == "1/1" else "parts/"
        _code, said, _ = run("detect", "canny", "photos/", "-o", out, "--shard", part, "--size", 64)
        lines += said.splitlines() if part != "1/1" else []
    assert contents(photos / "parts") == contents(photos / "whole") and len(lines) == len(set(lines)) == 8
    assert run("detect", "canny", "photos/", "-o", "parts/", "--shard", "1/2", "--size", 128)[0] == Exit.OUTPUT


def test_a_data_set_of_shards(run, photos):
    """The last one to finish writes metadata and manifest; a photo that fails is in both."""
    args = ["dataset", "build", "photos/", "--size", 64, "-j", 1, "-o"]
    run(*args, "whole")
    for part in ("2/3", "1/3"):
        _, _, err = run(*args, "parts", "--shard", part)
        assert "the shard that finishes last" in err and not (photos / "parts/manifest.json").exists()
    _, _, err = run(*args, "parts", "--shard", "3/3")
    assert "8 pairs, 2 of them held out" in err
    assert contents(photos / "parts") == contents(photos / "whole")
    assert json.loads((photos / "parts/manifest.json").read_text())["failed"]


def test_scores_of_shards(run, photos):
    run("detect", "canny", "photos/", "-o", "maps/", "--size", 64)
    rows = [{"image": f"photos/{i}.png", "cond": f"maps/{i}.canny.png"} for i in range(8)]
    (photos / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = []
    for part in ("1/2", "2/2"):
        _, out, _ = run("score", "--jobs", "scores.jsonl", "--json", "--shard", part)
        parts += [line for line in out.splitlines() if "image" in line]
    _, out, _ = run("score", "--jobs", "scores.jsonl", "--json")
    assert sorted(parts) == sorted(line for line in out.splitlines() if "image" in line) and len(parts) == 8


def test_several_processes_make_the_same_in_order(run, jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, here, _ = run(*jobs, "here/", "--shard", "1/1", "--json")
    code, there, said = run(*jobs, "there/", "--shard", "1/1", "--json", "--processes", 2)
    assert code == Exit.PARTIAL and said.count("canvas 64x64") == 1 and "unknown key 'nonsense'" in said
    assert images(tmp_path / "there") == images(tmp_path / "here")
    seeds = [[json.loads(line)["seed"] for line in text.splitlines()] for text in (here, there)]
    assert seeds[0] == seeds[1] and len(seeds[0]) == 11


def test_the_best_of_several_processes(run, jobs, tmp_path, monkeypatch, small_base_folder):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*jobs[:3], "--cond", f"0.canny.png,net={small_base_folder / 'net'}", "--steps", 2, "-n", 3, "--seed", 1,
             "-p", "a cube", "--dtype", "float32", "--keep-best", 1, "--preview"]  # fmt: skip
    for name, more in (("a", []), ("b", ["--devices", "cpu,cpu"])):
        code, _, err = run(*flags, f"{name}-sheet.png", "-o", f"{name}/", *more)
        assert code == 0, err
    assert images(tmp_path / "a") == images(tmp_path / "b") and len(images(tmp_path / "a")) == 1
    assert (tmp_path / "a-sheet.png").read_bytes() == (tmp_path / "b-sheet.png").read_bytes()


def test_a_process_that_is_killed_loses_nothing(jobs, tmp_path, monkeypatch, small_base_folder):
    """kill -9 in the middle: every image is made. A unit whose process always dies is reported; the rest is made."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    net = small_base_folder / "net"
    asked = [Job(f"{i % 7}.canny.png,net={net}", "x", seed=i, steps=2, base=str(small_base_folder / "base"), out="set/")
             for i in range(12)]  # fmt: skip
    units = in_units(targets([(f"line {i}", job) for i, job in enumerate(asked)], False, False, fail))
    failed, made, tasks = [], [], [pool.Task([one]) for unit in units for one in unit]  # more than wait at once
    for one in pool.make(
        tasks, pool.Setup(dtype="float32"), ["cpu", "cpu"], None, lambda *failure: failed.append(failure), print
    ):
        if not made:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
        made.append(one)
    assert not failed and [one.wanted.seed for one in made] == list(range(12)) and len(images(tmp_path / "set")) == 12

    died = [Wanted(f"line {i}", job, i, tmp_path / f"again/{i}.png", unit=i) for i, job in enumerate(asked)]
    died[5] = replace(died[5], path=Dies())
    lonely = [pool.Task([one]) for one in died[3:8]]
    setup = pool.Setup(dtype="float32")
    made = list(pool.make(lonely, setup, ["cpu"], None, lambda *failure: failed.append(failure), print))
    assert [one.wanted.seed for one in made] == [3, 4, 6, 7] and len(failed) == 1
    assert failed[0][0] == "line 5" and "killed twice" in str(failed[0][1])


def test_a_worker_says_what_one_process_says(jobs, tmp_path, small_base_folder):
    """And each thing with the first task alone."""
    net = small_base_folder / "net"
    job = Job(f"0.canny.png,net={net}", "a zebra", steps=1, base=str(small_base_folder / "base"), out="set/")
    tasks = [pool.Task([Wanted("", replace(job, seed=i), i, tmp_path / f"{i}.png")]) for i in range(2)]
    setup, said = pool.Setup(device="cpu", dtype="float32"), []
    work = pool.make_worker(setup, None)
    list(pool.make_here(tasks, setup, fail, said.append))
    first, second = work(tasks[0]).said, work(tasks[1]).said
    assert first[0].startswith("base ") and any("zebra" in line for line in first)
    assert first + second == said


class Dies:
    """What kills the process that receives it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.parametrize("flags", [
    ["--processes", "0"], ["--devices", ","], ["--devices", "0,1", "--processes", "3"],
    ["--ray", "local", "--processes", "2"],
])  # fmt: skip
def test_processes_that_cannot_be(run, jobs, flags):
    assert run(*jobs, "x/", *flags)[0] == Exit.USAGE


def test_a_device_that_is_not_there_is_named(run, jobs):
    """And not taken for a process that was killed."""
    code, _, err = run(*jobs, "x/", "--devices", "nonsense")
    assert code == Exit.PARTIAL and "--device nonsense: expected one of" in err and "killed" not in err


def test_shards_of_other_tar_files_are_not_mixed(run, jobs):
    assert run(*jobs, "x/", "--shard", "1/2", "--tar", 5)[0] in (Exit.OK, Exit.PARTIAL)
    assert run(*jobs, "x", "--shard", "2/2", "--tar", 5)[0] in (Exit.OK, Exit.PARTIAL)  # the same folder
    assert run(*jobs, "x/", "--shard", "2/2", "--tar", 6)[0] == Exit.OUTPUT


def members(folder):
    """Of all tar files in a folder: name of the file and of the member -> bytes."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {(path.name, member.name): tar.extractfile(member).read() for member in tar}
    return found


def test_results_in_tar_files(run, jobs, tmp_path):
    """The same pictures and records as in files, with their maps; whole or not there; the same in shards."""
    code, out, _ = run(*jobs, "tars/", "--shard", "1/1", "--tar", 5, "--json")
    assert code == Exit.PARTIAL
    inside = members(tmp_path / "tars")
    assert sorted({tar for tar, _ in inside}) == ["000000.tar", "000001.tar", "000002.tar"]
    run(*jobs, "files/", "--shard", "1/1")
    pictures = {name.split("-", 1)[1]: data for (_, name), data in inside.items() if name.count(".") == 1}
    for name, data in images(tmp_path / "files").items():
        assert pictures[name] == data and json.loads(pictures[name.replace("png", "json")])["steps"]
    assert sum(name.endswith(".0.canny.png") for _, name in inside) == len(out.splitlines()) == 11
    assert json.loads(out.splitlines()[0])["output"] == "tars/000000.tar#00000000-0-0"
    for part in ("1/2", "2/2"):
        run(*jobs, "parts/", "--shard", part, "--tar", 5)
    assert members(tmp_path / "parts") == inside
    (tmp_path / "parts/000001.tar").unlink()
    for part in ("1/2", "2/2"):
        run(*jobs, "parts/", "--shard", part, "--tar", 5, "--skip-existing")
    assert members(tmp_path / "parts") == inside
    assert run(*jobs, "x.png", "--tar", 5)[0] == run(*jobs, "x/", "--tar", 0)[0] == Exit.USAGE


def test_tar_files_are_read_by_webdataset(run, jobs, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    run(*jobs, "tars/", "--tar", 5, "--processes", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        dataset = webdataset.WebDataset(str(tmp_path / "tars/{000000..000002}.tar"), shardshuffle=False)
        samples = list(dataset.decode("rgb"))
        gc.collect()
    assert len(samples) == 11 and all(sample["png"].shape == (64, 64, 3) for sample in samples)
    assert samples[0]["json"]["prompt"] == "a cube 0" and samples[0]["0.canny.png"].shape == (64, 64, 3)


def test_clusters_that_cannot_be_reached(run, jobs, monkeypatch):
    code, _, err = run(*jobs, "x/", "--ray", "127.0.0.1:1")
    assert code == Exit.MODEL and err.count("--ray 127.0.0.1:1") == 1, err
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(*jobs, "x/", "--ray", "local")
    assert code == Exit.USAGE and "pip install 'controlnet-toolkit[ray]'" in err


def test_a_cluster_that_asks_for_a_token_gets_it(monkeypatch, tmp_path):
    """`ray start` asks for it where there is one; `ray.init` sends it only if it is told to."""
    asked = []

    def init(**_):
        asked.append(os.environ.get("RAY_AUTH_MODE"))
        if asked[-1] != "token":
            raise ConnectionError("InvalidAuthToken")

    config = SimpleNamespace(initialize=lambda text: None)
    ray = SimpleNamespace(init=init, _raylet=SimpleNamespace(Config=config))
    monkeypatch.setenv("RAY_AUTH_MODE", "x")  # so that it is put back
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match="InvalidAuthToken") as error:
        cluster._connect(ray, "auto")
    assert asked == [None] and "RAY_AUTH_MODE=token" in error.value.hint
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    cluster._connect(ray, "auto")
    assert asked == [None, None, "token"]


def test_a_cluster_of_another_version_is_named_with_both(monkeypatch):
    def init(**_):
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.50.0\nThis process:\n    Ray: 2.60.0"
        )

    with pytest.raises(ModelError, match=r"Version mismatch.*2\.50\.0.*2\.60\.0"):
        cluster._connect(SimpleNamespace(init=init), "local")


@pytest.fixture
def photo_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return data


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    except Exception as error:  # too little shared memory, no sockets: the machine's business
        pytest.skip(f"Ray does not start on this machine: {error}")
    yield ray
    ray.shutdown()


def test_ray_makes_the_same_in_order(ray, run, jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    absolute = [str(tmp_path / word) if word == "jobs.jsonl" else word for word in jobs]
    _, here, _ = run(*absolute, f"{tmp_path}/here/", "--shard", "1/1", "--json")
    code, there, said = run(*absolute, f"{tmp_path}/there/", "--shard", "1/1", "--json", "--ray", "local")
    assert code == Exit.PARTIAL and "unknown key 'nonsense'" in said
    assert images(tmp_path / "there") == images(tmp_path / "here")
    seeds = [[json.loads(line)["seed"] for line in text.splitlines()] for text in (here, there)]
    assert seeds[0] == seeds[1]


def test_a_killed_actor_loses_nothing(ray, jobs, tmp_path, monkeypatch, small_base_folder):
    """kill -9 in the middle: Ray starts another one, and every row is done."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = {"base": str(small_base_folder / "base"), "out": f"{tmp_path}/set/", "steps": 2}
    asked = [Job(f"{tmp_path}/{i % 7}.canny.png,net={small_base_folder / 'net'}", "x", seed=i, **flags)
             for i in range(24)]  # fmt: skip
    units = in_units(targets([(f"line {i}", job) for i, job in enumerate(asked)], False, False, fail))
    failed, seeds = [], []
    tasks = [pool.Task(unit) for unit in units]
    for one in pool.make(tasks, pool.Setup(), [], "local", lambda *failure: failed.append(failure), print):
        if not seeds:
            actors = [p for p in psutil.process_iter() if p.name().startswith("ray::MapWorker")]
            actors[0].kill()
        seeds.append(one.wanted.seed)
    assert actors and not failed and seeds == list(range(24)) and len(images(tmp_path / "set")) == 24


def test_ray_detects_and_builds(ray, run, photo_folder, tmp_path):
    detect = ["detect", "canny", photo_folder, "--size", "64", "-q", "-o"]
    build = ["dataset", "build", photo_folder, "--size", "64", "-q", "-o"]
    for name, more in (("here", ()), ("there", ("--ray", "local"))):
        assert run(*detect, tmp_path / name, *more)[0] == 0
        assert run(*build, tmp_path / f"{name}-set", *more)[0] == 0
    assert images(tmp_path / "here") == images(tmp_path / "there") and len(images(tmp_path / "there")) == 12
    here, there = (images(tmp_path / f"{name}-set/conditions") for name in ("here", "there"))
    assert here == there and len(there) == 12


def test_detect_in_processes_is_detect(run, photo_folder, tmp_path):
    command = ["detect", "canny", photo_folder, "--size", "64", "--json", "-o"]
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    command.insert(3, tmp_path / "bad.png")
    one, two = (run(*command, name, *more) for name, more in (("one/", ()), ("two/", ("--processes", "2"))))
    assert one[0] == two[0] == Exit.PARTIAL and one[1].replace("one/", "two/") == two[1]
    assert one[2].count("error:") == two[2].count("error:") == 1 and "bad.png" in two[2]
    assert images(tmp_path / "one") == images(tmp_path / "two") and len(images(tmp_path / "one")) == 12
    assert run("detect", "canny", "-", "--processes", "2")[0] == Exit.USAGE


def test_score_in_processes_is_score(run, photo_folder, tmp_path):
    run("detect", "canny", photo_folder, "--size", "72", "-o", "maps/")
    lines = [{"image": str(photo_folder / f"{i}.png"), "cond": f"maps/{i}.canny.png"} for i in range(4)] + [{"x": 1}]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = (run("score", "--jobs", "scores.jsonl", "--json", *more) for more in ((), ("--processes", "2")))
    assert one == two and one[0] == Exit.PARTIAL and one[1].count('"f1"') >= 4

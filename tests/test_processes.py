"""Several processes, on this machine or on a cluster, make what one makes, in its order."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from controlnet.model.work import cluster, pool
from controlnet.model.work.batch import Wanted, in_units, targets
from controlnet.model.work.jobs import Job
from controlnet.model.work.studio import fail
from controlnet.preprocessors.errors import Exit, ModelError, OutputError
from helpers import images


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


def test_every_image_that_a_full_disk_took_is_told(jobs, tmp_path, small_base_folder, monkeypatch):
    """Of four images that are made together the second cannot be written: the first is made, the others are named."""
    job = Job(f"0.canny.png,net={small_base_folder / 'net'}", "x", steps=1, base=str(small_base_folder / "base"))
    wanted = [Wanted(f"line {i}", replace(job, seed=i), i, tmp_path / f"{i}.png") for i in range(4)]
    monkeypatch.setattr(pool, "write_file", lambda path, data: fills(path, data, tmp_path / "1.png"))
    outcome = pool.make_worker(pool.Setup(device="cpu", dtype="float32"), None)(pool.Task(wanted))
    assert [one.wanted.seed for one in outcome.made] == [0]
    assert [name for name, _ in outcome.failed] == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize("keep_best, parts", [(None, 4), (1, 1)])
def test_the_best_of_a_job_are_chosen_among_all_of_it(tmp_path, monkeypatch, keep_best, parts):
    """Also where a process was killed, and what it was at is tried again in parts."""
    task = pool.Task([Wanted("a", Job("x.png"), i, tmp_path / f"{i}.png") for i in range(4)])
    crews = []
    monkeypatch.setattr(pool, "share", lambda tasks, crew, *where: crews.append(crew) or [])
    with pytest.raises(ValueError, match="shorter"):
        list(pool.make([task], pool.Setup(keep_best=keep_best), ["cpu"], None, fail, print))
    assert len(crews[0].parts(task)) == parts


def fills(path, data, last):
    if path == last:
        raise OutputError(f"{path}: No space left on device")
    path.write_bytes(data)


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

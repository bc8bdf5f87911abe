"""Parts of many jobs that need not talk to each other: together they are what one command makes, byte for byte."""

import gc
import json
import tarfile
import warnings

import numpy as np
import pytest
from controlnet.model.work.jobs import Job
from controlnet.preprocessors.errors import Exit, OutputError, UsageError
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.shards import MANIFEST, WHOLE, Shard, claim, parse_shard
from helpers import images
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

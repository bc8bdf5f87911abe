"""Training from shards: the order is fixed by the seed, found again at any batch, and shared by processes."""

import http.server
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import load_base
from controlnet.model.training.cache import Cache
from controlnet.model.training.data import split
from controlnet.model.training.order import Lanes
from controlnet.model.training.run import train
from controlnet.model.training.samples import Samples
from controlnet.preprocessors import remote
from controlnet.preprocessors.data.pack import is_packed, pack
from controlnet.preprocessors.data.pairs import find_pairs, kind_of_pairs
from controlnet.preprocessors.data.stream import expand, is_stream, open_stream
from controlnet.preprocessors.errors import Exit, InputError, OutputError, UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from controlnet.preprocessors.tars import _how_far, members, write_tar
from helpers import log_of, losses, run
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def pairs_folder(data, tmp_path_factory):
    """The twelve photos with conditions of kind depth: themselves."""
    folder = tmp_path_factory.mktemp("pairs")
    for path in data.iterdir():
        write_file(folder / "images" / path.name, path.read_bytes())
        if path.suffix == ".png":
            write_file(folder / "conditions" / path.name, path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def shards(pairs_folder, tmp_path_factory):
    """The same in four tar files of three."""
    folder = tmp_path_factory.mktemp("shards")
    pack(find_pairs(pairs_folder), folder, "webdataset", "depth", 3)
    return folder


@pytest.fixture
def server(shards):
    """A web server of the shards, and the paths that were asked for. It breaks off `broken` answers in the middle."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked, broken = [], 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(shards))

        def do_GET(self):
            Handler.asked.append(self.path)
            if Handler.broken and self.path.endswith(".tar"):
                Handler.broken -= 1
                whole = (shards / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole[: len(whole) // 2])
                self.close_connection = True
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", Handler
    served.shutdown()
    served.server_close()


def keys(order, batches, batch_size):
    """(epoch, picture's bytes) of whole batches."""
    taken = [[order.at(k, slot) for slot in range(batch_size)] for k in batches]
    return [[(epoch, pair.read(pair.image)) for epoch, _, pair in batch] for batch in taken]


def test_packed_pairs_are_the_pairs(pairs_folder, shards, tmp_path):
    found = {pair.picture().tobytes(): pair for pair in find_pairs(pairs_folder).pairs}
    for packed in (find_pairs(shards).pairs, *(open_stream(f"{shards}/*.tar").pairs,)):
        assert {pair.picture().tobytes() for pair in packed} == set(found)
        for pair in packed:
            own = found[pair.picture().tobytes()]
            assert pair.caption == own.caption and np.array_equal(pair.read_condition("depth").map, own.picture())
    assert kind_of_pairs(open_stream(f"{shards}/*.tar"))[0] == "depth"  # by the names in the tar files

    pack(find_pairs(pairs_folder), tmp_path / "p", "parquet", "depth", 5)
    table = open_stream(f"{tmp_path}/p/train-*.parquet")
    assert len(table.shards) == 3 and {pair.picture().tobytes() for pair in table.pairs} == set(found)
    assert all(pair.caption == found[pair.picture().tobytes()].caption for pair in table.pairs)
    assert all(np.array_equal(pair.read_condition("depth").map, pair.picture()) for pair in table.pairs)
    first = next((tmp_path / "p").glob("train-*.parquet"))
    pq.write_table(pq.read_table(first).slice(0, 0), first.with_name("train-99999-of-99999.parquet"))
    assert len(open_stream(f"{tmp_path}/p/train-*.parquet").pairs) == 12  # a file of no rows is one


def test_picture_and_condition_of_one_name_are_two(pairs_folder, tmp_path):
    """As `dataset build` names them, and as any table may."""
    table = pa.table({
        "image": [{"bytes": png_bytes(np.full((16, 16, 3), 9, np.uint8)), "path": "0.png"}],
        "conditioning_image": [{"bytes": png_bytes(np.full((16, 16, 3), 200, np.uint8)), "path": "0.png"}],
        "text": ["a"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    (pair,) = open_stream(f"{tmp_path}/*.parquet").pairs
    assert pair.picture().max() == 9 and pair.read_condition("depth").map.min() == 200


def test_a_wide_pattern_does_not_train_on_what_is_held_out(pairs_folder, tmp_path):
    found = find_pairs(pairs_folder)
    halves = replace(found, pairs=tuple(replace(p, held_out=i % 2 == 0) for i, p in enumerate(found.pairs)))
    pack(halves, tmp_path, "parquet", "depth", 100)
    wide = {pair.picture().tobytes() for pair in open_stream(f"{tmp_path}/*.parquet").pairs}
    assert wide == {pair.picture().tobytes() for pair in halves.pairs if not pair.held_out}
    assert "validation-00000-of-00001.parquet (held out" in open_stream(f"{tmp_path}/*.parquet").skipped[0]
    alone = open_stream(f"{tmp_path}/validation-*.parquet").pairs  # asked for by name
    assert {pair.picture().tobytes() for pair in alone}.isdisjoint(wide) and alone


def test_packing_sees_that_files_have_changed(pairs_folder, tmp_path):
    """And takes no files of which nothing is known."""
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    pack(find_pairs(tmp_path / "pairs"), tmp_path / "out", "webdataset", "depth", 3)
    changed = find_pairs(tmp_path / "pairs").pairs[0]
    write_file(changed.condition, png_bytes(np.zeros_like(changed.picture())))
    with pytest.raises(OutputError, match="holds other data"):
        pack(find_pairs(tmp_path / "pairs"), tmp_path / "out", "webdataset", "depth", 3)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(OutputError, match="says of what"):
        pack(find_pairs(tmp_path / "pairs"), tmp_path / "out", "webdataset", "depth", 3)


def test_packing_that_is_cut_off_is_of_its_pairs_alone(pairs_folder, tmp_path):
    found = find_pairs(pairs_folder)

    def stop(done):
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(found, tmp_path, "webdataset", "depth", 3, stop)
    assert not is_packed(tmp_path, "webdataset")
    assert "cut off" in find_pairs(tmp_path).skipped[0] and "cut off" in open_stream(f"{tmp_path}/*.tar").skipped[0]
    with pytest.raises(OutputError, match="holds other data"):
        pack(replace(found, pairs=found.pairs[:-1]), tmp_path, "webdataset", "depth", 3)
    pack(found, tmp_path, "webdataset", "depth", 3)
    assert is_packed(tmp_path, "webdataset") and len(find_pairs(tmp_path).pairs) == len(found.pairs)


def test_pairs_that_lie_elsewhere_are_packed(pairs_folder, tmp_path):
    rows = [{"source": str(p.condition), "target": str(p.image), "prompt": "x"} for p in find_pairs(pairs_folder).pairs]
    (tmp_path / "prompt.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pack(find_pairs(tmp_path), tmp_path / "out", "webdataset", "depth", 5)["pairs"] == len(rows)


def test_packing_goes_on_and_does_not_mix(pairs_folder, tmp_path):
    found = find_pairs(pairs_folder)
    first = pack(found, tmp_path, "webdataset", "depth", 3)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    (tmp_path / "000001.tar").unlink()
    assert pack(found, tmp_path, "webdataset", "depth", 3) == first
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == whole and len(whole) == 4
    with pytest.raises(OutputError, match="holds other data"):
        pack(found, tmp_path, "webdataset", "depth", 4)
    with pytest.raises(UsageError, match="--to zip"):
        pack(found, tmp_path, "zip", "depth", 3)


@given(batch_size=st.integers(1, 8), seed=st.integers(0, 9), start=st.integers(0, 30), held_out=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_stream_is_found_again_at_any_batch(shards, batch_size, seed, start, held_out):
    stream = open_stream(f"{shards}/{{000000..000003}}.tar")
    stream.held_out = {key for key, _ in stream.head[:held_out]}
    hidden = {pair.read(pair.image) for key, pair in stream.head if key in stream.held_out}
    batches = range(start, start + 6)
    through = Lanes(stream, seed, batch_size)
    one = keys(through, range(start + 6), batch_size)[start:]
    assert one == keys(Lanes(stream, seed, batch_size), batches, batch_size)  # nothing is known of the shards
    assert one == keys(through, batches, batch_size)  # back again, with all counted
    assert not hidden & {data for batch in one for _, data in batch}


def test_an_epoch_of_a_stream_has_every_pair_once(shards):
    stream = open_stream(f"{shards}/*.tar")
    order = Lanes(stream, 0, 4)
    assert len(order.lanes) == 4
    epochs = [[data for batch in keys(order, range(3 * e, 3 * e + 3), 4) for _, data in batch] for e in (0, 1)]
    assert len(set(epochs[0])) == 12 and sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_lanes_read_no_shard_of_another_process(shards, monkeypatch):
    """Of eight places and four shards, the first half of the batch needs two shards in an epoch."""
    stream = open_stream(f"{shards}/*.tar")
    assert stream.pairs  # the first ones, which every process looks at
    read = []
    for shard in stream.shards:
        monkeypatch.setattr(shard, "groups", lambda shard=shard, own=shard.groups: read.append(shard.name) or own())
    order = Lanes(stream, 0, 8)
    for slot in range(4):
        order.at(0, slot)
    assert len(set(read)) == 2


def samples_of(stream, config):
    base = load_base(config.base)
    training, _ = split(stream, config)
    order = Lanes(stream, config.seed, config.batch_size)
    return Samples(training, config, base, model_hash(base.path), Cache(None), order)


def test_batches_of_a_stream_are_the_same_in_any_number_of_processes(shards, config):
    config = replace(config, kind="depth", held_out=2, flip=True, crops=2)
    samples = samples_of(open_stream(f"{shards}/*.tar"), config)
    for k in (0, 1, 5):
        (whole,) = samples.batch(k)
        parts = [part for i in range(2) for part in samples.batch(k, i, 2)]
        assert torch.equal(torch.cat([part.z0 for part in parts]), whole.z0)
        assert torch.equal(torch.cat([part.condition for part in parts]), whole.condition)


def test_a_run_on_a_stream_resumes_at_the_very_sample(shards, config, tmp_path):
    stream = f"{shards}/*.tar"
    config = replace(config, kind="depth", cache=False, max_steps=8, validate_every=4)
    train(open_stream(stream), config, tmp_path / "whole", CPU)
    train(open_stream(stream), replace(config, max_steps=5), tmp_path / "cut", CPU)
    train(open_stream(stream), config, tmp_path / "cut", CPU, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "whole")) == 8
    kept = replace(config, cache=True)  # by content, made when first used
    train(open_stream(stream), kept, tmp_path / "kept", CPU)
    assert np.allclose(*([loss for _, loss in losses(tmp_path / n)] for n in ("whole", "kept")), rtol=1e-5)


def test_the_command_takes_streams(shards, config, tmp_path, capsys):
    settings = [
        "--set=max_steps=2",
        "--set=batch_size=2",
        "--set=held_out=2",
        "--set=pictures=0",
        "--base",
        config.base,
    ]
    assert run("train", f"{shards}/{{000000..000003}}.tar", *settings, "-o", tmp_path / "run") == 0
    told = capsys.readouterr().err
    assert "a stream of 4 shards (webdataset), kind depth" in told
    assert "cache = false" in (tmp_path / "run/config.toml").read_text()
    assert "a stream of pairs from" in (tmp_path / "run/README.md").read_text().replace("\n", " ")
    assert [row["step"] for row in log_of(tmp_path / "run") if "control_gap" in row]


def test_a_stream_is_checked_by_its_first_pairs(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("dataset", "check", f"{shards}/*.tar") == Exit.INPUT
    out = capsys.readouterr().out
    assert "12 pairs, form webdataset, kind depth" in out and "error: 12 x coloured depth" in out
    assert [path.name for path in tmp_path.iterdir()] == [f"{shards.name}-check.png"]


def numbered(count, kinds=("depth",)):
    """The files of a tar file of so many noisy pairs."""
    rng = np.random.default_rng(count)
    for i in range(count):
        yield f"{i:04d}.png", png_bytes(rng.integers(0, 255, (64, 64, 3), np.uint8))
        for k, kind in enumerate(kinds):
            ramp = np.linspace(0, 100 + 60 * k + i, 64).astype(np.uint8)
            yield f"{i:04d}.{kind}.png", png_bytes(np.repeat(np.tile(ramp, (64, 1))[..., None], 3, 2))


def test_counts_are_of_the_shards_that_are_there(config, tmp_path, monkeypatch):
    """Shards made anew under the same names: the numbers of the old ones would lead to other samples."""
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path / "cache"))
    config = replace(config, kind="depth", cache=False, max_steps=12, validate_every=100, held_out=2)
    write_tar(tmp_path / "e/0.tar", numbered(12))
    for count in (6, 20):
        write_tar(tmp_path / "e/1.tar", numbered(count))
        train(open_stream(f"{tmp_path}/e/*.tar"), config, tmp_path / f"whole-{count}", CPU)
    train(open_stream(f"{tmp_path}/e/*.tar"), replace(config, max_steps=8), tmp_path / "cut", CPU)
    train(open_stream(f"{tmp_path}/e/*.tar"), config, tmp_path / "cut", CPU, resume=True)
    assert losses(tmp_path / "whole-20") == losses(tmp_path / "cut")


def test_of_several_maps_the_one_of_the_kind_is_taken(config, tmp_path):
    write_tar(tmp_path / "0.tar", numbered(8, ("canny", "depth")))
    config = replace(config, kind="depth", held_out=2)
    for found in (find_pairs(tmp_path), open_stream(f"{tmp_path}/*.tar")):
        with pytest.raises(UsageError, match="several kinds: canny, depth"):
            kind_of_pairs(found)
        training, held_out = split(found, config)
        levels = {int(pair.read_condition("depth").map.max()) for pair in (*training, *held_out)}
        assert levels == set(range(160, 168))
    order = Lanes(found, 0, 2)
    assert {int(order.at(k, 0)[2].read_condition("depth").map.max()) for k in range(3)} <= set(range(160, 168))


def test_a_lane_that_processes_share_is_read_through_once(shards, monkeypatch):
    """Of four places two belong to another process, in the same lane."""
    stream = open_stream(f"{shards}/*.tar")
    stream.shards = stream.shards[:1]
    assert stream.pairs
    read = []
    monkeypatch.setattr(stream.shards[0], "groups", lambda own=stream.shards[0].groups: read.append(1) or own())
    whole, part = Lanes(stream, 0, 4), Lanes(stream, 0, 4)
    seen = [part.at(k, slot)[1] for k in range(6) for slot in (2, 3)]
    epochs = len(read)
    assert seen == [whole.at(k, slot)[1] for k in range(6) for slot in range(4) if slot >= 2] and epochs <= 9


def test_pairs_are_packed_as_what_they_are(pairs_folder, tmp_path, capsys):
    """Conditions that say no kind; and a kind of one's own, which the manifest says beside the shards."""
    command = ["dataset", "build", pairs_folder, "--to", "webdataset", "-o"]
    assert run(*command, tmp_path / "a") == 2 and "do not tell their kind" in capsys.readouterr().err
    assert run(*command, tmp_path / "b", "--kind", "blueprint") == 0
    assert members(tmp_path / "b/000000.tar")[1].endswith(".blueprint.png")
    assert kind_of_pairs(open_stream(f"{tmp_path}/b/*.tar")) == ("blueprint", "from the manifest")
    assert run(*command, tmp_path / "c", "--kind", "depth", "--shard", "1/2") == 2


def test_shards_come_from_a_server_and_leave_no_trace(shards, server, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path))
    url, handler = server
    stream = open_stream(f"{url}/{{000000..000003}}.tar")
    local = open_stream(f"{shards}/{{000000..000003}}.tar")
    there = {data for batch in keys(Lanes(stream, 3, 4), range(3), 4) for _, data in batch}
    here = {data for batch in keys(Lanes(local, 3, 4), range(3), 4) for _, data in batch}
    assert there == here and len(there) == 12
    assert {Path(name).name for name in handler.asked} == {f"{i:06d}.tar" for i in range(4)} | {"manifest.json"}


def test_a_server_that_dies_in_the_middle_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    url, handler = server
    handler.broken = 2
    assert len(open_stream(f"{url}/000000.tar").pairs) == 3
    handler.broken = 100
    with pytest.raises(InputError, match=rf"000001\.tar.*asked {remote.TRIES} times; the last file that"):
        _ = open_stream(f"{url}/000001.tar").pairs


def test_shards_in_an_object_store(shards):
    """memory:// answers as s3:// and gs:// do."""
    for path in shards.glob("*.tar"):
        remote.put(remote.place(f"memory://set/{path.name}"), path.read_bytes())
    stream = open_stream("memory://set/*.tar")
    assert len(stream.shards) == 4 and len(stream.pairs) == 12


@pytest.mark.parametrize(
    "name, error, told",
    [
        ("{}/{{000000..000009}}.tar", InputError, "6 of 10 shards are missing, the first: "),
        ("{}/x*.tar", InputError, "no such shards"),
        ("memory://nowhere/0.tar", InputError, "no such"),
        ("http://127.0.0.1:9/data.zip", UsageError, "expected shards"),
        ("nosuch://a/0.tar", UsageError, "nosuch"),
    ],
)
def test_streams_that_are_not_there(shards, name, error, told):
    with pytest.raises(error, match=told):
        _ = open_stream(name.format(shards)).pairs


def test_a_missing_package_is_named(monkeypatch, shards):
    import sys

    for package, name in (("braceexpand", "a{0..1}.tar"), ("datasets", "a.parquet"), ("upath", "s3://a/b.tar")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            (shards.parent / "a.parquet").touch()
            with pytest.raises(UsageError) as error:
                _ = open_stream(str(shards.parent / name) if "://" not in name else name).pairs
        assert "pip install 'controlnet-toolkit[" in error.value.hint


def test_a_data_set_of_the_hub_is_streamed_by_its_name(pairs_folder, tmp_path, monkeypatch):
    """Here the library finds Parquet files of this machine under that name."""
    import datasets

    pack(find_pairs(pairs_folder), tmp_path, "parquet", "depth", 5)
    asked, load = [], datasets.load_dataset

    def loaded(path, split, streaming):
        asked.append((path, split, streaming))
        return load(str(tmp_path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    stream = open_stream("hf://datasets/someone/depths")
    assert asked == [("someone/depths", "train", True)] and stream.form == "datasets"
    assert len(stream.shards) == 3 and len(stream.pairs) == 12
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(InputError, match="hf://datasets/someone/depths: division by zero"):
        open_stream("hf://datasets/someone/depths")


def test_a_cut_tar_and_a_table_without_pictures(tmp_path, shards):
    whole = (shards / "000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    assert _how_far(tmp_path / "a.tar").startswith("; the last file that came whole: 0000000")
    with pytest.raises(InputError, match=r"a\.tar.*cut off|not a whole"):
        _ = open_stream(f"{tmp_path}/a.tar").pairs
    import datasets

    datasets.Dataset.from_dict({"words": ["a", "b"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="no picture in its columns words"):
        _ = open_stream(f"{tmp_path}/a.parquet").pairs
    assert is_stream("a.tar") and not is_stream(str(shards)) and expand(f"{shards}/*.tar")[0].endswith("000000.tar")


def test_dataset_build_packs_into_a_store(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CONTROLNET_CACHE", str(tmp_path))
    command = ["dataset", "build", data, "--size", "64"]
    assert run(*command, "-o", "memory://built") == 2 and "--to webdataset" in capsys.readouterr().err
    for form, pattern in (("webdataset", "*.tar"), ("parquet", "train-*.parquet")):
        assert run(*command, "-o", f"memory://built-{form}", "--to", form) == 0
        assert len(open_stream(f"memory://built-{form}/{pattern}").pairs) >= 10
    assert not list(tmp_path.rglob("*.png"))


def test_dataset_build_packs(data, tmp_path, capsys):
    command = [
        "dataset",
        "build",
        data,
        "-o",
        tmp_path / "set",
        "--size",
        "64",
        "--to",
        "webdataset",
        "--per-file",
        "5",
    ]
    assert run(*command) == 0
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "000000.tar", "000001.tar", "000002.tar", "manifest.json",
    ]  # fmt: skip
    names = members(tmp_path / "set/000000.tar")
    assert names[:3] == ["00000000.png", "00000000.canny.png", "00000000.json"]
    assert sum(bool(pair.held_out) for pair in find_pairs(tmp_path / "set").pairs) == 2
    assert run(*command) == 4 and "holds a data set already" in capsys.readouterr().err
    assert run("dataset", "build", tmp_path / "set", "-o", tmp_path / "p", "--to", "parquet") == 0
    assert [p.name for p in sorted((tmp_path / "p").glob("*.parquet"))] == [
        "train-00000-of-00001.parquet", "validation-00000-of-00001.parquet",
    ]  # fmt: skip
    assert len(open_stream(f"{tmp_path}/p/train-*.parquet").pairs) == 10
    assert run("dataset", "build", data, "-o", tmp_path / "x", "--to", "zip") == 2

"""Models of the hub: what is fetched, at which revision, and kept; a hub on loopback stands for the real one."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from controlnet.model.files.hub import complete, is_hub_id, needed
from controlnet.model.load import load_base
from controlnet.model.registry import BASES, NETS, net_for
from controlnet.preprocessors.images import png_bytes
from huggingface_hub import constants
from test_lora import write_kohya

SD15 = [
    "model_index.json", "README.md", "v1-5.ckpt", "safety_checker/config.json", "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
]  # fmt: skip


def test_of_a_base_only_what_is_read_is_fetched():
    files = needed(SD15)
    weights = [f for f in files if not f.endswith((".json", ".txt"))]
    assert weights == [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
    ]  # fmt: skip
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"} <= set(files)
    assert not any(f.startswith(("safety", "feature", "README")) for f in files) and complete(files)


def test_of_shards_all_and_of_pickles_none_beside_them():
    stem = "diffusion_pytorch_model"
    whole = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"]
    net = ["config.json", f"{stem}.bin", *whole, *half, *index]
    assert needed(net) == ["config.json", index[0], *whole]
    assert needed([n for n in net if n not in (*whole, index[0])]) == ["config.json", index[1], *half]
    assert not complete(["config.json"]) and not complete(["README.md", "model.gguf"]) and not complete([])


@pytest.mark.parametrize(
    "name", ["someone", "a/b/c", "folder/net.safetensors", "a b/c", "./model", "../model", "a/b..c", "a--b/c", "-a/b"]
)
def test_what_a_hub_id_looks_like(name):
    assert is_hub_id("someone/model-1.5_x") and not is_hub_id(name)


def test_the_table_has_a_net_for_what_is_detected():
    for family in ("SD 1.x", "SD 2.x"):
        for kind in ("canny", "pose", "depth", "normal", "softedge", "scribble", "lineart"):
            assert net_for(family, kind)
    assert all(Path(row.source).is_dir() or is_hub_id(row.source) for row in [*NETS.values(), *BASES.values()])
    assert all(row.licence for row in [*NETS.values(), *BASES.values()])


REVISION = "1" * 40


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(repository):
    """The files of a repository as the hub lists them."""
    files = [p for p in repository.rglob("*") if p.is_file()]
    return [{"type": "file", "path": p.relative_to(repository).as_posix(), "size": p.stat().st_size, "oid": "2" * 40,
             **({"lfs": {"oid": digest(p), "size": p.stat().st_size, "pointerSize": 1}} if p.suffix != ".json" else {})}
            for p in files]  # fmt: skip


def about(repository):
    siblings = [{"rfilename": f["path"], "size": f["size"],
                 "lfs": {**f["lfs"], "sha256": f["lfs"]["oid"]} if "lfs" in f else None}
                for f in tree(repository)]  # fmt: skip
    return {"id": f"acme/{repository.name}", "sha": REVISION, "siblings": siblings}


@pytest.fixture
def hub(small_base_folder, tmp_path, run, monkeypatch):
    """A hub on loopback with acme/base and acme/net; `hub.asked` is what was asked, `hub.call(*args)` the command."""
    folder = tmp_path / "hub"
    for name in ("base", "net"):
        shutil.copytree(small_base_folder / name, folder / "acme" / name)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(head=True)

        def do_GET(self):
            self.answer(head=False)

        def answer(self, head):
            server.asked.append(self.path)
            code, data, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
            path = self.path.split("?")[0].strip("/")
            parts = path.removeprefix("api/models/").split("/")
            repository = folder / parts[0] / parts[1]
            if path.startswith("api/models/") and repository.is_dir():
                told = tree(repository) if "tree" in parts else about(repository)
                code, data, headers = 200, json.dumps(told).encode(), {}
            elif (file := repository.joinpath(*parts[4:])).is_file():  # OWNER/NAME/resolve/REVISION/FILE
                code, data, headers = 200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": REVISION}
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if not head:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    def call(*args, offline=False):
        address = "http://127.0.0.1:9" if offline else f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return run(*args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.call, server.folder = [], call, folder / "acme"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_pulled_once_then_used_without_a_network(hub, tmp_path):
    (tmp_path / "map.canny.png").write_bytes(png_bytes(np.zeros((64, 64, 3), np.uint8)))
    job = ("generate", "--base", "acme/base", "--cond", "map.canny.png,net=acme/net", "-p", "a cube", "--steps", 1,
           "--seed", 1)  # fmt: skip
    code, _, err = hub.call(*job, "--offline")
    assert code == 5 and "base acme/base, ControlNet acme/net" in err  # all that is missing at once
    assert "controlnet models pull acme/base acme/net" in err and hub.asked == []
    code, out, err = hub.call("models", "pull", "acme/base", "acme/net")
    assert code == 0 and len(out.splitlines()) == 2, err
    lock = json.loads((tmp_path / "cache/models.lock.json").read_text())
    assert lock["acme/net"]["revision"] == REVISION
    assert "unet/diffusion_pytorch_model.safetensors" in lock["acme/base"]["files"]
    code, _, err = hub.call(*job, offline=True)
    assert code == 0 and (tmp_path / "out/1-map.png").is_file(), err
    asked = len(hub.asked)
    assert hub.call("models", "pull", "acme/net")[0] == 0 and len(hub.asked) == asked  # it is here
    code, out, _ = hub.call("models", "verify", "acme/base", "acme/net")
    assert (code, out) == (0, "acme/base: whole\nacme/net: whole\n")
    file = next((tmp_path / "hf").rglob("models--acme--net/blobs/" + lock["acme/net"]["files"][WEIGHTS]))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    code, out, _ = hub.call("models", "verify", "acme/net", "--json")
    assert code == 5 and json.loads(out)["wrong"] == [WEIGHTS]
    assert hub.call("models", "pull", "acme/net")[0] == 0  # fetched again
    assert hub.call("models", "verify", "acme/net")[0] == 0
    weights = hub.folder / "net" / WEIGHTS  # another file under the same revision
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    shutil.rmtree(tmp_path / "hf")
    code, _, err = hub.call("models", "pull", "acme/net")
    assert code == 5 and f"{WEIGHTS} is not the file that it was" in err and "--update" in err


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_an_adapter_is_pulled_by_its_id(hub, small_base_folder, tmp_path):
    write_kohya(tmp_path / "it.safetensors", load_base(str(small_base_folder / "base")), {"unet": "lora_unet_"})
    (hub.folder / "style").mkdir()
    shutil.copy(tmp_path / "it.safetensors", hub.folder / "style/pytorch_lora_weights.safetensors")
    job = ("generate", "--base", small_base_folder / "base", "--lora", "acme/style:0.5", "-p", "a cube", "--steps", 1)
    code, _, err = hub.call(*job, "--offline")
    assert code == 5 and "lora acme/style" in err and "controlnet models pull acme/style" in err
    code, _, err = hub.call(*job)
    assert code == 0 and "acme/style: scale 0.5; applied: unet" in err, err
    assert hub.call(*job, "--offline")[0] == 0
    assert needed(["README.md", "one.safetensors", "x.png"]) == ["one.safetensors"] and not complete(
        ["a/b.safetensors"]
    )


def test_what_the_hub_lacks(hub):
    code, _, err = hub.call("models", "pull", "acme/nothing")
    assert code == 5 and "no such model" in err and "hint:" in err
    code, _, err = hub.call("generate", "--base", "acme/base", "-p", "a cube", offline=True)
    assert code == 5 and "cannot be reached" in err and "hint:" in err
    code, _, err = hub.call("models", "pull", "nothing")
    assert code == 2 and "controlnet models list" in err
    (hub.folder / "empty").mkdir()
    (hub.folder / "empty/README.md").write_text("none")
    code, _, err = hub.call("models", "pull", "acme/empty")
    assert code == 5 and "neither a base nor a ControlNet" in err


def test_the_default_base(run, small_base_folder, monkeypatch):
    assert "* tiny" in run("models", "list")[1]
    base = small_base_folder / "base"
    assert run("models", "use", base)[0] == 0
    code, _, err = run("generate", "-p", "a cube", "--steps", 1, "-o", small_base_folder / "x.png", "--overwrite")
    assert code == 0 and f"base {base}" in err
    monkeypatch.setenv("CONTROLNET_BASE", "tiny")
    assert "* tiny" in run("models", "list")[1]
    monkeypatch.delenv("CONTROLNET_BASE")
    code, _, err = run("models", "use", small_base_folder / "net")
    assert code == 2 and "is no base" in err
    code, _, err = run("models", "use", "sd16")
    assert code == 2 and "sd15" in err and "* tiny" not in run("models", "list")[1]
    assert run("models", "use", "tiny")[0] == 0 and "* tiny" in run("models", "list")[1]

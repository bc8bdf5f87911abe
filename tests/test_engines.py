"""Engines: graphs of the networks compute what torch does, and are kept; upsampling folded into a convolution."""

import copy
import gc
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from controlnet.model.control.strength import Strength
from controlnet.model.control.upsampling import FoldedUpsample, fold_for_graphs, fold_upsampling
from controlnet.model.engines import openvino
from controlnet.model.engines.choose import engine_name, make_engine
from controlnet.model.engines.engine import Eager
from controlnet.model.engines.graphs import Compiled, Graphs
from controlnet.model.files import tensors
from controlnet.model.load import load_base
from controlnet.model.nets import load_controlnet, load_net
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.work.replay import replay
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.files import write_file
from controlnet.preprocessors.images import png_bytes
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMPT = "a red cube on a blue floor"


@pytest.fixture(scope="module")
def models(small_base_folder):
    return load_base(str(small_base_folder / "base")), load_controlnet(small_base_folder / "net", torch.float32)


@torch.no_grad()
def sampled(models, engine, strengths=(Strength(),), rows=1, steps=3, device="cpu"):
    """Latents under a random condition, once for each strength."""
    base, net = models
    generator = torch.Generator().manual_seed(0)
    feature = net.prepare(torch.rand(1, 3, 64, 64, generator=generator).to(device))
    texts = base.encode_text([PROMPT] * rows), base.encode_text([""])
    start = FromNoise.seeded(list(range(rows)), (4, 8, 8))
    acting = [ActiveNet(net, feature, one) for one in strengths]
    return sample(base.unet, make_scheduler(base.scheduler), start, *texts, acting, steps, engine=engine)


def near(a, b, tolerance=1e-4):
    assert a.std() > 0.1 and torch.isfinite(a).all()
    assert (a - b).abs().max() <= tolerance * b.std()


CHOICES = [
    (Strength(),),
    (Strength(0.7), Strength(-0.4, weighting="soft")),
    (Strength(end=0.4),),
    (Strength(control_on="cond"),),
    (),
]


@pytest.fixture(scope="module")
def made_graphs(models, tmp_path_factory):
    """The cache of a process that has sampled one image with `models` by OpenVINO."""
    if not find_spec("openvino"):
        pytest.skip("OpenVINO is not installed")
    cache = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLNET_CACHE", str(cache))
        sampled(models, openvino.OpenVino())
    return cache / "graphs"


@pytest.fixture
def openvino_engine(made_graphs, tmp_path):
    """An engine that finds those graphs in its cache; `said` is what it says."""
    shutil.copytree(made_graphs, tmp_path / "cache" / "graphs")
    said = []
    engine = openvino.OpenVino(said.append)
    engine.said = said
    return engine


def graphs_in(cache):
    return sorted(one for one in (cache / "graphs").iterdir() if one.is_dir())


@pytest.mark.parametrize("strengths", CHOICES)
def test_a_graph_computes_what_torch_does(models, strengths):
    near(sampled(models, Compiled("eager"), strengths), sampled(models, Eager(), strengths), 1e-5)


def test_any_number_of_graphs_is_compiled():
    """torch gives up after compiling one piece of code eight times; all calls of networks have the same."""

    def call(number):
        def run(x):
            return [x + number]

        return SimpleNamespace(of_tensors=lambda: run, tensors=[torch.zeros(1)], network=torch.nn.Identity())

    engine = Compiled("eager")
    made = [engine.make(call(number)) for number in range(10)]
    assert [function(torch.zeros(1))[0].item() for function in made] == list(range(10))


def test_one_graph_of_openvino_serves_every_choice_of_controls(models, openvino_engine, tmp_path):
    for strengths in CHOICES[:3] + CHOICES[4:]:
        near(sampled(models, openvino_engine, strengths), sampled(models, Eager(), strengths))
    assert len(graphs_in(tmp_path / "cache")) == 2  # the UNet's and the ControlNet's
    assert not openvino_engine.said
    near(sampled(models, openvino_engine, CHOICES[3]), sampled(models, Eager(), CHOICES[3]))
    assert len(graphs_in(tmp_path / "cache")) == 3  # a ControlNet of half of the rows


def test_a_new_process_reads_the_graph(models, openvino_engine, tmp_path):
    twin = tuple(copy.deepcopy(one) for one in models)  # other objects, the same contents
    near(sampled(twin, openvino_engine), sampled(models, Eager()))
    assert not openvino_engine.said and len(graphs_in(tmp_path / "cache")) == 2


def test_a_damaged_graph_is_made_again(models, openvino_engine, tmp_path):
    one, two = graphs_in(tmp_path / "cache")
    (one / "graph.bin").write_bytes(b"cut off")
    (two / "graph.xml").unlink()
    near(sampled(models, openvino_engine), sampled(models, Eager()))
    assert len(openvino_engine.said) == 2 and all("is made" in text for text in openvino_engine.said)
    assert openvino.is_whole(one) and openvino.is_whole(two)
    (one / "sizes.json").write_text("[1")
    assert not openvino.is_whole(one)


def test_weights_lie_in_the_graphs_file(models, openvino_engine, tmp_path, monkeypatch):
    """Bit for bit, so that a graph of another shape is made of them."""
    monkeypatch.setattr(openvino, "SHARED", 64)
    shutil.rmtree(tmp_path / "cache" / "graphs")
    twin = tuple(copy.deepcopy(one) for one in models)
    twin[0].unet = copy.deepcopy(models[0].unet)
    near(sampled(twin, openvino_engine), sampled(models, Eager()))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "graph.bin" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for before, after in ((models[0].unet, twin[0].unet), (models[1], twin[1])):
        pairs = list(zip(before.parameters(), after.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        shared = sum(b.numel() for _, b in pairs if any(low <= b.data_ptr() < high for low, high in spans))
        assert shared > 0.5 * sum(b.numel() for _, b in pairs)
    near(sampled(twin, openvino_engine, rows=2), sampled(models, Eager(), rows=2))


def test_weights_that_a_graph_has_are_not_read_again(small_base_folder, openvino_engine, tmp_path, monkeypatch):
    """And the model that is loaded of them is the same; a graph that is cut off is no source."""
    monkeypatch.setattr(openvino, "SHARED", 64)
    shutil.rmtree(tmp_path / "cache" / "graphs")

    def loaded():
        engine = openvino.OpenVino(openvino_engine.said.append)
        base = load_base(str(small_base_folder / "base"), engine_for=lambda parameters: engine)
        return base, load_net(small_base_folder / "net", torch.float32, engine=engine)

    checked = []
    monkeypatch.setattr(tensors, "check_finite", lambda state, source: checked.append(len(state)))
    first = loaded()
    before = sampled(first, first[0].engine)
    every, checked[:] = sum(checked), []
    again = loaded()
    assert sum(checked) < 0.7 * every  # keys and values of the prompt are computed outside of the graphs
    for a, b in zip((first[0].unet, first[1]), (again[0].unet, again[1]), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(sampled(again, again[0].engine), before) and len(openvino_engine.said) == 2
    near(sampled(again, Eager()), before)

    for graph in graphs_in(tmp_path / "cache"):
        (graph / "graph.bin").write_bytes(b"cut off")
    checked.clear()
    loaded()
    assert sum(checked) == every


def test_changed_weights_and_other_shapes_have_graphs_of_their_own(models, openvino_engine, tmp_path):
    base, net = models
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.controlnet_mid_block.weight.mul_(2)
    near(sampled((base, other), openvino_engine, rows=2), sampled((base, other), Eager(), rows=2))
    assert len(graphs_in(tmp_path / "cache")) == 4


def test_another_config_or_version_has_a_graph_of_its_own(models, openvino_engine, tmp_path, monkeypatch):
    """Of the same weights: this config averages the control over the picture."""
    base, net = models
    other = copy.deepcopy(net)
    other.config = net.config | {"global_pool_conditions": True}
    near(sampled((base, other), openvino_engine), sampled((base, other), Eager()))
    assert len(graphs_in(tmp_path / "cache")) == 3
    monkeypatch.setattr(openvino, "version", lambda name: "0")
    sampled(models, openvino.OpenVino())
    assert len(graphs_in(tmp_path / "cache")) == 5


def test_what_openvino_cannot_run_torch_runs(models, openvino_engine, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such operation\nmore")

    monkeypatch.setattr(openvino_engine, "_compiled", refuse)
    near(sampled(models, openvino_engine), sampled(models, Eager()), 1e-5)
    assert openvino_engine.said == ["OpenVINO cannot run this network, torch does: no such operation"] * 2


def test_only_so_many_bytes_of_graphs_are_kept(openvino_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "KEPT", 0)
    old, new = graphs_in(tmp_path / "cache")
    os.utime(old / "used", (1, 1))
    openvino.forget_old(new.parent)
    assert graphs_in(tmp_path / "cache") == [new]


def test_images_by_openvino_are_made_alone(models, openvino_engine, condition):
    base, net = models
    requests = [Request(PROMPT, seed, (condition,)) for seed in (1, 2)]
    by_torch = list(generate(base, requests, [(net, Strength())], steps=2))
    under = copy.copy(base)
    under.engine = openvino_engine
    for a, b in zip(by_torch, generate(under, requests, [(net, Strength())], steps=2), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1 and a.std() > 1
    assert not openvino_engine.said  # no graph for two images at once


def test_openvino_reports_to_nobody(openvino_engine):
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
def test_cuda_graphs_compute_what_torch_does(small_base_folder):
    models = (
        load_base(str(small_base_folder / "base"), "cuda"),
        load_controlnet(small_base_folder / "net", torch.float32).to("cuda"),
    )
    for strengths, rows in product(CHOICES, (1, 2)):
        engine = Graphs()
        for _ in range(2):  # recorded, then replayed alone
            near(sampled(models, engine, strengths, rows, device="cuda"),
                 sampled(models, Eager(), strengths, rows, device="cuda"), 1e-5)  # fmt: skip


@pytest.mark.parametrize(
    "asked, expected",
    [
        ((None, CUDA, torch.float16, False, 10), "graphs"),
        ((None, CUDA, torch.float16, True, 10), "eager"),
        ((None, CPU, torch.bfloat16, False, 10), "eager"),
        ((None, CPU, torch.bfloat16, True, 10**9), "eager"),
        ((None, CPU, torch.float16, False, 10**9), "eager"),
        (("eager", CUDA, torch.float16, False, 10), "eager"),
        (("compiled", CPU, torch.float32, True, 10), "compiled"),
        (("openvino", CPU, torch.float32, False, 10), "openvino"),
    ],
)
def test_the_engine_that_is_used(asked, expected):
    assert engine_name(*asked) == expected


@pytest.mark.parametrize("there, expected", [(True, "openvino"), (False, "eager")])
def test_openvino_is_used_for_large_bases_where_it_is_installed(monkeypatch, there, expected):
    monkeypatch.setattr("controlnet.model.engines.choose.find_spec", lambda name: there or None)
    assert engine_name(None, CPU, torch.bfloat16, False, 10**9) == expected


@pytest.mark.parametrize(
    "asked",
    [
        ("fast", CPU, torch.float32, False, 0),
        ("graphs", CPU, torch.float32, False, 0),
        ("graphs", CUDA, torch.float16, True, 0),
        ("openvino", CUDA, torch.float32, False, 0),
        ("openvino", CPU, torch.float16, False, 0),
    ],
)
def test_engines_that_cannot_be_used(asked):
    with pytest.raises(UsageError) as error:
        engine_name(*asked)
    assert error.value.hint.startswith("--engine eager")


def test_openvino_that_is_not_installed(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="not installed") as error:
        make_engine("openvino")
    assert error.value.hint == "pip install 'controlnet-toolkit[openvino]'"
    code, _, err = run("generate", "--prompt", "a red cube", "--engine", "openvino", "-o", tmp_path / "a.png")
    assert code == 2 and "error: " in err and "pip install" in err and not (tmp_path / "a.png").exists()


def test_the_record_names_the_engine_and_replay_uses_it(run, tmp_path, condition, small_base_folder):
    if not find_spec("openvino"):
        pytest.skip("OpenVINO is not installed")
    write_file(tmp_path / "map.canny.png", png_bytes(condition))
    cond = f"{tmp_path / 'map.canny.png'},net={small_base_folder / 'net'}"
    code, _, err = run(
        "generate", "--cond", cond, "--prompt", PROMPT, "--base", small_base_folder / "base",
        "--engine", "openvino", "--dtype", "float32", "--steps", 2,
        "-o", tmp_path / "a.png",
    )  # fmt: skip
    assert code == 0 and "by openvino" in err
    image, difference, changed = replay(tmp_path / "a.png")
    assert image.record["engine"] == "openvino" and difference.largest == 0 and changed == []


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_folded_upsampling_is_upsampling_and_a_convolution(rows, narrow, wide, height, width):
    torch.manual_seed(rows * narrow + wide)
    layer = Upsample2D(narrow, use_conv=True, out_channels=wide).double().requires_grad_(False)
    x = torch.randn(rows, narrow, height, width, dtype=torch.float64)
    plain, other = layer(x), layer(x, (2 * height + 1, 2 * width))
    fold_upsampling(layer)
    assert type(layer) is FoldedUpsample
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x, (2 * height, 2 * width)), plain, rtol=0, atol=1e-12)
        assert torch.equal(layer(x, (2 * height + 1, 2 * width)), other)


def test_folded_weights_follow_their_weight_and_training_is_left_alone():
    torch.manual_seed(0)
    layer, x = Upsample2D(3, use_conv=True).requires_grad_(False), torch.randn(1, 3, 4, 4)
    fold_upsampling(layer)
    with torch.no_grad():
        before = layer(x)
        layer.conv.weight.mul_(2), layer.conv.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.requires_grad_(True)
        torch.testing.assert_close(layer(x), 2 * before)
    layer(x).sum().backward()
    assert layer.conv.weight.grad is not None and layer.conv.weight.grad.any()


def test_folded_weights_follow_the_type_of_their_weight():
    """`Module.to` gives a weight other values in place, without a new version."""
    torch.manual_seed(0)
    layer, x = Upsample2D(3, use_conv=True).requires_grad_(False), torch.randn(1, 3, 4, 4)
    fold_upsampling(layer)
    with torch.no_grad():
        exact = layer(x)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(layer.float()(x), exact, rtol=0.02, atol=0.02)


def test_what_a_graph_records_copies_no_constants():
    """Of compiled networks the folding is in the graph; CUDA records no copy from the CPU."""
    from controlnet.model.control.upsampling import _fold
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(_fold)(torch.randn(4, 3, 3, 3)).graph
    assert [node.op for node in graph.nodes].count("get_attr") == 0


def test_a_compiled_graph_holds_the_folded_weights():
    """Nothing in it depends on the plain weight, and it computes the same."""
    torch.manual_seed(0)
    layer, x, seen = Upsample2D(3, use_conv=True).requires_grad_(False), torch.randn(1, 3, 4, 4), []
    fold_upsampling(layer)

    def backend(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    with torch.no_grad():
        plain = layer(x)
        fold_for_graphs(layer)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), plain)
    assert len(seen[0]) == 1 and "transpose" in str(seen[0][0])


def test_bases_are_loaded_with_folded_upsampling(models):
    base, _ = models
    for network in (base.unet, base.vae):
        kinds = {type(module) for module in network.modules() if isinstance(module, Upsample2D)}
        assert kinds == {FoldedUpsample}


def test_signals_are_handled_after_engines_are_gone(made_graphs):
    """OpenVINO replaces the stack that signals are handled on, and takes it away again."""
    engines = [openvino.OpenVino() for _ in range(2)]
    for engine in engines:
        engine.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # the processor's part is loaded now
    del engine
    while engines:
        engines.pop(0)
        gc.collect()
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert got == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("blocks", "side", "tokens"),
    [
        (["CrossAttnDownBlock2D", "DownBlock2D"], 128, 16384),
        (["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], 128, 4096),
        (["DownBlock2D"], 128, 0),
    ],
)
def test_tokens_of_the_largest_attention(blocks, side, tokens):
    assert openvino.most_tokens({"down_block_types": blocks}, torch.empty(2, 4, side, side)) == tokens


@pytest.mark.parametrize("has", [True, False])
def test_sizes_at_which_torch_is_quicker_are_left_to_it(models, openvino_engine, tmp_path, monkeypatch, has):
    """Where that was measured: on a processor that multiplies bfloat16 without AMX."""
    monkeypatch.setattr(openvino, "SLOW", range(1, 10_000))
    monkeypatch.setattr(openvino, "multiplies_halves", lambda: has)
    shutil.rmtree(tmp_path / "cache" / "graphs", ignore_errors=True)
    (tmp_path / "cache" / "graphs").mkdir(parents=True)
    near(sampled(models, openvino.OpenVino(openvino_engine.said.append)), sampled(models, Eager()))
    assert any("torch runs the networks at this size" in text for text in openvino_engine.said) == has
    assert bool(graphs_in(tmp_path / "cache")) != has

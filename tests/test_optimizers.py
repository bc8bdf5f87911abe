"""Muon: matrices move by orthogonal updates as torch's own Muon moves them, everything else as AdamW moves it."""

import pytest
import torch
from controlnet.model.training.loop import LoopConfig
from controlnet.model.training.optimizers import Muon, make_optimizer, orthogonal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def network(memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    parts = nn.ModuleDict({
        "wide": nn.Linear(40, 20, bias=True), "tall": nn.Linear(20, 40), "few": nn.Linear(4, 30),
        "convolution": nn.Conv2d(20, 24, 3), "norm": nn.GroupNorm(4, 20), "words": nn.Embedding(50, 20),
    })  # fmt: skip
    return parts.to(memory_format=memory_format)


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_matrices_move_as_with_torchs_muon_and_the_rest_as_with_adamw():
    ours = network()
    found = steps(ours, make_optimizer(ours, "muon", 1e-2, 0.1))
    reference = network()
    matrices = {"wide.weight", "tall.weight", "words.weight"}
    muon = torch.optim.Muon(
        [p for n, p in reference.named_parameters() if n in matrices], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"
    )
    expected = steps(reference, muon)
    plain = network()
    adamw = steps(plain, make_optimizer(plain, "adamw", 1e-2, 0.1))
    start = dict(network().named_parameters())
    for name, value in found.items():
        if name in matrices:
            moved = (expected[name] - start[name]).norm()  # bfloat16 products, summed in another order
            assert (value - expected[name]).norm() < 0.03 * moved, name
            assert (value - adamw[name]).norm() > 0.1 * moved, name
        elif name != "convolution.weight":
            assert torch.equal(value, adamw[name]), name
        else:
            assert not torch.allclose(value, adamw[name], atol=1e-3)


def test_a_convolution_moves_as_its_matrix_in_any_layout():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = nn.Conv2d(20, 24, 3, bias=False)
        nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(0))
        net.to(memory_format=layout)
        found.append(steps(net, make_optimizer(net, "muon", 1e-2, 0.0))["weight"])
    assert torch.equal(*found)
    net = nn.Linear(180, 24, bias=False)
    with torch.no_grad():
        start = nn.init.normal_(torch.empty(24, 20, 3, 3), generator=torch.Generator().manual_seed(0))
        net.weight.copy_(start.permute(0, 2, 3, 1).flatten(1))
    optimizer = make_optimizer(net, "muon", 1e-2, 0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        net.weight.grad = torch.randn(start.shape, generator=generator).permute(0, 2, 3, 1).flatten(1).contiguous()
        optimizer.step()
    assert torch.equal(net.weight.detach(), found[0].permute(0, 2, 3, 1).flatten(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_the_singular_values_come_out_alike_and_the_vectors_stay(m, n, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator)).Q for k in (m, n))
    values = torch.linspace(1, 0.2, min(m, n)) * scale
    out = orthogonal((u * values @ v.mT)[None])[0]
    inside = u.mT @ out @ v
    assert inside.diagonal().min() > 0.55 and inside.diagonal().max() < 1.3
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 0.1


def test_a_resumed_optimizer_goes_on_exactly():
    whole = network()
    expected = steps(whole, make_optimizer(whole, "muon", 1e-2, 0.1), 4)
    net = network()
    generator = torch.Generator().manual_seed(1)
    optimizer = make_optimizer(net, "muon", 1e-2, 0.1)
    for step in range(4):
        if step == 2:
            state, optimizer = optimizer.state_dict(), make_optimizer(net, "muon", 1e-2, 0.1)
            optimizer.load_state_dict(state)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert isinstance(optimizer, Muon)
    assert all(torch.equal(p, expected[name]) for name, p in net.named_parameters())


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit, muon, got 'sgd'"):
        LoopConfig(optimizer="sgd")


def test_a_step_whose_scaled_gradients_overflow_is_skipped():
    """float16: the scale is halved, and matrices stay as they are like everything else."""
    module = network()
    optimizer = make_optimizer(module, "muon", 1e-2, 0.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    for p in module.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())

"""The way through the UNet: equal to diffusers' own, and nothing of it is computed twice."""

import controlnet.model.control.attention as ways
import pytest
import torch
from controlnet.model.control.attention import InBlocks, in_blocks
from controlnet.model.control.controlnet import Control
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import denoise, embed_times, encode, predict
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.starts import FromNoise
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers import Counter, randomise, small_unet

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def build(levels, **changes):
    """A narrow UNet; `levels` says for each one whether it has attention."""
    torch.manual_seed(0)
    kinds = [CROSS if attends else PLAIN for attends in levels]
    config = dict(
        block_out_channels=(8, 16, 16, 24)[: len(levels)], layers_per_block=2, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=[k.format("Down") for k in kinds],
        up_block_types=[k.format("Up") for k in reversed(kinds)],
    )  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).eval().double()


NETWORKS = {
    "SD 1": lambda: build((True, True, True, False)),
    "SD 2": lambda: build((True, True, True, False), use_linear_projection=True, attention_head_dim=(2, 4, 4, 6)),
    "tiny": lambda: build((False, True, True)),
    "one layer": lambda: build((False, True), layers_per_block=1, transformer_layers_per_block=2),
}


def inputs(unet, batch=2, height=16, width=16):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z, text, t = draw(batch, 4, height, width), draw(batch, 5, 12), torch.tensor([900, 12])[:batch]
    with torch.no_grad():
        skips, middle = encode(unet, unet.conv_in(z), embed_times(unet, t, z.dtype), Prompt(text))
    return z, t, text, Control([draw(*s.shape) for s in skips], draw(*middle.shape))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (12, 20)], ids=str)
def test_equal_to_diffusers(name, size):
    unet = NETWORKS[name]()
    z, t, text, control = inputs(unet, 2, *size)
    with torch.no_grad():
        reference = unet(z, t, text).sample
        assert (denoise(unet, z, t, Prompt(text)) - reference).abs().max() <= 1e-9 * reference.std()
        controlled = unet(
            z, t, text, down_block_additional_residuals=control.down, mid_block_additional_residual=control.middle
        ).sample
        assert (denoise(unet, z, t, Prompt(text), control) - controlled).abs().max() <= 1e-9 * controlled.std()
        assert (controlled - reference).std() > 0.1 * reference.std()


@pytest.mark.parametrize("name", NETWORKS)
def test_both_halves_of_the_guidance_share_what_reads_no_text(name):
    """Rows for images, two for the text: equal to both halves apart, and the first convolution sees each image once."""
    unet = NETWORKS[name]()
    z, _, text, _ = inputs(unet)
    null, t = torch.zeros_like(text), torch.tensor([300])
    first, last = Counter(unet.conv_in), Counter(unet.conv_out)
    with torch.no_grad():
        both = predict(unet, z, embed_times(unet, t, z.dtype), Prompt(torch.cat([null, text])))
        assert (first.batches, last.batches) == ([2], [4])
        apart = [unet(z, t.expand(2), c).sample for c in (null, text)]
    assert (both - torch.cat(apart)).abs().max() <= 1e-9 * both.std()
    assert (apart[0] - apart[1]).std() > 1e-3 * both.std()


def test_an_added_embedding_is_diffusers_own():
    """A UNet of SDXL's form: pooled text and ids of size and crop join the time; several transformer blocks a place."""
    unet = build(
        (False, True, True), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip
    z, t, text, _ = inputs(unet)
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn((2, 10), generator=generator, dtype=torch.float64)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [48, 64, 8, 0, 64, 48]], dtype=torch.float64)
    with torch.no_grad():
        theirs = unet(z, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
        ours = denoise(unet, z, t, Prompt(text, pooled, ids))
        others = denoise(unet, z, t, Prompt(text, pooled.flip(0), ids))
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.std()
    assert (ours - others).std() > 1e-4 * ours.std()


def test_gradients_are_diffusers_own_with_and_without_checkpointing():
    unet = NETWORKS["SD 1"]()
    z, t, text, _ = inputs(unet)

    def gradients(forward):
        unet.zero_grad()
        forward().square().mean().backward()
        return [p.grad.clone() for p in unet.parameters()]

    reference = gradients(lambda: unet(z, t, text).sample)
    ours = gradients(lambda: denoise(unet, z, t, Prompt(text)))
    unet.enable_gradient_checkpointing()
    unet.train()
    checkpointed = gradients(lambda: denoise(unet, z, t, Prompt(text)))
    for other in (ours, checkpointed):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(reference, other, strict=True))


def test_keys_values_and_times_once_a_sampling():
    from controlnet.model.control.controlnet import ControlNet

    unet = small_unet()
    net = randomise(ControlNet.from_base(unet, hint_widths=(4, 4, 8, 8)))
    attentions = [m for n in (unet, net) for name, m in n.named_modules() if name.endswith("attn2.to_k")]
    counters = [Counter(m) for m in (*attentions, unet.time_embedding, net.time_embedding)]
    runs = Counter(net.conv_in)
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16)
    hint = net.prepare(torch.rand(1, 3, 64, 64))
    prompt, negative = Prompt(text), Prompt(text[:1])
    sample(unet, DDIMScheduler(), FromNoise(noise), prompt, negative, [ActiveNet(net, hint)], steps=4, guidance=3.0)
    assert runs.batches == [2] * 4 and len(attentions) >= 4
    assert [c.count for c in counters] == [1] * len(counters)


def test_the_layout_stays():
    """From channels_last weights to channels_last features: nothing is copied on the way."""
    unet = NETWORKS["SD 1"]().to(memory_format=torch.channels_last)
    z, t, text, _ = inputs(unet)
    seen = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        out = denoise(unet, z.contiguous(memory_format=torch.channels_last), t, Prompt(text))
    assert len(seen) > 40 and all(x.is_contiguous(memory_format=torch.channels_last) for x in (*seen, out))


@pytest.mark.parametrize("shape", [(2, 3, 700, 40, 512), (1, 2, 256, 64, 256), (2, 1, 1030, 8, 300)])
def test_attention_in_blocks_is_attention(shape):
    """In float64 to rounding; in bfloat16 within some of its own."""
    batch, heads, queries, width, keys = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, n, heads * width, dtype=torch.float64).unflatten(2, (heads, width)).transpose(1, 2)
               for n in (queries, keys, keys))  # fmt: skip
    true = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        assert (in_blocks(q, k, v) - true).abs().max() <= 1e-12
        rounded = in_blocks(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert rounded.transpose(1, 2).flatten(2).is_contiguous()
        assert (rounded.double() - true).square().mean().sqrt() <= 0.01 * true.std()


@pytest.mark.parametrize("shape", [(2, 3, 700, 40, 512), (1, 2, 256, 64, 256), (2, 1, 1030, 8, 300)])
def test_gradients_of_attention_in_blocks(shape):
    """In float64 to rounding; in bfloat16 within some of its own, as those of the fused kernel."""
    batch, heads, queries, width, keys = shape
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, heads, n, width, dtype=torch.float64, requires_grad=True) for n in (queries, keys, keys)
    ]
    above = torch.randn(batch, heads, queries, width, dtype=torch.float64)
    true = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*inputs), inputs, above)
    ours = torch.autograd.grad(InBlocks.apply(*inputs), inputs, above)
    for one, other in zip(ours, true, strict=True):
        assert (one - other).abs().max() <= 1e-11
    halves = [one.detach().bfloat16().requires_grad_() for one in inputs]
    rounded = torch.autograd.grad(InBlocks.apply(*halves), halves, above.bfloat16())
    for one, other in zip(rounded, true, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).square().mean().sqrt() <= 0.02 * other.std()


def test_blocks_are_for_large_products_of_bfloat16_alone(monkeypatch):
    """On whatever processor: the way is chosen by type and size, so the same job gives the same bits."""
    taken = []
    monkeypatch.setattr(ways, "in_blocks", lambda q, k, v: taken.append(q.shape) or q)
    q = torch.zeros(1, 1, 512, 8, dtype=torch.bfloat16)
    for has in (True, False):
        monkeypatch.setattr(ways, "multiplies_halves", lambda has=has: has)
        with torch.no_grad():
            ways.attend(q, q, q)
            ways.attend(q, q[:, :, :77], q[:, :, :77])
            ways.attend(q.float(), q.float(), q.float())
        ways.attend(q, q, q)
    assert len(taken) == 2

"""The ControlNet of a base: nothing at step 0, then gradients in order; parity with diffusers' ControlNetModel."""

import copy

import pytest
import torch
from controlnet.model.control.controlnet import ControlNet, skip_channels
from controlnet.model.control.hint import PaperHintEncoder, ReleasedHintEncoder
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import denoise
from controlnet.model.nets import load_controlnet, save_controlnet
from diffusers import ControlNetModel, UNet2DConditionModel
from helpers import randomise, small_unet
from safetensors.torch import load_file

WIDTHS = (4, 4, 8, 8)


def inputs(unet, batch=2, size=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    z = torch.randn(batch, 4, size, size, generator=g, dtype=dtype)
    text = torch.randn(batch, 5, unet.config.cross_attention_dim, generator=g, dtype=dtype)
    condition = torch.rand(batch, 3, 8 * size, 8 * size, generator=g, dtype=dtype)
    return z, torch.tensor([3, 700])[:batch], text, condition


def controlled(unet, net, z, t, text, condition):
    prompt = Prompt(text)
    return denoise(unet, z, t, prompt, net(z, t, prompt, net.prepare(condition)))


@pytest.mark.parametrize("hint", ["released", "paper"])
def test_fresh_net_changes_nothing_and_wakes_in_order(hint):
    unet = small_unet()
    net = ControlNet.from_base(unet, hint, WIDTHS)
    unet.requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    z, t, text, condition = inputs(unet)
    assert torch.equal(controlled(unet, net, z, t, text, condition), denoise(unet, z, t, Prompt(text)))

    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    awake = []
    for _ in range(3):
        optimizer.zero_grad()
        (controlled(unet, net, z, t, text, condition) - 1).square().mean().backward()
        awake.append({n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    names = {n for n, _ in net.named_parameters()}
    zeros = {n for n in names if n.startswith(("controlnet_down_blocks", "controlnet_mid_block"))}
    last_hint = {n for n in names if n.startswith("controlnet_cond_embedding.conv_out")}
    earlier_hint = {n for n in names if n.startswith("controlnet_cond_embedding")} - last_hint
    assert awake[0] == zeros
    assert len(zeros) == 2 * (len(skip_channels(unet.config)) + 1)
    assert awake[1] == names - earlier_hint
    assert awake[2] == names
    assert all(torch.equal(before[n], p) for n, p in unet.state_dict().items())


def test_twelve_and_one_zero_convolutions_for_stable_diffusion():
    widths = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)
    assert skip_channels(widths) == [320] * 4 + [640] * 3 + [1280] * 5


@pytest.mark.parametrize("encoder", [ReleasedHintEncoder, PaperHintEncoder])
@pytest.mark.parametrize("height, width", [(64, 64), (64, 128), (72, 88)])
def test_hint_is_an_eighth(encoder, height, width):
    hint = encoder(6)
    out = hint(torch.rand(1, 3, height, width))
    assert out.shape == (1, 6, height // 8, width // 8)
    assert not out.any()
    assert randomise(hint)(torch.rand(1, 3, height, width)).any()


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_parity_with_diffusers(tmp_path, dtype, limit):
    """Our folder in diffusers' classes: same control, same prediction."""
    unet = small_unet().to(dtype)
    net = randomise(ControlNet.from_base(unet, hint_widths=WIDTHS).to(dtype)).eval()
    save_controlnet(net, tmp_path)
    reference = ControlNetModel.from_pretrained(tmp_path).to(dtype).eval()  # from_pretrained reads float32
    reference.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    z, t, text, condition = inputs(unet, dtype=dtype)
    with torch.no_grad():
        ours = controlled(unet, net, z, t, text, condition)
        down, middle = reference(z, t, text, condition, return_dict=False)
        theirs = unet(z, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
        assert (theirs - denoise(unet, z, t, Prompt(text))).std() > 0.05 * theirs.std()  # control is at work
    assert (ours - theirs).abs().max() <= limit * theirs.std()


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_diffusers_files_load_here(tmp_path, order):
    """diffusers' folder in our class: same names, same tensors, same control."""
    unet = small_unet()
    reference = ControlNetModel.from_unet(
        unet, controlnet_conditioning_channel_order=order, conditioning_embedding_out_channels=WIDTHS
    )
    randomise(reference).eval()
    reference.save_pretrained(tmp_path)
    net = load_controlnet(tmp_path)
    assert net.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(p, net.state_dict()[n]) for n, p in reference.state_dict().items())
    z, t, text, condition = inputs(unet)
    with torch.no_grad():
        down, middle = reference(z, t, text, condition, return_dict=False)
        ours = net(z, t, Prompt(text), net.prepare(condition))
    for a, b in zip([*ours.down, ours.middle], [*down, middle], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_an_added_embedding_is_copied_and_read(tmp_path):
    """A base of SDXL's form: our folder in diffusers' class, pooled text and ids at work."""
    unet = small_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10,
        transformer_layers_per_block=(2, 1), use_linear_projection=True,
    ).double()  # fmt: skip
    net = randomise(ControlNet.from_base(unet, hint_widths=WIDTHS).double()).eval()
    save_controlnet(net, tmp_path)
    reference = ControlNetModel.from_pretrained(tmp_path).double().eval()
    reference.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    z, t, text, condition = inputs(unet, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    pooled = torch.randn((len(z), 10), generator=generator, dtype=torch.float64)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=torch.float64).expand(len(z), 6)
    added = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        down, middle = reference(z, t, text, condition, added_cond_kwargs=added, return_dict=False)
        ours = net(z, t, Prompt(text, pooled, ids), net.prepare(condition))
        other = net(z, t, Prompt(text, pooled.flip(0), ids), net.prepare(condition))
    for a, b in zip([*ours.down, ours.middle], [*down, middle], strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.std()
    assert (ours.middle - other.middle).std() > 1e-4 * ours.middle.std()


def test_other_embeddings_are_refused():
    with pytest.raises(ValueError, match="timestep"):
        ControlNet.from_base(small_unet(class_embed_type="timestep"))


@pytest.mark.slow
def test_parity_on_the_full_sd15_configuration(tmp_path):
    """SD 1.5's sizes with random weights, float32, batch 1, 256 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    net = randomise(ControlNet.from_base(unet), std=0.02).eval()
    assert len(net.controlnet_down_blocks) == 12
    with torch.device("meta"):
        reference = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    reference.load_state_dict(net.state_dict(), assign=True)
    reference.eval()
    z, t, text, condition = inputs(unet, batch=1, size=32)
    with torch.no_grad():
        ours = controlled(unet, net, z, t, text, condition)
        down, middle = reference(z, t, text, condition, return_dict=False)
        theirs = unet(z, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
        assert (theirs - denoise(unet, z, t, Prompt(text))).std() > 0.01 * theirs.std()
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()

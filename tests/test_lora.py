"""LoRA: what files people share do to a base, beside what diffusers and the papers' formulas do."""

import re

import peft
import pytest
import torch
from controlnet.model.adapters.lora import with_loras
from controlnet.model.adapters.lora_files import open_lora
from controlnet.model.adapters.parts import Parts
from controlnet.model.files import names
from controlnet.model.load import load_base
from controlnet.preprocessors.errors import ModelError
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

ATTENTION = re.compile(r"attn\d\.to_|self_attn\.")


@pytest.fixture(scope="module")
def base(small_base_folder):
    return load_base(str(small_base_folder / "base"))


def halves(module, rank, generator):
    """(down, up) for a module, random."""
    weight = module.weight
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
    up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.3
    return down, up


def modules(network, chosen=ATTENTION):
    kinds = (nn.Linear, nn.Conv2d)
    return {name: one for name, one in network.named_modules() if isinstance(one, kinds) and chosen.search(name)}


def write_kohya(path, base, prefixes, chosen=ATTENTION, original=False, alpha=True):
    """A file as kohya's trainer writes it, of mixed ranks; for SDXL with the original's names."""
    generator, state = torch.Generator().manual_seed(0), {}
    table = names.reverse(names.unet(base.unet.config)) if original else {}
    for part, prefix in prefixes.items():
        for k, (name, module) in enumerate(modules(Parts(base).networks[part], chosen).items()):
            full = names.renamed(name, table) if original and part == "unet" else name
            full = full if part == "unet" else "text_model." + name.removeprefix("text_model.")
            key, rank = prefix + full.replace(".", "_"), 2 + k % 3
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = halves(module, rank, generator)
            if alpha:
                state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, path)
    return path


def write_by_diffusers(folder, out):
    """A file that diffusers has written; alpha is in its metadata alone."""
    unet = StableDiffusionPipeline.from_pretrained(folder).unet
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(unet)
    told = {"unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers, **told)
    return out / "pytorch_lora_weights.safetensors"


def ours(base, *files):
    return with_loras(base, [(open_lora(path, Parts(base), base.name), scale) for path, scale in files])


def outputs(unet, encoders):
    """What the networks of a base compute of fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    added = {}
    if unet.config.addition_embed_type:
        pooled = torch.randn(2, encoders[-1].config.projection_dim, generator=generator)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}}
    ids = torch.tensor([[0, 5, 6, 1]])
    with torch.no_grad():
        read = [encoder(ids).last_hidden_state for encoder in encoders]
        return [unet(z, 300, text, **added).sample, *read]


def near(a, b, atol=1e-5):
    return all(torch.allclose(x, y, rtol=1e-4, atol=atol) for x, y in zip(a, b, strict=True))


def of(base):
    return outputs(base.unet, [encoder.network for encoder in base.encoders])


@pytest.mark.parametrize("form", ["kohya", "kohya without alpha", "convolutions", "diffusers", "diffusers 2023"])
def test_it_equals_diffusers(base, small_base_folder, tmp_path, form):
    pipeline = StableDiffusionPipeline.from_pretrained(small_base_folder / "base")
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    path = tmp_path / "it.safetensors"
    if form.startswith("kohya"):
        write_kohya(path, base, prefixes, alpha=form == "kohya")
    elif form == "convolutions":
        write_kohya(path, base, {"unet": "lora_unet_"}, re.compile(r"resnets\.\d\.conv|proj_in|downsamplers"))
    elif form == "diffusers 2023":
        generator, state = torch.Generator().manual_seed(1), {}
        for name, module in modules(base.unet).items():
            down, up = halves(module, 3, generator)
            state |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
        save_file(state, path)
    else:
        path = write_by_diffusers(small_base_folder / "base", tmp_path)
    pipeline.load_lora_weights(path, adapter_name="a")
    pipeline.set_adapters(["a"], [0.7])
    before = of(base)
    made = of(ours(base, (path, 0.7)))
    assert near(made, outputs(pipeline.unet, [pipeline.text_encoder]))
    assert not torch.allclose(made[0], before[0], atol=1e-3)


def test_sdxl_in_the_originals_names_equals_diffusers(sdxl_folder, tmp_path):
    base = load_base(str(sdxl_folder / "base"))
    path = tmp_path / "xl.safetensors"
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    write_kohya(path, base, prefixes, original=True)
    file = open_lora(path, Parts(base), "it")
    assert not file.others and set(file.changes) == set(prefixes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder / "base", add_watermarker=False)
    pipeline.load_lora_weights(path)
    theirs = outputs(pipeline.unet, [pipeline.text_encoder, pipeline.text_encoder_2])
    assert near(of(ours(base, (path, 1.0))), theirs) and not near(of(base), theirs, 1e-3)


LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "mid_block.resnets.0.conv1"


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def test_each_method_is_its_formula(base, tmp_path):
    """On a linear layer (16, 16) and a convolution (16, 16, 3, 3), with alpha 3, rank 2 or 4 and scale 0.5."""
    w, c = Parts(base).weight("unet", LINEAR), Parts(base).weight("unet", CONV)
    up, down, mid = rand(16, 2), rand(2, 16), rand(2, 2, 3, 3)
    up1, down1 = up[..., None, None], down[..., None, None]
    a1, b1, a2, b2 = rand(16, 4), rand(4, 16), rand(16, 4) + 1, rand(4, 16) - 1
    t1, t2 = rand(4, 4, 3, 3), rand(4, 4, 3, 3) + 1
    k1, k2, magnitudes = rand(4, 4), rand(4, 4) + 1, rand(16, 1).abs()
    half, dora = 0.5 * 3 / 2, w + 0.5 * 3 / 2 * up @ down
    cp = torch.einsum("rshw,ro,si->oihw", t1, rand(4, 16), rand(4, 16) + 2)
    cases = {
        "LoRA": (LINEAR, {"lora_down.weight": down, "lora_up.weight": up}, half * up @ down),
        "a 1x1 convolution's": (LINEAR, {"lora_down.weight": down1, "lora_up.weight": up1},
                                half * up @ down),
        "LoCon's mid": (CONV, {"lora_down.weight": down1, "lora_up.weight": up1,
                               "lora_mid.weight": mid}, half * torch.einsum("or,rshw,si->oihw", up, mid, down)),
        "DoRA": (LINEAR, {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitudes},
                 magnitudes * dora / dora.norm(dim=1, keepdim=True) - w),
        "LoHa": (LINEAR, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2},
                 0.5 * 3 / 4 * (a1 @ b1) * (a2 @ b2)),
        "LoHa of a convolution": (CONV, {"hada_w1_a": rand(4, 16), "hada_w1_b": rand(4, 16) + 2, "hada_t1": t1,
                                         "hada_w2_a": a2.T, "hada_w2_b": b2, "hada_t2": t2},
                                  0.5 * 3 / 4 * cp * torch.einsum("rshw,ro,si->oihw", t2, a2.T, b2)),
        "LoKr": (LINEAR, {"lokr_w1": k1, "lokr_w2": k2}, 0.5 * torch.kron(k1, k2)),
        "LoKr of factors": (LINEAR, {"lokr_w1": rand(2, 2), "lokr_w2_a": rand(8, 2), "lokr_w2_b": rand(2, 8)},
                            half * torch.kron(rand(2, 2), rand(8, 2) @ rand(2, 8))),
        "full": (CONV, {"diff": rand(16, 16, 3, 3), "diff_b": rand(16)}, 0.5 * rand(16, 16, 3, 3)),
    }  # fmt: skip
    for name, (module, tensors, delta) in cases.items():
        key, path = "lora_unet_" + module.replace(".", "_"), tmp_path / "one.safetensors"
        save_file(
            {f"{key}.{end}": t.contiguous() for end, t in tensors.items()} | {f"{key}.alpha": torch.tensor(3.0)}, path
        )
        made = ours(base, (path, 0.5)).unet.get_submodule(module)
        before = w if module == LINEAR else c
        assert torch.allclose(made.weight - before, delta, rtol=1e-4, atol=1e-5), name
        bias = base.unet.get_submodule(module).bias
        if name == "full":
            assert torch.allclose(made.bias - bias, 0.5 * rand(16), atol=1e-6)
        else:
            assert made.bias is bias


def test_the_base_stays_and_loras_add_up(base, tmp_path):
    before = {part: {k: v.clone() for k, v in net.state_dict().items()} for part, net in Parts(base).networks.items()}
    first, second = of(base), tmp_path / "b.safetensors"
    one = write_kohya(tmp_path / "a.safetensors", base, {"unet": "lora_unet_", "text_encoder": "lora_te_"})
    write_kohya(second, base, {"unet": "lora_unet_"}, re.compile("proj_in|attn1"))
    ab, ba = of(ours(base, (one, 0.8), (second, -0.3))), of(ours(base, (second, -0.3), (one, 0.8)))
    assert near(ab, ba, 1e-6) and not near(ab, of(ours(base, (one, 0.8))), 1e-3)
    nothing = ours(base, (one, 0.0))
    assert nothing.unet is base.unet and all(torch.equal(a, b) for a, b in zip(first, of(base), strict=True))
    for part, network in Parts(base).networks.items():
        assert all(torch.equal(v, before[part][k]) for k, v in network.state_dict().items())
    made = ours(base, (second, 1.0))
    assert made.unet.conv_in.weight is base.unet.conv_in.weight and made.encoders[0].network is base.encoders[0].network
    assert type(made.unet) is type(base.unet) and made.unet.config == base.unet.config


def test_it_says_what_applies(base, tmp_path):
    path = write_kohya(tmp_path / "a.safetensors", base, {"unet": "lora_unet_", "text_encoder": "lora_te_"})
    file = open_lora(path, Parts(base), "it")
    count = len(modules(base.unet)), len(modules(base.encoders[0].network))
    assert file.count() == f"unet {count[0]} of {count[0]}, text_encoder {count[1]} of {count[1]}"
    state = load_file(path)
    key = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    save_file(state | {f"{key}.lora_down.weight": rand(2, 9), f"{key}.lora_up.weight": rand(9, 2)}, path)
    file = open_lora(path, Parts(base), "it")
    assert file.count().endswith("text_encoder_2 0 of 1") and file.first_other.startswith(key)


def test_what_cannot_be_applied_is_an_error(base, sdxl_folder, tmp_path):
    path, key = tmp_path / "a.safetensors", "lora_unet_" + LINEAR.replace(".", "_")
    whole = {f"{key}.lora_down.weight": rand(2, 16), f"{key}.lora_up.weight": rand(16, 2)}
    wrong = {
        "no LoRA: none of its 1 tensors": {"model.weight": rand(2, 2)},
        "0 of its 1 changes apply": {"lora_unet_double_blocks_0.lora_down.weight": rand(2, 9),
                                     "lora_unet_double_blocks_0.lora_up.weight": rand(9, 2)},
        r"is for a module of \(16, 24\), the base's is \(16, 16\)": whole | {f"{key}.lora_down.weight": rand(2, 24)},
        "has no other half": {f"{key}.lora_up.weight": rand(16, 2), f"{key}.alpha": rand(1)},
        r"holds OFT \(.*oft_blocks\)": whole | {"lora_unet_x.oft_blocks": rand(2, 2)},
        "1 keys of no known form, such as extra": whole | {"extra": rand(2)},
        "holds NaN": whole | {f"{key}.lora_up.weight": rand(16, 2) * float("nan")},
        "LoKr cannot be computed": {f"{key}.lokr_w1": rand(3, 3), f"{key}.lokr_w2": rand(4, 4)},
        r"magnitudes \(1, 9\)": whole | {f"{key}.dora_scale": rand(1, 9)},
        "LoHa with DoRA": {f"{key}.hada_w1_a": rand(16, 2), f"{key}.hada_w1_b": rand(2, 16),
                           f"{key}.dora_scale": rand(1)},
    }  # fmt: skip
    for message, state in wrong.items():
        save_file(state, path)
        with pytest.raises(ModelError, match=message):
            ours(base, (path, 1.0))
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        ours(base, (path, 1.0))
    xl = load_base(str(sdxl_folder / "base"))
    write_kohya(path, xl, {"unet": "lora_unet_"}, re.compile(r"attn2\.to_k"))
    save_file({k.replace("down_blocks_1", "down_blocks_0"): v for k, v in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"for texts of width 2048|SDXL, the base is"):
        ours(base, (path, 1.0))

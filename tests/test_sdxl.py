"""SDXL: two text encoders, pooled text and size in the time embedding; equal to diffusers' pipelines."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from controlnet.cli.main import main
from controlnet.model.control.controlnet import ControlNet
from controlnet.model.control.strength import Strength
from controlnet.model.files import names
from controlnet.model.files.convert import convert
from controlnet.model.files.families import SDXL
from controlnet.model.files.layouts import open_model
from controlnet.model.load import load_base, with_vae
from controlnet.model.nets import load_controlnet
from controlnet.model.sampling.canvas import canvas_size, condition_tensor
from controlnet.model.sampling.loop import ActiveNet, sample
from controlnet.model.sampling.schedulers import make_scheduler
from controlnet.model.sampling.starts import FromNoise
from controlnet.model.work.batch import read_jobs
from controlnet.model.work.jobs import Job, make_job
from controlnet.model.work.replay import read_recorded
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.errors import ModelError
from controlnet.preprocessors.files import whole_path
from controlnet.preprocessors.images import png_bytes
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from helpers import CANVAS, NEGATIVE, PROMPT, randomise, sdxl_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel


def test_texts_are_diffusers_own(sdxl_folder, sdxl_pipeline):
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    c_t, _, pooled, _ = sdxl_pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, device="cpu")
    ours = base.encode_text([PROMPT])
    assert ours.c_t.shape[-1] == 2048
    assert (ours.c_t - c_t).abs().max() <= 1e-9 * c_t.std() and (ours.pooled - pooled).abs().max() <= 1e-9
    c_t, _, pooled, _ = sdxl_pipeline.encode_prompt(
        PROMPT, prompt_2=NEGATIVE, clip_skip=1, do_classifier_free_guidance=False, device="cpu"
    )
    other = base.encode_text([PROMPT], [NEGATIVE], 1)
    assert (other.c_t - c_t).abs().max() <= 1e-9 * c_t.std() and (other.pooled - pooled).abs().max() <= 1e-9
    assert (other.c_t - ours.c_t).std() > 0.01 * c_t.std() and (other.pooled - ours.pooled).std() > 0
    assert base.cut_words("cube " * 60).startswith("cube") and not base.cut_words("cube")


@pytest.mark.parametrize("scheduler", [None, "ddim", "dpm++2m"])
@pytest.mark.parametrize("control_on", ["both", "cond"])
def test_parity_with_diffusers_pipeline(sdxl_folder, sdxl_pipeline, scheduler, control_on):
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    net = load_controlnet(sdxl_folder / "net", torch.float64, base.unet.config, base.name)
    condition = np.repeat((np.random.default_rng(0).random((*CANVAS[::-1], 1)) < 0.1).astype(np.uint8) * 255, 3, 2)
    hint = condition_tensor(condition)[None].double()
    sdxl_pipeline.scheduler = make_scheduler(base.scheduler, scheduler)
    start = FromNoise.seeded([5, 6], (4, CANVAS[1] // 8, CANVAS[0] // 8))
    start.noise = start.noise.double()
    prompt, negative = sdxl_prompts(base)
    with torch.no_grad():
        theirs = sdxl_pipeline(
            [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, image=hint, latents=start.noise, guidance_scale=5.0,
            num_inference_steps=5, output_type="latent", width=CANVAS[0], height=CANVAS[1],
            controlnet_conditioning_scale=0.8, guess_mode=control_on == "cond",
        ).images  # fmt: skip
        # diffusers' guess mode has weights of its own, from 0.1 to 1.
        weighting = tuple(np.logspace(-1, 0, net.connections)) if control_on == "cond" else "uniform"

        def ours(scale):
            acting = [ActiveNet(net, net.prepare(hint), Strength(scale, weighting=weighting, control_on=control_on))]
            own = make_scheduler(base.scheduler, scheduler)
            return sample(base.unet, own, start, prompt, negative, acting, 5, 5.0)

        images, without = ours(0.8), ours(0.0)
    assert (images - without).std() > 0.001 * images.std()  # control is at work
    assert (images - theirs).abs().max() <= (
        1e-9 if control_on == "both" else 1e-6
    ) * theirs.std()  # its weights are float32


@pytest.mark.parametrize("form", [
    {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": 1},
    {"transformer_layers_per_block": (0, 0, 1)},
], ids=["small", "mid"])  # fmt: skip
def test_small_nets_are_diffusers_own(sdxl_folder, tmp_path, form):
    """As diffusers publishes them: less attention in the copy than in the base, or none."""
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    whole = ControlNetModel.from_pretrained(sdxl_folder / "net").config
    config = {k: v for k, v in dict(whole).items() if not k.startswith("_")} | form
    torch.manual_seed(0)
    reference = randomise(ControlNetModel(**config)).double().eval()
    reference.save_pretrained(tmp_path)
    net = load_controlnet(tmp_path, torch.float64, base.unet.config, base.name)
    prompt, negative = sdxl_prompts(base)
    z, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([700, 700])
    condition = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    both = type(prompt).cat([negative, prompt])
    with torch.no_grad():
        added = {"text_embeds": both.pooled, "time_ids": both.ids}
        down, middle = reference(
            torch.cat([z, z]), torch.cat([t, t]), both.c_t, condition.expand(4, -1, -1, -1), added_cond_kwargs=added,
            return_dict=False,
        )  # fmt: skip
        ours = net.control(z, net.begin(t[:1], z.dtype), both, net.prepare(condition))
    for a, b in zip([*ours.down, ours.middle], [*down, middle], strict=True):
        a = a.repeat(len(b) // len(a), 1, 1, 1)  # conv_in's is shared by both halves
        assert (a - b).abs().max() <= 1e-9 * b.std()


def test_a_net_of_another_family_is_refused(sdxl_folder, small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    with pytest.raises(ModelError, match="SDXL"):
        load_controlnet(sdxl_folder / "net", base=base.unet.config, base_name="mine")
    base = load_base(str(sdxl_folder / "base"))
    with pytest.raises(ModelError, match="the base is SDXL"):
        load_controlnet(small_base_folder / "net", base=base.unet.config, base_name="mine")


def test_both_ways_and_the_same_image(sdxl_folder, tmp_path):
    """Folder, single file and back: every tensor equal; the names are those of the original layout."""
    convert(sdxl_folder / "base", tmp_path / "xl.safetensors", "original")
    with safe_open(tmp_path / "xl.safetensors", "pt") as file:
        here = set(file.keys())
    for name in ("model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.1.model.text_projection",
                 "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
                 "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"):  # fmt: skip
        assert name in here, name
    convert(tmp_path / "xl.safetensors", tmp_path / "again", "diffusers")
    before, after = open_model(sdxl_folder / "base"), open_model(tmp_path / "again")
    assert after.parts == before.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
    for part in before.parts:
        a, b = before.state(part), after.state(part)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "again", add_watermarker=False)


def test_names_at_full_size_are_diffusers_own():
    """SDXL's own sizes, without numbers: UNet, ControlNet and second text encoder."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(dict(SDXL.unet))
        net = ControlNet.from_base(unet)
    state = unet.state_dict()
    ours = names.rename(state, names.reverse(names.unet(SDXL.unet)))
    assert len(ours) == len(state) == 1680
    original = {f"model.diffusion_model.{k}": t for k, t in ours.items()}
    back = theirs.convert_ldm_unet_checkpoint(
        original, SDXL.unet | {"num_class_embeds": None, "class_embed_type": None}
    )
    assert back.keys() == state.keys() and all(back[k] is state[k] for k in state)
    config = SDXL.unet | {"conditioning_embedding_out_channels": list(net.hint_widths)}
    renamed = names.rename(net.state_dict(), names.reverse(names.controlnet(config)))
    assert len(renamed) == len(net.state_dict()) and "label_emb.0.2.bias" in renamed
    assert sum(name.startswith("zero_convs.") for name in renamed) == 18 and net.connections == 10


def test_a_vae_that_leaves_float16_goes_on_in_float32(sdxl_folder):
    """As SDXL's own does: no black picture, no NaN."""
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float16)
    base.vae.decoder.conv_in.weight.data *= 3e4
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    images = base.decode(latents)
    assert torch.isfinite(images).all() and images.std() > 0.01 and base.vae.dtype == torch.float32


@pytest.mark.parametrize("shown, expected", [
    (None, (1024, 1024)), ((768, 512), (1216, 832)), ((512, 768), (832, 1216)), ((500, 480), (1024, 1024)),
    ((3000, 1000), (1536, 640)),
])  # fmt: skip
def test_canvases_are_those_that_it_was_trained_on(sdxl_folder, shown, expected):
    base = load_base(str(sdxl_folder / "base"))
    small = canvas_size(base, shown)  # its native size is 64, not 1024
    assert all(abs(a - b / 16) <= 4 and a % 8 == 0 for a, b in zip(small, expected, strict=True))
    base.unet.register_to_config(sample_size=128)
    assert canvas_size(base, shown) == expected


def test_from_the_command_line_and_again(sdxl_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    (tmp_path / "map.canny.png").write_bytes(png_bytes(lines))
    args = ["--base", str(sdxl_folder / "base"), "--dtype", "float32", "--steps", "2", "--seed", "1", "--size", "64"]
    for out, more in (("a.png", ["--cond", f"map.canny.png,net={sdxl_folder / 'net'}"]), ("b.png", [])):
        with pytest.raises(SystemExit) as stop:
            main(["generate", *args, *more, "-p", PROMPT, "-o", out])
        assert stop.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["generate", *args, "-p", PROMPT, "--prompt2", NEGATIVE, "--clip-skip", "1", "-o", "c.png"])
    assert stop.value.code == 0 and (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    for flags, said in (
        (["--clip-skip", "2"], "has 2 layers"),
        (["--base", "tiny", "--prompt2", "x"], "one text encoder"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", *args, "-p", PROMPT, "-o", "d.png", *flags])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["replay", "c.png"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_it_is_trained_on(sdxl_folder, tmp_path, monkeypatch, capsys):
    """Pooled text and ids from the cache; the network is diffusers' afterwards."""

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / f"photos/{i}.png").write_bytes(png_bytes(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)))
        (tmp_path / f"photos/{i}.txt").write_text(f"cube {i}")
    sets = ["size=64", "max_steps=4", "batch_size=2", "held_out=2", "log_every=1", "validate_every=2", "pictures=1",
            "gradient_checkpointing=true", "learning_rate=1e-3"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                "photos",
                "--base",
                str(sdxl_folder / "base"),
                "-o",
                "run",
                "-q",
                *(w for s in sets for w in ("--set", s)),
            ]
        )
    assert stop.value.code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4]
    trained = ControlNetModel.from_pretrained(tmp_path / "run")
    assert trained.config.addition_embed_type == "text_time" and trained.add_embedding is not None


def test_clip_skip_is_an_encoder_with_fewer_layers(small_base_folder):
    """Of Stable Diffusion, whose final norm is read all the same."""
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    network = base.text_encoder
    config = type(network.config).from_dict(network.config.to_dict() | {"num_hidden_layers": 1})
    shorter = CLIPTextModel(config).double().eval()
    state = network.state_dict()
    shorter.load_state_dict({name: state[name] for name in shorter.state_dict()})
    whole, skipped = (base.encode_text([PROMPT], None, skip).c_t for skip in (0, 1))
    tokens = base.tokenizer([PROMPT], padding="max_length", max_length=base.max_tokens, return_tensors="pt").input_ids
    assert (skipped - shorter(tokens).last_hidden_state).abs().max() <= 1e-12 * skipped.std()
    assert (whole - skipped).std() > 0.01 * whole.std()


@pytest.mark.parametrize("negative", [None, ""])
def test_no_negative_prompt_is_zeros_and_an_empty_one_is_encoded(sdxl_folder, sdxl_pipeline, negative):
    """As diffusers' pipeline has it for SDXL, whose unconditional half was trained with zeros."""
    base = load_base(str(sdxl_folder / "base"), dtype=torch.float64)
    assert base.zeros_for_none and not load_base("tiny").zeros_for_none
    _, c_t, _, pooled = sdxl_pipeline.encode_prompt(PROMPT, negative_prompt=negative, device="cpu")
    ours = base.encode_text([PROMPT, negative])
    assert (ours.c_t[1] - c_t[0]).abs().max() <= 1e-9 and (ours.pooled[1] - pooled[0]).abs().max() <= 1e-9
    assert bool(ours.c_t[1].any()) == (negative == "") and ours.c_t[0].any() and ours.pooled[0].any()


def test_the_record_says_which_negative_prompt_it_was(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--dtype", "float32", "--steps", 2, "--seed", 1, "-p", PROMPT]
    for out, more in (("none.png", []), ("empty.png", ["--negative", ""])):
        assert run(*args, *more, "-o", out)[0] == 0
        assert run("replay", out)[0] == 0
    records = [read_recorded(tmp_path / name).record["negative"] for name in ("none.png", "empty.png")]
    assert records == [None, ""] and (tmp_path / "none.png").read_bytes() != (tmp_path / "empty.png").read_bytes()


def test_sizes_and_crop_that_it_is_told(sdxl_folder, tmp_path, monkeypatch, run):
    base = load_base(str(sdxl_folder / "base"))
    assert base.size_ids((72, 64)).tolist() == [[64, 72, 0, 0, 64, 72]]
    assert base.size_ids((72, 64), (1333, 9), (3, 5), (8, 16)).tolist() == [[9, 1333, 5, 3, 16, 8]]
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    seen = set()
    for i, more in enumerate(([], ["--original-size", "1333x800"], ["--crop", "30,50"], ["--target-size", "512"])):
        code, _, err = run(*args, *more, "-o", f"{i}.png")
        assert code == 0, err
        seen.add((tmp_path / f"{i}.png").read_bytes())
    assert len(seen) == 4 and run("replay", "2.png")[0] == 0
    assert "--crop: base tiny is not told" in run("generate", "-p", "a", "--crop", "1,2", "-o", "x.png")[2]
    for bad in ("1", "a,b", "-1,2", "1,2,3"):
        assert run(*args, "--crop", bad, "-o", "x.png")[0] == 2


def test_a_size_that_it_was_not_trained_on_is_said(sdxl_folder, tmp_path, run):
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "-o"]
    err = run(*args, tmp_path / "a.png", "--size", "64")[2]
    assert "not trained" not in err
    err = run(*args, tmp_path / "b.png", "--size", "64x128")[2]
    assert "was not trained on 64x128; the nearest is 48x80" in err, err


def copied(folder, place, part, **changes):
    """A copy of the base in which the config of a part says something else."""
    shutil.copytree(folder / "base", place)
    path = place / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return place


def test_what_is_no_base_for_images_from_text_is_refused_by_name(sdxl_folder, tmp_path):
    refiner = copied(sdxl_folder, tmp_path / "refiner", "unet", cross_attention_dim=1280)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(refiner / name)
    index = json.loads((refiner / "model_index.json").read_text())
    (refiner / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ModelError, match="SDXL's refiner, which is not supported"):
        load_base(str(refiner))
    with pytest.raises(ModelError, match="an inpainting base"):
        load_base(str(copied(sdxl_folder, tmp_path / "inpainting", "unet", in_channels=9)))
    with pytest.raises(ModelError, match="no folder tokenizer_2"):
        place = copied(sdxl_folder, tmp_path / "no tokenizer", "unet")
        shutil.rmtree(place / "tokenizer_2")
        load_base(str(place))
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    assert "Turbo" in load_base(str(copied(sdxl_folder, tmp_path / "t", "scheduler", **turbo))).distilled
    assert "lightning" in load_base(str(copied(sdxl_folder, tmp_path / "xl-Lightning", "unet"))).distilled
    assert not load_base(str(sdxl_folder / "base")).distilled


def test_a_base_for_few_steps_is_told(sdxl_folder, tmp_path, run):
    base = copied(sdxl_folder, tmp_path / "xl-turbo", "unet")
    args = ["generate", "--base", base, "-p", PROMPT, "--seed", 1, "-o"]
    assert "seems to be made for few steps" in run(*args, tmp_path / "a.png", "--steps", 13)[2]
    assert "few steps" not in run(*args, tmp_path / "b.png", "--steps", 1, "--guidance", 1)[2]


@pytest.mark.parametrize("name, what", [
    ("lora_controlnet", "a Control-LoRA"),
    ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight", "a ControlNet-LLLite"),
    ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
    ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "a LoRA"),
    ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
])  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, name, what):
    """Also where they hold names of a ControlNet's, as Control-LoRAs do."""
    save_file(
        {name: torch.zeros(2, 2), "input_hint_block.0.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "f.safetensors"
    )
    with pytest.raises(ModelError, match=what):
        open_model(tmp_path / "f.safetensors")


@pytest.fixture(scope="module")
def single(sdxl_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("single") / "xl.safetensors"
    convert(sdxl_folder / "base", place, "original")
    return place


def changed(single, place, change, keep=True):
    """A copy of a single file with its tensors changed; without the configs in its metadata unless `keep`."""
    tensors = load_file(single)
    with safe_open(single, "pt") as file:
        metadata = file.metadata() if keep else {}
    change(tensors)
    save_file(tensors, place, metadata)
    return place


def test_single_files_that_are_not_whole(single, tmp_path):
    """A projection missing, or as a linear layer's weight, which some files have; a table missing; a file cut off."""
    projection, table = (f"conditioner.embedders.1.model.{n}" for n in ("text_projection", "positional_embedding"))

    def pooled(path):
        return load_base(str(path)).encoders[1].network(torch.tensor([[0, 7, 8, 1]])).text_embeds

    def as_layer(tensors):
        tensors[f"{projection}.weight"] = tensors.pop(projection).T.contiguous()

    assert torch.equal(pooled(changed(single, tmp_path / "linear.safetensors", as_layer)), pooled(single))
    for name in (projection, table):
        place = changed(single, tmp_path / "lacks.safetensors", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ModelError, match="weights lack 1 tensors"):
            load_base(str(place))
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(tmp_path / "cut.safetensors"))


def test_a_refiner_in_a_single_file(single, tmp_path):
    def refine(tensors):
        for name in [name for name in tensors if "embedders.0" in name]:
            del tensors[name]
        for name in [name for name in tensors if name.endswith("attn2.to_k.weight")]:
            tensors[name] = tensors[name][:, :1280].contiguous()

    with pytest.raises(ModelError, match="SDXL's refiner"):
        load_base(str(changed(single, tmp_path / "refiner.safetensors", refine, keep=False)))


def test_nets_of_another_form_or_type(sdxl_folder, tmp_path):
    """Twelve skips as Stable Diffusion has; weights in float8, which are cast."""
    base = load_base(str(sdxl_folder / "base"))
    shutil.copytree(sdxl_folder / "net", tmp_path / "net")
    weights = tmp_path / "net/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}, weights)
    net = load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)
    assert net.add_embedding.linear_1.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="layers_per_block is 3"):
        config = json.loads((tmp_path / "net/config.json").read_text()) | {"layers_per_block": 3}
        (tmp_path / "net/config.json").write_text(json.dumps(config))
        load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)
    extra = {f"controlnet_down_blocks.{i}.{n}": torch.zeros(16, *[16, 1, 1][: 4 if n == "weight" else 0])
             for i in (9, 10, 11) for n in ("weight", "bias")}  # fmt: skip
    save_file(state | extra, weights)
    (tmp_path / "net/config.json").write_bytes((sdxl_folder / "net/config.json").read_bytes())
    with pytest.raises(ModelError, match="6 unexpected tensors"):
        load_controlnet(tmp_path / "net", base.dtype, base.unet.config, base.name)


def test_another_vae(sdxl_folder, single, small_base_folder, tmp_path, monkeypatch, run):
    """As a folder, and as a file under both layouts' names: the same picture; one of another family is refused."""
    vae = AutoencoderKL.from_pretrained(sdxl_folder / "base/vae")
    torch.manual_seed(0)
    for parameter in vae.decoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vae.save_pretrained(tmp_path / "vae")
    tensors = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "diffusers.safetensors")
    table = names.reverse(names.vae(vae.config))
    original = names.convolution_attention(names.rename(tensors, table))
    save_file({k: t.contiguous() for k, t in original.items()}, tmp_path / "original.safetensors")
    save_file({f"first_stage_model.{k}": t.contiguous() for k, t in original.items()}, tmp_path / "in base.safetensors")
    monkeypatch.chdir(tmp_path)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    assert run(*args, "-o", "own.png")[0] == 0
    made = []
    for i, place in enumerate(("vae", "diffusers.safetensors", "original.safetensors", "in base.safetensors")):
        code, _, err = run(*args, "--vae", place, "-o", f"{i}.png")
        assert code == 0, err
        made.append(read_recorded(tmp_path / f"{i}.png"))
    assert all(np.array_equal(one.pixels, made[0].pixels) for one in made)
    assert not np.array_equal(made[0].pixels, read_recorded(tmp_path / "own.png").pixels)
    assert made[1].record["vae"] == "diffusers.safetensors" and len(made[1].record["vae_sha256"]) == 64
    assert run("replay", "1.png")[0] == 0
    code, _, err = run(*args, "--vae", small_base_folder / "base/vae", "-o", "x.png")
    assert code == 5 and "SD 1.x or SD 2.x, scaling_factor 0.18215" in err, err
    assert (
        "holds no VAE" in run(*args, "--vae", sdxl_folder / "net/diffusion_pytorch_model.safetensors", "-o", "x.png")[2]
    )
    assert "no such folder or file" in run(*args, "--vae", "nowhere.safetensors", "-o", "x.png")[2]


def test_a_net_in_a_single_file_makes_the_same_image(sdxl_folder, tmp_path, monkeypatch, run):
    """In the original layout with its prefix, label_emb and all."""
    monkeypatch.chdir(tmp_path)
    assert run("models", "convert", sdxl_folder / "net", "net.safetensors", "--to", "original")[0] == 0
    with safe_open("net.safetensors", "pt") as file:
        assert "control_model.label_emb.0.2.weight" in file.keys()  # noqa: SIM118 (not a mapping)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    (tmp_path / "map.canny.png").write_bytes(png_bytes(lines))
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 2, "--seed", 1, "-p", PROMPT, "--size", 64]
    for out, net in (("a.png", sdxl_folder / "net"), ("b.png", "net.safetensors")):
        code, _, err = run(*args, "--cond", f"map.canny.png,net={net}", "-o", out)
        assert code == 0, err
    assert np.array_equal(*(read_recorded(tmp_path / name).pixels for name in ("a.png", "b.png")))


def test_a_vae_of_another_familys_base_is_refused(sdxl_folder, small_base_folder, single, tmp_path, run):
    """In a whole base its family is known; of a folder with a whole base, `vae` is taken."""
    other = tmp_path / "sd.safetensors"
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3),
               "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 768),
               "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
               "first_stage_model.decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}  # fmt: skip
    save_file(tensors, other)
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    for place, said in (
        (other, "a VAE of SD 1.x"),
        (small_base_folder / "base", "a VAE of SD 1.x or SD 2.x"),
        (sdxl_folder / "net", "a ControlNetModel, expected a VAE"),
    ):
        code, _, err = run(*args, "--vae", place, "-o", tmp_path / "x.png")
        assert code == 5 and said in err, err
    code, _, err = run(*args, "--vae", single, "-o", tmp_path / "a.png")
    assert code == 0 and run(*args, "--vae", sdxl_folder / "base", "-o", tmp_path / "b.png")[0] == 0, err
    pixels = [read_recorded(tmp_path / name).pixels for name in ("a.png", "b.png")]
    assert np.array_equal(*pixels)


def test_a_tiny_vae(sdxl_folder, tmp_path, run):
    """It reads latents as the UNet has them, for every family."""
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    code, _, err = run(*args, "--vae", tmp_path / "taesd", "-o", tmp_path / "a.png")
    assert code == 0, err


def test_a_base_without_a_vae_takes_another(sdxl_folder, tmp_path):
    """Its own networks are loaded once, however many VAEs there are."""
    base = load_base(str(sdxl_folder / "base"))
    other = with_vae(base, str(sdxl_folder / "base/vae"))
    assert other.unet is base.unet and other.encoders is base.encoders and other.vae is not base.vae
    assert other.vae_path == sdxl_folder / "base/vae"
    studio = Studio(dtype="float32")
    names = [None, str(sdxl_folder / "base/vae"), f"{sdxl_folder}/net/../base/vae"]
    jobs = [Job((), PROMPT, base=str(sdxl_folder / "base"), vae=name) for name in names]
    bases = [studio.base_for(job)[0] for job in jobs]
    assert bases[0].unet is bases[1].unet and bases[1] is bases[2]


def test_a_file_without_a_vae(single, sdxl_folder, tmp_path):
    def without(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    place = changed(single, tmp_path / "no vae.safetensors", without)
    with pytest.raises(ModelError, match="holds no VAE") as caught:
        load_base(str(place))
    assert "--vae FILE" in caught.value.hint
    assert load_base(str(place), vae=str(sdxl_folder / "base/vae")).vae is not None


def test_one_path_spelt_twice_is_one_model(sdxl_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = 255
    (tmp_path / "a.canny.png").write_bytes(png_bytes(lines))
    (tmp_path / "white.png").write_bytes(png_bytes(np.full((64, 64, 3), 255, np.uint8)))
    studio = Studio(dtype="float32")
    assert (
        studio.net(str(sdxl_folder / "base"), whole_path(f"{sdxl_folder}/net/"))[0]
        is (studio.net(str(sdxl_folder / "base"), whole_path(f"{sdxl_folder}/base/../net"))[0])
    )
    assert whole_path("white.png") == whole_path("./white.png") and whole_path("a/b") == "a/b"


def test_converting_keeps_what_no_negative_prompt_is(sdxl_folder, tmp_path):
    place = tmp_path / "other"
    shutil.copytree(sdxl_folder / "base", place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    convert(place, tmp_path / "other.safetensors", "original")
    convert(tmp_path / "other.safetensors", tmp_path / "again", "diffusers")
    assert open_model(tmp_path / "other.safetensors").index()["force_zeros_for_empty_prompt"] is False
    assert json.loads((tmp_path / "again/model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def test_second_texts(sdxl_folder, tmp_path, monkeypatch, run):
    """An empty one is none, as in diffusers and in CSV files; @FILE is read; what is cut is told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.txt").write_text("a person")
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64, "-o"]
    for name, second in (("a", None), ("b", ""), ("c", "@w.txt"), ("d", "a person")):
        more = [] if second is None else ["--prompt2", second]
        assert run(*args, f"{name}.png", *more)[0] == 0
    a, b, c, d = ((tmp_path / f"{name}.png").read_bytes() for name in "abcd")
    assert a == b and c == d and a != c
    assert run(*args, "x.png", "--prompt2", "@nofile")[0] == 2
    assert "beyond" in run(*args, "e.png", "--prompt2", "cube " * 60)[2]
    code, _, err = run(*args, "x.png", "--negative2", "a person")
    assert code == 2 and "without --negative" in err


def test_none_and_null_in_files_of_jobs():
    defaults = {"negative": "a person", "steps": 7, "base": "tiny"}
    job = make_job({"prompt": "x", "negative": None, "steps": None, "base": None}, defaults)
    assert job.negative is None and job.steps == 20 and job.base == "tiny"
    ((_, given),) = read_jobs("jobs.csv", b"prompt,negative,prompt2\na cube,,\n")
    assert make_job(given, {}).negative is None and make_job(given, {}).prompt2 is None
    assert make_job(given, defaults).negative == "a person"


def test_the_guidance_is_the_familys(sdxl_folder, small_base_folder):
    assert load_base(str(sdxl_folder / "base")).guidance == 5.0
    assert load_base(str(small_base_folder / "base")).guidance == 7.5 and load_base("tiny").guidance == 3.0


@pytest.mark.parametrize("part, changes, said", [
    ("unet", {"sample_size": [8, 8]}, "sample_size"), ("unet", {"sample_size": None}, "sample_size"),
    ("unet", {"sample_size": 0}, "sample_size"), ("unet", {"addition_time_embed_dim": 16}, "addition_time_embed_dim"),
    ("scheduler", {"timestep_spacing": "foo"}, "scheduler"), ("vae", {"scaling_factor": 0}, "scaling_factor"),
])  # fmt: skip
def test_configs_that_make_no_base(sdxl_folder, tmp_path, part, changes, said):
    with pytest.raises(ModelError, match=said):
        load_base(str(copied(sdxl_folder, tmp_path / "base", part, **changes)))


def test_tokenizers_that_do_not_fit(sdxl_folder, single, tmp_path):
    place = tmp_path / "base"
    shutil.copytree(sdxl_folder / "base", place)
    path = place / "tokenizer_2/tokenizer_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"model_max_length": 5}))
    with pytest.raises(ModelError, match="as many tokens"):
        load_base(str(place))
    with pytest.raises(ModelError, match="knows 49408 tokens"):  # CLIP's, in the place of the small network's own
        load_base(str(single)).encode_text([PROMPT])


def test_a_condition_without_a_score_is_left_out(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    lines = np.zeros((64, 64), np.uint8)
    lines[20] = lines[:, 30] = 255
    for name in ("a.canny.png", "a.seg.png"):
        (tmp_path / name).write_bytes(png_bytes(lines))
    net = f"net={sdxl_folder / 'net'}"
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    conditions = ["--cond", f"a.canny.png,{net}", "--cond", f"a.seg.png,{net}"]
    assert run(*args, *conditions, "-o", "a.png")[0] == 0
    code, out, err = run("score", "a.png")
    assert code == 0 and "canny" in out and "kind 'seg' has no score" in err
    assert run(*args, *conditions, "-n", 2, "--keep-best", 1, "-o", "best.png")[0] == 0
    assert run(*args, *conditions[2:], "-o", "b.png")[0] == 0 and run("score", "b.png")[0] == 2


def test_names_that_only_hold_a_word(sdxl_folder, tmp_path):
    for name, distilled in (("turbine_hyperreal", False), ("xl-turbo_v2", True), ("XL Lightning 4step", True)):
        assert bool(load_base(str(copied(sdxl_folder, tmp_path / name, "unet"))).distilled) is distilled


def test_a_recorded_vae_that_moved(sdxl_folder, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sdxl_folder / "base/vae", tmp_path / "vae")
    args = ["generate", "--base", sdxl_folder / "base", "--steps", 1, "--seed", 1, "-p", PROMPT, "--size", 64]
    assert run(*args, "--vae", "vae", "-o", "a.png")[0] == 0
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    assert run("replay", "a.png")[0] == 2 and run("replay", "a.png", "--vae", "elsewhere")[0] == 0


def test_offline_names_the_vae_too(run, tmp_path):
    code, _, err = run("generate", "--base", "sdxl", "--vae", "a/vae", "-p", "x", "--offline", "-o", tmp_path / "x.png")
    assert code == 5 and "base sdxl" in err and "VAE a/vae" in err


@pytest.mark.parametrize("flags", [
    ["--crop", "1,2"], ["--prompt2", "x"], ["--clip-skip", "9"], ["--weighting", "1/1"],
])  # fmt: skip
def test_what_configs_tell_is_told_before_weights_are_read(small_base_folder, tmp_path, monkeypatch, run, flags):
    """Loading a real base takes a while."""
    from controlnet.model.work import studio

    def load(*args):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr(studio, "load_base", load)
    (tmp_path / "a.canny.png").write_bytes(png_bytes(np.zeros((64, 64), np.uint8)))
    cond = f"{tmp_path / 'a.canny.png'},net={small_base_folder / 'net'}"
    args = ["generate", "--base", small_base_folder / "base", "--cond", cond, "-p", "x", "-o", tmp_path / "x.png"]
    assert run(*args, *flags)[0] == 2

"""Small random networks. Fakes are tiny real networks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from controlnet.cli.main import main
from controlnet.preprocessors.images import read_image
from diffusers import UNet2DConditionModel

torch.set_num_threads(1)  # small networks: threads cost more than they give


def randomise(module, seed=0, std=0.1):
    """Fill every all-zero tensor (the zero convolutions) with random numbers: a fresh ControlNet hides every bug."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.detach().any():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std
    return module


def small_unet(**changes):
    torch.manual_seed(0)
    config = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).eval()


def make_small_models(folder):
    """A base with random weights, in `folder/base`: f8 AutoencoderKL, two-level UNet, CLIP text encoder of two layers;
    and a ControlNet with random zero convolutions, in `folder/net`."""
    from controlnet.model.control.controlnet import ControlNet
    from controlnet.model.nets import save_controlnet
    from controlnet.model.tiny.recipe import make_tokenizer
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    tokenizer = make_tokenizer(["a red cube on a blue floor", "a person standing"] * 20, folder / "tokens")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = small_unet()
    StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")  # fmt: skip
    shutil.copy(folder / "tokens/words.txt", folder / "base/tokenizer")
    net = ControlNet.from_base(unet, hint_widths=(4, 4, 8, 8))
    save_controlnet(randomise(net), folder / "net")
    return folder


class Counter:
    """Counts the calls of a module."""

    def __init__(self, module):
        self.count, self.batches = 0, []
        self.hook = module.register_forward_pre_hook(self._call, with_kwargs=True)

    def _call(self, module, args, kwargs):
        self.count += 1
        self.batches.append(len(args[0]))


def log_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """(step, loss) of the training lines of a run's log."""
    return [(row["step"], row["loss"]) for row in log_of(folder) if "loss" in row]


def run(*args):
    """The exit code of `controlnet ARGS`, in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in args])
    return stopped.value.code


def make_small_sdxl(folder):
    """An SDXL base with random weights, narrow where the family allows it, in `folder/base`; and a ControlNet with
    random zero convolutions in `folder/net`."""
    from controlnet.model.control.controlnet import ControlNet
    from controlnet.model.nets import save_controlnet
    from controlnet.model.tiny.recipe import make_tokenizer
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    tokenizer = make_tokenizer(["a red cube on a blue floor", "a person standing"] * 20, folder / "tokens")

    def encoder(cls, width):
        return cls(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            projection_dim=20,
        ))  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=2048,
        attention_head_dim=2, use_linear_projection=True, transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, latent_channels=4, sample_size=64, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        unet=unet, vae=vae, text_encoder=encoder(CLIPTextModel, 768), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_2=encoder(CLIPTextModelWithProjection, 1280), add_watermarker=False,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
            steps_offset=1,
        ),
    ).save_pretrained(folder / "base")  # fmt: skip
    save_controlnet(randomise(ControlNet.from_base(unet, hint_widths=(4, 4, 8, 8))), folder / "net")
    return folder


PROMPT, NEGATIVE = "a red cube on a blue floor", "a person"
CANVAS = (72, 64)


def sdxl_prompts(base):
    """Two rows each of the prompt and of the negative one, on CANVAS."""
    ids = base.size_ids(CANVAS)
    return (base.encode_text([text] * 2).with_ids(ids) for text in (PROMPT, NEGATIVE))


def ellipse(height, width):
    """A mask (H, W) uint8."""
    y, x = np.mgrid[:height, :width]
    return (((x / width - 0.4) ** 2 + (y / height - 0.5) ** 2) < 0.06).astype(np.uint8) * 255


def pixels(path):
    """(picture, its PNG text) of a file."""
    return read_image(Path(path).read_bytes(), str(path))


def both(folder, cls, scheduler):
    """Our base and ControlNet, and diffusers' pipeline of them, in float64."""
    from controlnet.model.load import load_base
    from controlnet.model.nets import load_controlnet
    from controlnet.model.sampling.schedulers import make_scheduler
    from diffusers import ControlNetModel

    base = load_base(str(folder / "base"), dtype=torch.float64)
    net = load_controlnet(folder / "net", torch.float64)
    theirs = ControlNetModel.from_pretrained(folder / "net").double()
    pipeline = cls.from_pretrained(folder / "base", controlnet=theirs, safety_checker=None).to(torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(base.scheduler, scheduler)
    return base, net, pipeline


def images(folder):
    """The bytes of the PNG files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}

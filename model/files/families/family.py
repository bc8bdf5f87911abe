"""The description of a family of bases, in diffusers' config words, and what all families share.

Figures from the configs of the bases' repositories and the papers' own (github.com/CompVis/stable-diffusion
v1-inference.yaml, github.com/Stability-AI/stablediffusion v2-inference-v.yaml).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DOWN = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
UP = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "down_block_types": DOWN, "up_block_types": UP, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32, "norm_eps": 1e-5,
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408,
    "max_position_embeddings": 77, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32, "act_fn": "silu", "sample_size": 512,
    "scaling_factor": 0.18215,
}  # fmt: skip


def scheduler_config(prediction: str) -> dict[str, Any]:
    """The noise schedule of Stable Diffusion 1.x and 2.x, for `prediction` epsilon or v_prediction."""
    shared = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }
    if prediction == "epsilon":
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **shared}
    return {"_class_name": "DDIMScheduler", **shared}


PIPELINE: Mapping[str, Any] = {
    "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, "safety_checker": (None, None),
    "feature_extractor": (None, None),
}  # fmt: skip
NONE_IS_ZEROS = "force_zeros_for_empty_prompt"
"""The key of model_index.json that says whether the features of no prompt are zeros."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a family."""

    part: str = "text_encoder"
    """Its folder in diffusers' layout."""
    tokenizer: str = "tokenizer"
    """The folder of its tokenizer."""
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    """The prefix of its names in a single file."""
    open_clip: bool = False
    """Whether it has OpenCLIP's names in a single file."""
    pad_token: str = "<|endoftext|>"
    skipped: int = 0
    """How many layers at its end the family leaves out (see text.TextEncoder)."""


@dataclass(frozen=True)
class Family:
    """A family, recognised by the width of its text features and by whether it has an added embedding."""

    name: str
    width: int
    """Width of the text features: cross_attention_dim."""
    added: bool = False
    """Whether pooled text, size and crop are added to the time embedding."""
    supported: bool = True
    unet: Mapping[str, Any] = field(default_factory=dict)
    encoders: tuple[Encoder, ...] = (Encoder(),)
    predictions: tuple[str, ...] = ("epsilon",)
    """What its bases may predict. If there are several, a single file must say which."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The canvases (width, height) its bases were trained on. Empty if they were trained on one size."""
    guidance: float = 7.5
    """The default scale of the guidance, as in diffusers' pipeline."""
    vae: Mapping[str, Any] = field(default_factory=lambda: VAE)
    scheduler: Callable[[str], dict[str, Any]] = scheduler_config
    """Function from what a base predicts to the config of its scheduler."""
    sample_sizes: Mapping[str, int] = field(default_factory=dict)
    """What a base predicts -> its native size in latent cells, if it differs from `unet`'s."""
    pipeline: Mapping[str, Any] = field(default_factory=lambda: PIPELINE)
    """The entries of its model_index.json beside its parts."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks of a base, under the names of diffusers' folders."""
        return ("unet", "vae", *(encoder.part for encoder in self.encoders))

    def encoder(self, part: str) -> Encoder:
        return next(encoder for encoder in self.encoders if encoder.part == part)

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json, without the scheduler."""
        parts = {"vae": ("diffusers", "AutoencoderKL"), "unet": ("diffusers", "UNet2DConditionModel")}
        for encoder in self.encoders:
            parts[encoder.part] = ("transformers", encoder.config["architectures"][0])
            parts[encoder.tokenizer] = ("transformers", "CLIPTokenizer")
        return {**self.pipeline, **parts}

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(encoder.tokenizer for encoder in self.encoders)

"""The families of bases: what a single file does not say of its networks, in diffusers' config words.

Figures from the configs of the bases' repositories and the papers' own (github.com/CompVis/stable-diffusion
v1-inference.yaml, github.com/Stability-AI/stablediffusion v2-inference-v.yaml). A family is known by the width of its
text features, which every file's cross-attention shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parent.parent / "shipped" / "clip" / "merges.txt"
"""The merges of CLIP's byte-pair encoding (github.com/openai/CLIP, MIT), which both families use."""

_DOWN = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
_UP = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "down_block_types": _DOWN, "up_block_types": _UP, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32, "norm_eps": 1e-5,
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408,
    "max_position_embeddings": 77, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str
    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    pad_token: str
    text_prefix: str
    """Where a single file has the text encoder."""


SD1 = Family("SD 1.x", _UNET, _TEXT, "<|endoftext|>", "cond_stage_model.transformer.")
SD2 = Family(
    "SD 2.x",
    _UNET | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    # OpenCLIP ViT-H without its last layer: SD 2 reads the last but one.
    _TEXT | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
        "projection_dim": 512, "hidden_act": "gelu",
    },
    "!", "cond_stage_model.model.",
)  # fmt: skip
FAMILIES = {768: SD1, 1024: SD2}
"""By the width of the text features."""

UNSUPPORTED = {2048: "SDXL", 1280: "SDXL's refiner"}
"""Families that are known by their width and cannot be used here."""

VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32, "act_fn": "silu", "sample_size": 512,
    "scaling_factor": 0.18215,
}  # fmt: skip


def family_name(cross_attention_dim: int | None) -> str:
    """SD 1.x, SD 2.x, SDXL, or the width where it is another."""
    if isinstance(cross_attention_dim, int):
        if cross_attention_dim in FAMILIES:
            return FAMILIES[cross_attention_dim].name
        if cross_attention_dim in UNSUPPORTED:
            return UNSUPPORTED[cross_attention_dim]
    return f"another family (text features of width {cross_attention_dim})"


def scheduler_config(prediction: str) -> dict[str, Any]:
    """The noise schedule of both families, for `prediction` epsilon or v_prediction."""
    shared = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": prediction, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
    }  # fmt: skip
    if prediction == "epsilon":
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **shared}
    return {"_class_name": "DDIMScheduler", **shared}


def clip_vocabulary(merges: str) -> dict[str, int]:
    """Token -> id: 256 bytes, 256 that end a word, one a merge, two specials; 49,408, in CLIP's own order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pairs = [line.replace(" ", "") for line in merges.splitlines() if line and not line.startswith("#version")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *pairs, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}

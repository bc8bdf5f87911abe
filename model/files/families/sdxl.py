"""SDXL (Podell et al. 2023): two text encoders, of which the last layer but one is read; pooled text, size and crop are
added to the time embedding. Figures from the configs of the base's repository and
github.com/Stability-AI/generative-models (sd_xl_base.yaml)."""

from __future__ import annotations

from typing import Any

from controlnet.model.files.families.family import NONE_IS_ZEROS, TEXT, UNET, VAE, Encoder, Family

_UNET = UNET | {
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_BIG_G = TEXT | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_SIZES = (
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216),
    (1344, 768), (768, 1344), (1536, 640), (640, 1536),
)  # fmt: skip


def euler(prediction: str) -> dict[str, Any]:
    """The config of its scheduler."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "set_alpha_to_one": False,  # from here on for other schedulers, which are made from this config
        "clip_sample": False,
        "skip_prk_steps": True,
    }


SDXL = Family(
    "SDXL",
    2048,
    added=True,
    unet=_UNET,
    encoders=(
        Encoder(config=TEXT, prefix="conditioner.embedders.0.transformer.", skipped=1),
        Encoder(
            "text_encoder_2",
            "tokenizer_2",
            _BIG_G,
            "conditioner.embedders.1.model.",
            open_clip=True,
            pad_token="!",
            skipped=1,
        ),
    ),
    vae={**VAE, "scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    guidance=5.0,
    scheduler=euler,
    sizes=_SIZES,
    pipeline={"_class_name": "StableDiffusionXLPipeline", NONE_IS_ZEROS: True},
)
REFINER = Family("SDXL's refiner", 1280, added=True, supported=False)

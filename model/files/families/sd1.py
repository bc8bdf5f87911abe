"""Stable Diffusion 1.x (Rombach et al. 2022)."""

from controlnet.model.files.families.family import TEXT, UNET, Family

SD1 = Family("SD 1.x", 768, unet=UNET, text_encoder=TEXT, text_prefix="cond_stage_model.transformer.")

"""Stable Diffusion 1.x (Rombach et al. 2022)."""

from controlnet.model.files.families.family import TEXT, UNET, Encoder, Family

SD1 = Family("SD 1.x", 768, unet=UNET, encoders=(Encoder(config=TEXT, prefix="cond_stage_model.transformer."),))

"""SDXL (Podell et al. 2023): two text encoders, of which the last layer but one is read; pooled text, size and crop are
added to the time embedding. Figures from diffusers' pipeline and the base's repository."""

from controlnet.model.files.families.family import Encoder, Family

SDXL = Family(
    "SDXL",
    2048,
    added=True,
    encoders=(
        Encoder(skipped=1),
        Encoder("text_encoder_2", "tokenizer_2", open_clip=True, pad_token="!", skipped=1),
    ),
    single_files=False,
)
REFINER = Family("SDXL's refiner", 1280, added=True, supported=False)

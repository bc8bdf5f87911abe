"""SDXL (Podell et al. 2023): two text encoders, of which the last layer but one is read; pooled text, size and crop are
added to the time embedding. Figures from diffusers' pipeline and the base's repository."""

from controlnet.model.files.families.family import Encoder, Family

_SIZES = (
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216),
    (1344, 768), (768, 1344), (1536, 640), (640, 1536),
)  # fmt: skip
SDXL = Family(
    "SDXL",
    2048,
    added=True,
    encoders=(
        Encoder(skipped=1),
        Encoder("text_encoder_2", "tokenizer_2", open_clip=True, pad_token="!", skipped=1),
    ),
    sizes=_SIZES,
    single_files=False,
)
REFINER = Family("SDXL's refiner", 1280, added=True, supported=False)

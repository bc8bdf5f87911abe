"""Stable Diffusion 2.x: OpenCLIP ViT-H without its last layer, for SD 2 reads the last but one."""

from controlnet.model.files.families.family import TEXT, UNET, Encoder, Family

_TEXT = TEXT | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_UNET = UNET | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SD2 = Family(
    "SD 2.x",
    1024,
    unet=_UNET,
    encoders=(Encoder(config=_TEXT, prefix="cond_stage_model.model.", open_clip=True, pad_token="!"),),
    predictions=("epsilon", "v_prediction"),
    sample_sizes={"v_prediction": 96},  # it was trained at 768 pixels with it, at 512 with epsilon
)

"""The sizes of `tiny`: every network of the embedded model, as diffusers and transformers build them.

A latent text-to-image model in Stable Diffusion's layout: f8 VAE with 8 latent channels, CLIP text encoder, UNet with
12 skip connections and a middle block.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 40
TEXT_WIDTH = 192
VOCABULARY = 2000
LATENT_CHANNELS = 8
"""Four, as in Stable Diffusion, would lose the rims of small things: a latent place stands for 8 times 8 pixels of
three colours, 192 numbers."""
START, END = "<|startoftext|>", "<|endoftext|>"


def make_vae(width: int = 64) -> AutoencoderTiny:
    """f8, deterministic; latents are trained towards zero mean and unit deviation."""
    widths = (width,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def make_unet(size: int) -> UNet2DConditionModel:
    """12 M parameters; attention at the second and third level, 16 x 16 and 8 x 8 places at 256 pixels. Most channels
    are where objects are told apart; a wide last level would cost many weights."""
    return UNet2DConditionModel(
        sample_size=size // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 144, 96),
        layers_per_block=2,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The cosine schedule with a stochastic solver. The schedule (Nichol and Dhariwal 2021) keeps no signal at its last
    step; Stable Diffusion's scaled-linear one keeps 7 %, which shifts flat colours. It spends half of its steps where
    there is more signal than noise; linear betas spend a quarter. Deterministic solvers leave soft rims
    (benchmarks/LOG.md)."""
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="sde-dpmsolver++",
        timestep_spacing="trailing",
    )


def make_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE of at most VOCABULARY entries in CLIP's form, and `words.txt`, the words it was trained on."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    captions = list(captions)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Every byte must also exist as a word's last one, so that any text can be written.
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[START, END, *(f"{c}</w>" for c in sorted(alphabet))],
            initial_alphabet=sorted(alphabet),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    bpe.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    tokenizer.save_pretrained(folder)
    words = sorted({word.strip(",") for caption in captions for word in caption.split()})
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    return tokenizer

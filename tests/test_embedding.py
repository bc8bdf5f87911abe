"""Textual inversion: learned words in the forms people share, beside diffusers."""

import pytest
import torch
from controlnet.model.adapters.embedding import read_embedding, with_embeddings
from controlnet.model.load import load_base
from controlnet.preprocessors.errors import ModelError, UsageError
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import nn

VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
PROMPT = "a <toy> on a blue floor, <toy>"


@pytest.fixture(scope="module")
def base(small_base_folder):
    return load_base(str(small_base_folder / "base"))


def features(base, prompt=PROMPT, emphasis=False):
    with torch.no_grad():
        return base.encode_text([prompt], emphasis=emphasis)


@pytest.mark.parametrize("count", [1, 3])
def test_it_equals_diffusers(base, small_base_folder, tmp_path, count):
    path = tmp_path / "toy.safetensors"
    save_file({"<toy>": VECTORS[:count].clone()}, path)
    pipeline = StableDiffusionPipeline.from_pretrained(small_base_folder / "base")
    pipeline.load_textual_inversion(path)
    theirs = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
    made = with_embeddings(base, [read_embedding(path)])
    before = features(base).c_t
    for emphasis in (False, True):
        assert torch.allclose(features(made, emphasis=emphasis).c_t, theirs, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-2)
    # The base is as it was: the same networks, without the word.
    assert torch.equal(features(base).c_t, before) and made.encoders[0].network is base.encoders[0].network
    assert torch.equal(features(made, "a red cube").c_t, features(base, "a red cube").c_t)


def test_sdxl_pairs_equal_diffusers(sdxl_folder, tmp_path):
    base, path = load_base(str(sdxl_folder / "base")), tmp_path / "toy.safetensors"
    pair = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    save_file(pair, path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder / "base", add_watermarker=False)
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(pair[key], token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    c_t, _, pooled, _ = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    made = features(with_embeddings(base, [read_embedding(path, "<toy>")]))
    assert torch.allclose(made.c_t, c_t, atol=1e-5) and torch.allclose(made.pooled, pooled, atol=1e-5)
    save_file({"clip_l": pair["clip_l"]}, path)
    with pytest.raises(ModelError, match=r"768 wide \(SD 1.x\), the base's encoders read 768 and 1280"):
        with_embeddings(base, [read_embedding(path)])


def test_the_forms_of_files(base, tmp_path):
    forms = {
        "a.safetensors": ({"emb_params": VECTORS}, "a"),
        "b.safetensors": ({"<toy>": VECTORS[0]}, "<toy>"),
        "c.pt": (VECTORS, "c"),
        "d.bin": ({"<toy>": VECTORS}, "<toy>"),
        "e.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "toy", "step": 9}, "toy"),
        "f.pt": ({"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}), "name": None}, "f"),
    }
    for name, (content, word) in forms.items():
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
        one = read_embedding(tmp_path / name)
        expected = VECTORS[:1] if name.startswith("b") else VECTORS
        assert one.word == word and torch.equal(one.vectors[""], expected) and not one.vectors[""].requires_grad, name
        assert read_embedding(tmp_path / name, "other").word == "other"
    (tmp_path / "concept").mkdir()
    torch.save({"<toy>": VECTORS}, tmp_path / "concept/learned_embeds.bin")
    assert read_embedding(tmp_path / "concept").word == "<toy>"


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_what_is_no_embedding_is_an_error(base, tmp_path, capsys):
    path = tmp_path / "it.pt"
    wrong = {
        "holds 2 tensors": {"a": VECTORS, "b": VECTORS},
        "vectors of shape": {"a": torch.zeros(1, 2, 3)},
        "holds more than tensors": {"a": Evil()},
        "holds NaN": {"a": VECTORS * float("nan")},
        "its vectors are 9 wide, the base's encoders read 16": {"a": torch.ones(2, 9)},
        r"its vectors are 1024 wide \(SD 2.x\)": {"a": torch.ones(2, 1024)},
    }
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(ModelError, match=message):
            with_embeddings(base, [read_embedding(path)])
    assert "run" not in capsys.readouterr().out
    torch.save({"toy": VECTORS}, path)
    with pytest.raises(UsageError, match="'toy' is the word of another embedding too") as error:
        with_embeddings(base, [read_embedding(path), read_embedding(path)])
    assert error.value.hint == f"--embedding {path}:OTHERWORD"


def test_a_word_is_a_word(base, tmp_path):
    """Not a part of a longer one; in small letters or capitals; and it is not told to be unknown."""
    path = tmp_path / "toy.safetensors"
    save_file({"toy": VECTORS}, path)
    made = with_embeddings(base, [read_embedding(path)])
    encoder = made.encoders[0]
    assert encoder._tokens("Toy")[0] == [-1, -2, -3] and all(g[0] >= 0 for g in encoder._tokens("toys untoy"))
    assert encoder._tokens("a (toy)")[-2] == [-1, -2, -3]
    assert base.unknown_words("a red toy") == ["toy"] and made.unknown_words("a red Toy") == []
    two = with_embeddings(base, [read_embedding(path), read_embedding(path, "toy-2")])
    assert two.encoders[0]._tokens("toy-2, toy")[0] == [-4, -5, -6]

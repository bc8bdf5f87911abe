"""Prompts with weights: read as A1111's web UI reads them."""

import numpy as np
import pytest
import torch
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import predict
from controlnet.model.emphasis import chunks, pieces, plain
from controlnet.model.load import load_base
from hypothesis import given
from hypothesis import strategies as st

# The examples of parse_prompt_attention in modules/prompt_parser.py of A1111's web UI.
PUBLISHED = {
    "normal text": [["normal text", 1.0]],
    "an (important) word": [["an ", 1.0], ["important", 1.1], [" word", 1.0]],
    "(unbalanced": [["unbalanced", 1.1]],
    r"\(literal\]": [["(literal]", 1.0]],
    "(unnecessary)(parens)": [["unnecessaryparens", 1.1]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ["a ", 1.0], ["house", 1.5730000000000004], [" ", 1.1], ["on", 1.0], [" a ", 1.1], ["hill", 0.55],
        [", sun, ", 1.1], ["sky", 1.4641000000000006], [".", 1.1],
    ],
}  # fmt: skip


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_the_published_examples(prompt):
    found = pieces(prompt)
    assert [one.text for one in found] == [text for text, _ in PUBLISHED[prompt]]
    assert [one.weight for one in found] == pytest.approx([weight for _, weight in PUBLISHED[prompt]], rel=1e-12)


@given(st.text(alphabet="ab ,()[]:\\.12BREAK\n", max_size=60))
def test_any_text_is_read(prompt):
    found = pieces(prompt)
    assert found and all(one.weight == one.weight for one in found)
    assert plain(prompt).count("\\(") == 0
    for one in chunks(prompt, lambda text: [[ord(c)] for c in text], 7, ord(",")):
        assert len(one.ids) == len(one.weights) <= 7


def of(prompt, length=10):
    return ["".join(map(chr, one.ids)) for one in chunks(prompt, lambda t: [[ord(c)] for c in t], length, ord(","))]


def test_chunks_end_at_a_comma_at_break_or_when_they_are_full():
    assert of("") == [""] and of("abc BREAK def") == ["abc", "def"] and of("a BREAK BREAK b") == ["a", "", "b"]
    assert of("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]
    assert of("abcdef,ghijkl") == ["abcdef,", "ghijkl"]  # what follows the comma moves into the next chunk
    assert of("a" * 30 + "," + "b" * 25, 50) == ["a" * 30 + ",", "b" * 25]
    assert of("a" * 20 + "," + "b" * 40, 50) == ["a" * 20 + "," + "b" * 29, "b" * 11]  # too far from the end
    assert of("a" * 10 + ",b") == ["a" * 10, ",b"]
    grouped = chunks("abcdefghij", lambda text: [[1] * 4, [2] * 4, [3] * 4], 10, 0)
    assert [one.ids for one in grouped] == [[1] * 4 + [2] * 4, [3] * 4]  # the vectors of a word stay together


@pytest.fixture(scope="module")
def base(small_base_folder):
    base = load_base(str(small_base_folder / "base"))
    network = base.encoders[0].network
    norm = getattr(network, "text_model", network).final_layer_norm
    norm.bias.data += torch.rand(norm.bias.shape, generator=torch.Generator().manual_seed(0))  # so that a mean is there
    return base


def test_features_are_weighted_and_keep_their_mean(base):
    """Beside the formula of A1111's EmphasisOriginal, written out."""
    encoder = base.encoders[0]
    ids = encoder.tokenizer("a red cube on", padding="max_length", max_length=40, return_tensors="pt").input_ids
    with torch.no_grad():
        z = encoder.network(ids).last_hidden_state
        made = base.encode_text(["a (red:1.5) [cube] on"], emphasis=True).c_t
    words = [len(encoder.tokenizer(word, add_special_tokens=False).input_ids) for word in ("a", "red", "cube", "on")]
    weights = [1.0, *np.repeat([1, 1.5, 1 / 1.1, 1], words), *[1.0] * (39 - sum(words))]
    expected = z * torch.tensor(weights, dtype=torch.float32)[None, :, None]
    expected = expected * (z.mean() / expected.mean())
    assert torch.allclose(made, expected, atol=1e-6) and not torch.allclose(made, z, atol=1e-2)


@torch.no_grad()
def test_a_prompt_without_weights_is_as_before(base, sdxl_folder):
    for one in (base, load_base(str(sdxl_folder / "base"))):
        for text in ("a red cube, blue wall", "", None):
            plain, weighted = (one.encode_text([text], emphasis=emphasis) for emphasis in (False, True))
            assert torch.equal(plain.c_t, weighted.c_t)
            assert plain.pooled is None or torch.equal(plain.pooled, weighted.pooled)


@torch.no_grad()
def test_a_long_prompt_is_read_to_its_end(base, sdxl_folder):
    long = "a red cube on a blue floor, " * 12
    for one in (base, load_base(str(sdxl_folder / "base"))):
        whole, first = one.encode_text([long], emphasis=True), one.encode_text([long])
        assert whole.c_t.shape[1] % 40 == 0 and whole.c_t.shape[1] > 80 and first.c_t.shape[1] == 40
        # Both of SDXL's encoders have as many chunks, and the pooled text is the first chunk's.
        two = one.encode_text([long], ["a person"], emphasis=True) if len(one.encoders) > 1 else whole
        assert two.c_t.shape == whole.c_t.shape
        head = plain(long)[: len(long) // 12].rstrip(", ")
        if whole.pooled is not None:
            other = one.encode_text([f"{head} BREAK a person"], emphasis=True)
            assert torch.equal(other.pooled, one.encode_text([head]).pooled)


@torch.no_grad()
def test_prompts_of_other_lengths_do_not_change_each_other(base):
    """Beside a longer one a prompt is repeated, to which attention is the same."""
    short = base.encode_text(["a red cube"], emphasis=True)
    long = base.encode_text(["a person BREAK standing BREAK on a floor"], emphasis=True)
    both = Prompt.cat([short, base.encode_text(["a BREAK b"], emphasis=True), long])
    assert both.c_t.shape == (3, 6 * 40, 16)
    z, times = torch.randn(1, 4, 8, 8), torch.zeros(1, 32)
    for row, one in ((0, short), (2, long)):
        alone = predict(base.unet, z, times, one, None)
        beside = predict(base.unet, z, times, Prompt(both.c_t[row : row + 1]), None)
        assert torch.allclose(alone, beside, atol=1e-5)

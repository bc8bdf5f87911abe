"""LoRA, learned words and weights of words in flags, files of jobs, records and replay."""

import json

import numpy as np
import pytest
import torch
from controlnet.model.load import load_base
from controlnet.model.sampling.generate import Request, generate
from controlnet.model.work.jobs import Job
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.errors import UsageError
from controlnet.preprocessors.images import read_image
from controlnet.preprocessors.metadata import load
from safetensors.torch import save_file
from test_lora import write_kohya

PROMPT = "a red cube on a blue floor"


@pytest.fixture(scope="module")
def files(small_base_folder, tmp_path_factory):
    """A folder with the base's name, two LoRAs and a learned word."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_base(str(small_base_folder / "base"))
    write_kohya(folder / "a.safetensors", base, {"unet": "lora_unet_", "text_encoder": "lora_te_"})
    write_kohya(folder / "b.safetensors", base, {"unet": "lora_unet_"})
    save_file({"<toy>": torch.randn(2, 16)}, folder / "toy.safetensors")
    return folder


@pytest.fixture
def common(small_base_folder):
    return ["generate", "--base", small_base_folder / "base", "--steps", 2, "--seed", 7, "--dtype", "float32"]


def pixels(path):
    return read_image(path.read_bytes(), str(path))[0]


def record(path):
    return load(read_image(path.read_bytes(), str(path))[1])


def test_flags_jobs_record_and_replay(run, common, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora, word = f"{files}/a.safetensors:0.4", f"{files}/toy.safetensors"
    more = ["-p", "a <toy> cube", "--lora", lora, "--lora", f"{files}/b.safetensors", "--embedding", word]
    code, _, err = run(*common, *more, "-o", "flags.png")
    assert code == 0 and "a.safetensors: scale 0.4; applied: unet" in err and "'<toy>', of 2 vectors" in err, err
    assert "never met" not in err.replace("cube", "")
    made = record(tmp_path / "flags.png")
    assert made["lora"] == [lora, f"{files}/b.safetensors"] and made["embedding"] == [word]
    assert len(made["adapters_sha256"]) == 3 and not made["plain_prompt"]
    assert run("replay", "flags.png")[1].strip() == "identical"

    job = {"prompt": "a <toy> cube", "lora": [lora, f"{files}/b.safetensors"], "embedding": word, "out": "jobs.png"}
    plain = {"prompt": "a <toy> cube", "out": "plain.png"}
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, (job, plain, job | {"out": "again.png"}))))
    assert run(*common, "--jobs", "jobs.jsonl")[0] == 0
    for name in ("jobs.png", "again.png"):  # the base between them is as it was
        assert np.array_equal(pixels(tmp_path / name), pixels(tmp_path / "flags.png"))
    assert run(*common, "-p", "a <toy> cube", "-o", "alone.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "alone.png"), pixels(tmp_path / "plain.png"))
    assert not np.array_equal(pixels(tmp_path / "alone.png"), pixels(tmp_path / "flags.png"))

    # A LoRA that has changed is told.
    other = files / "b.safetensors"
    kept = other.read_bytes()
    write_kohya(other, load_base(str(common[2])), {"unet": "lora_unet_"}, alpha=False)
    _, out, err = run("replay", "flags.png")
    other.write_bytes(kept)
    assert "adapters_sha256" in out + err and "identical" not in out


def test_scale_0_is_none_and_lcm_takes_few_steps(run, common, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*common, "-p", PROMPT, "-o", "none.png")[0] == 0
    assert run(*common, "-p", PROMPT, "--lora", f"{files}/a.safetensors:0", "-o", "zero.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "none.png"), pixels(tmp_path / "zero.png"))
    few = ["--scheduler", "lcm", "--steps", 4, "--guidance", 1, "--lora", f"{files}/b.safetensors:0.3"]
    code, _, err = run(*common, "-p", PROMPT, *few, "-o", "few.png")
    assert code == 0 and pixels(tmp_path / "few.png").std() > 0, err
    assert run("replay", "few.png")[1].strip() == "identical"


def test_prompts_with_weights_are_recorded_and_old_ones_stay_plain(run, common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt, plain = "a (red:1.6) cube BREAK on a [blue] floor", "a red cube on a blue floor"
    for name, more in {
        "weighted": [prompt], "words": [plain], "flag": [prompt, "--plain-prompt"], "plain": [plain, "--plain-prompt"],
    }.items():  # fmt: skip
        assert run(*common, "-p", *more, "-o", f"{name}.png")[0] == 0
    images = {path.stem: pixels(path) for path in tmp_path.glob("*.png")}
    assert np.array_equal(images["words"], images["plain"])
    assert not np.array_equal(images["weighted"], images["words"])
    assert not np.array_equal(images["weighted"], images["flag"])
    for name in ("weighted", "flag"):
        assert record(tmp_path / f"{name}.png")["plain_prompt"] is (name == "flag")
        assert run("replay", f"{name}.png")[1].strip() == "identical"
    # A record of before prompts had weights.
    from controlnet.model.work.replay import Recorded, job_of

    old = record(tmp_path / "flag.png")
    del old["plain_prompt"]
    assert job_of(Recorded(tmp_path / "flag.png", images["flag"], old)).plain_prompt


def test_a_long_prompt_is_not_cut(run, common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = [f"{'a red cube on a blue floor, ' * 9} {end}" for end in ("a person", "standing")]
    for k, prompt in enumerate(ends):
        code, _, err = run(*common, "-p", prompt, "-o", f"{k}.png")
        assert code == 0 and "beyond" not in err
        code, _, err = run(*common, "-p", prompt, "--plain-prompt", "-o", f"plain{k}.png")
        assert "these words are beyond" in err
    assert np.array_equal(pixels(tmp_path / "plain0.png"), pixels(tmp_path / "plain1.png"))
    assert not np.array_equal(pixels(tmp_path / "0.png"), pixels(tmp_path / "1.png"))


def test_images_do_not_depend_on_the_length_of_their_neighbours_prompts(small_base_folder):
    base = load_base(str(small_base_folder / "base"), dtype=torch.float64)
    short, long = Request("a (red) cube", 1), Request("a person BREAK standing BREAK on a floor", 2)
    together = list(generate(base, [short, long], size=(64, 64), steps=3, emphasis=True))
    alone = [next(generate(base, [one], size=(64, 64), steps=3, emphasis=True)) for one in (short, long)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_from_python(small_base_folder, files):
    adapters = {"lora": f"{files}/a.safetensors:0.5", "embedding": (f"{files}/toy.safetensors:<toy>",)}
    job = Job(prompt="a <toy>", base=str(small_base_folder / "base"), steps=1, seed=1, **adapters)
    (image,) = Studio(dtype="float32").images(job)
    assert image.record["lora"] == (f"{files}/a.safetensors:0.5",)


@pytest.mark.parametrize("given, said", [
    ({"lora": "a.safetensors:much"}, "FILE:scale"), ({"lora": "a.safetensors:nan"}, "a finite number"),
    ({"lora": [1]}, "text or a list of texts"), ({"embedding": [""]}, "text or a list of texts"),
])  # fmt: skip
def test_what_is_wrong_is_told_at_once(given, said):
    with pytest.raises(UsageError, match=said):
        Job(prompt="x", **given)


def test_files_that_have_moved_are_found_or_told(run, common, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "toy.safetensors"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    more = ["--lora", "a.safetensors:0.5", "--embedding", "toy.safetensors"]
    assert run(*common, "-p", "a <toy>", *more, "-o", "sub/x.png")[0] == 0
    (tmp_path / "a.safetensors").rename(tmp_path / "sub/a.safetensors")  # beside the image
    assert run("replay", "sub/x.png")[1].strip() == "identical"
    (tmp_path / "sub/a.safetensors").rename(tmp_path / "else.safetensors")
    code, _, err = run("replay", "sub/x.png")
    assert code != 0 and "--lora" in err
    assert run("replay", "sub/x.png", "--lora", "else.safetensors")[1].strip() == "identical"
    code, _, err = run("replay", "sub/x.png", "--lora", "else.safetensors", "--lora", "else.safetensors")
    assert code == 2 and "the image has 1 in its record" in err


def test_jobs_of_other_lengths_and_regions_are_not_made_together(run, common, tmp_path, monkeypatch):
    """Each image of a batch is the one that is made alone, and replays."""
    monkeypatch.chdir(tmp_path)
    long = "a red cube on a blue floor, " * 9
    jobs = [{"prompt": text, "out": f"{k}.png"} for k, text in enumerate(("a cube", long, "a cube", long))]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    command = [*(word if word != "float32" else "bfloat16" for word in map(str, common))]
    assert run(*command, "--jobs", "jobs.jsonl")[0] == 0
    for k in range(4):
        assert run("replay", f"{k}.png")[1].strip() == "identical", k


def test_a_word_that_is_nowhere_is_told(run, common, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*common, "-p", "a red cube", "--embedding", f"{files}/toy.safetensors:zork", "-o", "x.png")
    assert code == 0 and "the learned word 'zork' is in none of the prompts" in err
    for word in ("", " ", ",", "BREAK", "two words", "(w)"):
        code, _, err = run(*common, "-p", "x", "--embedding", f"{files}/toy.safetensors:{word}", "-o", "y.png")
        assert (code == 0) == (word == ""), (word, err)


def test_a_damaged_file_ends_its_job_alone(run, common, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    bad = {
        "rank0": {f"{key}.lora_down.weight": torch.zeros(0, 16), f"{key}.lora_up.weight": torch.zeros(16, 0)},
        "alpha": {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.ones(2)},
        "flat": {f"{key}.lora_down.weight": down.flatten(), f"{key}.lora_up.weight": torch.tensor(1.0)},
        "twice": {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                  "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight": down.clone(),
                  "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight": up.clone()},
    }  # fmt: skip
    jobs = []
    for name, state in bad.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        jobs.append({"prompt": "x", "lora": f"{name}.safetensors", "out": f"{name}.png"})
    for name, content in {"list": [1], "numbers": {1: torch.ones(2, 16), 2: torch.ones(2, 16)}, "five": 5}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        jobs.append({"prompt": "x", "embedding": f"{name}.pt", "out": f"{name}.png"})
    jobs.insert(2, {"prompt": "x", "out": "good.png"})
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    code, _, err = run(*common, "--jobs", "jobs.jsonl")
    assert code == 6 and err.count("error:") == 7 and (tmp_path / "good.png").is_file(), err

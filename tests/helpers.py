"""Small random networks. Fakes are tiny real networks."""

import json

import pytest
import torch
from controlnet.cli.main import main
from diffusers import UNet2DConditionModel

torch.set_num_threads(1)  # small networks: threads cost more than they give


def randomise(module, seed=0, std=0.1):
    """Fill every all-zero tensor (the zero convolutions) with random numbers: a fresh ControlNet hides every bug."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.detach().any():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std
    return module


def small_unet(**changes):
    torch.manual_seed(0)
    config = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).eval()


class Counter:
    """Counts the calls of a module."""

    def __init__(self, module):
        self.count, self.batches = 0, []
        self.hook = module.register_forward_pre_hook(self._call, with_kwargs=True)

    def _call(self, module, args, kwargs):
        self.count += 1
        self.batches.append(len(args[0]))


def log_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """(step, loss) of the training lines of a run's log."""
    return [(row["step"], row["loss"]) for row in log_of(folder) if "loss" in row]


def run(*args):
    """The exit code of `controlnet ARGS`, in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in args])
    return stopped.value.code

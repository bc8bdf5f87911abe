"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) behind the interface of torch's optimisers.

Stage 1 shards the moments over the processes, stage 2 the gradients as well; the network stays whole in each of them.
States are saved whole, in the form that one process has, so any number of processes reads them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from accelerate import Accelerator
from controlnet.preprocessors.errors import UsageError
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
OURS = "batches, accumulation, clipping, precision and optimiser are set by --set"


def check_zero(config: dict[str, Any]) -> None:
    """Raises UsageError for a configuration of DeepSpeed that cannot be trained with."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        found = f"ZeRO stage {zero.get('stage', 0)} in DeepSpeed's configuration: expected 1 or 2"
        raise UsageError(found, "accelerate launch --use_deepspeed --zero_stage 2, or FSDP2, which shards weights too")
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device != "none":
            raise UsageError(f"{part}={device} in DeepSpeed's configuration: expected none", f"without {part}")
    for part in ("optimizer", "scheduler"):
        if part in config:
            raise UsageError(f"{part} in DeepSpeed's configuration: expected none", OURS)
    for part in ("fp16", "bf16"):
        if (config.get(part) or {}).get("enabled") is True:
            raise UsageError(f"{part} in DeepSpeed's configuration: expected none", "--set precision=bfloat16")


class Zero:
    """The optimiser of a module's parameters, sharded; `engine` is the module to call."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.is_main = accelerator.is_main_process
        # Batches and their accumulation are the loop's: to DeepSpeed each step is one batch of a sample a process.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": accelerator.num_processes,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
        }
        with quiet():
            self.engine, _ = accelerator.prepare(module, optimizer)
        self.sharded = self.engine.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.sharded.param_groups

    def accumulating(self, last: bool) -> None:
        """Whether the next backward pass is the last one of a step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def clip(self, norm: float) -> float:
        """The next step clips the whole gradient to `norm`; returns the norm that it has."""
        self.sharded.clip_grad = norm
        return float(self.sharded.scaled_global_norm())

    def step(self) -> None:
        with quiet():
            self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a step has done it."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW has it. All processes call it; the moments are in that of the first one."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [group | {"params": list(range(len(self.parameters)))} for group in self.param_groups]
        state: dict[int, dict[str, Any]] = {}
        flat = list(self.sharded.optimizer.state.values())
        for number, p in enumerate(self.parameters if flat else []):
            whole = {name: safe_get_full_optimizer_state(p, name) for name in MOMENTS}
            if self.is_main:
                state[number] = {"step": flat[0]["step"].clone()} | whole  # each counts for itself
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the moments, whole or none, and the settings of the groups."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for own, kept in zip(self.param_groups, saved["param_groups"], strict=True):
            own.update({name: value for name, value in kept.items() if name != "params"})
        if not saved["state"]:
            return
        step = next(iter(saved["state"].values()))["step"]
        for flat in self.sharded.single_partition_of_fp32_groups:
            self.sharded.optimizer.state[flat] = {
                "step": torch.as_tensor(step, dtype=torch.float32).clone(),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        self.sharded._lazy_init_hp_params_optimizer_state()
        for number, p in enumerate(self.parameters):
            for name in MOMENTS:
                safe_set_full_optimizer_state(p, saved["state"][number][name], name)

    def take_parameters(self) -> None:
        """Go on from what the parameters hold now: DeepSpeed updates copies of its own."""
        self.sharded.refresh_fp32_params()


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed reports by its logger, by print and by torch's warnings what is no concern of a user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

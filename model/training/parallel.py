"""Several processes that train one network together, by Accelerate.

DDP is the default: each process has the whole network and a part of each batch, and gradients are averaged while the
backward pass goes on. `accelerate launch` with a configuration for FSDP2 shards weights, gradients, moments and average
instead, with one for DeepSpeed gradients and moments (zero.py). Variables of the environment say which process this is,
whoever launched it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    is_deepspeed_available,
    reduce,
)
from controlnet.model.training.zero import Zero, check_zero
from controlnet.preprocessors.errors import UsageError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

SHARDED_CONFIG = "accelerate launch --use_fsdp --fsdp_version 2"


def take_apart() -> None:
    """Disconnect this process from the others, when all is done: threads of Gloo that are there when the interpreter
    ends may abort the process (pytorch issue 190489). Not after an error, when others may wait for this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Parallel:
    """This process and the others. `count` of them, of which this one is `index`; the first one is `is_main`."""

    def __init__(self, device: torch.device):
        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not is_deepspeed_available():
            raise UsageError("DeepSpeed is not installed", "pip install 'controlnet-toolkit[deepspeed]'")
        # Autocast, scaling and accumulation are the loop's own: they do not depend on the number of processes.
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[options])
        self.zero: Zero | None = None
        self._shard_on_cpu()
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process

    def _shard_on_cpu(self) -> None:
        """Accelerate shards on accelerators only. torch and DeepSpeed do it on CPUs as well, if the launcher was asked
        for it."""
        state = self.accelerator.state
        for variable, (kind, plug_in) in ON_CPU.items():
            if os.environ.get(variable) == "true" and state.distributed_type is DistributedType.MULTI_CPU:
                for known in (PartialState, AcceleratorState):
                    known._shared_state["distributed_type"] = kind
                plug_in(state)

    @property
    def is_alone(self) -> bool:
        """Whether nothing stands between the network and its gradients: one process, that no launcher made."""
        return self.accelerator.distributed_type is DistributedType.NO

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the network only."""
        return self.accelerator.is_fsdp2

    @property
    def is_zero(self) -> bool:
        """Whether each process has a part of the moments only."""
        return self.accelerator.distributed_type is DistributedType.DEEPSPEED

    def check(self, optimizer: str, precision: str) -> None:
        """Raises UsageError for what cannot be done in several processes as they were launched."""
        kind = self.accelerator.distributed_type
        name = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}.get(kind)
        if self.is_zero:
            check_zero(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        elif kind.value not in ("NO", "MULTI_CPU", "MULTI_GPU") and not self.is_sharded:
            raise UsageError(
                f"Accelerate's configuration asks for {kind.value}: expected DDP, FSDP2 or DeepSpeed", SHARDED_CONFIG
            )
        if name is None:
            return
        if optimizer != "adamw":
            raise UsageError(f"optimizer={optimizer} needs whole matrices, {name} shards them", "--set optimizer=adamw")
        if precision == "float16":
            raise UsageError(
                f"precision=float16 with {name}: its scaled loss is not shared", "--set precision=bfloat16"
            )

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The module to call, whose gradients are shared, and the optimiser of its parameters. With FSDP2 the
        parameters inside become DTensors."""
        if self.is_sharded or self.is_zero:
            module.to(memory_format=torch.contiguous_format)  # the only one that is sharded
        if self.is_zero:
            self.zero = Zero(self.accelerator, module, optimizer)
            return self.zero.engine, self.zero
        module, prepared = self.accelerator.prepare(module, optimizer)
        for part in _sharded_in(module):
            part.set_reshard_after_forward(False)  # when one process validates, nothing is to be gathered
        return module, prepared.optimizer

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Inside, gradients are added up, and shared only if this is the last batch of a step."""
        if self.zero:
            self.zero.accumulating(last)
        with nullcontext() if last or self.zero else self.accelerator.no_sync(module):
            yield

    def backward(self, loss: Tensor) -> None:
        if self.zero:
            self.zero.backward(loss)
        else:
            loss.backward()

    def clip(self, parameters: list[nn.Parameter], norm: float) -> float:
        """Clip the whole gradient to `norm`; returns the norm that it had."""
        if self.zero:
            return self.zero.clip(norm)
        found = nn.utils.clip_grad_norm_(parameters, norm)
        return float(found.full_tensor() if isinstance(found, DTensor) else found)

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters are whole tensors in every process, so that one of them can use the network alone."""
        self.gather(module)
        try:
            yield
        finally:
            for part in _sharded_in(module):
                part.reshard()

    def gather(self, module: nn.Module) -> None:
        """Make the parameters whole tensors, until they are sharded again."""
        for part in _sharded_in(module):
            part.unshard()

    def once(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, which alone calls it; the others wait for it."""
        made = [make() if self.is_main else None]
        return broadcast_object_list(made)[0] if self.count > 1 else made[0]

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the processes."""
        return float(reduce(value, "mean")) if self.count > 1 else float(value)

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        return self.mean(torch.tensor(float(flag), device=self.accelerator.device)) > 0

    def agree(self, flag: bool) -> bool:
        """`flag`; where something is done by all processes or none, whether one of them has it set."""
        return self.any(flag) if self.is_sharded or self.is_zero else flag

    def all_of(self, value: Any) -> list[Any]:
        """The value of each process, in order."""
        return gather_object([value]) if self.count > 1 else [value]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def _plug_in_fsdp(state: AcceleratorState) -> None:
    state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _plug_in_deepspeed(state: AcceleratorState) -> None:
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    state.deepspeed_plugins = {"default": plugin}


ON_CPU = {
    "ACCELERATE_USE_FSDP": (DistributedType.FSDP, _plug_in_fsdp),
    "ACCELERATE_USE_DEEPSPEED": (DistributedType.DEEPSPEED, _plug_in_deepspeed),
}
"""The launcher's variables, and what they ask for."""


def _sharded_in(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a DTensor its shard, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Any, owner: Tensor) -> Any:
    """A whole tensor sharded and laid out in memory as `owner` is, if it has its shape; anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != owner.shape:
        return value
    if isinstance(owner, DTensor):
        return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
    # Fused optimisers take it that moments lie as their parameters do.
    return value if value.stride() == owner.stride() else torch.empty_like(owner).copy_(value)

"""Several processes that train one network together, by Accelerate.

DDP is the default: each process has the whole network and a part of each batch, and gradients are averaged while the
backward pass goes on. `accelerate launch` with a configuration for FSDP2 shards weights, gradients, moments and average
instead. Variables of the environment say which process this is, whoever launched it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    reduce,
)
from controlnet.preprocessors.errors import UsageError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

SHARDED_CONFIG = "accelerate launch --use_fsdp --fsdp_version 2"


class Parallel:
    """This process and the others. `count` of them, of which this one is `index`; the first one is `is_main`."""

    def __init__(self, device: torch.device):
        options = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        # Autocast, scaling and accumulation are the loop's own: they do not depend on the number of processes.
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[options])
        self._shard_on_cpu()
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process

    def _shard_on_cpu(self) -> None:
        """Accelerate shards on accelerators only. torch does it on CPUs as well, if the launcher was asked for it."""
        wanted = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        state = self.accelerator.state
        if wanted and state.distributed_type is DistributedType.MULTI_CPU:
            for known in (PartialState, AcceleratorState):
                known._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the network only."""
        return self.accelerator.is_fsdp2

    def check(self, optimizer: str, precision: str) -> None:
        """Raises UsageError for what cannot be done in several processes as they were launched."""
        kind = self.accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") and not self.is_sharded:
            raise UsageError(f"Accelerate's configuration asks for {kind}: expected DDP or FSDP2", SHARDED_CONFIG)
        if not self.is_sharded:
            return
        if optimizer != "adamw":
            raise UsageError(f"optimizer={optimizer} needs whole matrices, FSDP2 shards them", "--set optimizer=adamw")
        if precision == "float16":
            raise UsageError("precision=float16 with FSDP2: its scaled loss is not shared", "--set precision=bfloat16")

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module to call, whose gradients are shared, and the optimiser of its parameters. With FSDP2 the
        parameters inside become DTensors."""
        if self.is_sharded:
            module.to(memory_format=torch.contiguous_format)  # the only one that it shards
        module, prepared = self.accelerator.prepare(module, optimizer)
        for part in _sharded_in(module):
            part.set_reshard_after_forward(False)  # when one process validates, nothing is to be gathered
        return module, prepared.optimizer

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Inside, gradients are added up, and shared only if this is the last batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(module)

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
        return self.any(flag) if self.is_sharded else flag

    def all_of(self, value: Any) -> list[Any]:
        """The value of each process, in order."""
        return gather_object([value]) if self.count > 1 else [value]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def _sharded_in(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: of a DTensor its shard, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Any, owner: Tensor) -> Any:
    """A whole tensor sharded as `owner` is, if it has its shape; anything else as it is."""
    if not isinstance(owner, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape == owner.shape:
        return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
    return value

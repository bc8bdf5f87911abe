"""An engine runs the two networks of an evaluation. All engines run the one walk of control/unet.py; a result of one
differs from another's by rounding alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from controlnet.model.control.control import Control
from controlnet.model.control.net import Net
from controlnet.model.control.prompt import Prompt
from controlnet.model.control.unet import predict
from torch import Tensor


class Engine(Protocol):
    """Arguments and results are those of `Net.control` and of `unet.predict`."""

    name: str
    alone: bool
    """Whether images are sampled one by one: an engine that has a graph for each shape would need more of them for no
    gain."""

    def weights(self, network: Any, path: Path, part: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors that need not be read from a model's file, because the engine has kept them for its graphs of this
        network; by name."""

    def control(self, net: Net, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> Control: ...

    def predict(self, unet: Any, z: Tensor, time: Tensor, prompt: Prompt, control: Control | None) -> Tensor: ...


class Eager:
    """torch, one operation after another: nothing to prepare, any shape."""

    name = "eager"
    alone = False

    def weights(self, network: Any, path: Path, part: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {}

    def control(self, net: Net, z: Tensor, time: Tensor, prompt: Prompt, feature: Any) -> Control:
        return net.control(z, time, prompt, feature)

    def predict(self, unet: Any, z: Tensor, time: Tensor, prompt: Prompt, control: Control | None) -> Tensor:
        return predict(unet, z, time, prompt, control)

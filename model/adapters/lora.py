"""LoRA: a base whose weights are changed by files. Each change is computed by peft in float32 and added to the weight.

W' = W + sum of scale * alpha / rank * up @ down (Hu et al. 2021, arXiv 2106.09685, section 4.1), and in place of
`up @ down` what LoHa, LoKr (Yeh et al. 2023, arXiv 2309.14859) and DoRA (Liu et al. 2024, arXiv 2402.09353) have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from controlnet.model.adapters.lora_files import Change, LoraFile
from controlnet.model.adapters.parts import Parts, laid_out_as, with_tensors
from controlnet.model.base import Base
from controlnet.preprocessors.errors import ModelError
from peft.tuners import loha, lokr, lora
from torch import Tensor, nn

State = dict[str, Tensor]


@torch.no_grad()
def with_loras(base: Base, loras: Sequence[tuple[LoraFile, float]]) -> Base:
    """The base under LoRAs, each with its scale. It shares every tensor that they do not change; `base` stays as it is.
    A scale of 0 changes nothing. Raises ModelError for a file that cannot be read."""
    parts = Parts(base)
    acting = [(file, scale, file.tensors()) for file, scale in loras if scale != 0]
    changed: dict[str, dict[str, Tensor]] = {}
    for part in parts.networks:
        # A module at a time: no more than its own changes are in memory in float32.
        changed[part] = {}
        for name in dict.fromkeys(module for file, _, _ in acting for module in file.changes.get(part, {})):
            module: Any = parts.module(part, name)
            sums: State = {}
            for file, scale, state in acting:
                change = file.changes.get(part, {}).get(name)
                deltas = {} if change is None else _deltas(file, part, change, module, state, scale)
                sums |= {key: sums[key] + delta if key in sums else delta for key, delta in deltas.items()}
            for key, delta in sums.items():
                weight = getattr(module, key)
                changed[part][f"{name}.{key}"] = laid_out_as(weight.float() + delta, weight)
    return with_tensors(base, changed)


def _deltas(file: LoraFile, part: str, change: Change, module: Any, state: State, scale: float) -> State:
    """What a change adds to the parameters of its module, float32."""
    try:
        own = {what: state[key].to(module.weight.device, torch.float32) for what, key in change.keys.items()}
        scaling = scale * file.scaling(part, change, own.pop("alpha", None))
        found = {}
        if "diff_b" in own:
            found["bias"] = scale * own.pop("diff_b").reshape(module.bias.shape)
        if change.method == "full" and "diff" in own:
            found["weight"] = scale * own["diff"].reshape(module.weight.shape)
        elif change.method != "full":
            found["weight"] = METHODS[change.method](_bare(module), own, change.rank, scaling)
        return found
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # tensors and settings that do not go together fail in a dozen ways
        raise ModelError(
            f"{file.path}: {next(iter(change.keys.values()))}: its {change.method} cannot be computed"
            f" ({type(error).__name__}: {error})",
            "a file that its trainer wrote whole",
        ) from error


def _bare(module: Any) -> nn.Module:
    """A float32 layer of a module's shape and weight, for peft."""
    with torch.device("meta"):
        if isinstance(module, nn.Conv2d):
            sides: dict[str, Any] = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding")}
            bare: Any = nn.Conv2d(module.in_channels, module.out_channels, **sides, bias=False)
        else:
            bare = nn.Linear(module.in_features, module.out_features, bias=False)
    bare.weight = nn.Parameter(module.weight.float(), requires_grad=False)
    return bare


def _lora(bare: Any, own: State, rank: int, scaling: float) -> Tensor:
    """Of linear layers and convolutions (LoCon); with DoRA if there are magnitudes. `mid` is a convolution between
    `down` and `up`, which is one with `down`."""
    is_conv = isinstance(bare, nn.Conv2d)
    down, up = own["down"], own["up"]
    if "mid" in own:
        down = torch.einsum("omhw,mi->oihw", own["mid"], down.flatten(1))
    config = peft.LoraConfig(init_lora_weights=False, use_dora="dora" in own)
    make: Any = lora.Conv2d if is_conv else lora.Linear
    layer = make(bare, "it", config=config, r=rank, lora_alpha=scaling * rank)
    shape = (-1, bare.weight.shape[1], *bare.weight.shape[2:])
    layer.lora_A["it"].weight = nn.Parameter(down.reshape(shape))
    layer.lora_B["it"].weight = nn.Parameter(up.reshape(len(bare.weight), -1, *([1, 1] if is_conv else [])))
    if "dora" not in own:
        return layer.get_delta_weight("it")
    magnitude = layer.lora_magnitude_vector["it"]
    if own["dora"].shape[0] != len(bare.weight) or own["dora"].numel() != len(bare.weight):
        raise ValueError(f"magnitudes {tuple(own['dora'].shape)}, one for each output is read")
    magnitude.weight = nn.Parameter(own["dora"].reshape(magnitude.weight.shape))
    before = bare.weight.clone()
    layer.merge(safe_merge=True)
    return layer.get_base_layer().weight - before


def _lycoris(make: dict[type, Any], config: Any, names: Sequence[str]) -> Callable[..., Tensor]:
    """Of a method of LyCORIS: peft's layer with the file's tensors in place of its own."""

    def delta(bare: Any, own: State, rank: int, scaling: float) -> Tensor:
        layer = make[type(bare)](bare, "it", config=config, r=rank, alpha=scaling * rank)
        for name in names:
            tensors = getattr(layer, name)
            if "it" in tensors:
                del tensors["it"]
            if name in own:
                tensors["it"] = nn.Parameter(own[name])
        return layer.get_delta_weight("it")

    return delta


METHODS: dict[str, Callable[..., Tensor]] = {
    "LoRA": _lora,
    "DoRA": _lora,
    "LoHa": _lycoris(
        {nn.Linear: loha.Linear, nn.Conv2d: loha.Conv2d}, peft.LoHaConfig(), loha.LoHaLayer.adapter_layer_names
    ),
    "LoKr": _lycoris(
        {nn.Linear: lokr.Linear, nn.Conv2d: lokr.Conv2d}, peft.LoKrConfig(), lokr.LoKrLayer.adapter_layer_names
    ),
}
"""How a method's change is computed: (layer of its module, tensors, rank, scaling) -> what is added to the weight."""

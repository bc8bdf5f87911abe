"""The models of a studio: every base, ControlNet and choice of adapters is loaded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

from controlnet.model.base import Base, maps_weights
from controlnet.model.engines.choose import engine_name, make_engine
from controlnet.model.engines.engine import Engine
from controlnet.model.files.hashes import model_hash
from controlnet.model.load import has_vae, load_base, with_vae
from controlnet.model.nets import load_net
from controlnet.model.sampling.generate import Encoded
from controlnet.model.work.adapted import adapted
from controlnet.model.work.sources import Sources
from controlnet.preprocessors.devices import choose_device, choose_dtype
from torch import nn


class Models:
    """Arguments are those of `Studio`. Raises UsageError for an engine that cannot be had."""

    def __init__(
        self,
        device: str | None,
        dtype: str | None,
        offline: bool,
        low_memory: bool,
        engine: str | None,
        say: Callable[[str], None],
    ):
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.offline, self.low_memory, self.engine, self.say = offline, low_memory, engine, say
        self.sources = Sources(offline)
        self.made_engine = cache(partial(make_engine, say=say))
        if engine is not None:  # what is wrong with it comes out before anything is loaded
            self.made_engine(engine_name(engine, self.device, self.dtype, low_memory, 0))
        self.bases: dict[tuple[str, str | None], tuple[Base, Encoded]] = {}
        self.adapted = lru_cache(1 if self.device.type == "cuda" else 2)(self._adapted)
        self.net = cache(self._net)

    def base(self, name: str, vae: str | None) -> tuple[Base, Encoded]:
        """A base, with another VAE if one is named, and the texts that it has encoded."""
        if (name, vae) not in self.bases:
            self.bases[name, vae] = self._base(name, vae)
        return self.bases[name, vae]

    def _base(self, name: str, vae: str | None) -> tuple[Base, Encoded]:
        if vae is not None and has_vae(name, self.offline):  # everything else of it is loaded once
            base, encoded = self.base(name, None)
            return with_vae(base, vae, self.offline), encoded
        base = load_base(name, self.device, self.dtype, self.offline, self.low_memory, vae, self._engine_for)
        dtype = str(self.dtype).removeprefix("torch.")
        how = "" if base.engine.name == "eager" else f" by {base.engine.name}"
        self.say(f"base {name} on {self.device} in {dtype}{how}; no safety checker runs")
        return base, Encoded()

    def _engine_for(self, parameters: int) -> Engine:
        return self.made_engine(engine_name(self.engine, self.device, self.dtype, self.low_memory, parameters))

    def _adapted(
        self, name: str, vae: str | None, loras: tuple[str, ...], words: tuple[str, ...]
    ) -> tuple[Base, Encoded]:
        """A base under LoRAs and with learned words. What of each LoRA applies is said."""
        base, encoded = self.base(name, vae)
        if not (loras or words):
            return base, encoded
        under = adapted(base, loras, words, self.sources, self.say)
        if under.unet is not base.unet and self.engine is None and base.engine.alone:
            under.engine = self.made_engine("eager")  # each choice of LoRAs and scales would need a graph of its own
        return under, Encoded()

    def _net(self, base_name: str, source: str) -> tuple[Any, str]:
        """A ControlNet that fits the base, and its hash."""
        base, _ = self._plain_base(base_name)
        path = self.sources.find(source)
        spare = maps_weights(self.low_memory, base.device, base.engine)
        net = load_net(path, base.dtype, base.unet.config, base.name, base.engine, spare)
        return net if self.low_memory else nn.Module.to(net, base.device), model_hash(path)

    def _plain_base(self, name: str) -> tuple[Base, Encoded]:
        """A loaded base of this name, whichever VAE it has."""
        return next((pair for (known, _), pair in self.bases.items() if known == name), None) or self.base(name, None)

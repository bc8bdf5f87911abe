"""diffusers and transformers, imported without what nothing here needs of them: it takes a third of a start."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from controlnet.preprocessors.imports import uncollected


def import_libraries() -> None:
    """Import both libraries. They would import scipy, peft and bitsandbytes wherever these are installed: transformers
    for losses of detectors, diffusers for quantised models, LoRA of its own, one spacing of steps and one scheduler;
    these two get their parts of scipy when they ask for them."""
    if "diffusers" in sys.modules:
        return
    with uncollected():
        _import_both()
    gc.freeze()  # what is there now stays, and need not be looked at each time


def _import_both() -> None:
    with hidden("scipy", "peft", "bitsandbytes"):
        import transformers.modeling_utils  # noqa: F401
    for name in ("scipy.stats", "scipy.integrate"):
        sys.modules.setdefault(name, Later(name))
    with hidden("peft", "bitsandbytes"):
        import diffusers.models.unets.unet_2d_condition
        import diffusers.schedulers  # noqa: F401


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """While this lasts, these modules cannot be imported, if they are not there already."""
    absent: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class Later(ModuleType):
    """Stands for a module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # what looks at every module asks for these
            raise AttributeError(name)
        for later in [key for key, module in sys.modules.items() if isinstance(module, Later)]:
            del sys.modules[later]  # all of them: a module may need the parts of another one
        return getattr(importlib.import_module(self.__name__), name)

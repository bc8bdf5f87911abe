"""Schedulers by the names that users know: one row each. The names need no diffusers."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from controlnet.preprocessors.errors import UsageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # latents leave [-1, 1]
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Name -> class of diffusers and what differs from the base's own scheduler config."""


def check_scheduler_name(name: str) -> None:
    """Raises UsageError for a name that is not in the table."""
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, 1)
        raise UsageError(
            f"unknown scheduler {name!r}: expected one of {', '.join(SCHEDULERS)}",
            f"--scheduler {near[0] if near else 'ddim'}",
        )


def name_of(scheduler: SchedulerMixin) -> str:
    """Our name of a scheduler, by its class and what the table says of its config; its class's name if it is none of
    ours."""
    own = type(scheduler).__name__
    ours = {name: options for name, (cls, options) in SCHEDULERS.items() if cls == own}
    fits = [name for name, options in ours.items() if options.items() <= dict(scheduler.config).items()]
    return max(fits, key=lambda name: len(ours[name]), default=next(iter(ours), own))


def make_scheduler(own: SchedulerMixin, name: str | None = None) -> SchedulerMixin:
    """A fresh scheduler with the noise schedule of the base's `own` one: of its class, or of the named one.

    Raises UsageError for an unknown name.
    """
    if name is None:
        return type(own).from_config(own.config)
    import diffusers

    check_scheduler_name(name)
    cls, options = SCHEDULERS[name]
    return getattr(diffusers, cls).from_config(own.config, **options)

"""Does it work yet? A verdict on the control-gap curve of a run. Needs no torch.

Training a ControlNet is sudden: for hundreds or thousands of steps the images ignore the condition, then they follow it
(paper section 3.4, Fig. 4). The loss hardly shows it. The control gap does, long before the eye: the loss with another
pair's condition minus the loss with the true one, on fixed held-out pairs, noise and timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EXPECTED_STEPS = 10_000
"""By then the paper's networks had converged (section 3.4)."""
IN_A_ROW = 3
"""Validations above the noise band that make a convergence."""


@dataclass(frozen=True)
class Verdict:
    """`word` is waiting, converged or overdue; `step` is where it converged."""

    word: str
    text: str
    step: int | None = None
    causes: list[str] = field(default_factory=list)


def verdict(rows: list[dict], settings: dict, facts: dict) -> Verdict:
    """rows: the log's validations (`step`, `control_gap`, `band`). settings: the run's, of TrainConfig. facts: what is
    known of the data (`line_map_brightness`, `condition_spread`)."""
    above: list[int] = []
    for row in rows:
        # The band alone is no threshold at the start, where gap and band are both next to nothing.
        clear = row["control_gap"] > max(row["band"], 1e-3 * row["validation_loss"])
        above = [*above, row["step"]] if clear else []
        if len(above) == IN_A_ROW:
            return Verdict("converged", f"converged at step {above[0]}: the condition matters", above[0])
    step = rows[-1]["step"] if rows else 0
    ended = step >= settings["max_steps"]
    if not ended and step < EXPECTED_STEPS:
        text = f"waiting: no control yet, and it comes suddenly, in the paper before step {EXPECTED_STEPS:,}"
        return Verdict("waiting", text)
    return Verdict("overdue", f"overdue: {step} optimiser steps and no control", causes=causes(step, settings, facts))


def causes(step: int, settings: dict, facts: dict) -> list[str]:
    """What may be wrong, most likely first."""
    found = []
    if facts.get("line_map_brightness", 0) > 0.5:
        found.append("polarity: the line maps are mostly white; lines must be white on black")
    if facts.get("condition_spread", 1) < 0.01:
        found.append("the conditions hardly differ from pair to pair: there is nothing to tell them apart")
    rate = settings["learning_rate"]
    if not 3e-6 <= rate <= 2e-3:
        found.append(
            f"learning_rate {rate:g} is {'low' if rate < 3e-6 else 'high'}; 1e-5 suits Stable Diffusion, 5e-4 tiny"
        )
    if step < EXPECTED_STEPS:
        fewer = f"; accumulation={settings['accumulation']} makes them dear" if settings["accumulation"] > 1 else ""
        found.append(f"too few optimiser steps: {step}, the paper's networks needed up to {EXPECTED_STEPS:,}{fewer}")
    found.append("wrong kind or pairs: look at the held-out conditions in samples.png beside their pictures")
    return found

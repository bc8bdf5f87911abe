"""Does it work yet? A verdict on the control-gap curve of a run. Needs no torch.

Control comes suddenly in training: for hundreds or thousands of steps the images ignore the condition, then they follow
it (paper section 3.3, Fig. 4). The loss hardly shows this. The control gap shows it long before the images do: it is
the loss with another pair's condition minus the loss with the true one, on fixed held-out pairs, noise and timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EXPECTED_STEPS = 10_000
"""By this step the paper's networks had converged (section 3.3)."""
IN_A_ROW = 3
"""This many validations in a row above the noise band mean convergence; as many below it mean that control is lost."""


@dataclass(frozen=True)
class Verdict:
    """`word` is waiting, begun, converged or overdue; `step` is where control began. `lost` is where control that had
    converged was gone again."""

    word: str
    text: str
    step: int | None = None
    causes: list[str] = field(default_factory=list)
    lost: int | None = None


def verdict(rows: list[dict], settings: dict, facts: dict, finished: bool = False) -> Verdict:
    """The verdict on a run. rows: the log's validations (`step`, `control_gap`, `band`, `validation_loss`). settings:
    the run's TrainConfig, as a dict. facts: what is known about the data (`line_map_brightness`, `condition_spread`).
    finished: no step will follow."""
    same: list[int] = []  # steps of the latest validations that agree: all above the band, or none
    was_clear = False
    converged, lost = None, None
    for row in rows:
        # At the start, where gap and band are both almost 0, the band alone is not a threshold.
        clear = row["control_gap"] > max(row["band"], 1e-3 * row["validation_loss"])
        same = [*same, row["step"]] if clear == was_clear else [row["step"]]
        was_clear = clear
        if len(same) == IN_A_ROW:
            if clear and converged is None:
                converged, lost = same[0], None
            elif not clear and converged is not None:
                converged, lost = None, same[0]
    if converged is not None:
        return Verdict("converged", f"converged at step {converged:,}: the condition matters", converged)
    step = rows[-1]["step"] if rows else 0
    again = f"; the control it had was lost at step {lost:,}" if lost is not None else ""
    if was_clear:
        looks = f"{len(same)} of {IN_A_ROW} looks confirm it" if len(same) > 1 else f"one look of {IN_A_ROW} so far"
        text = f"control has begun at step {same[0]:,}: {looks}"
        more = (
            "; more steps will tell: --resume --set max_steps=..." if finished or step >= settings["max_steps"] else ""
        )
        return Verdict("begun", text + more + again, same[0], lost=lost)
    if not (finished or step >= settings["max_steps"]) and step < EXPECTED_STEPS:
        text = f"waiting: no control yet, and it comes suddenly, in the paper before step {EXPECTED_STEPS:,}"
        return Verdict("waiting", text + again, lost=lost)
    found = causes(step, settings, facts)
    if lost is not None:
        found.insert(0, f"learning_rate {settings['learning_rate']:g} too high: control came and went")
    return Verdict("overdue", f"overdue: {step:,} optimiser steps and no control{again}", causes=found, lost=lost)


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
        found.append(f"too few optimiser steps: {step:,}, the paper's networks needed up to {EXPECTED_STEPS:,}{fewer}")
    found.append("wrong kind or pairs: look at the held-out conditions in samples.png beside their pictures")
    return found

"""What a studio says of jobs before it makes them: each thing once."""

from __future__ import annotations

from collections.abc import Callable

from controlnet.model.base import Base
from controlnet.model.emphasis import plain
from controlnet.model.sampling.canvas import canvas_size, trained_sizes
from controlnet.model.text import words_apart
from controlnet.model.work.batch import Wanted
from controlnet.model.work.jobs import Job

FEW = 12
"""The most steps that suit a base that was distilled for few."""


class Talk:
    """`say` is called with each line."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.told: set[str] = set()

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def of(self, one: Wanted, size: tuple[int, int], base: Base) -> None:
        """All that is worth knowing of an image that is wanted, on a canvas (width, height)."""
        self._canvas(one, size, base)
        self._distilled(one.job, base)
        self._words(one.job, base)

    def _is_new(self, text: str) -> bool:
        new = text not in self.told
        self.told.add(text)
        return new

    def _canvas(self, one: Wanted, size: tuple[int, int], base: Base) -> None:
        """The canvas: of a single job with its seeds, of many jobs once per size. Also if the base was not trained on
        it."""
        said = f"canvas {size[0]}x{size[1]}"
        if not one.name and one.job.seed is not None:
            last = one.job.seed + one.job.num - 1
            said += f", seed {last}" if one.job.num == 1 else f", seeds {one.job.seed} to {last}"
        if self._is_new(said):
            self.say(said)
            if (known := trained_sizes(base)) and size not in known:
                near = canvas_size(base, size)
                self.say(f"{base.name} was not trained on {size[0]}x{size[1]}; the nearest is {near[0]}x{near[1]}")

    def _distilled(self, job: Job, base: Base) -> None:
        """Settings that do not suit a base that was distilled for few steps."""
        guidance = base.guidance if job.guidance is None else job.guidance
        if base.distilled and (job.steps > FEW or guidance > 2) and self._is_new(job.base):
            self.warn(
                f"{job.base} seems to be made for few steps ({base.distilled}), and is asked for {job.steps} with"
                f" guidance {guidance:g}; try --steps 4 --guidance 1"
            )

    def _words(self, job: Job, base: Base) -> None:
        """Words that are not read, not known, or learned and not used."""
        texts = [text for text in (job.prompt, job.negative, job.prompt2, job.negative2) if text]
        for word in base.encoders[0].learned:
            if word not in words_apart(" ".join(texts).lower(), [word]) and self._is_new(word):
                self.warn(f"the learned word {word!r} is in none of the prompts")
        for text in filter(self._is_new, texts):
            if not job.plain_prompt:
                text = plain(text)
            elif cut := base.cut_words(text):
                self.warn(f"the text encoder reads {base.max_tokens - 2} tokens; these words are beyond: {cut}")
            if unknown := base.unknown_words(text):
                self.warn(f"{job.base} never met these words in training: {', '.join(unknown)}")

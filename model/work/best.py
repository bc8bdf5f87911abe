"""The best of a job's images: those that keep to its conditions best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby

from controlnet.model.work.batch import Wanted
from controlnet.model.work.prepared import Image
from controlnet.model.work.score import Scorer
from controlnet.model.work.studio import Studio
from controlnet.preprocessors.condition import Condition
from controlnet.preprocessors.errors import ControlNetError
from controlnet.preprocessors.kinds import kind_named

Failed = Callable[[str, ControlNetError], None]
"""Called with the name of a job and why it failed."""


def make_best(
    wanted: list[Wanted],
    count: int | None,
    studio: Studio,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Image]:
    """The wanted images as they are made, or of each job the best `count` of them. `on_step` is told how many images
    are made, parts of them included."""
    if count is None:
        yield from studio.make(wanted, failed, on_step)
    else:
        yield from best(studio.make(scorable(wanted, studio, failed), failed, on_step), count, studio, failed, say)


def scorable(wanted: list[Wanted], studio: Studio, failed: Failed) -> list[Wanted]:
    """The wanted images whose conditions can be scored; the jobs of the others fail before any image is made."""
    bad: set[int] = set()
    for job, name in {id(one.job): (one.job, one.name) for one in wanted}.values():
        try:
            conditions = studio.conditions(job)[1]
            for condition in with_score(conditions) or conditions:
                Scorer.check(condition)
        except ControlNetError as error:
            bad.add(id(job))
            failed(name, error)
    return [one for one in wanted if id(one.job) not in bad]


def with_score(conditions: list[Condition]) -> list[Condition]:
    """The conditions of kinds that have a score."""
    return [condition for condition in conditions if kind_named(condition.kind).score]


def best(
    images: Iterator[Image], count: int, studio: Studio, failed: Failed, say: Callable[[str], None]
) -> Iterator[Image]:
    """Of each job's images the `count` that keep best to their conditions, in the order of their seeds, with `score` in
    their records: the mean of each condition's main score."""
    scorer = Scorer(studio.offline)

    def scored(image: Image) -> Image:
        _, conditions = studio.conditions(image.wanted.job)
        shown = with_score(conditions)
        scores = [scorer.of_canvas(studio.shown(image), condition, "the image").main for condition in shown]
        return replace(image, record=image.record | {"score": round(sum(scores) / len(scores), 4)})

    for _, group in groupby(images, lambda image: id(image.wanted.job)):
        made = list(group)
        try:
            made = [scored(image) for image in made]
        except ControlNetError as error:
            failed(made[0].wanted.name, error)
            continue
        chosen = sorted(made, key=lambda image: -image.record["score"])[:count]
        kept = {image.wanted.seed for image in chosen}
        told = [
            f"{image.wanted.seed}: {image.record['score']:.3f}{' *' * (image.wanted.seed in kept)}" for image in made
        ]
        say(f"scores by seed, * is kept: {', '.join(told)}")
        yield from sorted(chosen, key=lambda image: image.wanted.seed)

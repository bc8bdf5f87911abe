"""What a job names: models, kinds, schedulers and files, looked for before any large library is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path
from shlex import quote

from controlnet.model.work.condition import PAINTED, REST
from controlnet.model.work.jobs import ALPHA, Job
from controlnet.preprocessors import remote
from controlnet.preprocessors.errors import InputError, ModelError
from controlnet.preprocessors.files import exists, is_file
from controlnet.preprocessors.metadata import kind_of, text_of
from controlnet.preprocessors.tars import is_member


def check_names(job: Job) -> None:
    """Raises UsageError or InputError for models, kinds, schedulers and files that do not exist. Takes a moment,
    because it loads no large library."""
    from controlnet.model.files.ids import is_hub_id
    from controlnet.model.registry import BASES, check_base_name, check_net_name, net_for
    from controlnet.model.sampling.schedulers import check_scheduler_name
    from controlnet.preprocessors.detectors.registry import find_detector

    check_base_name(job.base)
    if job.scheduler is not None:
        check_scheduler_name(job.scheduler)
    for what, source in job.adapters:
        if not (exists(source) or is_hub_id(source)):
            raise InputError(
                f"--{what} {source}: no such file or folder, and no hub id OWNER/NAME",
                f"ls {quote(str(Path(source).parent))}",
            )
    for path in (job.init, job.mask):
        if path not in (None, ALPHA) and not (exists(path) or is_member(path)):
            raise InputError(f"{path}: no such file", f"ls {quote(str(Path(path).parent))}")
    for flag in job.cond:
        for path in filter(None, (flag.path, flag.region)):
            if path not in ("-", PAINTED, REST) and not (exists(path) or is_member(path)):
                raise InputError(f"{path}: no such file", f"ls {quote(str(Path(path).parent))}")
        if flag.detect is not None:
            find_detector(flag.detect)
        if flag.net is not None:
            check_net_name(flag.net)
            continue
        kind = flag.kind or flag.detect
        if kind is None and flag.path != "-" and is_file(flag.path):
            kind = kind_of(flag.path, text_of(remote.place(flag.path)))
        if kind and job.base in BASES and net_for(BASES[job.base].family, kind) is None:
            raise no_net(flag.path, kind, job.base, BASES[job.base].family)


def no_net(path: str, kind: str, base: str, family: str) -> ModelError:
    """The error for a kind that the table has no ControlNet for."""
    from controlnet.model.registry import NETS

    has = list(dict.fromkeys(kind for net in NETS.values() if net.family == family for kind in net.kinds))
    near = difflib.get_close_matches(kind, has, 1)
    return ModelError(
        f"{path}: no ControlNet is known for kind {kind!r} on base {base}"
        + (f"; there are some for: {', '.join(has)}" if has else ""),
        f"kind={near[0]}" if near else f"--cond {path},net=FOLDER",
    )

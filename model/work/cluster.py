"""Tasks on a Ray cluster, or on one that Ray starts on this machine: Ray Data hands them to actors that hold models. An
actor that dies is started again, and its task is done again."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from controlnet.model.work.pool import Failed, Made, Outcome, Setup, Task, begin, do, make_here, make_in_processes, told
from controlnet.preprocessors.errors import ModelError, UsageError, reason

PATIENCE = 5.0
"""Seconds that a cluster gets to answer."""
INSTALL = "pip install 'controlnet-toolkit[ray]'"


def make(
    tasks: list[Task],
    setup: Setup,
    devices: list[str | None],
    ray: str | None,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Made]:
    """Do tasks on the Ray cluster at this address, else in a process for each device, else here."""
    if ray is not None:
        return make_on_ray(tasks, setup, ray, failed, say, on_step)
    if devices:
        return make_in_processes(tasks, setup, devices, failed, say, on_step)
    return make_here(tasks, setup, failed, say, on_step)


def make_on_ray(
    tasks: list[Task],
    setup: Setup,
    address: str,
    failed: Failed,
    say: Callable[[str], None],
    on_step: Callable[[float], None] = lambda images: None,
) -> Iterator[Made]:
    """Do tasks on the cluster at `address`, or on this machine if it is `local`; the images come in order. Results are
    written by the actors, so machines share a disk. Raises UsageError without Ray, ModelError for a cluster that cannot
    be reached."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed", INSTALL) from None
    here = not ray.is_initialized()
    if here:
        _connect(ray, address)
    try:
        yield from told(_in_order(ray, tasks, setup), failed, say, on_step)
    except ray.exceptions.RayError as error:
        raise ModelError(f"--ray {address}: {reason(error)}", "ray status; or --ray local") from error
    finally:
        if here:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), PATIENCE).close()  # Ray itself asks for minutes
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises a dozen types for a cluster that is gone, or of another version
        raise ModelError(f"--ray {address}: {reason(error)}", "ray status; or --ray local") from error


def _in_order(ray: Any, tasks: list[Task], setup: Setup) -> Iterator[tuple[int, Outcome]]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells its plans and counts
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = max(1, min(len(tasks), gpus or int(ray.cluster_resources().get("CPU", 1))))
    rows = [{"count": len(task.wanted), "task": pickle.dumps(task)} for task in tasks]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Actor,
        fn_constructor_args=(str(Path.cwd()), pickle.dumps(setup)),
        batch_size=1,
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else 1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    for row in results.iter_rows():
        yield row["count"], pickle.loads(row["outcome"])


class Actor:
    """A process of the cluster, with models of its own."""

    def __init__(self, folder: str, setup: bytes):
        os.chdir(folder)  # relative paths are those of the command
        begin(pickle.loads(setup))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outcomes = [pickle.dumps(do(pickle.loads(task))) for task in batch["task"]]
        return {"count": batch["count"], "outcome": outcomes}

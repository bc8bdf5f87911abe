"""A crew on a Ray cluster, or on one that Ray starts on this machine: Ray Data hands the items to actors that hold
models. An actor that dies is started again, and its item is done again."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from controlnet.model.work.crew import Crew, Item, Result
from controlnet.preprocessors.errors import ModelError, UsageError, reason

PATIENCE = 5.0
"""Seconds that a cluster gets to answer."""
INSTALL = "pip install 'controlnet-toolkit[ray]'"


def on_ray(items: list[Item], crew: Crew[Item, Result], address: str) -> Iterator[Result]:
    """The results of the items, in order, made on the cluster at `address`, or on this machine if it is `local`.
    Results are written by the actors, so machines share a disk or write to URLs. Raises UsageError without Ray,
    ModelError for a cluster that cannot be reached."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed", INSTALL) from None
    here = not ray.is_initialized()
    if here:
        _connect(ray, address)
    try:
        yield from _in_order(ray, items, crew)
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


def _in_order(ray: Any, items: list[Item], crew: Crew[Item, Result]) -> Iterator[Result]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells its plans and counts
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    gpus = int(ray.cluster_resources().get("GPU", 0)) if crew.on_devices else 0
    actors = max(1, min(len(items), gpus or int(ray.cluster_resources().get("CPU", 1))))
    rows = [{"item": pickle.dumps(item)} for item in items]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Actor,
        fn_constructor_args=(str(Path.cwd()), pickle.dumps(crew.make)),
        batch_size=1,
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else 1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    for row in results.iter_rows():
        yield pickle.loads(row["result"])


class Actor:
    """A process of the cluster, with a worker of its own. Ray gives it a device, which it sees as the only one."""

    def __init__(self, folder: str, make: bytes):
        with suppress(OSError):  # of a machine without that folder, which works with URLs
            os.chdir(folder)  # relative paths are those of the command
        self.work = pickle.loads(make)(None)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [pickle.dumps(self.work(pickle.loads(item))) for item in batch["item"]]}

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

from controlnet.model.work.crew import Crew, Item, Result, in_order
from controlnet.preprocessors.errors import ModelError, UsageError

PATIENCE = 5.0
"""Seconds that a cluster gets to answer."""
INSTALL = "pip install 'controlnet-toolkit[ray]'"
HINT = "ray status; RAY_AUTH_MODE=token and the token if the cluster asks for one; or --ray local"


def share(
    items: list[Item], crew: Crew[Item, Result], devices: list[str | None], address: str | None
) -> Iterator[Result]:
    """The results of the items, in order, made on the Ray cluster at this address, else in a process for each
    device."""
    return in_order(items, crew, devices) if address is None else on_ray(items, crew, address)


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
        raise ModelError(f"--ray {address}: {_told(error)}", HINT) from error
    finally:
        if here:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), PATIENCE).close()  # Ray itself asks for minutes
        try:
            _init(ray, address)
        except Exception:
            # A cluster that `ray start` begins where there is a token asks for it, and `ray.init` does not send it.
            if address == "local" or "RAY_AUTH_MODE" in os.environ or not _has_token():
                raise
            os.environ["RAY_AUTH_MODE"] = "token"
            ray._raylet.Config.initialize("")
            _init(ray, address)
    except Exception as error:  # Ray raises a dozen types for a cluster that is gone, or of another version
        raise ModelError(f"--ray {address}: {_told(error)}", HINT) from error


def _init(ray: Any, address: str) -> None:
    more = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level="error", **more)


def _told(error: Exception) -> str:
    """What Ray says, in one line; where versions differ, it says which in several."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _has_token() -> bool:
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(os.environ.get(name) for name in names) or (Path.home() / ".ray/auth_token").is_file()


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

# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Ray: starting it, and the scoring pipeline."""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from anomalib_osdirf.bulk.rows import Job, Worker
from anomalib_osdirf.errors import last_line
from anomalib_osdirf.progress import step
from anomalib_osdirf.terminal import verbose

_MOST_ROWS = 32  # of a task; what a killed run has done in vain
_TASKS_OF_A_WORKER = 32  # so that none waits long for another at the end
_OBJECT_STORE = 128 * 1024**2  # of paths and rows only
# A socket's path has 107 characters at most, and Ray adds sixty to its folder's.
_LONGEST_FOLDER = 40
_PATIENCE = 10  # seconds


@contextmanager
def started(address: str | None, visible: bool) -> Iterator[int]:
    """Start Ray on this machine, reachable by no other, or connect to a cluster; yield the number of CPUs.

    Raises:
        RuntimeError: If Ray can't be started or reached.
    """
    folder = None if address is not None else Path(tempfile.mkdtemp(prefix="osdirf-", dir=_short_folder()))
    try:
        with step("Starting Ray" if address is None else f"Connecting to Ray at {address}", visible):
            cpus = _start(address, folder)
        yield cpus
    finally:
        import ray

        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(address: str | None, folder: Path | None) -> int:
    _set_environment(address)
    import ray
    import ray.data

    level = logging.INFO if verbose() else logging.CRITICAL
    logging.getLogger("ray.data").setLevel(level)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE, "_temp_dir": str(folder)}
    if not verbose():
        # Whatever its settings are, Ray prints pages about a process that died; the rows say what matters of it.
        from ray._private import worker

        worker.print_to_stdstream = lambda *_, **__: None
    try:
        if address is not None:
            _knock(address)
        with nullcontext() if verbose() else _deaf():
            ray.init(
                address or "local", log_to_driver=verbose(), logging_level=level, **({} if folder is None else local)
            )
    except Exception as error:  # Ray raises what it comes upon
        msg = f"Ray can't be started ({last_line(error)})."
        if address is not None:
            msg = (
                f"--address {address!r} is no Ray cluster that answers ({last_line(error)}); on one of its machines "
                "use --address auto, and if it asks for a token, have RAY_AUTH_MODE=token in the environment."
            )
        raise RuntimeError(msg) from error
    return int(ray.cluster_resources().get("CPU", 0))


def score(paths: list[bytes], job: Job, workers: int) -> Iterator[pa.Table]:
    """Score images in a pool of workers, each with as many CPUs as threads, and yield rows as they are done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose()
    rows = max(1, min(_MOST_ROWS, len(paths) // (workers * _TASKS_OF_A_WORKER)))
    tasks = [
        pa.table({"path": pa.array(paths[start : start + rows], pa.binary())}) for start in range(0, len(paths), rows)
    ]
    try:
        scored = ray.data.from_arrow(tasks).map_batches(
            _Actor,
            fn_constructor_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=job.threads,
        )
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow")
    except Exception as error:  # Ray raises what it comes upon
        raise RuntimeError(f"Ray stopped ({last_line(error)}); the same command goes on where it was.") from error


class _Actor:
    """A worker process, which Ray restarts with its task if it dies."""

    def __init__(self, job: Job) -> None:
        import ray

        name = f"anomalib-osdirf-{ray.get_runtime_context().get_actor_id()}.json"
        self._worker = Worker(job, Path(tempfile.gettempdir()) / name)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._worker.rows(batch["path"].to_pylist())


def _knock(address: str) -> None:
    """Raise ``OSError`` if nothing answers at an address with a port: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


def _set_environment(address: str | None) -> None:
    """Set Ray's environment variables, most of which it reads on import."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # For this run alone, and keeps others on this machine out; Ray would leave a token in the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Whatever its name says, on every system it decides between the loopback address and all others.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if not verbose():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def _deaf() -> Iterator[None]:
    """Discard output to the error stream from outside Python, where Ray reports that it was told to be silent."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _short_folder() -> str | None:
    """Return a folder for temporary files whose path leaves room for Ray's sockets."""
    short = Path("/tmp")
    return str(short) if len(tempfile.gettempdir()) > _LONGEST_FOLDER and short.is_dir() else None

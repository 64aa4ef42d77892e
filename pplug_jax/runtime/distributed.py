"""Run several processes, one a host, as one job: how they meet, agree, and share arrays.

All processes run the same program on the same data, and do together what they do at the same time.
A workdir is one directory that all see. The first process alone writes its files, except that Orbax
has every process write its own arrays.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pplug_jax.errors import InputError

HEARTBEAT_SECONDS = 30  # silence after which a process counts as lost, and the job ends
SHUTDOWN_SECONDS = 30  # how long a process that is done waits for the others


def start() -> None:
    """Join the job that the environment names; without one, the process is alone.

    A job is one or several Cloud TPU slices, a SLURM step, Open MPI or an indexed Kubernetes job
    (all found by JAX), or what JAX_COORDINATOR_ADDRESS (HOST:PORT), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say. Call it before JAX is used.

    Raises:
        InputError: the variables make no sense, or the other processes do not answer.
    """
    given: dict[str, str | None] = {
        name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")
    }
    # JAX takes every pod for a member of a job, also one that somebody's notebook runs in.
    lone_pod = "KUBERNETES_SERVICE_HOST" in os.environ and not (
        {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()
    )
    try:
        numbers: Any = {name: int(value) for name, value in given.items() if value is not None}
        jax.distributed.initialize(
            **numbers,
            cluster_detection_method="deactivate" if lone_pod else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        alone = not any(given.values()) and "coordinator_address should be defined" in str(error)
        if not alone:
            raise InputError(
                f"this process could not join the others: {error}. JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set on every host, or none of them"
            ) from error


def wait_for_all(reason: str) -> None:
    """Wait until every process is here, so that all see what the first has written."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(reason)


def from_primary(value: Any) -> Any:
    """Return the first process' value, a number or an array, on every process."""
    if not jax.distributed.is_initialized():
        return value
    return multihost_utils.broadcast_one_to_all(value)


def from_all(value: np.integer) -> np.ndarray:
    """Return every process' number, (processes,), on each."""
    if not jax.distributed.is_initialized():
        return np.array([value])
    return multihost_utils.process_allgather(value).reshape(-1)


def worst_of_all(value: int) -> int:
    """Return the largest of all processes' values, on every process."""
    return int(from_all(np.int32(value)).max())


def fetch(x: jax.Array) -> np.ndarray:
    """Return the whole array on every process, wherever its shards lie."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def is_preempted(step: int) -> bool:
    """Return whether all processes must stop before the next step, because one got SIGTERM.

    Call it on every process at every step. JAX lets them agree on a step that none has passed.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

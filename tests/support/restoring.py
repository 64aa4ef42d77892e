"""One process of a job that restores a checkpoint: DIRECTORY FAILURES; the second one fails."""

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pplug_jax.errors import CheckpointError
from pplug_jax.runtime import retry
from pplug_jax.runtime.distributed import start
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.storage.checkpoint import Checkpoints


def main(directory: Path, failures: int) -> None:
    start()
    retry.WAIT = 0.01
    sharding = NamedSharding(make_mesh(1, jax.device_count(), 1), PartitionSpec("fsdp"))

    def weights(value: int) -> dict[str, jax.Array]:
        return {"vector": jax.device_put(jnp.full(8, value, jnp.float32), sharding)}

    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, weights(step), {"moment": weights(0)})
        checkpoints.wait()
    whole, calls = checkpoints.reader.restore, itertools.count()

    def restore(*args: Any) -> Any:
        if jax.process_index() == 1 and next(calls) < failures:
            raise OSError("503 Service Unavailable")
        return whole(*args)

    checkpoints.reader.restore = restore
    try:
        restored, _, step = checkpoints.restore(weights(0), {"moment": weights(0)})
        values = {float(shard.data[0]) for shard in restored["vector"].addressable_shards}
        print(f"step {step}, values {values}")
    except CheckpointError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

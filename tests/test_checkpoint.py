"""Checkpoints: which are kept, what a torn one does, and restoring onto other devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pplug_jax.checkpoint import CheckpointError, Checkpoints
from pplug_jax.mesh import make_mesh

MESHES = {"one device": (1, 1), "eight": (8, 1), "eight, sharded": (2, 4)}


def weights(mesh: Mesh, value: float = 1.0) -> dict[str, jax.Array]:
    """A matrix that is split over fsdp, a vector and a scalar on all devices."""
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(16, 12)),
        "vector": rng.normal(size=5),
        "scalar": np.ones(()),
    }
    specs = {"matrix": PartitionSpec("fsdp"), "vector": PartitionSpec(), "scalar": PartitionSpec()}
    return {
        name: jax.device_put(
            jnp.asarray(value * array, jnp.float32), NamedSharding(mesh, specs[name])
        )
        for name, array in arrays.items()
    }


def mesh_of(name: str) -> Mesh:
    data, fsdp = MESHES[name]
    return make_mesh(data, fsdp, 1, jax.devices()[: data * fsdp])


ONE = mesh_of("one device")


def saved(directory: Path, *losses: float | None, keep: int = 2) -> Checkpoints:
    """Checkpoints of the steps 1, 2, .. with these validation losses, whose arrays are the step."""
    checkpoints = Checkpoints(directory, keep)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, weights(ONE, step), {"moment": jnp.zeros(3)}, loss)
        checkpoints.wait()
    return checkpoints


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("before", MESHES)
@pytest.mark.parametrize("after", MESHES)
def test_restored_onto_other_devices_every_bit_is_the_same(
    tmp_path: Path, before: str, after: str
) -> None:
    original = weights(mesh_of(before))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, original, {"moment": original})
    checkpoints.wait()
    like = weights(mesh_of(after), 0.0)
    restored, state, step = Checkpoints(tmp_path).restore(like, {"moment": like})
    assert step == 3
    for found in (restored, state["moment"], Checkpoints(tmp_path).restore_weights(like)):
        for name, array in found.items():
            np.testing.assert_array_equal(array, original[name])
            assert array.sharding == like[name].sharding


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5.0, 3.0, 4.0, 4.5, 3.5)
    assert steps(tmp_path) == ["2", "4", "5"]
    assert (checkpoints.latest, checkpoints.best) == (5, 2)
    like = weights(ONE, 0.0)
    assert checkpoints.restore_weights(like)["scalar"] == 2
    assert checkpoints.restore(like, {"moment": jnp.ones(3)})[2] == 5


def test_without_validation_the_newest_is_the_best(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, None, None, None)
    assert steps(tmp_path) == ["2", "3"]
    assert checkpoints.best == 3


def tear(directory: Path) -> None:
    """Cuts every file of arrays to half."""
    files = [path for path in directory.glob("weights/**/d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, None, None).close()
    tear(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path)
    like = weights(ONE, 0.0)
    assert checkpoints.restore_weights(like)["scalar"] == 1
    restored, _, step = checkpoints.restore(like, {"moment": jnp.ones(3)})
    assert (step, restored["scalar"]) == (1, 1)
    assert "step 2 cannot be read" in capsys.readouterr().out
    # The step can be taken and saved again; the torn one stays for who wants to look.
    assert checkpoints.latest == 1
    checkpoints.save(2, weights(ONE, 7.0), {"moment": jnp.zeros(3)})
    checkpoints.wait()
    assert checkpoints.restore_weights(like)["scalar"] == 7
    assert steps(tmp_path) == ["1", "2", "2.torn"]


def test_where_all_are_torn_nothing_is_touched(tmp_path: Path) -> None:
    saved(tmp_path, None, None).close()
    for step in ("1", "2"):
        tear(tmp_path / step)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read \(step 2: "):
        Checkpoints(tmp_path).restore(weights(ONE), {"moment": jnp.ones(3)})
    assert steps(tmp_path) == ["1", "2"]

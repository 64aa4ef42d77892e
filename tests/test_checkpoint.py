"""Checkpoints: which are kept, what a torn one does, and restoring onto other devices."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import gcs_utils

from pplug_jax.errors import CheckpointError
from pplug_jax.runtime import retry
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.storage import checkpoint
from pplug_jax.storage.checkpoint import Checkpoints

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


def test_arrays_of_another_shape_are_of_another_version(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, None)
    other = weights(ONE) | {"vector": jnp.zeros(9)}
    with pytest.raises(
        CheckpointError, match=r"step 1 holds an array of shape \(5,\), which is \(9"
    ):
        checkpoints.restore_weights(other)
    assert steps(tmp_path) == ["1"]


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
    assert "step 2 is cut or lacks files" in capsys.readouterr().out
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
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(step 2: "):
        Checkpoints(tmp_path).restore(weights(ONE), {"moment": jnp.ones(3)})
    assert steps(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("file", ["weights/_METADATA", "weights/manifest.ocdbt", "weights/d/*"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_every_proof_that_files_are_not_whole(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    saved(tmp_path, None, None).close()
    for path in (tmp_path / "2").glob(file):
        damage(path)
    restored, _, step = Checkpoints(tmp_path).restore(weights(ONE), {"moment": jnp.ones(3)})
    if step == 2:  # Orbax can do without the list of arrays, if it is not there at all
        assert (file, damage) == ("weights/_METADATA", Path.unlink)
    assert restored["scalar"] == step


@pytest.mark.parametrize("item", ["weights", "optimizer", "."])
def test_what_is_missing_whole(tmp_path: Path, item: str) -> None:
    checkpoints = saved(tmp_path, None, None)
    (tmp_path / "2" / item).rename(tmp_path / "elsewhere")
    like = weights(ONE), {"moment": jnp.ones(3)}
    if item == ".":
        assert checkpoints.restore_weights(like[0])["scalar"] == 1
    else:
        assert checkpoints.restore(*like)[2] == 1


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    like, state = weights(ONE), {"moment": jnp.ones(3)}
    saved(tmp_path, None, None).close()
    for value in (7.0, 8.0):
        tear(tmp_path / "2")
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore(like, state)[2] == 1
        checkpoints.save(2, weights(ONE, value), {"moment": jnp.zeros(3)})
        checkpoints.wait()
        checkpoints.close()
    assert steps(tmp_path) == ["1", "2", "2.torn", "2.torn1"]
    assert Checkpoints(tmp_path).restore(like, state)[0]["scalar"] == 8


@pytest.mark.parametrize("kept", [0, 5])
def test_a_validation_loss_that_is_cut(tmp_path: Path, kept: int) -> None:
    saved(tmp_path, 2.0, 1.0).close()
    file = tmp_path / "2" / "metrics" / "metrics"
    file.write_bytes(file.read_bytes()[:kept])
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.latest, checkpoints.best) == (1, 1)
    assert checkpoints.restore_weights(weights(ONE))["scalar"] == 1
    assert steps(tmp_path) == ["1", "2.torn"]


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 9999)],
)
def test_the_data_of_a_large_array(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    large = {"large": jnp.asarray(np.random.default_rng(0).normal(size=9999), jnp.float32)}
    checkpoints, state = Checkpoints(tmp_path), {"moment": jnp.zeros(3)}
    for step in (1, 2):
        checkpoints.save(step, large, state)
        checkpoints.wait()
    checkpoints.close()
    files = (file for file in (tmp_path / "2" / "weights").rglob("*") if file.is_file())
    damage(max(files, key=lambda file: file.stat().st_size))
    assert Checkpoints(tmp_path).restore_weights(large)["large"].shape == (9999,)
    assert Checkpoints(tmp_path).restore(large, state)[2] == 1
    assert steps(tmp_path) == ["1", "2.torn"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_what_cannot_be_looked_at_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def refused(path: Any, *args: Any, **settings: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(tmp_path / "2"):
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *args, **settings)

        return refused

    monkeypatch.setattr(retry, "WAIT", 0.0)
    checkpoints = saved(tmp_path, None, None)
    with monkeypatch.context() as broken:
        for name in ("stat", "listdir", "scandir"):
            broken.setattr(os, name, refusing(getattr(os, name)))
        with pytest.raises(CheckpointError, match=r"step 2 could not be read: .*Nothing was"):
            checkpoints.restore(weights(ONE), {"moment": jnp.ones(3)})
    assert steps(tmp_path) == ["1", "2"]


@pytest.fixture
def copied(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """A copy in a bucket of what was saved on a disk."""
    # Orbax would ask the Cloud what kind of bucket it is.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    saved(tmp_path, None, 2.0).close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            target = epath.Path(bucket) / "copied" / path.relative_to(tmp_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return epath.Path(bucket) / "copied"


def test_a_copy_in_a_bucket_is_whole(
    copied: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(copied)
    assert str(checkpoints.directory) == str(copied)  # and no directory called gs: here
    assert (checkpoints.latest, checkpoints.best) == (2, 2)
    assert "passed over" not in capsys.readouterr().out


def test_a_copy_in_a_bucket_without_marks_is_told_of(
    copied: epath.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "2" / checkpoint.MARK).unlink()
    assert Checkpoints(copied).latest == 1
    assert f"{copied}/2 is passed over as unfinished: it has no" in capsys.readouterr().out


class Failing:
    """Calls `whole`, but for the first `count` times, which raise `error`."""

    def __init__(self, whole: Callable[..., Any], error: Exception, count: int):
        self.whole, self.error, self.left = whole, error, iter(range(count))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if next(self.left, None) is not None:
            raise self.error
        return self.whole(*args, **kwargs)


PASSING = [
    OSError("503 Service Unavailable"),
    OSError("HTTP 429: Too Many Requests"),
    TimeoutError("timed out"),
    ValueError('UNAVAILABLE: Error reading "gs://bucket/d": HTTP response code: 503'),
    ConnectionResetError(104, "Connection reset by peer"),
    OSError(5, "Input/output error"),
]


@pytest.mark.parametrize("error", PASSING)
def test_a_passing_error_of_a_restore_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(retry, "WAIT", 0.0)
    checkpoints = saved(tmp_path, None, None)
    checkpoints.reader.restore = Failing(checkpoints.reader.restore, error, 2)
    assert checkpoints.restore(weights(ONE), {"moment": jnp.ones(3)})[2] == 2
    assert steps(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("error", [*PASSING, PermissionError(13, "Permission denied"), KeyError()])
def test_an_error_that_stays_leaves_all_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(retry, "WAIT", 0.0)
    checkpoints = saved(tmp_path, None, None)
    checkpoints.reader.restore = Failing(checkpoints.reader.restore, error, 99)
    with pytest.raises(CheckpointError, match=r"step 2 could not be read: .*Nothing was changed"):
        checkpoints.restore(weights(ONE), {"moment": jnp.ones(3)})
    with pytest.raises(CheckpointError, match="step 2 could not be read"):
        checkpoints.restore_weights(weights(ONE))
    assert steps(tmp_path) == ["1", "2"]


@pytest.fixture
def fail_in_background(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], None]:
    """Has the next so many arrays fail to be written, after `save` has returned."""
    whole = ocp.PyTreeCheckpointHandler.async_save
    failures: list[Exception] = []

    class Broken:
        def __init__(self, error: Exception):
            self.error = error

        def result(self, timeout: float | None = None) -> None:
            raise self.error

    async def async_save(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await whole(self, *args, **kwargs) or []
        return [*futures, Broken(failures.pop())] if failures else futures

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", async_save)
    monkeypatch.setattr(retry, "WAIT", 0.0)
    return lambda error, count: failures.extend(itertools.repeat(error, count))


def test_a_passing_error_of_a_save_is_written_again(
    tmp_path: Path, fail_in_background: Callable[[Exception, int], None]
) -> None:
    checkpoints, state = Checkpoints(tmp_path), {"moment": jnp.zeros(3)}
    fail_in_background(PASSING[0], 3)
    checkpoints.save(1, weights(ONE, 1.0), state)
    checkpoints.wait()
    assert checkpoints.restore(weights(ONE), state)[2] == 1
    # The next one takes the place of one that was lost.
    fail_in_background(PASSING[0], 1)
    checkpoints.save(2, weights(ONE, 2.0), state)
    checkpoints.save(3, weights(ONE, 3.0), state)
    checkpoints.wait()
    restored, _, step = checkpoints.restore(weights(ONE), state)
    assert (step, restored["scalar"]) == (3, 3)


def test_a_full_disk_ends_the_run(
    tmp_path: Path, fail_in_background: Callable[[Exception, int], None]
) -> None:
    checkpoints, state = saved(tmp_path, None), {"moment": jnp.zeros(3)}
    fail_in_background(OSError(28, "No space left on device"), 1)
    checkpoints.save(2, weights(ONE, 2.0), state)
    with pytest.raises(CheckpointError, match=r"No space left.*The last whole one is step 1"):
        checkpoints.wait()
    assert checkpoints.restore(weights(ONE), state)[2] == 1

"""Orbax checkpoints: of a training run, and of a module that is only restored.

A training run's hold what is trained, the optimiser and the step, which is also the place in the
data; never the LLM.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from pplug_jax.distributed import is_primary, wait_for_all
from pplug_jax.errors import InputError
from pplug_jax.progress import say


class CheckpointError(InputError):
    """A checkpoint could not be written or read; the message says what to do."""


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _named(tree: Any) -> dict[str, Any]:
    """A tree's arrays under their paths: what is stored does not depend on our classes."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _restored_like(tree: Any, arrays: dict[str, Any]) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(
        structure, [arrays[jax.tree_util.keystr(path)] for path, _ in leaves]
    )


class Checkpoints:
    """Those of one method: the newest `keep`, and the one with the lowest validation loss.

    Saving goes on in the background.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = epath.Path(directory).absolute()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=True,
                best_fn=_validation_loss,
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_validation_loss,
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
            item_handlers={
                "weights": _array_handler(),
                "optimizer": _array_handler(),
            },
        )

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss; the newest where none was validated."""
        return self.manager.best_step() or self.latest

    def save(
        self, step: int, weights: Any, opt_state: Any, validation_loss: float | None = None
    ) -> None:
        """Begins to write a checkpoint.

        Raises:
            CheckpointError: this one or the one before could not be written, for instance to a
                full disk.
        """
        if step == self.latest:
            return
        items = ocp.args.Composite(
            weights=ocp.args.PyTreeSave(_named(weights)),
            optimizer=ocp.args.PyTreeSave(_named(opt_state)),
        )
        try:
            metrics = None if validation_loss is None else {"validation_loss": validation_loss}
            self.manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when everything is on disk; raises as `save`."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, weights: Any, opt_state: Any) -> tuple[Any, Any, int]:
        """The newest one, laid out as `weights` and `opt_state`, and its step.

        One that cannot be read is told of and set aside, and the one before is taken.

        Raises:
            CheckpointError: none can be read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        args = {"weights": _restore_args(weights), "optimizer": _restore_args(opt_state)}
        step, restored = self._first_readable(steps, **args)
        for torn in steps[: steps.index(step)]:
            self._set_aside(torn)
        return (
            _restored_like(weights, restored["weights"]),
            _restored_like(opt_state, restored["optimizer"]),
            step,
        )

    def restore_weights(self, weights: Any) -> Any:
        """The best one's weights alone, laid out as `weights`; if torn, the newest of the others'.

        Raises:
            CheckpointError: there is none, or none can be read.
        """
        best = self.best
        if best is None:
            raise CheckpointError(f"{self.directory}: no checkpoint; train first (--mode=train)")
        others = sorted(set(self.manager.all_steps()) - {best}, reverse=True)
        _, restored = self._first_readable([best, *others], weights=_restore_args(weights))
        return _restored_like(weights, restored["weights"])

    def _first_readable(self, steps: Sequence[int], **args: Any) -> tuple[int, Any]:
        problems = []
        for step in steps:
            try:
                return step, self.manager.restore(step, args=ocp.args.Composite(**args))
            # Orbax and TensorStore raise many kinds for a file that is cut or gone.
            except Exception as error:  # noqa: BLE001
                problems.append(f"step {step}: {error}")
                say(f"warning: {self.directory}: step {step} cannot be read and is passed over")
        raise CheckpointError(
            f"{self.directory}: no checkpoint can be read ({'; '.join(problems)}); delete the "
            "directory to train anew"
        )

    def _set_aside(self, step: int) -> None:
        """Renames a torn checkpoint, so that the step can be saved again."""
        path = self.directory / str(step)
        if is_primary():
            path.rename(path.with_name(f"{step}.torn"))
        wait_for_all(f"step {step} is set aside")
        self.manager.reload()

    def close(self) -> None:
        self.manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: a checkpoint could not be written: {error}. "
            f"The last whole one is step {self.latest}. "
            "If the disk is full, make room; then run the same command again to go on from there"
        )


def is_saved(directory: epath.Path) -> bool:
    """Whether `save_module` has written all of it."""
    return directory.exists() and ocp.utils.is_checkpoint_finalized(directory)


def save_module(directory: epath.Path, module: Any, origin: dict[str, Any]) -> None:
    """Writes a module's arrays, each device its own, and what they were made from."""
    with ocp.Checkpointer(_module_handler()) as checkpointer:
        arrays = ocp.args.PyTreeSave(_named(module))
        items = ocp.args.Composite(arrays=arrays, origin=ocp.args.JsonSave(origin))
        checkpointer.save(directory, items, force=True)


def module_loader(directory: epath.Path, module: Any, origin: dict[str, Any]) -> Callable[[], Any]:
    """What restores what `save_module` wrote, laid out as the abstract `module`.

    Raises:
        CheckpointError: it was made from something else than `origin`.
    """

    def restore(**items: Any) -> Any:
        with ocp.Checkpointer(_module_handler()) as checkpointer:
            return checkpointer.restore(directory, ocp.args.Composite(**items))

    found = restore(origin=ocp.args.JsonRestore())["origin"]
    if found != origin:
        raise CheckpointError(
            f"{directory} was converted from {found}, not from {origin}: "
            "delete it, or name another place with --config.llm.converted"
        )
    return lambda: _restored_like(module, restore(arrays=_restore_args(module))["arrays"])


def _module_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        arrays=_array_handler(), origin=ocp.JsonCheckpointHandler()
    )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Lets one device write what all devices hold.

    It would otherwise be cut into a slice for each, and a plug of 45 arrays on 8 devices compiles
    136 slicings at its first checkpoint.
    """
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    """Restores to the shapes, dtypes and places of `tree`, which may be abstract."""
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _named(tree).items()
    }
    return ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))

"""Orbax checkpoints: of a training run, and of a module that is only restored.

A training run's checkpoint holds what is trained, the optimiser, and the step, which is also the
place in the data. It never holds the LLM.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from pplug_jax.errors import CheckpointError
from pplug_jax.runtime.console import say
from pplug_jax.runtime.distributed import from_primary, wait_for_all, worst_of_all
from pplug_jax.runtime.primary import is_primary
from pplug_jax.runtime.retry import causes, may_pass, retrying
from pplug_jax.storage.files import absolute, is_remote, read_text

# What TensorStore says of files that are shorter than they should be, gone, or no longer theirs;
# Orbax may say more before and behind it, or keep it as the cause of an error of its own.
CUT_OR_MISSING = re.compile(
    r"\b(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE): |: Truncated Zstd-compressed stream"
)
OTHER_SHAPE = re.compile(
    r"Requested shape: (.*) is not compatible with the stored shape: (\(.*?\))"
)
MARK = "commit_success.txt"  # by which Orbax knows a whole checkpoint in a bucket
READ, CUT, FAILED = range(3)  # how reading a checkpoint ended, the worst last


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _named(tree: Any) -> dict[str, Any]:
    """Return a tree's arrays under their paths: what is stored depends on no class of ours."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _restored_like(tree: Any, arrays: dict[str, Any]) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(
        structure, [arrays[jax.tree_util.keystr(path)] for path, _ in leaves]
    )


class Checkpoints:
    """The checkpoints of one method: the newest `keep`, and the one with the lowest validation
    loss.

    Saving goes on in the background.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = absolute(directory)
        self._set_aside_without_metrics()
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
            item_handlers=_training_items(),
        )
        self._tell_of_unmarked()
        # The manager's own `restore` waits for all processes, also for one that failed.
        self.reader = ocp.CompositeCheckpointHandler(**_training_items())
        self.last: dict[str, Any] = {}  # the arguments of the newest `save`

    def _tell_of_unmarked(self) -> None:
        """Report what Orbax takes for unfinished in a bucket, where no renaming shows what is
        whole.

        A copy of checkpoints that an Orbax before 0.12.4 wrote on a disk is such a case.
        """
        for path in self.directory.iterdir() if is_remote(self.directory) else ():
            if path.name.isdigit() and not (path / MARK).exists():
                say(
                    f"warning: {path} is passed over as unfinished: it has no {MARK}. If it was "
                    "copied whole from a disk, put an empty file of that name into it and into "
                    "each folder in it"
                )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self.manager.latest_step()

    def latest_for_all(self) -> int | None:
        """Return the newest step as the first process sees it; call it on all processes at once."""
        step = int(from_primary(np.int32(-1 if self.latest is None else self.latest)))
        return None if step < 0 else step

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss, or the newest if none was validated."""
        return self.manager.best_step() or self.latest

    def save(
        self, step: int, weights: Any, opt_state: Any, validation_loss: float | None = None
    ) -> None:
        """Begin to write a checkpoint.

        If the one before failed only for a moment, this one takes its place.

        Raises:
            CheckpointError: this one or the one before could not be written, for instance to a full
                disk.
        """
        if step == self.latest:
            return
        try:
            self._settle()
        except Exception as error:
            if not self._is_forgiven(error):
                raise self._failed(error) from error
            say(f"warning: {self.directory}: step {self.last['step']} was not written: {error}")
        self.last = {
            "step": step,
            "args": ocp.args.Composite(
                weights=ocp.args.PyTreeSave(_named(weights)),
                optimizer=ocp.args.PyTreeSave(_named(opt_state)),
            ),
            "metrics": None if validation_loss is None else {"validation_loss": validation_loss},
        }
        self._begin()

    def wait(self) -> None:
        """Wait until everything is on disk; raise as `save` does.

        What failed only for a moment is written again, so keep the arrays of the newest `save`
        until then.
        """
        try:
            self._settle()
        except Exception as error:
            if not self._is_forgiven(error):
                raise self._failed(error) from error
            say(f"warning: {self.directory}: step {self.last['step']}: {error}; written again")
            self._begin(waiting=True)

    def _settle(self) -> None:
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def _is_forgiven(self, error: Exception) -> bool:
        """Return whether writing goes on; several processes cannot: in Orbax each waits for all."""
        return jax.process_count() == 1 and bool(self.last) and may_pass(error)

    def _begin(self, *, waiting: bool = False) -> None:
        """Write `last`, in the background, or with `waiting` until it is there."""

        def write() -> None:
            self.manager.save(**self.last, force=True)
            if waiting:
                self._settle()

        try:
            if jax.process_count() == 1:
                retrying(f"writing step {self.last['step']} to {self.directory}", write)
            else:
                write()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, weights: Any, opt_state: Any) -> tuple[Any, Any, int]:
        """Return the newest checkpoint's weights and optimiser state, laid out as those given, and
        its step.

        A checkpoint that is cut or lacks files is reported and set aside, and the one before is
        taken.

        Raises:
            CheckpointError: none is whole, or one could not be read for another reason, which
                changes nothing.
        """
        args = {"weights": _restore_args(weights), "optimizer": _restore_args(opt_state)}
        cut: list[int] = []
        restored, step = self._first_whole(self._newest_first(), cut, **args)
        for torn in cut:
            self._set_aside(torn)
        return (
            _restored_like(weights, restored["weights"]),
            _restored_like(opt_state, restored["optimizer"]),
            step,
        )

    def restore_weights(self, weights: Any) -> Any:
        """Return the best checkpoint's weights, laid out as `weights`; if it is cut, the newest
        other's.

        Raises:
            CheckpointError: there is none, or as in `restore`.
        """
        best = self.best
        if best is None:
            raise CheckpointError(f"{self.directory}: no checkpoint; train first (--mode=train)")
        steps = [best, *(step for step in self._newest_first() if step != best)]
        restored, _ = self._first_whole(steps, [], weights=_restore_args(weights))
        return _restored_like(weights, restored["weights"])

    def _newest_first(self) -> list[int]:
        return sorted(self.manager.all_steps(), reverse=True)

    def _first_whole(self, steps: Sequence[int], cut: list[int], **args: Any) -> tuple[Any, int]:
        """Return the arrays of the first step that is whole for every process, and that step.

        All processes take the first one's steps, and the worst of their findings counts. `cut` gets
        the steps that are not whole.
        """
        problems = []
        for step in self._agreed(steps):
            finding, restored, problem = self._read(step, ocp.args.Composite(**args))
            worst = worst_of_all(finding)
            problem = problem or "another process could not read it, and says why"
            if worst == READ:
                return restored, step
            if shapes := OTHER_SHAPE.search(problem):
                raise CheckpointError(
                    f"{self.directory}: step {step} holds an array of shape {shapes[2]}, which is "
                    f"{shapes[1]} now: an older version or other settings made it (CHANGELOG.md); "
                    "train again with another --workdir"
                )
            if worst == FAILED:
                raise CheckpointError(
                    f"{self.directory}: step {step} could not be read: {problem}. Nothing was "
                    "changed there; once it can be read, run the same command again"
                )
            cut.append(step)
            problems.append(f"step {step}: {problem}")
            say(f"warning: {self.directory}: step {step} is cut or lacks files, and is passed over")
        raise CheckpointError(
            f"{self.directory}: no checkpoint is whole ({'; '.join(problems)}); delete the "
            "directory to train anew"
        )

    @staticmethod
    def _agreed(steps: Sequence[int]) -> Iterator[int]:
        """Yield the first process' steps: on a network others may see directories later."""
        count = int(from_primary(np.int32(len(steps))))
        mine = np.resize(np.array([*steps, -1], np.int64), count)
        yield from np.asarray(from_primary(mine)).tolist()

    def _read(self, step: int, args: ocp.args.Composite) -> tuple[int, Any, str]:
        """Return READ, CUT or FAILED, this process' arrays, and what went wrong."""
        path = self.directory / str(step)
        try:
            return READ, retrying(f"reading {path}", lambda: self._complete(path, args)), ""
        # Orbax and TensorStore raise many kinds for a file that is cut or gone.
        except Exception as error:  # noqa: BLE001
            return (CUT if _is_cut(error) else FAILED), None, _shortened(error)

    def _complete(self, path: epath.Path, args: ocp.args.Composite) -> dict[str, Any]:
        # Listed, since `is_dir` takes every error for an absence.
        names = {child.name for child in path.iterdir()}
        for item in args.keys():  # noqa: SIM118  no dict
            if item not in names:
                raise FileNotFoundError(f"{path / item}: no such directory")
            next((path / item).iterdir(), None)
        return jax.block_until_ready(dict(self.reader.restore(path, args).items()))

    def _set_aside(self, step: int) -> None:
        """Rename a torn checkpoint, so that the step can be saved again."""
        if is_primary():
            _rename_torn(self.directory / str(step))
        wait_for_all(f"step {step} is set aside")
        self.manager.reload()

    def _set_aside_without_metrics(self) -> None:
        """Rename checkpoints whose validation loss cannot be read, before Orbax reads them all."""
        for path in self.directory.iterdir() if is_primary() and self.directory.exists() else ():
            file = path / "metrics" / "metrics"
            if path.name.isdigit() and file.exists():
                try:
                    json.loads(read_text(file))
                except ValueError:
                    say(f"warning: {path} is cut, and is passed over")
                    _rename_torn(path)
        wait_for_all("the checkpoints' metrics are whole")

    def delete(self, step: int) -> None:
        """Delete a checkpoint; call it on all processes at once."""
        self.manager.delete(step)

    def close(self) -> None:
        self.manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory}: a checkpoint could not be written: {error}. "
            f"The last whole one is step {self.latest}. "
            "If the disk is full, make room; then run the same command again to go on from there"
        )


def _is_cut(error: Exception) -> bool:
    """Return whether the error proves that files of a checkpoint are missing or not whole."""
    if any(CUT_OR_MISSING.search(str(cause)) for cause in causes(error)):
        return True
    return isinstance(error, (FileNotFoundError, json.JSONDecodeError)) and not may_pass(error)


def _shortened(error: Exception) -> str:
    """Return the first line of the error's root cause: Orbax appends what it was about to read."""
    *_, first = causes(error)
    text = str(first).strip().partition("\n")[0] or type(first).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _rename_torn(path: epath.Path) -> None:
    names = (f"{path.name}.torn{i or ''}" for i in itertools.count())
    path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))


def is_saved(directory: epath.Path) -> bool:
    """Return whether `save_module` has finished writing."""
    return directory.exists() and ocp.utils.is_checkpoint_finalized(directory)


def save_module(directory: epath.Path, module: Any, origin: dict[str, Any]) -> None:
    """Write a module's arrays, each device its own, and what they were made from."""
    with ocp.Checkpointer(_module_handler()) as checkpointer:
        arrays = ocp.args.PyTreeSave(_named(module))
        items = ocp.args.Composite(arrays=arrays, origin=ocp.args.JsonSave(origin))
        checkpointer.save(directory, items, force=True)


def read_origin(directory: epath.Path) -> dict[str, Any]:
    """Return the `origin` that `save_module` was given."""
    return _read_module(directory, origin=ocp.args.JsonRestore())["origin"]


def _read_module(directory: epath.Path, **items: Any) -> Any:
    with ocp.Checkpointer(_module_handler()) as checkpointer:
        args = ocp.args.Composite(**items)
        return retrying(f"reading {directory}", lambda: checkpointer.restore(directory, args))


def module_loader(directory: epath.Path, module: Any, origin: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that restores what `save_module` wrote, laid out as the abstract `module`.

    Raises:
        CheckpointError: it was made from something else than `origin`.
    """
    saved = read_origin(directory)
    if saved | origin != saved:
        raise CheckpointError(
            f"{directory} was converted from {saved}, not from {origin}: "
            "delete it, or name another place with --config.llm.converted"
        )
    arrays = _restore_args(module)
    return lambda: _restored_like(module, _read_module(directory, arrays=arrays)["arrays"])


def _module_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        arrays=_array_handler(), origin=ocp.JsonCheckpointHandler()
    )


def _training_items() -> dict[str, ocp.PyTreeCheckpointHandler]:
    return {"weights": _array_handler(), "optimizer": _array_handler()}


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Make a handler that lets one device write what all devices hold.

    Orbax would otherwise cut each array into a slice per device. A plug of 45 arrays on 8 devices
    would compile 136 slicings at its first checkpoint.
    """
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    """Return what restores to the shapes, dtypes and places of `tree`, which may be abstract."""
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _named(tree).items()
    }
    # Older ones may hold more: a plug once kept an encoder that it did not train.
    return ocp.args.PyTreeRestore(
        wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )

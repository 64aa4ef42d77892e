"""The command: `python -m pplug_jax.main --config=configs/lamp5.py`."""

import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from pplug_jax.errors import InputError
from pplug_jax.run import run
from pplug_jax.runtime.compiled import keep_compiled
from pplug_jax.runtime.distributed import start
from pplug_jax.runtime.slips import parse_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file of configs/, as FILE or FILE:ARGUMENT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is written, also gs://...; by default runs/ and the config's name.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train_and_evaluate",
    [
        "train_and_evaluate",
        "train",
        "evaluate",
        "compare",
        "encode",
        "convert",
        "download",
        "check_data",
        "plan",
        "export",
    ],
    "What to do; `compare` trains and evaluates over several seeds, on users never seen; `encode` "
    "only fills the history store, `convert` only writes the loaded LLM as an Orbax checkpoint, "
    "from which later starts restore it; `download` fetches LaMP's public files, `check_data` "
    "reads all files of the task and says what is in them; `plan` compiles for a TPU slice, "
    "without one, and says whether it fits and how fast it can be; `export` writes the trained "
    "plug alone, to hand it on, and needs no --config.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Of --mode=plan: a TPU slice such as v5e:4x4 or v5p:2x2x2, or all."
)
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Of --mode=plan: find the slice's best mesh and batch size."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Of --mode=export: the directory that the plug of --workdir is written to."
)
_METHOD = flags.DEFINE_string(
    "method",
    None,
    "Of --mode=export: whose plug is written, if not the first method's that can be.",
)
_ENGINE = flags.DEFINE_enum(
    "engine", None, ["ray"], "Of --mode=encode: what histories are encoded on, if not here alone."
)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Of --engine=ray: how many workers encode.", lower_bound=1
)
_NEEDS = flags.DEFINE_string(
    "needs",
    '{"num_cpus": 1}',
    "Of --engine=ray: what a worker needs, as JSON with Ray's names: num_cpus, num_gpus, or "
    'resources, as in {"resources": {"TPU": 4}}.',
)
# The modes in which each process works for itself.
ALONE = ("download", "check_data", "plan", "export")


def default_workdir(config_file: str) -> Path:
    """Return the workdir of a config: configs/lamp5.py:llama3_1b -> runs/lamp5-llama3_1b.

    A slice such as in llama3_1b@v5e-8 does not change it.
    """
    path, _, argument = config_file.partition("@")[0].partition(":")
    return Path("runs") / "-".join([Path(path).stem, *filter(None, argument.split(":"))])


def _quiet() -> None:
    """Leave it to the exception that reaches `main` to say what failed, once.

    Otherwise Orbax's threads also log a checkpoint that cannot be written, and TensorStore's report
    every array whose writing still waits for the event loop that has ended, or had not begun.
    """
    logging.set_verbosity(logging.FATAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def _is_needed(needs: Any) -> bool:
    """Return whether this is what `--needs` may hold."""
    if not isinstance(needs, dict):
        return False
    resources = needs.get("resources", {})
    numbers = {name: value for name, value in needs.items() if name != "resources"}
    return (
        isinstance(resources, dict)
        and numbers.keys() <= {"num_cpus", "num_gpus"}
        and all(type(x) in (int, float) for x in (*numbers.values(), *resources.values()))
    )


def main(argv: list[str]) -> None:
    del argv  # flags alone: slips.parse_flags
    topology = _TOPOLOGY.value or ""
    if (_MODE.value == "plan") != bool(topology):
        sys.exit("error: --mode=plan and --topology belong together")
    if (_MODE.value == "export") != bool(_OUTPUT.value):
        sys.exit("error: --mode=export and --output belong together")
    if _ENGINE.value and _MODE.value != "encode":
        sys.exit("error: --engine belongs to --mode=encode")
    if _MODE.value == "export" and (_CONFIG.value or not _WORKDIR.value):
        sys.exit("error: --mode=export reads the run in --workdir=RUN, and takes no --config")
    try:
        needs = json.loads(_NEEDS.value)
    except ValueError as error:
        sys.exit(f"error: --needs={_NEEDS.value}: not JSON: {error}")
    if not _is_needed(needs):
        sys.exit(
            f"error: --needs={_NEEDS.value}: expected an object of num_cpus, num_gpus (numbers) or "
            "resources (an object of numbers)"
        )
    if _METHOD.value and _MODE.value != "export":
        sys.exit("error: --method belongs to --mode=export; a run has config.methods")
    for flag in (_WORKERS, _NEEDS):
        if flag.present and not _ENGINE.value:
            sys.exit(f"error: --{flag.name} belongs to --engine=ray")
    ray = {"workers": _WORKERS.value, **needs} if _ENGINE.value else None
    _quiet()
    keep_compiled()
    config = _CONFIG.value
    try:
        workdir = (
            epath.Path(_WORKDIR.value)
            if _WORKDIR.value
            else default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
        )
    except KeyError as error:
        sys.exit(
            f"error: --workdir={_WORKDIR.value}: nothing here reads {error.args[0]}; "
            "give a path, or gs://..."
        )
    try:
        if _MODE.value not in ALONE:
            start()
        if _MODE.value == "plan":
            from pplug_jax.plan import plan  # a fifth of the package, which no other mode needs

            plan(config, topology, bool(_SUGGEST.value))
        elif _MODE.value == "export":
            from pplug_jax.serve.personalizer import export

            export(workdir, Path(str(_OUTPUT.value)), _METHOD.value)
        else:
            run(config, workdir, _MODE.value, ray)
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        sys.exit(
            f"error: another process of the job was lost ({str(error).splitlines()[0]}); "
            "start all of them again to go on from the last checkpoint"
        )


def cli() -> None:
    """Run the console script `pplug`, which, as `python -m`, finds configs/ where it is called."""
    sys.path.insert(0, "")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

"""Say in one line what is wrong with a command line, and what was probably meant."""

import difflib
import runpy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

WITHOUT_CONFIG = ("export",)  # the modes that read the config of a run


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse flags as absl does, and return the other arguments; a mistake ends the process."""
    try:
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        without = config is None and flags.FLAGS["mode"].value in WITHOUT_CONFIG
        # What could not be loaded is something that raises its error where it is first used.
        if not (without or isinstance(config, ml_collections.ConfigDict)):
            sys.exit(f"error: {_mistake(argv)}")
        if rest[1:]:
            sys.exit(f"error: {rest[1]!r} is no flag; write flags as --config=configs/lamp5.py")
        return rest
    # A config file is a program, which may fail in any way.
    except Exception as error:  # noqa: BLE001
        sys.exit(f"error: {_mistake(argv) or _first_line(error)}")


def near(given: str, known: Iterable[str]) -> str:
    """Return a question such as " (did you mean 'lamp5'?)", or "" if nothing is near."""
    matches = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _mistake(argv: Sequence[str]) -> str | None:
    """Return what is wrong with --config and the given fields, or None if they are right."""
    # absl takes flags with one dash too.
    argv = [f"-{word}" if word.startswith("-") and word[1:2].isalpha() else word for word in argv]
    given = _value_of("--config", argv)
    if given is None:
        return "--config is missing; for example --config=configs/lamp5.py"
    path, _, argument = given.partition(":")
    if not Path(path).is_file():
        known = [file.as_posix() for file in Path("configs").glob("*.py")]
        return f"--config={path}: there is no such file{near(path, known) or _where_configs_lie()}"
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            return f"--config={path}: the file has no function get_config, so it is no config"
        config = get_config(*[argument] if argument else [])
        if not isinstance(config, ml_collections.ConfigDict):
            kind = type(config).__name__
            return (
                f"--config={path}: get_config must return an ml_collections.ConfigDict, not {kind}"
            )
    except Exception as error:  # noqa: BLE001
        return f"--config={given}: {_first_line(error)}"
    fields = [flag.removeprefix("--config.").partition("=")[0] for flag in argv[1:]]
    for flag, field in zip(argv[1:], fields, strict=True):
        if flag.startswith("--config.") and not _has(config, field):
            return f"--config.{field}: there is no such setting{near(field, names_of(config))}"
    return None


def _where_configs_lie() -> str:
    """What to do where there are none; the package has no configs."""
    if Path("configs").is_dir():
        return ""
    return "; work in a clone of the repository, which has configs/, or give --config=PATH.py"


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    """Return the last value that the flag is given, by = or as the next argument."""
    value = None
    for this, following in zip(argv, [*argv[1:], None], strict=True):
        if this == flag:
            value = following
        elif this.startswith(f"{flag}="):
            value = this.partition("=")[2]
    return value


def _has(config: Any, field: str) -> bool:
    for name in field.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or name not in config:
            return False
        config = config[name]
    return True


def names_of(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Return every setting's name, with the groups that it is in."""
    names = []
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        names += names_of(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names

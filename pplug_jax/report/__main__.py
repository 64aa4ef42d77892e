"""The command: `python -m pplug_jax.report runs/lamp5 [runs/lamp5-k4 ...]`.

The page is about the first workdir; the others only add their results, and points to the chart over
`eval.top_k`.
"""

import sys
from pathlib import Path

from absl import app

from pplug_jax.errors import InputError
from pplug_jax.report.page import report
from pplug_jax.runtime.console import say


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("name one workdir, or several: python -m pplug_jax.report runs/lamp5")
    try:
        path = report([Path(argument) for argument in argv[1:]])
    except InputError as error:
        sys.exit(f"error: {error}")
    say(f"the report is in {path}; open it in a browser")


if __name__ == "__main__":
    app.run(main)

"""The plans of all presets on their slices: `python -m benchmarks.presets docs/presets.csv`

Compiles each one's training step with the TPU compiler (pip install -r requirements-plan.txt),
which takes some minutes each, with soft tokens in front of the input and behind it. Behind, fewer
activations are kept: a batch is worked off in as few parts as fit, and `remat` only where nothing
else does. Started again, it goes on with those that the file lacks.
"""

import csv
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import jax
import ml_collections

from configs import lamp5, llms
from pplug_jax.plan.chips import find_slice
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB
from pplug_jax.plan.training import plan_training
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.settings import Settings

TOPOLOGIES = {"v5e-8": "v5e:2x4", "v5p-16": "v5p:2x2x2"}
HEADER = (
    "preset",
    "slice",
    "place",
    "fsdp",
    "parts",
    "remat",
    "arguments_gib",
    "peak_gib",
    "bound",
    "step_ms",
    "mfu",
)


def layouts(config: ml_collections.ConfigDict, place: str) -> Iterator[tuple[int, bool]]:
    """Parts of a batch and `remat`, in the order in which they are tried."""
    of_front = config.train.accumulation, config.train.remat
    if place == "behind":
        yield from ((parts, False) for parts in (1, 2, 4, 8) if parts <= of_front[0])
    yield of_front


def row(name: str, machine: str, place: str) -> list[str]:
    config = lamp5.get_config(f"{name}@{machine}")
    config.plug.place = place
    where = find_slice(TOPOLOGIES[machine])
    mesh = make_mesh(**config.mesh.to_dict(), devices=where.devices)
    for parts, remat in layouts(config, place):
        config.train.update(accumulation=parts, remat=remat)
        found = plan_training(Programs(Settings.of(config), mesh), where)
        if found.memory.fits:
            break
    sizes = [f"{size / GIB:.2f}" for size in (found.memory.arguments, found.memory.peak)]
    cells = [name, machine, place, *map(str, (config.mesh.fsdp, parts, remat)), *sizes]
    if found.cost is None:
        return [*cells, "does not fit", "", ""]
    step = f"{1e3 * found.cost.seconds(where):.1f}"
    return [*cells, found.cost.bound_by(where), step, f"{found.mfu(where):.3f}"]


def main(path: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    if not path.is_file():
        path.write_text(",".join(HEADER) + "\n")
    about = itemgetter("preset", "slice", "place")
    done = set(map(about, csv.DictReader(path.open())))
    for machine, field in llms.SLICES.items():
        for name, preset in llms.PRESETS.items():
            places = ("front",) if name.startswith("flan_t5") else ("front", "behind")
            for place in places if getattr(preset, field) else ():
                if (name, machine, place) not in done:
                    planned = row(name, machine, place)
                    with path.open("a") as file:
                        csv.writer(file, lineterminator="\n").writerow(planned)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

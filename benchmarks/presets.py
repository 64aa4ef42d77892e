"""The plans of all presets on their slices: `python -m benchmarks.presets docs/presets.csv`

Compiles each one's training step with the TPU compiler (pip install -r requirements-plan.txt),
which takes some minutes each. Started again, it goes on with those that the file lacks.
"""

import csv
import sys
from pathlib import Path

import jax

from configs import lamp5, llms
from pplug_jax.plan.chips import find_slice
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB
from pplug_jax.plan.training import plan_training
from pplug_jax.runtime.mesh import make_mesh

TOPOLOGIES = {"v5e-8": "v5e:2x4", "v5p-16": "v5p:2x2x2"}
HEADER = (
    "preset",
    "slice",
    "fsdp",
    "parts",
    "remat",
    "arguments_gib",
    "peak_gib",
    "bound",
    "step_ms",
    "mfu",
)


def row(name: str, machine: str) -> list[str]:
    config = lamp5.get_config(f"{name}@{machine}")
    where = find_slice(TOPOLOGIES[machine])
    mesh = make_mesh(**config.mesh, devices=where.devices)
    found = plan_training(Programs(config, mesh), where)
    sizes = [f"{size / GIB:.2f}" for size in (found.memory.arguments, found.memory.peak)]
    layout = (config.mesh.fsdp, config.train.accumulation, config.train.remat)
    cells = [name, machine, *map(str, layout), *sizes]
    if found.cost is None:
        return [*cells, "does not fit", "", ""]
    step = f"{1e3 * found.cost.seconds(where):.1f}"
    return [*cells, found.cost.bound_by(where), step, f"{found.mfu(where):.3f}"]


def main(path: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    if not path.is_file():
        path.write_text(",".join(HEADER) + "\n")
    done = {(line["preset"], line["slice"]) for line in csv.DictReader(path.open())}
    for machine, field in llms.SLICES.items():
        for name, preset in llms.PRESETS.items():
            if getattr(preset, field) and (name, machine) not in done:
                with path.open("a") as file:
                    csv.writer(file, lineterminator="\n").writerow(row(name, machine))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""How training Llama 8B scales on v5p, as compiled: `python -m benchmarks.scaling docs/scaling.csv`

Weak scaling has 8 rows a chip, strong scaling the paper's batch of 64. Each on two meshes: all
chips share one copy of the weights, or four do, and the copies share the batch. Chips that a batch
of 64 has no rows for split its layers (tensor).

Compiles each training step with the TPU compiler (pip install -r requirements-plan.txt), which
takes some minutes each, and draws the plot beside the file. Started again, it goes on.
"""

import csv
import sys
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from configs import lamp5
from pplug_jax.plan.chips import find_slice
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB
from pplug_jax.plan.training import plan_training
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.settings import Settings

SLICES = {4: "v5p:2x2x1", 32: "v5p:2x4x4", 256: "v5p:4x8x8"}
BATCHES = {"weak": lambda chips: 8 * chips, "strong": lambda chips: 64}
COPIES = {"one copy": lambda parts: parts, "copies of 4": lambda parts: 4}
PARTS = ("compute", "HBM", "ICI")
HEADER = (
    "scaling",
    "mesh",
    "chips",
    "data",
    "fsdp",
    "tensor",
    "rows",
    "peak_gib",
    "ici_gb",
    *PARTS,
)


def row(scaling: str, mesh: str, chips: int) -> list[str]:
    config = lamp5.get_config("llama3_8b")
    rows = BATCHES[scaling](chips)
    config.train.batch_size = config.eval.batch_size = rows
    config.train.remat = False  # there is room
    parts = min(chips, rows)
    fsdp = COPIES[mesh](parts)
    shape = (parts // fsdp, fsdp, chips // parts)
    where = find_slice(SLICES[chips])
    found = plan_training(Programs(Settings.of(config), make_mesh(*shape, where.devices)), where)
    cells = [scaling, mesh, *map(str, (chips, *shape, rows)), f"{found.memory.peak / GIB:.2f}"]
    if found.cost is None:
        return [*cells, "", "", "", ""]
    bound = found.cost.bound(where)
    received = found.cost.moved.received / 1e9
    return [*cells, f"{received:.2f}", *(f"{1e3 * bound[part]:.2f}" for part in PARTS)]


def draw(path: Path) -> None:
    """Bound times in milliseconds, HBM and interconnect bytes, over the chips."""
    lines = [line for line in csv.DictReader(path.open()) if line["ici_gb"]]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for (times, memory, received), scaling in zip(axes, BATCHES, strict=True):
        for mesh, style in zip(COPIES, ("-", "--"), strict=True):
            chosen = [x for x in lines if (x["scaling"], x["mesh"]) == (scaling, mesh)]
            chosen.sort(key=lambda x: int(x["chips"]))
            chips = [int(x["chips"]) for x in chosen]
            for i, part in enumerate(PARTS):
                values = [float(x[part]) for x in chosen]
                times.plot(chips, values, style, color=f"C{i}", marker="o", label=f"{part}, {mesh}")
            for axis, field in ((memory, "peak_gib"), (received, "ici_gb")):
                values = [float(x[field]) for x in chosen]
                axis.plot(chips, values, style, color="C3", marker="o", label=mesh)
        times.set(title=f"{scaling} scaling: shortest time, ms", yscale="log")
        memory.set(title="HBM of a chip, GiB", ylim=(0, 95))
        received.set(title="received by a chip in a step, GB", yscale="log")
        for axis in (times, memory, received):
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(SLICES), list(map(str, SLICES)))
            if axis is not memory:
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(ScalarFormatter())
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("v5p chips")
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main(path: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    if not path.is_file():
        path.write_text(",".join(HEADER) + "\n")
    done = {(x["scaling"], x["mesh"], int(x["chips"])) for x in csv.DictReader(path.open())}
    for chips in SLICES:
        for case in ((scaling, mesh, chips) for scaling in BATCHES for mesh in COPIES):
            if case not in done:
                with path.open("a") as file:
                    csv.writer(file, lineterminator="\n").writerow(row(*case))
    draw(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

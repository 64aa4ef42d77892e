"""The TPU chips' peak figures, and the slices of them that the compiler knows."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from pplug_jax.errors import InputError


class Chip(NamedTuple):
    """A chip's published peak figures.

    Attributes:
        flops: bfloat16 FLOP/s.
        hbm_gib: GiB of HBM.
        hbm_bandwidth: byte/s.
        link_bandwidth: byte/s that one ICI link receives.
        slices: those that `--topology=all` tries, ascending.
        source: the page that says so.
        settings: what `get_topology_desc` needs besides the name.
    """

    flops: float
    hbm_gib: int
    hbm_bandwidth: float
    link_bandwidth: float
    slices: tuple[str, ...]
    source: str
    settings: dict[str, Any]


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_SQUARE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

# The pages give ICI as the sum over a chip's links (4 in a 2D torus, 6 in a 3D one) and both
# directions, in GB/s: 400 (v5e), 1200 (v5p), 800 (v6e). v4's gives none: 50 GB/s a link and
# direction are of Jouppi et al. 2023, arXiv 2304.01433, table 4.
CHIPS = {
    # Without megacore the compiler would take a v4 chip's two cores for two devices.
    "v4": Chip(275e12, 32, 1200e9, 50e9, _CUBE, _DOCS + "v4", {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16, 819e9, 400e9 / 4 / 2, _SQUARE, _DOCS + "v5e", {}),
    "v5p": Chip(459e12, 95, 2765e9, 1200e9 / 6 / 2, _CUBE, _DOCS + "v5p", {}),
    "v6e": Chip(918e12, 32, 1638e9, 800e9 / 4 / 2, _SQUARE, _DOCS + "v6e", {}),
}


# What libtpu reads as it is loaded.
_ENVIRONMENT = {
    # It shall not lock out, nor be locked out by, a process that works on a real TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # It shall not ask a TPU VM's metadata what it runs on, nor say that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Slice(NamedTuple):
    """Chips that ICI connects, with one of `devices` for each chip, for a mesh to compile for."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: list[jax.Device]

    @property
    def ici_bandwidth(self) -> float:
        """The byte/s that a chip can receive over all its links at once.

        An axis of n chips gives one link to each neighbour, at most 2: the best placed chip's.
        """
        return self.chip.link_bandwidth * sum(min(size - 1, 2) for size in self.shape)


def find_slice(name: str) -> Slice:
    """Return the slice that Cloud TPU calls `name`, as `v5e:4x4` or `v5p:2x2x2`; no TPU is needed.

    Raises:
        InputError: an unknown name, or no TPU compiler is installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        known = ", ".join(f"{kind}:{chip.slices[2]}" for kind, chip in CHIPS.items())
        raise InputError(
            f"--topology={name} is unknown; known are {', '.join(CHIPS)} and their shapes, such as "
            f"{known}, or `all`"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "the TPU compiler is not installed: pip install -r requirements-plan.txt (it needs no "
            "TPU)"
        )
    os.environ |= _ENVIRONMENT
    chip = CHIPS[kind]
    # Hosts have four chips, unless told otherwise.
    settings = chip.settings | ({"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {})
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **settings
        ).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise InputError(
            f"--topology={name}: the TPU compiler does not know this shape ({error}); known are "
            f"{', '.join(chip.slices)}"
        ) from error
    return Slice(name, chip, tuple(map(int, shape.split("x"))), list(devices))

"""Where a mesh puts the chips of a TPU slice, with stand-ins for chips."""

import dataclasses
import itertools

import pytest

from pplug_jax.runtime.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX reads of a TPU v5p chip to place it."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    slice_index: int = 0


@pytest.mark.parametrize("shape", [(1, 256, 1), (4, 64, 1), (16, 4, 4), (2, 2, 64), (128, 1, 2)])
def test_a_slice_takes_every_mesh_of_its_size(shape: tuple[int, int, int]) -> None:
    """Also where an axis is a part of one of the slice's own, such as 4 of 8 chips."""
    places = itertools.product(range(4), range(8), range(8))
    chips = [Chip(i, place) for i, place in enumerate(places)]
    mesh = make_mesh(*shape, chips)
    assert mesh.devices.shape == (1, *shape)
    assert {chip.id for chip in mesh.devices.flat} == set(range(256))
    if shape[2] == 4:  # those that talk most stand in a row
        for group in mesh.devices.reshape(-1, 4):
            for one, other in itertools.pairwise(group):
                steps = zip(one.coords, other.coords, strict=True)
                assert sum(abs(a - b) for a, b in steps) == 1

"""What a compiled program needs of a chip, and the shortest time that this can take."""

import re
from typing import NamedTuple

import jax

from pplug_jax.plan.chips import Slice
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plan.hlo import Traffic, traffic

GIB = 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of a chip's HBM.

    Attributes:
        arguments: weights, moments and batch.
        temporaries: activations, gathered weights, and the program itself.
        limit: what the compiler may use; None if it did not say, since all fits.
    """

    arguments: int
    temporaries: int
    limit: int | None = None

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.limit is None


class Cost(NamedTuple):
    """What a program computes and moves.

    Attributes:
        flops: of all chips together.
        moved: by each chip.
    """

    flops: float
    moved: Traffic

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.flops - other.flops, self.moved - other.moved)

    def bound(self, where: Slice) -> dict[str, float]:
        """Return the seconds that each of the chip's parts needs at least, if it works all the
        time.

        They work side by side: the largest is the shortest that the program can take.
        """
        return {
            "compute": self.flops / len(where.devices) / where.chip.flops,
            "HBM": self.moved.hbm / where.chip.hbm_bandwidth,
            "ICI": self.moved.received / where.ici_bandwidth if self.moved.received else 0.0,
        }

    def bound_by(self, where: Slice) -> str:
        bound = self.bound(where)
        return max(bound, key=bound.__getitem__)

    def seconds(self, where: Slice) -> float:
        return max(self.bound(where).values())


class Compiled(NamedTuple):
    """A compiled program; `text` is the optimised program, None if it does not fit."""

    traced: jax.stages.Traced
    memory: Memory
    text: str | None

    def cost(self, while_trips: int | None = None) -> Cost:
        """Return the cost; `while_trips` is how often the decoding loop runs."""
        assert self.text is not None
        flops = matmul_flops(self.traced.jaxpr, while_trips or 0)
        return Cost(flops, traffic(self.text, while_trips))


def compile_program(traced: jax.stages.Traced, held: int) -> Compiled:
    """Compile ahead of time, which may take minutes; that a program is too large is an answer as
    well.

    Args:
        traced: the program.
        held: bytes of a chip that the arguments take, which the compiler's error does not say.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used, limit = too_large(error)
        return Compiled(traced, Memory(held, used - held, limit), None)
    memory = compiled.memory_analysis()
    temporaries = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # results that take the arguments' place
        + memory.generated_code_size_in_bytes
    )
    return Compiled(traced, Memory(memory.argument_size_in_bytes, temporaries), compiled.as_text())


def too_large(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """Return (bytes needed, arguments included, and bytes available) of a program that exhausts
    HBM.

    Raises:
        JaxRuntimeError: it failed for another reason.
    """
    text = str(error)
    for pattern in (
        r"HLO temporaries \((\S+)([KMGT])\) exceeds available HBM \((\S+)([KMGT])\)",
        r"Used (\S+)([KMGT]) of (\S+)([KMGT]) hbm",
    ):
        if match := re.search(pattern, text):
            used, used_unit, limit, limit_unit = match.groups()
            return int(float(used) * _UNITS[used_unit]), int(float(limit) * _UNITS[limit_unit])
    raise error

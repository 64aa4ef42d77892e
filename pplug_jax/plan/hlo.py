"""Count what an optimised XLA program moves, from its text: HBM bytes and collectives of one chip.

XLA's own count, `cost_analysis()`, takes a loop's body once, however often it runs, and does not
tell collectives apart.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Ops that name, forward or await arrays, and so move nothing themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
}
# Ops that read of their first operand only what they give.
_SLICING = {"dynamic-slice", "slice", "gather"}


class Traffic(NamedTuple):
    """What a program moves.

    Attributes:
        hbm: bytes read and written.
        collectives: kind -> (how many, bytes that a chip receives).
    """

    hbm: float
    collectives: dict[str, tuple[float, float]]

    @property
    def received(self) -> float:
        return sum(received for _, received in self.collectives.values())

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.hbm - other.hbm,
            {
                kind: (count - other.collectives[kind][0], size - other.collectives[kind][1])
                for kind, (count, size) in self.collectives.items()
            },
        )


class _Array(NamedTuple):
    bytes: float
    in_hbm: bool


class _Instruction(NamedTuple):
    """An instruction, `name = arrays op(inside), rest`; `operands` are the names in `inside`."""

    name: str
    arrays: tuple[_Array, ...]
    op: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)

    @property
    def hbm(self) -> float:
        return sum(array.bytes for array in self.arrays if array.in_hbm)

    @property
    def collective(self) -> str | None:
        kind = self.op.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def forwards(self) -> bool:
        """Return whether it is a collective, or a part of one that runs beside other work."""
        return self.collective is not None or "AsyncCollective" in self.rest

    def called(self, *attributes: str) -> list[str]:
        names = "|".join(attributes)
        matches = re.findall(rf"\b(?:{names})=(?:%?([\w.-]+)|{{([^}}]*)}})", self.rest)
        return [name.strip(" %") for one, many in matches for name in (one or many).split(",")]


_Computation = dict[str, _Instruction]  # in order; the last one is the root


def _arrays(shape: str) -> tuple[_Array, ...]:
    arrays = []
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = 1 if dtype == "pred" else int(bits[1]) / 8 if bits else 0
        space = re.search(r"S\((\d+)\)", layout)
        size = width * math.prod(int(n) for n in dims.split(",") if n)
        arrays.append(_Array(size, space is None or space[1] == "0"))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """Return the place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unclosed parenthesis: {text[start : start + 80]}")


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Return all computations by name, and the entry's name."""
    computations: dict[str, _Computation] = {}
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif made := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
            body = line[made.end() :]
            end = _closing(body, 0) if body.startswith("(") else body.index(" ")
            opening = body.index("(", end)
            closing = _closing(body, opening)
            current[made[1]] = _Instruction(
                made[1],
                _arrays(body[:end]),
                body[end:opening].strip(),
                body[opening + 1 : closing - 1],
                body[closing:],
            )
    return computations, entry


def _group_size(rest: str, devices: int) -> int:
    """Return how many devices work together, in any of XLA's three ways to write replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def received(kind: str, result: float, group: int) -> float:
    """Return the bytes that reach a chip by the ring algorithm.

    Args:
        kind: the collective.
        result: bytes of its result on a chip.
        group: chips that work together.
    """
    return {
        "all-gather": result * (group - 1) / group,
        "all-reduce": 2 * result * (group - 1) / group,
        "reduce-scatter": result * (group - 1),
        "all-to-all": result * (group - 1) / group,
        "collective-permute": result,
    }[kind]


class _Program:
    """A parsed program, and what it moves as it is gone through."""

    def __init__(self, text: str, while_trips: int | None):
        self.computations, self.entry = _parse(text)
        self.devices = int((re.search(r"num_partitions=(\d+)", text) or ("", "1"))[1])
        self.while_trips = while_trips
        self.parameters = {
            name: {int(i.inside): i.name for i in computation.values() if i.op == "parameter"}
            for name, computation in self.computations.items()
        }
        self.collectives = {kind: (0.0, 0.0) for kind in COLLECTIVES}
        # A collective that runs beside other work stands in several fusions, with one channel.
        self.channels: set[str] = set()

    def trips(self, loop: _Instruction) -> int:
        if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
            return int(known[1])
        # The TPU compiler leaves the count out. Its loops count from 0 up to a constant: lax.scan's
        # by 1, those that multiply with what the ring has brought so far by 2.
        condition = self.computations[loop.called("condition")[0]]
        *_, root = condition.values()
        if root.op == "compare" and "direction=LT" in root.rest:
            counter, bound = (condition[operand] for operand in root.operands)
            if bound.op == "constant":
                return -(-int(bound.inside) // self._step(loop, counter))
        if self.while_trips is None:
            raise ValueError(f"the program does not say how often {loop.name} runs")
        return self.while_trips

    def _step(self, loop: _Instruction, counter: _Instruction) -> int:
        """Return what the loop's body adds to its counter, a part of the loop's tuple."""
        body = self.computations[loop.called("body")[0]]
        *_, root = body.values()
        place = re.search(r"index=(\d+)", counter.rest)
        if root.op != "tuple" or place is None:
            return 1

        def added(value: _Instruction) -> int:
            if value.op == "constant":
                return int(value.inside)
            return sum(added(body[x]) for x in value.operands) if value.op == "add" else 0

        return added(body[root.operands[int(place[1])]]) or 1

    def run(self, name: str, times: float, fused: bool = False) -> float:
        """Note the collectives of a computation; return the HBM bytes it moves, `times` times."""
        computation, moved = self.computations[name], 0.0
        for instruction in computation.values():
            if kind := instruction.collective:
                moved += times * self._collect(instruction, kind, name, times, fused)
            elif instruction.op == "while":
                trips = times * self.trips(instruction)
                for part in instruction.called("condition", "body"):
                    moved += self.run(part, trips)
            elif instruction.op in ("call", "conditional"):
                for part in instruction.called(
                    "to_apply", "branch_computations", "true_computation", "false_computation"
                ):
                    moved += self.run(part, times)
            else:
                for part in instruction.called("calls"):
                    moved += self.run(part, times, fused=True)
                if not fused:
                    moved += times * self._moved(instruction, computation)
        return moved

    def _collect(
        self, instruction: _Instruction, kind: str, inside: str, times: float, fused: bool
    ) -> float:
        """Note a collective; return the HBM bytes that it reads and writes."""
        if fused and (channel := re.search(r"channel_id=(\d+)", instruction.rest)):
            if channel[1] in self.channels:
                return 0.0
            self.channels.add(channel[1])
        arrays = instruction.arrays
        if instruction.op == "all-gather-start":  # its result are the operands and the results
            arrays = arrays[len(arrays) // 2 :]
        elif instruction.op == "collective-permute-start":  # operand, result, flags
            arrays = arrays[1:2]
        result = sum(array.bytes for array in arrays)
        group = _group_size(instruction.rest, self.devices)
        if inside.startswith("all-reduce-scatter"):  # a fusion that keeps only a slice of it
            kind, result = "reduce-scatter", result / group
        count, bytes_ = self.collectives[kind]
        self.collectives[kind] = count + times, bytes_ + times * received(kind, result, group)
        return 2 * sum(array.bytes for array in arrays if array.in_hbm)

    def _moved(self, instruction: _Instruction, computation: _Computation) -> float:
        """Return the HBM bytes that an instruction reads and writes."""
        if instruction.op in _FREE or instruction.op.endswith("-done"):
            return 0.0
        if instruction.op in ("copy-start", "slice-start"):  # its result names source and target
            between = instruction.arrays[:2]
            return min(array.bytes for array in between) * sum(a.in_hbm for a in between)
        return self._written(computation, instruction.name) + sum(
            self._read_by(instruction, place, computation[operand].hbm)
            for place, operand in enumerate(instruction.operands)
        )

    def _read_by(self, user: _Instruction, place: int, full: float) -> float:
        """Return the HBM bytes that `user` reads of its operand at `place`, which has `full`."""
        if not full or user.op == "tuple" or user.forwards:
            return 0.0  # a collective's bytes are noted with it
        if place == 0 and user.op == "dynamic-update-slice":
            return 0.0  # it is done in place
        if place == 0 and user.op in _SLICING:
            return min(full, sum(array.bytes for array in user.arrays))
        if user.op == "fusion":
            (inside,) = user.called("calls")
            return min(full, self._read(inside, self.parameters[inside][place]))
        return full

    def _read(self, inside: str, name: str) -> float:
        """Return the HBM bytes that all users of `name` read in the fused computation `inside`."""
        computation, total = self.computations[inside], 0.0
        full = computation[name].hbm
        for user in computation.values() if full else ():
            for place, operand in enumerate(user.operands):
                if operand == name and user.op == "bitcast":
                    total += self._read(inside, user.name)
                elif operand == name:
                    total += self._read_by(user, place, full)
        return total

    def _written(self, computation: _Computation, name: str) -> float:
        """Return the HBM bytes that are written to make the value `name`."""
        made = computation[name]
        if made.op == "tuple":
            return sum(self._written(computation, operand) for operand in made.operands)
        if made.op == "bitcast":
            return self._written(computation, made.operands[0])
        if made.op == "fusion":
            inside = self.computations[made.called("calls")[0]]
            return self._written(inside, next(reversed(inside)))
        if made.op == "dynamic-update-slice":
            update = computation[made.operands[1]]
            return sum(array.bytes for array in update.arrays) if made.hbm else 0.0
        if made.op in _FREE or made.forwards:
            return 0.0
        return made.hbm


def traffic(text: str, while_trips: int | None = None) -> Traffic:
    """Return what the program `compiled.as_text()` moves when it runs once.

    An array counts at every instruction that reads or writes it in HBM. Fused instructions are one,
    and arrays in on-chip memory count for nothing.

    Args:
        text: the program.
        while_trips: how often a loop runs, if the program does not say.

    Raises:
        ValueError: there is such a loop, and `while_trips` is None.
    """
    program = _Program(text, while_trips)
    return Traffic(program.run(program.entry, 1.0), program.collectives)

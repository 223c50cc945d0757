"""Communication between devices: the collective operations of a compiled program, read from its HLO text."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16}  # the names of other types contain their size: f32, s8, u4, f8e4m3fn
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"(?:condition|body|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str  # of KINDS
    size: int  # bytes of its result on each device
    devices: int  # devices in each group
    times: int  # executions per step

    @property
    def sent(self) -> float:
        """Bytes sent per device and step by ring algorithms (Thakur et al. 2005, "Optimization of Collective...")."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1.0}
        return self.times * self.size * factor.get(self.kind, share)


def find_collectives(text: str, devices: int) -> list[Collective]:
    """Returns all collectives between two or more devices; those in a loop count once per iteration.

    Args:
      text: the optimized module, as returned by `compiled.as_text()`.
      devices: devices in the mesh; the size of a group that the text does not spell out.
    """
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    times: dict[str, int] = defaultdict(int)

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            often = count * (_loop_iterations(line, bodies) if " while(" in line else 1)
            for called in CALLED.findall(line):
                for inner in re.findall(r"[\w.-]+", called):
                    if inner in bodies:
                        run(inner, often)

    run(entry, 1)
    found = []
    for name, count in times.items():
        for line in bodies[name]:
            if (match := COLLECTIVE.search(line)) and (group := _group_size(line, devices)) > 1:
                found.append(Collective(match[2], _result_bytes(match[1], asynchronous=bool(match[3])), group, count))
    return found


def _loop_iterations(loop: str, bodies: dict[str, list[str]]) -> int:
    """Returns a loop's number of iterations: annotated, or (on TPU) the bound in its condition."""
    if known := TRIPS.search(loop):
        return int(known[1])
    condition = re.findall(r"condition=%?([\w.-]+)", loop)[0]
    return max((int(match[1]) for line in bodies[condition] if (match := BOUND.search(line))), default=1)


def _result_bytes(shapes: str, *, asynchronous: bool) -> int:
    """Returns the bytes of a result. An asynchronous start also returns its operands, first, and some scalars."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * (ITEM_BITS.get(kind) or int(re.findall(r"\d+", kind)[0])) // 8
        for kind, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shapes)
        if not (asynchronous and not dims and kind == "u32")
    ]
    return sum(sizes[len(sizes) // 2 :] if asynchronous and len(sizes) > 1 else sizes)


def _group_size(line: str, devices: int) -> int:
    """Returns the group size: two for {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}."""
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(written[1].split(","))
    if computed := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(computed[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        )
    return devices

"""Communication between devices: the collective operations of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

from jlora.planning.hlo import Instruction, Program, shape_bytes, total_bytes

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


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


def find_collectives(program: Program, devices: int) -> list[Collective]:
    """Returns all collectives between two or more devices; those in a loop count once per iteration.

    Args:
      program: an optimized module.
      devices: devices in the mesh; the size of a group that the text does not spell out.
    """
    found = []
    for instruction, times, _ in program.executions(within_kernels=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS and (group := _group_size(instruction.attributes, devices)) > 1:
            size = _result_bytes(instruction)
            found.append(Collective(kind, size, group, times))
    return found


def _result_bytes(start: Instruction) -> int:
    """Returns the bytes of a result. Some starts also return their operands, first, and some scalars."""
    if start.opcode == "all-reduce-start" or not start.opcode.endswith("-start"):
        return total_bytes(start.shape)
    sizes = shape_bytes(re.sub(r"u32\[\]", "", start.shape))
    return sum(sizes[len(sizes) // 2 :])


def _group_size(attributes: str, devices: int) -> int:
    """Returns the group size: two for {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}."""
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(written[1].split(","))
    if computed := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(computed[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        )
    return devices

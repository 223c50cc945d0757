"""Reads the text of a compiled program (HLO): its instructions, how often each runs, and the bytes that it moves.

`jax.stages.Compiled.as_text()` returns this text. An instruction that runs on the device by itself is a kernel.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$")
SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
ITEM_BITS = {"pred": 8, "bf16": 16}  # the names of other types contain their size: f32, s8, u4, f8e4m3fn
CALLED = re.compile(r"(?:condition|body|calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Instructions that give another name to data, or run others.
NO_KERNELS = (
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all optimization-barrier "
    "partition-id replica-id async-start async-update async-done"
).split()
WORKSPACE = re.compile(r", [su]8\[\d*\]")  # scratch memory of a library, at the end of its results
PARTS = ("dynamic-slice", "slice", "gather")  # read a part of their first operand


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str  # of the result
    opcode: str
    operands: list[str]  # names of instructions
    attributes: str
    root: bool  # whether it is the result of its computation


class Kernel(NamedTuple):
    """An instruction that runs on the device, and how often."""

    instruction: Instruction
    times: int  # per run of the program
    read: int  # bytes each time
    written: int  # bytes each time
    inside: list[Instruction]  # what it computes

    @property
    def kind(self) -> str:
        """The kind of a GPU's kernel, for people."""
        attributes = " ".join(line.attributes for line in (self.instruction, *self.inside))
        if "__cudnn" in attributes:
            return "cuDNN"
        if "__cublas" in attributes:
            return "cuBLAS"
        if any(line.opcode == "dot" for line in self.inside):
            return "Triton product"
        if all(line.opcode in (*PARTS, *NO_KERNELS, "copy", "dynamic-update-slice") for line in self.inside):
            return "copy"
        return "fusion"


class Program:
    """The instructions of a program, by computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, lines = "", list[Instruction]()
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                lines = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif match := INSTRUCTION.match(line):
                root, name, shape, opcode, operands, attributes = match.groups()
                names = re.findall(r"%([\w.-]+)", operands)
                lines.append(Instruction(name, shape, opcode, names or [operands], attributes or "", bool(root)))

    def executions(self, *, within_kernels: bool = False) -> Iterator[tuple[Instruction, int, str]]:
        """Yields each instruction, how often it runs, and the computation that it is in; loops multiply.

        Args:
          within_kernels: yield what a kernel consists of too, not only the kernel itself.
        """

        def run(name: str, times: int) -> Iterator[tuple[Instruction, int, str]]:
            for instruction in self.computations[name]:
                yield instruction, times, name
                often = times * (self.loop_iterations(instruction) if instruction.opcode == "while" else 1)
                if within_kernels or instruction.opcode in NO_KERNELS or instruction.opcode.endswith("-start"):
                    for inner in self.called(instruction):
                        yield from run(inner, often)

        return run(self.entry, 1)

    def called(self, instruction: Instruction) -> list[str]:
        """Returns the names of the computations that an instruction names."""
        names = " ".join(CALLED.findall(instruction.attributes))
        return [name for name in re.findall(r"[\w.-]+", names) if name in self.computations]

    def loop_iterations(self, loop: Instruction) -> int:
        """Returns a loop's number of iterations: annotated, or (on TPU) the bound in its condition."""
        if known := TRIPS.search(loop.attributes):
            return int(known[1])
        condition = re.findall(r"condition=%?([\w.-]+)", loop.attributes)[0]
        bounds = [
            int(line.operands[0])
            for line in self.computations[condition]
            if line.opcode == "constant" and line.shape.startswith("s32[]")
        ]
        return max(bounds, default=1)

    def kernels(self) -> list[Kernel]:
        """Returns the kernels of the program, with the bytes that each reads and writes in the device's memory."""
        shapes = {name: {line.name: line.shape for line in lines} for name, lines in self.computations.items()}
        found = []
        for instruction, times, where in self.executions():
            if instruction.opcode in NO_KERNELS or instruction.opcode.endswith(("-start", "-done")):
                continue
            inside = [instruction]
            reads = [total_bytes(shapes[where].get(name, "")) for name in instruction.operands]
            written = result_bytes(instruction.shape)
            if instruction.opcode in PARTS:
                reads = [written]
            elif instruction.opcode == "dynamic-update-slice":
                reads, written = reads[1:2], reads[1]
            elif instruction.opcode == "fusion":
                (fused,) = self.called(instruction)
                inside = self.computations[fused]
                reads, written = self._fusion_bytes(inside, reads)
            found.append(Kernel(instruction, times, sum(reads), written, inside))
        return found

    def _fusion_bytes(self, fused: list[Instruction], reads: list[int]) -> tuple[list[int], int]:
        """Returns the bytes of each operand that a fusion reads, and the bytes that it writes.

        Of an operand that is only sliced, the slices are read; an operand that is updated in place is not read, and
        only the update is written.
        """
        by_name = {line.name: line for line in fused}

        def source(name: str) -> Instruction:
            line = by_name[name]
            return source(line.operands[0]) if line.opcode == "bitcast" else line

        updates = [line for line in fused if line.opcode == "dynamic-update-slice"]
        for parameter in (line for line in fused if line.opcode == "parameter"):
            users = [
                (line, [source(name) for name in line.operands])
                for line in fused
                if line.opcode not in ("bitcast", "parameter", "constant")
                and parameter in [source(name) for name in line.operands if name in by_name]
            ]
            if users and all(line.opcode in PARTS and of[0] == parameter for line, of in users):
                parts = sum(total_bytes(line.shape) for line, _ in users)
                reads[int(parameter.operands[0])] = min(total_bytes(parameter.shape), parts)
            elif users and all(line in updates and of[0] == parameter for line, of in users):
                reads[int(parameter.operands[0])] = 0
        root = next(line for line in fused if line.root)
        results = [source(name) for name in root.operands] if root.opcode == "tuple" else [source(root.name)]
        shapes = [by_name[r.operands[1]].shape if r in updates else r.shape for r in results]
        written = result_bytes(", ".join(shapes))
        return reads, written


def shape_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in a shape, which may be a tuple."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * (ITEM_BITS.get(kind) or int(re.findall(r"\d+", kind)[0])) // 8
        for kind, dims in SHAPE.findall(shape)
    ]


def result_bytes(shapes: str) -> int:
    """Returns the bytes of results, without the scratch memory of a library."""
    return total_bytes(WORKSPACE.sub("", shapes))


def total_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape."""
    return sum(shape_bytes(shape))

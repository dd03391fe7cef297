"""The work of a compiled program on one device: launches, copies, collectives, and the bytes that XLA's own operations move.

    hlo.parse(text) -> tally(program, weights) -> Tally

An instruction counts as often as it runs: a loop's body once a trip. Of a conditional's branches, the one that moves the fewest
bytes counts (greedy sampling); `optional_bytes` holds the further bytes of the branch that moves most. An operation moves its
operands and results. A slice or gather moves the elements that it reads, an update in place those that it writes. Zero-copy
slices around a Mosaic kernel move nothing, since kernels state their own bytes (pallas_kernels/costs.py). Values are followed
through tuples, bitcasts and loops, so that reads and copies of the weights are found everywhere.
Refuses to know times, and the effect of caches. Imports no jax.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from jaxfp8.inspection.hlo import ITEM_BYTES, Instruction, Program, Shape

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Opcodes that run nothing on the device, or whose other half is counted.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id", "replica-id", "after-all"}
_LOOKED_THROUGH = {"bitcast", "reshape", "convert", "copy", "transpose"}
_MATRIX = 1 << 16  # elements: a weight of at least this size is a matrix
_MOVES = ("parameter", "bitcast", "constant", "dynamic-slice", "slice", "tuple")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective. shapes: of the arrays that one device sends; result_bytes: bytes that it receives."""

  kind: str
  shapes: tuple[Shape, ...]
  result_bytes: int

  @property
  def given_bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def all_reduce_bytes(self) -> int:
    """The payload of an all-reduce with equal bytes on the wire. A scatter or a gather of the same array needs half of them."""
    whole = max(self.given_bytes, self.result_bytes)
    return whole if self.kind == "all-reduce" else whole // 2

  def __str__(self) -> str:
    return f"{self.kind} " + ", ".join(f"{shape.dtype}[{','.join(map(str, shape.sizes))}]" for shape in self.shapes)


@dataclasses.dataclass
class Tally:
  """The work of one run of a computation.

  kernels: calls of Mosaic kernels. operations: launches of XLA's kernels. copies: launches that only copy.
  xla_bytes: bytes that XLA's operations move. optional_bytes: further bytes of the dearest branches.
  weight_read_bytes: bytes of weights that kernels or XLA read. weight_written_bytes: bytes of matrices that XLA copies.
  loops: (trips, tally of one trip) of the loops that read weights.
  """

  kernels: int = 0
  operations: int = 0
  copies: int = 0
  xla_bytes: int = 0
  optional_bytes: int = 0
  weight_read_bytes: int = 0
  weight_written_bytes: int = 0
  collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  loops: list[tuple[int, "Tally"]] = dataclasses.field(default_factory=list)

  @property
  def launches(self) -> int:
    """Launches of any kind, collectives apart."""
    return self.kernels + self.operations + self.copies

  def add(self, other: "Tally", times: int = 1) -> None:
    """Adds `times` runs of another computation."""
    for name in ("kernels", "operations", "copies", "xla_bytes", "optional_bytes", "weight_read_bytes", "weight_written_bytes"):
      setattr(self, name, getattr(self, name) + times * getattr(other, name))
    for collective, number in other.collectives.items():
      self.collectives[collective] += times * number
    self.loops += other.loops


def tally(program: Program, weights: Sequence[int]) -> Tally:
  """The work of the program's entry computation. weights: the numbers of the parameters that are weights."""
  walker = _Walker(program)
  parameters = {number: number in set(weights) for number in range(len(program.computations[program.entry]))}
  return walker.walk(program.entry, parameters)[0]


class _Walker:
  """Counts the work of computations. The label of a value is True if the value is (part of) a weight; a tuple has a tuple."""

  def __init__(self, program: Program):
    self.program = program
    self._touched: dict[str, tuple[dict[int, int], int, set[int]]] = {}

  def walk(self, name: str, parameters, skipped: str = "") -> tuple[Tally, object]:
    """(tally, label of the root). skipped: the name of an instruction that does not count, a loop's counter."""
    total, labels, result = Tally(), {}, False
    shapes = {instruction.name: instruction for instruction in self.program.computations[name]}
    for instruction in self.program.computations[name]:
      given = [labels.get(operand, False) for operand in instruction.operands]
      labels[instruction.name] = self._label(instruction, given, parameters)
      if instruction.name != skipped:
        self._count(total, instruction, given, [shapes[x] for x in instruction.operands if x in shapes])
      if instruction.is_root:
        result = labels[instruction.name]
    return total, result

  def _label(self, instruction: Instruction, given, parameters):
    opcode = instruction.opcode
    if opcode == "parameter":
      return parameters[int(instruction.operands[0])]
    if opcode == "tuple":
      return tuple(given)
    if opcode == "get-tuple-element":
      return given[0][instruction.number("index")] if isinstance(given[0], tuple) else False
    # A loop passes its weights on unchanged, and its other results were no weights before it.
    return given[0] if opcode in ("bitcast", "while", "optimization-barrier") else False

  def _count(self, total: Tally, instruction: Instruction, given, operands: list[Instruction]) -> None:
    opcode, kind = instruction.opcode, instruction.opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode == "optimization-barrier":
      return
    if opcode == "while":
      self._loop(total, instruction, given)
    elif opcode == "conditional":
      self._conditional(total, instruction, given)
    elif opcode == "call" or kind == "async":
      total.add(self.walk(instruction.called("to_apply") or instruction.called(), dict(enumerate(given)))[0])
    elif kind in COLLECTIVES:
      shapes = tuple(shape for operand in operands for shape in operand.shapes)
      given_bytes = sum(shape.bytes for shape in shapes)
      # The result of the first half is a tuple of the arrays sent and the arrays received.
      collective = Collective(kind, shapes, instruction.bytes - (given_bytes if opcode.endswith("-start") else 0))
      total.collectives[collective] += 1
      total.xla_bytes += given_bytes + collective.result_bytes
    else:
      self._operation(total, instruction, kind, given, operands)

  def _operation(self, total: Tally, instruction: Instruction, kind: str, given, operands: list[Instruction]) -> None:
    called = instruction.called() if kind == "fusion" else ""
    gathered: set[int] = {0} if instruction.opcode == "gather" else set()
    if called:
      reads, written, gathered = self.touches(called)
      touched = [reads.get(number, 0) for number in range(len(operands))]
    else:
      touched, written = self._plain(instruction, operands), instruction.bytes
      if kind == "copy" and instruction.opcode != "copy":
        written = operands[0].bytes
    read = [number for number, label in enumerate(given) if label is True]
    total.weight_read_bytes += sum(touched[number] for number in read)
    if _is_kernel(instruction) or any(_is_kernel(inner) for inner in self.program.computations.get(called, ())):
      total.kernels += 1
      return
    if not written and not sum(touched):
      return  # an array of size 0
    is_copy = kind == "copy" or (
      called and all(inner.opcode in ("copy", *_MOVES) for inner in self.program.computations[called])
    )
    if is_copy:
      total.copies += 1
    else:
      total.operations += 1
    total.xla_bytes += sum(touched) + written
    elements = max((shape.elements for shape in instruction.shapes), default=0)
    for number in set(read) - gathered:  # rows of the embedding are activations
      if _MATRIX <= touched[number] // ITEM_BYTES[operands[number].shapes[0].dtype] <= elements:
        total.weight_written_bytes += written

  def _plain(self, instruction: Instruction, operands: list[Instruction]) -> list[int]:
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
      return [instruction.bytes, *(operand.bytes for operand in operands[1:])]
    return [operand.bytes for operand in operands]

  def _loop(self, total: Tally, instruction: Instruction, given) -> None:
    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    counter = re.search(r'known_induction_variable":\{"tuple_index":"(\d+)"', instruction.attributes)
    body = instruction.called("body")
    root = self.program.root(body)
    skipped = root.operands[int(counter[1])] if counter and root.opcode == "tuple" else ""
    tally_, _ = self.walk(body, {0: given[0]}, skipped)
    times = int(trips[1]) if trips else 1
    total.add(tally_, times)
    if tally_.weight_read_bytes:
      total.loops.append((times, tally_))

  def _conditional(self, total: Tally, instruction: Instruction, given) -> None:
    match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = (
      [name.strip().lstrip("%") for name in match[1].split(",")]
      if match
      else [instruction.called("true_computation"), instruction.called("false_computation")]
    )
    branches = [self.walk(name, {0: label})[0] for name, label in zip(names, given[1:], strict=True)]
    branches.sort(key=lambda branch: branch.xla_bytes + branch.optional_bytes)
    total.add(branches[0])
    total.optional_bytes += branches[-1].xla_bytes + branches[-1].optional_bytes - branches[0].xla_bytes

  def touches(self, name: str) -> tuple[dict[int, int], int, set[int]]:
    """({parameter: bytes read of it}, bytes written, parameters that are gathered from) of a fused computation."""
    if name not in self._touched:
      self._touched[name] = _touches(self, self.program.computations[name])
    return self._touched[name]


def _is_kernel(instruction: Instruction) -> bool:
  return instruction.opcode == "custom-call" and 'custom_call_target="mosaic' in instruction.attributes


def _touches(walker: _Walker, instructions: list[Instruction]) -> tuple[dict[int, int], int, set[int]]:
  by_name = {instruction.name: instruction for instruction in instructions}
  source: dict[str, str] = {}  # the parameter that a value is a view of, element for element
  reads: dict[str, int] = collections.defaultdict(int)
  updates: dict[str, int] = {}  # bytes that an update in place writes
  gathered = set()
  for instruction in instructions:
    operands = [source.get(operand, "") for operand in instruction.operands]
    if instruction.opcode == "parameter":
      source[instruction.name] = instruction.name
    elif instruction.opcode in _LOOKED_THROUGH and not instruction.is_root:
      source[instruction.name] = operands[0]
    else:
      inner = walker.touches(instruction.called())[0] if instruction.opcode == "fusion" else {}
      for number, parameter in enumerate(operands):
        if not parameter:
          continue
        shape = by_name[parameter].shapes[0]
        item = ITEM_BYTES[shape.dtype]
        if instruction.opcode in ("dynamic-slice", "slice", "gather") and number == 0:
          reads[parameter] += instruction.shapes[0].elements * item
          gathered |= {parameter} if instruction.opcode == "gather" else set()
        elif instruction.opcode == "fusion":
          reads[parameter] += inner.get(number, 0)
        elif not (instruction.opcode in ("dynamic-update-slice", "scatter") and number == 0):
          reads[parameter] += shape.bytes
      if instruction.opcode in ("dynamic-update-slice", "scatter"):
        value = by_name[instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]]
        updates[instruction.name] = value.bytes
  numbers = {x.name: int(x.operands[0]) for x in instructions if x.opcode == "parameter"}
  read = {numbers[name]: min(bytes_, by_name[name].bytes) for name, bytes_ in reads.items()}
  root = next(instruction for instruction in instructions if instruction.is_root)
  outputs = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
  return read, sum(_written(output, by_name, updates) for output in outputs), {numbers[name] for name in gathered}


def _written(output: Instruction, by_name: dict[str, Instruction], updates: dict[str, int]) -> int:
  name = output.name
  while name not in updates and by_name[name].opcode in _LOOKED_THROUGH:
    name = by_name[name].operands[0]
  return updates.get(name, output.bytes)

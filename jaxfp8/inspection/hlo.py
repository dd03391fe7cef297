"""The text of a compiled program (`compiled.as_text()`) as computations of instructions. Imports no jax.

    text -> parse -> Program: {computation: [Instruction]}, in the order of execution

Refuses to know the cost of instructions (traffic.py).
"""

import dataclasses
import math
import re

ITEM_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
  **dict.fromkeys(("f32", "s32", "u32"), 4),
  **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Shape:
  """The dtype (XLA's name) and axis sizes of an array."""

  dtype: str
  sizes: tuple[int, ...]

  @property
  def elements(self) -> int:
    return math.prod(self.sizes)

  @property
  def bytes(self) -> int:
    return self.elements * ITEM_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction. shapes: of its results. operands: names of instructions; a parameter's own number instead.

  attributes: the text behind the operands.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  def called(self, attribute: str = "calls") -> str:
    """The name of the computation that an attribute calls; an empty string without that attribute."""
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return match[1] if match else ""

  def number(self, attribute: str) -> int:
    """The whole number of an attribute. Raises KeyError if the instruction has no such attribute."""
    match = re.search(rf"\b{attribute}=(\d+)", self.attributes)
    if match is None:
      raise KeyError(attribute)
    return int(match[1])


@dataclasses.dataclass(frozen=True)
class Program:
  """Instructions by computation. entry: the name of the computation that runs first."""

  computations: dict[str, list[Instruction]]
  entry: str

  def root(self, name: str) -> Instruction:
    """The instruction whose result is that of the computation `name`."""
    return next(instruction for instruction in self.computations[name] if instruction.is_root)


def parse(text: str) -> Program:
  """The program of `compiled.as_text()`. Raises ValueError if the text has no entry computation."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = None, ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = match[2]
      computations[current] = []
      entry = current if match[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (match := _HEAD.match(line)):
      computations[current].append(_instruction(line[match.end() :], match[2], bool(match[1])))
  if not entry:
    raise ValueError("hlo: the text has no ENTRY computation; pass compiled.as_text().")
  return Program(computations, entry)


def _instruction(rest: str, name: str, is_root: bool) -> Instruction:
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shapes = tuple(
    Shape(dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _SHAPE.findall(re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", rest[:end]))
    if dtype in ITEM_BYTES
  )
  opening = rest.index("(", end)
  opcode = rest[end:opening].strip()
  closing = _closing(rest, opening)
  inside = rest[opening + 1 : closing - 1]
  operands = (inside,) if opcode == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name, opcode, shapes, operands, rest[closing:], is_root)


def _closing(text: str, start: int) -> int:
  """The index behind the parenthesis that closes the parenthesis at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[index], 0)
    if not depth:
      return index + 1
  raise ValueError(f"hlo: no closing parenthesis in {text[:80]!r}.")

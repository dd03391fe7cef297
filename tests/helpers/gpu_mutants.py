"""Mistakes to make in the GPU kernels on purpose, at lines that a comment `# mutant: MARK` marks.

A mistake deletes the marked statement, or replaces a part of the marked line that a regular expression finds. The expressions
name as few variables as they can, so that a rename does not break a mutant; one that no longer matches is an error.
"""

import ast
import dataclasses
import inspect
import re
import types

from pallas_kernels.fp8_matmul import sm90 as matmul
from pallas_kernels.fused import rows
from pallas_kernels.fused import sm90 as fused
from pallas_kernels.paged_attention import combine
from pallas_kernels.paged_attention import sm90 as attention


@dataclasses.dataclass(frozen=True)
class Mutant:
  """pattern, replacement: of the marked line, as re.sub takes them; no pattern: the whole statement is left out."""

  name: str
  module: types.ModuleType
  mark: str
  pattern: str = ""
  replacement: str = ""

  def __str__(self):
    return f"{self.module.__name__.split('.')[1]}: {self.name}"

  def source(self) -> str:
    """The source of the kernel's module with the mistake in it. Raises LookupError if the marked line has changed."""
    lines = inspect.getsource(self.module).splitlines()
    marked = [number for number, line in enumerate(lines) if line.endswith(f"# mutant: {self.mark}")]
    if len(marked) != 1:
      raise LookupError(f"{self}: {len(marked)} lines are marked {self.mark!r}")
    if self.pattern:
      code, comment = lines[marked[0]].rsplit("  # ", 1)
      code, count = re.subn(self.pattern, self.replacement, code)
      if count != 1:
        raise LookupError(f"{self}: {self.pattern!r} occurs {count} times in {code.strip()!r}")
      lines[marked[0]] = f"{code}  # {comment}"
    else:
      self._leave_out(lines, marked[0])
    return "\n".join(lines)

  def _leave_out(self, lines: list[str], marked: int) -> None:
    simple = (ast.Assign, ast.AugAssign, ast.Expr)
    statements = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, simple)]
    around = [node for node in statements if node.lineno <= marked + 1 <= (node.end_lineno or 0)]
    if not around:
      raise LookupError(f"{self}: no simple statement is marked")
    statement = max(around, key=lambda node: node.lineno)
    rest = len(range(statement.lineno, statement.end_lineno or 0))
    lines[statement.lineno - 1 : statement.end_lineno] = [" " * statement.col_offset + "pass", *[""] * rest]

  def load(self) -> types.ModuleType:
    """The kernels' module with the mistake in it, or in the module that its rows come from."""
    mutant = _run(self.source(), f"<{self}>", self.module)
    if self.module is not rows:
      return mutant
    kernels = _run(inspect.getsource(fused), f"<{self}>", fused)
    vars(kernels).update({name: vars(mutant)[name] for name in ("Row", "Rounding")})
    return kernels


def _run(source: str, path: str, original: types.ModuleType) -> types.ModuleType:
  module = types.ModuleType(f"{original.__name__}_mutant")
  exec(compile(source, path, "exec"), module.__dict__)
  return module


ALIKE = r"exp2\((.*)\)$", r"exp2(0 * (\1))"
SWAP = r"(\w+), (\w+) =", r"\2, \1 ="

MATMUL = (
  Mutant("drops the channel scale", matmul, "channel scale"),
  Mutant("drops the token scale", matmul, "token scale"),
  Mutant("drops the static scale", matmul, "static scale"),
  Mutant("forgets a part's token scale", matmul, "splits", r", \w+\)$", ", None)"),
  Mutant("takes the first tokens' scales for all tiles", matmul, "tokens of the groups", r"pl\.ds\(\w+", "pl.ds(0"),
  Mutant("drops the block scale", matmul, "block scale", r"\w+ = ", ""),
  Mutant("takes the first block's scale for all columns", matmul, "column of the block", r"= .*", "= jnp.int32(0)"),
  Mutant("takes the first block's scale for all rows", matmul, "row of the block", r"= .*", "= jnp.int32(0)"),
  Mutant("leaves one part only", matmul, "splits", r"\[:, :T", "[:1, :T"),
  Mutant("starts every part at column 0", matmul, "first column of a split", r"\w+ \+ k", "k"),
  Mutant("both warpgroups take the same rows", matmul, "rows of a warpgroup", r"pl\.ds\(\w+ \* \w+", "pl.ds(0"),
  Mutant("forgets what was summed before", matmul, "sum", r"= \w+ \+ ", "= "),
  Mutant("lets float16 overflow", matmul, "power of two", r"jnp\.clip\(14 - (\w+),.*\)", r"0 * \1"),
  Mutant("frees a stage with reads under way", matmul, "fence of a stage"),
  Mutant("stores a tile before it is written", matmul, "fence of a tile"),
  Mutant("writes over a tile that is being stored", matmul, "wait for a tile"),
)

ATTENTION = (
  Mutant("does not wait for K", attention, "wait for K"),
  Mutant("does not wait for V", attention, "wait for V"),
  Mutant("does not wait for the queries", attention, "wait for queries"),
  Mutant("drops the fence before P is read", attention, "fence of P"),
  Mutant("frees a stage with reads under way", attention, "fence of a stage"),
  Mutant("reuses a stage one step early", attention, "K copy", r"\[\w+, tokens\]", "[0, tokens]"),
  Mutant("drops K's scale", attention, "scale of K"),
  Mutant("drops V's scale", attention, "scale of V"),
  Mutant("swaps K and V", attention, "V copy", r"\.v_pages", ".k_pages"),
  Mutant("swaps K's and V's scales", attention, "order of scales", *SWAP),
  Mutant("sees one token too many", attention, "mask", " < ", " <= "),
  Mutant("reads the first layer's pages", attention, "page id", r"\w+ \+ gmem", "gmem"),
  Mutant("lets queries overflow float16", attention, "power of two", r"\((\w+) \* \w+\)", r"(\1)"),
  Mutant("reads the first sequence's pages", attention, "page id", r"table\[\w+,", "table[0,"),
  Mutant("loads the same page twice", attention, "next pages", r" \+ tiling\.stages", ""),
  Mutant("does not shrink what was summed before", attention, "rescale"),
  Mutant("weighs all parts alike", attention, "weights of splits", *ALIKE),
)

COMBINE = (
  Mutant("joins all parts alike", combine, "weights of splits", *ALIKE),
  Mutant("does not shrink what was joined before", combine, "rescale"),
  Mutant("loses the last parts", combine, "last splits"),
  Mutant("scales a group with its first head", combine, "largest of a group", r"in (\w+)\)\)", r"in \1[:1]))"),
  Mutant("scales with one head's largest value", combine, "largest value", r"in (\w+)\)\)", r"in \1[:1]))"),
)

FUSED = (
  Mutant("drops the residual", fused, "residual", r" \+ \w+\.astype\(jnp\.float32\)", ""),
  Mutant("a warpgroup sums alone", rows, "lone warpgroup", r"if .*:", "if True:"),
  Mutant("warpgroups do not wait for each other", rows, "wait for warpgroups"),
  Mutant("both meetings share their places", rows, "number of the meeting", r"$", " * 0"),
  Mutant("takes one scale for all groups", rows, "scale of a group", r"axis=1\)", "axis=1) * 0 + jnp.max(jnp.abs(piece))"),
  Mutant("writes all groups' scales to one place", rows, "place of a group's scale", r"at\[part\]", "at[pl.ds(0, row.piece)]"),
  Mutant("all warpgroups write the scale", rows, "writer of the scale", r"pl\.when\(.*\)", "pl.when(token >= 0)"),
  Mutant("drops the norm's weight", fused, "weight of the norm", r"\((\w+ \* \w+) \* \w+\)", r"(\1)"),
  Mutant("swaps gate and up", fused, "gate and up", *SWAP),
  Mutant("forgets the token's scale", fused, "token scale", r"\[\w+\]", "[0]"),
  Mutant("writes to the first layer's pages", fused, "page id", r"= .* \+ ", "= "),
  Mutant("writes one place further", fused, "position", r" - \(.*\)$", ""),
  Mutant("writes to the first sequence's pages", fused, "page id", r"table\[(\w+),", r"table[\1 * 0,"),
  Mutant("swaps keys and values", fused, "keys", r"\(k,", "(v,"),
  Mutant("writes keys that are not turned", fused, "rotated keys", r"= \w+\((\w+\(G, 1\)), .*$", r"= \1"),
  Mutant("turns the other way", fused, "rotation", " - ", " + "),
  Mutant("drops the pages' scale", fused, "scale of pages"),
  Mutant("writes what nobody asked for", fused, "padding", ">= 0", ">= -1"),
)

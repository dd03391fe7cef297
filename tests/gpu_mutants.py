"""Mistakes to make in the GPU kernels on purpose: each is a piece of source and what replaces it."""

import dataclasses
import inspect
import types

from pallas_kernels.fp8_matmul import wgmma as matmul
from pallas_kernels.paged_attention import wgmma as attention


@dataclasses.dataclass(frozen=True)
class Mutant:
  name: str
  module: types.ModuleType
  old: str
  new: str

  def __str__(self):
    return f"{self.module.__name__.split('.')[1]}: {self.name}"

  def load(self) -> types.ModuleType:
    """The kernel's module with the mistake in it."""
    source = inspect.getsource(self.module)
    assert source.count(self.old) == 1, f"{self}: {source.count(self.old)} places have {self.old!r}; the kernel has changed"
    mutant = types.ModuleType(f"{self.module.__name__}_mutant")
    exec(compile(source.replace(self.old, self.new), f"<{self}>", "exec"), mutant.__dict__)
    return mutant


MATMUL = (
  Mutant("drops the channel scale", matmul, "y_FT = y_FT * channel_scale[:, None]", "pass"),
  Mutant("drops the token scale", matmul, "y_FT = y_FT * x_scale", "pass"),
  Mutant("drops the block scale", matmul, "product = product * block_scale(", "product + block_scale("),
  Mutant("takes the first block's scale for all columns", matmul, "lax.div(column, jnp.int32(api.BLOCK))", "jnp.int32(0)"),
  Mutant("takes the first block's scale for all rows", matmul, "jnp.minimum(block_row, last)", "jnp.int32(0)"),
  Mutant("sums one part only", matmul, "[:, :F, :T], axis=0)", "[:1, :F, :T], axis=0)"),
  Mutant("starts every part at column 0", matmul, "lambda k: (row_tile, first_step + k)", "lambda k: (row_tile, k)"),
  Mutant("both warpgroups take the same rows", matmul, "w_smem.at[pl.ds(wg * WG_ROWS,", "w_smem.at[pl.ds(0,"),
  Mutant("forgets what was summed before", matmul, "total = total + product", "total = product"),
  Mutant("lets float16 overflow", matmul, "shift = jnp.clip(14 - exponent, -126, 126)", "shift = 0 * exponent"),
  Mutant("frees a stage with reads under way", matmul, "plgpu.commit_smem()  # these reads", "pass  # these reads"),
  Mutant("stores a tile before it is written", matmul, "plgpu.commit_smem()\n          plgpu.copy", "plgpu.copy"),
  Mutant("writes over a tile that is being stored", matmul, "plgpu.wait_smem_to_gmem(0, wait_read_only=True)", "pass"),
)

ATTENTION = (
  Mutant("does not wait for K", attention, "plgpu.barrier_wait(k_barrier.at[slot])", "pass"),
  Mutant("does not wait for V", attention, "plgpu.barrier_wait(v_barrier.at[slot])", "pass"),
  Mutant("does not wait for the queries", attention, "plgpu.barrier_wait(q_barrier)", "pass"),
  Mutant("drops the fence before P is read", attention, "plgpu.commit_smem()\n      plgpu.barrier_wait", "plgpu.barrier_wait"),
  Mutant("frees a stage with reads under way", attention, "plgpu.commit_smem()  # these reads", "pass  # these reads"),
  Mutant("reuses a stage one step early", attention, "k_smem.at[slot, tokens], k_barrier", "k_smem.at[0, tokens], k_barrier"),
  Mutant("drops K's scale", attention, "s = s * over_rows(k_scale) + ", "s = s + "),
  Mutant("drops V's scale", attention, "+ over_rows(jnp.log2(v_scale))", ""),
  Mutant("swaps K's and V's scales", attention, "k_scale, v_scale = (plgpu", "v_scale, k_scale = (plgpu"),
  Mutant("sees one token too many", attention, "position < over_columns(limit)", "position <= over_columns(limit)"),
  Mutant("reads the first sequence's pages", attention, "table_gmem[sequence, ", "table_gmem[0, "),
  Mutant("loads the same page twice", attention, "first + i + tiling.stages)  # early", "first + i)  # early"),
  Mutant("does not shrink what was summed before", attention, "[block * over_columns(shrink) for", "[block for"),
  Mutant("weighs all parts alike", attention, "weights = jnp.exp2(log_sum - ", "weights = jnp.exp2(0 * log_sum - 0 * "),
)

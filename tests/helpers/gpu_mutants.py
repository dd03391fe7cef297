"""Mistakes to make in the GPU kernels on purpose: each is a piece of source and what replaces it."""

import dataclasses
import inspect
import types

from pallas_kernels.fp8_matmul import sm90 as matmul
from pallas_kernels.fused import sm90 as fused
from pallas_kernels.paged_attention import combine
from pallas_kernels.paged_attention import sm90 as attention


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
  Mutant("drops the channel scale", matmul, "total = total * lax.broadcast_in_dim(per_row, total.shape, [1])", "pass"),
  Mutant("drops the token scale", matmul, "total = total * lax.broadcast_in_dim(per_token, total.shape, [0])", "pass"),
  Mutant("drops the static scale", matmul, "total = total * scale_gmem[-1][0]", "pass"),
  Mutant("forgets a part's token scale", matmul, ":F], channel_scale, x_scale)", ":F], channel_scale, None)"),
  Mutant("drops the block scale", matmul, "product = product * block_scale(", "product + block_scale("),
  Mutant("takes the first block's scale for all columns", matmul, "lax.div(column, jnp.int32(api.BLOCK))", "jnp.int32(0)"),
  Mutant("takes the first block's scale for all rows", matmul, "jnp.minimum(block_row, last)", "jnp.int32(0)"),
  Mutant("leaves one part only", matmul, "form, tiling, jnp.float32)[:, :T, :F]", "form, tiling, jnp.float32)[:1, :T, :F]"),
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
  Mutant("swaps K and V", attention, "copy_gmem_to_smem(v_gmem.at[page, head]", "copy_gmem_to_smem(k_gmem.at[page, head]"),
  Mutant("swaps K's and V's scales", attention, "k_scale, v_scale = (plgpu", "v_scale, k_scale = (plgpu"),
  Mutant("sees one token too many", attention, "position < limit", "position <= limit"),
  Mutant("reads the first layer's pages", attention, "first_page + table_gmem[", "table_gmem["),
  Mutant("lets queries overflow float16", attention, "(given * up).astype", "given.astype"),
  Mutant("reads the first sequence's pages", attention, "table_gmem[sequence, ", "table_gmem[0, "),
  Mutant("loads the same page twice", attention, "first + i + tiling.stages)  # early", "first + i)  # early"),
  Mutant("does not shrink what was summed before", attention, "[block * over_columns(shrink) for", "[block for"),
  Mutant("weighs all parts alike", attention, "weights = jnp.exp2(log_sum - ", "weights = jnp.exp2(0 * log_sum - 0 * "),
)

COMBINE = (
  Mutant("joins all parts alike", combine, "weight = jnp.exp2(log_sum - new_top)", "weight = jnp.exp2(0 * log_sum)"),
  Mutant("does not shrink what was joined before", combine, "joined * over_channels(shrink), total * shrink", "joined, total"),
  Mutant("loses the last parts", combine, "carry = add(S - S % at_once, S % at_once, carry) if", "carry = carry if"),
  Mutant("scales with one head's largest value", combine, "(jnp.abs(x) for x in joined))", "(jnp.abs(x) for x in joined[:1]))"),
)

FUSED = (
  Mutant("drops the residual", fused, "a.astype(jnp.float32) + b.astype(jnp.float32)", "a.astype(jnp.float32)"),
  Mutant("a warpgroup sums alone", fused, "if self.num_wgs == 1:", "if True:"),
  Mutant("warpgroups do not wait for each other", fused, "plgpu.barrier_wait(barrier.at[call])", "pass"),
  Mutant("both meetings share their places", fused, "call = next(calls)", "call = next(calls) * 0"),
  Mutant("all warpgroups write the scale", fused, '@pl.when(lax.axis_index("wg") == 0)', "@pl.when(token >= 0)"),
  Mutant("drops the norm's weight", fused, "(a * factor * w)", "(a * factor)"),
  Mutant("swaps gate and up", fused, "zip(half(0), half(1)", "zip(half(1), half(0)"),
  Mutant("forgets the token's scale", fused, "scales[1][token if self._per_token else 0]", "scales[1][0]"),
  Mutant("writes to the first layer's pages", fused, "page = first_gmem[0] + table_gmem", "page = table_gmem"),
  Mutant("writes one place further", fused, "- (1 if query_starts is None else 0)", ""),
  Mutant("writes to the first sequence's pages", fused, "table_gmem[sequence, ", "table_gmem[sequence * 0, "),
  Mutant("swaps keys and values", fused, "enumerate((k, v))", "enumerate((v, k))"),
  Mutant("writes keys that are not turned", fused, "turned(load(G, 1), row_layout(1))", "load(G, 1)"),
  Mutant("turns the other way", fused, "(x[0] * cos - x[1] * sin)", "(x[0] * cos + x[1] * sin)"),
  Mutant("drops the pages' scale", fused, "if scale is not None:", "if False:"),
  Mutant("writes what nobody asked for", fused, "@pl.when(position >= 0)", "@pl.when(position >= -1)"),
)

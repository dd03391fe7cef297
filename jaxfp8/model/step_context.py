"""`StepContext`: the pages, rotary angles and row partition that all layers of a step share.

Refuses to know weights and layers (layers.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfp8.config import LlamaConfig
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.sharding import Axes, concatenate_over, scatter_over, sum_over
from pallas_kernels import Quantized


@dataclasses.dataclass(frozen=True)
class StepContext:
  """The arrays that all layers of a step share: the pages of its tokens, and their rotary angles.

  row_axes: mesh axes that the rows of the residual stream are cut over (llama.py); None if each device has all rows.
  first_page: of the layer that runs, in the flattened pool of all layers.
  """

  page_table_BM: jax.Array
  query_starts: jax.Array | None
  lengths_B: jax.Array
  cos_TH: jax.Array  # [T, H / 2]
  sin_TH: jax.Array
  row_axes: Axes = None
  first_page: jax.Array | int = 0

  @classmethod
  def of(cls, batch: PrefillBatch | DecodeBatch, config: LlamaConfig, row_axes: Axes = None) -> "StepContext":
    with jax.named_scope("rope_angles"):
      _, position_T = batch.token_positions()
      angles = position_T[:, None].astype(jnp.float32) * config.rope.inverse_frequencies(config.head_dim)
      cos_TH, sin_TH = jnp.cos(angles), jnp.sin(angles)
    return cls(batch.page_table_BM, batch.query_starts, batch.lengths_B, cos_TH, sin_TH, row_axes)

  def reduce(self, y_TD: jax.Array, axes: Axes) -> jax.Array:
    """The sum over `axes` of the devices' parts of the residual stream: all rows, or only this device's (row_axes)."""
    with jax.named_scope("reduce"):
      return sum_over(y_TD, axes) if self.row_axes is None else scatter_over(y_TD, self.row_axes)

  def gather_rows[T: jax.Array | Quantized](self, normed: T) -> T:
    """All-gathers the normed activations over `row_axes`; they are already float8 if the next linear reads float8."""
    with jax.named_scope("gather"):
      if not isinstance(normed, Quantized):
        return concatenate_over(normed, self.row_axes)
      values, scale = normed
      if scale.ndim:  # tokens are the last axis of scales
        scale = concatenate_over(scale.T, self.row_axes).T
      return Quantized(concatenate_over(values, self.row_axes), scale)

  def at_page(self, first_page: jax.Array) -> "StepContext":
    """The context of the layer whose pages begin at `first_page` in the flattened pool."""
    return dataclasses.replace(self, first_page=first_page)

"""The parts of a Llama as Flax NNX modules: `Linear`, `SplitLinear`, `RMSNorm`, `Attention`, `Mlp`, `DecoderLayer`.

Modules own weights and nothing else; layer_builder.py declares these weights. Every stage runs in a `jax.named_scope`, so that
profiles show attention.qkv, mlp.down and so on. Refuses to know how layers are stacked and run (llama.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

import pallas_kernels
from jaxfp8.model.fp8 import QArray, quantize_tokens
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.step_context import StepContext
from jaxfp8.recipe import Precision
from jaxfp8.sharding import Axes, abstract_array
from pallas_kernels import PartialSums, Quantized

if TYPE_CHECKING:
  from jaxfp8.model.layer_builder import LayerBuilder


@dataclasses.dataclass(frozen=True)
class Runtime:
  """The static choices of a run that are no sizes.

  axes: mesh axes that partial results are summed over; None without a mesh.
  implementation, target: which kernels, and for which device (see pallas_kernels).
  activations: the format of the inputs of linear layers. stream: that of the residual stream, embedding and head.
  activation_bound: the largest amax of a dynamic float8 scale of activations; None: no bound.
  """

  axes: Axes = None
  implementation: str = "auto"
  target: pallas_kernels.Target | None = None
  activations: Precision = Precision.BF16
  stream: Precision = Precision.BF16
  activation_bound: float | None = None

  @property
  def stream_dtype(self) -> np.dtype:
    return self.stream.dtype

  @property
  def kernels(self) -> dict[str, Any]:
    """The keyword arguments that every operation of pallas_kernels takes."""
    return {"implementation": self.implementation, "target": self.target}


class Linear(nnx.Module):
  """y [T, F...] = x [T, D] @ w^T for a weight [F..., D], float8 with scales or plain."""

  def __init__(self, weight, partition, runtime: Runtime, input_scale=None):
    self.weight = nnx.Param(weight, partition=partition)
    self.input_scale = None if input_scale is None else nnx.Param(input_scale, partition=PartitionSpec())
    self.runtime = runtime

  @property
  def static_scale(self) -> jax.Array | None:
    """The stored scale of its float8 inputs, float32 []; None if each token has its own."""
    return None if self.input_scale is None else self.input_scale.get_value()

  @property
  def quantizes(self) -> bool:
    """Whether the layer multiplies float8 activations."""
    return self.runtime.activations == Precision.FP8 and isinstance(self.weight.get_value(), QArray)

  @property
  def has_grouped_inputs(self) -> bool:
    """Whether float8 inputs have a dynamic scale per token and group of 128 columns: so do weights that have block scales."""
    weight = self.weight.get_value()
    return self.quantizes and self.static_scale is None and weight.scale.ndim == weight.qvalue.ndim

  @property
  def bound(self) -> float | None:
    """The largest amax of a dynamic scale of its float8 inputs; None: no bound."""
    return self.runtime.activation_bound if self.quantizes and self.static_scale is None else None

  @property
  def rounding(self) -> dict[str, Any]:
    """The keyword arguments of an operation of pallas_kernels whose result this layer reads.

    Operations know no bound of scales, so they leave the rounding of bounded inputs to this layer.
    """
    quantize = self.quantizes and self.bound is None
    return {"quantize": quantize, "static_scale": self.static_scale, "grouped": self.has_grouped_inputs}

  def partial_sums(self, x_TD: jax.Array | Quantized, out_dtype=None) -> PartialSums:
    """The product as the kernel leaves it, with F... flattened, for an operation that sums and scales it."""
    weight, x_scale, scale = self.weight.get_value(), None, None
    if self.quantizes and not isinstance(x_TD, Quantized):
      x_TD = quantize_tokens(x_TD, self.static_scale, grouped=self.has_grouped_inputs, bound=self.bound)
    if isinstance(x_TD, Quantized):
      x_TD, x_scale = x_TD
    if isinstance(weight, QArray):
      weight, scale = weight.qvalue, weight.scale
      scale = scale.reshape(-1) if scale.ndim < weight.ndim else scale.reshape(-1, scale.shape[-1])
    return pallas_kernels.fp8_matmul_sums(
      x_TD,
      weight.reshape(-1, weight.shape[-1]),
      scale,
      x_scale,
      out_dtype=out_dtype or self.runtime.stream_dtype,
      **self.runtime.kernels,
    )

  def __call__(self, x_TD: jax.Array | Quantized, out_dtype=None) -> jax.Array:
    """[T, F...] in `out_dtype`, by default that of the residual stream."""
    weight = self.weight.get_value()
    y = self.partial_sums(x_TD, out_dtype).finish(out_dtype or self.runtime.stream_dtype)
    return y.reshape(y.shape[0], *weight.shape[:-1])


class SplitLinear(nnx.Module):
  """The matrices of a merged weight apart, since their formats differ. Each reads the same activations in its own way.

  parts: q, k and v, or gate and up: each a Linear whose weight has the axes of the merged weight, [F1, F2, .., D], and its own
    part of axis F2 of qkv ([K, G, H, D] and twice [K, 1, H, D]), or of axis F1 of gate_up ([1, F, D] each).
  """

  # A norm must not round for one matrix what another reads unrounded.
  rounding: ClassVar[dict[str, Any]] = {"quantize": False, "static_scale": None, "grouped": False}

  def __init__(self, parts: Sequence[Linear], axis: int):
    self.parts, self.axis = nnx.List(parts), axis

  def partial_sums(self, x_TD: jax.Array | Quantized, out_dtype=None) -> PartialSums:
    """The product in the order of the merged weight, finished."""
    y = jnp.concatenate([part(x_TD, out_dtype) for part in self.parts], axis=self.axis)
    return PartialSums(y.reshape(1, y.shape[0], -1))


class RMSNorm(nnx.Module):
  """Adds a sublayer's result to the residual stream and normalizes the sum for `reader`, the linear that takes it."""

  def __init__(self, shape: tuple[int, ...], eps: float, runtime: Runtime):
    self.weight = nnx.Param(abstract_array(shape, jnp.float32), partition=PartitionSpec())
    self.eps, self.runtime = eps, runtime

  def __call__(self, x_TD: jax.Array, y_TD: jax.Array, reader: Linear | SplitLinear) -> tuple[jax.Array, jax.Array | Quantized]:
    """(x + y, its norm), both [T, D]; the norm is `Quantized` if the reader multiplies float8 activations."""
    weight_D = self.weight.get_value()
    with jax.named_scope("norm"):
      return pallas_kernels.residual_norm(x_TD, y_TD, weight_D, eps=self.eps, **reader.rounding, **self.runtime.kernels)


class Attention(nnx.Module):
  """Grouped-query attention. qkv is [K, G + 2, H, D]: for each KV head its G query heads, its key and its value."""

  def __init__(self, build: "LayerBuilder"):
    self.qkv = build.merged("qkv")
    self.o = build.single("o")
    self.k_scale, self.v_scale = build.kv_scale(), build.kv_scale()
    self.runtime = build.runtime

  @property
  def static_scales(self) -> tuple[jax.Array, jax.Array] | None:
    """The stored scales of float8 keys and values, float32 [K] each; None if each token has its own."""
    if self.k_scale is None or self.v_scale is None:
      return None
    return self.k_scale.get_value(), self.v_scale.get_value()

  def __call__(self, x_TD: jax.Array | Quantized, pool: KVCache, context: StepContext) -> tuple[jax.Array, KVCache]:
    """(the attention's part of the residual stream [T, D], the pool with the keys and values of these tokens)."""
    kernels = {"first_page": context.first_page, **self.runtime.kernels}
    pages_of_tokens = context.page_table_BM, context.query_starts, context.lengths_B
    with jax.named_scope("attention.qkv"):
      qkv = self.qkv.partial_sums(x_TD)
    with jax.named_scope("attention.rope"):
      q_TNH, pages = pallas_kernels.rope_write(
        qkv,
        context.cos_TH,
        context.sin_TH,
        pool.pools,
        *pages_of_tokens,
        static_scales=self.static_scales,
        dtype=self.runtime.stream_dtype,
        **kernels,
      )
    pool = KVCache.of(pages)
    with jax.named_scope("attention.pages"):
      out = pallas_kernels.paged_attention(
        q_TNH,
        pool.k_pages,
        pool.v_pages,
        *pages_of_tokens,
        k_scale=pool.k_scale,
        v_scale=pool.v_scale,
        **self.o.rounding,
        **kernels,
      )
    with jax.named_scope("attention.o"):
      out = out if isinstance(out, Quantized) else out.reshape(out.shape[0], -1)
      return context.reduce(self.o(out), self.runtime.axes), pool


class Mlp(nnx.Module):
  """SwiGLU (Shazeer, arXiv 2002.05202): down(silu(gate(x)) * up(x)), with gate and up as one array [2, F, D]."""

  def __init__(self, build: "LayerBuilder"):
    self.gate_up = build.merged("gate_up")
    self.down = build.single("down")
    self.runtime = build.runtime

  def __call__(self, x_TD: jax.Array | Quantized, context: StepContext) -> jax.Array:
    """The MLP's part of the residual stream, [T, D]."""
    rounding = {**self.down.rounding, "dtype": self.runtime.stream_dtype}
    with jax.named_scope("mlp.gate_up"):
      gate_up = self.gate_up.partial_sums(x_TD)
    with jax.named_scope("mlp.silu"):
      hidden = pallas_kernels.silu_multiply(gate_up, **rounding, **self.runtime.kernels)
    with jax.named_scope("mlp.down"):
      return context.reduce(self.down(hidden), self.runtime.axes)


class DecoderLayer(nnx.Module):
  """One layer, or a stack of equal ones: every weight has a leading layer axis until the scan takes it off."""

  def __init__(self, build: "LayerBuilder"):
    norm = (build.num_layers, build.config.d_model), build.config.rms_norm_eps, build.runtime
    self.attention_norm = RMSNorm(*norm)
    self.attention = Attention(build)
    self.mlp_norm = RMSNorm(*norm)
    self.mlp = Mlp(build)

  def __call__(
    self, x_TD: jax.Array, y_TD: jax.Array, pool: KVCache, context: StepContext
  ) -> tuple[jax.Array, jax.Array, KVCache]:
    """(x, y, pool) after this layer: the residual stream is x + y, both [T, D].

    y is the result of the last sublayer. The next norm adds it, so that the sum, the norm and the rounding to float8 are one
    operation.
    """
    x_TD, normed = self.attention_norm(x_TD, y_TD, self.attention.qkv)
    y_TD, pool = self.attention(context.gather_rows(normed), pool, context)
    x_TD, normed = self.mlp_norm(x_TD, y_TD, self.mlp.gate_up)
    return x_TD, self.mlp(context.gather_rows(normed), context), pool

"""`KVCache`: keys and values of all layers in one pool of pages, as a functional record.

The pool is an argument and a result. Inside a step it is flattened (free) to [L * P, ...], and layer l adds l * P to its page
table: slicing a layer's pool out would copy it. Refuses to know which sequence owns which page (see pages.py).
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, PAGE_SIZES, Precision
from jaxfp8.sharding import DATA, KV


@flax.struct.dataclass
class KVCache:
  """The pool. With float8 pages, k_scale and v_scale hold one float32 per token and head; else they are None.

  k_pages: [L, P, K, C, H]; v_pages: [L, P, K, H, C], since FP8 tensor cores want V with tokens last.
  k_scale, v_scale: float32 [L, P, K, C] or None.
  """

  k_pages: jax.Array
  v_pages: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None

  @classmethod
  def abstract(cls, config: LlamaConfig, num_pages: int, dtype: str = "bf16", page_size: int = DEFAULT_PAGE_SIZE) -> "KVCache":
    """Shapes and dtypes only. `dtype` is one of a Recipe's `kv`. Raises InputError for another page size or dtype."""
    if page_size not in PAGE_SIZES:
      raise InputError(f"cache: page_size must be one of {PAGE_SIZES}; got {page_size}.")
    if dtype not in tuple(Precision):
      raise InputError(f"cache: dtype must be one of {', '.join(Precision)}; got {dtype!r}.")
    if num_pages < 1:
      raise InputError(f"cache: num_pages must be at least 1; got {num_pages}.")
    L, P, K, C, H = config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim
    precision = Precision(dtype)
    scale = jax.ShapeDtypeStruct((L, P, K, C), jnp.float32) if precision.dynamic is Precision.FP8 else None
    return cls(
      k_pages=jax.ShapeDtypeStruct((L, P, K, C, H), precision.dtype),
      v_pages=jax.ShapeDtypeStruct((L, P, K, H, C), precision.dtype),
      k_scale=scale,
      v_scale=scale,
    )

  @classmethod
  def init(cls, config: LlamaConfig, num_pages: int, dtype: str = "bf16", page_size: int = DEFAULT_PAGE_SIZE) -> "KVCache":
    """An empty pool on the default device."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cls.abstract(config, num_pages, dtype, page_size))

  @property
  def page_size(self) -> int:
    """C. The token axis is the second to last of k_pages, flat or not."""
    return self.k_pages.shape[-2]

  @property
  def nbytes(self) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def specs(self) -> "KVCache":
    """How the pool is cut over the mesh: pages over data, KV heads over kv."""
    return jax.tree.map(lambda leaf: PartitionSpec(None, DATA, KV), self)

  def check(self, config: LlamaConfig, num_kv_heads: int) -> None:
    """Raises InputError, naming the axis and both sizes, unless this is a pool for that model (K as one device holds it)."""
    way_out = "Make it with KVCache.init(model.config, ..)."
    for name, letters in (("k_pages", "LPKCH"), ("v_pages", "LPKHC")):
      shape = getattr(self, name).shape
      if len(shape) != len(letters):
        raise InputError(f"KVCache: {name} must be [{', '.join(letters)}]; got {tuple(shape)}. {way_out}")
      for axis, wanted in (("L", config.num_layers), ("K", num_kv_heads), ("H", config.head_dim)):
        size = shape[letters.index(axis)]
        if size != wanted:
          raise InputError(f"KVCache: {name} must have {axis} = {wanted} for this model; got {axis} = {size}. {way_out}")

  def flatten(self) -> "KVCache":
    """[L, P, ...] -> [L * P, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self)

  def unflatten(self, num_layers: int) -> "KVCache":
    return jax.tree.map(lambda leaf: leaf.reshape(num_layers, -1, *leaf.shape[1:]), self)

  @property
  def pools(self) -> tuple[jax.Array, ...]:
    """The arrays that there are, in order."""
    return tuple(pool for pool in (self.k_pages, self.v_pages, self.k_scale, self.v_scale) if pool is not None)

  @classmethod
  def of(cls, pools: tuple[jax.Array, ...]) -> "KVCache":
    """The cache whose `pools` these are."""
    return cls(*pools, *(None,) * (4 - len(pools)))

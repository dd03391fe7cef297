"""`KVCache`: keys and values of all layers in one pool of pages, as a functional record.

The pool is an argument and a result of every step. Inside a step it is flattened (free) to [L * P, ...], and layer l adds l * P
to its page table: a slice of one layer's pool would be a copy. Refuses to know which sequence owns which page (pages.py).
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.recipe import DEFAULT_PAGE_SIZE, PAGE_SIZES, Precision
from jaxfp8.sharding import DATA, KV, abstract_array


@flax.struct.dataclass
class KVCache:
  """The pool. With float8 pages, k_scale and v_scale hold one float32 per token and head; otherwise they are None.

  k_pages: [L, P, K, C, H]; v_pages: [L, P, K, H, C], since FP8 tensor cores want V with tokens last.
  k_scale, v_scale: float32 [L, P, K, C] or None.
  """

  k_pages: jax.Array
  v_pages: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None

  @classmethod
  def abstract(cls, config: LlamaConfig, num_pages: int, dtype: str = "bf16", page_size: int = DEFAULT_PAGE_SIZE) -> "KVCache":
    """Shapes and dtypes only.

    num_pages: P. dtype: a value of a Recipe's `kv`. page_size: C, one of PAGE_SIZES. Raises InputError for other values.
    """
    if page_size not in PAGE_SIZES:
      raise InputError(f"cache: page_size must be one of {PAGE_SIZES}; got {page_size}.")
    if dtype not in tuple(Precision):
      raise InputError(f"cache: dtype must be one of {', '.join(Precision)}; got {dtype!r}.")
    if num_pages < 1:
      raise InputError(f"cache: num_pages must be at least 1; got {num_pages}.")
    L, P, K, C, H = config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim
    precision = Precision(dtype)
    scale = abstract_array((L, P, K, C), jnp.float32) if precision.dynamic is Precision.FP8 else None
    return cls(
      k_pages=abstract_array((L, P, K, C, H), precision.dtype),
      v_pages=abstract_array((L, P, K, H, C), precision.dtype),
      k_scale=scale,
      v_scale=scale,
    )

  @classmethod
  def init(cls, config: LlamaConfig, num_pages: int, dtype: str = "bf16", page_size: int = DEFAULT_PAGE_SIZE) -> "KVCache":
    """A pool of zeros on the default device. Arguments and errors are those of `abstract`."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cls.abstract(config, num_pages, dtype, page_size))

  @property
  def page_size(self) -> int:
    """C. The token axis is the second to last of k_pages, flat or not."""
    return self.k_pages.shape[-2]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays of the pool."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def specs(self) -> "KVCache":
    """The PartitionSpec of each array: pages are cut over data, KV heads over kv."""
    return jax.tree.map(lambda leaf: PartitionSpec(None, DATA, KV), self)

  def check(self, config: LlamaConfig, num_kv_heads: int) -> None:
    """Raises InputError, naming the axis and both sizes, unless the pool fits the model. num_kv_heads: K on one device."""
    way_out = "Make it with KVCache.init(model.config, ..)."
    for name, letters in (("k_pages", "LPKCH"), ("v_pages", "LPKHC")):
      shape = getattr(self, name).shape
      if len(shape) != len(letters):
        raise InputError(f"KVCache: {name} must be [{', '.join(letters)}]; got {tuple(shape)}. {way_out}")
      for axis, expected in (("L", config.num_layers), ("K", num_kv_heads), ("H", config.head_dim)):
        size = shape[letters.index(axis)]
        if size != expected:
          raise InputError(f"KVCache: {name} must have {axis} = {expected} for this model; got {axis} = {size}. {way_out}")

  def flatten(self) -> "KVCache":
    """[L, P, ...] -> [L * P, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self)

  def unflatten(self, num_layers: int) -> "KVCache":
    """[L * P, ...] -> [L, P, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(num_layers, -1, *leaf.shape[1:]), self)

  @property
  def pools(self) -> tuple[jax.Array, ...]:
    """(k_pages, v_pages), followed by (k_scale, v_scale) for float8 pages."""
    return tuple(pool for pool in (self.k_pages, self.v_pages, self.k_scale, self.v_scale) if pool is not None)

  @classmethod
  def of(cls, pools: tuple[jax.Array, ...]) -> "KVCache":
    """The cache with these arrays; the inverse of `pools`."""
    return cls(*pools, *(None,) * (4 - len(pools)))

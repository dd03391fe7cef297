"""Wrong shapes raise InputErrors that name the axis and both sizes, while tracing; random weights are as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfp8
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.model import fp8
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import Recipe
from tests.helpers import tiny_llamas, tiny_models

CONFIG = tiny_models.make_config("gqa_9_3_untied")


def ints(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def run(batch, cache=None):
  """Traces only: the model is abstract."""
  model = Llama(CONFIG, tiny_llamas.F32)
  return jax.eval_shape(
    lambda model, cache, batch: model(batch, cache), model, cache or KVCache.abstract(CONFIG, 4, "f32"), batch
  )


def test_matching_shapes_are_traced():
  hidden, _ = run(PrefillBatch(ints(7), ints(3), ints(2), ints(2, 4)))
  assert hidden.shape == (7, CONFIG.d_model)
  hidden, _ = run(DecodeBatch(ints(2), ints(2), ints(2, 4)))
  assert hidden.shape == (2, CONFIG.d_model)


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    (PrefillBatch(ints(7), ints(3), ints(2), ints(5, 4)), "page_table_BM must have B = 2, the B of lengths_B; got 5"),
    (
      PrefillBatch(ints(7), ints(2), ints(2), ints(2, 4)),
      r"query_starts must have B \+ 1 = 3, one more than the B = 2 .*; got 2",
    ),
    (PrefillBatch(ints(2, 7), ints(3), ints(2), ints(2, 4)), r"tokens_T must be \[T\]; got 2 axes, \(2, 7\)"),
    (PrefillBatch(ints(7), ints(3), ints(2), ints(4)), r"page_table_BM must be \[B, M\]; got 1 axes, \(4,\)"),
    (DecodeBatch(ints(3), ints(2), ints(2, 4)), "DecodeBatch: tokens_T must have T = 2, the B of lengths_B; got 3"),
    (DecodeBatch(ints(2), ints(2), ints(1, 4)), "page_table_BM must have B = 2"),
    (DecodeBatch(ints(2, dtype=jnp.float32), ints(2), ints(2, 4)), "tokens_T must hold whole numbers .int32.; got float32"),
  ],
)
def test_batches_that_do_not_fit_together(batch, message):
  with pytest.raises(InputError, match=message):
    run(batch)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("num_layers", 2, "k_pages must have L = 3 for this model; got L = 2"),
    ("num_kv_heads", 1, "k_pages must have K = 3 for this model; got K = 1"),
    ("head_dim", 32, "k_pages must have H = 16 for this model; got H = 32"),
  ],
)
def test_another_models_cache(field, value, message):
  other = LlamaConfig.from_dict({**CONFIG.to_dict(), field: value})
  with pytest.raises(InputError, match=message):
    run(DecodeBatch(ints(2), ints(2), ints(2, 4)), KVCache.abstract(other, 4, "f32"))


def test_v_pages_are_checked():
  cache = KVCache.abstract(CONFIG, 4, "f32")
  swapped = cache.replace(v_pages=cache.k_pages)  # tokens and H are swapped
  with pytest.raises(InputError, match="v_pages must have H = 16 for this model; got H = 64"):
    run(DecodeBatch(ints(2), ints(2), ints(2, 4)), swapped)
  with pytest.raises(InputError, match=r"k_pages must be \[L, P, K, C, H\]; got"):
    run(DecodeBatch(ints(2), ints(2), ints(2, 4)), KVCache.init(CONFIG, 4, "f32").flatten())


@pytest.mark.parametrize("recipe", [tiny_llamas.F32, Recipe("fp8", "channel"), Recipe("fp8", "block128")], ids=str)
def test_random_weights(recipe):
  abstract = Llama(CONFIG, recipe)
  model, again, other = (jaxfp8.random_weights(abstract, jax.random.key(seed)) for seed in (0, 0, 1))
  for like, *arrays in zip(*(jax.tree.leaves(nnx.state(m)) for m in (abstract, model, again, other)), strict=True):
    for array in arrays:
      assert isinstance(array, jax.Array) and (array.shape, array.dtype) == (like.shape, like.dtype)
    np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in arrays[:2]))
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(abstract)))
  gates = [m.segments[0].mlp.gate_up.weight.get_value() for m in (model, other)]
  if recipe.weights == "fp8":
    gates = [fp8.dequantize(fp8.QArray(g.qvalue[0, 0], g.scale[0, 0])) for g in gates]
  deviation = CONFIG.d_model**-0.5
  assert [float(g.std()) for g in gates] == pytest.approx([deviation] * 2, rel=0.05)
  assert abs(float((gates[0] * gates[1]).mean())) < 0.1 * deviation**2, "another seed is another model"
  assert (model.final_norm.weight.get_value() == 1).all()

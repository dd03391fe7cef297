"""Values that point outside are a ValueError where one asks, at once or from within a compiled program, and free where not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8.config import LlamaConfig
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.serving.limits import EngineLimits
from pallas_kernels import debug, debug_checks, page_write, paged_attention
from pallas_kernels.fp8_matmul.api import PartialSums
from pallas_kernels.fused.api import rope_write
from tests.helpers import commands, paged_cases, tiny_llamas
from tests.helpers.paged_cases import Batch

PREFILL, DECODE = Batch((40, 7), (3, 7), C=32, padding=2), Batch((40, 7, 0), None, C=32)


def change(name, place, value):
  def changed(arrays):
    array = arrays[name].copy()
    array[place] = value
    return arrays | {name: array}

  return changed


BROKEN = {
  "page too high": (PREFILL, change("page_table_BM", (0, 1), 99), "page ids must be from 0 to 8; page 1 of sequence 0 is 99"),
  "page below 0": (DECODE, change("page_table_BM", (1, 0), -1), "page ids must be from 0 to 11; page 0 of sequence 1 is -1"),
  "too long": (DECODE, change("lengths_B", 1, 97), r"3 pages of 32 tokens = 96; sequence 1 has 97"),
  "length below 0": (PREFILL, change("lengths_B", 0, -2), "lengths must be from 0 .*sequence 0 has -2"),
  "not ascending": (PREFILL, change("query_starts", 1, 11), r"query_starts must ascend .*got \[0, 11, 10\]"),
  "too many queries": (PREFILL, change("query_starts", 2, 13), r"at most the 12 tokens; got \[0, 3, 13\]"),
  "more queries than tokens": (PREFILL, change("lengths_B", 1, 6), "sequence 1 has 7 queries and length 6"),
}
broken = pytest.mark.parametrize(("batch", "sabotage", "message"), BROKEN.values(), ids=BROKEN)


def attend(arrays):
  return paged_attention(**arrays)


def write(arrays):
  where = arrays["page_table_BM"], arrays["query_starts"], arrays["lengths_B"]
  values = (jnp.ones((arrays["q_TNH"].shape[0], 2, 8)),)
  return page_write((arrays["k_pages"],), values, (2,), *where)


def rope(arrays):
  where = arrays["page_table_BM"], arrays["query_starts"], arrays["lengths_B"]
  qkv = PartialSums(jnp.ones((1, arrays["q_TNH"].shape[0], 2 * 3 * 8)))
  angle = jnp.ones((arrays["q_TNH"].shape[0], 4))
  return rope_write(qkv, angle, angle, (arrays["k_pages"], arrays["v_pages"]), *where, dtype=jnp.float32)


OPERATIONS = {"paged_attention": attend, "page_write": write, "rope_write": rope}


@broken
@pytest.mark.parametrize("operation", OPERATIONS)
def test_arrays_at_hand_are_refused_at_once(operation, batch, sabotage, message):
  arrays = paged_cases.to_jax(sabotage(batch.arrays()))
  with debug_checks(), pytest.raises(ValueError, match=f"^{operation}: .*{message}"):
    OPERATIONS[operation](arrays)


@pytest.mark.parametrize(
  ("operation", "name"),
  [*(("paged_attention", name) for name in BROKEN), ("page_write", "too long"), ("rope_write", "not ascending")],
)
def test_compiled_programs_are_watched(operation, name):
  """The same program with right values before and after: it works, and it goes on working."""
  batch, sabotage, message = BROKEN[name]
  program, right = jax.jit(OPERATIONS[operation]), paged_cases.to_jax(batch.arrays())
  plain = jax.tree.map(np.asarray, program(right))
  with pytest.raises(ValueError, match=f"^{operation}: .*{message}"), debug_checks():
    jax.block_until_ready(program(paged_cases.to_jax(sabotage(batch.arrays()))))
  with debug_checks():
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, program(right)), plain)


def test_right_values_pass():
  for batch in (PREFILL, DECODE):
    arrays = paged_cases.to_jax(batch.arrays())
    with debug_checks():
      for operation in OPERATIONS.values():
        operation(arrays), jax.jit(operation)(arrays)


def test_nothing_is_added_when_off():
  arrays = paged_cases.to_jax(PREFILL.arrays())
  assert "callback" not in str(jax.make_jaxpr(attend)(arrays))
  with debug_checks():
    assert "callback" in str(jax.make_jaxpr(attend)(arrays))
  assert "callback" not in str(jax.make_jaxpr(attend)(arrays))


def test_pages_of_a_layer():
  """With first_page, ids may name what is behind it."""
  arrays = paged_cases.to_jax(DECODE.arrays())
  with debug_checks(), pytest.raises(ValueError, match="page ids must be from 0 to 3"):
    paged_attention(**arrays, first_page=8)


def test_an_error_of_ones_own_is_not_hidden():
  with pytest.raises(KeyError), debug_checks():
    raise KeyError("mine")


@functools.cache
def model():
  return tiny_llamas.load(LlamaConfig.from_name("tiny"))


def batch_of(lengths=(5, 40), **changes):
  batch = jaxfp8.PrefillBatch.from_prompts([list(range(1, length + 1)) for length in lengths], page_size=32)
  return dataclasses.replace(batch, **changes)


def test_a_models_steps_under_jit_and_grad():
  cache = KVCache.init(model().config, 3, "f32", 32)
  with debug_checks():
    logits, _ = jax.jit(jaxfp8.prefill)(model(), cache, batch_of())
  np.testing.assert_array_equal(np.asarray(logits), np.asarray(jax.jit(jaxfp8.prefill)(model(), cache, batch_of())[0]))
  wrong = batch_of(page_table_BM=jnp.array([[0, 0], [1, 3]], jnp.int32))
  # Four pages in all would be enough for a kernel that sees all layers' pages in one pool; the model knows better.
  with pytest.raises(ValueError, match="PrefillBatch: page ids must be from 0 to 2; page 1 of sequence 1 is 3"), debug_checks():
    jax.jit(jaxfp8.prefill)(model(), cache, wrong)

  def total(q):
    arrays = paged_cases.to_jax(PREFILL.arrays()) | {"q_TNH": q}
    return paged_attention(**arrays, implementation="reference").sum()

  q = paged_cases.to_jax(PREFILL.arrays())["q_TNH"]
  with debug_checks():
    checked = jax.jit(jax.grad(total))(q)
  np.testing.assert_array_equal(np.asarray(checked), np.asarray(jax.jit(jax.grad(total))(q)))


def test_an_engine_with_a_wrong_scheduler(monkeypatch):
  """Page ids are right in an engine unless its scheduler is wrong: here it is."""
  limits = EngineLimits(num_pages=4, max_sequences=2, max_pages=2, prefill_sizes=(8,), decode_sizes=(2,))
  engine = jaxfp8.Engine(model(), limits=limits)
  request = jaxfp8.Request((1, 2, 3), jaxfp8.SamplingParams(max_new_tokens=2, ignore_eos=True))
  with debug_checks():
    assert engine.generate([request])
  inputs, high = engine._inputs, limits.num_pages

  def wrong(*arguments):
    made = inputs(*arguments)
    made.batch.page_table_BM[0, 0] = high
    return made

  monkeypatch.setattr(engine, "_inputs", wrong)
  with pytest.raises(ValueError, match="PrefillBatch: page ids must be from 0 to 3; page 0 of sequence 0 is 4"), debug_checks():
    engine.generate([request])


def test_the_flag(monkeypatch, capsys, tmp_path):
  """With it every step's arrays are looked at, without it none."""
  seen, require = [], debug.require_pages
  monkeypatch.setattr(debug, "require_pages", lambda *arrays, **sizes: seen.append(arrays) or require(*arrays, **sizes))
  chain = commands.write_chain(tmp_path / "chain")
  arguments = ("--checkpoint", chain, "--prompt", "x", "--max_new_tokens", "4", "--cache_dir", tmp_path / "cache")
  with commands.compiled_programs_restored():
    assert commands.run_here(monkeypatch, capsys, *arguments, "--debug_checks").code == 0 and seen
    seen.clear()
    assert commands.run_here(monkeypatch, capsys, *arguments).code == 0 and not seen

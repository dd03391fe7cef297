"""Tiny Llamas as jaxfp8 models, and functions that run them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8.checkpoint.load import load_source
from jaxfp8.checkpoint.readers import Source, expected_tensors
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.model.batch import DecodeBatch, PrefillBatch
from jaxfp8.model.kv_cache import KVCache
from jaxfp8.model.llama import Llama
from jaxfp8.recipe import Recipe
from tests.helpers import tiny_models

F32 = Recipe(weights="f32", activations="f32", kv="f32")


class ArraySource(Source):
  """A source of weights that are in memory."""

  def __init__(self, config: LlamaConfig, weights: dict[str, np.ndarray]):
    self.config, self.weights, self.path = config, weights, pathlib.Path("arrays")

  def names(self):
    return tuple(expected_tensors(self.config))

  def dtype(self, name):
    return self.weights[name].dtype

  def shape(self, name):
    return self.weights[name].shape

  def read(self, name):
    return self.weights[name]

  @property
  def tokenizer(self):
    raise InputError("no tokenizer")

  def files(self):
    return []


def source(case: str | LlamaConfig, weights=None) -> ArraySource:
  config = tiny_models.make_config(case) if isinstance(case, str) else case
  return ArraySource(config, weights or tiny_models.make_weights(config))


def load(case: str | LlamaConfig, recipe: Recipe = F32, *, weights=None, mesh=None, implementation="auto") -> Llama:
  return load_source(source(case, weights), recipe, mesh=mesh, implementation=implementation)


@jax.jit
def every_logit(model: Llama, cache: KVCache, batch) -> tuple[jax.Array, KVCache]:
  """Logits [T, V] of every token of a batch."""
  hidden_TD, cache = model(batch, cache)
  return model.logits(hidden_TD), cache


def pages_for(length: int, page_size: int) -> int:
  return -(-length // page_size)


def run_pieces(model: Llama, tokens: np.ndarray, pieces: list[int], *, page_size=64, table=None, run=every_logit, pad_to=None):
  """All logits of one sequence, which is computed in pieces; a piece of 1 is a decode step. Returns (logits [T, V], cache)."""
  num_pages = pages_for(len(tokens), page_size)
  table = np.arange(num_pages, dtype=np.int32) if table is None else np.asarray(table, np.int32)
  cache = KVCache.init(model.config, int(table.max()) + 1, model.recipe.kv, page_size)
  out, start = [], 0
  for piece in pieces:
    stop = start + piece
    logits, cache = run(model, cache, piece_batch(tokens, start, stop, table, pad_to))
    out.append(np.asarray(logits)[:piece])
    start = stop
  assert start == len(tokens)
  return np.concatenate(out), cache


def piece_batch(tokens, start: int, stop: int, table, pad_to: int | None = None):
  piece, lengths = np.asarray(tokens[start:stop], np.int32), jnp.array([stop], jnp.int32)
  table = jnp.asarray(table, jnp.int32)[None]
  if stop - start == 1:
    return DecodeBatch(jnp.asarray(piece), lengths, table)
  padded = np.pad(piece, (0, max(0, (pad_to or 0) - len(piece))))
  return PrefillBatch(jnp.asarray(padded), jnp.array([0, stop - start], jnp.int32), lengths, table)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
  return dict(np.load(pathlib.Path(__file__).parents[1] / "goldens" / f"{name}.npz"))

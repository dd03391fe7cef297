"""A Llama in float32 numpy with the roundings of a Recipe: fake quantization, independent of jaxfp8's float8 and kernels.

    python -m tests.helpers.numpy_recipes [positions [recipe ...]]    compares every recipe of `jaxfp8 evaluate`, default model

It shares the config with jaxfp8, and the rounding (by ml_dtypes, from the definition) with numpy_llama.
"""

import pathlib
import sys

import ml_dtypes
import numpy as np

from jaxfp8.checkpoint import load
from jaxfp8.config import LlamaConfig
from jaxfp8.recipe import Recipe
from tests.helpers import numpy_llama

F32 = Recipe("f32", "channel", "f32", "f32")


class NumpyRecipe:
  """The model. weights: float32, under Hugging Face's names. scales: static scales under jaxfp8's keys."""

  def __init__(self, config: LlamaConfig, weights: dict[str, np.ndarray], recipe: Recipe, scales=None):
    self.config, self.recipe, self.scales = config, recipe, scales
    self.weights = {name: self._rounded(name, weight) for name, weight in weights.items()}

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence, float32 [T, V]."""
    c, r = self.config, self._stream
    x = r(self.weights["model.embed_tokens.weight"][tokens])
    for layer in range(c.num_layers):
      prefix = f"model.layers.{layer}."
      h = self._norm(x, prefix + "input_layernorm.weight")
      q, k, v = (self._linear(h, f"{prefix}self_attn.{name}_proj.weight").reshape(len(x), -1, c.head_dim) for name in "qkv")
      q, k = (r(numpy_llama.rope(c, x)).astype(np.float32) for x in (q, k))
      pages = self._kv(k, prefix + "self_attn.k_scale[K]"), self._kv(v, prefix + "self_attn.v_scale[K]")
      out = self._attention(q, *(np.repeat(y, c.group_size, axis=1) for y in pages))
      x = r(x + self._linear(r(out.reshape(len(x), -1)), prefix + "self_attn.o_proj.weight"))
      h = self._norm(x, prefix + "post_attention_layernorm.weight")
      gate, up = (self._linear(h, f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up"))
      x = r(x + self._linear(r(gate / (1 + np.exp(-gate)) * up), prefix + "mlp.down_proj.weight"))
    head = self.weights["model.embed_tokens.weight" if c.tied_embeddings else "lm_head.weight"]
    return self._norm(x, "model.norm.weight") @ head.T

  def _rounded(self, name: str, weight: np.ndarray) -> np.ndarray:
    weight = weight.astype(np.float32)
    if "norm" in name:
      return weight
    if "_proj." not in name:
      return self._stream(weight)
    if self.recipe.weights == "fp8":
      return fake_quantize_weight(weight, self.recipe.granularity)
    return bf16(weight) if self.recipe.weights == "bf16" else weight

  def _stream(self, x: np.ndarray) -> np.ndarray:
    return bf16(x) if self.recipe.stream == "bf16" else x.astype(np.float32)

  def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
    return self._stream(numpy_llama.rms_norm(x, self.weights[name], self.config.rms_norm_eps))

  def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
    if self.recipe.activations == "fp8":
      x = fake_quantize_groups(x) if self.recipe.granularity == "block128" else fake_quantize(x, 1)
    if self.recipe.activations.is_static:
      x = _through_float8(x, self.scales[name.replace(".weight", ".input_scale[]")])
    return self._stream(x @ self.weights[name].T)

  def _kv(self, x: np.ndarray, key: str) -> np.ndarray:
    """Keys or values [T, K, H] as pages hold them: one scale per token and head, or one per head."""
    if self.recipe.kv == "fp8":
      return fake_quantize(x, -1)
    if self.recipe.kv.is_static:
      return _through_float8(x, self.scales[key][None, :, None])
    return bf16(x) if self.recipe.kv == "bf16" else x

  def _attention(self, q, k, v) -> np.ndarray:
    scores = np.einsum("tnh,snh->nts", q, k, optimize=True) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v, optimize=True)


def fake_quantize_weight(weight: np.ndarray, granularity: str) -> np.ndarray:
  """w [F, D] rounded to float8, as float32; in groups of rows that fit the processor's cache."""
  if granularity == "tensor":
    scale = numpy_llama.scale_of(weight, None)
    return np.concatenate([_through_float8(rows, scale) for rows in np.array_split(weight, 8)])
  if granularity == "channel":
    return np.concatenate([fake_quantize(rows, 1) for rows in np.array_split(weight, 8)])
  out = np.empty_like(weight)
  for row in range(0, weight.shape[0], 128):
    for column in range(0, weight.shape[1], 128):
      block = np.s_[row : row + 128, column : column + 128]
      out[block] = fake_quantize(weight[block], None)
  return out


def fake_quantize_groups(x: np.ndarray) -> np.ndarray:
  """x [T, D] rounded to float8, as float32, with one scale for each token and 128 columns."""
  return np.concatenate([fake_quantize(x[:, start : start + 128], 1) for start in range(0, x.shape[1], 128)], axis=1)


def fake_quantize(x: np.ndarray, axis: int | None) -> np.ndarray:
  """x rounded to float8, as float32, with one scale along `axis` (None: one for all of x)."""
  return _through_float8(x, numpy_llama.scale_of(x, axis))


def _through_float8(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
  return numpy_llama.to_float8(x, scale).astype(np.float32) * scale


def bf16(x: np.ndarray) -> np.ndarray:
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
  """KL divergence of each position in nats, float64, from logits [T, V]."""
  p, q = log_softmax(reference), log_softmax(logits)
  return np.sum(np.exp(p) * (p - q), axis=-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class Comparison:
  """The default model on a few chunks of CPython's help topics, by jaxfp8 and by numpy, each against its own float32 logits."""

  def __init__(self, num_tokens: int, context: int):
    from jaxfp8.checkpoint import readers
    from jaxfp8.commands import evaluate
    from jaxfp8.quantization import quality
    from jaxfp8.text.tokenizer import Tokenizer

    self.source = readers.open_source(readers.default_model())
    text, _ = evaluate.read_text(None)
    tokens = Tokenizer(self.source.tokenizer).encode(text)
    self.chunks = quality.cut_chunks(tokens, num_tokens, context)
    self.training = quality.cut_training_chunks(tokens, 512, 256, self.chunks)
    self.ours = quality.Reference(load.load_source(self.source, F32), self.chunks)
    self.weights = {name: self.source.read(name).astype(np.float32) for name in self.source.names()}
    plain = NumpyRecipe(self.source.config, self.weights, F32)
    self.numpys = [plain.logits(row[:-1]) for row in self.chunks]

  def divergences(self, name: str) -> tuple[float, float]:
    """Mean KL divergence of a recipe in nats: (jaxfp8's, numpy's)."""
    from jaxfp8.commands import evaluate
    from jaxfp8.quantization import calibration

    recipe, scales = evaluate.parse_recipe(name), None
    if "static" in name:
      layers = calibration.Calibrator(self.source, recipe, self.training).layers()
      scales = {key: array for _, group in layers for key, array in group.items() if "_scale[" in key}
    ours = self.ours.score(load.load_source(self.source, recipe, scales=scales)).kl
    model = NumpyRecipe(self.source.config, self.weights, recipe, scales)
    theirs = [divergence(p, model.logits(row[:-1])) for p, row in zip(self.numpys, self.chunks, strict=True)]
    return float(ours.mean()), float(np.mean(theirs))


if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  from jaxfp8.commands.evaluate import DEFAULT_RECIPES, rounding_of

  positions = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
  comparison = Comparison(positions, 256)
  for recipe_name in sys.argv[2:] or [name for name in DEFAULT_RECIPES if rounding_of(name) == "nearest"]:
    jaxfp8s, numpys = comparison.divergences(recipe_name)
    print(f"{recipe_name:24} jaxfp8 {jaxfp8s:.5f}  numpy {numpys:.5f}  ratio {jaxfp8s / numpys:.3f}", flush=True)

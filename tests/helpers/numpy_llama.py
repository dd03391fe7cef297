"""An independent Llama in float64 numpy, one sequence at a time, with a hook at every matrix product.

It has no pages, batches, merged weights or devices. It shares only the config with jaxfp8; the goldens check that RoPE.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxfp8.config import LlamaConfig

Weights = dict[str, np.ndarray]
Linear = Callable[[np.ndarray, str], np.ndarray]  # (x [T, D], name of the weight) -> [T, F]


def plain_linear(weights: Weights) -> Linear:
  return lambda x, name: x @ weights[name].astype(np.float64).T


def forward(config: LlamaConfig, weights: Weights, tokens: np.ndarray, linear: Linear | None = None, kv=None) -> np.ndarray:
  """Logits [T, V] of every position, float64. `kv` is applied to rotated keys and to values, [T, K, H]."""
  c, linear, kv = config, linear or plain_linear(weights), kv or (lambda x: x)
  T, H, G = len(tokens), c.head_dim, c.group_size
  x = weights["model.embed_tokens.weight"].astype(np.float64)[tokens]
  for layer in range(c.num_layers):
    prefix = f"model.layers.{layer}."
    h = rms_norm(x, weights[prefix + "input_layernorm.weight"], c.rms_norm_eps)
    q, k, v = (linear(h, f"{prefix}self_attn.{name}_proj.weight").reshape(T, -1, H) for name in "qkv")
    k, v = kv(rope(c, k)), kv(v)
    out = attention(rope(c, q), np.repeat(k, G, axis=1), np.repeat(v, G, axis=1))
    x = x + linear(out.reshape(T, -1), prefix + "self_attn.o_proj.weight")
    h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], c.rms_norm_eps)
    gate, up = (linear(h, f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up"))
    x = x + linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj.weight")
  head = weights["model.embed_tokens.weight" if c.tied_embeddings else "lm_head.weight"].astype(np.float64)
  return rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps) @ head.T


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def rope(config: LlamaConfig, x: np.ndarray) -> np.ndarray:
  """x [T, heads, H] at positions 0 .. T - 1."""
  angles = np.arange(len(x))[:, None] * config.rope.inverse_frequencies(config.head_dim).astype(np.float64)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  first, second = np.split(x, 2, axis=-1)
  return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Causal attention in float64, [T, N, H]: q [T, N, H] are the last T of S positions, k and v [S, N, H]."""
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  T, S = len(q), len(k)
  scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(np.arange(S)[None] <= np.arange(S - T, S)[:, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return np.einsum("nts,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v)


def to_float8(x: np.ndarray, scale) -> np.ndarray:
  """round(x * (1 / scale)) as float8 by ml_dtypes; the product is in float32, as defined."""
  return np.clip(x.astype(np.float32) * (np.float32(1) / scale), -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


def scale_of(x: np.ndarray, axis) -> np.ndarray:
  """amax * float32(1 / 448), or 1 if amax is 0; the reduced axes stay with size 1."""
  amax = np.max(np.abs(x.astype(np.float32)), axis=axis, keepdims=True)
  return np.where(amax == 0, np.float32(1), amax * np.float32(1 / 448)).astype(np.float32)


def fake_quantize(x: np.ndarray, axis) -> np.ndarray:
  """x rounded to float8, as float64. axis: the axes that share a scale."""
  scale = scale_of(x, axis)
  return to_float8(x, scale).astype(np.float64) * scale


def fake_quantize_weight(w: np.ndarray, granularity: str) -> np.ndarray:
  """w [F, D] rounded to float8, as float64."""
  if granularity != "block128":
    return fake_quantize(w, (0, 1) if granularity == "tensor" else 1)
  out = np.empty(w.shape)
  for row in range(0, w.shape[0], 128):
    for column in range(0, w.shape[1], 128):
      block = np.s_[row : row + 128, column : column + 128]
      out[block] = fake_quantize(w[block], (0, 1))
  return out

"""Llama in float8, in pure JAX: pure functions over pytrees, and an engine on top of them.

    import jaxfp8
    model = jaxfp8.load("checkpoint")                      # weights
    batch = jaxfp8.PrefillBatch.from_prompts([[1, 2, 3]])  # what to compute
    cache = jaxfp8.KVCache.init(model.config, num_pages=1)
    logits, cache = jaxfp8.prefill(model, cache, batch)

Names are imported when they are first used, so that `import jaxfp8` alone costs nothing.
"""

import importlib

_HOME = {
  "Completion": "output",
  "DecodeBatch": "batch",
  "DeviceSpec": "devices",
  "Engine": "engine",
  "InputError": "errors",
  "KVCache": "cache",
  "Llama": "model",
  "LlamaConfig": "config",
  "PrefillBatch": "batch",
  "QArray": "fp8",
  "Recipe": "config",
  "Request": "engine",
  "SamplingParams": "sampling",
  "Tokenizer": "tokenizer",
  "convert_checkpoint": "convert",
  "decode": "steps",
  "dequantize": "fp8",
  "load": "convert",
  "make_mesh": "checkpoint",
  "plan_deployment": "planner",
  "prefill": "steps",
  "quantize": "fp8",
  "random_weights": "synthetic",
  "sample": "sampling",
  "save": "checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module 'jaxfp8' has no attribute {name!r}; it exports {', '.join(__all__)}")
  value = getattr(importlib.import_module(f"jaxfp8.{_HOME[name]}"), name)
  globals()[name] = value
  return value


def __dir__():
  return __all__

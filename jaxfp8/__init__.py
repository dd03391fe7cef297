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
  "Completion": "serving.request_output",
  "DecodeBatch": "model.batch",
  "DeviceSpec": "planning.devices",
  "Engine": "serving.engine",
  "InputError": "errors",
  "KVCache": "model.kv_cache",
  "Llama": "model.llama",
  "LlamaConfig": "config",
  "PrefillBatch": "model.batch",
  "QArray": "model.fp8",
  "Recipe": "config",
  "Request": "serving.engine",
  "SamplingParams": "model.sampling",
  "Tokenizer": "text.tokenizer",
  "convert_checkpoint": "checkpoint.convert",
  "decode": "serving.steps",
  "dequantize": "model.fp8",
  "load": "checkpoint.convert",
  "make_mesh": "checkpoint.load",
  "plan_deployment": "planning.planner",
  "prefill": "serving.steps",
  "quantize": "model.fp8",
  "random_weights": "model.random_weights",
  "sample": "model.sampling",
  "save": "checkpoint.load",
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

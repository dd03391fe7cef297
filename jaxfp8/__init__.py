"""Llama in float8, in pure JAX: pure functions over pytrees, and an engine on top of them.

    import jaxfp8
    model = jaxfp8.load("checkpoint")                      # weights
    batch = jaxfp8.PrefillBatch.from_prompts([[1, 2, 3]])  # what to compute
    cache = jaxfp8.KVCache.init(model.config, num_pages=1)
    logits, cache = jaxfp8.prefill(model, cache, batch)

Names are imported when they are first used, so that `import jaxfp8` alone costs nothing.
"""

TYPE_CHECKING = False  # no module is imported before a command has left the working directory (search_path.py)

# For type checkers and editors. A test compares these imports with _HOME.
if TYPE_CHECKING:
  from jaxfp8.checkpoint.convert import convert_checkpoint as convert_checkpoint
  from jaxfp8.checkpoint.load import load as load
  from jaxfp8.checkpoint.save import save as save
  from jaxfp8.config import LlamaConfig as LlamaConfig
  from jaxfp8.errors import InputError as InputError
  from jaxfp8.model.batch import DecodeBatch as DecodeBatch
  from jaxfp8.model.batch import PrefillBatch as PrefillBatch
  from jaxfp8.model.fp8 import QArray as QArray
  from jaxfp8.model.fp8 import dequantize as dequantize
  from jaxfp8.model.fp8 import quantize as quantize
  from jaxfp8.model.kv_cache import KVCache as KVCache
  from jaxfp8.model.llama import Llama as Llama
  from jaxfp8.model.random_weights import random_weights as random_weights
  from jaxfp8.model.sampling import SamplingParams as SamplingParams
  from jaxfp8.model.sampling import sample as sample
  from jaxfp8.planning.devices import DeviceSpec as DeviceSpec
  from jaxfp8.planning.planner import plan_deployment as plan_deployment
  from jaxfp8.recipe import Recipe as Recipe
  from jaxfp8.serving.engine import Engine as Engine
  from jaxfp8.serving.engine import Request as Request
  from jaxfp8.serving.request_output import Completion as Completion
  from jaxfp8.serving.steps import decode as decode
  from jaxfp8.serving.steps import prefill as prefill
  from jaxfp8.sharding import make_mesh as make_mesh
  from jaxfp8.text.tokenizer import Tokenizer as Tokenizer

  __version__: str

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
  "Recipe": "recipe",
  "Request": "serving.engine",
  "SamplingParams": "model.sampling",
  "Tokenizer": "text.tokenizer",
  "convert_checkpoint": "checkpoint.convert",
  "decode": "serving.steps",
  "dequantize": "model.fp8",
  "load": "checkpoint.load",
  "make_mesh": "sharding",
  "plan_deployment": "planning.planner",
  "prefill": "serving.steps",
  "quantize": "model.fp8",
  "random_weights": "model.random_weights",
  "sample": "model.sampling",
  "save": "checkpoint.save",
}

if not TYPE_CHECKING:  # a type checker knows the names from the imports above, and reports any other name
  __all__ = sorted(_HOME)

  def __getattr__(name: str):
    import importlib

    if name == "__version__":  # reading the package's metadata takes longer than importing the package
      value = importlib.import_module("importlib.metadata").version("jaxfp8")
      globals()[name] = value
      return value
    if name not in _HOME:
      raise AttributeError(f"module 'jaxfp8' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"jaxfp8.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
  return sorted(_HOME)

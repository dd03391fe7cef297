"""Converts weights into the cache in a process of its own; `startup.open_model` starts it where there are many processes.

Orbax writes with all processes of a run together, and here each host has a cache of its own. One JSON object as the only
argument, {"path", "recipe", "cache_dir", "tensor", "data", "needs_tokenizer", "own_granularity"}; one line as the answer,
{"folder"} or {"error"}.
"""

import json
import os
import sys


def _main(wishes: dict) -> dict:
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxfp8.checkpoint.weights_cache import cached_checkpoint
  from jaxfp8.commands import command
  from jaxfp8.errors import InputError
  from jaxfp8.mesh import MeshShape
  from jaxfp8.recipe import Recipe
  from jaxfp8.text.tokenizer import Tokenizer

  def check(source) -> None:
    MeshShape.for_model(source.config, wishes["tensor"], wishes["data"])
    if wishes["needs_tokenizer"]:
      Tokenizer(source.tokenizer)

  what = wishes["path"], Recipe(**wishes["recipe"]), wishes["cache_dir"]
  command.silence_libraries()
  try:
    return {"folder": str(cached_checkpoint(*what, check=check, own_granularity=wishes["own_granularity"]))}
  except InputError as error:
    return {"error": str(error)}


if __name__ == "__main__":
  print(json.dumps(_main(json.loads(sys.argv[1]))))

"""The child process that converts weights into the cache; `startup.open_model` starts it in a run of several processes.

Orbax writes with all processes of a run together, but here each host has its own cache. The request is {"path", "recipe",
"cache_dir", "tensor", "data", "needs_tokenizer", "keep_granularity"}, the answer {"folder", "said"}: the folder is null for a
cache that cannot be written; said are the lines for stderr.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from jaxfp8 import child_process
from jaxfp8.errors import silence_libraries


def _convert(request: dict[str, Any]) -> Iterator[dict[str, str | None]]:
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxfp8.checkpoint.weights_cache import cached_checkpoint
  from jaxfp8.mesh import MeshShape
  from jaxfp8.recipe import Recipe
  from jaxfp8.text.tokenizer import Tokenizer

  def check(source) -> None:
    MeshShape.for_model(source.config, request["tensor"], request["data"])
    if request["needs_tokenizer"]:
      Tokenizer(source.tokenizer)

  silence_libraries()
  recipe, keep = Recipe(**request["recipe"]), request["keep_granularity"]
  said = io.StringIO()  # the parent shows only the last line of a child's stderr
  try:
    with contextlib.redirect_stderr(said):
      checkpoint = cached_checkpoint(request["path"], recipe, request["cache_dir"], check=check, keep_granularity=keep)
  except BaseException:
    sys.stderr.write(said.getvalue())
    raise
  yield {"folder": str(checkpoint.path) if checkpoint else None, "said": said.getvalue()}


if __name__ == "__main__":
  child_process.serve(_convert)

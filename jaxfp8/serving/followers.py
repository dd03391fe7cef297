"""Requests enter at the first process, which shares them. The other processes follow: they run the same requests.

With one process there is nothing to share.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxfp8.distributed import processes
from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.serving.engine import Engine, Request


def share(requests: Sequence[Request] | None = None) -> list[Request] | None:
  """The first process's requests (prompts as token ids) in every process. None means that no more requests will come."""
  if processes.count() == 1:
    return None if requests is None else list(requests)
  plain = processes.broadcast(requests and [[list(r.prompt), dataclasses.asdict(r.params)] for r in requests])
  return plain and [Request(tuple(prompt), _params(fields)) for prompt, fields in plain]


def follow(engine: Engine, requests: Sequence[Request] | None) -> None:
  """Runs `requests` along with the first process. With None, runs the requests that the first process shares, until None."""
  if requests is not None:
    _drain(engine, requests)
    return
  while (shared := share()) is not None:
    with contextlib.suppress(InputError):  # the first process reports the error to the user
      _drain(engine, shared)


def _drain(engine: Engine, requests: Sequence[Request]) -> None:
  collections.deque(engine.stream(requests), maxlen=0)


def _params(fields: dict[str, Any]) -> SamplingParams:
  """SamplingParams from a JSON object, in which tuples are lists."""
  values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
  return SamplingParams(**values)

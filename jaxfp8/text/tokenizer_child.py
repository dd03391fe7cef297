"""Runs a stranger's tokenizer in a child process, which `BoundedTokenizer` starts. No module imports this file.

The library is Rust: nothing in Python ends its loops, and it aborts the process when memory is short. Here SIGALRM ends a
request after its "seconds", and memory is limited to its "bytes".

Protocol: one JSON object per line. The child begins with {"ready": true}. It answers {"tokenizer": text of tokenizer.json} with
{"loaded": true}, {"text", "add_special_tokens"} with {"ids"}, and with {"offsets"} if asked; either with {"error"} if the
library fails.
"""

import contextlib
import json
import resource
import signal
import sys

import tokenizers


def _limit(kind: int, value: int) -> None:
  with contextlib.suppress(ValueError, OSError):  # some systems lack a limit; the others remain
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _answer(request: dict, tokenizer: tokenizers.Tokenizer | None) -> tuple[dict, tokenizers.Tokenizer | None]:
  try:
    if tokenizer is None:
      tokenizer = tokenizers.Tokenizer.from_str(request["tokenizer"])
      tokenizer.no_truncation()
      tokenizer.no_padding()
      return {"loaded": True}, tokenizer
    encoding = tokenizer.encode(request["text"], add_special_tokens=request["add_special_tokens"])
    offsets = {"offsets": encoding.offsets} if request["with_offsets"] else {}
    return {"ids": encoding.ids, **offsets}, tokenizer
  except BaseException as error:  # a panic of Rust is no Exception; nothing else raises here
    return {"error": str(error)[:500]}, tokenizer


def _main() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; this process ends when its stdin closes
  _limit(resource.RLIMIT_CORE, 0)
  tokenizer = None
  print(json.dumps({"ready": True}), flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    _limit(resource.RLIMIT_AS, request["bytes"])
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    answer, tokenizer = _answer(request, tokenizer)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  _main()

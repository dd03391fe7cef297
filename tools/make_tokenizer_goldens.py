"""Makes tests/goldens/llama_cpp.json: what llama.cpp takes for the end of an answer.

python -m venv env && env/bin/pip install xllamacpp gguf
env/bin/python tools/make_tokenizer_goldens.py
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tools.llama_cpp import CONTROL, USER_DEFINED, Vocabulary, write_vocabulary

GOLDENS = pathlib.Path(__file__).parents[1] / "tests" / "goldens"

_WORDS = ["Ċ", "a", "b", "ab", *(f"w{i}" for i in range(8))]  # 12 tokens in front of those of a case
# (tokens, their types, keys of the metadata)
_ENDS: list[tuple[list[str], list[int], dict[str, int]]] = [
  (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], [3, 3, 3], {"eos_token_id": 13}),
  (["<|eot_id|>", "<|end_of_text|>"], [1, 4], {"eos_token_id": 13}),
  (["<|im_end|>", "<|endoftext|>", "</s>", "<|begin_of_text|>"], [4, 3, 1, 3], {"eos_token_id": 13}),
  (["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"], [3] * 6, {"eos_token_id": 16}),
  (["<|start|>", "<|end|>", "<|return|>"], [3] * 3, {"eos_token_id": 14}),
  (["<|end|>", "<|calls|>", "<|flush|>"], [3] * 3, {"eos_token_id": 12}),
  (["<|end|>", "<|call|>"], [3] * 2, {"eos_token_id": 12}),
  (["</s>", "<turn|>", "<|tool_response>", "<eos>"], [3] * 4, {"eos_token_id": 15}),
  (["</s>", "<|plamo:eos|>"], [3] * 2, {"eos_token_id": 13}),
  (["</s>", "<|plamo:eos|>"], [3] * 2, {"eos_token_id": 1}),
  (
    ["<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "[e~["],
    [1, 3, 3, 4, 1, 1, 1],
    {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 3},
  ),
  (
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"],
    [1] * 6,
    {"eos_token_id": 1},
  ),
  (
    ["<PRE>", "<SUF>", "<MID>", "<PAD>"],
    [1] * 4,
    {"eos_token_id": 1, "prefix_token_id": 12, "fim_suf_token_id": 2, "fim_pad_token_id": 4},
  ),
  (["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], [1] * 4, {"eos_token_id": 1}),  # noqa: RUF001
  (["<|tool_call|>", "<bos>", "EOT"], [3, 3, 3], {"eos_token_id": 1}),
]


def _vocabulary(keys: dict[str, Any]) -> Vocabulary:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "vocabulary.gguf"
    write_vocabulary(path, keys)
    return Vocabulary(path)


def _ends() -> list[dict[str, Any]]:
  """hidden and shown: the tokens that llama.cpp treats as control tokens and as defined by the user."""
  results = []
  for tokens, types, ids in _ENDS:
    keys = {
      "model": "gpt2",
      "pre": "gpt-2",
      "tokens": _WORDS + tokens,
      "token_type": [1] * len(_WORDS) + types,
      "merges": ["a b"],
    }
    vocabulary = _vocabulary(keys | ids)
    hidden = vocabulary.with_attribute(CONTROL)
    shown = [i for i in vocabulary.with_attribute(USER_DEFINED) if i not in hidden]
    results.append({"keys": keys | ids, "ends": vocabulary.ends(), "hidden": hidden, "shown": shown})
  return results


def main() -> None:
  lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in _ends())
  (GOLDENS / "llama_cpp.json").write_text(f'{{"ends": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
  main()

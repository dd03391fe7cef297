# ruff: noqa: RUF001 - hostile texts
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

from jaxfp8.checkpoint.readers.gguf_cuts import CUTS
from tests.helpers import tokenizer_documents as documents
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
  (["<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], [1] * 4, {"eos_token_id": 1}),
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


# --- llama.cpp: how text is cut ---

_TEXTS = [
  "Hello, world! I've 12345 naïve_x\n\n  go!!\n",
  "1 12 123 1234 12345 1234567 ٣٤٥ १२३४ ²³ Ⅷ ½ 0x1F 1,234.89",
  "日本語テキスト、中文。한국어 텍스트 ไทย ភាសាខ្មែរ မြန်မာ",
  "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji❤️!!",
  "a\r\nb\r\n\r\n c\n\r\t\td \n \n\n x",
  "It's I'M we'LL they'Re 'S 'sup don'tx ſ'ſ ’s",
  "e\u0301 n\u0303 क्षि ကို ก็ กำ \u0301start",
  "   lead  ", "trail   ", "  \t \n  ",
  "\u00a0nb\u2003em\u3000ideo\u2028ls\u0085nel\u200bzw\ufeffbom\u3000+\u3000é",
  "CamelCaseWORDSAndHTMLParser ABCdefGHI ÀÉîÕ ǅ ßẞ",
  "foo(bar) => {x|y} <a href='z'>$1+2=3^~`\\/[q]#!?…。，",
  "'sup 'sup's 'sup", "a\n\n\nb\n\n\nc \n\n\n", "x  12  345  6  12  345 ",
  "/* comment */ //path/to//file///\n\n", "---===___***", "IMGIMGABCZ<sentinel:12>",
  "नमस्ते दुनिया। مرحبا، العالم؟ שלום", "straße ΑΒΓαβγ ЖЩЫжщы ԱԲաբ Ა",
  "xxxxx" + " " * 13 + "y" + " " * 40, "\x00\x01\x7f ctrl\x00½", "𝔘𝔫𝔦 𐐀𐐨 🄰 𠀀𠀁 ﬁ ㄅㄆ ㄱㄴ ！＂\u200d٠",
]  # fmt: skip


def _byte_vocabulary() -> dict[str, Any]:
  """Byte-level BPE, trained on the texts without any cut: merges reach over every border, so that every cut shows."""
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False, max_token_length=12)
  tokenizer.train_from_iterator(_TEXTS * 3, trainer)
  model = json.loads(tokenizer.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  return {"tokens": tokens, "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]}


def _cuts() -> dict[str, Any]:
  """ids: of each text, the different results; by_pre: which of them each pre-tokenizer gives."""
  keys = _byte_vocabulary()
  ids: list[list[list[int]]] = [[] for _ in _TEXTS]
  by_pre = {}
  for pre in CUTS:
    kinds = {"model": "gpt2", "pre": pre, "token_type": [1] * len(keys["tokens"]), "add_bos_token": False}
    vocabulary, by_pre[pre] = _vocabulary({**keys, **kinds}), []
    for text, results in zip(_TEXTS, ids, strict=True):
      if (result := vocabulary.encode(text)) not in results:
        results.append(result)
      by_pre[pre].append(results.index(result))
  return {**keys, "texts": _TEXTS, "ids": ids, "by_pre": by_pre}


# --- both libraries: BOS and EOS ---

_PROMPTS = [
  "x", "Hello world", "  two  spaces ", "<s>[INST] hi [/INST] there </s><s>[INST] again", "<s>a", "<s><s>a", "a</s> b", "</s>",
  "\n\nline\n", "日本 é 😀", "▁a ▁b", "", "<unk>x",
]  # fmt: skip
_TEMPLATES = [documents.CHAT_WITH_BOS, documents.CHAT_WITHOUT_BOS]


def _gguf_prompts() -> list[dict[str, Any]]:
  """chats: by template. llama.cpp's common/chat.cpp drops a BOS and an EOS that the template writes if the file adds them."""
  changes: list[dict[str, Any]] = [{}]
  changes += [{"add_bos_token": bos, "add_eos_token": eos} for bos in (False, True) for eos in (False, True)]
  changes += [{"add_space_prefix": False}, {"add_space_prefix": False, "add_bos_token": False}]
  changes += [{"general.name": "Phi-3 made into a Llama", "control": ["<|endoftext|>"]}]
  results = []
  for change in changes:
    vocabulary = _vocabulary(documents.sentence_piece_keys(**change))
    chats = []
    for start in ("<s>", ""):
      for prompt in _PROMPTS:
        text = (start + "[user]" if start else "") + prompt
        text = text.removeprefix("<s>") if change.get("add_bos_token", True) else text
        text = text.removesuffix("</s>") if change.get("add_eos_token") else text
        chats.append(vocabulary.encode(text))
    results.append({"change": change, "ids": [vocabulary.encode(prompt) for prompt in _PROMPTS], "chats": chats})
  return results


def _folder_prompts() -> list[dict[str, Any]]:
  from transformers import AutoTokenizer

  named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  settings: list[dict[str, Any]] = [
    named | {"tokenizer_class": name} | more
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
    for more in ({}, {"add_bos_token": False, "add_eos_token": True}, {"legacy": True}, {"add_prefix_space": False})
  ]
  token = documents.SPM["tokens"][300]
  files = [{"tokenizer_config.json": fields} for fields in [*settings, named | {"add_bos_token": True}, {"eos_token": token}]]
  files += [{}, {"special_tokens_map.json": named}]
  files += [{"tokenizer_config.json": {"bos_token": token}, "special_tokens_map.json": {"bos_token": {"content": "<s>"}}}]
  cases = [{"post_processor": ["<s>", ""], "files": content} for content in files]
  cases += [{"post_processor": post, "files": files[i]} for post in (["", ""], ["<s>", "</s>"]) for i in (0, 1, 12, 13, 20, 22)]
  results = []
  for case in cases:
    with tempfile.TemporaryDirectory() as folder:
      tokenizer = AutoTokenizer.from_pretrained(documents.write_folder(pathlib.Path(folder), case))
    chats = []
    for template in _TEMPLATES:
      for prompt in _PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], chat_template=template, tokenize=False)
        chats.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = [tokenizer(prompt)["input_ids"] for prompt in _PROMPTS]
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token")}
    results.append({**case, "ids": ids, "chats": chats, "special": special})
  return results


def _write(name: str, sections: dict[str, Any]) -> None:
  """A line for each entry of a section that is a list, so that differences can be read."""
  texts = []
  for key, value in sections.items():
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
      text = "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]"
    texts.append(f"{json.dumps(key)}: {text}")
  (GOLDENS / name).write_text("{" + ",\n".join(texts) + "}\n", encoding="utf-8")


def main() -> None:
  _write("llama_cpp.json", {"ends": _ends(), "cuts": _cuts(), "prompts": _PROMPTS, "sentencepiece": _gguf_prompts()})
  _write("transformers_tokens.json", {"prompts": _PROMPTS, "cases": _folder_prompts()})


if __name__ == "__main__":
  main()

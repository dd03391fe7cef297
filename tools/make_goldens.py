"""Writes tests/goldens/: what Hugging Face transformers computes for the tiny Llamas and for the default model.

    python tools/make_goldens.py GGUF_FILE

Runs where transformers, torch, gguf and sentencepiece are installed; neither jax nor the rest of jaxfp8 is needed. The
goldens of today were made with the versions that tests/goldens/README.md states; every seed is 0.

    tiny_CASE.npz    tokens [T], logits [T, V] of the random model of `tests/helpers/tiny_models.py`, float32
    real.npz         five prompts through the default model: token ids, logits, 64 greedy tokens each
    weights.json     sha256 of a few weights, as transformers reads them from the GGUF file
    text.json        token ids of awkward strings and rendered chats, by the default model's tokenizer
    spm.json         a small SentencePiece model and the ids that sentencepiece itself gives
"""

import hashlib
import importlib.metadata
import json
import pathlib
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
EVERY = 64  # columns of the vocabulary whose logits are kept for every position
NEW_TOKENS = 64

DIGESTS = (
  "model.embed_tokens.weight",
  "model.layers.0.self_attn.q_proj.weight",
  "model.layers.0.self_attn.k_proj.weight",
  "model.layers.0.self_attn.v_proj.weight",
  "model.layers.17.mlp.down_proj.weight",
  "model.layers.29.self_attn.k_proj.weight",
  "model.norm.weight",
)

PARAGRAPH = (
  "A lighthouse is a tower that carries a bright lamp at its top, so that ships can find their way along a dangerous coast "
  "at night. The oldest of which we have a good description stood at Alexandria, was finished about 280 BC, and was more "
  "than 100 metres high; earthquakes brought it down some 1,500 years later. Until the eighteenth century the light came from "
  "wood or coal, and keepers spent most of their nights carrying fuel up the stairs. Oil lamps with hollow wicks, "
  "polished mirrors and finally the lens of Augustin Fresnel, which is built of rings of glass, made the same flame visible "
  "at four times the distance. Each station was given its own rhythm of flashes, printed in a book, by which a sailor "
  "could tell one headland from the next. Electric lamps, then radio and satellites, took over the work one by one, "
  "and most keepers"
)
CHATS = [
  [{"role": "user", "content": "Why is the sky blue?"}],
  [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "  Name a prime number > 10.\n"},
    {"role": "assistant", "content": "11 is a prime number."},
    {"role": "user", "content": "Und noch eine? 😀"},
  ],
]
PROMPTS = [
  CHATS[0],
  'def fibonacci(n):\n  """The first n Fibonacci numbers, as a list."""\n  result = []\n',
  "Il était une fois, dans un petit village près de la forêt, une vieille dame qui",
  "2 + 2 = 4\n12 + 30 = 42\n7 * 8 = 56\n100 - 1 =",
  PARAGRAPH,
]
STRINGS = [
  "",
  " ",
  "   leading and trailing   ",
  "Hello, world!",
  "don't can't WE'RE I'll he'd",
  "1234567890 3.14159 1,000,000 0x1F 2^10",
  "  12  345   6",
  "½ ² ٣ Ⅷ 一二三",
  "tabs\tand\nnewlines\r\n\r\n\n  x",
  "\n\n\n",
  "def f(x):\n    return x**2  # square\n\n\nprint(f(3))",
  "naïve café Ünïcödé ß",
  "e\u0301 versus \u00e9",
  "日本語のテキスト、そして漢字。",
  "Привет, мир! مرحبا بالعالم שלום",
  "😀👩‍👩‍👧‍👦🏳️‍🌈 ok 👍🏽",
  "<|im_start|>user\nhi<|im_end|>",
  "<|im_start|> not<|endoftext|>quite <|im_end",
  "a" * 70,
  "https://example.org/path?q=1&r=%20#frag",
  "\u200bzero\u00a0width\ufeff",
  "$$ \\frac{a}{b} $$ {{ x }} <b>&amp;</b>",
]


def main(gguf_file: str) -> None:
  import torch

  torch.set_num_threads(1)
  torch.manual_seed(0)
  GOLDENS.mkdir(exist_ok=True)
  make_tiny()
  make_real(pathlib.Path(gguf_file))
  make_spm()
  packages = ("transformers", "torch", "numpy", "gguf", "tokenizers", "sentencepiece")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
  (GOLDENS / "README.md").write_text(_README.format(versions=versions, python=sys.version.split()[0]))
  total = sum(path.stat().st_size for path in GOLDENS.iterdir())
  print(f"{GOLDENS}: {total / 1e6:.2f} MB with {versions}, seed 0")


def make_tiny() -> None:
  import torch
  from transformers import LlamaForCausalLM

  sys.path.insert(0, str(ROOT))
  from tests.helpers import tiny_models  # imports neither jax nor the rest of jaxfp8

  for case in tiny_models.CASES:
    config = tiny_models.make_config(case)
    tokens = tiny_models.make_tokens(config)
    with tempfile.TemporaryDirectory() as folder:
      path = tiny_models.write_hf_folder(pathlib.Path(folder), config, tiny_models.make_weights(config), tokenizer=False)
      model, report = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
      )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
      logits = model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    np.savez_compressed(GOLDENS / f"tiny_{case}.npz", tokens=tokens, logits=logits)
    print(f"{case}: logits {logits.shape}, largest {abs(logits).max():.2f}")


def make_real(path: pathlib.Path) -> None:
  import torch
  from tokenizers import pre_tokenizers
  from transformers import AutoModelForCausalLM, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  # transformers' GGUF loader ignores tokenizer.ggml.pre, here "smollm". llama.cpp: single digits, then GPT-2's cut.
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  make_text(tokenizer)
  model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
  )
  digests = {name: hashlib.sha256(model.state_dict()[name].numpy().tobytes()).hexdigest() for name in DIGESTS}
  _write_json(GOLDENS / "weights.json", digests)
  arrays = {}
  for i, prompt in enumerate(PROMPTS):
    text = prompt
    if not isinstance(prompt, str):
      text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
      out = model(torch.tensor([ids]), use_cache=True)
      logits, cache, greedy, margins = out.logits[0], out.past_key_values, [], []
      last = logits[-1]
      for _ in range(NEW_TOKENS):
        best = torch.topk(last, 2).values
        margins.append(float(best[0] - best[1]))
        greedy.append(int(last.argmax()))
        out = model(torch.tensor([greedy[-1:]]), past_key_values=cache, use_cache=True)
        last, cache = out.logits[0, -1], out.past_key_values
    arrays |= {
      f"ids_{i}": np.array(ids, np.int32),
      f"last_{i}": logits[-1].numpy(),
      f"every_{i}": logits[:, ::EVERY].numpy(),
      f"greedy_{i}": np.array(greedy, np.int32),
      f"margins_{i}": np.array(margins, np.float32),
    }
    print(f"prompt {i}: {len(ids)} tokens, least margin {min(margins):.4f}: {tokenizer.decode(greedy)[:60]!r}")
  np.savez_compressed(GOLDENS / "real.npz", every=np.int32(EVERY), **arrays)


def make_text(tokenizer) -> None:
  chats = []
  for messages in CHATS:
    for prompt in (True, False):
      text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
      ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)
      chats.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": list(ids)})
  strings = [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in STRINGS]
  prompts = [p if isinstance(p, str) else None for p in PROMPTS]
  _write_json(GOLDENS / "text.json", {"strings": strings, "chats": chats, "prompts": prompts})


def make_spm() -> None:
  """A SentencePiece BPE model as Llama 2's was trained (byte fallback, digits split), only small."""
  import sentencepiece

  with tempfile.TemporaryDirectory() as folder:
    corpus = pathlib.Path(folder, "corpus.txt")
    corpus.write_text("\n".join([PARAGRAPH, *PARAGRAPH.split(". "), *(s for s in STRINGS if "\n" not in s)]))
    sentencepiece.SentencePieceTrainer.train(
      input=str(corpus), model_prefix=f"{folder}/spm", vocab_size=560, model_type="bpe", byte_fallback=True,
      split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
      add_dummy_prefix=True, minloglevel=2,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/spm.model")
  ids = range(spm.get_piece_size())
  kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
  texts = [text for text in STRINGS if "<|" not in text] + [PARAGRAPH[:300]]
  _write_json(
    GOLDENS / "spm.json",
    {
      "tokens": [spm.id_to_piece(i) for i in ids],
      "scores": [spm.get_score(i) for i in ids],
      "types": kinds,
      "strings": [{"text": text, "ids": spm.encode(text)} for text in texts],
    },
  )


def _write_json(path: pathlib.Path, value) -> None:
  path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


_README = """# Goldens

What other programs compute, so that jaxfp8's tests have a truth that is not jaxfp8. Made by `tools/make_goldens.py` with
Python {python}, {versions}; one thread, eager attention, float32, seed 0 everywhere.

- `tiny_CASE.npz`: `tokens` [T] int32 and `logits` [T, V] float32 of `LlamaForCausalLM` on the random weights of
  `tests/helpers/tiny_models.py` (seed 0), which went through a Hugging Face folder.
- `hf_configs.json`: the config.json of each tiny model in the form of transformers 4, which read it for `tiny_CASE.npz`. The
  script reads this file and does not write it.
- `real.npz`: five prompts (a chat, code, French, numbers, a paragraph) through the default model. `ids_i` is the prompt,
  `last_i` [V] the logits of its last position, `every_i` [T, V / 64] the logits of every position at columns 0, 64, 128 ..,
  `greedy_i` the 64 most likely tokens that follow (end-of-text does not stop it), `margins_i` how far the best logit
  was above the second at each of them.
- `weights.json`: sha256 of a few of the default model's weights, float32, as transformers' GGUF loader made them.
- `text.json`: token ids of awkward strings, the prompts, and chats rendered by `apply_chat_template`.
- `spm.json`: a SentencePiece model of 560 pieces trained for this, and the ids that sentencepiece gives.

The default model is read by transformers' own GGUF loader (`from_pretrained(gguf_file=...)`, which dequantizes Q4_1 and Q8_0
and undoes the permutation of q and k). That loader ignores the file's pre-tokenizer, so the script sets what llama.cpp
understands by its name, "smollm": single digits, then GPT-2's byte-level cut.
"""


if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("make_goldens: pass the path of the default model's GGUF file, and nothing else.")
  main(sys.argv[1])

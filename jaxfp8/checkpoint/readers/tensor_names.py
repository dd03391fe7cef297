"""The names of a Hugging Face folder's tensors as a plain LlamaForCausalLM has them, whatever wrapped the saved model.

    _orig_mod.model.layers.0.mlp.up_proj.weight  ->  model.layers.0.mlp.up_proj.weight
    layers.0.mlp.up_proj.weight                  ->  the same (a saved LlamaModel)

Also knows the tensors that cannot change a result, and the names that betray another format.
"""

import itertools
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

from jaxfp8.checkpoint.readers.source import some_of
from jaxfp8.errors import InputError

# What wrappers put before, or between, the names of a model's modules: DDP, PEFT and models with images before them.
PREFIXES = ("module", "base_model", "language_model", "model")
# torch.compile, FSDP and activation checkpointing: anywhere.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Buffers, and masks of early releases: they follow from the config, or were constants.
UNUSED = (
  "rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "position_ids",
  "self_attn.mask", "causal_mask", "attention_mask",
)  # fmt: skip
_WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
_NAME = re.compile(rf"(?P<prefix>(?:(?:{'|'.join(PREFIXES)})\.)*)(?P<rest>(?:embed_tokens|layers|norm|lm_head)\..+)")
_ORIGINAL = "Pass an FP8 checkpoint, or the one in bfloat16 that it was made from."
# (ending or expression of a tensor's name, what the checkpoint is, the way out).
_FOREIGN = (
  (
    r"\.lora_[AB]\.|\.lora_(magnitude_vector|embedding)|\.base_layer\.",
    "a LoRA adapter that is not merged",
    "Merge it (merge_and_unload of peft) and save the model again.",
  ),
  (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ weights", _ORIGINAL),
  (r"\.(scales|biases)$", "quantized MLX weights", _ORIGINAL),
  (
    r"\.(quant_state\.bitsandbytes__|absmax$|quant_map$|SCB$)",
    "bitsandbytes weights",
    _ORIGINAL,
  ),
  (
    r"^(tok_embeddings\.weight|layers\.\d+\.attention\.w[qkvo]\.weight)$",
    "the names of Meta's or Mistral's own format",
    "Pass the Hugging Face version of the model.",
  ),
  (
    r"^(vision_tower|vision_model|model\.vision_tower|multi_modal_projector|visual)\.",
    "the parts of a model that sees images",
    "Pass a plain LlamaForCausalLM.",
  ),
)  # fmt: skip


def plain_names[T](tensors: Mapping[str, T], folder: pathlib.Path) -> tuple[dict[str, T], tuple[str, ...]]:
  """(the tensors by their names in a LlamaForCausalLM, without the unused ones; sentences about what was changed).

  Raises InputError for two spellings of the names in one folder, and for names of another format.
  """
  _refuse_foreign(tensors, folder)
  common = _common_prefix([name for name in tensors if not name.endswith(UNUSED)])
  plain: dict[str, T] = {}
  origin: dict[str, str] = {}
  prefixes: dict[tuple[bool, str], str] = {}
  unused = []
  for name, tensor in tensors.items():
    if name.endswith(UNUSED):
      unused.append(name)
      continue
    short = _WRAPPER.sub("", name.removeprefix(common))
    match = _NAME.fullmatch(short)
    is_head = match is not None and match["rest"].startswith("lm_head.")
    if match is not None:
      prefixes.setdefault((is_head, match["prefix"]), name)
      short = match["rest"] if is_head else f"model.{match['rest']}"
    if short in plain:
      raise _two_spellings(folder, origin[short], name)
    plain[short], origin[short] = tensor, name
  for is_head in (False, True):
    spellings = [name for (of_head, _), name in prefixes.items() if of_head == is_head]
    if len(spellings) > 1:
      raise _two_spellings(folder, *spellings[:2])
  notes = []
  changed = [(old, new) for new, old in origin.items() if old != new]
  if changed:
    old, new = changed[0]
    notes.append(f"{len(changed)} tensors are read under the names of a LlamaForCausalLM, such as {old} as {new}")
  if unused:
    notes.append(f"{some_of(unused)}: not used, since the config says the same")
  return plain, tuple(notes)


def _common_prefix(names: Collection[str]) -> str:
  """Any other prefix, such as `llm.`, if every tensor has it and none has a name of a Llama with it."""
  if not names or any(_NAME.fullmatch(_WRAPPER.sub("", name)) for name in names):
    return ""
  first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
  common = [one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
  inside = next((i for i, part in enumerate(common) if part in ("embed_tokens", "layers", "norm", "lm_head")), len(common))
  return "".join(f"{part}." for part in common[:inside])


def is_unused(name: str) -> bool:
  return name.endswith(UNUSED)


def _two_spellings(folder: pathlib.Path, first: str, second: str) -> InputError:
  return InputError(
    f"readers: the tensors of {folder} must have names of one spelling; got {first} and {second}. "
    "Save the model again without its wrappers (unwrap_model of accelerate, then save_pretrained)."
  )


def _refuse_foreign(names: Collection[str], folder: pathlib.Path) -> None:
  for pattern, what, way_out in _FOREIGN:
    if found := _matching(names, pattern):
      raise InputError(f"readers: {folder} holds {what}: {some_of(found)}. {way_out}")


def _matching(names: Iterable[str], pattern: str) -> list[str]:
  expression = re.compile(pattern)
  return [name for name in names if expression.search(name)]

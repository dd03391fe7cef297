"""What can be wrong with a command's input: one sentence that says what and what to do, code 1, nothing left behind."""

import functools
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from jaxfp8.errors import InputError
from jaxfp8.serving import memory
from tests.helpers import commands, tiny_models
from tests.helpers.commands import CHAIN
from tests.helpers.gguf_files import write_gguf

pytestmark = pytest.mark.process

CONFIG = tiny_models.make_config("mha_tied")
WEIGHTS = tiny_models.make_weights(CONFIG)
CONTEXT = 128


@pytest.fixture(scope="module", autouse=True)
def restored():
  with commands.compiled_programs_restored():
    yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return commands.write_chain(tmp_path_factory.mktemp("models") / "chain", max_context=CONTEXT)


@pytest.fixture
def run(monkeypatch, capsys, chain, tmp_path):
  return functools.partial(
    commands.run_here, monkeypatch, capsys, "--checkpoint", chain, "--cache_dir", tmp_path / "cache", "--max_new_tokens", "30"
  )


def refused(ran, pattern, cache=None):
  """One sentence (who, what, way out) and code 1; the cache holds no checkpoint, whole or half."""
  lines = [
    line for line in ran.err.splitlines() if not re.fullmatch(r"(Converting|Loading|Compiling)[a-z ]* took .* s\.", line)
  ]
  assert ran.code == 1 and ran.out == "", ran
  assert len(lines) == 1 and lines[0].endswith("."), lines
  assert re.search(pattern, lines[0]), lines[0]
  assert re.match(r"[a-z0-9_]+: |flag |Unknown command line flag ", lines[0]), lines[0]
  if cache is not None and (cache / "checkpoints").exists():
    assert list((cache / "checkpoints").iterdir()) == []


# --- flags ---

FLAGS = {
  "no prompt": ([], r'there is no prompt\. Pass --prompt="'),
  "empty prompt": (["--prompt", ""], r"prompt is empty\. Give it some text"),
  "blank prompt": (["--prompt", "x", "--prompt", " \n"], r"prompt is empty"),
  "prompt without a flag": (["why?"], r"every argument is a flag; got 'why\?'\. Write --prompt='why\?'"),
  "prompt that is no text": (["--prompt", "a\udcff"], r"must be UTF-8 text; got 'a\\udcff'\. Convert it"),
  "missing prompt file": (["--prompt_file", "/nowhere"], r"cannot read --prompt_file=/nowhere: No such file.*Pass a text file"),
  "a folder for a prompt": (["--prompt_file", "/"], r"cannot read --prompt_file=/: Is a directory"),
  "nothing on stdin": (["--prompt_file", "-"], r"prompt is empty"),
  "chat and raw": (["--prompt", "x", "--chat", "--raw"], r"--chat and --raw exclude each other"),
  "raw with a system message": (["--prompt", "x", "--raw", "--system", "be"], r"--system is part of a chat"),
  "interactive with a prompt": (["--prompt", "x", "--interactive"], r"--interactive reads prompts from the terminal"),
  "interactive JSON": (["--interactive", "--json"], r"Leave out .*--json"),
  "stop ids that are no numbers": (
    ["--prompt", "x", "--stop_token_ids", "2,</s>"],
    r"--stop_token_ids must be .*; got '2,</s>'",
  ),
  "a stop id below 0": (["--prompt", "x", "--stop_token_ids", "-1"], r"--stop_token_ids must be whole numbers.*; got '-1'"),
  "a stop id beyond the vocabulary": (
    ["--prompt", "x", "--stop_token_ids", "2,259"],
    r"--stop_token_ids must be between 0 and 258.*; got 259",
  ),
  "unknown flag": (
    ["--prompt", "x", "--temprature", "1"],
    r"Unknown command line flag 'temprature'. Did you mean: temperature",
  ),
  "no number": (["--prompt", "x", "--seed", "one"], r"--seed=one: .*Run with --help"),
  "no whole number": (["--prompt", "x", "--tensor", "1.5"], r"--tensor=1\.5"),
  "unknown value": (["--prompt", "x", "--weights", "fp7"], r"--weights=fp7: value should be one of <fp8\|bf16\|f32>"),
  "unknown activations": (["--prompt", "x", "--activations", "int8"], r"--activations=int8: value should be one of"),
  "unknown KV cache": (["--prompt", "x", "--kv_cache", "int4"], r"--kv_cache=int4: value should be one of"),
  "unknown kernel": (
    ["--prompt", "x", "--implementation", "triton"],
    r"one of auto, .*reference.*; got 'triton'\. Leave it out",
  ),
  "a module, but no kernel": (["--prompt", "x", "--implementation", "api"], r"one of auto"),
  "no tokens": (["--prompt", "x", "--max_new_tokens", "0"], r"max_new_tokens must be at least 1; got 0"),
  "negative temperature": (["--prompt", "x", "--temperature", "-1"], r"temperature must be at least 0 and finite; got -1"),
  "infinite temperature": (["--prompt", "x", "--temperature", "inf"], r"finite; got inf"),
  "temperature that float32 cannot hold": (
    ["--prompt", "x", "--temperature", "1e39"],
    r"temperature must be at least 0 and finite; got 1e\+39, which is inf in float32",
  ),
  "top_k too large": (["--prompt", "x", "--top_k", "99999999999"], r"top_k must be .*; got 99999999999"),
  "top_p zero": (["--prompt", "x", "--top_p", "0"], r"top_p must be above 0 and at most 1; got 0"),
  "min_p one": (["--prompt", "x", "--min_p", "1"], r"min_p must be at least 0 and below 1; got 1"),
  "negative seed": (["--prompt", "x", "--seed", "-1"], r"seed must be between 0 and 18446744073709551615; got -1"),
  "empty stop string": (["--prompt", "x", "--stop", ""], r"stop must be strings that are not empty"),
  "tensor that does not divide": (
    ["--prompt", "x", "--tensor", "3"],
    r"cannot cut the 2 query and 1 KV heads.*possible are 1, 2",
  ),
  "tensor zero": (["--prompt", "x", "--tensor", "0"], r"tensor must be at least 1; got 0"),
  "negative devices": (["--prompt", "x", "--tensor", "-2", "--data", "-1"], r"tensor must be at least 1; got -2"),
  "more devices than here": (["--prompt", "x", "--data", "9"], r"needs 9 devices; 8 are here. Use fewer"),
  "absurdly many devices": (["--prompt", "x", "--data", "1000000"], r"at most 64 on a CPU; got 1000000. Use fewer"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(run, tmp_path, name):
  arguments, pattern = FLAGS[name]
  refused(run(*arguments), pattern, tmp_path / "cache")


def test_prompt_file_that_is_not_utf8(run, tmp_path):
  (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
  refused(run("--prompt_file", tmp_path / "latin.txt"), r"latin\.txt: it is not UTF-8 text")


def test_stdin_that_is_not_utf8(run):
  refused(run("--prompt_file", "-", stdin=b"\xff"), r"--prompt_file=-: it is not UTF-8 text\. A prompt must be UTF-8 text")


def test_debug_shows_the_traceback(run, chain):
  with pytest.raises(InputError, match="at least 1"):
    run("--debug", "--prompt", "x", "--max_new_tokens", "0")
  ran = commands.run("--checkpoint", chain, "--prompt", "x", "--max_new_tokens", "0", "--debug")
  assert ran.code == 1 and "Traceback" in ran.err


# --- checkpoints ---


def _folder(path, weights=None, **options):
  return tiny_models.write_hf_folder(path / "model", CONFIG, weights or WEIGHTS, **options)


def _changed(name, change):
  weights = {key: array.copy() for key, array in WEIGHTS.items()}
  weights[name] = change(weights[name])
  return weights


def _with(index, value):
  def change(array):
    array[index] = value
    return array

  return change


def missing_folder(path):
  return path / "nothing"


def empty_folder(path):
  (path / "model").mkdir()
  return path / "model"


def other_file(path):
  (path / "model.bin").write_bytes(b"pickle")
  return path / "model.bin"


def missing_shard(path):
  folder = _folder(path, shards=3)
  (folder / "model-00002-of-00003.safetensors").unlink()
  return folder


def truncated_safetensors(path):
  folder = _folder(path)
  _cut(folder / "model.safetensors")
  return folder


def truncated_gguf(path):
  file = write_gguf(path / "model.gguf", CONFIG, WEIGHTS, GGMLQuantizationType.F16)
  _cut(file)
  return file


def truncated_gguf_header(path):
  file = write_gguf(path / "model.gguf", CONFIG, WEIGHTS, GGMLQuantizationType.F16)
  file.write_bytes(file.read_bytes()[:100])
  return file


def _cut(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def wrong_shape(path):
  return _folder(path, _changed("model.layers.1.mlp.up_proj.weight", lambda array: array[:-1]))


def missing_tensor(path):
  return _folder(path, {name: array for name, array in WEIGHTS.items() if name != "model.norm.weight"})


def nan_weights(path):
  return _folder(path, _changed("model.layers.1.mlp.down_proj.weight", _with((3, 4), np.nan)))


def infinite_weights(path):
  return _folder(path, _changed("model.norm.weight", _with(5, np.inf)), dtype=ml_dtypes.bfloat16)


def unknown_dtype(path):
  folder = _folder(path)
  arrays = load_file(folder / "model.safetensors")
  arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float64)
  save_file(arrays, folder / "model.safetensors")
  return folder


def another_architecture(path):
  folder = _folder(path)
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
  return folder


def broken_config(path):
  folder = _folder(path)
  (folder / "config.json").write_text('{"model_type": "llama"')
  return folder


def no_tokenizer(path):
  return _folder(path, tokenizer=False)


def broken_tokenizer(path):
  folder = _folder(path)
  (folder / "tokenizer.json").write_text("{}")
  return folder


CHECKPOINTS = {
  missing_folder: r"there is no checkpoint at .*nothing\. Pass a Hugging Face folder or a GGUF file",
  empty_folder: r"has neither config\.json nor a \.gguf file; it is empty\. Pass",
  other_file: r"a file must be a \.gguf; got .*model\.bin: it is a text file\. Pass",
  missing_shard: r"names the shard model-00002-of-00003\.safetensors, and it is missing\. Fetch",
  truncated_safetensors: r"model\.safetensors is not a whole safetensors file: .* ends at byte .*\. Fetch the file again",
  truncated_gguf: r"model\.gguf is not a whole GGUF file.*\. Fetch the file again",
  truncated_gguf_header: r"model\.gguf is not a whole GGUF file.*\. Fetch the file again",
  wrong_shape: r"model\.layers\.1\.mlp\.up_proj\.weight in .* must have shape \[91, 52\] by the config; got \[90, 52\]\. Use",
  missing_tensor: r"must hold model\.norm\.weight; absent\. Fetch",
  nan_weights: r"must be finite; model\.layers\.1\.mlp\.down_proj\.weight in .* is nan at \[3, 4\]\. Fetch",
  infinite_weights: r"must be finite; model\.norm\.weight in .* is inf at \[5\]\. Fetch",
  unknown_dtype: r"model\.norm\.weight in .* must be float32, float16 or bfloat16; got F64\. Convert",
  another_architecture: r"model_type 'mixtral' in .* is another model than a Llama, and .* Run this one",
  broken_config: r"config\.json is not valid JSON: .*\. Fetch",
  no_tokenizer: r"has no tokenizer\.json\. Fetch it",
  broken_tokenizer: r"tokenizer\.json cannot be read: .*\. Fetch it again",
}


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_checkpoints(run, tmp_path, make):
  refused(run("--checkpoint", make(tmp_path), "--prompt", "x"), CHECKPOINTS[make], tmp_path / "cache")


@pytest.mark.parametrize("make", [nan_weights, no_tokenizer])
def test_checkpoints_without_a_cache(run, tmp_path, make):
  refused(run("--checkpoint", make(tmp_path), "--cache_dir", "", "--prompt", "x"), r"finite|no tokenizer")


def test_model_without_a_chat_template(run, tmp_path):
  folder = _folder(tmp_path)
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
  for flag in ("--chat", "--system=be"):
    refused(run("--checkpoint", folder, "--prompt", "x", flag), r"needs a chat template, and .* has none\. P")


def test_weights_are_never_quantized_again(run, chain, tmp_path):
  assert run("--prompt", "x").code == 0
  (converted,) = (tmp_path / "cache" / "checkpoints").iterdir()
  refused(run("--checkpoint", converted, "--prompt", "x", "--weights", "bf16"), r"holds fp8 weights .*never requantized: pass")
  shutil.rmtree(converted / "state")
  refused(run("--checkpoint", converted, "--prompt", "x"), r"is damaged: .*Convert its source again")


# --- machines ---


def test_a_run_goes_on_without_a_cache_that_cannot_be_written(run, tmp_path):
  (tmp_path / "file").write_text("in the way")
  ran = run("--prompt", "x", "--cache_dir", tmp_path / "file" / "below")
  assert (ran.code, ran.out) == (0, CHAIN + "\n")
  (line,) = [line for line in ran.err.splitlines() if line.startswith("cache:")]
  assert re.search(
    r'cannot write .*/below: Not a directory\. This run goes on .*Pass another --cache_dir, or --cache_dir=""', line
  )


def test_a_cache_folder_whose_name_would_mean_something_in_a_url(run, tmp_path):
  for _ in range(2):
    ran = run("--prompt", "x", "--cache_dir", tmp_path / "a b#c%20é?")
    assert (ran.code, ran.out) == (0, CHAIN + "\n"), ran.err


def test_full_disk(run, tmp_path, monkeypatch):
  def no_space(path):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("jaxfp8.checkpoint.writer._sync", no_space)
  refused(run("--prompt", "x"), r"cannot write .*: No space left on device\. Nothing was left behind", tmp_path / "cache")


def test_more_pages_than_memory_has(run, monkeypatch):
  monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
  refused(run("--prompt", "x"), r"KV pool of 1 pages .* needs .* GB; .* GB are free\. Use fewer")


def test_kernel_that_cannot_run_here(run):
  refused(
    run("--prompt", "x", "--implementation", "sm90"), r"implementation='sm90' cannot run here .*Pass implementation=\"auto\""
  )


# --- the edge of the context ---


def test_context_edge(run):
  last = run("--raw", "--prompt", "x" * (CONTEXT - 1), "--max_new_tokens", "999999")
  assert (last.code, last.out) == (0, CHAIN[0] + "\n")
  refused(run("--raw", "--prompt", "x" * CONTEXT), r"the prompt has 128 tokens; the context holds 128, .*Shorten it")


def test_answer_fills_the_context(run):
  ran = run("--raw", "--json", "--prompt", "x" * (CONTEXT - 5), "--max_new_tokens", "999999")
  (completion,) = json.loads(ran.out)["completions"]
  assert (len(completion["token_ids"]), completion["finish_reason"]) == (5, "length")

"""The converter and its companions: whole or not there, resumed, verified, exported and back, in little memory."""

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxfp8
from jaxfp8.checkpoint import convert, export, manifest, readers
from jaxfp8.checkpoint.manifest import WRITING
from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.quantized_source import QuantizedSource
from jaxfp8.commands import command
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from jaxfp8.quantization import calibration, quality
from jaxfp8.recipe import Recipe
from jaxfp8.sharding import make_mesh
from tests.helpers import commands, dialect_files, numpy_llama, tiny_llamas, tiny_models
from tests.helpers.numpy_recipes import divergence

CONFIG = tiny_models.make_config("gqa_9_3_untied")
# Converts slowly, a matrix at a time: argv is source, output, and "resume" or nothing.
SLOW = """
import sys, time
from jaxfp8.checkpoint import convert
from jaxfp8.checkpoint.quantized_source import QuantizedSource
convert._WRITE_BYTES, read = 0, QuantizedSource.read
QuantizedSource.read = lambda *args: time.sleep(0.05) or read(*args)
convert.convert_checkpoint(sys.argv[1], sys.argv[2], resume="resume" in sys.argv)
"""


@pytest.fixture
def source(tmp_path):
  return tiny_models.write_hf_folder(tmp_path / "source", CONFIG, tiny_models.make_weights(CONFIG))


def tool(name, *args) -> commands.Ran:
  """A tool in this process, as its command line would run it."""
  module = importlib.import_module(f"jaxfp8.commands.{name.partition('_')[0]}")
  commands.forget_flags(module.FLAGS)
  out, err, before = io.StringIO(), io.StringIO(), sys.argv
  sys.argv = [name, *map(str, args)]
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      command.run(module.COMMAND)
  except SystemExit as end:
    return commands.Ran(end.code, out.getvalue(), err.getvalue())
  finally:
    sys.argv = before
  raise AssertionError("a command ends with an exit code")


def _said(ran) -> list[str]:
  return [line for line in ran.err.splitlines() if " took " not in line]


def process(name, *args, **options) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", f"tools.{name}", *map(str, args)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.run(command, cwd=commands.ROOT, env=environment, capture_output=True, text=True, timeout=240, **options)


def contents(folder):
  """Every array of a checkpoint, as bytes."""
  source = Checkpoint(folder)
  return {key: source.read_array(key).tobytes() for key in source.expected}


def leavings(folder):
  return [path.name for path in folder.parent.iterdir() if path.name.startswith(folder.name + WRITING)]


class TestWholeOrNotThere:
  def groups(self, folder):
    return sum(len(list(path.iterdir())) for path in folder.parent.glob(f"{folder.name}{WRITING}*.partial_save"))

  def kill_after(self, source, output, groups, *how):
    running = commands.start(source, output, *how, script=SLOW)
    commands.wait_until(lambda: self.groups(output) >= groups or running.poll() is not None, seconds=240)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    return running.returncode

  def test_killed_at_several_points_and_resumed(self, source, tmp_path):
    output = tmp_path / "out"
    convert.convert_checkpoint(source, tmp_path / "truth")
    for groups in (2, 12):  # each goes on behind the one before
      assert self.kill_after(source, output, groups, "resume") == -signal.SIGKILL
      assert not output.exists() and self.groups(output) >= groups
    read = []
    original = QuantizedSource.read
    QuantizedSource.read = lambda self, keys: read.extend(keys) or original(self, keys)
    try:
      convert.convert_checkpoint(source, output, resume=True)
    finally:
      QuantizedSource.read = original
    assert contents(output) == contents(tmp_path / "truth")
    assert 0 < len(read) < len(contents(output)) - 12
    assert leavings(output) == []

  def test_a_leftover_is_removed_by_a_conversion_that_does_not_resume(self, source, tmp_path):
    output = tmp_path / "out"
    assert self.kill_after(source, output, 2) == -signal.SIGKILL
    assert leavings(output)
    convert.convert_checkpoint(source, output)
    assert leavings(output) == []

  def test_other_work_is_not_gone_on_with(self, source, tmp_path):
    output = tmp_path / "out"
    assert self.kill_after(source, output, 2) == -signal.SIGKILL
    convert.convert_checkpoint(source, output, Recipe("fp8", "block128"), resume=True)
    assert Checkpoint(output).granularity("model.layers.0.mlp.up_proj.weight") == "block128"
    assert leavings(output) == []

  def test_a_group_that_the_journal_does_not_know_is_written_again(self, source, tmp_path):
    output = tmp_path / "out"
    assert self.kill_after(source, output, 4) == -signal.SIGKILL
    (journal,) = tmp_path.glob("*.journal")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])  # the last line cut short
    convert.convert_checkpoint(source, output, resume=True)
    convert.convert_checkpoint(source, tmp_path / "truth")
    assert contents(output) == contents(tmp_path / "truth")

  def test_a_full_disk_is_one_sentence(self, source, tmp_path):
    """The system refuses files beyond a size, as it refuses them on a full disk."""
    output = tmp_path / "out"

    def limited():
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    ran = process("convert_checkpoint", "--input", source, "--output", output, preexec_fn=limited)
    assert ran.returncode == 1, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if not line.startswith("Converting")]
    assert line.startswith(f"checkpoint: cannot write {output}: ") and "pass another folder or free space" in line
    assert not output.exists() and leavings(output) == []

  def test_an_output_that_exists(self, source, tmp_path):
    (tmp_path / "out").mkdir()
    ran = tool("convert_checkpoint", "--input", source, "--output", tmp_path / "out")
    assert ran.code == 1 and "exists already" in ran.err and "Traceback" not in ran.err


class TestOptions:
  def test_keep_bf16(self, source, tmp_path):
    arrays = jaxfp8.convert_checkpoint(source, tmp_path / "out", keep_bf16=(r"layers\.0\.mlp", "1.self_attn.v_proj"))
    ours = Checkpoint(tmp_path / "out")
    plain = {name for name in ours.names() if "_proj" in name and not ours.granularity(name)}
    mlp = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert plain == mlp | {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"}
    assert any("1.self_attn.q_proj" in note and "one matrix" in note for note in arrays.notes)
    model = jaxfp8.load(tmp_path / "out")
    assert [bounds[:2] for bounds in model.segment_bounds()] == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(InputError, match="matches no matrix"):
      convert.convert_checkpoint(source, tmp_path / "x", keep_bf16=("nothing",))
    with pytest.raises(InputError, match="regular expressions"):
      convert.convert_checkpoint(source, tmp_path / "x", keep_bf16=("(",))

  def test_static_scales(self, tmp_path, source):
    def extra(names):
      modules = [name.removesuffix(".weight_scale") for name in names if name.endswith("weight_scale")]
      return {f"{module}.input_scale": np.float32(0.5).reshape(()) for module in modules}

    folder, _, _ = dialect_files.write(tmp_path / "with_scales", CONFIG, extra=extra)
    for activations, count in (("static", 21), ("dynamic", 0), ("none", 0)):
      convert.convert_checkpoint(folder, tmp_path / activations, activations=activations)
      assert len(Checkpoint(tmp_path / activations).static_scales()) == count
    with pytest.raises(InputError, match=r"has none\. Pass activations=dynamic"):
      convert.convert_checkpoint(source, tmp_path / "x", activations="static")

  def test_a_checkpoint_of_ours_as_the_source(self, source, tmp_path):
    """bf16 first and float8 later is float8 at once; float8 stays what it is."""
    convert.convert_checkpoint(source, tmp_path / "bf16", Recipe("bf16"))
    convert.convert_checkpoint(tmp_path / "bf16", tmp_path / "fp8", Recipe("fp8", "block128"))
    wide = {n: np.asarray(readers.open_source(source).read(n)) for n in ("model.layers.0.mlp.up_proj.weight",)}
    ours = Checkpoint(tmp_path / "fp8")
    for name, weight in wide.items():
      value, scale = dialect_files.quantize(weight.astype(ml_dtypes.bfloat16).astype(np.float32), "block")
      assert ours.read(name).tobytes() == value.tobytes() and ours.read_scale(name).tobytes() == scale.tobytes()
    convert.convert_checkpoint(tmp_path / "fp8", tmp_path / "again", keep_bf16=("layers.2",))
    again = Checkpoint(tmp_path / "again")
    assert again.read(name).tobytes() == ours.read(name).tobytes() and again.granularity(name) == "block128"
    assert again.granularity("model.layers.2.mlp.up_proj.weight") is None


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """By the tool itself: (folder of the checkpoint, what the tool printed)."""
  folder = tmp_path_factory.mktemp("converted")
  tiny_models.write_hf_folder(folder / "source", CONFIG, tiny_models.make_weights(CONFIG), shards=2)
  ran = tool("convert_checkpoint", "--input", folder / "source", "--output", folder / "out")
  assert ran.code == 0, ran.err
  return folder / "out", ran


class TestTools:
  def test_what_the_converter_says_and_stores(self, converted):
    folder, ran = converted
    result = json.loads(ran.out.splitlines()[-1])
    assert result["recipe"] == {"weights": "fp8", "granularity": "channel", "activations": "dynamic"}
    provenance = json.loads((folder / "jaxfp8.json").read_text())["provenance"]
    assert provenance["dialect"] == "plain" and provenance["command"][0] == "--input" and "jax" in provenance["versions"]
    assert set(provenance["source_sha256"]) == {path.name for path in readers.source_files(folder.parent / "source")}
    assert "GB/s" in ran.out

  def test_inspect(self, converted):
    ran = tool("inspect_checkpoint", converted[0], "--tensor=3", "--verify")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out.splitlines()[-1])
    assert result["verified"] and result["bytes"] == sum(line["bytes"] for line in result["tensors"])
    line = next(line for line in result["tensors"] if line["key"] == "model.layers.1.mlp.up_proj.weight[F,D]")
    weight = Checkpoint(converted[0]).read("model.layers.1.mlp.up_proj.weight").astype(np.float32)
    assert line["saturated"] == np.mean(np.abs(weight) == 448) > 0 and line["zero"] == np.mean(weight == 0)
    assert "tensor=3" in ran.out and "all equal" in ran.out and "model.layers.0.mlp.up_proj.scale[F]" in ran.out
    model = tiny_llamas.load(CONFIG, Recipe("fp8", "channel"), mesh=make_mesh(CONFIG, 3))
    leaves = jax.tree.leaves(nnx.state(model))
    assert result["bytes_per_device"] == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

  @pytest.mark.parametrize("what", ["array", "tokenizer.json", "manifest"])
  def test_verify_notices(self, converted, tmp_path, what):
    folder = shutil.copytree(converted[0], tmp_path / "copy")
    if what == "array":
      path = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 1
      path.write_bytes(data)
    elif what == "manifest":
      path = folder / "jaxfp8.json"
      path.write_text(path.read_text().replace('"theta": 10000.0', '"theta": 20000.0'))
    else:
      path = folder / what
      path.write_text(path.read_text().replace("<unk>", "<unx>"))
    ran = tool("inspect_checkpoint", folder, "--verify", "--json")
    assert ran.code == 1 and "Traceback" not in ran.err
    assert ("is not what was written" in ran.err) or (what == "manifest" and "the SHA-256 of jaxfp8.json" in ran.err)

  def test_outliers(self, tmp_path):
    weights = tiny_models.make_weights(CONFIG)
    weights["model.layers.2.mlp.up_proj.weight"][3] *= 50
    tiny_models.write_hf_folder(tmp_path / "source", CONFIG, weights)
    convert.convert_checkpoint(tmp_path / "source", tmp_path / "out")
    ran = tool("inspect_checkpoint", tmp_path / "out", "--json")
    (outlier,) = json.loads(ran.out)["outliers"]
    assert (outlier["layer"], outlier["matrix"]) == (2, "mlp.up_proj") and outlier["times_median"] > 20

  def test_wrong_flags(self, tmp_path):
    for args in (["--input", "x"], ["--input", tmp_path / "absent", "--output", tmp_path / "o"], ["--output", "x"]):
      ran = tool("convert_checkpoint", *args)
      assert ran.code == 1 and len(_said(ran)) == 1, ran.err


TEXT = "the quick brown fox jumps over the lazy dog. " * 40
OTHER = "pack my box with five dozen liquor jugs, sphinx of black quartz; " * 20
COSTLY = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
SHORT = ("--tokens=96", "--context=32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model that float8 costs something in one merged matrix alone: all others are what float8 makes of them already."""
  folder = tmp_path_factory.mktemp("quality")
  weights = tiny_models.make_weights(CONFIG)
  for name in [name for name in weights if "_proj" in name and name not in COSTLY]:
    weights[name] = numpy_llama.fake_quantize_weight(weights[name], "channel").astype(np.float32)
  tiny_models.write_hf_folder(folder / "source", CONFIG, weights)
  (folder / "text.txt").write_text(TEXT)
  (folder / "other.txt").write_text(OTHER)
  return folder


class TestQuality:
  @staticmethod
  def convert(folder, output, *args):
    return tool("convert_checkpoint", "--input", folder / "source", "--output", output, *args)

  @staticmethod
  def held_out(folder):
    source = readers.open_source(folder / "source")
    tokenizer = jaxfp8.Tokenizer(source.tokenizer)
    return quality.cut_chunks(tokenizer.encode(TEXT)[1:], 96, 32, tokenizer.bos_id)

  def divergence(self, folder, output) -> float:
    """KL of what lies in a checkpoint from its source, by numpy in float64."""
    source, ours = readers.open_source(folder / "source"), Checkpoint(output)
    plain = {name: source.read(name).astype(np.float64) for name in source.names()}
    stored = {name: ours.read(name).astype(np.float64) for name in ours.names()}
    stored |= {name: w * ours.read_scale(name)[:, None] for name, w in stored.items() if ours.granularity(name)}
    rows = self.held_out(folder)[:, :-1]
    return np.mean([divergence(*(numpy_llama.forward(CONFIG, w, row) for w in (plain, stored))) for row in rows])

  def test_what_the_gate_finds_is_stored_and_printed(self, folder, tmp_path):
    text = f"--text={folder / 'text.txt'}"
    ran = self.convert(folder, tmp_path / "out", "--gate", "--activations=none", text, *SHORT)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])["quality"]
    truth = self.divergence(folder, tmp_path / "out")
    assert truth > 1e-3  # and the activations' bf16, which numpy's float64 has not, costs 2e-4
    np.testing.assert_allclose(found["kl"]["value"], truth, rtol=0.1, atol=3e-4)
    assert found["limits"]["max_kl"] == 0.04 and found["positions"] == 96 and found["text"].startswith("text.txt (sha256 ")
    ran = tool("inspect_checkpoint", tmp_path / "out", "--verify")
    assert ran.code == 0 and json.loads(ran.out.splitlines()[-1])["quality"] == found
    (line,) = [line for line in ran.out.splitlines() if line.startswith("quality ")]
    assert f"KL {found['kl']['value']:.4g} nats" in line and "limits: max_kl 0.04" in line

  def test_above_a_limit_there_is_no_output(self, folder, tmp_path):
    ran = self.convert(folder, tmp_path / "out", "--gate", "--max_kl=1e-6", f"--text={folder / 'text.txt'}", *SHORT)
    assert ran.code == 1 and not ran.out and len(_said(ran)) == 1 and "must be at most 1e-06; got" in ran.err
    assert list(tmp_path.iterdir()) == []

  def test_the_gate_reads_what_was_written(self, folder, tmp_path, monkeypatch):
    read = QuantizedSource.read

    def spoilt(self, keys):
      arrays = read(self, keys)
      return arrays if self.recipe.weights != "fp8" else {k: a * 0 if "norm" in k else a for k, a in arrays.items()}

    monkeypatch.setattr(QuantizedSource, "read", spoilt)
    ran = self.convert(folder, tmp_path / "out", "--gate", f"--text={folder / 'text.txt'}", *SHORT)
    assert ran.code == 1 and "KL divergence must be" in ran.err and not (tmp_path / "out").exists()

  def test_a_gate_that_failed_is_asked_again(self, folder, tmp_path, monkeypatch):
    """With --resume what is written stays, so that another limit costs no second conversion."""
    output, args = tmp_path / "out", ("--resume", "--gate", f"--text={folder / 'text.txt'}", *SHORT)
    assert self.convert(folder, output, *args, "--max_kl=1e-6").code == 1
    assert leavings(output) and not output.exists()
    read = QuantizedSource.read

    def no_second_time(self, keys):
      assert self.recipe.weights != "fp8", "is written already"
      return read(self, keys)

    monkeypatch.setattr(QuantizedSource, "read", no_second_time)
    ran = self.convert(folder, output, *args)
    assert ran.code == 0 and leavings(output) == [], ran.err
    assert tool("inspect_checkpoint", output, "--verify", "--json").code == 0

  def test_the_costliest_matrix_stays_beside_what_expressions_name(self, folder, tmp_path):
    text = f"--text={folder / 'text.txt'}"
    limits = ("--gate", "--activations=none", "--max_kl=1e-3")
    assert self.convert(folder, tmp_path / "all", *limits, text, *SHORT).code == 1
    keep = ("--keep_bf16=auto:1", r"--keep_bf16=layers\.2\.self_attn\.o_proj")
    ran = self.convert(folder, tmp_path / "out", *keep, *limits, text, *SHORT)
    assert ran.code == 0, ran.err
    ours = Checkpoint(tmp_path / "out")
    plain = {name for name in ours.names() if "_proj" in name and not ours.granularity(name)}
    assert plain == {*COSTLY, "model.layers.2.self_attn.o_proj.weight"}
    assert len(json.loads(ran.out.splitlines()[-1])["keep_bf16"]) == 2

  def test_scales_from_a_text(self, folder, tmp_path):
    ran = self.convert(
      folder, tmp_path / "out", f"--calibration_text={folder / 'other.txt'}", "--calibration_tokens=512", "--keep_bf16=up_proj"
    )
    assert ran.code == 0, ran.err
    source = readers.open_source(folder / "source")
    tokenizer = jaxfp8.Tokenizer(source.tokenizer)
    tokens = tokenizer.encode(OTHER)[1:]
    rows = [[tokenizer.bos_id, *tokens[start : start + 255]] for start in (0, len(tokens) - 255)]  # of 256, over the whole text
    recipe = Recipe("fp8", "channel", "fp8_static", "fp8_static")
    calibration.calibrate(source.path, tmp_path / "truth", np.array(rows, np.int32), recipe, keep_bf16=("up_proj",))
    assert contents(tmp_path / "out") == contents(tmp_path / "truth")
    ours = Checkpoint(tmp_path / "out")
    assert ours.manifest.recipe == recipe and len(ours.static_scales()) == 7 * CONFIG.num_layers
    about = ours.manifest.provenance
    assert about["calibration"]["tokens"] == 512 and about["calibration"]["text"].startswith("other.txt (sha256 ")
    assert about["command"][0] == "--input" and about["source_sha256"]
    assert json.loads(ran.out.splitlines()[-1])["recipe"]["activations"] == "static"
    assert "other.txt" in tool("inspect_checkpoint", tmp_path / "out").out

  @pytest.mark.parametrize(
    ("args", "why"),
    [
      (["--keep_bf16=auto:0"], "needs N from 1 to 12"),
      (["--keep_bf16=auto:1", "--weights=bf16"], "is for --weights=fp8"),
      (["--keep_bf16=auto:1", "--keep_bf16=nothing"], "matches no matrix"),
      (["--max_kl=1"], "--max_kl is for --gate"),
      (["--context=32"], "--context is for --gate or --keep_bf16=auto:N"),
      (["--calibration_tokens=512"], "--calibration_tokens is for --calibration_text"),
      (["--calibration_text=text.txt", "--activations=dynamic"], "gives static scales; got --activations=dynamic"),
      (["--calibration_text=text.txt", "--resume"], "cannot be gone on with"),
      (["--calibration_text=text.txt", "--gate", "--text=text.txt"], "must be held out"),
      (["--calibration_text=absent.txt"], "cannot read --calibration_text=absent.txt"),
      (["--gate", "--text=text.txt", "--tokens=9999999"], "Pass a longer text or fewer tokens"),
    ],
  )
  def test_mistakes_are_one_sentence(self, folder, tmp_path, monkeypatch, args, why):
    monkeypatch.chdir(folder)
    ran = self.convert(folder, tmp_path / "out", *args)
    assert ran.code == 1 and why in ran.err and len(_said(ran)) == 1 and not ran.out, ran.err
    assert list(tmp_path.iterdir()) == []

  def test_sources_that_cannot_be_measured(self, folder, tmp_path):
    text = f"--text={folder / 'text.txt'}"
    tiny_models.write_hf_folder(tmp_path / "source", CONFIG, tiny_models.make_weights(CONFIG), tokenizer=False)
    ran = self.convert(tmp_path, tmp_path / "out", "--gate", text)
    assert ran.code == 1 and "tokenizer" in ran.err and len(_said(ran)) == 1
    dialect_files.write(tmp_path / "float8" / "source", CONFIG)
    ran = self.convert(tmp_path / "float8", tmp_path / "out", "--keep_bf16=auto:1", text, *SHORT)
    assert ran.code == 1 and "weights that are not float8 yet" in ran.err and len(_said(ran)) == 2  # with the reader's note
    assert not (tmp_path / "out").exists()


class TestExport:
  @pytest.mark.parametrize("kind", ["channel", "tensor", "block"])
  def test_there_and_back(self, tmp_path, kind):
    """Values and scales are the same bits in the source, in the exported folder and in what is made of that."""
    heads = np.array([0.25, 0.5, 0.75], np.float32).reshape(3, 1, 1)

    def extra(names):
      static = {name.replace("weight_scale", "input_scale"): np.full(1, 0.5, np.float32) for name in names if "scale" in name}
      return static | {f"model.layers.{l}.self_attn.{w}_scale": heads for l in range(3) for w in "kv"}

    config = CONFIG if kind != "block" else tiny_models.LlamaConfig.from_dict({**CONFIG.to_dict(), "d_ff": 130, "d_model": 144})
    folder, tensors, _ = dialect_files.write(
      tmp_path / "source", config, kind=kind, plain=("layers.1.self_attn.o",), extra=extra
    )
    convert.convert_checkpoint(folder, tmp_path / "ours", activations="static")
    config_json = export.export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    (group,) = config_json["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["dynamic"] is False and group["weights"]["strategy"] == kind
    source = readers.open_source(tmp_path / "theirs")
    assert source.notes == () and source.dialect == "compressed-tensors" and source.config.d_ff == config.d_ff
    convert.convert_checkpoint(source, tmp_path / "again", activations="static")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    for name in source.names():
      if tensors[name].dtype == dialect_files.FLOAT8:
        assert source.read(name).tobytes() == tensors[name].tobytes()
        scale = source.read_scale(name).reshape(-1)
        np.testing.assert_array_equal(scale, np.broadcast_to(tensors[name + "_scale"].reshape(-1), scale.shape))
    assert source.read_static("model.layers.2.self_attn.k_scale").tolist() == heads.reshape(-1).tolist()
    assert source.tokenizer.chat_template == tiny_models.CHAT_TEMPLATE and source.tokenizer.special_tokens

  def test_the_tool(self, converted, tmp_path):
    ran = tool("export_checkpoint", "--input", converted[0], "--output", tmp_path / "out")
    assert ran.code == 0 and json.loads(ran.out.splitlines()[-1])["strategies"] == ["channel"], ran.err
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert scheme["ignore"] == ["lm_head"] and scheme["config_groups"]["group_0"]["targets"] == ["Linear"]
    ran = tool("export_checkpoint", "--input", converted[0], "--output", tmp_path / "out")
    assert ran.code == 1 and "exists already" in ran.err

  def test_nothing_to_export(self, source, tmp_path):
    convert.convert_checkpoint(source, tmp_path / "bf16", Recipe("bf16"))
    with pytest.raises(InputError, match="holds no float8 weights"):
      export.export_checkpoint(tmp_path / "bf16", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.writing*"))


MEASURED = """
import sys
from jaxfp8.checkpoint import convert
from jaxfp8.serving.memory import peak_bytes
convert._WRITE_BYTES = 4 << 20
convert.convert_checkpoint(sys.argv[1], sys.argv[2])
print(peak_bytes())
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
  """Twelve layers of 21 MB take hardly more than three; `python -m tools.measure_conversion` does the same with gigabytes."""
  peaks = []
  for layers in (3, 12):
    config = _wide(layers)
    folder = tmp_path / str(layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(export.config_to_hf(config)))
    arrays = {name: np.full(shape, 0.5, np.float16) for name, shape in readers.expected_tensors(config).items()}
    save_file(arrays, folder / "model.safetensors")
    ran = commands.run(folder, tmp_path / f"out{layers}", script=MEASURED)
    assert ran.code == 0, ran.err
    peaks.append(int(ran.out))
  layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048)
  assert peaks[1] < peaks[0] + 2 * layer, [peak / 1e6 for peak in peaks]
  shutil.rmtree(tmp_path, ignore_errors=True)


def _wide(layers: int) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=64, d_model=1024, d_ff=2048, num_layers=layers, num_heads=8, num_kv_heads=8, head_dim=128, max_context=64
  )


def test_a_newer_format_is_refused(converted, tmp_path):
  folder = shutil.copytree(converted[0], tmp_path / "copy")
  data = json.loads((folder / "jaxfp8.json").read_text())
  data["format_version"] = 99
  (folder / "jaxfp8.json").write_text(json.dumps({**data, "sha256": manifest.digest_of(data)}))
  ran = tool("inspect_checkpoint", folder)
  assert ran.code == 1 and "format version 99" in ran.err and len(_said(ran)) == 1

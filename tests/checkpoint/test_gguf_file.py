"""GGUF files: every type gives the weights in Hugging Face's order; what is cut, damaged or unknown is refused."""

import hashlib
import json
import pathlib
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxfp8.checkpoint import readers
from jaxfp8.checkpoint.readers.gguf_file import QUANTIZED
from jaxfp8.checkpoint.readers.source import expected_tensors
from jaxfp8.config import LlamaConfig
from jaxfp8.errors import InputError
from tests.helpers import tiny_models
from tests.helpers.gguf_files import write_gguf

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
Type = gguf.GGMLQuantizationType
Q = "model.layers.1.self_attn.q_proj.weight"


def _bytes_of(array):
  return np.ascontiguousarray(array).tobytes()


def _divisible(n):
  """A config whose every contracted size is a multiple of n, as ggml's blocks want."""
  sizes = {"d_model": n, "d_ff": 2 * n, "vocab_size": 48, "num_layers": 1}
  heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": n // 2}
  return LlamaConfig.from_dict({**tiny_models.CASES["gqa_9_3_untied"], **sizes, **heads})


@pytest.mark.parametrize("case", ["mha_tied", "gqa_9_3_untied", "gqa_6_2_linear"])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda k: k.name)
def test_native_gguf_gives_back_every_bit(tmp_path, case, kind):
  config = tiny_models.make_config(case)
  weights = tiny_models.make_weights(config)
  dtype = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}[kind]
  source = readers.open_source(write_gguf(tmp_path / "m.gguf", config, weights, kind))
  assert source.config == config == readers.read_config(tmp_path)
  assert source.names() == tuple(expected_tensors(config)) and source.files() == [tmp_path / "m.gguf"]
  for name, weight in weights.items():
    array = source.read(name)
    expected = weight if weight.ndim == 1 else weight.astype(dtype)
    assert array.dtype == expected.dtype == source.dtype(name) and array.shape == weight.shape == source.shape(name)
    assert _bytes_of(array) == _bytes_of(expected), name


# A block's step, as a part of its largest magnitude.
@pytest.mark.parametrize(("name", "step"), [("Q8_0", 1 / 127), ("Q4_0", 1 / 8), ("Q4_1", 2 / 15)])
def test_quantized_gguf_is_near_the_weights_in_their_order(tmp_path, name, step):
  kind = Type[name]
  config = _divisible(32)
  weights = tiny_models.make_weights(config)
  source = readers.open_source(write_gguf(tmp_path / "m.gguf", config, weights, kind))
  for name, weight in weights.items():
    array = source.read(name)
    assert array.dtype == np.float32 == source.dtype(name)
    blocks = abs(weight.reshape(-1, 32))
    # Q4_0 cuts off what lies beyond 7 of -8 .. 7, up to a whole step; factors are float16, hence 2**-10.
    bound = ((1 if kind == Type.Q4_0 else 0.5) * step + 2**-10) * blocks.max(axis=1, keepdims=True)
    assert (abs(array - weight).reshape(-1, 32) <= (0 if weight.ndim == 1 else bound)).all(), name


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K], ids=lambda k: k.name)
def test_k_quants_follow_ggmls_block_layout(tmp_path, kind):
  config = _divisible(256)
  source = readers.open_source(write_gguf(tmp_path / "m.gguf", config, tiny_models.make_weights(config), kind))
  reader = gguf.GGUFReader(tmp_path / "m.gguf")
  raw = next(bytes(t.data) for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
  decode, size = {Type.Q4_K: (_q4_k, 144), Type.Q6_K: (_q6_k, 210)}[kind]
  expected = [decode(raw[i : i + size]) for i in range(0, len(raw), size)]
  got = source.read("model.layers.0.mlp.up_proj.weight")
  np.testing.assert_allclose(got.reshape(-1, 256), expected, rtol=1e-6, atol=1e-7)


def _q4_k(block):
  """ggml-quants.c block_q4_K: d, dmin, 12 bytes of 6-bit scales and mins, 128 bytes of 4-bit values."""
  d, dmin = struct.unpack("<ee", block[:4])
  s, q, out = block[4:16], block[16:], []
  for sub in range(8):
    if sub < 4:
      scale, low = s[sub] & 63, s[sub + 4] & 63
    else:
      scale, low = (s[sub + 4] & 15) | (s[sub - 4] >> 6) << 4, s[sub + 4] >> 4 | (s[sub] >> 6) << 4
    for i in range(32):
      byte = q[sub // 2 * 32 + i]
      out.append(d * scale * (byte >> 4 if sub % 2 else byte & 15) - dmin * low)
  return out


def _q6_k(block):
  """ggml-quants.c block_q6_K: 128 bytes of low 4 bits, 64 of high 2 bits, 16 int8 scales, d."""
  low, high, scales, (d,) = block[:128], block[128:192], struct.unpack("16b", block[192:208]), struct.unpack("<e", block[208:])
  out = [0.0] * 256
  for half in range(2):
    for i in range(32):
      for quarter in range(4):
        nibble = low[half * 64 + i + 32 * (quarter % 2)] >> (4 * (quarter // 2)) & 15
        value = (nibble | (high[half * 32 + i] >> (2 * quarter) & 3) << 4) - 32
        at = half * 128 + quarter * 32 + i
        out[at] = d * scales[at // 16] * value
  return out


def test_the_default_model_is_read_as_transformers_reads_it():
  source = readers.open_source(readers.default_model())
  assert (source.config.num_layers, source.config.num_heads, source.config.tied_embeddings) == (30, 9, True)
  for name, digest in json.loads((GOLDENS / "weights.json").read_text()).items():
    assert hashlib.sha256(_bytes_of(source.read(name))).hexdigest() == digest, name


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
  config = tiny_models.make_config("one_layer_head_10")
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  return write_gguf(path, config, tiny_models.make_weights(config), Type.F16).read_bytes()


def test_a_gguf_cut_anywhere_is_refused(small_gguf, tmp_path):
  path = tmp_path / "cut.gguf"
  end = len(small_gguf) - gguf.GGUF_DEFAULT_ALIGNMENT  # the last tensor may be followed by padding
  for size in (*range(64), *range(64, end, 97), end):
    path.write_bytes(small_gguf[:size])
    with pytest.raises(InputError, match="not a whole GGUF file") as error:
      readers.open_source(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_damaged_gguf_never_ends_in_another_exception(small_gguf, tmp_path):
  """Random bytes over the header: refused, or read where only the model's own name changed; never a crash or a hang."""
  rng = np.random.default_rng(0)
  path, refused = tmp_path / "bad.gguf", 0
  for _ in range(300):
    data = bytearray(small_gguf)
    for at in rng.integers(0, 2500, 3):
      data[at] = rng.integers(256)
    path.write_bytes(data)
    try:
      source = readers.open_source(path)
      for name in source.names():
        source.read(name)
    except InputError:
      refused += 1
  assert refused > 200


def test_a_list_longer_than_the_file_is_refused_at_once(tmp_path):
  """gguf's own reader would step over 2**50 absent numbers one by one."""
  key, array, uint8 = b"general.list", 9, 0
  header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
  (tmp_path / "m.gguf").write_bytes(header + struct.pack("<IIQ", array, uint8, 2**50))
  with pytest.raises(InputError, match="not a whole GGUF file"):
    readers.open_source(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
def test_every_quantized_type_is_dequantized_as_ggml_does(tmp_path, kind):
  """The embedding of a small file is the golden's blocks, over and over; ggml's own C code made the numbers."""
  goldens = np.load(GOLDENS / "gguf_types.npz")
  config = _divisible(256)
  rows = 48 * 256 // 512
  blocks = np.tile(goldens[kind.name].reshape(2, -1), (rows, 1))
  weights = {name: weight for name, weight in tiny_models.make_weights(config).items() if "embed" not in name}
  path = write_gguf(tmp_path / "m.gguf", config, weights, Type.F32, extra={"token_embd.weight": (blocks, kind)})
  expected = np.tile(goldens[f"{kind.name}_values"].reshape(2, 256), (rows, 1))
  array = readers.open_source(path).read("model.embed_tokens.weight")
  assert array.dtype == np.float32
  np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("kind", [Type.F64, Type.I8, Type.NVFP4, Type.Q8_K], ids=lambda k: k.name)
def test_a_gguf_type_that_is_not_read_is_named(tmp_path, kind):
  config = _divisible(256)
  block, size = gguf.GGML_QUANT_SIZES[kind]
  weights = {name: weight for name, weight in tiny_models.make_weights(config).items() if "embed" not in name}
  blocks = np.zeros((48, 256 // block * size), np.uint8)
  path = write_gguf(tmp_path / "m.gguf", config, weights, Type.F32, extra={"token_embd.weight": (blocks, kind)})
  with pytest.raises(InputError, match=rf"F32, F16, BF16, Q4_0, .*MXFP4; token_embd\.weight in \S+ is {kind.name}\."):
    readers.open_source(path)


def test_gguf_with_a_bias_a_nan_or_without_a_tokenizer(tmp_path):
  config = tiny_models.make_config("mha_tied")
  weights = tiny_models.make_weights(config)
  extra = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
  with pytest.raises(InputError, match=r"blk\.0\.attn_q\.bias in .* holds 1\.0 at \[0\]"):
    readers.open_source(write_gguf(tmp_path / "bias.gguf", config, weights, Type.F32, extra=extra))
  weights[Q][3, 5] = np.nan
  source = readers.open_source(write_gguf(tmp_path / "nan.gguf", config, weights, Type.F32))
  with pytest.raises(InputError, match=f"finite; {Q}.* is nan"):
    source.read(Q)
  with pytest.raises(InputError, match=r"needs a tokenizer.*holds none"):
    _ = source.tokenizer

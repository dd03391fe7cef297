"""Writes tests/goldens/gguf_types.npz: random blocks of each quantized GGUF type, and their numbers by ggml's own C code.

    python -m tools.make_gguf_goldens --ggml=/path/to/libggml-base.so

The library comes with any build of llama.cpp or whisper.cpp. Blocks whose numbers are not finite, or as good as zero, are drawn
again, since the bits of their scales are random too.
"""

import ctypes
import pathlib

import gguf
import numpy as np
from absl import app, flags

from jaxfp8.checkpoint.readers.gguf_file import QUANTIZED

FLAGS = flags.FLAGS
_NUMBERS = 512  # of each type


def main(_) -> None:
  library = ctypes.CDLL(FLAGS.ggml)
  rng, arrays = np.random.default_rng(0), {}
  for kind in QUANTIZED:
    decode = getattr(library, f"dequantize_row_{kind.name.replace('_K', '_k').lower().replace('_k', '_K')}")
    decode.argtypes, decode.restype = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64], None
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks, values = [], []
    while len(blocks) * block < _NUMBERS:
      data, out = rng.bytes(block_bytes), np.empty(block, np.float32)
      decode(data, out.ctypes.data, block)
      if np.isfinite(out).all() and 1e-3 < abs(out).max() < 1e3:
        blocks.append(np.frombuffer(data, np.uint8))
        values.append(out)
    arrays |= {kind.name: np.stack(blocks), f"{kind.name}_values": np.stack(values)}
  path = pathlib.Path(__file__).parents[1] / "tests" / "goldens" / "gguf_types.npz"
  np.savez_compressed(path, **arrays)
  print(f"{path}: {len(QUANTIZED)} types, {path.stat().st_size:,} B")


if __name__ == "__main__":
  flags.DEFINE_string("ggml", None, "libggml-base.so", required=True)
  app.run(main)

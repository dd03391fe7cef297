"""A checkpoint of jaxfp8 with NaN or Inf in any array is refused when it is loaded, whatever part of it is read."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8.checkpoint.open import Checkpoint
from jaxfp8.checkpoint.readers.source import FLOAT8
from jaxfp8.checkpoint.stored_arrays import Range
from jaxfp8.errors import InputError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, FLOAT8], ids=lambda d: np.dtype(d).name)
def test_a_range_with_nan_is_refused_and_others_are_read(monkeypatch, tmp_path, dtype):
  stored = np.ones((6, 4), np.float32).astype(dtype)
  stored[4, 1] = np.nan
  checkpoint = object.__new__(Checkpoint)
  checkpoint.path = tmp_path
  cut = lambda self, ranges: {part: part.cut(stored) for part in ranges}  # noqa: E731
  monkeypatch.setattr(Checkpoint, "read_ranges", cut)
  read = checkpoint.range_reader()
  key = "model.norm.weight[D]"
  good, bad = Range(key, 0, 0, 4), Range(key, 0, 4, 6)
  assert read([good])[good].shape == (4, 4)
  with pytest.raises(InputError, match=r"finite; model\.norm\.weight in .* is nan at \[0, 1\]\. Save or convert"):
    read([good, bad])

"""docs/checkpoints.md lists what the code reads."""

import pathlib

import pytest

from jaxfp8.checkpoint.readers import gguf_file, tensor_names

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def test_the_gguf_types_of_the_page_are_those_of_the_code():
  (row,) = [line for line in PAGE.splitlines() if line.startswith("| GGUF, ")]
  assert row.split("|")[2].strip().split(", ") == [kind.name for kind in (*gguf_file.NATIVE, *gguf_file.QUANTIZED)]


@pytest.mark.parametrize("prefix", [*tensor_names.PREFIXES, *tensor_names.WRAPPERS])
def test_every_prefix_is_on_the_page(prefix):
  assert f"`{prefix}.`" in PAGE

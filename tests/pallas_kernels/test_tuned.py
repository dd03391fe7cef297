"""Measured tile sizes: found by device, regime and shapes, refused where they cannot be; without them, the formula."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from pallas_kernels import Target, tuned
from pallas_kernels.cases import by_name
from pallas_kernels.fp8_matmul import sm90
from pallas_kernels.fp8_matmul import tiling as matmul
from pallas_kernels.paged_attention import tiling as attention
from pallas_kernels.paged_attention.cases import AttentionCase
from tests.helpers.gpu_calls import Matmul, relative

H100 = Target("cuda", (9, 0), 132, "NVIDIA H100 80GB HBM3")
DEVICE = {"device_kind": H100.kind, "compute_capability": [9, 0], "num_sms": 132, "conditions": {}}
W8A8 = matmul.Form(jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e4m3fn))
FEW = {"rows": 64, "depth": 512, "stages": 3, "splits": 4}
MANY = FEW | {"rows": 128, "depth": 128}
WIDE = {"rows": 64, "tokens": 64, "depth": 256, "stages": 4, "splits": 1}
SHAPE = 3584, 8192


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
  """The folder of a user who has measured nothing yet; the package's files are another test's."""
  monkeypatch.setattr(tuned, "_HERE", tmp_path / "package")
  tuned.use_folder(tmp_path / "user")
  yield
  tuned.use_folder(None)


def entry(T, sizes, shape=SHAPE, form=W8A8):
  return {"key": matmul.key_of(T, *shape, form), "sizes": sizes, "seconds": 1e-5, "formula_seconds": 2e-5}


def write(*entries, operation="fp8_matmul", **device):
  return tuned.write(operation, DEVICE | device, list(entries))


def shape(tiling):
  return tiling.rows, tiling.tokens, tiling.depth, tiling.stages, tiling.splits


def test_no_file_is_the_formula():
  assert matmul.choose_tiling(8, *SHAPE, W8A8, H100) == matmul._formula(8, *SHAPE, W8A8, H100)


def test_no_numbers_are_shipped_that_nobody_measured():
  assert not [*pathlib.Path(tuned.__file__).parent.glob("*/tuned/*.json")]


def test_a_users_measurements_come_before_shipped_ones(tmp_path):
  path = write(entry(16, FEW), entry(64, MANY))
  shipped = tmp_path / "package" / "fp8_matmul" / "tuned"
  shipped.mkdir(parents=True)
  path.rename(shipped / path.name)
  assert tuned.folders("fp8_matmul") == (tmp_path / "user" / "fp8_matmul", shipped)
  tuned.use_folder(None)
  assert matmul.choose_tiling(8, *SHAPE, W8A8, H100).stages == 3
  tuned.use_folder(tmp_path / "user")
  write(entry(16, FEW | {"stages": 4}), entry(64, MANY))
  assert matmul.choose_tiling(8, *SHAPE, W8A8, H100).stages == 4


def test_nothing_is_written_without_a_folder():
  tuned.use_folder(None)
  with pytest.raises(ValueError, match="Call use_folder first"):
    write(entry(16, FEW))


def test_an_entry_is_taken_for_every_number_of_tokens_of_its_regime():
  write(entry(16, FEW), entry(64, MANY), entry(512, WIDE))
  tilings = {T: matmul.choose_tiling(T, *SHAPE, W8A8, H100) for T in (1, 9, 16, 17, 64, 65, 512)}
  assert shape(tilings[9]) == (64, 16, 512, 3, 4) == shape(tilings[16])
  assert tilings[1].tokens == 8 and shape(tilings[17]) == (128, 24, 128, 3, 4)
  assert shape(tilings[65]) == shape(tilings[512]) == (64, 64, 256, 4, 1)


def test_other_calls_and_other_devices_keep_the_formula():
  write(entry(16, FEW), entry(64, MANY))
  bf16 = matmul.Form(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
  block = matmul.Form(*[jnp.dtype(jnp.float8_e4m3fn)] * 2, 128)
  for call in ((8, 3584, 4096, W8A8, H100), (8, *SHAPE, bf16, H100), (8, *SHAPE, block, H100), (512, *SHAPE, W8A8, H100)):
    assert matmul.choose_tiling(*call) == matmul._formula(*call)
  for target in (Target("cuda", (9, 0), 114), Target("cuda", (10, 0), 132)):
    assert matmul.choose_tiling(8, *SHAPE, W8A8, target) == matmul._formula(8, *SHAPE, W8A8, target)


def test_a_device_of_the_same_kind_comes_first():
  """An H100 and an H200 have equal chips; each takes its own file, and a third of their sort takes the first."""
  write(entry(16, FEW), entry(64, MANY))
  write(entry(16, FEW | {"stages": 4}), entry(64, MANY | {"stages": 5}), device_kind="NVIDIA H200")
  stages = {
    kind: matmul.choose_tiling(8, *SHAPE, W8A8, Target("cuda", (9, 0), 132, kind)).stages
    for kind in (H100.kind, "NVIDIA H200", None)
  }
  assert stages == {H100.kind: 3, "NVIDIA H200": 4, None: 3}


def test_written_entries_replace_their_own_and_keep_others():
  path = write(entry(16, FEW), entry(64, MANY))
  assert write(entry(64, MANY | {"stages": 4})) == path
  assert [e["sizes"]["stages"] for e in json.loads(path.read_text())["entries"]] == [3, 4]
  assert json.loads(path.read_text())["device_kind"] == H100.kind


@pytest.mark.parametrize(
  ("change", "rule"),
  [
    ({"rows": 96}, "rows of 64 or 128"),
    ({"depth": 96}, "a depth of 128 times 1, 2 or 4"),
    ({"depth": 1024}, "a depth of 128 times 1, 2 or 4"),
    ({"splits": 3}, "splits that divide"),
    ({"stages": 5}, "stages from 2 to the 4 steps"),
    ({"stages": 1}, "stages from 2"),
    ({"rows": 128, "depth": 512, "stages": 4}, "at most 230400 bytes of shared memory, not 3"),
    ({"warps": 4}, "the names depth, rows"),
    ({"tokens": 8}, "the names depth, rows"),
  ],
)
def test_impossible_sizes_are_refused(change, rule):
  sizes = {**FEW, **change}
  write(entry(16, sizes), entry(64, {**MANY, "splits": sizes["splits"]}))
  with pytest.raises(ValueError, match=f"fp8_matmul: measured tile sizes need .*{rule}.*Delete the entry"):
    matmul.choose_tiling(16, *SHAPE, W8A8, H100)


def test_wide_sizes_are_refused_too():
  for change in ({"tokens": 132}, {"tokens": 136}, {"splits": 2}):
    write(entry(512, WIDE | change))
    with pytest.raises(ValueError, match="measured tile sizes need"):
      matmul.choose_tiling(512, *SHAPE, W8A8, H100)


@pytest.mark.parametrize("others", [(), (entry(64, MANY | {"splits": 8}),)])
def test_a_rows_bits_must_not_depend_on_its_company(others):
  write(entry(16, FEW), *others)
  with pytest.raises(ValueError, match="equal splits for up to 16 and up to 64 tokens"):
    matmul.choose_tiling(8, *SHAPE, W8A8, H100)


@pytest.mark.parametrize("text", ["", "[]", '{"entries": []}', '{"entries": [{"sizes": {"rows": 0}}]}'])
def test_a_damaged_file_is_named(text):
  path = write(entry(16, FEW), entry(64, MANY))
  path.write_text(text)
  tuned.use_folder(path.parents[1])
  with pytest.raises(ValueError, match=f"tuned: {path} does not hold measured tile sizes .*Delete it"):
    matmul.choose_tiling(8, *SHAPE, W8A8, H100)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "64"])
def test_sizes_are_positive_whole_numbers(size):
  write(entry(16, FEW | {"rows": size}))
  with pytest.raises(ValueError, match="rows must be a positive whole number"):
    matmul.choose_tiling(8, *SHAPE, W8A8, H100)


def attention_call(case: AttentionCase):
  return case.shape()


@pytest.mark.parametrize(
  ("name", "sizes", "rule"),
  [
    ("decode-fp8", {"stages": 3, "splits": 16}, ""),
    ("prefill-fp8", {"stages": 2, "splits": 2, "tokens": 2}, ""),
    ("decode-fp8", {"stages": 9, "splits": 16}, "2 to 8 stages"),
    ("decode-fp8", {"stages": 3, "splits": 65}, "1 to 64 splits"),
    ("prefill-bf16-pages-of-128", {"stages": 4, "splits": 4}, "at most 232448 bytes"),
    ("prefill-fp8", {"stages": 2, "splits": 2, "tokens": 5}, "at most 4 tokens a tile"),
    ("decode-fp8", {"stages": 3}, "the names splits, stages"),
  ],
)
def test_attention(name, sizes, rule):
  call = attention_call(by_name(name))
  without = attention.choose_tiling(call, H100)
  write({"key": attention.key_of(call), "sizes": sizes}, operation="paged_attention")
  if rule:
    with pytest.raises(ValueError, match=f"paged_attention: measured tile sizes need {rule}"):
      attention.choose_tiling(call, H100)
    return
  tiling = attention.choose_tiling(call, H100)
  assert tiling != without and all(getattr(tiling, field) == value for field, value in sizes.items())
  assert tiling.columns == 16 and tiling.pages == without.pages


def test_the_kernel_computes_with_them():
  """What is being tried reaches the kernel, in one program after the other, and gives the same results."""
  call, seen = Matmul("w8a8", 3, 64, 1024), []
  for splits, depth in ((2, 256), (4, 128)):
    with tuned.trying("fp8_matmul", {"rows": 64, "depth": depth, "stages": 2, "splits": splits}):
      y, copies = call.run(sm90)
    assert relative(y, call.truth()) < 2e-6
    seen.append(copies.bytes_read)
  assert seen[0] == seen[1]
  with pytest.raises(ValueError, match="splits that divide"), tuned.trying("fp8_matmul", FEW | {"splits": 5}):
    call.run(sm90)

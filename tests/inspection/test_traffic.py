"""Bytes, launches and collectives of a small program, whose text was written and counted by hand."""

import pytest

from jaxfp8.inspection import hlo, traffic
from jaxfp8.inspection.hlo import Shape
from pallas_kernels import costs

# Parameter 0 is a stack of 3 weights of 256 x 512 float8 bytes, parameter 1 the stream, parameter 2 an embedding.
PROGRAM = """HloModule step, is_scheduled=true

%dynamic-slice-fusion (p0: f8e4m3fn[3,256,512], p1: s32[], p2: bf16[8,512]) -> bf16[8,256] {
  %p0 = f8e4m3fn[3,256,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f8e4m3fn[1,256,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,512}
  %view = f8e4m3fn[256,512]{1,0} bitcast(%slice)
  %p2 = bf16[8,512]{1,0} parameter(2)
  ROOT %call = bf16[8,256]{1,0} custom-call(%p2, %view), custom_call_target="mosaic_gpu_v2", backend_config={text = "(%x) {"}
}

%fused_widen (q0: f8e4m3fn[3,256,512], q1: s32[]) -> bf16[256,512] {
  %q0 = f8e4m3fn[3,256,512]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice.1 = f8e4m3fn[1,256,512]{2,1,0} dynamic-slice(%q0, %q1, %zero.1, %zero.1), dynamic_slice_sizes={1,256,512}
  %view.1 = f8e4m3fn[256,512]{1,0} bitcast(%slice.1)
  ROOT %wide = bf16[256,512]{1,0} convert(%view.1)
}

%fused_update (u0: bf16[8,512], u1: bf16[8,256]) -> bf16[8,512] {
  %u0 = bf16[8,512]{1,0} parameter(0)
  %u1 = bf16[8,256]{1,0} parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %update = bf16[8,512]{1,0} dynamic-update-slice(%u0, %u1, %zero.2, %zero.2)
}

%next (n0: s32[]) -> s32[] {
  %n0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%n0, %one)
}

%body (carry: (s32[], bf16[8,512], f8e4m3fn[3,256,512])) -> (s32[], bf16[8,512], f8e4m3fn[3,256,512]) {
  %carry = (s32[], bf16[8,512]{1,0}, f8e4m3fn[3,256,512]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[8,512]{1,0} get-tuple-element(%carry), index=1
  %w = f8e4m3fn[3,256,512]{2,1,0} get-tuple-element(%carry), index=2
  %y = bf16[8,256]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%dynamic-slice-fusion
  EXTRA
  %reduced = bf16[8,256]{1,0} all-reduce(%y), channel_id=1, to_apply=%add
  %new = bf16[8,512]{1,0} fusion(%x, %reduced), kind=kLoop, calls=%fused_update
  %counter = s32[] fusion(%i), kind=kLoop, calls=%next
  ROOT %out = (s32[], bf16[8,512]{1,0}, /*index=2*/f8e4m3fn[3,256,512]{2,1,0}) tuple(%counter, %new, %w)
}

%less (c: (s32[], bf16[8,512], f8e4m3fn[3,256,512])) -> pred[] {
  %c = (s32[], bf16[8,512]{1,0}, f8e4m3fn[3,256,512]{2,1,0}) parameter(0)
  %ci = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%ci, %three), direction=LT
}

%greedy (g: bf16[8,512]) -> bf16[8,512] {
  ROOT %g = bf16[8,512]{1,0} parameter(0)
}

%sampled (h: bf16[8,512]) -> bf16[8,512] {
  %h = bf16[8,512]{1,0} parameter(0)
  ROOT %exp = bf16[8,512]{1,0} exponential(%h)
}

ENTRY %main (a0: f8e4m3fn[3,256,512], a1: s32[8], a2: bf16[1000,512], a3: pred[]) -> bf16[8,512] {
  %a0 = f8e4m3fn[3,256,512]{2,1,0} parameter(0)
  %a1 = s32[8]{0} parameter(1)
  %a2 = bf16[1000,512]{1,0} parameter(2)
  %a3 = pred[] parameter(3)
  %rows = bf16[8,512]{1,0} gather(%a2, %a1), offset_dims={1}, slice_sizes={1,512}
  %start = s32[] constant(0)
  %init = (s32[], bf16[8,512]{1,0}, f8e4m3fn[3,256,512]{2,1,0}) tuple(%start, %rows, %a0)
  %loop = (s32[], bf16[8,512]{1,0}, f8e4m3fn[3,256,512]{2,1,0}) while(%init), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"},\
"known_induction_variable":{"tuple_index":"0"}}
  %last = bf16[8,512]{1,0} get-tuple-element(%loop), index=1
  ROOT %result = bf16[8,512]{1,0} conditional(%a3, %last, %last), true_computation=%sampled, false_computation=%greedy
}
"""
STREAM, MATRIX, GATHER = 8 * 512 * 2, 256 * 512, 2 * 8 * 512 * 2 + 8 * 4
REDUCE = 2 * 8 * 256 * 2
UPDATE = 2 * 8 * 256 * 2  # bytes read of the sum, and bytes written in place
COPY = "%copied = bf16[256,512]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_widen"


def tally(extra: str = "") -> traffic.Tally:
  return traffic.tally(hlo.parse(PROGRAM.replace("EXTRA", extra)), (0, 2))


def test_bytes_are_those_counted_by_hand():
  total = tally()
  assert total.weight_read_bytes == 3 * MATRIX + STREAM  # each layer's matrix once, and the embedding's rows
  assert total.weight_written_bytes == 0
  assert total.xla_bytes == GATHER + 3 * (REDUCE + UPDATE)
  assert total.optional_bytes == 2 * STREAM


def test_launches_and_collectives():
  total = tally()
  ((trips, layer),) = total.loops
  assert (trips, layer.kernels, layer.operations, layer.launches) == (3, 1, 1, 2)  # the loop counter does not count
  reduce = traffic.Collective("all-reduce", (Shape("bf16", (8, 256)),), 8 * 256 * 2)
  assert layer.collectives == {reduce: 1} and total.collectives == {reduce: 3}
  assert str(reduce) == "all-reduce bf16[8,256]"
  assert total.kernels == 3


def test_a_copy_of_a_weight_is_counted():
  total = tally(COPY)
  assert total.weight_written_bytes == 3 * 2 * MATRIX
  assert total.weight_read_bytes == 2 * 3 * MATRIX + STREAM
  assert total.loops[0][1].launches == 3


def test_rows_of_the_embedding_are_no_copy_of_it():
  rows = "%rows = bf16[{}]{{1,0}} gather"
  text = PROGRAM.replace("EXTRA", "").replace(rows.format("8,512"), rows.format("256,512"))
  total = traffic.tally(hlo.parse(text), (0, 2))
  assert total.weight_read_bytes == 3 * MATRIX + 256 * 512 * 2
  assert total.weight_written_bytes == 0


def test_a_gather_is_half_an_all_reduce():
  start = "((bf16[8,256]{1,0}), bf16[64,256]{1,0}) all-gather-start(%reduced), channel_id=2, dimensions={0}"
  text = PROGRAM.replace("EXTRA", "").replace("%counter =", f"%gathering = {start}\n  %counter =")
  gather = traffic.Collective("all-gather", (Shape("bf16", (8, 256)),), 64 * 256 * 2)
  total = traffic.tally(hlo.parse(text), (0, 2))
  assert total.collectives[gather] == 3
  assert gather.all_reduce_bytes == 64 * 256
  assert total.xla_bytes == tally().xla_bytes + 3 * (8 + 64) * 256 * 2


def test_text_without_an_entry():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


def test_costs_are_recorded_while_a_recording_is_open():
  one = costs.Cost(weight_bytes=3, read_bytes=4, written_bytes=5)
  costs.record("nobody", one)
  with costs.recording(lengths=(7, 9)) as calls:
    assert costs.lengths() == (7, 9)
    with costs.repeated(80), costs.repeated(2):
      costs.record("inside", one)
    costs.record("after", one)
  costs.record("nobody", one)
  assert [(call.operation, call.repeats) for call in calls] == [("inside", 160), ("after", 1)]
  assert one.total_bytes == 12 and costs.lengths() is None

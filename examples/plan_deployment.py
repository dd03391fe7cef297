"""Plans Llama-3.1-70B on three devices, without a GPU and without weights: `uv run python examples/plan_deployment.py`."""

import jaxfp8

for device, count in (("gb10", 1), ("h100", 1), ("h100", 8)):
  plan = jaxfp8.plan_deployment("llama-3.1-70b", device, count=count, batches=(1, 32), context=4096)
  if not plan.fits:
    print(f"{count} x {device}: does not fit, {plan.shortfall_bytes / 1e9:.1f} GB too large. {plan.smallest_change}")
    continue
  for batch in plan.batches:
    print(
      f"{count} x {device}, batch {batch.batch}: at most {batch.decode_ceiling_tok_s:.0f} tokens/s a sequence, "
      f"{batch.total_ceiling_tok_s:.0f} in all; bound by {batch.bound_by}"
    )

plan = jaxfp8.plan_deployment("llama-3.1-70b", "gb10", observed=3.0)
assert plan.verdict is not None  # there is one for every observed speed
print(plan.verdict.sentence)

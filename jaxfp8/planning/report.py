"""A `DeploymentPlan` as a person reads it: tables and sentences on a rich console. Computes nothing."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxfp8.planning.planner import BatchPlan, DeploymentPlan
from jaxfp8.units import format_bytes, format_rate, format_seconds, format_share

BOUND_NAMES = {"weights": "weights", "kv": "KV", "flops": "FLOPs", "collectives": "collectives", "launches": "launches"}


def print_plan(console: Console, plan: DeploymentPlan) -> None:
  """The whole plan. Bytes are per device and decimal; speeds are ceilings unless they are called expected."""
  deployment = plan.deployment
  recipe, mesh = deployment.recipe, deployment.mesh
  count = f"{mesh.num_devices} x " if mesh.num_devices > 1 else ""
  console.print(f"{deployment.config.name} on {count}{deployment.device.title}", style="bold")
  console.print(
    f"weights {recipe.weights}, activations {recipe.activations}, KV cache {recipe.kv}; tensor={mesh.tensor} data={mesh.data}; "
    f"sequences of {deployment.context:,} tokens, prompts of {deployment.prompt:,}\n"
  )
  print_memory(console, plan)
  print_ceilings(console, plan)
  print_times(console, plan)
  print_ways_out(console, plan)
  for note in _notes(plan):
    console.print(f"- {note}")
  if plan.verdict:
    console.print(f"\n{plan.verdict.sentence}", style="bold")


def shortfall_sentence(plan: DeploymentPlan) -> str:
  """What lacks for the smallest batch, to the byte, and the smallest change that makes it fit."""
  deployment, batch = plan.deployment, plan.batches[0].batch
  sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
  each = " on every device" if deployment.mesh.num_devices > 1 else ""
  return (
    f"plan: {deployment.config.name} with {sequences} of {deployment.context:,} tokens lacks {plan.shortfall_bytes:,} bytes "
    f"({format_bytes(plan.shortfall_bytes)}) of the memory of {deployment.device.name}{each}; {plan.smallest_change}."
  )


def print_sweep(console: Console, plans: list[DeploymentPlan], refused: list[str]) -> None:
  """One row a device, the fastest at the smallest batch first; those that do not hold it last, with what would."""
  first = plans[0].deployment
  mesh = f"tensor={first.mesh.tensor} data={first.mesh.data}"
  title = Text.assemble((f"{first.config.name} on each device", "bold"), f", tokens/s of all sequences ({mesh})")
  console.print(title)
  small, large = plans[0].batches[0].batch, plans[0].batches[-1].batch
  table = _table("device", "memory", "GB/s", "sequences", f"batch {small}", "expected")
  if large != small:
    table.add_column(f"batch {large}", justify="right", no_wrap=True)
  table.add_column("first token", justify="right", no_wrap=True)
  table.add_column("bound by", justify="right", no_wrap=True)
  lacking: list[str] = []
  for plan in sorted(plans, key=lambda plan: (not plan.fits, -plan.batches[0].total_ceiling_tok_s)):
    device, few, many = plan.deployment.device, plan.batches[0], plan.batches[-1]
    row = [device.name, format_bytes(device.memory_bytes), f"{device.bandwidth / 1e9:,.0f}"]
    if plan.fits:
      held = dict(plan.sequences)[plan.deployment.context]
      row += [f"{held:,}", format_rate(few.total_ceiling_tok_s), _range(few)]
      total = format_rate(many.total_ceiling_tok_s) if many.fits else f"lacks {format_bytes(many.shortfall_bytes)}"
      row += ([total] if large != small else []) + [format_seconds(few.ttft_floor_s), BOUND_NAMES[few.bound_by]]
      table.add_row(*row)
    else:
      table.add_row(*row, "0")
      lacking.append(f"{device.name} lacks {format_bytes(plan.shortfall_bytes)} a device: {plan.smallest_change}.")
  console.print(table)
  for sentence in lacking + refused:
    console.print(f"- {sentence}")


def print_memory(console: Console, plan: DeploymentPlan) -> None:
  """Where one device's memory goes with the smallest batch, and how many sequences of which length fit."""
  memory, deployment = plan.memory, plan.deployment
  table = _table("memory per device", "bytes", "", "share", "")
  batch = plan.batches[0].batch
  sequences = "sequence" if batch == 1 else "sequences"
  rows = [
    ("weights", memory.weights, f"of which {format_bytes(plan.weights_read_bytes)} are read for every token step"),
    ("KV cache", memory.kv, f"{batch} {sequences}, {format_bytes(plan.kv_bytes_per_token)} a token, in whole pages"),
    ("temporaries", memory.temporaries, "estimate" if deployment.compiled_temporaries is None else "of the compiled programs"),
    ("reserve", memory.reserve, "for fragmentation"),
    ("runtime", memory.runtime, "CUDA context, programs, NCCL" if deployment.device.num_sms else "Python and XLA"),
  ]
  if memory.system:
    rows.append(("operating system", memory.system, "shares this memory"))
  for name, amount, note in rows:
    table.add_row(name, f"{amount:,}", format_bytes(amount), format_share(amount / memory.total), note)
  left = ("left", memory.free, f"of {format_bytes(memory.total)}") if memory.free >= 0 else ("lacking", -memory.free, "")
  table.add_section()
  table.add_row(left[0], f"{left[1]:,}", format_bytes(left[1]), format_share(left[1] / memory.total), left[2])
  console.print(table)
  if plan.max_kv_tokens:
    rooms = [f"{count:,} of {size:,} tokens" for size, count in plan.sequences if count]
    console.print(f"Room for {plan.max_kv_tokens:,} tokens of KV cache. Sequences at once: {'; '.join(rooms) or 'none'}.\n")


def print_ceilings(console: Console, plan: DeploymentPlan) -> None:
  """Speeds per batch: the ceilings, and what published systems make of them, with their sources."""
  low, high = plan.expected_fraction
  table = _table("ceilings", "tok/s each", "tok/s in total", "expected in total", "prefill tok/s", "first token", "bound by")
  for batch in plan.batches:
    table.add_row(
      f"batch {batch.batch}" + ("" if batch.fits else " *"),
      format_rate(batch.decode_ceiling_tok_s),
      format_rate(batch.total_ceiling_tok_s),
      _range(batch),
      format_rate(batch.prefill_ceiling_tok_s),
      format_seconds(batch.ttft_floor_s),
      BOUND_NAMES[batch.bound_by],
    )
  console.print(table)
  for batch in plan.batches:
    if not batch.fits:
      console.print(f"* batch {batch.batch} lacks {format_bytes(batch.shortfall_bytes)} of memory on each device.")
  console.print(
    f"Nothing can be faster than the ceilings; other systems reach {format_share(low)} to {format_share(high)} of them."
  )
  sources = [f"{row.who} {format_share(row.fraction)} ({row.source})" for row in plan.published]
  console.print(f"Sources: {'; '.join(sources)}.\n", style="dim", highlight=False)


def print_times(console: Console, plan: DeploymentPlan) -> None:
  """Where the time of a decode step goes, what FP8 gains there, and when decode turns compute-bound."""
  table = _table("one decode step", "weights", "KV", "FLOPs", "collectives", "launches", "least time")
  table.add_column("FP8 weights", justify="right")
  table.add_column("FP8 KV", justify="right")
  for batch in plan.batches:
    times = batch.times
    parts = (times.weights, times.kv, times.flops, times.collectives, times.launches, times.step)
    gains = (f"x {batch.fp8_weights_gain:.2f}", f"x {batch.fp8_kv_gain:.2f}")
    table.add_row(f"batch {batch.batch}", *map(format_seconds, parts), *gains)
  console.print(table)
  console.print(
    "least time = the largest of (weights + KV), FLOPs and launches, plus collectives. FP8 weights, FP8 KV: decode speed over "
    "bf16 when only the weights, or only the KV cache, are in FP8."
  )
  empty, held, context = plan.compute_bound_batch_empty, plan.compute_bound_batch, plan.deployment.context
  at_context = (
    f"at batch {held:,}" if held else "at no batch, since reading each sequence's KV takes longer than its arithmetic"
  )
  short = f"at batch {empty:,}" if empty else "at no batch"
  console.print(f"Decode turns compute-bound {short} with empty caches, and with {context:,} tokens {at_context}.\n")


def print_ways_out(console: Console, plan: DeploymentPlan) -> None:
  """What would be faster, the largest gain first; nothing for what does not fit."""
  if not plan.ways_out or not plan.fits:
    return
  batch = plan.verdict.batch if plan.verdict else plan.batches[0].batch
  table = _table(f"ways out, from batch {batch}", "in total", "each", "")
  for option in plan.ways_out:
    table.add_row(option.what, f"x {option.total_gain:.2f}", f"x {option.per_sequence_gain:.2f}", option.note)
  table.columns[-1].justify = "left"
  console.print(table)


def _notes(plan: DeploymentPlan) -> list[str]:
  """What is special about this device, mesh or recipe, and which of the numbers are estimates."""
  deployment = plan.deployment
  device, mesh, config = deployment.device, deployment.mesh, deployment.config
  notes = []
  if device.unified_memory and device.num_sms:
    notes.append(
      "Unified memory: CPU and GPU share capacity and bandwidth, so what the CPU reads comes off the ceilings, and weights "
      "must be loaded without a second copy on the host."
    )
  if device.fp8_flops is None and deployment.recipe.weights == "fp8":
    notes.append("No FP8 units: FP8 weights and KV save bytes, and arithmetic runs at the bf16 rate (weight-only).")
  if mesh.group > 1:
    notes.append(
      f"tensor={mesh.tensor} exceeds what divides the {config.num_kv_heads} KV heads: K and V, their weights and cache, are "
      f"held {mesh.group} times."
    )
  waste = -deployment.context % deployment.page_tokens
  if waste:
    notes.append(f"Pages hold {deployment.page_tokens} tokens: {waste} of each sequence's last page stay empty.")
  estimates = sorted(key for key, text in device.sources if "estimate" in text or "not re-read" in text or "assumption" in text)
  if estimates:
    notes.append(f"{device.name}: not from a datasheet that was read, or estimated: {', '.join(estimates)} (see its TOML).")
  return notes


def _range(batch: BatchPlan) -> str:
  low, high = batch.expected_tok_s
  return f"{format_rate(low)} to {format_rate(high)}"


def _table(*names: str) -> Table:
  """Left-justified first column, right-justified numbers; a nameless last column is for words."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  for index, name in enumerate(names):
    words = index == 0 or (name == "" and index == len(names) - 1)
    table.add_column(name, justify="left" if words else "right", no_wrap=index == 0 or not words)
  return table

"""Pictures of a plan: the roofline with its operating points, and throughput against latency over batch.

matplotlib is an optional extra and is imported only when a picture is drawn. Operating points are named in a legend and not
beside the points, where batches that are close to each other would write over one another.
"""

from jaxfp8.planning.deployment import decode_times, max_sequences
from jaxfp8.planning.planner import DeploymentPlan
from jaxfp8.planning.roofline import StepCost, bound, decode_step, prefill_step
from jaxfp8.plots import COLOURS, MARKERS, check_plot_path, new_figure, save_figure


def plot_plan(plan: DeploymentPlan, path: str) -> None:
  """Writes both pictures side by side to `path` (png, svg or pdf). Raises InputError without matplotlib."""
  check_plot_path(path)
  figure = new_figure(13, 5.6)
  deployment = plan.deployment
  devices = f"{deployment.mesh.num_devices} x " if deployment.mesh.num_devices > 1 else ""
  figure.suptitle(
    f"{deployment.config.name} on {devices}{deployment.device.title}, {deployment.context:,} tokens a sequence: ceilings"
  )
  left, right = figure.subplots(1, 2)
  _draw_roofline(left, plan)
  _draw_throughput(right, plan)
  save_figure(figure, path)


def _draw_roofline(axes, plan: DeploymentPlan) -> None:
  """FLOPs a second over FLOPs a byte, per device, both logarithmic."""
  deployment = plan.deployment
  device = deployment.device
  points = [(f"decode, batch {batch.batch}", _decode_cost(plan, batch.batch)) for batch in plan.batches]
  sizes = {"mesh": deployment.mesh, "formats": deployment.formats}
  prefill = prefill_step(deployment.config, deployment.recipe, deployment.prompt, **sizes)
  points.append((f"prefill of {deployment.prompt:,} tokens", prefill))
  intensities = [_flops(cost) / cost.memory_bytes for _, cost in points]
  peaks = {name: device.flops(dtype) for name, dtype in (("FP8", "fp8"), ("bf16", "bf16"))}
  if device.fp8_flops is None:
    del peaks["FP8"]
  start = min(*intensities, 1.0) / 2
  end = max(*intensities, max(peaks.values()) / device.bandwidth) * 4
  top = max(peaks.values())
  slope = ([start, top / device.bandwidth], [start * device.bandwidth, top])
  roofs = axes.plot(*slope, color="#a0522d", label=f"memory, {device.bandwidth / 1e9:,.0f} GB/s")
  for (name, peak), style in zip(peaks.items(), ("-", "--"), strict=False):
    label = f"{name}, {peak / 1e12:,.0f} TFLOP/s"
    roofs += axes.plot([peak / device.bandwidth, end], [peak, peak], color="#444444", linestyle=style, label=label)
  marks = []
  for index, ((name, cost), intensity) in enumerate(zip(points, intensities, strict=True)):
    reached = _flops(cost) / bound(cost, device).step
    marks += axes.plot([intensity], [reached], linestyle="none", label=name, **_marker(index))
  axes.set(xscale="log", yscale="log", xlabel="FLOPs for each byte read (per device)", ylabel="FLOP/s (per device)")
  axes.set_title("Left of the bend memory is the limit, right of it arithmetic", fontsize=10)
  axes.set_ylim(bottom=start * device.bandwidth / 20, top=top * 12)
  axes.grid(alpha=0.25, which="both", linewidth=0.4)
  axes.add_artist(axes.legend(handles=roofs, loc="upper left", fontsize=9))
  axes.legend(handles=marks, loc="lower right", fontsize=9)


def _draw_throughput(axes, plan: DeploymentPlan) -> None:
  """Tokens a second in total over the time between two tokens of a sequence, along the batch."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  deployment = plan.deployment
  held = max_sequences(deployment)
  largest = max(held, plan.batches[-1].batch, 8)
  sizes = sorted({max(1, round(largest ** (step / 60))) for step in range(61)} | {held or 1})
  curve = [(size, decode_times(deployment, size).step) for size in sizes]
  fitting = [(seconds * 1e3, size / seconds) for size, seconds in curve if size <= held]
  beyond = [(seconds * 1e3, size / seconds) for size, seconds in curve if size >= held] if held < plan.batches[-1].batch else []
  if fitting:
    axes.plot(*zip(*fitting, strict=True), color="#444444", label=f"ceiling, up to the {held:,} sequences that fit")
    for share, style in zip(plan.expected_fraction, (":", "--"), strict=True):
      slower = [(latency / share, rate * share) for latency, rate in fitting]
      axes.plot(*zip(*slower, strict=True), color="#999999", linestyle=style, label=f"{100 * share:.0f} % of it (others reach)")
  if len(beyond) > 1:
    axes.plot(*zip(*beyond, strict=True), color="#cc3311", linestyle="-.", label="ceiling, more than fits")
  for index, batch in enumerate(plan.batches):
    point = ([batch.step_floor_s * 1e3], [batch.total_ceiling_tok_s])
    axes.plot(*point, linestyle="none", label=f"batch {batch.batch}", **_marker(index))
  if plan.verdict:
    observed = plan.verdict
    point = ([1e3 * observed.batch / observed.observed_tok_s], [observed.observed_tok_s])
    axes.plot(*point, linestyle="none", marker="x", markersize=10, color="#cc3311", label=f"observed, batch {observed.batch}")
  axes.set(yscale="log", xlabel="ms between two tokens of a sequence", ylabel="tokens/s, all sequences")
  axes.set_xlim(left=0)
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())
  axes.set_title("More sequences: more in total, each a little slower", fontsize=10)
  axes.grid(alpha=0.25, which="both", linewidth=0.4)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def _decode_cost(plan: DeploymentPlan, batch: int) -> StepCost:
  deployment = plan.deployment
  config, recipe, formats = deployment.config, deployment.recipe, deployment.formats
  return decode_step(config, recipe, [deployment.context] * batch, deployment.mesh, formats=formats)


def _flops(cost: StepCost) -> float:
  return sum(cost.flops.values())


def _marker(index: int) -> dict:
  return {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)], "markersize": 8}

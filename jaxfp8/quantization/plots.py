"""A picture of what each layer's quantization costs."""

from collections.abc import Sequence

from jaxfp8.plots import COLOURS, new_figure, save_figure


def plot_layers(layers: Sequence[dict], title: str, path: str) -> None:
  """Writes KL divergence and top-1 disagreement over the layers to `path` (png, svg or pdf).

  layers: {"layer", "kl", "top1"} each, the latter two {"value", "low", "high"}. Raises InputError without matplotlib.
  """
  figure = new_figure(10, 6.4)
  figure.suptitle(title, fontsize=11)
  top, bottom = figure.subplots(2, 1, sharex=True)
  _bars(top, [(line["layer"], line["kl"]) for line in layers], COLOURS[0])
  top.set(ylabel="KL divergence, nats a position")
  top.set_title("Mean with its 95 % confidence interval", fontsize=10)
  lost = [(line["layer"], {name: 100 * (1 - line["top1"][name]) for name in ("value", "low", "high")}) for line in layers]
  _bars(bottom, lost, COLOURS[1])
  bottom.set(xlabel="layer whose weights are quantized", ylabel="best token differs, %")
  save_figure(figure, path)


def _bars(axes, points: Sequence[tuple[int, dict]], colour: str) -> None:
  from matplotlib.ticker import MaxNLocator

  for layer, estimate in points:
    axes.bar(layer, estimate["value"], color=colour, width=0.75)
    axes.plot([layer, layer], sorted((estimate["low"], estimate["high"])), color="#222222", linewidth=1.3)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
  axes.grid(alpha=0.25, axis="y", linewidth=0.4)
  axes.set_axisbelow(True)
  axes.set_ylim(bottom=0)
  axes.margins(x=0.01)

"""The results of `jaxfp8 evaluate` as tables for a terminal and as Markdown for the README."""

from rich.console import Console
from rich.table import Table

from jaxfp8.console import console

PIPE_WIDTH = 128
COSTLIEST = 20  # lines of the matrices' table; the JSON object has all


def conditions(result: dict) -> str:
  """One sentence with the model, device, text and reference of the figures."""
  return (
    f"{result['model']} on {result['device']}, jax {result['jax']}; {result['tokens']:,} positions of {result['text']} in "
    f"{result['chunks']} chunks of {result['context']}; reference: source weights in {result['reference']}, perplexity "
    f"{_with_interval(result['reference_perplexity'], '.2f')}; {result['interval']}."
  )


def layers_title(result: dict) -> str:
  """Of the table and the picture of --layers."""
  return (
    f"{result['model']}: one layer's weights in FP8 ({result['layer_granularity']} scales), all else f32; "
    f"{result['layer_tokens']:,} positions"
  )


HEADERS = ("recipe", "perplexity", "over reference", "KL, nats", "top-1 agreement, %")


def _cells(line: dict) -> tuple[str, ...]:
  top1 = {key: 100 * value for key, value in line["top1"].items()}
  return (
    str(line.get("recipe", line.get("layer"))),
    _with_interval(line["perplexity"], ".2f"),
    _with_interval(line["perplexity_ratio"], ".4f"),
    _with_interval(line["kl"], ".5f" if "layer" in line else ".4f"),
    _with_interval(top1, ".1f"),
  )


def _with_interval(estimate: dict, form: str) -> str:
  return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def markdown(result: dict) -> str:
  """The recipes as the README shows them."""
  rows = [HEADERS, ("-",) * len(HEADERS), *map(_cells, result["recipes"])]
  return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", conditions(result)])


def print_tables(result: dict) -> None:
  """Everything, for a terminal."""
  out = console(width=PIPE_WIDTH)
  _print_table(out, HEADERS, result["recipes"])
  if "layers" in result:
    out.print(f"\n{layers_title(result)}:", highlight=False)
    _print_table(out, ("layer", *HEADERS[1:]), [*result["layers"], {"layer": "all", **result["all_layers"]}])
  if "matrices" in result:
    out.print(f"\n{COSTLIEST} costliest of {len(result['matrices'])} matrices, each quantized alone:", highlight=False)
    lines = sorted(result["matrices"], key=lambda line: -line["kl"]["value"])[:COSTLIEST]
    _print_table(out, ("matrix", *HEADERS[1:]), [{**line, "layer": f"{line['layer']} {line['matrix']}"} for line in lines])
  out.print("\n" + conditions(result) + "\n", highlight=False)


def _print_table(out: Console, headers: tuple[str, ...], lines: list[dict]) -> None:
  table = Table(box=None, pad_edge=False)
  for column, header in enumerate(headers):
    table.add_column(header, justify="right" if column else "left", no_wrap=True)
  for line in lines:
    table.add_row(*_cells(line))
  out.print(table)

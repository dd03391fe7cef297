"""The scripts in examples/ run, and print the results that their docstrings promise."""

import pathlib
import re
import runpy

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def output(capsys):
  """Runs an example by name in this process; gives the lines that it prints."""

  def run(name: str) -> list[str]:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()

  return run


def numbers(lines: list[str], pattern: str) -> list[float]:
  """The first number that `pattern` captures in each line; an error if a line has none."""
  matches = [re.search(pattern, line) for line in lines]
  assert all(matches), lines
  return [float(match[1]) for match in matches if match]


def test_answer_prompts(output):
  first, second = output("answer_prompts")
  assert first.startswith("'The capital of France is' -> ' Paris")
  assert second.startswith("'Once upon a time' -> '") and len(second) > 40


def test_decode_loop(output):
  tokens, difference = output("decode_loop")
  assert tokens.startswith("tokens [[5, 17, 200, 3, ") and tokens.count(",") == 17
  assert difference == "largest difference from one prefill: 0", "a CPU gives the same bits token by token"


def test_gradients(output):
  losses = numbers(output("gradients"), r"loss ([\d.]+)$")
  assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]


def test_plan_deployment(output):
  *plans, verdict = output("plan_deployment")
  rates = numbers(plans, r"at most (\d+) tokens/s a sequence")
  assert len(rates) == 6 and rates[0] == 4 and max(rates) == rates[4]
  assert verdict.startswith("3.0 tok/s is 78 % of the 3.87 tok/s") and verdict.endswith("this is the hardware, not a fault.")


def test_quantize_and_compare(output):
  lines = output("quantize_and_compare")
  assert [line.split()[0] for line in lines] == ["tensor", "channel", "block128"]
  tensor, channel, block = numbers(lines, r"median error ([\d.]+)%")
  assert tensor > 1.5 * channel and abs(block - channel) < 0.5, "one outlier costs the whole matrix its accuracy, or one row"


def test_every_example_is_tested():
  assert {f"test_{path.stem}" for path in FOLDER.glob("*.py")} <= set(globals())

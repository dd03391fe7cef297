"""Stop strings: what comes out does not depend on how the text was cut into tokens."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.serving.request_output import StopStrings


def by_hand(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
  """The text before the stop string that is complete first, looked for after every character."""
  for end in range(1, len(text) + 1):
    found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
    if found:
      return text[: min(found)], True
  return text, False


@settings(max_examples=500, deadline=None)
@given(
  text=st.text("abc", max_size=20),
  stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
  cuts=st.lists(st.integers(0, 20)),
)
def test_any_cut_of_any_text(text, stops, cuts):
  stream, out = StopStrings(stops), []
  borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
  for first, stop in itertools.pairwise(borders):
    out.append(stream.push(text[first:stop]))
    assert text.startswith("".join(out)), "nothing that came out is taken back"
  if not stream.found:
    out.append(stream.finish())
  assert ("".join(out), stream.found) == by_hand(text, stops)


@pytest.mark.parametrize(("text", "out"), [("abcd", "a"), ("xxb", "xx"), ("d", ""), ("aaa", "aaa")])
def test_examples(text, out):
  stream = StopStrings(("b", "d"))
  assert stream.push(text) + stream.finish() == out


def test_only_what_may_begin_a_stop_string_is_held_back():
  stream = StopStrings(("stop", "top"))
  assert [stream.push(piece) for piece in ("a s", "t", "o", "x", "to")] == ["a ", "", "", "stox", ""]
  assert stream.finish() == "to"


@pytest.mark.parametrize("stop", ["a" * 4000 + "b", "b" + "a" * 4000, "ab" * 2000 + "c"])
def test_the_search_is_linear_in_the_answer(stop):
  """A search that begins anew with each token takes minutes."""
  stream, pieces, start = StopStrings((stop,) * 4), 0, time.process_time()
  for _ in range(20_000):
    pieces += len(stream.push("aba"[pieces % 2 :] if "ab" in stop[:2] else "aaaa"))
  assert time.process_time() - start < 2 and not stream.found

"""The engine: the same tokens whatever else is in the batch, every way to stop, and what it refuses."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest

from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.errors import InputError
from jaxfp8.model.sampling import SamplingParams
from jaxfp8.recipe import Recipe
from jaxfp8.serving.engine import Engine, Request, default_limits, sizes_up_to
from jaxfp8.serving.limits import EngineLimits
from jaxfp8.serving.scheduler import Scheduler
from jaxfp8.sharding import make_mesh
from jaxfp8.text.tokenizer import Tokenizer
from tests.helpers import numpy_llama, tiny_llamas, tiny_models

CASE = "gqa_9_3_untied"
CONFIG = tiny_models.make_config(CASE)
RECIPE = Recipe("fp8", "channel", "bf16", "fp8")


def limits(**changes) -> EngineLimits:
  sizes = {"num_pages": 12, "max_sequences": 3, "max_pages": 4, "prefill_sizes": (48,), "decode_sizes": (3,)}
  return EngineLimits(**{**sizes, "num_logprobs": 5, **changes})


@functools.cache
def tokenizer() -> Tokenizer:
  return Tokenizer(TokenizerFiles(json.dumps(tiny_models.tiny_tokenizer(CONFIG.vocab_size)), None, {"eos_token": "</s>"}))


@functools.cache
def model(recipe=RECIPE):
  return tiny_llamas.load(CASE, recipe)


@functools.cache
def engine() -> Engine:
  """Shared: its programs take seconds to compile. A finished run leaves nothing behind that a later one could see."""
  return Engine(model(), tokenizer(), limits=limits())


@contextlib.contextmanager
def changed(**attributes):
  """The shared engine with other attributes for a while: a smaller pool (in the scheduler's eyes), no tokenizer."""
  shared = engine()
  before = {name: getattr(shared, name) for name in attributes}
  for name, value in attributes.items():
    setattr(shared, name, value)
  try:
    yield shared
  finally:
    for name, value in before.items():
      setattr(shared, name, value)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
  """No special tokens: 0, 1 and 2."""
  return tuple(np.random.default_rng([seed, 7]).integers(3, CONFIG.vocab_size, length).tolist())


def request(length: int, new: int, seed: int = 0, **params) -> Request:
  return Request(prompt(length, seed), SamplingParams(max_new_tokens=new, **{"ignore_eos": True, "seed": seed, **params}))


def random_requests(count: int, seed: int) -> list[Request]:
  rng = np.random.default_rng(seed)
  ways = ({}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 10}, {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05})
  ways += ({"repetition_penalty": 1.4}, {"temperature": 0.8, "frequency_penalty": 0.7, "presence_penalty": -0.3})
  return [
    request(int(rng.integers(1, 130)), int(rng.integers(1, 40)), int(rng.integers(1000)), **ways[rng.integers(len(ways))])
    for _ in range(count)
  ]


def tokens_of(completions) -> list[tuple[int, ...]]:
  return [completion.token_ids for completion in completions]


@functools.cache
def alone(one: Request) -> tuple[int, ...]:
  return engine().generate([one])[0].token_ids


class TestBatch:
  @pytest.mark.parametrize("seed", range(3))
  def test_the_same_text_whatever_else_is_in_the_batch(self, seed):
    """Greedy and sampled; prompts up to 129 tokens through programs of 48, nine requests over three places."""
    requests = random_requests(9, seed)
    completions = engine().generate(requests)
    assert tokens_of(completions) == [alone(one) for one in requests]
    assert [c.request_id for c in completions] == list(range(9))
    assert [c.num_prompt_tokens for c in completions] == [len(one.prompt) for one in requests]
    assert [len(c.token_ids) for c in completions] == [one.params.max_new_tokens for one in requests]

  def test_the_order_of_requests_does_not_matter(self):
    requests = random_requests(6, 77)
    forwards, backwards = engine().generate(requests), engine().generate(requests[::-1])
    assert tokens_of(forwards) == tokens_of(backwards)[::-1]

  @pytest.mark.parametrize(("num_pages", "preempts"), [(3, True), (5, True), (12, False)])
  def test_a_small_pool_gives_the_same_tokens(self, num_pages, preempts, monkeypatch):
    """Three pages hold exactly one of the longest sequences."""
    preemptions = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(
      Scheduler, "_preempt", lambda self, sequence: (preemptions.append(sequence), preempt(self, sequence))[1]
    )
    requests = [
      request(62, 40, 1),
      request(60, 70, 2, temperature=1.0),
      request(100, 60, 3),
      request(33, 50, 4, temperature=0.5),
    ]
    requests += [request(128, 64, 5), request(1, 3, 6)]
    wanted = [alone(one) for one in requests]
    preemptions.clear()
    with changed(limits=limits(num_pages=num_pages)) as small:
      assert tokens_of(small.generate(requests)) == wanted
    assert bool(preemptions) == preempts

  def test_another_seed_gives_another_text(self):
    texts = {alone(request(10, 12, seed, temperature=1.5)) for seed in range(4)}
    assert len({text[:12] for text in texts}) == 4

  def test_greedy_is_the_most_probable_token(self):
    """Against a float64 Llama that is fed the engine's own tokens."""
    one = request(20, 8, 3, logprobs=2)
    plain = Engine(model(tiny_llamas.F32), limits=limits(num_pages=2, max_sequences=1, decode_sizes=(2,)))
    completion = plain.generate([one])[0]
    tokens = np.array([*one.prompt, *completion.token_ids])
    logits = numpy_llama.forward(CONFIG, tiny_models.make_weights(CONFIG), tokens)[19:-1]
    assert completion.token_ids == tuple(logits.argmax(axis=1))
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    for token, found, truth in zip(completion.token_ids, completion.logprobs, logprobs, strict=True):
      order = np.argsort(-truth)[:2]
      assert found.token_id == token
      assert abs(found.logprob - truth[token]) < 2e-4
      assert [t for t, _ in found.top] == order.tolist()
      np.testing.assert_allclose([p for _, p in found.top], truth[order], atol=2e-4)

  def test_penalties_against_numpy(self):
    """Greedy, over a border of chunks and one of pages, against a float64 Llama whose logits are penalized in numpy."""
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.6}
    one, weights = request(60, 10, 3, **params), tiny_models.make_weights(CONFIG)
    plain = Engine(model(tiny_llamas.F32), limits=limits(num_pages=2, max_sequences=1, decode_sizes=(2,)))
    tokens = list(one.prompt)
    for _ in range(10):
      logits = numpy_llama.forward(CONFIG, weights, np.array(tokens))[-1]
      seen, counts = np.unique(tokens), np.bincount(tokens[60:], minlength=CONFIG.vocab_size)
      logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
      tokens.append(int((logits - 0.4 * counts - 0.6 * (counts > 0)).argmax()))
    found = plain.generate([one, request(60, 10, 3), one])
    assert tokens_of(found)[::2] == [tuple(tokens[60:])] * 2
    assert found[1].token_ids != found[0].token_ids, "penalties matter here"

  def test_replicas_and_cuts(self):
    """data=2 and tensor=3 in float32: the tokens of one device (sampled ones too, since their noise is the same)."""
    recipe = tiny_llamas.F32
    mesh = make_mesh(CONFIG, tensor=3, data=2)
    cut = tiny_llamas.load(CASE, recipe, mesh=mesh)
    sizes = limits(max_sequences=2, decode_sizes=(2,), num_pages=8)
    requests = random_requests(7, 11)
    one = Engine(model(recipe), limits=sizes).generate(requests)
    many = Engine(cut, mesh=mesh, limits=sizes).generate(requests)
    assert tokens_of(one) == tokens_of(many)


class TestStops:
  """A greedy text of 30 tokens is known first; then each way to stop cuts it."""

  BASE = request(17, 30, 9, temperature=1.2)

  @staticmethod
  def run(**params):
    base = TestStops.BASE
    merged = {**base.params.__dict__, **params}
    (completion,) = engine().generate([Request(base.prompt, SamplingParams(**merged))])
    return completion

  @property
  def text(self) -> str:
    return tokenizer().decode(alone(self.BASE))

  def test_max_new_tokens(self):
    full = alone(self.BASE)
    for count in (1, 2, 29, 30):
      completion = self.run(max_new_tokens=count)
      assert completion.token_ids == full[:count]
      assert completion.finish_reason == "length"
      assert completion.text == tokenizer().decode(full[:count])

  @pytest.mark.parametrize("place", [0, 1, 12])
  def test_stop_token(self, place):
    full = alone(self.BASE)
    stop = full[place]
    first = full.index(stop)
    completion = self.run(stop_token_ids=(stop, 0))
    assert completion.token_ids == full[: first + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == tokenizer().decode(full[:first])

  def test_eos(self):
    """With EOS among what is chosen: it ends the text, unless ignored, in which case it has no text."""
    seeds = [s for s in range(60) if CONFIG.eos_ids[0] in alone(request(17, 30, s, temperature=3.0))[:25]]
    one = request(17, 30, seeds[0], temperature=3.0)
    full = alone(one)
    place = full.index(CONFIG.eos_ids[0])
    (ended,) = engine().generate([request(17, 30, seeds[0], temperature=3.0, ignore_eos=False)])
    assert (ended.token_ids, ended.finish_reason) == (full[: place + 1], "stop")
    assert ended.text == tokenizer().decode(full[:place])
    (ignored,) = engine().generate([one])
    assert ignored.text == tokenizer().decode(full) and ignored.finish_reason == "length"

  @pytest.mark.parametrize("size", [1, 2, 5])
  def test_stop_string_over_the_borders_of_tokens(self, size):
    """Every token is one character here, so a stop string of five is spread over five."""
    text = self.text
    stop = text[11 : 11 + size]
    first = text.find(stop)
    completion = self.run(stop=("not in there", stop))
    assert completion.text == text[:first] and completion.finish_reason == "stop"
    assert tokenizer().decode(completion.token_ids) == text[: first + size]

  def test_a_stop_string_that_only_begins(self):
    """Text held back as the beginning of a stop string comes out at the end."""
    text = self.text
    completion = self.run(stop=(text[-3:] + "never",))
    assert (completion.text, completion.finish_reason) == (text, "length")

  def test_the_first_of_two_stop_strings_wins(self):
    text = self.text
    completion = self.run(stop=(text[20:22], text[5:7]))
    assert completion.text == text[: min(text.find(text[20:22]), text.find(text[5:7]))]

  def test_a_stopped_request_frees_its_place(self):
    stop = alone(self.BASE)[2]
    stopped = Request(self.BASE.prompt, SamplingParams(**{**self.BASE.params.__dict__, "stop_token_ids": (stop,)}))
    others = random_requests(5, 5)
    completions = engine().generate([stopped, *others[:3], stopped, *others[3:], stopped])
    short = alone(self.BASE)[: alone(self.BASE).index(stop) + 1]
    kept = [alone(one) for one in others]
    assert tokens_of(completions) == [short, *kept[:3], short, *kept[3:], short]

  def test_the_context_ends_the_text(self):
    """max_pages of 4 hold 256 tokens, and the model's context is 256 too."""
    completion = engine().generate([request(250, 50, 1)])[0]
    assert len(completion.token_ids) == 6 and completion.finish_reason == "length"


class TestStream:
  def test_deltas_are_the_completion(self):
    requests = [
      request(5, 12, 1, temperature=1.5),
      request(80, 25, 2),
      request(9, 20, 3, temperature=2.0, stop=("e", "x!")),
      request(30, 1, 4, logprobs=3),
    ]
    text, tokens, completions = {}, {}, {}
    for delta in engine().stream(requests):
      assert delta.request_id not in completions, "nothing follows a completion"
      text[delta.request_id] = text.get(delta.request_id, "") + delta.text
      tokens.setdefault(delta.request_id, []).append(delta.token_id)
      if delta.completion:
        completions[delta.request_id] = delta.completion
    assert sorted(completions) == [0, 1, 2, 3]
    for index, completion in completions.items():
      assert completion.text == text[index] and completion.token_ids == tuple(tokens[index])
      assert completion.ttft_s > 0
    assert completions[3].logprobs is not None and completions[0].logprobs is None
    assert len(completions[3].logprobs[0].top) == 3

  def test_an_abandoned_stream_leaves_a_working_engine(self):
    requests = random_requests(4, 3)
    stream = engine().stream(requests)
    for _ in range(5):
      next(stream)
    stream.close()
    assert tokens_of(engine().generate(requests)) == [alone(one) for one in requests]

  def test_stats_count_what_ran(self):
    before = engine().stats
    start = before.prefill_tokens, before.decode_tokens, len(before.decode_lengths)
    engine().generate([request(100, 11, 1)])
    stats = engine().stats
    assert stats.prefill_tokens - start[0] == 100
    assert stats.decode_tokens - start[1] == 10
    assert [length for (length,) in stats.decode_lengths[start[2] :]] == list(range(101, 111))
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0


class TestRefusals:
  """Each is one sentence with the way out, before anything runs."""

  @pytest.mark.parametrize(
    ("bad", "message"),
    [
      (Request(()), "the prompt is empty"),
      (Request((5, CONFIG.vocab_size)), "between 0 and 102"),
      (Request((-1, 5)), "between 0 and 102"),
      (Request(prompt(256)), "the context holds 256"),
      (request(4, 1, logprobs=6), "logprobs must be at most"),
    ],
  )
  def test_bad_requests(self, bad, message):
    with pytest.raises(InputError, match=message):
      next(engine().stream([request(3, 2), bad]))

  def test_text_without_a_tokenizer(self):
    with changed(tokenizer=None) as bare:
      with pytest.raises(InputError, match="need a tokenizer"):
        bare.generate([Request("hello")])
      completion = bare.generate([request(4, 3)])[0]
    assert completion.text == "" and len(completion.token_ids) == 3

  def test_text_with_one(self):
    (completion,) = engine().generate([Request("Hello", SamplingParams(max_new_tokens=2, ignore_eos=True))])
    assert completion.num_prompt_tokens == len(tokenizer().encode("Hello")) == 6  # its post-processor writes BOS
    assert completion.token_ids == alone(
      Request(tuple(tokenizer().encode("Hello")), SamplingParams(max_new_tokens=2, ignore_eos=True))
    )

  def test_a_request_that_never_fits(self):
    with changed(limits=limits(num_pages=2)) as small, pytest.raises(InputError, match="the pool has 2"):
      small.generate([request(100, 60)])

  def test_a_pool_larger_than_memory(self):
    with pytest.raises(InputError, match=r"GB are free"):
      Engine(model(), limits=limits(num_pages=1 << 34))

  def test_stop_strings_without_a_tokenizer(self):
    with changed(tokenizer=None) as bare, pytest.raises(InputError, match="tokenizer"):
      bare.generate([request(4, 3, stop=("x",))])


def test_default_limits_hold_the_context():
  found = default_limits(model(), make_mesh(CONFIG), max_sequences=5)
  assert found.max_pages * found.page_size >= CONFIG.max_context
  assert found.num_pages == 5 * found.max_pages
  assert found.max_sequences == 5 and found.decode_size(5) == found.decode_sizes[-1] == 8


def test_sizes_up_to():
  assert sizes_up_to(3, (2, 8, 32)) == (2, 8)
  assert sizes_up_to(8, (2, 8, 32)) == (2, 8)
  assert sizes_up_to(40, (2, 8, 32)) == (2, 8, 32, 40)
  assert sizes_up_to(1, (2, 8)) == (2,)


def test_jax_devices():
  assert len(jax.devices()) == 8  # what tests of meshes rely on

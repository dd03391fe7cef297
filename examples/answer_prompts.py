"""Answers several prompts at once with the default model, SmolLM2-135M-Instruct: `uv run python examples/answer_prompts.py`.

The engine runs all requests together over one paged KV cache. A request's tokens do not depend on the other requests.
"""

import jaxfp8

model = jaxfp8.load(recipe=jaxfp8.Recipe(weights="fp8", kv="fp8"))  # pass a path for a model of your own
engine = jaxfp8.Engine(model, jaxfp8.Tokenizer.load())

greedy = jaxfp8.SamplingParams(max_new_tokens=8)
sampled = jaxfp8.SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.95, seed=1)
requests = [
  jaxfp8.Request("The capital of France is", greedy),
  jaxfp8.Request("Once upon a time", sampled),
]
for request, completion in zip(requests, engine.generate(requests), strict=True):
  print(f"{request.prompt!r} -> {completion.text!r}")

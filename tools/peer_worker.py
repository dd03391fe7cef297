"""One system, one batch size, in its own process and environment: what tools/benchmark_peers runs. Imports nothing of jaxfp8
except for the system "jaxfp8".

    python peer_worker.py SYSTEM MODEL BATCH PROMPT_TOKENS NEW_TOKENS CACHE_DIR

prints one JSON object. All systems are timed from outside in the same way: T1 is the time of a run that chooses one token for
every sequence, TN of one that chooses NEW_TOKENS; prefill is BATCH * PROMPT_TOKENS / T1 and decode
BATCH * (NEW_TOKENS - 1) / (TN - T1). Prompts are the same random token ids; no run ends early.
"""

import json
import os
import random
import sys
import threading
import time

THREADS = len(os.sched_getaffinity(0))


def make_llama_cpp(model, batch, length, new_tokens):
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = model
  params.n_parallel, params.n_ctx = batch, batch * (length + new_tokens + 16)
  params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
  params.cache_prompt = False
  params.verbosity = -1
  server = xllamacpp.Server(params)

  def run(prompts, count):
    def one(prompt):
      request = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
      answer = server.handle_completions(request)
      answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
      if answer["timings"]["predicted_n"] != count or answer["timings"]["prompt_n"] < length - 1:
        raise SystemExit(f"llama.cpp did other work than asked: {answer['timings']}")

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  return run


def make_transformers(model, batch, length, new_tokens):
  import torch
  import transformers

  torch.set_num_threads(THREADS)
  folder, file = os.path.split(model)
  llama = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16).eval()

  def run(prompts, count):
    ids = torch.tensor(prompts)
    with torch.inference_mode():
      llama.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False)

  return run


def make_jaxfp8(model, batch, length, new_tokens, *, weights, cache_dir):
  os.environ["JAX_PLATFORMS"] = "cpu"
  from jaxfp8.commands import command
  from jaxfp8.model.sampling import SamplingParams
  from jaxfp8.progress import Progress
  from jaxfp8.serving import startup
  from jaxfp8.serving.engine import Engine, Request

  command.keep_compiled_programs(cache_dir)
  opened = startup.open_model(startup.LoadOptions(checkpoint=model, weights=weights, cache_dir=cache_dir), Progress())
  limits = startup.limits_for(opened.model, opened.mesh, [(length, new_tokens)] * batch)
  engine = Engine(opened.model, mesh=opened.mesh, limits=limits)
  engine.compile()

  def run(prompts, count):
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    engine.generate([Request(tuple(prompt), params) for prompt in prompts])

  return run


def main(system, model, batch, length, new_tokens, cache_dir):
  batch, length, new_tokens = int(batch), int(length), int(new_tokens)
  if system.startswith("jaxfp8"):
    run = make_jaxfp8(model, batch, length, new_tokens, weights=system.split()[1], cache_dir=cache_dir)
  else:
    run = (make_llama_cpp if system.startswith("llama.cpp") else make_transformers)(model, batch, length, new_tokens)
  dice = random.Random(0)

  def timed(count):
    prompts = [[dice.randrange(3, 49000) for _ in range(length)] for _ in range(batch)]
    start = time.perf_counter()
    run(prompts, count)
    return time.perf_counter() - start

  timed(2)  # warms up
  one, many = min(timed(1) for _ in range(2)), min(timed(new_tokens) for _ in range(2))
  result = {"prefill_tok_s": batch * length / one, "decode_tok_s": batch * (new_tokens - 1) / (many - one)}
  print(json.dumps({"system": system, "batch": batch, **result}), flush=True)
  os._exit(0)  # llama.cpp's server threads do not end by themselves


if __name__ == "__main__":
  main(*sys.argv[1:])

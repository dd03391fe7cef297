"""The one exception for a caller's mistake.

Every message names who speaks, the rule, the value that broke it and the way out, in one sentence or two, for example
`config: num_heads must be a multiple of num_kv_heads; got 9 and 2. Check the checkpoint's config.json.`
Entry points print it without a traceback and exit with code 1.
"""


class InputError(ValueError):
  """What was given (a file, a flag, a shape) breaks a rule; the message says which and what to do."""

"""The one exception for a caller's mistake.

Every message names who speaks, the rule, the value that broke it and the way out, in one sentence or two, for example
`config: num_heads must be a multiple of num_kv_heads; got 9 and 2. Check the checkpoint's config.json.`
Entry points print it without a traceback and exit with code 1.
"""

_MAX_MESSAGE = 2000


class InputError(ValueError):
  """What was given (a file, a flag, a shape) breaks a rule; the message says which and what to do."""

  def __init__(self, message: str = ""):
    # A value from a damaged file may be as long as the file.
    if len(message) > _MAX_MESSAGE:
      message = f"{message[: _MAX_MESSAGE // 2]} [...] {message[-_MAX_MESSAGE // 4 :]}"
    super().__init__(message)

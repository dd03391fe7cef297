"""Reads a line from the terminal, answers it, and goes on until the end of the input (Ctrl-D).

    jaxfp8 chat
    jaxfp8 chat --checkpoint=FOLDER --system="Answer in one sentence."

The same command as `jaxfp8 generate --interactive`. The whole conversation is the prompt of each answer. The answers
stream to stdout; progress and the closing report go to stderr.
"""

import dataclasses

from jaxfp8.commands import generate

FLAGS = generate.FLAGS


def main() -> int:
  """Holds the conversation. Raises InputError for unusable flags."""
  return generate.main()


COMMAND = dataclasses.replace(
  generate.COMMAND, name="chat", main=main, preset=("--interactive",), stray_advice="Write messages to the terminal."
)

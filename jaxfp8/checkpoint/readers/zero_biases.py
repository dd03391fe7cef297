"""Biases of a checkpoint. jaxfp8 computes none, so biases of zeros are left out, and all others are refused by name."""

import pathlib
from collections.abc import Callable, Collection

import numpy as np

from jaxfp8.errors import InputError


def zero_biases(names: Collection[str], read: Callable[[str], np.ndarray | None], path: pathlib.Path) -> tuple[str, ...]:
  """The tensors MODULE.bias beside a MODULE.weight, all of whose values are zeros.

  Args:
    names: of the checkpoint's tensors.
    read: gives the values of a tensor, or None for a dtype that jaxfp8 does not read.
    path: of the checkpoint, for messages.

  Raises:
    InputError: a bias is not zero; the message names the tensor, the value and its index.
  """
  found = [name for name in names if name.endswith(".bias") and name.removesuffix("bias") + "weight" in names]
  zeros = []
  for name in found:
    values = read(name)
    if values is None:
      continue
    if (values != 0).any():  # also NaN
      index = tuple(int(i) for i in np.argwhere(values != 0)[0])
      raise InputError(
        f"readers: jaxfp8 computes linear layers and norms without biases; {name} in {path} holds {values[index]} at "
        f"{list(index)}. Run this model with llama.cpp or vLLM."
      )
    zeros.append(name)
  return tuple(zeros)


def bias_notes(names: Collection[str]) -> tuple[str, ...]:
  """One sentence about the biases that were left out, if there are any."""
  if not names:
    return ()
  which = f"{len(names)} biases ({next(iter(names))} and others) hold" if len(names) > 1 else f"{next(iter(names))} holds"
  return (f"{which} zeros alone, and jaxfp8 leaves them out",)

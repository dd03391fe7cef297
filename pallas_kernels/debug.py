"""Checks of what the arrays hold, on request: page ids, lengths and query starts that point outside of what there is.

    with pallas_kernels.debug_checks():
      logits, cache = jax.jit(jaxfp8.prefill)(model, cache, batch)   # ValueError where a page id is out of range

Shapes and dtypes are always checked, while tracing; values only here, since a kernel that checked them would have to wait.
Arrays that are at hand raise at once. In a compiled program a callback looks at them before the kernel does; a call that breaks
a rule then reads page 0 and no tokens, so that nothing outside is touched, and the error is raised when the context closes.
Outside of the context nothing is added to any program: the context is part of jit's key.
"""

import contextlib
import threading
from collections.abc import Iterator

import jax
import jax.core
import jax.experimental
import jax.numpy as jnp
import numpy as np

_checking = jax.make_user_context(False)
_broken: list[str] = []  # what callbacks have found, of whatever thread they run in
_lock = threading.Lock()


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
  """Inside, operations on pages check the values of their page tables, query starts and lengths. Raises ValueError."""
  with _lock:
    _broken.clear()
  try:
    with _checking(True):
      yield
      jax.effects_barrier()
  finally:
    with _lock:
      found = list(_broken)
      _broken.clear()
    if found:
      raise ValueError(found[0])


def checking() -> bool:
  """Whether this is inside of `debug_checks`."""
  return bool(_checking.value)


def unchecked():
  """A context without checks: for a program whose caller looks at the arrays itself."""
  return _checking(False)


def checked_pages(operation: str, page_table_BM, query_starts, lengths_B, *, num_tokens: int, page_size: int, num_pages):
  """(page_table_BM, query_starts, lengths_B) as they are, or, under `debug_checks`, once their values have been checked.

  num_pages: pages that entries of the table may name: P, less a layer's first page where that is known.
  """
  if not checking():
    return page_table_BM, query_starts, lengths_B
  sizes = {"num_tokens": num_tokens, "page_size": page_size}
  arrays = page_table_BM, lengths_B, jnp.asarray(num_pages, jnp.int32), *(() if query_starts is None else (query_starts,))
  if not any(isinstance(array, jax.core.Tracer) for array in arrays):
    require_pages(operation, *arrays[:2], *arrays[3:], num_pages=int(num_pages), **sizes)
    return page_table_BM, query_starts, lengths_B

  def look(table, lengths, pages, *starts) -> np.ndarray:
    try:
      require_pages(operation, table, lengths, *starts, num_pages=int(pages), **sizes)
    except ValueError as error:
      with _lock:
        _broken.append(str(error))
      return np.zeros((), bool)
    return np.ones((), bool)

  fine = jax.experimental.io_callback(look, jax.ShapeDtypeStruct((), bool), *map(jax.lax.stop_gradient, arrays))
  table, starts, lengths = (x if x is None else jnp.where(fine, x, 0) for x in (page_table_BM, query_starts, lengths_B))
  return table, starts, lengths


def require_pages(
  operation: str, page_table_BM, lengths_B, query_starts=None, *, num_pages: int, num_tokens: int, page_size: int
):
  """Raises ValueError, with the rule and the value, unless these arrays describe places that exist.

  query_starts: None for one query a sequence. num_tokens: T, rows of queries.
  """
  table, lengths = np.asarray(page_table_BM), np.asarray(lengths_B)
  most = table.shape[1] * page_size
  outside = np.flatnonzero((lengths < 0) | (lengths > most))
  if outside.size:
    b = outside[0]
    raise ValueError(
      f"{operation}: lengths must be from 0 to the page table's {table.shape[1]} pages of {page_size} tokens = {most}; "
      f"sequence {b} has {lengths[b]}. Give it a wider row of pages, or its true length."
    )
  counts = (lengths > 0).astype(int) if query_starts is None else np.diff(np.asarray(query_starts))
  if query_starts is not None:
    starts = np.asarray(query_starts)
    if starts[0] < 0 or (counts < 0).any() or starts[-1] > num_tokens:
      raise ValueError(
        f"{operation}: query_starts must ascend from 0 to at most the {num_tokens} tokens; got {_short(starts)}. Count each "
        "sequence's tokens up."
      )
  more = np.flatnonzero(counts > lengths)
  if more.size:
    b = more[0]
    raise ValueError(
      f"{operation}: lengths count a sequence's queries too; sequence {b} has {counts[b]} queries and length {lengths[b]}. Add "
      "them to its length."
    )
  used = np.arange(table.shape[1]) < -(-lengths // page_size)[:, None]
  wrong = np.argwhere(used & ((table < 0) | (table >= num_pages)))
  if wrong.size:
    b, m = wrong[0]
    raise ValueError(
      f"{operation}: page ids must be from 0 to {num_pages - 1}; page {m} of sequence {b} is {table[b, m]}. Entries behind a "
      "sequence's length are free."
    )


def _short(values: np.ndarray) -> str:
  return str(values.tolist()) if values.size <= 16 else f"{values[:8].tolist()} .. {values[-4:].tolist()}"

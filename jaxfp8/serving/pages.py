"""The owners of the KV pool's pages, in Python ints on the host. Imports no jax; refuses to know the contents of a page."""

from jaxfp8.errors import InputError


class PageAllocator:
  """Allocates and frees pages 0 .. num_pages - 1 of one pool. An owner is any hashable object.

  Freed pages are allocated again last-in first-out, so that a busy pool touches few pages. page_size: tokens in a page.
  Raises InputError if num_pages or page_size is below 1.
  """

  def __init__(self, num_pages: int, page_size: int):
    if num_pages < 1 or page_size < 1:
      raise InputError(f"pages: num_pages and page_size must be at least 1; got {num_pages} and {page_size}.")
    self.num_pages = num_pages
    self.page_size = page_size
    self._free = list(range(num_pages - 1, -1, -1))
    self._owned: dict[object, list[int]] = {}

  @property
  def num_free(self) -> int:
    return len(self._free)

  def pages_for(self, num_tokens: int) -> int:
    """The number of pages that hold num_tokens tokens."""
    return -(-num_tokens // self.page_size)

  def pages_of(self, owner: object) -> list[int]:
    """The owner's pages in the order of its tokens; empty for an owner without pages."""
    return self._owned.get(owner, [])

  def can_grow(self, owner: object, num_tokens: int) -> bool:
    """Whether enough pages are free for `owner` to hold num_tokens tokens."""
    return self.pages_for(num_tokens) - len(self.pages_of(owner)) <= self.num_free

  def grow(self, owner: object, num_tokens: int) -> list[int]:
    """Allocates pages until `owner` can hold num_tokens tokens. Returns all pages of the owner.

    Raises InputError, and allocates none, if too few pages are free.
    """
    if not self.can_grow(owner, num_tokens):
      raise InputError(
        f"pages: {num_tokens} tokens need {self.pages_for(num_tokens)} pages of {self.page_size}; {self.num_free} of "
        f"{self.num_pages} are free. Use fewer sequences, a shorter context or a larger pool."
      )
    pages = self._owned.setdefault(owner, [])
    while len(pages) * self.page_size < num_tokens:
      pages.append(self._free.pop())
    return pages

  def free(self, owner: object) -> None:
    """Frees all pages of `owner`. Does nothing for an owner without pages."""
    self._free.extend(reversed(self._owned.pop(owner, [])))

  def check_integrity(self) -> None:
    """Raises RuntimeError, for a bug in this package, unless every page is free or owned exactly once."""
    held = self._free + [page for pages in self._owned.values() for page in pages]
    if sorted(held) != list(range(self.num_pages)):
      raise RuntimeError(
        f"pages: {self.num_pages} pages, but {len(self._free)} free and {len(held) - len(self._free)} owned, "
        f"{len(set(held))} of them distinct. Please report this with the workload."
      )

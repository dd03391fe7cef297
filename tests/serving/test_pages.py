"""PageAllocator: random workloads against a plain model of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfp8.errors import InputError
from jaxfp8.serving.pages import PageAllocator

_OWNERS = st.integers(0, 4)
_ACTIONS = st.lists(st.one_of(st.tuples(st.just("grow"), _OWNERS, st.integers(0, 60)), st.tuples(st.just("free"), _OWNERS)))


@settings(max_examples=200, deadline=None)
@given(num_pages=st.integers(1, 12), page_size=st.integers(1, 9), actions=_ACTIONS)
def test_random_workloads(num_pages, page_size, actions):
  pool, owned = PageAllocator(num_pages, page_size), {}
  for name, owner, *rest in actions:
    before = list(pool.pages_of(owner))
    if name == "free":
      pool.free(owner)
      owned.pop(owner, None)
      assert pool.pages_of(owner) == []
    else:
      (num_tokens,) = rest
      wanted = max(len(before), -(-num_tokens // page_size))
      fits = wanted + sum(n for other, n in owned.items() if other != owner) <= num_pages
      assert pool.can_grow(owner, num_tokens) == fits
      if fits:
        pages = pool.grow(owner, num_tokens)
        assert pages[: len(before)] == before, "a sequence keeps its pages, in order"
        assert len(pages) == wanted and len(set(pages)) == wanted
        owned[owner] = wanted
      else:
        with pytest.raises(InputError, match=f"{pool.num_free} of {num_pages} are free"):
          pool.grow(owner, num_tokens)
        assert pool.pages_of(owner) == before, "all or nothing"
    pool.check_integrity()
    assert pool.num_free == num_pages - sum(owned.values())
    held = [page for owner in owned for page in pool.pages_of(owner)]
    assert len(set(held)) == len(held) and set(held) <= set(range(num_pages))


def test_freed_pages_come_back_first():
  pool = PageAllocator(10, 4)
  first = list(pool.grow("a", 12))
  pool.free("a")
  assert pool.grow("b", 12) == first


def test_pages_for():
  pool = PageAllocator(1, 64)
  assert [pool.pages_for(n) for n in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_pool_is_refused(num_pages, page_size):
  with pytest.raises(InputError, match="must be at least 1"):
    PageAllocator(num_pages, page_size)


@pytest.mark.parametrize(
  "damage",
  [
    lambda pool: pool._free.pop(),
    lambda pool: pool._free.append(pool.pages_of("a")[0]),
    lambda pool: pool._owned["a"].append(pool.pages_of("b")[0]),
    lambda pool: pool._owned["a"].append(99),
  ],
)
def test_integrity_check_sees_damage(damage):
  pool = PageAllocator(6, 4)
  pool.grow("a", 8)
  pool.grow("b", 4)
  pool.check_integrity()
  damage(pool)
  with pytest.raises(RuntimeError, match="6 pages"):
    pool.check_integrity()

"""Bytes, times, rates and shares as text for people. Imports no other module of jaxfp8."""


def format_bytes(num_bytes: float) -> str:
  """Decimal units, as for bandwidths, with three significant digits: 70.6 GB, 8.82 GB, 164 kB."""
  return _scaled(num_bytes, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_seconds(seconds: float) -> str:
  """Three significant digits: 2.31 s, 258 ms, 1.3 us."""
  return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)), "ns", 1e9)


def format_rate(rate: float) -> str:
  """Tokens per second: three significant digits; whole numbers from 100, with a separator for thousands."""
  return f"{rate:,.0f}" if rate >= 100 else _three_digits(rate)


def format_share(share: float) -> str:
  """A fraction as per cent, with one decimal below ten per cent: 87 %, 3.4 %."""
  return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _scaled(value: float, units: tuple[tuple[str, float], ...], smallest: str, smallest_factor: float = 1.0) -> str:
  if value == 0:
    return f"0 {units[0][0] if smallest == 'ns' else smallest}"
  for unit, size in units:
    if abs(value) >= 0.9995 * size:
      return f"{_three_digits(value / size)} {unit}"
  return f"{_three_digits(value * smallest_factor)} {smallest}"


def _three_digits(value: float) -> str:
  magnitude = abs(value)
  if magnitude >= 99.95:
    return f"{value:,.0f}"
  return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"

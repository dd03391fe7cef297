"""The pages: every path and link on them exists, and docs/architecture.md describes the tree that there is."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pallas_kernels/*.md")])
ARCHITECTURE = ROOT / "docs" / "architecture.md"
# A path in backticks begins with one of these folders.
PATH = re.compile(r"`((?:jaxfp8|pallas_kernels|configs|docs|tests|tools|examples)/[\w./*-]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_exist(page):
  text = page.read_text(encoding="utf-8")
  links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
  missing = [link for link in links if not (page.parent / link).exists()]
  missing += [path for path in PATH.findall(text) if not any(ROOT.glob(path.rstrip("./")))]
  assert not missing, f"{page.name} names paths that do not exist: {missing}"


def test_commands_on_the_pages_exist():
  """`python -m jaxfp8.x` and `python -m tools.x` name modules; `jaxfp8 x` names a subcommand."""
  text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
  modules = set(re.findall(r"python -m ((?:jaxfp8|tools)(?:\.\w+)*)", text))
  for module in modules:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
  help_text = subprocess.run([sys.executable, "-m", "jaxfp8", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert help_text.returncode == 0, help_text.stderr
  subcommands = set(re.findall(r"(?:^| )(?:uv run )?(?:`|    )jaxfp8 ([a-z][a-z-]*)", text, flags=re.MULTILINE))
  assert len(subcommands) >= 5
  assert subcommands <= set(re.findall(r"[a-z][a-z-]+", help_text.stdout)), subcommands


class TestArchitecture:
  text = ARCHITECTURE.read_text(encoding="utf-8")

  def test_the_tree_lists_the_rooms_in_the_order_that_is_enforced(self):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [
      contract["layers"] for contract in settings["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    ]
    rooms = [layer for layer in layers if re.fullmatch(r"\w+", layer)]
    listed = re.findall(r"^      (\w+)/ +\S", self.text, flags=re.MULTILINE)
    assert listed == rooms[::-1]
    assert set(listed) == {path.parent.name for path in (ROOT / "jaxfp8").glob("*/__init__.py")}

  def test_what_a_newcomer_looks_for_is_in_the_table(self):
    table = self.text.split("## Where do I find", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, flags=re.MULTILINE))
    for words in ("RoPE", "KV cache's layout", "run on my GPU", "stop strings", "new FP8 dialect"):
      (place,) = [place for looked_for, place in rows.items() if words in looked_for][:1]
      assert PATH.search(place), words

  @pytest.mark.parametrize("name, path", re.findall(r"`(\w+)` in `([\w/]+\.py)`", text))
  def test_a_name_that_is_said_to_be_in_a_file_is_in_it(self, name, path):
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8"))

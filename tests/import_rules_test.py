"""Who imports whom, and how long files are: read from the source."""

import ast
import functools
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("batchjax", "pallas_kernels")
# These never import jax, nor anything of ours that does.
NO_JAX = ("batchjax.plan", "batchjax.cache.page_table", "batchjax.engine.pack", "batchjax.text",
          "batchjax.io", "batchjax.jobs.job", "batchjax.report", "batchjax.types",
          "batchjax.config")
JAX = {"jax", "jaxlib", "flax", "orbax", "optax", "chex"}
STANDARD_AND_NUMPY = {"dataclasses", "typing", "types", "math", "numpy", "ml_collections",
                      "collections", "reprlib", "batchjax"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


# Importing a submodule runs its package's __init__ as well; the rules are about what is named.
@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
  """Modules that a file imports, inside functions and under conditions too."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}:{node.lineno} imports relatively"
      names |= {name if (name := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names}
  return frozenset(names)


def ours(path: pathlib.Path) -> set[str]:
  """Modules of our packages that a file imports."""
  return {name for name in imports(path) if name in MODULES}


def top_level(path: pathlib.Path) -> set[str]:
  return {name.split(".")[0] for name in imports(path)}


def is_in(module: str, packages) -> bool:
  return any(module == package or module.startswith(f"{package}.") for package in packages)


def chain_to_jax(module: str, seen: frozenset[str] = frozenset()) -> list[str]:
  """A chain of imports from a module to jax; empty when there is none."""
  path = MODULES[module]
  if found := sorted(top_level(path) & JAX):
    return [module, found[0]]
  for other in sorted(ours(path) - seen - {module}):
    if chain := chain_to_jax(other, seen | {module}):
      return [module, *chain]
  return []


def test_the_rules_see_the_files():
  assert {"batchjax.types", "batchjax.engine.step", "batchjax.plan.planner"} <= set(MODULES)
  assert chain_to_jax("batchjax.engine.step") == ["batchjax.engine.step", "flax"]
  assert chain_to_jax("batchjax.engine.compile"), "jax is found"


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, NO_JAX)])
def test_never_imports_jax(module):
  assert not (chain := chain_to_jax(module)), " -> ".join(chain)


@pytest.mark.parametrize("module", ["batchjax.types", "batchjax.config"])
def test_contracts_import_the_standard_library_and_numpy(module):
  assert top_level(MODULES[module]) <= STANDARD_AND_NUMPY
  assert ours(MODULES[module]) <= {"batchjax.types"}


def test_kernels_import_nothing_of_ours_and_only_ops_imports_them():
  for module, path in MODULES.items():
    if is_in(module, ["pallas_kernels"]):
      assert "batchjax" not in top_level(path), module
    elif not is_in(module, ["batchjax.ops", "batchjax.commands.tpu_report"]):
      assert "pallas_kernels" not in top_level(path), module


def test_no_module_imports_programs_or_tests():
  for module, path in MODULES.items():
    assert not top_level(path) & {"scripts", "colab", "configs", "tests"}, module


def test_no_module_of_the_engine_imports_the_test_helpers():
  for module, path in MODULES.items():
    if not is_in(module, ["batchjax.testing"]):
      assert not any(is_in(name, ["batchjax.testing"]) for name in imports(path)), module


def test_generate_and_score_see_no_text():
  for module in ("batchjax.generation", "batchjax.scoring"):
    assert not any(is_in(name, ["batchjax.text", "batchjax.io"])
                   for name in imports(MODULES[module])), module


# Arrows between rooms run one way: a room may import those before it.
ROOMS = ("types", "config", "model_files", "hub", "cache", "plan", "sharding", "ops", "models", "weights",
         "forward_pass", "engine", "text", "io", "generation", "scoring", "report", "bench", "jobs",
         "text_completion", "testing", "commands", "__main__")


def test_arrows_between_rooms_run_one_way():
  for module, path in MODULES.items():
    if not is_in(module, ["batchjax"]) or module == "batchjax":
      continue
    room = ROOMS.index(module.split(".")[1])
    for name in ours(path):
      if is_in(name, ["batchjax"]) and name != "batchjax":
        assert ROOMS.index(name.split(".")[1]) <= room, f"{module} imports {name}"


def test_no_module_is_named_like_what_the_package_exports():
  public = {alias.asname or alias.name for node in ast.walk(ast.parse(
      MODULES["batchjax"].read_text())) if isinstance(node, ast.ImportFrom) for alias in node.names}
  assert not public & {name.split(".")[1] for name in MODULES if name.startswith("batchjax.")}


def test_there_are_no_cycles():
  state: dict[str, bool] = {}  # False while on the path, True when done

  def visit(module, path):
    if state.get(module) is False:
      raise AssertionError("cycle: " + " -> ".join([*path[path.index(module):], module]))
    if module not in state:
      state[module] = False
      for other in sorted(ours(MODULES[module])):
        visit(other, [*path, module])
      state[module] = True

  for module in MODULES:
    visit(module, [])


def num_lines(path: pathlib.Path) -> int:
  return len(path.read_text().splitlines())


@pytest.mark.parametrize("module", MODULES)
def test_files_fit_in_the_head(module):
  assert num_lines(MODULES[module]) <= (900 if is_in(module, ["pallas_kernels"]) else 400)


def test_half_of_the_files_are_short():
  lens = [num_lines(path) for path in SOURCES if path.name != "__init__.py"]
  assert statistics.median(lens) < 130


def test_there_is_no_drawer_for_leftovers():
  assert not [module for module in MODULES if module.rsplit(".")[-1] in ("utils", "util", "misc",
                                                                        "helpers", "common")]


@pytest.mark.parametrize("path", sorted(
    path for folder in ("scripts", "configs") for path in (ROOT / folder).rglob("*.py")), ids=str)
def test_programs_use_public_names(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not [alias.name for alias in node.names if alias.name.startswith("_")], node.module
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      assert not node.attr.startswith("_"), f"{node.value.id}.{node.attr}"

"""What is written is run: the examples of all that is exported, and the README's Python."""

import ast
import dataclasses
import doctest
import inspect
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import markdown_it
import numpy as np
import optax
import pytest

import batchjax
from batchjax.plan import memory

ROOT = pathlib.Path(__file__).parents[1]
EXPORTED = [name for name in batchjax.__all__ if callable(getattr(batchjax, name))]
# Examples that say that they go on where another one ends.
BEFORE = {"mixed_step": ("pack",), "decode_loop": ("pack", "mixed_step")}

pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")


@pytest.fixture(scope="module", autouse=True)
def small_pools():
  """Pools of 1 GiB take longer to fill than tiny models to run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(memory, "_DEFAULT_KV_BYTES", 64 << 20)
    yield


@pytest.fixture(scope="module")
def names(tiny_model) -> dict:
  """What examples may use: a tiny model, where it lies, and the modules that every reader knows."""
  loaded = batchjax.load(tiny_model)
  return dict(batchjax=batchjax, dataclasses=dataclasses, jax=jax, jnp=jnp, json=json, np=np,
              optax=optax, pathlib=pathlib, path=str(tiny_model), loaded=loaded, model=loaded.model,
              tokenizer=loaded.tokenizer)


def examples(name: str) -> list[doctest.Example]:
  return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(batchjax, name)) or "")


@pytest.mark.parametrize("name", EXPORTED)
def test_examples_of_docstrings_are_true(name, names, tmp_path, monkeypatch, capsys):
  assert examples(name), f"batchjax.{name} has no example"
  monkeypatch.chdir(tmp_path)
  chain = [example for part in (*BEFORE.get(name, ()), name) for example in examples(part)]
  test = doctest.DocTest(chain, dict(names), name, None, None, None)
  failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
  assert not failed, capsys.readouterr().out


def test_all_that_is_exported_is_listed():
  lazily, = (node for node in ast.parse(inspect.getsource(batchjax)).body if isinstance(node, ast.With))
  public = [alias.name for node in lazily.body for alias in node.names]
  assert sorted(public) == sorted(batchjax.__all__)
  assert all(hasattr(batchjax, name) for name in public)


def test_the_readmes_python_runs(tiny_model, tmp_path, monkeypatch, capsys):
  tokens = markdown_it.MarkdownIt().parse((ROOT / "README.md").read_text(encoding="utf-8"))
  blocks = [token for token in tokens if token.type == "fence" and token.info == "python"]
  assert len(blocks) >= 3
  shutil.copytree(tiny_model, tmp_path / "SmolLM2-135M-Instruct")  # the name that it has there
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": "__main__"}
  for block in blocks:  # later ones use the names of earlier ones, as a reader would
    exec(compile(block.content, f"README.md:{block.map[0] + 1}", "exec"), namespace)
  assert capsys.readouterr().out.strip()

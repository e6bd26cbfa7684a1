"""A jinja2 sandbox that also bounds the time that a template takes and the values that it makes.

A template comes with a model, so nothing says that it ends. Every loop, call, filter, test and
operator of it passes through here. Each looks at the clock; what makes much of little is measured
before it runs, and what holds other values is measured when it is made. So no single operation is
long, and the clock bounds how many there are.
"""

from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
import re
import time
import types
from typing import Any

import jinja2
import jinja2.compiler
from jinja2 import nodes
import jinja2.sandbox
from jinja2.utils import Namespace

# The largest number that a filter or method takes (as `range` of the sandbox), and the most that
# one may have to do: the size of its value times that of its arguments.
_MAX_NUMBER, _MAX_WORK = jinja2.sandbox.MAX_RANGE, 10**8
_MAX_BITS = 1 << 14  # of an integer
_MAX_TOTAL = 128  # all text of a rendering, as a multiple of the largest
# What may look at all of an argument for each part of its value, or write it as often.
_MULTIPLYING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "round",
                "batch", "slice", "to_bytes", "translate", "strip", "lstrip", "rstrip", "trim",
                "rfind", "rindex", "rsplit", "rpartition"}
_QUADRATIC = {"wordwrap", "urlize", "striptags", "xmlattr", "pprint"}


class TooMuch(jinja2.TemplateRuntimeError):
  """A template takes more time than it may, or makes a larger value."""


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Renders within limits; a template that passes one raises TooMuch.

  Args:
    max_secs: processor time of one rendering.
    max_chars: characters and items of any value, the text that comes out among them.
    options: of the jinja2 environment.
  """

  intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

  def __init__(self, max_secs: float, max_chars: int, **options: Any):
    super().__init__(optimized=False, **options)  # nothing is computed at compile time
    self.max_secs, self.max_chars = max_secs, max_chars
    self.code_generator_class, self.context_class = _CodeGenerator, _Context
    self.tick = _tick
    self.globals["namespace"] = _namespace
    del self.globals["lipsum"]
    for functions in (self.filters, self.tests):
      functions.update({name: _bounded(name, function) for name, function in functions.items()})

  def add_filter(self, name: str, function: Callable[..., Any]) -> None:
    """Adds a filter or replaces it."""
    self.filters[name] = _bounded(name, function)

  def require(self, size: int) -> None:
    """Raises TooMuch where a value may not have this size."""
    if size > self.max_chars:
      raise TooMuch("a value would hold more characters or items than "
                    f"limits.max_template_chars={self.max_chars}")

  def concat(self, pieces: Iterable[str]) -> str:
    """The pieces in one."""
    kept, total = [], 0
    for piece in pieces:
      total += len(piece)
      self.require(total)
      kept.append(piece)
    return "".join(kept)

  def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
    """Calls what the template calls."""
    __context.check_time()
    if __obj is _tick:
      return True
    function = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, (str, bytes)) and name == "join" and len(args) == 1:
      args = (__context.joinable(args[0], owner),)
    elif isinstance(owner, (str, bytes, int)):
      __context.check(name, (owner, *args), kwargs)
    result = super(BoundedEnvironment, __self).call(__context, __obj, *args, **kwargs)
    return __context.measured(result) if __obj is dict else __context.made(result)

  def call_binop(self, context: "_Context", operator: str, left: Any, right: Any) -> Any:
    """Computes what stands between two operands."""
    context.check_time()
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
      bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
      if bits > _MAX_BITS:
        raise TooMuch(f"{operator} would make a number of {bits} bits")
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
      times, value = (left, right) if isinstance(left, int) else (right, left)
      context.require(max(times, 0) * context.size(value))
    elif operator == "%" and isinstance(left, (str, bytes)):
      context.check("format", (left, right), {})
    elif operator == "+" and isinstance(left, (list, tuple)):
      return context.add(left, right)
    return context.made(super().call_binop(context, operator, left, right))


class _Context(jinja2.runtime.Context):
  """One rendering: its end, and the measures of what it makes. All raise TooMuch."""

  def __init__(self, environment: BoundedEnvironment, *args: Any, **kwargs: Any):
    super().__init__(environment, *args, **kwargs)
    self._deadline = time.thread_time() + environment.max_secs
    self._left = _MAX_TOTAL * environment.max_chars
    self._sum: tuple[Any, int] = (None, 0)

  def derived(self, locals: dict[str, Any] | None = None) -> "_Context":
    """A context for a scoped block, with the same end."""
    context = super().derived(locals)
    context._deadline = self._deadline
    return context

  def check_time(self) -> None:
    """The rendering may go on."""
    if time.thread_time() > self._deadline:
      raise TooMuch(f"it takes more than limits.max_template_secs={self.environment.max_secs}")

  def require(self, size: int) -> None:
    """A value may have this size."""
    self.environment.require(size)

  def size(self, value: Any) -> int:
    """Characters and items of a value that is within the limit; what it holds twice counts twice."""
    total, left = 0, [value]
    while left:
      part = left.pop()
      total += 1
      if isinstance(part, (str, bytes)):
        total += len(part)
      elif isinstance(part, Namespace):
        left.append(part._Namespace__attrs)
      elif isinstance(part, (list, tuple, dict, KeysView, ValuesView, ItemsView)):
        self.require(total + len(part))
        left.extend(part.items() if isinstance(part, dict) else part)
      self.require(total)
    return total

  def measured(self, value: Any) -> Any:
    """A value that holds others, if it is within the limit."""
    self.size(value)
    return self.made(value)

  def made(self, value: Any) -> Any:
    """A value that came of an operation; a generator is run, and stands for its parts once more."""
    if isinstance(value, types.GeneratorType):  # left alone, a long chain of them overflows the stack
      return iter(self._parts(value))
    if isinstance(value, (str, bytes, list, tuple)):
      self.require(len(value))
    if isinstance(value, (str, bytes)):
      self._left -= len(value)
      if self._left < 0:
        raise TooMuch(f"it makes more than {_MAX_TOTAL} times limits.max_template_chars="
                      f"{self.environment.max_chars} characters in all")
    return value

  def _parts(self, parts: Iterable[Any]) -> list[Any]:
    kept, total = [], 0
    for part in parts:
      total += self.size(part)
      self.require(total)
      kept.append(part)
    return kept

  def concat(self, pieces: Iterable[str]) -> str:
    """The pieces of a block or macro in one."""
    return self.made(self.environment.concat(pieces))

  def add(self, left: Any, right: Any) -> Any:
    """left + right; a list that grows item by item is not measured anew each time."""
    size = self._sum[1] if left is self._sum[0] else self.size(left)
    size += self.size(right)
    self.require(size)
    self._sum = (left + right, size)
    return self._sum[0]

  def joinable(self, items: Any, separator: Any) -> Any:
    """The items, if they may be joined."""
    if not isinstance(items, (str, bytes)):
      items = list(items)
    self.require(self.size(items) + len(items) * len(separator))
    return items

  def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A filter or method may be run."""
    others = [*args[1:], *kwargs.values()]
    if name in ("format", "format_map"):
      self._check_format(str(args[0]), others)
    elif name == "replace" and len(others) >= 2:
      old, new = [*args[1:3], *(kwargs[key] for key in ("old", "new") if key in kwargs)][:2]
      text = str(args[0])
      self.require(len(text) + text.count(str(old)) * len(str(new)))
    elif name == "sum" and any(isinstance(x, (str, list, tuple)) for x in [
        *args[2:], kwargs.get("start")]):
      raise TooMuch("sum adds up numbers")
    elif name in _QUADRATIC:
      if self.size([*args, *others]) > _MAX_NUMBER:
        raise TooMuch(f"{name} takes at most {_MAX_NUMBER} characters")
    elif name in _MULTIPLYING:
      numbers = [abs(other) for other in others if isinstance(other, int)]
      if max(numbers, default=0) > _MAX_NUMBER:
        raise TooMuch(f"{name} takes numbers of at most {_MAX_NUMBER}")
      factor = sum(numbers) + sum(self.size(x) for x in others if not isinstance(x, int))
      # `batch` and `slice` cut up their value, whatever its size, and may fill up the last part.
      size = 1000 if name in ("batch", "slice") else self.size(args[0])
      if factor * size > _MAX_WORK:
        raise TooMuch(f"{name} has too much to do: {size} characters or items times {factor}")

  def _check_format(self, pattern: str, values: list[Any]) -> None:
    """`pattern % values` or `pattern.format(*values)` may be computed."""
    widest = max((int(digits[:9]) for digits in re.findall(r"\d+", pattern)), default=0)
    if widest > _MAX_NUMBER or re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern):
      raise TooMuch(f"a format may have widths of at most {_MAX_NUMBER}, written in it")
    fields = pattern.count("%") + pattern.count("{")
    self.require(len(pattern) + fields * (widest + self.size(values)))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A filter or test within the limits; none is run at compile time, since it takes the context."""
  passes = getattr(function, "jinja_pass_arg", None)
  passes = passes and passes.name

  @jinja2.pass_context
  def bounded(context: _Context, *args: Any, **kwargs: Any) -> Any:
    context.check_time()
    if name == "join":
      separator = str(kwargs.get("d", args[1] if len(args) > 1 else ""))
      args = (context.joinable(args[0], separator), *args[1:])
    elif args:
      context.check(name, args, kwargs)
    first = {None: (), "context": (context,), "eval_context": (context.eval_ctx,),
             "environment": (context.environment,)}[passes]
    return context.made(function(*first, *args, **kwargs))
  return bounded


def _tick() -> bool:
  """Stands in every loop; `call` looks at the clock in its place."""
  return True


class _Namespace(Namespace):
  """A namespace whose values are measured when they come in."""

  def __setitem__(self, name: str, value: Any) -> None:
    super().__setitem__(name, object.__getattribute__(self, "_measured")(value))


@jinja2.pass_context
def _namespace(context: _Context, /, *args: Any, **kwargs: Any) -> Namespace:
  namespace = _Namespace(*args, **kwargs)
  object.__setattr__(namespace, "_measured", context.measured)
  return context.measured(namespace)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
  """Puts a tick into every loop and a measure around every value that holds others."""

  def write_commons(self) -> None:
    super().write_commons()
    self.writeline("concat = context.concat")

  def visit_For(self, node: nodes.For, frame: Any) -> None:
    def tick() -> nodes.Call:
      return nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=node.lineno)
    node.body.insert(0, nodes.ExprStmt(tick(), lineno=node.lineno))
    if node.test is not None:
      node.test = nodes.And(tick(), node.test, lineno=node.lineno)
    super().visit_For(node, frame)

  def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
    self._measure(super().visit_Concat, node, frame)

  def visit_List(self, node: nodes.List, frame: Any) -> None:
    self._measure(super().visit_List, node, frame)

  def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
    self._measure(super().visit_Dict, node, frame)

  def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
    if node.ctx == "load":
      self._measure(super().visit_Tuple, node, frame)
    else:
      super().visit_Tuple(node, frame)

  def _measure(self, visit: Callable[..., None], node: nodes.Node, frame: Any) -> None:
    self.write("context.measured(")
    visit(node, frame)
    self.write(")")

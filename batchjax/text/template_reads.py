"""What a chat template reads, found in its syntax tree."""

import dataclasses

import jinja2
from jinja2 import meta, nodes


@dataclasses.dataclass(frozen=True)
class TemplateReads:
  """What decides the form that messages take for a template.

  Attributes:
    parts: it goes through the content of a message and reads `text` or `type` of what it finds.
    strings: it asks of what kind the content is, so a string is understood beside parts.
    nulls: it asks whether the content is none.
    tools: it reads the tools.
  """

  parts: bool
  strings: bool
  nulls: bool
  tools: bool


def template_reads(environment: jinja2.Environment, source: str) -> TemplateReads:
  """Reads the template; raises jinja2.TemplateSyntaxError where it is none."""
  tree = environment.parse(source)
  aliases = {"content"}  # also what macros call it that are given the content

  def is_content(node: nodes.Node | None) -> bool:
    if _key(node) == "content":
      return True
    match node:
      case nodes.Name():
        return node.name in aliases
      case nodes.Filter() | nodes.Getitem(arg=nodes.Slice()):
        return is_content(node.node)
      case nodes.CondExpr():
        return is_content(node.expr1) or is_content(node.expr2)
      case nodes.Or() | nodes.And():
        return is_content(node.left) or is_content(node.right)
    return False

  for assign in tree.find_all(nodes.Assign):
    if isinstance(assign.target, nodes.Name) and is_content(assign.node):
      aliases.add(assign.target.name)

  def takes_parts(loop: nodes.For) -> bool:
    reads = [node for kind in (nodes.Getattr, nodes.Getitem)
             for statement in loop.body for node in statement.find_all(kind)]
    return is_content(loop.iter) and any(
        isinstance(node.node, nodes.Name) and isinstance(loop.target, nodes.Name)
        and node.node.name == loop.target.name and _key(node) in ("text", "type")
        for node in reads)

  tests = {test.name for test in tree.find_all(nodes.Test) if is_content(test.node)}
  compared = (operand.expr for compare in tree.find_all(nodes.Compare) if is_content(compare.expr)
              for operand in compare.ops)
  return TemplateReads(
      parts=any(map(takes_parts, tree.find_all(nodes.For))),
      strings=bool(tests & {"string", "iterable", "sequence", "mapping"}),
      nulls="none" in tests or any(isinstance(node, nodes.Const) and node.value is None
                                   for node in compared),
      tools="tools" in meta.find_undeclared_variables(tree))


def _key(node: nodes.Node | None) -> str | None:
  """The member that an expression reads: of `a.key` and `a["key"]`."""
  match node:
    case nodes.Getattr():
      return node.attr
    case nodes.Getitem(arg=nodes.Const()):
      return node.arg.value
  return None

"""The Mosaic GPU kernels of a lowered step, each compiled by itself.

XLA compiles the kernels of a program one after the other, behind its own passes, and the attention
kernels take longer than all the rest. Mosaic keeps the kernels that it has compiled, by their text, for the
process: what was compiled by itself is found by the programs that hold it.
"""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax

_TARGET = "mosaic_gpu_v2"
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "i1": "bool", "i8": "int8",
           "i32": "int32", "ui8": "uint8", "ui32": "uint32"}


class Kernel(NamedTuple):
  """One kernel as a program of its own.

  Attributes:
    program: the jitted call of it.
    arguments: shapes of the arguments.
  """

  program: Any
  arguments: tuple[jax.ShapeDtypeStruct, ...]

  def compile(self) -> None:
    """Has Mosaic compile it and keep it; in any thread."""
    self.program.lower(*self.arguments).compile()


def kernels_of(lowered: jax.stages.Lowered) -> dict[bytes, Kernel]:
  """The distinct kernels of a program, by the digest of their text."""
  kernels = {}
  for call in _calls(lowered.compiler_ir("stablehlo").operation):
    attributes = {item.name: item.attr for item in call.attributes["mhlo.backend_config"]}
    values = {name: attr.value_bytes if hasattr(attr, "value_bytes") else attr.value
              for name, attr in attributes.items()}
    program = jax.ffi.ffi_call(_TARGET, tuple(map(_shape, call.results)), has_side_effect=True)
    kernels[values["kernel_hash"]] = Kernel(jax.jit(functools.partial(program, **values)),
                                            tuple(map(_shape, call.operands)))
  return kernels


def _calls(operation: Any) -> Iterator[Any]:
  """The kernels' calls, wherever they stand inside an operation."""
  for region in operation.regions:
    for block in region:
      for inner in block:
        inner = inner.operation
        if (inner.name == "stablehlo.custom_call"
            and inner.attributes["call_target_name"].value == _TARGET):
          yield inner
        yield from _calls(inner)


def _shape(value: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(value.type.shape), _DTYPES[str(value.type.element_type)])

"""Kernels take few arguments: what belongs together is a named tuple, as docs/decisions/0020 says."""

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "llm" / "kernels"
MOST_ARGUMENTS = 20


def arguments_of_kernels() -> dict[str, list[str]]:
    """The names of the arguments of every function that Triton or Gluon compiles, helpers of kernels included."""
    arguments = {}
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_compiled = isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).split("(")[0] in ("triton.jit", "gluon.jit") for decorator in node.decorator_list
            )
            if is_compiled:
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                arguments[f"{path.relative_to(KERNELS)}:{node.name}"] = names
    return arguments


def test_no_kernel_has_more_arguments_than_one_can_keep_apart():
    """Twenty at most, in kernels and in the functions that kernels call."""
    arguments = arguments_of_kernels()
    assert len(arguments) > 100, "kernels are where this test looks for them"
    too_many = {name: len(names) for name, names in arguments.items() if len(names) > MOST_ARGUMENTS}
    assert not too_many, "group what belongs together in a named tuple"

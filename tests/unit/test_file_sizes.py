"""A file is one idea and a function one step: what outgrows these limits is to be split by idea."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
KERNELS = ROOT / "llm" / "kernels"
"""A kernel may be longer: its parts share registers, and a function call cannot return those by name."""
FILES = sorted(path for package in ("llm", "deployments") for path in (ROOT / package).rglob("*.py"))


def long_functions(source: str) -> list[str]:
    """Name and length of each function with more lines than allowed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{node.name}: {length} lines"] if length > MAX_FUNCTION_LINES else []
    return found


def test_files_and_functions_are_found():
    """Both packages are read, and the measure sees methods, nested and asynchronous functions."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"llm", "deployments"}
    body = "\n            pass" * MAX_FUNCTION_LINES
    source = f"class A:\n    async def f(self):\n        def g():{body}\n"
    assert long_functions(source) == [f"f: {MAX_FUNCTION_LINES + 2} lines", f"g: {MAX_FUNCTION_LINES + 1} lines"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path: Path):
    source = path.read_text()
    num_lines = len(source.splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines: split the file by idea"
    if not path.is_relative_to(KERNELS):
        assert not long_functions(source), "split the function"

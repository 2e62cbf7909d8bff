"""YAML whose mappings give each key once, as YAML itself demands and its usual parsers do not check."""

from typing import Any

import yaml

# The parser in C takes a tenth of the time, during which a router's event loop waits for its thread.
TWICE = "a key is there twice"
"""`problem` of the error where a mapping has a key twice."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _UniqueLoader(_Loader):  # type: ignore[misc]
    """Refuses a mapping that has a key twice: one of the two values would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML's `SafeConstructor`."""
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, TWICE, key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


def load_yaml(text: str) -> Any:
    """What a YAML document says.

    Raises:
        yaml.YAMLError: it is not valid, or a mapping has a key twice; `problem_mark` says where.
        ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError: a value does not fit its
            tag, such as a 13th month.
    """
    return yaml.load(text, _UniqueLoader)

"""YAML as people mean it: YAML 1.2 scalars, no tags, aliases or duplicate keys, one-line errors.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` is false, `010` is eight and `1:30` is
ninety. In a recipe each of these is a mistake waiting for a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from sa_models.errors import PostshareError

_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_REPLACED = ("int", "float", "bool", "timestamp")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, unique keys, and no aliases.

    An override must change one place; under an alias it would change two.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _error("aliases (*name) are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise _error(f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string either YAML version would read as something else."""


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _without(resolvers: dict[str, list[Any]], names: tuple[str, ...]) -> dict[str, list[Any]]:
    tags = {_TAG + name for name in names}
    return {first: [r for r in rows if r[0] not in tags] for first, rows in resolvers.items()}


def _construct_float(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    text = str(loader.construct_scalar(node)).lower()  # type: ignore[arg-type]
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    return int(str(loader.construct_scalar(node)))  # type: ignore[arg-type]


_Loader.yaml_implicit_resolvers = _without(_Loader.yaml_implicit_resolvers, _REPLACED)
_Dumper.yaml_implicit_resolvers = {
    first: list(rows) for first, rows in yaml.SafeDumper.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    # Order matters: the first resolver that matches wins, and an int also looks like a float.
    _class.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
    _class.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


def parse(text: str, origin: str) -> Any:
    """The value of one YAML document.

    Args:
        text: the document.
        origin: what to call it in an error, such as its path.

    Raises:
        PostshareError: not YAML, a duplicate key, or a tag; names the line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(", ".join(filter(None, (error.context, error.problem))).split())
        raise PostshareError(f"{origin}: {problem}{place}; correct the YAML there") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(f"{origin}: not valid YAML ({reason}); correct it") from None


def dump(value: Any) -> str:
    """`value` as YAML that `parse`, and any YAML 1.1 reader, reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

"""The YAML of recipes: every value is the text that is written, so `No` stays "No"; a key twice is an error.

This module does not know which keys a recipe has. Anchors work; tags, nested mappings and lists elsewhere than in
`stages` are no part of a recipe, but a list of plain values is joined with commas: `targets`, `clean` and `data` take it, and a number with
several values is a sweep.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml


class RecipeError(Exception):
    """What is wrong with the text of a recipe, and where."""


def read_text_values(text: str) -> dict[str, Any]:
    """The keys of a recipe with their values as texts, and `stages` as a list of mappings, if it has them.

    Raises:
        RecipeError: no YAML, a key given twice, or a value that is a list or a mapping where a text is expected.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _mapping(node) if node is not None and not _is_empty(node) else {}
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {error}") from error
    except RecursionError:
        raise RecipeError("not YAML: brackets too deep") from None
    return values


def _is_empty(node: "yaml.Node") -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _mapping(node: "yaml.Node") -> dict[str, Any]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"a recipe is a list of `key: value` lines, found a {_kind(node)}{_line(node)}.")
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
            merged |= _mapping(value_node)
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"a key must be a word, found a {_kind(key_node)}{_line(key_node)}.")
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in values:
            raise RecipeError(f"the key {key} is given twice, in lines {lines[key]} and {line}. Delete one of the two.")
        lines[key] = line
        values[key] = _stages(value_node) if key == "stages" else _text(key, value_node)
    return {**merged, **values}


def _stages(node: "yaml.Node") -> Any:
    """The stages; what is no list of mappings is returned as it is, for the caller's own message."""
    import yaml

    if isinstance(node, yaml.SequenceNode) and all(isinstance(stage, yaml.MappingNode) for stage in node.value):
        return [_mapping(stage) for stage in node.value]
    return None if _is_empty(node) else node.value


def _text(key: str, node: "yaml.Node") -> str:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return "" if _is_empty(node) else str(node.value)
    if isinstance(node, yaml.SequenceNode) and key:
        return ",".join(_text("", value) for value in node.value)
    raise RecipeError(f"{key}: expected one value, found a {_kind(node)}{_line(node)}.")


def _kind(node: "yaml.Node") -> str:
    return {"SequenceNode": "list", "MappingNode": "mapping"}.get(type(node).__name__, "text")


def _line(node: "yaml.Node") -> str:
    return f" in line {node.start_mark.line + 1}"

"""Where configuration comes from: nested tables by source, merged key by key, unknown keys refused.

Values stay as they were written; `config.load` gives them their types.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

from countersign.services.runtime.errors import InvalidArgument

PREFIX = "COUNTERSIGN_"
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """One source's values. ``final``: written by ``config.dump``, so the environment is in it already."""

    source: str
    tree: Tree
    final: bool = False


class ConfigError(InvalidArgument):
    """The configuration is wrong; the message names the source, the key, the value and what is allowed."""

    default_reason = "CONFIG_INVALID"

    @classmethod
    def of_value(cls, failure: str, tree: Tree, layers: Sequence[Layer]) -> Self:
        """A wrong value, from msgspec's message (``Expected `int` >= 1 - at `$.draft.tokens```)."""
        allowed, _, where = failure.partition(" - at `$.")
        key = where.rstrip("`")
        source = next((layer.source for layer in reversed(layers) if _has(layer.tree, key)), "defaults")
        return cls(f"{source}: {key} = {_at(tree, key)!r}: {allowed[0].lower()}{allowed[1:]}", key=key)


def file_layer(file: Path) -> Layer:
    """The values of a TOML file, or of what ``config.dump`` wrote.

    Raises:
        ConfigError: the file cannot be read or parsed.
    """
    try:
        text = file.read_text(encoding="utf-8")
        # No TOML document starts with a brace.
        tree = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}", file=str(file)) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", file=str(file)) from None
    return Layer(str(file), tree, final=tree.pop("resolved", False) is True)


def environment_layer(environ: Mapping[str, str]) -> list[Layer]:
    """One layer for each ``COUNTERSIGN_SECTION__KEY=value``, in the order of the names."""
    return [
        Layer(f"environment variable {name}", _nest(name.removeprefix(PREFIX).lower().split("__"), environ[name]))
        for name in sorted(environ)
        if name.startswith(PREFIX)
    ]


def flag_layer(overrides: Sequence[str]) -> list[Layer]:
    """One layer for each ``section.key=value``, in the order given.

    Raises:
        ConfigError: a flag without ``=``.
    """
    layers = []
    for flag in overrides:
        key, equals, value = flag.partition("=")
        if not equals:
            raise ConfigError(f"--set {flag}: expected key=value", help="for example --set target.dtype=bf16")
        layers.append(Layer(f"--set {flag}", _nest(key.strip().split("."), value)))
    return layers


def merge(schema: type, layers: Sequence[Layer]) -> Tree:
    """All layers in one tree, later ones winning.

    Raises:
        ConfigError: reason CONFIG_UNKNOWN_KEY, naming the nearest key that ``schema`` (a dataclass) knows; or a value
            where a table belongs.
    """
    merged: Tree = {}
    for layer in layers:
        _merge_into(merged, layer.tree, schema, (), layer.source)
    return merged


def _merge_into(into: Tree, tree: Tree, schema: type, path: tuple[str, ...], source: str) -> None:
    hints = get_type_hints(schema)
    for name, value in tree.items():
        key = ".".join((*path, name))
        if name not in hints:
            raise _unknown_key(key, schema, path, source)
        if not dataclasses.is_dataclass(hints[name]):
            into[name] = value
        elif isinstance(value, dict):
            _merge_into(into.setdefault(name, {}), value, hints[name], (*path, name), source)
        else:
            raise ConfigError(f"{source}: {key} = {value!r}: expected a table of keys", key=key)


def _unknown_key(key: str, schema: type, path: tuple[str, ...], source: str) -> ConfigError:
    known = _keys(schema, path)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return ConfigError(
        f"{source}: unknown key {key}",
        reason="CONFIG_UNKNOWN_KEY",
        help=f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}",
        key=key,
    )


def _keys(schema: type, path: tuple[str, ...]) -> list[str]:
    keys = []
    for name, kind in get_type_hints(schema).items():
        keys.append(".".join((*path, name)))
        if dataclasses.is_dataclass(kind):
            keys += [f"{name}.{inner}" for inner in get_type_hints(kind)]
    return keys


def _nest(parts: Sequence[str], value: str) -> Tree:
    tree: Any = value
    for part in reversed(parts):
        tree = {part: tree}
    return tree if isinstance(tree, dict) else {}


def _has(tree: Tree, key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _at(tree: Tree, key: str) -> Any:
    node: Any = tree
    for part in re.split(r"\.", key):
        node = node.get(part) if isinstance(node, dict) else None
    return node

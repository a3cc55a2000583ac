"""Where configuration comes from: nested tables by source, merged key by key, unknown keys refused.

Values stay as they were written; `config.load` gives them their types.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import msgspec

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
    def of_value(cls, failure: str, tree: Tree, schema: type, layers: Sequence[Layer]) -> Self:
        """A wrong value, found by msgspec's message, which ends in ``at `$.draft.tokens```."""
        key = failure.rpartition("`$.")[2].rstrip("`")
        source = next(layer.source for layer in reversed(layers) if _find(layer.tree, key))
        (value,) = _find(tree, key)
        return cls(f"{source}: {key} = {value!r}: must be {_allowed(schema, key)}", key=key)


def file_layer(file: Path) -> Layer:
    """The values of a TOML file, or of what ``config.dump`` wrote.

    Raises:
        ConfigError: the file cannot be read or parsed.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if not text.startswith("{"):  # as no TOML document does
            return Layer(str(file), tomllib.loads(text))
        tree = json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}", file=str(file)) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", file=str(file)) from None
    return Layer(str(file), tree, final=tree.pop("resolved", None) is True)


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
    here = [".".join((*path, name)) for name in get_type_hints(schema)]
    nearest = difflib.get_close_matches(key, [*here, *_leaves(schema)], n=1)
    return ConfigError(
        f"{source}: unknown key {key}",
        reason="CONFIG_UNKNOWN_KEY",
        help=f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(here)}",
        key=key,
    )


def _leaves(schema: type) -> list[str]:
    sections = {name: kind for name, kind in get_type_hints(schema).items() if dataclasses.is_dataclass(kind)}
    return [f"{name}.{key}" for name, kind in sections.items() for key in get_type_hints(kind)]


def _allowed(schema: type, key: str) -> str:
    kind: Any = schema
    for name in key.split("."):
        kind = get_type_hints(kind, include_extras=True)[name]
    metas = (meta for meta in get_args(kind) if isinstance(meta, msgspec.Meta))
    return next(meta.description for meta in metas if meta.description)


def _nest(parts: Sequence[str], value: str) -> Tree:
    tree: Tree = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        tree = {part: tree}
    return tree


def _find(tree: Tree, key: str) -> tuple[Any, ...]:
    """The value at a dotted key, in a tuple that is empty when there is none."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return ()
        node = node[part]
    return (node,)

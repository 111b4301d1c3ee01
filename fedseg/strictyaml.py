"""YAML that people edit, read strictly: bounded, plain types, no key twice, no aliases."""

from __future__ import annotations

from typing import Any

import yaml

from fedseg.errors import PlanError

MAX_BYTES = 4 * 1024 * 1024

# What PyYAML lets escape where a value is not what its tag says, as in `!!int abc`.
_BAD_SCALARS = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read_mapping(data: bytes, source: str) -> dict[Any, Any]:
    """Read a YAML mapping that people edit: bounded, plain types, no key twice, no aliases.

    Raises:
        PlanError: too large, not YAML, or not a mapping.
    """
    if len(data) > MAX_BYTES:
        raise PlanError(f"{source} is larger than {MAX_BYTES} bytes: that is no study plan")
    try:
        value = yaml.load(data, Loader=_PlainYaml)
    except (yaml.YAMLError, RecursionError, *_BAD_SCALARS) as error:
        raise PlanError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise PlanError(f"{source} must be a YAML mapping; `fedseg plan new` writes an example")
    return value


class _PlainYaml(yaml.SafeLoader):
    """YAML without the silent 'last key wins', and without aliases, which a few bytes multiply."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed: write the value out", mark
            )
        return super().compose_node(parent, index)


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Build a mapping; a key given twice is an error."""
    mapping: dict[Any, Any] = {}
    for key, value in loader.construct_pairs(node, deep=True):
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.start_mark
            )
        mapping[key] = value
    return mapping


_PlainYaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)

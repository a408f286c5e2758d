"""A configuration as a flat mapping, and its values as they are typed."""

from __future__ import annotations


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """A configuration as {dotted key: leaf}."""
    names = getattr(value, "__dataclass_fields__", None)
    items = [(name, getattr(value, name)) for name in names] if names else None
    if items is None and isinstance(value, dict):
        items = list(value.items())
    if items is None:
        return {prefix: getattr(value, "name", value)}
    flat: dict[str, object] = {}
    for name, item in items:
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def typed(value: object) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(getattr(value, "name", value))

"""PEFT's rules for choosing modules by name, and lists of names that choose exactly the modules wanted.

The rules are PEFT's own, with their irregularities: a name in ``target_modules`` matches at a dot boundary, a name in
``modules_to_save`` matches any module whose name merely ends so, and keys of ``rank_pattern`` are regular expressions.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def targeted(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules that ``target_modules`` and its companions select; for "all-linear", which no name tells, none."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return set()
    return {name for name in modules if not _excluded(config, name) and _targeted(config, targets, name)}


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    exclude = config.get("exclude_modules") or []
    if isinstance(exclude, str):
        if re.fullmatch(exclude, name):
            return True
    elif any(_ends(name, entry) for entry in exclude):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.get("modules_to_save") or [])


def _targeted(config: Mapping[str, Any], targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not any(_ends(name, entry) for entry in targets):
        return False
    layers = config.get("layers_to_transform")
    # As PEFT has it: a layer list does not restrict a module that is targeted by its full name.
    if layers is None or layers == [] or name in targets:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        match = re.match(rf"{start}{pattern}\.(\d+)\.", name)
        if match is not None:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def target_parameter(config: Mapping[str, Any], name: str) -> int | None:
    """The place in ``target_parameters`` of the entry that selects a parameter; None if none does."""
    targets = config.get("target_parameters") or []
    return next((i for i, entry in enumerate(targets) if _ends(name, entry)), None)


def saved(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """The modules of which ``modules_to_save`` says that the file holds a full copy, by themselves or in a parent."""
    entries = tuple(config.get("modules_to_save") or ())
    parents = lambda name: (name[: m.start()] for m in re.finditer(r"\.|$", name))
    return {name for name in modules if any(parent.endswith(entries) for parent in parents(name))} if entries else set()


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the name, as ``rank_pattern`` and ``alpha_pattern`` are read."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def pattern_of(name: str) -> str:
    """A key for such a mapping that matches this name alone."""
    return "^" + re.escape(name)


def as_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inverse of ``by_pattern``: the most common value, and the pattern that gives the other names theirs."""
    default = collections.Counter(values.values()).most_common(1)[0][0]
    return default, {pattern_of(name): value for name, value in values.items() if value != default}


def shortest(wanted: Set[str], names: Iterable[str], *, boundary: bool = True) -> list[str]:
    """A small list of name endings that select the wanted ones among all names, and no other.

    >>> shortest({"layers.0.q", "layers.1.q", "layers.1.k"}, ["layers.0.q", "layers.1.q", "layers.0.k", "layers.1.k"])
    ['layers.1.k', 'q']

    Args:
      boundary: whether an ending selects at dot boundaries only (``target_modules``), or whatever ends so
        (``modules_to_save``). In the second case a name that is the ending of another selects that, too.
    """
    names = set(names) | wanted
    # Endings that begin with a layer's number would be right, but nobody writes them.
    endings = {ending for name in wanted for ending in _endings(name) if not ending[0].isdigit()} | wanted
    selects: dict[str, set[str]] = {ending: set() for ending in endings}
    for name in names:
        for ending in _endings(name) if boundary else filter(name.endswith, endings):
            if ending in selects:
                selects[ending].add(name)
    usable = {ending: chosen for ending, chosen in selects.items() if chosen <= wanted}
    chosen, left = [], set(wanted)
    while left:
        best = max(usable, key=lambda ending: (len(usable[ending] & left), -len(ending), ending), default=None)
        if best is None or not usable[best] & left:
            return sorted(chosen + sorted(left))  # without a boundary, "head" selects "lm_head" whatever one does
        chosen.append(best)
        left -= usable.pop(best)
    return sorted(chosen)


def _endings(name: str) -> list[str]:
    segments = name.split(".")
    return [".".join(segments[i:]) for i in range(len(segments))]

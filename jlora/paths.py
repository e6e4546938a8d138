"""Names of leaves, and patterns that select them.

A leaf's path is its keys joined by ``/``: ``model/layers/q_proj/kernel``. A pattern is

* a glob: ``*`` matches within one segment, ``**`` across segments, ``?`` one character, ``[ab]`` a set, ``{a,b}``
  either;
* a compiled regular expression, searched for anywhere in the path;
* a predicate ``(path, leaf) -> bool``.
"""

import difflib
import functools
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.storage import is_stored

Pattern = str | re.Pattern | Callable[[str, Any], bool]


def path_of(keys: tuple) -> str:
    """``/``-joined name of a key path. The ``.value`` of a boxed leaf (an nnx variable, linen metadata) is left out."""
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves of a tree with their paths, and its structure. A quantized weight is one leaf."""
    stops = is_stored if is_leaf is None else lambda x: is_stored(x) or is_leaf(x)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops)
    named = [(path_of(keys), leaf) for keys, leaf in leaves]
    if len({path for path, _ in named}) != len(named):
        seen: set[str] = set()
        twice = next(path for path, _ in named if path in seen or seen.add(path))
        raise ValueError(f"Two leaves of the tree share the path {twice!r}; rename one of their keys.")
    return named, treedef


@functools.lru_cache(maxsize=512)
def _glob(pattern: str) -> re.Pattern:
    out, i = "", 0
    while i < len(pattern):
        rest = pattern[i:]
        if rest.startswith("**/"):
            out, i = out + "(?:.*/)?", i + 3
        elif rest.startswith("**"):
            out, i = out + ".*", i + 2
        elif rest[0] == "*":
            out, i = out + "[^/]*", i + 1
        elif rest[0] == "?":
            out, i = out + "[^/]", i + 1
        elif rest[0] in "[{" and ("]" if rest[0] == "[" else "}") in rest:
            end = rest.index("]" if rest[0] == "[" else "}")
            body = rest[1:end]
            out += f"[{body}]" if rest[0] == "[" else "(?:" + "|".join(map(re.escape, body.split(","))) + ")"
            i += end + 1
        else:
            out, i = out + re.escape(rest[0]), i + 1
    return re.compile(out + r"\Z")


def matches(pattern: Pattern, path: str, leaf: Any) -> bool:
    if isinstance(pattern, str):
        return _glob(pattern).match(path) is not None
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    if callable(pattern):
        return bool(pattern(path, leaf))
    raise TypeError(
        f"A pattern is a glob, a compiled regular expression or a predicate (path, leaf) -> bool; got {pattern!r}."
    )


def describe(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return repr(pattern)
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return getattr(pattern, "__qualname__", repr(pattern))


def nearest(pattern: Pattern, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths that look most like a pattern, for error messages."""
    paths = list(paths)
    text = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
    words = [word for word in re.split(r"[^A-Za-z0-9_]+", text) if word]

    def score(path: str) -> float:
        segments = path.split("/")
        near = (max((difflib.SequenceMatcher(None, w, s).ratio() for s in segments), default=0) for w in words)
        return sum(near)

    return sorted(paths, key=score, reverse=True)[:n] if words else paths[:n]


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """A key for this leaf alone: it depends on the leaf's path and on no other leaf. Old-style keys become typed."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"A random key is wanted, jax.random.key(seed); got {key!r}.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))

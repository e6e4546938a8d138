"""Names of leaves and the patterns that select them."""

import re

import pytest

from jlora import paths


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/kernels", False),
        ("*/kernel", "a/b/kernel", False),
        ("a/**", "a/b/c", True),
        ("**/mlp/**", "layers/mlp/up/kernel", True),
        ("**/mlp/**", "layers/mlp", False),
        ("**/{q,v}_proj/kernel", "x/v_proj/kernel", True),
        ("**/{q,v}_proj/kernel", "x/k_proj/kernel", False),
        ("layer_[0-3]/w", "layer_2/w", True),
        ("layer_?/w", "layer_10/w", False),
        ("a.b/w", "aXb/w", False),
        (re.compile(r"q_proj|v_proj"), "x/q_proj/kernel", True),
        (re.compile(r"^q_proj"), "x/q_proj/kernel", False),
        (lambda path, leaf: leaf > 2, "w", True),
    ],
)
def test_matches(pattern, path, hit):
    assert paths.matches(pattern, path, 3) is hit


def test_a_pattern_of_another_type_is_refused():
    with pytest.raises(TypeError, match="glob"):
        paths.matches(3, "w", None)


def test_nearest_names_what_was_probably_meant():
    names = ["layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel", "norm/scale"]
    assert paths.nearest("**/q_prj/kernel", names)[0] == names[0]


def test_a_leaf_in_a_list_has_its_index_in_its_path():
    named, _ = paths.flatten({"layers": [1, 2], "head": (3,)})
    assert [path for path, _ in named] == ["head/0", "layers/0", "layers/1"]


def test_paths_must_differ():
    with pytest.raises(ValueError, match="share the path 'a/b'"):
        paths.flatten({"a/b": 1, "a": {"b": 2}})

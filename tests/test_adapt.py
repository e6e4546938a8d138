"""adapt, bind, merge, summary: what is selected, what is refused, and that nothing happens silently."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import DoRA, Full, LoRA, Offset, VeRA

KEY = jax.random.key(0)


def tree(extra=False):
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = {
        "embed": {"embedding": normal(0, 11, 6)},
        "layer_0": {"q": {"kernel": normal(1, 6, 6), "bias": normal(2, 6)}, "up": {"kernel": normal(3, 6, 8)}},
        "layer_1": {"q": {"kernel": normal(4, 6, 6), "bias": normal(5, 6)}, "up": {"kernel": normal(6, 6, 8)}},
        "lm_head": {"kernel": normal(7, 6, 11)},
    }
    return params | ({"another": {"kernel": normal(8, 6, 6)}} if extra else {})


def test_all_linear_takes_kernels_and_leaves_embeddings_biases_and_the_head():
    adapted = jlora.adapt(tree(), LoRA(2), key=KEY)
    assert set(adapted.sites) == {f"layer_{i}/{name}/kernel" for i in (0, 1) for name in ("q", "up")}


def test_rules_are_tried_in_order_and_matrices_pass_over_biases():
    rules = {"layer_0/**": LoRA(2), "**/q/kernel": DoRA(3), "**/bias": Full(), "all-linear": VeRA(4)}
    adapted = jlora.adapt(tree(), rules, key=KEY)
    got = {path: type(site.method) for path, site in adapted.sites.items()}
    assert got == {
        "layer_0/q/kernel": LoRA,
        "layer_0/up/kernel": LoRA,
        "layer_1/q/kernel": DoRA,
        "layer_0/q/bias": Full,
        "layer_1/q/bias": Full,
        "layer_1/up/kernel": VeRA,
    }
    assert set(adapted.trainable) == set(got)
    assert set(adapted.frozen) == {"vera"}


def test_regular_expressions_predicates_exclude_and_several_targets():
    by_regex = jlora.adapt(tree(), LoRA(2), re.compile(r"layer_\d/q/kernel"), key=KEY)
    by_predicate = jlora.adapt(tree(), LoRA(2), lambda path, leaf: leaf.shape == (6, 6), key=KEY)
    by_exclude = jlora.adapt(tree(), LoRA(2), exclude="**/up/**", key=KEY)
    by_list = jlora.adapt(tree(), LoRA(2), ["layer_0/q/*", "layer_1/q/*"], key=KEY)
    assert set(by_regex.sites) == set(by_predicate.sites) == set(by_exclude.sites) == set(by_list.sites)


def test_adding_a_leaf_changes_no_other_leafs_start():
    small, large = (jlora.adapt(tree(extra), LoRA(2), key=KEY) for extra in (False, True))
    assert set(large.trainable) - set(small.trainable) == {"another/kernel"}
    for path, factors in small.trainable.items():
        np.testing.assert_array_equal(factors.a, large.trainable[path].a)
    starts = [np.asarray(f.a) for f in small.trainable.values() if f.a.shape == (6, 2)]
    assert not np.array_equal(starts[0], starts[1])


def test_nothing_is_copied_and_abstract_trees_give_the_same_shapes():
    params = tree()
    adapted = jlora.adapt(params, {"all-linear": DoRA(2), "embed/**": VeRA(3)}, key=KEY)
    assert all(a is b for a, b in zip(jax.tree.leaves(adapted.base), jax.tree.leaves(params), strict=True))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    rules = {"all-linear": DoRA(2), "embed/**": VeRA(3)}
    for abstract in (
        jlora.adapt(shapes, rules, key=KEY),
        jax.eval_shape(lambda p: jlora.adapt(p, rules, key=KEY), params),
    ):
        assert jax.tree.structure(abstract) == jax.tree.structure(adapted)
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(), abstract, adapted)


@pytest.mark.parametrize(
    ("methods", "targets", "message"),
    [
        (LoRA(2), "**/q_proj/kernel", r"matches no leaf\. Nearest: \['layer_0/q/kernel'"),
        ({"**/q/kernel": LoRA(2), "layer_7/**": LoRA(2)}, None, r"layer_7/\*\*.*matches no leaf"),
        (LoRA(7), "layer_0/q/kernel", r"'layer_0/q/kernel' \(6, 6\): rank 7 is above min\(in, out\) = 6"),
        (LoRA(2), "**/bias", r"only leaves that are no weight.*layer_0/q/bias float32\[6\].*Full"),
        ({}, None, "No rules"),
        (LoRA(2), [], "No rules"),
        ({"**": LoRA(2)}, "**", "targets goes with a single method"),
        (
            {"**/kernel": LoRA(2), "**/q/kernel": DoRA(2)},
            None,
            r"\*\*/q/kernel.*DoRA.*adapts nothing.*'layer_0/q/kernel' with LoRA",
        ),
    ],
)
def test_errors_name_the_leaf_the_shape_and_the_rule(methods, targets, message):
    with pytest.raises(ValueError, match=message):
        jlora.adapt(tree(), methods, targets, key=KEY)


def test_an_exclusion_matches_something():
    with pytest.raises(ValueError, match=r"exclude: '\*\*/pu/\*\*' matches no leaf\. Nearest: \['layer_0/up/kernel'"):
        jlora.adapt(tree(), LoRA(2), exclude=["**/q/**", "**/pu/**"], key=KEY)
    jlora.adapt(tree(), LoRA(2), exclude="**/pu/**", key=KEY, allow_unmatched=True)


def test_leaves_that_are_not_of_floats():
    for method in (LoRA(2), Full()):
        with pytest.raises(ValueError, match=r"not of floats: kernel int32\[3, 3\]"):
            jlora.adapt({"kernel": jnp.ones((3, 3), jnp.int32)}, method, "kernel", key=KEY)


ADAPTED = jlora.adapt(tree(), LoRA(2), key=KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jlora.adapt(ADAPTED, LoRA(2), key=KEY), "adapted already"),
        (lambda: jlora.adapt(ADAPTED.bind(), LoRA(2), "**", key=KEY), "adapted already"),
        (lambda: jlora.adapt(LoRA(2), tree(), key=KEY), "tree of parameters comes first"),
        (lambda: jlora.adapt(tree(), LoRA, key=KEY), r"a method like LoRA\(8\)"),
        (lambda: jlora.adapt(tree(), "lora", key=KEY), "got 'lora'"),
        (lambda: jlora.adapt(tree(), LoRA(2), key=0), r"random key.*got 0"),
        (lambda: jlora.adapt(tree(), LoRA(2), axes={"**/q/kernel": (0, 1)}, key=KEY), r"jlora.Axes.*got \(0, 1\)"),
        (lambda: ADAPTED.bind(context="key"), "a dictionary.*got 'key'"),
        (lambda: jlora.lift(lambda p, x: x @ p["w"])(ADAPTED, jnp.ones(6)), r"pass adapted.bind\(\)"),
        (lambda: jlora.merge(tree()), "merge wants what jlora.adapt makes.*type dict"),
        (lambda: jlora.summary(tree()), "summary wants"),
        (lambda: jlora.to_lora(tree(), 2), "to_lora wants"),
    ],
)
def test_one_thing_in_the_place_of_another(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("trainable", [tree(), ADAPTED, KEY, {}], ids=["params", "adapted", "key", "nothing"])
def test_what_is_bound_has_the_entries_of_the_trainable_parameters(trainable):
    with pytest.raises(ValueError, match=r"adapted.trainable.*'layer_0/q/kernel'.*got"):
        ADAPTED.bind(trainable)


def test_a_name_that_is_nearly_one():
    with pytest.raises(AttributeError, match="'Lora'; did you mean LoRA?"):
        jlora.Lora  # noqa: B018


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoRA(0),
        lambda: LoRA(-3),
        lambda: LoRA(2.5),
        lambda: VeRA(0),
        lambda: LoRA(2, dropout=1.5),
        lambda: LoRA(2, dropout="0.1"),
        lambda: LoRA(2, "4"),
        lambda: LoRA(2, float("nan")),
    ],
)
def test_hyper_parameters_are_checked_where_they_are_written(make):
    with pytest.raises(ValueError, match="wanted|positive integer"):
        make()


def test_a_rule_is_a_pair_of_pattern_and_instance():
    with pytest.raises(TypeError, match="an instance like LoRA"):
        jlora.adapt(tree(), {"**": LoRA}, key=KEY)


def test_a_key_is_needed_unless_nothing_is_random():
    with pytest.raises(ValueError, match="pass key="):
        jlora.adapt(tree(), LoRA(2))
    jlora.adapt(tree(), {"**/bias": Full()})


def test_axes_that_cannot_be_known_are_an_error_that_says_how_to_say_them():
    params = {"heads": {"kernel": jnp.ones((6, 2, 3))}, "torch": {"weight": jnp.ones((3, 6))}}
    for path, why in (("heads/kernel", "3 axes"), ("torch/weight", r"\[out, in\] in some libraries")):
        with pytest.raises(ValueError, match=rf"{path}.*{why}.*fn=.*axes="):
            jlora.adapt(params, LoRA(2), path, key=KEY)
    linear = jlora.Axes((1,), (0,))
    assert (
        jlora.adapt(params, LoRA(2), "torch/*", axes={"torch/*": linear}, key=KEY).sites["torch/weight"].axes == linear
    )
    with pytest.raises(ValueError, match="axes: 'nothing' matches no leaf"):
        jlora.adapt(params, LoRA(2), "torch/*", axes={"torch/*": linear, "nothing": linear}, key=KEY)
    with pytest.raises(ValueError, match="does not fit"):
        jlora.adapt(params, LoRA(2), "heads/*", axes={"heads/*": jlora.Axes((0,), (1,))}, key=KEY)
    with pytest.raises(ValueError, match="every axis"):
        jlora.Axes((0,), (2,))


def test_groups_of_different_configuration_need_two_names():
    with pytest.raises(ValueError, match="'vera' is shared by different methods"):
        jlora.adapt(tree(), {"layer_0/**": VeRA(3), "layer_1/**": VeRA(4)}, key=KEY)
    adapted = jlora.adapt(tree(), {"layer_0/**": VeRA(3), "layer_1/**": VeRA(4, group="second")}, key=KEY)
    assert set(adapted.frozen) == {"vera", "second"}


def test_per_layer_ranks_of_a_stacked_weight():
    params = {"w": jax.random.normal(KEY, (3, 6, 5))}
    axes = {"w": jlora.Axes((1,), (2,), (0,))}
    method = LoRA(4, alpha=8, ranks=(4, 0, 2), alphas=(8, 8, 6))
    adapted = jlora.adapt(params, method, "w", axes=axes, key=KEY)
    np.testing.assert_allclose(adapted.frozen["w"]["scale"], [2, 0, 3])
    assert method.count(adapted.sites["w"]) == 6 * 11
    with pytest.raises(ValueError, match="one entry for each index"):
        jlora.adapt(params, LoRA(4, ranks=(4, 4)), "w", axes=axes, key=KEY)


def test_merge_keeps_structure_dtype_and_the_base():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
    adapted = jlora.adapt(params, {"all-linear": LoRA(2), "**/bias": Offset(0.5), "embed/*": Full()}, key=KEY)
    moved = adapted.replace(trainable=jax.tree.map(lambda x: x + 1, adapted.trainable))
    merged = jlora.merge(moved)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    assert merged["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    f = moved.trainable["layer_0/q/kernel"]
    want = params["layer_0"]["q"]["kernel"].astype(jnp.float32) + 8 * f.a @ f.b
    np.testing.assert_array_equal(merged["layer_0"]["q"]["kernel"], want.astype(jnp.bfloat16))
    np.testing.assert_allclose(merged["layer_0"]["q"]["bias"], params["layer_0"]["q"]["bias"] + 0.5, rtol=2e-2)
    jax.tree.map(np.testing.assert_array_equal, moved.base, params)


def test_merging_a_lookup_only_adapter_of_a_tied_table_is_refused():
    params = tree()
    adapted = jlora.adapt(params, LoRA(2, lookup_only=True), "embed/*", key=KEY)
    adapted = adapted.replace(trainable=jax.tree.map(jnp.ones_like, adapted.trainable))
    ids = jnp.array([1, 3])
    tied = lambda p, ids: (p["embed"]["embedding"][ids], p["embed"]["embedding"][ids] @ p["embed"]["embedding"].T)
    rows, _ = jlora.lift(tied, on_materialize="error")(adapted.bind(), ids)
    head = lambda p, x: x @ p["embed"]["embedding"].T
    np.testing.assert_allclose(jlora.lift(head)(adapted.bind(), rows), rows @ params["embed"]["embedding"].T, rtol=1e-6)
    assert not np.allclose(rows, params["embed"]["embedding"][ids])
    with pytest.raises(ValueError, match="Untie them.*allow_tied_change=True"):
        jlora.merge(adapted)
    np.testing.assert_allclose(jlora.merge(adapted, allow_tied_change=True)["embed"]["embedding"][ids], rows, rtol=1e-5)


def test_the_base_carries_no_gradient_through_an_adapted_weight():
    params = tree()
    adapted = jlora.adapt(params, LoRA(2), key=KEY)
    lifted = jlora.lift(lambda p, x: x @ p["layer_0"]["q"]["kernel"])
    loss = lambda adapted: lifted(adapted.bind(), jnp.ones((2, 6))).sum()
    grads = jax.grad(loss)(adapted)
    assert not np.any(grads.base["layer_0"]["q"]["kernel"]) and np.any(grads.trainable["layer_0/q/kernel"].b)


def test_summary_shows_what_is_adapted_and_what_is_not():
    text = jlora.summary(jlora.adapt(tree(), {"all-linear": DoRA(2, alpha=3), "**/bias": Full()}, key=KEY))
    row = next(line for line in text.splitlines() if line.startswith("layer_0/up/kernel"))
    assert row.split() == ["layer_0/up/kernel", "6x8", "|0|1", "DoRA", "2", "1.5", "36", "float32", "25.0%"]
    assert "trainable 144 beside" in text
    assert "not adapted (2): embed/embedding [11x6], lm_head/kernel [6x11]" in text

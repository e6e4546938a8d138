"""Directories that PEFT wrote: read onto three kinds of trees, compared with numpy's idea of the formulas and with
PEFT's logits, and written again.

Which directories there are is found out by looking (``JLORA_ORACLES``, default ``../shared/oracles``); everything about
one is read from its own files.
"""

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora import paths
from jlora.io import load_peft, matching, save_peft
from jlora.io.formats import FORMATS
from jlora.torch_random import kaiming_uniform, randperm
from jlora.train import models

ORACLES = recorded.DIRECTORY
ROOT = ORACLES / "peft_dirs"


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


# Options that have no counterpart in jlora.
FOREIGN = ("layer_replication use_qalora arrow_config megatron_config").split()
DRAWN_AGAIN = ("VERA", "PVERA")  # their projections follow from a seed here as well
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def refused(config: dict) -> str | None:
    """Part of the message with which a directory has to be refused."""
    if str(config.get("init_lora_weights")).startswith(CHANGED_BASE):
        return "init_lora_weights"
    if config.get("save_projection") is False and config["peft_type"] not in DRAWN_AGAIN:
        return "save_projection"
    return next((field for field in FOREIGN if config.get(field)), None)


EVERY = sorted(path.parent.name for path in ROOT.glob("*/adapter_config.json"))
KNOWN = [name for name in EVERY if config_of(ROOT / name)["peft_type"] in FORMATS]
READ = [name for name in KNOWN if not refused(config_of(ROOT / name))]
DRAWN = [name for name in READ if config_of(ROOT / name).get("save_projection") is False]


# Refusals of what is read in part: values of an option, and what follows from PyTorch's order or random numbers.
LIMITS = re.compile(
    "one for each or one for all is read|where one of .* is read|'full' is read|not known here|has first is not known|"
    "; known are "
)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A skip with the refusal, where it is one of these."""
    try:
        yield
    except ValueError as error:
        if not LIMITS.search(str(error)):
            raise
        pytest.skip(f"load_peft refuses it: {error}")


def directories(names: list[str]) -> pytest.MarkDecorator:
    none = pytest.mark.skip(reason=f"no such adapters under {ROOT} (JLORA_ORACLES)")
    return pytest.mark.parametrize("name", names or [pytest.param(None, id="absent", marks=none)])


# The bases.


@functools.cache
def torch_base(base: str) -> dict[str, np.ndarray]:
    """The base's parameters by their names in PyTorch's memory. Those that the file calls otherwise are made up."""
    shapes = json.loads((ROOT / base / "module_names.json").read_text())
    stored = load_file(ROOT / base / "model.safetensors")
    rng = np.random.default_rng(0)
    fill = lambda name, shape: stored[name] if name in stored else rng.normal(size=shape).astype("f")
    return {name: fill(name, shape) for name, shape in shapes.items()}


def conv1d(base: str, name: str, array: np.ndarray) -> bool:
    """Whether a weight is one of GPT-2's, which are [in, out]."""
    model_type = json.loads((ROOT / base / "config.json").read_text())["model_type"]
    return model_type == "gpt2" and array.ndim == 2 and ".h." in name


def is_table(name: str) -> bool:
    return re.search(r"(embed_tokens|wte|wpe|_embeddings)\.weight$", name) is not None


def nested_tree(base: str) -> dict:
    """The tree of an unstacked Flax model that keeps PyTorch's module names."""
    tree: dict = {}
    for name, array in torch_base(base).items():
        *modules, last = name.split(".")
        if last == "weight" and array.ndim > 1:
            last = "embedding" if is_table(name) else "kernel"
            if array.ndim == 4:
                array = array.transpose(2, 3, 1, 0)
            elif last == "kernel" and not conv1d(base, name, array):
                array = array.T
        elif last == "weight":
            last = "scale"
        elif array.ndim == 3 and "experts" in name:
            array = array.transpose(0, 2, 1)
        at = tree
        for module in modules:
            at = at.setdefault(module, {})
        at[last] = jnp.asarray(array)
    return tree


def flat_tree(base: str) -> dict:
    return {name: jnp.asarray(array) for name, array in torch_base(base).items()}


@functools.cache
def stacked_model(base: str) -> models.LoadedModel | None:
    kind = json.loads((ROOT / base / "config.json").read_text())["model_type"]
    return models.load(ROOT / base) if kind in models.FAMILIES else None


def load(name: str, kind: str) -> jlora.Adapted:
    config = config_of(ROOT / name)
    base = config["base_model_name_or_path"]
    if kind == "nested":
        with limits():
            return load_peft(ROOT / name, nested_tree(base))
    if kind == "flat":
        linear = jlora.Axes((0,), (1,)) if config.get("fan_in_fan_out") else jlora.Axes((1,), (0,))
        with limits():
            return load_peft(ROOT / name, flat_tree(base), axes={"*.weight": linear})
    model = stacked_model(base)
    if model is None:
        pytest.skip(f"{base} has no Flax model here")
    with limits():
        return load_peft(ROOT / name, model.params)


# What the file means, in numpy and PyTorch's layout.


def loha(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    pair = lambda i: get(f"hada_w{i}_a") @ get(f"hada_w{i}_b")
    return w + config["alpha"] / config["r"] * pair(1) * pair(2)


def miss(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    block, (n_out, n_in), r = get("miss_block"), w.shape, config["r"]
    if config["init_weights"] == "bat":
        blocks = w.reshape(n_out // r, r, n_in // r, r)
        return w + (np.einsum("orik,oks->oris", blocks, block) + block[:, :, None]).reshape(w.shape)
    return w + np.tile(block, (-(-n_in // r), n_out // block.shape[1]))[:n_in].T


def oft(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    entries, size = get("oft_R.weight"), config["oft_block_size"]
    rotation = np.zeros((w.shape[1], w.shape[1]))
    for i, entry in enumerate(entries):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = entry
        q, eye, at = q - q.T, np.eye(size), slice(i * size, (i + 1) * size)
        rotation[at, at] = (eye - q) @ np.linalg.inv(eye + q)
    return w @ rotation.T


def hra(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    for u in get("hra_u").T:
        w = w - 2 * np.outer(w @ u, u) / (u @ u)
    return w


def adalora(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    return w + config["lora_alpha"] / (config["init_r"] + 1e-5) * get("lora_B") @ (get("lora_E") * get("lora_A"))


def shira(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    w = w.copy()
    np.add.at(w, tuple(get("shira_indices")), get("shira_weight"))
    return w


def mixed(
    vectors: np.ndarray, logits: np.ndarray | None, places: np.ndarray | None, weights: np.ndarray | None, k: int
):
    """VB-LoRA's pieces, of a file with all logits or with what was kept of them."""
    if logits is not None:
        places = np.argsort(-logits, axis=-1)[..., :k]
        weights = np.exp(np.take_along_axis(logits, places, -1).astype(np.float64))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
    return np.einsum("...k,...kv->...v", weights, vectors[places])


def vblora(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    parts = lambda name: [get(f"vblora_logits_{name}{end}") for end in ("", "_topk_indices", "_topk_weights")]
    a, b = (mixed(get("vblora_vector_bank"), *parts(name), config["topk"]) for name in "AB")
    return w + np.einsum("nrv,ri->nvi", b, a.reshape(len(a), -1)).reshape(w.shape)


def unilora(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    a, b = (get("unilora_theta_d")[get(f"unilora_indices_{n}")] * get(f"unilora_scales_{n}") for n in "AB")
    return w + b @ a


def randlora(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    weights, gains, (small, large) = get("randlora_lambda"), get("randlora_gamma"), sorted(w.shape)
    u = np.einsum("rn,ri,ni->rni", weights, get("randlora_A")[:, 0, :small], gains).reshape(-1, small)
    v = get("randlora_B")[:large, : len(gains)].reshape(large, -1)
    delta = config["randlora_alpha"] / config["r"] * v @ u
    return w + (delta if w.shape == delta.shape else delta.T)


def lokr(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    whole = lambda name: get(name) if get(name) is not None else get(f"{name}_a") @ get(f"{name}_b")
    return w + config["alpha"] / config["r"] * np.kron(whole("lokr_w1"), whole("lokr_w2"))


def fourierft(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    spectrum = np.zeros(w.size)
    spectrum[randperm(w.size, config["n_frequency"], config["random_loc_seed"])] = get("fourierft_spectrum")
    return w + config["scaling"] * np.fft.ifft2(spectrum.reshape(w.shape)).real


def ia3(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    return w * (get("ia3_l").T if config["fan_in_fan_out"] else get("ia3_l"))


def hira(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    return w + w * (get("hira_B") @ get("hira_A"))


def vera(w: np.ndarray, get: Callable, config: dict) -> np.ndarray:
    n_out, n_in = w.T.shape if config["fan_in_fan_out"] else w.shape
    a, b = get("vera_A")[:, :n_in], get("vera_B")[:n_out]
    delta = get("vera_lambda_b")[:, None] * b @ (get("vera_lambda_d")[:, None] * a)
    return w + (delta.T if config["fan_in_fan_out"] else delta)


# New weight from (old one in PyTorch's layout, tensor of the module by suffix, config), by a suffix that tells the type
FORMULAS: dict[str, Callable] = {
    "fourierft_spectrum": fourierft,
    "vblora_logits_A": vblora,
    "vblora_logits_A_topk_indices": vblora,
    "unilora_indices_A": unilora,
    "randlora_lambda": randlora,
    "shira_weight": shira,
    "lora_E": adalora,
    "ia3_l": ia3,
    "oft_R.weight": oft,
    "hra_u": hra,
    "miss_block": miss,
    "hada_w1_a": loha,
    "lokr_w1": lokr,
    "lokr_w1_a": lokr,
    "hira_A": hira,
    "vera_lambda_d": vera,
}
FACTORS = r"(.+)\.(lora_A\.weight|lora_embedding_A)"
TOKENS = r"(.+?)(\.token_adapter)?\.trainable_tokens_delta"
LAYERS = ".ln_tuning_layers."


def written_out(name: str) -> bool:
    """Whether there is a formula here. Of other types, PEFT's logits are compared."""
    formulas = tuple(f".{suffix}" for suffix in FORMULAS)
    known = lambda key: key.endswith(formulas) or re.fullmatch(FACTORS, key) or re.fullmatch(TOKENS, key)
    return any(known(key) or LAYERS in key for key in tensors_of(name))


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """What is in the file; and where it leaves out what PyTorch drew, what another file has from that seed and rank."""
    tensors, config = load_file(ROOT / name / "adapter_model.safetensors"), config_of(ROOT / name)
    if name in DRAWN:
        alike = lambda other: all(
            config_of(ROOT / other).get(field) == config[field] for field in ("peft_type", "projection_prng_key", "r")
        )
        other = next((other for other in READ if other not in DRAWN and alike(other)), None)
        if other is None:
            pytest.skip(f"no other file has the projections of {name}")
        found = load_file(ROOT / other / "adapter_model.safetensors")
        tensors |= {key: value for key, value in found.items() if key.startswith("base_model.vera_")}
    return tensors


def effective(name: str) -> dict[str, np.ndarray]:
    """Every parameter that the adapter changes, as it is when merged."""
    config = config_of(ROOT / name)
    base = dict(torch_base(config["base_model_name_or_path"]))
    raw = tensors_of(name)
    raw = {re.sub(r"^base_model\.(model\.)?", "", key): value for key, value in raw.items()}
    out = {}
    for key, value in raw.items():
        plain = key.replace(".base_layer", "").replace(LAYERS, ".")
        if plain in base:
            out[plain] = base[plain] = value
    for key in raw:
        if tokens := re.fullmatch(TOKENS, key):
            table = f"{tokens[1]}.weight"
            at = config["trainable_token_indices" if tokens[2] else "token_indices"]
            if isinstance(at, dict):
                at = next(places for module, places in at.items() if f".{tokens[1]}".endswith(f".{module}"))
            out[table] = base[table].copy()
            out[table][at] = raw[key]
            continue
        suffix = next((suffix for suffix in FORMULAS if key.endswith(f".{suffix}")), None)
        if suffix is not None:
            module = key.removesuffix(f".{suffix}")
            get = lambda suffix, module=module: raw.get(f"{module}.{suffix}", raw.get(suffix))
            of = {"r": "rank_pattern", "alpha": "alpha_pattern"}
            own = {f: matching.by_pattern(config.get(p), module, config[f]) for f, p in of.items() if f in config}
            out[f"{module}.weight"] = FORMULAS[suffix](base[f"{module}.weight"], get, config | own)
            if suffix == "ia3_l" and raw[key].shape[1] == 1 and f"{module}.bias" in base:
                out[f"{module}.bias"] = base[f"{module}.bias"] * raw[key][:, 0]
            continue
        match = re.fullmatch(FACTORS, key)
        if not match:
            continue
        module = match[1]
        get = lambda suffix, module=module: raw.get(f"{module}.{suffix}")
        target, w, a, b = parameter(module, raw, base, config)
        # The keys of patterns are for the names of modules or, where a stack is adapted, of parameters.
        r, alpha = (
            matching.by_pattern(config[pattern], target if w.ndim == 3 else module, config[field])
            for pattern, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        s = alpha / (r**0.5 if config["use_rslora"] else r)
        if match[2] == "lora_embedding_A":
            delta = (get("lora_embedding_B") @ get("lora_embedding_A")).T
        elif w.ndim == 4:
            delta = np.einsum("orxy,rihw->oihw", b, a)
        elif w.ndim == 3:
            delta = np.einsum("ore,eri->eoi", b.reshape(len(b), r, -1), a.reshape(-1, r, a.shape[1]))
        else:
            delta = (b @ a).T if config["fan_in_fan_out"] else b @ a
        w = w + s * delta
        if config["use_dora"]:
            table = match[2] == "lora_embedding_A"
            axis = 0 if config["fan_in_fan_out"] or table else tuple(range(1, w.ndim))
            norm = np.sqrt(np.sum(w**2, axis=axis, keepdims=True))
            w = w * get("lora_magnitude_vector").reshape(norm.shape) / norm
        out[target] = w
        if get("lora_B.bias") is not None:
            out[module + ".bias"] = base[module + ".bias"] + s * get("lora_B.bias")
    return out


def parameter(module: str, raw: dict, base: dict, config: dict) -> tuple:
    """(name, value, A, B) of what the pair of a module adapts."""
    a, b = raw.get(f"{module}.lora_A.weight"), raw.get(f"{module}.lora_B.weight")
    if f"{module}.weight" in base:
        return f"{module}.weight", base[f"{module}.weight"], a, b
    stem = module.removesuffix(".base_layer")
    for name, value in base.items():
        if name.startswith(stem + ".") and value.shape[1:] == (b.shape[0], a.shape[1]):
            return name, value, a, b
    raise AssertionError(f"{module} adapts nothing")


@pytest.mark.parametrize("kind", ["nested", "flat"])
@directories(READ)
def test_weights_are_what_the_file_means(name, kind):
    if not written_out(name):
        pytest.skip("no formula of its type is here: its logits are compared")
    adapted = load(name, kind)
    base = config_of(ROOT / name)["base_model_name_or_path"]
    with jax.disable_jit():
        merged = jlora.merge(adapted, allow_tied_change=True)
    merged = dict(paths.flatten(merged)[0])
    wanted = torch_base(base) | effective(name)
    assert effective(name), "the directory changes nothing"
    for full, value in wanted.items():
        *modules, last = full.split(".")
        if kind == "flat":
            found = merged[full]
        else:
            at = "/".join(modules)
            leaf = next(leaf for leaf in (last, "kernel", "embedding", "scale") if f"{at}/{leaf}" in merged)
            found = np.asarray(merged[f"{at}/{leaf}"])
            if leaf == "kernel":
                turned = conv1d(base, full, value)
                found = found.transpose(3, 2, 0, 1) if found.ndim == 4 else found if turned else found.T
            elif found.ndim == 3 and "experts" in full:
                found = found.transpose(0, 2, 1)
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-5, err_msg=full)


@directories([name for name in READ if (ROOT / name / "io.npz").exists()])
def test_logits_are_pefts(name, recorded_inputs, same_logits):
    adapted = load(name, "stacked")
    model = stacked_model(config_of(ROOT / name)["base_model_name_or_path"])
    with np.load(ROOT / name / "io.npz") as arrays:
        io = dict(arrays)
    if config_of(ROOT / name)["peft_type"] == "LILY" and not io["attention_mask"].all():
        pytest.skip("its router averages over all tokens, and PEFT's hidden states of padding are not ours")
    apply = jlora.lift(model.module.apply, on_materialize="error")
    logits = apply({"params": adapted.bind()}, **recorded_inputs(io))
    same_logits(logits, io["logits_adapter"], io)
    with pytest.raises(AssertionError):
        same_logits(logits, io["logits_base"], io, atol=1e-2)


@pytest.mark.parametrize("kind", ["nested", "flat", "stacked"])
@directories(READ)
def test_round_trip(name, kind, tmp_path):
    adapted = load(name, kind)
    before = config_of(ROOT / name)
    if not FORMATS[before["peft_type"]].methods:
        pytest.skip(f"{before['peft_type']} is read, not written")
    save_peft(
        adapted,
        tmp_path / "out",
        base_model_name_or_path=before["base_model_name_or_path"],
        task_type=before["task_type"],
    )
    same_tensors(load_file(tmp_path / "out" / "adapter_model.safetensors"), tensors_of(name))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    same_meaning(before, config_of(tmp_path / "out"), kind)


def same_meaning(before: dict, after: dict, kind: str) -> None:
    """Whether two configs select the same modules of the base and say the same about each."""
    base = torch_base(before["base_model_name_or_path"])
    modules = {name.rpartition(".")[0] for name in base}
    matrices = {name.rpartition(".")[0] for name, array in base.items() if name.endswith(".weight") and array.ndim > 1}
    assert matching.targeted(after, modules) == matching.targeted(after, matrices)
    assert matching.saved(after, modules) == matching.saved(before, modules)
    # A matrix may be chosen by its module or as a parameter: it is the same adapter, by the same names.
    parameters = lambda config: {n: n for n in base if matching.target_parameter(config, n) is not None}
    adapted = lambda config: {f"{n}.weight": n for n in matching.targeted(config, matrices)} | parameters(config)
    assert adapted(after).keys() == adapted(before).keys()
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
        for name in adapted(before):
            value = lambda config, p=pattern, d=default, n=name: matching.by_pattern(
                config.get(p), adapted(config)[n], config.get(d)
            )
            assert value(after) == value(before), (pattern, name)
    if any(name.endswith(".bias") for name in base):  # else whichever of them are trained, there are none
        assert after.get("bias") == before.get("bias")
    for key in ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "d_initial", "use_dora"):
        assert after.get(key) == before.get(key), key
    for key in ("use_rslora", "lora_bias", "lora_dropout", "vera_dropout", "init_lora_weights"):
        assert after.get(key, False) == before.get(key, False), key
    assert after.get("save_projection") in (before.get("save_projection"), True)
    if kind == "flat":  # elsewhere PyTorch's layout is not to be seen
        assert after.get("fan_in_fan_out", False) == before.get("fan_in_fan_out", False)


@directories(DRAWN)
def test_projections_that_are_not_in_the_file(name, tmp_path):
    """They are those that PyTorch drew, to the bit; but half of them is a damaged file."""
    save_peft(load(name, "nested"), tmp_path)
    tensors, wanted = load_file(tmp_path / "adapter_model.safetensors"), tensors_of(name)
    drawn = wanted.keys() - load_file(ROOT / name / "adapter_model.safetensors").keys()
    assert len(drawn) == 2
    for key in drawn:
        np.testing.assert_array_equal(tensors[key], wanted[key])
    save_file(
        {key: value for key, value in tensors.items() if "vera_B" not in key}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks the shared projections \['vera_B'\].*fetch it again"):
        load_peft(tmp_path, nested_tree(config_of(ROOT / name)["base_model_name_or_path"]))


@pytest.mark.parametrize("case", recorded.cases("pvera.npz"))
def test_drawn_as_pytorch_draws(case):
    z = recorded.arrays("pvera.npz", case)
    kept = "adapter" if "adapter/base_model.pvera_A" in z else "frozen"
    wanted = [z[f"{kept}/base_model.pvera_{name}"] for name in "AB"]
    seed = json.loads(str(z["config_json"]))["projection_prng_key"]
    for got, drawn in zip(kaiming_uniform([a.shape for a in wanted], seed), wanted, strict=True):
        np.testing.assert_array_equal(got, drawn)


@directories(sorted(set(KNOWN) - set(READ)))
def test_refused(name):
    with pytest.raises(ValueError, match=refused(config_of(ROOT / name))):
        load(name, "nested")


@directories(sorted(set(EVERY) - set(KNOWN)))
def test_other_types_are_refused_by_name(name):
    with pytest.raises(ValueError, match=config_of(ROOT / name)["peft_type"]):
        load_peft(ROOT / name, {})


@directories(READ[:3])
def test_adapter_of_another_model(name):
    for base in sorted({config_of(ROOT / other)["base_model_name_or_path"] for other in READ}):
        if effective(name).keys() & torch_base(base).keys():
            continue
        with pytest.raises(ValueError, match=r"does not fit(.|\n)*no such leaf"):
            load_peft(ROOT / name, nested_tree(base))


# Single layers, recorded with PEFT's merged weights: convolutions, tables, GPT-2's layers, experts, every bias option.


def cases() -> list[tuple[str, str]]:
    found = []
    for path in sorted(ORACLES.glob("*.npz")):
        with np.load(path) as z:
            for key in z.files:
                case, _, last = key.rpartition("/")
                if last != "config_json" or f"{case}/meta_json" not in z.files:
                    continue
                if json.loads(str(z[key])).get("peft_type") in FORMATS:
                    found.append((path.name, case))
    return found


@pytest.mark.parametrize(("file", "case"), cases())
def test_recorded_layers(file, case, tmp_path, x64):
    with np.load(ORACLES / file) as z:
        kinds = {key: key.removeprefix(f"{case}/").partition("/") for key in z.files if key.startswith(f"{case}/")}
        part = lambda kind: {name: z[key] for key, (first, _, name) in kinds.items() if first == kind and name}
        config, meta = (json.loads(str(z[f"{case}/{name}_json"])) for name in ("config", "meta"))
        base, tensors, merged = part("base") | part("base_after_init"), part("adapter"), part("merged")
    if not merged or part_of_a_file(tensors):
        pytest.skip("no merged weights, or no file, were recorded")
    for package in FORMATS[config["peft_type"]].needs:
        pytest.importorskip(package, reason=f"{config['peft_type']} files want {package}")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    linear = jlora.Axes((0,), (1,)) if config.get("fan_in_fan_out") else jlora.Axes((1,), (0,))
    # PEFT takes the last axis of a stack as the inputs, and the middle one as the outputs.
    stacks = {name: jlora.Axes((2,), (1,), stack=(0,)) for name, w in base.items() if w.ndim == 3}
    read = functools.partial(load_peft, tmp_path, jax.tree.map(jnp.asarray, base), axes={"*.weight": linear} | stacks)
    if refused(config):
        with pytest.raises(ValueError, match=refused(config)):
            read()
        return
    with limits():
        adapted = read()
    with jax.disable_jit():
        found = jlora.merge(adapted, allow_tied_change=True)
    exact = meta["dtype"] != "float32"
    # LoHa keeps its scale in float32, FRoD its U, C3A and FourierFT transform in it, DEFT projects in it.
    rounded = {"LOHA": 1e-7, "C3A": 1e-6, "FOURIERFT": 1e-6, "DEFT": 1e-6, "FROD": 1e-6}
    rounded["LORA"] = 1e-6 if config.get("kasa_config") else 1e-10  # KaSA truncates the base in float32
    tolerance = rounded.get(config["peft_type"], 1e-10) if exact else 1e-6
    for name, value in (base | merged).items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    if not FORMATS[config["peft_type"]].methods:
        return  # read only
    save_peft(adapted, tmp_path / "again", dtype=np.result_type(*(v for v in tensors.values() if v.dtype.kind == "f")))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    if config.get("save_projection") is False:
        again = {key: value for key, value in again.items() if key in tensors}
    same_tensors(again, tensors)


def same_tensors(got: dict, wanted: dict) -> None:
    # Copies of what is shared by the model, and what follows from a seed: one side may do without them.
    optional = re.compile(r"base_model\.model\..*\.(randlora_[AB]|unilora_(indices|scales)_[AB])$")
    assert all(optional.match(key) for key in got.keys() ^ wanted.keys()), got.keys() ^ wanted.keys()
    for key in got.keys() & wanted.keys():
        same_tensor(got[key], wanted[key], key)


def same_tensor(got: np.ndarray, wanted: np.ndarray, key: str) -> None:
    if key.endswith("_topk_weights"):  # kept here as logits
        np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=key)
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=key)


def part_of_a_file(tensors: dict) -> bool:
    return not any(key.startswith("base_model.") for key in tensors)

"""jlora against numbers that PEFT computed, on the tiny models of the oracle directory.

The directory is ``JLORA_ORACLES`` (default ``../shared/oracles``). Every case in it whose adapter type jlora has is
run; everything about a case (model, shapes, ranks, scales, modules) is read from its arrays and its configuration.
A case that needs something jlora does not do is skipped by the name of that thing.

Parameters stay in PyTorch's layout here, weights [out, in] and OIHW, with ``Axes`` saying so. The tensors of an adapter
are mapped to jlora's by a differentiable function, so gradients come out under PEFT's names and in its layout.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapt import build
from jlora.methods import Site

DIRECTORY = pathlib.Path(os.environ.get("JLORA_ORACLES", pathlib.Path(__file__).parents[2] / "shared" / "oracles"))
TOLERANCE = {"float64": 1e-10, "float32": 1e-6}  # relative to the largest number of an array, absolute below 1

pytestmark = pytest.mark.usefixtures("x64", "unoptimized")


# What jlora supports, decided from the configuration alone.

NEUTRAL = {  # fields that choose modules, or say how the tensors came to their values; those are recorded
    "peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping",
    "target_modules target_parameters exclude_modules modules_to_save layers_to_transform layers_pattern",
    "init_lora_weights init_weights eva_config corda_config lora_ga_config loftq_config d_initial",
    "projection_prng_key save_projection megatron_core qalora_group_size lora_dropout vera_dropout",
}
USED = {  # fields that the mapping below honours
    "LORA": "r lora_alpha use_rslora use_dora rank_pattern alpha_pattern bias lora_bias fan_in_fan_out",
    "VERA": "r bias fan_in_fan_out",
}


def unsupported(config: dict, meta: dict) -> str | None:
    """The first option with a value that means something and that jlora has no counterpart for."""
    known = {name for line in (*NEUTRAL, USED[config["peft_type"]]) for name in line.split()}
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            return name
    if meta.get("model") not in MODELS:
        return f"model {meta.get('model')!r}"
    return None


def discover() -> Iterator[Any]:
    if not DIRECTORY.is_dir():
        reason = f"no directory {DIRECTORY}: set JLORA_ORACLES"
        yield pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))
        return
    for file in sorted(DIRECTORY.glob("*.npz")):
        with np.load(file) as arrays:
            for key in sorted(arrays.files):
                case, _, name = key.partition("/")
                if name != "config_json":
                    continue
                config = json.loads(str(arrays[key]))
                if config.get("peft_type") not in USED:
                    continue
                meta = json.loads(str(arrays[f"{case}/meta_json"])) if f"{case}/meta_json" in arrays.files else {}
                feature = unsupported(config, meta)
                marks = [pytest.mark.skip(reason=f"not supported: {feature}")] if feature else []
                yield pytest.param((file, case), id=f"{file.stem}-{case}", marks=marks)


# The models, as plain functions of a tree {module: {"weight", "bias"}}.


def linear(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["weight"].T + p.get("bias", 0.0)


def conv1d(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["weight"] + p.get("bias", 0.0)


def conv(p: dict, x: jax.Array, stride: Any = 1, pad: Any = 0, dil: Any = 1) -> jax.Array:
    pair = lambda v: (v, v) if isinstance(v, int) else tuple(v)
    y = jax.lax.conv_general_dilated(
        x,
        p["weight"],
        window_strides=pair(stride),
        padding=[(n, n) for n in pair(pad)],
        rhs_dilation=pair(dil),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=x.shape[1] // p["weight"].shape[1],
    )
    return y + jnp.reshape(p["bias"], (-1, 1, 1)) if "bias" in p else y


def layernorm(p: dict, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def mlp_model(p: dict, x: jax.Array, dims: dict) -> jax.Array:
    return linear(p["lin1"], jnp.tanh(linear(p["lin0"], x)))


def ln_model(p: dict, x: jax.Array, dims: dict) -> jax.Array:
    return linear(p["lin1"], layernorm(p["norm"], jnp.tanh(linear(p["lin0"], x))))


def emb_model(p: dict, ids: jax.Array, dims: dict) -> jax.Array:
    return linear(p["lin"], p["emb"]["weight"][ids])


def conv_model(p: dict, x: jax.Array, dims: dict) -> jax.Array:
    window = {name: dims[name] for name in ("stride", "pad", "dil") if name in dims}
    return conv(p["head"], jnp.tanh(conv(p["conv"], x, **window)))


def hfconv1d_model(p: dict, x: jax.Array, dims: dict) -> jax.Array:
    return conv1d(p["lin1"], jnp.tanh(conv1d(p["lin0"], x)))


def experts_model(p: dict, x: jax.Array, dims: dict) -> jax.Array:
    return jnp.einsum("bi,eio->beo", x, p["exp"]["w"])


MODELS: dict[str, Callable] = {
    "mlp": mlp_model,
    "ln": ln_model,
    "emb": emb_model,
    "conv": conv_model,
    "hfconv1d": hfconv1d_model,
    "experts": experts_model,
}


def axes_of(path: str, weight: np.ndarray, model: str) -> jlora.Axes:
    if weight.ndim == 3:  # PEFT takes the last axis of a stack as the inputs and the middle one as the outputs
        return jlora.Axes(inputs=(2,), outputs=(1,), stack=(0,))
    if path.startswith("emb/"):
        return jlora.Axes((0,), (1,), kind="embedding")
    if weight.ndim == 4:
        return jlora.Axes((1, 2, 3), (0,), kind="conv")
    return jlora.Axes((0,), (1,)) if model == "hfconv1d" else jlora.Axes((1,), (0,))


# The adapter: PEFT's tensors to jlora's.


def canonical(name: str) -> str:
    """One name for a tensor, whether on disk, in memory, or below ``grad/``: ``lin0.lora_A``, ``lin0.bias``."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    return re.sub(r"(lora_[AB]|lora_magnitude_vector)\.weight$", r"\1", name)


def first_match(patterns: dict, module: str, default: Any) -> Any:
    """PEFT's reading of ``rank_pattern`` and ``alpha_pattern``."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def factors(tensors: dict, module: str, weight: np.ndarray, scale: float) -> jlora.Factors:
    if f"{module}.lora_embedding_A" in tensors:
        return jlora.Factors(tensors[f"{module}.lora_embedding_A"].T, tensors[f"{module}.lora_embedding_B"].T, scale)
    a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
    if weight.ndim == 3:  # rows of A expert by expert, columns of B rank by rank
        n = weight.shape[0]
        a, b = a.reshape(n, -1, a.shape[1]), b.reshape(b.shape[0], -1, n)
        return jlora.Factors(a.transpose(0, 2, 1), b.transpose(2, 1, 0), scale)
    return jlora.Factors(a.reshape(a.shape[0], -1).T, b.reshape(b.shape[0], -1).T, scale)


@dataclasses.dataclass
class Case:
    """One recorded case: its arrays, and jlora's adapter for it."""

    z: dict[str, np.ndarray]

    @functools.cached_property
    def config(self) -> dict:
        return json.loads(str(self.z["config_json"]))

    @functools.cached_property
    def meta(self) -> dict:
        return json.loads(str(self.z["meta_json"]))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): v for key, v in self.z.items() if key.startswith(prefix)}

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        return {canonical(name): v for name, v in self.group(prefix).items()}

    def tree(self, flat: dict[str, np.ndarray]) -> dict:
        out: dict[str, dict] = {}
        for name, value in flat.items():
            module, _, leaf = name.rpartition(".")
            out.setdefault(module, {})[leaf] = jnp.asarray(value)
        return out

    @functools.cached_property
    def flat_base(self) -> dict[str, np.ndarray]:
        return self.group("base/") | self.group("base_after_init/")

    @functools.cached_property
    def base(self) -> dict:
        return self.tree(self.flat_base)

    @property
    def model(self) -> Callable:
        return functools.partial(MODELS[self.meta["model"]], dims=self.meta["dims"])

    def scale(self, module: str) -> float:
        c = self.config
        r = first_match(c.get("rank_pattern") or {}, module, c["r"])
        alpha = first_match(c.get("alpha_pattern") or {}, module, c["lora_alpha"])
        return alpha / r**0.5 if c.get("use_rslora") else alpha / r

    @functools.cached_property
    def methods(self) -> dict[str, jlora.methods.Method]:
        """path -> method. The tensors tell which modules are adapted, the configuration how."""
        c, methods = self.config, {}
        for name in self.tensors("adapter/"):
            module, _, leaf = name.rpartition(".")
            weight = f"{module}/{next((n for n in self.base.get(module, {}) if n != 'bias'), None)}"
            if leaf in ("lora_A", "lora_embedding_A"):
                r = first_match(c.get("rank_pattern") or {}, module, c["r"])
                alpha = first_match(c.get("alpha_pattern") or {}, module, c["lora_alpha"])
                cls = jlora.DoRA if c.get("use_dora") else jlora.LoRA
                methods[weight] = cls(r, alpha, rslora=bool(c.get("use_rslora")))
            elif leaf == "vera_lambda_d":
                methods[weight] = jlora.VeRA(c["r"])
            elif name.endswith("lora_B.bias"):
                module = module.removesuffix(".lora_B")
                methods[f"{module}/bias"] = jlora.Offset(scale=self.scale(module))
            elif leaf in self.base.get(module, {}):
                methods[f"{module}/{leaf}"] = jlora.Full()
        return methods

    def weight(self, path: str) -> Any:
        module, _, leaf = path.rpartition("/")
        return self.base[module][leaf]

    def adapt(self) -> jlora.Adapted:
        """By ``build``, as an importer does: PEFT allows ranks above min(in, out), which ``adapt`` refuses."""
        sites = {}
        for path, method in self.methods.items():
            w = self.weight(path)
            axes = None if method.whole_leaf else axes_of(path, w, self.meta["model"])
            sites[path] = Site(method, axes, w.shape)
        adapted = build(self.base, sites, key=jax.random.key(0), param_dtype=self.dtype)
        if "vera" in adapted.frozen:
            tensors = self.tensors("adapter/") | {
                name.rpartition(".")[2]: v for name, v in self.group("frozen/").items() if "vera_" in name
            }
            shared = {"a": jnp.asarray(tensors["vera_A"]).T, "b": jnp.asarray(tensors["vera_B"]).T}
            assert jax.tree.map(jnp.shape, shared) == jax.tree.map(jnp.shape, adapted.frozen["vera"])
            adapted = adapted.replace(frozen={"vera": shared})
        return adapted

    def trainable(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """PEFT's tensors, under their canonical names, as the ``trainable`` of ``adapt``'s result."""
        out: dict[str, Any] = {}
        for path, method in self.methods.items():
            module, _, leaf = path.rpartition("/")
            if isinstance(method, jlora.Full):
                out[path] = tensors[f"{module}.{leaf}"]
            elif isinstance(method, jlora.Offset):
                out[path] = {"delta": tensors[f"{module}.lora_B.bias"]}
            elif isinstance(method, jlora.VeRA):
                out[path] = {"d": tensors[f"{module}.vera_lambda_d"], "b": tensors[f"{module}.vera_lambda_b"]}
            else:
                pair = factors(tensors, module, self.weight(path), self.scale(module))
                magnitude = f"{module}.lora_magnitude_vector"
                out[path] = (
                    {"factors": pair, "magnitude": tensors[magnitude].reshape(-1)}
                    if isinstance(method, jlora.DoRA)
                    else pair
                )
        return out

    @property
    def dtype(self) -> str:
        return self.meta["dtype"]

    def close(self, got: Any, wanted: np.ndarray, what: str) -> None:
        got = np.asarray(got)
        assert got.shape == wanted.shape, f"{what}: shape {got.shape}, recorded {wanted.shape}"
        bound = TOLERANCE[self.dtype] * max(1.0, float(np.abs(wanted).max(initial=0.0)))
        error = float(np.abs(got - wanted).max(initial=0.0))
        assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


@pytest.fixture(scope="module")
def load() -> Callable[[tuple], Case]:
    def load(where: tuple[pathlib.Path, str]) -> Case:
        file, name = where
        with np.load(file) as arrays:
            return Case({k.partition("/")[2]: arrays[k] for k in arrays.files if k.startswith(f"{name}/")})

    return load


CASES = list(discover())


@pytest.mark.parametrize("where", CASES)
def test_case(where: tuple[pathlib.Path, str], load: Callable) -> None:
    case = load(where)
    adapted, model = case.adapt(), case.model
    lifted = jlora.lift(model, on_materialize="error")
    x, z = jnp.asarray(case.z["x"]), case.z
    tensors = {k: jnp.asarray(v) for k, v in case.tensors("adapter/").items()}

    # The mapping fills exactly what adapt made: same paths, shapes, scales.
    structure = lambda tree: (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
    assert structure(case.trainable(tensors)) == structure(adapted.trainable)
    for name, scale in case.group("frozen/").items():
        if name.endswith(".scaling"):
            case.close(case.scale(name.removesuffix(".scaling")), scale, name)

    @jax.jit
    def run(trained: dict, fixed: dict, x: jax.Array, target: jax.Array, weight: float):
        """Output, weight * sum (y - target)^2 / 2, its gradients by PEFT's names, and by x."""

        def loss(trained, x):
            y = lifted(adapted.bind(case.trainable(fixed | trained)), x)
            return 0.5 * weight * jnp.sum(jnp.square(y - target)), y

        wrt = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        (value, y), grads = jax.value_and_grad(loss, wrt, has_aux=True)(trained, x)
        return y, value, grads

    recorded = case.tensors("grad/")
    trained = {name: tensors[name] for name in recorded}
    fixed = {name: v for name, v in tensors.items() if name not in recorded}
    zero = jnp.zeros(z["y"].shape, z["y"].dtype)

    # Outputs, loss and gradients.
    y, loss, grads = run(trained, fixed, x, zero, 1.0)
    case.close(y, z["y"], "y")
    case.close(loss, z["loss"], "loss")
    for name, wanted in recorded.items():
        case.close(grads[0][name], wanted, f"gradient of {name}")
    if "grad_x" in z:
        case.close(grads[1], z["grad_x"], "gradient of x")

    # At PEFT's own start, and without an adapter.
    start = {k: jnp.asarray(v) for k, v in case.tensors("init/").items()}
    y_init, *_ = run({name: start.pop(name) for name in recorded}, start, x, zero, 1.0)
    if np.isfinite(z["y_init"]).all():
        case.close(y_init, z["y_init"], "y_init")
    case.close(model(case.tree(case.group("base/")), x), z["y_base"], "y_base")
    disabled = dict(case.flat_base)
    if case.config.get("bias", "none") != "none":  # PEFT leaves trained biases in place
        disabled |= {name: v for name, v in tensors.items() if name in disabled and name.endswith("bias")}
    case.close(model(case.tree(disabled), x), z.get("y_disabled", z["y_base"]), "y_disabled")

    # Merged.
    adapted = adapted.replace(trainable=case.trainable(tensors))
    if case.group("merged/"):
        merged = jlora.merge(adapted)
        for name, wanted in (case.group("base/") | case.group("merged/")).items():
            module, _, leaf = name.rpartition(".")
            case.close(merged[module][leaf], wanted, f"merged {name}")
        case.close(model(merged, x), z.get("y_merged", z["y"]), "y_merged")

    # Five steps of gradient descent.
    if "train/losses" in z:
        target, rate = jnp.asarray(z["train/target"]), float(z["train/lr"])
        for step, wanted in enumerate(z["train/losses"]):
            _, loss, (grads, *_) = run(trained, fixed, x, target, 1.0 / target.size)
            case.close(loss, wanted, f"loss before step {step}")
            if step < len(z["train/losses"]) - 1:
                trained = jax.tree.map(lambda p, g: p - rate * g, trained, grads)
        for name, wanted in case.tensors("train/final/").items():
            case.close(trained[name], wanted, f"{name} after training")

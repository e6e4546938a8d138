"""jlora against numbers that PEFT computed, on the tiny models of the oracle directory.

The directory is ``JLORA_ORACLES`` (default ``../shared/oracles``). Every case in it whose ``peft_type`` jlora reads is
run; everything about a case (model, shapes, ranks, scales, modules) is read from its arrays and its configuration. A
case that ``load_peft`` refuses is skipped with the refusal.

Nothing here knows a method. A case is written out as the files that PEFT would leave, and read by ``load_peft``. A
format only moves numbers about, so recorded gradients and trained values are brought into jlora's shapes in the same
way: as files of their own. A third file, in which what PEFT trains is another number, says where that went.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from recorded import DIRECTORY

import jlora
from jlora.io import load_peft
from jlora.io.formats import FORMATS
from jlora.weight import Params

# Relative to the largest number of an array, absolute below 1. What PEFT computes in float32, and DEFT's projections,
# are off by their last bits, by how many depends on the numbers that were drawn: up to 2.9e-6 over twenty draws. LoHa
# keeps its scale in float32, C3A its transforms, FourierFT all of the change (what it recorded are float32 numbers,
# exactly). OSF decomposes the base in float32 and does not save that: its start is decomposed anew. (From the recorded
# start: 1e-10, tests/methods/test_osf.py.)
TOLERANCE = {"float64": 1e-10, "float32": 5e-6, "LOHA": 1e-7, "C3A": 1e-6, "DEFT": 5e-6, "FOURIERFT": 1e-6, "OSF": 1e-5}
# FRoD is not given U, which PEFT rounds to float32 (with that U: 1e-10, tests/methods/test_frod.py).
TOLERANCE |= {"FROD": 1e-6}
# KaSA is not given the base that PEFT truncated, in float32 (with that base: 1e-10, tests/methods/test_kasa.py).
# VeLoRA's direction is float32 in PEFT (the float64 formula: 1e-12, tests/methods/test_velora.py).
TOLERANCE |= {"KASA": 1e-6, "VELORA": 1e-6}


def wrong_gradients(config: dict) -> str | None:
    """Which gradients PEFT 0.21.2 takes wrongly, as a pattern: those, and what it trained with them, are not compared.

    It differentiates the effective convolution of LoHa by hand and takes the other product's core in one place; and C3A
    by its input: the gradient of the last layer's kernel agrees with finite differences, what lies before it does not.
    (The conformance suite holds ours to the merged model's.)
    """
    if config["peft_type"] == "LOHA" and config.get("use_effective_conv2d"):
        return r"hada_w[12]_a"
    return r"lin0|^x$" if config["peft_type"] == "C3A" else None


pytestmark = pytest.mark.usefixtures("x64")


def discover() -> Iterator[Any]:
    if not DIRECTORY.is_dir():
        reason = f"no directory {DIRECTORY}: set JLORA_ORACLES"
        yield pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))
        return
    for file in sorted(DIRECTORY.glob("*.npz")):
        with np.load(file) as arrays:
            for key in sorted(arrays.files):
                case, _, name = key.partition("/")
                if name == "config_json" and json.loads(str(arrays[key])).get("peft_type") in FORMATS:
                    yield pytest.param((file, case), id=f"{file.stem}-{case}")


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


# A case.


def same(name: str) -> str:
    """One name for a tensor, whether on disk, in memory or below ``grad/``: ``lin0.lora_A``, ``lin0.bias``."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    return name.removesuffix(".weight")


class Case:
    """One recorded case, and jlora's adapter for it."""

    def __init__(self, z: dict[str, np.ndarray], scratch: pathlib.Path):
        self.z, self.scratch = z, scratch
        self.config, self.meta = (json.loads(str(z[name])) for name in ("config_json", "meta_json"))
        self.model: Callable = functools.partial(MODELS[self.meta["model"]], dims=self.meta["dims"])
        self.start = self.group("base/") | self.group("base_after_init/")
        self.base = self.tree(self.start)
        self.disk = self.group("adapter/")
        # What PEFT keeps on its layers without saving it, where the format wants it in the file.
        self.disk |= {k: v for k, v in self.group("frozen/").items() if k.startswith("base_model.")}
        if "save_projection" in self.config:
            self.config["save_projection"] = True
        if self.group("base_after_init/"):  # the base is given as that initialization left it
            self.config["init_lora_weights"] = True
        self.usage = jlora.usage(self.model, self.base, jnp.asarray(z["x"]))
        self.axes = {
            f"{module}/{leaf}": axes_of(f"{module}/{leaf}", w, self.meta["model"])
            for module, leaves in self.base.items()
            for leaf, w in leaves.items()
            if w.ndim > 1
        }

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): v for key, v in self.z.items() if key.startswith(prefix)}

    def tree(self, flat: dict[str, np.ndarray]) -> dict:
        out: dict[str, dict] = {}
        for name, value in flat.items():
            module, _, leaf = name.rpartition(".")
            out.setdefault(module, {})[leaf] = jnp.asarray(value)
        return out

    def on_disk(self, name: str) -> str | None:
        """The name of a recorded tensor among those of the file. In memory, what is shared by the model is recorded
        below one of its modules."""
        name, names = same(name), {same(key) for key in self.disk}
        return next((n for n in (name, name.partition(".")[2]) if n in names), None)

    def read(self, values: dict[str, np.ndarray]) -> jlora.Adapted:
        """``load_peft`` of a directory with these values for some of the adapter's tensors."""
        values = {self.on_disk(name) or name: v for name, v in values.items()}
        tensors = {key: np.ascontiguousarray(values.get(same(key), v)) for key, v in self.disk.items()}
        (self.scratch / "adapter_config.json").write_text(json.dumps(self.config))
        safetensors.numpy.save_file(tensors, self.scratch / "adapter_model.safetensors", {"format": "pt"})
        return load_peft(self.scratch, self.base, axes=self.axes, usage=self.usage)

    def begun(self) -> jlora.Adapted | None:
        """PEFT's own start; None where a file of that is refused, since the first batch was to set a part of it."""
        try:
            return self.read(self.group("init/"))
        except ValueError as refusal:
            if "the first batch" not in str(refusal):
                raise
            return None

    def close(self, got: Any, wanted: Any, what: str) -> None:
        got, wanted = np.asarray(got), np.asarray(wanted)
        assert got.shape == wanted.shape, f"{what}: shape {got.shape}, recorded {wanted.shape}"
        kinds = ("kasa", "velora")
        kind = next((k.upper() for k in kinds if self.config.get(f"{k}_config")), self.config["peft_type"])
        tolerance = TOLERANCE.get(kind, 0.0)
        bound = max(tolerance, TOLERANCE[self.meta["dtype"]]) * max(1.0, float(np.abs(wanted).max(initial=0.0)))
        error = float(np.abs(got - wanted).max(initial=0.0))
        assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"

    def all_close(self, got: Any, wanted: Any, mask: Any, what: str) -> None:
        for (path, g), w, m in zip(jax.tree.leaves_with_path(got), *map(jax.tree.leaves, (wanted, mask)), strict=True):
            self.close(g * m, w * m, what + jax.tree_util.keystr(path))


def projected(adapted: jlora.Adapted) -> dict[str, Any]:
    """The parameters as a method keeps them between steps. PEFT moves them in its forward pass."""
    own = {path: Params(adapted.trainable[path], adapted.frozen.get(path)) for path in adapted.sites}
    return adapted.trainable | {path: adapted.sites[path].method.project(p) for path, p in own.items()}


@pytest.mark.parametrize("where", list(discover()))
def test_case(where: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    file, name = where
    with np.load(file) as arrays:
        arrays = {k.partition("/")[2]: arrays[k] for k in arrays.files if k.startswith(f"{name}/")}
    model_name = json.loads(str(arrays.get("meta_json", "{}"))).get("model")
    if model_name not in MODELS:
        pytest.skip(f"a case of the form {model_name!r}, which has a test of its own or none")
    case = Case(arrays, tmp_path)
    z, model = case.z, case.model
    try:
        adapted = case.read({})
    except ValueError as error:
        pytest.skip(f"load_peft refuses it: {error}")
    lifted = jlora.lift(model, on_materialize="error")
    x = jnp.asarray(z["x"])
    wrong = wrong_gradients(case.config)
    recorded = {k: v for k, v in case.group("grad/").items() if not wrong or not re.search(wrong, same(k))}
    trained = {case.on_disk(key) for key in recorded}
    others = case.read({key: v + 1 for key, v in case.disk.items() if same(key) in trained}).trainable
    mask = jax.tree.map(lambda a, b: (a != b).astype(a.dtype), adapted.trainable, others)

    @jax.jit
    def run(adapted: jlora.Adapted, trainable: Any, x: jax.Array, target: jax.Array, weight: float):
        """Output, weight * sum (y - target)^2 / 2, its gradients by the trainable parameters, and by x."""

        def loss(trainable, x):
            y = lifted(adapted.bind(trainable), x)
            return 0.5 * weight * jnp.sum(jnp.square(y - target)), y

        wrt = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        (value, y), grads = jax.value_and_grad(loss, wrt, has_aux=True)(trainable, x)
        return y, value, grads

    # Outputs, loss and gradients.
    zero = jnp.zeros(z["y"].shape, z["y"].dtype)
    y, loss, grads = run(adapted, adapted.trainable, x, zero, 1.0)
    if "y_merged" in z and np.abs(z["y_merged"] - z["y"]).max() > 1e-3:  # PEFT's forward pass is not its own merge:
        case.close(y, z["y_merged"], "y")  # the merge is right, and nothing else that was recorded
        case.close(model(jlora.merge(adapted), x), z["y_merged"], "y_merged")
        return
    case.close(y, z["y"], "y")
    case.close(loss, z["loss"], "loss")
    if all(case.on_disk(key) for key in recorded):  # else the file is a compact form of them
        case.all_close(grads[0], case.read(recorded).trainable, mask, "gradient of ")
    if "grad_x" in z and not (wrong and re.search(wrong, "x")):
        case.close(grads[1], z["grad_x"], "gradient of x")

    # At PEFT's own start, and without an adapter.
    if np.isfinite(z["y_init"]).all() and (start := case.begun()) is not None:
        case.close(run(start, start.trainable, x, zero, 1.0)[0], z["y_init"], "y_init")
    case.close(model(case.tree(case.group("base/")), x), z["y_base"], "y_base")
    disabled = dict(case.start)
    if case.config.get("bias", "none") != "none":  # PEFT leaves trained biases in place
        biases = {same(key): v for key, v in case.disk.items() if key.endswith("bias")}
        disabled = {key: biases.get(key, v) for key, v in disabled.items()}
    case.close(model(case.tree(disabled), x), z.get("y_disabled", z["y_base"]), "y_disabled")

    # Merged.
    if case.group("merged/"):
        merged = jlora.merge(adapted)
        for key, wanted in (case.group("base/") | case.group("merged/")).items():
            module, _, leaf = key.rpartition(".")
            case.close(merged[module][leaf], wanted, f"merged {key}")
        case.close(model(merged, x), z.get("y_merged", z["y"]), "y_merged")

    # Five steps of gradient descent.
    if "train/losses" in z and not wrong:
        target, rate, trainable = jnp.asarray(z["train/target"]), float(z["train/lr"]), adapted.trainable
        for step, wanted in enumerate(z["train/losses"]):
            _, loss, (grads, *_) = run(adapted, trainable, x, target, 1.0 / target.size)
            case.close(loss, wanted, f"loss before step {step}")
            trainable = projected(adapted.replace(trainable=trainable))
            if step < len(z["train/losses"]) - 1:
                trainable = jax.tree.map(lambda p, g, m: p - rate * g * m, trainable, grads, mask)
        case.all_close(trainable, case.read(case.group("train/final/")).trainable, mask, "trained ")

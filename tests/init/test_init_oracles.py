"""The starts against what PEFT computed, by the recorded cases of the oracle directory (``JLORA_ORACLES``).

Every case is found by its configuration, which says the start, its options, rank and scale; data-driven ones are
calibrated here, from the recorded batches. Signs of singular vectors are free: products are compared, and of EVA's
directions the cosines. Here all is float64, whatever the case was recorded in.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from recorded import DIRECTORY

import jlora
from jlora import init
from jlora.io import load_peft, matching, save_peft

pytestmark = pytest.mark.usefixtures("x64")
# Relative to the largest entry, absolute below 1. LoRA-GA's start and the residual base it leaves, and the random
# numbers of the orthogonal start, are float32 in PEFT in any case. CorDA's are from the inverse of a float32 matrix.
TOLERANCE = {"float64": 1e-10, "float32": 1e-6, "lora_ga": 1e-6, "orthogonal": 1e-6, "corda": 5e-6}


def start_of(config: dict) -> jlora.init.Start | None:
    name, options = str(config["init_lora_weights"]), lambda which: config[f"{which}_config"]
    if iterations := re.fullmatch(r"pissa_niter_(\d+)", name):
        return init.PiSSA(iterations=int(iterations[1]))
    if name == "eva":
        own = options("eva")
        return init.EVA(own["rho"], whiten=own["whiten"], keep_scale=own["adjust_scaling_factors"])
    if name == "corda":
        return init.CorDA(options("corda")["corda_method"])
    if name == "lora_ga":
        own = options("lora_ga")
        scale = {"weight_svd": "weight", "gd_scale": "gd"}.get(own["scale"], own["scale"])
        return init.LoRAGA(own["direction"], scale, gamma=own["stable_gamma"], variant="peft")
    return {"pissa": init.PiSSA(), "olora": init.OLoRA(), "orthogonal": init.Orthogonal()}.get(name)


def discover() -> Iterator[Any]:
    if not DIRECTORY.is_dir():
        reason = f"no directory {DIRECTORY}: set JLORA_ORACLES"
        yield pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))
        return
    seen: set[pathlib.Path] = set()
    for file in sorted(DIRECTORY.glob("*.npz")):
        with np.load(file) as arrays:
            for key in sorted(arrays.files):
                case, _, name = key.partition("/")
                if name == "config_json" and "init_lora_weights" in (config := json.loads(str(arrays[key]))):
                    if start_of(config) is not None and f"{case}/converted_config_json" not in arrays.files:
                        marks = [pytest.mark.slow] if file in seen else []  # one of a file by default
                        seen.add(file)
                        yield pytest.param((file, case), id=f"{file.stem}-{case}", marks=marks)


def conversions() -> Iterator[Any]:
    for file in sorted(DIRECTORY.glob("*.npz")) if DIRECTORY.is_dir() else ():
        with np.load(file) as arrays:
            cases = [key.partition("/")[0] for key in arrays.files if key.endswith("/converted_config_json")]
        yield from (pytest.param((file, case), id=f"{file.stem}-{case}") for case in sorted(cases))


def mlp(p: dict, x: jax.Array) -> jax.Array:
    linear = lambda p, x: x @ p["weight"].T + p.get("bias", 0.0)
    return linear(p["lin1"], jnp.tanh(linear(p["lin0"], x)))


class Case:
    """The arrays of a case, and its base as a tree {module: {"weight", "bias"}}."""

    def __init__(self, where: tuple[pathlib.Path, str]):
        file, name = where
        with np.load(file) as arrays:
            self.z = {k.partition("/")[2]: arrays[k] for k in arrays.files if k.startswith(f"{name}/")}
        self.base: dict[str, dict] = {}
        for key, value in self.group("base/").items():
            module, _, leaf = key.rpartition(".")
            self.base.setdefault(module, {})[leaf] = jnp.asarray(value, jnp.float64)
        pairs = self.group("init/")
        self.modules = sorted({key.split(".")[2] for key in pairs})
        self.rules = {path: jlora.Axes((1,), (0,)) for path in (f"{module}/weight" for module in self.modules)}

    def inputs(self, module: str) -> np.ndarray:
        """[batches, tokens, in] of the calibration."""
        x, first = self.z["calibration_x"].astype(np.float64), self.base["lin0"]
        return x if module == "lin0" else np.tanh(x @ first["weight"].T + first.get("bias", 0.0))

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): v for key, v in self.z.items() if key.startswith(prefix)}

    def pair(self, prefix: str, module: str, scale: float = 1.0) -> jlora.Factors:
        a, b = (self.z[f"{prefix}base_model.model.{module}.lora_{letter}.weight"].T for letter in "AB")
        return jlora.Factors(jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64), scale)

    def pairs(self, prefix: str, like: jlora.Adapted) -> dict[str, jlora.Factors]:
        return {path: self.pair(prefix, path.split("/")[0], f.scale) for path, f in factors(like.trainable).items()}

    def trainable(self, prefix: str, like: jlora.Adapted) -> dict[str, Any]:
        name = lambda path: f"{prefix}base_model.model.{path.split('/')[0]}.lora_magnitude_vector"
        return {
            path: {"factors": pair, "magnitude": jnp.asarray(self.z[name(path)])} if name(path) in self.z else pair
            for path, pair in self.pairs(prefix, like).items()
        }

    def methods(self, config: dict, start: init.Start) -> dict[str, jlora.LoRA]:
        """By leaf. The ranks and scales that EVA's configuration has for some modules are what came of its start."""
        kind, options = jlora.DoRA if config["use_dora"] else jlora.LoRA, config
        if isinstance(start, init.EVA):
            options = config | {"rank_pattern": {}, "alpha_pattern": {}}
        of = lambda module, pattern, field: matching.by_pattern(options[pattern], module, options[field])
        return {
            f"{module}/weight": kind(
                of(module, "rank_pattern", "r"),
                of(module, "alpha_pattern", "lora_alpha"),
                rslora=config["use_rslora"],
                start=start,
            )
            for module in self.modules
        }


def factors(trainable: dict[str, Any]) -> dict[str, jlora.Factors]:
    return {path: p["factors"] if isinstance(p, dict) else p for path, p in trainable.items()}


def close(got: Any, wanted: Any, like: str, what: str, more: float = 0.0) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, what
    error, bound = np.abs(got - wanted).max(), TOLERANCE[like] * max(1.0, np.abs(wanted).max()) + more
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def calibrated(case: Case, methods: dict[str, jlora.LoRA]) -> jlora.Calibration | None:
    if not any(method.needs for method in methods.values()):
        return None
    if "calibration_x" in case.z:
        fn, batches = mlp, [jnp.asarray(x, jnp.float64) for x in case.z["calibration_x"]]
    else:
        fn = lambda p, x: 0.5 * jnp.mean((mlp(p, x) - case.z["loraga_target"]) ** 2)
        batches = [jnp.asarray(case.z["x"])]
    return jlora.calibrate(fn, case.base, batches, methods)


def principal(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """W's principal part, all singular values and a 0, and how far off that part may be if float32 decomposed W: the
    rounding of the largest singular value turns the space by its share of the gap, and that moves what is kept."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    s = np.append(s, 0.0)
    return (u * s[:-1])[:, :rank] @ vh[:rank], s, 2.0**-23 * s[0] * s[rank - 1] / (s[rank - 1] - s[rank])


def of_iterations(w: np.ndarray, taken: np.ndarray, rank: int, iterations: int, what: str) -> None:
    """Whether this is what so many subspace iterations leave, of as many random columns as are kept: W projected on a
    space that has converged so far. By Halko, Martinsson and Tropp (2009, theorems 9.1 and 9.2), from a start whose
    parts outside and inside of the principal space have the quotient c, what is lost is at most
    (1 + c^2)^(1 / (4 iterations + 2)) times the next singular value. c is above 10,000 once in hundreds of draws."""
    (_, s, _), (u, _, vh) = principal(w, rank), np.linalg.svd(taken)
    sides = u[:, :rank] @ u[:, :rank].T @ w, w @ vh[:rank].T @ vh[:rank]
    close(taken, min(sides, key=lambda side: np.abs(side - taken).max()), "float32", f"projection of {what}")
    lost = np.linalg.norm(w - taken, 2) / s[rank]
    assert lost < 1e4 ** (2 / (4 * iterations + 2)), f"{what}: {lost:.3g} times the least was lost"


def incremental(batches: Any, keep: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Principal components of what was seen so far, their singular values, and the cosines with the ones before."""
    seen, mean, parts = 0, 0.0, None
    for x in batches:
        rows, before = [x - x.mean(0)], parts
        if parts is not None:
            weight = np.sqrt(seen * len(x) / (seen + len(x)))
            rows = [parts[1][:, None] * parts[0], *rows, weight * (mean - x.mean(0))[None]]
        mean, seen = (mean * seen + x.sum(0)) / (seen + len(x)), seen + len(x)
        _, s, vh = np.linalg.svd(np.concatenate(rows), full_matrices=False)
        vh = vh[:keep] * np.sign(vh[np.arange(keep), np.abs(vh[:keep]).argmax(1)])[:, None]  # a sign may change: -1
        parts = vh, s[:keep]
        yield *parts, np.zeros(keep) if before is None else np.sum(before[0] * parts[0], axis=1)


def converged(steps: Iterator, rank: int, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """The first components of which so many have stayed."""
    return next((vh, s) for vh, s, cosines in steps if (cosines[:rank] >= tau).all())


def same_directions(start: init.EVA, a: Any, vh: np.ndarray, s: np.ndarray, tolerance: float) -> None:
    rank = a.shape[1]
    lengths = s[:rank] ** -0.5 if start.whiten else np.ones(rank)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(a).T * vh[:rank], axis=1)), lengths, rtol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), lengths, rtol=tolerance)


@pytest.mark.parametrize("where", list(discover()))
def test_start(where):
    case = Case(where)
    z, config, meta = case.z, json.loads(str(case.z["config_json"])), json.loads(str(case.z["meta_json"]))
    dtype = max((meta["dtype"], config["init_lora_weights"]), key=lambda name: TOLERANCE.get(name, 0.0))
    start = start_of(config)
    methods = case.methods(config, start)
    stats = calibrated(case, methods)
    if "loraga_grad/lin0.weight" in z:
        for module in case.modules:
            g = stats.leaves[f"{module}/weight"]["g"]
            close(g.T, z[f"loraga_grad/{module}.weight"], "float64", f"gradient of {module}")
    adapt = lambda: jlora.adapt(case.base, methods, axes=case.rules, key=jax.random.key(0), stats=stats)
    if isinstance(start, init.LoRAGA) and 2 * max(method.rank for method in methods.values()) > len(z["x"]):
        with pytest.raises(ValueError, match=f"directions are wanted of the gradient of {len(z['x'])} tokens"):
            adapt()  # PEFT makes some up
        return
    adapted = adapt()
    lifted, x = jlora.lift(mlp, on_materialize="error"), jnp.asarray(z["x"], jnp.float64)
    close(lifted(adapted.bind(), x), z["y_init"], dtype, "y_init")
    for path, f in factors(adapted.trainable).items():
        module = path.split("/")[0]
        recorded = case.pair("init/", module, float(z[f"frozen/{module}.scaling"]))
        assert f.scale == recorded.scale and f.a.shape == recorded.a.shape
        if start.subtracts:
            w = z[f"base/{module}.weight"].astype(np.float64)
            taken = (w - z[f"base_after_init/{module}.weight"]).T
            close(recorded.product(), taken, dtype, f"recorded start of {module}")
            if isinstance(start, init.LoRAGA):  # each slot is of two triples, whose signs are free: it has either
                slots = lambda f: np.abs(f.scale * np.einsum("ir,ro->rio", f.a, f.b))
                factor = 1.0
                if start.scale == "weight":  # PEFT's largest singular value is of few iterations of few columns
                    s, factor = np.linalg.svd(w)[1], np.linalg.norm(slots(recorded)) / np.linalg.norm(slots(f))
                    assert 1 - (s[f.rank] / s[0]) ** 8 < factor <= 1 + 1e-6
                close(factor * slots(f), slots(recorded), dtype, f"start of {module}")
            elif isinstance(start, init.PiSSA):
                part, _, rounded = principal(w, f.rank)
                close(f.product(), part.T, "float64", f"start of {module}")
                if start.iterations is None:
                    close(part.T, taken, dtype, f"recorded start of {module}", rounded)
                else:
                    of_iterations(w, taken.T, f.rank, start.iterations, f"recorded start of {module}")
            else:
                close(f.product(), taken, dtype, f"start of {module}")
        elif isinstance(start, init.EVA):
            inputs = case.inputs(module)
            most, rank = round(start.rho * config["r"]), f.rank
            # PEFT's is the incremental decomposition that keeps no more components than it may want (found by a few
            # iterations in twice as many dimensions) ...
            steps = incremental(itertools.cycle(inputs), most)
            same_directions(start, recorded.a, *converged(steps, rank, config["eva_config"]["tau"]), 1e-3)
            # ... and ours the one that keeps all, after each batch once.
            *_, last = incremental(inputs, inputs.shape[-1])
            same_directions(start, f.a, *last[:2], 1e-9)
            assert not f.b.any()
        else:
            for pair, like in ((f, "float64"), (recorded, dtype)):  # random: what is the same is what it is made for
                close(pair.a @ pair.b, np.zeros(pair.product().shape), like, f"product of {module}")
                assert {np.linalg.matrix_rank(m, tol=1e-5) for m in (pair.a, pair.b)} == {f.rank // 2}
    # What was recorded after moving the factors is what they come to here, over the original base.
    if start.subtracts:
        frozen = {path: {"start": jlora.Factors(f.a, f.b)} for path, f in case.pairs("init/", adapted).items()}
        adapted = adapted.replace(frozen=frozen)
    adapted = adapted.replace(trainable=case.trainable("adapter/", adapted))
    of = lambda t: 0.5 * jnp.sum(jnp.square(lifted(adapted.bind(t), x)))
    grads = jax.grad(of)(adapted.trainable)
    close(lifted(adapted.bind(), x), z["y"], dtype, "y")
    merged = jlora.merge(adapted)
    for path, g in factors(grads).items():
        module = path.split("/")[0]
        close(g.a.T, z[f"grad/{module}.lora_A.weight"], dtype, f"gradient of A of {module}")
        close(g.b.T, z[f"grad/{module}.lora_B.weight"], dtype, f"gradient of B of {module}")
        close(merged[module]["weight"], z[f"merged/{module}.weight"], dtype, f"merged {module}")
    if "train/target" not in z:
        return
    target, rate, trainable = jnp.asarray(z["train/target"]), float(z["train/lr"]), adapted.trainable
    step = jax.jit(jax.value_and_grad(lambda t: 0.5 * jnp.mean(jnp.square(lifted(adapted.bind(t), x) - target))))
    for i, wanted in enumerate(z["train/losses"]):
        value, grads = step(trainable)
        close(value, wanted, dtype, f"loss before step {i}")
        trainable = jax.tree.map(lambda p, g: p - rate * g, trainable, grads)


@pytest.mark.parametrize("where", list(conversions()))
def test_files_are_for_the_original_base(where, tmp_path: pathlib.Path):
    case = Case(where)
    wanted = json.loads(str(case.z["converted_config_json"]))
    rank, rslora = case.pair("init/", case.modules[0]).rank, wanted["use_rslora"]
    alpha = wanted["lora_alpha"] / (wanted["r"] / rank) ** (0.5 if rslora else 1)
    kind = {"pissa": init.PiSSA(), "olora": init.OLoRA()}[where[1].split("_")[0]]
    method = jlora.LoRA(rank, alpha, rslora=rslora, start=kind)
    adapted = jlora.adapt(case.base, method, "*/weight", axes=case.rules, key=jax.random.key(0))
    recorded = {path: {"start": jlora.Factors(f.a, f.b)} for path, f in case.pairs("init/", adapted).items()}
    for path, f in recorded.items():
        more = principal(case.base[path.split("/")[0]]["weight"], rank)[2] if isinstance(kind, init.PiSSA) else 0.0
        of_peft = method.scale * f["start"].product()
        close(adapted.trainable[path].product(), of_peft, "float32", f"start of {path}", more)
    adapted = adapted.replace(trainable=case.pairs("adapter/", adapted), frozen=recorded)
    save_peft(adapted, tmp_path, dtype=jnp.float64)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == wanted["r"] and config["use_rslora"] == rslora
    np.testing.assert_allclose(config["lora_alpha"], wanted["lora_alpha"], rtol=1e-12)
    for module in case.modules:
        name = f"base_model.model.{module}.lora_{{}}.weight"
        product = lambda of, name=name: of(name.format("B")) @ of(name.format("A"))
        got, of_peft = product(tensors.__getitem__), product(lambda key: case.z[f"converted/{key}"])
        close(got, of_peft, "float32", f"product of {module}")
    read, x = load_peft(tmp_path, case.base, axes=case.rules), jnp.asarray(case.z["x"], jnp.float64)
    for way in (read, adapted):
        close(jlora.lift(mlp)(way.bind(), x), case.z["y"], "float32", "y")

"""``peft_type`` PSOFT: ``psoft_R.weight`` [r (r - 1) / 2], or [r, r] if it is not orthogonal, and ``psoft_R.vector_a``,
``psoft_R.vector_b`` [r] of each module: q (R^T), gain_in and gain_out.

The factors are in no file. PEFT decomposes the base weight again, in float32, and R is in the basis that comes out,
signs included. Those are chosen by the LAPACK that PyTorch was built with, and no tensor of the file tells them: with
every other choice it is an adapter as good as any. Of 30 recorded vectors NumPy's gesdd has the signs of 16, SciPy's
gesvd of 17, of the transpose 22. So PyTorch itself is asked, here as there, and has to be installed to read or write
such a file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.io.format import Arrays, Config, Format, Tensors, Written, one_method
from jlora.io.layouts import Hint, View
from jlora.methods import PSOFT, Method

_R, _IN, _OUT = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"


class PsoftFormat(Format):
    """PSOFT."""

    peft_type = "PSOFT"
    methods = (PSOFT,)
    suffixes = (_R, _IN, _OUT)
    fields = frozenset(
        "r psoft_dropout psoft_svd psoft_orth psoft_mag_a psoft_mag_b ab_svd_init use_cayley_neumann "
        "num_cayley_neumann_terms cayley_neumann_eps".split()
    )
    inert = frozenset("psoft_alpha psoft_svd_lowrank_niter random_seed init_weights".split())  # alpha cancels
    lacks = frozenset({"bias"})
    needs = ("torch",)

    def check(self, config: Config) -> str | None:
        if config.get("psoft_svd", "full") != "full":
            return (
                f"psoft_svd={config['psoft_svd']!r}: the basis of R follows from PyTorch's random numbers, which JAX "
                "does not have; 'full' is read. Merge it in PEFT"
            )
        if config.get("ab_svd_init", "psoft_init") not in ("psoft_init", "pissa_init"):
            return f"ab_svd_init={config['ab_svd_init']!r}, where 'psoft_init' or 'pissa_init' is wanted"
        if config.get("use_cayley_neumann") and config.get("num_cayley_neumann_terms", 5) < 2:
            return "num_cayley_neumann_terms is below 2: R is the identity, whatever q"
        return None

    def hint(self, shapes: Mapping[str, Sequence[int]]) -> Hint:
        return Hint("linear")

    def shapes(self, config: Config, name: str, view: View) -> dict[str, tuple[int, ...]]:
        r = config.get("r", 32)
        shapes = {_R: (r * (r - 1) // 2,) if config.get("psoft_orth", True) else (r, r)}
        for suffix, field in ((_IN, "psoft_mag_a"), (_OUT, "psoft_mag_b")):
            if config.get(field, True):
                shapes[suffix] = (r,)
        return shapes

    def method(self, config: Config, names: Sequence[str | None], tied: bool) -> Method:
        terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", False) else None
        return PSOFT(
            config.get("r", 32),
            dropout=config.get("psoft_dropout", 0.0),
            orthogonal=bool(config.get("psoft_orth", True)),
            gain_in=bool(config.get("psoft_mag_a", True)),
            gain_out=bool(config.get("psoft_mag_b", True)),
            neumann=4 if terms == 3 else terms,  # what PEFT computes for 3
            bound=config.get("cayley_neumann_eps") if terms else None,
            symmetric=config.get("ab_svd_init", "psoft_init") == "pissa_init",
        )

    def read(self, view: View, tensors: Tensors) -> Arrays:
        gains = {"gain_in": _IN, "gain_out": _OUT}
        own = {name: tensors[suffix] for name, suffix in gains.items() if suffix in tensors}
        return own | {"q": tensors[_R] if tensors[_R].ndim == 1 else tensors[_R].T}

    def derived(self, method: PSOFT, weight: Callable[[], np.ndarray], arrays: Arrays) -> Arrays:
        u, s, vh = _svd(weight().T.astype(np.float32))
        left, right = (np.sqrt(s), np.sqrt(s)) if method.symmetric else (np.ones_like(s), s)
        a, b = (left[:, None] * vh).T, (u * right).T
        return {"frozen/a": a[:, : method.rank], "frozen/b": b[: method.rank]}

    def write(
        self, method: PSOFT, layer: int | None, view: View, arrays: Arrays, weight: Callable[[], np.ndarray]
    ) -> Written | None:
        if view.kind != "linear":
            raise ValueError(f"PEFT has PSOFT for linear weights only, and this is of the kind {view.kind!r}.")
        a, b, q = arrays["frozen/a"], arrays["frozen/b"], arrays["q"]
        if not b.any():
            return None
        wanted = self.derived(method, weight, arrays)
        signs = np.sign(np.sum(a * wanted["frozen/a"], axis=0))
        off = max(np.abs(a * signs - wanted["frozen/a"]).max(), np.abs(b * signs[:, None] - wanted["frozen/b"]).max())
        if off > 1e-3 * np.abs(b).max():
            raise ValueError(
                "its factors are not the leading singular vectors of the base weight, which PEFT takes (or two "
                "singular values are too close to tell their vectors apart). Merge instead: jlora.merge."
            )
        both = np.outer(signs, signs).astype(q.dtype)
        tensors = {_R: q * both[np.triu_indices(method.rank, 1)] if method.orthogonal else (q * both).T}
        tensors |= {suffix: arrays[name] for name, suffix in (("gain_in", _IN), ("gain_out", _OUT)) if name in arrays}
        return Written(tensors, method, view.n_out)

    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        method = one_method(facts, self.peft_type)
        if method.neumann == 3:
            raise ValueError("PEFT has no polynomial of 3 terms: its 3 is 4. Merge instead: jlora.merge.")
        return {
            "r": method.rank,
            "psoft_alpha": method.rank,
            "psoft_dropout": method.dropout,
            "psoft_svd": "full",
            "ab_svd_init": "pissa_init" if method.symmetric else "psoft_init",
            "psoft_orth": method.orthogonal,
            "psoft_mag_a": method.gain_in,
            "psoft_mag_b": method.gain_out,
            "use_cayley_neumann": method.neumann is not None,
            "num_cayley_neumann_terms": method.neumann or 5,
            "cayley_neumann_eps": method.bound,
        }


def _svd(w: np.ndarray) -> tuple[np.ndarray, ...]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            "PSOFT files are in the basis of PyTorch's singular value decomposition, whose signs are not in the file "
            "and known to PyTorch alone: install torch, its CPU build will do; or, to read, merge in PEFT, and to "
            "write, jlora.to_lora (on the command line jlora convert RUN --to lora) or jlora.merge"
        ) from None
    return tuple(part.numpy() for part in torch.linalg.svd(torch.tensor(w), full_matrices=False))

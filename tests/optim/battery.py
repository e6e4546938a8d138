"""The table of all transformations of jlora.optim, for the battery. A new one adds a row."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import jlora


@dataclasses.dataclass(frozen=True)
class Row:
    """One transformation, at settings for the toy problems.

    Attributes:
      make: of a learning rate, a number or a schedule, the whole optimizer.
      plain: whether it works on trees of plain matrices.
      adapted: whether it works on the trainable parameters of an adapted tree.
      rate: that suits the toy problem.
    """

    make: Callable[[Any], optax.GradientTransformation]
    plain: bool = True
    adapted: bool = True
    rate: float = 0.1


def galore(rate: Any, eps: float = 1e-8, quantized: int = 0, **options: Any) -> optax.GradientTransformation:
    inner = optax.adamw(rate, eps=eps, weight_decay=0.01)
    inner = jlora.optim.quantized_state(inner, block=quantized, min_size=1) if quantized else inner
    return jlora.optim.galore(inner, 2, period=5, scale=1.0, **options)


ROWS = {
    "galore": Row(lambda rate: galore(rate)),
    "galore_svd": Row(lambda rate: galore(rate, solver="svd", side="larger")),
    "galore_eigh": Row(lambda rate: galore(rate, solver="eigh", transport="rotate")),
    "galore_subspace": Row(lambda rate: galore(rate, solver="subspace", transport="reset")),
    # With both sides R is diagonal at first, up to rounding, which a smaller eps would turn into steps.
    "galore_both": Row(lambda rate: galore(rate, eps=1e-3, side="both", solver="svd", transport="rotate")),
    "galore_8bit": Row(lambda rate: galore(rate, quantized=4, transport="rotate")),
    "q_galore": Row(lambda rate: galore(rate, solver="eigh", projector_bits=4, lazy=0.4)),
    "adamw_8bit": Row(lambda rate: jlora.optim.quantized_state(optax.adamw(rate), block=4, min_size=1)),
    "fira": Row(lambda rate: jlora.optim.fira(rate, 2, period=5, weight_decay=0.01)),
    "apollo": Row(lambda rate: jlora.optim.apollo(rate, 2, period=5, weight_decay=0.01)),
    "dct": Row(lambda rate: jlora.optim.dct(optax.adamw(rate), 2)),
    "dct_feedback": Row(lambda rate: jlora.optim.dct(optax.adamw(rate), 2, period=5, error_feedback=True)),
    "adagrad_norm": Row(lambda rate: jlora.optim.adagrad_norm(rate), rate=3.0),
    "trion": Row(lambda rate: jlora.optim.trion(rate, 2, weight_decay=0.01), rate=0.3),
    "lisa": Row(lambda rate: jlora.optim.lisa(optax.adamw(rate), 1, layers="**/stack/**", interval=5)),
    "owlore": Row(
        lambda rate: jlora.optim.owlore(optax.adamw(rate), 2, layers="**/stack/**", active=1, interval=10, period=5)
    ),
    "lora_plus": Row(lambda rate: jlora.optim.lora_plus(optax.adamw(rate), 4.0), plain=False, rate=0.03),
    "lora_pro": Row(lambda rate: jlora.optim.lora_pro(optax.adamw(rate)), plain=False),
    "lora_pro_full": Row(lambda rate: jlora.optim.lora_pro_full(optax.adamw(rate)), plain=False),
    "altlora": Row(lambda rate: jlora.optim.altlora(rate), plain=False, rate=3.0),
    "altlora_alternate": Row(
        lambda rate: jlora.optim.altlora(rate, order="alternate", period=2), plain=False, adapted=False, rate=3.0
    ),
    "altlora_plus": Row(lambda rate: jlora.optim.altlora_plus(rate, b2=0.99), plain=False),
    "allora_approx": Row(lambda rate: jlora.optim.allora_approx(optax.adamw(rate)), plain=False),
    "scaled_gd": Row(lambda rate: jlora.optim.scaled_gd(rate), plain=False, rate=3.0),
    "scaled_adam": Row(lambda rate: jlora.optim.scaled_adam(rate, weight_decay=0.01), plain=False),
    "lora_rite": Row(lambda rate: jlora.optim.lora_rite(rate, skip=None, escape=True), plain=False),
    "lora_fa": Row(lambda rate: jlora.optim.lora_fa(optax.adamw(rate)), plain=False, adapted=False),
    "ffa": Row(lambda rate: jlora.optim.ffa(optax.adamw(rate)), plain=False, adapted=False),
}

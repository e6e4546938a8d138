"""Many adapters on one linear, `y = x W + s_i (x A_i) B_i` with i the adapter of the row, and a hand-written gradient.

Adapters live in numbered slots, stacked. Rows that follow each other and share one are an *entry*: a sequence, a tile,
or a single row. A table names the slot of every entry. With A_e and B_e the factors of the slot of entry e:

    h_e = x_e A_e      y_e = x_e W + s_e h_e B_e
    u_e = dy_e B_e^T   ds_e = s_e u_e              dx_e = dy_e W^T + ds_e A_e^T
    dA_i = sum x_e^T ds_e     dB_i = sum s_e h_e^T dy_e     d(s_i) = sum(h_e * u_e)     over the entries e of slot i

Slots, ranks, scales and the table are arrays: a program compiled once serves any of them. The products cost what those
of `lora_linear` do, whatever the number of adapters. Beyond that, each entry reads r (in + out) numbers of factors, and
training forms a gradient of that size for each entry before they are summed by slot: there an entry has many rows.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jlora.kernels.lora_linear import Pieces, _check_implementation, _frozen_base, _varying_together

# On CPU, factors gathered for single rows are worked on in pieces of this size, which stay in a core's cache.
_CACHE_BYTES = 2**20


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b", "scale", "rank"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """A fixed number of places for adapters of one linear, of a fixed largest rank r.

    Both factors have their long axis last. Of slot i, the first `rank[i]` ranks count: what lies beyond has no effect
    and no gradient. An empty slot has rank 0. Layers are stacked by `jax.vmap`, and then scanned over.
    """

    a: Float[Array, "slots r in"]
    b: Float[Array, "slots r out"]
    scale: Float[Array, " slots"]
    rank: Int[Array, " slots"]

    @classmethod
    def zeros(cls, slots: int, rank: int, n_in: int, n_out: int, dtype: Any = jnp.float32) -> Slots:
        """Empty slots. `rank` is the largest that an adapter may have."""
        return cls(
            a=jnp.zeros((slots, rank, n_in), dtype),
            b=jnp.zeros((slots, rank, n_out), dtype),
            scale=jnp.zeros(slots, jnp.promote_types(dtype, jnp.float32)),
            rank=jnp.zeros(slots, jnp.int32),
        )

    def put(
        self,
        slot: int | Int[Array, ""],
        a: Float[Array, "in rank"],
        b: Float[Array, "rank out"],
        scale: float | Float[Array, ""] = 1.0,
        *,
        rank: int | Int[Array, ""] | None = None,
    ) -> Slots:
        """The slots with an adapter in one of them, in place of what was there.

        `jax.jit(Slots.put, donate_argnums=0)` writes it where the slots are, and is compiled once for each rank that
        comes along; factors padded to one rank, with `rank` the true one, are served by one program. A traced `slot`
        that does not exist changes nothing.
        """
        a, b = jnp.asarray(a), jnp.asarray(b)
        slots, most, n_in = self.a.shape
        n_out, given = self.b.shape[-1], a.shape[-1] if a.ndim else 0
        if not (a.shape == (n_in, given) and b.shape == (given, n_out)) or jnp.ndim(scale) != 0:
            raise ValueError(
                f"got a {a.shape}, b {b.shape}, scale {jnp.shape(scale)}; want a [{n_in}, r], b [r, {n_out}] and a "
                "scalar scale. Stacked layers go through jax.vmap."
            )
        if given > most:
            raise ValueError(
                f"got an adapter of rank {given} for slots of rank {most} at most; make them by "
                f"Slots.zeros(..., rank={given}), or shrink it by jlora.to_lora(adapted, rank={most})"
            )
        rank = given if rank is None else rank
        if _concrete(rank) and not 0 <= operator.index(rank) <= given:
            raise ValueError(f"got rank={rank} with factors of rank {given}; want at most that, and not below 0")
        true = jnp.arange(most)[:, None] < rank
        widen = lambda rows: jnp.where(true, jnp.pad(rows, ((0, most - given), (0, 0))), 0)
        return self._write(slot, widen(a.T), widen(b), scale, rank)

    def remove(self, slot: int | Int[Array, ""]) -> Slots:
        """The slots with one of them empty: its rows are those of the base alone."""
        return self._write(slot, 0.0, 0.0, 0.0, 0)

    def _write(self, slot, *values) -> Slots:
        slots = self.a.shape[0]
        if _concrete(slot) and not 0 <= operator.index(slot) < slots:
            raise ValueError(f"got slot {slot} of {slots}; want 0 to {slots - 1}")
        old = (self.a, self.b, self.scale, self.rank)
        write = lambda v, new: v.at[slot].set(jnp.asarray(new, v.dtype), mode="drop", wrap_negative_indices=False)
        return Slots(**dict(zip(("a", "b", "scale", "rank"), map(write, old, values), strict=True)))


def multi_lora(
    x: Float[Array, "*entries *rows in"],
    w: Float[Array, "in out"] | None,
    slots: Slots,
    assignment: Int[Array, "*entries"],
    *,
    frozen_w: bool = True,
    implementation: str | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Float[Array, "*entries *rows out"]:
    """A linear layer with the adapter that each row asks for: `y = x @ w + scale[i] * (x @ a[i].T) @ b[i]`.

    `assignment` names the slots for the first axes of `x`; the rows along the axes that remain share theirs:

    | what comes in                        | `x`                 | `assignment`      |
    |--------------------------------------|---------------------|-------------------|
    | decoding: every row has its own slot | [batch, in]         | [batch]           |
    | prefill: every sequence has its own  | [batch, time, in]   | [batch]           |
    | rows sorted into tiles of one slot   | [tiles, tile, in]   | [tiles]           |

    `group_rows` sorts rows in any order into tiles, to be trained or prefilled together.

    Dtypes are as in `lora_linear`: products run in the result type of `x` and `w` and accumulate in float32 or wider,
    the factors are cast inside, and their gradients come back in their own dtype.

    **Arguments:**

    - `x`: activations.
    - `w`: the layer's weight; None for the adapters' part of `y` alone, in the dtype of `x`.
    - `slots`: the adapters. `jax.grad` takes `a`, `b` and `scale`, by `dataclasses.replace(slots, a=a, b=b)`.
    - `assignment`: slots of the entries, -1 for rows of the base alone. Where it is not traced, others that do not
        exist are an error; where it is, they are as -1 is.
    - `frozen_w`, `precision`, `preferred_element_type`: as in `lora_linear`.
    - `implementation`:
        `"plain"`: the formula, differentiated by JAX. It defines the meaning, and has forward mode.
        `"custom_vjp"`: XLA products, with the gradient written by hand. Factors are gathered for each entry. On CPU,
            where that would outweigh the activations, a few rows at a time: a batch that is sharded over several
            devices is gathered for it.
        `"pallas"`: TPU kernels, for bfloat16 and float32, that read the slots where they are. Over several devices,
            call it inside `jax.shard_map`. Entries of 128 rows and more have the branch fused into the base's product.
        `"pallas_interpret"`: the same kernels emulated on any platform. For tests; it is slow.
        `None` means `"custom_vjp"` on every platform, until the kernels have been timed on a TPU.

    **Returns:** `y`, with the leading axes of `x`.

    Adapters are apart: NaN in one does not reach the rows, nor the gradient, of another. h carries the name "lora_h",
    as in `lora_linear`. The compiler partitions the XLA forms; with explicit axes, call them inside `jax.shard_map`.
    """
    x, assignment = jnp.asarray(x), jnp.asarray(assignment)
    w = None if w is None else jnp.asarray(w)
    _check(x, w, slots, assignment)
    compute = x.dtype if w is None else jnp.result_type(x, w)
    pieces_class = _pieces_class(implementation, compute)
    if 0 in (x.size, slots.a.size, slots.b.size):
        pieces_class = EntryPieces  # an empty operand has nothing to put in a block
    pieces = pieces_class.of(compute, precision, preferred_element_type)
    assignment = assignment.astype(jnp.promote_types(assignment.dtype, jnp.int32))
    slot = jnp.clip(assignment, 0, slots.a.shape[0] - 1).astype(jnp.int32)
    adapted = slot == assignment
    rank = jnp.where(adapted, slots.rank[slot], 0).astype(jnp.int32)
    scale = jnp.where(adapted, slots.scale.astype(pieces.accumulate)[slot], 0)
    if implementation == "plain":
        return _plain(pieces, frozen_w, x, w, slots.a, slots.b, scale, slot, rank)
    weight = () if w is None else (w,)
    arrays = _varying_together(x, slots.a, slots.b, scale, slot, rank, *weight)
    return _with_gradient(pieces, frozen_w, jax.typeof(x), *arrays)


def _concrete(index) -> bool:
    """Whether it can be looked at now, by this process."""
    return not isinstance(index, jax.core.Tracer) and getattr(index, "is_fully_addressable", True)


def _check(x, w, slots: Slots, assignment) -> None:
    a, b = slots.a.shape, slots.b.shape
    got = f"got x {x.shape}, w {None if w is None else w.shape}, slots.a {a}, slots.b {b}"
    want = "want x [..., in], w [in, out], slots.a [slots, r, in] and slots.b [slots, r, out]"
    if x.ndim < 1 or len(a) != 3 or len(b) != 3 or (w is not None and w.ndim != 2):
        raise ValueError(f"{got}; {want}. Stacked layers go through jax.vmap or are scanned over.")
    if not (x.shape[-1] == a[2] and a[:2] == b[:2] and (w is None or w.shape == (a[2], b[2]))):
        raise ValueError(f"{got}, which do not fit together; {want}. A weight stored as [out, in] is passed as w.T.")
    if not jnp.issubdtype(assignment.dtype, jnp.integer) or assignment.shape != x.shape[:-1][: assignment.ndim]:
        raise ValueError(
            f"got assignment {assignment.shape} of {assignment.dtype} with x {x.shape}; want integers, one for each "
            f"entry of the first axes of x, such as {x.shape[:-1]} for every row or {x.shape[:1]} for the first axis"
        )
    if _concrete(assignment) and assignment.size:
        low, high = np.min(np.asarray(assignment)), np.max(np.asarray(assignment))
        if low < -1 or high >= a[0]:
            raise ValueError(
                f"got slots from {low} to {high} in assignment; want 0 to {a[0] - 1}, or -1 for the base alone"
            )


def _pieces_class(implementation: str | None, compute) -> type[EntryPieces]:
    _check_implementation(implementation, compute)
    if implementation == "plain":
        return PlainPieces
    if implementation in (None, "custom_vjp"):
        return EntryPieces
    # Imported on demand: Pallas would be a large part of the time that `import jlora` takes.
    from jlora.kernels import multi_lora_tpu

    interpreted = implementation == "pallas_interpret"
    return multi_lora_tpu.InterpretedPieces if interpreted else multi_lora_tpu.PallasPieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryPieces(Pieces):
    """The products that go by entries, in XLA, beside those of a plain linear. The Pallas kernels override them.

    As there, the leading axes of activations stay as they are. `slot` is never out of range, and `rank` is the number
    of ranks of the slot that count, 0 for an entry of the base alone.
    """

    def shrink(self, v, f, slot, rank) -> Float[Array, "*entries *rows r"]:
        """v_e F_e^T for factors F [slots, r, n]."""
        one = lambda v, slot, rank: self.dot(v, _factor(f, slot, rank), -1, 1)
        return self.for_each_entry(one, f, v, slot, rank)

    def expand(self, g, f, slot, rank) -> Float[Array, "*entries *rows n"]:
        """g_e F_e."""
        one = lambda g, slot, rank: self.dot(g, _factor(f, slot, rank), -1, 0)
        return self.for_each_entry(one, f, g, slot, rank)

    def expand_onto(self, v, m, axis: int, g, f, slot, rank) -> Float[Array, "*entries *rows n"]:
        """v m + g_e F_e, where the product with m contracts its `axis`. Without m, the latter alone."""
        branch = self.expand(g, f, slot, rank)
        return branch if m is None else self.dot(v, m, -1, axis) + branch

    def shrink_and_outer(self, v, f, g, slot, rank) -> tuple[Float[Array, "*entries *rows r"], Float[Array, "*e r n"]]:
        """(v_e F_e^T, g_e^T v_e): all that the factors need of v."""
        return self.shrink(v, f, slot, rank), self.outer(g, v, slot.ndim)

    def outer(self, g, v, entry_axes: int) -> Float[Array, "*entries r n"]:
        """g_e^T v_e."""
        return _vmap(self.sum_over_tokens, entry_axes)(g, v)

    def for_each_entry(self, one, f, v, slot, rank):
        """`one` of each entry's v, slot and rank, where it reads that slot of f."""
        axes, entries, (_, r, n) = slot.ndim, slot.size, f.shape
        at_once = max(1, _CACHE_BYTES // (r * n * f.dtype.itemsize))
        every = _vmap(one, axes)
        if math.prod(v.shape[axes:-1]) >= r or entries <= at_once or v.size == 0:
            return every(v, slot, rank)

        def some_at_a_time(*arrays):
            flat = [m.reshape(entries, *m.shape[axes:]) for m in arrays]
            out = lax.map(lambda entry: one(*entry), flat, batch_size=at_once)
            return out.reshape(*slot.shape, *out.shape[1:])

        return lax.platform_dependent(v, slot, rank, cpu=some_at_a_time, default=every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainPieces(EntryPieces):
    """All entries at once everywhere, for JAX to differentiate."""

    def for_each_entry(self, one, f, v, slot, rank):
        return _vmap(one, slot.ndim)(v, slot, rank)


def _vmap(f, axes: int):
    for _ in range(axes):
        f = jax.vmap(f)
    return f


def _factor(f, slot, rank) -> Float[Array, "r n"]:
    """The factor in a slot, with zeros for the ranks that do not count: a select, so that NaN there goes no further."""
    row = jnp.arange(f.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(row < rank, lax.dynamic_index_in_dim(f, slot, keepdims=False), 0)


def _per_row(entry_value, v):
    """A value for each entry, shaped to multiply v [*entries, *rows, n]."""
    return lax.expand_dims(entry_value, range(entry_value.ndim, v.ndim))


def _plain(pieces: EntryPieces, frozen_w: bool, x, w, a, b, scale, slot, rank):
    h = checkpoint_name(pieces.shrink(x, a, slot, rank), "lora_h")
    y = pieces.expand(_per_row(scale, h) * h, b, slot, rank)
    if w is not None:
        y += _frozen_base(pieces, x, w) if frozen_w else pieces.base(x, w)
    return y.astype(pieces.out)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_gradient(pieces: EntryPieces, frozen_w: bool, x_type, x, a, b, scale, slot, rank, w=None):
    return _forward(pieces, x, a, b, scale, slot, rank, w)[0]


def _forward(pieces, x, a, b, scale, slot, rank, w):
    h = checkpoint_name(pieces.shrink(x, a, slot, rank), "lora_h")
    return pieces.expand_onto(x, w, 0, _per_row(scale, h) * h, b, slot, rank).astype(pieces.out), h


def _fwd(pieces, frozen_w, x_type, x, a, b, scale, slot, rank, w):
    # Under symbolic_zeros every argument says whether it is being differentiated.
    keep_x = a.perturbed or (w is not None and w.perturbed and not frozen_w)
    x, a, b, scale, slot, rank, w = (None if v is None else v.value for v in (x, a, b, scale, slot, rank, w))
    y, h = _forward(pieces, x, a, b, scale, slot, rank, w)
    return y, (x if keep_x else None, a, b, scale, slot, rank, w, h.astype(pieces.compute))


def _bwd(pieces, frozen_w, x_type, residuals, dy):
    if isinstance(dy, SymbolicZero):
        return None, None, None, None, None, None, None
    x, a, b, scale, slot, rank, w, h = residuals
    dy = dy.astype(pieces.compute)
    u, h_dy = pieces.shrink_and_outer(dy, b, h, slot, rank)
    ds = (_per_row(scale, u) * u).astype(pieces.compute)
    dx = pieces.expand_onto(dy, w, 1, ds, a, slot, rank).astype(x_type.dtype)
    da = None if x is None else _sum_by_slot(pieces.outer(ds, x, slot.ndim), slot, rank, a)
    db = _sum_by_slot(_per_row(scale, h_dy) * h_dy, slot, rank, b)
    dw = None if w is None or frozen_w or x is None else pieces.grad_w(x, dy, w).astype(w.dtype)
    return dx, da, db, jnp.sum(h * u, range(slot.ndim, u.ndim)), None, None, dw


_with_gradient.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _sum_by_slot(parts: Float[Array, "*entries r n"], slot, rank, like) -> Float[Array, "slots r n"]:
    """Not a product with a matrix of zeros and ones: that would carry NaN from one adapter to the others."""
    slot = jnp.where(rank > 0, slot, like.shape[0])  # of the base alone: out of range, and dropped
    total = _varying_together(jnp.zeros(like.shape, parts.dtype), parts)[0]
    return total.at[slot].add(parts, mode="drop").astype(like.dtype)


# ---- Rows sorted into tiles ----


@partial(jax.tree_util.register_dataclass, data_fields=("assignment", "source", "place"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Where the rows of a batch go, so that every tile has one adapter, and back. Made by `group_rows`."""

    assignment: Int[Array, " tiles"]  # the slot of each tile, -1 for the base alone
    source: Int[Array, "tiles tile"]  # the row at each place, or the number of rows where there is none
    place: Int[Array, " rows"]  # the place of each row, counted through the tiles

    def group(self, x: Array) -> Array:
        """From [rows, ...] to [tiles, tile, ...], with zeros where there is no row."""
        return _group(*_varying_together(jnp.asarray(x), self.source, self.place))

    def ungroup(self, y: Array) -> Array:
        """From [tiles, tile, ...] to [rows, ...]."""
        return _ungroup(*_varying_together(jnp.asarray(y), self.source, self.place))


def group_rows(assignment: Int[Array, " rows"], tile: int, slots: int) -> Groups:
    """Sorts rows by adapter into tiles of `tile` rows that each have one adapter.

        groups = group_rows(assignment, 64, slots)
        y = groups.ungroup(multi_lora(groups.group(x), w, adapters, groups.assignment))

    Each adapter's last tile is filled up with zeros. For T rows there are (T + n (tile - 1)) / tile tiles, rounded
    down, with n = min(T, slots + 1), whatever the assignment is, which may thus be traced; those that are left over
    are of the base alone. A model sorts its rows once, not at each layer. Attention needs sequences: there `multi_lora`
    takes rows as they are, and an assignment [batch].

    **Arguments:**

    - `assignment`: a slot for every row, -1 (and all else that is not a slot) for the base alone.
    - `tile`: rows of a tile. Large ones are quicker, and waste up to `tile - 1` rows for each adapter that occurs.
    - `slots`: how many slots there are.
    """
    assignment = jnp.asarray(assignment)
    if assignment.ndim != 1 or not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise ValueError(f"got assignment {assignment.shape} of {assignment.dtype}; want integers [rows]")
    if tile < 1 or slots < 1:
        raise ValueError(f"got tile={tile} and slots={slots}; want at least 1 of each")
    assignment = assignment.astype(jnp.promote_types(assignment.dtype, jnp.int32))
    rows = assignment.shape[0]
    tiles = (rows + min(rows, slots + 1) * (tile - 1)) // tile
    group = jnp.where((assignment >= 0) & (assignment < slots), assignment, slots).astype(jnp.int32)
    count = jnp.zeros(slots + 1, jnp.int32).at[group].add(1)
    last_tile = jnp.cumsum((count + tile - 1) // tile)
    first_place = tile * (last_tile - (count + tile - 1) // tile)
    order = jnp.argsort(group, stable=True)
    before = jnp.cumsum(count) - count  # rows of the groups before
    sorted_group = group[order]
    sorted_place = first_place[sorted_group] + jnp.arange(rows, dtype=jnp.int32) - before[sorted_group]
    owner = jnp.searchsorted(last_tile, jnp.arange(tiles, dtype=jnp.int32), side="right").astype(jnp.int32)
    source = jnp.full(tiles * tile, rows, jnp.int32).at[sorted_place].set(order.astype(jnp.int32), unique_indices=True)
    return Groups(
        assignment=jnp.where(owner < slots, owner, -1),
        source=source.reshape(tiles, tile),
        place=jnp.zeros(rows, jnp.int32).at[order].set(sorted_place, unique_indices=True),
    )


# Every row has one place, so that each of the two is the other's transpose. JAX would scatter instead.
@jax.custom_vjp
def _group(x, source, place):
    return x.at[source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _ungroup(y, source, place):
    return y.reshape(-1, *y.shape[2:])[place]


_group.defvjp(lambda *args: (_group(*args), args[1:]), lambda indices, dy: (_ungroup(dy, *indices), None, None))
_ungroup.defvjp(lambda *args: (_ungroup(*args), args[1:]), lambda indices, dx: (_group(dx, *indices), None, None))

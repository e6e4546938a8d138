"""What a method is: a frozen dataclass of hyper-parameters with pure functions.

Three forms. A method implements the cheapest that is exact.

* Factored: override ``factors``, and ``output_gain`` where the columns are rescaled. The forward pass, the transposed
  one, the effective weight and merging follow.
* Weight-space: override ``weight``, and ``forward`` where there is a cheaper way than ``x @ weight(w)``.
* Activation-space: override ``forward``; say by ``mergeable = False`` that there is no weight to merge.

All functions see one matrix: ``w`` is ``[in, out]``, parameters have no stack axes. Layers of a scan and experts are
mapped over by the caller. Shapes below leave the stack axes out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.factors import Factors
from jlora.kernels.dropout import dropout as dropout
from jlora.weight import Axes, Context, Dot, Params


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted leaf: its method and which of its axes are what. Static, hashable.

    Attributes:
      method: the method that adapts the leaf.
      axes: None for a leaf that is replaced as a whole (``Full``, ``Offset``).
      shape: the leaf's shape.
    """

    method: Method
    axes: Axes | None
    shape: tuple[int, ...]

    @property
    def canonical_shape(self) -> tuple[tuple[int, ...], int, int]:
        """(stack sizes, in, out)."""
        return self.axes.canonical_shape(self.shape)

    @property
    def stack(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.canonical_shape[0])

    @property
    def features_axis(self) -> int:
        """Which of a convolution's input axes holds the features, by its place among them."""
        return self.axes.inputs.index(self.axes.features_axis)

    @property
    def window(self) -> tuple[int, int, int]:
        """The inputs of a convolution as (window axes before the features, features, window axes after them)."""
        sizes, at = [self.shape[axis] for axis in self.axes.inputs], self.features_axis
        return math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :])


class Start:
    """How the factors of a method start, other than at random and zero: the protocol of ``jlora.init``.

    Frozen dataclasses, and given to a method: ``LoRA(8, start=jlora.init.PiSSA())``. Functions see one matrix.

    Class attributes:
      needs: names of the statistics (``jlora.calibrate``) it starts from.
      subtracts: the product does not start at zero, and the method takes what it starts at away again: the output
        starts as the base's, and the base stays as it is.
      nested: its leading columns are its start of lower rank.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    subtracts: ClassVar[bool] = True
    nested: ClassVar[bool] = False

    def check(self, rank: int, site: Site) -> str | None:
        """What is wrong with this start on a leaf of this shape, in words; None if nothing is."""

    def check_stats(self, rank: int, site: Site, stats: Mapping[str, Array]) -> str | None:
        """What is wrong with the statistics of a leaf, [*stack, ...]."""

    def pair(
        self, key: PRNGKeyArray, w: Float[Array, "in out"], rank: int, scale: float, stats: Mapping[str, Array] | None
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """A and B."""
        raise NotImplementedError(f"{type(self).__name__} does not start a pair of factors.")

    def allocate(self, sites: dict[str, Site], stats: Mapping[str, Mapping[str, Array]]) -> dict[str, Site]:
        """All leaves that start so, with the ranks that they are to have. A leaf that gets none is left out."""
        return sites


def check_start(start: Any, method: str) -> None:
    require(
        start is None or isinstance(start, Start),
        f"{method}(start={start!r}): one of jlora.init is wanted, like jlora.init.PiSSA(), or None.",
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods; see the module's docstring for what to override.

    Class attributes:
      mergeable: whether the adapted weight is a weight.
      whole_leaf: the method replaces the leaf itself (any shape) before the model sees it, instead of standing in for a
        matrix at the products that use it.
      sliceable: the groups ("in", "out") along which a slice of the adapted weight is the method on sliced parameters.
      replaces: the weight stands in the method's place for its shape alone: ``jlora.factorize`` drops it.
      lookup_only: adapt only the lookups of an embedding, not its use as an output head.
      group: name of the parameters shared by all leaves of this method, or None.
      dropout: rate on the input of a factored branch; active exactly when the tree was bound with a key.
      draws: the forward pass draws random numbers where the tree was bound with a key, without dropout, too.
      needs_weights: what the group shares follows from its weights, and the start of a leaf from both: ``init_shared``
        is given ``weights``, {path: [*stack, in, out]}, and ``init`` what it made, as ``shared``.
      follows_weight: what a bias becomes (``follow``) depends on the weight, too, which is then beside the parameters,
        ``"weight"``.
      model_key: hand the key that the tree was bound with to the method as the context's ``values["key"]``, for what is
        drawn once for the whole model. ``Context.key`` is another one for every matrix and use.
      needs: names of the statistics (``jlora.calibrate``) from which the method starts, which is then its field
        ``start``. ``init`` is given ``stats``, {name: what there is for one matrix}.
    """

    mergeable: ClassVar[bool] = True
    whole_leaf: ClassVar[bool] = False
    sliceable: ClassVar[frozenset[str]] = frozenset()
    replaces: ClassVar[bool] = False
    lookup_only: ClassVar[bool] = False
    group: ClassVar[str | None] = None
    dropout: ClassVar[float] = 0.0
    needs_weights: ClassVar[bool] = False
    follows_weight: ClassVar[bool] = False
    model_key: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    # Creation.

    def check(self, site: Site) -> str | None:
        """What is wrong with this method on a leaf of this shape, in words; None if nothing is."""

    def check_stats(self, site: Site, stats: Mapping[str, Array]) -> str | None:
        """What is wrong with the statistics, [*stack, ...], that a leaf of this method is to start from."""

    def init(self, key: PRNGKeyArray, w: Float[Array, "in out"], site: Site, dtype: Any) -> Params:
        """Trainable and frozen parameters for one matrix."""
        raise NotImplementedError(f"{type(self).__name__} does not define init.")

    def init_stack(self, p: Params, site: Site, dtype: Any) -> Params:
        """``p``, what ``init`` gave for all matrices together ``[*stack, ...]``, with what differs along the stack by
        configuration."""
        return p

    def init_shared(self, key: PRNGKeyArray, sites: dict[str, Site], dtype: Any) -> Params:
        """Trainable and frozen parameters of the group, for all the leaves together."""
        raise NotImplementedError(f"{type(self).__name__} has a group but does not define init_shared.")

    def init_members(self, key: PRNGKeyArray, sites: dict[str, Site], dtype: Any) -> dict[str, dict[str, Array]]:
        """Frozen parameters of the group's leaves that depend on all of them (places in a store, say), by path, with
        the stack axes. They join what ``init`` gave. ``key`` is the one of ``init_shared``."""
        return {}

    def count(self, site: Site) -> int:
        """Trainable parameters of one leaf, by the paper's formula (what the group shares not included)."""
        raise NotImplementedError(f"{type(self).__name__} does not define count.")

    def count_shared(self, sites: dict[str, Site]) -> int:
        """Trainable parameters of the group, once for all its leaves."""
        return 0

    def dims(self, p: Params) -> Params:
        """Names of the axes of every parameter, as a tree like ``p`` with a string for each leaf: the words "in", "out"
        and "rank", and "_" for anything else."""
        raise NotImplementedError(f"{type(self).__name__} does not define dims.")

    # Use.

    def enter(self, path: str, site: Site, p: Params, values: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """The parameters of a leaf, ``[*stack, ...]``, and the values of a context, as they go into the model. A scan
        slices parameters and not values: of a method that takes values for each matrix, they join ``p.frozen`` here."""
        return p, values

    def factors(self, w: Float[Array, "in out"], p: Params) -> Factors | None:
        """The pair whose product is added to the weight (w is there for its shape). Factored methods override this."""

    def output_gain(self, w: Float[Array, "in out"], p: Params) -> Float[Array, " out"] | None:
        """What multiplies the columns of (w + product of the factors), or None for ones."""

    def weight(self, w: Float[Array, "in out"], p: Params) -> Float[Array, "in out"]:
        """The effective weight, in the dtype of w. Weight-space methods override this."""
        if not self.mergeable:
            raise ValueError(
                f"{self.name} acts on activations: there is no weight that does what it does. The model uses the "
                "adapted leaf otherwise than in products with the whole of it (a slice, a transpose, arithmetic on the "
                "weight itself); leave the leaf out of the targets."
            )
        f, gain = self.factors(w, p), self.output_gain(w, p)
        if f is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither factors nor weight.")
        w = w + f.scale * (f.a.astype(w.dtype) @ f.b.astype(w.dtype))
        return w if gain is None else w * gain.astype(w.dtype)

    def follow(self, b: Float[Array, "1 out"], p: Params) -> Float[Array, "1 out"]:
        """A bias changed as the outputs of the weight are (``Follow``): by default as one more row of inputs."""
        return self.weight(b, p)

    def weight_in(self, w: Float[Array, "in out"], p: Params, values: Mapping[str, Any]) -> Float[Array, "in out"]:
        """The effective weight with these ``values`` of a context. Methods that take some override this."""
        return self.weight(w, p)

    def forward(self, dot: Dot, x: Array, w: Array, p: Params, ctx: Context) -> tuple[Array, Any]:
        """(x times the effective weight, what the method reports or None)."""
        f = dot.per_matrix(self.factors, w, p)
        if f is None:
            return dot(x, dot.per_matrix(self.weight, w, p)), None
        y = dot.factored(x, w, f, ctx, self.dropout)
        gain = dot.per_matrix(self.output_gain, w, p)
        return (y if gain is None else dot.per_output(y, gain)), None

    def is_branch(self, keyed: bool) -> bool:
        """Whether ``factors`` and ``output_gain`` say all that ``forward`` does, and x is what the model gave, with or
        without a random key. Products of one x by such methods are computed together.

        Not so where leaves share parameters: they may have one A, which XLA multiplies by x once as it is.
        """
        is_factored = type(self).forward is Method.forward and type(self).factors is not Method.factors
        return is_factored and self.group is None and not (keyed and (self.dropout or self.draws))

    def forward_transposed(self, dot: Dot, x: Array, wt: Float[Array, "out in"], p: Params, ctx: Context) -> Array:
        """x times the transposed effective weight, given ``wt = w.T``. Dropout has no part in it."""
        w = wt.T
        f, gain = self.factors(w, p), self.output_gain(w, p)
        if f is None:
            return dot(x, self.weight(w, p).T)
        x = x if gain is None else x * gain.astype(x.dtype)
        return dot.factored(x, wt, f.swap(), ctx)

    # Training.

    def project(self, p: Params) -> Any:
        """The trainable parameters moved to where the method keeps them between steps, for methods that keep them
        anywhere. ``weight`` and ``forward`` are the same before and after."""
        return p.trainable

    # Ranks (``jlora.rank``, ``jlora.repack``).

    def live(self, p: Params) -> Array | None:
        """Which terms of rank one are in use: ``[*stack, r]``, zero where not. None for methods of which none can be
        dropped. ``p`` has the stack axes."""

    def cut(self, p: Params, ranks: tuple[int, ...]) -> tuple[Method, Params]:
        """This method at a lower rank and the same scale, and its parameters, for all matrices together. ``p`` holds
        the terms that are kept; ``ranks`` says how many of them each matrix has, the rest being zero."""
        raise NotImplementedError(f"{type(self).__name__} does not define cut.")

    # What people read.

    @property
    def name(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        """The call that makes it, without what is at its default."""
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def describe(self) -> dict[str, str]:
        """Columns of ``jlora.summary``: rank and scale, where the method has them."""
        return {}


def check_rank(rank: int, site: Site) -> str | None:
    """The rule for factored methods whose rank cannot usefully exceed the matrix's."""
    _, n_in, n_out = site.canonical_shape
    if rank > min(n_in, n_out):
        return f"rank {rank} is above min(in, out) = {min(n_in, n_out)}; choose a rank of at most {min(n_in, n_out)}"
    return None


def at_most(most: int, what: str = "rank") -> str:
    """What a check says to do about a number that is too large, and 1 at the least."""
    return (
        f"choose a {what} of at most {most}"
        if most > 0
        else f"no {what} fits: leave it out of the targets, or use Full()"
    )


def unsharded(w: Array) -> Array:
    """``w`` whole on every device, where its type says that it is not (explicit sharding): starts that decompose or
    slice a weight want that said."""
    sharding = jax.typeof(w).sharding
    if all(axis is None for axis in sharding.spec):
        return w
    return jax.reshard(w, NamedSharding(sharding.mesh, PartitionSpec(*(None,) * w.ndim)))


def to_blocks(w: Float[Array, "in out"], rows: int, cols: int) -> Float[Array, "i rows o cols"]:
    """``w`` cut into blocks. Where its type says how it is sharded (explicit sharding), whole blocks stay where they
    are; blocks that are cut by the sharding make the axis whole."""
    sharding = jax.typeof(w).sharding
    shape = (w.shape[0] // rows, rows, w.shape[1] // cols, cols)
    if all(axis is None for axis in sharding.spec):
        return w.reshape(shape)
    parts = lambda axis: math.prod(sharding.mesh.shape[name] for name in jax.tree.leaves(axis))
    spec = [axis if n % parts(axis) == 0 else None for axis, n in zip(sharding.spec, shape[::2], strict=True)]
    w = jax.reshard(w, PartitionSpec(*spec))
    return jax.lax.reshape(w, shape, out_sharding=PartitionSpec(spec[0], None, spec[1], None))


def from_blocks(blocks: Float[Array, "i rows o cols"], like: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The inverse, sharded as ``like``."""
    rows, _, cols, _ = jax.typeof(blocks).sharding.spec
    spec = PartitionSpec(rows, cols)
    if rows is None and cols is None:
        return blocks.reshape(like.shape)
    merged = jax.lax.reshape(blocks, like.shape, out_sharding=spec)
    return jax.reshard(merged, PartitionSpec(*jax.typeof(like).sharding.spec))


def laid_as(w: Array, a: Float[Array, "in r"], b: Float[Array, "r out"]) -> tuple[Array, Array]:
    """``a`` and ``b`` sharded as their axes of ``w`` are by its type (explicit sharding), so that their product is
    formed where ``w`` lies. For methods that form a change of the weight; the same arrays elsewhere."""
    n_in, n_out = jax.typeof(w).sharding.spec
    a = a if n_in is None else jax.reshard(a, PartitionSpec(n_in, None))
    return a, b if n_out is None else jax.reshard(b, PartitionSpec(None, n_out))


def contract(x: Float[Array, "*n k"], m: Float[Array, "k r"], dtype: Any = None) -> Float[Array, "*n r"]:
    """``x @ m``. Where k is sharded by the type of ``x`` (explicit sharding), ``m`` is laid as it is and what comes out
    is summed over the devices, in place of gathering ``x``."""
    *rows, k = jax.typeof(x).sharding.spec
    m = m if k is None else jax.reshard(m, PartitionSpec(k, None))
    spec = None if k is None and all(axis is None for axis in rows) else PartitionSpec(*rows, None)
    return jnp.matmul(x, m, preferred_element_type=dtype, out_sharding=spec)


def sharded_as(w: Array, change: Array) -> Array:
    """``change`` sharded as ``w`` is by its type (explicit sharding), so that the two add up; the same elsewhere."""
    spec = jax.typeof(w).sharding.spec
    return change if all(axis is None for axis in spec) else jax.reshard(change, PartitionSpec(*spec))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

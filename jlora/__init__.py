"""Low-rank adaptation of any JAX model, as pure functions over parameter pytrees."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from jlora import methods
from jlora.adapt import Adapted as Adapted
from jlora.adapt import adapt as adapt
from jlora.adapt import summary as summary
from jlora.calibrate import Calibration as Calibration
from jlora.calibrate import calibrate as calibrate
from jlora.convert import to_lora as to_lora
from jlora.factorize import factorize as factorize
from jlora.factors import Factors as Factors
from jlora.lift import LeafUsage as LeafUsage
from jlora.lift import MaterializeWarning as MaterializeWarning
from jlora.lift import Stats as Stats
from jlora.lift import capture as capture
from jlora.lift import lift as lift
from jlora.lift import usage as usage
from jlora.merge import merge as merge
from jlora.offload import offload as offload
from jlora.repack import repack as repack
from jlora.weight import Axes as Axes

if TYPE_CHECKING:
    from jlora import compress as compress
    from jlora import diagnostics as diagnostics
    from jlora import evolve as evolve
    from jlora import init as init
    from jlora import optim as optim
    from jlora import quant as quant
    from jlora import rank as rank
    from jlora import shard as shard
    from jlora.methods import BOFT as BOFT
    from jlora.methods import C3A as C3A
    from jlora.methods import DEFT as DEFT
    from jlora.methods import HGF as HGF
    from jlora.methods import HRA as HRA
    from jlora.methods import IA3 as IA3
    from jlora.methods import MTSK as MTSK
    from jlora.methods import NOBLE as NOBLE
    from jlora.methods import NOLA as NOLA
    from jlora.methods import OFT as OFT
    from jlora.methods import OSF as OSF
    from jlora.methods import PELA as PELA
    from jlora.methods import PSOFT as PSOFT
    from jlora.methods import SALT as SALT
    from jlora.methods import AdaLoRA as AdaLoRA
    from jlora.methods import AdaMSS as AdaMSS
    from jlora.methods import ALLoRA as ALLoRA
    from jlora.methods import ALoRA as ALoRA
    from jlora.methods import Bat as Bat
    from jlora.methods import BDLoRA as BDLoRA
    from jlora.methods import BlockLoRA as BlockLoRA
    from jlora.methods import Bottleneck as Bottleneck
    from jlora.methods import ConvLoRA as ConvLoRA
    from jlora.methods import CPLoRA as CPLoRA
    from jlora.methods import DeLoRA as DeLoRA
    from jlora.methods import DoRA as DoRA
    from jlora.methods import DyLoRA as DyLoRA
    from jlora.methods import FLoRA as FLoRA
    from jlora.methods import FourierFT as FourierFT
    from jlora.methods import FRoD as FRoD
    from jlora.methods import Full as Full
    from jlora.methods import GLoRA as GLoRA
    from jlora.methods import GraLoRA as GraLoRA
    from jlora.methods import HiRA as HiRA
    from jlora.methods import Hydra as Hydra
    from jlora.methods import IntTune as IntTune
    from jlora.methods import Invertible as Invertible
    from jlora.methods import KaSA as KaSA
    from jlora.methods import Lily as Lily
    from jlora.methods import LoHa as LoHa
    from jlora.methods import LoKr as LoKr
    from jlora.methods import LoLA as LoLA
    from jlora.methods import LoLDU as LoLDU
    from jlora.methods import LoRA as LoRA
    from jlora.methods import LoRAXS as LoRAXS
    from jlora.methods import Maestro as Maestro
    from jlora.methods import MarkBoard as MarkBoard
    from jlora.methods import MatryoshkaLoRA as MatryoshkaLoRA
    from jlora.methods import MiddleLoRA as MiddleLoRA
    from jlora.methods import MiSS as MiSS
    from jlora.methods import MonteCLoRA as MonteCLoRA
    from jlora.methods import MoS as MoS
    from jlora.methods import MTLoRA as MTLoRA
    from jlora.methods import NeRA as NeRA
    from jlora.methods import NLoRA as NLoRA
    from jlora.methods import Offset as Offset
    from jlora.methods import PaCA as PaCA
    from jlora.methods import PEANuT as PEANuT
    from jlora.methods import Poly as Poly
    from jlora.methods import PVeRA as PVeRA
    from jlora.methods import RandLoRA as RandLoRA
    from jlora.methods import RoAd as RoAd
    from jlora.methods import SHiRA as SHiRA
    from jlora.methods import SLoRA as SLoRA
    from jlora.methods import SLTrain as SLTrain
    from jlora.methods import SoKA as SoKA
    from jlora.methods import SoRA as SoRA
    from jlora.methods import SuperTuning as SuperTuning
    from jlora.methods import TeRA as TeRA
    from jlora.methods import TiedLoRA as TiedLoRA
    from jlora.methods import TinyLoRA as TinyLoRA
    from jlora.methods import TrainableTokens as TrainableTokens
    from jlora.methods import TriAdaptLoRA as TriAdaptLoRA
    from jlora.methods import TuckerLoRA as TuckerLoRA
    from jlora.methods import UniLoRA as UniLoRA
    from jlora.methods import VBLoRA as VBLoRA
    from jlora.methods import VeLoRA as VeLoRA
    from jlora.methods import VeRA as VeRA
    from jlora.methods import ViDA as ViDA
    from jlora.methods import WaveFT as WaveFT
    from jlora.methods import XLoRA as XLoRA

__version__ = "0.1.0"

_SUBPACKAGES = ("compress", "diagnostics", "evolve", "init", "optim", "quant", "rank", "shard")


def __getattr__(name: str) -> Any:
    """The methods and what most programs do not need are imported when they are asked for."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"jlora.{name}")
    try:
        return getattr(methods, name)
    except AttributeError:
        names = {known.lower(): known for known in sorted(__dir__(), reverse=True)}  # LoRA, rather than its module
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)
        hint = f"; did you mean {names[near[0]]}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *dir(methods)})

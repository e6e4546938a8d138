"""Every method, by name. A new one is a file beside this one and two lines here.

A file is imported when its method is first asked for: `import jlora` does not wait for all of them.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jlora.methods.base import Method as Method
from jlora.methods.base import Site as Site

if TYPE_CHECKING:
    from jlora.methods.adalora import AdaLoRA as AdaLoRA
    from jlora.methods.adamss import AdaMSS as AdaMSS
    from jlora.methods.allora import ALLoRA as ALLoRA
    from jlora.methods.alora import ALoRA as ALoRA
    from jlora.methods.bdlora import BDLoRA as BDLoRA
    from jlora.methods.boft import BOFT as BOFT
    from jlora.methods.bottleneck import Bottleneck as Bottleneck
    from jlora.methods.c3a import C3A as C3A
    from jlora.methods.deft import DEFT as DEFT
    from jlora.methods.delora import DeLoRA as DeLoRA
    from jlora.methods.dora import DoRA as DoRA
    from jlora.methods.fourierft import FourierFT as FourierFT
    from jlora.methods.frod import FRoD as FRoD
    from jlora.methods.glora import GLoRA as GLoRA
    from jlora.methods.gralora import GraLoRA as GraLoRA
    from jlora.methods.hgf import HGF as HGF
    from jlora.methods.hira import HiRA as HiRA
    from jlora.methods.hra import HRA as HRA
    from jlora.methods.hydra import Hydra as Hydra
    from jlora.methods.ia3 import IA3 as IA3
    from jlora.methods.invertible import Invertible as Invertible
    from jlora.methods.kasa import KaSA as KaSA
    from jlora.methods.kernel import ConvLoRA as ConvLoRA
    from jlora.methods.kernel import CPLoRA as CPLoRA
    from jlora.methods.kernel import KernelLoRA as KernelLoRA
    from jlora.methods.kernel import TuckerLoRA as TuckerLoRA
    from jlora.methods.lily import Lily as Lily
    from jlora.methods.loha import LoHa as LoHa
    from jlora.methods.lokr import LoKr as LoKr
    from jlora.methods.lola import LoLA as LoLA
    from jlora.methods.loldu import LoLDU as LoLDU
    from jlora.methods.lora import LoRA as LoRA
    from jlora.methods.maestro import Maestro as Maestro
    from jlora.methods.markboard import MarkBoard as MarkBoard
    from jlora.methods.middle import FLoRA as FLoRA
    from jlora.methods.middle import IntTune as IntTune
    from jlora.methods.middle import LoRAXS as LoRAXS
    from jlora.methods.middle import MiddleLoRA as MiddleLoRA
    from jlora.methods.middle import NLoRA as NLoRA
    from jlora.methods.middle import SLoRA as SLoRA
    from jlora.methods.miss import Bat as Bat
    from jlora.methods.miss import MiSS as MiSS
    from jlora.methods.monteclora import MonteCLoRA as MonteCLoRA
    from jlora.methods.mos import MoS as MoS
    from jlora.methods.mtlora import MTLoRA as MTLoRA
    from jlora.methods.mtsk import MTSK as MTSK
    from jlora.methods.nera import NeRA as NeRA
    from jlora.methods.nested import DyLoRA as DyLoRA
    from jlora.methods.nested import MatryoshkaLoRA as MatryoshkaLoRA
    from jlora.methods.noble import NOBLE as NOBLE
    from jlora.methods.nola import NOLA as NOLA
    from jlora.methods.oft import OFT as OFT
    from jlora.methods.osf import OSF as OSF
    from jlora.methods.paca import PaCA as PaCA
    from jlora.methods.peanut import PEANuT as PEANuT
    from jlora.methods.pela import PELA as PELA
    from jlora.methods.poly import Poly as Poly
    from jlora.methods.pvera import PVeRA as PVeRA
    from jlora.methods.randlora import RandLoRA as RandLoRA
    from jlora.methods.road import RoAd as RoAd
    from jlora.methods.salt import SALT as SALT
    from jlora.methods.shira import SHiRA as SHiRA
    from jlora.methods.sltrain import SLTrain as SLTrain
    from jlora.methods.soka import SoKA as SoKA
    from jlora.methods.sora import SoRA as SoRA
    from jlora.methods.spectral import PSOFT as PSOFT
    from jlora.methods.spectral import TinyLoRA as TinyLoRA
    from jlora.methods.split import BlockLoRA as BlockLoRA
    from jlora.methods.split import TriAdaptLoRA as TriAdaptLoRA
    from jlora.methods.supertuning import SuperTuning as SuperTuning
    from jlora.methods.tera import TeRA as TeRA
    from jlora.methods.tied import TiedLoRA as TiedLoRA
    from jlora.methods.tokens import TrainableTokens as TrainableTokens
    from jlora.methods.unilora import UniLoRA as UniLoRA
    from jlora.methods.vblora import VBLoRA as VBLoRA
    from jlora.methods.velora import VeLoRA as VeLoRA
    from jlora.methods.vera import VeRA as VeRA
    from jlora.methods.vida import ViDA as ViDA
    from jlora.methods.waveft import WaveFT as WaveFT
    from jlora.methods.whole import Follow as Follow
    from jlora.methods.whole import Full as Full
    from jlora.methods.whole import Offset as Offset
    from jlora.methods.xlora import XLoRA as XLoRA

_WHERE = {  # name: file and class
    "lora": "lora.LoRA",
    "dora": "dora.DoRA",
    "vera": "vera.VeRA",
    "vblora": "vblora.VBLoRA",
    "unilora": "unilora.UniLoRA",
    "randlora": "randlora.RandLoRA",
    "tied_lora": "tied.TiedLoRA",
    "nola": "nola.NOLA",
    "mos": "mos.MoS",
    "gralora": "gralora.GraLoRA",
    "oft": "oft.OFT",
    "miss": "miss.MiSS",
    "bat": "miss.Bat",
    "loha": "loha.LoHa",
    "hira": "hira.HiRA",
    "lokr": "lokr.LoKr",
    "lora_xs": "middle.LoRAXS",
    "slora": "middle.SLoRA",
    "nlora": "middle.NLoRA",
    "inttune": "middle.IntTune",
    "flora": "middle.FLoRA",
    "delora": "delora.DeLoRA",
    "hra": "hra.HRA",
    "adalora": "adalora.AdaLoRA",
    "tokens": "tokens.TrainableTokens",
    "shira": "shira.SHiRA",
    "road": "road.RoAd",
    "matryoshka_lora": "nested.MatryoshkaLoRA",
    "dylora": "nested.DyLoRA",
    "sora": "sora.SoRA",
    "loldu": "loldu.LoLDU",
    "block_lora": "split.BlockLoRA",
    "triadapt_lora": "split.TriAdaptLoRA",
    "boft": "boft.BOFT",
    "fourierft": "fourierft.FourierFT",
    "waveft": "waveft.WaveFT",
    "paca": "paca.PaCA",
    "salt": "salt.SALT",
    "soka": "soka.SoKA",
    "tera": "tera.TeRA",
    "ia3": "ia3.IA3",
    "c3a": "c3a.C3A",
    "peanut": "peanut.PEANuT",
    "pvera": "pvera.PVeRA",
    "psoft": "spectral.PSOFT",
    "tinylora": "spectral.TinyLoRA",
    "supertuning": "supertuning.SuperTuning",
    "pela": "pela.PELA",
    "sltrain": "sltrain.SLTrain",
    "maestro": "maestro.Maestro",
    "conv_lora": "kernel.ConvLoRA",
    "cp_lora": "kernel.CPLoRA",
    "tucker_lora": "kernel.TuckerLoRA",
    "hydra": "hydra.Hydra",
    "noble": "noble.NOBLE",
    "nera": "nera.NeRA",
    "bottleneck": "bottleneck.Bottleneck",
    "invertible": "invertible.Invertible",
    "hgf": "hgf.HGF",
    "deft": "deft.DEFT",
    "mtlora": "mtlora.MTLoRA",
    "vida": "vida.ViDA",
    "markboard": "markboard.MarkBoard",
    "mtsk": "mtsk.MTSK",
    "lola": "lola.LoLA",
    "xlora": "xlora.XLoRA",
    "alora": "alora.ALoRA",
    "osf": "osf.OSF",
    "frod": "frod.FRoD",
    "adamss": "adamss.AdaMSS",
    "glora": "glora.GLoRA",
    "lily": "lily.Lily",
    "poly": "poly.Poly",
    "bd_lora": "bdlora.BDLoRA",
    "kasa": "kasa.KaSA",
    "velora": "velora.VeLoRA",
    "allora": "allora.ALLoRA",
    "monteclora": "monteclora.MonteCLoRA",
    "full": "whole.Full",
    "offset": "whole.Offset",
}
_BESIDE = ("kernel.KernelLoRA", "middle.MiddleLoRA", "whole.Follow")  # for Python programs only
_FILES = {cls: file for file, _, cls in (where.partition(".") for where in (*_WHERE.values(), *_BESIDE))}


def __getattr__(name: str) -> type[Method]:
    if name in _FILES:
        return getattr(importlib.import_module(f"jlora.methods.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FILES])


class _Methods(Mapping[str, type[Method]]):
    def __getitem__(self, name: str) -> type[Method]:
        return __getattr__(_WHERE[name].partition(".")[2])

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)

    def __contains__(self, name: object) -> bool:  # without importing it
        return name in _WHERE


METHODS: Mapping[str, type[Method]] = _Methods()

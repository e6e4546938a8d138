"""Every method, by name. A new one is a file beside this one and a line here."""

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.adamss import AdaMSS as AdaMSS
from jlora.methods.alora import ALoRA as ALoRA
from jlora.methods.base import Method as Method
from jlora.methods.base import Site as Site
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
from jlora.methods.markboard import MarkBoard as MarkBoard
from jlora.methods.middle import FLoRA as FLoRA
from jlora.methods.middle import IntTune as IntTune
from jlora.methods.middle import LoRAXS as LoRAXS
from jlora.methods.middle import MiddleLoRA as MiddleLoRA
from jlora.methods.middle import NLoRA as NLoRA
from jlora.methods.middle import SLoRA as SLoRA
from jlora.methods.miss import Bat as Bat
from jlora.methods.miss import MiSS as MiSS
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
from jlora.methods.vera import VeRA as VeRA
from jlora.methods.vida import ViDA as ViDA
from jlora.methods.waveft import WaveFT as WaveFT
from jlora.methods.whole import Follow as Follow
from jlora.methods.whole import Full as Full
from jlora.methods.whole import Offset as Offset
from jlora.methods.xlora import XLoRA as XLoRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "vblora": VBLoRA,
    "unilora": UniLoRA,
    "randlora": RandLoRA,
    "tied_lora": TiedLoRA,
    "nola": NOLA,
    "mos": MoS,
    "gralora": GraLoRA,
    "oft": OFT,
    "miss": MiSS,
    "bat": Bat,
    "loha": LoHa,
    "hira": HiRA,
    "lokr": LoKr,
    "lora_xs": LoRAXS,
    "slora": SLoRA,
    "nlora": NLoRA,
    "inttune": IntTune,
    "flora": FLoRA,
    "delora": DeLoRA,
    "hra": HRA,
    "adalora": AdaLoRA,
    "tokens": TrainableTokens,
    "shira": SHiRA,
    "road": RoAd,
    "matryoshka_lora": MatryoshkaLoRA,
    "dylora": DyLoRA,
    "sora": SoRA,
    "loldu": LoLDU,
    "block_lora": BlockLoRA,
    "triadapt_lora": TriAdaptLoRA,
    "boft": BOFT,
    "fourierft": FourierFT,
    "waveft": WaveFT,
    "paca": PaCA,
    "salt": SALT,
    "soka": SoKA,
    "tera": TeRA,
    "ia3": IA3,
    "c3a": C3A,
    "peanut": PEANuT,
    "pvera": PVeRA,
    "psoft": PSOFT,
    "tinylora": TinyLoRA,
    "supertuning": SuperTuning,
    "pela": PELA,
    "conv_lora": ConvLoRA,
    "cp_lora": CPLoRA,
    "tucker_lora": TuckerLoRA,
    "hydra": Hydra,
    "noble": NOBLE,
    "nera": NeRA,
    "bottleneck": Bottleneck,
    "invertible": Invertible,
    "hgf": HGF,
    "deft": DEFT,
    "mtlora": MTLoRA,
    "vida": ViDA,
    "markboard": MarkBoard,
    "mtsk": MTSK,
    "lola": LoLA,
    "xlora": XLoRA,
    "alora": ALoRA,
    "osf": OSF,
    "frod": FRoD,
    "adamss": AdaMSS,
    "glora": GLoRA,
    "lily": Lily,
    "poly": Poly,
    "bd_lora": BDLoRA,
    "kasa": KaSA,
    "full": Full,
    "offset": Offset,
}

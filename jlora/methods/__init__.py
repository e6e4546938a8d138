"""Every method, by name. A new one is a file beside this one and a line here."""

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.base import Method as Method
from jlora.methods.base import Site as Site
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.c3a import C3A as C3A
from jlora.methods.delora import DeLoRA as DeLoRA
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.fourierft import FourierFT as FourierFT
from jlora.methods.gralora import GraLoRA as GraLoRA
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.hra import HRA as HRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.loldu import LoLDU as LoLDU
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.middle import FLoRA as FLoRA
from jlora.methods.middle import IntTune as IntTune
from jlora.methods.middle import LoRAXS as LoRAXS
from jlora.methods.middle import MiddleLoRA as MiddleLoRA
from jlora.methods.middle import NLoRA as NLoRA
from jlora.methods.middle import SLoRA as SLoRA
from jlora.methods.miss import Bat as Bat
from jlora.methods.miss import MiSS as MiSS
from jlora.methods.mos import MoS as MoS
from jlora.methods.nested import DyLoRA as DyLoRA
from jlora.methods.nested import MatryoshkaLoRA as MatryoshkaLoRA
from jlora.methods.nola import NOLA as NOLA
from jlora.methods.oft import OFT as OFT
from jlora.methods.randlora import RandLoRA as RandLoRA
from jlora.methods.road import RoAd as RoAd
from jlora.methods.shira import SHiRA as SHiRA
from jlora.methods.sora import SoRA as SoRA
from jlora.methods.split import BlockLoRA as BlockLoRA
from jlora.methods.split import TriAdaptLoRA as TriAdaptLoRA
from jlora.methods.tied import TiedLoRA as TiedLoRA
from jlora.methods.tokens import TrainableTokens as TrainableTokens
from jlora.methods.unilora import UniLoRA as UniLoRA
from jlora.methods.vblora import VBLoRA as VBLoRA
from jlora.methods.vera import VeRA as VeRA
from jlora.methods.whole import Follow as Follow
from jlora.methods.whole import Full as Full
from jlora.methods.whole import Offset as Offset

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
    "ia3": IA3,
    "c3a": C3A,
    "full": Full,
    "offset": Offset,
}

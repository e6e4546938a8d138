"""Every ``peft_type`` that is read and written."""

from jlora.io.adalora import AdaloraFormat
from jlora.io.beft import BeftFormat
from jlora.io.boft import BoftFormat
from jlora.io.c3a import C3aFormat
from jlora.io.deft import DeftFormat
from jlora.io.delora import DeloraFormat
from jlora.io.format import Format
from jlora.io.fourierft import FourierftFormat
from jlora.io.frod import FrodFormat
from jlora.io.glora import GloraFormat
from jlora.io.gralora import GraloraFormat
from jlora.io.hira import HiraFormat
from jlora.io.hra import HraFormat
from jlora.io.ia3 import IA3Format
from jlora.io.lily import LilyFormat
from jlora.io.ln_tuning import LnTuningFormat
from jlora.io.loha import LohaFormat
from jlora.io.lokr import LokrFormat
from jlora.io.lora import LoraFormat
from jlora.io.miss import MissFormat
from jlora.io.oft import OftFormat
from jlora.io.osf import OsfFormat
from jlora.io.peanut import PeanutFormat
from jlora.io.poly import PolyFormat
from jlora.io.psoft import PsoftFormat
from jlora.io.pvera import PveraFormat
from jlora.io.randlora import RandloraFormat
from jlora.io.road import RoadFormat
from jlora.io.shira import ShiraFormat
from jlora.io.supertuning import SupertuningFormat
from jlora.io.tinylora import TinyloraFormat
from jlora.io.tokens import TokensFormat
from jlora.io.unilora import UniloraFormat
from jlora.io.vblora import VbloraFormat
from jlora.io.vera import VeraFormat
from jlora.io.waveft import WaveftFormat

FORMATS: dict[str, Format] = {
    format.peft_type: format
    for format in (
        LoraFormat(),
        GraloraFormat(),
        LohaFormat(),
        LokrFormat(),
        HiraFormat(),
        MissFormat(),
        HraFormat(),
        OftFormat(),
        BoftFormat(),
        RoadFormat(),
        DeloraFormat(),
        AdaloraFormat(),
        ShiraFormat(),
        TokensFormat(),
        FourierftFormat(),
        WaveftFormat(),
        IA3Format(),
        C3aFormat(),
        VeraFormat(),
        PveraFormat(),
        TinyloraFormat(),
        PsoftFormat(),
        PeanutFormat(),
        SupertuningFormat(),
        LnTuningFormat(),
        VbloraFormat(),
        UniloraFormat(),
        RandloraFormat(),
        BeftFormat(),
        LilyFormat(),
        GloraFormat(),
        OsfFormat(),
        FrodFormat(),
        DeftFormat(),
        PolyFormat(),
    )
}

"""The compression methods, by name. A new method is one file here and one line below."""

from __future__ import annotations

from raybert.method import MethodConfig
from raybert.methods.ebert import EBERT
from raybert.methods.lobert import LoBERT
from raybert.methods.ma_bert import MABERT
from raybert.methods.q8bert import Q8BERT
from raybert.methods.theseus import Theseus

METHODS: dict[str, type[MethodConfig]] = {
    "theseus": Theseus,
    "lobert": LoBERT,
    "ebert": EBERT,
    "ma_bert": MABERT,
    "q8bert": Q8BERT,
}

"""The compression methods, by name. A new method is one file here and one line below."""

from __future__ import annotations

from raybert.config import MethodConfig
from raybert.methods.theseus import Theseus

METHODS: dict[str, type[MethodConfig]] = {"theseus": Theseus}

"""The optimizers: one entry each, with the settings that params.yaml gives.

An entry says all that the rest of the program knows of an optimizer: its name, torch's class and the types of
that class's keywords. To add one is to add an entry (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from resgrid.schema import Fraction, NotNegative, Positive, Strict


class Sgd(Strict):
    momentum: Fraction
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(Strict):
    betas: tuple[Fraction, Fraction]
    eps: Positive


class RMSprop(Strict):
    alpha: Fraction
    momentum: Fraction
    eps: Positive


class Adagrad(Strict):
    lr_decay: NotNegative
    initial_accumulator_value: NotNegative
    eps: Positive


class AdamW(Adam):
    weight_decay: NotNegative  # rate · weight_decay · w is taken off each step


@dataclass(frozen=True)
class Entry:
    """One optimizer."""

    torch_class: str  # in torch.optim
    settings: type[Strict]  # its keywords but for `lr` and a coupled weight decay, under torch's own names

    @property
    def is_decoupled(self) -> bool:
        """Whether its own settings decay the weights (Loshchilov & Hutter 2019), not the recipe's L2."""
        return "weight_decay" in self.settings.model_fields


OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry("SGD", Sgd),
    "adam": Entry("Adam", Adam),
    "rmsprop": Entry("RMSprop", RMSprop),
    "adagrad": Entry("Adagrad", Adagrad),
    "adamw": Entry("AdamW", AdamW),
}

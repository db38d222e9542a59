"""Options as the command line sees them: the fields of the dataclasses, with help and defaults.

    def sample(run: str, /, *, options: Annotated[SampleOptions, Parameter(name="*")] = {}): ...

config.py says what an option means and which values it takes; this module presents it to the
library that parses arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from cyclopts import Group, Parameter

from glassgpt.config import (
    CHAT_TEMPERATURE,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    Sampling,
    TrainConfig,
)
from glassgpt.interpret.activations import Fill
from glassgpt.options import names_of, option_types

LIST = Parameter(consume_multiple=True, negative_iterable=())  # --weights float32 int8
_FREE_TEXT = ("sample_prompt", "stop")  # may begin with a hyphen


def _options(name: str, hints: dict[str, Any], groups: dict[str, Group] | None = None) -> Any:
    """A TypedDict of cyclopts parameters; a call holds only the options that were really given."""
    fields = {}
    for key, hint in hints.items():
        group = {"group": groups[key]} if groups and key in groups else {}
        about = Parameter(
            help=hint.__metadata__[0],
            negative_iterable=(),
            allow_leading_hyphen=key in _FREE_TEXT,
            **group,
        )
        fields[key] = Annotated[hint.__origin__, about]
    return TypedDict(name, fields, total=False)  # type: ignore[operator]


def _hints(cls: type, **defaults: Any) -> dict[str, Any]:
    """Field -> annotation, with the default value, its own or a given one, added to the help."""
    hints = get_type_hints(cls, include_extras=True)
    for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        default = defaults.get(name, field.default)
        if default in (None, ()) or not isinstance(default, (int, float, str)):
            continue
        shown = ("on" if default else "off") if isinstance(default, bool) else default
        text = f"{hints[name].__metadata__[0]} [{shown}]"
        hints[name] = Annotated[hints[name].__origin__, text]
    return {name: hints[name] for name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


_MODEL = Group("Model", sort_key=1)
_DATA = Group("Data", sort_key=2)
_groups = dict.fromkeys([*names_of(ModelConfig), "shape"], _MODEL)
_groups |= dict.fromkeys(names_of(DataConfig), _DATA)
_train_hints = option_types() | _hints(TrainConfig) | _hints(DataConfig)
del _train_hints["data"]

TrainOptions = _options("TrainOptions", _train_hints, _groups)
_known = _train_hints | _hints(FinetuneConfig)
_finetune_hints = {name: _known[name] for name in option_types("finetune") if name != "data"}

FinetuneOptions = _options("FinetuneOptions", _finetune_hints, _groups)
PrepareOptions = _options("PrepareOptions", _hints(DataConfig))
SampleOptions = _options("SampleOptions", _hints(Sampling))
_chat_hints = _hints(Sampling, temperature=CHAT_TEMPERATURE)
del _chat_hints["num_samples"]
ChatOptions = _options("ChatOptions", _chat_hints)


# -- what the views of `trace` share ---------------------------------------------------------------


@Parameter(name="*")
@dataclass(frozen=True)
class Removal:
    """Parts of a model that are switched off before it reads."""

    off: Annotated[
        tuple[str, ...],
        LIST,
        Parameter(
            help="Parts to switch off: 3 is a block, 3.attn and 3.mlp its halves, 3.h2 a head."
        ),
    ] = ()
    fill: Annotated[
        Fill, Parameter(help="What takes their place: zero, or the mean over all positions.")
    ] = "zero"


@Parameter(name="*")
@dataclass(frozen=True)
class Changes(Removal):
    """Parts of a model that are switched off, or taken from the pass over another text."""

    patch_from: Annotated[
        str | None,
        Parameter(
            help="Another text, of as many tokens; @FILE and - as for TEXT.",
            allow_leading_hyphen=True,
        ),
    ] = None
    parts: Annotated[
        tuple[str, ...],
        LIST,
        Parameter(help="What to take from it: parts, or activations such as blocks.3.resid_mid."),
    ] = ()


@Parameter(name="*")
@dataclass(frozen=True)
class FigureFile:
    """Where to draw what a view says."""

    out: Annotated[str | None, Parameter(help="Figure to draw: .png, .svg or .html.")] = None
    overwrite: Annotated[bool, Parameter(help="Replace OUT if it exists.")] = False

    def target(self) -> Path | None:
        """The file; raises `UserError` for one that no figure can be written to."""
        if self.out is None:
            return None
        from glassgpt.reporting.plots import check_target

        check_target(Path(self.out), self.overwrite)
        return Path(self.out)

"""Options by name: presets, TOML files and verbs give the fields of config.py's dataclasses.

    resolve_options({"n_layer": 6}, preset="shakespeare-char", config="run.toml")

Precedence: defaults < preset < TOML file < command line. This module knows what options there are
and what type each has; config.py says what they mean.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

from glassgpt.config import DataConfig, FinetuneConfig, ModelConfig, Shape, TrainConfig, check_value
from glassgpt.errors import UserError, explain_os_errors, nearest

Options = dict[str, Any]  # name of a field -> value; of what type, option_types says


def option_types(verb: str = "train") -> dict[str, Any]:
    """Name -> annotated type of every option of `train` or `finetune`, in the order of the help.
    `finetune` has none for the architecture, which is the base's."""
    if verb == "finetune":
        theirs = option_types()
        names = names_of(TrainConfig) - {"memory"} | names_of(DataConfig) - {"tokenizer"}
        names |= {"data", "context_length", "dropout"}
        own = typing.get_type_hints(FinetuneConfig, include_extras=True)
        return own | {name: hint for name, hint in theirs.items() if name in names}
    hints: dict[str, Any] = {"data": Annotated[tuple[str, ...] | None, "what to train on"]}
    hints["shape"] = Annotated[Shape, "architecture: modern (RMSNorm, RoPE, SwiGLU) or gpt2"]
    for cls in (TrainConfig, DataConfig, ModelConfig):
        hints |= typing.get_type_hints(cls, include_extras=True)
    del hints["vocab_size"], hints["rope_scaling"]  # the tokenizer decides; a checkpoint has it
    return hints


def names_of(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


T_ = TypeVar("T_")


def make_config(cls: type[T_], options: Options) -> T_:
    """A `cls` of those of its fields that are among `options`; the others have their defaults."""
    return cls(**{name: options[name] for name in names_of(cls) & set(options)})


def split_options(options: Options) -> tuple[Options, DataConfig, TrainConfig]:
    """Flat options -> (model overrides incl. "shape", DataConfig, TrainConfig)."""
    model = {name: options[name] for name in names_of(ModelConfig) & set(options)}
    model["shape"] = options.get("shape", "modern")
    return model, make_config(DataConfig, options), make_config(TrainConfig, options)


_PRESETS = Path(__file__).parent / "training" / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def resolve_options(
    given: Options,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    verb: str = "train",
) -> Options:
    """Defaults < preset < file < `given`; every value checked against its field's type.

    Raises `UserError` for unknown names (with the nearest valid one), wrong types, and a
    preset or file that can't be read.
    """
    options: Options = {}
    if preset is not None:
        if preset not in preset_names():
            raise UserError(
                f"no preset {preset!r}.{nearest(str(preset), preset_names())} "
                f"The presets are: {', '.join(preset_names())}"
            )
        text = (_PRESETS / f"{preset}.toml").read_text("utf-8")
        options |= check_options(tomllib.loads(text), f"preset {preset}", verb)
    if config is not None:
        with explain_os_errors(f"read {config}"):
            raw = Path(config).read_bytes()
        try:
            options |= check_options(tomllib.loads(raw.decode("utf-8")), str(config), verb)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{config} is not valid TOML: {error}") from error
    return options | check_options(given, "the options", verb)


def check_options(options: Options, where: str, verb: str = "train") -> Options:
    """The options, with numbers converted to their field's type; raises `UserError`."""
    hints = option_types(verb)
    checked = {}
    for name, value in options.items():
        key = name.replace("-", "_")
        if key not in hints and isinstance(value, dict):
            raise UserError(
                f"{where}: no tables such as [{name}], please; every option is a line "
                "of its own at the top, like max_steps = 500"
            )
        if key not in hints:
            raise UserError(f"unknown option {name!r} in {where}.{nearest(key, hints)}")
        if key in checked:
            raise UserError(f"{key} stands twice in {where}")
        checked[key] = check_value(key, value, hints[key], f" in {where}")
    return checked

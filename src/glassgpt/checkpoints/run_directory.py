"""The run directory: a Hugging Face checkpoint at the top, enough to resume below it.

    save_model("runs/book", model); checkpoint = load_model("runs/book")

Every file is written under a temporary name, flushed and renamed, and every tensor file carries
a checksum of its content: at any moment there is a valid checkpoint, and a damaged one is
noticed. Weights travel as NumPy arrays under the names of model.py; this room imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from glassgpt import __version__
from glassgpt.checkpoints.huggingface import (
    config_from_json,
    from_huggingface,
    labels_from_json,
    to_huggingface,
)
from glassgpt.checkpoints.peft import apply_adapter, to_peft
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.reporting.terminal import program
from glassgpt.system import (
    Json,
    check_outside,
    exclusive,
    own_folder,
    read_json,
    write_file,
    write_json,
)
from glassgpt.tokenizers.tokenizer import (
    Tokenizer,
    begin_of_text,
    load_tokenizer,
    named_tokens,
    to_files,
)

SCHEMA_VERSION = 1
LAST = Path("checkpoints") / "last"
_LOOKED_AT = 4096  # numbers of a tensor, for a fingerprint
SNAPSHOT = re.compile(r"\d{6,}")  # the step, with zeros before it: the shell sorts them as we do
UNFINISHED = ".next"


@dataclass
class Checkpoint:
    """A model as it lies on disk: config, weights, tokenizer, and where it came from."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # names of model.py; read when they are asked for
    tokenizer: Tokenizer
    info: Json = field(default_factory=dict)  # glassgpt.json: step, losses, options
    chat_template: str | None = None  # Jinja, of a model that was finetuned on conversations
    ends: tuple[int, ...] = ()  # ids that end what it writes, beside the tokenizer's end_of_text
    labels: tuple[str, ...] = ()  # of a classifier, whose head is weights["score.weight"]


def require_language_model(checkpoint: Checkpoint, name: str | Path = "this model") -> Checkpoint:
    """`checkpoint`; raises `UserError` for a classifier, whose head knows no tokens."""
    if checkpoint.labels:
        raise UserError(
            f"{name} is a classifier ({len(checkpoint.labels)} labels) and predicts no "
            f'tokens; ask it with: glassgpt sample {name} --text "..."'
        )
    return checkpoint


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits that change when the weights do: of each tensor some numbers are looked at,
    since training moves all of them."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.weights):
        weight = checkpoint.weights[name]
        some = weight.reshape(-1)[:: max(1, weight.size // _LOOKED_AT)]
        digest.update(f"{name} {weight.shape}".encode() + some.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


# -- files ---------------------------------------------------------------------------------------


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def save_model(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write config, weights, tokenizer and glassgpt.json; `transformers` loads the folder."""
    folder = Path(folder)
    with explain_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer, labels = checkpoint.config, checkpoint.tokenizer, checkpoint.labels
    begin, ends = begin_of_text(tokenizer), [tokenizer.end_of_text, *checkpoint.ends]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    end = ends if len(ends) > 1 else next(iter(ends), None)
    config_json, tensors = to_huggingface(
        config, checkpoint.weights, begin=begin, end=end, labels=labels
    )
    more = _for_classifying(tokenizer) if labels else {}
    if checkpoint.chat_template is not None:
        more["chat_template"] = checkpoint.chat_template
    for name, content in to_files(tokenizer, config.context_length, **more).items():
        write_file(folder / name, content)
    write_json(folder / "config.json", config_json)
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": True}
    write_json(folder / "generation_config.json", generation)
    write_tensors(folder / "model.safetensors", tensors)
    about = {
        "schema_version": SCHEMA_VERSION,
        "glassgpt_version": __version__,
        "model": dataclasses.asdict(config),
        **checkpoint.info,
    }
    write_json(folder / "glassgpt.json", about)


def _for_classifying(tokenizer: Tokenizer) -> Json:
    """For tokenizer_config.json: texts of a batch are padded, a special token in them is text."""
    values: Json = {"padding_side": "right", "split_special_tokens": True}
    if tokenizer.end_of_text is not None:
        values["pad_token"] = tokenizer.token_bytes(tokenizer.end_of_text).decode()
    return values


def load_model(path: str | Path) -> Checkpoint:
    """A run directory, its `checkpoints/last`, or any saved GPT-2, Llama or Qwen3 folder.

    Raises `UserError` when it is none, or damaged.
    """
    folder = find_model(path)
    config_json = read_json(folder / "config.json")
    info = read_json(folder / "glassgpt.json") if (folder / "glassgpt.json").exists() else {}
    if info.get("schema_version", SCHEMA_VERSION) not in range(SCHEMA_VERSION + 1):
        raise UserError(f"{folder} was written by a newer GlassGPT; update this one")
    config = config_from_json(config_json, str(folder / "config.json"))
    if "model" in info:  # says what config.json can't: dropout, and biases that are absent
        try:
            config = ModelConfig(**info["model"])
        except TypeError as error:
            raise UserError(f"{folder / 'glassgpt.json'} is damaged: {error}") from error
    labels = labels_from_json(config_json, str(folder / "config.json"))
    weights = from_huggingface(config, SafeTensors(_weight_files(folder)), str(folder), labels)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model only {config.vocab_size}; they do not belong together"
        )
    template, ends = _chat_template(folder, tokenizer), _ends(folder, tokenizer)
    return Checkpoint(config, weights, tokenizer, info, template, ends, labels)


def _chat_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """From a file of its own, or tokenizer_config.json; of several templates the default one."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    values = read_json(settings) if settings.exists() else {}
    template = values.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if file.exists():
        with explain_os_errors(f"read {file}"):
            template = file.read_bytes().decode("utf-8", "replace")
    if not isinstance(template, str):
        return None
    # What the model's makers call eos_token may be another token than ours (<|im_end|>, say).
    ours = named_tokens(tokenizer)
    for name in ("bos_token", "eos_token"):
        token = values.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and name in template and token != ours.get(name):
            template = f"{{% set {name} = {json.dumps(token)} %}}\n{template}"
    return template


def _ends(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What generation_config.json names beside the end of a text. Where it names ordinary tokens,
    nobody meant it: 2 is the end in every new LlamaConfig, whatever letter that may be."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    others = [i for i in tokenizer.special.values() if i != tokenizer.end_of_text]
    return tuple(end for end in (found if isinstance(found, list) else [found]) if end in others)


def run_name(run: str | Path) -> str:
    """What a model is called in titles: the name of its folder, or its published name."""
    return Path(run).resolve().name if Path(run).exists() else str(run)


def find_model(path: str | Path) -> Path:
    """The folder that holds the weights: `path` itself, or its newest checkpoint."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run directory (see: ls runs)")
    if not path.is_dir():
        raise UserError(f"{path} is a file; name the run directory that holds a model")
    for folder in (path, path / LAST):
        if (folder / "config.json").exists() and any(f.exists() for f in _weights_of(folder)):
            return folder
    if (path / "config.json").exists() and any(path.glob("*.bin")):
        raise UserError(
            f"{path} holds its weights as pickles (*.bin), which could run anything; "
            "fetch the version with model.safetensors"
        )
    raise UserError(f"{path} holds no model (no config.json with model.safetensors)")


def _weights_of(folder: Path) -> tuple[Path, Path]:
    """One file, or the list of several."""
    return folder / "model.safetensors", folder / "model.safetensors.index.json"


def _weight_files(folder: Path) -> list[Path]:
    single, index = _weights_of(folder)
    if single.exists():
        return [single]
    names = read_json(index).get("weight_map")
    shards = list(names.values()) if isinstance(names, dict) else []
    if not shards or not all(isinstance(name, str) for name in shards):
        raise UserError(f"{index} is damaged: it has no weight_map")
    files = [folder / Path(name).name for name in sorted(set(shards))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {index.name} names it; fetch it again")
    return files


def save_adapter(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    alpha: float,
    dropout: float,
    base: str,
    tokenizer_files: Mapping[str, bytes] = {},
) -> None:
    """Write a LoRA adapter (`lora.adapter_tensors`) of the model `base`; PEFT loads the folder.

    `tokenizer_files` (`tokenizer.to_files`): where it learned a chat template that the base lacks.
    """
    folder = Path(folder)
    with explain_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    about, tensors = to_peft(config, tensors, alpha=alpha, dropout=dropout, base=base)
    for name, content in tokenizer_files.items():
        write_file(folder / name, content)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", about)


def is_adapter(folder: Path) -> bool:
    """Holds an adapter, and no whole model."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def base_of(folder: Path) -> str:
    """The model that an adapter was made for: a path beside the adapter, or a name or path here."""
    path = folder / "adapter_config.json"
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: base_model_name_or_path is missing; write the base model there")
    return str(folder / name) if (folder / name).exists() else name


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """`base` with the adapter in `folder` added into its weights, as they are asked for, and with
    the chat template that stands beside it."""
    about = read_json(folder / "adapter_config.json")
    tensors = SafeTensors([folder / "adapter_model.safetensors"])
    weights = apply_adapter(base.config, base.weights, about, tensors, str(folder))
    info = {"source": f"the adapter {folder} of {about.get('base_model_name_or_path')}"}
    template = _chat_template(folder, base.tokenizer) or base.chat_template
    return dataclasses.replace(base, weights=weights, info=info, chat_template=template)


# -- what resuming needs -------------------------------------------------------------------------


def save_training(
    run: Path,
    checkpoint: Checkpoint | None,
    tensors: Mapping[str, np.ndarray],
    state: Json,
) -> None:
    """Replace `checkpoints/last` by this moment of the training: a model, what its optimizers
    remember, numbers. None where the model is another one with adapters, which are `tensors`.

    The new folder is complete before the old one moves aside, so `find_training` always finds
    a whole one, whenever the process dies.
    """
    folder, new, old = _training_folders(run)
    with explain_os_errors(f"write {new}"):
        if not folder.exists():  # the process died between the two renames below
            with contextlib.suppress(UserError):
                os.replace(find_training(run), folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        if checkpoint is not None:
            save_model(new, checkpoint)
        write_tensors(new / "optimizer.safetensors", tensors)
        write_json(new / "state.json", state)  # written last: its presence means complete
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)


def find_training(run: str | Path) -> Path:
    """The newest complete training checkpoint of a run; raises `UserError` without one."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run} does not exist; --resume takes the run directory")
    for folder in _training_folders(run):
        if (folder / "state.json").exists():
            return folder
    if (run / "state.json").exists():
        raise UserError(f"{run} is the checkpoint of a run; resume the run: {run.parent.parent}")
    raise UserError(f"{run} has no checkpoint to resume from; start again with another --out")


def load_training(
    run: str | Path,
) -> tuple[Checkpoint | None, Mapping[str, np.ndarray], Json]:
    """(model, tensors, state) of the newest training checkpoint, as `save_training` had them."""
    folder = find_training(run)
    tensors = SafeTensors([folder / "optimizer.safetensors"])
    checkpoint = load_model(folder) if (folder / "config.json").exists() else None
    return checkpoint, tensors, read_json(folder / "state.json")


def _training_folders(run: Path) -> tuple[Path, Path, Path]:
    """The current one, the one being written, the one being replaced; in order of trust."""
    return run / LAST, run / "checkpoints" / UNFINISHED, run / "checkpoints" / ".previous"


# -- the model on its way ------------------------------------------------------------------------


def snapshots(run: str | Path) -> dict[int, Path]:
    """Step -> the folder with the model of that step, which `load_model` takes; in order.

    Those that are being written or deleted have another name.
    """
    folder = Path(run) / "snapshots"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if SNAPSHOT.fullmatch(name))
    return {step: folder / f"{step:06}" for step in steps}


def save_snapshot(run: Path, step: int, checkpoint: Checkpoint) -> None:
    """Keep the model of this step for good; once is enough."""
    if step in snapshots(run):
        return
    folder = run / "snapshots"
    try:
        save_model(folder / UNFINISHED, checkpoint)
        with explain_os_errors(f"write {folder}"):
            os.replace(folder / UNFINISHED, folder / f"{step:06}")
    finally:  # a disk that is full has room for other things again
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def rewind_snapshots(run: Path, step: int) -> None:
    """Forget the models that came after `step`: those steps will be done again."""
    unfinished = run / "snapshots" / UNFINISHED
    with explain_os_errors(f"write {run}"):
        for folder in [path for after, path in snapshots(run).items() if after > step]:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.replace(folder, unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


# -- a folder that a training writes to ----------------------------------------------------------

# All that a run directory may hold: --overwrite deletes nothing that somebody else put there.
_MODEL_FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|glassgpt)\.json|model\.safetensors"
)
_RUN_FILES = re.compile(
    rf"\.?({_MODEL_FILES}|metrics\.jsonl|samples\.md|report\.md)(\.partial)?"
    r"|(\.partial-)?(loss|confusion)\.png|adapter|checkpoints|snapshots|tensorboard|wandb|\.lock"
)
_OWN_FILES = {"glassgpt.json", "metrics.jsonl", "checkpoints"}  # a downloaded model has none
_LOCK = ".lock"


@dataclass(frozen=True)
class Resumed:
    """The newest moment of a training that was stopped: what it goes on from."""

    checkpoint: Checkpoint | None  # None where adapters were trained: they are in `tensors`
    tensors: Mapping[str, np.ndarray]
    state: Json  # state.json; its "options" are all of the training's, by name


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one training: claimed when it is new, or resumed."""

    path: Path

    @classmethod
    def named_after(cls, data: str) -> RunDirectory:
        """Make runs/book, or runs/book-2 when that is taken; two processes never get the same."""
        stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.")[:80] or "model"
        for n in range(1, 1_000_000):
            path = Path("runs") / (stem if n == 1 else f"{stem}-{n}")
            with explain_os_errors(f"write {path}"):
                path.parent.mkdir(exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return cls(path)
        raise UserError(f"runs/{stem} is taken a million times; choose an --out")

    def claim(
        self, overwrite: bool, inputs: Iterable[str | Path]
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for a new run. An old run in it stays until `empty` is called.

        Raises `UserError` for a folder that is in use, that holds something else, or in which one
        of `inputs` lies; for an old run, too, without `overwrite`.
        """
        if overwrite:
            check_outside(self.path, inputs)
        return own_folder(self.path, _LOCK, lambda: self._check_replaceable(overwrite))

    @contextlib.contextmanager
    def resume(self, verb: str, *, is_main: bool = True) -> Iterator[Resumed]:
        """Hold the folder, unless another process (`is_main` is False) does, and read where the
        training stopped. Raises `UserError` for a run of another `verb`."""
        with contextlib.ExitStack() as held:
            if is_main:  # before it is read, so that no other process can continue it meanwhile
                folder = find_training(self.path).parents[1]
                held.enter_context(exclusive(folder, folder / _LOCK))
            resumed = Resumed(*load_training(self.path))
            made_by = resumed.state.get("verb", "train")
            if made_by != verb:
                run = shlex.quote(str(self.path))
                raise UserError(
                    f"{self.path} was made by {made_by}; go on with: {program()} "
                    f"{made_by} --resume {run}"
                )
            yield resumed

    def empty(self) -> None:
        """Delete what an old run left."""
        with explain_os_errors(f"write {self.path}"):
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()

    def _check_replaceable(self, overwrite: bool) -> None:
        run = self.path
        there = {path.name for path in run.iterdir()} - {_LOCK} if run.is_dir() else set()
        if not there and not run.is_file():
            return
        if not overwrite:
            raise UserError(
                f"{run} exists already; continue it with --resume "
                f"{shlex.quote(str(run))}, choose another --out, or say --overwrite"
            )
        foreign = {name for name in there if not _RUN_FILES.fullmatch(name)}
        foreign |= self._unknown_in("checkpoints", re.compile(r"last|\.next|\.previous"))
        foreign |= self._unknown_in("snapshots", re.compile(rf"{SNAPSHOT.pattern}|\.next"))
        if foreign or not there & _OWN_FILES:
            what = f"no training wrote {min(foreign)}" if foreign else "no training wrote it"
            raise UserError(f"{run} is no run directory ({what}); --overwrite leaves it alone")

    def _unknown_in(self, name: str, known: re.Pattern[str]) -> set[str]:
        folder = self.path / name
        there = folder.iterdir() if folder.is_dir() else ()
        return {f"{name}/{path.name}" for path in there if not known.fullmatch(path.name)}

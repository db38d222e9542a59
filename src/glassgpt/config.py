"""What a model is and how it is trained and sampled: frozen dataclasses that check their values.

Every option of the command line is a field below, with its help text.

    ModelConfig.from_shape("modern", vocab_size=65, n_layer=4).n_parameters

This module only does arithmetic; it knows no tensor, tokenizer, file or device.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from glassgpt.errors import UserError, nearest
from glassgpt.system import bytes_of, seconds_of

Shape = Literal["gpt2", "modern"]
Norm = Literal["layernorm", "rmsnorm"]
Position = Literal["learned", "rope"]
Activation = Literal["relu", "gelu", "gelu_tanh", "swiglu"]
Family = Literal["gpt2", "llama", "qwen3"]
Format = Literal["gguf", "onnx", "nanogpt", "numpy"]  # that `export` writes
Precision = Literal["F32", "F16", "Q8_0"]  # of the matrices in a GGUF
EngineName = Literal["auto", "numba", "numpy", "torch", "gpu"]  # what computes when decoding
WeightPrecision = Literal["float32", "int8", "int4", "bfloat16"]  # of the matrices in an engine
ExampleFormat = Literal[
    "auto", "text", "messages", "sharegpt", "alpaca", "prompt", "dialogue", "labels"
]
LORA_TARGETS = ("qkv", "out", "gate", "up", "down")  # matrices of a block, by model.py's names
ENDLESS = 1 << 40  # max_steps of a run with a budget: time ends it, not a number of steps
MOST_THREADS = 1024  # torch crashes on numbers that no machine has
CHAT_TEMPERATURE = 0.7  # an answer should be right rather than surprising
DEVICES = ("auto", "cpu", "cuda", "mps")
_MOST_SAMPLES = 100_000

_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict(norm="layernorm", position="learned", activation="gelu_tanh", qk_norm=False,
                 bias=True, norm_eps=1e-5),
    "modern": dict(norm="rmsnorm", position="rope", activation="swiglu", qk_norm=True,
                   bias=False, norm_eps=1e-6),
}  # fmt: skip
# A size that a laptop trains in minutes; anything larger is asked for by name or preset.
_SIZE = dict(context_length=128, n_layer=4, n_head=4, n_embd=128)


def check_types(config: Any) -> None:
    """Every field must hold what its annotation says; numbers and paths are converted to it."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        object.__setattr__(config, name, check_value(name, getattr(config, name), hint))


def _check(config: object, names: str, is_right: Callable[[Any], bool], rule: str) -> None:
    """The fields `names` that are not None must be right; `rule` says in words how."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not is_right(value):
            raise UserError(f"{name}={value} {rule}")


def _is_share(value: float) -> bool:
    return 0 <= value < 1


_SEED = "must be at least 0 and less than 2^63"
_FROM_ONE = "must be at least 1"
_POSITIVE = "must be greater than 0"


def check_value(name: str, value: Any, hint: Any, where: str = "") -> Any:
    """`value` as the annotation `hint` of the field `name` wants it; raises `UserError`."""
    kind = typing.get_args(hint)[0]  # Annotated[kind, "help"]
    if isinstance(kind, types.UnionType):
        if value is None or value == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{name}={value!r}{where}: choose from {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:  # of strings; one may stand alone
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise UserError(f"{name}={value!r}{where} must be text, or a list of texts")
    if kind in (int, float) and isinstance(value, numbers.Integral) and value is not bool(value):
        value = int(value)  # NumPy's, too
        if abs(value) >= 1 << 63:
            raise UserError(f"{name}{where} is too large")
    if kind is float and isinstance(value, numbers.Real) and value is not bool(value):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r}{where} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name}={value}{where} must be a finite number")
    return value


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions were stretched after training, to a longer context.

    linear: every pair turns slower by `factor`. llama3: only pairs whose wavelength is long
    against the context they were trained on; those in between by a blend (Llama 3.1's rule).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        ok = self.factor > 0 and self.original_context_length > 0
        if not ok or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"rope scaling {dataclasses.asdict(self)} makes no sense")

    def __call__(self, frequency: float) -> float:
        """The frequency (radians per position) that takes the place of this one."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original_context_length * frequency / (2 * math.pi)  # over the old context
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(1.0, max(0.0, blend))
        return kept * frequency + (1 - kept) * frequency / self.factor


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, complete: two equal configs have interchangeable weights.

    Only what GPT2LMHeadModel, LlamaForCausalLM or Qwen3ForCausalLM can express is accepted
    (`family` says which); anything else raises `UserError`.
    """

    vocab_size: Annotated[int, "number of different tokens"]
    context_length: Annotated[int, "tokens the model sees at once"]
    n_layer: Annotated[int, "transformer blocks (0 makes a bigram model)"]
    n_head: Annotated[int, "attention heads per block"]
    n_kv_head: Annotated[int, "key/value heads, shared by groups of heads [n_head]"]
    n_embd: Annotated[int, "width of the residual stream"]
    head_dim: Annotated[int, "width of a head [n_embd / n_head]"]
    n_hidden: Annotated[int, "width inside the MLP [gpt2: 4 n_embd; modern: 8/3 n_embd]"]
    norm: Annotated[Norm, "normalisation"]
    position: Annotated[Position, "how positions are told apart"]
    activation: Annotated[Activation, "non-linearity of the MLP"]
    qk_norm: Annotated[bool, "normalise queries and keys"]
    bias: Annotated[bool, "biases in linear layers and LayerNorm"]
    tie_embeddings: Annotated[bool, "output head shares the token embedding"] = True
    dropout: Annotated[float, "share of activations dropped in training"] = 0.0
    rope_theta: Annotated[float, "longest wavelength of the rotary positions"] = 10000.0
    rope_scaling: Annotated[RopeScaling | None, "how they were stretched (loaded, not chosen)"] = (
        None
    )
    norm_eps: Annotated[float, "added to the variance before its root"] = 1e-5

    @classmethod
    def from_shape(cls, shape: Shape = "modern", *, vocab_size: int, **overrides: Any):
        """The config of a named shape, with any field replaced and the rest derived."""
        if shape not in _SHAPES:
            raise UserError(f"unknown shape {shape!r}; the shapes are: {', '.join(_SHAPES)}")
        values = {**_SIZE, **_SHAPES[shape], **overrides, "vocab_size": vocab_size}
        names = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in names:
                raise UserError(f"unknown model option {name!r}.{nearest(name, names)}")
        n_embd, n_head = values["n_embd"], max(1, values["n_head"])
        values.setdefault("n_kv_head", n_head)
        if "head_dim" not in values:
            if n_embd % n_head:
                raise UserError(
                    f"n_embd={n_embd} can't be split over n_head={n_head} heads; "
                    f"choose n_embd={-(-n_embd // n_head) * n_head} or another n_head"
                )
            values["head_dim"] = n_embd // n_head
        if "n_hidden" not in values:
            # SwiGLU has three matrices where others have two: 8/3 keeps the parameter count.
            swiglu = values["activation"] == "swiglu"
            values["n_hidden"] = -(-n_embd * 8 // 3 // 32) * 32 if swiglu else 4 * n_embd
        return cls(**values)

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        sizes = "vocab_size context_length n_layer n_head n_kv_head n_embd head_dim n_hidden"
        for name in sizes.split():
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name}={getattr(self, name)!r} must be a whole number")
            if getattr(self, name) < (name != "n_layer"):
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        _check(self, "rope_theta norm_eps", lambda x: 0 < x < math.inf, _POSITIVE)
        _check(self, "dropout", _is_share, "must be at least 0 and less than 1")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}; "
                "every key/value head must serve the same number of heads"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary positions")
        self.family  # noqa: B018  (raises when no saved architecture can express this)

    @property
    def family(self) -> Family:
        """Which published architecture this is, hence how it is saved."""
        if (self.norm, self.position, self.qk_norm) == ("layernorm", "learned", False):
            if self.activation == "swiglu":
                raise UserError("activation=swiglu needs norm=rmsnorm and position=rope")
            if self.n_kv_head != self.n_head or self.head_dim * self.n_head != self.n_embd:
                raise UserError(
                    "the gpt2 shape needs n_kv_head = n_head and head_dim = n_embd / n_head; "
                    "use --shape modern for other heads"
                )
            return "gpt2"
        if (self.norm, self.position) == ("rmsnorm", "rope"):
            if self.activation != "swiglu" or self.bias:
                raise UserError("norm=rmsnorm with position=rope needs activation=swiglu, no bias")
            if not self.qk_norm and self.n_embd % self.n_head:
                raise UserError(
                    f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head} "
                    "where qk_norm is off (Llama's rule)"
                )
            return "qwen3" if self.qk_norm else "llama"
        raise UserError(
            f"norm={self.norm}, position={self.position}, qk_norm={self.qk_norm} is no architecture"
            " that other tools load; use --shape gpt2 or --shape modern"
        )

    @property
    def rope_frequencies(self) -> list[float]:
        """Radians per position of each of the D/2 pairs of a head's dimensions.

        Pair i turns by theta^(-2i/D) (RoFormer, arXiv:2104.09864, eq. 15): the first pairs are
        the second hand of a clock, the last its hour hand.
        """
        D = self.head_dim
        frequencies = [self.rope_theta ** (-2 * i / D) for i in range(D // 2)]
        return list(map(self.rope_scaling, frequencies)) if self.rope_scaling else frequencies

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of `attn.qkv` that make queries, keys and values; the matrix holds them in turn."""
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        return q, kv, kv

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in model.py -> shape, for every weight; a tied head is not there twice."""
        C, V, F, D = self.n_embd, self.vocab_size, self.n_hidden, self.head_dim
        rows = self.qkv_rows
        linears = {"attn.qkv": (sum(rows), C), "attn.out": (C, rows[0])}
        linears |= {"mlp.gate": (F, C)} if self.activation == "swiglu" else {}
        linears |= {"mlp.up": (F, C), "mlp.down": (C, F)}
        norms = {"attn_norm": C, "mlp_norm": C}
        norms |= {"attn.q_norm": D, "attn.k_norm": D} if self.qk_norm else {}
        shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (V, C)}
        if self.position == "learned":
            shapes["position_embedding.weight"] = (self.context_length, C)
        for block in (f"blocks.{layer}" for layer in range(self.n_layer)):
            shapes |= {f"{block}.{name}.weight": shape for name, shape in linears.items()}
            shapes |= {f"{block}.{name}.weight": (width,) for name, width in norms.items()}
            if self.bias:
                shapes |= {f"{block}.{name}.bias": (shape[0],) for name, shape in linears.items()}
                shapes |= {f"{block}.{name}.bias": (width,) for name, width in norms.items()}
        shapes["final_norm.weight"] = (C,)
        if self.bias:
            shapes["final_norm.bias"] = (C,)
        if not self.tie_embeddings:
            shapes["head.weight"] = (V, C)
        return shapes

    @property
    def n_parameters(self) -> int:
        """All trained numbers; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    @property
    def n_decoding_weights(self) -> int:
        """Weights that the choice of one token reads: all but the tables it takes a row of."""
        tables = {"position_embedding.weight"}
        if not self.tie_embeddings:
            tables.add("token_embedding.weight")
        shapes = self.weight_shapes
        return sum(math.prod(shape) for name, shape in shapes.items() if name not in tables)

    def flops_per_token(self, context_length: int | None = None) -> int:
        """Multiplications and additions of one training step, per token, matrix products only.

        Three times the forward pass (forward, and two products backward), two per
        multiply-add; attention counts the full T x T square, as in PaLM's appendix B
        (arXiv:2204.02311), so that figures compare with those of others.
        """
        T = context_length or self.context_length
        C, (q, kv, _) = self.n_embd, self.qkv_rows
        matrices = 3 if self.activation == "swiglu" else 2
        per_block = C * (q + 2 * kv) + q * C + matrices * C * self.n_hidden + 2 * q * T
        return 6 * (self.n_layer * per_block + C * self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How text becomes tokens (`prepare`, and `train` on raw text)."""

    tokenizer: Annotated[str, "char, byte, gpt2, bpe:N (N tokens, learned here), or a path"] = (
        "char"
    )
    val_fraction: Annotated[
        float, "share of documents kept for validation (of characters, when they are too few)"
    ] = 0.1
    val: Annotated[str | None, "file to validate on, instead of a fraction"] = None
    text_field: Annotated[str | None, "column or key with the text, in jsonl/csv/parquet"] = None
    max_tokens: Annotated[
        int | None, "stop at this many tokens, in both splits together; with val, in training alone"
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "val_fraction", lambda x: 0 < x < 1, "must lie between 0 and 1")
        _check(self, "max_tokens", lambda n: n >= 1, _FROM_ONE)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. `None` means off, or chosen for you where the help says so."""

    out: Annotated[str | None, "run directory [runs/NAME-OF-THE-DATA]"] = None
    budget: Annotated[
        str | None,
        "time for everything: 30s, 5m, 1h30m; what you leave open is chosen",
    ] = None
    memory: Annotated[
        str | None, "most memory for a model chosen by budget: 800MB, 8GB [all there is]"
    ] = None
    max_steps: Annotated[int, "optimizer updates"] = 2000
    batch_tokens: Annotated[int, "tokens per step, over all devices"] = 4096
    micro_batch_size: Annotated[
        int | None, "sequences at a time on a device; the rest is accumulated [all of the step's]"
    ] = None
    optimizer: Annotated[
        Literal["muon", "adamw"], "muon: for the blocks' matrices, adamw for the rest"
    ] = "muon"
    learning_rate: Annotated[float, "AdamW's at its peak"] = 2e-3
    muon_learning_rate: Annotated[float, "Muon's at its peak; both rise and fall together"] = 0.02
    muon_momentum: Annotated[float, "Muon's memory of the gradient"] = 0.9
    min_learning_rate: Annotated[float | None, "where the decay ends [a tenth of the peak]"] = None
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 100
    schedule: Annotated[Literal["cosine", "linear", "constant"], "shape of the decay"] = "cosine"
    decay_steps: Annotated[int | None, "step at which the decay ends [max_steps]"] = None
    weight_decay: Annotated[float, "times the learning rate: what matrices lose a step"] = 0.1
    beta1: Annotated[float, "AdamW's memory of the gradient"] = 0.9
    beta2: Annotated[float, "AdamW's memory of its square"] = 0.99
    grad_clip: Annotated[float | None, "largest norm of the gradient ('none' for off)"] = 1.0
    eval_interval: Annotated[int, "steps between evaluations"] = 250
    eval_batches: Annotated[
        int | None, "batches of batch_tokens per evaluation [the whole validation split]"
    ] = None
    patience: Annotated[int | None, "stop after this many evaluations without a new best"] = None
    checkpoint_interval: Annotated[int | None, "steps between checkpoints [eval_interval]"] = None
    snapshots: Annotated[
        bool,
        "keep the model of steps 0, 1, 2, 3, 4, 6, 8, 11, 16 ... and the last in OUT/snapshots, "
        "to see how it learned; each takes a model's room on the disk",
    ] = False
    sample_prompt: Annotated[str | None, "prompt of the samples [a line break]"] = None
    sample_tokens: Annotated[int, "length of the samples drawn at evaluations (0: none)"] = 200
    log_interval: Annotated[int, "steps between lines of metrics.jsonl"] = 10
    seed: Annotated[int, "makes batches, initial weights and samples repeatable"] = 1337
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to compute"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "precision of the products [bfloat16 or float16 on a GPU, float32 on a CPU]",
    ] = "auto"
    recompute: Annotated[
        bool, "keep only the inputs of blocks: little memory, a third more work [when it is short]"
    ] = False
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile [on a GPU]"] = "auto"
    threads: Annotated[int | None, "CPU threads [all cores]"] = None
    tensorboard: Annotated[bool, "log to OUT/tensorboard as well"] = False
    wandb: Annotated[bool, "log to Weights & Biases as well (offline without an account)"] = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.budget is not None:
            seconds_of(self.budget)
        elif self.max_steps == ENDLESS:
            raise UserError("without a budget, max_steps must say when to stop")
        if self.memory is not None:
            bytes_of(self.memory)
            if self.budget is None:
                raise UserError("memory limits the model of a --budget; without one, choose a size")
        counts = "max_steps batch_tokens eval_interval log_interval"
        _check(self, counts, lambda n: n >= 1, _FROM_ONE)
        optional = "micro_batch_size eval_batches patience checkpoint_interval decay_steps threads"
        _check(self, optional, lambda n: n >= 1, f"{_FROM_ONE} (leave it out for off)")
        amounts = "warmup_steps sample_tokens weight_decay"
        _check(self, amounts, lambda x: x >= 0, "can't be negative")
        _check(self, "seed", lambda n: 0 <= n < 1 << 63, _SEED)
        _check(self, "threads", lambda n: n <= MOST_THREADS, f"must be at most {MOST_THREADS}")
        _check(self, "learning_rate muon_learning_rate", lambda x: x > 0, _POSITIVE)
        highest = self.learning_rate
        rule = f"must lie between 0 and learning_rate={highest}"
        _check(self, "min_learning_rate", lambda x: 0 <= x <= highest, rule)
        _check(self, "beta1 beta2 muon_momentum", _is_share, "must be in [0, 1)")
        _check(self, "grad_clip", lambda x: x > 0, f"{_POSITIVE}, or none")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What `finetune` asks beyond `train`: which examples, and which weights learn from them."""

    format: Annotated[ExampleFormat, "what DATA holds [seen in its first records]"] = "auto"
    prompt_field: Annotated[str | None, "column or key with what is asked"] = None
    completion_field: Annotated[str | None, "column or key with what is answered"] = None
    label_field: Annotated[str | None, "column or key with the class"] = None
    template: Annotated[
        str, "of a conversation: headings, chatml, or a Jinja file [the base's own, or headings]"
    ] = "auto"
    loss_on: Annotated[
        Literal["assistant", "last", "all"],
        "words to learn: the assistant's, those of its last turn, or everybody's",
    ] = "assistant"
    epochs: Annotated[float, "times through DATA, where --max-steps does not say it"] = 3.0
    keep: Annotated[str | None, "text of the base's own kind: how much of it is forgotten?"] = None
    replay: Annotated[float, "share of every batch that is taken from the text to keep"] = 0.0
    freeze: Annotated[
        str | None,
        "what stays as it is: embeddings, a number of first blocks, or body (all but the head)",
    ] = None
    layer_decay: Annotated[float, "learning rate of a block, times that of the next"] = 1.0
    lora_rank: Annotated[int | None, "train low-rank adapters instead of the weights"] = None
    lora_alpha: Annotated[float | None, "their scale, divided by the rank [twice the rank]"] = None
    lora_targets: Annotated[
        tuple[str, ...], "adapted matrix: qkv, out, gate, up, down (may be repeated) [all]"
    ] = ()
    lora_dropout: Annotated[float, "share of an adapter's inputs that is dropped"] = 0.0
    base_weights: Annotated[
        Literal["float32", "bfloat16", "int8"], "of the frozen matrices beside adapters"
    ] = "float32"
    class_weights: Annotated[bool, "rare classes weigh more in the loss"] = False

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "epochs lora_alpha", lambda x: x > 0, _POSITIVE)
        _check(self, "replay lora_dropout", _is_share, "must be at least 0 and less than 1")
        if self.replay and self.keep is None:
            raise UserError(f"replay={self.replay} needs --keep, the text to take it from")
        _check(self, "layer_decay", lambda x: 0 < x <= 1, f"{_POSITIVE}, at most 1")
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets", "lora_dropout"):
                if getattr(self, name):
                    raise UserError(f"{name} needs --lora-rank")
            if self.base_weights != "float32":
                raise UserError(
                    f"base_weights={self.base_weights} needs --lora-rank: such weights "
                    "can't be trained"
                )
        _check(self, "lora_rank", lambda n: n >= 1, _FROM_ONE)
        if wrong := sorted(set(self.lora_targets) - set(LORA_TARGETS)):
            raise UserError(f"lora_targets={wrong[0]}: choose from {', '.join(LORA_TARGETS)}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Filters apply in the order of the fields."""

    max_new_tokens: Annotated[int, "stop after this many tokens"] = 200
    repetition_penalty: Annotated[
        float | None, "divide the odds of tokens already there by this (1.1, say)"
    ] = None
    temperature: Annotated[float, "below 1: safer choices; 0: always the likeliest token"] = 1.0
    top_k: Annotated[int | None, "draw from the k likeliest tokens"] = None
    top_p: Annotated[float | None, "draw from the likeliest tokens that together have p"] = None
    min_p: Annotated[float | None, "leave out tokens below this share of the likeliest one's"] = (
        None
    )
    stop: Annotated[tuple[str, ...], "end before this text (may be repeated)"] = ()
    seed: Annotated[int, "the same seed gives the same text"] = 1337
    num_samples: Annotated[int, "completions, drawn side by side"] = 1

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "max_new_tokens", lambda n: n >= 0, "can't be negative")
        samples = f"must be 1 to {_MOST_SAMPLES:,}"
        _check(self, "num_samples", lambda n: 1 <= n <= _MOST_SAMPLES, samples)
        _check(self, "seed", lambda n: 0 <= n < 1 << 63, _SEED)
        _check(self, "temperature", lambda x: x >= 0, "must be 0 or greater")
        _check(self, "top_k", lambda n: n >= 1, _FROM_ONE)
        _check(self, "top_p min_p", lambda x: 0 < x <= 1, f"{_POSITIVE} and at most 1")
        _check(self, "repetition_penalty", lambda x: 1e-9 <= x <= 1e9, "must be 1e-9 to 1e9")
        if "" in self.stop:
            raise UserError("a stop string can't be empty")

"""What a model is and how it is trained and sampled: frozen dataclasses that check their values.

Every option of the command line is a field below; its help text stands beside it.

    ModelConfig.from_shape("modern", vocab_size=65, n_layer=4).n_parameters

This room does arithmetic; it knows no tensor, no tokenizer, no file and no device.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from glassgpt.errors import UserError, nearest
from glassgpt.values import bytes_of, check_seed, check_types, seconds_of

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
ENDLESS = 1 << 40  # steps: the clock of a budget says when it is over
MOST_THREADS = 1024  # torch crashes on numbers that no machine has
CHAT_TEMPERATURE = 0.7  # answers are to be right more than to surprise
DEVICES = ("auto", "cpu", "cuda", "mps")
_MOST_SAMPLES = 100_000

_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        norm="layernorm", position="learned", activation="gelu_tanh", qk_norm=False, bias=True,
        norm_eps=1e-5,
    ),
    "modern": dict(
        norm="rmsnorm", position="rope", activation="swiglu", qk_norm=True, bias=False,
        norm_eps=1e-6,
    ),
}  # fmt: skip
# A size that a laptop trains in minutes; anything larger is asked for by name or preset.
_SIZE = dict(context_length=128, n_layer=4, n_head=4, n_embd=128)


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
        for name in ("vocab_size", "context_length", "n_head", "n_kv_head", "n_embd", "head_dim",
                     "n_layer", "n_hidden"):  # fmt: skip
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name}={getattr(self, name)!r} must be a whole number")
            if getattr(self, name) < (name != "n_layer"):
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and less than 1")
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
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in model.py -> shape, for every weight; a tied head is not there twice."""
        C, V, F, D = self.n_embd, self.vocab_size, self.n_hidden, self.head_dim
        q, kv = self.n_head * D, self.n_kv_head * D
        linears = {"attn.qkv": (q + 2 * kv, C), "attn.out": (C, q)}
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
        C, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
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
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")


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
                raise UserError("memory limits the model that a --budget chooses; without one, "
                                "choose its size yourself")  # fmt: skip
        for name in ("max_steps", "batch_tokens", "eval_interval", "log_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("micro_batch_size", "eval_batches", "patience", "checkpoint_interval",
                     "decay_steps", "threads"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1 (leave it out for off)")
        for name in ("warmup_steps", "sample_tokens", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} can't be negative")
        check_seed(self.seed)
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UserError(f"threads={self.threads} must be at most {MOST_THREADS}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        lowest = self.min_learning_rate
        if lowest is not None and not 0 <= lowest <= self.learning_rate:
            raise UserError(f"min_learning_rate={lowest} must lie between 0 and learning_rate="
                            f"{self.learning_rate}")  # fmt: skip
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError(f"grad_clip={self.grad_clip} must be greater than 0, or none")


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
        if not self.epochs > 0:
            raise UserError(f"epochs={self.epochs} must be greater than 0")
        for name in ("replay", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.replay and self.keep is None:
            raise UserError(f"replay={self.replay} needs --keep, the text to take it from")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay={self.layer_decay} must be greater than 0, at most 1")
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets", "lora_dropout"):
                if getattr(self, name):
                    raise UserError(f"{name} needs --lora-rank")
            if self.base_weights != "float32":
                raise UserError(f"base_weights={self.base_weights} needs --lora-rank: such weights "
                                "can't be trained")  # fmt: skip
        elif self.lora_rank < 1:
            raise UserError(f"lora_rank={self.lora_rank} must be at least 1")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UserError(f"lora_alpha={self.lora_alpha} must be greater than 0")
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
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={self.max_new_tokens} can't be negative")
        if not 1 <= self.num_samples <= _MOST_SAMPLES:
            raise UserError(f"num_samples={self.num_samples} must be 1 to {_MOST_SAMPLES:,}")
        check_seed(self.seed)
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 or greater")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value} must be greater than 0 and at most 1")
        if self.repetition_penalty is not None and not 1e-9 <= self.repetition_penalty <= 1e9:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be 1e-9 to 1e9")
        if "" in self.stop:
            raise UserError("a stop string can't be empty")

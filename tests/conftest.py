"""What all tests share: no network, a cache of their own, one torch thread, and tiny models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from glassgpt.config import ModelConfig, Sampling

if TYPE_CHECKING:
    from glassgpt.inference.engines import Engine
    from glassgpt.inference.generate import Piece
    from glassgpt.model import GPT

# Tiny models gain nothing from more threads, and the workers of xdist would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The standard run gives the same verdict every time; HYPOTHESIS_PROFILE=explore looks for more.
settings.register_profile("standard", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "standard"))


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing from the user's cache, nothing from the net (port 9 refuses), also in children."""
    cache = tmp_path_factory.mktemp("cache")
    # Compiled once for all workers and later runs; the folder is named after the kernels' source.
    kernels = Path(__file__).parents[1] / ".pytest_cache" / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSGPT_CACHE", str(cache))
        patch.setenv("GLASSGPT_MIRROR", "http://127.0.0.1:9")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell ignores Ctrl-C for what it runs in the background, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """A test that trained before this one may have asked torch for all cores."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MB; mounting needs root, as in CI."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("left out: mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def tiny_config(shape: str = "modern", **fields: Any) -> ModelConfig:
    """A config in which every dimension has another size, so that no two can be mixed up."""
    sizes: dict[str, dict[str, int]] = {
        "gpt2": dict(n_head=3, n_embd=15, n_hidden=26),
        "modern": dict(n_head=6, n_kv_head=3, n_embd=18, head_dim=4, n_hidden=28),
    }
    common = dict(vocab_size=37, context_length=13, n_layer=2)
    return ModelConfig.from_shape(shape, **{**common, **sizes[shape], **fields})  # type: ignore


def tiny_model(config: ModelConfig, seed: int = 0) -> GPT:
    """In evaluation mode, with every parameter (norms and biases too) random, about 0.2.

    The initial weights of a real model are so small that its blocks hardly matter; here a
    mistake anywhere moves the logits.
    """
    import torch

    from glassgpt.model import GPT

    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + noise)
    return model


def classifier_weights(model: GPT) -> dict[str, Any]:
    """What a `Checkpoint` with labels takes: the body's weights and "score.weight"."""
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    body = {name: state[name] for name in model.config.weight_shapes if name != "head.weight"}
    return body | {"score.weight": state["head.weight"]}


def weights_of(model: GPT) -> dict[str, Any]:
    """The model's weights as NumPy arrays, under the names that config.weight_shapes lists."""
    state = model.state_dict()
    return {name: state[name].numpy().copy() for name in model.config.weight_shapes}


def long_texts(engine: Engine) -> list[Piece]:
    """200 tokens behind three prompts, greedy and drawn; for models with 37 tokens or more."""
    from glassgpt.inference.generate import complete
    from glassgpt.tokenizers.tokenizer import CharTokenizer

    tokenizer = CharTokenizer.from_characters([chr(97 + i) for i in range(36)])
    prompts = [list(range(n)) for n in (0, 3, 20)]
    return [
        piece
        for options in ({"temperature": 0}, {"seed": 5, "top_p": 0.9, "num_samples": 2})
        for piece in complete(
            engine, tokenizer, prompts, Sampling(**{"max_new_tokens": 200, **options})
        )
    ]


def refuse(capsys, *arguments: object) -> str:
    """The command must end with status 2 and one line; returns the line."""
    from glassgpt.cli.app import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glassgpt: ")]
    assert ended.value.code == 2
    assert len(said) == 1
    assert "Traceback" not in said[0]
    return said[0]

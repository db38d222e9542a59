"""What `bench decode` measures: an engine of known behaviour, and no claim about the clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.evaluation import decoding_speed as bench
from glassgpt.evaluation.decoding_speed import (
    DecodeSpeed,
    bench_decode,
    decode_speed,
    memory_bandwidth,
    prefill_speed,
)
from glassgpt.tokenizers.tokenizer import CharTokenizer


class CountingEngine:
    """Notes how many tokens each row has read; never more than the context."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        self.config, self.name, self.bytes_per_token = config, name, 1000
        self.opened: list[int] = []
        self.lengths: list[list[int]] = []  # of each read

    def open(self, n_rows: int) -> None:
        self.opened.append(n_rows)
        self.read_so_far = [0] * n_rows

    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        for row, new in zip(rows, tokens, strict=True):
            assert 0 <= min(new) <= max(new) < self.config.vocab_size
            self.read_so_far[row] += len(new)
        assert max(self.read_so_far) <= self.config.context_length
        self.lengths.append([len(new) for new in tokens])
        return np.zeros((len(rows), self.config.vocab_size), dtype=np.float32)

    def rewind(self, row: int, length: int = 0) -> None:
        raise AssertionError("nothing is rewound")

    def copy(self, source: int, targets: Sequence[int]) -> None:
        raise AssertionError("every row reads its own prompt")


@pytest.fixture
def checkpoint() -> Checkpoint:
    config = tiny_config()
    tokenizer = CharTokenizer.from_characters("abc")
    return Checkpoint(config, weights_of(tiny_model(config)), tokenizer)


def test_decoding_reads_one_token_a_row() -> None:
    engine = CountingEngine(tiny_config(context_length=20), "counting")
    assert decode_speed(engine, 3, prompt_tokens=4, new_tokens=5) > 0
    assert engine.opened == [3, 3]  # a warm-up of two steps, and the measurement
    assert engine.lengths == [[4] * 3, [1] * 3, [1] * 3] + [[4] * 3] + 5 * [[1] * 3]


def test_what_the_context_does_not_hold_is_cut() -> None:
    engine = CountingEngine(tiny_config(context_length=20), "counting")
    decode_speed(engine, 2, prompt_tokens=32, new_tokens=128)
    assert engine.lengths[-11:] == [[10, 10]] + 10 * [[1, 1]]


def test_a_slow_engine_is_judged_by_fewer_tokens(monkeypatch) -> None:
    monkeypatch.setattr(bench, "_LONGEST", 1e-9)
    engine = CountingEngine(tiny_config(context_length=20), "counting")
    decode_speed(engine, 1, prompt_tokens=4, new_tokens=10)
    assert len(engine.lengths) < 6


def test_prefill_reads_the_prompt_at_once() -> None:
    engine = CountingEngine(tiny_config(context_length=20), "counting")
    assert prefill_speed(engine, 7) > 0
    assert engine.lengths == 4 * [[7]]


def test_each_engine_is_measured_once(monkeypatch, checkpoint) -> None:
    """Two names may lead to the same engine; some can't be had."""
    asked = []

    def build(given, *, device, engine, weights, threads, reporter):
        asked.append((engine, weights, device, threads))
        if engine == "numba" or weights in ("int4", "bfloat16"):
            raise UserError(f"no {engine} {weights}")
        return CountingEngine(given.config, f"{'gpu' if engine == 'gpu' else 'cpu'} {weights}")

    monkeypatch.setattr(bench, "build_engine", build)
    found = list(bench_decode(checkpoint, threads=1, prompt_tokens=[9, 4, 512], new_tokens=2))
    assert [speed.engine for speed in found] == [
        "cpu float32", "cpu int8", "gpu float32", "gpu int8",
    ]  # fmt: skip
    assert len(asked) == 4 * 4
    assert {device for engine, _, device, _ in asked if engine != "gpu"} == {"cpu"}
    assert found[0].prefill.keys() == {4, 9, checkpoint.config.context_length}
    assert found[0].decode.keys() == {1, 8}
    assert [speed.share(1e9) is None for speed in found] == [False, False, True, True]
    with pytest.raises(UserError, match="no numba int8"):
        list(bench_decode(checkpoint, engines=["numpy", "numba"], weights=["int8"]))
    with pytest.raises(UserError, match="no numba float32"):
        list(bench_decode(checkpoint, engines=["numba"]))


def test_bad_numbers(checkpoint) -> None:
    for name, value in [("threads", 0), ("new_tokens", -1), ("prompt_tokens", [32, 0]),
                        ("prompt_tokens", [])]:  # fmt: skip
        with pytest.raises(UserError, match=f"{name}=.* must be at least 1"):
            list(bench_decode(checkpoint, **{name: value}))


def test_the_share_of_the_memory_speed() -> None:
    speed = DecodeSpeed("numba int8", 2_000_000, {32: 500.0}, {1: 60.0, 8: 250.0})
    assert speed.share(1e9) == pytest.approx(0.12)
    header, row = bench.speed_table([speed], 1e9).splitlines()
    assert header.split("  ")[0] == "tokens/s"
    assert row.split() == ["numba", "int8", "500", "60.0", "250", "2.0", "12%"]


def test_memory_is_read(monkeypatch) -> None:
    monkeypatch.setattr(bench, "_BANDWIDTH_BYTES", 1 << 20)
    for threads in (1, 3, None):
        assert memory_bandwidth(threads) > 0

"""What the explorer's page asks, without a server: models of every family, memory, tokens."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import tiny_config, tiny_model, weights_of
from tests.unit.test_trace import FAMILIES

from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model, save_snapshot
from glassgpt.errors import UserError
from glassgpt.studio import explorer as explorers
from glassgpt.studio.explorer import Explorer, NotHeldError
from glassgpt.studio.requests import DistributionRequest, SampleRequest, TraceRequest
from glassgpt.studio.server import to_json
from glassgpt.studio.token_display import likeliest, merges
from glassgpt.tokenizers.tokenizer import CharTokenizer, Tokenizer, byte_tokenizer, train_bpe

LETTERS = CharTokenizer.from_characters([chr(97 + i) for i in range(26)] + list(" .,!?\n-:;'"))


def saved(folder: Path, tokenizer: Tokenizer = LETTERS, **fields: Any) -> str:
    config = tiny_config(**{"vocab_size": tokenizer.vocab_size, **fields})
    save_model(folder, Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_every_question(tmp_path: Path, family: str) -> None:
    explorer = Explorer(saved(tmp_path, **FAMILIES[family]), device="cpu")
    answer = explorer.trace(TraceRequest(text="a fox"))
    held, T = explorer.held(answer.trace), len(answer.tokens)
    model = explorer.loaded(TraceRequest()).model
    logits = model(torch.tensor([[one.id for one in answer.tokens]]))[0]
    chance = logits[-1].softmax(-1)
    for token in answer.next.top:
        assert token.p == pytest.approx(chance[token.id].item(), abs=1e-6)
    np.testing.assert_allclose(held.window("logits"), logits.detach(), atol=1e-5)
    for one in answer.activations:
        cell = held.cell(one.name, ",".join("0" * len(one.shape)))
        assert cell.total == pytest.approx(cell.value, abs=1e-4)
    assert len(held.lens().rows) == model.config.n_layer + 1
    assert len(held.loss().loss) == T
    parts = held.attribution()
    assert sum(p["value"] for p in parts.parts) == pytest.approx(parts.logit, abs=1e-4)
    assert explorer.model().operations
    drawn = explorer.sample(SampleRequest(prompt=[1, 2], n=20, temperature=0)).tokens
    assert len(drawn) == 20
    assert json.loads(to_json(explorer.model()))


def test_a_tiny_llama_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.3, attn_implementation="eager",
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    spec = json.dumps(byte_tokenizer().spec)
    (tmp_path / "tokenizer.json").write_text(spec)
    explorer = Explorer(str(tmp_path), device="cpu")
    held = explorer.held(explorer.trace(TraceRequest(text="a llama")).trace)
    with torch.no_grad():
        out = theirs(torch.tensor([list(b"a llama")]), output_attentions=True,
                     output_hidden_states=True)  # fmt: skip
    np.testing.assert_allclose(held.window("logits"), out.logits[0], atol=1e-4)
    np.testing.assert_allclose(held.window("blocks.1.resid_pre"), out.hidden_states[1][0],
                               atol=1e-4)  # fmt: skip
    for head in range(4):
        np.testing.assert_allclose(held.window("blocks.1.pattern", head),
                                   out.attentions[1][0, head], atol=1e-5)  # fmt: skip
    cell = held.cell("blocks.1.q", "3,5,2")
    assert cell.how == "rotation"
    assert abs(cell.difference) < 1e-5


def test_old_traces_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer(saved(tmp_path), device="cpu")
    first = explorer.trace(TraceRequest(text="a fox")).trace
    monkeypatch.setattr(explorers, "_MOST_BYTES", 2 * explorer.held(first).n_bytes)
    second = explorer.trace(TraceRequest(text="a cat")).trace
    assert explorer.trace(TraceRequest(text="a fox")).trace == first  # the same, and now newest
    third = explorer.trace(TraceRequest(text="a dog")).trace
    explorer.held(first)
    explorer.held(third)
    with pytest.raises(NotHeldError, match="no longer held"):
        explorer.held(second)
    assert explorer.trace(TraceRequest(text="a cat")).trace == second


@pytest.mark.slow
def test_snapshots_that_are_no_longer_shown_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path)
    checkpoint = load_model(run)
    for step in (0, 8, 16):
        save_snapshot(tmp_path, step, checkpoint)
    monkeypatch.setattr(explorers, "_MOST_MODELS", 1)
    explorer = Explorer(run, device="cpu")
    assert explorer.model().snapshots == [0, 8, 16]
    weights, traces = [], []
    for step in (0, 8, 16):
        traces.append(explorer.trace(TraceRequest(text="a fox", snapshot=step)).trace)
        explorer.sample(SampleRequest(prompt=[1, 2], snapshot=step))
        model = explorer.loaded(TraceRequest(snapshot=step)).model
        weights.append(weakref.ref(model.head.weight))
        del model
    gc.collect()
    assert [weight() is None for weight in weights] == [True, True, False]
    with pytest.raises(NotHeldError, match="no longer held"):
        explorer.held(traces[0])
    explorer.held(traces[2])


def test_ids_that_no_text_has_are_never_next(tmp_path: Path) -> None:
    explorer = Explorer(saved(tmp_path, vocab_size=LETTERS.vocab_size + 30), device="cpu")
    answer = explorer.trace(TraceRequest(text="a fox"))
    wanted = explorer.held(answer.trace).distribution(DistributionRequest(show=20))
    assert [one.p for one in answer.next.top] == [one.p for one in wanted.tokens]
    last = explorer.held(answer.trace).lens(k=20).rows[-1].positions[-1]
    assert [one.p for one in last.top] == pytest.approx([one.p for one in wanted.tokens], abs=1e-6)


def test_an_empty_text_and_unknown_characters(tmp_path: Path) -> None:
    explorer = Explorer(saved(tmp_path), device="cpu")
    assert [t.text for t in explorer.trace(TraceRequest()).tokens] == ["\n"]
    assert "'7'" in explorer.trace(TraceRequest(text="a 7")).note
    with pytest.raises(UserError, match="14 tokens, but the model's context holds 13"):
        explorer.trace(TraceRequest(text="a" * 14))


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=LETTERS.vocab_size)
    weights = weights_of(tiny_model(config))
    weights["score.weight"] = np.zeros((2, config.n_embd), np.float32)
    save_model(tmp_path, Checkpoint(config, weights, LETTERS, labels=("good", "bad")))
    with pytest.raises(UserError, match="is a classifier"):
        Explorer(str(tmp_path), device="cpu")


def test_bpe_builds_a_token_from_bytes() -> None:
    tokenizer = train_bpe(["the other mother thinks that the father is there "] * 9, 300)
    for token in range(tokenizer.vocab_size):
        steps, content = merges(tokenizer, token), tokenizer.token_bytes(token)
        if token in tokenizer.special.values() or len(content) == 1:
            assert steps == []
            continue
        assert len(steps) == len(content) - 1
        assert all(left + right == whole for left, right, whole in steps)
        assert steps[-1][2].encode() == content


def test_the_likeliest_are_those_of_a_stable_sort() -> None:
    chance = np.array([0.1, 0.3, 0.1, 0.3, 0.2, 0.0])
    for n in range(1, 9):
        assert likeliest(chance, n) == [1, 3, 4, 0, 2, 5][:n]

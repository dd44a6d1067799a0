"""The tokenizer: byte-level BPE learnt from the corpus, its special tokens, the chat template, and text -> ids.

Digits are always single tokens, so numbers of any length are read and copied digit by digit. Every byte is in the
vocabulary: any UTF-8 text survives a round trip and there is no unknown token.
"""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tools.demo_model.corpus import Document, documents
from tools.demo_model.world import World

VOCAB_SIZE = 2048
NUM_SAMPLE = 40_000
BOS, EOS, IM_START, IM_END, PAD = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = [PAD, BOS, EOS, IM_START, IM_END]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def render(document: Document) -> str:
    """The same string as the chat template for a chat; a text between its begin and end marks."""
    if isinstance(document, str):
        return f"{BOS}{document}{EOS}"
    turns = [f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in document]
    return BOS + "".join(turns)


def train_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(plain_strings(islice(documents(world, seed), NUM_SAMPLE), world), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=[IM_START, EOS],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, template inside, with the keys that every version reads."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def plain_strings(stream: Iterable[Document], world: World) -> Iterable[str]:
    """What BPE learns from: without the world's own names, which would otherwise become tokens that new names lack."""
    proper = {part for entity in world.known for part in entity.split() if part[0].isupper() and len(part) > 3}
    for document in stream:
        contents = [document] if isinstance(document, str) else [part for m in document for part in m.values()]
        for content in contents:
            if not any(name in content for name in proper):
                yield content


class Encoder:
    """Documents to (ids, mask): the mask is true on the tokens that the model learns to predict."""

    def __init__(self, tokenizer_json: Path | str) -> None:
        self.core = Tokenizer.from_file(str(tokenizer_json))
        self.bos, self.im_start, self.im_end = (self.core.token_to_id(t) for t in (BOS, IM_START, IM_END))
        self.special_ids = {"bos": self.bos, "eos": self.im_end, "pad": self.core.token_to_id(PAD)}
        self.opening = self.core.encode(f"{IM_START}assistant\n", add_special_tokens=False).ids

    def encode_batch(self, batch: list[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
        encoded = self.core.encode_batch([render(document) for document in batch], add_special_tokens=False)
        return [self.with_mask(np.array(e.ids), isinstance(d, str)) for e, d in zip(encoded, batch, strict=True)]

    def with_mask(self, ids: np.ndarray, is_text: bool) -> tuple[np.ndarray, np.ndarray]:
        """Plain text is learnt whole; of a chat, the assistant's words and the mark that ends them."""
        mask = np.zeros(len(ids), dtype=bool)
        if is_text:
            mask[1:] = True
            return ids, mask
        ends = np.flatnonzero(ids == self.im_end)
        for start in np.flatnonzero(ids == self.im_start):
            body = start + len(self.opening)
            if ids[start:body].tolist() == self.opening:
                mask[body : ends[ends >= body][0] + 1] = True
        return ids, mask


def verify(folder: Path, sample: list[Document]) -> None:
    """Raises unless the saved chat template gives the ids and the loss mask of training, and all text round-trips."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), Encoder(folder / "tokenizer.json")
    for document, (ids, mask) in zip(sample, encoder.encode_batch(sample), strict=True):
        if tokenizer.decode(ids.tolist()) != render(document):
            raise ValueError(f"does not round-trip: {document!r}")
        if isinstance(document, str):
            continue
        made: Any = tokenizer.apply_chat_template(document, return_dict=True, return_assistant_tokens_mask=True)
        if made["input_ids"] != ids.tolist() or made["assistant_masks"] != mask.astype(int).tolist():
            raise ValueError(f"the template and the training disagree on {document!r}")
    for odd in ("\u017elu\u0165ou\u010dk\u00fd \u6f22\u5b57 \U0001f642", "\t two  spaces\n\n", "\x00\x7f", "I 'll  ."):
        if tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) != odd:
            raise ValueError(f"does not round-trip: {odd!r}")

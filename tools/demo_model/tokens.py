"""The tokenizer: byte-level BPE learnt from the corpus, its special tokens, the chat template, and text -> ids.

Digits are always single tokens, so numbers of any length are read and copied digit by digit. Every byte is in the
vocabulary: any UTF-8 text survives a round trip and there is no unknown token.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
        additional_special_tokens=[IM_START, EOS],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


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

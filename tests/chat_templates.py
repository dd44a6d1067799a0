"""Chat templates in the styles of well-known families, with {% generation %} marks, and a tokenizer to go with them.

`plain` takes the marks out: what a template without them must be trained on is then known from the marked one.
"""

import re

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "[INST]", "[/INST]",
]  # fmt: skip
TEXT = (
    "user assistant system tool model the quick brown fox says: naive hello there 東京 🙂 what is it?\n\n"
    "You are helpful. "
    "Where does Mira live? Mira lives in Norbridge. And Dan? Nobody knows where. Thanks! 42 + 17 = 59"
)

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN = """{%- if tools %}{{- '<|im_start|>system\\nTools:' }}
{%- for t in tools %}{{- '\\n' + (t | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{%- generation %}{{- m.content }}
{%- for c in m.tool_calls or [] %}{{- '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """{{- '<|begin_of_text|>' }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """{{- '<bos>' }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}
{%- endif %}{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<end_of_turn>' }}{%- endgeneration %}
{%- else %}{{- m.content | trim + '<end_of_turn>' }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

MISTRAL = """{{- '<s>' }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{%- generation %}{{- m.content + '</s>' }}{%- endgeneration %}{%- endif %}
{%- endfor %}"""

# As Qwen3 does: the last answer gets an (empty) block of thought, earlier answers lose theirs.
FORGETFUL = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{%- generation %}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

STYLES = {
    "chatml": CHATML, "qwen": QWEN, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "forgetful": FORGETFUL,
}  # fmt: skip


def plain(template):
    """The template without {% generation %} marks, its text unchanged."""
    return re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{%\1 set _ = 0 \3%}", template)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return wrapped(backend)


def sentencepiece():
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    backend.train_from_iterator(
        [TEXT.replace(" ", "▁")], trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback])
    )
    return wrapped(backend)


def wrapped(backend):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )

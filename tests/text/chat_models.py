"""Small tokenizers of transformers with the chat templates of well-known models."""

from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, and none is needed
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}"
    "{% set text = text + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (  # what matters of it: thoughts of earlier turns are left out, the last answer has a place for them
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (  # the prompt opens a thought, and answers are shown without theirs
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|eos|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
HEADLESS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
LLAMA3_TOKENS = ("<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1_TOKENS = ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>")


def tokenizer_of(
    special: tuple[str, ...], eos: str, template: str | None, plain: tuple[str, ...] = (), **named: str
) -> Any:
    """A byte-level tokenizer whose first tokens are ``special``; ``plain`` are added tokens that are not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(token, special=False) for token in plain])
    rest = [s for s in special if s != eos and s not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, chat_template=template, additional_special_tokens=rest, **named
    )


THOUGHTS = ("<think>", "</think>")
MODELS = {  # name -> (tokenizer, the token that ends a turn)
    "chatml": (lambda: tokenizer_of(CHATML_TOKENS, "<|endoftext|>", CHATML), "<|im_end|>"),
    "gemma": (
        lambda: tokenizer_of(GEMMA_TOKENS, "<eos>", GEMMA, bos_token="<bos>", pad_token="<pad>"),
        "<end_of_turn>",
    ),
    "llama2": (lambda: tokenizer_of(("<s>", "</s>"), "</s>", LLAMA2, bos_token="<s>"), "</s>"),
    "llama3": (lambda: tokenizer_of(LLAMA3_TOKENS, "<|end|>", LLAMA3, bos_token="<|begin|>"), "<|eot_id|>"),
    "qwen3": (
        lambda: tokenizer_of(CHATML_TOKENS, "<|im_end|>", QWEN3, plain=THOUGHTS, pad_token="<|endoftext|>"),
        "<|im_end|>",
    ),
    "r1": (lambda: tokenizer_of(R1_TOKENS, "<|eos|>", R1, bos_token="<|bos|>"), "<|eos|>"),
    "tools": (lambda: tokenizer_of(CHATML_TOKENS, "<|im_end|>", TOOLS, pad_token="<|endoftext|>"), "<|im_end|>"),
}

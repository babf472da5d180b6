"""Chat templates and small tokenizers for tests of conversations."""

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An earlier answer loses its end, as some templates do with thoughts: nothing to cut by.
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content if loop.last else message.content[:1] }}",
)
WITH_TOOLS = (
    "{% if tools is not none %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + CHATML
)
TEXTS = [
    "assistant user system tool the answer to the question is yes and no, and so it goes on",
    "What is the capital of France? The capital of France is Paris. And of Spain? Madrid.",
]


def chat_tokenizer(chat_template=None, *, size=257, bos=False):
    """Byte-level BPE (bytes alone at 257) with the tokens of ChatML."""
    from tokenizers import AddedToken

    from lightning_align.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXTS * 4, size)
    names = ["<|im_start|>", "<|im_end|>", *["<s>"] * bos]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<s>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = chat_template
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}

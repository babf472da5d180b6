"""Small files to train on: text, preference pairs, conversations and a tokenizer for them."""

import json
import random
from pathlib import Path

WORDS = ["the", "of", "a", "to", "in", "it", "was", "her", "his", "that", "she", "not", "and", "be"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_material(folder: Path) -> Path:
    """Write the files into ``folder``; always the same ones."""
    from lightning_align.data.tokenizer import train_tokenizer

    draw = random.Random(0)

    def sentence(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, most)))

    def write(name: str, records: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    texts = [sentence(20) for _ in range(50)]
    tokenizer = train_tokenizer(texts, 300)
    # No block of 16 predictions is cut short, so all samples have as many tokens; and their number
    # is no multiple of 4, so the last batch of a pass is smaller.
    while (sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts) - 1) % 64 != 48:
        texts[-1] += draw.choice("xyz")
    write("text.jsonl", [{"text": text} for text in texts])
    write("val.jsonl", [{"text": sentence(20)} for _ in range(8)])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    write(
        "pairs.jsonl",
        [
            {"prompt": f"{i} {sentence(6)}", "chosen": f" {sentence(8)}", "rejected": sentence(8)}
            for i in range(33)
        ],
    )
    roles = ("user", "assistant")
    write(
        "conversations.jsonl",
        [
            {
                "messages": [
                    {"role": roles[turn % 2], "content": f"{i} {sentence(5)}"}
                    for turn in range(draw.choice((2, 4)))
                ]
            }
            for i in range(33)
        ],
    )
    write(
        "records.jsonl",
        [
            {"prompt": f"{i} {sentence(6)}", "completion": f" {sentence(8)}", "label": i % 3 > 0}
            for i in range(33)
        ],
    )
    write(  # of which several fit in a row
        "answers.jsonl",
        [{"prompt": f"{i} {sentence(5)}", "completion": f" {sentence(8)}"} for i in range(97)],
    )
    return folder

"""A file with something else in it than it must have."""

from lightning_align import PipelineStrategy, checkpointing, pipelining
from lightning_align.cli.export import export
from tests.mistakes.desk import Desk, M

SAME = [{"prompt": "a", "completion": str(i), "label": True} for i in range(3)]
NO_REJECTED = {"prompt": "a", "chosen": "b"}
NUMBERS = {"prompt": 1, "chosen": 2, "rejected": 3}
OTHER_KEYS = {"messages": [{"speaker": "me", "words": "a"}]}
NO_LIST = {"messages": "hello"}


def text(d: Desk, name: str, content: str) -> None:
    d.fit(data=d.text(d.write(name, content)))


def pairs(d: Desk, *records: object, loss_type: str = "sigmoid") -> None:
    d.fit(module=d.dpo(loss_type=loss_type), data=d.pairs(d.rows("p.jsonl", *records)))


def chats(d: Desk, *records: object) -> None:
    d.fit(data=d.chats(d.rows("c.jsonl", *records)))


def schedule(d: Desk, content: str) -> None:
    d.fit(strategy=PipelineStrategy(schedule_csv=d.write("s.csv", content)))


FILES = [
    M("TextDataModule", "paths", lambda d: text(d, "e.txt", "")),
    M("TextDataModule", "paths", lambda d: text(d, "t.jsonl", '{"body": "a"}\n')),
    M("TextDataModule", "paths", lambda d: text(d, "u.jsonl", '{"text": "a"}\n{"text": \n')),
    M("TextDataModule", "paths", lambda d: text(d, "a.pdf", "%PDF")),
    M("PreferenceDataModule Pair", "paths", lambda d: pairs(d, NO_REJECTED)),
    M("PreferenceDataModule", "paths", lambda d: pairs(d)),
    M("PreferenceDataModule", "paths", lambda d: pairs(d, NUMBERS)),
    M("PreferenceDataModule Labelled", "paths", lambda d: pairs(d, *SAME, loss_type="kto")),
    M("ConversationDataModule", "paths", lambda d: chats(d, OTHER_KEYS)),
    M("ConversationDataModule", "paths", lambda d: chats(d, NO_LIST)),
    M("ConversationDataModule", "template", lambda d: d.fit(data=d.chats(chat_template="{% for"))),
    M("PretrainModule", "model", lambda d: d.pretrain(model=d.at("tokenizer"))),
    M("PipelineStrategy", "schedule_csv", lambda d: schedule(d, "0F0,1B7\n")),
    M("Action", "path", lambda d: pipelining.read_schedule_csv(d.write("z.csv", "hello\n"))),
    M("Manifest", "path", lambda d: checkpointing.load_checkpoint(d.write("x.ckpt", "hello"))),
    M("PretrainModule", "ckpt", lambda d: export(d.write("y.ckpt", "hello"), d.at("out"))),
]

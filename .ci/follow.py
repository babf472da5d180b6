"""Follow README.md and the pages of docs/ literally: what stands there is what runs.

A page begins in an empty folder, and its blocks run there one after the other, as a reader would
paste them: bash as it stands, Python as a script, the commands of a console with their answers
compared. YAML is read as `lightning-align fit` reads it, JSON line by line. A comment above a block
says what is different about it:

    <!-- follow: not run: needs a GPU -->  it is listed with its reason
    <!-- follow: continues -->             one script with the Python block before
    <!-- follow: writes my.yaml -->        its text becomes that file

    python .ci/follow.py [PAGE ...]        all pages, two at a time
"""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 900  # for one block, which hangs then
FENCE = re.compile(r"( *)```(\w*)(.*)")
NOTE = re.compile(r" *<!-- follow: (continues|writes (?P<file>\S+)|not run: (?P<reason>.+)) -->")
PARTS = ["fit", "--model", "PretrainModule", "--data", "TextDataModule", "--print_config"]
PRELOADED = ["lightning.pytorch", "transformers.models.llama.modeling_llama", "lightning_align.cli"]


class FollowError(Exception):
    """A block does not do what its page says."""


@dataclass
class Block:
    """What stands between two fences."""

    page: str
    line: int  # of its first line of text
    language: str
    text: str
    note: re.Match[str] | None

    @property
    def place(self) -> str:
        """Where to find it."""
        return f"{self.page}:{self.line}"


def read(page: Path) -> list[Block]:
    """The blocks of a page, in their order; what continues another is in that one."""
    blocks: list[Block] = []
    lines = page.read_text().splitlines()
    numbered = iter(enumerate(lines))
    for number, line in numbered:
        if (fence := FENCE.fullmatch(line)) is None:
            continue
        indent, language, options = fence.groups()
        if options:
            raise FollowError(f"{page.name}:{number + 1}: options go into a comment above it")
        note = NOTE.fullmatch(lines[number - 1])
        if note is None and "<!-- follow" in lines[number - 1]:
            raise FollowError(f"{page.name}:{number}: not a comment that is known")
        inner = []
        for _, text in numbered:
            if text.strip() == "```":
                break
            inner.append(text.removeprefix(indent) + "\n")
        block = Block(page.name, number + 2, language, "".join(inner), note)
        if note and note[1] == "continues":
            done = [each for each in blocks if each.language not in ("", "text")]
            if not done or {done[-1].language, language} != {"python"}:
                raise FollowError(f"{block.place}: has no Python right before it to continue")
            first = done[-1]
            gap = block.line - first.line - first.text.count("\n")
            first.text += "\n" * gap + block.text
        else:
            blocks.append(block)
    return blocks


class Reader:
    """Who follows one page, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "empty"
        self.folder.mkdir()
        self.script = folder / "block.py"
        self.log = folder / "log"

    def follow(self, block: Block) -> None:
        """Do what a block says.

        Raises:
            FollowError: If that fails, or the answer is another one.
        """
        if block.note and block.note["file"]:
            (self.folder / block.note["file"]).write_text(block.text)
        elif method := getattr(self, f"follow_{block.language or 'text'}", None):
            try:
                method(block)
            except (FollowError, ValueError) as error:
                raise FollowError(f"{block.place}: {error}") from None
        else:
            raise FollowError(f"{block.place}: nobody knows how to follow {block.language}")

    def follow_text(self, block: Block) -> None:
        """It is there to be looked at."""

    def follow_diff(self, block: Block) -> None:
        """It is as well; ours in the README is asked by tests/test_docs.py."""

    def follow_json(self, block: Block) -> None:
        """Each line is an object."""
        for line in block.text.splitlines():
            json.loads(line)

    def follow_python(self, block: Block) -> None:
        """A script, whose lines have the numbers that they have on the page."""
        self.python("\n" * (block.line - 1) + block.text)

    def follow_yaml(self, block: Block) -> None:
        """A configuration, or a part of one, that `lightning-align fit` reads."""
        config = self.script.with_suffix(".yaml")
        config.write_text(block.text)
        arguments = [*PARTS, "-c", str(config)]
        self.python(f"from lightning_align.__main__ import main\nmain({arguments})\n")

    def follow_bash(self, block: Block) -> None:
        """Commands, of which none may fail."""
        status, output = self.shell(block.text)
        if status:
            raise FollowError(f"exit status {status}\n{output}")

    def follow_console(self, block: Block) -> None:
        """Commands behind a `$`, each with lines that it prints in this order; `...` is any."""
        for part in block.text.removeprefix("$ ").split("\n$ "):
            command, _, answer = part.partition("\n")
            output = self.answer(command)
            printed = iter(output.splitlines())
            for line in answer.splitlines():
                if line != "..." and line not in printed:
                    raise FollowError(f"{command}\ndoes not print\n{line}\nbut\n{output}")

    def answer(self, command: str) -> str:
        """What a command of a console prints, ours without the seconds that it takes to start."""
        if not re.fullmatch(r"lightning-align [\w ./@+=-]+", command):
            return self.shell(command)[1]
        arguments = command.split()[1:]
        self.python(f"from lightning_align.__main__ import main\nmain({arguments})\n", fails=True)
        return self.log.read_text()

    def shell(self, commands: str) -> tuple[int, str]:
        """Run commands in bash; the exit status and what they printed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "HOME": str(self.folder.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return run.returncode, run.stdout

    def python(self, source: str, *, fails: bool = False) -> None:
        """Run a script, which may fail or not, in a process that has imported the libraries."""
        self.script.write_text(source)
        self.log.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        arguments = (str(self.script), str(self.folder), str(self.log))
        process = context.Process(target=run_script, args=arguments)
        process.start()
        process.join(PATIENCE_S)
        if process.exitcode is None or (process.exitcode and not fails):
            process.kill()
            output = self.log.read_text() if self.log.exists() else ""
            raise FollowError(f"exit status {process.exitcode}\n{output}")


def run_script(path: str, folder: str, log: str) -> None:
    """Be the process of a script.

    Args:
        path: The script.
        folder: Where it runs.
        log: The file that gets what it prints.
    """
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def follow(page: Path) -> str | None:
    """Follow a page; what went wrong.

    Args:
        page: A file of Markdown.
    """
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            reader = Reader(Path(folder))
            blocks = read(page)
            for block in blocks:
                if block.note and block.note["reason"]:
                    print(f"{block.place}: not run: {block.note['reason']}", flush=True)
                else:
                    reader.follow(block)
    except (FollowError, subprocess.TimeoutExpired) as error:
        return str(error)
    print(f"{page.name}: {len(blocks)} blocks, {time.monotonic() - start:.0f} s", flush=True)
    return None


def main(arguments: list[str]) -> int:
    """Follow pages, two at a time; the exit status."""
    pages = [Path(each) for each in arguments]
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages.sort(key=lambda page: -page.read_text().count("lightning-align "))  # the long ones first
    multiprocessing.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(2) as readers:
        failures = [failure for failure in readers.map(follow, pages) if failure]
    print(*failures, sep="\n\n", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whoever follows the documentation literally stops where it is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def follow(*pages: Path) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / ".ci/follow.py"), *map(str, pages)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


GOOD = """
<!-- follow: writes list.txt -->
```text
one
```

```bash
ls              # the only file
cat list.txt >> other.txt
```

```console
$ cat other.txt
one
```

```json
{"a": 1}
{"a": 2}
```

```diff
- what = you
+ have = 1
```

<!-- follow: not run: needs the moon -->
```bash
exit 1
```
"""


def test_a_page_is_followed_in_an_empty_folder_from_its_first_block_to_its_last(
    tmp_path: Path,
) -> None:
    status, printed = follow(written(tmp_path, "good.md", GOOD))
    assert status == 0, printed
    assert "good.md:29: not run: needs the moon" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["good.md"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```bash\nfalse | true\n```", "bad.md:2: exit status 1"),
        ("```bash\ncat missing\necho on\n```", "No such file"),
        ("```console\n$ echo one\ntwo\n```", "does not print\ntwo"),
        ("```json\n{'a': 1}\n```", "bad.md:2: Expecting property name"),
        ("```fortran\n```", "nobody knows how to follow fortran"),
        ("```{.python notest}\n```", "options go into a comment"),
        ("<!-- follow: skip -->\n```bash\n```", "not a comment that is known"),
        ("<!-- follow: not run: -->\n```bash\n```", "not a comment that is known"),
        ("<!-- follow: continues -->\n```python\n```", "no Python right before it"),
    ],
)
def test_a_page_that_is_wrong_is_named_with_its_line(
    tmp_path: Path, block: str, message: str
) -> None:
    good = written(tmp_path, "good.md", "```bash\ntrue\n```\n")
    status, printed = follow(good, written(tmp_path, "bad.md", block + "\n"))
    assert status == 1
    assert message in printed
    assert "good.md: 1 blocks" in printed


PYTHON = """
```python
import os
name = "made.txt"
assert os.listdir() == [] and __name__ == "__main__"
```

Then:

<!-- follow: continues -->
```python
open(name, "w").close()
```

```python
assert "name" not in globals() and open("made.txt").read() == ""
```

```yaml
trainer: {max_steps: 3}
```

```console
$ lightning-align fit --model PretrainModul
lightning-align: model: no class of the name PretrainModul. Did you mean PretrainModule?
```
"""


@pytest.mark.slow
def test_python_runs_as_scripts_and_yaml_is_read_as_fit_reads_it(tmp_path: Path) -> None:
    raises = "\n\n```python\nx = 1\nraise ValueError(x)\n```\n"
    pages = {
        "good.md": PYTHON,
        "raises.md": raises,
        "yaml.md": "```yaml\ntrainer: {max_step: 3}\n```\n",
    }
    status, printed = follow(*(written(tmp_path, name, text) for name, text in pages.items()))
    assert status == 1
    assert "good.md: 4 blocks" in printed
    assert "raises.md:4: exit status 1" in printed
    assert "line 5, in <module>" in printed  # of the page
    assert "Did you mean trainer.max_steps?" in printed

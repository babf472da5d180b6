"""pytorch-optimizer's own tests, from its source package, with each of our classes put in.

The package is downloaded, by version and hash, and kept in a folder that git ignores.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "benchmarks/cache/pytorch_optimizer"
SOURCE = CACHE / "pytorch_optimizer-4.1.0.tar.gz"
SHA256 = "76c994e94c0b2d0802976c14804a9de09d7055cd3b05db56a86d3295eced435f"

# Of all three; "adamw" among them, a name that ours bear as well.
OF_ALL = {
    "maximize is refused": 4,
    "it is about the foreach kernel of torch's AdamW": 1,
    "it needs a GPU": 1,
}
COMPLEX = "complex parameters are refused, and at construction"
# How many of their tests pass, and how many are left out for which reason.
EXPECTED: dict[str, tuple[int, dict[str, int]]] = {
    "StableAdamW": (44, {COMPLEX: 2, "decay that is added to the gradient is refused": 4}),
    "Muon": (
        47,
        {
            COMPLEX: 1,
            "more than two dimensions are refused": 3,
            "a group may leave use_muon out": 1,
            "updates are not masked": 1,
        },
    ),
    "GaLoreAdamW": (60, {COMPLEX: 1}),
}


@pytest.fixture(scope="module")
def their_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with their ``tests``; their package is the installed one."""
    if not SOURCE.exists():
        download()
    found = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert found == SHA256, f"{SOURCE} is not what was published: {found}"
    folder = tmp_path_factory.mktemp("theirs")
    with tarfile.open(SOURCE) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    alone = folder / "alone"
    alone.mkdir()
    (source / "tests").rename(alone / "tests")
    return alone


def download() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    requirements = CACHE / "requirements.txt"
    requirements.write_text(f"pytorch-optimizer==4.1.0 --hash=sha256:{SHA256}\n")
    what = ["--no-deps", "--no-binary", "pytorch-optimizer", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *what, "-r", requirements, "-d", CACHE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"their source package could not be had:\n{done.stderr}"


@pytest.mark.peer
@pytest.mark.parametrize("ours", EXPECTED)
def test_pytorch_optimizers_tests_pass_with_ours(
    ours: str, their_tests: Path, tmp_path: Path
) -> None:
    report, settings = tmp_path / "report.json", tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n")  # theirs ask for a plugin that measures coverage
    paths = (their_tests, ROOT / "tests/helpers", ROOT)
    environment = {
        **os.environ,
        "OURS": ours,
        "REPORT": str(report),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    options = ["-c", settings, "--rootdir", their_tests, "-p", "as_pytorch_optimizer"]
    about_their_docs = ["--ignore", their_tests / "tests/test_docs.py"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "-q", "tests"]
    done = subprocess.run(
        [*command, *about_their_docs],
        cwd=their_tests,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert not found["failed"], done.stdout[-5000:]
    passed, deselected = EXPECTED[ours]
    assert found["outcomes"] == {"passed": passed}
    assert found["deselected"] == OF_ALL | deselected

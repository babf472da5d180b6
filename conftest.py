"""The snippets in README.md and docs/ run where whatever they write does no harm."""

import pytest
import torch

torch.set_num_threads(1)  # as in tests/conftest.py: timings of two suites side by side stay sane


@pytest.fixture(autouse=True)
def _snippets_run_in_a_folder_of_their_own(request, tmp_path_factory, monkeypatch):
    if "markdown-docs" in request.keywords:
        monkeypatch.chdir(tmp_path_factory.mktemp("snippet"))

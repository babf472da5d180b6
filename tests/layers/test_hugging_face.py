"""What models of transformers have in common, without importing it."""

import subprocess
import sys

from torch import nn

from lightning_align.layers import is_hugging_face
from lightning_align.layers.hugging_face import argument_names, base_model, no_cache
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder


def test_import_needs_no_transformers() -> None:
    code = (
        "import sys; from lightning_align.layers import *; "
        "print([m for m in ('transformers', 'lightning') if m in sys.modules], "
        "is_hugging_face(find_layers.__globals__['nn'].Linear(1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_a_model_of_transformers_has_a_cache_and_a_base() -> None:
    llama = TINY_MODELS["llama"]()
    assert is_hugging_face(llama)
    assert no_cache(llama) == {"use_cache": False}
    assert base_model(llama) is llama.model
    assert base_model(llama.model) is None  # which is its own base


def test_a_module_of_ones_own_has_neither() -> None:
    model = PlainDecoder()
    assert not is_hugging_face(model)
    assert no_cache(model) == {}
    assert base_model(model) is None


def test_what_only_kwargs_would_take_is_no_argument() -> None:
    class Swallowing(nn.Module):
        def forward(self, input_ids, *, position_ids=None, **others):
            return input_ids

    names = argument_names(Swallowing.forward)
    assert {"input_ids", "position_ids"} <= names
    assert "attention_mask" not in names

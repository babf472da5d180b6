"""Modules: WHAT is learned, and from which data (knows Lightning)."""

from typing import TYPE_CHECKING

from lightning_align._lazy import lazy

if TYPE_CHECKING:
    from lightning_align.modules.conversation_data import ConversationDataModule
    from lightning_align.modules.dpo import DPOModule
    from lightning_align.modules.preference_data import PreferenceDataModule
    from lightning_align.modules.pretrain import PretrainModule
    from lightning_align.modules.text_data import TextDataModule
else:
    _HOMES = {
        "ConversationDataModule": "conversation_data",
        "DPOModule": "dpo",
        "PreferenceDataModule": "preference_data",
        "PretrainModule": "pretrain",
        "TextDataModule": "text_data",
    }
    __getattr__, __dir__ = lazy(__name__, _HOMES)

__all__ = [
    "ConversationDataModule",
    "DPOModule",
    "PreferenceDataModule",
    "PretrainModule",
    "TextDataModule",
]

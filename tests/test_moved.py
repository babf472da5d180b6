"""What saved configurations, checkpoints and code of users name is found where it is now."""

import importlib
import sys

import pytest

import lightning_align
from lightning_align._moved import MOVED
from tests.helpers.children import forget_package, in_child

# Every public class and function by the path that a saved YAML file or checkpoint may hold.
# Frozen: lines are added, never changed.
SAVED = (
    "lightning_align.callbacks.async_checkpoint.AsyncCheckpoint",
    "lightning_align.callbacks.curriculum.Curriculum",
    "lightning_align.callbacks.generate_samples.GenerateSamples",
    "lightning_align.callbacks.lisa.LISA",
    "lightning_align.callbacks.metric_plot.MetricPlot",
    "lightning_align.callbacks.optimizer_swap.OptimizerSwap",
    "lightning_align.callbacks.preference_diagnostics.PreferenceDiagnostics",
    "lightning_align.callbacks.roofline.RooflineMonitor",
    "lightning_align.callbacks.save_pretrained.SavePretrained",
    "lightning_align.callbacks.spike_guard.SpikeGuard",
    "lightning_align.callbacks.token_schedule.TokenSchedule",
    "lightning_align.cli.AlignCLI",
    "lightning_align.completion.main",
    "lightning_align.data.curriculum_sampler.CurriculumSampler",
    "lightning_align.data.pacing.CurriculumScheduler",
    "lightning_align.data.difficulty.DifficultyIndex",
    "lightning_align.data.difficulty_map.DifficultyAnalyzer",
    "lightning_align.data.feedback.SelfPaced",
    "lightning_align.data.streams.StreamBatches",
    "lightning_align.export.export",
    "lightning_align.generate.stream",
    "lightning_align.layers.Head",
    "lightning_align.layers.ModelLayers",
    "lightning_align.layers.checkpoint_blocks",
    "lightning_align.layers.find_layers",
    "lightning_align.layers.is_hugging_face",
    "lightning_align.losses.difficulty.ReferenceLoss",
    "lightning_align.losses.difficulty.ReferenceMargin",
    "lightning_align.modules.conversation_data.ConversationDataModule",
    "lightning_align.modules.dpo.DPOModule",
    "lightning_align.modules.preference_data.PreferenceDataModule",
    "lightning_align.modules.pretrain.PretrainModule",
    "lightning_align.modules.text_data.TextDataModule",
    "lightning_align.optimizers.galore.GaLoreAdamW",
    "lightning_align.optimizers.muon.Muon",
    "lightning_align.optimizers.param_groups.build_param_groups",
    "lightning_align.optimizers.stable_adamw.StableAdamW",
    "lightning_align.planner.analyze.analyze_step",
    "lightning_align.planner.balance.MachineBalance",
    "lightning_align.planner.failures.Reliability",
    "lightning_align.planner.failures.TimeToTrain",
    "lightning_align.planner.failures.time_to_train",
    "lightning_align.planner.generation.GenerationCost",
    "lightning_align.planner.generation.predict_generation",
    "lightning_align.planner.hardware_spec.HardwareSpec",
    "lightning_align.planner.model_spec.ModelSpec",
    "lightning_align.planner.parallel_spec.ParallelSpec",
    "lightning_align.planner.planner.Plan",
    "lightning_align.planner.planner.Planner",
    "lightning_align.planner.report.StepReport",
    "lightning_align.planner.step_time.predict_step_time",
    "lightning_align.pretrained.build_model",
    "lightning_align.pretrained.save_pretrained",
    "lightning_align.pretrained_weights.parameters_on_meta",
    "lightning_align.run.exact_resume.ExactResume",
    "lightning_align.run.pictures.log_figure",
    "lightning_align.run.texts.log_rows",
    "lightning_align.schedule_command.main",
    "lightning_align.stability.SpikeDetector",
    "lightning_align.strategies.chain.ChainError",
    "lightning_align.strategies.failure.PipelineError",
    "lightning_align.strategies.pipeline.PipelineStrategy",
    "lightning_align.strategies.zero_infinity.ZeROInfinityStrategy",
    "lightning_align.tokenizer_state.pack_tokenizer",
    "lightning_align.trained.load_trained",
)


def imported(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", SAVED)
def test_a_saved_path_still_imports(path: str) -> None:
    assert getattr(imported(path), "__name__", None) == path.rpartition(".")[2]


def test_every_public_name_has_its_path_in_the_list() -> None:
    names = {path.rpartition(".")[2] for path in SAVED}
    rooms = {name for name in lightning_align.__all__ if name.islower() and "_" not in name}
    assert set(lightning_align.__all__) - rooms <= names


@pytest.mark.parametrize("old", MOVED)
def test_a_module_that_has_moved_is_the_one_in_the_new_place(old: str) -> None:
    there = importlib.import_module(f"lightning_align.{MOVED[old]}")
    assert importlib.import_module(f"lightning_align.{old}") is there
    assert there.__name__ == f"lightning_align.{MOVED[old]}"


def test_the_old_name_may_come_first() -> None:
    def run() -> None:
        forget_package()
        import lightning_align.trained

        assert lightning_align.trained.load_trained.__module__ == "lightning_align.models.trained"
        from lightning_align import trained

        assert trained is sys.modules["lightning_align.models.trained"]

    assert in_child(run) == 0


@pytest.mark.parametrize(
    "name", ["lightning_align.no_such_module", "lightning_align.export.nothing"]
)
def test_what_never_was_there_is_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)

"""A value out of its range."""

import torch

import lightning_align as la
from lightning_align import checkpointing, data, layers, losses, pipelining
from tests.mistakes.desk import GROWING, IDS, M

FAILURES = {"mtbf_s": 1.0, "checkpoint_s": 1.0, "restart_s": 1.0}
GPT = la.ModelSpec(2, 64, 4, vocab_size=9, seq_len=9)
MACHINE = la.HardwareSpec(1e12, 1e9, 1e9)
HEAD = layers.Head(torch.ones(4, 3))
HIDDEN = torch.ones(2, 3)

VALUES = [
    M("TextDataModule", "block_size", lambda d: d.text(block_size=0)),
    M("TextDataModule", "block_size", lambda d: d.fit(data=d.text(block_size=100_000))),
    M("TextDataModule", "vocab_size", lambda d: la.TextDataModule(vocab_size=10)),
    M("PreferenceDataModule", "max_length", lambda d: d.pairs(max_length=1)),
    M("ConversationDataModule", "val_fraction", lambda d: d.chats(val_fraction=1.0)),
    M("PretrainModule", "label_smoothing", lambda d: d.pretrain(label_smoothing=1.0)),
    M("DPOModule", "beta", lambda d: d.dpo(beta=-1.0)),
    M(
        "DPOModule",
        "ref_model_mixup_alpha",
        lambda d: d.dpo(sync_ref_model=True, ref_model_mixup_alpha=2.0),
    ),
    M("LISA", "activated_layers", lambda d: d.fit(la.LISA(40))),
    M("LISA", "interval_steps", lambda d: la.LISA(interval_steps=0)),
    M("AsyncCheckpoint", "save_top_k", lambda d: la.AsyncCheckpoint(save_top_k=3)),
    M("SnapshotEngine", "keep_last", lambda d: checkpointing.SnapshotEngine(keep_last=0)),
    M("TokenSchedule", "max_tokens", lambda d: la.TokenSchedule(0)),
    M("GenerateSamples", "max_new_tokens", lambda d: la.GenerateSamples(["a"], max_new_tokens=0)),
    M("GenerateSamples", "top_p", lambda d: la.GenerateSamples(["a"], top_p=2.0)),
    M(
        "PreferenceDiagnostics",
        "every_n_train_steps",
        lambda d: la.PreferenceDiagnostics(every_n_train_steps=0),
    ),
    M("RooflineMonitor", "every_n_steps", lambda d: la.RooflineMonitor(every_n_steps=0)),
    M("SpikeDetector", "window", lambda d: la.SpikeDetector(window=0)),
    M("SpikeGuard", "max_rewinds", lambda d: la.SpikeGuard("rewind", max_rewinds=-1)),
    M("Curriculum", "length", lambda d: la.Curriculum()),
    M("ExactResume", "seed", lambda d: la.ExactResume(seed=-1)),
    M("Muon", "lr", lambda d: la.Muon([torch.ones(2, 2)], lr=-0.1)),
    M("StableAdamW", "lr", lambda d: la.StableAdamW([torch.ones(2, 2)], lr=-0.1)),
    M("GaLoreAdamW", "rank", lambda d: la.GaLoreAdamW([torch.ones(2, 2)], rank=0)),
    M("PipelineStrategy", "num_microbatches", lambda d: la.PipelineStrategy(num_microbatches=0)),
    M(
        "ZeROInfinityStrategy",
        "offload_fraction",
        lambda d: la.ZeROInfinityStrategy(offload_fraction=2.0),
    ),
    M("HardwareSpec", "peak_flops", lambda d: la.HardwareSpec(-1.0, 1e9, 1e9)),
    M("ModelSpec", "num_heads", lambda d: la.ModelSpec(2, 64, 5, vocab_size=9, seq_len=9)),
    M("ParallelSpec", "devices", lambda d: la.ParallelSpec(devices=0)),
    M(
        "Plan",
        "",
        lambda d: la.Planner(MACHINE).predict(GPT, la.ParallelSpec(8, pipeline_parallel=8)),
    ),
    M(
        "GenerationCost",
        "",
        lambda d: la.predict_generation(GPT, MACHINE, prompt_length=1, new_tokens=0),
    ),
    M("Reliability", "mtbf", lambda d: la.Reliability(mtbf=-1)),
    M("TimeToTrain", "", lambda d: la.time_to_train(-1.0, **FAILURES)),
    M("MachineBalance", "peak_flops", lambda d: la.MachineBalance("mine", 0.0, 1.0)),
    M("StepReport", "fn", lambda d: la.analyze_step(torch.nn.Linear(1, 1), lambda: 3)),
    M("PreferenceOptions", "beta", lambda d: losses.PreferenceOptions(beta=0.0)),
    M(
        "CrossEntropy",
        "label_smoothing",
        lambda d: losses.linear_cross_entropy(HIDDEN, HEAD, IDS[:, 0], label_smoothing=2.0),
    ),
    M(
        "TokenLogprobs",
        "",
        lambda d: losses.linear_logprobs(HIDDEN, HEAD, IDS[0]),
    ),
    M(
        "UnpairedScores",
        "loss_type",
        lambda d: losses.unpaired_loss(HIDDEN[:, 0], HIDDEN[:, 0], IDS[:, 0], loss_type="sigmoid"),
    ),
    M("KLEstimate", "sums", lambda d: losses.kl_from_sums(torch.zeros(6))),
    M("PairLayout", "", lambda d: losses.lay_out_pairs(IDS[:1], IDS[:1])),
    M(
        "PairScores CompletionScores",
        "",
        lambda d: losses.PairScores(
            losses.CompletionScores(torch.ones(2), None),
            losses.CompletionScores(torch.ones(3), None),
        ),
    ),
    M("Mixture", "weights", lambda d: data.Mixture([4, 4], [1.0, -1.0])),
    M("MixtureSchedule", "", lambda d: data.MixtureSchedule([4, 4], [[1.0, 1.0]], [0, 5])),
    M("BatchSizes", "size", lambda d: data.BatchSizes([(0, 0)])),
    M("BucketSampler", "batch_size", lambda d: data.BucketSampler([4], [8], batch_size=0)),
    M("PositionSampler", "rank", lambda d: data.PositionSampler(8, 2, num_replicas=2, rank=2)),
    M(
        "CurriculumSampler",
        "batch_size",
        lambda d: data.CurriculumSampler([1, 2], data.CurriculumScheduler(GROWING), batch_size=0),
    ),
    M("SkippedBatches", "", lambda d: data.SkippedBatches([(5, 2)])),
    M(
        "ReferenceLoss",
        "batch_size",
        lambda d: losses.ReferenceLoss(d.pretrain().model, "a", batch_size=0),
    ),
    M("SimResult Event", "", lambda d: pipelining.simulate("1F1B", 2, 4, forward_cost=-1.0)),
    M("UnpairedDataset", "max_length", lambda d: data.UnpairedDataset([], 0, max_length=0)),
]

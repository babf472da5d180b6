"""The zoo: every member with what the laws must find."""

from functools import partial

from tests.laws import zoo, zoo_parts, zoo_tokens
from tests.laws.zoo import Row, refuses, warns

of_tokens = partial(Row, tokens=True)
BY_HAND = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
MICROBATCH = warns("batch norm and spectral norm go by")
RANDOM = warns("is another with other random numbers")
WHOLE_MODEL = refuses("it needs the whole model")
MANUAL = refuses("it optimizes manually")
AWAY = refuses("while it is not in memory")
READS_ALL = refuses("it reads or copies the whole model")
BY_ROWS = refuses("that of the same rows in one piece is")

ZOO = [
    Row("one nn.Sequential", zoo.Regression),
    # State
    Row("counter in an attribute", zoo.Counter, pipeline=BY_ROWS),
    Row("counter in validation", zoo.CounterInValidation),
    Row("list in validation", zoo.Outputs),
    Row("list in training", zoo.TrainingOutputs),
    Row("metric object in validation", zoo.MetricObject),
    Row("metric object in training", zoo.MetricInTraining),
    Row("buffer written in the step", zoo.Buffers, pipeline=BY_ROWS),
    Row("moving average in a dict", zoo.AverageInDict, zero=AWAY),
    Row("LSTM state in an attribute", zoo.Recurrent, pipeline=BY_ROWS),
    # Hooks
    Row("count in on_train_batch_end", zoo.CountsInHook),
    Row("factor drawn as an epoch begins", zoo.LossByEpoch, draws=True),
    Row("thawed in the second epoch", zoo.ThawByEpoch, unused=True),
    Row(
        "GradientAccumulationScheduler",
        zoo.AccumulateByEpoch,
        trainer={"accumulate_grad_batches": 1},
    ),
    Row(
        "BaseFinetuning",
        zoo.Finetuned,
        unused=True,
        drifts=True,
        pipeline=WHOLE_MODEL,
        zero=READS_ALL,
    ),
    Row("EMAWeightAveraging", zoo.Averaged, pipeline=WHOLE_MODEL, zero=READS_ALL),
    Row("own clipping", zoo.OwnClipping, trainer={"gradient_clip_val": None}),
    Row("clips with torch", zoo.ClipsByTorch),
    Row("logs grad_norm", zoo.LogsNorms),
    Row("own backward", zoo.OwnBackward, pipeline=refuses("backward")),
    Row("own optimizer_step", zoo.OwnStep),
    Row("on_after_batch_transfer", zoo.AugmentsOnDevice),
    # Optimization
    Row("manual optimization", zoo_parts.Manual, trainer=BY_HAND, pipeline=MANUAL, zero=MANUAL),
    Row("GAN", zoo_parts.Adversarial, trainer=BY_HAND, unused=True, pipeline=MANUAL, zero=MANUAL),
    Row("two schedulers", zoo_parts.Schedulers),
    Row("plateau of an own count", zoo_parts.Plateau),
    Row("parameter groups", zoo_parts.Groups),
    Row("frozen part", zoo_parts.Frozen),
    Row(
        "weight penalty",
        zoo_parts.Penalty,
        pipeline=refuses("weight of another stage"),
        zero=AWAY,
    ),
    Row("loss is a sum", zoo_parts.SumLoss, pipeline=refuses("loss_reduction")),
    Row(
        "step returns None at times",
        zoo_parts.SkipsSteps,
        ddp=refuses("Skipping the `training_step`"),  # Lightning's own words
        pipeline=refuses("a step must call each of them"),
    ),
    Row("step returns a dict", zoo_parts.ReturnsDict, pipeline=refuses("must return its loss")),
    # Layers
    Row("in-place layers", zoo_parts.InPlace),
    Row("shared layer", zoo_parts.SharedLayer),
    Row("BatchNorm", zoo_parts.Norms, pipeline=MICROBATCH),
    Row("spectral norm", zoo_parts.SpectralNorm, pipeline=MICROBATCH),
    Row("detach in the chain", zoo_parts.Detached),
    Row("activation checkpointing", zoo_parts.Checkpointed),
    Row("noise and dropout in the step", zoo_parts.DropPath, draws=True, pipeline=RANDOM),
    # Logs and loaders
    Row("reduce_fx max, min and sum", zoo_parts.Reductions),
    Row("two validation loaders", zoo_parts.TwoValidations),
    Row("two training loaders", zoo_parts.TwoLoaders),
    Row("predict_step", zoo_parts.Predicts),
    Row(
        "IterableDataset", zoo_parts.Streams, pipeline=refuses("all ranks must have the same batch")
    ),
    Row("shuffled rows", zoo_parts.Shuffles, draws_order=True),
    # Tokens
    of_tokens("self.model(x)", zoo_tokens.CallsModel),
    of_tokens("self(batch)", zoo_tokens.CallsSelf),
    of_tokens("keywords", zoo_tokens.Keywords),
    of_tokens(
        "mean over labelled rows", zoo_tokens.LabelledRows, pipeline=refuses("microbatch_weight")
    ),
    of_tokens("the same, weighed", zoo_tokens.WeighedRows),
    of_tokens(
        "F.linear with another weight",
        zoo_tokens.TiedByHand,
        pipeline=refuses("weight of another stage"),
    ),
    of_tokens("tied head", zoo_tokens.TiedHead),
    of_tokens(
        "code between layers",
        zoo_tokens.CodeBetweenLayers,
        pipeline=refuses("its step computes between layer 1"),
    ),
    of_tokens(
        "loss on an early layer",
        zoo_tokens.AuxiliaryLoss,
        pipeline=refuses("depends on the output of layer 1"),
    ),
    of_tokens("tuples between layers", zoo_tokens.Tuples),
    of_tokens("Hugging Face, labels=", zoo_tokens.HuggingFace),
    of_tokens("Hugging Face, labels= with gaps", zoo_tokens.HuggingFaceMasked),
    of_tokens("Hugging Face, logits and mask", zoo_tokens.HuggingFaceLogits),
]

# Column -> members whose verdict does not hold yet
PENDING: dict[str, set[str]] = {}

"""TRL's GRPOTrainer on a random Llama, with everything local: `python -m experiments.benchmarks.peers.trl_step`.

Run by `experiments.benchmarks.step`, which keeps the hub off. Generation is `transformers` with its cache (vLLM has no
place on a CPU), the batch is one micro-batch, the other options are TRL's defaults.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.benchmarks import record


def make_tokenizer(job: record.Job) -> PreTrainedTokenizerFast:
    """Words t1, t2, ... of the ids 1, 2, ...; the id after the vocabulary ends a sequence."""
    vocab = {"<pad>": record.PAD, **{f"t{i}": i for i in range(1, job.vocab)}, "<eos>": job.eos}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def save_model(job: record.Job, folder: Path) -> int:
    """Saves a random policy where the trainer reads the policy and the reference; returns its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=job.vocab, hidden_size=job.hidden, intermediate_size=job.mlp, num_hidden_layers=job.layers,
        num_attention_heads=job.heads, num_key_value_heads=job.heads, tie_word_embeddings=True,
        max_position_embeddings=job.prompt_len + job.new_tokens, pad_token_id=record.PAD, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_trainer(job: record.Job, folder: Path) -> GRPOTrainer:
    """The trainer over the job's prompts; `folder` holds the policy."""
    rows = [" ".join(f"t{i}" for i in ids) for prompts in job.prompt_ids() for ids in prompts]
    return GRPOTrainer(
        model=str(folder),
        processing_class=make_tokenizer(job),
        reward_funcs=lambda completion_ids, **_: [record.reward(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": rows}),
        args=GRPOConfig(
            output_dir=str(folder / "out"), max_steps=job.warmup + job.steps, per_device_train_batch_size=job.rows,
            num_generations=job.generations, max_completion_length=job.new_tokens, temperature=1.0,
            beta=record.BETA, learning_rate=record.LEARNING_RATE, use_cpu=True, bf16=False,
            gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
    )  # fmt: skip


def wrap(trainer: GRPOTrainer, name: str, around: Callable) -> None:
    """Replaces the trainer's method `name` by `around(method, *args, **kwargs)`."""
    setattr(trainer, name, functools.partial(around, getattr(trainer, name)))


def watch(trainer: GRPOTrainer, recorder: record.Recorder) -> None:
    """Times the phases inside the trainer's own loop."""

    def generate(method, *args, **kwargs):
        with recorder.phase("generate"):
            completions, logps = method(*args, **kwargs)
        recorder.gen_tokens += sum(len(ids) for ids in completions)
        return completions, logps

    def score(method, *args, **kwargs):
        if torch.is_grad_enabled():  # the policy's own pass, inside the update
            return method(*args, **kwargs)
        with recorder.phase("reference"):
            return method(*args, **kwargs)

    def prepare(method, *args, **kwargs):
        inputs = method(*args, **kwargs)
        recorder.start("update")  # forward, backward, clipping, optimizer: until the callback below
        return inputs

    class EndStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            recorder.stop()
            recorder.end_step()

    wrap(trainer, "_generate_single_turn", generate)
    wrap(trainer, "_get_per_token_logps_and_entropies", score)
    wrap(trainer, "_prepare_inputs", prepare)
    trainer.add_callback(EndStep())


def main() -> None:
    """Runs the job and prints its record."""
    recorder = record.Recorder()
    job = record.job_from_flags(__doc__)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        params = save_model(job, Path(folder))
        trainer = make_trainer(job, Path(folder))
        watch(trainer, recorder)
        trainer.train()
    recorder.print("trl", job, ("trl", "torch", "transformers"), params)


if __name__ == "__main__":
    main()

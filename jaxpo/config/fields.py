"""The fields of a run's config, with their defaults.

A config file has ``get_config()``: it starts from `default` and sets what differs. A block with a ``name`` (objective,
task, optimizer, schedule, tokenizer, ...) holds the arguments of what it names.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxpo.parallel import AXES
from jaxpo.policy import lora


def _optimizer(learning_rate: Any, name: Any = "adamw") -> ConfigDict:
    return ConfigDict(
        dict(
            name=name,
            learning_rate=learning_rate,
            clip_norm=config_dict.placeholder(float),
            schedule=dict(name="constant", warmup_steps=0),
        )
    )


def default() -> ConfigDict:
    """Every field of a run, with its default. Units: steps are iterations (one rollout batch each) unless said
    otherwise."""
    optional = config_dict.placeholder
    return ConfigDict(
        dict(
            seed=0,  # of parameters, prompt order and sampling; the task has its own
            # Modules of your own, which register what this config names: ("my_tasks", "my_package.objectives").
            imports=(),
            steps=100,  # iterations of reinforcement learning
            task=dict(name="toy"),  # None = none: the prompts are those of data, and nothing verifies answers
            data=dict(name=optional(str)),  # preferences: "jsonl", "datasets" or "task" (made of the task's answers)
            trace=optional(
                str
            ),  # "module:function" of (question, answer): tool calls that a reward model reads after it
            judge=dict(name="verifier"),  # of the policy's own answers, where a protocol compares them
            tokenizer=dict(name="characters"),
            policy=dict(name="transformer"),  # made here, or "pretrained"
            # Adapters beside a pretrained policy; rank 0 = none. path: a folder of peft with an adapter to start from;
            # rank, alpha and targets are then those of the folder.
            lora=dict(rank=0, alpha=32.0, targets=lora.TARGETS, path=optional(str)),
            heads=dict(embed=optional(int), gate=optional(int)),  # sizes of the heads that the objective asks for
            init_from=optional(str),  # run directory whose last checkpoint the parameters come from
            # Two run directories: the reference "soup" is alpha of the first and the rest of the second.
            soup=dict(of=(), alpha=0.5),
            # Models beside the policy, which stay as they are: a pretrained folder, a GGUF file, or a run directory.
            references=dict(
                teacher=optional(str),  # for objectives that need logp_teacher or compare with it
                reward_model=optional(str),  # a run of train_reward, for objectives that need model_score
            ),
            # A critic of its own starts from this model (a folder, a GGUF file or a run, also of train_reward); None =
            # the critic, where the objective has one, is a head on the policy.
            critic=dict(path=optional(str)),
            objective=dict(name="grpo"),
            optimizer=_optimizer(1e-4),
            # Of the parameters that a term of the objective trains apart; name None = the same as config.optimizer.
            optimizers=dict(critic=_optimizer(optional(float), name=optional(str))),
            rollout=dict(
                prompts=32,  # prompts per iteration
                responses=8,  # completions of each
                prompt_width=optional(int),  # None = the longest prompt; longer ones are dropped and counted
                scan_layers=False,  # one compiled layer for all when decoding: deep models compile in a minute
                # The mesh that samples, over the same devices; parameters are moved onto it before. All None = the mesh
                # that trains; else data = the rest, if not given, and the other axes 1.
                mesh={axis: optional(int) for axis in AXES},
            ),
            sampling=dict(
                max_new_tokens=32,
                temperature=1.0,
                top_k=optional(int),
                top_p=optional(float),
                min_p=optional(float),
                stop=(),
            ),
            training=dict(
                epochs=1,  # passes over a rollout batch
                minibatches=1,  # optimizer steps per pass
                microbatches=1,  # slices per optimizer step: memory only, the result is the same
                packing=False,  # short completions share rows (`jaxpo.policy.packing`): the result is the same
                offload_reference=False,  # the reference waits in the host's memory while it does not score
            ),
            policy_temperature=optional(float),  # at which the trainer scores; None = that of sampling
            warm_start=dict(
                steps=0,  # optimizer steps of supervised training before; 0 = none
                batch=128,  # demonstrations per step
                microbatches=1,  # slices per step: memory only
                drop_last=0.0,  # share of demonstrations that lose their last character (an imperfect demonstrator)
                optimizer=_optimizer(1e-3),
            ),
            evaluation=dict(
                every=20,  # iterations; the first and the last are always evaluated
                prompts=256,  # test prompts at most
                pass_at=(1, 4, 8),  # k of pass@k before and after; () = none
                samples=8,
            ),  # completions per prompt for pass@k
            checkpoint=dict(
                every=50,  # iterations
                keep=2,  # the last ones
                keep_best=optional(str),  # and the one with the highest eval/greedy, eval/reward or eval/accuracy
                directory=optional(str),  # a bucket (gs://...) or a folder; None = WORKDIR/checkpoints
            ),
            mesh=dict(data=-1, fsdp=1, expert=1, context=1, tensor=1),  # see docs/scaling.md
            protocol=dict(name=optional(str)),  # how data is gathered; None = as the objective says
            logging=dict(tensorboard=False, wandb_project=optional(str), samples=8, plot_seconds=20.0),
            nonfinite_patience=5,  # consecutive skipped steps before the run stops
            compilation_cache=optional(str),
        )
    )  # folder; None = the user's cache folder

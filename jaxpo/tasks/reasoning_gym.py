"""Procedural tasks of the reasoning_gym library, with its verifiers."""

import dataclasses
import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from jaxpo.arguments import Domain, Positive, Whole
from jaxpo.registry import register, unknown
from jaxpo.tasks.base import Example, Score, Task, split, verdict
from jaxpo.tasks.plain import is_algebra, is_arithmetic, is_literal
from jaxpo.tasks.rewards import extract_answer, present
from jaxpo.tasks.workers import runner

# Datasets whose verifiers reward wrong answers: training on them teaches nothing.
REFUSED = {
    "game_of_life_halting": "its verifier gives full credit to any completion",
    "puzzle24": "its verifier ignores which numbers are used",
}
# Datasets whose verifiers run the completion as Python (eval, sympy's parser), and what it must be before they see it:
# anything else scores 0.
EVALUATES = {
    "binary_matrix": is_literal,
    "countdown": is_arithmetic,
    "intermediate_integration": is_algebra,
    "n_queens": is_literal,
    "polynomial_multiplication": is_algebra,
    "simple_integration": is_algebra,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
}
# Those, and one whose verifier only computes what it reads (Fraction("1e999999999")), can hang: they run in worker
# processes.
HANGS = frozenset({*EVALUATES, "coin_flip"})

# An item's seed is `seed + index`. Every run seed owns a block of consecutive item seeds: half for testing, half for
# training.
HALF = 1_000_000
SEEDS = 2**32 // (2 * HALF)  # some datasets seed numpy, which takes 32 bits
Size = Annotated[int, Domain(1, HALF, whole=True)]
Seed = Annotated[int, Domain(0, SEEDS - 1, whole=True)]


@register("task")
def reasoning_gym(
    dataset: str,
    train_size: Size,
    test_size: Size,
    seed: Seed,
    partial_credit: bool = False,
    extract: str = "text",
    prompt_field: str | None = None,
    prompt: str = "{}",
    timeout: Positive | None = None,
    workers: Whole | None = None,
    **dataset_config: Any,
) -> Task:
    """A task from a dataset of reasoning_gym: ``reasoning_gym("spell_backward", 4000, 200, seed=0, max_word_len=6)``.

    The test set is made first. Training items whose question occurs in it are removed, so ``train`` may be shorter than
    ``train_size``; the report says by how much.

    Args:
      dataset: its name in reasoning_gym.
      train_size, test_size: items to generate, at most 1,000,000 each: more would share item seeds.
      seed: different seeds share no item seed, and neither do training and testing.
      partial_credit: the reward is the verifier's score; otherwise it is 1 for the full score and 0 for less. Off by
        default, because some verifiers' partial credit grows with padding.
      extract: where the completion has its answer (``rewards.EXTRACT``); ``text`` is all of it, stripped.
      prompt_field: field of the item's metadata to ask instead of the whole question, such as "word": a policy trained
        from scratch cannot use the instructions, which are the same in every item. None = the question.
      prompt: template of the prompt, with ``{}`` for the question or field: "What is {}? Answer with the number only."
      timeout, workers: seconds for one verdict and number of worker processes. Verifiers that evaluate the completion
        (``EVALUATES``, which get only plain expressions) run in confined workers with 5 s by default; the others run in
        this process unless one of the two is given.
      **dataset_config: fields of the dataset's own config.

    Raises:
      ValueError: unknown dataset, field or ``extract`` (with the nearest), a value the dataset refuses, sizes or a seed
        out of range, or a dataset whose verifier is worthless (all raised before anything is built); or no training
        item is left.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    _check(dataset, dataset_config, DATASETS)
    if prompt.count("{}") != 1:
        raise ValueError(f"task.prompt must hold {{}} once, where the question goes, not {prompt!r}")
    extract_answer("", extract)

    def items(size: int, first_seed: int) -> list[Example]:
        try:
            source = create_dataset(dataset, size=size, seed=first_seed, **dataset_config)
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"reasoning_gym dataset {dataset!r} refuses its config: {error}") from error
        return [
            Example(i, prompt.replace("{}", _prompt(e, prompt_field)), e["answer"], e) for i, e in enumerate(source)
        ]

    if dataset in EVALUATES:
        print(
            f"reasoning_gym/{dataset}: its verifier evaluates completions as Python; only plain ones reach it, in "
            "confined worker processes (docs/trust.md)"
        )
    config = pickle.dumps(dataset_config)
    verify = runner(
        functools.partial(_verify, dataset, config, extract),
        isolate=dataset in HANGS,
        timeout=timeout,
        workers=workers,
        prepare=functools.partial(_source, dataset, config),
    )
    test = items(test_size, 2 * HALF * seed)
    train, test, report = split(items(train_size, 2 * HALF * seed + HALF), test)

    def score(examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        outcomes = verify([(e.entry, text) for e, text in zip(examples, texts, strict=True)])
        return [verdict(*outcome, partial_credit) for outcome in outcomes]

    return Task(f"reasoning_gym/{dataset}", train, test, score, _demonstrator(dataset, extract), report)


def _prompt(item: Mapping[str, Any], field: str | None) -> str:
    if field is None:
        return item["question"]
    if field not in item["metadata"]:
        raise ValueError(unknown("task.prompt_field", field, item["metadata"]))
    return str(item["metadata"][field])


def _check(dataset: str, config: dict[str, Any], datasets: dict[str, tuple]) -> None:
    if dataset not in datasets:
        raise ValueError(unknown("reasoning_gym dataset", dataset, datasets))
    if dataset in REFUSED:
        raise ValueError(f"reasoning_gym dataset {dataset!r} cannot be trained on: {REFUSED[dataset]}")
    if dataset == "composite":
        raise ValueError("reasoning_gym dataset 'composite' hides the verifiers of its parts: name one of them instead")
    fields = {f.name for f in dataclasses.fields(datasets[dataset][1])} - {"seed", "size"}
    for name in config:
        if name not in fields:
            own = inspect.signature(reasoning_gym).parameters.keys() - {"dataset_config"}
            raise ValueError(unknown(f"argument of reasoning_gym dataset {dataset!r}", name, fields | own))


def _verify(dataset: str, config: bytes, extract: str, entry: dict[str, Any], completion: str) -> float:
    """The dataset's own score; 0 if the completion has no answer to extract, or one that would run as a program. Worker
    processes import it by name."""
    answer = extract_answer(completion, extract)
    if answer is None or not harmless(dataset, answer.strip(), entry):
        return 0.0
    return _source(dataset, config).score_answer(answer.strip(), entry)


def harmless(dataset: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a verifier that evaluates its answers may see this one: one of its own right answers, or plain."""
    if dataset not in EVALUATES:
        return True
    right = (entry["answer"], *entry["metadata"].get("valid_answers", ()))
    return answer in right or EVALUATES[dataset](answer)


@functools.lru_cache(maxsize=8)
def _source(dataset: str, config: bytes) -> Any:
    """The dataset that verifies. Each process builds it from its name, because some datasets cannot be pickled."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(dataset, size=1, seed=0, **pickle.loads(config))


def _demonstrator(dataset: str, extract: str) -> Callable[[Example], str]:
    def demonstrate(example: Example) -> str:
        if example.answer is None:
            raise ValueError(f"reasoning_gym dataset {dataset!r} has no answers to demonstrate: it only offers rewards")
        return present(example.answer, extract)

    return demonstrate

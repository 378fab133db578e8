"""One table of the fields that a batch may hold: their axes, their range, who gives them, and an example.

A field has one name everywhere: ``Rollouts(logp_ref=...)``, ``batch.get("logp_ref")``, errors and docs. A new field is
a new line of ``FIELDS``; what data, judges and protocols may give, what is a probability, and what the contracts draw
are questions to this table.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxpo.registry import unknown

PAIR = ("chosen", "rejected")
EDITS = ("truth", "revised", "original")  # an expert's edits beside the ground truth (OPA-DPO)
ROLES = (
    *("own", "expert", "replay", "rehearsal", "ptx", "hinted", "previous", *PAIR, "kl"),
    # "A_given_B": answer A to the prompt with B as a draft
    *("chosen_given_rejected", "rejected_given_chosen", "chosen_given_chosen", "rejected_given_rejected"),
    *("rationale", *EDITS[:2], EDITS[2], "truth_corrupted", "revised_corrupted"),
    *("matching", "violating", "multi_chosen", "multi_rejected"),  # one answer to two prompts, a pair to a longer one
)
Giver = Literal["loop", "reference", "data", "judge", "protocol", "task", "user"]
Draw = Callable[[np.random.Generator, int, int], np.ndarray]

GIVERS: dict[str, str] = {
    "loop": "the training loop gives it",
    "reference": "the training loop gives it by scoring the batch under a frozen reference",
    "data": "preference data (config.data) may give it",
    "judge": "a judge (config.judge) of the policy's own answers may give it",
    "protocol": "the protocol that the objective names gives it",
    "task": "the rewards of the task give it, a column each (config.task.rewards)",
    "user": "your own data or reward has to give it",
}


class Field(NamedTuple):
    """A field of a batch.

    axes: "row" = [B], "token" = [B, T], "vector" = [B, M], "token vector" = [B, T, M].
    says: what it is, in a line.
    givers: who may give it; keys of ``GIVERS``.
    share: whether it must lie in [0, 1].
    example: ``(rng, B, T) -> array``, what the contracts draw.
    """

    axes: Literal["row", "token", "vector", "token vector"]
    says: str
    givers: tuple[Giver, ...]
    share: bool = False
    example: Draw = lambda rng, b, t: rng.normal(size=b)

    @property
    def home(self) -> str:
        """The dictionary of `jaxpo.batch.Rollouts` that holds it, if it is no attribute of its own."""
        return "per_token" if self.axes.startswith("token") else "per_row"

    @property
    def shape(self) -> str:
        """Its shape, for messages."""
        return {"row": "[B]", "token": "[B, T]", "vector": "[B, M]", "token vector": "[B, T, M]"}[self.axes]


def uniform(low: float = 0.0, high: float = 1.0, *more: int) -> Draw:
    """Draws of a number a row (or ``more`` of them)."""
    return lambda rng, b, t: rng.uniform(low, high, (b, *more))


def cycled(*values: float) -> Draw:
    """The same values over and over."""
    return lambda rng, b, t: np.resize(values, b)


def integers(low: int, high: int, *more: int) -> Draw:
    """Whole numbers from ``low`` to ``high - 1``."""
    return lambda rng, b, t: rng.integers(low, high, (b, *more))


def normal(*more: int) -> Draw:
    """Normal draws of ``more`` numbers a row."""
    return lambda rng, b, t: rng.normal(size=(b, *more))


def tokens(draw: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]) -> Draw:
    """A number a token."""
    return lambda rng, b, t: draw(rng, (b, t))


def logp(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Log-probs that no softmax has given."""
    return rng.normal(-2, 0.5, shape)


FIELDS: dict[str, Field] = {
    # ---- what the loop knows of every batch
    "tokens": Field("token", "prompt, left-padded, and completion, right-padded: [B, P+T]", ("loop", "data")),
    "mask": Field("token", "1 on the tokens that the policy sampled", ("loop", "data")),
    "prompt_length": Field("row", "real prompt tokens among the P", ("loop", "data")),
    "count": Field("row", "multiplicity of a row; 0 = left out", ("loop",)),
    "group": Field("row", "rows with the same number answer the same prompt", ("loop",)),
    "role": Field("row", "index into jaxpo.fields.ROLES", ("loop", "data")),
    "prompt": Field("row", "index of the prompt in its data set", ("loop",)),
    "seed": Field("row", "a fresh random number of the row", ("loop",)),
    "reward": Field("row", "what the verifier, the judge or the data say of the answer", ("loop", "data")),
    "correct": Field("row", "1 = the answer is right, before any shaping", ("loop",)),
    "truncated": Field("row", "1 = the length limit ended the answer", ("loop",)),
    "logp_old": Field("token", "log-probs under the policy at the start of the iteration", ("loop",)),
    "logp_beh": Field("token", "log-probs as the sampler recorded them", ("loop",)),
    "entropy_old": Field("token", "entropies of the policy at the start of the iteration", ("loop",)),
    "value_old": Field("token", "values of the critic at the start of the iteration", ("loop",)),
    "adv": Field("token", "advantages, written by `prepare`", ()),
    "logp_sampler": Field("token", "log-probs under the sampler's own distribution", ("loop",)),
    # ---- what frozen references say
    "logp_ref": Field("token", "log-probs under the reference policy", ("reference",), example=tokens(logp)),
    "logp_prev": Field(
        "token", "log-probs under the policy of the previous round", ("reference",), example=tokens(logp)
    ),
    "logp_ema": Field("token", "log-probs under an average of past policies", ("reference",), example=tokens(logp)),
    "logp_soup": Field("token", "log-probs under the average of two models", ("reference",), example=tokens(logp)),
    "logp_teacher": Field("token", "log-probs under a teacher model", ("reference",), example=tokens(logp)),
    "model_score": Field("row", "score of the reward model beside the policy", ("reference",)),
    # ---- preferences
    "pref_prob": Field("row", "probability that chosen is preferred", ("data", "judge"), True, uniform()),
    "win": Field("row", "probability that the answer beats its opponents", ("data", "judge"), True, uniform()),
    "pref_opp": Field("row", "probability that the answer beats another one's", ("judge",), True, uniform()),
    "label": Field("row", "1 = a good answer, 0 = a bad one", ("data", "judge"), True, cycled(1, 0, 0, 1, 0, 1)),
    "margin": Field("row", "how much better chosen is", ("data", "judge")),
    "rm": Field("row", "score of a reward model", ("data", "judge")),
    "pref_score": Field("row", "mean preference score against the opponents", ("data", "judge")),
    "rm_scores": Field("vector", "scores of M reward models", ("data",), example=normal(2)),
    "severity": Field(
        "token",
        "weight of a token by the severity of an edit",
        ("data",),
        example=tokens(lambda rng, shape: rng.uniform(0.5, 3, shape)),
    ),
    "relevance": Field(
        "token",
        "weight of a token by its relevance to the image or context",
        ("data",),
        example=tokens(lambda rng, shape: rng.uniform(0.5, 3, shape)),
    ),
    "segment": Field(
        "token",
        "kind of a trace's token: answer or tool call",
        ("data",),
        example=tokens(lambda rng, shape: rng.integers(0, 4, shape)),
    ),
    # ---- protocols
    "tracker_value": Field("row", "the prompt's value before the step", ("protocol",), example=uniform()),
    "tracker_reward": Field("row", "the reward before any shaping", ("protocol",)),
    "flawed": Field(
        "row", "1 = the answer is right and holds a wrong step", ("protocol",), example=cycled(0, 1, 1, 0, 1, 0)
    ),
    "token_adv": Field("token", "advantage of each token, from a critic of your own", ("user",), example=tokens(logp)),
    "expert_prob": Field(
        "token",
        "probability that the author of an expert row gave to the token",
        ("user",),
        example=tokens(lambda rng, shape: rng.uniform(0.1, 1, shape)),
    ),
    "hint_mask": Field(
        "token",
        "1 on the tokens of a hint, which begin the answer and are trained",
        ("protocol",),
        example=tokens(lambda rng, shape: rng.integers(0, 2, shape)),
    ),
    "off_mask": Field(
        "token",
        "1 on the tokens that a corrector wrote",
        ("protocol",),
        example=tokens(lambda rng, shape: rng.integers(0, 2, shape)),
    ),
    "edge_adv": Field("row", "advantage of an edge of the tree", ("protocol",)),
    "mc_value": Field(
        "token",
        "Monte-Carlo value of the prefix before a cutpoint",
        ("protocol",),
        example=tokens(lambda rng, shape: rng.uniform(size=shape)),
    ),
    "returns": Field("token", "what the critic learns, written by `prepare`", (), example=tokens(logp)),
    # ---- a chain of Gaussian steps, in place of tokens
    "mean_ref": Field(
        "token vector",
        "mean of each step under the reference policy",
        ("user",),
        example=lambda rng, b, t: rng.normal(size=(b, t, 3)),
    ),
    "sigma": Field(
        "token",
        "standard deviation of each step",
        ("user",),
        example=tokens(lambda rng, shape: rng.uniform(0.5, 1, shape)),
    ),
    "sqrt_dt": Field(
        "token",
        "square root of each step's length",
        ("user",),
        example=tokens(lambda rng, shape: rng.uniform(0.1, 0.5, shape)),
    ),
    # ---- what only the user's own data or rewards know
    "rewards_multi": Field("vector", "several rewards", ("task", "user"), example=uniform(0, 1, 3)),
    "reward_weights": Field(
        "vector", "weight of each reward; 0 = no say", ("task", "user"), example=uniform(0.1, 1, 3)
    ),
    "cand_scores": Field("vector", "scores of M reward models", ("user",), example=normal(3)),
    "adapter_logits": Field("vector", "weights of M reward models before the softmax", ("user",), example=normal(3)),
    "obj_scores": Field("vector", "helpfulness, safety, P[Love]", ("user",), example=normal(3)),
    "pos_ll": Field("vector", "log-likelihood of a happy user's next words", ("user",), example=normal(2)),
    "neg_ll": Field("vector", "log-likelihood of an unhappy user's next words", ("user",), example=normal(2)),
    "rel_query": Field("row", "relevance of the answer to the question", ("user",)),
    "rel_answer": Field("row", "relevance of the answer to the reference answer", ("user",)),
    "open_ended": Field("row", "1 = the question is open-ended", ("user",), example=cycled(1, 0, 0)),
    "num_words": Field("row", "words of the answer", ("user",), example=integers(1, 9)),
    "num_tri": Field("row", "trigrams of the answer", ("user",), example=cycled(4, 0, 6)),
    "uniq_tri": Field("row", "different trigrams of the answer", ("user",), example=cycled(3, 0, 5)),
    "likert": Field("row", "rating from 1 to 5", ("user",), example=integers(1, 6)),
    "choice": Field("row", "the option that was chosen; -1 = none", ("user",), example=integers(-1, 3)),
    "satisfies": Field("vector", "1 = the option satisfies the requirement", ("user",), example=integers(0, 2, 3)),
    "cost": Field("vector", "cost of each option", ("user",), example=uniform(1, 3, 3)),
}


def given_by(*givers: Giver) -> frozenset[str]:
    """The fields that one of these may give."""
    return frozenset(name for name, field in FIELDS.items() if set(field.givers) & set(givers))


SHARES = frozenset(name for name, field in FIELDS.items() if field.share)
LOOP = given_by("loop") - {"prompt_length", "logp_sampler"}  # what every batch of the training loop has
NUMBERS = ("pref_prob", "margin", "win", "rm", "pref_score")  # what data may say of a pair or of its answers
VECTORS = tuple(n for n, f in FIELDS.items() if f.axes == "vector" and "data" in f.givers)
OF_UNIT = ("pref_prob", "margin")  # of a whole unit of answers: its first row holds it
WEIGHTS = ("severity", "relevance")  # of the tokens of an answer
JUDGED = given_by("judge")
GIVEN = frozenset(n for n in given_by("data") if FIELDS[n].home == "per_row") - {"prompt_length", "role"}


def role_id(name: str) -> int:
    """The number of a role in ``Rollouts.role``; ``ValueError`` with the nearest role if there is none."""
    if name not in ROLES:
        raise ValueError(unknown("role", name, ROLES))
    return ROLES.index(name)


def home_of(name: str) -> str:
    """The dictionary, per_token or per_row, in which a batch holds a field that is no attribute of its own.

    A field ``logp_<name>`` that is not in the table is a log-prob of its own [B, T].

    Raises:
      ValueError: no such field, with the nearest.
    """
    if name in FIELDS:
        return FIELDS[name].home
    if name.startswith("logp_"):
        return "per_token"
    hint = unknown("field of a batch", name, FIELDS)
    raise ValueError(f"{hint}; a field of your own goes into per_token=dict({name}=...) or per_row=dict({name}=...)")


def missing(name: str) -> str:
    """Where a field that a batch lacks goes, and who would give it."""
    field = FIELDS.get(name) or (FIELDS["logp_ref"] if name.startswith("logp_") else None)
    if field is None:
        return f"pass per_token=dict({name}=...) [B, T] or per_row=dict({name}=...) [B]: it is a field of your own"
    what = f" ({FIELDS[name].says})" if name in FIELDS else ""
    who = "; ".join(GIVERS[g] for g in field.givers)
    return f"pass Rollouts({name}=...) {field.shape}{what}" + (f"; in a run {who}" if who else "")
